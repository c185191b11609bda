import math

import numpy as np
import pytest
import torch

from pneumo.decision import metrics
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


def random_scores(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, and whether each case is positive."""
    rng = np.random.default_rng(seed)
    positive = rng.random(count) < 0.3
    return (rng.integers(0, 12, count) + 3 * positive) / 15, positive


@pytest.mark.parametrize("seed", range(5))
def test_roc_auc_counts_pairs(seed):
    score, positive = random_scores(seed)
    wins = [(a > b) + (a == b) / 2 for a in score[positive] for b in score[~positive]]
    assert metrics.roc_auc(score, positive, np.ones((1, 60)))[0] == pytest.approx(np.mean(wins), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_steps_over_recall(seed):
    score, positive = random_scores(seed)
    total = 0.0
    for at in np.unique(score):
        flagged = score >= at
        total += (positive & (score == at)).sum() * positive[flagged].mean()
    found = metrics.average_precision(score, positive, np.ones((1, 60)))[0]
    assert found == pytest.approx(total / positive.sum(), abs=1e-12)


def test_weights_are_repetitions():
    score, positive = random_scores(9)
    weights = np.random.default_rng(1).integers(0, 4, (3, 60))
    for statistic in (metrics.roc_auc, metrics.average_precision):
        found = statistic(score, positive, weights)
        for row, value in zip(weights, found, strict=True):
            repeated = np.repeat(np.arange(60), row)
            one = np.ones((1, len(repeated)))
            assert statistic(score[repeated], positive[repeated], one)[0] == pytest.approx(value, abs=1e-12)
    assert np.isnan(metrics.roc_auc(score, np.ones(60, bool), np.ones((1, 60)))[0])
    assert np.isnan(metrics.average_precision(score, np.zeros(60, bool), np.ones((1, 60)))[0])


def test_curves_end_where_all_are_flagged():
    score, positive = random_scores(3)
    curve = metrics.ranking_curves(score, positive)
    assert curve["score"][0] == score.max()
    assert (curve["false_positive_rate"][-1], curve["sensitivity"][-1]) == (1, 1)
    assert curve["precision"][-1] == pytest.approx(positive.mean())
    area = np.trapezoid([0, *curve["sensitivity"]], [0, *curve["false_positive_rate"]])
    assert area == pytest.approx(metrics.roc_auc(score, positive, np.ones((1, 60)))[0])


def test_reliability_by_hand():
    score = np.array([0.05, 0.15, 0.15, 0.95, 1.0])
    positive = np.array([False, True, False, True, True])
    rows, error = metrics.reliability(score, positive)
    assert [(row["low"], row["cases"], row["positive_share"]) for row in rows] == [
        (0, 1, 0),
        (0.1, 2, 0.5),
        (0.9, 2, 1),
    ]
    assert error == pytest.approx((0.05 + 2 * 0.35 + 2 * 0.025) / 5)


def test_interval_of_a_mean_is_that_of_theory():
    values = np.random.default_rng(0).normal(size=(1, 2000))
    alone = metrics.groups_of([None] * 2000)
    (found,) = metrics.bootstrap_means(values, alone, draws=2000, seed=1)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)
    assert metrics.bootstrap_means(values, alone, draws=200, seed=1) == metrics.bootstrap_means(
        values, alone, draws=200, seed=1
    )


def test_patients_are_resampled_as_a_whole():
    """Each value four times: knowing the patients, the interval is twice as wide."""
    values = np.repeat(np.random.default_rng(0).normal(size=500), 4)[None]
    patients = metrics.groups_of([f"p{i // 4}" for i in range(2000)])
    assert len(np.unique(patients)) == 500
    widths = [
        found.high - found.low
        for groups in (patients, metrics.groups_of([None] * 2000))
        for found in metrics.bootstrap_means(values, groups, draws=1000, seed=0)
    ]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.12)


def test_cases_that_do_not_count():
    values = np.array([[1.0, np.nan, 0.0, np.nan], [np.nan] * 4])
    groups = metrics.groups_of(["a", "a", None, None])
    assert len(np.unique(groups)) == 3
    for first, none in (metrics.bootstrap_means(values, groups, draws=100, seed=0), metrics.shares(values, groups)):
        assert first.value == 0.5
        assert np.isnan([none.value, none.low, none.high]).all() and str(none) == "-"


def test_few_groups_have_no_bootstrap_interval():
    values = np.random.default_rng(0).random((1, 40))
    for patients, has_ends in ((1, False), (4, False), (5, True), (40, True)):
        groups = metrics.groups_of([f"p{i % patients}" for i in range(40)])
        (found,) = metrics.bootstrap_means(values, groups, draws=100, seed=0)
        assert found.has_ends == has_ends and found.value == pytest.approx(values.mean())
        assert ("to" in str(found)) == has_ends
    for positives, has_ends in ((1, False), (4, False), (5, True), (35, True), (36, False)):
        found = metrics.bootstrap_ranking(
            metrics.roc_auc, values[0], np.arange(40) < positives, np.arange(40), draws=100, seed=0
        )
        assert found.has_ends == has_ends


@pytest.mark.parametrize(("count", "share"), [(8, 0.5), (20, 0.95), (50, 0.98), (100, 0.01), (100, 0.3)])
def test_shares_intervals_hold_what_they_promise(count, share):
    """Exactly, over all outcomes; a bootstrap's interval holds 0.57 to 0.67 at the first two shares near 1."""
    groups, held = metrics.groups_of([None] * count), 0.0
    for number in range(count + 1):
        (found,) = metrics.shares((np.arange(count) < number)[None].astype(float), groups)
        assert 0 <= found.low < found.high <= 1 and found.low <= found.value <= found.high
        held += (
            math.comb(count, number)
            * share**number
            * (1 - share) ** (count - number)
            * (found.low <= share <= found.high)
        )
    assert held > 0.9


def test_shares_of_cases_by_wilsons_formula():
    (found,) = metrics.shares(np.array([[1.0] * 9 + [0.0]]), np.arange(10))
    z2, n = metrics.Z**2, 9  # the variance between ten cases is that of a share among nine
    middle, half = (0.9 + z2 / 18) / (1 + z2 / 9), metrics.Z * (0.09 / n + z2 / (4 * n**2)) ** 0.5 / (1 + z2 / 9)
    assert (found.low, found.high) == pytest.approx((middle - half, min(middle + half, 1)))


def test_shares_count_patients():
    """Each value four times: knowing the patients, the interval is that of one of them."""
    once = (np.random.default_rng(0).random(300) < 0.8).astype(float)
    (alone,) = metrics.shares(once[None], np.arange(300))
    (found,) = metrics.shares(np.repeat(once, 4)[None], np.repeat(np.arange(300), 4))
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))
    (all_right,) = metrics.shares(np.ones((1, 40)), np.repeat(np.arange(10), 4))
    (of_ten,) = metrics.shares(np.ones((1, 10)), np.arange(10))
    assert all_right == of_ten and all_right.high == 1 and all_right.low == pytest.approx(0.7225, abs=1e-3)
    (one,) = metrics.shares(np.ones((1, 40)), np.zeros(40, dtype=int))
    assert one.low < 0.21


