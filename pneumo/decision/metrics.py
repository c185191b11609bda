"""The challenge's Dice, exact and per image, and what goes with it: rates, ROC, calibration, intervals, sizes.

Every value is made per image first, then aggregated. Imports kernels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, stdtrit
from torch import Tensor

from pneumo.kernels.runs import area, intersection_size

FEWEST = 5  # groups that a bootstrap interval takes: of fewer, it is far too narrow
SMALLEST_PART = 10  # positive images by size
Z = 1.959964  # standard deviations to either side that hold 95 % of a normal distribution


def dice(pred: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """Dice of each image.

    Args:
        pred, truth: (B, H, W) or (H, W) bool.

    Returns:
        (B,) or () float64, of the kind of `pred`: 1 where both are empty, 0 where only one is.

    Raises:
        ValueError: shapes differ, or not two or three dimensions.
        TypeError: not bool.
    """
    if pred.shape != truth.shape or pred.ndim not in (2, 3):
        raise ValueError(f"expected two (B, H, W) or (H, W) masks, got {tuple(pred.shape)} and {tuple(truth.shape)}")
    if not str(pred.dtype).endswith("bool") or not str(truth.dtype).endswith("bool"):
        raise TypeError(f"masks must be bool, got {pred.dtype} and {truth.dtype}")
    overlap, total = (pred & truth).sum((-2, -1)), pred.sum((-2, -1)) + truth.sum((-2, -1))
    both_empty = total == 0
    overlap = 2 * overlap + both_empty  # 1 / 1 where both are empty
    total = total + both_empty
    if isinstance(overlap, Tensor):
        return overlap.double() / total.double()
    return np.asarray(overlap / total)


def dice_runs(pred: np.ndarray, truth: np.ndarray) -> float:
    """Dice of one image from (R, 2) runs, sorted and disjoint; exactly `dice` of their masks."""
    total = area(pred) + area(truth)
    return 2 * intersection_size(pred, truth) / total if total else 1.0


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; all are NaN of no case, the ends alone where too few cases tell of them, or none.

    None do where no draw of a bootstrap differed.
    """

    value: float
    low: float
    high: float

    @property
    def has_ends(self) -> bool:
        return not np.isnan(self.low)

    @property
    def signed(self) -> str:
        """As of a difference, with its sign."""
        return self._text("+.4f")

    def __str__(self) -> str:
        return self._text(".4f")

    def _text(self, how: str) -> str:
        if np.isnan(self.value):
            return "-"
        value, low, high = (round(number, 4) + 0.0 for number in (self.value, self.low, self.high))  # no -0.0000
        return f"{value:{how}}" + (f" ({low:{how}} to {high:{how}})" if self.has_ends else "")


def groups_of(names: Sequence[str | None]) -> np.ndarray:
    """(N,) int64: which cases are resampled together: those of one name, as a patient's; one without, on its own."""
    names = [f"group {name}" if name is not None else f"case {i}" for i, name in enumerate(names)]
    return np.unique(names, return_inverse=True)[1] if names else np.empty(0, dtype=np.int64)


def bootstrap_means(values: np.ndarray, groups: np.ndarray, *, draws: int, seed: int) -> list[Interval]:
    """Means with percentile intervals, of at least `FEWEST` groups; whole groups are drawn with replacement.

    Of few groups, or of groups of which a few have most cases, the quantiles lie further out, see `_interval`.

    Args:
        values: (K, N) float; NaN where a case does not count.
        groups: (N,) from `groups_of`.
    """
    counted = ~np.isnan(values)
    filled = np.where(counted, values, 0.0)
    number = int(groups.max()) + 1
    # a draw needs only each group's sum and count
    sums = np.array([np.bincount(groups, weights=row, minlength=number) for row in (*filled, *counted)])
    total, count = np.split(sums, 2)
    drawn = np.concatenate([drawn @ sums.T for drawn in _draws(number, draws, seed)])
    above, below = np.split(drawn, 2, axis=1)
    means = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    return [
        _interval(float(t.sum() / c.sum()) if c.sum() else float("nan"), column, c)
        for t, c, column in zip(total, count, means.T, strict=True)
    ]


