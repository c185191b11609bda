import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pneumo.kernels import conv_relu as module
from pneumo.kernels.conv_relu import conv_relu, conv_relu_ref

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tried_anew():
    module._fused_is_right.cache_clear()
    yield
    module._fused_is_right.cache_clear()


def convolution(inside: int, out: int, stride: int = 1, **options) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(inside, out, 3, stride, padding=1, **options).requires_grad_(False)


def test_by_hand():
    conv = convolution(1, 1)
    conv.weight.zero_()
    conv.weight[0, 0, 1, 2] = 2.0  # twice the right neighbour
    conv.bias.fill_(-3.0)
    x = torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]])
    assert conv_relu(x, conv).tolist() == [[[[1, 3, 0], [7, 9, 0]]]]
    assert conv_relu(x, conv, torch.full_like(x, -2.0)).tolist() == [[[[0, 1, 0], [5, 7, 0]]]]
    assert x[0, 0, 0].tolist() == [1, 2, 3]


def as_cudnn(x, weight, bias, z, share, stride, padding, dilation, groups):
    return (F.conv2d(x, weight, bias, stride, padding, dilation, groups) + share * z).relu()


@pytest.mark.parametrize(
    ("fused", "right"),
    [
        (as_cudnn, True),
        (lambda *given: as_cudnn(*given[:4], 1.0, *given[5:]), False),  # adds where nothing is to be added
        (lambda *given: as_cudnn(*given[:4], 0.0, *given[5:]), False),
        (lambda *given: torch.full_like(given[3], torch.nan), False),
        (module._fused, False),  # a CPU has none
    ],
)
def test_the_fused_form_is_tried_before_it_is_used(monkeypatch, fused, right):
    monkeypatch.setattr(module, "_fused", fused)
    assert module._fused_is_right(CPU, torch.bfloat16) is right


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inside", "out", "stride"), [(32, 32, 1), (16, 32, 1), (16, 32, 2), (3, 16, 2)])
@pytest.mark.parametrize("adds", [True, False])
def test_on_the_gpu_it_is_the_plain_result(dtype, inside, out, stride, adds):
    device = torch.device("cuda")
    conv = convolution(inside, out, stride, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    x = torch.randn(2, inside, 64, 64, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    add = torch.randn_like(conv(x)) if adds else None
    wanted = conv_relu_ref(x, conv, add)
    torch.testing.assert_close(conv_relu(x, conv, add), wanted, rtol=0.02, atol=0.02)
    assert module._fused_is_right(device, torch.bfloat16)
