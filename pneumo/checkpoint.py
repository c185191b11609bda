"""Checkpoints that are never half-written, never silently damaged, and hold tensors and plain Python only.

A run folder has one writer at a time. Imports errors.
"""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import io
import os
import re
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from pneumo.errors import (
    DataError,
    FolderGoneError,
    NoSpaceError,
    NotFiniteError,
    OutOfMemory,
    UsageError,
    WriteError,
    one_line,
)

FORMAT = 1
INSTEAD = "another place, as with --set runs=DIR or --out DIR"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, largest file

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # of flock, where a file system does not do it
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of fsync, where it does not do it for a folder
_NOT_ITS_FAULT = (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
_held: dict[Path, IO[str]] = {}  # lock files of the folders that this process is the writer of
_TEMPORARY = re.compile(r"(?s)(.+)\.([1-9][0-9]*)\.tmp")  # a name of `temporary`


class _UnreadableError(DataError):
    """A file that may be good, but that this process is not allowed, or not able, to read."""


def save(state: dict[str, Any], path: Path, *, keep: Path | None = None) -> None:
    """Write a checkpoint so that at every moment a whole one is on the disk.

    Args:
        state: tensors and plain Python, nested in dicts and lists.
        path: written beside itself as .tmp, made durable, then renamed.
        keep: what was at `path` before is kept under this name.

    Raises:
        NotFiniteError: a floating-point tensor holds NaN or infinity; nothing is written.
        NoSpaceError, WriteError: no space, no permission; what was there is intact.
    """
    if name := not_finite(state):
        raise NotFiniteError(f"{path} was not written: {name} is not finite. The previous one is intact.")
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomic(path, buffer.getvalue(), keep=keep)


def not_finite(state: Any) -> str:
    """The dotted name of the first floating-point tensor that holds NaN or infinity; "" if there is none."""
    for name, tensor in leaves(state):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return ""


def write_atomic(path: Path, content: bytes, *, keep: Path | None = None) -> None:
    """Replace a file's content, all or nothing, and durably.

    Raises:
        FolderGoneError: its folder is no longer the one that this process has locked.
        NoSpaceError, WriteError: no space, no permission; what was there is intact.
    """
    check_held(path.parent)
    unfinished = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if not isinstance(error, OSError):  # Ctrl-C
            raise
        if error.errno not in NO_SPACE:
            raise WriteError(
                f"Cannot save {path}: {error.strerror or error}. What was there is intact. {_way_out(error)}."
            ) from error
        place = next(folder for folder in path.parents if folder.exists())
        free = shutil.disk_usage(place).free
        raise NoSpaceError(
            f"Cannot save {path}: {megabytes(len(content))} needed, {megabytes(free)} free on {place}"
            f"{'' if free < len(content) else f' ({error.strerror})'}. What was there is intact."
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in it durable, where the file system can."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(opened)


def refusal(path: Path | str, error: OSError, instead: str = INSTEAD) -> WriteError:
    """The error for what the system refused to write or make.

    Args:
        instead: what could be chosen in place of the path.
    """
    kind = NoSpaceError if error.errno in NO_SPACE else WriteError
    return kind(f"Cannot write {path}: {error.strerror or error}. {_way_out(error, instead)}.")


@contextlib.contextmanager
def writing(path: Path, *, instead: str = INSTEAD) -> Iterator[None]:
    """Within, whatever the system refuses is the `refusal` of the path."""
    try:
        yield
    except OSError as error:
        raise refusal(path, error, instead) from error


def _way_out(error: OSError, instead: str = INSTEAD) -> str:
    if error.errno in NO_SPACE:
        return "Free space, then run the same command"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"Allow writing there, or choose {instead}"
    return f"Choose {instead}"


def temporary(path: Path) -> Path:
    """Where this process makes what shall be at `path` once it is whole; no other one writes there."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def abandoned(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Those of `paths` that `temporary` named for a process that is gone, and the names they should have got.

    A user's own .tmp file is none of ours.
    """
    for path in paths:
        if (name := _TEMPORARY.fullmatch(path.name)) and not _at_work(name[2]):
            yield path, name[1]


def _at_work(pid: str) -> bool:
    """Whether another process of that number runs; one that was killed has no command line."""
    try:
        return int(pid) != os.getpid() and Path("/proc", pid, "cmdline").read_bytes() != b""
    except OSError:
        return False


def clean(paths: Iterable[Path], *names: str) -> None:
    """Remove the files among `paths` that killed processes left half-written.

    Args:
        names: patterns, as in a shell, of what they should have become; all others stay.
    """
    for path, name in abandoned(paths):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in names) and path.is_file():
            path.unlink()


def megabytes(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e6:.0f} MB" if count > 9.5e6 else f"{count / 1e6:.2g} MB"


def read(path: Path) -> Any:
    """Read a file that torch.save wrote, onto the CPU, running nothing that is in it.

    Raises:
        DataError: missing, damaged (any flipped bit of a zip archive's content is found), or holds anything but tensors
            and plain Python; or this process may or can not read it.
        OutOfMemory: it does not fit in what memory is left.
    """
    try:
        if zipfile.is_zipfile(path):  # files of torch before 1.6 are none
            with zipfile.ZipFile(path) as archive:
                if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                    raise DataError(
                        f"{path} cannot be read: it would unpack to more than it is, as torch never writes."
                    )
                bad = archive.testzip()
            if bad is not None:
                raise DataError(f"{path} is damaged (CRC of {one_line(bad)} differs).")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except Exception as error:  # zipfile, pickle and torch raise a dozen types on damaged or hostile files
        text = one_line(error)
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
            raise OutOfMemory(
                f"{path}: not enough memory to read it ({megabytes(path.stat().st_size)}); it was left as it is. Close "
                f"other programs."
            ) from None
        if isinstance(error, OSError) and error.errno in _NOT_ITS_FAULT:
            raise _UnreadableError(
                f"{path} cannot be read: {error.strerror}; it was left as it is. Mend that, then run the same command."
            ) from None
        if code := re.search(r"[Uu]nsupported (?:class|global):? (?:GLOBAL )?(\S+)|GLOBAL (\S+)", text):
            reason = f"it asks for code ({one_line(code[1] or code[2])}), which was not run"
        else:
            reason = f"it is cut off, damaged or something else ({path.stat().st_size:,} bytes)"
        raise DataError(f"{path} cannot be read: {reason}.") from None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        DataError: as `read` does, or it is of another format.
    """
    state = read(path)
    _check_format(state, path)
    return state


def _check_format(state: Any, path: Path) -> None:
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        newer = isinstance(found, int) and found > FORMAT
        raise DataError(
            f"{path} is no checkpoint of this program's format {FORMAT} (found: {found!r})."
            + (" A newer version of this program wrote it; use that one." if newer else "")
        )


def load_last(folder: Path) -> tuple[dict[str, Any], Path, list[str]] | None:
    """Read the newest good checkpoint of a run folder: last.pt, else prev.pt.

    Returns:
        The state, the file it came from and warnings to print; None if the folder has neither file.

    Raises:
        DataError: there are files, but none is good: never start afresh silently. Or one is whole but of another
            format, or cannot be read by no fault of its own.
    """
    complaints: list[str] = []
    last, previous = folder / "last.pt", folder / "prev.pt"
    if previous.exists() and not last.exists() and not any(folder.glob("last.pt.corrupt")):
        complaints.append(f"{last} is not there: the run ended while it was replaced.")
    for path in (last, previous):
        if not path.exists():
            continue
        try:
            state = read(path)
        except _UnreadableError:
            raise
        except DataError as error:
            corrupt = path.with_name(path.name + ".corrupt")
            os.replace(path, corrupt)
            complaints.append(f"{error} Kept as {corrupt.name}.")
            continue
        _check_format(state, path)  # whole, so it is not put aside
        return state, path, complaints
    if complaints or any(folder.glob("*.pt.corrupt")):
        raise DataError(
            f"{folder}: no good checkpoint is left. {' '.join(complaints)} "
            f"Delete the folder to start this stage anew, or restore last.pt."
        )
    return None


def leaves(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dicts and lists, with its dotted name."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else None
    if items is None:
        yield name, state
    else:
        for key, value in items:
            yield from leaves(value, f"{name}.{key}" if name else str(key))


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A hash of weights, 64 hex digits; not of what else a file holds, as the seconds that it took."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def sha256(path: Path) -> str:
    """The file's hash, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(folder: Path, *, instead: str = "another recipe or --set runs=DIR") -> Iterator[None]:
    """Hold a run folder against a second writer; released when the process ends, however it ends.

    What an earlier writer left half-written is removed.

    Args:
        instead: what else a second one could choose, for the error.

    Raises:
        UsageError: another process holds it; names that process.
        WriteError: the folder cannot be made, or nothing can be written in it, or its file system has no locks.
    """
    with _open_lock(folder / "lock", instead) as file, contextlib.ExitStack() as stack:
        with writing(folder, instead=instead):
            try:
                _take(file, fcntl.LOCK_NB, instead)
            except BlockingIOError:
                raise UsageError(f"{folder} is in use by {_holder(file)}. Stop it, or choose {instead}.") from None
            _sign(file)
        _held[folder] = file
        stack.callback(_held.pop, folder)
        clean(folder.glob("*.tmp"), "*")
        yield
        file.seek(0)
        file.truncate()


def check_held(folder: Path) -> None:
    """Refuse to go on writing into a folder that somebody has removed, or put another in place of, since it was locked.

    A second run could have started there, and hold the lock of the new one.

    Raises:
        FolderGoneError: says so; never of a folder that this process has not locked.
    """
    if folder in _held:
        try:
            same = os.path.samestat(os.stat(folder / "lock"), os.fstat(_held[folder].fileno()))
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            raise FolderGoneError(f"{folder}: the folder was removed or replaced under this run, which ends here.")


@contextlib.contextmanager
def wait_lock(path: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Hold a lock file while the processes that want it as well wait their turn.

    On a file system that is read-only nobody has to wait, and nothing is held.

    Args:
        say: is told, once, whom a wait is for that takes longer than a moment.

    Raises:
        WriteError: it cannot be made, or its file system has no locks.
    """
    if is_read_only(path.parent):
        yield
        return
    with _open_lock(path) as file:
        with writing(path):
            for _ in range(40):
                try:
                    _take(file, fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
            else:
                say(f"{path}: waiting for {_holder(file)}, which holds it")
                _take(file, 0)
        with contextlib.suppress(OSError):  # on a full disk nothing may be left to do
            _sign(file)
        yield
        with contextlib.suppress(OSError):
            os.truncate(file.fileno(), 0)


def _take(file: IO[str], how: int, instead: str = INSTEAD) -> None:
    """Lock a file for this process alone.

    Args:
        how: LOCK_NB not to wait, else 0.
        instead: what could be chosen in place of the file's folder.

    Raises:
        BlockingIOError: another process has it, and `how` says not to wait.
        WriteError: its file system has no locks, as some of clusters; processes would write at the same time.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise WriteError(
            f"Cannot lock {file.name}: {error.strerror}. Its file system has no locks, which keep processes from "
            f"writing at the same time. Mount it with them (Lustre: -o flock), or choose {instead}."
        ) from error


def is_read_only(folder: Path) -> bool:
    """Whether a folder is there, on a file system that nobody can write to."""
    return os.path.isdir(folder) and os.statvfs(folder).f_flag & os.ST_RDONLY != 0


def _sign(file: IO[str]) -> None:
    """Write into a lock file who holds it."""
    os.truncate(file.fileno(), 0)
    os.write(file.fileno(), f"process {os.getpid()} (since {time.strftime('%H:%M')})".encode())


def _holder(file: IO[str]) -> str:
    for _ in range(20):  # it may have just come
        file.seek(0)
        if holder := file.read().strip():
            return holder
        time.sleep(0.05)
    return "another process"


def _open_lock(path: Path, instead: str = INSTEAD) -> IO[str]:
    """Open a lock file; it and its folder are made if they are not there."""
    with writing(path, instead=instead):
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+")
