import numpy as np
import pytest
import torch

from pneumo.decision import rule as rules
from pneumo.decision.rule import Rule, decide, quantise, resize_quantise
from pneumo.kernels.runs import runs_to_mask


def test_every_threshold_is_exact_to_the_last_bit():
    steps = torch.arange(257, dtype=torch.float64) / 256
    below = torch.nextafter(steps.float(), torch.tensor(-1.0)).clamp(0, 1)
    above = torch.nextafter(steps.float(), torch.tensor(2.0)).clamp(0, 1)
    probs = torch.cat([steps.float(), below, above])
    q = quantise(probs)
    for k in range(1, 256):
        assert torch.equal(probs > k / 256, q >= k)


def test_quantise_ends():
    assert quantise(torch.tensor([0.0, 1e-9, 1 / 256, 0.5, 1.0])).tolist() == [0, 0, 0, 127, 255]


def test_resizing_keeps_a_constant():
    probs = torch.full((2, 1, 8, 8), 0.7)
    assert resize_quantise(probs, 20).shape == (2, 20, 20)
    assert resize_quantise(probs, 20).unique().tolist() == [179]
    assert torch.equal(resize_quantise(probs, 8), quantise(probs[:, 0]))


def q_map() -> np.ndarray:
    q = np.zeros((20, 20), dtype=np.uint8)
    q[2:6, 2:6] = 140  # 16 pixels above 0.5
    q[10:18, 8:18] = 200  # 80 pixels above 0.75
    return q


@pytest.mark.parametrize(
    ("rule", "area"),
    [
        (Rule(threshold=0.5), 96),
        (Rule(threshold=0.75), 80),
        (Rule(threshold=0.5, min_area=15), 96),
        (Rule(threshold=0.5, min_area=16), 80),
        (Rule(threshold=0.5, min_area=80), 0),
        (Rule(threshold=0.5, top_threshold=0.75, top_area=79), 96),
        (Rule(threshold=0.5, top_threshold=0.75, top_area=80), 0),
        (Rule(threshold=0.5, top_threshold=0.75), 96),
    ],
)
def test_decide(rule, area):
    assert runs_to_mask(decide(q_map(), rule), 20, 20).sum() == area


def test_the_recipes_gate_never_empties_an_image():
    q = np.full((20, 20), 130, dtype=np.uint8)
    assert len(decide(q, Rule(threshold=0.5))) == 1


@pytest.mark.parametrize("threshold", [-0.5, 0.3, 1.5])
def test_thresholds_are_checked(threshold):
    with pytest.raises(ValueError, match="multiple of 1/256"):
        Rule(threshold=threshold)
    with pytest.raises(ValueError, match="multiple of 1/256"):
        Rule(top_threshold=threshold)
    with pytest.raises(ValueError, match="areas"):
        Rule(min_area=-1)


def test_score_is_the_highest_probability():
    assert rules.image_score(q_map()) == pytest.approx(200 / 255)
    assert rules.image_score(np.zeros((2, 2), np.uint8)) == 0