@pytest.mark.parametrize(
    ("patients", "images", "correlation"), [(2, 20, 0.2), (3, 20, 0.2), (5, 40, 0.3), (10, 10, 0.2), (30, 4, 0.2)]
)
def test_shares_of_few_patients_hold_what_they_promise(patients, images, correlation):
    """Patients' own shares are drawn from a beta distribution of this intraclass correlation, with mean 0.7."""
    rng = np.random.default_rng(0)
    scale = 1 / correlation - 1
    own = rng.beta(0.7 * scale, 0.3 * scale, (1000, patients))
    values = (rng.random((1000, patients, images)) < own[:, :, None]).reshape(1000, -1).astype(float)
    found = metrics.shares(values, np.repeat(np.arange(patients), images))
    assert np.mean([interval.low <= 0.7 <= interval.high for interval in found]) > 0.92


@pytest.mark.parametrize(
    ("sizes", "share", "correlation"),
    [([1] * 20 + [200], 0.9, 0.3), ([1] * 60 + [40], 0.9, 0.3), ([2] * 60 + [60, 60], 0.95, 0.5)],
)
def test_a_patient_with_most_images_does_not_make_a_share_certain(sizes, share, correlation):
    """With as many degrees of freedom as patients, the first two held 0.24 and 0.82."""
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(len(sizes)), sizes)
    scale = 1 / correlation - 1
    own = rng.beta(share * scale, (1 - share) * scale, (1000, len(sizes)))
    found = metrics.shares((rng.random((1000, len(groups))) < own[:, groups]).astype(float), groups)
    assert np.mean([interval.low <= share <= interval.high for interval in found]) > 0.87


