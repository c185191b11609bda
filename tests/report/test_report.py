"""The report of a run, as files and as a page in a browser."""

import csv
import html
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import browser
import maps
import numpy as np
import pandas as pd
import pytest
import small_run
import torch
from PIL import Image

from pneumo import checkpoint, config, dataset, log, oof, report, tuning
from pneumo.decision import metrics, tables, trust, tune
from pneumo.decision.rule import Rule
from pneumo.errors import DataError, UsageError
from pneumo.report import galleries, page, results, words

SETTINGS = ("tune.thresholds=12", "tune.min_areas=9", "tune.top_thresholds=4", "tune.top_areas=5", "tune.draws=100")
READY = "document.querySelector('#explorer').dataset.ready === 'yes'"


def write_logs(recipe) -> None:
    """Two made-up epochs for each fold and stage."""
    keys = ("loss", "val_loss", "dice", "dice_positive", "true_negative_rate", "all_empty", "lr")
    for fold in range(recipe.folds.count):
        for stage in range(1, recipe.stages + 1):
            lines = [{"epoch": epoch, **dict.fromkeys(keys, 0.5 + epoch / 10)} for epoch in (1, 2)]
            log.write_jsonl(recipe.stage_folder(fold, stage) / "log.jsonl", lines)


@pytest.fixture(scope="module")
def place(repo, tmp_path_factory):
    """A recipe with random networks and all their predictions, its data and its report."""
    folder = tmp_path_factory.mktemp("report")
    small_run.write_data(folder / "data")
    recipe = small_run.recipe(repo, folder / "data", folder / "runs", *SETTINGS)
    data = small_run.pretend_trained(recipe, "best.pt", "ema.pt")
    write_logs(recipe)
    for weights in ("best", "ema"):
        oof.write(replace(recipe, predict=replace(recipe.predict, weights=weights)), data, torch.device("cpu"))
    beside = small_run.recipe(repo, folder / "data", folder / "runs", *SETTINGS, name="seed-image")
    oof.write(beside, small_run.pretend_trained(beside), torch.device("cpu"))
    report.write(recipe, [beside])
    return recipe, data, recipe.folder / "report"


def test_every_figure_has_its_numbers(place):
    _, _, folder = place
    names = {path.stem for path in folder.glob("*.png")}
    wanted = "augmentations curves min_area surface sizes ranking reliability risk_coverage"
    assert set(wanted.split()) <= names
    assert any(name.startswith("gallery_") for name in names)
    for name in names:
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 200
        assert len((folder / f"{name}.csv").read_text().splitlines()) > 1


def test_results_are_those_of_tuning(repo, place):
    recipe, data, folder = place
    numbers = json.loads((folder / "report.json").read_text())
    rows = {row["name"]: row for row in numbers["rows"]}
    tuned = tuning.search(recipe, oof.load(recipe, data))
    assert rows["recipe's rule"]["dice"]["value"] == pytest.approx(tuned.baseline.mean())
    assert rows["tuned rule, cross-fitted"]["dice"]["value"] == pytest.approx(tuned.dice.mean())
    assert rows["tuned rule, cross-fitted"]["gain"]["value"] == pytest.approx((tuned.dice - tuned.baseline).mean())
    assert rows["weights ema, recipe's rule"]["gain"] is not None
    assert {"seed-image, its recipe's rule", "seed-image, tuned rule, cross-fitted"} <= rows.keys()
    assert rows["recipe's rule"]["gain"] is None
    beside = small_run.recipe(repo, recipe.data.root, recipe.runs, *SETTINGS, name="seed-image")
    found = oof.load(beside, dataset.load(beside))
    theirs = dict(zip(found.image_ids, tuning.search(beside, found).dice, strict=True))
    ours = dict(zip(oof.load(recipe, data).image_ids, tuned.dice, strict=True))
    difference = np.mean([theirs[image_id] - ours[image_id] for image_id in ours])
    over = {name: row["gain_over_tuned"] for name, row in rows.items()}
    assert over.pop("seed-image, tuned rule, cross-fitted")["value"] == pytest.approx(difference)
    assert set(over.values()) == {None}
    text = (folder / "report.html").read_text()
    assert (
        '<th scope="col">tuned over tuned</th>' in text
        and page.BESIDE_NOTE in text
        and "to this recipe&#x27;s own rule as it stands" in text
    )
    assert numbers["rule"] == tuning.asdict(tuned.rule)


