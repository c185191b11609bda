"""What a recipe's runs show: figures with their numbers as CSV, report.json, and one self-contained report.html.

Imports figures, galleries, page, results, words, config, dataset, data, decision, oof, training, tuning, checkpoint,
log, errors.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pneumo import checkpoint, dataset, log, oof, training, tuning
from pneumo.config import Recipe
from pneumo.data.feed import Feed, key
from pneumo.data.phantom import MARK_FILE
from pneumo.dataset import Dataset
from pneumo.decision import metrics, tables, trust
from pneumo.decision.metrics import Interval, Scores
from pneumo.decision.rule import Rule
from pneumo.decision.tune import Tuned
from pneumo.errors import DataError, UsageError
from pneumo.oof import OutOfFold
from pneumo.report import figures, galleries, page, results, words
from pneumo.report.page import Figure
from pneumo.report.results import Decided

ROWS, COLUMNS = 4, 6  # of the picture of augmentations
PICTURES = (
    "augmentations",
    "curves",
    "loss_comparison",
    "min_area",
    "ranking",
    "reliability",
    "risk_coverage",
    "sizes",
    "surface",
    *galleries.NAMES,
)
CURVES = (
    "Loss and Dice by epoch, fold and stage. The two losses are not alike: that of training is the mean over "
    "micro-batches, augmented and with the epoch's share of positives; that of validation pools the whole fold, which "
    "makes its Dice term smaller."
)
# all that a report may write beside its page
OWN = {"report.json", "referral.csv", *(f"{name}{end}" for name in PICTURES for end in (".png", ".csv"))}


def write(recipe: Recipe, beside: Sequence[Recipe] = ()) -> None:
    """Write <runs>/<recipe>/report/: what can be shown of what has been trained.

    What an earlier report wrote there and this one does not is removed.

    Args:
        beside: other recipes whose out-of-fold scores stand in the same table.

    Raises:
        DataError: nothing has been trained yet.
        UsageError: a recipe beside has no out-of-fold predictions; nothing has been written then.
    """
    for other in beside:
        if not oof.predicted_folds(other):
            raise UsageError(
                f"{other.folder}: no out-of-fold predictions to set beside those of {recipe.name}. "
                f"Run: {other.command('cv')}"
            )
    folder = recipe.folder / "report"
    logs = _logs(recipe)
    if logs.empty:
        raise DataError(
            f"{recipe.folder.absolute()}: no log.jsonl yet. Run: {recipe.command('cv')}, or say where it is: --set "
            f"runs=DIR"
        )
    data = dataset.load(recipe)
    packed = dataset.open_train(recipe, data, recipe.stage[1].image_size)
    note = " (SYNTHETIC X-rays)" if (Path(recipe.data.root) / MARK_FILE).exists() else ""
    content = page.Content(
        title=f"{recipe.name}{note}",
        origin=words.origin(recipe, data, recipe.model.encoder),
        audit=dataset.audit(recipe, data.cases, data.folds, packed),
        figures=[("Training", _training_figures(recipe, data, logs, note, folder))],
    )
    numbers: set[str] = set()
    if oof.predicted_folds(recipe):
        content, numbers = _add_out_of_fold(recipe, data, beside, note, folder, logs, content)
    else:
        log.warn(
            f"{recipe.folder}: no out-of-fold predictions, so the report shows training only. "
            f"Run: {recipe.command('oof')}"
        )
    text = page.render(content)
    checkpoint.write_atomic(folder / "report.html", text.encode())
    pictures = sorted(figure.path for _, drawn in content.figures for figure in drawn)
    _remove_others(folder, numbers | {path.with_suffix(end).name for path in pictures for end in (".png", ".csv")})
    names = ", ".join(path.name for path in pictures)
    log.say(f"{folder / 'report.html'}: {len(text) / 1e6:.1f} MB; figures: {names}")


def _remove_others(folder: Path, written: set[str]) -> None:
    """Remove what only an earlier report wrote: it is of another state than the page."""
    assert written <= OWN, written - OWN
    stale = sorted(name for name in OWN - written if (folder / name).is_file())
    for name in stale:
        (folder / name).unlink()
    if stale:
        log.say(f"{folder}: removed of an earlier report: {', '.join(stale)}")


def _epochs(logs: pd.DataFrame, weights: str) -> dict[int, int]:
    """The epoch of each fold whose weights predict, from the last stage's logs; none where they are of several."""
    order = {"best": ["dice", "epoch"], "last": ["epoch"]}.get(weights)
    return {} if order is None else logs.sort_values(order).groupby("fold")["epoch"].last().to_dict()


