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

    def only(self, i: int) -> "Warp":
        """What is done to image i alone."""
        return Warp(**{name: value[i : i + 1] for name, value in vars(self).items()})

    @property
    def bent(self) -> Tensor:
        """(B,) bool, whether there is an elastic distortion."""
        return (self.elastic != 0).flatten(1).any(dim=1) | (self.affine != _identity(self.affine)).flatten(1).any(dim=1)

    @property
    def stretched(self) -> Tensor:
        """(B,) bool, whether there is a grid distortion."""
        return (self.grid.diff() - 2 / (self.grid.shape[-1] - 1)).abs().flatten(1).amax(dim=1) > 1e-6

    @property
    def moved(self) -> Tensor:
        """(B,) bool, whether pixels move other than by a mirror."""
        turned = (self.rigid != _identity(self.rigid)).flatten(1).any(dim=1)
        return turned | self.bent | self.stretched | (self.optical != 0)


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
    centre = (2 * torch.arange(side, device=warp.rigid.device) + 1) / side - 1
    x, y = _affine(warp.rigid, centre[None, None, :], centre[None, :, None])  # (B, S, S) each
    if _some(warp.bent):
        # elastic: the field is laid over the distorted image; it moves positions before the affine part does
        field = _sample(warp.elastic, _positions(x, y), "bilinear")
        x, y = _affine(warp.affine, x + field[:, 0], y + field[:, 1])
    if _some(warp.stretched):
        x, y = _follow(warp.grid[:, 0], x), _follow(warp.grid[:, 1], y)
    if _some(warp.optical != 0):
        radius2 = (x.square() + y.square()) / 4  # in units of the focal length, which is the side
        factor = 1 + warp.optical[:, None, None] * (radius2 + radius2.square())
        x, y = x * factor, y * factor
    return _positions(x * warp.flip[:, None, None], y)


def apply(image: Tensor, mask: Tensor, warp: Warp) -> tuple[Tensor, Tensor]:
    """Augment a batch.

    On a CPU each image is made by itself, within the cache and without the parts that leave it as it is.

    Args:
        image: (B, 1, S, S) uint8.
        mask: (B, 1, S, S) uint8 of 0 and 1.

    Returns:
        (B, 1, S, S) float32 in [0, 1], resampled bilinearly, and (B, 1, S, S) float32 of 0 and 1, of the nearest pixel.
    """
    if image.device.type != "cpu":
        return _apply(image, mask, warp)
    parts = [_apply(image[i : i + 1], mask[i : i + 1], warp.only(i)) for i in range(len(image))]
    grey, moved = zip(*parts, strict=True)
    return torch.cat(grey), torch.cat(moved)


def _apply(image: Tensor, mask: Tensor, warp: Warp) -> tuple[Tensor, Tensor]:
    grey, mask = adjust(image, warp), mask.float()
    if not _some(warp.moved):
        return (grey.flip(-1), mask.flip(-1)) if _some(warp.flip < 0) else (grey, mask)
    grid = sampling_grid(warp, image.shape[-1])
    return _sample(grey, grid, "bilinear"), _sample(mask, grid, "nearest") if _some(mask) else mask


def adjust(image: Tensor, warp: Warp) -> Tensor:
    """Change grey levels: (B, 1, S, S) uint8 to float32, clipped to [0, 1]."""
    grey = image.float() / 255
    gamma, gain, bias = (value[:, None, None, None] for value in (warp.gamma, warp.gain, warp.bias))
    if not _some((gamma != 1) | (gain != 1) | (bias != 0)):
        return grey
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    return (grey**gamma * gain + bias * mean).clamp(0, 1)


def _some(change: Tensor) -> bool:
    """Whether a part changes any image of a batch, as far as that can be known without waiting for a device."""
    return change.device.type != "cpu" or bool(change.any())


def _positions(x: Tensor, y: Tensor) -> Tensor:
    """(B, S, S) each to (B, S, S, 2), stored as two planes."""
    return torch.stack([x, y], dim=1).permute(0, 2, 3, 1)


def _sample(values: Tensor, grid: Tensor, mode: str) -> Tensor:
    """Read (B, C, S, S) values at (B, S, S, 2) positions; beyond the edge they are mirrored."""
    return F.grid_sample(values, grid, mode, padding_mode="reflection", align_corners=False)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(2, 3, device=like.device)


def _affine(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Apply (B, 2, 3) affine maps to positions that broadcast to (B, S, S)."""
    (a, b, c), (d, e, f) = (row.unbind() for row in theta.permute(1, 2, 0)[..., None, None])
    return a * x + (b * y + c), d * x + (e * y + f)


def _follow(knots: Tensor, x: Tensor) -> Tensor:
    """Send (B, S, S) positions through piecewise linear maps of n equal steps: (B, n + 1) knots."""
    steps = knots.shape[-1] - 1
    place = (x + 1) * (steps / 2)
    cell = place.floor().clamp(0, steps - 1)
    number = cell.long().flatten(1)
    left, right = (knots.gather(1, number + more).view_as(x) for more in (0, 1))
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
