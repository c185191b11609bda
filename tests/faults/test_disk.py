"""A disk that fills up: a small file system, mounted for the test."""

import os
import subprocess
from pathlib import Path

import forked
import numpy as np
import pytest
import small_run
from PIL import Image

from pneumo import checkpoint

STAGE = Path("seed") / "fold0" / "stage1"


class Disk:
    """A mounted tmpfs."""

    def __init__(self, place: Path, megabytes: float) -> None:
        self.place = place
        place.mkdir()
        self._mount(f"size={int(megabytes * 1024)}k")

    def _mount(self, options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.place], check=True, capture_output=True)

    def grow(self, megabytes: float) -> None:
        self._mount(f"remount,size={int(megabytes * 1024)}k")

    def fill(self, leave: int) -> Path:
        """Fill all but `leave` bytes."""
        stat = os.statvfs(self.place)
        path = self.place / "filler"
        path.write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - leave)))
        return path

    def close(self) -> None:
        subprocess.run(["umount", self.place], check=True)


@pytest.fixture
def disk(tmp_path):
    """A disk of a size in MB."""
    made = []

    def make(megabytes: float) -> Disk:
        try:
            made.append(Disk(tmp_path / "disk", megabytes))
        except (PermissionError, FileNotFoundError, subprocess.CalledProcessError):
            pytest.skip("may not mount a file system here")
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("straight")
    assert forked.start(*forked.train(data, runs), cwd=runs).wait() == 0
    return runs


def sizes(runs: Path) -> tuple[float, float]:
    """MB of last.pt and of best.pt."""
    return tuple((runs / STAGE / name).stat().st_size / 2**20 for name in ("last.pt", "best.pt"))


@pytest.mark.fault("R7", "the disk has no room for a second checkpoint; then it grows and the same command goes on")
def test_no_room_for_a_checkpoint(data, straight, disk, tmp_path, figure):
    last, _ = sizes(straight)
    place = disk(1.5 * last + 0.5)
    job = forked.start(*forked.train(data, place.place), cwd=tmp_path)
    assert job.wait() == 5
    (line,) = job.complaints
    assert f"error: Cannot save {place.place / STAGE / 'last.pt'}: {last * 2**20 / 1e6:.2g} MB needed, " in line
    assert f" MB free on {place.place / STAGE}. What was there is intact." in line
    assert "For this run, last.pt is from epoch 1, step 1. Free space, then run the same command." in line
    assert checkpoint.load(place.place / STAGE / "last.pt")["position"]["step"] == 1
    assert not list((place.place / STAGE).glob("*.tmp"))
    status = forked.status(place.place / STAGE)
    assert status["state"] == "failed" and "Cannot save" in status["reason"]
    place.grow(64)
    assert forked.start(*forked.train(data, place.place), cwd=tmp_path).wait() == 0
    assert forked.differing_files(straight, place.place) == []
    figure("exit 5 with both sizes, the checkpoint before loads, equal after the disk grew")


@pytest.mark.fault("R7", "room for two checkpoints but not for three: the oldest makes room")
def test_the_oldest_makes_room(data, straight, disk, tmp_path, figure):
    last, best = sizes(straight)
    place = disk(2.5 * last + best + 0.5)
    job = forked.start(*forked.train(data, place.place), cwd=tmp_path)
    assert job.wait() == 0, job.text
    assert job.text.count(f"Removing {place.place / STAGE / 'prev.pt'} to make room.") >= 1
    assert forked.differing_files(straight, place.place) == []
    figure("done, equal")


@pytest.mark.fault("R7", "a damaged last.pt: then prev.pt is not given up for room")
def test_the_only_good_one_is_not_given_up(data, straight, disk, tmp_path, figure):
    last, best = sizes(straight)
    place = disk(2.5 * last + best + 0.5)
    hook = forked.damage_last_before_saving
    job = forked.start(*forked.train(data, place.place), cwd=tmp_path, hook=hook)
    assert job.wait() == 5, job.text
    assert "Removing" not in job.text
    assert checkpoint.load(place.place / STAGE / "prev.pt")
    figure("exit 5, prev.pt loads")


@pytest.mark.fault("R7", "no room for masks, predictions.jsonl, submission.csv: exit 5, the old submission stays")
def test_no_room_for_predictions(data, repo, disk, tmp_path, figure):
    place = disk(64)
    runs, options = place.place / "runs", ["--set", *small_run.settings(data, place.place / "runs")]
    small_run.pretend_trained(small_run.recipe(repo, data, runs))
    assert forked.start("predict.py", *options, cwd=tmp_path).wait() == 0
    submission = runs / "seed" / "submission.csv"
    before = submission.read_bytes()
    place.fill(0)
    again = forked.start("predict.py", *options, cwd=tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (900, 900), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    files = forked.start(
        "predict.py", str(tmp_path / "noise.png"), "--out", str(place.place / "masks"), *options, cwd=tmp_path
    )
    for job in (again, files):
        assert job.wait() == 5, job.text
        (line,) = job.complaints
        assert "No space left" in line or " MB needed, " in line
    assert submission.read_bytes() == before
    figure("2 of 2 exit 5, submission.csv as it was")
