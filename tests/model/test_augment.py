import math
from dataclasses import fields, replace

import numpy as np
import pytest
import scipy.ndimage
import torch

from pneumo.model import augment
from pneumo.model.augment import Warp

NONE = {"flip": 0.0, "intensity": 0.0, "distort": 0.0, "rigid": 0.0}


def draw(count: int, side: int = 64, seed: int = 0, **settings) -> Warp:
    return augment.draw(count, side, torch.Generator().manual_seed(seed), **{**NONE, **settings})


def pictures(count: int, side: int = 64) -> torch.Tensor:
    """Smooth random pictures, (B, 1, S, S) uint8."""
    noise = np.random.default_rng(0).normal(size=(count, side, side))
    smooth = scipy.ndimage.gaussian_filter(noise, (0, side / 12, side / 12))
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return torch.from_numpy((smooth * 255).astype(np.uint8))[:, None]


def pixels(grid: torch.Tensor) -> torch.Tensor:
    """Positions in [-1, 1] as pixel coordinates (x, y), whole at centres."""
    return (grid + 1) * grid.shape[1] / 2 - 0.5


def test_nothing_drawn_changes_nothing():
    image = pictures(3)
    mask = (image > 120).to(torch.uint8)
    out, out_mask = augment.apply(image, mask, draw(3))
    torch.testing.assert_close(out, image.float() / 255, atol=2e-5, rtol=0)
    assert torch.equal(out_mask, mask.float())


def test_flip_is_a_flip():
    image = pictures(2)
    mask = (image > 120).to(torch.uint8)
    out, out_mask = augment.apply(image, mask, draw(2, flip=1.0))
    torch.testing.assert_close(out, image.flip(-1).float() / 255, atol=2e-5, rtol=0)
    assert torch.equal(out_mask, mask.flip(-1).float())


def test_same_seed_same_batch():
    image = pictures(4)
    settings = {"flip": 0.5, "intensity": 0.9, "distort": 0.9, "rigid": 0.9}
    torch.manual_seed(0)
    a = augment.apply(image, image > 99, draw(4, seed=5, **settings))[0]
    torch.manual_seed(1)  # global randomness is not read
    b = augment.apply(image, image > 99, draw(4, seed=5, **settings))[0]
    c = augment.apply(image, image > 99, draw(4, seed=6, **settings))[0]
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_seed_draws_what_it_always_drew():
    """Else a run that is gone on with by a later version ends elsewhere, and no result can be made again."""
    warp = draw(8, flip=0.5, intensity=1.0, distort=1.0, rigid=1.0)
    wanted = {
        "rigid": (21.368, 0.0043), "affine": (16.732, 0.0), "elastic": (168.385, 0.0), "grid": (58.503, 1.205),
        "optical": (0.063, 0.0), "flip": (8.0, 1.0), "gamma": (7.863, 0.9543), "gain": (7.830, 1.0),
        "bias": (0.500, 0.0),
    }  # fmt: skip
    for name, (size, last) in wanted.items():
        value = getattr(warp, name)
        assert float(value.abs().sum()) == pytest.approx(size, abs=2e-3), name
        assert float(value.flatten()[-1]) == pytest.approx(last, abs=1e-4), name
    assert wanted.keys() == vars(warp).keys()


@pytest.mark.parametrize("side", [64, 128])
def test_a_mask_moves_with_its_image(side):
    image = pictures(24, side)
    settings = {"flip": 0.5, "distort": 0.9, "rigid": 0.9, "elastic_alpha": 30.0}
    out, mask = augment.apply(image, (image > 128).to(torch.uint8), draw(24, side, **settings))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    clear = (out - 128.5 / 255).abs() > 0.02  # nearest and bilinear may differ at the edge itself
    assert clear.float().mean() > 0.7
    agree = (mask > 0.5) == (out > 128.5 / 255)
    assert agree[clear].float().mean() > 0.999
    assert not torch.equal(mask, (image > 128).float())


def mixed(monkeypatch) -> tuple[tuple[torch.Tensor, torch.Tensor, Warp], tuple[torch.Tensor, torch.Tensor]]:
    """Images, masks and what is done to them, of every kind and none; and the result with every part applied to all."""
    image = pictures(60, 96)
    mask = (image > 128).to(torch.uint8)
    mask[::3] = 0
    warp = augment.draw(60, 96, torch.Generator().manual_seed(3), distort=0.5, elastic_alpha=30.0)
    assert {int(warp.moved.sum()), int(warp.bent.sum()), int(warp.stretched.sum())}.isdisjoint({0, 60})
    monkeypatch.setattr(augment, "_some", lambda change: True)  # as on a GPU, whose values are not read
    return (image, mask, warp), augment._apply(image, mask, warp)


