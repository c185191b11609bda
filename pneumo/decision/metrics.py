"""The challenge's Dice, exact and per image. Imports kernels."""

import numpy as np
from torch import Tensor

from pneumo.kernels.runs import area, intersection_size


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