def _add_out_of_fold(
    recipe: Recipe,
    data: Dataset,
    beside: Sequence[Recipe],
    note: str,
    folder: Path,
    logs: pd.DataFrame,
    content: page.Content,
) -> tuple[page.Content, set[str]]:
    """Everything that needs out-of-fold predictions, and the names of the files of numbers that were written."""
    epochs = _epochs(logs[logs["stage"] == recipe.stages], recipe.predict.weights)
    found = oof.load(recipe, data)
    tuned = tuning.search(recipe, found) if len(np.unique(found.folds)) > 1 else None
    baseline = results.by_rule("recipe's rule", found, Rule.of(recipe.rule))
    ways = [baseline]
    if tuned is not None:
        ways.append(results.cross_fitted("tuned rule, cross-fitted", found, tuned))
    shown = ways[-1]
    ways += results.other_ways(recipe, data, found.folds, beside)
    doubts = [] if tuned is None else tuning.doubts(recipe, found, tuned)
    warnings = [*(doubt[0].upper() + doubt[1:] for doubt in doubts), *words.warnings(recipe, data, found, tuned, ways)]
    for warning in warnings:
        log.warn(warning)
    options = {"draws": recipe.tune.draws, "seed": recipe.seed}
    scores = {way.name: way.scores(**options) for way in ways}
    gains = {way.name: way.gain_over(baseline, **options) for way in ways[1:]}
    tuned_gains = {way.name: way.gain_over(shown, **options) for way in ways[2:] if shown.tuned and way.tuned}
    sizes = metrics.by_size(
        shown.dice, found.tables.true_area, shown.signals.decided, shown.signals.score, found.groups, **options
    )
    files = {"report.json"}
    expected = None if tuned is None else trust.cross_fitted(shown.signals, shown.dice, found.folds)

    drawn = [_min_area(recipe, found, note, folder)]
    if tuned is not None:
        drawn.insert(0, _surface(recipe, tuned, note, folder))
    drawn += _score_figures(recipe, shown, scores[shown.name], sizes, note, folder)
    if expected is not None:
        curve = trust.risk_coverage(expected, shown.dice)
        title = f"{recipe.name}, out of fold, {shown.name}{note}"
        figures.risk_coverage(curve, title, folder / "risk_coverage.png")
        drawn.append(Figure(folder / "risk_coverage.png", words.worth(curve)))
        _write_queue(shown, expected, folder / "referral.csv")
        files.add("referral.csv")
    numbers = {
        "rows": [
            {
                "name": way.name,
                **asdict(scores[way.name]),
                "gain": _plain(gains.get(way.name)),
                "gain_over_tuned": _plain(tuned_gains.get(way.name)),
            }
            for way in ways
        ],
        "sizes": [{name: _plain(value) for name, value in row.items()} for row in sizes],
        "rule": asdict(Rule.of(recipe.rule) if tuned is None else tuned.rule),
        "optimism": None if tuned is None else tuned.optimism,
        "checkpoints": found.sources,
    }
    log.write_json(folder / "report.json", numbers)
    content = replace(
        content,
        origin=words.origin(recipe, data, found.encoder),
        warnings=warnings,
        summary=words.summary(recipe, data, shown, scores[shown.name], tuned, note),
        results=words.result_rows(ways, scores, gains, tuned_gains),
        results_note=page.BESIDE_NOTE if any(tuned_gains.values()) else "",
        folds=words.fold_rows(shown, baseline, tuned, epochs),
        sizes=words.size_rows(sizes),
        figures=[("Out of fold", drawn), *galleries.draw(recipe, data, shown, tuned, folder), *content.figures],
        explorer=None if tuned is None else page.explorer(tuned, Rule.of(recipe.rule)),
        case_columns=("image", "fold", "outcome", "Dice", "expected Dice", "score", "agreement", "true px", "found px"),
        cases=words.case_rows(shown, expected),
        sources=found.sources,
    )
    return content, files