@pytest.mark.parametrize(("patients", "images"), [(5, 40), (8, 25), (15, 10), (30, 4)])
def test_means_of_few_patients_hold_what_they_promise(patients, images):
    """Plain percentiles held 0.80, 0.85, 0.90 and 0.93."""
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(patients), images)
    own = rng.beta(0.6 * 7 / 3, 0.4 * 7 / 3, (400, patients))
    values = (rng.random((400, len(groups))) < own[:, groups]).astype(float)
    found = metrics.bootstrap_means(values, groups, draws=500, seed=0)
    assert np.mean([interval.low <= 0.6 <= interval.high for interval in found]) > 0.89


@pytest.mark.parametrize("positives", [5, 10])
def test_the_ranking_of_few_positives_holds_what_it_promises(positives):
    """Plain percentiles held 0.78 and 0.87."""
    rng, positive, groups = np.random.default_rng(0), np.arange(60) < positives, np.arange(60)
    true, held = metrics.ndtr(1.2 / 2**0.5), []
    for seed in range(150):
        score = rng.normal(1.2 * positive)
        found = metrics.bootstrap_ranking(metrics.roc_auc, score, positive, groups, draws=300, seed=seed)
        held.append(found.low <= true <= found.high)
    assert np.mean(held) > 0.88


def test_the_quantiles_of_a_bootstrap_by_hand():
    """Ten groups: t of 9 is 2.2622, times sqrt(10 / 9) 2.3845, beyond which lies 0.8550 % of a normal distribution."""
    samples = np.linspace(0, 1, 100_001)
    found = metrics._interval(0.5, samples, np.full(10, 3))
    assert (found.low, found.high) == pytest.approx((0.00855, 0.99145), abs=2e-5)
    uneven = metrics._interval(0.5, samples, np.array([1] * 10 + [10]))  # 400 / 110 effective groups
    assert uneven.low < found.low
    many = metrics._interval(0.5, samples, np.ones(100_000))
    assert (many.low, many.high) == pytest.approx((0.025, 0.975), abs=2e-5)
    few, alike = metrics._interval(0.5, samples, np.ones(4)), metrics._interval(0.5, np.full(9, 0.5), np.ones(10))
    assert not few.has_ends and not alike.has_ends and str(alike) == "0.5000"


def test_two_patients_alike_tell_little_more_than_two():
    patients = np.repeat([0, 1], 100)
    (alike,) = metrics.shares((np.arange(200) % 2 == 0)[None].astype(float), patients)
    nearly = np.r_[np.arange(100) < 49, np.arange(100) < 51]
    (almost,) = metrics.shares(nearly[None].astype(float), patients)
    assert alike.low < 0.1 and alike.high > 0.9
    assert almost.low < 0.2 and almost.high > 0.8


def test_summary_by_hand():
    dice_of = np.tile([1.0, 0.0, 0.5, 0.0], 5)
    positive = np.tile([False, False, True, True], 5)
    decided = np.tile([False, True, True, False], 5)
    score = np.tile([0.1, 0.8, 0.9, 0.2], 5)
    groups = metrics.groups_of([None] * 20)
    found = metrics.summarise(dice_of, positive, decided, score, groups, draws=100, seed=0)
    values = (found.dice, found.dice_positive, found.sensitivity, found.specificity, found.roc_auc)
    assert [value.value for value in values] == [0.375, 0.25, 0.5, 0.5, 0.75]
    assert (found.cases, found.positives, found.all_empty) == (20, 10, 0.5)
    assert all(value.low <= value.value <= value.high for value in values)
    without = metrics.summarise(dice_of, positive, decided, None, groups, draws=100, seed=0)
    assert (without.roc_auc, without.average_precision, without.calibration_error) == (None, None, None)
    empty = metrics.summarise(dice_of, np.zeros(20, bool), decided, score, groups, draws=100, seed=0)
    assert np.isnan(empty.dice_positive.value) and empty.roc_auc is None


