import maps
import numpy as np
import pytest
import torch
from scipy import ndimage

from pneumo.decision import metrics, tables, trust
from pneumo.decision.rule import Rule, decide
from pneumo.errors import UsageError
from pneumo.kernels.runs import mask_to_runs

LEVELS = [1, 40, 128, 200, 255]


def test_one_case_by_hand():
    q = np.zeros((4, 5), dtype=np.uint8)
    q[0, 0], q[1, 1] = 100, 200  # touch over a corner
    q[3, 3:] = 255
    truth = np.zeros((4, 5), dtype=bool)
    truth[1, 1] = truth[3, 4] = truth[0, 4] = True
    table = tables.measure(q, mask_to_runs(truth), np.array([50, 150, 255]))
    assert table.counts.tolist() == [[2, 2, 1]]
    assert table.area.tolist() == [2, 2, 1, 2, 2]
    assert table.overlap.tolist() == [1, 1, 1, 1, 1]
    assert table.true_area.tolist() == [3]
    assert table.agreement.tolist() == [[1, 1, 1]]
    assert tables.dice(table, Rule(threshold=50 / 256)) == [2 * 2 / (4 + 3)]
    assert tables.dice(table, Rule(threshold=150 / 256, min_area=1)) == [2 * 1 / (2 + 3)]
    assert tables.dice(table, Rule(threshold=50 / 256, top_threshold=150 / 256, top_area=3)) == [0]


@pytest.mark.parametrize("chunk", [1, 500, 1 << 23])
def test_equal_to_the_masks_themselves(monkeypatch, chunk):
    """Every rule, whichever levels were labelled together."""
    monkeypatch.setattr(tables, "STACKED_PIXELS", chunk)
    rng = np.random.default_rng(1)
    cases = maps.draw(rng, 12, 30)
    data = maps.measured(cases, LEVELS)
    for _ in range(60):
        rule = Rule(
            threshold=int(rng.choice(LEVELS)) / 256,
            min_area=int(rng.choice([0, 1, 7, 40])),
            top_threshold=int(rng.integers(257)) / 256,
            top_area=int(rng.choice([0, 1, 30, 900])),
        )
        decided = [decide(q, rule) for q, _ in cases]
        dice = [metrics.dice_runs(runs, truth) for runs, (_, truth) in zip(decided, cases, strict=True)]
        assert tables.dice(data, rule).tolist() == dice
        area, _ = tables.filtered(data, rule)
        assert area.tolist() == [metrics.area(runs) for runs in decided]


def test_components_are_those_of_scipy():
    rng = np.random.default_rng(2)
    for q, truth in maps.draw(rng, 8, 25):
        table = tables.measure(q, truth, np.array(LEVELS))
        areas = np.split(table.area, np.cumsum(table.counts[0])[:-1])
        for level, found in zip(LEVELS, areas, strict=True):
            labels, count = ndimage.label(q >= level, structure=np.ones((3, 3)))
            assert sorted(found.tolist()) == sorted(np.bincount(labels.ravel())[1:].tolist())
            assert len(found) == count


def test_agreement_is_the_dice_of_two_views():
    rng = np.random.default_rng(3)
    first, second = (torch.from_numpy(rng.integers(0, 256, (2, 9, 9)).astype(np.uint8)) for _ in range(2))
    found = tables.agreement(first, second)
    assert found.shape == (2, 257)
    for image in range(2):
        for level in (0, 1, 99, 255, 256):
            alike = float(metrics.dice(first[image] >= level, second[image] >= level))
            assert found[image, level] == pytest.approx(alike, abs=1e-12)
    assert (found[:, 256] == 1).all()  # nothing is above: both empty


def test_take_and_join_are_inverse():
    cases = maps.draw(np.random.default_rng(4), 7, 20)
    data = maps.measured(cases, LEVELS)
    order = np.array([5, 0, 3, 6])
    some = data.take(order)
    again = maps.measured([cases[i] for i in order], LEVELS)
    for name in ("histogram", "true_histogram", "agreement", "counts", "area", "overlap"):
        np.testing.assert_array_equal(getattr(some, name), getattr(again, name))
    assert len(data.take(np.array([], dtype=int))) == 0


def test_a_map_without_anything():
    q = np.zeros((8, 8), dtype=np.uint8)
    table = tables.measure(q, np.empty((0, 2), dtype=np.int64), np.array(LEVELS))
    assert table.counts.sum() == 0
    assert tables.dice(table, Rule(threshold=40 / 256)) == [1]


def test_a_threshold_without_components_is_refused_with_the_nearest():
    data = maps.measured(maps.draw(np.random.default_rng(5), 2, 10), LEVELS)
    with pytest.raises(UsageError, match=r"no components at threshold 0\.5078125; nearest: 0\.5"):
        tables.dice(data, Rule(threshold=130 / 256))
    with pytest.raises(UsageError, match="make them again"):
        tables.join([data, maps.measured(maps.draw(np.random.default_rng(5), 2, 10), [5])])


def test_other_thresholds_are_refused_whatever_their_number():
    drawn = maps.draw(np.random.default_rng(5), 2, 10)
    data = maps.measured(drawn, LEVELS)
    with pytest.raises(UsageError, match="make them again"):
        tables.join([data, maps.measured(drawn, [2, 40, 128, 200, 255])])
    with pytest.raises(UsageError, match=r"at threshold 1\.0; nearest: 0\.99609375"):
        data.place(1.0)


def test_a_map_of_zeros_is_decided_without_a_warning():
    q = np.zeros((8, 8), dtype=np.uint8)
    found = trust.signals(tables.measure(q, np.empty((0, 2), dtype=np.int64), np.array([40])), Rule(threshold=40 / 256))
    assert found.soft_dice.tolist() == [0] and found.score.tolist() == [0] and found.confidence.tolist() == [1]
