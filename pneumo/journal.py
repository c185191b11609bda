"""What a prediction has finished, line by line in files, so that an interrupted one goes on where it was.

A line is the CRC of its JSON, a blank and the JSON: first a dict, the basis, which is all that the results depend on,
then lists of a key and its result. A line that was cut off or damaged is no line.

Imports checkpoint, dist, log, errors.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pneumo import checkpoint, dist, log
from pneumo.errors import WriteError


@contextlib.contextmanager
def open_journal(folder: Path, basis: dict[str, Any], *, instead: str) -> Iterator["Journal"]:
    """Hold a folder against a second prediction, and read what earlier, interrupted ones left in it.

    All processes of a launch call this together.

    Args:
        basis: JSON; what was made on another one is thrown away, and the user is told so.
        instead: what a second prediction could choose in place of this folder.

    Raises:
        UsageError: another prediction holds the folder.
        WriteError: no space or no permission.
    """
    with checkpoint.lock(folder, instead=instead) if dist.is_main() else contextlib.nullcontext():
        journal = Journal(folder, basis)
        try:
            yield journal
        except KeyboardInterrupt:
            log.warn("stopped; the same command goes on from here")
            raise
        finally:
            journal.close()


class Journal:
    """The finished parts of a prediction. Each process appends to a file of its own, so nobody waits.

    Attributes:
        parts: result by key, of all processes of earlier runs.
    """

    def __init__(self, folder: Path, basis: dict[str, Any]) -> None:
        self.folder = folder
        header = _line(basis)
        parts: dict[str, Any] = {}
        changed: list[str] = []
        outdated: list[Path] = []
        for path in self._own_files():
            first, *others = _read(path) or [None]
            if first is not None and _line(first) == header:
                parts |= dict(others)
            else:
                outdated.append(path)
                changed += log.changes(first, json.loads(log.dumps(basis))) if others else []
        found = dist.gather((parts, changed))  # from here on the first process holds the lock
        self.parts: dict[str, Any] = {key: result for part, _ in found for key, result in part.items()}
        if said := sorted({change for _, some in found for change in some}):
            log.warn(f"{folder} holds an unfinished prediction of another kind ({'; '.join(said)}); it starts anew")
        for path in outdated:
            path.unlink()
        path = folder / f"{dist.rank()}.jsonl"
        self._path = path
        with checkpoint.writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._file).st_size
        if size == 0:
            self._append(header)
        elif os.pread(self._file, 1, size - 1) != b"\n":
            self._append(b"\n")  # after a line that was cut off

    def add(self, key: str, result: Any) -> None:
        """Note a finished part, durably.

        Args:
            result: JSON.

        Raises:
            WriteError: the disk is full; what was noted before is intact.
        """
        self._append(_line([key, result]))

    def finish(self) -> None:
        """Forget everything: the results stand in files of their own."""
        if dist.is_main():
            for path in self.folder.glob("*.jsonl"):
                path.unlink()

    def close(self) -> None:
        os.close(self._file)

    def _own_files(self) -> list[Path]:
        """The files that this process reads: its own, and its share of those of a run with more processes."""
        files = {int(path.stem): path for path in self.folder.glob("*.jsonl") if path.stem.isdecimal()}
        return [path for number, path in sorted(files.items()) if number % dist.world() == dist.rank()]

    def _append(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError as error:
            raise WriteError(
                f"Cannot write {self._path}: {error.strerror}. What was predicted so far is kept. Free space, then run "
                f"the same command."
            ) from error


def _line(value: Any) -> bytes:
    text = log.dumps(value).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read(path: Path) -> list[Any]:
    """The whole lines of a file; none if its first one, the basis, is not whole."""
    lines = [line.partition(b" ") for line in path.read_bytes().split(b"\n")]
    good = [crc == b"%08x" % zlib.crc32(text) for crc, _, text in lines]
    return [json.loads(line[2]) for line, whole in zip(lines, good, strict=True) if whole] if good[0] else []
