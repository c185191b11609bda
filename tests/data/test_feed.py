import numpy as np
import pytest
import torch

from pneumo.data import feed
from pneumo.data.feed import Feed
from pneumo.data.pack import Pack

POSITIVES, NEGATIVES = np.arange(0, 40), np.arange(40, 200)


def plan(epoch: int, draw: str, positive_fraction: float = 0.5, **changes: int) -> np.ndarray:
    place = {"seed": 0, "fold": 1, "stage": 2, **changes}
    return feed.epoch_plan(POSITIVES, NEGATIVES, positive_fraction=positive_fraction, draw=draw, epoch=epoch, **place)


@pytest.mark.parametrize("draw", ["fixed", "fresh"])
@pytest.mark.parametrize(("share", "size"), [(0.5, 80), (1.0, 40), (0.8, 50), (0.25, 160), (0.01, 200)])
def test_every_positive_once_and_a_share_of_negatives(draw, share, size):
    chosen = plan(3, draw, share)
    assert len(chosen) == size  # all negatives at most
    assert np.array_equal(np.sort(chosen[chosen < 40]), POSITIVES)
    assert len(set(chosen.tolist())) == size


def test_fixed_negatives_are_the_same_in_every_epoch_and_stage():
    first = set(plan(1, "fixed").tolist())
    assert set(plan(7, "fixed").tolist()) == set(plan(2, "fixed", stage=3).tolist()) == first
    assert set(plan(1, "fixed", fold=0).tolist()) != first


def test_fresh_negatives_are_all_seen_before_any_comes_again():
    seen = [row for epoch in range(1, 5) for row in plan(epoch, "fresh").tolist() if row >= 40]
    assert sorted(seen) == NEGATIVES.tolist()  # 4 epochs of 40 are the 160
    again = [row for epoch in range(5, 9) for row in plan(epoch, "fresh").tolist() if row >= 40]
    assert sorted(again) == NEGATIVES.tolist()
    assert again != seen


def test_fresh_negatives_that_do_not_divide_evenly():
    dealt = [row for epoch in range(1, 14) for row in plan(epoch, "fresh", 0.6).tolist() if row >= 40]
    counts = np.bincount(dealt, minlength=200)[40:]
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("share", [0.9, 0.6, 0.35, 0.3, 0.25])
def test_fresh_negatives_come_once_in_an_epoch_and_equally_often(share):
    dealt = [plan(epoch, "fresh", share) for epoch in range(1, 31)]
    assert all(len(set(chosen.tolist())) == len(chosen) for chosen in dealt)
    counts = np.bincount(np.concatenate(dealt), minlength=200)[40:]
    assert counts.max() - counts.min() <= 1
    assert len({tuple(chosen.tolist()) for chosen in dealt}) == 30


def test_a_plan_is_shuffled_and_depends_on_its_place_alone():
    assert not np.array_equal(plan(1, "fixed"), plan(2, "fixed"))
    assert not np.array_equal(plan(1, "fixed"), plan(1, "fixed", seed=1))
    torch.manual_seed(5)
    np.random.seed(5)  # global randomness is not read
    assert np.array_equal(plan(1, "fresh"), plan(1, "fresh"))


def test_without_positives_all_negatives_are_shown():
    none = feed.epoch_plan(
        POSITIVES[:0], NEGATIVES, positive_fraction=0.5, draw="fresh", seed=0, fold=0, stage=1, epoch=1
    )
    assert np.array_equal(np.sort(none), NEGATIVES)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 15, 16, 17, 31])
def test_steps_take_everything_once(count):
    steps = feed.steps(np.arange(count), batch_size=4, accumulation=2)
    assert np.array_equal(np.concatenate([rows for step in steps for rows in step]), np.arange(count))
    assert all(len(step) == 2 for step in steps[:-1])
    assert all(len(rows) == 4 for step in steps for rows in step[:-1])


def test_keys_differ():
    keys = {feed.key(0, fold, stage, word) for fold in range(5) for stage in range(3) for word in ("a", "b")}
    assert len(keys) == 30
    assert feed.key(1, 23) != feed.key(12, 3)
    assert 0 <= min(keys) <= max(keys) < 2**63


def made_up_pack(count: int = 10, side: int = 32) -> tuple[Pack, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
    masks = rng.random((count, side, side)) < 0.3
    packed = np.packbits(masks, axis=2)
    return Pack(
        tuple(map(str, range(count))), images, packed, np.full((count, 2), side), "digest", np.arange(count)
    ), masks


def check_batches(device: torch.device, reserve: int) -> None:
    pack, masks = made_up_pack()
    rows = np.array([8, 1, 3, 4])
    feeder = Feed(pack, device, rows, reserve=reserve)
    plan = [np.array([3, 8]), np.array([1]), np.array([4, 3, 8])]
    for wanted, (image, mask) in zip(plan, feeder.batches(plan), strict=True):
        assert image.shape == mask.shape == (len(wanted), 1, 32, 32)
        assert image.dtype == mask.dtype == torch.uint8
        assert image.device.type == device.type
        np.testing.assert_array_equal(image[:, 0].cpu(), pack.images[wanted])
        np.testing.assert_array_equal(mask[:, 0].cpu(), masks[wanted])


def test_batches_come_in_order_with_their_masks():
    check_batches(torch.device("cpu"), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("reserve", [0, 1 << 50])  # resident, streamed
def test_batches_on_the_gpu(reserve):
    check_batches(torch.device("cuda", 0), reserve)


@pytest.mark.parametrize("other", [{"seed": 1}, {"fold": 0}, {"stage": 1}])
def test_orders_and_fresh_negatives_differ_by_seed_fold_and_stage(other):
    assert not np.array_equal(plan(1, "fixed", 1.0), plan(1, "fixed", 1.0, **other))  # all positives, in another order
    assert set(plan(1, "fresh").tolist()) != set(plan(1, "fresh", **other).tolist())
