"""The figures, each a pure function from numbers to a PNG with the same numbers beside it as CSV.

matplotlib draws, scikit-image finds contours. Imports nothing from pneumo.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")  # before pyplot: there is no screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from skimage.measure import find_contours

DRAWN = ("epoch", "loss", "val_loss", "dice", "dice_positive", "all_empty")  # numbers of a log line
FEW_EPOCHS = 10  # up to so many each is marked: a line of one has no length
STAGE_COLOURS = ("#e8eef7", "#f7efe3", "#e9f4ea")
PLAIN = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def augmentations(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], names: Sequence[str], note: str, path: Path
) -> None:
    """Originals in the first column, their augmentations to the right, the mask outlined.

    Args:
        images: rows of (1 + K, S, S) float in [0, 1].
        masks: rows of (1 + K, S, S) bool.
        names: one per row.
        note: shown in the title, as "SYNTHETIC"; may be empty.
    """
    count = len(images[0])
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(
            len(images), count, figsize=(1.9 * count, 2.05 * len(images)), squeeze=False, layout="constrained"
        )
    records = []
    for row, (pictures, outlines, name) in enumerate(zip(images, masks, names, strict=True)):
        for column in range(count):
            axis = axes[row, column]
            outlined(axis, pictures[column], outlines[column])
            if row == 0:
                axis.set_title("original" if column == 0 else f"augmented {column}")
            records.append(
                {
                    "image_id": name,
                    "column": column,
                    "mean": float(pictures[column].mean()),
                    "mask_pixels": int(outlines[column].sum()),
                }
            )
        axes[row, 0].set_ylabel(shorten(name), fontsize=7)
    figure.suptitle(f"Originals and their augmentations{note}")
    _save(figure, pd.DataFrame(records), path)


def outlined(axis: Axes, image: np.ndarray, mask: np.ndarray, colour: str = "#ff5050", line: str = "-") -> None:
    """Show an X-ray with a mask's outline: (H, W) and (H, W) bool."""
    axis.imshow(image, cmap="gray", vmin=0, vmax=255 if image.dtype == np.uint8 else 1, interpolation="nearest")
    for contour in find_contours(np.pad(mask, 1).astype(np.float32), 0.5):
        axis.plot(contour[:, 1] - 1, contour[:, 0] - 1, color=colour, linewidth=1.2, linestyle=line)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)


def curves(records: pd.DataFrame, title: str, path: Path) -> None:
    """Loss and Dice against epoch: training and validation, all folds, stages side by side.

    Args:
        records: log lines with columns fold and stage added.
    """
    stages = sorted(records["stage"].unique())
    colours = plt.get_cmap("tab10" if records["fold"].max() < 10 else "tab20")
    marked = ""
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(
            2,
            len(stages),
            figsize=(3.6 * len(stages) + 1, 5.6),
            squeeze=False,
            layout="constrained",
            sharex="col",
        )
    for column, stage in enumerate(stages):
        loss_axis, dice_axis = axes[:, column]
        for axis in (loss_axis, dice_axis):
            axis.set_facecolor(STAGE_COLOURS[column % len(STAGE_COLOURS)])
        part = records[records["stage"] == stage]
        dot, cross = _marker(part, "."), _marker(part, "x")
        marked = ", x" if cross else marked
        for fold, lines in part.groupby("fold"):
            colour = colours(fold % colours.N)
            train = {"color": colour, "linestyle": "--", "linewidth": 1, "marker": cross}
            whole = {"color": colour, "linewidth": 1.4, "marker": dot, "label": f"fold {fold}"}
            some = {"color": colour, "linestyle": ":", "linewidth": 1.2, "marker": cross}
            loss_axis.plot(lines["epoch"], lines["loss"], **train)
            loss_axis.plot(lines["epoch"], lines["val_loss"], **whole)
            dice_axis.plot(lines["epoch"], lines["dice"], **whole)
            dice_axis.plot(lines["epoch"], lines["dice_positive"], **some)
        dice_axis.axhline(part["all_empty"].mean(), color="black", linewidth=0.8)
        loss_axis.set_title(f"stage {stage}")
        dice_axis.set_xlabel("epoch")
        dice_axis.set_ylim(-0.02, 1.02)
        _count_epochs(dice_axis, part)
    axes[0, 0].set_ylabel(f"loss\n(dashed{marked}: training; solid: validation)")
    axes[1, 0].set_ylabel(f"validation Dice\n(solid: all; dotted{marked}: positives;\nblack: all masks empty)")
    _legend_below(figure, 10, axes[0, 0])
    figure.suptitle(title)
    _save(figure, records, path)


