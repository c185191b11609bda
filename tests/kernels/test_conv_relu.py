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


def as_cudnn(x, weight, bias, add, *geometry):
    return (F.conv2d(x, weight, bias, *geometry) + (0 if add is None else add)).relu()


def half(x, weight, bias, add, *geometry):
    return as_cudnn(x, weight, bias, None if add is None else add / 2, *geometry)


def always(x, weight, bias, add, *geometry):
    return as_cudnn(x, weight, bias, x if add is None else add, *geometry)


def without_nan(x, weight, bias, add, *geometry):
    return as_cudnn(x, weight, bias, add, *geometry).nan_to_num(0)


def is_right(inside: int, out: int, stride: int, adds: bool, dtype: torch.dtype = torch.bfloat16) -> bool:
    geometry = (stride, stride), (1, 1), (1, 1), 1
    return module._fused_is_right(CPU, dtype, (out, inside, 3, 3), *geometry, adds)


@pytest.mark.parametrize(
    ("fused", "right"),
    [
        (as_cudnn, {True, False}),
        (half, {False}),
        (always, {True}),
        (lambda *given: torch.full_like(as_cudnn(*given), torch.nan), set()),
        (module._fused, set()),  # a CPU has none
    ],
)
def test_the_fused_form_is_tried_before_it_is_used(monkeypatch, fused, right):
    monkeypatch.setattr(module, "_fused", fused)
    assert {adds for adds in (True, False) if is_right(16, 16, 1, adds)} == right
    assert {adds for adds in (True, False) if is_right(8, 16, 2, adds)} == right - {False}


@pytest.mark.parametrize("adds", [True, False])
def test_where_numbers_end_early_nan_has_to_stay(monkeypatch, adds):
    monkeypatch.setattr(module, "_fused", without_nan)
    assert is_right(16, 16, 1, adds, torch.bfloat16)
    assert not is_right(16, 16, 1, adds, torch.float16)
    module._fused_is_right.cache_clear()
    monkeypatch.setattr(module, "_fused", as_cudnn)
    assert is_right(16, 16, 1, adds, torch.float16)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("on a card"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")]
)
def test_what_only_memory_prevented_is_tried_again(monkeypatch, error):
    def out_of_memory(*_given):
        raise error

    monkeypatch.setattr(module, "_fused", out_of_memory)
    with pytest.raises(type(error), match=str(error)):
        is_right(16, 16, 1, True)
    monkeypatch.setattr(module, "_fused", as_cudnn)
    assert is_right(16, 16, 1, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inside", "out", "stride"), [(32, 32, 1), (16, 32, 1), (16, 32, 2), (3, 16, 2), (61, 38, 1)])
@pytest.mark.parametrize("adds", [True, False])
def test_on_the_gpu_it_is_the_plain_result(dtype, inside, out, stride, adds):
    device = torch.device("cuda")
    conv = convolution(inside, out, stride, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    x = torch.randn(2, inside, 64, 64, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    add = torch.randn_like(conv(x)) if adds else None
    wanted = conv_relu_ref(x, conv, add)
    torch.testing.assert_close(conv_relu(x, conv, add), wanted, rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_recipes_network_is_fused_on_the_gpu():
    device, geometry = torch.device("cuda"), ((1, 1), (1, 1), (1, 1), 1)
    for channels in (64, 512, 16):
        for adds in (True, False):
            assert module._fused_is_right(device, torch.bfloat16, (channels, channels, 3, 3), *geometry, adds)
