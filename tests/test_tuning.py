import json
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import small_run
import torch

from pneumo import ensemble, inference, oof, tuning
from pneumo.decision import metrics, trust, tune
from pneumo.decision.rule import Rule
from pneumo.decision.trust import Trust
from pneumo.errors import DataError, UsageError
from pneumo.tuning import Ruling

CPU = torch.device("cpu")
SMALL = ("tune.thresholds=6", "tune.min_areas=5", "tune.top_thresholds=3", "tune.top_areas=4", "tune.draws=100")


@pytest.fixture(scope="module")
def place(repo, tmp_path_factory):
    """A recipe with random networks and their out-of-fold predictions, and its data."""
    folder = tmp_path_factory.mktemp("tuning")
    small_run.write_data(folder / "data")
    recipe = small_run.recipe(repo, folder / "data", folder / "runs", *SMALL)
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    return recipe, data


@pytest.mark.fault("S8", "a rule tuned on out-of-fold predictions used with other checkpoints than made these")
def test_the_queue_begins_with_the_lowest_expected_dice(tmp_path):
    records = [
        {"ImageId": name, "expected_dice": dice} for name, dice in (("a", 0.9), ("b", 0.2), ("d", 0.5), ("c", 0.5))
    ]
    inference._write_referrals(records, tmp_path / "referral.csv")
    lines = (tmp_path / "referral.csv").read_text().splitlines()[1:]
    assert [line.split(",")[:2] for line in lines] == [["1", "b"], ["2", "c"], ["3", "d"], ["4", "a"]]
    inference._write_referrals([{**records[0], "expected_dice": None}], tmp_path / "referral.csv")
    assert not (tmp_path / "referral.csv").exists()


def test_tune_prints_what_it_found_and_prediction_uses_it(place, capsys):
    recipe, data = place
    tuned = tuning.run(recipe, data)
    printed = capsys.readouterr().out
    for word in ("all masks empty: 0.6667", "cross-fitted", "optimism", "gain", "paired", "18 cases of 3 folds"):
        assert word in printed
    models = ensemble.load(recipe, [0, 2], CPU)
    ruling = tuning.ruling_for(recipe, models, "auto")
    assert (ruling.rule, ruling.source) == (tuned.rule, str(recipe.folder / "rule.toml"))
    assert tuning.ruling_for(recipe, models, "recipe") == Ruling(Rule.of(recipe.rule), "recipe", None)
    found = oof.load(recipe, data)
    signals = tuning.held_out_signals(found, tuned)
    expected = ruling.trust.expected_dice(signals)
    assert ((expected >= 0) & (expected <= 1)).all()
    area = np.empty(18)
    for fold, rule in enumerate(tuned.fold_rules):
        inside = np.flatnonzero(found.folds == fold)
        area[inside] = tuning.trust.signals(found.tables.take(inside), rule).area
    np.testing.assert_array_equal(signals.area, area)
    # other networks than those the rule was chosen for
    path = recipe.folder / "rule.toml"
    good = path.read_text()
    digest = next(iter(models.sources.values()))
    path.write_text(good.replace(digest, "0" * 64))
    with pytest.raises(UsageError, match=r"chosen for other checkpoints than .*make oof SET.* and make tune SET.*, or"):
        tuning.ruling_for(recipe, models, "auto")
    capsys.readouterr()
    assert tuning.ruling_for(recipe, models, str(path)).rule == tuned.rule  # named on purpose
    (said,) = capsys.readouterr().err.splitlines()
    assert "was chosen for other checkpoints than" in said and "Its rule is used as you ask, without expected" in said
    path.write_text(good)
    tuning.ruling_for(recipe, models, str(path))
    assert capsys.readouterr().err == ""
    # the same checkpoints, but predicted otherwise; best.pt can be one of the averaged epochs, byte for byte
    path.write_text(good)
    for other, said in (
        ({"mirror": False}, "mirror=true, not predict.mirror=false"),
        ({"weights": "average"}, "weights=best, not "),
    ):
        with pytest.raises(UsageError, match=f"was chosen on predictions with predict.{said}"):
            tuning.ruling_for(replace(recipe, predict=replace(recipe.predict, **other)), models, "auto")
    path.unlink()
    assert tuning.ruling_for(recipe, models, "auto").source == "recipe"


