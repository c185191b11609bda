"""Checkpoints that are damaged, hostile, of other settings or of another version."""

import errno
import os
import re
import shutil
import signal
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import forked
import pytest
import timm
import torch

from pneumo import checkpoint, log
from pneumo.errors import DataError, OutOfMemory

STAGE = Path("seed") / "fold0" / "stage1"


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A run killed at its last step, and the files of the same run without a break."""
    folder = tmp_path_factory.mktemp("stopped")
    straight, half = folder / "straight", folder / "half"
    assert forked.start(*forked.train(data, straight), cwd=straight).wait() == 0
    job = forked.start(*forked.train(data, half), cwd=half, hook=partial(forked.signal_at_step, 4, signal.SIGKILL))
    assert job.wait() == -9
    return straight, half


@pytest.fixture
def half(stopped, tmp_path):
    """A copy of the killed run to do harm to; `go_on` starts it again."""
    shutil.copytree(stopped[1], tmp_path / "runs")
    return tmp_path / "runs"


def go_on(data: Path, runs: Path, *more: str) -> forked.Job:
    """The killed run's command again, on the copy."""
    return forked.start(*forked.train(data, runs, *more), cwd=runs)


SHARES = [0, 0.001, 0.01, 0.5, 0.9, 0.999]


@pytest.mark.fault("R5", "last.pt cut to 0, 0.1, 1, 50, 90 and 99.9 %; loaded")
def test_a_truncated_checkpoint_is_put_aside_for_the_one_before(half, figure):
    folder = half / STAGE
    last, previous = (folder / name for name in ("last.pt", "prev.pt"))
    content, wanted = last.read_bytes(), checkpoint.load(previous)
    for share in SHARES:
        last.write_bytes(content[: int(len(content) * share)])
        state, path, (complaint,) = checkpoint.load_last(folder)
        assert path == previous and state["position"] == wanted["position"]
        assert complaint.startswith(f"{last} ") and complaint.endswith("Kept as last.pt.corrupt.")
        assert (folder / "last.pt.corrupt").exists() and not last.exists()
    figure(f"{len(SHARES)} of {len(SHARES)} fell back to prev.pt")


REASONS = [
    (PermissionError(errno.EACCES, "Permission denied"), DataError, r"cannot be read: Permission denied; it was left"),
    (
        OSError(errno.EIO, "Input/output error"),
        DataError,
        r"cannot be read: Input/output error; it was left as it is\.",
    ),
    (MemoryError(), OutOfMemory, r"not enough memory to read it \([\d.]+ MB\); it was left as it is\."),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory, r"not enough memory to read it"),
]


@pytest.mark.fault(
    "R17", "memory, permission or the disk fails while good checkpoints are read: they stay what they are"
)
def test_what_is_not_the_checkpoints_fault_leaves_it_alone(half, monkeypatch, figure):
    folder = half / STAGE
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt*")}
    for reason, kind, message in REASONS:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", Mock(side_effect=reason))
            with pytest.raises(kind, match=rf"last\.pt.*{message}") as caught:
                checkpoint.load_last(folder)
        assert "\n" not in str(caught.value)
        assert {path.name: path.read_bytes() for path in folder.glob("*.pt*")} == before
    assert checkpoint.load_last(folder)[1] == folder / "last.pt"
    figure(f"{len(REASONS)} of {len(REASONS)} named, nothing renamed")


@pytest.mark.fault("R5", "the end of last.pt cut off, the run started again: said, and equal in the end")
def test_a_run_goes_on_from_the_checkpoint_before(data, stopped, half, figure):
    last = half / STAGE / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    job = go_on(data, half)
    assert job.wait() == 0, job.text
    last_bytes = r"last\.pt cannot be read: it is cut off, damaged or something else \([\d,]+ bytes\)\."
    then = r" Kept as last\.pt\.corrupt\. Continuing from prev\.pt, epoch 2, step 0 \(6 images earlier\)\.\n"
    assert re.search(last_bytes + then, job.text), job.text
    assert forked.differing_files(stopped[0], half) == []
    figure("equal")


@pytest.mark.fault("R5", "last.pt and prev.pt both damaged: exit 3, twice, and nothing is begun anew")
def test_nothing_good_is_left(data, half, figure):
    for name in ("last.pt", "prev.pt"):
        (half / STAGE / name).write_bytes(b"")
    for _ in range(2):
        job = go_on(data, half)
        assert job.wait() == 3
        (line,) = job.complaints
        assert "no good checkpoint is left" in line and "Delete the folder to start this stage anew" in line
    assert not (half / STAGE / "last.pt").exists()
    figure("exit 3, 2 of 2")


def test_a_name_within_a_damaged_archive_cannot_break_the_line(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/\x1b[2J\nerror: b" + "c" * 300, b"first")
    path.write_bytes(path.read_bytes().replace(b"first", b"other"))
    with pytest.raises(DataError, match=r"w\.pt is damaged \(CRC of a/\\x1b\[2J error: bc{96}\.\.\. differs\)\.$"):
        checkpoint.read(path)


def test_a_damaged_log_is_named_by_line(tmp_path):
    path = tmp_path / "log.jsonl"
    log.write_jsonl(path, [{"epoch": 1}, {"epoch": 2}])
    good = path.read_bytes()
    assert log.read_jsonl(path) == [{"epoch": 1}, {"epoch": 2}]
    for bad in (good[:-3], good.replace(b'{"epoch": 2}', b"[2]"), good[:13] + b"\xff\n", good[:13] + b"[" * 100_000):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"log\.jsonl line 2 is damaged: .* Start the stage's training again"):
            log.read_jsonl(path)


@pytest.mark.parametrize("line", [b'{"loss": 1}', b'{"epoch": "1", "loss": 1}', b'{"epoch": true, "loss": 1}'])
def test_a_log_line_without_a_number_that_is_drawn_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"epoch": 1, "loss": null}\n' + line + b"\n")
    assert len(log.read_jsonl(path)) == 2
    with pytest.raises(
        DataError, match=r"log\.jsonl line 2 is damaged: it holds no number 'epoch'\. Start the stage's"
    ):
        log.read_jsonl(path, ("epoch", "loss"))


