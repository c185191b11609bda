"""Connected components on runs, not pixels, and the filter by area.

Runs of neighbouring columns that touch, over an edge or a corner, belong together; an area is a sum of run lengths.
Imports kernels.
"""

import numpy as np

from pneumo.kernels.runs import join, mask_to_runs, runs_to_mask, split_columns


def label_runs(runs: np.ndarray, height: int) -> np.ndarray:
    """Number the 8-connected components of column runs.

    Args:
        runs: (K, 2) int64, sorted and disjoint, none spanning two columns; no two of one column touch.
        height: of the mask, pixels.

    Returns:
        (K,) int64: component 0 .. C - 1 of each run, in order of each component's first run.
    """
    count = len(runs)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    starts, ends = runs[:, 0], runs[:, 1]
    # a run touches those of the next column that start at its end or before and end at its start or after;
    # these are one stretch of the sorted runs
    column_end = (starts // height + 1) * height
    low = np.searchsorted(ends, np.maximum(starts + height, column_end + 1), side="left")
    high = np.searchsorted(starts, np.minimum(ends + height, column_end + height - 1), side="right")
    touching = np.maximum(high - low, 0)
    first = np.repeat(np.arange(count), touching)
    second = np.arange(len(first)) - np.repeat(np.cumsum(touching) - touching, touching) + low[first]
    return _components(count, first, second)


def drop_small_runs(runs: np.ndarray, height: int, min_area: int) -> np.ndarray:
    """Keep the components of more than `min_area` pixels.

    Args:
        runs: (R, 2) int64, sorted, disjoint and maximal.

    Returns:
        (R, 2) int64 of the same kind.
    """
    if min_area <= 0 or not len(runs):
        return runs
    columns = split_columns(runs, height)
    labels = label_runs(columns, height)
    areas = np.bincount(labels, weights=columns[:, 1] - columns[:, 0])
    return join(columns[areas[labels] > min_area])


def drop_small(mask: np.ndarray, min_area: int) -> np.ndarray:
    """Keep the 8-connected components of more than `min_area` pixels: (H, W) bool to (H, W) bool."""
    return runs_to_mask(drop_small_runs(mask_to_runs(mask), mask.shape[0], min_area), *mask.shape)


def _components(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Components of a graph of `count` nodes with edges first-second, numbered by their lowest node."""
    root = np.arange(count)
    while len(first):
        # hook the larger root of every edge under the smallest root it meets, then shorten all paths
        a, b = root[first], root[second]
        apart = a != b
        if not apart.any():
            break
        first, second, a, b = first[apart], second[apart], a[apart], b[apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, shorter := root[root]):
            root = shorter
    return np.unique(root, return_inverse=True)[1]
