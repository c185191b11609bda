"""Submissions: rows S1 to S5 and S9."""

import argparse
import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_run
import torch

from pneumo import __main__ as commands
from pneumo import checkpoint, cli, dataset, ensemble, inference, log, submission
from pneumo.data import rle
from pneumo.decision.rule import Rule, decide
from pneumo.errors import DataError, NotFiniteError, UsageError
from pneumo.kernels.runs import runs_to_mask
from pneumo.tuning import Ruling

CPU = torch.device("cpu")
IMAGES = 9


@pytest.fixture(scope="module")
def recipe(repo, tmp_path_factory):
    """Two folds of random networks; a sample of repeated ids in an order of its own."""
    folder = tmp_path_factory.mktemp("submission")
    small_run.write_data(folder / "data", test=IMAGES)
    ids = [f"test-{number:03d}" for number in (4, 1, 4, 8, 0, 1, 7, 6, 5, 3, 2)]
    (folder / "data" / "sample_submission.csv").write_text(
        "ImageId,EncodedPixels\n" + "".join(f"{i},-1\n" for i in ids)
    )
    recipe = small_run.recipe(repo, folder / "data", folder / "runs", "folds.count=2", "predict.batch_size=4")
    small_run.pretend_trained(recipe)
    return recipe


def rows_of(path: Path) -> list[tuple[str, str]]:
    with open(path, newline="") as file:
        return [(row["ImageId"], row["EncodedPixels"]) for row in csv.DictReader(file)]