@pytest.fixture
def titles(monkeypatch):
    """The titles and captions of a report's figures, by name, as they are drawn; and the figures' arguments."""
    kept = {}

    def note(name):
        original = getattr(report.figures, name)

        def drawing(*arguments):
            kept[name] = arguments
            return original(*arguments)

        monkeypatch.setattr(report.figures, name, drawing)

    for name in ("surface", "min_area", "sizes", "ranking", "reliability", "risk_coverage"):
        note(name)
    return kept


def test_a_mark_stands_on_its_rules_own_dice(repo, place, titles, tmp_path):
    recipe, data, _ = place
    found = oof.load(recipe, data)
    tuned = tuning.search(recipe, found)
    grid, dice = tuned.grid, tuned.sums.without(-1).dice
    assert tuned.grid.top_areas[0] == Rule.of(recipe.rule).top_area == 0
    captions = {}
    for top, top_area in ((0, 0), (0, 2), (2, 2)):
        index = (1, 1, top, top_area)
        moved = replace(tuned, rule=grid.rule(index), choice=replace(tuned.choice, index=index))
        captions[top, top_area] = report._surface(recipe, moved, "", tmp_path).caption
        plane, thresholds, areas, marks, *_ = titles["surface"]
        assert marks["chosen"] == (grid.thresholds[1], grid.min_areas[1])
        assert ("recipe" in marks) == (top == 0)  # any top area lets all images through there
        own = {"chosen": dice[index], "recipe": tuned.baseline.mean()}
        for name, (threshold, area) in marks.items():
            assert plane[thresholds.index(threshold), areas.index(area)] == pytest.approx(own[name], abs=1e-12)
    assert plane[thresholds.index(0.5), areas.index(20)] != pytest.approx(own["recipe"])  # where it stood
    assert "recipe's rule is not marked: its top rule is another" in captions[2, 2]
    assert "not marked" not in captions[0, 0] + captions[0, 2]


def test_captions_and_titles_name_the_rule_that_was_used(repo, place, titles, tmp_path):
    recipe, data, _ = place
    found = oof.load(recipe, data)
    shown = results.cross_fitted("tuned rule, cross-fitted", found, tuning.search(recipe, found))
    scores = shown.scores(draws=100, seed=0)
    report._score_figures(
        recipe,
        shown,
        scores,
        metrics.by_size(
            shown.dice,
            found.tables.true_area,
            shown.signals.decided,
            shown.signals.score,
            found.groups,
            draws=100,
            seed=0,
        ),
        " (note)",
        tmp_path,
    )
    title = {name: arguments[-2] for name, arguments in titles.items()}
    assert title["ranking"] == title["reliability"] == "seed, out of fold, image score (note)"  # no rule changes it
    assert title["sizes"] == "seed, out of fold, tuned rule, cross-fitted (note)"
    assert "top rule: none" in report._min_area(recipe, found, "", tmp_path).caption
    strict = small_run.recipe(repo, recipe.data.root, tmp_path, "rule.top_threshold=0.75", "rule.top_area=1500")
    caption = report._min_area(strict, found, "", tmp_path).caption
    assert "an image is positive only if more than 1,500 px exceed 0.75" in caption