def test_image_by_image_is_as_the_batch(monkeypatch):
    with monkeypatch.context() as patch:
        batch, (wanted, wanted_mask) = mixed(patch)
    out, mask = augment.apply(*batch)
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=0)
    assert (mask != wanted_mask).float().mean() < 1e-5  # of a pixel half-way between two


@pytest.mark.slow
def test_compiled_is_as_it_stands(monkeypatch):
    settings = {"distort": 0.5, "elastic_alpha": 30.0}
    (image, mask, _), (wanted, wanted_mask) = mixed(monkeypatch)
    numbers = augment.random_numbers(60, 96, torch.Generator().manual_seed(3))
    monkeypatch.setattr(augment, "apply", augment._apply)
    out, moved = torch.compile(augment.transform, fullgraph=True, dynamic=False)(image, mask, *numbers, **settings)
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=0)
    assert (moved != wanted_mask).float().mean() < 1e-5


def test_in_one_function_is_as_in_two():
    image = pictures(6)
    settings = {"intensity": 0.9, "distort": 0.9, "elastic_sigma": 4.0, "grid_steps": 3}
    numbers = augment.random_numbers(6, 64, torch.Generator().manual_seed(5), **settings)
    warp = augment.draw(6, 64, torch.Generator().manual_seed(5), **settings)
    for one, two in zip(
        augment.transform(image, image > 99, *numbers, **settings), augment.apply(image, image > 99, warp), strict=True
    ):
        assert torch.equal(one, two)


def test_rigid_motion_is_the_stated_one():
    warp = draw(200, 100, rigid=1.0)
    grid = augment.sampling_grid(warp, 100)
    # distances shrink or grow by the same factor everywhere, within the stated limits
    step = (grid[:, 50, 51] - grid[:, 50, 50]).norm(dim=-1) * 50
    assert 1 / 1.1 - 1e-3 <= step.min() < 0.95
    assert 1.05 < step.max() <= 1 / 0.9 + 1e-3
    angle = torch.rad2deg(torch.atan2(*(grid[:, 50, 51] - grid[:, 50, 50]).flip(-1).unbind(-1)))
    assert 40 < angle.abs().max() <= 45.01
    # the centre moves by at most 6.25 % of the side, and does move
    turned = warp.rigid[:, :, :2].inverse() @ warp.rigid[:, :, 2:]
    assert 0.11 < turned.abs().max() <= 0.125 + 1e-5


def test_a_shift_to_the_right_moves_the_picture_right():
    warp = replace(draw(1), rigid=torch.tensor([[[1.0, 0, -2 * 4 / 64], [0, 1, 0]]]))  # back by 4 pixels
    image = pictures(1)
    out, _ = augment.apply(image, image > 99, warp)
    torch.testing.assert_close(out[..., 4:], image[..., :-4].float() / 255, atol=2e-5, rtol=0)
    torch.testing.assert_close(out[..., :4], image[..., :4].flip(-1).float() / 255, atol=2e-5, rtol=0)  # mirrored


def test_optical_distortion_is_opencvs_map_and_never_folds():
    side = 96
    warp = draw(60, side, distort=1.0, elastic_alpha=0.0, elastic_affine=0.0, grid_limit=0.0)
    assert 0.25 < warp.optical.abs().max() <= 0.3
    grid = pixels(augment.sampling_grid(warp, side))
    y, x = np.mgrid[:side, :side].astype(np.float64)
    centre = (side - 1) / 2
    u, v = (x - centre) / side, (y - centre) / side
    for image, k in enumerate(warp.optical.tolist()):
        r2 = u**2 + v**2
        factor = 1 + k * r2 + k * r2**2
        np.testing.assert_allclose(grid[image, ..., 0], u * factor * side + centre, atol=1e-3)
        np.testing.assert_allclose(grid[image, ..., 1], v * factor * side + centre, atol=1e-3)
    assert (grid[:, :, 1:, 0] > grid[:, :, :-1, 0]).all()


