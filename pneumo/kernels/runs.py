"""Runs: a mask as the (R, 2) starts and ends of its foreground, column by column.

Pixel (row, column) of an (H, W) mask is number column * H + row; a run [start, end) may go on over a column's end into
the next column, as in the challenge's run-length code. Imports nothing from pneumo.
"""

from collections.abc import Sequence

import numpy as np

DENSE = 64  # pixels to an edge; with fewer there are many edges


def mask_to_runs(mask: np.ndarray) -> np.ndarray:
    """Find the runs of a mask.

    Args:
        mask: (H, W) bool.

    Returns:
        (R, 2) int64, sorted, disjoint and maximal.
    """
    edges = None if mask.flags.f_contiguous else _few_edges(mask)
    if edges is None:
        pixels = mask.ravel(order="F")
        edges = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
        if pixels.size and pixels[0]:
            edges = np.concatenate([[0], edges])
    if mask.size and mask[-1, -1]:
        edges = np.append(edges, mask.size)
    return edges.reshape(-1, 2)


def _few_edges(mask: np.ndarray) -> np.ndarray | None:
    """Where runs of a mask that is stored by rows start and end, sorted, but for the last pixel's end.

    A few edges put in order cost a fifth of transposing the mask.

    Returns:
        None if there are many.
    """
    height, width = mask.shape
    changes = np.empty_like(mask)  # where a pixel differs from the one before it, a column's first from its last one
    np.not_equal(mask[1:], mask[:-1], out=changes[1:])
    np.not_equal(mask[0, 1:], mask[-1, :-1], out=changes[0, 1:])
    changes[0, 0] = mask[0, 0]
    if np.count_nonzero(changes) * DENSE > mask.size:
        return None
    row, column = np.divmod(np.flatnonzero(changes), width)
    return np.sort(column * height + row)


def threshold_to_runs(q: np.ndarray, level: int) -> np.ndarray:
    """Find the runs of quantised probabilities of at least `level`: (H, W) uint8 to (R, 2) int64."""
    return mask_to_runs(q >= level)


def runs_to_mask(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """Paint runs: the inverse of `mask_to_runs`.

    Args:
        runs: (R, 2) int64, sorted and disjoint, within height * width pixels.

    Returns:
        (H, W) bool.
    """
    lengths = np.diff(runs.reshape(-1), prepend=0, append=height * width)  # gap, run, gap, run, ..., gap
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def split_columns(runs: np.ndarray, height: int) -> np.ndarray:
    """Cut runs at the ends of columns: (R, 2) to (K, 2), K >= R, none of which spans two columns."""
    first, last = runs[:, 0] // height, (runs[:, 1] - 1) // height
    if (first == last).all():
        return runs
    counts = last - first + 1
    parent = np.repeat(np.arange(len(runs)), counts)
    column = np.arange(len(parent)) - np.repeat(np.cumsum(counts) - counts, counts) + first[parent]
    starts = np.maximum(runs[parent, 0], column * height)
    ends = np.minimum(runs[parent, 1], (column + 1) * height)
    return np.stack([starts, ends], axis=1)


def join(runs: np.ndarray) -> np.ndarray:
    """Make sorted, disjoint runs maximal: those that touch become one."""
    if len(runs) < 2:
        return runs
    apart = np.flatnonzero(runs[1:, 0] != runs[:-1, 1])
    starts = runs[np.concatenate([[0], apart + 1]), 0]
    ends = runs[np.concatenate([apart, [len(runs) - 1]]), 1]
    return np.stack([starts, ends], axis=1)


def union(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Runs of the pixels that are in any part.

    Args:
        parts: (R, 2) int64 each; in any order, overlapping or not.

    Returns:
        (R, 2) int64, sorted, disjoint and maximal.
    """
    runs = np.concatenate([np.empty((0, 2), np.int64), *parts])
    if not len(runs):
        return runs
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    reach = np.maximum.accumulate(runs[:, 1])
    new = np.concatenate([[True], runs[1:, 0] > reach[:-1]])
    ends = reach[np.concatenate([np.flatnonzero(new)[1:] - 1, [len(runs) - 1]])]
    return np.stack([runs[new, 0], ends], axis=1)


def area(runs: np.ndarray) -> int:
    """How many pixels disjoint runs cover."""
    return int((runs[:, 1] - runs[:, 0]).sum())


def intersection_size(a: np.ndarray, b: np.ndarray) -> int:
    """How many pixels two sets of sorted, disjoint runs share."""
    if not len(a) or not len(b):
        return 0
    return int((_covered(b, a[:, 1]) - _covered(b, a[:, 0])).sum())


def _covered(runs: np.ndarray, position: np.ndarray) -> np.ndarray:
    """How many pixels before each position the runs cover."""
    before = np.searchsorted(runs[:, 0], position, side="right")  # runs that start at or before the position
    total = np.concatenate([[0], np.cumsum(runs[:, 1] - runs[:, 0])])
    beyond = np.maximum(runs[np.maximum(before, 1) - 1, 1] - position, 0)
    return total[before] - np.where(before > 0, beyond, 0)
