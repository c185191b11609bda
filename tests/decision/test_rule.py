import numpy as np
import pytest
import torch

from pneumo.decision import rule as rules
from pneumo.decision.rule import Rule, decide, decide_batch, quantise, resize_quantise
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


def test_nothing_is_found_outside_of_a_box():
    probs = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    boxes = np.array([[2, 18, 0, 20], [0, 20, 0, 20], [3, 3, 5, 9]])
    plain, found = resize_quantise(probs, 20), resize_quantise(probs, 20, boxes)
    assert plain.min() > 0 and found.dtype == torch.uint8
    assert torch.equal(found[1], plain[1]) and not found[2].any()
    assert torch.equal(found[0, 2:18], plain[0, 2:18]) and not found[0, :2].any() and not found[0, 18:].any()


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


def test_a_threshold_of_0_is_refused():
    """Levels cannot tell a probability of 0, as padding's, from one just above."""
    with pytest.raises(ValueError, match="threshold must be at least 1/256"):
        Rule(threshold=0.0)


@pytest.mark.parametrize("threshold", [-0.5, 0.3, 1.5])
def test_thresholds_are_checked(threshold):
    with pytest.raises(ValueError, match="multiple of 1/256"):
        Rule(threshold=threshold)
    with pytest.raises(ValueError, match="multiple of 1/256"):
        Rule(top_threshold=threshold)
    with pytest.raises(ValueError, match="areas"):
        Rule(min_area=-1)


def test_score_is_the_mean_of_the_most_suspicious_pixels():
    histogram = np.zeros((2, 256), dtype=np.int64)
    histogram[:, 0] = 1024 - 5
    histogram[0, [10, 100, 255]] = 1, 2, 2  # a 1/256 of 1024 pixels is 4
    histogram[1, 0] = 1024
    wanted = (2 * 255.5 + 2 * 100.5) / 256 / 4
    assert rules.image_score(histogram).tolist() == [pytest.approx(wanted), 0]
    assert rules.image_score(histogram[0]) == pytest.approx(wanted)
    few = np.zeros(256, dtype=np.int64)
    few[[0, 200]] = 3, 1
    assert rules.image_score(few) == pytest.approx(200.5 / 256)  # one pixel at least


def test_a_top_rule_of_no_pixels_still_asks_for_one():
    q = q_map()
    assert len(rules.decide(q, Rule(threshold=0.5, top_threshold=200 / 256, top_area=0)))
    assert not len(rules.decide(q, Rule(threshold=0.5, top_threshold=201 / 256, top_area=0)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_batch_is_decided_as_its_images_are(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    rng = np.random.default_rng(0)
    decided = 0
    for trial in range(400):
        count, side = rng.integers(1, 5), rng.integers(1, 14)
        q = (rng.integers(0, 256, (count, side, side)) * (rng.random((count, side, side)) < rng.random())).astype(
            np.uint8
        )
        q[0] = (0, 255, q[0])[min(trial % 10, 2)]
        rule = Rule(
            threshold=rng.integers(1, 257) / 256,
            min_area=int(rng.choice([0, 1, 5, 30])),
            top_threshold=rng.integers(0, 2) * rng.integers(0, 257) / 256,
            top_area=int(rng.choice([0, 3, 40])),
        )
        for runs, one in zip(decide_batch(torch.from_numpy(q).to(device), rule), q, strict=True):
            np.testing.assert_array_equal(runs, decide(one, rule))
            decided += len(runs) > 0
    assert decided > 100


def test_resizing_keeps_the_edges_of_pixels_in_place():
    """Not the centres of the corners: images, masks and boxes are brought to another size as areas."""
    probs = torch.zeros(1, 1, 2, 2)
    probs[..., 1] = 1
    assert resize_quantise(probs, 4)[0, 0].tolist() == quantise(torch.tensor([0.0, 0.25, 0.75, 1.0])).tolist()


def test_no_area_is_below_0():
    with pytest.raises(ValueError, match="areas must be at least 0, got 0 and -1"):
        Rule(top_area=-1)
