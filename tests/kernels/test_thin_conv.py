import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from pneumo import ensemble
from pneumo.ensemble import Ensemble
from pneumo.errors import NotFiniteError
from pneumo.kernels import thin_conv
from pneumo.kernels.thin_conv import conv, doubling_conv, grey_conv
from pneumo.model.folded import FoldedUNet
from pneumo.model.unet import UNet

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"  # there Triton interprets the kernels, see conftest.py
HALF = torch.bfloat16 if GPU else torch.float16  # bf16 is wrong in Triton's interpreter
NUMBERS = HALF if GPU else torch.float32


def cannot_interpret() -> bool:
    """Up to 3.6 Triton's interpreter takes the only number of an array in a way that NumPy 2.4 refuses."""
    if GPU or thin_conv.triton is None:
        return False
    triton, numpy = (tuple(map(int, package.__version__.split(".")[:2])) for package in (thin_conv.triton, np))
    return triton < (3, 7) and numpy >= (2, 4)


pytestmark = [
    pytest.mark.skipif(thin_conv.triton is None, reason="no Triton"),
    pytest.mark.skipif(cannot_interpret(), reason="Triton too old for NumPy 2.4"),
    pytest.mark.skipif(GPU and not thin_conv.has_products(torch.device(DEVICE)), reason="GPU too old for Triton's dot"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
    *([pytest.mark.gpu] if GPU else []),  # all of them compute there
]


@pytest.fixture(autouse=True)
def in_triton(monkeypatch):
    """On a CPU, too, nothing goes the plain way."""
    monkeypatch.setattr(thin_conv, "is_thin", lambda *_given, **_more: True)


def numbers(*shape: int, dtype: torch.dtype = NUMBERS) -> Tensor:
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(sum(shape))).to(dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    """Within the rounding of the type that is tested."""
    found, wanted = found.detach().double(), wanted.detach()
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=scale * (0.02 if GPU else 2e-5))


def check(ours, plain, *given: Tensor) -> None:
    """The same result and gradients."""
    results = []
    for function, dtype in ((ours, NUMBERS), (plain, torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in given]
        y = function(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, numbers(*y.shape).to(dtype))))
    for found, wanted in zip(*results, strict=True):
        close(found, wanted)


def test_by_hand():
    weight = torch.zeros(1, 1, 3, 3, device=DEVICE, dtype=NUMBERS)
    weight[0, 0, 1, 2] = 2  # twice the right neighbour
    x = torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]], device=DEVICE, dtype=NUMBERS)
    assert conv(x, weight).tolist() == [[[[4, 6, 0], [10, 12, 0]]]]
    assert conv(x, weight, torch.tensor([-5.0], device=DEVICE), relu=True).tolist() == [[[[0, 1, 0], [5, 7, 0]]]]


def test_doubling_by_hand():
    weight = torch.arange(16.0, device=DEVICE, dtype=NUMBERS).view(1, 1, 4, 4)
    x = torch.zeros(1, 1, 2, 2, device=DEVICE, dtype=NUMBERS)
    x[0, 0, 0, 1] = 1  # its outputs are rows -1 .. 2, columns 1 .. 4
    assert doubling_conv(x, weight)[0, 0].tolist() == [[0, 4, 5, 6], [0, 8, 9, 10], [0, 12, 13, 14], [0, 0, 0, 0]]


# channels that are powers of two and others, one alone, rows that end within a block of pixels and beyond one
SHAPES = [(16, 16, 5, 20), (16, 1, 7, 9), (8, 8, 2, 150), (3, 5, 6, 6), (1, 16, 3, 129), (1, 1, 1, 1)]


@pytest.mark.parametrize(("channels", "out", "height", "width"), SHAPES)
def test_convolution_and_its_gradients(channels, out, height, width):
    given = numbers(2, channels, height, width), numbers(out, channels, 3, 3), numbers(out)
    check(conv, lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1), *given)
    check(conv, lambda x, weight: F.conv2d(x, weight, padding=1), *given[:2])


@pytest.mark.parametrize(("channels", "out", "height", "width"), [*SHAPES, (32, 16, 4, 6)])
def test_doubling_convolution_and_its_gradients(channels, out, height, width):
    given = numbers(2, channels, height, width), numbers(channels, out, 4, 4), numbers(out)
    check(doubling_conv, lambda x, weight, bias: F.conv_transpose2d(x, weight, bias, stride=2, padding=1), *given)


