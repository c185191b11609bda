"""Every rule scored on out-of-fold tables, and one chosen that a fold which had no say in it confirms.

Imports tables, rule, metrics, errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from pneumo.decision import metrics, tables
from pneumo.decision.rule import LEVELS, Rule, level
from pneumo.decision.tables import Tables
from pneumo.errors import UsageError

CASES_AT_ONCE = 1024  # bounds the memory of the component rules' scores
NEIGHBOURS = (5, 5, 3, 3)  # rules averaged around each rule: thresholds, minimum areas, top thresholds, top areas


@dataclass(frozen=True)
class Grid:
    """The rules that are tried: all combinations of four ascending lists; areas in pixels of the annotation grid."""

    thresholds: tuple[float, ...]
    min_areas: tuple[int, ...]
    top_thresholds: tuple[float, ...]
    top_areas: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """How many of each."""
        return len(self.thresholds), len(self.min_areas), len(self.top_thresholds), len(self.top_areas)

    def rule(self, index: Sequence[int]) -> Rule:
        """The rule at one place of the grid."""
        t, m, p, a = (int(i) for i in index)
        return Rule(
            threshold=self.thresholds[t],
            min_area=self.min_areas[m],
            top_threshold=self.top_thresholds[p],
            top_area=self.top_areas[a],
        )

    def place(self, rule: Rule) -> tuple[int, int, int, int]:
        """Where a rule stands in the grid; the inverse of `rule`.

        Raises:
            ValueError: it is none of the grid's.
        """
        return (
            self.thresholds.index(rule.threshold),
            self.min_areas.index(rule.min_area),
            self.top_thresholds.index(rule.top_threshold),
            self.top_areas.index(rule.top_area),
        )


def make_grid(
    rule: Rule, annotation_size: int, *, thresholds: int, min_areas: int, top_thresholds: int, top_areas: int
) -> Grid:
    """Spread a grid of so many values a side over all sensible rules, with the given rule on it.

    Thresholds are evenly spaced; areas geometrically, from 1/65536 to 1/16 (top areas: 1/64) of the annotation grid,
    and 0.
    """
    pixels = annotation_size**2

    def areas(count: int, largest: float, own: int) -> tuple[int, ...]:
        spread = np.geomspace(max(pixels / 65536, 1), pixels * largest, count - 1)
        return _with(np.unique(np.rint(spread).astype(int)).tolist(), [0, own])

    def levels(first: int, last: int, count: int, own: list[float]) -> tuple[float, ...]:
        spread = np.unique(np.rint(np.linspace(first, last, count)).astype(int))
        return tuple(k / LEVELS for k in _with(spread.tolist(), [level(threshold) for threshold in own]))

    return Grid(
        thresholds=levels(8, 248, thresholds, [rule.threshold]),
        min_areas=areas(min_areas, 1 / 16, rule.min_area),
        top_thresholds=levels(64, 248, top_thresholds - 1, [0.0, rule.top_threshold]),
        top_areas=areas(top_areas, 1 / 64, rule.top_area),
    )


@dataclass(frozen=True)
class Sums:
    """What every rule of a grid scores, summed over the cases of each fold.

    Attributes:
        dice_positive: (F, *grid.shape) float64, sum of Dice over positive cases.
        found: (F, *grid.shape) float64, positive cases decided positive.
        kept_empty: (F, *grid.shape) float64, negative cases decided negative; each scores 1, the others 0.
        positives, negatives: (F,) float64, cases.
    """

    dice_positive: np.ndarray
    found: np.ndarray
    kept_empty: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray

    def without(self, fold: int) -> "Sums":
        """The sums over all folds but one, as one fold; -1 leaves none out."""
        keep = np.arange(len(self.positives)) != fold
        parts = (self.dice_positive, self.found, self.kept_empty, self.positives, self.negatives)
        return Sums(*(part[keep].sum(axis=0, keepdims=True) for part in parts))

    @cached_property
    def dice(self) -> np.ndarray:
        """(*grid.shape) mean Dice over all cases."""
        return (self.dice_positive + self.kept_empty).sum(axis=0) / (self.positives + self.negatives).sum()

    @property
    def dice_on_positives(self) -> np.ndarray:
        """(*grid.shape) mean Dice over positive cases; NaN if there are none."""
        return _divide(self.dice_positive.sum(axis=0), self.positives.sum())

    @property
    def sensitivity(self) -> np.ndarray:
        """(*grid.shape) share of positive cases decided positive."""
        return _divide(self.found.sum(axis=0), self.positives.sum())

    @property
    def specificity(self) -> np.ndarray:
        """(*grid.shape) share of negative cases decided negative: the true-negative rate."""
        return _divide(self.kept_empty.sum(axis=0), self.negatives.sum())


def score_all(data: Tables, folds: np.ndarray, grid: Grid) -> Sums:
    """Score every rule of the grid on every case, exactly as building its mask would.

    Args:
        data: N cases.
        folds: (N,) numbers of the folds, 0 .. F - 1.
    """
    count = int(folds.max()) + 1
    places = np.array([data.place(threshold) for threshold in grid.thresholds])
    min_areas = np.array(grid.min_areas)
    tails = data.histogram[:, ::-1].cumsum(axis=1, dtype=np.int64)[:, ::-1]  # pixels of at least each level ...
    tails = np.pad(tails, ((0, 0), (0, 1)))  # ... and none of at least 256
    top = tails[:, [level(threshold) for threshold in grid.top_thresholds]]
    t, m, p, a = grid.shape
    flat = (count, p * a, t * m)
    dice_positive, found, kept_empty = np.zeros(flat), np.zeros(flat), np.zeros(flat)
    true_area, positive = data.true_area, data.positive
    for start in range(0, len(data), CASES_AT_ONCE):
        rows = slice(start, start + CASES_AT_ONCE)
        gates = (top[rows, :, None] > np.array(grid.top_areas)).reshape(-1, p * a)
        area, overlap = _kept(data.components(rows), len(gates), len(data.levels), places, min_areas)
        is_positive, fold = positive[rows], folds[rows]
        total = area + true_area[rows, None, None]
        score = (2 * overlap / np.maximum(total, 1)).reshape(len(gates), -1)
        decided = (area > 0).reshape(len(gates), -1)
        for number in np.unique(fold):
            some = (fold == number) & is_positive
            open_ = gates[some]
            dice_positive[number] += open_.T.astype(np.float64) @ score[some]
            found[number] += open_.T.astype(np.float32) @ decided[some].astype(np.float32)
            some = (fold == number) & ~is_positive
            flagged = gates[some].T.astype(np.float32) @ decided[some].astype(np.float32)  # whole numbers: exact
            kept_empty[number] += some.sum() - flagged
    shaped = (part.reshape(count, p, a, t, m).transpose(0, 3, 4, 1, 2) for part in (dice_positive, found, kept_empty))
    weights = (np.bincount(folds, weights=some, minlength=count) for some in (positive, ~positive))
    return Sums(*shaped, *weights)


@dataclass(frozen=True)
class Choice:
    """A rule and the flat stretch it stands in.

    Attributes:
        index: its place in the grid.
        plateau: (*grid.shape) bool, the rules around it that score alike.
        reached: whether any rule fulfils the objective's target.
    """

    index: tuple[int, int, int, int]
    plateau: np.ndarray
    reached: bool


def choose(
    sums: Sums, baseline: tuple[int, int, int, int], *, objective: str, target: float, tolerance: float
) -> Choice:
    """Choose a rule from the flat middle of the best plateau, not its spike.

    Every rule is judged by the mean over its neighbours in the grid. Those within `tolerance` of the best one that
    are connected with it form the plateau; the one nearest to the plateau's middle is taken. Where the baseline may be
    taken, none that scores below it is: beside a steep edge the mean over neighbours is highest on the lower side.

    Args:
        baseline: the place of a rule that needs no choosing, the recipe's.
        objective: "dice", mean Dice; or "sensitivity" or "specificity": mean Dice among the rules that reach `target`;
            if none does, among those that come closest.
        tolerance: of mean Dice.
    """
    dice = sums.dice
    smooth = ndimage.uniform_filter(dice, size=NEIGHBOURS, mode="nearest")
    allowed, reached = np.ones(dice.shape, dtype=bool), True
    if objective != "dice":
        share = sums.sensitivity if objective == "sensitivity" else sums.specificity
        reached = bool((share >= target).any())
        allowed = share >= (target if reached else np.nanmax(share))
    if allowed[baseline]:
        allowed &= dice >= dice[baseline]
    smooth[~allowed] = -np.inf
    best = np.unravel_index(smooth.argmax(), smooth.shape)
    near = smooth >= smooth[best] - tolerance
    parts, _ = ndimage.label(near, structure=np.ones((3,) * 4))
    plateau = parts == parts[best]
    places = np.argwhere(plateau)
    middle = np.median(places, axis=0)
    away = (np.abs(places - middle) / np.array(smooth.shape)).max(axis=1)
    nearest = places[np.lexsort((-smooth[plateau], np.round(away, 9)))[0]]
    return Choice(tuple(int(i) for i in nearest), plateau, reached)


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        rule: chosen on all folds: the one to use.
        choice: its place.
        fold_rules: for each fold the rule chosen on the others.
        short: folds for which no rule on the others reaches the target.
        dice: (N,) float64, each case under the rule that its fold had no say in: cross-fitted.
        baseline: (N,) float64, each case under the recipe's rule.
        in_sample: mean Dice of `rule` on the very cases that chose it.
        sums: of all rules.
        grid: of all rules.
    """

    rule: Rule
    choice: Choice
    fold_rules: tuple[Rule, ...]
    short: tuple[int, ...]
    dice: np.ndarray
    baseline: np.ndarray
    in_sample: float
    sums: Sums
    grid: Grid

    @property
    def optimism(self) -> float:
        """In-sample minus cross-fitted mean Dice: what a score on its own tuning data overstates.

        Where the folds' networks differ, so that a rule of the others does not suit one, that is in it as well.
        """
        return self.in_sample - float(self.dice.mean())

    def gain(self, groups: np.ndarray, *, draws: int, seed: int) -> metrics.Interval:
        """Mean gain over the recipe's rule, cross-fitted, with its paired bootstrap interval."""
        return metrics.bootstrap_means((self.dice - self.baseline)[None], groups, draws=draws, seed=seed)[0]


