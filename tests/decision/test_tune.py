import time
from itertools import product

import maps
import numpy as np
import pytest

from pneumo.decision import metrics, tables, tune
from pneumo.decision.rule import Rule, decide
from pneumo.decision.tables import Tables
from pneumo.decision.tune import Grid
from pneumo.errors import UsageError

WANTED = {"objective": "dice", "target": 0.9, "tolerance": 5e-4}


def check_against_masks(seed: int) -> None:
    """Every rule of a random grid on a random data set, by tables and by masks."""
    rng = np.random.default_rng(seed)
    levels = np.sort(rng.choice(np.arange(1, 256), 4, replace=False)).tolist()
    grid = Grid(
        thresholds=tuple(level / 256 for level in levels[1:]),
        min_areas=(0, *sorted(rng.choice(np.arange(1, 60), 3, replace=False).tolist())),
        top_thresholds=(0.0, int(rng.integers(1, 256)) / 256, 1.0),
        top_areas=(0, int(rng.integers(1, 50)), int(rng.integers(50, 300))),
    )
    cases = maps.draw(rng, 6, 20)
    data = maps.measured(cases, levels)
    folds = np.array([0, 1, 2, 0, 1, 2])
    sums = tune.score_all(data, folds, grid)
    positive = np.array([len(truth) > 0 for _, truth in cases])
    assert (sums.positives.sum(), sums.negatives.sum()) == (positive.sum(), (~positive).sum())
    for index in product(*map(range, grid.shape)):
        rule = grid.rule(index)
        masks = [decide(q, rule) for q, _ in cases]
        dice = np.array([metrics.dice_runs(runs, truth) for runs, (_, truth) in zip(masks, cases, strict=True)])
        found = np.array([len(runs) > 0 for runs in masks])
        assert tables.dice(data, rule).tolist() == dice.tolist()
        whole = sums.without(-1)
        assert abs(whole.dice[index] - dice.mean()) <= 1e-12
        assert whole.found[(0, *index)] == (found & positive).sum()
        assert whole.kept_empty[(0, *index)] == (~found & ~positive).sum()
        for fold in range(3):
            assert abs(sums.without(fold).dice[index] - dice[folds != fold].mean()) <= 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_every_rule_scores_as_its_masks_do(seed):
    check_against_masks(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 100))
def test_every_rule_scores_as_its_masks_do_on_more(seed):
    check_against_masks(seed)


def one_component_each(area: np.ndarray, overlap: np.ndarray, true_area: np.ndarray, levels: list[int]) -> Tables:
    """Cases with one component at each level.

    Args:
        area, overlap: (N, T). true_area: (N,).
    """
    count, width = area.shape
    histogram = np.zeros((count, 256), dtype=np.int32)
    histogram[:, 255] = 1000
    true = np.zeros((count, 256), dtype=np.int32)
    true[:, 255] = true_area
    return Tables(
        levels=np.array(levels),
        histogram=histogram,
        true_histogram=true,
        agreement=np.ones((count, width), dtype=np.float32),
        counts=np.ones((count, width), dtype=np.int32),
        area=area.ravel().astype(np.int32),
        overlap=overlap.ravel().astype(np.int32),
    )


def test_a_known_best_rule_is_found():
    """Positives are outlined best at the middle thresholds; false components have up to 60 px, true ones over 100."""
    rng = np.random.default_rng(0)
    levels = list(range(20, 240, 10))
    best = 120
    count = 400
    positive = rng.random(count) < 0.3
    true_area = np.where(positive, rng.integers(120, 400, count), 0)
    quality = np.clip(1 - np.abs(np.array(levels) - best) / 150, 0.05, 1)
    overlap = np.where(positive[:, None], true_area[:, None] * quality, 0).round()
    area = np.where(positive[:, None], true_area[:, None], rng.integers(1, 61, (count, len(levels))))
    data = one_component_each(area, overlap, true_area, levels)
    grid = Grid(tuple(k / 256 for k in levels), (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 150, 250), (0.0,), (0,))
    found = tune.tune(data, np.arange(count) % 5, grid, Rule(threshold=200 / 256), **WANTED)
    assert abs(found.rule.threshold * 256 - best) <= 10
    assert 60 <= found.rule.min_area <= 100
    assert found.rule.min_area == 80  # the middle of the flat stretch
    assert found.gain(np.arange(count), draws=200, seed=0).low > 0
    assert all(abs(rule.threshold * 256 - best) <= 10 for rule in found.fold_rules)


def test_the_flat_middle_is_preferred_to_a_spike():
    score = np.full((21, 1, 1, 1), 0.5)
    score[12:19] = 0.8  # a plateau
    score[4] = 0.85  # a spike
    sums = tune.Sums(score[None] * 100, score[None] * 100, score[None] * 0, np.array([100.0]), np.array([0.0]))
    choice = tune.choose(sums, (0, 0, 0, 0), **WANTED)
    assert choice.index == (15, 0, 0, 0)
    assert choice.plateau[15, 0, 0, 0] and not choice.plateau[4, 0, 0, 0]