def _training_figures(recipe: Recipe, data: Dataset, logs: pd.DataFrame, note: str, folder: Path) -> list[Figure]:
    figures.curves(logs, f"{recipe.name}: loss and Dice by epoch{note}", folder / "curves.png")
    drawn = [Figure(folder / "curves.png", CURVES)]
    if caption := _compare_losses(recipe, logs, note, folder / "loss_comparison.png"):
        drawn.append(Figure(folder / "loss_comparison.png", caption))
    _draw_augmentations(recipe, data, note, folder / "augmentations.png")
    drawn.append(Figure(folder / "augmentations.png", "Training images as the last stage sees them, mask outlined."))
    return drawn


def _logs(recipe: Recipe) -> pd.DataFrame:
    """All log lines of the recipe's own stages."""
    tables_ = []
    for fold in range(recipe.folds.count):
        for stage in range(1, recipe.stages + 1):
            path = recipe.stage_folder(fold, stage) / "log.jsonl"
            if path.exists():
                tables_.append(figures.frame(log.read_jsonl(path, figures.DRAWN), fold=fold, stage=stage))
    return pd.concat(tables_, ignore_index=True) if tables_ else pd.DataFrame()


def _draw_augmentations(recipe: Recipe, data: Dataset, note: str, path: Path) -> None:
    """Some positive images as the last stage's training sees them."""
    pack = dataset.open_train(recipe, data, recipe.stage[recipe.stages].image_size)
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


def _compare_losses(recipe: Recipe, logs: pd.DataFrame, note: str, path: Path) -> str:
    """Draw the first own stage beside the same stage of the recipe that it starts from, in folds that both trained.

    Returns:
        The caption; "" if there is nothing to draw.
    """
    stage = recipe.own_stages[0]
    other = recipe.stage[stage].start
    if other in ("encoder", "previous"):
        return ""
    own = logs[logs["stage"] == stage]
    losses = {recipe.name: recipe.stage[stage].loss}
    lines = []
    for fold in own["fold"].unique().tolist():
        place = Path(recipe.runs) / other / f"fold{fold}" / f"stage{stage}"
        if (place / "best.pt").exists():
            lines.append(figures.frame(log.read_jsonl(place / "log.jsonl", figures.DRAWN), fold=fold, stage=stage))
            losses[other] = checkpoint.load(place / "best.pt")["settings"][f"stage.{stage}.loss"]
    if not lines:
        return ""
    theirs = pd.concat(lines)
    shared = own[own["fold"].isin(theirs["fold"])]
    figures.loss_comparison({other: theirs, recipe.name: shared}, losses, stage, note, path)
    folds = ", ".join(map(str, sorted(shared["fold"].unique().tolist())))
    return f"Stage {stage} of {other}, in which {recipe.name} starts, and of {recipe.name}; fold {folds}."


