"""Predictions that are interrupted, refused or given what is no X-ray: rows S6, R7, R10, R17, R18, D7, P7."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_run
import torch
from PIL import Image

from pneumo import checkpoint, cli, dataset, ensemble, given, inference, journal
from pneumo.decision.rule import Rule
from pneumo.decision.trust import Trust
from pneumo.errors import DataError, UsageError, WriteError
from pneumo.tuning import Ruling

CPU = torch.device("cpu")
IMAGES = 7


@pytest.fixture(scope="module")
def trained(repo, tmp_path_factory):
    """A recipe with two finished folds of random networks, its ensemble and rule; batches of two."""
    folder = tmp_path_factory.mktemp("prediction")
    small_run.write_data(folder / "data", test=IMAGES)
    recipe = small_run.recipe(
        repo, folder / "data", folder / "runs", "folds.count=2", "predict.batch_size=2", "predict.mirror=false"
    )
    small_run.pretend_trained(recipe)
    models = ensemble.load(recipe, [0, 1], CPU)
    return recipe, models, Ruling(small_run.halving_rule(models, folder / "data" / "test"), "recipe", None)


@pytest.fixture
def predict(trained):
    """Predict given files into a folder; returns how many images went through the networks."""
    recipe, models, its_own = trained

    def predict(paths, out, ruling=its_own) -> int:
        with pytest.MonkeyPatch.context() as patch:
            images, real = [], ensemble.predict
            patch.setattr(
                ensemble, "predict", lambda m, x, size, names, box: images.extend(names) or real(m, x, size, names, box)
            )
            given.predict(recipe, models, ruling, given.find(paths, out), out, CPU)
        return len(images)

    return predict


@pytest.fixture
def scans(trained, tmp_path) -> Path:
    """A folder of seven X-rays to be given."""
    shutil.copytree(Path(trained[0].data.root) / "test", tmp_path / "scans")
    return tmp_path / "scans"


def outputs(out: Path) -> dict[str, bytes]:
    """What a prediction leaves, but for the lock."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "lock"}


# ----------------------------------------------------------------------------------------------------------------------
# S6: an interrupted prediction goes on
# ----------------------------------------------------------------------------------------------------------------------