def test_by_size_takes_positives_in_equal_parts():
    rng = np.random.default_rng(0)
    area = np.concatenate([np.zeros(30, int), rng.permutation(np.arange(1, 45))])
    dice_of = np.where(area > 0, area / 100, 1.0)
    decided = area > 22
    groups = metrics.groups_of([None] * len(area))
    rows = metrics.by_size(dice_of, area, decided, area / 100, groups, bins=4, draws=100, seed=0)
    assert [(row["cases"], row["smallest"], row["largest"]) for row in rows] == [
        (11, 1, 11), (11, 12, 22), (11, 23, 33), (11, 34, 44),
    ]  # fmt: skip
    assert [row["dice"].value for row in rows] == pytest.approx([0.06, 0.17, 0.28, 0.39])
    assert [row["sensitivity"].value for row in rows] == [0, 0, 1, 1]
    assert rows[0]["roc_auc"] == 1 and rows[0]["calibration_gap"] == pytest.approx(0.94)
    few = metrics.by_size(dice_of[:33], area[:33], decided[:33], None, groups[:33], draws=100, seed=0)
    assert [row["cases"] for row in few] == [3] and few[0]["roc_auc"] is None
    tied = np.where(area > 20, 20, area)
    rows = metrics.by_size(dice_of, tied, decided, area / 100, groups, bins=4, draws=100, seed=0)
    assert [(row["cases"], row["smallest"], row["largest"]) for row in rows] == [(11, 1, 11), (33, 12, 20)]
    most = np.where(area > 3, 20, area)
    rows = metrics.by_size(dice_of, most, decided, area / 100, groups, bins=4, draws=100, seed=0)
    assert [(row["cases"], row["smallest"], row["largest"]) for row in rows] == [(44, 1, 20)]
    assert metrics.by_size(dice_of[:30], area[:30], decided[:30], None, groups[:30], draws=100, seed=0) == []


def test_every_interval_of_a_summary_resamples_patients():
    """Each case four times: knowing the patients, all intervals are twice as wide."""
    rng = np.random.default_rng(0)
    positive = rng.random(150) < 0.5
    decided = positive ^ (rng.random(150) < 0.3)
    score = np.clip(0.3 * positive + rng.random(150) * 0.7, 0, 1)
    once = (rng.random(150), positive, decided, score)
    four = [np.repeat(part, 4) for part in once]
    patients, alone = np.repeat(np.arange(150), 4), np.arange(600)
    known, unknown = (metrics.summarise(*four, groups, draws=400, seed=0) for groups in (patients, alone))
    for name in ("dice", "dice_positive", "sensitivity", "specificity", "roc_auc", "average_precision"):
        wide, narrow = (getattr(found, name) for found in (known, unknown))
        assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2, rel=0.2), name
    area = four[1] * np.repeat(rng.permutation(150) + 1, 4)
    rows = [
        metrics.by_size(four[0], area, four[2], four[3], groups, bins=1, draws=400, seed=0)[0]
        for groups in (patients, alone)
    ]
    for name in ("dice", "sensitivity"):
        wide, narrow = (row[name] for row in rows)
        assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2, rel=0.2), name


def test_a_summary_has_both_rankings():
    score, positive = random_scores(4)
    groups, one = metrics.groups_of([None] * 60), np.ones((1, 60))
    found = metrics.summarise(np.zeros(60), positive, positive, score, groups, draws=20, seed=0)
    auc, precision = (statistic(score, positive, one)[0] for statistic in (metrics.roc_auc, metrics.average_precision))
    assert (found.roc_auc.value, found.average_precision.value) == (auc, precision) and auc != precision
    every = metrics.summarise(np.zeros(60), positive | True, positive, score, groups, draws=20, seed=0)
    assert every.roc_auc is every.average_precision is None
    (row,) = metrics.by_size(np.zeros(60), np.ones(60, int), positive, score, groups, draws=20, seed=0)
    assert row["roc_auc"] is row["average_precision"] is None


def test_samples_without_a_positive_case_spoil_no_interval():
    score, positive = np.random.default_rng(0).random(100), np.arange(100) < 5
    found = metrics.bootstrap_ranking(metrics.roc_auc, score, positive, np.arange(100), draws=2000, seed=0)
    assert found.has_ends and found.low < found.value < found.high


def test_a_patient_named_like_a_number_is_no_lone_case():
    assert len(np.unique(metrics.groups_of(["1", None]))) == 2


def test_as_many_samples_are_drawn_as_asked_for():
    drawn = np.concatenate(list(metrics._draws(7, 120, 0)))
    assert drawn.shape == (120, 7) and (drawn.sum(axis=1) == 7).all()


def test_a_part_by_size_has_ten_images_if_there_are_as_many():
    area, groups = np.arange(1, 21), np.arange(20)
    rows = metrics.by_size(np.ones(20), area, area > 0, None, groups, bins=10, draws=10, seed=0)
    assert [row["cases"] for row in rows] == [metrics.SMALLEST_PART] * 2


def test_an_annotation_that_is_no_mask_is_refused():
    mask = np.zeros((4, 4), dtype=bool)
    with pytest.raises(TypeError, match="bool"):
        dice(mask, mask.astype(np.uint8))
