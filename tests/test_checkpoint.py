import errno
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from pneumo import checkpoint
from pneumo.errors import DataError, FolderGoneError, NoSpaceError, NotFiniteError, UsageError, WriteError


def state(value: float = 1.0) -> dict:
    return {"model": {"w": torch.full((300,), value)}, "position": {"epoch": 2, "history": [{"dice": 0.5}]}}


def test_round_trip(tmp_path):
    checkpoint.save(state(), tmp_path / "last.pt")
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert loaded["format"] == checkpoint.FORMAT
    assert torch.equal(loaded["model"]["w"], torch.ones(300))
    assert loaded["position"] == state()["position"]
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]  # no temporary file stays


def test_the_one_before_is_kept(tmp_path):
    for value in (1.0, 2.0):
        checkpoint.save(state(value), tmp_path / "last.pt", keep=tmp_path / "prev.pt")
    assert checkpoint.load(tmp_path / "prev.pt")["model"]["w"][0] == 1
    assert checkpoint.load(tmp_path / "last.pt")["model"]["w"][0] == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_written(tmp_path, bad):
    checkpoint.save(state(), tmp_path / "last.pt")
    with pytest.raises(NotFiniteError, match=r"model\.w is not finite"):
        checkpoint.save(state(bad), tmp_path / "last.pt")
    assert checkpoint.load(tmp_path / "last.pt")["model"]["w"][0] == 1