@pytest.mark.parametrize("objective", ["sensitivity", "specificity"])
def test_other_objectives(place, capsys, objective):
    recipe, data = place
    other = replace(recipe, tune=replace(recipe.tune, objective=objective, target=0.9))
    tuned = tuning.run(other, data)
    share = tuned.sums.without(-1)
    value = (share.sensitivity if objective == "sensitivity" else share.specificity)[tuned.choice.index]
    printed = capsys.readouterr()
    assert value >= 0.9 or "no rule reaches" in printed.err
    assert f"{objective} {measured(recipe)[f'{objective}_cross_fitted']:.4f} (in-sample {value:.4f})" in printed.out
    assert measured(recipe)["target"] == 0.9


def test_a_target_that_is_missed_out_of_fold_is_said_with_its_number(place):
    recipe, data = place
    other = replace(recipe, tune=replace(recipe.tune, objective="sensitivity", target=0.9))
    found = oof.load(other, data)
    tuned = tuning.search(other, found)
    decided = tuning.held_out_signals(found, tuned).decided[found.tables.positive]
    for target, missed in ((0.0, False), (decided.mean(), False), (min(decided.mean() + 1e-9, 1.1), True)):
        asked = replace(other, tune=replace(other.tune, target=target))
        said = [doubt for doubt in tuning.doubts(asked, found, tuned) if "is missed on folds" in doubt]
        assert [f"where it is {decided.mean():.4f}: " in doubt for doubt in said] == [True] * missed


def test_a_rule_on_the_edge_of_the_grid_is_said(place):
    """Of the axes that have one: no area is too small, and a top area without a top threshold says nothing."""
    recipe, data = place
    found = oof.load(recipe, data)
    tuned = tuning.search(recipe, found)
    (low, inner, *_, high), areas = tuned.grid.thresholds, tuned.grid.min_areas
    top, top_areas = tuned.grid.top_thresholds[-1], tuned.grid.top_areas

    def edges(rule, of=recipe):
        return [doubt for doubt in tuning.doubts(of, found, replace(tuned, rule=rule)) if "edge" in doubt]

    assert edges(Rule(threshold=inner, min_area=0, top_threshold=top, top_area=0)) == []
    assert edges(Rule(threshold=inner, min_area=areas[-2], top_threshold=0.0, top_area=top_areas[-1])) == []
    (said,) = edges(Rule(threshold=low, min_area=areas[-1]))
    assert f"(threshold={low}, the smallest tried; min_area={areas[-1]}, the largest tried)" in said
    assert "set rule.threshold and rule.min_area to it, and run again, with that in SET: make oof SET=" in said
    (said,) = edges(Rule(threshold=high, top_threshold=top, top_area=top_areas[-1]))
    assert f"(threshold={high}, the largest tried; top_area={top_areas[-1]}, the largest tried)" in said
    on_purpose = replace(recipe, rule=replace(recipe.rule, min_area=areas[-1]))
    assert edges(Rule(threshold=inner, min_area=areas[-1]), on_purpose) == []


def test_a_plateau_of_one_is_one_rule(place, capsys, monkeypatch):
    recipe, data = place
    tuned = tuning.search(recipe, oof.load(recipe, data))
    alone = np.zeros_like(tuned.choice.plateau)
    alone[tuned.choice.index] = True
    one = replace(tuned, choice=replace(tuned.choice, plateau=alone))
    monkeypatch.setattr(tuning, "search", lambda *_: one)
    tuning.run(recipe, data)
    assert "on a plateau of 1 rule\n" in capsys.readouterr().out


def of_folds(found, *folds):
    """Out-of-fold predictions of some folds only."""
    inside = np.flatnonzero(np.isin(found.folds, folds))
    return replace(
        found,
        image_ids=tuple(found.image_ids[i] for i in inside),
        rows=found.rows[inside],
        folds=found.folds[inside],
        groups=found.groups[inside],
        tables=found.tables.take(inside),
    )


def measured(recipe):
    """What rule.toml says of its rule."""
    return tomllib.loads((recipe.folder / "rule.toml").read_text())["measured"]


@pytest.mark.parametrize("objective", ["sensitivity", "specificity"])
def test_a_target_needs_a_case_that_it_is_about(place, objective):
    """Without one, all rules would reach it alike, and the middle of them all be chosen."""
    recipe, data = place
    found = oof.load(recipe, data)
    of_kind = found.tables.positive == (objective == "sensitivity")
    kept = np.flatnonzero(~of_kind | (found.folds == 1))
    rows = found.tables.take(kept)
    wanted = {"objective": objective, "target": 0.5, "tolerance": 1e-3}
    with pytest.raises(UsageError, match=rf"{objective}: without fold 1 there is no (positive|negative) case"):
        tune.tune(rows, found.folds[kept], oof.grid(recipe), Rule.of(recipe.rule), **wanted)


