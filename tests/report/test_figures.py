"""What the figures draw: marks, axes and legends that hide nothing."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from pneumo.decision.metrics import Interval
from pneumo.report import figures


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Call a function of `figures` and get its figure, laid out, in place of a file."""
    kept = []
    monkeypatch.setattr(figures, "_save", lambda figure, table, path: kept.append(figure))

    def draw(function, *arguments):
        function(*arguments, tmp_path / "x.png")
        kept[-1].canvas.draw()
        return kept[-1]

    yield draw
    for figure in kept:
        plt.close(figure)


def log_lines(epochs: int, stage: int = 1) -> pd.DataFrame:
    """Two folds of so many epochs."""
    return pd.concat(
        pd.DataFrame({"fold": fold, "stage": stage, "epoch": range(1, epochs + 1), **dict.fromkeys(numbers, 0.5)})
        for fold, numbers in enumerate([figures.DRAWN[1:]] * 2)
    )


def labels(axis) -> list[str]:
    """What the ticks in view say, from left to right or from below."""
    low, high = axis.get_view_interval()
    return [tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def hidden_by_legend(figure) -> bool:
    """Whether a legend lies over any of the axes or over their labels."""
    legends = [*figure.legends, *filter(None, (axis.get_legend() for axis in figure.axes))]
    assert legends
    return any(legend.get_window_extent().overlaps(axis.get_tightbbox()) for legend in legends for axis in figure.axes)


@pytest.mark.parametrize("epochs", [1, 2, 5, 20])
def test_epochs_are_whole_and_few_of_them_marked(drawn, epochs):
    lines = pd.concat([log_lines(epochs), log_lines(30, stage=2)])
    compared = drawn(figures.loss_comparison, {"a": log_lines(epochs)}, {"a": "lovasz"}, 1, "")
    for figure in (drawn(figures.curves, lines, "title"), compared):
        said = labels(figure.axes[2 if figure is not compared else 0].xaxis)
        assert said and all(text.isdecimal() and 1 <= int(text) <= epochs for text in said)
        marked = {line.get_marker() not in ("", "None") for line in figure.axes[0].lines if len(line.get_xdata()) > 0}
        assert (True in marked) == (epochs <= figures.FEW_EPOCHS)


def test_no_legend_lies_on_what_is_drawn(drawn):
    half = Interval(0.5, 0.0, 1.0)
    parts = [{"smallest": i, "largest": i, "cases": 1, "dice": half, "sensitivity": half} for i in range(10)]
    assert not hidden_by_legend(drawn(figures.sizes, parts, "title"))
    columns = dict.fromkeys(("dice", "dice_positive", "true_negative_rate", "all_empty"), 0.5)
    table = pd.DataFrame({"min_area": range(9), **columns})
    assert not hidden_by_legend(drawn(figures.min_area, table, 3, "title"))
    assert not hidden_by_legend(drawn(figures.loss_comparison, {"a": log_lines(3)}, {"a": "lovasz"}, 1, ""))
    ends = {name: np.linspace(0.1, 1, 9) for name in ("coverage", "dice", "oracle", "random")}
    assert not hidden_by_legend(drawn(figures.risk_coverage, ends, "title"))
    flat, all_of_it = np.zeros((3, 4)), np.ones((3, 4), bool)
    marks = {"chosen": (0.5, 1)}
    assert not hidden_by_legend(
        drawn(figures.surface, flat, (0.25, 0.5, 0.75), (0, 1, 2, 3), marks, all_of_it, "title")
    )


def test_a_fold_that_has_not_reached_the_last_stage_is_named(drawn):
    later = log_lines(3, stage=2)
    figure = drawn(figures.curves, pd.concat([log_lines(3), later[later["fold"] == 0]]), "title")
    assert not hidden_by_legend(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fold 0", "fold 1"]


@pytest.mark.parametrize("counts", [[90, 30], [1, 1], [3, 12000]])
def test_every_count_of_a_score_is_a_bar(drawn, counts):
    rows = [
        {"low": i / 10, "high": (i + 1) / 10, "cases": count, "mean_score": i / 10, "positive_share": 0.5}
        for i, count in enumerate(counts)
    ]
    axis = drawn(figures.reliability, rows, 0.1, "title").axes[1]
    low, high = axis.get_ylim()
    heights = np.array([bar.get_height() for bar in axis.patches])
    assert (np.log(heights / low) / np.log(high / low) > 0.05).all()  # of the axis' height
    said = labels(axis.yaxis)
    assert 1 <= len(said) <= 5 and all(text.strip("0,") == "1" for text in said)  # older matplotlib begins at 10
    assert not axis.yaxis.get_minorticklocs().size