def shares(values: np.ndarray, groups: np.ndarray) -> list[Interval]:
    """Shares with Wilson's intervals, which stay honest near 0 and 1, where a bootstrap's have no width.

    They are those of as many independent cases as have the variance that the groups' shares show between them, and of
    fewer where few groups tell of that variance, or a few have most cases; where there is none, of as many as there are
    groups.

    Args:
        values: (K, N) float, 0 or 1; NaN where a case does not count.
        groups: (N,) from `groups_of`.

    Source:
        Wilson 1927, doi:10.1080/01621459.1927.10502953; effective number of cases and its correction by quantiles of
        Student's t as in Korn and Graubard 1998, Survey Methodology 24, 193, the latter's first degrees of freedom
        those of the effective number, so that repeated cases change nothing.
    """
    found = []
    for row in values:
        counted = ~np.isnan(row)
        if not counted.any():
            found.append(Interval(*[float("nan")] * 3))
            continue
        _, place = np.unique(groups[counted], return_inverse=True)
        total, size = np.bincount(place, weights=row[counted]), np.bincount(place)
        number, cases = len(size), size.sum()
        share = total.sum() / cases
        equal = _effective(size)
        spread = ((total - share * size) ** 2).sum() * equal / max(equal - 1, 1) / cases**2
        alone = number
        if 0 < share < 1 and number > 1 and spread > 0:
            alone = min(share * (1 - share) / spread, cases)
            alone *= min(stdtrit(max(alone - 1, 1), 0.975) / stdtrit(max(equal - 1, 1), 0.975), 1) ** 2
        wider = 1 + Z**2 / alone
        middle = (share + Z**2 / (2 * alone)) / wider
        half = Z * np.sqrt(share * (1 - share) / alone + Z**2 / (4 * alone**2)) / wider
        low, high = min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)
        found.append(Interval(float(share), float(low), float(high)))
    return found


def bootstrap_ranking(
    statistic: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    score: np.ndarray,
    positive: np.ndarray,
    groups: np.ndarray,
    *,
    draws: int,
    seed: int,
) -> Interval:
    """`roc_auc` or `average_precision` with its percentile interval; whole groups are drawn with replacement.

    It takes `FEWEST` groups with positive cases, and as many with negative ones.
    """
    number = int(groups.max()) + 1
    sides = [np.bincount(groups[some], minlength=number) for some in (positive, ~positive)]
    weights = (drawn[:, groups] for drawn in _draws(number, draws, seed))
    values = np.concatenate([statistic(score, positive, some) for some in weights])
    rarer = min(sides, key=lambda count: ((count > 0).sum() >= FEWEST, _effective(count)))
    return _interval(float(statistic(score, positive, np.ones((1, len(score))))[0]), values, rarer)


def roc_auc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve: how often a positive case scores above a negative one, half where they tie.

    Args:
        score: (N,) float. positive: (N,) bool.
        weights: (D, N), how often each case counts in each of D samples.

    Returns:
        (D,) float64; NaN where a sample has no positive or no negative case.
    """
    above, below = _by_score(score, positive, weights)
    negatives_below = below.cumsum(axis=1) - below / 2
    pairs = above.sum(axis=1) * below.sum(axis=1)
    wins = (above * negatives_below).sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)


def average_precision(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean precision over the steps of recall, without interpolation; arguments and result as `roc_auc`'s."""
    above, below = (part[:, ::-1] for part in _by_score(score, positive, weights))
    found, flagged = above.cumsum(axis=1), (above + below).cumsum(axis=1)
    precision = np.divide(found, flagged, out=np.zeros_like(found), where=flagged > 0)
    positives = above.sum(axis=1)
    total = (above * precision).sum(axis=1)
    return np.divide(total, positives, out=np.full(len(total), np.nan), where=positives > 0)