def min_area(table: pd.DataFrame, chosen: int, title: str, path: Path) -> None:
    """Mean Dice against the minimum component area, out of fold.

    Args:
        table: columns min_area, dice, dice_positive, true_negative_rate, all_empty.
        chosen: the recipe's minimum area, pixels of the annotation grid.
    """
    with plt.rc_context(PLAIN):
        figure, axis = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
    best = table.loc[table["dice"].idxmax()]
    axis.plot(table["min_area"], table["dice"], color="C0", label="mean Dice")
    axis.plot(table["min_area"], table["dice_positive"], color="C1", label="Dice on positives")
    axis.plot(table["min_area"], table["true_negative_rate"], color="C2", label="true-negative rate")
    axis.plot(table["min_area"], table["all_empty"], color="black", linewidth=0.8, label="all masks empty")
    axis.axvline(chosen, color="gray", linestyle="--", linewidth=1, label=f"the recipe's {chosen:,} px")
    axis.plot(
        best["min_area"],
        best["dice"],
        "o",
        color="C0",
        label=f"best, in-sample, {best['dice']:.4f} at {best['min_area']:,.0f} px",
    )
    axis.set_xlabel("components of this many pixels or fewer are dropped (annotation grid)")
    axis.set_ylabel("mean Dice; rate")
    axis.set_ylim(-0.02, 1.02)
    _legend_below(figure, 3)
    axis.set_title(title, fontsize=10, wrap=True)
    _save(figure, table, path)


def loss_comparison(
    records: Mapping[str, pd.DataFrame], losses: Mapping[str, str], stage: int, note: str, path: Path
) -> None:
    """Validation Dice of one stage of two recipes: each fold's line, and the mean over folds.

    Args:
        records: log lines of the stage with column fold, by recipe.
        losses: the loss of each recipe.
        stage: its number.
        note: shown in the title; may be empty.
    """
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharex=True)
    rows = []
    for number, (recipe, lines) in enumerate(records.items()):
        marker = _marker(lines, ".")
        for axis, column in zip(axes, ("dice", "dice_positive"), strict=True):
            for _, one in lines.groupby("fold"):
                axis.plot(one["epoch"], one[column], marker=marker, color=f"C{number}", linewidth=0.7, alpha=0.4)
            mean = lines.groupby("epoch")[column].mean()
            label = f"{losses[recipe]} ({recipe})"  # one that began with "_" would not be shown
            axis.plot(mean.index, mean, marker=marker, color=f"C{number}", linewidth=2, markersize=9, label=label)
        rows.append(lines.assign(recipe=recipe, loss_kind=losses[recipe]))
    table = pd.concat(rows, ignore_index=True)
    axes[0].axhline(table["all_empty"].mean(), color="black", linewidth=0.8, label="all masks empty")
    for axis, label in zip(axes, ("validation Dice", "validation Dice on positives"), strict=True):
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        _count_epochs(axis, table)
    _legend_below(figure, 3, axes[0])
    figure.suptitle(f"Stage {stage}, by loss and recipe; thick: mean over folds{note}")
    _save(figure, table, path)