@pytest.mark.parametrize("hits", [0, 1, 5, 12, 13, 24, 25, 40, 100])
def test_an_image_is_in_one_gallery(hits):
    rng = np.random.default_rng(0)
    count = hits + 20
    positive = np.arange(count) < hits + 10
    decided = (np.arange(count) < hits) | (np.arange(count) >= count - 5)
    true_area = rng.permutation(count) + 1
    found = SimpleNamespace(tables=SimpleNamespace(positive=positive, true_area=true_area))
    dice = rng.permutation(count) / count
    shown = results.Decided("x", found, dice, SimpleNamespace(decided=decided, area=rng.permutation(count)))
    pairs = zip(galleries.NAMES, galleries.chosen(shown), strict=True)
    chosen = {name.removeprefix("gallery_"): places.tolist() for name, (_, places) in pairs}
    everything = [place for places in chosen.values() for place in places]
    assert len(everything) == len(set(everything))
    assert len(chosen["best"] + chosen["median"] + chosen["worst"]) == min(hits, 3 * galleries.SHOWN)
    by_dice = sorted(range(hits), key=lambda i: -dice[i])
    assert chosen["best"] == by_dice[:12]
    if hits <= galleries.SHOWN:
        assert not chosen["median"] + chosen["worst"]
    if hits == 100:
        assert chosen["worst"] == by_dice[::-1][:12]
        assert chosen["median"] == by_dice[44:56]
    assert set(chosen["false_positives"]) == set(range(count - 5, count))
    assert chosen["missed"] == sorted(range(hits, hits + 10), key=lambda i: -true_area[i])


