"""Checkpoints times mirror to probabilities, streamed: models are loaded once, memory does not grow with the images.

Imports config, engine, model, decision, measured, stages, checkpoint, log, errors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pneumo import checkpoint, engine, log, measured, stages
from pneumo.config import ModelConfig, Recipe
from pneumo.decision import tables
from pneumo.decision.rule import LEVELS, resize_quantise
from pneumo.errors import DataError, NotFiniteError, UsageError, one_line
from pneumo.model.folded import FoldedUNet
from pneumo.model.unet import UNet


@dataclass(frozen=True)
class Ensemble:
    """The networks of some folds, ready to predict.

    Attributes:
        models: for each fold its networks, one or, of averaged epochs, several; on the device, in evaluation.
        image_size: side of the images they take, pixels.
        sources: path and sha256 of each checkpoint.
        dtype: autocast type.
        mirror: average with the mirrored image.
        data: hash of the images and annotations that they were trained on.
        split: hash of the folds.
        batch_size: images that `predict` is given at a time.
        settings: what the first fold was trained under, as far as it is `pneumo.config.essential`.
    """

    models: tuple[tuple[nn.Module, ...], ...]
    image_size: int
    sources: dict[str, str]
    dtype: torch.dtype
    mirror: bool
    data: str
    split: str
    batch_size: int
    settings: dict[str, Any]


def load(recipe: Recipe, folds: Sequence[int], device: torch.device) -> Ensemble:
    """Load the networks of the recipe's last stage that `predict.weights` names.

    Raises:
        UsageError: a fold is not trained to the end, or did not keep these weights; gives the command.
        DataError: a checkpoint is damaged, or the folds were trained on different data or splits.
    """
    stage = recipe.stages
    if not recipe.folder.is_dir():
        some = "" if len(folds) == recipe.folds.count else f" FOLDS={','.join(map(str, folds))}"
        raise UsageError(
            f"{recipe.folder.absolute()}: no such folder, so nothing is trained. Run: {recipe.command(f'cv{some}')}, "
            f"or say where it is: --set runs=DIR"
        )
    engine.make_room(device)
    models: list[tuple[FoldedUNet, ...]] = []
    sources, origins, trained = {}, set(), {}
    dtype = engine.autocast_dtype(recipe.train.amp, device)
    for fold in folds:
        folder = recipe.stage_folder(fold, stage)
        try:
            stages.check_finished(folder, recipe.command(f"cv FOLDS={fold}"))
        except UsageError as error:
            raise UsageError(f"fold {fold} cannot predict: {error}, or choose folds with --folds") from None
        networks = []
        for path in _files(recipe, folder):
            state = stages.load_weights(path, digest=None, split=None, fold=fold)
            if (side := state["settings"].get(f"stage.{stage}.image_size")) != recipe.stage[stage].image_size:
                raise UsageError(
                    f"{path} was trained at {side} px, the recipe now says "
                    f"stage.{stage}.image_size={recipe.stage[stage].image_size}"
                )
            if (grid := state["settings"].get("data.annotation_size")) != recipe.data.annotation_size:
                raise UsageError(
                    f"{path} was trained for an annotation grid of {grid} px, the recipe now says "
                    f"data.annotation_size={recipe.data.annotation_size}"
                )
            trained[fold] = stages.trained_under(folder, stage, state)
            networks.append(FoldedUNet(build(state, path).to(device), dtype).eval())
            sources[str(path)] = checkpoint.sha256(path)
            origins.add((state["digest"], state["split"]))
        models.append(tuple(networks))
    if len(origins) > 1:
        raise DataError(f"the folds {list(folds)} of {recipe.folder} were not trained on one split of one data set")
    warn_of_differences(recipe.folder, trained)
    side = recipe.stage[stage].image_size
    batch_size = measured.evaluation_batch(recipe, models[0][0], side, dtype, device)
    mirror, settings = recipe.predict.mirror, trained[folds[0]]
    return Ensemble(tuple(models), side, sources, dtype, mirror, *origins.pop(), batch_size, settings)


def warn_of_differences(folder: Path, trained: Mapping[int, dict[str, Any]]) -> None:
    """Tell which folds of a run were trained under other settings than its first: their networks answer as one.

    Args:
        trained: by fold, `Ensemble.settings`.
    """
    first, *others = trained
    for fold in others:
        if changed := log.changes(trained[first], trained[fold]):
            log.warn(f"fold {fold} of {folder} was trained otherwise than fold {first} ({'; '.join(changed)})")


def build(state: dict[str, Any], path: Path) -> UNet:
    """The network of a checkpoint.

    Args:
        state: from `stages.load_weights`.
        path: the file it is from, for the error.

    Raises:
        DataError: it holds no such network, or weights of another.
    """
    settings = state["settings"]
    try:
        channels = ModelConfig(
            encoder=settings["model.encoder"],
            pretrained=False,
            decoder_channels=tuple(settings["model.decoder_channels"]),
            upsample="auto",
            checkpointing=False,
        ).decoder_channels
        model = UNet(settings["model.encoder"], pretrained=False, decoder_channels=channels)
        model.load_state_dict(state["model"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path} holds no network that can be built: {one_line(error)[:300]}") from None
    return model


def _files(recipe: Recipe, folder: Path) -> list[Path]:
    """The checkpoints of a finished stage that `predict.weights` names."""
    if recipe.predict.weights == "average":
        paths = sorted(folder.glob(stages.KEPT.format("*")))
        if not paths:
            raise UsageError(
                f"{folder} kept the weights of one epoch only; predict.weights=average needs a run with "
                f"train.keep_best above 1"
            )
        return paths
    path = folder / f"{recipe.predict.weights}.pt"
    if not path.exists() and recipe.predict.weights == "ema":
        raise UsageError(f"{path}: not there; predict.weights=ema needs a run with train.ema above 0, as 0.999")
    return [path]


class Prediction(NamedTuple):
    """What an ensemble says of B images, on the annotation grid, on the host.

    Attributes:
        q: (B, A, A) uint8 quantised probabilities.
        agreement: (B, F, 257) float64, of each fold's networks with themselves on the mirror image, their mean; 1
            without mirror. See `pneumo.decision.tables.agreement`.
        histograms: (B, F, 256) int64, pixels by quantised probability of each fold's networks alone.

    The last two mean the same of one fold as of several, so what was learned from them out of fold, where one fold
    predicts, holds for each fold of an ensemble. Of the average of probabilities that is not true: where networks
    disagree it is vaguer than each of them, and no worse.
    """

    q: np.ndarray
    agreement: np.ndarray
    histograms: np.ndarray


@torch.inference_mode()
def predict(
    ensemble: Ensemble, image: Tensor, annotation_size: int, names: Sequence[str], boxes: np.ndarray | None = None
) -> Prediction:
    """Average the networks' probabilities, each with its mirror image, and bring them to the annotation grid.

    Args:
        image: (B, 1, S, S) uint8, on the models' device.
        annotation_size: side of the annotation grid, A.
        names: of the B images, for the error.
        boxes: where each lies on the annotation grid, and not its padding to a square, as `Pack.boxes` gives it;
            nothing is found elsewhere.

    Raises:
        NotFiniteError: a probability is not a number; it would have become an innocent empty mask.
    """
    mean = torch.zeros(image.shape, dtype=torch.float32, device=image.device)
    histograms, alike = [], []
    for networks in ensemble.models:
        total, own = torch.zeros(image.shape, dtype=torch.float32, device=image.device), []
        for views in _views(ensemble, networks, image):
            for probs in views:
                total += probs
            if ensemble.mirror:
                own.append(tables.agreement(*(resize_quantise(probs, annotation_size, boxes) for probs in views)))
        total /= len(networks) * len(views)
        mean += total / len(ensemble.models)
        q = resize_quantise(total, annotation_size, boxes)
        histograms.append(tables.histogram(q))
        certain = torch.ones(len(image), LEVELS + 1, dtype=torch.float64, device=q.device)
        alike.append(torch.stack(own).mean(dim=0) if own else certain)
    finite = mean.isfinite().flatten(1).all(dim=1).tolist()
    if bad := [name for name, good in zip(names, finite, strict=True) if not good]:
        raise NotFiniteError(f"the networks' probabilities of {', '.join(bad[:5])} are not numbers")
    if len(ensemble.models) > 1:
        q = resize_quantise(mean, annotation_size, boxes)
    by_fold = (torch.stack(parts, dim=1).cpu().numpy() for parts in (alike, histograms))
    return Prediction(q.cpu().numpy(), *by_fold)


def _views(ensemble: Ensemble, networks: Sequence[nn.Module], image: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield each network's (B, 1, S, S) float32 probabilities: of the image, and of its mirror image turned back."""
    batch = torch.cat([image, image.flip(-1)]) if ensemble.mirror else image
    for model in networks:
        probs = engine.predict_logits(model, batch, ensemble.dtype).sigmoid()
        if ensemble.mirror:
            plain, mirrored = probs.chunk(2)
            yield plain, mirrored.flip(-1)
        else:
            yield (probs,)


def parse_folds(text: str, count: int) -> list[int]:
    """Read "0,2" or "all".

    Raises:
        UsageError: not numbers below `count`, or one twice.
    """
    if text == "all":
        return list(range(count))
    known = {str(fold): fold for fold in range(count)}
    parts = [part.strip() for part in text.split(",")]
    if not all(part in known for part in parts) or len(set(parts)) < len(parts):
        raise UsageError(f"--folds {one_line(text)}: expected all, or different numbers from 0 to {count - 1} as 0,1")
    return [known[part] for part in parts]
