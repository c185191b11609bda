"""The commands as a user types them, from PNG files to submission.csv."""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import small_run
from PIL import Image

from pneumo import config, dataset
from pneumo.__main__ import recipe as print_recipe
from pneumo.data import rle


def run(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Run a script or module of the project in another folder; return what it printed."""
    job = forked.start(*arguments, cwd=cwd)
    assert job.wait(300) == code, job.text
    assert "Traceback" not in job.text
    return job.text


def run_python(*arguments: str, cwd: Path, code: int = 0) -> str:
    """The same by a Python that starts anew, with all of its imports, for what forks processes itself."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(forked.REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a blank and an umlaut in its name, with data."""
    folder = tmp_path_factory.mktemp("dät a")
    small_run.write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def options(place):
    one_epoch = [f"stage.{number}.epochs=1" for number in (1, 2, 3)]
    return ["--set", *small_run.settings(place / "data", place / "runs"), *one_epoch, "folds.count=2"]


@pytest.fixture(scope="module")
def trained(place, options):
    """All folds and stages trained, in one process."""
    return run("pneumo", "cv", *options, cwd=place)


def test_verify_pack_and_folds(place, options):
    assert "18 training images, 6 with pneumothorax, 4 test images; 0 errors" in run(
        "pneumo", "verify", *options, cwd=place
    )
    assert "train, 64 px: 18 images packed and checked" in run("pneumo", "pack", *options, cwd=place)
    assert "18 images in 2 folds" in run("pneumo", "folds", *options, cwd=place)
    assert "--force splits anew" in run("pneumo", "folds", *options, cwd=place)
    text = (place / "runs" / "seed" / "audit.txt").read_text()
    (place / "runs" / "seed" / "audit.txt").unlink()
    assert f"--force splits anew\n{text}" in run("pneumo", "folds", *options, cwd=place)
    audit = json.loads((place / "runs" / "seed" / "audit.json").read_text())
    assert (audit["patients_crossing"], audit["duplicates_crossing"]) == (0, 0)


def test_from_png_to_submission(place, options, trained):
    assert "fold 1 stage 3 epoch 1/1" in trained
    printed = run("predict.py", *options, cwd=place)
    assert "4 images" in printed and "networks: 2" in printed
    with open(place / "runs" / "seed" / "submission.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ImageId"] for row in rows] == [f"test-{i:03d}" for i in range(4)]
    for row in rows:
        rle.decode(row["EncodedPixels"], 64, 64)
    origin = json.loads((place / "runs" / "seed" / "submission.json").read_text())
    assert len(origin["checkpoints"]) == 2
    assert origin["rule"]["min_area"] == 20
    # the same submission again, and with a part of the folds another one
    first = (place / "runs" / "seed" / "submission.csv").read_bytes()
    run("predict.py", *options, cwd=place)
    assert (place / "runs" / "seed" / "submission.csv").read_bytes() == first
    assert "networks: 1" in run("predict.py", "--folds", "1", *options, cwd=place)
    run("predict.py", *options, cwd=place)
    scored = run(
        "pneumo", "score", "--json", str(place / "runs" / "seed" / "submission.csv"),
        str(place / "runs" / "seed" / "submission.csv"), *options, cwd=place,
    )  # fmt: skip
    assert json.loads(scored)["dice"] == 1