def test_the_queue_begins_with_the_doubtful(place):
    _, _, folder = place
    with open(folder / "referral.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [float(row["expected_dice"]) for row in rows]
    assert len(rows) == 18 and expected == sorted(expected)


def test_gallery_numbers_are_those_of_the_annotation_grid(place):
    """By the whole id, so that they can be joined with the other tables."""
    recipe, data, folder = place
    found = oof.load(recipe, data)
    area = dict(zip(found.image_ids, found.tables.true_area.tolist(), strict=True))
    rows = [row for path in folder.glob("gallery_*.csv") for row in csv.DictReader(path.read_text().splitlines())]
    assert rows and all(area[row["ImageId"]] == int(row["true_area"]) for row in rows)


@pytest.mark.parametrize("weights", ["best", "last", "ema"])
def test_the_epoch_of_a_fold_is_that_of_the_weights_that_predict(weights):
    logs = pd.DataFrame({"fold": 0, "epoch": [1, 2, 3], "dice": [0.5, 0.6, 0.4]})
    assert report._epochs(logs, weights) == {"best": {0: 2}, "last": {0: 3}, "ema": {}}[weights]


def test_nothing_is_fetched(place):
    _, _, folder = place
    text = (folder / "report.html").read_text()
    assert not re.search(r"https?://", text)
    assert not re.search(r"<!--[A-Z]+-->", text)


def test_text_cannot_break_out():
    evil = "</script><i>x"
    content = page.Content(
        title=evil,
        origin=evil,
        warnings=[evil],
        summary=(evil,),
        results=[[evil], [evil, evil]],
        sizes=[[evil], [evil, evil]],
        audit=evil,
        sources={evil: evil},
        case_columns=[evil],
        cases=[[evil]],
    )
    text = page.render(content)
    assert "<i>" not in text
    assert text.count("</script>") == 3


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if browser.EXECUTABLE is None:
        pytest.skip("no Chromium on this machine")
    with browser.open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(place, tab):
    """The report, opened; no exception and no request by the end."""
    _, _, folder = place
    tab.resize(1200, 900)
    tab.problems.clear()
    tab.open(folder / "report.html", READY)
    yield tab
    assert tab.problems == []


def shown(opened) -> dict[str, float]:
    names = ("dice", "dice_positive", "true_negative_rate", "sensitivity", "all_empty")
    return {name: float(opened.run(f"document.querySelector('#{name}').dataset.value")) for name in names}


def move(opened, index) -> None:
    for number, place in enumerate(index):
        slider = f"document.querySelector('#slider-{number}')"
        opened.run(f"{slider}.value = {place}; {slider}.dispatchEvent(new Event('input'))")


def test_sliders_show_what_tuning_has(place, opened):
    recipe, data, _ = place
    tuned = tuning.search(recipe, oof.load(recipe, data))
    whole = tuned.sums.without(-1)

    def wanted(index) -> dict[str, float]:
        return {
            "dice": whole.dice[tuple(index)],
            "dice_positive": whole.dice_on_positives[tuple(index)],
            "true_negative_rate": whole.specificity[tuple(index)],
            "sensitivity": whole.sensitivity[tuple(index)],
            "all_empty": 12 / 18,
        }

    assert shown(opened) == wanted(tuned.choice.index)
    rng = np.random.default_rng(0)
    seen = set()
    for index in rng.integers(0, tuned.grid.shape, (25, 4)).tolist():
        move(opened, index)
        assert shown(opened) == wanted(index)
        assert opened.run("document.querySelector('#dice').textContent") == f"{whole.dice[tuple(index)]:.4f}"
        seen.add(shown(opened)["dice"])
    assert len(seen) > 2  # the sliders do something
    opened.run("document.querySelector('#to-recipe').click()")
    assert shown(opened)["dice"] == pytest.approx(tuned.baseline.mean(), abs=1e-12)
    opened.run("document.querySelector('#to-chosen').click()")
    assert shown(opened)["dice"] == pytest.approx(tuned.in_sample, abs=1e-12)


def test_the_keyboard_moves_sliders_and_sorts(place, opened):
    recipe, data, _ = place
    whole = tuning.search(recipe, oof.load(recipe, data)).sums.without(-1)
    move(opened, (0, 0, 0, 0))
    opened.run("document.querySelector('#slider-0').focus()")
    opened.press("ArrowRight")
    opened.press("ArrowRight")
    opened.press("Tab")
    opened.press("ArrowRight")
    assert shown(opened)["dice"] == whole.dice[2, 1, 0, 0]
    opened.run("document.querySelector('#cases thead button').focus()")
    opened.press("Enter")
    first = "document.querySelector('#cases tbody td').textContent"
    assert opened.run(first) == "train-000"
    opened.press("Enter")
    assert opened.run(first) == "train-017"
    assert opened.run("document.querySelector('#cases th').getAttribute('aria-sort')") == "descending"


def test_cases_are_filtered(opened):
    find = "document.querySelector('#find')"
    opened.run(f"{find}.value = '-01'; {find}.dispatchEvent(new Event('input'))")
    assert opened.run("document.querySelectorAll('#cases tbody tr').length") == 8  # 010 .. 017
    assert opened.run("document.querySelector('#count').textContent") == "8 of 8 shown, 18 in all"
    opened.run(f"{find}.value = ''; document.querySelector('#outcome').selectedIndex = 1")
    opened.run("document.querySelector('#outcome').dispatchEvent(new Event('change'))")
    kind = opened.run("document.querySelector('#outcome').value")
    kinds = opened.run("[...document.querySelectorAll('#cases tbody tr')].map(row => row.cells[2].textContent)")
    assert kinds and set(kinds) == {kind}


def test_it_fits_a_phone_and_the_dark(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    assert opened.run(ground) == "rgb(255, 255, 255)"
    opened.resize(390, 844, phone=True, dark=True)
    assert opened.run("document.documentElement.scrollWidth") <= 390
    assert opened.run(ground) == "rgb(13, 17, 23)"


@pytest.mark.parametrize("width", [500, 1300, 1920])
def test_the_result_table_is_cut_by_narrow_windows_only(opened, width):
    opened.resize(width, 900)
    inside, window = opened.run("(box => [box.scrollWidth, box.clientWidth])(document.querySelector('#results .wide'))")
    assert opened.run("document.documentElement.scrollWidth") <= width
    assert (inside > window) == (width == 500)


def frames(opened) -> dict[str, int]:
    """Pixels of each frame's colour in the explorer's map."""
    return opened.run(
        """(map => {
            const count = { "0,224,255": 0, "255,48,96": 0, "255,255,255": 0 };
            const bytes = map.getContext("2d").getImageData(0, 0, map.width, map.height).data;
            for (let i = 0; i < bytes.length; i += 4) count[bytes.slice(i, i + 3).join()]++;
            return { blue: count["0,224,255"], red: count["255,48,96"], white: count["255,255,255"] };
        })(document.querySelector("#map"))"""
    )


def test_frames_are_seen_on_the_plane_of_their_top_rule_only(place, opened):
    recipe, data, _ = place
    tuned = tuning.search(recipe, oof.load(recipe, data))
    said = "document.querySelector('#map-text').textContent"
    t, m, top, top_area = tuned.choice.index
    assert Rule.of(recipe.rule).top_threshold == 0
    at_first = frames(opened)  # blue and red in one place
    assert min(at_first["blue"], at_first["red"]) > 20
    assert "red the chosen one" in opened.run(said)
    last = len(tuned.grid.top_thresholds) - 1
    for p, a in ((0, 0), (0, 3), (top, top_area), (last, 3), (1, 1)):
        move(opened, (t, m, p, a))
        found = frames(opened)
        red = p == top and (p == 0 or a == top_area)
        assert found["blue"] > 20 and (found["red"] > 20) == red and (found["white"] > 20) == (p == 0)
        assert ("red the chosen one" in opened.run(said)) == red
        assert ("white the recipe's" in opened.run(said)) == (p == 0)
        assert ("Of another top rule, so not marked" in opened.run(said)) == (not red or p != 0)


def test_it_says_what_it_is_of_and_what_its_numbers_are(opened):
    origin = opened.run("document.querySelector('#origin').textContent")
    assert re.fullmatch(
        r"Report of \d{4}-\d\d-\d\d\. Data: data, 18 training images\. Encoder: test_resnet\. "
        r"Image sizes of the stages: 64, 64, 64 px\.",
        origin,
    )
    for section, said in (
        ("results", ("are by image", "Calibration error: ")),
        ("by-size", ("Calibration gap: ",)),
        ("by-fold", ("by a rule that was chosen on the other folds",)),
        ("cases-section", ("Score of the image: ", "Agreement: ")),
    ):
        text = opened.run(f"document.querySelector('#{section} > p').textContent")
        assert all(word in text for word in said), text


def test_folds_stand_one_by_one(place):
    recipe, data, _ = place
    found = oof.load(recipe, data)
    tuned = tuning.search(recipe, found)
    ways = [results.by_rule("recipe's rule", found, Rule.of(recipe.rule)), results.cross_fitted("", found, tuned)]
    head, *rows = words.fold_rows(ways[1], ways[0], tuned, {0: 2, 1: 7})
    assert [row[:2] for row in rows] == [["0", "2"], ["1", "7"], ["2", ""]]
    for fold, row in enumerate(rows):
        of = dict(zip(head, row, strict=True))
        inside = found.folds == fold
        assert of["images"] == str(inside.sum()) and of["positive"] == str((found.tables.positive & inside).sum())
        assert of["Dice"] == f"{tuned.dice[inside].mean():.4f}"
        assert of["Dice, recipe's rule"] == f"{tuned.baseline[inside].mean():.4f}"
        assert of["rule chosen on the others"] == tuning.describe(tuned.fold_rules[fold])
    outcome = ways[1].outcome
    for name, right, wrong in (
        ("sensitivity", "true positive", "missed"),
        ("true-negative rate", "true negative", "false positive"),
    ):
        hits, misses = (int(((outcome == kind) & (found.folds == 0)).sum()) for kind in (right, wrong))
        assert rows[0][head.index(name)] == f"{hits / (hits + misses):.4f}"


def test_the_summary_says_what_the_figures_are_worth(repo, place):
    recipe, data, _ = place
    found = oof.load(recipe, data)
    for more in ((), ("tune.objective=sensitivity", "tune.target=0.9", "predict.weights=last")):
        asked = small_run.recipe(repo, recipe.data.root, recipe.runs, *SETTINGS, *more)
        tuned = tuning.search(asked, found)
        shown = results.cross_fitted("tuned rule", found, tuned)
        said = " ".join(words.summary(asked, data, shown, shown.scores(draws=10, seed=0), tuned, ""))
        assert ("of the best Dice among those of a sensitivity of 0.9 by image" in said) == bool(more)
        assert ("The epoch of each network was chosen by its Dice on the same images" in said) != bool(more)
        assert ("Each stage began with the epoch of the stage before that had the best Dice" in said) == bool(more)
        assert "resample 18 patients or single images" in said and "predict.py averages those of all folds" in said
        given, right = shown.signals.decided, found.tables.positive
        assert f"{given.sum()} images were given a mask" in said
        if given.any():
            assert f"images were given a mask, of which {right[given].mean():.1%} have pneumothorax" in said
        if not given.all():
            assert f"{(~given).sum()} were left empty, of which {(~right[~given]).mean():.1%} have none" in said


def test_a_data_set_without_negatives_has_no_rate_of_them(place):
    recipe, data, _ = place
    found = oof.load(recipe, data)
    some = np.flatnonzero(found.tables.positive)
    ids = tuple(found.image_ids[i] for i in some)
    only = replace(
        found, image_ids=ids, rows=found.rows[some], folds=found.folds[some], groups=np.arange(len(some)),
        tables=found.tables.take(some),
    )  # fmt: skip
    way = results.by_rule("recipe's rule", only, Rule.of(recipe.rule))
    head, empty, row = words.result_rows([way], {way.name: way.scores(draws=10, seed=0)}, {}, {})
    place_of = head.index("true-negative rate")
    assert empty[place_of] == row[place_of] == "-" and empty[place_of - 1] == "0"


def test_it_warns_of_another_rule_of_predict(place, capsys, tmp_path):
    recipe, data, folder = place
    found = oof.load(recipe, data)
    tuned = tuning.search(recipe, found)
    ways = [results.by_rule("recipe's rule", found, Rule.of(recipe.rule))]
    path = recipe.folder / "rule.toml"

    predicted = {"weights": "best", "mirror": recipe.predict.mirror, "annotation_size": recipe.data.annotation_size}

    def warnings(rule: Rule, sources: dict[str, str], predicted: dict | None = predicted) -> list[str]:
        learned = trust.fit(trust.signals(found.tables, rule), tables.dice(found.tables, rule))
        tuning.write(path, tuning.Ruling(rule, "", learned, predicted), {}, sources)
        return words.warnings(recipe, data, found, tuned, ways)

    other = replace(tuned.rule, min_area=4321)
    try:
        own = Rule.of(recipe.rule)
        (said,) = words.warnings(recipe, data, found, tuned, ways)
        assert said.startswith("predict.py uses another rule than this report, the recipe's, as there is no")
        assert f"{tuning.describe(own)}. Run: make tune" in said
        (said,) = words.warnings(recipe, data, found, None, ways)
        assert said.startswith("Only fold 0 has out-of-fold predictions: no rule can be tuned")
        some = replace(data, cases=[case for case in data.cases if case.positive])
        assert "NOT ONE of the 6 training images is without pneumothorax" in " ".join(
            words.warnings(recipe, some, found, tuned, ways)
        )
        assert warnings(tuned.rule, found.sources) == []
        assert "is of an earlier version" in warnings(tuned.rule, found.sources, None)[0]
        assert "not predict.weights=best" in warnings(tuned.rule, found.sources, {**predicted, "weights": "ema"})[0]
        open_to_all = replace(tuned.rule, top_threshold=0.0, top_area=1)
        assert len(warnings(open_to_all, found.sources)) == (tuned.rule.top_threshold != 0)
        assert "predict.py will stop" in warnings(other, {"a": "0"})[0]
        said = warnings(other, found.sources)[0]
        assert f"that of {path}: {tuning.describe(other)}. This report was given other settings of tune" in said
        report.write(recipe)
        assert f"warning: {said}" in capsys.readouterr().err
        assert html.escape(said) in (folder / "report.html").read_text()
        assert "This report is of other folds than make tune was" in warnings(other, {**found.sources, "a": "0"})[0]
        path.write_text("[rule")
        assert "rule.toml: not a rule file" in words.warnings(recipe, data, found, tuned, ways)[0]
    finally:
        path.unlink(missing_ok=True)


def test_doubts_of_tuning_stand_on_the_page(place):
    recipe, data, folder = place
    found = oof.load(recipe, data)
    doubts = tuning.doubts(recipe, found, tuning.search(recipe, found))
    assert doubts  # of random networks: no better than empty masks
    text = (folder / "report.html").read_text()
    for doubt in doubts:
        assert html.escape(doubt[1:]) in text


@pytest.fixture
def own(repo, place, tmp_path):
    """A recipe with the data and folds of `place`, of which two folds have predictions."""
    recipe, _, _ = place
    shutil.copytree(recipe.runs, tmp_path / "runs")
    copied = small_run.recipe(repo, recipe.data.root, tmp_path / "runs", *SETTINGS)
    oof.path_of(copied, 2).unlink()
    return copied


def test_a_recipe_beside_without_predictions_is_named_before_anything_is_written(repo, place, tmp_path):
    recipe, _, _ = place
    other = small_run.recipe(repo, tmp_path / "nowhere", tmp_path / "runs", *SETTINGS, name="seed-focal")
    before = {path: path.stat().st_mtime_ns for path in recipe.folder.rglob("*")}
    with pytest.raises(UsageError, match=r"seed-focal: no out-of-fold predictions .*Run: make cv RECIPE=seed-focal"):
        report.write(recipe, [other])
    assert not (tmp_path / "runs").exists()
    assert before == {path: path.stat().st_mtime_ns for path in recipe.folder.rglob("*")}


def test_a_row_of_other_images_says_so(repo, own, capsys):
    whole = small_run.recipe(repo, own.data.root, own.runs, *SETTINGS, name="seed-image")
    report.write(own, [whole])
    text = (own.folder / "report" / "report.html").read_text()
    count = len(oof.load(own, dataset.load(own)).image_ids)
    images = f"on 18 images, {count} of them among the recipe's {count}; all masks empty: 0.6667"
    assert count < 18
    said = capsys.readouterr().err
    for name in ("seed-image, its recipe's rule", "seed-image, tuned rule, cross-fitted"):
        assert f"{html.escape(name)}<br><small>({html.escape(images)})</small>" in text
        assert f"warning: {name}: {images}. Its row cannot be compared" in said
    assert "weights ema, recipe&#x27;s rule<br>" in text  # all of its folds are read
    assert "warning: No out-of-fold predictions of fold 2: the rule is chosen without" in said
    oof.path_of(replace(own, predict=replace(own.predict, weights="ema")), 2).unlink()
    report.write(own)
    assert "Its row cannot" not in capsys.readouterr().err


def test_a_row_of_other_annotations_has_no_gain(repo, place, tmp_path, capsys):
    """The same ids with other masks: every difference may come of these."""
    recipe, _, _ = place
    shutil.copytree(recipe.data.root, tmp_path / "data")
    rows = (tmp_path / "data" / "train-rle.csv").read_text().splitlines()
    rows = [f"{row.split(',')[0]},-1" if row.startswith("train-000") else row for row in rows]
    (tmp_path / "data" / "train-rle.csv").write_text("\n".join(rows) + "\n")
    other = small_run.recipe(repo, tmp_path / "data", tmp_path / "runs", *SETTINGS, name="seed-image")
    oof.write(other, small_run.pretend_trained(other), torch.device("cpu"))
    report.write(recipe, [other])
    try:
        numbers = {row["name"]: row for row in json.loads((place[2] / "report.json").read_text())["rows"]}
        warned = capsys.readouterr().err
        for name in ("seed-image, its recipe's rule", "seed-image, tuned rule, cross-fitted"):
            assert numbers[name]["gain"] is numbers[name]["gain_over_tuned"] is None
            said = (
                f"{name}: on other annotations of 1 of the images; all masks empty: 0.7222. Its row cannot be compared"
            )
            assert said in warned
            assert html.escape(said) in (place[2] / "report.html").read_text()
    finally:
        report.write(recipe)


def test_predictions_with_other_weights_that_no_longer_fit_are_left_out(own, capsys):
    for fold in (0, 1):
        path = own.stage_folder(fold, 3) / "ema.pt"
        state = checkpoint.load(path)
        state["model"]["head.bias"] += 1
        checkpoint.save(state, path)
    report.write(own)
    said = capsys.readouterr().err
    assert "warning: the report leaves out weights ema: " in said
    assert 'Run again: make oof SET="... predict.weights=ema"' in said
    numbers = json.loads((own.folder / "report" / "report.json").read_text())
    assert [row["name"] for row in numbers["rows"]] == ["recipe's rule", "tuned rule, cross-fitted"]


def test_losses_are_compared_in_folds_that_both_recipes_trained(repo, own, tmp_path, monkeypatch):
    focal = small_run.recipe(repo, own.data.root, own.runs, *SETTINGS, name="seed-focal")
    drawn = {}
    monkeypatch.setattr(report.figures, "loss_comparison", lambda records, losses, *_: drawn.update(records) or losses)
    write_logs(focal)
    logs = report._logs(focal)
    assert report._compare_losses(own, report._logs(own), "", tmp_path / "a.png") == "" and not drawn
    for has, there, both in (([0, 1, 2], [0, 1], "0, 1"), ([1], [0, 1], "1"), ([0], [1], "")):
        for fold in range(3):
            (own.stage_folder(fold, 3) / "best.pt").unlink(missing_ok=True)
        for fold in there:
            settings = config.stage_settings(own, 3)
            checkpoint.save({"settings": settings}, own.stage_folder(fold, 3) / "best.pt")
        said = report._compare_losses(focal, logs[logs["fold"].isin(has)], "", tmp_path / "a.png")
        assert said == (both and f"Stage 3 of seed, in which seed-focal starts, and of seed-focal; fold {both}.")
        if both:
            assert {name: ", ".join(map(str, table["fold"].unique())) for name, table in drawn.items()} == {
                "seed": both, "seed-focal": both
            }  # fmt: skip


def test_what_only_an_earlier_report_wrote_goes(own, capsys):
    folder = own.folder / "report"
    foreign = {"curves.pdf", "my.png", "my.csv", "gallery_mine.png", "notes.txt"}
    for name in (*foreign, "gallery_median.png", "gallery_median.csv", "loss_comparison.png"):
        (folder / name).write_text("x")
    report.write(own)
    said = capsys.readouterr().out
    names = {path.name for path in folder.iterdir()}
    assert foreign < names and not {"gallery_median.png", "gallery_median.csv", "loss_comparison.png"} & names
    drawn = said.split("figures: ")[1].strip().split(", ")
    assert {f"{name}.png" for name in ("surface", "curves", "ranking")} < set(drawn)
    made = {"report.html", "report.json", "referral.csv", *drawn, *(name.replace(".png", ".csv") for name in drawn)}
    assert names == foreign | made
    oof.path_of(own, 1).unlink()  # one fold: nothing to tune on
    report.write(own)
    assert "removed of an earlier report: referral.csv, " in capsys.readouterr().out
    names = {path.name for path in folder.iterdir()}
    assert "report.json" in names and not {"referral.csv", "surface.png", "surface.csv", "risk_coverage.csv"} & names
    oof.path_of(own, 0).unlink()
    report.write(own)
    names = {path.name for path in folder.iterdir()}
    assert names == foreign | {
        "report.html",
        *(f"{name}.{end}" for name in ("augmentations", "curves") for end in ("png", "csv")),
    }


@pytest.mark.slow
def test_a_page_of_the_whole_challenge_stays_small(repo, tmp_path):
    """12,047 cases and all rules, without pictures: they add 2 MB whatever the cases; 15 MB is the limit."""
    recipe = config.load(repo / "configs.toml", "seed")
    rule = Rule(threshold=0.5, min_area=3500)
    grid = oof.grid(recipe)
    data = maps.many(12047, [round(threshold * 256) for threshold in grid.thresholds])
    tuned = tune.tune(data, np.arange(12047) % 5, grid, rule, objective="dice", target=0.9, tolerance=5e-4)
    row = ["1.2.276.0.7230010.3.1.4.8323329.10000.1517875220.930580", 4, "true negative", 0.1234, 0.1234, 0.1234, 0.1]
    content = page.Content(
        "x", explorer=page.explorer(tuned, rule), case_columns=["x"], cases=[[*row, 9999, 1]] * 12047
    )
    size = len(page.render(content))
    assert size < 12e6, size


def test_without_predictions_it_shows_the_training(repo, place, tmp_path, capsys):
    recipe, _, _ = place
    other = small_run.recipe(repo, recipe.data.root, tmp_path, *SETTINGS)
    with pytest.raises(DataError, match=r"no log\.jsonl yet"):
        report.write(other)
    write_logs(other)
    report.write(other)
    assert "Run: make oof" in capsys.readouterr().err
    text = (other.folder / "report" / "report.html").read_text()
    assert "Folds and leaks" in text and "data:image/png" in text
