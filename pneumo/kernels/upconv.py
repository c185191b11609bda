"""Nearest upsampling by two, a skip joined to it, and a 3x3 convolution of both: the first half of a decoder block.

A 3x3 window over an upsampled image sees each pixel of the image two or four times, so its nine weights act as four:
the upsampled half is a 4x4 transposed convolution of stride 2 of the small image, whose weights are sums of the 3x3
ones. It costs 4 instead of 9 products for each input channel and pixel, and neither the upsampled image nor its
concatenation with the skip is ever in memory, nor kept for the backward pass. Imports thin_conv, wide_conv, winograd.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pneumo.kernels import wide_conv, winograd
from pneumo.kernels.thin_conv import doubling_conv

CPU_PIXELS = 512  # of x, over the batch: with fewer, summing up the weights costs more than it saves
INTEL_PIXELS = {torch.bfloat16: 1024, torch.float32: 2048}  # on Intel's, whose plain form is faster: AMX, Winograd
AHEAD = 10_000_000  # cycles, about 6 ms, that a GPU is kept busy while the host launches what is to be timed


def upsampled_conv(x: Tensor, skip: Tensor | None, weight: Tensor) -> Tensor:
    """Convolve the upsampled `x` and `skip`, as `upsampled_conv_ref` does, by the sum of two convolutions.

    Args:
        x: (B, C, H, W) float.
        skip: (B, K, 2H, 2W) of the same type, or None for K = 0.
        weight: (O, C + K, 3, 3).

    Returns:
        (B, O, 2H, 2W); beyond the rim are zeros.
    """
    below = x.shape[1]
    channels_last = weight.permute(0, 2, 3, 1)  # so that gradients of both parts are joined in this order
    above, beside = channels_last.split([below, weight.shape[1] - below], dim=3)
    y = doubling_conv(x, stride_2_weight(above.permute(0, 3, 1, 2)))
    return y if skip is None else y.add_(wide_conv.conv(skip, beside.permute(0, 3, 1, 2)))


def upsampled_conv_ref(x: Tensor, skip: Tensor | None, weight: Tensor) -> Tensor:
    """What `upsampled_conv` computes, step by step; the same arguments and result."""
    x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return wide_conv.conv(x if skip is None else torch.cat([x, skip], dim=1), weight)


def stride_2_weight(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) over an upsampled image to (C, O, 4, 4) of the transposed convolution of the image itself.

    Along one axis, pixel i of the image stands at 2i and 2i + 1 of the upsampled one; to the outputs 2i - 1 .. 2i + 2
    it adds what the window's last, last two, first two and first weight see of it.
    """
    weight = weight.transpose(0, 1).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # (C, 3, 3, O)
    for axis in (1, 2):
        first, middle, last = weight.unbind(axis)
        weight = torch.stack([last, middle + last, first + middle, first], dim=axis)
    return weight.permute(0, 3, 1, 2)


def is_faster(
    x: tuple[int, int, int, int], skip: int, out: int, device: torch.device, dtype: torch.dtype, runs: int = 5
) -> bool:
    """Whether `upsampled_conv` trains faster than its reference at this shape, on this device.

    On a CPU by a rule that was measured, forward and backward, on 2 cores of an AMD EPYC with AVX-512, ResNet34's
    five blocks at 64, 256 and 1024 px, float32 and bf16: it won in all of the cases of 512 pixels or more, by 1.1 to
    3.2 times, and lost most of those with fewer. On 2 cores of an Intel Xeon with AMX it took 1.1 to 1.4 times as long
    as the reference below 1024 pixels in bf16, and below 2048 in float32, and won from there on by 1.1 to 2.4 times.
    So two runs on a CPU compute the same, bit for bit, which a timer's choice would not promise. On a GPU it is timed,
    which takes milliseconds; the caller keeps the answer.

    Args:
        x: shape of the small image.
        skip, out: channels.
        dtype: of the computation.
    """
    batch, below, height, width = x
    if device.type == "cpu":
        least = INTEL_PIXELS.get(dtype, CPU_PIXELS) if winograd.mkl_is_at_home() else CPU_PIXELS
        return batch * height * width >= least
    options = {"device": device, "dtype": dtype, "requires_grad": True}
    small = torch.randn(x, **options)
    joined = torch.randn(batch, skip, 2 * height, 2 * width, **options) if skip else None
    small, joined = (
        part if part is None else part.contiguous(memory_format=torch.channels_last) for part in (small, joined)
    )
    weight = torch.randn(out, below + skip, 3, 3, **options).contiguous(memory_format=torch.channels_last)

    def milliseconds(convolve: Callable[..., Tensor]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)  # at small sizes the host takes longer to launch than the device to compute
        start.record()
        result = convolve(small, joined, weight)
        torch.autograd.grad(result, [part for part in (small, joined, weight) if part is not None], result)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    times = [[milliseconds(form) for form in (upsampled_conv, upsampled_conv_ref)] for _ in range(2 + runs)][2:]
    mine, reference = (statistics.median(column) for column in zip(*times, strict=True))
    return mine < reference