def test_grid_distortion_stretches_equal_steps():
    side = 100
    warp = draw(80, side, distort=1.0, elastic_alpha=0.0, elastic_affine=0.0, optical_limit=0.0)
    grid = augment.sampling_grid(warp, side)
    plain = augment.sampling_grid(draw(1, side), side)
    bent = [i for i in range(80) if not torch.allclose(grid[i], plain[0], atol=1e-5)]
    assert 10 < len(bent) < 45  # a third
    slopes = (grid[:, :, 1:, 0] - grid[:, :, :-1, 0]) / (plain[:, :, 1:, 0] - plain[:, :, :-1, 0])
    assert 0.7 - 1e-3 <= slopes.min() < 0.75
    assert 1.25 < slopes.max() <= 1.3 + 1e-3
    inside = slopes[bent[0], 0, :19]  # one step has one slope
    assert inside.max() - inside.min() < 1e-3
    assert torch.allclose(grid[bent[0], 0, :, 0], grid[bent[0], 50, :, 0])  # x depends on x alone


def test_optical_distortion_does_not_fold_beyond_the_corners_either():
    """Where a rigid motion takes positions."""
    warp = draw(400, 32, flip=0.0, distort=1.0, rigid=1.0, elastic_alpha=0.0, elastic_affine=0.0, grid_limit=0.0)
    grid = augment.sampling_grid(warp, 32)
    assert float(grid.abs().max()) > 1.4
    across, down = grid[:, :-1, 1:] - grid[:, :-1, :-1], grid[:, 1:, :-1] - grid[:, :-1, :-1]
    turn = across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0]
    assert float(turn.min()) > 0


def test_elastic_field_is_blurred_noise():
    side = 192
    warp = draw(60, side, distort=1.0, elastic_affine=0.0, grid_limit=0.0, optical_limit=0.0)
    moved = pixels(augment.sampling_grid(warp, side)) - pixels(augment.sampling_grid(draw(1, side), side))
    moved = moved[[i for i in range(60) if moved[i].abs().max() > 1e-3]].numpy()
    assert 8 < len(moved) < 35
    noise = np.random.default_rng(0).uniform(-1, 1, (30, side, side))
    wanted = scipy.ndimage.gaussian_filter(noise, (0, 6, 6)) * 120
    assert moved[..., 0].std() == pytest.approx(wanted.std(), rel=0.08)
    assert moved[..., 1].std() == pytest.approx(wanted.std(), rel=0.08)
    noise = augment.random_numbers(400, side, torch.Generator().manual_seed(0), elastic_sigma=6.0)[1]
    field = augment._elastic_field(noise, side, 6.0)
    plain = augment.sampling_grid(draw(1), side).expand(400, side, side, 2)
    read = augment._sample(field, plain, "bilinear")[:, :, 24:-24, 24:-24]
    assert float(read.std()) == pytest.approx((1 / 3) ** 0.5 / (2 * 6 * math.pi**0.5), rel=0.01)  # between points too

    def correlation(field: np.ndarray, lag: int) -> float:
        return float((field[..., lag:] * field[..., :-lag]).mean() / field.var())

    for lag in (3, 6, 12, 24):
        assert correlation(moved[..., 0], lag) == pytest.approx(correlation(wanted, lag), abs=0.06)


def test_elastic_affine_moves_three_points_by_a_few_pixels():
    side = 90
    warp = draw(200, side, distort=1.0, elastic_alpha=0.0, grid_limit=0.0, optical_limit=0.0)
    corners = torch.tensor([[2 / 3, 2 / 3], [2 / 3, -2 / 3], [-2 / 3, -2 / 3]])
    linear, offset = warp.affine[:, :, :2], warp.affine[:, None, :, 2]
    came_from = corners @ linear.transpose(1, 2) + offset
    # the map takes moved corners back to the corners, so corners themselves come from about as far on the other side
    distance = (came_from - corners).abs().amax(dim=(1, 2)) * side / 2
    assert 3 < distance.max() < 4.5
    assert (distance < 1e-4).float().mean() == pytest.approx(2 / 3, abs=0.12)