@pytest.mark.fault("S1", "a sample whose rows repeat ids, in no order")
@pytest.mark.fault("S2", "every code decoded and compared with the mask that was decided")
@pytest.mark.fault("S3", "a rule that leaves some images empty")
def test_rows_codes_and_empty_masks(recipe, monkeypatch, capsys, figure):
    maps: dict[str, np.ndarray] = {}
    real = ensemble.predict

    def kept(models, image, size, names, boxes=None):
        found = real(models, image, size, names, boxes)
        maps.update(zip(names, found.q, strict=True))
        return found

    monkeypatch.setattr(ensemble, "predict", kept)
    models = ensemble.load(recipe, [0, 1], CPU)
    half = small_run.halving_rule(models, Path(recipe.data.root) / "test").threshold
    inference.predict_test(recipe, models, Ruling(Rule(threshold=half), "recipe", None), CPU)
    areas = sorted(np.count_nonzero(q >= half * 256) for name, q in maps.items() if name.startswith("test-"))
    rule = Rule(threshold=half, top_threshold=half, top_area=int(areas[len(areas) // 2]))
    inference.predict_test(recipe, models, Ruling(rule, "recipe", None), CPU)
    assert "11 rows have 9 different ids" in capsys.readouterr().err
    rows = rows_of(recipe.folder / "submission.csv")
    assert [image_id for image_id, _ in rows] == [f"test-{number:03d}" for number in (4, 1, 8, 0, 7, 6, 5, 3, 2)]
    for image_id, code in rows:
        mask = runs_to_mask(decide(maps[image_id], rule), 64, 64)
        np.testing.assert_array_equal(rle.decode(code, 64, 64), mask)
        assert (code == "-1") == (not mask.any())
    empty = sum(code == "-1" for _, code in rows)
    assert 0 < empty < len(rows)
    figure(f"9 of 9 ids once, 9 of 9 masks equal, {empty} of {empty} empty ones are -1")


@pytest.mark.fault("S4", "a network whose probabilities are not numbers for some images")
def test_what_is_not_a_number_is_no_empty_mask(recipe, monkeypatch, capsys, figure):
    path = recipe.folder / "submission.csv"
    path.write_text("old")
    models = ensemble.load(recipe, [0], CPU)
    logits = torch.nn.Module.__call__

    class Broken(torch.nn.Module):
        def forward(self, image):
            found = logits(models.models[0][0], image)
            return torch.where(image[:, :1].mean(dim=(1, 2, 3), keepdim=True) > 0.26, torch.nan, found)

    broken = replace(models, models=((Broken(),),), sources={"broken": "0"})
    parser = cli.argparse.ArgumentParser()
    cli.add_recipe_options(parser)
    ruling = Ruling(Rule(threshold=0.5), "recipe", None)
    code = cli.run(lambda _: inference.predict_test(recipe, broken, ruling, CPU), parser, [])
    said = capsys.readouterr().err
    assert code == NotFiniteError.exit_code == 4
    assert "error: the networks' probabilities of test-00" in said and "Traceback" not in said
    assert path.read_text() == "old"
    path.unlink()
    figure("exit 4, ids named, the earlier submission intact")


@pytest.mark.fault("S4", "a checkpoint whose weights are NaN or infinite; whose hashes, weights are something else")
def test_a_checkpoint_that_cannot_predict_is_named(recipe, figure):
    path = recipe.stage_folder(1, 3) / "best.pt"
    good, state = path.read_bytes(), checkpoint.load(path)
    weight = state["model"]["head.weight"]
    changes = [
        *({"model": {**state["model"], "head.weight": weight * float(number)}} for number in ("nan", "inf")),
        *(
            {"model": {**state["model"], "head.weight": odd}}
            for odd in (weight > 0, 5, weight.to_sparse(), weight.to("meta"))
        ),
        *({"digest": ["a"]}, {"split": {"a": 1}}, {"fold": torch.zeros(2)}),
    ]
    try:
        for number, change in enumerate(changes):
            torch.save({**state, **change}, path)
            with pytest.raises(
                (NotFiniteError, DataError),
                match=r"fold1/stage3/best\.pt .*Restore it, or delete .*fold1.stage3 and train that stage again\.$",
            ) as caught:
                ensemble.load(recipe, [0, 1], CPU)
            assert caught.value.exit_code == (4 if number < 2 else 3)
    finally:
        path.write_bytes(good)
    figure(f"{len(changes)} of {len(changes)} named with the way out")


@pytest.mark.fault("S5", "a fold not trained, one stopped, one whose weights are gone; then --folds without them")
def test_a_missing_fold_is_asked_for_or_left_out_on_purpose(recipe, capsys, figure):
    folder = recipe.stage_folder(1, 3)
    status = (folder / "status.json").read_bytes()
    log.write_status(folder, "stopped", epoch=12, epochs=30)
    with pytest.raises(UsageError, match=r'fold 1 .*says "stopped" at epoch 12 of 30. Run: make cv FOLDS=1'):
        ensemble.load(recipe, [0, 1], CPU)
    (folder / "status.json").unlink()
    with pytest.raises(UsageError, match=r'make cv FOLDS=1 SET="\.\.\.", or choose folds with --folds'):
        ensemble.load(recipe, ensemble.parse_folds("all", 2), CPU)
    assert len(ensemble.load(recipe, ensemble.parse_folds("0", 2), CPU).models) == 1
    for damaged in (b"", b"[]", b"{}", b'{"state": 1}', b'{"state": "done", "epoch": 1}', b"[" * 100_000, b"\xff"):
        (folder / "status.json").write_bytes(damaged)
        with pytest.raises(UsageError, match=r'json says "missing"\. Run: make cv FOLDS=1'):
            ensemble.load(recipe, [0, 1], CPU)
        assert f"warning: {folder / 'status.json'} is damaged: it h" in capsys.readouterr().err
    (folder / "status.json").write_bytes(status)
    with pytest.raises(ValueError, match=r"best\.pt.*no such file"):
        (folder / "best.pt").rename(folder / "away.pt")
        try:
            ensemble.load(recipe, [0, 1], CPU)
        finally:
            (folder / "away.pt").rename(folder / "best.pt")
    figure("3 of 3 named with the command, and 7 damaged status.json; --folds 0 predicts")


def check(recipe, capsys, *arguments: str, code: int) -> str:
    """Run check-submission on the recipe; what it printed."""
    parser = cli.argparse.ArgumentParser()
    cli.add_recipe_options(parser)
    for name in ("submission", "--sample", "--truth"):
        parser.add_argument(name, type=Path, **({"nargs": "?"} if name == "submission" else {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "load_recipe", lambda _: recipe)
        assert cli.run(commands.check_submission, parser, arguments) == code
    out, err = capsys.readouterr()
    return out + err


@pytest.mark.fault("S9", "a submission as it was written; then one with each thing that can be wrong")
def test_a_submission_is_checked(recipe, tmp_path, capsys, figure):
    models = ensemble.load(recipe, [0, 1], CPU)
    ruling = Ruling(small_run.halving_rule(models, Path(recipe.data.root) / "test"), "recipe", None)
    inference.predict_test(recipe, models, ruling, CPU)
    capsys.readouterr()
    said = check(recipe, capsys, code=0)
    written = dict(rows_of(recipe.folder / "submission.csv"))
    assert f"submission.csv: 9 rows, 9 ids; {submission.summary(written, 64)}" in said
    assert "sample_submission.csv: 9 ids" in said and "all masks empty: Dice 0.6667 on 18 training images" in said
    assert "submission.json: what made it, networks of 2 of 2 folds" in said
    note = recipe.folder / "submission.json"
    written_note = note.read_bytes()
    for damaged in (b"", b"[1]"):
        note.write_bytes(damaged)
        assert f"note  {note} is damaged: it holds no JSON object" in check(recipe, capsys, code=0)
    note.write_bytes(written_note)
    bad = tmp_path / "bad.csv"
    head = "ImageId,EncodedPixels\n"
    rest = "".join(f"test-{number:03d},-1\n" for number in range(1, 9))
    for text, message in (
        (rest + "test-000,1 2 3\n", "line 10, ImageId test-000, EncodedPixels: 3 numbers"),
        (rest + "test-000,4000 97\n", "line 10, ImageId test-000, EncodedPixels: run 1 ends at pixel 4,097"),
        (rest + "test-000,5 5 0 5\n", "line 10, ImageId test-000, EncodedPixels: runs that touch"),
        (rest + "test-000,\n", "line 10, ImageId test-000, EncodedPixels: an empty code"),
        (
            rest + "test-000,1 2\ntest-000,2 9\n",
            "line 11, ImageId test-000: a second row for this id, which has one on",
        ),
        (rest, "1 id of the sample is missing: test-000"),
        (rest + "test-000,-1\nb,-1\n", "1 id is not in the sample: b"),
        (
            "test-000,-1\n",
            "8 ids of the sample are missing: test-004, test-001, test-008, test-007, test-006 and 3 more.",
        ),
        ("test-000,x\n", f"{bad}: 1 row, 1 id; no row is good"),
        (rest + 'test-000, "-1"\n', "line 10, ImageId test-000, EncodedPixels: token 1 is not"),  # to others no code
        (rest + "test-000, 1 2\n", "line 10, ImageId test-000, EncodedPixels: runs that touch, or zeros or blanks too"),
        (rest + "test-000 ,-1\n", "line 10: ImageId 'test-000 '"),
        (rest + "test-000,-1,\n", "line 10: 3 fields, the header has 2"),
    ):
        bad.write_text(head + text)
        assert message in check(recipe, capsys, str(bad), code=3), message
    for content in (b"fname,mask\na,-1\n", b"\xef\xbb\xbf" + (head + "a,-1\n").encode()):
        bad.write_bytes(content)
        assert "line 1: the first line must be ImageId,EncodedPixels" in check(recipe, capsys, str(bad), code=3)
    bad.write_text(head + rest + "test-000,-1\n")
    assert "9 rows, 9 ids; 9 images, 100.0% empty" in check(recipe, capsys, str(bad), code=0)
    packed = bad.with_suffix(".csv.gz")
    packed.write_bytes(gzip.compress(bad.read_bytes()))
    assert "9 rows, 9 ids; 9 images, 100.0% empty" in check(recipe, capsys, str(packed), code=0)
    path = recipe.folder / "submission.csv"
    path.write_text(head + rest + "test-000,-1\n")
    assert "tells of another file" in check(recipe, capsys, code=0)
    said = check(recipe, capsys, str(path), f"--truth={path}", code=0)
    assert f"all masks empty: Dice 1.0000 on 9 images of {path}" in said
    figure("13 of 13 faults named by line and id, exit 3")


@pytest.mark.fault("S9", "the Dice of empty masks on the challenge's real annotations")
def test_empty_masks_on_the_real_annotations(recipe, siim, tmp_path, capsys, figure):
    (tmp_path / "a.csv").write_text("ImageId,EncodedPixels\na,-1\n")
    (tmp_path / "sample.csv").write_text("ImageId\na\n")
    recipe = replace(recipe, data=replace(recipe.data, annotation_size=1024))
    truth = ("--truth", str(siim / "train-rle-real.csv.gz"), "--sample", str(tmp_path / "sample.csv"))
    said = check(recipe, capsys, str(tmp_path / "a.csv"), *truth, code=0)
    assert "all masks empty: Dice 0.7811 on 11,972 images of" in said
    figure("0.7811 on the 11,972 of 12,047 that are at hand")


@pytest.mark.fault("S8", "submission.json names rule and checkpoints, and the file they made")
def test_the_origin_of_a_submission(recipe, figure):
    inference.predict_test(recipe, ensemble.load(recipe, [1], CPU), Ruling(Rule(threshold=0.5), "recipe", None), CPU)
    origin = json.loads((recipe.folder / "submission.json").read_text())
    best = recipe.stage_folder(1, 3) / "best.pt"
    assert origin["checkpoints"] == {str(best): checkpoint.sha256(best)}
    assert origin["sha256"] == checkpoint.sha256(recipe.folder / "submission.csv")
    assert (origin["data"], origin["split"]) == (dataset.load(recipe).digest, dataset.load(recipe).split)
    figure("sha256 of checkpoints and of the file")


def test_ids_of_the_sample_without_an_image_are_empty_if_that_is_allowed(recipe, tmp_path, capsys):
    sample = Path(recipe.data.root) / "sample_submission.csv"
    (tmp_path / "sample.csv").write_text(sample.read_text() + "lost,-1\n")
    here = replace(
        recipe,
        runs=str(tmp_path),
        data=replace(recipe.data, sample=str(tmp_path / "sample.csv"), allow_missing=True),
    )
    models = ensemble.load(recipe, [1], CPU)
    inference.predict_test(here, models, Ruling(Rule(threshold=0.5), "recipe", None), CPU)
    assert dict(rows_of(here.folder / "submission.csv"))["lost"] == "-1"
    said = capsys.readouterr().err
    assert "submission.csv is of 1 of 2 folds; make submit writes it of all" in said


def test_a_large_submission_is_checked_in_linear_time(tmp_path):
    ids = [f"i{number}" for number in range(20_000)]
    (tmp_path / "s.csv").write_text("ImageId,EncodedPixels\n" + "".join(f"{i},-1\n" for i in ids))
    checked = submission.check(tmp_path / "s.csv", ids[::-1], 64)
    assert len(checked.codes) == 20_000 and not checked.problems[0].fatal


@pytest.mark.fault("S4", "a submission of the header alone; a truth that is not there: errors, exit 3")
def test_nothing_to_check_is_no_pass(recipe, tmp_path, capsys, figure):
    path = tmp_path / "s.csv"
    path.write_text("ImageId,EncodedPixels\n")
    for sample_ids in (None, ["a", "b"]):
        first, *_ = submission.check(path, sample_ids, 64).problems
        assert first.fatal and first.message == f"{path}: no rows"
    good = "".join(f"test-{number:03d},-1\n" for number in range(IMAGES))
    path.write_text("ImageId,EncodedPixels\n" + good)
    options = {"recipe": recipe.name, "config": None, "set": [], "submission": path, "sample": path}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "load_recipe", lambda _: recipe)
        commands.check_submission(argparse.Namespace(**options, truth=None))
        with pytest.raises(DataError, match="no such file"):
            commands.check_submission(argparse.Namespace(**options, truth=tmp_path / "nope.csv"))
    figure("2 of 2")
