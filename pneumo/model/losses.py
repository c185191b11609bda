"""Losses on logits, built on sums that add up: over a micro-batch in training, over a whole fold in validation.

Always outside autocast and in at least float32: half-precision sums of a megapixel overflow. Imports nothing from
pneumo.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["focal_dice", "bce_dice", "lovasz"]  # as config.StageConfig.loss has them

PIXELS, BCE, FOCAL, OVERLAP, PROBS, MASK, LOVASZ, IMAGES = range(8)  # places in the vector of sums


def loss_sums(logits: Tensor, mask: Tensor, kind: Kind, *, gamma: float = 2.0) -> Tensor:
    """Sum up, over a batch, what a loss is made of.

    Args:
        logits: (B, 1, H, W) float of any precision.
        mask: (B, 1, H, W), 0 or 1.
        kind: "lovasz" sums the Lovász hinge of each image, which costs a sort; the others leave it 0.
        gamma: focusing power of the focal term.

    Returns:
        (8,) float32, or float64 if the logits are: pixels, cross-entropy, focal term, p * t, p, t, Lovász hinge,
        images. Sums of parts of a batch add up to the sums of the whole.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = mask.to(logits.dtype)
        nll = F.binary_cross_entropy_with_logits(logits, target, reduction="none")  # -log p_t
        # 1 - p_t; above 0, where a power below 1 has an infinite slope that 0 would be multiplied with
        missed = (1 - (-nll).exp()).clamp_min(torch.finfo(nll.dtype).tiny)
        probs = logits.sigmoid()
        hinge = lovasz_hinge(logits, target).sum() if kind == "lovasz" else logits.new_zeros(())
        sums = [
            nll.sum(),
            (missed**gamma * nll).sum(),
            (probs * target).sum(),
            probs.sum(),
            target.sum(),
            hinge,
        ]
        pixels, images = logits.new_full((), logits.numel()), logits.new_full((), len(logits))
        return torch.stack([pixels, *sums, images])


def loss_from_sums(sums: Tensor, kind: Kind, *, focal_weight: float = 10.0, smooth: float = 1.0) -> Tensor:
    """Make the loss of sums.

    D = (2 sum(p t) + smooth) / (sum p + sum t + smooth) pools all pixels, not those of each image: most images are
    empty, and the Dice of an empty mask has no useful gradient.

    Args:
        sums: (8,) from `loss_sums`, or several of them added.
        kind: "focal_dice" is focal_weight * focal - log D, "bce_dice" is BCE + 1 - D, "lovasz" the mean Lovász hinge.
        focal_weight: of the focal term.
        smooth: added to both parts of D, in pixels: of empty masks that stay empty D is 1.

    Returns:
        The scalar.

    Raises:
        ValueError: `kind` is none of these.
    """
    soft_dice = (2 * sums[OVERLAP] + smooth) / (sums[PROBS] + sums[MASK] + smooth)
    if kind == "focal_dice":
        return focal_weight * (sums[FOCAL] / sums[PIXELS]) - soft_dice.log()
    if kind == "bce_dice":
        return sums[BCE] / sums[PIXELS] + 1 - soft_dice
    if kind == "lovasz":
        return sums[LOVASZ] / sums[IMAGES]
    raise ValueError(f"no loss of kind {kind!r}")


def loss(
    logits: Tensor,
    mask: Tensor,
    kind: Kind,
    *,
    focal_weight: float = 10.0,
    gamma: float = 2.0,
    smooth: float = 1.0,
) -> Tensor:
    """The loss of one batch; see `loss_sums` and `loss_from_sums`.

    Args:
        logits: (B, 1, H, W) float of any precision.
        mask: (B, 1, H, W), 0 or 1.

    Source:
        Focal term from Lin et al. 2017, arXiv:1708.02002, eq. 4, without class weight.
    """
    return loss_from_sums(loss_sums(logits, mask, kind, gamma=gamma), kind, focal_weight=focal_weight, smooth=smooth)


def lovasz_hinge(logits: Tensor, target: Tensor) -> Tensor:
    """The Lovász extension of the Jaccard loss at the hinge errors of each image.

    Errors pass through elu + 1 in place of the hinge's max(error, 0): it has a slope on both sides, so that pixels that
    are right by the margin go on being taught while the sorted weights change around them.

    Args:
        logits: (B, 1, H, W) float32 or float64.
        target: (B, 1, H, W) of the same type, 0 or 1.

    Returns:
        (B,) losses.

    Source:
        Berman, Rannen Triki, Blaschko 2018, arXiv:1705.08790, algorithm 1.
    """
    logits, target = logits.flatten(1), target.flatten(1)
    errors, order = (1 - logits * (2 * target - 1)).sort(dim=1, descending=True)
    target = target.gather(1, order)
    positives = target.sum(dim=1, keepdim=True)
    intersection = positives - target.cumsum(dim=1)
    union = positives + (1 - target).cumsum(dim=1)
    jaccard = 1 - intersection / union  # union >= 1: each of its terms counts the first pixel
    gradient = torch.cat([jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]], dim=1)
    return ((F.elu(errors) + 1) * gradient).sum(dim=1)