@pytest.mark.fault("C4", "base and overrides resolved: printed by `recipe`, printed and saved by a run, and read again")
def test_the_recipe_is_printed_and_saved(repo, place, options, trained, tmp_path, capsys, figure):
    wanted = config.load(repo / "configs.toml", "seed", options[1:])
    folder = place / "runs" / "seed" / "fold1" / "stage3"
    assert f"{folder / 'config.toml'}: epochs 1, image_size 64, batch_size 3, accumulation 2, loss bce_dice" in trained
    assert config.load(folder / "config.toml", "seed") == wanted
    print_recipe(argparse.Namespace(recipe="seed", config=repo / "configs.toml", set=[options[1:]]))
    (tmp_path / "again.toml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert config.load(tmp_path / "again.toml", "seed") == wanted
    figure(f"{len(config.dumps(wanted).splitlines())} lines, read back equal 2 of 2")


def test_given_files(place, options, trained):
    wide = np.random.default_rng(0).integers(0, 256, (50, 90), dtype=np.uint8)
    Image.fromarray(wide).save(place / "wide one.png")
    out = place / "masks"
    files = [str(place / "data" / "test" / "test-000.png"), str(place / "wide one.png")]
    run("predict.py", *files, "--out", str(out), *options, cwd=place)
    with Image.open(out / "wide one_mask.png") as mask, Image.open(out / "wide one_overlay.png") as overlay:
        assert mask.size == overlay.size == (90, 50)
        assert set(np.unique(mask)) <= {0, 255}
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [Path(record["file"]).name for record in records] == ["test-000.png", "wide one.png"]
    for record in records:
        with Image.open(out / f"{Path(record['file']).stem}_mask.png") as mask:
            assert record["area_pixels"] == (np.asarray(mask) > 0).sum()
        assert 0 <= record["score"] <= 1 and 0 <= record["agreement"] <= 1
        assert record["expected_dice"] is None  # no rule has been tuned
        assert record["area_cm2"] is None
    assert "say where" in run("predict.py", files[0], *options, cwd=place, code=2)


def test_a_bad_file_among_good_ones_is_named_and_the_others_are_done(place, options, trained):
    (place / "bad.png").write_bytes(b"<html>")
    good = str(place / "data" / "test" / "test-001.png")
    printed = run("predict.py", "bad.png", good, "--out", "some", *options, cwd=place, code=3)
    assert "1 of 2 files could not be predicted: bad.png" in printed
    assert (place / "some" / "test-001_mask.png").exists()


def test_a_tuned_rule_is_used_and_recorded(place, options, trained):
    folder = place / "runs" / "seed"
    assert "oof-best.npz" in trained  # cv ends with them
    assert "there already" in run("pneumo", "oof", *options, cwd=place)
    assert "cross-fitted" in run("pneumo", "tune", *options, cwd=place)
    assert "rule.toml" in run("predict.py", *options, cwd=place)
    origin = json.loads((folder / "submission.json").read_text())
    assert origin["rule_source"] == str(folder / "rule.toml")
    with open(folder / "referral.csv", newline="") as file:
        queue = list(csv.DictReader(file))
    assert sorted(row["ImageId"] for row in queue) == [f"test-{i:03d}" for i in range(4)]
    expected = [float(row["expected_dice"]) for row in queue]
    assert expected == sorted(expected) and [row["rank"] for row in queue] == ["1", "2", "3", "4"]
    assert "rule of the recipe" in run("predict.py", "--rule", "recipe", *options, cwd=place)
    assert json.loads((folder / "submission.json").read_text())["rule"]["min_area"] == 20
    assert not (folder / "referral.csv").exists()  # nothing was learned for that rule
    (folder / "rule.toml").unlink()


@pytest.mark.slow
def test_report(place, options, trained):
    printed = run("pneumo", "report", *options, cwd=place)
    assert "report.html" in printed and "surface.png" in printed
    run("pneumo", "cv", "--recipe", "seed-focal", *options, cwd=place)
    printed = run("pneumo", "report", "--recipe", "seed-focal", *options, cwd=place)
    assert "loss_comparison.png" in printed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train.py", "--recipe", "sead"], 2, 'Did you mean "seed"?'),
        (["train.py", "--set", "stage.1.epoch=3"], 2, 'Did you mean "epochs"?'),
        (["train.py", "--fold", "9"], 2, "--fold 9: the recipe has folds 0 to 4"),
        (["train.py", "--stage", "0"], 2, "--stage 0"),
        (["train.py", "--recipe", "seed-focal", "--stage", "1"], 2, "trains from stage 3 on, which starts from seed;"),
        (["predict.py", "--set", "predict.mirror=true", "a.png"], 2, "a.png: expected key=value; what is none goes"),
        (["train.py", "--set", "model.encoder=ResNet34", "data.root=nowhere"], 2, "Did you mean resnet34 or"),
        (["pneumo", "cv", "--set", "model.encoder=ResNet34", "data.root=nowhere"], 2, "Did you mean resnet34 or"),
        (["train.py", "--set", "data.root=nowhere"], 3, "nowhere: no such folder. Set data.root."),
        (["predict.py", "--folds", "0,7"], 2, "--folds 0,7"),
        (["predict.py", "--folds", "0"], 2, "Run: make cv FOLDS=0"),
        (["predict.py", "--out", "masks"], 2, "--out is for the masks of given files, and no file is given"),
        (["pneumo", "score"], 2, "name both files: score SUBMISSION TRUTH, or make score SUBMISSION=a.csv TRUTH=b.csv"),
        (["pneumo", "score", "truth.csv"], 2, "name both files"),
        (["pneumo", "report"], 3, "no log.jsonl yet"),
    ],
)
def test_mistakes_are_one_line_with_an_exit_code(tmp_path, arguments, code, message):
    printed = run(*arguments, cwd=tmp_path, code=code)
    assert message in printed
    assert len(printed.strip().splitlines()) == 1


def test_a_mistake_in_a_python_that_starts_anew(repo, tmp_path):
    printed = run_python(str(repo / "train.py"), "--recipe", "sead", cwd=tmp_path, code=2)
    assert 'Did you mean "seed"?' in printed
    assert len(printed.strip().splitlines()) == 1


