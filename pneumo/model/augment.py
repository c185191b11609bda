"""Augmentation of a batch on its device: parameters are drawn, then applied, each image by one resampling.

Mirror, distortion, shift, scale and rotation are composed into one map from output to input positions; contrast,
gamma and brightness into one curve. No value of the device is read by the host. Imports nothing from pneumo.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LATTICE = 1.5  # the elastic field's lattice has this many points to a sigma: between them it is all but linear


@dataclass(frozen=True)
class Warp:
    """What is done to each image of a batch; positions are in [-1, 1], as `grid_sample` has them.

    Attributes:
        rigid: (B, 2, 3) from output positions to positions of the distorted image.
        affine: (B, 2, 3), the linear part of the elastic distortion; the identity where there is none.
        elastic: (B, 2, h, w) displacement on a lattice over the image; 0 where there is none.
        grid: (B, 2, n + 1) positions that the n equal steps of x and y are sent to.
        optical: (B,) radial coefficient k; 0 where there is none.
        flip: (B,) -1 where the image is mirrored, else 1.
        gamma, gain, bias: (B,) image ** gamma * gain + bias * mean(image).
    """

    rigid: Tensor
    affine: Tensor
    elastic: Tensor
    grid: Tensor
    optical: Tensor
    flip: Tensor
    gamma: Tensor
    gain: Tensor
    bias: Tensor


def draw(
    count: int,
    side: int,
    generator: torch.Generator,
    *,
    flip: float = 0.5,
    intensity: float = 0.3,
    contrast: float = 0.2,
    gamma: tuple[float, float] = (0.8, 1.2),
    brightness: float = 0.2,
    distort: float = 0.3,
    elastic_alpha: float = 120.0,
    elastic_sigma: float = 6.0,
    elastic_affine: float = 3.6,
    grid_steps: int = 5,
    grid_limit: float = 0.3,
    optical_limit: float = 0.3,
    rigid: float = 0.5,
    shift: float = 0.0625,
    scale: float = 0.1,
    rotate: float = 45.0,
) -> Warp:
    """Draw the augmentation of a batch.

    Args:
        count: how many images, B.
        side: of the images, pixels.
        generator: source of randomness; everything is made on its device.
        flip: probability of a left-right mirror.
        intensity: probability of one of: gain 1 +- `contrast`, exponent in `gamma`, `brightness` +- times the mean.
        distort: probability of one of: an elastic field (noise in [-1, 1] blurred by `elastic_sigma` pixels, times
            `elastic_alpha`, after an affine map that moves three points by up to `elastic_affine` pixels), a grid of
            `grid_steps` steps each stretched by 1 +- `grid_limit`, or a radial map of |k| up to `optical_limit`.
        rigid: probability of shifting by +- `shift` of the side, scaling by 1 +- `scale` and rotating by +- `rotate`
            degrees, together.

    Source:
        The transforms are those of albumentations 0.3 (ShiftScaleRotate, ElasticTransform, GridDistortion,
        OpticalDistortion, RandomContrast, RandomGamma, RandomBrightness), written as maps from output to input.
    """
    device = generator.device

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, device=device)

    def signed(limit: float, *shape: int) -> Tensor:
        return uniform(*shape, low=-limit, high=limit)

    one = torch.ones(count, device=device)
    which = (uniform(count) * 3).long()  # of the three kinds of each group
    kind = torch.where(uniform(count) < intensity, which, -1)
    gain = torch.where(kind == 0, 1 + signed(contrast, count), one)
    exponent = torch.where(kind == 1, uniform(count, low=gamma[0], high=gamma[1]), one)
    bias = torch.where(kind == 2, signed(brightness, count), 0 * one)

    which = (uniform(count) * 3).long()
    kind = torch.where(uniform(count) < distort, which, -1)
    elastic = (kind == 0).float()
    field = _elastic_field(uniform, count, side, elastic_sigma) * (elastic_alpha * 2 / side)
    straight = torch.eye(2, 3, device=device).expand(count, 2, 3)
    bent = _three_point_affine(signed(elastic_affine * 2 / side, count, 3, 2))
    widths = torch.where((kind == 1)[:, None, None], 1 + signed(grid_limit, count, 2, grid_steps), 1.0)
    knots = F.pad((widths * (2 / grid_steps)).cumsum(dim=-1), (1, 0)) - 1

    moved = uniform(count) < rigid
    angle = torch.where(moved, signed(math.radians(rotate), count), 0.0)
    zoom = torch.where(moved, 1 + signed(scale, count), 1.0)
    move = torch.where(moved[:, None], signed(2 * shift, count, 2), 0.0)  # positions span 2
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    back = torch.stack([torch.stack([cos, -sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=1)
    return Warp(
        rigid=torch.cat([back, -back @ move[:, :, None]], dim=-1),
        affine=torch.where(elastic[:, None, None] > 0, bent, straight),
        elastic=field * elastic[:, None, None, None],
        grid=knots,
        optical=torch.where(kind == 2, signed(optical_limit, count), 0.0),
        flip=torch.where(uniform(count) < flip, -one, one),
        gamma=exponent,
        gain=gain,
        bias=bias,
    )


def sampling_grid(warp: Warp, side: int) -> Tensor:
    """Where each output pixel comes from.

    Args:
        side: of the images, pixels.

    Returns:
        (B, S, S, 2) float32 input positions (x, y); [-1, 1] spans the image from edge to edge, beyond is mirrored.
    """
    position = F.affine_grid(warp.rigid, [len(warp.rigid), 1, side, side], align_corners=False)
    # elastic: the field is laid over the distorted image; it moves positions before the affine part does
    field = F.grid_sample(warp.elastic, position, "bilinear", padding_mode="reflection", align_corners=False)
    position = position + field.permute(0, 2, 3, 1)
    position = position @ warp.affine[:, None, :, :2].transpose(-1, -2) + warp.affine[:, None, None, :, 2]
    # grid: piecewise linear along each axis
    steps = warp.grid.shape[-1] - 1
    place = (position + 1) * (steps / 2)
    cell = place.floor().clamp(0, steps - 1)
    x, y = (_knot(warp.grid[:, axis], cell[..., axis].long(), place[..., axis]) for axis in (0, 1))
    position = torch.stack([x, y], dim=-1)
    # optical: in units of the focal length, which is the side
    radius2 = (position / 2).square().sum(dim=-1, keepdim=True)
    position = position * (1 + warp.optical[:, None, None, None] * (radius2 + radius2.square()))
    return position * torch.stack([warp.flip, torch.ones_like(warp.flip)], dim=-1)[:, None, None, :]


def apply(image: Tensor, mask: Tensor, warp: Warp) -> tuple[Tensor, Tensor]:
    """Augment a batch.

    Args:
        image: (B, 1, S, S) uint8.
        mask: (B, 1, S, S) uint8 of 0 and 1.

    Returns:
        (B, 1, S, S) float32 in [0, 1], resampled bilinearly, and (B, 1, S, S) float32 of 0 and 1, of the nearest pixel.
    """
    grid = sampling_grid(warp, image.shape[-1])
    grey = F.grid_sample(adjust(image, warp), grid, "bilinear", padding_mode="reflection", align_corners=False)
    moved = F.grid_sample(mask.float(), grid, "nearest", padding_mode="reflection", align_corners=False)
    return grey, moved


def adjust(image: Tensor, warp: Warp) -> Tensor:
    """Change grey levels: (B, 1, S, S) uint8 to float32, clipped to [0, 1]."""
    grey = image.float() / 255
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    gamma, gain, bias = (value[:, None, None, None] for value in (warp.gamma, warp.gain, warp.bias))
    return (grey**gamma * gain + bias * mean).clamp(0, 1)


def _knot(knots: Tensor, cell: Tensor, place: Tensor) -> Tensor:
    """Follow a piecewise linear map: (B, n + 1) knots, (B, S, S) cell numbers and places in units of cells."""
    count, *shape = cell.shape
    left = knots.gather(1, cell.reshape(count, -1)).view(count, *shape)
    right = knots.gather(1, cell.reshape(count, -1) + 1).view(count, *shape)
    return left + (right - left) * (place - cell)


def _elastic_field(uniform, count: int, side: int, sigma: float) -> Tensor:
    """White noise in [-1, 1] at every pixel, blurred by `sigma` pixels, on a coarse lattice: (B, 2, h, w).

    The noise is made on the lattice itself; blurring n times fewer values a direction needs 1 / n of the deviation to
    give the same field.
    """
    stride = max(sigma / LATTICE, 1.0)
    size = max(math.ceil(side / stride), 2)
    radius = math.ceil(4 * sigma / stride)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets * stride / sigma) ** 2)
    kernel = (kernel / kernel.sum()).tolist()
    noise = uniform(count, 2, size + 2 * radius, size + 2 * radius, low=-1.0, high=1.0) / stride
    rows = sum(weight * noise[:, :, i : i + size, :] for i, weight in enumerate(kernel))
    return sum(weight * rows[:, :, :, i : i + size] for i, weight in enumerate(kernel))


def _three_point_affine(jitter: Tensor) -> Tensor:
    """The affine maps that undo moving three points of the image: (B, 3, 2) moves to (B, 2, 3)."""
    third = jitter.new_full((), 2 / 3)  # filled there: a tensor of Python numbers would be copied with a wait
    corners = torch.stack([third, third, third, -third, -third, -third]).view(3, 2)
    moved = corners + jitter
    # for moved points q and corners p of x and y: p = A q + b; two edge vectors give A by Cramer's rule
    (ax, ay), (bx, by) = (moved[:, 0] - moved[:, 1]).unbind(-1), (moved[:, 1] - moved[:, 2]).unbind(-1)
    determinant = ax * by - ay * bx
    inverse = torch.stack([by, -bx, -ay, ax], dim=-1).view(-1, 2, 2) / determinant[:, None, None]
    edges = torch.stack([corners[0] - corners[1], corners[1] - corners[2]], dim=-1)
    linear = edges @ inverse
    return torch.cat([linear, (corners[1] - (linear @ moved[:, 1, :, None]).squeeze(-1))[..., None]], dim=-1)