@pytest.mark.parametrize(("size", "stride", "pad", "out"), [(7, 2, 3, 64), (3, 2, 1, 32), (3, 1, 1, 8), (2, 2, 0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_grey_convolution_and_the_gradient_of_its_weights(size, stride, pad, out, bias):
    module = nn.Conv2d(3, out, size, stride, pad, bias=bias, device=DEVICE)
    image = torch.rand(2, 1, 18, 22, device=DEVICE)
    mean, std = (torch.tensor(values, device=DEVICE).view(1, 3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    with torch.autocast(DEVICE, HALF, enabled=GPU):
        found = grey_conv(image, module, mean, std)
        with torch.no_grad():
            clipped = grey_conv(image, module, mean, std, relu=True)
    exact = copy.deepcopy(module).double()
    wanted = exact((image.double() - mean) / std)
    close(found, wanted)
    close(clipped, wanted.relu())
    towards = numbers(*wanted.shape)
    ours = torch.autograd.grad(found, module.parameters(), towards.to(found.dtype))
    for gradient, right in zip(ours, torch.autograd.grad(wanted, exact.parameters(), towards.double()), strict=True):
        close(gradient, right)


def plain_doubling(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv_transpose2d(x, weight, stride=2, padding=1)


@pytest.mark.parametrize(
    ("ours", "plain", "shape"),
    [
        (conv, lambda x, weight: F.conv2d(x, weight, padding=1), (16, 16, 3, 3)),
        (conv, lambda x, weight: F.conv2d(x, weight, padding=1), (1, 16, 3, 3)),
        (doubling_conv, plain_doubling, (16, 8, 4, 4)),
    ],
)
def test_it_errs_no_more_than_twice_the_plain_form(ours, plain, shape):
    """Against float64, results and both gradients, in the mean over all numbers."""
    given, towards = (numbers(1, 16, 12, 40), numbers(*shape)), None
    found = {}
    for name, function, dtype in (
        ("exact", plain, torch.float64),
        ("plain", plain, NUMBERS),
        ("ours", ours, NUMBERS),
    ):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in given]
        y = function(*leaves)
        towards = numbers(*y.shape) if towards is None else towards
        results = (y.detach(), *torch.autograd.grad(y, leaves, towards.to(dtype)))
        found[name] = [result.double() for result in results]
    for mine, reference, exact in zip(found["ours"], found["plain"], found["exact"], strict=True):
        assert float((mine - exact).square().mean()) <= 4 * float((reference - exact).square().mean())


def test_half_precision_is_rounded_once():
    x, weight = numbers(2, 16, 9, 40, dtype=HALF), numbers(16, 16, 3, 3, dtype=HALF)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    found = conv(x, weight)
    assert found.dtype == HALF
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(HALF).eps, atol=1e-4)


def test_results_are_channels_last():
    assert conv(numbers(1, 16, 8, 8), numbers(16, 16, 3, 3)).is_contiguous(memory_format=torch.channels_last)
    assert doubling_conv(numbers(1, 16, 8, 8), numbers(16, 8, 4, 4)).is_contiguous(memory_format=torch.channels_last)


def test_the_kernels_are_as_a_compiler_is_told():
    """Shapes, strides, mutation and the registration of gradients."""
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    weight, bias = numbers(1, 1, 3, 3, 4, 8).requires_grad_(), numbers(8).requires_grad_()
    x, gradient = (numbers(2, channels, 6, 10).contiguous(memory_format=torch.channels_last) for channels in (4, 8))
    library.opcheck(thin_conv.patches, (x.requires_grad_(), weight, bias, 1, 1, 1, False), test_utils=kinds)
    library.opcheck(thin_conv.patches_weight, (x.detach(), gradient, 3, 1, 1, 1), test_utils=kinds)


def test_compiled_it_is_the_same():
    given = numbers(1, 4, 6, 10), numbers(4, 3, 4, 4), numbers(1, 3, 3, 3)

    def ours(x: Tensor, doubling: Tensor, weight: Tensor) -> Tensor:
        return conv(doubling_conv(x, doubling).relu(), weight)

    def plain(x: Tensor, doubling: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(F.conv_transpose2d(x, doubling, stride=2, padding=1).relu(), weight, padding=1)

    check(torch.compile(ours, fullgraph=True, dynamic=False, backend="aot_eager"), plain, *given)


@pytest.mark.parametrize("channels", [1, 2, 3, 16, 32])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("out", [1, 5, 16, 64])
def test_no_dot_product_is_too_small_for_a_gpu(channels, size, out):
    """Or too wide; the interpreter takes any."""
    of = thin_conv._constants((1, 1, size, size, channels, out), 1, 1, 1)
    assert 16 <= of["LANES"] * of["ACROSS"] * of["DOWN"] <= max(thin_conv.WINDOW, of["LANES"] * of["ACROSS"])
    assert of["WIDE"] >= max(out, 16) and of["LANES"] >= channels and of["ACROSS"] >= size


def test_refusals():
    x, weight = numbers(1, 2, 6, 6).requires_grad_(), numbers(4, 2, 3, 3).requires_grad_()
    with pytest.raises(NotImplementedError, match="the ReLU is for prediction, without gradients"):
        conv(x, weight, relu=True)
    strided = thin_conv.patches(x, weight.permute(2, 3, 1, 0)[None, None].contiguous(), None, 2, 1, 1, False)
    with pytest.raises(NotImplementedError, match="a strided convolution gets no gradient"):
        strided.sum().backward()


def test_nan_is_not_taken_for_nothing_by_the_relu():
    """As PyTorch's: else an image that overflows would be one without a finding."""
    x = numbers(1, 16, 6, 6)
    x[0, 3, 2, 2] = torch.nan
    weight, doubling = numbers(16, 16, 3, 3), numbers(16, 16, 4, 4)
    with torch.no_grad():
        for convolve, given in ((conv, weight), (doubling_conv, doubling)):
            plain, clipped = convolve(x, given), convolve(x, given, relu=True)
            assert plain.isnan().any() and torch.equal(clipped.isnan(), plain.isnan())
            assert clipped.nan_to_num(0).min() == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")  # NumPy's
@pytest.mark.fault("S4", "float16 that overflows deep within a network, before kernels of our own")
def test_an_image_that_overflows_is_no_empty_mask(monkeypatch, figure):
    monkeypatch.setattr(thin_conv, "is_thin", lambda _x, *channels, **most: thin_conv.few(*channels, **most))
    torch.manual_seed(0)
    model = UNet("test_resnet", False, (8, 8, 8, 4, 4)).eval()
    with torch.no_grad():
        model.blocks[1].conv2[1].weight.mul_(2e5)
    folded = FoldedUNet(model, torch.float16).to(DEVICE)
    assert all(tensor.isfinite().all() for tensor in folded.state_dict().values())
    network = Ensemble(((folded,),), 64, {}, torch.float16, True, "", "", 1, {})
    image = torch.randint(256, (1, 1, 64, 64), dtype=torch.uint8, device=DEVICE)
    with pytest.raises(NotFiniteError, match="probabilities of a are not numbers"):
        ensemble.predict(network, image, 64, ["a"])
    figure("exit 4, the image named")


def test_works_says_whether_results_are_right(monkeypatch):
    device = torch.device(DEVICE)
    assert thin_conv._tried.__wrapped__(device, HALF)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert thin_conv._tried.__wrapped__(device, HALF)
    right = thin_conv.patches
    monkeypatch.setattr(thin_conv, "patches", lambda *given: right(*given) * 1.1)
    with pytest.warns(RuntimeWarning, match=r"^Triton's kernels are not used.*: their results are wrong here$"):
        assert not thin_conv._tried.__wrapped__(device, HALF)

    def broken(*_given):
        raise RuntimeError("no\ncompiler")

    monkeypatch.setattr(thin_conv, "patches", broken)
    with pytest.warns(RuntimeWarning, match=r"take longer: RuntimeError: no compiler$"):
        assert not thin_conv._tried.__wrapped__(device, HALF)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("on a card"), RuntimeError("Triton Error [CUDA]: out of memory")]
)
def test_lack_of_memory_is_no_answer(monkeypatch, error):
    def out_of_memory(*_given):
        raise error

    monkeypatch.setattr(thin_conv, "patches", out_of_memory)
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
        thin_conv._tried.__wrapped__(torch.device(DEVICE), HALF)


class TestChoice:
    @pytest.fixture(autouse=True)
    def in_triton(self):
        """The choice as it is."""

    def test_a_cpu_goes_the_plain_way(self):
        assert not thin_conv.is_thin(torch.zeros(1, 16, 8, 8, dtype=torch.bfloat16), 16, 16)

    @pytest.mark.gpu
    @pytest.mark.skipif(not GPU, reason="no GPU")
    def test_a_gpu_does_few_channels_in_half_precision(self):
        x = torch.zeros(1, 16, 8, 8, device="cuda")
        assert not thin_conv.is_thin(x, 16, 16)
        assert thin_conv.is_thin(x.bfloat16(), 16, 16)
        for many in ((64, 64), (64, 1), (1, 64), (32, 32)):
            assert not thin_conv.is_thin(x.bfloat16(), *many)
        with torch.autocast("cuda", torch.float16):
            assert thin_conv.is_thin(x, 16, 16)
            assert conv(x, numbers(16, 16, 3, 3)).dtype == torch.float16

    @pytest.mark.parametrize(
        ("inside", "out", "most", "thin"),
        [(16, 16, 32, True), (32, 16, 32, True), (32, 32, 32, False), (256, 1, 32, False), (2, 64, 64, True)],
    )
    def test_more_channels_would_need_more_memory_than_a_multiprocessor_has(self, monkeypatch, inside, out, most, thin):
        class Card:
            is_cuda, device, dtype = True, torch.device("cuda"), torch.bfloat16

        monkeypatch.setattr(thin_conv, "compute_dtype", lambda x: x.dtype)
        monkeypatch.setattr(thin_conv, "works", lambda *_given, **_more: True)
        assert thin_conv.is_thin(Card, inside, out, most) is thin

    def test_without_triton_all_goes_the_plain_way(self, monkeypatch):
        monkeypatch.setattr(thin_conv, "triton", None)
        assert not thin_conv.is_thin(torch.zeros(1, 16, 8, 8, device=DEVICE, dtype=torch.bfloat16), 16, 16)
