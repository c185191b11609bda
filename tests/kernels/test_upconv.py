import pytest
import torch

from pneumo.kernels import winograd
from pneumo.kernels.upconv import is_faster, stride_2_weight, upsampled_conv, upsampled_conv_ref

SHAPES = [
    # B, C, K, O, H, W
    (1, 3, 2, 4, 1, 1),
    (1, 5, 0, 2, 3, 7),
    (2, 4, 3, 5, 5, 2),
    (3, 16, 8, 8, 9, 11),
]


def inputs(shape, dtype, seed: int = 0) -> list[torch.Tensor | None]:
    batch, below, skip, out, height, width = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        tensor = torch.randn(*sizes, generator=generator, dtype=torch.float32).to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last).requires_grad_()

    x = normal(batch, below, height, width)
    return [x, normal(batch, skip, 2 * height, 2 * width) if skip else None, normal(out, below + skip, 3, 3)]


def values(convolve, tensors) -> list[torch.Tensor]:
    """The result, and the gradients of a sum that weighs every pixel differently."""
    y = convolve(*tensors)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [tensor for tensor in tensors if tensor is not None], slope)]


def test_by_hand():
    """One pixel of 1: each of its four copies sees the weights whose window covers it, zeros beyond the rim."""
    weight = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    y = upsampled_conv(torch.ones(1, 1, 1, 1), None, weight)
    assert y.tolist() == [[[[5 + 6 + 8 + 9.0, 4 + 5 + 7 + 8], [2 + 3 + 5 + 6, 1 + 2 + 4 + 5]]]]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_its_reference_and_so_do_the_gradients(shape):
    tensors = inputs(shape, torch.float64)
    for mine, reference in zip(values(upsampled_conv, tensors), values(upsampled_conv_ref, tensors), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_errs_at_most_twice_as_much_as_the_reference(shape):
    """Root mean square error against float64: of the result, half as much; of the gradients of x and skip, 1.3 times.

    That of the weight's is measured at up to 2.7 times, as oneDNN adds it up in longer chains, and held to 3.
    """
    errors = []
    for seed in range(20):
        single = inputs(shape, torch.float32, seed)
        double = [None if t is None else t.detach().double().requires_grad_() for t in single]
        exact = values(upsampled_conv_ref, double)
        found = [values(convolve, single) for convolve in (upsampled_conv, upsampled_conv_ref)]
        errors.append([[float((a - e).square().mean()) for a, e in zip(some, exact, strict=True)] for some in found])
    mine, reference = torch.tensor(errors).mean(dim=0).sqrt()
    limits = torch.full_like(mine, 2.0)
    limits[-1] = 3.0
    assert (mine <= limits * reference).all(), (mine / reference).tolist()


@pytest.mark.parametrize(
    ("intel", "dtype", "least"),
    [
        (False, torch.float32, 8),
        (False, torch.bfloat16, 8),
        (True, torch.bfloat16, 16),
        (True, torch.float32, 32),
        (True, torch.float64, 8),
    ],
)
def test_the_rule_on_a_cpu_is_the_same_every_time(monkeypatch, intel, dtype, least):
    monkeypatch.setattr(winograd, "mkl_is_at_home", lambda: intel)
    cpu = torch.device("cpu")
    assert is_faster((least, 512, 8, 8), 256, 256, cpu, dtype)
    assert not is_faster((least - 1, 512, 8, 8), 256, 256, cpu, dtype)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_keeps_the_order_in_memory(order):
    """What the gradients of training are; the summed weights as convolutions have them."""
    x, skip, weight = inputs((2, 8, 4, 6, 4, 4), torch.float32)
    weight = weight.detach().contiguous(memory_format=order).requires_grad_()
    assert stride_2_weight(weight).is_contiguous(memory_format=torch.channels_last)
    y = upsampled_conv(x, skip, weight)
    (slope,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert slope.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_choice_on_a_gpu_is_timed():
    assert is_faster((4, 64, 128, 128), 64, 32, torch.device("cuda"), torch.bfloat16) in (True, False)