def test_what_tuning_did_not_see_or_gain_is_said(place, capsys, monkeypatch):
    recipe, data = place
    part = of_folds(oof.load(recipe, data), 0, 1)
    monkeypatch.setattr(oof, "load", lambda *_: part)
    tuned = tuning.run(recipe, data)
    said = capsys.readouterr().err
    assert "no out-of-fold predictions of fold 2" in said and "--folds 0,1 only" in said and "make cv" in said
    high = np.linspace(0.9, 1, len(part.rows))
    worse = replace(tuned, dice=high * 0.0, baseline=high)
    monkeypatch.setattr(tuning, "search", lambda *_: worse)
    tuning.run(recipe, data)
    said = capsys.readouterr().err
    assert "worse than the recipe's" in said and "no better than leaving all masks empty" in said
    monkeypatch.undo()
    tuning.run(recipe, data)  # for the tests that follow


@pytest.mark.parametrize("objective", ["dice", "sensitivity"])
@pytest.mark.parametrize(
    ("gain", "patients", "said"),
    [(-0.1, 18, "is worse than"), (-0.1, 4, "gains nothing over"), (0.0, 18, ""), (0.1, 18, "")],
)
def test_a_loss_against_the_recipes_rule_is_said(place, objective, gain, patients, said):
    """Also of too few patients for an interval; with another objective, if the recipe's rule reaches its target."""
    recipe, data = place
    recipe = replace(recipe, tune=replace(recipe.tune, objective=objective, target=0.0))
    found = oof.load(recipe, data)
    found = replace(found, groups=np.arange(len(found.rows)) % patients)
    tuned = tuning.search(recipe, found)
    tuned = replace(tuned, dice=tuned.baseline + gain)
    doubts = [doubt for doubt in tuning.doubts(recipe, found, tuned) if "--rule recipe" in doubt]
    assert [f"the chosen rule {said} the recipe's" in doubt for doubt in doubts] == [True] * bool(said)
    if objective == "sensitivity":
        out_of_reach = replace(recipe, tune=replace(recipe.tune, target=1.1))
        assert not any("--rule recipe" in doubt for doubt in tuning.doubts(out_of_reach, found, tuned))


def test_what_is_worth_no_more_than_empty_masks_is_said(place):
    recipe, data = place
    found = oof.load(recipe, data)
    tuned = tuning.search(recipe, found)
    empty = (~found.tables.positive).astype(float)
    marking = Rule(threshold=tuned.grid.thresholds[0], min_area=0)
    for rule, gain, words in (
        (Rule(threshold=tuned.grid.thresholds[-1], min_area=10**9), 0.1, ["leaves every mask empty"]),
        (marking, 0.0, ["no better than leaving"]),
        (marking, 0.1, []),
    ):
        better = replace(tuned, rule=rule, dice=empty + gain, baseline=empty)
        said = [doubt for doubt in tuning.doubts(recipe, found, better) if "empty" in doubt]
        assert [word in doubt for word, doubt in zip(words, said, strict=True)] == [True] * len(words)
    uneven = replace(tuned, rule=marking, dice=empty + np.where(np.arange(18) % 2, 0.5, -0.45), baseline=empty)
    (said,) = [doubt for doubt in tuning.doubts(recipe, found, uneven) if "empty" in doubt]
    assert "is not clearly better than leaving all masks empty: +0.0250 (-" in said


def test_predictions_made_otherwise_are_not_tuned_on(place):
    recipe, data = place
    turned = replace(recipe, predict=replace(recipe.predict, mirror=not recipe.predict.mirror))
    with pytest.raises(DataError, match=r"made with predict.mirror=(true|false), which is now .*Run again: make oof"):
        tuning.run(turned, data)
    finer = replace(recipe, tune=replace(recipe.tune, thresholds=100))
    with pytest.raises(DataError, match=r"made for other thresholds than tune.thresholds.*Run again: make oof"):
        tuning.run(finer, data)


