"""A disk that fills up: a small file system, mounted for the test."""

import subprocess
from pathlib import Path

import forked
import pytest
import small_run

from pneumo import checkpoint, dataset
from pneumo.errors import WriteError

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

    def read_only(self) -> None:
        self._mount("remount,ro")

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


@pytest.mark.fault("R24", "runs/ on a read-only file system: the data are loaded; a pack that is not whole is named")
def test_a_read_only_disk(repo, data, disk, figure):
    small = disk(20)
    recipe = small_run.recipe(repo, data, small.place)
    before = dataset.load(recipe)
    dataset.open_train(recipe, before, 96)
    (rows,) = small.place.glob("pack/train-96-*/rows.npy")
    rows.write_bytes(rows.read_bytes()[:-8] + bytes(8))  # the last one is not done
    small.read_only()
    loaded = dataset.load(recipe)
    assert (loaded.digest, loaded.split) == (before.digest, before.split)
    assert dataset.open_train(recipe, loaded, 64).images.any()
    with pytest.raises(WriteError, match=r"Cannot write .*pack/train-96.*: Read-only file system\. Allow writing"):
        dataset.open_train(recipe, loaded, 96)
    figure("loaded")


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