def _min_area(recipe: Recipe, found: OutOfFold, note: str, folder: Path) -> Figure:
    """Dice for each minimum area at the recipe's threshold."""
    rule = Rule.of(recipe.rule)
    areas = oof.grid(recipe).min_areas
    positive = found.tables.positive
    dice = np.array([tables.dice(found.tables, replace(rule, min_area=area)) for area in areas])
    table = pd.DataFrame(
        {
            "min_area": areas,
            "dice": dice.mean(axis=1),
            "dice_positive": dice[:, positive].mean(axis=1) if positive.any() else np.nan,
            "true_negative_rate": dice[:, ~positive].mean(axis=1) if not positive.all() else np.nan,
            "all_empty": (~positive).mean(),
            "images": len(positive),
        }
    )
    title = f"{recipe.name}: out-of-fold Dice against minimum component area{note}"
    figures.min_area(table, rule.min_area, title, folder / "min_area.png")
    caption = f"Dice against the minimum component area, at the recipe's threshold {rule.threshold:g} and top rule: "
    return Figure(folder / "min_area.png", f"{caption}{words.top(rule)}.")


def _surface(recipe: Recipe, tuned: Tuned, note: str, folder: Path) -> Figure:
    """Dice against threshold and minimum area, at the chosen top rule; the recipe's is marked if it has the same."""
    *_, top, top_area = tuned.choice.index
    own = Rule.of(recipe.rule)
    marks = {"chosen": (tuned.rule.threshold, tuned.rule.min_area)}
    away = f" The recipe's rule is not marked: its top rule is another ({words.top(own)})."
    if words.same_top(own, tuned.rule):
        marks["recipe"], away = (own.threshold, own.min_area), ""
    figures.surface(
        tuned.sums.without(-1).dice[:, :, top, top_area],
        tuned.grid.thresholds,
        tuned.grid.min_areas,
        marks,
        tuned.choice.plateau[:, :, top, top_area],
        f"{recipe.name}: out-of-fold Dice against threshold and minimum area{note}",
        folder / "surface.png",
    )
    caption = "Mean Dice against threshold and minimum area, in-sample, at the chosen top rule: "
    return Figure(folder / "surface.png", f"{caption}{words.top(tuned.rule)}.{away}")


def _score_figures(
    recipe: Recipe, shown: Decided, scores: Scores, sizes: Sequence[dict[str, Any]], note: str, folder: Path
) -> list[Figure]:
    """By size, under the rule shown; by image score and its calibration, which no rule changes."""
    positive, score = shown.found.tables.positive, shown.signals.score
    title = f"{recipe.name}, out of fold, image score{note}"
    drawn = []
    if sizes:
        figures.sizes(sizes, f"{recipe.name}, out of fold, {shown.name}{note}", folder / "sizes.png")
        drawn.append(Figure(folder / "sizes.png", "Dice and sensitivity by size of the pneumothorax."))
    if scores.roc_auc is not None:
        curve = metrics.ranking_curves(score, positive)
        areas = str(scores.roc_auc), str(scores.average_precision)
        figures.ranking(curve, *areas, float(positive.mean()), title, folder / "ranking.png")
        drawn.append(Figure(folder / "ranking.png", "ROC and precision-recall of the image score; black: chance."))
    parts, error = metrics.reliability(score, positive)
    figures.reliability(parts, error, title, folder / "reliability.png")
    drawn.append(Figure(folder / "reliability.png", "Share with pneumothorax by image score; black: calibrated."))
    return drawn


def _write_queue(shown: Decided, expected: np.ndarray, path: Path) -> None:
    """The referral queue of the training images: lowest expected Dice first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "ImageId", "expected_dice", "dice", "score", "agreement", "area_grid"])
    order = sorted(range(len(expected)), key=lambda i: (expected[i], shown.found.image_ids[i]))
    for rank, i in enumerate(order, 1):
        values = (expected[i], shown.dice[i], shown.signals.score[i], shown.signals.agreement[i])
        area = int(shown.signals.area[i])
        writer.writerow([rank, shown.found.image_ids[i], *(f"{value:.6f}" for value in values), area])
    checkpoint.write_atomic(path, text.getvalue().encode())


def _plain(value: Any) -> Any:
    """As JSON has it: NaN, the mean over no case, becomes null."""
    if isinstance(value, Interval):
        value = asdict(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value
