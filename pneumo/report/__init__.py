"""Figures, and their numbers as CSV, from the folders that runs leave behind.

Imports figures, config, dataset, data, decision, ensemble, engine, training, log.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pneumo import dataset, dist, ensemble, inference, log, training
from pneumo.config import Recipe
from pneumo.data.feed import Feed, cut, key
from pneumo.dataset import Dataset
from pneumo.decision.components import drop_small_runs
from pneumo.decision.metrics import dice_runs
from pneumo.decision.rule import Rule, decide
from pneumo.errors import DataError
from pneumo.report import figures

ROWS, COLUMNS = 4, 6  # of the picture of augmentations
AREAS = np.concatenate([[0], np.geomspace(1 / 4096, 1 / 32, 40)])  # minimum areas tried, shares of the annotation grid


def write(recipe: Recipe) -> None:
    """Write <runs>/<recipe>/report/*.png and *.csv: what can be drawn of what has been trained.

    Raises:
        DataError: nothing has been trained yet.
    """
    folder = recipe.folder / "report"
    logs = _logs(recipe)
    if logs.empty:
        raise DataError(f"{recipe.folder}: no log.jsonl yet. Run: make cv RECIPE={recipe.name}")
    data = dataset.load(recipe)
    synthetic = (Path(recipe.data.root) / "SYNTHETIC.txt").exists()
    note = "(SYNTHETIC X-rays)" if synthetic else ""
    _draw_augmentations(recipe, data, note, folder / "augmentations.png")
    figures.curves(logs, f"{recipe.name}: loss and Dice by epoch {note}".strip(), folder / "curves.png")
    _compare_losses(recipe, logs, note, folder / "loss_comparison.png")
    done = [f for f in range(recipe.folds.count) if training.finished(recipe, f, recipe.stages)]
    if done:
        table = _min_area_table(recipe, data, done)
        title = f"{recipe.name}: out-of-fold Dice against minimum component area {note}".strip()
        figures.min_area(table, recipe.rule.min_area, title, folder / "min_area.png")
    log.say(f"{folder}: {', '.join(sorted(path.name for path in folder.glob('*.png')))}")


def _logs(recipe: Recipe) -> pd.DataFrame:
    """All log lines of the recipe, with the stages that it took over from another recipe."""
    tables = []
    for fold in range(recipe.folds.count):
        for stage in range(1, recipe.stages + 1):
            path = recipe.stage_folder(fold, stage) / "log.jsonl"
            if path.exists():
                tables.append(figures.frame(log.read_jsonl(path), fold=fold, stage=stage))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _draw_augmentations(recipe: Recipe, data: Dataset, note: str, path: Path) -> None:
    """Some positive images as the last stage's training sees them."""
    pack = dataset.open_pack(recipe, "train", data.cases, recipe.stage[recipe.stages].image_size)
    rows = np.flatnonzero(data.positive)[:ROWS]
    feed = Feed(pack, torch.device("cpu"), rows)
    images, masks = [], []
    for row, (image, mask) in zip(rows, feed.batches([np.array([row]) for row in rows]), strict=True):
        generator = torch.Generator().manual_seed(key(recipe.seed, "report", int(row)))
        copies = COLUMNS - 1
        more, more_masks = training.augmented(
            image.expand(copies, -1, -1, -1), mask.expand(copies, -1, -1, -1), recipe.augment, generator
        )
        images.append(torch.cat([image.float() / 255, more])[:, 0].numpy())
        masks.append(torch.cat([mask.float(), more_masks])[:, 0].numpy() > 0.5)
    figures.augmentations(images, masks, [data.cases[row].image_id for row in rows], note, path)


def _compare_losses(recipe: Recipe, logs: pd.DataFrame, note: str, path: Path) -> None:
    """The first own stage beside the same stage of the recipe that it starts from, if both were trained."""
    stage = recipe.own_stages[0]
    other = recipe.stage[stage].start
    if other in ("encoder", "previous"):
        return
    tables = {recipe.name: logs[logs["stage"] == stage]}
    losses = {recipe.name: recipe.stage[stage].loss}
    lines = []
    for fold in range(recipe.folds.count):
        place = Path(recipe.runs) / other / f"fold{fold}" / f"stage{stage}"
        if (place / "best.pt").exists():
            lines.append(figures.frame(log.read_jsonl(place / "log.jsonl"), fold=fold, stage=stage))
            losses[other] = training.checkpoint.load(place / "best.pt")["settings"][f"stage.{stage}.loss"]
    if lines and not tables[recipe.name].empty:
        figures.loss_comparison({other: pd.concat(lines), **tables}, losses, stage, note, path)


def _min_area_table(recipe: Recipe, data: Dataset, done: list[int]) -> pd.DataFrame:
    """Mean Dice for each minimum area: every image is predicted by the fold that did not see it, with its mirror."""
    size = recipe.data.annotation_size
    areas = np.unique(np.append(np.rint(AREAS * size**2).astype(int), recipe.rule.min_area))
    rule = Rule(**{**asdict(recipe.rule), "min_area": 0})
    positive: list[bool] = []
    scores: list[list[float]] = []
    with dist.launch(recipe.train.timeout_seconds) as device:
        for fold in done:
            model = ensemble.load(recipe, [fold], device)
            pack = dataset.open_pack(recipe, "train", data.cases, model.image_size)
            rows = np.flatnonzero(data.folds == fold)
            batches = cut(rows, recipe.predict.batch_size)
            shown = log.bar(batches, total=len(batches), title=f"out of fold {fold}")
            for numbers, (image, _) in zip(shown, Feed(pack, device, rows).batches(batches), strict=True):
                names = [data.cases[row].image_id for row in numbers]
                for row, q in zip(numbers, inference.quantised(model, image, size, names), strict=True):
                    found, truth = decide(q, rule), data.cases[row].runs
                    scores.append([dice_runs(drop_small_runs(found, size, int(area)), truth) for area in areas])
                    positive.append(data.cases[row].positive)
    dice, is_positive = np.array(scores), np.array(positive)
    return pd.DataFrame(
        {
            "min_area": areas,
            "dice": dice.mean(axis=0),
            "dice_positive": dice[is_positive].mean(axis=0) if is_positive.any() else np.nan,
            "true_negative_rate": dice[~is_positive].mean(axis=0) if not is_positive.all() else np.nan,
            "all_empty": (~is_positive).mean(),
            "images": len(dice),
        }
    )
