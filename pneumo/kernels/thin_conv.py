"""Convolutions of few channels over many pixels, in Triton: where a library's kernels leave most of a GPU idle.

The layers at full resolution have 1 to 32 channels. They are bound by memory, yet cuDNN, whose tiles are made for
hundreds of channels, takes many times as long as reading and writing would. Here each program multiplies the patches
that a row of pixels sees, read through the cache, by the weights. One form serves all of them:

    y[u * oy + p, u * ox + q] = bias + sum over i, j of x[s * oy + i - pad + p, s * ox + j - pad + q] @ w[p, q, i, j]

with a stride s or an upsampling u, the other being 1, and p, q of 0 .. u - 1; beyond the rim x is 0. A second kernel
gives the gradient of w; that of x is the same form again.

On an H100, bf16, 4 images of 1024 x 1024 pixels, in ms by cuDNN and here:

    result, gradient of x, of w      cuDNN                 here
    16 to 16 channels, 3x3           0.44  0.46  0.44      0.24  0.24  0.23
    16 to 1 channel, 3x3             0.59  1.51  0.89      0.23  0.06  0.09
    32 to 16, doubling               0.46  0.23  0.51      0.19  0.11  0.19
    grey to 64, 7x7, stride 2        0.60    -   0.44      0.10    -   0.12
    32 to 32 at half the pixels      0.11  0.11  0.23      0.14    -   0.20      left to cuDNN

Imports wide_conv, errors.
"""

import importlib.util
import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from pneumo.errors import is_gpu_full
from pneumo.kernels import wide_conv
from pneumo.kernels.wide_conv import compute_dtype

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
else:  # as with PyTorch for CPUs
    triton = None

VERSION = 2  # of the kernels and what `upconv` makes of them: a new one makes what was timed with the old obsolete
HALVES = (torch.float16, torch.bfloat16)
THIN = 32  # channels in and out at most, and their product
PRODUCT = 512
PIXELS = 128  # of a row that a program handles at a time; in a gradient of many weights half of it
WINDOW = 128  # numbers of a patch that a program takes in at once; with more, it does so row by row of the window
PROGRAMS = 528  # that share the pixels of a gradient of weights: four to a multiprocessor of an H100


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """3x3 convolution with padding 1, and a ReLU where that is asked for.

    Args:
        x: (B, C, H, W) float.
        weight: (O, C, 3, 3).
        bias: (O,).
        relu: without gradients only.

    Returns:
        (B, O, H, W).
    """
    if is_thin(x, *weight.shape[:2]):
        return _thin(x, weight.permute(2, 3, 1, 0)[None, None], bias, 1, 1, 1, relu)
    y = wide_conv.conv(x, weight, bias)
    return y.relu_() if relu else y


def doubling_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """Transposed 4x4 convolution of stride 2 and padding 1, which doubles the resolution.

    Args:
        x: (B, C, H, W) float.
        weight: (C, O, 4, 4).
        bias: (O,).
        relu: as of `conv`.

    Returns:
        (B, O, 2H, 2W).
    """
    below, out = weight.shape[:2]
    if is_thin(x, below, out):
        # of four weights along an axis, output pixels of even place see numbers 3 and 1, the others 2 and 0
        packed = weight.flip(2, 3).reshape(below, out, 2, 2, 2, 2).permute(3, 5, 2, 4, 0, 1)
        return _thin(x, packed, bias, 1, 2, 1, relu)
    y = wide_conv.doubling_conv(x, weight, bias)
    return y.relu_() if relu else y