def ranking_curves(score: np.ndarray, positive: np.ndarray) -> dict[str, np.ndarray]:
    """ROC and precision-recall curves: one point for each different score, the strictest first.

    Returns:
        "score", "false_positive_rate", "sensitivity", "precision", (K,) each.
    """
    above, below = (part[0, ::-1] for part in _by_score(score, positive, np.ones((1, len(score)))))
    found, wrong = above.cumsum(), below.cumsum()
    return {
        "score": np.unique(score)[::-1],
        "false_positive_rate": wrong / max(below.sum(), 1),
        "sensitivity": found / max(above.sum(), 1),
        "precision": found / (found + wrong),
    }


def reliability(score: np.ndarray, positive: np.ndarray, bins: int = 10) -> tuple[list[dict[str, float]], float]:
    """How often cases of a score are positive.

    Args:
        score: (N,) float in [0, 1], read as a probability.

    Returns:
        One row for each of `bins` equal parts of [0, 1] that has cases: "low", "high", "cases", "mean_score",
        "positive_share"; and the expected calibration error, the mean gap of the two over all cases.
    """
    place = np.minimum((score * bins).astype(int), bins - 1)
    rows = [
        {
            "low": number / bins,
            "high": (number + 1) / bins,
            "cases": int((place == number).sum()),
            "mean_score": float(score[place == number].mean()),
            "positive_share": float(positive[place == number].mean()),
        }
        for number in np.unique(place).tolist()
    ]
    return rows, sum(row["cases"] * abs(row["mean_score"] - row["positive_share"]) for row in rows) / len(score)


@dataclass(frozen=True)
class Scores:
    """What is said of a set of decided images.

    Attributes:
        dice, dice_positive: mean Dice of all and of positive images.
        sensitivity, specificity: share of positive images decided positive, of negative ones decided negative;
            the latter is the challenge's true-negative rate, and the Dice of negative images.
        all_empty: mean Dice if every mask were empty.
        roc_auc, average_precision, calibration_error: of the image score; None if there is none.
    """

    cases: int
    positives: int
    dice: Interval
    dice_positive: Interval
    sensitivity: Interval
    specificity: Interval
    all_empty: float
    roc_auc: Interval | None
    average_precision: Interval | None
    calibration_error: float | None


def summarise(
    dice: np.ndarray,
    positive: np.ndarray,
    decided: np.ndarray,
    score: np.ndarray | None,
    groups: np.ndarray,
    *,
    draws: int,
    seed: int,
) -> Scores:
    """Aggregate per-image values, with intervals.

    Args:
        dice: (N,) float, of each image.
        positive, decided: (N,) bool, annotated and decided to have pneumothorax.
        score: (N,) float in [0, 1], of the image; None if unknown.
        groups: (N,) from `groups_of`.
        draws: bootstrap samples.
    """
    options = {"draws": draws, "seed": seed}
    only_positive = np.where(positive, 1.0, np.nan)
    only_negative = np.where(positive, np.nan, 1.0)
    means = bootstrap_means(np.stack([dice, dice * only_positive]), groups, **options)
    means += shares(np.stack([decided * only_positive, ~decided * only_negative]), groups)
    ranked = score is not None and positive.any() and not positive.all()
    return Scores(
        len(dice),
        int(positive.sum()),
        *means,
        all_empty=float((~positive).mean()),
        roc_auc=bootstrap_ranking(roc_auc, score, positive, groups, **options) if ranked else None,
        average_precision=bootstrap_ranking(average_precision, score, positive, groups, **options) if ranked else None,
        calibration_error=reliability(score, positive)[1] if score is not None else None,
    )


