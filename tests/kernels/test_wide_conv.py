import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pneumo.kernels import wide_conv, winograd
from pneumo.kernels.wide_conv import conv, doubling_conv, is_product_faster, weight_gradient

SHAPES = [
    # B, C, O, H, W, window, stride; 0 for the transposed one
    (1, 1, 1, 1, 1, 3, 1),
    (2, 3, 5, 4, 7, 3, 1),
    (2, 3, 5, 4, 7, 3, 2),
    (3, 5, 3, 7, 6, 1, 1),
    (3, 5, 3, 7, 6, 1, 2),
    (2, 4, 3, 8, 2, 3, 2),
    (1, 5, 4, 3, 3, 5, 1),
    (2, 6, 3, 3, 5, 4, 0),
    (1, 1, 2, 1, 1, 4, 0),
]


def inputs(shape, dtype, seed: int = 0, *, last: bool = True, bias: bool = False) -> list[torch.Tensor]:
    batch, inside, out, height, width, size, stride = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        tensor = torch.randn(*sizes, generator=generator, dtype=torch.float32).to(dtype)
        order = torch.channels_last if last and len(sizes) == 4 else torch.contiguous_format
        return tensor.contiguous(memory_format=order).requires_grad_()

    weight = normal(out, inside, size, size) if stride else normal(inside, out, size, size)
    return [normal(batch, inside, height, width), weight, *([normal(out)] if bias else [])]


def plain(stride, x, weight, bias=None) -> torch.Tensor:
    if not stride:
        return F.conv_transpose2d(x, weight, bias, 2, 1)
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)


def mine(stride, x, weight, bias=None) -> torch.Tensor:
    return conv(x, weight, bias, stride) if stride else doubling_conv(x, weight, bias)


def values(convolve, stride, tensors) -> list[torch.Tensor]:
    """The result, and the gradients of a sum that weighs every pixel differently."""
    y = convolve(stride, *tensors)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [tensor for tensor in tensors if tensor.requires_grad], slope)]


@pytest.fixture
def products(monkeypatch):
    """A gradient of weights is computed here whatever the shape and type, and counted; no Winograd."""
    made = []
    monkeypatch.setattr(winograd, "mkl_is_at_home", lambda: False)
    monkeypatch.setattr(wide_conv, "is_product_faster", lambda *_: True)
    monkeypatch.setattr(wide_conv, "weight_gradient", lambda *given: made.append(1) or weight_gradient(*given))
    return made