def killed(repo: Path, place: Path, kind: str, processes: int, every: int) -> str:
    """Kill predictions at every so many steps and let them go on; the figure."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "tests/killed_predictions.py", place, kind, str(processes), str(every)],
        cwd=repo,
        env={**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["identical"] == result["trials"] > 2, result
    assert result["half_written"] == 0
    assert result["images_again"] <= IMAGES
    return f"{result['identical']} of {result['trials']} identical bytes ({kind}, {processes} processes)"


@pytest.mark.fault(
    "S6", "killed (SIGKILL) while it reads, computes and writes, half of a write on the disk; started again"
)
@pytest.mark.fault("S7", "submission.csv, .json and referral.csv after each kill: whole or not there")
def test_a_killed_submission_goes_on_to_the_same_bytes(repo, tmp_path, figure):
    figure(killed(repo, tmp_path, "test", 1, 7))


@pytest.mark.slow
@pytest.mark.fault("S6", "killed at every write, fsync, rename and unlink; one process and two; started again")
@pytest.mark.parametrize(
    ("kind", "processes", "every"), [("test", 1, 1), ("given", 1, 2), ("test", 2, 3), ("given", 2, 6)]
)
def test_killed_at_every_step(repo, tmp_path, figure, kind, processes, every):
    figure(killed(repo, tmp_path, kind, processes, every))


@pytest.mark.slow
@pytest.mark.fault("S6", "predict.py under torchrun killed as soon as a batch is done; typed again for one process")
def test_the_command_killed_and_typed_again(repo, trained, predict, scans, tmp_path, figure):
    recipe, _, ruling = trained
    for number in range(40):  # so many that the kill comes before the end
        shutil.copy(scans / f"test-00{number % 7}.png", scans / f"more-{number}.png")
    predict([scans], tmp_path / "straight")
    wanted, out = outputs(tmp_path / "straight"), tmp_path / "out"
    settings = [*small_run.settings(recipe.data.root, recipe.runs), "folds.count=2"]
    settings += ["predict.batch_size=2", "predict.mirror=false", f"rule.threshold={ruling.rule.threshold}"]
    command = ["predict.py", str(scans), "--out", str(out), "--set", *settings]
    options = {"cwd": repo, "env": {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.Popen([*launch, *command], start_new_session=True, **options)
    while not any(path.read_bytes().count(b"\n") > 1 for path in (out / ".predict").glob("*.jsonl")):
        assert run.poll() is None
        time.sleep(0.01)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()  # in sessions of their own
    for pid in map(int, workers):
        os.kill(pid, signal.SIGKILL)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    done = len(list(out.rglob("*_mask.png")))
    assert 0 < done < 47 and not (out / "predictions.jsonl").exists()
    again = subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, text=True, timeout=300, **options
    )
    assert "were there from before" in again.stdout
    assert outputs(out) == wanted
    figure(f"identical bytes; {done} of 47 masks were there at the kill")


@pytest.mark.fault("S6", "interrupted; then an input changed, an output deleted or cut, a note damaged or cut off")
def test_only_what_is_there_and_right_is_kept(predict, scans, tmp_path, monkeypatch, figure):
    """After each fault the batches that it touches are predicted again, and those only."""
    assert predict([scans], tmp_path / "straight") == IMAGES
    wanted, out = outputs(tmp_path / "straight"), tmp_path / "out"
    assert len({content for name, content in wanted.items() if name.endswith("mask.png")}) == IMAGES  # none is empty
    picture = (scans / "test-002.png").read_bytes()

    def interrupted() -> Path:
        """All batches done, but the run killed before its end."""
        shutil.rmtree(out, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(given, "_report", lambda *_: os.kill(os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                predict([scans], out)
        return out / ".predict" / "0.jsonl"

    notes = interrupted()
    assert predict([scans], out) == 0 and outputs(out) == wanted
    interrupted()
    (out / "test-003_mask.png").unlink()
    (out / "test-004_overlay.png").write_bytes(wanted["test-004_overlay.png"][:-1])
    assert predict([scans], out) == 4 and outputs(out) == wanted
    interrupted()
    lines = notes.read_bytes().splitlines(keepends=True)
    notes.write_bytes(b"".join([*lines[:2], lines[2].replace(b"score", b"scare"), *lines[3:-1], lines[-1][:50]]))
    assert predict([scans], out) == 3 and outputs(out) == wanted
    interrupted()
    notes.write_bytes(b"".join([lines[0][:20], b"\n", *lines[1:]]))  # nobody knows what the others were made from
    assert predict([scans], out) == IMAGES and outputs(out) == wanted
    interrupted()
    (scans / "test-002.png").write_bytes((scans / "test-001.png").read_bytes())
    assert predict([scans], out) == 2
    assert (out / "test-002_mask.png").read_bytes() == wanted["test-001_mask.png"]
    (scans / "test-002.png").write_bytes(picture)
    assert predict([scans], out) == IMAGES and outputs(out) == wanted  # nothing is kept of a finished prediction
    figure("5 of 5 faults mended, no other batch predicted again")


@pytest.mark.fault("S7", "a user's files whose names begin or end as those of half-written outputs do: none deleted")
def test_only_its_own_half_written_files_are_removed(trained, predict, scans, tmp_path, figure):
    recipe, models, ruling = trained
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    out = tmp_path / "out"
    half_written = [
        f"a_mask.png.{dead.pid}.tmp",
        f"sub/b_overlay.png.{dead.pid}.tmp",
        f"predictions.jsonl.{dead.pid}.tmp",
    ]
    own = ["notes/lung_mask.png.edited.tmp", "a_mask.png.tmp", "predictions.jsonl.old.tmp", f"a.png.{dead.pid}.tmp"]
    own += [f"a_mask.png.{os.getppid()}.tmp", f"a_mask.png.{dead.pid}.mine.tmp", f"my-predictions.jsonl.{dead.pid}.tmp"]
    for_submission = [f"{name}.{dead.pid}.tmp" for name in ("submission.csv", "submission.json", "referral.csv")]
    own_there = ["submission.final.tmp", f"submission.final.{dead.pid}.tmp", f"referral.csv.{dead.pid}.bak.tmp"]
    places = [out / name for name in half_written] + [recipe.folder / name for name in for_submission]
    kept = [out / name for name in own] + [recipe.folder / name for name in own_there]
    for path in (*places, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    predict([scans], out)
    inference.predict_test(recipe, models, ruling, CPU)
    assert [path for path in places if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []
    for path in kept:
        path.unlink()
    figure(f"{len(places)} of {len(places)} of its own removed, {len(kept)} of {len(kept)} of the user's kept")


@pytest.mark.fault("S6", "interrupted, then started with another rule, batch size or networks")
def test_another_kind_of_prediction_starts_anew_and_says_so(
    trained, predict, scans, tmp_path, capsys, monkeypatch, figure
):
    recipe, models, ruling = trained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(given, "_report", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            predict([scans], tmp_path / "out")
    half = int(ruling.rule.threshold * 128) / 256
    other = replace(ruling, rule=replace(ruling.rule, threshold=half))
    assert predict([scans], tmp_path / "out", other) == IMAGES
    said = capsys.readouterr().err
    assert "stopped; the same command goes on from here" in said
    assert f"another kind (rule.threshold: {ruling.rule.threshold} -> {half}); it starts anew" in said
    predict([scans], tmp_path / "straight", other)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "straight")
    results = []
    for first in (ruling, other):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inference, "_write_submission", lambda *_: os.kill(os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                inference.predict_test(recipe, models, first, CPU)
        inference.predict_test(recipe, models, other, CPU)
        results.append((recipe.folder / "submission.csv").read_bytes())
        said = capsys.readouterr()
        assert ("it starts anew" in said.err, "goes on; 4 of 4" in said.out) == (first is ruling, first is other)
    assert results[0] == results[1]
    before = inference.basis(recipe, models, ruling, CPU)
    others = [
        inference.basis(recipe, replace(models, batch_size=3), ruling, CPU),
        inference.basis(recipe, replace(models, mirror=True), ruling, CPU),
        inference.basis(recipe, replace(models, sources=dict(list(models.sources.items())[::-1])), ruling, CPU),
        inference.basis(recipe, replace(models, dtype=torch.float16), ruling, CPU),
        inference.basis(
            recipe, models, replace(ruling, trust=Trust((((0.0, 1.0), (0.0, 1.0)), ((0.0,), (0.5,))))), CPU
        ),
        inference.basis(replace(recipe, data=replace(recipe.data, annotation_size=128)), models, ruling, CPU),
    ]
    monkeypatch.setattr(torch, "__version__", "3.0")
    others.append(inference.basis(recipe, models, ruling, CPU))
    assert all(other != before for other in others)
    figure("2 of 2 named old -> new, the same bytes as without the first")


@pytest.mark.fault("S6", "interrupted; then a test image changed")
def test_a_submission_is_of_the_images_that_there_are(trained, tmp_path, capsys, figure):
    recipe, models, ruling = trained
    shutil.copytree(recipe.data.root, tmp_path / "data")
    here = replace(recipe, data=replace(recipe.data, root=str(tmp_path / "data")), runs=str(tmp_path / "runs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "_write_submission", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            inference.predict_test(here, models, ruling, CPU)
    images = tmp_path / "data" / "test"
    shutil.copy(images / "test-001.png", images / "test-000.png")
    inference.predict_test(here, models, ruling, CPU)
    first, second = (here.folder / "submission.csv").read_text().splitlines()[1:3]
    assert first.split(",")[1] == second.split(",")[1] != "-1"
    assert "another kind (data" in capsys.readouterr().err
    figure("predicted anew")


@pytest.mark.fault("R18", "a second prediction into the folder of a running one")
def test_two_predictions_into_one_folder(trained, predict, scans, tmp_path, figure):
    recipe, models, ruling = trained
    mine = rf"in use by process {os.getpid()} .* choose another --out DIR"
    with checkpoint.lock(tmp_path / "out" / ".predict"), pytest.raises(UsageError, match=mine) as caught:
        predict([scans], tmp_path / "out")
    assert caught.value.exit_code == 2
    assert outputs(tmp_path / "out") == {}
    with checkpoint.lock(recipe.folder / "predict"), pytest.raises(UsageError, match="choose another recipe"):
        inference.predict_test(recipe, models, ruling, CPU)
    figure("2 of 2 refused with the process's number, exit 2")


# ----------------------------------------------------------------------------------------------------------------------
# R7, R17: no space, no memory
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("R7", "the disk full at every write of a prediction in turn: masks, notes, records")
def test_a_full_disk_costs_no_mask(predict, scans, tmp_path, monkeypatch, figure):
    assert predict([scans], tmp_path / "straight") == IMAGES
    wanted, out, real = outputs(tmp_path / "straight"), tmp_path / "out", os.fsync
    trials = 0
    for last in range(1, 40, 8):
        shutil.rmtree(out, ignore_errors=True)
        calls = 0

        def full(descriptor: int, last: int = last) -> None:
            nonlocal calls
            calls += 1
            if calls >= last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        try:
            predict([scans], out)
        except WriteError as error:
            assert str(error).startswith("Cannot ") and str(out) in str(error) and error.exit_code == 5
            trials += 1
        monkeypatch.setattr(os, "fsync", real)
        left = outputs(out)
        assert all(left[name] == wanted[name] for name in left if name.endswith("png"))
        predict([scans], out)
        assert outputs(out) == wanted
    assert trials == 5
    figure(f"{trials} of 5: exit 5, what was written is whole, the same command ends the same")


@pytest.mark.fault("R7", "a file system of 200 kB for the masks, then a larger one")
def test_a_small_file_system_fills_up_and_is_enlarged(predict, scans, tmp_path, figure):
    out = tmp_path / "small"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", out]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems can be mounted by root only")
    try:
        for number in range(20):
            shutil.copy(scans / f"test-00{number % 7}.png", scans / f"more-{number}.png")
        with pytest.raises(WriteError, match=f"Cannot .*{out}"):
            predict([scans], out)
        done = len(list(out.glob("*_mask.png")))
        subprocess.run(["mount", "-o", "remount,size=20m", out], check=True)
        again = predict([scans], out)
        predict([scans], tmp_path / "straight")
        assert outputs(out) == outputs(tmp_path / "straight")
    finally:
        subprocess.run(["umount", out], check=True)
    assert 0 < done < 27 and again < 27
    figure(f"full after {done} of 27 masks, exit 5; enlarged: {again} predicted again, the same bytes")


@pytest.mark.fault("R24", "masks, or runs, in a file system that is read-only; a folder's name that is too long")
def test_a_folder_that_cannot_be_written(trained, predict, scans, tmp_path, capsys, figure):
    recipe, models, ruling = trained
    with pytest.raises(WriteError, match=r"File name too long. Choose another --out DIR"):
        predict([scans], tmp_path / ("x" * 300))
    out = tmp_path / "read-only"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", out]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems can be mounted by root only")
    try:
        with pytest.raises(WriteError, match=rf"Cannot write {out}.*: Read-only .* Allow .* choose another --out DIR"):
            predict([scans], out)
        parser = cli.argparse.ArgumentParser()
        cli.add_recipe_options(parser)
        code = cli.run(
            lambda _: inference.predict_test(replace(recipe, runs=str(out)), models, ruling, CPU), parser, []
        )
    finally:
        subprocess.run(["umount", out], check=True)
    assert code == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: Cannot write {out / 'pack'}") and "--set runs=DIR" in line
    figure("3 of 3: exit 5, path and way out")


@pytest.mark.fault("R17", "the device out of memory in the fourth batch")
def test_no_memory_in_a_prediction(trained, predict, scans, tmp_path, monkeypatch, capsys, figure):
    out, real, batches = tmp_path / "out", ensemble.predict, []

    def exhausted(*arguments):
        batches.append(1)
        if len(batches) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*arguments)

    recipe, models, ruling = trained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "predict", exhausted)
        parser = cli.argparse.ArgumentParser()
        cli.add_recipe_options(parser)
        code = cli.run(
            lambda _: given.predict(recipe, models, ruling, given.find([scans], out), out, CPU), parser, ["--debug"]
        )
    assert code == 6
    assert "out of memory" in capsys.readouterr().err
    again = predict([scans], out)
    assert again < IMAGES
    predict([scans], tmp_path / "straight")
    assert outputs(out) == outputs(tmp_path / "straight")
    figure(f"exit 6; {IMAGES - again} of {IMAGES} images need not be predicted again")


# ----------------------------------------------------------------------------------------------------------------------
# What is given
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("P7", "a folder given to predict.py: nested, with junk, names that are alike, DICOM without suffix")
def test_a_folder_is_predicted_as_it_lies(predict, scans, tmp_path, figure):
    for place in ("a", "b/c", ".hidden", "__MACOSX"):
        (scans / place).mkdir(parents=True)
        shutil.copy(scans / "test-000.png", scans / place / "x.PNG")
    for junk in ("Thumbs.db", "._test-000.png", "notes.txt"):
        (scans / junk).write_bytes(b"junk")
    out = scans / "masks"  # below the X-rays themselves: its pictures are none
    for _ in range(2):
        assert predict([scans, scans / "test-001.png"], out) == IMAGES + 2
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len({record["file"] for record in records}) == len(records) == IMAGES + 2
    for name in ("a/x_mask.png", "b/c/x_overlay.png", "test-006_mask.png"):
        assert (out / name).exists()
    assert all((out / record["mask"]).exists() for record in records)
    assert len(list(out.rglob("*.png"))) == 2 * len(records)
    assert given.find([Path("1.2.3"), Path("1.2.4")], out)[1].name == "1.2.4"
    figure(f"{len(records)} of {len(records)}, no junk, no name lost")


def test_what_an_earlier_prediction_left_stays(predict, scans, tmp_path, capsys, monkeypatch):
    """One call a file, as in a loop of the shell, leaves what one call for all does; no mask becomes another file's."""
    for path in sorted(scans.glob("*.png")):
        predict([path], tmp_path / "out")
    predict(sorted(scans.glob("*.png")), tmp_path / "straight")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "straight")
    (tmp_path / "b").mkdir()
    shutil.copy(scans / "test-001.png", tmp_path / "b" / "test-000.png")
    shutil.copy(scans / "test-001.png", tmp_path / "b" / "test-001.png")
    with pytest.raises(
        UsageError, match=r"test-000_mask.png is the mask of .*scans/test-000.png and would become .*/b/"
    ):
        predict([tmp_path / "b" / "test-000.png"], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / ".predict")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "straight")
    assert predict([tmp_path / "b" / "test-001.png"], tmp_path / "out") == 1  # the same picture from elsewhere
    (tmp_path / "out" / "test-002_mask.png").unlink()
    predict([scans / "test-000.png"], tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == IMAGES - 1 and all((tmp_path / "out" / record["mask"]).exists() for record in records)
    path.write_text(path.read_text().rstrip()[:-9])  # the last line is cut off: the others stay
    capsys.readouterr()
    predict([scans / "test-000.png"], tmp_path / "out")
    assert f"line {IMAGES - 1} is damaged and is dropped" in capsys.readouterr().err
    assert len(path.read_text().splitlines()) == IMAGES - 2
    # the name alone tells nothing: the same one, typed in another folder, is another file; the same file may change
    monkeypatch.chdir(scans)
    predict([Path("test-003.png")], tmp_path / "out")
    assert '"file": "test-003.png"' in path.read_text().splitlines()[-1]  # sorted: the only name without a folder
    assert str(scans) not in path.read_text().splitlines()[-1]  # a folder may bear a patient's name
    monkeypatch.chdir(tmp_path / "b")
    shutil.copy(scans / "test-001.png", "test-003.png")
    with pytest.raises(UsageError, match=r"test-003_mask.png is the mask of"):
        predict([Path("test-003.png")], tmp_path / "out")
    shutil.copy(scans / "test-001.png", scans / "test-003.png")
    assert predict([scans / "test-003.png"], tmp_path / "out") == 1


@pytest.mark.parametrize("shape", [(40, 64), (64, 39)])
def test_nothing_is_found_in_the_padding(trained, predict, tmp_path, shape):
    """At the lowest threshold all of the image is found, and the areas of its record are of the image."""
    _, _, ruling = trained
    path = tmp_path / "flat.png"
    Image.fromarray(np.full(shape, 90, np.uint8)).save(path)
    everything = replace(ruling, rule=Rule(threshold=1 / 256, min_area=0))
    assert predict([path], tmp_path / "out", everything) == 1
    (record,) = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    mask = np.asarray(Image.open(tmp_path / "out" / "flat_mask.png")) > 0
    assert mask.shape == shape and record["area_pixels"] == mask.sum() == mask.size
    assert record["area_grid"] == 64 * min(shape)  # the grid is 64 x 64 over the padded square
    corner = replace(ruling, rule=Rule(threshold=1 / 256, min_area=64 * min(shape)))  # only with the padding larger
    predict([path], tmp_path / "out", corner)
    (record,) = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert (record["area_grid"], record["area_pixels"], record["pneumothorax"]) == (0, 0, False)


def test_files_that_differ_in_their_suffix_alone_keep_it(predict, scans, tmp_path, capsys):
    """As many hospitals' folders hold a DICOM and its picture; whatever the order, and one by one in one call."""
    shutil.copy(scans / "test-000.png", scans / "test-000.jpg")
    (scans / "below").mkdir()
    shutil.copy(scans / "test-000.png", scans / "below" / "test-001.PNG")
    assert predict([scans], tmp_path / "out") == IMAGES + 2
    said = capsys.readouterr().out
    assert "2 files have another beside them that differs in its suffix alone" in said
    assert f"{IMAGES + 2} files, {IMAGES + 2} with pneumothorax; networks: 2, rule of the recipe: threshold" in said
    assert predict(sorted(scans.rglob("*.*g"), reverse=True), tmp_path / "again") == IMAGES + 1
    names = {path.name for path in (tmp_path / "out").glob("*_mask.png")}
    assert names == {f"test-00{number}_mask.png" for number in range(1, IMAGES)} | {
        "test-000.jpg_mask.png", "test-000.png_mask.png"
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "again").glob("*_mask.png")} == names
    assert (tmp_path / "out" / "below" / "test-001_mask.png").exists()