def by_size(
    dice: np.ndarray,
    area: np.ndarray,
    decided: np.ndarray,
    score: np.ndarray | None,
    groups: np.ndarray,
    *,
    bins: int = 10,
    draws: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The same by size of the pneumothorax: positive images in about equal parts by annotated area.

    Images of one area are in one part, and a part has at least `SMALLEST_PART` images, if there are as many. Ranking
    metrics set a part's positives against all negatives; the calibration gap is how far its mean score is below 1. What
    concerns negative images alone has no size.

    Args:
        area: (N,) int, annotated pixels; other arguments as `summarise`'s.

    Returns:
        Rows "cases", "smallest", "largest" (pixels), "dice", "sensitivity" (Intervals), "roc_auc",
        "average_precision", "calibration_gap" (float or None); at most `bins`.
    """
    order = np.flatnonzero(area > 0)
    order = order[np.argsort(area[order], kind="stable")]
    negative = np.flatnonzero(area == 0)
    rows = []
    for part in _equal_parts(order, area[order], bins):
        values = np.full((2, len(dice)), np.nan)
        values[:, part] = dice[part], decided[part]
        means = bootstrap_means(values[:1], groups, draws=draws, seed=seed) + shares(values[1:], groups)
        both = np.concatenate([part, negative])
        ranked = score is not None and len(negative) > 0
        one = np.ones((1, len(both)))
        rows.append(
            {
                "cases": len(part),
                "smallest": int(area[part[0]]),
                "largest": int(area[part[-1]]),
                "dice": means[0],
                "sensitivity": means[1],
                "roc_auc": float(roc_auc(score[both], area[both] > 0, one)[0]) if ranked else None,
                "average_precision": float(average_precision(score[both], area[both] > 0, one)[0]) if ranked else None,
                "calibration_gap": float(1 - score[part].mean()) if score is not None else None,
            }
        )
    return rows


def _equal_parts(order: np.ndarray, area: np.ndarray, bins: int) -> list[np.ndarray]:
    """Cut positive images, ascending by area, into about equal parts; none without images."""
    count = max(min(bins, len(order) // SMALLEST_PART), 1)
    cuts = len(order) * np.arange(1, count) // count
    kept = [0]
    for first in np.searchsorted(area, area[cuts]).tolist():  # of all images of that area
        if min(first - kept[-1], len(order) - first) >= SMALLEST_PART:
            kept.append(first)
    return np.split(order, kept[1:]) if len(order) else []


def _by_score(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(D, K) weights of positive and of negative cases at each of the K different scores, ascending."""
    order = np.argsort(score, kind="stable")
    first = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    weights = weights[:, order].astype(np.float64)
    above = np.add.reduceat(weights * positive[order], first, axis=1)
    return above, np.add.reduceat(weights, first, axis=1) - above


def _draws(groups: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """(some, groups) counts: how often each group is in each bootstrap sample."""
    generator = np.random.default_rng(seed)
    for start in range(0, draws, 50):
        picked = generator.integers(groups, size=(min(50, draws - start), groups))
        picked += np.arange(len(picked))[:, None] * groups
        yield np.bincount(picked.ravel(), minlength=len(picked) * groups).reshape(len(picked), groups)


def _interval(value: float, samples: np.ndarray, count: np.ndarray) -> Interval:
    """The interval of a bootstrap's samples.

    Draws from few groups differ too little, and the normal distribution is too narrow for them; so the quantiles are
    those at which a normal distribution lies as far out as Student's t, times what the draws lack.

    Args:
        value: of all cases.
        samples: (D,) the same of each draw; NaN where it had no case.
        count: (G,) cases in each group, of those that are rarest.

    Source:
        Hesterberg 2015, "What teachers should know about the bootstrap", The American Statistician 69, 371, section
        5.4: expanded percentile intervals; here of as many groups as there are effectively.
    """
    samples = samples[~np.isnan(samples)]
    low = high = float("nan")
    if (count > 0).sum() >= FEWEST:
        groups = max(_effective(count), 2.0)
        tail = ndtr(-np.sqrt(groups / (groups - 1)) * stdtrit(groups - 1, 0.975))
        low, high = map(float, np.quantile(samples, [tail, 1 - tail]))
    return Interval(value, low, high) if low < high else Interval(value, float("nan"), float("nan"))


def _effective(count: np.ndarray) -> float:
    """How many groups of equal size tell as much as groups of (G,) `count` cases; 0 without cases. Kish 1965."""
    return float(count.sum()) ** 2 / max(float((count.astype(np.float64) ** 2).sum()), 1.0)