def test_by_hand():
    """One pixel of 1 in the result's slope: the gradient is what the window sees there, zeros beyond the rim."""
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    slope = torch.zeros(1, 1, 3, 3)
    slope[0, 0, 0, 1] = 1
    assert weight_gradient(slope, x, 3, 1, 1).tolist() == [[[[0, 0, 0], [1, 2, 3], [4, 5, 6]]]]
    slope = torch.zeros(1, 1, 2, 2)
    slope[0, 0, 1, 1] = 2
    assert weight_gradient(slope, x, 3, 2, 1).tolist() == [[[[10, 12, 0], [16, 18, 0], [0, 0, 0]]]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_convolution_and_so_do_the_gradients(products, shape, last, bias):
    tensors, stride = inputs(shape, torch.float64, last=last, bias=bias), shape[-1]
    found, wanted = values(mine, stride, tensors), values(plain, stride, tensors)
    assert len(products) == 1
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_whatever_the_order_in_memory(products, order):
    """Values must not depend on it, as patches are read by their strides."""
    x, weight = inputs((4, 4, 4, 4, 8, 3, 1), torch.float64)
    back = sorted(range(4), key=order.__getitem__)
    turned = x.detach().permute(order).contiguous().permute(back).requires_grad_()
    for found, wanted in zip(values(mine, 1, [turned, weight]), values(plain, 1, [x, weight]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(mine(1, x, weight).sum(), weight)  # whose slope is one number, repeated
    torch.testing.assert_close(found, torch.autograd.grad(plain(1, x, weight).sum(), weight)[0])


class Asked(TorchDispatchMode):
    """Notes which gradients PyTorch's own form is asked for: of x, the weights, the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, function, _types, given=(), options=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.masks.append(given[-1])
        return function(*given, **(options or {}))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [0, 1, 2, None])
def test_gradients_that_nobody_needs_are_left_out(products, frozen, bias):
    """With the bias's alone oneDNN would compute the weights' as well."""
    tensors = inputs(SHAPES[1], torch.float64, bias=bias)
    for tensor in tensors[frozen : frozen + 1] if frozen is not None else []:
        tensor.requires_grad_(False)
    with Asked() as asked:
        results = values(mine, 1, tensors)
    for found, wanted in zip(results, values(plain, 1, tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert len(products) == (frozen != 1)
    assert asked.masks == ([] if frozen == 0 else [[True, False, False]])


@pytest.mark.parametrize("shape", [(2, 8, 16, 6, 6, 3, 1), (2, 8, 16, 6, 6, 1, 2), (2, 8, 16, 6, 6, 4, 0)])
def test_the_result_is_channels_last_as_training_has_it(products, shape):
    x, weight = inputs(shape, torch.float32, last=True)
    y = mine(shape[-1], x, weight)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert len(products) == 1


def test_no_images(products):
    x, weight = inputs((0, 3, 5, 4, 4, 3, 1), torch.float32)
    found = values(mine, 1, [x, weight])
    assert found[0].shape == (0, 5, 4, 4) and not found[2].any()


@pytest.mark.parametrize("shape", [(2, 128, 256, 4, 4, 3, 1), (2, 128, 256, 8, 8, 3, 2), (2, 256, 128, 4, 4, 4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errs_as_the_convolution_does(products, shape, dtype):
    """Root mean square error against float64, of the gradient of the weights."""
    tensors, stride = inputs(shape, dtype), shape[-1]
    exact = values(plain, stride, [tensor.detach().double().requires_grad_() for tensor in tensors])[-1]
    found, reference = (values(form, stride, tensors)[-1] for form in (mine, plain))
    assert found.dtype == reference.dtype == dtype
    assert len(products) == 1
    assert float((found - exact).norm()) < 1.5 * float((reference - exact).norm())


def test_under_autocast_as_a_convolution(products):
    tensors = inputs((2, 128, 256, 4, 4, 3, 1), torch.float32, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (values(form, 1, tensors) for form in (mine, plain))
    assert [part.dtype for part in found] == [torch.bfloat16, *[torch.float32] * 3]
    assert all(map(torch.equal, found[:2], wanted[:2]))
    exact = values(plain, 1, [tensor.detach().double().requires_grad_() for tensor in tensors])
    for one, other, true in zip(found[2:], wanted[2:], exact[2:], strict=True):
        assert float((one - true).norm()) < 1.5 * float((other - true).norm())
    assert len(products) == 1


def test_a_gradient_within_autocast_is_as_exact_as_its_result(products):
    tensors = inputs((2, 128, 256, 4, 4, 3, 1), torch.float32)
    y = conv(*tensors)
    wanted = torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, tensors, torch.ones_like(y))
    assert all(map(torch.equal, found, wanted))


def test_the_same_bits_every_time(products):
    tensors = inputs((4, 256, 256, 8, 8, 3, 1), torch.bfloat16)
    first = values(mine, 1, tensors)
    for _ in range(3):
        assert all(map(torch.equal, first, values(mine, 1, tensors)))


def test_a_relu_may_overwrite_the_result(products):
    tensors = inputs(SHAPES[1], torch.float64)
    found = values(lambda *given: mine(*given).relu_(), 1, tensors)
    for one, other in zip(found, values(lambda *given: plain(*given).relu(), 1, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "dtype", "product"),
    [
        ((8, 512, 256, 8, 8, 3, 1), torch.bfloat16, True),
        ((8, 256, 512, 16, 16, 3, 2), torch.bfloat16, True),
        ((8, 256, 512, 15, 15, 3, 2), torch.float32, True),
        ((8, 256, 512, 15, 15, 1, 2), torch.bfloat16, True),
        ((8, 512, 256, 8, 8, 4, 0), torch.float32, True),
        ((8, 512, 255, 8, 8, 3, 1), torch.bfloat16, False),  # too few channels for so many pixels
        ((8, 512, 256, 8, 9, 3, 1), torch.bfloat16, False),
        ((8, 256, 512, 17, 16, 3, 2), torch.bfloat16, False),
        ((8, 512, 256, 8, 9, 4, 0), torch.bfloat16, False),
        ((4, 2048, 512, 16, 16, 1, 1), torch.bfloat16, True),
        ((5, 2048, 512, 16, 16, 1, 1), torch.bfloat16, False),  # too many pixels at all
        ((1, 2048, 512, 8, 8, 1, 2), torch.float32, False),  # one weight for a pair of channels
        ((8, 512, 256, 8, 8, 3, 1), torch.float64, False),  # two processes are compared in it
        ((2, 256, 256, 4, 4, 3, 1), torch.float16, False),  # not measured
    ],
)
def test_the_rule(monkeypatch, shape, dtype, product):
    made = []
    monkeypatch.setattr(winograd, "mkl_is_at_home", lambda: False)
    monkeypatch.setattr(wide_conv, "weight_gradient", lambda *given: made.append(1) or weight_gradient(*given))
    x, weight = inputs(shape, dtype)
    y = mine(shape[-1], x, weight)
    torch.autograd.grad(y, weight, torch.ones_like(y))
    assert len(made) == product


def test_nothing_but_the_convolution_without_gradients_and_compiled():
    x, weight = inputs((2, 256, 256, 4, 4, 3, 1), torch.bfloat16)
    assert is_product_faster(x, weight, 32)
    with torch.no_grad():
        assert not is_product_faster(x, weight, 32)
    assert not is_product_faster(x, weight.detach(), 32)
    assert not torch.compile(is_product_faster, backend="eager", fullgraph=True)(x, weight, 32)


def test_not_where_float32_products_are_rounded():
    x, weight = inputs((2, 256, 256, 4, 4, 3, 1), torch.float32)
    try:
        torch.set_float32_matmul_precision("medium")
        assert not is_product_faster(x, weight, 32)
        with torch.autocast("cpu", torch.bfloat16):
            assert is_product_faster(x, weight, 32)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert is_product_faster(x, weight, 32)


def test_types_that_do_not_fit_are_refused_as_by_a_convolution():
    x, weight = inputs((2, 256, 256, 4, 4, 3, 1), torch.float32)
    with pytest.raises(RuntimeError, match="type"):
        conv(x, weight.detach().bfloat16().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):  # which casts float32 alone
        assert not is_product_faster(x.double(), weight.detach().double().requires_grad_(), 32)


@pytest.mark.parametrize("bias", [False, True])
def test_winograd_where_it_is_faster(monkeypatch, bias):
    asked = []
    monkeypatch.setattr(winograd, "mkl_is_at_home", lambda: True)
    original = winograd.winograd_conv
    monkeypatch.setattr(winograd, "winograd_conv", lambda *given: asked.append(1) or original(*given))
    x, weight, *shift = inputs((2, 128, 128, 16, 16, 3, 1), torch.float32, bias=bias)
    torch.testing.assert_close(conv(x, weight, *shift), plain(1, x, weight, *shift), rtol=1e-4, atol=1e-3)
    assert len(asked) == 1
    middle = weight[:, :, 1:2, 1:2]
    assert torch.equal(conv(x, weight, *shift, stride=2), plain(2, x, weight, *shift))
    assert torch.equal(conv(x, middle, *shift), plain(1, x, middle, *shift))
    x, weight = x[:, :127], weight[:, :127]
    assert torch.equal(conv(x, weight, *shift), plain(1, x, weight, *shift))
    assert len(asked) == 1
