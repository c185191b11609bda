"""A data set and a recipe small enough to train within seconds, for the tests that train."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pneumo import checkpoint, config, dataset, ensemble, log
from pneumo.config import Recipe
from pneumo.data import rle
from pneumo.dataset import Dataset
from pneumo.decision.rule import Rule
from pneumo.ensemble import Ensemble
from pneumo.model.unet import UNet

SIDE = 64


def write_data(root: Path, train: int = 18, test: int = 4) -> None:
    """Noise with a bright square where the mask is; every third image positive, one with two rows."""
    rng = np.random.default_rng(0)
    rows, sample = ["ImageId,EncodedPixels"], ["ImageId,EncodedPixels"]
    for part, count in (("train", train), ("test", test)):
        (root / part).mkdir(parents=True)
        for i in range(count):
            pixels = (rng.random((SIDE, SIDE)) * 120).astype(np.uint8)
            mask = np.zeros((SIDE, SIDE), dtype=bool)
            if i % 3 == 0:
                y, x = rng.integers(5, 30, 2)
                mask[y : y + 20, x : x + 18] = True
                pixels[mask] += 100
            image_id = f"{part}-{i:03d}"
            Image.fromarray(pixels).save(root / part / f"{image_id}.png")
            if part == "test":
                sample.append(f"{image_id},-1")
                continue
            rows.append(f"{image_id},{rle.encode(mask)}")
            if i == 3:
                rows.append(rows[-1])
    (root / "train-rle.csv").write_text("\n".join(rows) + "\n")
    (root / "sample_submission.csv").write_text("\n".join(sample) + "\n")


def settings(root: Path, runs: Path) -> list[str]:
    """Overrides of [seed] for these data and a small net."""
    stages = [
        f"stage.{number}.{value}"
        for number in (1, 2, 3)
        for value in ("image_size=64", "epochs=2", "batch_size=3", "accumulation=2", "lr=1e-3")
    ]
    return [
        f"data.root={root}",
        f"runs={runs}",
        f"data.annotation_size={SIDE}",
        "model.encoder=test_resnet",
        "model.pretrained=false",
        "model.decoder_channels=[8, 8, 8, 4, 4]",
        "folds.count=3",
        "rule.min_area=20",
        "augment.elastic_alpha=10",
        "augment.elastic_affine=1",
        *stages,
    ]


def recipe(repo: Path, root: Path, runs: Path, *more: str, name: str = "seed") -> Recipe:
    """The recipe that these overrides give."""
    return config.load(repo / "configs.toml", name, [*settings(root, runs), *more])


def differing(a: dict, b: dict) -> list[str]:
    """Leaves of two checkpoints that are not bit for bit the same, but for times."""
    first, second = (dict(checkpoint.leaves(state)) for state in (a, b))
    assert first.keys() == second.keys()
    timed = ("seconds", "images_per_second")
    return [
        key
        for key in first
        if not key.endswith(timed)
        and not (
            torch.equal(first[key], second[key]) if isinstance(first[key], torch.Tensor) else first[key] == second[key]
        )
    ]


def pretend_trained(recipe: Recipe, *names: str) -> Dataset:
    """Random networks in place of the last stage's finished folds: best.pt, or the files of these names."""
    data = dataset.load(recipe)
    stage = recipe.stages
    for fold in range(recipe.folds.count):
        folder = recipe.stage_folder(fold, stage)
        for number, name in enumerate(names or ("best.pt",)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(10 * fold + number)
                model = UNet(recipe.model.encoder, False, recipe.model.decoder_channels)
                model.head.weight.data *= 3  # probabilities on both sides of one half
            state = {
                "settings": config.stage_settings(recipe, stage),
                "digest": data.digest,
                "split": data.split,
                "fold": fold,
                "stage": stage,
                "model": {key: tensor.contiguous() for key, tensor in model.state_dict().items()},
                "record": {"epoch": 1, "dice": 0.5},
            }
            checkpoint.save(state, folder / name)
        log.write_status(folder, "done", epoch=2, epochs=2)
    return data


def halving_rule(models: Ensemble, folder: Path) -> Rule:
    """A rule that finds half of the pixels of these images, whatever random networks say of them.

    With a fixed threshold all masks may be empty, and then any two of them are equal.
    """
    pictures = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    image = torch.from_numpy(np.stack([picture for picture in pictures if picture.shape == (SIDE, SIDE)]))[:, None]
    k = int(np.median(ensemble.predict(models, image, SIDE, [str(i) for i in range(len(image))]).q))
    assert k > 1, "these networks tell nothing apart"
    return Rule(threshold=k / 256, min_area=20)
