"""3x3 convolutions of many channels on a CPU, in float32, with a quarter of the products.

Winograd's F(4x4, 3x3): a tile of 4x4 results depends on a piece of 6x6 numbers of x. Along each axis piece and weights
are brought to six numbers each, the weights to their polynomial's values at six points, multiplied one by one, and the
products made into four results:

    y = A ((B x B') * (G w G')) A'      36 products for each pair of channels in place of 144

The products of all tiles and channels are 36 matrix products; gradients are of the same form, each step transposed. Of
the points tried, of Barabasz et al., Error analysis and improving the accuracy of Winograd convolution for deep neural
networks (2018), and of a search, 0, 3/4, -3/4, 3/2, -3/2 and infinity round least: against float64 the root mean square
error of a result is 1e-6 to 2e-6 of its own, 1.3 to 2.2 times oneDNN's, that of the weights' gradient up to 6 times
oneDNN's. In bf16 it would be 1.4 %, 8 times oneDNN's. Errors are of a tile: beside a pixel that is far larger than all
others, and beside one that is not finite, the rest of its tile is as wrong, and inputs from 1e37 on may overflow.

On 2 cores of an Intel Xeon with AVX-512 (AMX), times as fast as oneDNN's convolution, forward, and with both gradients,
where freed memory is kept, as `cli.keep_freed_memory` has it; where each piece of work takes it anew from the system,
layers of few tiles or few channels take up to twice as long as oneDNN's. A layer takes up to 5 times the memory of x
for a while, 10 times with its gradients:

    images, channels, side          forward   all      with AVX2 alone
     8      128       64            1.47      1.40     1.78    2.14
     8      128       32            1.36      1.43     1.59    1.86
     8      256       16            1.80      1.67     1.98    2.10
     8      512        8            1.41      1.81     1.69    1.83
     8      512       32            2.71      2.90     3.13    3.99
     2      256       16            1.25      1.36     1.69    1.65
     2      512        8            0.83      0.92     left to oneDNN: the weights take longest
     8       64       64            0.74      0.76     left to oneDNN: the steps around the products do

Imports nothing from pneumo.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

TILE, PIECE = 4, 6  # pixels along a side: results of a tile, and what they depend on
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # and infinity
CHANNELS = 128  # in and out at least, for the products to be what takes longest
EXACT = ("none", "ieee")  # matrix products in float32 itself; else they round as bf16's do
TILES = 32  # of the batch at least, to be worth the transformation of the weights


def winograd_conv(x: Tensor, weight: Tensor) -> Tensor:
    """What F.conv2d(x, weight, padding=1) computes, by Winograd's form.

    Args:
        x: (B, C, H, W) float; H and W multiples of 4.
        weight: (O, C, 3, 3) of the same type.

    Returns:
        (B, O, H, W), channels_last.
    """
    return _Winograd.apply(x, weight)


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether `winograd_conv` takes less time than F.conv2d, by a rule that was measured; see above.

    A rule, not a timer, so that two runs compute the same, bit for bit. It says so of Intel's processors alone, for
    which MKL's matrix products are made; on others it was not measured.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or not products_are_exact():
        return False
    batch, _, height, width = x.shape
    if height % TILE or width % TILE or batch * height * width < TILES * TILE**2:
        return False
    return min(weight.shape[:2]) >= CHANNELS and mkl_is_at_home()


def products_are_exact() -> bool:
    """Whether products of float32 matrices are of float32, or rounded, as by torch.set_float32_matmul_precision."""
    return torch.backends.mkldnn.matmul.fp32_precision in EXACT


@cache
def mkl_is_at_home() -> bool:
    """Whether PyTorch multiplies matrices by MKL and the processor is Intel's."""
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return intel and torch.backends.mkl.is_available()


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        of_result, _, _ = matrices(x.dtype)
        products = torch.bmm(_pieces(x), _of_weight(weight).permute(1, 2, 0))  # (36, N, O)
        (batch, _, height, width), out = x.shape, len(weight)
        high, wide = height // TILE, width // TILE
        tiles = (of_result @ products.flatten(1)).view(TILE, TILE, batch, high, wide, out)
        y = torch.empty(batch, out, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        # no view of something else, so that a ReLU may overwrite it
        y.permute(0, 2, 3, 1).view(batch, high, TILE, wide, TILE, out).copy_(tiles.permute(2, 3, 0, 4, 1, 5))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        with torch.autocast("cpu", enabled=False):  # which may have begun since the forward pass
            slopes = _slopes(slope)  # (36, N, O)
            if ctx.needs_input_grad[0]:
                of_x = _spread(torch.bmm(slopes, _of_weight(weight).permute(1, 0, 2)), x.shape)
            if ctx.needs_input_grad[1]:
                _, of_weights, _ = matrices(x.dtype)
                sums = torch.bmm(slopes.transpose(1, 2), _pieces(x)).transpose(0, 1)  # (O, 36, C)
                of_weight = (of_weights.T @ sums).unflatten(1, (3, 3)).permute(0, 3, 1, 2)
        return of_x, of_weight


@cache
def matrices(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(16, 36), (36, 9) and (36, 36): A, G and B for both axes at once."""
    powers = np.vander(POINTS, TILE, increasing=True)
    a = np.vstack([powers, np.eye(TILE)[-1]]).T
    others = [np.poly([q for q in POINTS if q != p])[::-1] for p in POINTS]  # zero at all points but one
    scale = [np.polyval(other[::-1], p) for other, p in zip(others, POINTS, strict=True)]
    g = np.vstack([powers[:, :3] / np.array(scale)[:, None], np.eye(3)[-1]])
    b = np.vstack([*(np.append(other, 0) for other in others), np.poly(POINTS)[::-1]])
    of_result, of_weight, of_x = (torch.from_numpy(np.kron(matrix, matrix)).to(dtype) for matrix in (a, g, b))
    return of_result, of_weight, of_x


def _pieces(x: Tensor) -> Tensor:
    """(B, C, H, W) to (36, N, C): of each of N tiles the piece of x that it depends on, transformed by B."""
    batch, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    image, row, pixel, _ = padded.stride()
    shape = (batch, height // TILE, width // TILE, PIECE, PIECE, channels)
    pieces = padded.as_strided(shape, (image, TILE * row, TILE * pixel, row, pixel, 1))
    _, _, of_x = matrices(x.dtype)
    return (of_x @ pieces.reshape(-1, PIECE**2, channels)).transpose(0, 1)


def _spread(pieces: Tensor, shape: torch.Size) -> Tensor:
    """Transposed of `_pieces`: (36, N, C) to (B, C, H, W), adding up where pieces overlap."""
    batch, channels, height, width = shape
    high, wide = height // TILE, width // TILE
    _, _, of_x = matrices(pieces.dtype)
    pieces = (of_x.T @ pieces.flatten(1)).view(PIECE, PIECE, batch, high, wide, channels).permute(2, 3, 0, 4, 1, 5)
    # a piece is its tile's own 4 rows and columns, and the first two of the next
    padded = pieces.new_zeros(batch, high + 1, TILE, wide + 1, TILE, channels)
    over = PIECE - TILE
    padded[:, :high, :, :wide] = pieces[:, :, :TILE, :, :TILE]
    padded[:, 1:, :over, :wide] += pieces[:, :, TILE:, :, :TILE]
    padded[:, :high, :, 1:, :over] += pieces[:, :, :TILE, :, TILE:]
    padded[:, 1:, :over, 1:, :over] += pieces[:, :, TILE:, :, TILE:]
    padded = padded.view(batch, height + TILE, width + TILE, channels)
    return padded[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2)


def _slopes(slope: Tensor) -> Tensor:
    """Transposed of what makes results of products: (B, O, H, W) to (36, N, O)."""
    batch, out, height, width = slope.shape
    tiles = slope.permute(0, 2, 3, 1).reshape(batch, height // TILE, TILE, width // TILE, TILE, out)
    of_result, _, _ = matrices(slope.dtype)
    return (of_result.T @ tiles.transpose(2, 3).reshape(-1, TILE**2, out)).transpose(0, 1)


def _of_weight(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) to (O, 36, C): transformed by G."""
    _, of_weight, _ = matrices(weight.dtype)
    return of_weight @ weight.permute(0, 2, 3, 1).reshape(len(weight), 9, -1)