def test_pictures_that_are_not_read_are_named(tmp_path):
    for name in ("scan.TIF", "other.bmp", "notes.txt"):
        (tmp_path / name).write_bytes(b"MM")
    with pytest.raises(
        DataError, match=r"no PNG.* file in it\. Those in \.bmp, \.tif can be read if they are saved as PNG"
    ):
        given.find([tmp_path], tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "out", "message"),
    [
        (["a/x.png", "b/x.png"], "out", r"a/x.png and .*b/x.png would both become .*x_mask.png. Name the folder"),
        (["a/x.png", "a/x_mask.png", "b"], "out", r"become .*x_mask.png \(and 1 more such pairs\). Name the folder"),
        (["a"], "a", "the masks would lie among the X-rays"),
        (["a/x.png", "a/x_mask.png"], "a", "x_mask.png is one of the given files"),
        (["empty"], "out", "empty: no PNG, JPEG or DICOM file in it"),
    ],
)
def test_outputs_never_meet(tmp_path, files, out, message):
    for name in ("a/x.png", "b/x.png", "a/x_mask.png", "b/x_mask.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises((UsageError, DataError), match=message):
        given.find([tmp_path / name for name in files], tmp_path / out)


@pytest.mark.fault("P1", "bad files among those given to predict.py, mended, and given again")
def test_bad_files_are_listed_together_and_the_others_predicted(predict, scans, tmp_path, capsys, figure):
    good = (scans / "test-002.png").read_bytes()
    (scans / "test-002.png").write_bytes(good[:300])
    (scans / "test-005.png").write_bytes(b"<!DOCTYPE html>")
    out = tmp_path / "out"
    with pytest.raises(
        DataError, match=r"3 of 8 files could not be predicted: .*test-002.png: image file is truncated"
    ) as caught:
        predict([scans, tmp_path / "typo.png"], out)
    assert caught.value.exit_code == 3
    said = capsys.readouterr().err
    for text in ("test-002.png: image file is truncated", "test-005.png: an HTML page", "typo.png: no such file"):
        assert said.count(text) == 1
    assert len(list(out.glob("*_mask.png"))) == 5

    def records() -> list[dict]:
        return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]

    errors = {Path(record["file"]).name: record["error"] for record in records() if "error" in record}
    assert len(records()) == 8 and errors.keys() == {"test-002.png", "test-005.png", "typo.png"}
    assert all(error in said for error in errors.values())
    for path in (scans / "test-002.png", scans / "test-005.png", tmp_path / "typo.png"):
        path.write_bytes(good)
    assert predict([scans, tmp_path / "typo.png"], out) == 6  # the batches of the three
    predict([scans, tmp_path / "typo.png"], tmp_path / "straight")
    assert outputs(out) == outputs(tmp_path / "straight")
    with pytest.raises(DataError, match="1 of 1 files"):
        predict([tmp_path / "gone.png"], out)
    assert len(records()) == 9 and sum("error" in record for record in records()) == 1  # nothing good for something bad
    predict([scans / "test-000.png"], out)  # another call: what it is not about stays
    assert len(records()) == 9
    figure("3 of 3 named, 5 of 5 others predicted, exit 3")