@pytest.mark.slow
def test_plain_torchrun(repo, place, options):
    command = ["--standalone", "--nproc_per_node=2", str(repo / "train.py"), *options, f"runs={place / 'two'}"]
    printed = run_python("-m", "torch.distributed.run", *command, cwd=place)
    assert "2 x cpu" in printed
    assert (place / "two" / "seed" / "fold0" / "stage1" / "best.pt").exists()


@pytest.mark.slow
@pytest.mark.fault("R12", "submission and out-of-fold tables of one process and of two")
def test_two_processes_predict_as_one(repo, place, options, trained):
    """Per-image results of one process and of two, thread for thread, are the same."""
    folder = place / "runs" / "seed"
    run("predict.py", *options, cwd=place)
    alone = (folder / "submission.csv").read_bytes()
    tables = [np.load(folder / f"fold{fold}" / "stage3" / "oof-best.npz") for fold in (0, 1)]
    before = [{name: arrays[name] for name in arrays.files} for arrays in tables]
    for fold in (0, 1):
        (folder / f"fold{fold}" / "stage3" / "oof-best.npz").unlink()
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run_python(*launch, str(repo / "predict.py"), *options, cwd=place)
    assert (folder / "submission.csv").read_bytes() == alone
    run_python(*launch, "-m", "pneumo", "oof", *options, cwd=place)
    for fold, arrays in enumerate(before):
        with np.load(folder / f"fold{fold}" / "stage3" / "oof-best.npz") as again:
            for name, array in arrays.items():
                np.testing.assert_array_equal(again[name], array)


def test_where_many_images_have_one_fault_the_file_with_all_is_named(repo, tmp_path, capsys):
    """Whether or not the message ends with a full stop."""
    small_run.write_data(tmp_path / "data")
    table = tmp_path / "data" / "train-rle.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *rows, *rows]) + "\n")  # each twice
    for number in range(6):
        (tmp_path / "data" / "train" / f"note {number}.txt").touch()
    recipe = small_run.recipe(repo, tmp_path / "data", tmp_path / "runs")
    dataset.load_cases(recipe)
    report = recipe.folder / "train_report.csv"
    said = capsys.readouterr().err
    assert f"rows); they were united. All are listed in {report}.\n" in said
    assert f"note 3.txt, note 4.txt and 1 more. All are listed in {report}.\n" in said


def test_data_without_a_negative_are_warned_of(repo, tmp_path, capsys):
    """Where they are read, and at the end of verify."""
    small_run.write_data(tmp_path / "data")
    table = tmp_path / "data" / "train-rle.csv"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if not line.endswith(",-1\n")))
    recipe = small_run.recipe(repo, tmp_path / "data", tmp_path / "runs")
    dataset.load_cases(recipe)
    warning = "warning: NOT ONE of the 6 training images is without pneumothorax"
    assert warning in capsys.readouterr().err
    settings = small_run.settings(tmp_path / "data", tmp_path / "runs")
    assert warning in run("pneumo", "verify", "--set", *settings, cwd=tmp_path)
    assert warning not in run("pneumo", "verify", "--set", *settings, "data.unmasked=empty", cwd=tmp_path)


def test_verify_names_test_images_that_are_trained_on(tmp_path):
    """Under another name, and four times as large with noise."""
    small_run.write_data(tmp_path / "data")
    train, test = tmp_path / "data" / "train", tmp_path / "data" / "test"
    shutil.copy(train / "train-004.png", test / "test-002.png")
    with Image.open(train / "train-007.png") as image:
        pixels = np.array(image.resize((256, 256))) + np.random.default_rng(0).integers(0, 8, (256, 256))
    Image.fromarray(pixels.astype(np.uint8)).save(test / "test-000.png")
    shutil.copy(train / "train-009.png", train / "train-010.png")  # that pair is one of the folds' audit
    (tmp_path / "data" / "train" / "train-011.png").write_bytes(b"")  # no picture at all, which shifts no other
    options = ["--set", *small_run.settings(tmp_path / "data", tmp_path / "runs")]
    said = run("pneumo", "verify", *options, cwd=tmp_path, code=3)
    known = "test-{}.png: nearly the same picture as {}/train-{}.png, so that no score of it is one of an unseen image."
    assert said.count("nearly the same") == 2
    assert known.format("002", train, "004") in said and known.format("000", train, "007") in said
    assert "1 error, 3 notes" in said  # one of rows that overlap


def test_verify_says_what_is_missing_where_there_is_no_image(tmp_path):
    options = ["--set", f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}"]
    assert "data: no such folder" in run("pneumo", "verify", *options, cwd=tmp_path, code=3)
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train-rle.csv").write_text("ImageId,EncodedPixels\n")
    assert "train: no PNG, JPEG or DICOM file in it" in run("pneumo", "verify", *options, cwd=tmp_path, code=3)