def test_intensity_is_one_of_three():
    warp = draw(3000, intensity=1.0)
    changed = torch.stack([warp.gain != 1, warp.gamma != 1, warp.bias != 0])
    assert (changed.sum(dim=0) == 1).all()
    assert changed.float().mean(dim=1).tolist() == pytest.approx([1 / 3] * 3, abs=0.04)
    assert (float(warp.gain.min()), float(warp.gain.max())) == pytest.approx((0.8, 1.2), abs=0.01)
    assert (float(warp.gamma.min()), float(warp.gamma.max())) == pytest.approx((0.8, 1.2), abs=0.01)
    assert (float(warp.bias.min()), float(warp.bias.max())) == pytest.approx((-0.2, 0.2), abs=0.01)


def test_intensity_by_hand():
    image = torch.tensor([[[[0, 51], [102, 255]]]], dtype=torch.uint8)
    plain = draw(1, 2)
    grey, mean = image.float() / 255, 102 / 255
    for change, wanted in (
        ({"gain": torch.tensor([1.2])}, (grey * 1.2).clamp(0, 1)),
        ({"gamma": torch.tensor([0.8])}, grey**0.8),
        ({"bias": torch.tensor([-0.2])}, (grey - 0.2 * mean).clamp(0, 1)),
    ):
        torch.testing.assert_close(augment.adjust(image, replace(plain, **change)), wanted)


def test_probabilities_are_the_recipes():
    count = 4000
    warp = augment.draw(count, 32, torch.Generator().manual_seed(0))
    shares = {
        "flip": (warp.flip < 0, 0.5),
        "intensity": ((warp.gain != 1) | (warp.gamma != 1) | (warp.bias != 0), 0.3),
        "rigid": (warp.rigid[:, 0, 1] != 0, 0.5),
        "elastic": (warp.elastic.abs().amax(dim=(1, 2, 3)) > 0, 0.1),
        "optical": (warp.optical != 0, 0.1),
        "grid": ((warp.grid[:, 0, 1] - (-1 + 2 / 5)).abs() > 1e-6, 0.1),
    }
    for name, (happened, probability) in shares.items():
        spread = (probability * (1 - probability) / count) ** 0.5
        assert abs(float(happened.float().mean()) - probability) < 4 * spread, name
    distorted = sum(shares[name][0].int() for name in ("elastic", "optical", "grid"))
    assert int(distorted.max()) == 1


def test_a_warp_lives_where_its_generator_does():
    assert {getattr(draw(2), field.name).device.type for field in fields(Warp)} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_the_gpu_nothing_waits(waiting_refused):
    generator = torch.Generator("cuda").manual_seed(0)
    image = pictures(4).cuda()
    with waiting_refused():
        warp = augment.draw(4, 64, generator, distort=0.9, rigid=0.9)
        out, mask = augment.apply(image, image > 99, warp)
    reference, _ = augment.apply(
        image.cpu(), image.cpu() > 99, Warp(*(getattr(warp, f.name).cpu() for f in fields(Warp)))
    )
    torch.testing.assert_close(out.cpu(), reference, atol=1e-3, rtol=0)
    assert mask.device.type == "cuda"


def test_each_axis_of_a_grid_by_hand():
    """Of five equal steps in x, sent to steps of 0.2, 0.4, 0.4, 0.4 and 0.8; y stays."""
    x = torch.tensor([-1.0, -0.8, -0.4, 0.0, 0.4, 1.2])
    warp = replace(draw(1), grid=torch.stack([x, torch.linspace(-1, 1, 6)])[None])
    found, plain = augment.sampling_grid(warp, 10)[0], augment.sampling_grid(draw(1), 10)[0]
    wanted = torch.tensor([-0.95, -0.85, -0.7, -0.5, -0.3, -0.1, 0.1, 0.3, 0.6, 1.0])
    torch.testing.assert_close(found[..., 0], wanted.expand(10, 10))
    torch.testing.assert_close(found[..., 1], plain[..., 1])


def test_the_elastic_field_moves_positions_before_the_affine_part_does():
    """Also where there is no field."""
    affine = torch.tensor([[[2.0, 0, 0], [0, 1, 0]]])
    plain = augment.sampling_grid(draw(1), 8)
    for shift in (0.0, 0.25):
        field = torch.stack([torch.full((1, 4, 4), shift), torch.zeros(1, 4, 4)], dim=1)
        found = augment.sampling_grid(replace(draw(1), affine=affine, elastic=field), 8)
        torch.testing.assert_close(found[..., 0], 2 * (plain[..., 0] + shift))
        torch.testing.assert_close(found[..., 1], plain[..., 1])