@pytest.mark.fault("P1", "a file among those given whose outputs would have too long a name, as is or in a folder")
def test_a_name_that_is_too_long_costs_only_its_file(trained, scans, tmp_path, capsys, monkeypatch, figure):
    """240 letters: the mask's own name would fit, but not what it is written as first."""
    (scans / "new").mkdir()
    long = "x" * 240 + ".png"
    for place in (scans, scans / "new"):
        shutil.copy(scans / "test-000.png", place / long)
    out, computed, real = tmp_path / "out", [], ensemble.predict
    with monkeypatch.context() as patch:
        patch.setattr(
            ensemble, "predict", lambda m, x, size, names, b: computed.extend(names) or real(m, x, size, names, b)
        )
        with pytest.raises(DataError, match=r"2 of 9 files could not be predicted: .*xxx.png: .* too long. Rename it"):
            given.predict(*trained, given.find([scans], out), out, CPU)
    assert not any(long in name for name in computed) and len(computed) == IMAGES
    assert capsys.readouterr().err.count("too long. Rename it") == 2
    lines = (out / "predictions.jsonl").read_text().splitlines()
    assert len(list(out.glob("*_mask.png"))) == sum('"error"' not in line for line in lines) == IMAGES
    figure(f"2 of 2 named before they were computed, {IMAGES} of {IMAGES} others predicted, exit 3")