def surface(
    grid: np.ndarray,
    thresholds: Sequence[float],
    areas: Sequence[int],
    marks: Mapping[str, tuple[float, int]],
    plateau: np.ndarray,
    title: str,
    path: Path,
) -> None:
    """Mean Dice against threshold and minimum area, the chosen rule marked and its plateau outlined.

    Args:
        grid: (T, M) float, mean Dice at the chosen top rule.
        thresholds, areas: T and M.
        marks: threshold and minimum area of rules to mark, by name.
        plateau: (T, M) bool.
    """
    with plt.rc_context({**PLAIN, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(7.4, 4.8), layout="constrained")
    low = max(float(grid.min()), float(grid.max()) - 0.1)
    picture = axis.imshow(grid.T, origin="lower", aspect="auto", cmap="viridis", vmin=low, interpolation="nearest")
    bar = figure.colorbar(picture, ax=axis, extend="min" if grid.min() < low else "neither")
    bar.set_label("mean Dice, out of fold")
    for number, contour in enumerate(find_contours(np.pad(plateau.T, 1).astype(np.float32), 0.5)):
        axis.plot(
            contour[:, 1] - 1, contour[:, 0] - 1, color="white", linewidth=1.3, label="plateau" if number == 0 else None
        )
    for (name, (threshold, area)), shape in zip(marks.items(), "oXs^", strict=False):
        axis.plot(
            list(thresholds).index(threshold),
            list(areas).index(area),
            shape,
            color="#ff4060",
            markeredgecolor="white",
            markersize=9,
            linestyle="none",
            label=name,
        )
    columns = np.linspace(0, len(thresholds) - 1, 9).round().astype(int)
    rows = np.linspace(0, len(areas) - 1, 8).round().astype(int)
    axis.set_xticks(columns, [f"{thresholds[i]:.2f}" for i in columns])
    axis.set_yticks(rows, [f"{areas[i]:,}" for i in rows])
    axis.set_xlabel("threshold")
    axis.set_ylabel("components of this many pixels or fewer are dropped")
    legend = _legend_below(figure, 3)
    legend.get_frame().set_facecolor("#404040")  # the plateau's line is white
    for text in legend.get_texts():
        text.set_color("white")
    axis.set_title(title, fontsize=10, wrap=True)
    t, m = np.indices(grid.shape)
    table = pd.DataFrame(
        {
            "threshold": np.asarray(thresholds)[t.ravel()],
            "min_area": np.asarray(areas)[m.ravel()],
            "dice": grid.ravel(),
            "plateau": plateau.ravel(),
        }
    )
    _save(figure, table, path)


def sizes(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Dice and sensitivity by size of the pneumothorax, with intervals.

    Args:
        rows: from `pneumo.decision.metrics.by_size`.
    """
    with plt.rc_context(PLAIN):
        figure, axis = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
    place = np.arange(len(rows))
    for key, colour, shift, label in (("dice", "C0", -0.12, "Dice"), ("sensitivity", "C1", 0.12, "sensitivity")):
        values = np.array([row[key].value for row in rows])
        ends = np.abs(np.array([[row[key].low, row[key].high] for row in rows]).T - values)
        axis.errorbar(place + shift, values, yerr=ends, fmt="o", color=colour, capsize=3, label=label)
    axis.set_xticks(
        place, [f"{row['smallest']:,}\n to {row['largest']:,}\n({row['cases']})" for row in rows], fontsize=7
    )
    axis.set_xlabel("annotated pixels (number of images); parts of about as many images")
    axis.set_ylabel("mean Dice; sensitivity")
    axis.set_ylim(-0.02, 1.02)
    _legend_below(figure, 2)
    axis.set_title(title, fontsize=10, wrap=True)
    flat = [
        {key: value for key, value in row.items() if not hasattr(value, "low")}
        | {
            f"{key}{end}": getattr(row[key], name)
            for key in ("dice", "sensitivity")
            for end, name in (("", "value"), ("_low", "low"), ("_high", "high"))
        }
        for row in rows
    ]
    _save(figure, pd.DataFrame(flat), path)


def ranking(curve: Mapping[str, np.ndarray], area: str, precision: str, share: float, title: str, path: Path) -> None:
    """ROC and precision-recall curves of the image score.

    Args:
        curve: from `pneumo.decision.metrics.ranking_curves`.
        area, precision: text of ROC AUC and average precision with their intervals.
        share: of positive images, the precision of chance.
    """
    with plt.rc_context(PLAIN):
        figure, (roc, pr) = plt.subplots(1, 2, figsize=(8.4, 4.2), layout="constrained")
    roc.plot([0, *curve["false_positive_rate"]], [0, *curve["sensitivity"]], color="C0")
    roc.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    roc.set_xlabel("false-positive rate")
    roc.set_ylabel("sensitivity")
    roc.set_title(f"ROC, area {area}", fontsize=9)
    sensitivity, precisions = curve["sensitivity"], curve["precision"]
    pr.step([0, *sensitivity], [precisions[0], *precisions], where="pre", color="C0")
    pr.axhline(share, color="black", linewidth=0.8)
    pr.set_xlabel("sensitivity (recall)")
    pr.set_ylabel("precision")
    pr.set_title(f"precision-recall, average {precision}", fontsize=9)
    for axis in (roc, pr):
        axis.set_xlim(-0.01, 1.01)
        axis.set_ylim(-0.01, 1.02)
    figure.suptitle(title, fontsize=10, wrap=True)
    _save(figure, pd.DataFrame(dict(curve)), path)


def reliability(rows: Sequence[Mapping[str, float]], error: float, title: str, path: Path) -> None:
    """How often images of a score are positive, and how many there are of each.

    Args:
        rows, error: from `pneumo.decision.metrics.reliability`.
    """
    table = pd.DataFrame(list(rows))
    with plt.rc_context(PLAIN):
        figure, (axis, counts) = plt.subplots(
            2, 1, figsize=(5.4, 5.4), layout="constrained", sharex=True, height_ratios=(3, 1)
        )
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axis.plot(table["mean_score"], table["positive_share"], "o-", color="C0")
    axis.set_ylabel("share with pneumothorax")
    axis.set_ylim(-0.02, 1.02)
    axis.set_title(f"expected calibration error {error:.3f}", fontsize=9)
    counts.bar((table["low"] + table["high"]) / 2, table["cases"], width=0.9 / 10, color="C0")
    counts.set_yscale("log")
    counts.set_ylim(0.5, 2 * table["cases"].max())  # one image is a bar as well
    counts.yaxis.set_major_locator(LogLocator(numticks=4))
    counts.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    counts.yaxis.set_minor_locator(NullLocator())
    counts.set_ylabel("images")
    counts.set_xlabel("image score")
    figure.suptitle(title, fontsize=10, wrap=True)
    _save(figure, table, path)


def risk_coverage(curve: Mapping[str, np.ndarray], title: str, path: Path) -> None:
    """Mean Dice of what is left when the doubtful images are referred.

    Args:
        curve: from `pneumo.decision.trust.risk_coverage`.
    """
    with plt.rc_context(PLAIN):
        figure, axis = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
    for key, style, label in (
        ("dice", {"color": "C0", "linewidth": 2}, "lowest expected Dice referred first"),
        ("oracle", {"color": "C2", "linestyle": "--"}, "had the true Dice been known"),
        ("random", {"color": "black", "linewidth": 0.8}, "at random"),
    ):
        axis.plot(1 - curve["coverage"], curve[key], label=label, **style)
    axis.set_xlabel("share of images referred to a reader")
    axis.set_ylabel("mean Dice of the others")
    _legend_below(figure, 3)
    axis.set_title(title, fontsize=10, wrap=True)
    _save(figure, pd.DataFrame(dict(curve)), path)


def gallery(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    numbers: pd.DataFrame,
    title: str,
    path: Path,
) -> None:
    """X-rays with the annotation outlined in blue and the prediction in orange and dashed, whatever eyes look at it.

    Args:
        images: (S, S) uint8 each. truths, masks: (S, S) bool each.
        numbers: a row for each, of which the ImageId, dice and score stand above the picture.
    """
    columns = min(len(images), 6)
    lines = -(-len(images) // columns)
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(
            lines, columns, figsize=(max(2.3 * columns, 7), 2.6 * lines + 0.4), squeeze=False, layout="constrained"
        )
    for axis in axes.ravel()[len(images) :]:
        axis.axis("off")
    shown = zip(axes.ravel(), images, truths, masks, numbers.itertuples(), strict=False)
    for axis, image, truth, mask, row in shown:
        outlined(axis, image, truth, "#30c8ff")
        outlined(axis, image, mask, "#ff9000", "--")
        axis.set_title(f"{shorten(row.ImageId)}\nDice {row.dice:.3f}, score {row.score:.2f}", fontsize=7)
    figure.suptitle(f"{title}   blue: annotation; orange, dashed: prediction", fontsize=10, wrap=True)
    _save(figure, numbers, path)


def shorten(name: str) -> str:
    """An id that fits under a picture."""
    return name if len(name) <= 22 else f"{name[:8]}…{name[-12:]}"


def _legend_below(figure: Figure, columns: int, axis: Axes | None = None) -> Legend:
    """A legend, of all axes or of one, where it hides nothing: lines and points may be anywhere on the axes."""
    entries = () if axis is None else axis.get_legend_handles_labels()
    return figure.legend(*entries, fontsize=8, loc="outside lower center", ncols=columns)


def _marker(lines: pd.DataFrame, marker: str) -> str:
    """The marker, if there are few epochs; else none."""
    return marker if lines["epoch"].nunique() <= FEW_EPOCHS else ""


def _count_epochs(axis: Axes, lines: pd.DataFrame) -> None:
    """Whole numbers on the axis of epochs, also where there is but one."""
    axis.set_xlim(lines["epoch"].min() - 0.5, lines["epoch"].max() + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _save(figure: Figure, table: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    table.to_csv(path.with_suffix(".csv"), index=False)


def frame(lines: Sequence[Mapping[str, Any]], **columns: Any) -> pd.DataFrame:
    """Log lines as a table, with constant columns put first; null becomes NaN."""
    table = pd.DataFrame(list(lines))
    for place, (name, value) in enumerate(columns.items()):
        table.insert(place, name, value)
    return table