STEEP = [0.4, 0.5, 0.56, 0.58, 0.6, 0.637, 0.9585, 0.919, 0.8595, 0.860, 0.861, 0.861, 0.861, 0.859, 0.856, 0.853]


@pytest.mark.parametrize("objective", ["dice", "sensitivity"])
def test_no_rule_is_taken_that_scores_below_the_recipes(objective):
    """Beside a steep edge the mean over neighbours is highest on the lower side, as a trained run had it."""
    dice = np.array(STEEP).reshape(1, 16, 1, 1, 1) * 100
    sums = tune.Sums(dice, dice, dice * 0, np.array([100.0]), np.array([0.0]))
    wanted = {**WANTED, "objective": objective, "target": 0.8}
    assert STEEP[tune.choose(sums, (0, 0, 0, 0), **wanted).index[0]] == 0.8595
    assert STEEP[tune.choose(sums, (7, 0, 0, 0), **wanted).index[0]] == 0.919


def test_a_recipes_rule_that_misses_the_target_bounds_nothing():
    dice = np.array(STEEP).reshape(1, 16, 1, 1, 1) * 100
    found = np.arange(16.0).reshape(dice.shape) * 100 / 16
    sums = tune.Sums(dice, found, dice * 0, np.array([100.0]), np.array([0.0]))
    wanted = {**WANTED, "objective": "sensitivity", "target": 10 / 16}
    assert STEEP[tune.choose(sums, (6, 0, 0, 0), **wanted).index[0]] == 0.861


def test_a_rule_has_its_place_in_the_grid():
    grid = Grid((0.25, 0.5), (0, 10, 20), (0.0, 0.75), (0, 5))
    for index in product(*map(range, grid.shape)):
        assert grid.place(grid.rule(index)) == index
    with pytest.raises(ValueError, match="not in tuple"):
        grid.place(Rule(threshold=0.5, min_area=11))


@pytest.mark.parametrize(("objective", "first"), [("sensitivity", False), ("specificity", True)])
def test_a_target_is_kept(objective, first):
    """Sensitivity falls and specificity rises with the threshold; mean Dice is best in the middle."""
    place = np.arange(41)
    dice = np.exp(-(((place - 20) / 15) ** 2))
    found, kept = 1 - place / 50, 0.2 + place / 50
    shaped = [part.reshape(1, 41, 1, 1, 1) * 100 for part in (dice, found, kept)]
    sums = tune.Sums(*shaped, np.array([100.0]), np.array([100.0]))
    choice = tune.choose(sums, (0, 0, 0, 0), objective=objective, target=0.8, tolerance=1e-9)
    share = (found, kept)[first][choice.index[0]]
    assert choice.reached and share >= 0.8
    unreached = tune.choose(sums, (0, 0, 0, 0), objective=objective, target=1.5, tolerance=1e-9)
    assert not unreached.reached
    assert unreached.index[0] == (40 if first else 0)


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(100), marks=pytest.mark.slow)])
def test_no_gain_is_seen_where_there_is_none(seeds):
    """Where scores are exchangeable over rules: in 90 % of draws the gain is 0, or its interval holds it."""
    covered = 0
    levels = list(range(40, 240, 20))
    for seed in seeds:
        rng = np.random.default_rng(seed)
        count = 300
        true_area = np.full(count, 100)
        overlap = rng.integers(0, 101, (count, len(levels)))
        data = one_component_each(np.full(overlap.shape, 100), overlap, true_area, levels)
        grid = Grid(tuple(k / 256 for k in levels), (0,), (0.0,), (0,))
        found = tune.tune(data, np.arange(count) % 5, grid, Rule(threshold=120 / 256), **WANTED)
        gain = found.gain(np.arange(count), draws=300, seed=seed)
        covered += gain.value == 0 or gain.low <= 0 <= gain.high
        assert found.optimism > -0.05
    assert covered >= 0.9 * len(seeds)


def test_one_fold_is_refused():
    data = maps.measured(maps.draw(np.random.default_rng(0), 3, 10), [100])
    with pytest.raises(UsageError, match="only fold 2 has"):
        tune.tune(data, np.array([2, 2, 2]), Grid((100 / 256,), (0,), (0.0,), (0,)), Rule(), **WANTED)


