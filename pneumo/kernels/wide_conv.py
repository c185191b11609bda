"""Convolutions of many channels on a CPU: Winograd's or oneDNN's, and of few pixels a gradient by one product.

Where there are about as many weights as pixels, as at the coarsest level of a UNet, oneDNN takes two to nine times as
long for the gradient of the weights as for the result, which has as many products. As one matrix product it takes about
as long as the result:

    dw[o, i, j, c] = sum over pixels n of dy[n, o] patches[n, i, j, c]

where patches[n] is what the window sees of x around pixel n (im2col). Result and gradient of x stay oneDNN's. What the
gradient of the weights takes on 2 cores of an Intel Xeon, where alone it was measured, in ms by oneDNN and here; with
"AVX-512" oneDNN was held to its instructions for bf16. The copies are within:

    images, channels, side, window     bf16 (AMX)      bf16, AVX-512     float32
     8  512 to 512    8      3x3       10.8    3.7     19.4    17.9      10.7     8.8
     2  512 to 512    8      3x3        4.1    1.5      6.3     4.7       4.3     2.4
    16  512 to 512    4      3x3       14.2    2.5     10.1     8.9      11.5     6.2
    16  512 to 512    2      3x3        7.0    0.8      6.4     2.5       7.5     1.9
     8  512 to 256    8      4x4, up   13.0    4.0     16.8    13.9      13.5     9.7
     8  256 to 512   16      3x3, by 2  7.8    2.4     11.1     8.8       8.1     5.6
     8  256 to 512   16      1x1, by 2  1.0    0.3      1.3     1.1       left to oneDNN, as all of 1x1
    16  512 to 512    8      3x3       19.3    7.6     33.5    33.5      21.1    19.1
     8  256 to 256    8      3x3        2.3    1.0      4.5     4.7       2.5     2.8      left to oneDNN
     8  512 to 512   16      3x3       24.3   19.8     61.7    66.5      71.4    67.6      left to oneDNN

Imports winograd.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from pneumo.kernels import winograd

FLOATS = (torch.float32, torch.bfloat16)  # as measured
PIXELS = 1024  # of the batch at most
PAIRS = 256  # of channels, in and out, for each pixel at least


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """Convolution whose padding is half its window, in whichever form is faster here.

    Args:
        x: (B, C, H, W) float.
        weight: (O, C, K, K) for an odd K.
        bias: (O,).
        stride: 1 or 2.

    Returns:
        (B, O, H', W'), as F.conv2d(x, weight, bias, stride, K // 2).
    """
    size = weight.shape[-1]
    if (size, stride) == (3, 1) and winograd.is_faster(x, weight):
        y = winograd.winograd_conv(x, weight)
        return y if bias is None else y.add_(bias[:, None, None])
    batch, _, height, width = x.shape
    if not is_product_faster(x, weight, batch * -(-height // stride) * -(-width // stride)):
        return F.conv2d(x, weight, bias, stride, size // 2)
    return _apply(x, weight, bias, stride, size // 2, False)


def doubling_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Transposed 4x4 convolution of stride 2 and padding 1, which doubles the resolution.

    Args:
        x: (B, C, H, W) float.
        weight: (C, O, 4, 4).
        bias: (O,).

    Returns:
        (B, O, 2H, 2W), as F.conv_transpose2d(x, weight, bias, 2, 1).
    """
    batch, _, height, width = x.shape
    if not is_product_faster(x, weight, batch * height * width):
        return F.conv_transpose2d(x, weight, bias, 2, 1)
    return _apply(x, weight, bias, 2, 1, True)


def is_product_faster(x: Tensor, weight: Tensor, pixels: int) -> bool:
    """Whether the gradient of the weights takes less time as a product, by a rule that was measured; see above.

    Args:
        x, weight: as of `conv` or `doubling_conv`.
        pixels: of the result, or of a transposed convolution those of x, over the batch.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return False
    dtype, given = compute_dtype(x), {x.dtype, weight.dtype}
    if dtype not in FLOATS or not given <= set(FLOATS) or (len(given) > 1 and not torch.is_autocast_enabled("cpu")):
        return False  # or as refused by a convolution
    if dtype == torch.float32 and (weight.shape[-1] == 1 or not winograd.products_are_exact()):
        return False
    return pixels <= min(PIXELS, weight.shape[0] * weight.shape[1] // PAIRS)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a convolution of `x` computes in: autocast's type where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: int) -> Tensor:
    dtype = compute_dtype(x)
    return _ConvByProduct.apply(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *geometry)


class _ConvByProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, transposed
        return (F.conv_transpose2d if transposed else F.conv2d)(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, transposed = ctx.geometry
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        x_slope = weight_slope = None
        with torch.autocast("cpu", enabled=False):  # which may have begun since the forward pass
            if of_x:  # that alone: with the bias's, oneDNN computes the weight's as well
                rest = [stride] * 2, [padding] * 2, [1, 1], transposed, [0, 0], 1, [True, False, False]
                x_slope, _, _ = torch.ops.aten.convolution_backward(slope, x, weight, None, *rest)
            if of_weight:
                few, many = (x, slope) if transposed else (slope, x)
                weight_slope = weight_gradient(few, many, weight.shape[-1], stride, padding)
        return x_slope, weight_slope, slope.sum((0, 2, 3)) if of_bias else None, None, None, None


def weight_gradient(few: Tensor, many: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """Gradient of a convolution's weights, as one matrix product.

    Args:
        few: (B, O, H, W) slope of the result, or of a transposed convolution what it was given.
        many: (B, C, H', W') what the convolution was given, or of a transposed one the slope of its result.
        size: of the window.
        stride, padding: of the window over `many`.

    Returns:
        (O, C, size, size), channels_last.
    """
    (batch, out, height, width), inside = few.shape, many.shape[1]
    padded = F.pad(many.permute(0, 2, 3, 1), (0, 0, *[padding] * 4)).contiguous()
    image, row, pixel, _ = padded.stride()
    shape = (batch, height, width, size, size, inside)
    patches = padded.as_strided(shape, (image, stride * row, stride * pixel, row, pixel, 1))
    slopes = few.permute(0, 2, 3, 1).reshape(-1, out)
    return (slopes.T @ patches.reshape(-1, size * size * inside)).view(out, size, size, inside).permute(0, 3, 1, 2)
