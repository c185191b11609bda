import numpy as np
import pytest
from skimage.measure import label

from pneumo.decision.components import drop_small, drop_small_runs, label_runs
from pneumo.kernels.runs import mask_to_runs, runs_to_mask, split_columns


def reference(mask: np.ndarray, min_area: int) -> np.ndarray:
    labels = label(mask, connectivity=2)
    keep = np.bincount(labels.ravel()) > min_area
    keep[0] = False
    return keep[labels]


def test_by_hand():
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 1]], dtype=bool)
    assert drop_small(mask, 1).tolist() == [
        [True, False, False, False],  # joined to the next over a corner
        [False, True, False, False],
        [False, False, False, True],
        [False, False, False, True],
    ]
    assert not drop_small(mask, 2).any()  # more than, not at least


def test_top_and_bottom_of_neighbouring_columns_do_not_touch():
    mask = np.zeros((4, 2), dtype=bool)
    mask[3, 0] = mask[0, 1] = True  # one run in the code, two components
    assert not drop_small(mask, 1).any()
    columns = split_columns(mask_to_runs(mask), 4)
    assert label_runs(columns, 4).tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_like_a_pixel_labelling(seed):
    rng = np.random.default_rng(seed)
    for _ in range(700):
        mask = rng.random(rng.integers(1, 14, 2)) < rng.random()
        area = int(rng.integers(0, 12))
        np.testing.assert_array_equal(drop_small(mask, area), reference(mask, area))


def test_a_snake_is_one():
    mask = np.zeros((41, 41), dtype=bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    assert drop_small(mask, int(mask.sum()) - 1).sum() == mask.sum()
    assert not drop_small(mask, int(mask.sum())).any()


def test_large_noise():
    mask = np.random.default_rng(0).random((300, 280)) < 0.4
    np.testing.assert_array_equal(drop_small(mask, 30), reference(mask, 30))


def test_edges():
    empty = np.zeros((5, 5), dtype=bool)
    assert not drop_small(empty, 3).any()
    assert drop_small(~empty, 24).all()
    assert not drop_small(~empty, 25).any()
    runs = mask_to_runs(~empty)
    assert drop_small_runs(runs, 5, 0) is runs


def test_real_masks_with_specks(siim):
    from pneumo.data.cases import read_codes

    codes, _ = read_codes(siim / "gold-1024" / "stage_2_train.csv", 1024)
    rng = np.random.default_rng(0)
    positive = [runs for runs in codes.values() if len(runs)]
    assert len(positive) == 13
    for runs in positive:
        mask = runs_to_mask(runs, 1024, 1024).copy()
        for y, x in rng.integers(0, 1000, (60, 2)):
            mask[y : y + rng.integers(1, 15), x : x + rng.integers(1, 15)] = True
        np.testing.assert_array_equal(drop_small(mask, 3500), reference(mask, 3500))
