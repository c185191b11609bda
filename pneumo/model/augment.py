"""Augmentation of a batch on its device: parameters are drawn, then applied, each image by one resampling.

Mirror, distortion, shift, scale and rotation are composed into one map from output to input positions; contrast,
gamma and brightness into one curve. No value of the device is read by the host. Imports nothing from pneumo.
"""

import math
from dataclasses import dataclass
from typing import Any

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


def draw(count: int, side: int, generator: torch.Generator, **settings: Any) -> Warp:
    """Draw the augmentation of a batch.

    Args:
        count: how many images, B.
        side: of the images, pixels.
        generator: source of randomness; everything is made on its device.
        settings: as of `to_warp`.
    """
    return to_warp(*random_numbers(count, side, generator, **settings), side, **settings)


def random_numbers(
    count: int,
    side: int,
    generator: torch.Generator,
    *,
    grid_steps: int = 5,
    elastic_sigma: float = 6.0,
    **_settings: Any,
) -> tuple[Tensor, Tensor]:
    """All that is random about the augmentation of a batch, drawn at once; `to_warp` makes of it what a recipe says.

    Returns:
        (B, K) and (B, 2, h + 2 r, w + 2 r) float32, uniform in [0, 1): h by w is the elastic field's lattice, r how far
        it is smoothed.
    """
    options = {"generator": generator, "device": generator.device}
    _, size, radius = _lattice(side, elastic_sigma)
    chance = torch.rand(count, sum(_columns(grid_steps).values()), **options)
    return chance, torch.rand(count, 2, size + 2 * radius, size + 2 * radius, **options)


def to_warp(
    chance: Tensor,
    noise: Tensor,
    side: int,
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
    """What is done to each image of a batch, of random numbers; arithmetic alone, which a compiler can fuse.

    Args:
        chance, noise: from `random_numbers` with the same side, `grid_steps` and `elastic_sigma`.
        side: of the images, pixels.
        flip: probability of a left-right mirror.
        intensity: probability of one of: gain 1 +- `contrast`, exponent in `gamma`, `brightness` +- times the mean.
        distort: probability of one of: an elastic field (noise in [-1, 1] blurred by `elastic_sigma` pixels, times
            `elastic_alpha`, after an affine map that moves three points by up to `elastic_affine` pixels), a grid of
            `grid_steps` steps each stretched by 1 +- `grid_limit`, or a radial map of |k| up to `optical_limit`.
        rigid: probability of shifting by +- `shift` of the side, scaling by 1 +- `scale` and rotating by +- `rotate`
            degrees, together.

    Source:
        The transforms are those of albumentations 0.3 (ShiftScaleRotate, ElasticTransform, GridDistortion,
        OpticalDistortion, RandomContrast, RandomGamma, RandomBrightness), written as maps from output to input; of
        8-bit images it took 1 / gamma for the exponent, of others, and later versions of all, gamma.
    """
    columns = _columns(grid_steps)
    of = dict(zip(columns, chance.split(list(columns.values()), dim=1), strict=True))

    def uniform(name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * of[name].squeeze(1)

    def signed(name: str, limit: float) -> Tensor:
        return uniform(name, -limit, limit)

    count, one = len(chance), torch.ones_like(chance[:, 0])
    which = (uniform("tone") * 3).long()  # of the three kinds of each group
    kind = torch.where(uniform("toned") < intensity, which, -1)
    gain = torch.where(kind == 0, 1 + signed("contrast", contrast), one)
    exponent = torch.where(kind == 1, uniform("gamma", *gamma), one)
    bias = torch.where(kind == 2, signed("brightness", brightness), 0 * one)

    which = (uniform("distortion") * 3).long()
    kind = torch.where(uniform("distorted") < distort, which, -1)
    elastic = (kind == 0).float()
    field = _elastic_field(noise, side, elastic_sigma) * (elastic_alpha * 2 / side)
    straight = torch.eye(2, 3, device=chance.device).expand(count, 2, 3)
    bent = _three_point_affine(signed("corners", elastic_affine * 2 / side).view(count, 3, 2))
    stretch = 1 + signed("steps", grid_limit).view(count, 2, grid_steps)
    widths = torch.where((kind == 1)[:, None, None], stretch, 1.0)
    knots = F.pad((widths * (2 / grid_steps)).cumsum(dim=-1), (1, 0)) - 1

    moved = uniform("moved") < rigid
    angle = torch.where(moved, signed("angle", math.radians(rotate)), 0.0)
    zoom = torch.where(moved, 1 + signed("zoom", scale), 1.0)
    move = torch.where(moved[:, None], signed("shift", 2 * shift), 0.0)  # positions span 2
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    back = torch.stack([torch.stack([cos, -sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=1)
    return Warp(
        rigid=torch.cat([back, -back @ move[:, :, None]], dim=-1),
        affine=torch.where(elastic[:, None, None] > 0, bent, straight),
        elastic=field * elastic[:, None, None, None],
        grid=knots,
        optical=torch.where(kind == 2, signed("lens", optical_limit), 0.0),
        flip=torch.where(uniform("flip") < flip, -one, one),
        gamma=exponent,
        gain=gain,
        bias=bias,
    )


def transform(image: Tensor, mask: Tensor, chance: Tensor, noise: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Augment a batch by given random numbers: `to_warp`, then `apply`, in one function for a compiler.

    Args:
        image, mask: as of `apply`.
        chance, noise, settings: as of `to_warp`.
    """
    return apply(image, mask, to_warp(chance, noise, image.shape[-1], **settings))


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
        # in units of the focal length, which is the side; beyond the image's corners the map could fold
        radius2 = ((x.square() + y.square()) / 4).clamp(max=0.5)
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


def _columns(grid_steps: int) -> dict[str, int]:
    """What the random numbers of an image are for, and how many each takes; one more changes all that a seed draws."""
    once = ("tone", "toned", "contrast", "gamma", "brightness", "distortion", "distorted", "lens")
    more = {"corners": 6, "steps": 2 * grid_steps, "moved": 1, "angle": 1, "zoom": 1, "shift": 2, "flip": 1}
    return dict.fromkeys(once, 1) | more


def _lattice(side: int, sigma: float) -> tuple[float, int, int]:
    """The elastic field's lattice: pixels between its points, points along a side, points that its blur reaches."""
    stride = max(sigma / LATTICE, 1.0)
    return stride, max(math.ceil(side / stride), 2), math.ceil(4 * sigma / stride)


def _elastic_field(noise: Tensor, side: int, sigma: float) -> Tensor:
    """White noise in [-1, 1] at every pixel, blurred by `sigma` pixels, on a coarse lattice: (B, 2, h, w).

    The noise is made on the lattice itself; blurring n times fewer values a direction needs 1 / n of the deviation to
    give the same field. Between the lattice's points it is read bilinearly, which evens out: of neighbours that
    correlate by c it keeps (2 + c) / 3 of the variance a direction, and that is made up for.

    Args:
        noise: (B, 2, h + 2r, w + 2r) in [0, 1), r the reach of the blur.
    """
    stride, size, radius = _lattice(side, sigma)
    weights = [math.exp(-0.5 * (offset * stride / sigma) ** 2) for offset in range(-radius, radius + 1)]
    kernel = [weight / sum(weights) for weight in weights]
    kept = (2 + math.exp(-((stride / sigma) ** 2) / 4)) / 3 if stride > 1 else 1.0
    noise = (2 * noise - 1) / (stride * kept)
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
