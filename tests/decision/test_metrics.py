import numpy as np
import pytest
import torch

from pneumo.decision.metrics import dice, dice_runs
from pneumo.kernels.runs import mask_to_runs


def test_by_hand():
    pred = torch.zeros(4, 2, 3, dtype=torch.bool)
    truth = torch.zeros(4, 2, 3, dtype=torch.bool)
    pred[1, 0, 0] = True  # false positive
    truth[2, 0, 0] = True  # miss
    pred[3, 0, :2] = truth[3, 0, 1:] = True
    assert dice(pred, truth).tolist() == [1, 0, 0, 0.5]
    assert dice(pred, truth).dtype == torch.float64
    assert dice(pred.numpy(), truth.numpy()).tolist() == [1, 0, 0, 0.5]
    assert float(dice(pred[3], truth[3])) == 0.5
    assert float(dice(pred[0].numpy(), truth[0].numpy())) == 1


def test_a_true_negative_and_a_total_miss_average_to_a_half():
    # an epsilon in numerator and denominator, and a mean over the batch, once made this 1.0
    pred = torch.zeros(2, 4, 4, dtype=torch.bool)
    truth = pred.clone()
    truth[1, :2] = True
    assert float(dice(pred, truth).mean()) == 0.5


def test_runs_give_the_very_same_number():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        shape = rng.integers(1, 9, 2)
        pred, truth = (rng.random(shape) < rng.random() * rng.integers(0, 2) for _ in range(2))
        assert dice_runs(mask_to_runs(pred), mask_to_runs(truth)) == dice(pred, truth)


def test_large_masks_do_not_overflow():
    full = torch.ones(1, 1024, 1024, dtype=torch.bool)
    assert dice(full, full).tolist() == [1]
    assert dice(full.numpy(), full.numpy()).tolist() == [1]


def test_refusals():
    a = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="masks, got"):
        dice(a, a[:1])
    with pytest.raises(ValueError, match="masks, got"):
        dice(a[0], a[0])
    with pytest.raises(TypeError, match="bool"):
        dice(a.float(), a)