def test_a_file_reads_as_it_was_written(tmp_path):
    rule = Rule(threshold=0.3046875, min_area=3000, top_threshold=0.75, top_area=2000)
    learned = Trust((((0.1, 0.5), (0.9, 0.95)), ((0.0,), (0.6,))))
    path = tmp_path / "rule.toml"
    sources = {"runs/a b/best.pt": "ff", '/\U0001f600/dät/\\ud83d"\x7f\n/best.pt': "00", "胸部": "01"}
    predicted = {"weights": "ema", "mirror": False}
    tuning.write(path, Ruling(rule, "", learned, predicted), {"dice": 0.85, "interval": [0.8, float("nan")]}, sources)
    assert tuning.read(path) == (Ruling(rule, str(path), learned, predicted), sources)


def test_a_rule_alone_will_do(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[rule]\nthreshold = 0.25\nmin_area = 7\n")
    assert tuning.read(path)[0] == Ruling(Rule(threshold=0.25, min_area=7), str(path), None)


def test_what_a_rule_file_leaves_out_is_the_recipes(place, tmp_path, capsys):
    recipe, _ = place
    (tmp_path / "mine.toml").write_text("[rule]\nthreshold = 0.25\n")
    ruling = tuning.ruling_for(recipe, ensemble.load(recipe, [0], CPU), str(tmp_path / "mine.toml"))
    assert ruling.rule == replace(Rule.of(recipe.rule), threshold=0.25) and ruling.rule.min_area > 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threshold = 0.5", r"no \[rule\]"),
        ("[rule]\nthreshold = 0.3", "multiple of 1/256"),
        ("[rule]\ntreshold = 0.5", r"unknown key rule\.treshold"),
        ("[rule]\nmin_area = 3.5", r"rule\.min_area: expected int, got 3\.5"),
        ("[rule]\nmin_area = true", "expected int"),
        ('[rule]\nthreshold = "0.5"', "expected float"),
        ("[rule]\n[trust.positive]\nconfidence = [1]\ndice = [1]", r"no \[negative\]"),
        ("[rule]\n[trust]\nnegative = {confidence = [1, 0], dice = [1, 1]}\npositive = {confidence = [1], dice = [1]}",
         "confidence must rise"),
        *(
            (f"[rule]\n[trust.negative]\nconfidence = [{at}]\ndice = [{dice}]\n"
             "[trust.positive]\nconfidence = [1]\ndice = [1]", "confidence must be of finite numbers, dice of numbers")
            for at, dice in (("nan", 1), ("inf", 1), (1, "nan"), (1, "inf"), (1, 1.5))
        ),
        ("predicted = 3\n[rule]", "not a rule file"),
        ("[rule]\n[predicted]\nmirror = 1979-05-27", "predicted: expected texts, whole numbers, true or false"),
        ("rule = 3", "not a rule file"),
        ("= nothing", "not a rule file"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(tmp_path, text, message):
    path = tmp_path / "rule.toml"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        tuning.read(path)
    assert str(path) in str(caught.value)
    with pytest.raises(DataError, match="gone"):
        tuning.read(tmp_path / "gone.toml")


def test_one_fold_alone_cannot_be_tuned(place, repo, tmp_path):
    recipe, data = place
    one = of_folds(oof.load(recipe, data), 1)
    with pytest.raises(UsageError, match="only fold 1 has out-of-fold predictions"):
        tuning.search(recipe, one)


def test_the_measured_values_are_kept_with_the_rule(place):
    recipe, data = place
    tuned = tuning.run(recipe, data)
    document = tomllib.loads((recipe.folder / "rule.toml").read_text())
    assert document["measured"]["dice_cross_fitted"] == tuned.dice.mean()
    assert document["measured"]["cases"] == 18
    assert len(document["checkpoints"]) == 3
    assert json.dumps(document["rule"]) == json.dumps(tuning.asdict(tuned.rule))


def test_expected_dice_is_told_of_such_predictions_only_as_taught_it(place):
    """A rule file named on purpose is used on any; agreement without a mirror is 1 and says nothing."""
    recipe, data = place
    tuned = tuning.run(recipe, data)
    path = recipe.folder / "rule.toml"
    models = ensemble.load(recipe, [0], CPU)
    assert tuning.ruling_for(recipe, models, str(path)).trust is not None
    turned = replace(recipe, predict=replace(recipe.predict, mirror=not recipe.predict.mirror))
    coarser = replace(recipe, data=replace(recipe.data, annotation_size=recipe.data.annotation_size // 2))
    with pytest.raises(UsageError, match=r"with data.annotation_size=64, not data.annotation_size=32. Set those, or"):
        tuning.ruling_for(coarser, models, "auto")
    assert tuning.ruling_for(coarser, models, str(path)).trust is None
    path.write_text(path.read_text().replace("annotation_size", "size"))
    with pytest.raises(UsageError, match="of an earlier version and does not say"):
        tuning.ruling_for(recipe, models, "auto")
    path.write_text(path.read_text().replace("[predicted]", "[before]"))
    for other in (recipe, turned):
        ruling = tuning.ruling_for(other, models, str(path))
        assert (ruling.rule, ruling.trust) == (tuned.rule, None)
    with pytest.raises(UsageError, match=r"of an earlier version and does not say .* again: make oof .*and make tune"):
        tuning.ruling_for(recipe, models, "auto")
    path.unlink()


def test_what_a_rule_file_says_is_worth_is_of_other_folds_and_by_patient(place, monkeypatch):
    """The folds' own rules find nothing here, the chosen one marks everything; six patients."""
    recipe, data = place
    found = oof.load(recipe, data)
    found = replace(found, groups=np.arange(18) // 3)
    tuned = tuning.search(recipe, found)
    nothing, marking = (
        Rule(threshold=tuned.grid.thresholds[-1], min_area=10**9),
        Rule(threshold=tuned.grid.thresholds[0]),
    )
    dice, baseline = np.repeat(np.linspace(0, 1, 6), 3), np.arange(18) // 6 / 4
    made = replace(tuned, rule=marking, fold_rules=(nothing,) * 3, dice=dice, baseline=baseline)
    monkeypatch.setattr(oof, "load", lambda *_: found)
    monkeypatch.setattr(tuning, "search", lambda *_: made)
    tuning.run(recipe, data)
    kept = measured(recipe)
    assert (kept["sensitivity_cross_fitted"], kept["specificity_cross_fitted"]) == (0, 1)
    assert kept["dice_recipe"] == baseline.mean()
    for name, values in (("dice", dice), ("gain", dice - baseline)):
        (wanted,) = metrics.bootstrap_means(values[None], found.groups, draws=recipe.tune.draws, seed=recipe.seed)
        assert kept[f"{name}_interval"] == [wanted.low, wanted.high]
    learned = trust.fit(tuning.held_out_signals(found, made), dice)
    assert tuning.read(recipe.folder / "rule.toml")[0].trust == learned
    (recipe.folder / "rule.toml").unlink()


def test_a_loss_that_may_be_chance_is_called_no_gain(place):
    recipe, data = place
    found = oof.load(recipe, data)
    tuned = tuning.search(recipe, found)
    tuned = replace(tuned, dice=tuned.baseline + np.where(np.arange(18) % 2, 0.5, -0.55))
    (said,) = [doubt for doubt in tuning.doubts(recipe, found, tuned) if "--rule recipe" in doubt]
    assert "the chosen rule gains nothing over the recipe's" in said


def test_of_few_patients_no_rule_is_clearly_better_than_empty_masks(place):
    recipe, data = place
    found = oof.load(recipe, data)
    found = replace(found, groups=np.arange(18) % 4)
    tuned = tuning.search(recipe, found)
    marking = Rule(threshold=tuned.grid.thresholds[0])
    better = replace(tuned, rule=marking, dice=(~found.tables.positive) + 0.1)
    (said,) = [doubt for doubt in tuning.doubts(recipe, found, better) if "empty" in doubt]
    assert "is not clearly better than leaving all masks empty: +0.1000" in said


@pytest.mark.parametrize(("at", "dice"), [("9" * 400, 1), (1, -0.5)])
def test_numbers_beyond_bounds_in_a_rule_file_are_refused(tmp_path, at, dice):
    negative = f"[trust.negative]\nconfidence = [{at}]\ndice = [{dice}]"
    (tmp_path / "rule.toml").write_text(f"[rule]\n{negative}\n[trust.positive]\nconfidence = [1]\ndice = [1]")
    with pytest.raises(DataError, match=r"rule\.toml: not a rule file: "):
        tuning.read(tmp_path / "rule.toml")


def test_a_rule_file_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "rule.toml").write_text("[rule]\nmin_area = 7\n", encoding="utf-8-sig")
    assert tuning.read(tmp_path / "rule.toml")[0].rule.min_area == 7
