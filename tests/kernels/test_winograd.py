import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pneumo.kernels import winograd
from pneumo.kernels.winograd import is_faster, mkl_is_at_home, winograd_conv

SHAPES = [
    # B, C, O, H, W
    (1, 1, 1, 4, 4),
    (2, 3, 5, 4, 12),
    (3, 8, 2, 16, 8),
    (1, 130, 129, 8, 8),
]


def inputs(shape, dtype, seed: int = 0, *, last: bool = True) -> list[torch.Tensor]:
    batch, inside, out, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.channels_last if last else torch.contiguous_format

    def normal(*sizes: int) -> torch.Tensor:
        tensor = torch.randn(*sizes, generator=generator, dtype=torch.float32).to(dtype)
        return tensor.contiguous(memory_format=order).requires_grad_()

    return [normal(batch, inside, height, width), normal(out, inside, 3, 3)]


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, weight, padding=1)


def values(convolve, tensors) -> list[torch.Tensor]:
    """The result, and the gradients of a sum that weighs every pixel differently."""
    y = convolve(*tensors)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, tensors, slope)]


@pytest.fixture
def at_home(monkeypatch):
    """As on an Intel processor."""
    monkeypatch.setattr(winograd, "mkl_is_at_home", lambda: True)


def test_by_hand():
    """One pixel of 1 in the second tile's corner: around it stand the weights, turned by half a turn."""
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 4, 4] = 1
    weight = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    y = winograd_conv(x, weight).round(decimals=5)
    assert y[0, 0, 3:6, 3:6].tolist() == [[9, 8, 7], [6, 5, 4], [3, 2, 1]]
    assert y.count_nonzero() == 9


def test_the_matrices_are_those_of_a_quarter_of_the_products():
    of_result, of_weight, of_x = winograd.matrices(torch.float64)
    assert [matrix.shape for matrix in (of_result, of_weight, of_x)] == [(16, 36), (36, 9), (36, 36)]
    corner = of_x[0].view(6, 6)  # at the point 0 along both axes: the product of the other points' factors, twice
    # (x - 3/4)(x + 3/4)(x - 3/2)(x + 3/2), lowest power first
    row = torch.tensor([81 / 64, 0, -45 / 16, 0, 1, 0], dtype=torch.float64)
    assert torch.equal(corner, row[:, None] * row)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_convolution_and_so_do_the_gradients(shape, last):
    tensors = inputs(shape, torch.float64, last=last)
    for mine, reference in zip(values(winograd_conv, tensors), values(plain, tensors), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_whatever_the_order_in_memory(order):
    """Values must not depend on it, as where a tensor is read by its strides."""
    x, weight = inputs((4, 4, 4, 4, 8), torch.float64)
    back = sorted(range(4), key=order.__getitem__)
    turned = x.detach().permute(order).contiguous().permute(back).requires_grad_()
    for mine, wanted in zip(values(winograd_conv, [turned, weight]), values(plain, [x, weight]), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needed", [0, 1])
def test_a_gradient_that_nobody_needs_is_not_computed(monkeypatch, needed):
    tensors = inputs(SHAPES[1], torch.float64)
    tensors[1 - needed].requires_grad_(False)
    (wanted,) = torch.autograd.grad(plain(*tensors).square().sum(), tensors[needed])
    products, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *given: products.append(1) or bmm(*given))
    (found,) = torch.autograd.grad(winograd_conv(*tensors).square().sum(), tensors[needed])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert len(products) == 2  # of the result and of the one gradient


@pytest.mark.parametrize("last", [True, False])
def test_the_result_is_channels_last_as_training_has_it(last):
    y = winograd_conv(*inputs((2, 8, 16, 8, 8), torch.float32, last=last))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_relu_may_overwrite_the_result():
    tensors = inputs(SHAPES[1], torch.float64)
    mine = values(lambda *given: winograd_conv(*given).relu_(), tensors)
    for found, wanted in zip(mine, values(lambda *given: plain(*given).relu(), tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_float32_errs_little_more_than_the_convolution():
    """Root mean square error against float64; oneDNN's is 2e-7 to 8e-7 of the values' own."""
    for shape in ((8, 128, 128, 32, 32), (8, 256, 256, 16, 16)):
        single = inputs(shape, torch.float32)
        exact = values(plain, [tensor.detach().double().requires_grad_() for tensor in single])
        for mine, wanted in zip(values(winograd_conv, single), exact, strict=True):
            assert float((mine - wanted).norm() / wanted.norm()) < 3e-6


def test_the_same_bits_every_time():
    tensors = inputs((4, 128, 128, 16, 16), torch.float32)
    first = values(winograd_conv, tensors)
    for _ in range(3):
        assert all(map(torch.equal, first, values(winograd_conv, tensors)))


@pytest.mark.parametrize(
    ("shape", "dtype", "faster"),
    [
        ((2, 128, 128, 16, 16), torch.float32, True),
        ((32, 512, 256, 4, 4), torch.float32, True),
        ((31, 512, 256, 4, 4), torch.float32, False),  # too few tiles
        ((2, 127, 128, 16, 16), torch.float32, False),  # too few channels
        ((2, 128, 127, 16, 16), torch.float32, False),
        ((8, 128, 128, 16, 18), torch.float32, False),  # not whole tiles
        ((8, 128, 128, 18, 16), torch.float32, False),
        ((2, 128, 128, 16, 16), torch.float64, False),  # two processes are compared in it
        ((2, 128, 128, 16, 16), torch.bfloat16, False),  # would round too much
    ],
)
def test_the_rule(at_home, shape, dtype, faster):
    assert is_faster(*inputs(shape, dtype)) is faster


def test_not_under_autocast_and_not_compiled(at_home):
    x, weight = inputs((2, 128, 128, 16, 16), torch.float32)
    assert is_faster(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_faster(x, weight)
    assert not torch.compile(is_faster, backend="eager", fullgraph=True)(x, weight)


def test_a_gradient_within_autocast_is_as_exact_as_its_result():
    tensors = inputs((2, 128, 128, 16, 16), torch.float32)
    y = winograd_conv(*tensors)
    wanted = torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, tensors, torch.ones_like(y))
    assert all(map(torch.equal, found, wanted))


def test_not_where_float32_products_are_rounded(at_home):
    tensors = inputs((2, 128, 128, 16, 16), torch.float32)
    try:
        torch.set_float32_matmul_precision("medium")
        assert not is_faster(*tensors)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert is_faster(*tensors)


def test_not_for_weights_of_another_type(at_home):
    x, weight = inputs((2, 128, 128, 16, 16), torch.float32)
    assert not is_faster(x, weight.double())


@pytest.mark.parametrize(("vendor", "home"), [("GenuineIntel", True), ("AuthenticAMD", False), (None, False)])
def test_on_intel_alone(monkeypatch, vendor, home):
    def read_text(_path: Path) -> str:
        if vendor is None:
            raise FileNotFoundError
        return f"processor\t: 0\nvendor_id\t: {vendor}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert mkl_is_at_home.__wrapped__() is home
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not mkl_is_at_home.__wrapped__()