@pytest.mark.fault("R7", "a write that ends with ENOSPC, without a mount")
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(state(), tmp_path / "last.pt")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpaceError, match=r"last\.pt: .* MB needed, \d+ MB free on .* \(No space left"):
        checkpoint.save(state(2.0), tmp_path / "last.pt", keep=tmp_path / "prev.pt")
    assert checkpoint.load(tmp_path / "last.pt")["model"]["w"][0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_never_afresh_where_all_is_damaged(tmp_path):
    assert checkpoint.load_last(tmp_path) is None
    (tmp_path / "last.pt").write_bytes(b"x")
    for _ in range(2):  # the second time as well, when only the corrupt file is left
        with pytest.raises(DataError, match="no good checkpoint is left"):
            checkpoint.load_last(tmp_path)


def test_ctrl_c_while_it_writes_leaves_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "rule.toml"
    path.write_text("before")

    def interrupted(_file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomic(path, b"after")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


@pytest.mark.fault("R8", "a checkpoint of 30 kB that unpacks to 30 MB")
def test_a_bomb_is_not_unpacked(tmp_path, figure):
    whole, path = tmp_path / "whole.pt", tmp_path / "last.pt"
    checkpoint.save({"model": {"w": torch.zeros(8_000_000)}}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(DataError, match="would unpack to more than it is"):
        checkpoint.load(path)
    figure(f"{path.stat().st_size:,} bytes, which hold {whole.stat().st_size:,}, refused")


def test_other_formats_are_named(tmp_path):
    torch.save({"format": 99}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"format 1 .found: 99.\. A newer version of this program wrote it"):
        checkpoint.load(tmp_path / "a.pt")
    torch.save([1], tmp_path / "a.pt")
    with pytest.raises(DataError, match="found: 'list'"):
        checkpoint.load(tmp_path / "a.pt")
    with pytest.raises(DataError, match="no such file"):
        checkpoint.load(tmp_path / "b.pt")


def test_no_file_of_the_package_turns_safe_loading_off(repo: Path):
    sources = [*repo.glob("*.py"), *repo.glob("pneumo/**/*.py")]
    assert len(sources) > 10
    assert [p for p in sources if "weights_only=False" in p.read_text()] == []


def test_only_what_a_dead_process_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    unburied = subprocess.Popen([sys.executable, "-c", ""])  # a zombie: nobody waits for it
    dead.wait()
    os.waitid(os.P_PID, unburied.pid, os.WEXITED | os.WNOWAIT)
    gone = {f"last.pt.{pid}.tmp" for pid in (dead.pid, unburied.pid, os.getpid(), 10**12)}
    kept = {f"last.pt.{os.getppid()}.tmp", "last.pt.tmp", "my.tmp", "last.pt.0.tmp", "last.pt.7.draft.tmp", "7.tmp"}
    for name in gone | kept:
        (tmp_path / name).write_text("x")
    (tmp_path / f"notes.{dead.pid}.tmp").mkdir()
    checkpoint.clean(tmp_path.iterdir(), "best.*")
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == gone | kept
    with checkpoint.lock(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {*kept, f"notes.{dead.pid}.tmp", "lock"}
    unburied.wait()


def test_a_second_writer_is_refused_by_the_firsts_number(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from pneumo import checkpoint\n"
        f"with checkpoint.lock(Path({str(tmp_path)!r})):\n    print('held', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"in use by process {first.pid} "), checkpoint.lock(tmp_path):
            pass
    finally:
        first.kill()
        first.communicate()
    with checkpoint.lock(tmp_path):  # killed, it holds nothing
        pass


@pytest.mark.parametrize("seconds", [0.2, 3.5])
def test_a_wait_tells_whom_it_is_for(tmp_path, seconds):
    hold = (
        "import time; from pathlib import Path; from pneumo import checkpoint\n"
        f"with checkpoint.wait_lock(Path({str(tmp_path)!r}, 'lock'), print):\n"
        f"    print('held', flush=True); time.sleep({seconds})"
    )
    first = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    said: list[str] = []
    with checkpoint.wait_lock(tmp_path / "lock", said.append):
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()
    assert (tmp_path / "lock").read_text() == ""
    first.communicate()
    assert len(said) == (seconds > 1)
    assert all(f"lock: waiting for process {first.pid} (since " in line for line in said)


@pytest.mark.parametrize("how", ["removed", "lock removed", "replaced"])
def test_a_folder_that_is_gone_is_not_written_to(tmp_path, how):
    folder = tmp_path / "run"
    with checkpoint.lock(folder):
        checkpoint.write_atomic(folder / "status.json", b"")
        (folder / "lock").unlink()
        if how != "lock removed":
            shutil.rmtree(folder)
        if how == "replaced":
            folder.mkdir()
            (folder / "lock").touch()
        with pytest.raises(FolderGoneError, match=r"run: the folder was removed or replaced under this run"):
            checkpoint.write_atomic(folder / "last.pt", b"")
        assert folder.exists() == (how != "removed") and not (folder / "last.pt").exists()
    checkpoint.write_atomic(folder / "last.pt", b"")


def test_a_lock_that_cannot_be_made_says_so(tmp_path):
    too_long = tmp_path / ("x" * 300) / "lock"
    for held in (checkpoint.lock(too_long), checkpoint.wait_lock(too_long, print)):
        with pytest.raises(WriteError, match=r"Cannot write .*/lock: File name too long. Choose another"), held:
            pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint.fcntl, "flock", flock)
    for held, instead in (
        (checkpoint.lock(tmp_path / "run"), "another recipe"),
        (checkpoint.wait_lock(tmp_path / "lock", print), "another place"),
    ):
        with pytest.raises(WriteError, match=rf"lock: {os.strerror(code)}\. .* no locks.* or choose {instead}"), held:
            pass


def test_a_folder_that_cannot_be_synced_is_no_trouble_unless_the_disk_is(tmp_path, monkeypatch):
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", synced)
    code = errno.EINVAL
    checkpoint.write_atomic(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    code = errno.EIO
    with pytest.raises(WriteError, match="Input/output error"):
        checkpoint.write_atomic(tmp_path / "a", b"y")


def test_what_is_written_is_on_the_disk_before_it_has_its_name_and_so_is_the_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def replaced(old: Path, new: Path) -> None:
        done.append(f"{old.name} to {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    path = tmp_path / "last.pt"
    path.touch()
    checkpoint.write_atomic(path, b"x", keep=tmp_path / "prev.pt")
    temporary = checkpoint.temporary(path).name
    wanted = [f"sync {temporary}", "last.pt to prev.pt", f"{temporary} to last.pt", f"sync {tmp_path.name}"]
    assert done == wanted


def test_a_disk_that_has_no_room_is_not_filled(tmp_path, monkeypatch):
    """Other programs would stop for it."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _place: usage._replace(free=3))
    checkpoint.write_atomic(tmp_path / "a", b"abc")
    monkeypatch.setattr(checkpoint.os, "fsync", None)  # nothing is written
    with pytest.raises(NoSpaceError, match=r"needed, .* free on .*\. What was there is intact\.$"):
        checkpoint.write_atomic(tmp_path / "a", b"abcd")
    assert (tmp_path / "a").read_bytes() == b"abc" and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_last_is_said_once(tmp_path):
    """Gone on with from prev.pt and stopped again: last.pt was not lost while it was replaced."""
    checkpoint.save(state(), tmp_path / "prev.pt")
    (tmp_path / "last.pt").write_bytes(b"x")
    _, path, (complaint,) = checkpoint.load_last(tmp_path)
    assert path.name == "prev.pt" and "Kept as last.pt.corrupt" in complaint
    assert checkpoint.load_last(tmp_path)[2] == []
