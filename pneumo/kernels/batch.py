"""Runs and components of a batch of masks, found on its device by whole-tensor operations.

Pixel (row, column) of image b is number (b * W + column) * H + row: the images of a batch stand side by side as if they
were one. The definition of each result is its NumPy form for one mask, in runs and in decision.components. Imports
nothing from pneumo.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least(q: Tensor, level: int) -> Tensor:
    """Where quantised probabilities, uint8, reach a level of 0 .. 256; beside uint8, torch would take 256 for 0."""
    return q > level - 1 if level else torch.ones_like(q, dtype=torch.bool)


def column_runs(masks: Tensor) -> Tensor:
    """Find the runs of each column: (B, H, W) bool to (K, 2) int64, sorted, none of which spans two columns."""
    height = masks.shape[1]
    columns = F.pad(masks.transpose(1, 2).contiguous(), (1, 1))  # (B, W, H + 2), background at both ends
    edges = (columns[..., 1:] != columns[..., :-1]).flatten().nonzero()[:, 0]  # start, end, start, end, ...
    return (edges - edges // (height + 1)).view(-1, 2)  # H + 1 places for edges in H pixels


def label_runs(runs: Tensor, height: int, width: int) -> Tensor:
    """Find the 8-connected components of column runs.

    Args:
        runs: (K, 2) int64, as `column_runs` gives them.
        height, width: of one mask, pixels.

    Returns:
        (K,) int64: number of the first run of each run's component.
    """
    count, (starts, ends) = len(runs), runs.T.contiguous()
    column = starts // height
    column_end = (column + 1) * height
    # a run touches one stretch low .. high - 1 of the next column's; see decision.components
    low = torch.searchsorted(ends, torch.maximum(starts + height, column_end + 1))
    high = torch.searchsorted(starts, torch.minimum(ends + height, column_end + height - 1), right=True)
    touches = (high > low) & (column % width < width - 1)
    # it is united with the first of the stretch, and each of the stretch with the next: at most 2 K edges, no lists
    node = torch.arange(count, device=runs.device)
    first = torch.where(touches, low, node)
    change = torch.zeros(count + 1, dtype=torch.int64, device=runs.device)
    change.scatter_add_(0, low, touches.long())
    change.scatter_add_(0, (high - 1).clamp_min(0), -touches.long())
    following = torch.where(change[:-1].cumsum(0) > 0, node + 1, node)
    a, b = torch.cat([node, node]), torch.cat([first, following])
    root = node
    while True:
        # hook the larger root of every edge under the smallest root it meets, then shorten all paths
        x, y = root[a], root[b]
        hooked = root.scatter_reduce(0, torch.maximum(x, y), torch.minimum(x, y), "amin")
        for _ in range(count.bit_length()):
            hooked = hooked[hooked]
        if torch.equal(hooked, root):
            return root
        root = hooked


def drop_small_runs(runs: Tensor, height: int, width: int, min_area: int) -> Tensor:
    """Keep the components of more than `min_area` pixels: (K, 2) column runs to (L, 2), L <= K."""
    root = label_runs(runs, height, width)
    area = torch.zeros(len(runs), dtype=torch.int64, device=runs.device)
    area.scatter_add_(0, root, runs[:, 1] - runs[:, 0])
    return runs[area[root] > min_area]


def join(runs: Tensor, pixels: int) -> Tensor:
    """Make column runs maximal: those that touch become one, within each image of so many pixels.

    Args:
        runs: (K, 2) int64, sorted.

    Returns:
        (R, 2) int64.
    """
    apart = (runs[1:, 0] != runs[:-1, 1]) | (runs[1:, 0] % pixels == 0)
    end = torch.ones(min(len(runs), 1), dtype=torch.bool, device=runs.device)
    return torch.stack([runs[torch.cat([end, apart]), 0], runs[torch.cat([apart, end]), 1]], dim=1)
