import maps
import numpy as np
import pytest

from pneumo.decision import metrics, tables, trust
from pneumo.decision.rule import Rule, decide, image_score
from pneumo.decision.trust import Signals

RULE = Rule(threshold=100 / 256, min_area=5)


def made_up(confidence: np.ndarray, decided: np.ndarray) -> Signals:
    """Signals of this confidence."""
    one = np.ones(len(confidence))
    return Signals(decided, decided * 10, np.where(decided, 0.9, 1 - confidence), one, np.where(decided, confidence, 1))


def test_signals_of_a_mask():
    cases = maps.draw(np.random.default_rng(0), 8, 24)
    found = trust.signals(maps.measured(cases, [50, 100]), RULE)
    for i, (q, _) in enumerate(cases):
        runs = decide(q, RULE)
        assert found.decided[i] == (len(runs) > 0)
        assert found.area[i] == metrics.area(runs)
    assert ((found.soft_dice >= 0) & (found.soft_dice <= 1)).all()
    assert ((found.confidence >= 0) & (found.confidence <= 1)).all()


def test_soft_dice_is_the_dice_of_probabilities():
    q = np.zeros((16, 16), dtype=np.uint8)
    q[2:6, 2:6] = 255
    q[10, 10] = 128
    table = tables.measure(q, np.empty((0, 2), np.int64), np.array([100]))
    mask = 16 * 255.5 / 256 + 128.5 / 256
    assert trust.signals(table, RULE).soft_dice == pytest.approx([2 * mask / (17 + mask)])
    for at, inside, area in ((128, mask, 17), (129, 16 * 255.5 / 256, 16), (256, 0, 0)):
        found = trust.soft_dice(np.stack([table.histogram, table.histogram * 3]), at)
        assert found == pytest.approx(np.full((2, 1), 2 * inside / (area + mask)))


def test_expected_dice_rises_and_is_right_on_average():
    rng = np.random.default_rng(1)
    confidence, decided = rng.random(3000), rng.random(3000) < 0.5
    chance = np.where(decided, confidence, 0.5 + confidence / 2)
    dice = (rng.random(3000) < chance).astype(float)
    found = made_up(confidence, decided)
    expected = trust.cross_fitted(found, dice, np.arange(3000) % 5)
    assert np.abs(expected - chance).mean() < 0.05
    for side in (decided, ~decided):
        learned = trust.fit(found, dice).expected_dice(found)[side]
        assert learned.mean() == pytest.approx(dice[side].mean(), abs=1e-3)
        assert (np.diff(learned[np.argsort(confidence[side])]) >= 0).all()


def test_the_queue_is_worth_something_only_if_confidence_tells():
    rng = np.random.default_rng(2)
    dice = rng.random(2000)
    decided = np.ones(2000, dtype=bool)
    told, untold = (
        trust.risk_coverage(trust.cross_fitted(made_up(signal, decided), dice, np.arange(2000) % 4), dice)
        for signal in (np.clip(dice + rng.normal(size=2000) * 0.1, 0, 1), rng.random(2000))
    )
    half = 999
    assert told["oracle"][half] >= told["dice"][half] > told["random"][half] + 0.2
    assert untold["dice"][half] == pytest.approx(untold["random"][half], abs=0.04)
    assert told["coverage"][-1] == 1 and told["dice"][-1] == pytest.approx(dice.mean())


def test_the_order_within_ties_does_not_matter():
    expected, dice = np.array([0.9, 0.5, 0.5, 0.5]), np.array([1.0, 0.9, 0.3, 0.6])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        curve = trust.risk_coverage(expected[order], dice[order])
        assert curve["dice"] == pytest.approx([1.0, 0.8, 2.2 / 3, 0.7])
        assert curve["oracle"] == pytest.approx([1.0, 0.95, 2.5 / 3, 0.7])


def test_a_decision_never_seen_gets_the_mean():
    found = made_up(np.array([0.2, 0.8]), np.array([True, True]))
    learned = trust.fit(found, np.array([0.3, 0.7]))
    unseen = made_up(np.array([0.5]), np.array([False]))
    assert learned.expected_dice(unseen) == pytest.approx([0.5])


def test_confidence_is_of_the_views_and_the_probabilities_at_the_rules_threshold():
    q = np.zeros((16, 16), dtype=np.uint8)
    q[2:6, 2:6] = 200
    nothing = np.empty((0, 2), np.int64)
    agreement = np.linspace(0, 1, 257)
    found = trust.signals(tables.measure(q, nothing, np.array([50, 100]), agreement), RULE)
    assert found.agreement == pytest.approx([100 / 256]) and found.soft_dice == pytest.approx(
        [2 * 200.5 / (256 + 200.5)]
    )
    assert found.confidence == pytest.approx(found.agreement * found.soft_dice)
    empty = trust.signals(
        tables.measure(q, nothing, np.array([100]), agreement), Rule(threshold=100 / 256, min_area=16)
    )
    assert empty.score == image_score(np.bincount(q.ravel(), minlength=256)) and empty.confidence == 1 - empty.score


def test_a_folds_own_cases_teach_nothing_about_it():
    """Fold 0 has the confidence of the others, but not their Dice."""
    folds = np.repeat([0, 1], 50)
    found = made_up(np.tile(np.linspace(0, 1, 50), 2), np.ones(100, dtype=bool))
    dice = np.where(folds == 0, 0.1, 0.9)
    assert trust.cross_fitted(found, dice, folds) == pytest.approx(np.where(folds == 0, 0.9, 0.1))


def test_many_cases_of_one_confidence_weigh_as_many():
    found = made_up(np.array([0.2] * 9 + [0.5]), np.ones(10, dtype=bool))
    learned = trust.fit(found, np.array([0.9] * 9 + [0.4]))  # falls, so that both become their mean
    assert learned.expected_dice(found) == pytest.approx(np.full(10, 0.85))
