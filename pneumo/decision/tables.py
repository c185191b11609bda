"""What every decision rule needs to know of a case, without its probability map.

Two histograms and, for each threshold, the connected components: from these the Dice of any rule follows exactly as
from the mask itself, since both see the same quantised probabilities. Imports kernels, rule, components, errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pneumo.decision.components import label_runs
from pneumo.decision.rule import LEVELS, Rule, level
from pneumo.errors import UsageError
from pneumo.kernels.runs import mask_to_runs, runs_to_mask, split_columns

STACKED_PIXELS = 1 << 23  # of the thresholded maps of one image that are labelled in one go


@dataclass(frozen=True)
class Tables:
    """N cases, each as the rules see it.

    Attributes:
        levels: (T,) int64, ascending: the thresholds k of k / 256 that have components.
        histogram: (N, 256) int32, pixels of the annotation grid by quantised probability.
        true_histogram: (N, 256) int32, those of them that are pneumothorax.
        agreement: (N, T) float32, Dice of the mask of the image and that of its mirror image, the mean over networks,
            at each threshold, no area filter; 1 without mirror.
        counts: (N, T) int32, components at each threshold.
        area, overlap: (C,) int32, pixels of each component and those of them that are pneumothorax, by case, then
            threshold.
    """

    levels: np.ndarray
    histogram: np.ndarray
    true_histogram: np.ndarray
    agreement: np.ndarray
    counts: np.ndarray
    area: np.ndarray
    overlap: np.ndarray

    def __len__(self) -> int:
        return len(self.histogram)

    @property
    def true_area(self) -> np.ndarray:
        """(N,) int64, annotated pixels."""
        return self.true_histogram.sum(axis=1, dtype=np.int64)

    @property
    def positive(self) -> np.ndarray:
        """(N,) bool."""
        return self.true_area > 0

    def place(self, threshold: float) -> int:
        """Where a threshold stands in `levels`.

        Raises:
            UsageError: it has no components here; gives the nearest that has.
        """
        place = int(np.searchsorted(self.levels, level(threshold)))
        if place == len(self.levels) or self.levels[place] != level(threshold):
            nearest = self.levels[np.abs(self.levels - level(threshold)).argmin()] / LEVELS
            raise UsageError(f"the out-of-fold tables have no components at threshold {threshold}; nearest: {nearest}")
        return place

    def components(self, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The components of some cases.

        Returns:
            (K,) each: case (from 0 within `rows`) times T plus place of the threshold, area, overlap.
        """
        ends = np.cumsum(self.counts, dtype=np.int64)  # over cases, then thresholds
        width = len(self.levels)
        start, stop, _ = rows.indices(len(self))
        first, last = (0 if place == 0 else ends[place * width - 1] for place in (start, stop))
        cell = np.repeat(np.arange((stop - start) * width), self.counts[start:stop].ravel())
        return cell, self.area[first:last], self.overlap[first:last]

    def take(self, rows: np.ndarray) -> "Tables":
        """The tables of some cases, in the order of `rows`, (K,) int64."""
        sizes = self.counts.sum(axis=1, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        chosen = np.repeat(starts[rows] - (np.cumsum(sizes[rows]) - sizes[rows]), sizes[rows])
        chosen = chosen + np.arange(len(chosen))
        per_case = (self.histogram, self.true_histogram, self.agreement, self.counts)
        per_component = (self.area, self.overlap)
        return Tables(self.levels, *(part[rows] for part in per_case), *(part[chosen] for part in per_component))


def measure(q: np.ndarray, truth: np.ndarray, levels: np.ndarray, agreement: np.ndarray | None = None) -> Tables:
    """Make the tables of one case.

    Args:
        q: (A, A) uint8 quantised probabilities.
        truth: (R, 2) runs of the annotation; none where it is not known.
        levels: (T,) ascending, of 0 .. 256.
        agreement: (257,) from `agreement`; None for 1 at all levels.
    """
    levels = np.asarray(levels, dtype=np.int64)
    true = runs_to_mask(truth, *q.shape)
    counts, area, overlap = _components(q, true, levels)
    alike = np.ones(len(levels)) if agreement is None else agreement[levels]
    return Tables(
        levels=levels,
        histogram=np.bincount(q.ravel(), minlength=LEVELS)[None].astype(np.int32),
        true_histogram=np.bincount(q[true], minlength=LEVELS)[None].astype(np.int32),
        agreement=alike[None].astype(np.float32),
        counts=counts[None].astype(np.int32),
        area=area.astype(np.int32),
        overlap=overlap.astype(np.int32),
    )


def join(parts: Sequence[Tables]) -> Tables:
    """The tables of all parts, one after the other; their levels must be the same."""
    levels = parts[0].levels
    if any(not np.array_equal(part.levels, levels) for part in parts):
        raise UsageError("out-of-fold tables of different thresholds cannot be joined; make them again: make oof")
    names = ("histogram", "true_histogram", "agreement", "counts", "area", "overlap")
    return Tables(levels, *(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """How alike two views' masks are, at every level.

    Args:
        first, second: (B, A, A) uint8 quantised probabilities, as of one network on the image and on its mirror image.

    Returns:
        (B, 257) float64, on their device: for k of 0 .. 256, the Dice of first >= k and second >= k; 1 where both are
        empty.
    """
    both = 2 * _at_least(torch.minimum(first, second))
    sizes = _at_least(first) + _at_least(second)
    return torch.where(sizes > 0, both.double() / sizes.clamp(min=1), 1.0)


def histogram(q: Tensor) -> Tensor:
    """(B, 256) int64: pixels of each image by level, of (B, A, A) uint8, on their device."""
    if not q.is_cuda:  # as bytes, one by one: 3 to 15 times as fast as what takes a GPU a single call
        return torch.stack([torch.bincount(image.flatten(), minlength=LEVELS) for image in q])
    offset = torch.arange(len(q), device=q.device)[:, None, None] * LEVELS
    return torch.bincount((q + offset).flatten(), minlength=len(q) * LEVELS).view(len(q), LEVELS)


def _at_least(q: Tensor) -> Tensor:
    """(B, 257) int64: pixels of each image that are at least of each level; none is of 256."""
    return F.pad(histogram(q).flip(1).cumsum(1).flip(1), (0, 1))


def filtered(tables: Tables, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """What a rule leaves of each case: (N,) int64 area and overlap of the decided mask."""
    place, width = tables.place(rule.threshold), len(tables.levels)
    cell, area, overlap = tables.components(slice(None))
    kept = (cell % width == place) & (area > rule.min_area)
    case, open_ = cell[kept] // width, gate(tables, rule.top_threshold, rule.top_area)

    def total(values: np.ndarray) -> np.ndarray:
        return (np.bincount(case, weights=values[kept], minlength=len(tables)) * open_).astype(np.int64)

    return total(area), total(overlap)


def gate(tables: Tables, top_threshold: float, top_area: int) -> np.ndarray:
    """(N,) bool: whether more than `top_area` pixels exceed `top_threshold`."""
    return tables.histogram[:, level(top_threshold) :].sum(axis=1, dtype=np.int64) > top_area


def dice(tables: Tables, rule: Rule) -> np.ndarray:
    """(N,) float64: each case's Dice under a rule, equal to `metrics.dice_runs(decide(q, rule), truth)`."""
    area, overlap = filtered(tables, rule)
    total = area + tables.true_area
    return np.where(total > 0, 2 * overlap / np.maximum(total, 1), 1.0)


def _components(q: np.ndarray, true: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Components of q >= k for every level k: (T,) counts and (C,) areas, overlaps with `true`."""
    inside = q >= levels[0]
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    counts = np.zeros(len(levels), dtype=np.int64)
    parts: list[tuple[np.ndarray, ...]] = []
    if len(rows):
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        crop = np.ascontiguousarray(q[box].T)  # (w, h): columns are contiguous
        width, height = crop.shape
        before_true = np.concatenate([[0], np.cumsum(true[box].T, dtype=np.int64)])
        # the maps of many levels stand side by side, an empty column between them, and are labelled in one go
        period = (width + 1) * height
        per_chunk = max(1, STACKED_PIXELS // period)
        for first in range(0, len(levels), per_chunk):
            some = levels[first : first + per_chunk]
            stacked = np.zeros((len(some), width + 1, height), dtype=np.bool_)
            np.greater_equal(crop, some[:, None, None], out=stacked[:, :width])
            runs = split_columns(mask_to_runs(stacked.reshape(-1, height).T), height)
            if not len(runs):
                break  # levels ascend
            labels = label_runs(runs, height)
            place = runs[:, 0] // period
            start, end = (runs - (place * period)[:, None]).T
            area = np.bincount(labels, weights=end - start)
            overlap = np.bincount(labels, weights=before_true[end] - before_true[start])
            parts.append((area, overlap))
            first_run = np.unique(labels, return_index=True)[1]
            counts[first : first + len(some)] = np.bincount(place[first_run], minlength=len(some))
    area, overlap = (np.concatenate(part) for part in zip(*parts, strict=True)) if parts else np.zeros((2, 0))
    return counts, area.astype(np.int64), overlap.astype(np.int64)
