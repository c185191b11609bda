"""A convolution with bias, a sum and a ReLU: one pass over memory where cuDNN has it, for prediction only.

On an H100, bf16, 8 x 64 channels of 256 x 256 pixels, convolution, bias and ReLU took 0.241 ms one after the other, the
convolution alone 0.092 ms, and so did cuDNN's convolution with bias and ReLU. With a sum it was not timed. Imports
errors.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pneumo.errors import is_gpu_full

HALVES = (torch.float16, torch.bfloat16)


def conv_relu(x: Tensor, conv: nn.Conv2d, add: Tensor | None = None) -> Tensor:
    """ReLU of a convolution, or of its sum with `add`; no gradients.

    Args:
        x: (B, C, H, W).
        conv: with a bias.
        add: of the shape of the result, (B, O, H', W').
    """
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    if (
        x.is_cuda
        and x.dtype in HALVES
        and x.dtype == conv.weight.dtype
        and _fused_is_right(x.device, x.dtype, tuple(conv.weight.shape), *geometry, add is not None)
    ):
        return _fused(x, conv.weight, conv.bias, add, *geometry)
    return conv_relu_ref(x, conv, add)


def conv_relu_ref(x: Tensor, conv: nn.Conv2d, add: Tensor | None = None) -> Tensor:
    """What `conv_relu` computes, step by step; the same arguments and result."""
    y = conv(x)
    if add is not None:
        y += add
    return y.relu_()


def _fused(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, *geometry: object) -> Tensor:
    """The same by cuDNN, which always reads something to add; where there is nothing, x, of which it takes none."""
    z, share = (x, 0.0) if add is None else (add, 1.0)
    return torch.cudnn_convolution_add_relu(x, weight, z, share, bias, *geometry)


@cache
def _fused_is_right(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    adds: bool,
) -> bool:
    """Whether the fused form is there for such a convolution and gives the plain result; tried once on a few numbers.

    A result must not look sound that is none. cuDNN's ReLU may turn NaN into 0; in float16, where 65,504 is the end, it
    has to keep NaN to be used. What ends in NaN in bfloat16 is beyond float32 as well.

    Args:
        shape: of the weight.
        adds: whether there is something to add.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device).to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    x, weight, bias = random(2, shape[1] * groups, 32, 32), random(*shape), random(shape[0])
    plain = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    add = random(*plain.shape) if adds else None
    if add is None and plain.shape != x.shape:
        return False  # nothing of the result's shape is at hand to be read
    wanted = (plain.float() + (0 if add is None else add.float())).relu()
    spoilt = x.clone(memory_format=torch.channels_last)
    spoilt[:, :, 16, 16] = torch.nan
    try:
        result, bad = (_fused(part, weight, bias, add, stride, padding, dilation, groups) for part in (x, spoilt))
    except RuntimeError as error:
        if is_gpu_full(error):
            raise
        return False
    if dtype == torch.float16 and not bad.isnan().any():
        return False
    return torch.allclose(result.float(), wanted, rtol=0.02, atol=0.02 * float(wanted.max()))