def dry_make(repo, *words: str) -> subprocess.CompletedProcess:
    """What make would do; these tests may themselves run in a make, whose variables are none of it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES")}
    command = ["make", "-n", "PYTHON=python3", *words]
    return subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_takes_another_file_of_recipes(repo):
    done = dry_make(repo, "cv", "RECIPE=mine", "CONFIG='my own.toml'")
    assert " -m pneumo cv --folds all --jobs 1 --config 'my own.toml' --recipe mine \n" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cv", "FOLD=1"], "FOLD= has no meaning for make cv, which takes PYTHON RECIPE CONFIG SET FOLDS GPUS JOBS"),
        (["submit", "FOLD=1"], "FOLD= has no meaning for make submit"),
        (
            ["train", "FOLDS=1"],
            "FOLDS= has no meaning for make train, which takes PYTHON RECIPE CONFIG SET FOLD STAGE GPUS",
        ),
        (["oof", "FOLDS=0"], "FOLDS= has no meaning for make oof"),
        (["demo", "RECIPE=seed"], "RECIPE= has no meaning for make demo, which takes PYTHON SET"),
        (["train", "RECIPES=demo"], "no variable RECIPES; there are RECIPE CONFIG"),
        (["train", "recipe=demo"], "no variable recipe;"),
        (["verfy", "RECIPE=demo"], "no target verfy; there are help setup demo test"),
        (["cv", "SET=seed=1", "runs=elsewhere"], 'several overrides are quoted, as SET="runs=DIR seed=1"'),
        (["train", "GPUS=0"], "GPUS= takes a number of processes, 1 or more"),
        (["cv", "GPUS=two"], "GPUS= takes a number of processes, 1 or more"),
        (["cv", "JOBS="], "JOBS= takes a number of processes, 1 or more"),
    ],
)
def test_make_starts_nothing_else_than_what_was_meant(repo, words, said):
    done = dry_make(repo, *words)
    assert done.returncode == 2 and said in done.stderr and "python3" not in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_one_of_several_targets_may_take_a_variable(repo):
    done = dry_make(repo, "cv", "tune", "report", "GPUS=2", "BESIDE=demo", "SET=stage.1.epochs=1")
    assert done.returncode == 0, done.stderr
    assert dry_make(repo, "cv", "GPUS=2", "JOBS=12").returncode == 0
    assert "--nproc_per_node=2 -m pneumo cv" in done.stdout and "--beside demo" in done.stdout


def test_a_report_goes_with_the_problems_it_lists(repo, tmp_path):
    """Training and test images have one each, so that neither overwrites the other's."""
    small_run.write_data(tmp_path / "data")
    table = tmp_path / "data" / "train-rle.csv"
    (tmp_path / "data" / "sample_submission.csv").write_text(
        "ImageId\n" + "".join(f"test-00{number}\n" for number in (0, 1, 1, 2, 3))
    )
    recipe = small_run.recipe(repo, tmp_path / "data", tmp_path / "runs")
    dataset.load_cases(recipe)
    dataset.load_test_cases(recipe)
    train, test = (recipe.folder / f"{part}_report.csv" for part in ("train", "test"))
    assert "train-rle.csv" in train.read_text() and "sample_submission.csv" in test.read_text()
    table.write_text("".join(dict.fromkeys(table.read_text().splitlines(True))))  # one row was there twice
    dataset.load_cases(recipe)
    assert test.exists() and not train.exists()


def test_other_synthetic_data_are_not_taken_for_those_asked_for(tmp_path):
    options = ("phantom", "--set", f"data.root={tmp_path / 'data'}", "phantom.side=64", "phantom.test=2")
    run("pneumo", *options, "phantom.train=3", cwd=tmp_path)
    assert "there already" in run("pneumo", *options, "phantom.train=3", cwd=tmp_path)
    said = run("pneumo", *options, "phantom.train=4", cwd=tmp_path, code=3)
    assert "holds synthetic data of other settings (train=3 test=2 side=64" in said and "now train=4 test=2" in said


def test_a_patient_of_most_images_is_warned_of(repo, tmp_path, capsys):
    """As a placeholder is."""
    small_run.write_data(tmp_path / "data")
    names = sorted(path.stem for path in (tmp_path / "data" / "train").iterdir())
    patients = ["ANONYMOUS"] * 14 + [str(number) for number in range(4)]
    rows = "".join(f"{name},{patient}\n" for name, patient in zip(names, patients, strict=True))
    (tmp_path / "data" / "patients.csv").write_text("ImageId,patient_id\n" + rows)
    dataset.load(small_run.recipe(repo, tmp_path / "data", tmp_path / "runs"))
    assert "14 of 18 images are of one patient, ANONYMOUS, and stay in one fold" in capsys.readouterr().err