def tune(
    data: Tables, folds: np.ndarray, grid: Grid, baseline: Rule, *, objective: str, target: float, tolerance: float
) -> Tuned:
    """Choose a rule, and score the choosing: each fold by the rule chosen on the others.

    Args:
        data: N cases, each predicted by networks that did not see it.
        folds: (N,) fold of each; any numbers, at least two different.
        baseline: the rule to compare with, one of the grid.

    Raises:
        ValueError: `baseline` is not of the grid.
        UsageError: fewer than two folds; or one whose others have no case that the objective's target is about.
    """
    names, folds = np.unique(folds, return_inverse=True)
    if len(names) < 2:
        raise UsageError(
            f"only fold {', '.join(map(str, names))} has out-of-fold predictions: a rule chosen on a fold cannot be "
            f"scored on the same. Train another fold."
        )
    sums = score_all(data, folds, grid)
    wanted = {"objective": objective, "target": target, "tolerance": tolerance}
    if objective != "dice":
        kind, cases = ("positive", sums.positives) if objective == "sensitivity" else ("negative", sums.negatives)
        for name, count in zip(names, cases, strict=True):
            if cases.sum() == count:
                raise UsageError(
                    f"tune.objective={objective}: without fold {name} there is no {kind} case to choose a rule on"
                )
    own = grid.place(baseline)
    choice = choose(sums.without(-1), own, **wanted)
    choices = [choose(sums.without(fold), own, **wanted) for fold in range(len(names))]
    fold_rules = tuple(grid.rule(chosen.index) for chosen in choices)
    dice = np.empty(len(data))
    for fold, rule in enumerate(fold_rules):
        rows = np.flatnonzero(folds == fold)
        dice[rows] = tables.dice(data.take(rows), rule)
    return Tuned(
        rule=grid.rule(choice.index),
        choice=choice,
        fold_rules=fold_rules,
        short=tuple(int(name) for name, chosen in zip(names, choices, strict=True) if not chosen.reached),
        dice=dice,
        baseline=tables.dice(data, baseline),
        in_sample=float(tables.dice(data, grid.rule(choice.index)).mean()),
        sums=sums,
        grid=grid,
    )


def _kept(
    components: tuple[np.ndarray, ...], cases: int, width: int, places: np.ndarray, min_areas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(cases, T, M) float64, whole numbers: area and overlap of the components above each minimum area."""
    cell, area, overlap = components
    column = np.full(width, -1)
    column[places] = np.arange(len(places))
    case, place = np.divmod(cell, width)
    place = column[place]
    used = place >= 0
    steps = len(min_areas) + 1
    # a component survives the minimum areas below its own area: put it into the last of these, then add up from above
    bins = ((case * len(places) + place) * steps + np.searchsorted(min_areas, area, side="left"))[used]
    size = cases * len(places) * steps

    def above(values: np.ndarray) -> np.ndarray:
        table = np.bincount(bins, weights=values[used], minlength=size).reshape(cases, len(places), steps)
        return table[..., ::-1].cumsum(axis=-1)[..., -2::-1]

    return above(area), above(overlap)


def _with(values: list[int], more: list[int]) -> tuple[int, ...]:
    return tuple(sorted({*values, *more}))


def _divide(array: np.ndarray, count: float) -> np.ndarray:
    return array / count if count else np.full(array.shape, np.nan)
