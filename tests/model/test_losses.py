from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from pneumo.config import StageConfig
from pneumo.model import losses

KINDS = ["focal_dice", "bce_dice", "lovasz"]


def golden() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.linspace(-3, 3, 32, dtype=torch.float64).reshape(2, 1, 4, 4)
    return logits, (torch.arange(32) % 3 == 0).reshape(2, 1, 4, 4)


def test_golden_values():
    logits, mask = golden()
    sums = losses.loss_sums(logits, mask, "focal_dice")
    assert float(sums[losses.FOCAL] / sums[losses.PIXELS]) == pytest.approx(0.6947031515, abs=1e-9)
    soft_dice = (2 * sums[losses.OVERLAP] + 1) / (sums[losses.PROBS] + sums[losses.MASK] + 1)
    assert float(soft_dice) == pytest.approx(0.4175946674, abs=1e-9)
    assert float(losses.loss(logits, mask, "focal_dice")) == pytest.approx(7.8202755274, abs=1e-9)
    assert float(losses.loss(logits, mask, "bce_dice")) == pytest.approx(1.6407906046, abs=1e-9)
    empty = torch.zeros_like(mask)
    assert float(losses.loss(logits, empty, "focal_dice")) == pytest.approx(9.4693839958, abs=1e-9)
    assert float(losses.loss(logits, empty, "bce_dice")) == pytest.approx(1.9662956136, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_parts_make_the_loss_of_the_whole(kind):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=generator)
    mask = torch.rand(6, 1, 8, 8, generator=generator) < 0.2
    whole = losses.loss(logits, mask, kind)
    for cut in (1, 3, 5):
        sums = sum(losses.loss_sums(logits[part], mask[part], kind) for part in (slice(cut), slice(cut, None)))
        assert float(losses.loss_from_sums(sums, kind)) == pytest.approx(float(whole), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_finite_at_huge_logits_under_autocast(kind, size, dtype):
    logits = torch.full((2, 1, 64, 64), size, requires_grad=True)
    mask = (torch.arange(64) < 20).expand(2, 1, 64, 64)
    with torch.autocast("cpu", dtype):
        value = losses.loss(logits.to(dtype), mask, kind)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault("R16", "losses of a 1024 x 1024 image's half-precision logits, under autocast")
def test_a_megapixel_in_half_precision_does_not_overflow(kind):
    logits = torch.zeros(4, 1, 1024, 1024, dtype=torch.float16)
    with torch.autocast("cpu", torch.float16):
        value = losses.loss(logits, torch.ones_like(logits), kind)
    exact = losses.loss(logits[:1, :, :8, :8].double(), torch.ones(1, 1, 8, 8), kind)
    assert float(value) == pytest.approx(float(exact), rel=2e-2 if kind != "lovasz" else 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = torch.rand(2, 1, 3, 3, generator=generator) < 0.4
    assert torch.autograd.gradcheck(lambda x: losses.loss(x, mask, kind), (logits,))


def test_lovasz_of_hard_errors_is_the_jaccard_loss():
    mask = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).view(1, 1, 2, 4).double()
    pred = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0]).view(1, 1, 2, 4).double()
    margin = 40.0  # correct pixels have elu(1 - 40) + 1 = 0, wrong ones an error of 41 + 1
    value = losses.loss(margin * (2 * pred - 1), mask, "lovasz")
    jaccard = 2 / 4
    assert float(value) == pytest.approx((1 + margin + 1) * (1 - jaccard), abs=1e-9)
    assert float(losses.loss(margin * (2 * mask - 1), mask, "lovasz")) == pytest.approx(0, abs=1e-9)


def test_lovasz_of_an_empty_mask_looks_at_the_worst_pixel_alone():
    logits = torch.tensor([-5.0, -1.0, 2.0, -3.0], dtype=torch.float64).view(1, 1, 2, 2)
    assert float(losses.loss(logits, torch.zeros(1, 1, 2, 2), "lovasz")) == pytest.approx(1 + 2 + 1)


def trained_dice(kind: str, seed: int) -> float:
    """Dice of a small net after 120 steps on noisy squares, most images empty."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Conv2d(8, 1, 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.zeros(8, 1, 24, 24)
        mask[:3, :, 6:16, 8:20] = 1
        return mask * 0.7 + 0.6 * torch.rand_like(mask), mask

    for _ in range(120):
        image, mask = batch()
        optimizer.zero_grad()
        losses.loss(net(image), mask, kind).backward()
        optimizer.step()
    image, mask = batch()
    pred = net(image) > 0
    return float(2 * (pred * mask).sum() / (pred.sum() + mask.sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_trains_from_scratch(kind):
    assert trained_dice(kind, seed=0) > 0.9


def test_the_losses_of_recipes_are_those_that_there_are():
    sums = losses.loss_sums(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), "lovasz")
    assert get_type_hints(StageConfig)["loss"] == losses.Kind
    assert all(losses.loss_from_sums(sums, kind) > 0 for kind in get_args(losses.Kind))
    with pytest.raises(ValueError, match="no loss of kind 'tversky'"):
        losses.loss_from_sums(sums, "tversky")


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["focal_dice", "bce_dice", "lovasz"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_where_nothing_is_missed(gamma, kind, dtype):
    """A power below 1 has an infinite slope at 0, which 1 - p_t is for large logits."""
    logits = torch.linspace(-200, 200, 64, dtype=dtype).reshape(2, 1, 4, 8).requires_grad_()
    value = losses.loss(logits, logits.detach() > 0, kind, gamma=gamma)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()