@pytest.mark.parametrize("spacing", [(1e200, 1e200), (1e200, 1e-200), (float("nan"), 1.0)])
def test_an_area_that_is_no_number_is_null(predict, scans, tmp_path, monkeypatch, spacing):
    real = given.images.read
    monkeypatch.setattr(given.images, "read", lambda path: replace(real(path), spacing=spacing))
    predict([scans], tmp_path / "out")
    for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines():
        record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert record["area_pixels"] > 0
        assert (record["area_cm2"] is None) == (spacing != (1e200, 1e-200))


@pytest.mark.slow
@pytest.mark.fault("R10", "two processes predict; a bad file in the second one's share only")
def test_a_bad_file_in_one_process_is_named_and_all_end(repo, trained, scans, tmp_path, figure):
    recipe = trained[0]
    (scans / "test-003.png").write_bytes(b"GIF89a")
    settings = [*small_run.settings(recipe.data.root, recipe.runs), "folds.count=2", "predict.batch_size=2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "predict.py"]
    started = time.perf_counter()
    done = subprocess.run(
        [*launch, str(scans), "--out", str(tmp_path / "out"), "--set", *settings],
        cwd=repo, env={**os.environ, "PYTHONPATH": str(repo)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    assert done.returncode != 0 and "test-003.png: a GIF file, not a PNG, JPEG or DICOM. " in done.stderr
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == IMAGES - 1
    figure(f"named; 6 of 6 others predicted; all gone after {seconds:.1f} s, launch included")


@pytest.mark.fault("D7", "a lateral view and a knee given to predict.py")
def test_odd_views_are_warned_of(predict, tmp_path, capsys, figure):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian

    for name, element, value in (("side", "ViewPosition", "LL"), ("leg", "BodyPartExamined", "KNEE")):
        header = pydicom.Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
        header.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        header.PatientName = "ROENTGEN^ANNA"
        header.Rows, header.Columns, header.SamplesPerPixel, header.PhotometricInterpretation = 64, 64, 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 8, 8, 7, 0
        setattr(header, element, value)
        header.PixelData = np.arange(4096).astype(np.uint8).tobytes()
        header["PixelData"].VR = "OB"
        header.save_as(tmp_path / f"{name}.dcm", enforce_file_format=True)
    out = tmp_path / "out"
    assert predict([tmp_path / "side.dcm", tmp_path / "leg.dcm"], out) == 2
    said = capsys.readouterr().err
    assert "side.dcm: a lateral view (ViewPosition LL)" in said and "leg.dcm: not a chest" in said
    warnings = [json.loads(line)["warnings"] for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert ["not a chest" in warnings[0][0], "a lateral view" in warnings[1][0]] == [True, True]
    assert not any(b"ROENTGEN" in content for content in outputs(out).values())
    figure("2 of 2 warned of, printed and in predictions.jsonl")


def test_the_notes_of_more_processes_are_read_by_fewer(tmp_path):
    basis = {"format": 1}
    for rank in range(3):
        lines = [basis, [f"part{rank}", rank]]
        (tmp_path / f"{rank}.jsonl").write_bytes(b"".join(map(journal._line, lines)))
    with journal.open_journal(tmp_path, basis, instead="x") as notes:
        assert notes.parts == {"part0": 0, "part1": 1, "part2": 2}
        notes.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
    for key in ("a", "b"):
        with journal.open_journal(tmp_path, {"format": 1}, instead="x") as notes:
            notes.add(key, 1)
        path = tmp_path / "0.jsonl"
        path.write_bytes(path.read_bytes() + journal._line(["c", 1])[:-3])
    with journal.open_journal(tmp_path, {"format": 1}, instead="x") as notes:
        assert notes.parts == {"a": 1, "b": 1}


def test_results_do_not_depend_on_who_is_in_a_batch(trained, predict, scans, tmp_path):
    """One by one or in twos: the same numbers but for rounding."""
    predict([scans], tmp_path / "two")
    for path in sorted(scans.glob("*.png")):
        predict([path], tmp_path / path.stem)
        alone = json.loads((tmp_path / path.stem / "predictions.jsonl").read_text())
        both = [json.loads(line) for line in (tmp_path / "two" / "predictions.jsonl").read_text().splitlines()]
        (record,) = [record for record in both if record["file"] == str(path)]
        assert record["score"] == pytest.approx(alone["score"], abs=0.01)


def test_test_images_are_told_apart_by_id(trained, monkeypatch):
    """A sample in another order is no reason to give an image another one's mask."""
    recipe, models, ruling = trained
    inference.predict_test(recipe, models, ruling, CPU)
    before = set((recipe.folder / "submission.csv").read_text().splitlines())
    sample = Path(recipe.data.root) / "sample_submission.csv"
    text = sample.read_text()
    header, *rows = text.splitlines()
    sample.write_text("\n".join([header, *rows[::-1]]) + "\n")
    inference.predict_test(recipe, models, ruling, CPU)
    sample.write_text(text)
    lines = (recipe.folder / "submission.csv").read_text().splitlines()
    assert set(lines) == before and len(before) == IMAGES + 1
    assert [line.split(",")[0] for line in lines[1:]] == [row.split(",")[0] for row in rows[::-1]]
    assert dataset.load_test_cases(recipe)[1] == [row.split(",")[0] for row in rows]


@pytest.mark.fault("R17", "masks of the user's own where a prediction's would be written: refused, and left")
def test_what_no_prediction_wrote_is_not_overwritten(predict, scans, tmp_path, figure):
    """Some data sets call their annotations <id>_mask.png."""
    out = tmp_path / "mask"
    out.mkdir()
    own = out / "test-000_mask.png"
    Image.new("L", (64, 64), 255).save(own)
    before = own.read_bytes()
    with pytest.raises(UsageError, match=r"test-000_mask.png is there, and no prediction has written it"):
        predict([scans], out)
    assert outputs(out) == {own.name: before}
    own.unlink()
    assert predict([scans], out) == IMAGES
    (out / ".predict").mkdir(exist_ok=True)
    (out / "predictions.jsonl").unlink()
    assert predict([scans], out) == IMAGES  # its own may be, also where no record tells of them
    with Image.open(own) as mask:
        mask.save(own)  # as a program does in which somebody has corrected it
    with pytest.raises(UsageError, match="no prediction has written it"):
        predict([scans], out)
    figure("refused before anything was written")


def test_earlier_outputs_are_no_x_rays(predict, scans, tmp_path, capsys):
    predict([scans], scans / "run1")
    assert predict([scans], scans / "run2") == IMAGES
    assert f"{2 * IMAGES} pictures of earlier predictions were left out" in capsys.readouterr().out
    names = {path.name for path in (scans / "run2").glob("*.png")}
    assert len(names) == 2 * IMAGES and not any(name.count("_mask") > 1 for name in names)
    made = sorted((scans / "run1").glob("*.png"))  # as a shell names them
    assert predict([*made, scans / "test-000.png"], tmp_path / "out") == 1
    assert f"{2 * IMAGES} of the given files are pictures of earlier predictions" in capsys.readouterr().out
    with pytest.raises(DataError, match="none of the given files is an X-ray"):
        predict(made, tmp_path / "none")
    own = tmp_path / "tumour_mask.png"  # somebody's X-ray of such a name
    shutil.copy(scans / "test-000.png", own)
    assert predict([own], tmp_path / "out") == 1


def test_a_file_that_could_not_be_read_is_read_again(predict, scans, tmp_path, monkeypatch):
    """A decoder was installed meanwhile, say: neither names nor contents have changed."""
    real, lacking = given.images.read, [True]

    def read(path):
        if lacking and path.name == "test-003.png":
            raise DataError(f"{path}: needs a decoder")
        return real(path)

    monkeypatch.setattr(given.images, "read", read)
    for _ in range(2):
        with pytest.raises(DataError, match=r"1 of 7 files could not be predicted: .*needs a decoder"):
            predict([scans], tmp_path / "out")
    predict([scans / "test-002.png"], tmp_path / "earlier")
    lacking.clear()
    predict([scans / "test-003.png"], tmp_path / "earlier")
    lacking.append(True)
    with pytest.raises(DataError, match="1 of 1 files"):
        predict([scans / "test-003.png"], tmp_path / "earlier")
    assert len(list((tmp_path / "earlier").glob("*.png"))) == 4  # the mask is of what the file still is
    lacking.clear()
    assert predict([scans], tmp_path / "out") == 2  # its batch, and none of the others
    predict([scans], tmp_path / "straight")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "straight")


def test_no_mask_stays_of_what_a_file_was_before(predict, scans, tmp_path):
    a, b, out = scans / "test-000.png", scans / "test-001.png", tmp_path / "out"
    predict([a, b], out)
    good = a.read_bytes()
    a.write_bytes(good[:300])
    b.unlink()  # away for a while, perhaps
    with pytest.raises(DataError, match="2 of 2 files could not be predicted"):
        predict([a, b], out)
    assert sorted(path.name for path in out.glob("*.png")) == ["test-001_mask.png", "test-001_overlay.png"]
    a.write_bytes(good)
    predict([a], out)
    shutil.copy(a, a.with_suffix(".jpg"))
    predict([a, a.with_suffix(".jpg")], out)  # both keep their suffix
    masks = {path.name for path in out.glob("test-000*_mask.png")}
    assert masks == {"test-000.png_mask.png", "test-000.jpg_mask.png"}
    assert len(list(out.glob("test-000*_overlay.png"))) == 2


def test_only_masks_below_the_folder_are_removed(predict, scans, tmp_path):
    """Records that somebody wrote: their paths lead to another folder."""
    a, out = scans / "test-000.png", tmp_path / "out"
    predict([scans / "test-001.png"], tmp_path / "other")
    predict([a], out)
    record = json.loads((out / "predictions.jsonl").read_text())
    for mask in ("../other/test-001_mask.png", str(tmp_path / "other" / "test-001_mask.png")):
        (out / "predictions.jsonl").write_text(json.dumps({**record, "mask": mask}) + "\n")
        predict([a], out)
        assert len(list((tmp_path / "other").glob("*.png"))) == 2


def test_a_file_whose_mask_has_another_name_now_has_one_record(predict, scans, tmp_path):
    a, out = scans / "test-000.png", tmp_path / "out"
    with Image.open(scans / "test-001.png") as picture:
        picture.convert("L").save(a.with_suffix(".jpg"))
    predict([a, a.with_suffix(".jpg")], out)
    a.with_suffix(".jpg").unlink()
    shutil.copy(scans / "test-002.png", a)
    predict([a], out)
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records].count(str(a)) == 1
