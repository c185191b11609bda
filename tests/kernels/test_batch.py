import numpy as np
import pytest
import torch
from skimage.measure import label

from pneumo.decision.components import label_runs
from pneumo.kernels import batch, runs

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


def stacks(count: int, seed: int):
    """Small stacks of masks of every density, some of their masks empty, full or a chessboard."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        size, height, width = rng.integers(1, 12, 3)
        masks = rng.random((size, height, width)) < rng.random((size, 1, 1))
        masks[rng.random(size) < 0.1] = True
        masks[rng.random(size) < 0.1] = False
        masks[rng.random(size) < 0.1] = np.indices((height, width)).sum(axis=0) % 2 == 0
        yield masks


def test_by_hand():
    masks = torch.zeros(2, 3, 2, dtype=torch.bool)
    masks[0, 2, 0] = masks[0, 0, 1] = True  # touch in the code's order, not in the picture
    masks[0, 2, 1] = masks[1, 0, 0] = True  # the image's last pixel and the next one's first
    found = batch.column_runs(masks)
    assert found.tolist() == [[2, 3], [3, 4], [5, 6], [6, 7]]
    assert batch.label_runs(found, 3, 2).tolist() == [0, 1, 0, 3]
    assert batch.drop_small_runs(found, 3, 2, 1).tolist() == [[2, 3], [5, 6]]
    assert batch.join(found, 6).tolist() == [[2, 4], [5, 6], [6, 7]]


@pytest.mark.parametrize("device", DEVICES)
def test_like_one_mask_after_the_other(device):
    for masks in stacks(600, 0):
        _, height, width = masks.shape
        found = batch.column_runs(torch.from_numpy(masks).to(device))
        labels = batch.label_runs(found, height, width).cpu().numpy()
        joined = batch.join(found, height * width).cpu().numpy()
        found = found.cpu().numpy()
        for i, mask in enumerate(masks):
            first = i * height * width
            inside = found[:, 0] // (height * width) == i
            wanted = runs.split_columns(runs.mask_to_runs(mask), height)
            np.testing.assert_array_equal(found[inside] - first, wanted)
            numbers = np.unique(labels[inside], return_inverse=True)[1]
            np.testing.assert_array_equal(numbers, label_runs(wanted, height))
            some = joined[joined[:, 0] // (height * width) == i]
            np.testing.assert_array_equal(some - first, runs.mask_to_runs(mask))


@pytest.mark.parametrize("device", DEVICES)
def test_long_ways_around(device):
    snake = np.zeros((41, 41), dtype=bool)
    snake[::2] = True
    snake[1::4, -1] = snake[3::4, 0] = True
    noise = np.random.default_rng(0).random((41, 41)) < 0.4
    found = batch.column_runs(torch.from_numpy(np.stack([snake, snake.T, noise])).to(device))
    labels = batch.label_runs(found, 41, 41)
    image = found[:, 0] // 41**2
    assert [len(labels[image == i].unique()) for i in range(3)] == [1, 1, label(noise, connectivity=2).max()]


def test_levels_beyond_a_byte():
    q = torch.tensor([0, 1, 254, 255], dtype=torch.uint8)
    for level in (0, 1, 255, 256):
        assert batch.at_least(q, level).tolist() == [value >= level for value in (0, 1, 254, 255)]