@pytest.mark.fault("R6", "200 random bits of a training checkpoint flipped, one at a time")
def test_every_flipped_bit_is_found(half, figure):
    path = half / STAGE / "best.pt"
    good, wanted = path.read_bytes(), dict(checkpoint.leaves(checkpoint.load(path)))
    generator = torch.Generator().manual_seed(0)
    found = harmless = 0
    for _ in range(200):
        place = int(torch.randint(len(good) * 8, (1,), generator=generator))
        damaged = bytearray(good)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            loaded = dict(checkpoint.leaves(checkpoint.load(path)))
        except DataError:
            found += 1
            continue
        assert loaded.keys() == wanted.keys()
        assert all(
            torch.equal(loaded[key], value) if isinstance(value, torch.Tensor) else loaded[key] == value
            for key, value in wanted.items()
        )
        harmless += 1  # the archive's padding
    assert found > 150
    figure(f"{found} of 200 refused, {harmless} in padding with every leaf as it was, 0 unnoticed")


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.fault("R8", "a pickle that runs a command, as last.pt and prev.pt, best.pt of a stage before, and weights")
def test_a_hostile_file_runs_nothing(data, half, tmp_path, figure):
    owned = tmp_path / "owned"
    hostile = tmp_path / "hostile.pt"
    torch.save({"format": checkpoint.FORMAT, "x": Hostile(f"touch '{owned}'")}, hostile)
    for name in ("last.pt", "prev.pt", "best.pt"):
        shutil.copy(hostile, half / STAGE / name)
    status = half / STAGE / "status.json"
    status.write_text(status.read_text().replace('"running"', '"done"'))
    jobs = [
        go_on(data, half),
        forked.start(*forked.train(data, half, stage=2), cwd=half),
        forked.start(*forked.train(data, tmp_path / "new", f"model.pretrained={hostile}"), cwd=tmp_path),
    ]
    assert [job.wait() for job in jobs] == [3, 3, 3]
    for job in jobs:
        (line,) = job.complaints
        assert "asks for code" in line and "system" in line and "which was not run" in line
    assert not owned.exists()
    figure("3 of 3 refused, posix.system named, nothing run")


@pytest.mark.fault("R9", "gone on with other epochs, rate, image size, seed, data, processes; a newer format")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("stage.1.epochs=1", r"stage\.1\.epochs: 2 -> 1"),
        ("stage.1.lr=3e-3", r"stage\.1\.lr: 0\.001 -> 0\.003"),
        ("stage.1.image_size=96", r"stage\.1\.image_size: 64 -> 96"),
        ("seed=1", "seed: 0 -> 1"),
        ("train.amp=off", r"autocast: torch\.\w+ -> torch\.float32|train\.amp: auto -> off"),
        ("train.ema=0.9", r"train\.ema: 0\.0 -> 0\.9"),
        ("rows", "images or annotations: [0-9a-f]{12} -> [0-9a-f]{12}"),
        ("processes", "processes: 1 -> 2"),
        ("format", r"last\.pt is no checkpoint of this program's format 1 \(found: 2\)\. A newer version"),
    ],
)
def test_other_settings_are_named(data, half, tmp_path, figure, change, named):
    before = (half / STAGE / "last.pt").read_bytes()
    if change == "processes":
        jobs = forked.launch(*forked.train(data, half), cwd=half)
    elif change == "format":
        torch.save({**checkpoint.load(half / STAGE / "last.pt"), "format": 2}, half / STAGE / "last.pt")
        before = (half / STAGE / "last.pt").read_bytes()
        jobs = [go_on(data, half)]
    elif change == "rows":
        root = tmp_path / "data"
        shutil.copytree(data, root)
        table = root / "train-rle.csv"
        table.write_text(table.read_text().replace("train-001,-1", "train-001,5 5"))
        jobs = [go_on(root, half)]
    else:
        jobs = [go_on(data, half, change)]
    assert jobs[0].wait() == (3 if change == "format" else 2)
    (line,) = jobs[0].complaints
    assert re.search(named, line), line
    assert (half / STAGE / "last.pt").read_bytes() == before
    for job in jobs[1:]:
        job.wait()
    figure(f"{change}: named")


@pytest.mark.fault("R9", "made by another version of torch: said, and gone on with")
def test_another_version_is_said(data, half, figure):
    path = half / STAGE / "last.pt"
    state = checkpoint.load(path)
    state["versions"]["torch"] = "2.0.0"
    torch.save(state, path)
    job = go_on(data, half)
    assert job.wait() == 0
    assert f"made with torch 2.0.0 -> {torch.__version__}" in job.text
    assert timm.__version__ == checkpoint.load(path)["versions"]["timm"]
    figure("said")