def test_the_grid_holds_the_recipes_rule_and_is_large_enough():
    rule = Rule(threshold=0.3046875, min_area=3333, top_threshold=0.75, top_area=2000)
    grid = tune.make_grid(rule, 1024, thresholds=50, min_areas=60, top_thresholds=10, top_areas=20)
    for values, own in zip(
        (grid.thresholds, grid.min_areas, grid.top_thresholds, grid.top_areas),
        (rule.threshold, rule.min_area, rule.top_threshold, rule.top_area),
        strict=True,
    ):
        assert own in values
        assert list(values) == sorted(set(values))
    assert all(have >= want for have, want in zip(grid.shape, (50, 60, 10, 20), strict=True))
    small = tune.make_grid(Rule(), 64, thresholds=50, min_areas=60, top_thresholds=10, top_areas=20)
    assert small.min_areas[:4] == (0, 1, 2, 3)


@pytest.mark.slow
def test_all_rules_on_the_whole_challenge_take_seconds():
    """12,047 cases with three components a threshold: at most 10 s."""
    base = Rule(threshold=0.5, min_area=3500)
    grid = tune.make_grid(base, 1024, thresholds=50, min_areas=60, top_thresholds=10, top_areas=20)
    data = maps.many(12047, [round(threshold * 256) for threshold in grid.thresholds])
    started = time.perf_counter()
    found = tune.tune(data, np.arange(12047) % 5, grid, base, **WANTED)
    assert time.perf_counter() - started < 10
    assert found.sums.without(-1).dice[found.choice.index] == pytest.approx(found.in_sample, abs=1e-12)


def test_a_fold_has_no_say_in_the_rule_that_scores_it():
    """Low thresholds are right for the first half of the cases, high ones for the second."""
    levels, folds = list(range(20, 240, 20)), np.repeat([3, 7], 20)
    low = np.arange(len(levels)) < 5
    overlap = np.where((folds == 3)[:, None] == low, 100, 0)
    data = one_component_each(np.full(overlap.shape, 100), overlap, np.full(40, 100), levels)
    grid = Grid(tuple(k / 256 for k in levels), (0,), (0.0,), (0,))
    found = tune.tune(data, folds, grid, Rule(threshold=100 / 256), **WANTED)
    first, second = (rule.threshold * 256 for rule in found.fold_rules)
    assert first > 100 >= second and not found.dice.any()
    assert found.in_sample == 0.5 and found.optimism == 0.5
    unreached = tune.tune(
        data, folds, grid, Rule(threshold=100 / 256), objective="sensitivity", target=1.0, tolerance=5e-4
    )
    assert unreached.choice.reached and unreached.short == ()  # a target that is just reached is reached


def test_more_cases_than_are_scored_at_once(monkeypatch):
    monkeypatch.setattr(tune, "CASES_AT_ONCE", 4)
    data = maps.measured(maps.draw(np.random.default_rng(3), 11, 20), [40, 128])
    grid = Grid((40 / 256, 0.5), (0, 7), (0.0, 0.75), (0, 30))
    sums = tune.score_all(data, np.arange(11) % 3, grid).without(-1)
    for index in np.ndindex(grid.shape):
        assert sums.dice[index] == pytest.approx(tables.dice(data, grid.rule(index)).mean(), abs=1e-12)


def test_the_grid_spans_what_it_says():
    rule = Rule(threshold=0.5, min_area=3500, top_threshold=0.75, top_area=2000)
    grid = tune.make_grid(rule, 1024, thresholds=50, min_areas=60, top_thresholds=10, top_areas=20)
    assert [k * 256 for k in (grid.thresholds[0], grid.thresholds[-1])] == [8, 248]
    assert (grid.min_areas[:2], grid.min_areas[-1]) == ((0, 16), 1024**2 // 16)
    assert ([k * 256 for k in grid.top_thresholds[:2]], grid.top_thresholds[-1] * 256) == ([0, 64], 248)
    assert (grid.top_areas[:2], grid.top_areas[-1]) == ((0, 16), 1024**2 // 64)


def test_the_edge_of_the_grid_is_no_worse_than_its_middle():
    """A score that is the same all over is so after smoothing: no rule is pushed away from the edge."""
    score = np.full((21, 1, 1, 1), 0.8)
    score[8:] = 0.5
    sums = tune.Sums(score[None] * 100, score[None] * 100, score[None] * 0, np.array([100.0]), np.array([0.0]))
    choice = tune.choose(sums, (0, 0, 0, 0), **WANTED)
    assert choice.plateau[:, 0, 0, 0].tolist() == [True] * 6 + [False] * 15


def test_folds_that_miss_the_target_are_told_by_their_number():
    """Only the cases of fold 7 can be found, so that without it nothing is."""
    levels, folds = [100, 200], np.repeat([3, 5, 7], 10)
    area = np.where((folds == 7)[:, None], 100, 0) * np.ones((1, 2), int)
    data = one_component_each(area, area, np.full(30, 100), levels)
    grid = Grid((100 / 256, 200 / 256), (0,), (0.0,), (0,))
    wanted = {"objective": "sensitivity", "target": 0.3, "tolerance": 5e-4}
    found = tune.tune(data, folds, grid, Rule(threshold=100 / 256), **wanted)
    assert found.choice.reached and found.short == (7,)
