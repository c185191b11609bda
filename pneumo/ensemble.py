"""Checkpoints times mirror to probabilities, streamed: models are loaded once, memory does not grow with the images.

Imports config, data, engine, model, training, dist.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pneumo import checkpoint, engine, training
from pneumo.config import Recipe
from pneumo.errors import DataError, UsageError
from pneumo.model.unet import UNet


@dataclass(frozen=True)
class Ensemble:
    """The networks of some folds, ready to predict.

    Attributes:
        models: one per fold, on the device, in evaluation.
        image_size: side of the images they take, pixels.
        sources: path and sha256 of each checkpoint.
        dtype: autocast type.
        mirror: average with the mirrored image.
        data: hash of the images and annotations that they were trained on.
        split: hash of the folds.
    """

    models: tuple[nn.Module, ...]
    image_size: int
    sources: dict[str, str]
    dtype: torch.dtype
    mirror: bool
    data: str
    split: str


def load(recipe: Recipe, folds: Sequence[int], device: torch.device) -> Ensemble:
    """Load the best networks of the recipe's last stage.

    Raises:
        UsageError: a fold is not trained to the end; gives the command.
        DataError: a checkpoint is damaged, or the folds were trained on different data or splits.
    """
    stage = recipe.stages
    models, sources, origins = [], {}, set()
    for fold in folds:
        folder = recipe.stage_folder(fold, stage)
        command = f"make train FOLD={fold} STAGE={stage}" + ("" if recipe.name == "seed" else f" RECIPE={recipe.name}")
        try:
            state = training.load_best(folder, digest=None, split=None, fold=fold, command=command)
        except UsageError as error:
            raise UsageError(f"fold {fold} cannot predict: {error}, or choose folds with --folds") from None
        if state["settings"][f"stage.{stage}.image_size"] != recipe.stage[stage].image_size:
            raise UsageError(
                f"{folder / 'best.pt'} was trained at {state['settings'][f'stage.{stage}.image_size']} px, the recipe "
                f"now says stage.{stage}.image_size={recipe.stage[stage].image_size}"
            )
        model = UNet(
            state["settings"]["model.encoder"],
            pretrained=False,
            decoder_channels=state["settings"]["model.decoder_channels"],
        )
        model.load_state_dict(state["model"])
        models.append(model.to(device, memory_format=torch.channels_last).eval())
        sources[str(folder / "best.pt")] = checkpoint.sha256(folder / "best.pt")
        origins.add((state["digest"], state["split"]))
    if len(origins) > 1:
        raise DataError(f"the folds {list(folds)} of {recipe.folder} were not trained on one split of one data set")
    data, split = origins.pop()
    dtype = engine.autocast_dtype(recipe.train.amp, device)
    return Ensemble(tuple(models), recipe.stage[stage].image_size, sources, dtype, recipe.predict.mirror, data, split)


@torch.inference_mode()
def predict(ensemble: Ensemble, image: Tensor) -> Tensor:
    """Average the networks' probabilities, each with its mirror image.

    Args:
        image: (B, 1, S, S) uint8, on the models' device.

    Returns:
        (B, 1, S, S) float32.
    """
    views = torch.cat([image, image.flip(-1)]) if ensemble.mirror else image
    total = torch.zeros(views.shape, dtype=torch.float32, device=views.device)
    for model in ensemble.models:
        total += engine.predict_logits(model, views, ensemble.dtype).sigmoid()
    probs = total / len(ensemble.models)
    if ensemble.mirror:
        plain, mirrored = probs.chunk(2)
        probs = (plain + mirrored.flip(-1)) / 2
    return probs


def parse_folds(text: str, count: int) -> list[int]:
    """Read "0,2" or "all".

    Raises:
        UsageError: not numbers below `count`, or one twice.
    """
    if text == "all":
        return list(range(count))
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < count for part in parts) or len(set(parts)) < len(parts):
        raise UsageError(f"--folds {text}: expected all, or different numbers from 0 to {count - 1} as 0,1")
    return [int(part) for part in parts]
