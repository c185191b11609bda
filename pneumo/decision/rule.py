"""The decision rule: probabilities on the annotation grid to the runs of a mask.

Probabilities are quantised once to 256 levels, q = clip(ceil(256 p) - 1, 0, 255), so that p > k / 256 exactly where
q >= k for every k of 1 .. 255; validation, tuning and submission all see q. Imports components, kernels.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pneumo.decision.components import drop_small_runs
from pneumo.kernels import batch
from pneumo.kernels.runs import threshold_to_runs

LEVELS = 256

# middle of each level's probabilities; the lowest counts as 0, as it holds the whole background
PROBABILITY = np.concatenate([[0.0], (np.arange(1, LEVELS) + 0.5) / LEVELS])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When a pixel is pneumothorax; areas are pixels of the annotation grid.

    Attributes:
        threshold: mask = probs > threshold, a multiple of 1/256 and not 0, above which padding would be as well ...
        min_area: ... without 8-connected components of this many pixels or fewer.
        top_threshold, top_area: an image is positive only if more than `top_area` pixels exceed `top_threshold`.
    """

    threshold: float = 0.5
    min_area: int = 0
    top_threshold: float = 0.0
    top_area: int = 0

    @classmethod
    def of(cls, settings: Any) -> "Rule":
        """The rule of a recipe's table [rule]: a dataclass of the same fields."""
        return cls(**asdict(settings))

    def __post_init__(self) -> None:
        if not level(self.threshold):
            raise ValueError("threshold must be at least 1/256: at 0 every pixel would be pneumothorax")
        level(self.top_threshold)
        if self.min_area < 0 or self.top_area < 0:
            raise ValueError(f"areas must be at least 0, got {self.min_area} and {self.top_area}")


def level(threshold: float) -> int:
    """The k of threshold = k / 256.

    Raises:
        ValueError: not a multiple of 1/256 in [0, 1].
    """
    if not 0 <= threshold <= 1 or threshold * LEVELS % 1:
        raise ValueError(f"a threshold must be a multiple of 1/{LEVELS} in [0, 1], got {threshold}")
    return int(threshold * LEVELS)


def quantise(probs: Tensor) -> Tensor:
    """Quantise probabilities, any shape, float in [0, 1], to uint8 of the same shape."""
    levels = (probs.float() * LEVELS).ceil_().sub_(1).clamp_(0, LEVELS - 1)
    return levels.to(torch.int16).to(torch.uint8)  # on a CPU in a tenth of the time of float to uint8


def resize_quantise(probs: Tensor, size: int, boxes: np.ndarray | None = None) -> Tensor:
    """Bring probabilities to the annotation grid and quantise them.

    Args:
        probs: (B, 1, S, S) float32.
        size: side of the annotation grid, A.
        boxes: (B, 4) int64: first row and the one behind the last, first column and the one behind the last, where each
            image is no padding; outside nothing can be found. None: everywhere.

    Returns:
        (B, A, A) uint8, on the same device.
    """
    if probs.shape[-1] != size:
        probs = F.interpolate(probs, size=(size, size), mode="bilinear", align_corners=False)
    q = quantise(probs[:, 0])
    return q if boxes is None else q * _inside(torch.from_numpy(boxes).to(q.device), size)


def _inside(boxes: Tensor, size: int) -> Tensor:
    """(B, A, A) bool: which pixels are in each image's box."""
    place = torch.arange(size, device=boxes.device)
    top, bottom, left, right = boxes.T[:, :, None]
    rows, columns = (place >= top) & (place < bottom), (place >= left) & (place < right)
    return rows[:, :, None] & columns[:, None, :]


def decide(q: np.ndarray, rule: Rule) -> np.ndarray:
    """Apply the rule to one image.

    Args:
        q: (A, A) uint8 quantised probabilities.

    Returns:
        (R, 2) int64 runs of the mask; none if the image is decided negative.
    """
    top = level(rule.top_threshold)  # at 0 all pixels count: q cannot tell p = 0 from p just above it
    if (np.count_nonzero(q >= top) if top else q.size) <= rule.top_area:
        return np.empty((0, 2), dtype=np.int64)
    return drop_small_runs(threshold_to_runs(q, level(rule.threshold)), q.shape[0], rule.min_area)


def decide_batch(q: Tensor, rule: Rule) -> list[np.ndarray]:
    """Apply the rule to a batch on its device; only runs come to the host.

    Args:
        q: (B, A, A) uint8 quantised probabilities.

    Returns:
        B arrays of (R, 2) int64 runs, each equal to what `decide` gives.
    """
    count, side = q.shape[:2]
    positive = batch.at_least(q, level(rule.top_threshold)).sum(dim=(1, 2)) > rule.top_area
    runs = batch.column_runs(batch.at_least(q, level(rule.threshold)) & positive[:, None, None])
    if rule.min_area:
        runs = batch.drop_small_runs(runs, side, side, rule.min_area)
    runs = batch.join(runs, side**2).cpu().numpy()
    first = np.searchsorted(runs[:, 0], np.arange(count + 1) * side**2)
    return [runs[first[i] : first[i + 1]] - i * side**2 for i in range(count)]


def image_score(histogram: np.ndarray) -> np.ndarray:
    """How sure the networks are that an image has pneumothorax: the mean probability of its most suspicious pixels.

    Those are a 1/256 of the annotation grid, a small pneumothorax; the single highest probability ranks worse.

    Args:
        histogram: (..., 256) int, pixels by quantised probability.

    Returns:
        (...) float64 in [0, 1).
    """
    pixels = max(int(histogram.reshape(-1, LEVELS)[0].sum()) // 256, 1)
    reach = histogram[..., ::-1].cumsum(axis=-1).clip(max=pixels)  # of the highest level, the two highest, ...
    taken = np.diff(reach, prepend=0, axis=-1)
    return taken @ PROBABILITY[::-1] / pixels
