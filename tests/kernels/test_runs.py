import numpy as np
import pytest

from pneumo.kernels import runs as k


def masks(count: int, seed: int):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        shape = rng.integers(1, 9, 2)
        yield rng.random(shape) < rng.random(), rng.random(shape) < rng.random()


def test_by_hand():
    mask = np.zeros((3, 4), dtype=bool)
    mask[1:3, 0] = mask[0, 1] = mask[2, 3] = True
    assert k.mask_to_runs(mask).tolist() == [[1, 4], [11, 12]]
    assert k.split_columns(k.mask_to_runs(mask), 3).tolist() == [[1, 3], [3, 4], [11, 12]]
    assert k.area(k.mask_to_runs(mask)) == 4


def test_a_run_over_many_columns_is_cut_at_each():
    assert k.split_columns(np.array([[2, 11]]), 4).tolist() == [[2, 4], [4, 8], [8, 11]]


def test_runs_and_masks_are_each_others_inverse():
    for mask, _ in masks(2000, 0):
        runs = k.mask_to_runs(mask)
        np.testing.assert_array_equal(k.runs_to_mask(runs, *mask.shape), mask)
        np.testing.assert_array_equal(k.join(k.split_columns(runs, mask.shape[0])), runs)
        assert (runs[1:, 0] > runs[:-1, 1]).all()  # maximal


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("count", [0, 1, 40, 3000])  # few edges in rows are found another way than many
def test_few_pixels_and_many(order, count):
    rng = np.random.default_rng(count)
    for corner in (False, True):
        mask = np.zeros((90, 110), dtype=bool, order=order)
        mask[0, 0] = mask[-1, -1] = corner
        mask[rng.integers(0, 90, count), rng.integers(0, 110, count)] = True
        flat = np.pad(mask.T.reshape(-1).astype(int), 1)
        wanted = np.stack([np.flatnonzero(np.diff(flat) == 1), np.flatnonzero(np.diff(flat) == -1)], axis=1)
        np.testing.assert_array_equal(k.mask_to_runs(mask), wanted)


def test_touching_runs_paint_right():
    assert k.runs_to_mask(np.array([[0, 2], [2, 3]]), 2, 2).tolist() == [[True, True], [True, False]]


def test_sets():
    for a, b in masks(2000, 1):
        x, y = k.mask_to_runs(a), k.mask_to_runs(b)
        assert k.intersection_size(x, y) == (a & b).sum()
        np.testing.assert_array_equal(k.union([y, x]), k.mask_to_runs(a | b))
    assert k.union([]).shape == (0, 2)
    assert k.union([np.array([[5, 9], [1, 3]]), np.array([[2, 6], [20, 21]])]).tolist() == [[1, 9], [20, 21]]


@pytest.mark.parametrize("level", [1, 128, 254])
def test_threshold(level):
    q = np.array([[level - 1, level], [level, level + 1]], dtype=np.uint8)  # pixels go down the columns
    assert k.threshold_to_runs(q, level).tolist() == [[1, 4]]
    assert k.threshold_to_runs(q, 0).tolist() == [[0, 4]]
    assert k.threshold_to_runs(np.array([[254, 255]], dtype=np.uint8), 255).tolist() == [[1, 2]]
    assert k.threshold_to_runs(q, 256).tolist() == []