def grey_conv(image: Tensor, conv: nn.Conv2d, mean: Tensor, std: Tensor, *, relu: bool = False) -> Tensor:
    """An encoder's first convolution, of a grey image that stands for its three normalized channels.

    These are one channel and a constant, but for the rim, where the constant ends: two channels instead of three.

    Args:
        image: (B, 1, H, W) float in [0, 1]; it gets no gradient.
        conv: of three channels.
        mean, std: (1, 3, 1, 1) of the normalization.
        relu: as of `conv`.

    Returns:
        (B, O, H', W').
    """
    size, stride, pad = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    square = conv.kernel_size == (size, size) and conv.stride == (stride, stride) and conv.padding == (pad, pad)
    plain = square and conv.dilation == (1, 1) and conv.groups == 1
    thin = size <= 8 and is_thin(image, 2, conv.out_channels, most=2 * THIN)
    if plain and (thin or not image.is_cuda):
        grey = torch.cat([image - 0.5, torch.ones_like(image)], dim=1)  # about 0, where half precision is finest
        scaled = conv.weight / std
        weight = torch.stack([scaled.sum(dim=1), (scaled * (0.5 - mean)).sum(dim=1)], dim=1)
        if thin:
            return _thin(grey, weight.permute(2, 3, 1, 0)[None, None], conv.bias, stride, 1, pad, relu)
        if conv.weight.is_contiguous(memory_format=torch.channels_last):  # what follows keeps to this order
            grey, weight = (part.contiguous(memory_format=torch.channels_last) for part in (grey, weight))
        y = F.conv2d(grey, weight, conv.bias, stride, pad)
        return y.relu_() if relu else y
    y = F.conv2d((image - mean) / std, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return y.relu_() if relu else y


def is_thin(x: Tensor, inside: int, out: int, most: int = THIN) -> bool:
    """Whether a convolution of so many channels of `x` is done here: on a GPU, in half precision.

    Args:
        most: channels on either side at most; more would need more memory than a multiprocessor has.
    """
    dtype = compute_dtype(x)
    return triton is not None and x.is_cuda and dtype in HALVES and few(inside, out, most) and works(x.device, dtype)


def few(inside: int, out: int, most: int = THIN) -> bool:
    """Whether a convolution of so many channels is one for the kernels here."""
    return max(inside, out) <= most and inside * out <= PRODUCT


def has_products(device: torch.device) -> bool:
    """Whether Triton multiplies on the device's tensor cores, as it does from compute capability 8.0 on.

    Before, as on a T4 or an RTX 2080 Ti, it multiplies number by number and has too few registers: built for 7.5, up to
    24 kB of a thread's numbers are written to memory and read back. So cuDNN does it there; none was tried.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _thin(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, up: int, pad: int, relu: bool) -> Tensor:
    dtype = compute_dtype(x)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return patches(x, weight.to(dtype).contiguous(), bias, stride, up, pad, relu)


@torch.compiler.assume_constant_result
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has what the kernels need, Triton can build them and they give the plain result; tried once.

    A compiler takes the answer as it is. Ask before anything is compiled, so that nothing is tried while it traces.

    Warns:
        RuntimeWarning: they could be used, but cannot, and why; all else goes on, slower.
    """
    return _tried(device, dtype)


@cache
def _tried(device: torch.device, dtype: torch.dtype) -> bool:
    if not has_products(device):
        return False
    x = torch.randn(2, 16, 4, PIXELS + 2, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 3, 3, device=device).to(dtype)
    try:
        found = patches(x, weight.permute(2, 3, 1, 0)[None, None].contiguous(), None, 1, 1, 1, False)
    except Exception as error:  # no compiler on the machine, a card too old: Triton raises many types
        if is_gpu_full(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        with torch.autocast(device.type, enabled=False):
            wanted = F.conv2d(x.float(), weight.float(), padding=1)
        if torch.allclose(found.float(), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max())):
            return True
        reason = "their results are wrong here"
    warnings.warn(
        f"Triton's kernels are not used, cuDNN's are, which take longer: {reason}", RuntimeWarning, stacklevel=3
    )
    return False


@library.custom_op("pneumo::patches", mutates_args=())
def patches(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, up: int, pad: int, relu: bool) -> Tensor:
    """The form above: patches of `x` times weights.

    Args:
        x: (B, C, H, W), channels_last.
        weight: (u, u, K, K, C, O), contiguous, of the same type.
        bias: (O,), any float type.
        stride, up, pad: s, u and the padding.
        relu: clip the result at 0.

    Returns:
        (B, O, u H', u W'), channels_last, of the same type.
    """
    y = _result_of(x, weight, bias, stride, up, pad, relu)
    rows, columns = y.shape[2] // up, y.shape[3] // up
    constants = _constants(weight.shape, stride, up, pad)
    grid = (x.shape[0] * rows * triton.cdiv(columns, PIXELS) * up * up,)
    with _on(x):
        _patches[grid](
            x, weight, weight if bias is None else bias, y, *x.shape[2:], rows, columns,
            PIXELS=PIXELS, BIAS=bias is not None, RELU=relu, **constants,
        )  # fmt: skip
    return y


@patches.register_fake
def _result_of(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, up: int, pad: int, relu: bool) -> Tensor:
    size, out = weight.shape[2], weight.shape[-1]
    height, width = ((side + 2 * pad - size - (up - 1)) // stride + 1 for side in x.shape[2:])
    shape = (x.shape[0], out, up * height, up * width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@library.custom_op("pneumo::patches_weight", mutates_args=())
def patches_weight(x: Tensor, gradient: Tensor, size: int, stride: int, up: int, pad: int) -> Tensor:
    """The gradient of the weight of `patches`.

    Args:
        x: as of `patches`.
        gradient: of its result, channels_last, of the same type.
        size: K.
        stride, up, pad: as of `patches`.

    Returns:
        (u, u, K, K, C, O) float32.
    """
    shape = (up, up, size, size, x.shape[1], gradient.shape[1])
    rows, columns = gradient.shape[2] // up, gradient.shape[3] // up
    constants = _constants(shape, stride, up, pad)
    pixels = PIXELS if constants["WIDE"] <= 32 else PIXELS // 2
    tiles = x.shape[0] * rows * triton.cdiv(columns, pixels)
    programs = min(tiles, PROGRAMS)
    parts = torch.empty((programs, *shape), dtype=torch.float32, device=x.device)
    with _on(x):
        grid = (up * up, triton.cdiv(size, constants["DOWN"]), programs)
        _patches_weight[grid](x, gradient, parts, *x.shape[2:], rows, columns, tiles, PIXELS=pixels, **constants)
    return parts.sum(dim=0)


@patches_weight.register_fake
def _weight_of(x: Tensor, gradient: Tensor, size: int, stride: int, up: int, pad: int) -> Tensor:
    return x.new_empty((up, up, size, size, x.shape[1], gradient.shape[1]), dtype=torch.float32)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, *ctx.numbers, relu = inputs
    if relu:
        raise NotImplementedError("the ReLU is for prediction, without gradients")
    ctx.biased = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    stride, up, pad = ctx.numbers
    size = weight.shape[2]
    gradient = gradient.to(x.dtype).contiguous(memory_format=torch.channels_last)
    of_x = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        if stride > 1:
            raise NotImplementedError("what is given to a strided convolution gets no gradient")
        if up == 1:  # the mirrored window, from channels out to channels in
            back = weight.flip(2, 3).transpose(4, 5).contiguous()
            of_x = patches(gradient, back, None, 1, 1, size - 1 - pad, False)
        else:  # input pixel i reached outputs 2 i - 1 .. 2 i + 2, by weights of number 3 - 2 i - p
            back = weight.permute(2, 0, 3, 1, 5, 4).flatten(2, 3).flatten(0, 1).flip(0, 1)[None, None].contiguous()
            of_x = patches(gradient, back, None, 2, 1, pad, False)
    if ctx.needs_input_grad[1]:
        if stride == up == 1 and gradient.shape[1] < x.shape[1]:  # the narrower one's patches are the smaller
            swapped = patches_weight(gradient, x, size, 1, 1, size - 1 - pad)
            of_weight = swapped.flip(2, 3).transpose(4, 5)
        else:
            of_weight = patches_weight(x, gradient, size, stride, up, pad)
        of_weight = of_weight.to(weight.dtype)
    if ctx.biased is not None and ctx.needs_input_grad[2]:
        of_bias = gradient.sum(dim=(0, 2, 3), dtype=torch.float32).to(ctx.biased)
    return of_x, of_weight, of_bias, None, None, None, None


patches.register_autograd(_gradients, setup_context=_keep)


def _constants(weight: tuple[int, ...], stride: int, up: int, pad: int) -> dict[str, int]:
    """What both kernels are compiled for, of the weight's shape; a dot product needs at least 16 of everything."""
    size, channels, out = weight[2], weight[4], weight[5]
    lanes, across, down = (triton.next_power_of_2(number) for number in (channels, size, size))
    if lanes * across * down > WINDOW:
        down = 1  # row of the window by row
    lanes = max(lanes, 16 // (across * down))
    return {
        "CHANNELS": channels,
        "OUT": out,
        "SIZE": size,
        "STRIDE": stride,
        "UP": up,
        "PAD": pad,
        "LANES": lanes,
        "ACROSS": across,
        "DOWN": down,
        "WIDE": max(triton.next_power_of_2(out), 16),
    }


def _on(x: Tensor) -> torch.cuda.device:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


if triton is not None:

    @triton.jit
    def _patch(
        x, batch, row, column, place, height, width, tap,
        CHANNELS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr, PAD: tl.constexpr,
        LANES: tl.constexpr, ACROSS: tl.constexpr, DOWN: tl.constexpr,
    ):  # fmt: skip
        """(PIXELS, DOWN * ACROSS * LANES) of what pixels of a row see, from row `tap` of the window on."""
        number = tl.arange(0, DOWN * ACROSS * LANES)
        i, j, c = tap + number // (ACROSS * LANES), number // LANES % ACROSS, number % LANES
        y = row * STRIDE + i - PAD + place // UP  # (K,)
        x_ = column[:, None] * STRIDE + (j - PAD + place % UP)[None, :]  # (PIXELS, K)
        known = (i < SIZE) & (j < SIZE) & (c < CHANNELS) & (y >= 0) & (y < height)
        start = (batch * height + y).to(tl.int64) * width
        address = (start[None, :] + x_) * CHANNELS + c[None, :]
        return tl.load(x + address, mask=known[None, :] & (x_ >= 0) & (x_ < width), other=0.0)

    @triton.jit
    def _weight_place(
        place, tap, CHANNELS: tl.constexpr, OUT: tl.constexpr, SIZE: tl.constexpr,
        LANES: tl.constexpr, ACROSS: tl.constexpr, DOWN: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """(DOWN * ACROSS * LANES, WIDE): offsets of the weights that belong to `_patch`, and which there are."""
        number = tl.arange(0, DOWN * ACROSS * LANES)
        i, j, c = tap + number // (ACROSS * LANES), number // LANES % ACROSS, number % LANES
        out = tl.arange(0, WIDE)
        rows = ((place * SIZE + i) * SIZE + j) * CHANNELS + c
        known = (i < SIZE) & (j < SIZE) & (c < CHANNELS)
        return rows[:, None] * OUT + out[None, :], known[:, None] & (out < OUT)[None, :]

    @triton.jit
    def _patches(
        x, weight, bias, y, height, width, rows, columns,
        CHANNELS: tl.constexpr, OUT: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr,
        PAD: tl.constexpr, LANES: tl.constexpr, ACROSS: tl.constexpr, DOWN: tl.constexpr, WIDE: tl.constexpr,
        PIXELS: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    ):  # fmt: skip
        # places in turn: what writes between the others' pixels runs when they do
        place, tile, tiles = tl.program_id(0) % (UP * UP), tl.program_id(0) // (UP * UP), tl.cdiv(columns, PIXELS)
        batch, row = tile // tiles // rows, tile // tiles % rows
        column = tile % tiles * PIXELS + tl.arange(0, PIXELS)
        total = tl.zeros((PIXELS, WIDE), dtype=tl.float32)
        for tap in tl.static_range(0, SIZE, DOWN):
            seen = _patch(x, batch, row, column, place, height, width, tap,
                          CHANNELS, SIZE, STRIDE, UP, PAD, LANES, ACROSS, DOWN)  # fmt: skip
            where, known = _weight_place(place, tap, CHANNELS, OUT, SIZE, LANES, ACROSS, DOWN, WIDE)
            total = tl.dot(seen, tl.load(weight + where, mask=known, other=0.0), total, input_precision="ieee")
        out = tl.arange(0, WIDE)
        if BIAS:
            total += tl.load(bias + out, mask=out < OUT, other=0.0).to(tl.float32)[None, :]
        if RELU:
            total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
        line = ((batch * rows + row) * UP + place // UP).to(tl.int64) * columns
        address = ((line + column) * UP + place % UP)[:, None] * OUT + out[None, :]
        tl.store(y + address, total.to(y.dtype.element_ty), mask=(column < columns)[:, None] & (out < OUT)[None, :])

    @triton.jit
    def _patches_weight(
        x, gradient, parts, height, width, rows, columns, tiles,
        CHANNELS: tl.constexpr, OUT: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr,
        PAD: tl.constexpr, LANES: tl.constexpr, ACROSS: tl.constexpr, DOWN: tl.constexpr, WIDE: tl.constexpr,
        PIXELS: tl.constexpr,
    ):  # fmt: skip
        # places and rows of the window in turn, so that what all of them read is in the cache
        across, place, tap = tl.cdiv(columns, PIXELS), tl.program_id(0), tl.program_id(1) * DOWN
        out = tl.arange(0, WIDE)
        total = tl.zeros((DOWN * ACROSS * LANES, WIDE), dtype=tl.float32)
        for tile in range(tl.program_id(2), tiles, tl.num_programs(2)):
            line = tile // across
            batch, row = line // rows, line % rows
            column = tile % across * PIXELS + tl.arange(0, PIXELS)
            seen = _patch(x, batch, row, column, place, height, width, tap,
                          CHANNELS, SIZE, STRIDE, UP, PAD, LANES, ACROSS, DOWN)  # fmt: skip
            line = ((batch * rows + row) * UP + place // UP).to(tl.int64) * columns
            address = ((line + column) * UP + place % UP)[:, None] * OUT + out[None, :]
            inside = (column < columns)[:, None] & (out < OUT)[None, :]
            given = tl.load(gradient + address, mask=inside, other=0.0)
            total = tl.dot(tl.trans(seen), given, total, input_precision="ieee")
        where, known = _weight_place(place, tap, CHANNELS, OUT, SIZE, LANES, ACROSS, DOWN, WIDE)
        part = parts + tl.program_id(2).to(tl.int64) * (UP * UP * SIZE * SIZE * CHANNELS * OUT)
        tl.store(part + where, total, mask=known)
