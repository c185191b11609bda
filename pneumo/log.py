"""What a run says: a line to read, a JSON line to plot, a bar to watch, a status file.

Imports checkpoint, dist, errors.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pneumo import checkpoint, dist
from pneumo.errors import DataError, printable

LINE_SECONDS = 60.0  # between two lines of a bar that is no bar

tqdm.set_lock(threading.RLock())  # its own serves several processes and leaks a semaphore from one that is killed


def say(*lines: str) -> None:
    """Print lines on process 0, above any progress bar; a line end within one, as of a file's name, is escaped."""
    if dist.is_main():
        tqdm.write("\n".join(map(printable, lines)), file=sys.stdout)
        sys.stdout.flush()


def warn(message: str) -> None:
    """Print one warning line to stderr on process 0."""
    if dist.is_main():
        tqdm.write(f"warning: {printable(message)}", file=sys.stderr)


class Lines:
    """A progress bar where stderr is no terminal, as in a batch job: a line every minute.

    Args:
        items, total, title, start: as of `bar`.
    """

    def __init__(self, items: Iterable[Any] | None, total: int | None, title: str, start: int) -> None:
        self.items, self.title, self.start = items, title, start
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.done, self.postfix = start, ""
        self.began = self.said = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        """Count, and print a line if the last was long ago."""
        self.done = self.done + count if self.total is None else min(self.done + count, self.total)
        now = time.monotonic()
        if now - self.said < LINE_SECONDS:
            return
        self.said = now
        line = tqdm.format_meter(
            self.done,
            self.total,
            now - self.began,
            prefix=self.title,
            initial=self.start,
            postfix=self.postfix,
            bar_format="{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left{postfix}",
        )
        print(printable(line), file=sys.stderr, flush=True)

    def set_postfix(self, *, refresh: bool = True, **values: str) -> None:
        """What the next line ends with."""
        self.postfix = ", ".join(f"{name}={value}" for name, value in values.items())

    def close(self) -> None:
        """Nothing is left to do."""


def bar(items: Iterable[Any] | None = None, *, total: int | None = None, title: str, start: int = 0) -> tqdm | Lines:
    """A progress bar on process 0, or a line every minute where stderr is no terminal; silent on other processes."""
    if dist.is_main() and not sys.stderr.isatty():
        return Lines(items, total, title, start)
    return tqdm(
        items,
        total=total,
        desc=title,
        initial=start,
        leave=False,
        dynamic_ncols=True,
        disable=not dist.is_main(),
    )


def in_threads(work: Callable[[Any], Any], items: Sequence[Any], title: str) -> Iterator[Any]:
    """Results in order, behind a bar, a thread for each core: what decodes or hashes lets go of the interpreter's lock.

    Close it where it is not read to its end, so that nothing goes on.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            yield from bar(pool.map(work, items), total=len(items), title=title)
        finally:
            pool.shutdown(cancel_futures=True)


def dumps(value: Any, *, indent: int | None = None) -> str:
    """JSON for others to read, which knows no infinity and no NaN: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write all records, one JSON object a line; the whole file, so that a resumed run has no gaps and no doubles."""
    text = "".join(dumps(record) + "\n" for record in records)
    checkpoint.write_atomic(path, text.encode())


def read_jsonl(path: Path, numbers: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read what `write_jsonl` wrote.

    Args:
        numbers: keys that each line must have, with a number or null.

    Raises:
        DataError: a line is damaged; names it.
    """
    try:
        found = []
        for count, line in enumerate(path.read_bytes().splitlines(), 1):
            where = f"{path} line {count}"
            found.append(_object(line, where))
            for key in numbers:
                if key not in found[-1] or type(found[-1][key]) not in (int, float, type(None)):
                    raise DataError(f"{where} is damaged: it holds no number {key!r}")
        return found
    except DataError as error:
        raise DataError(
            f"{error}. Start the stage's training again: where it is done, that only writes this file."
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Replace a file by one JSON value, for people to read as well."""
    checkpoint.write_atomic(path, dumps(value, indent=1).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        FileNotFoundError: not there.
        DataError: damaged; names it.
    """
    return _object(path.read_bytes(), str(path))


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):  # cut, not UTF-8, numbers and brackets without end
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{where} is damaged: it holds no JSON object")
    return found


def write_status(folder: Path, state: str, **details: Any) -> None:
    """Replace status.json: `state` is running, stopped, done or failed."""
    checkpoint.write_atomic(folder / "status.json", dumps({"state": state, **details}).encode() + b"\n")


def read_status(folder: Path) -> dict[str, Any]:
    """The run folder's status; {"state": "missing"} where nothing ran, or a damaged file does not tell."""
    path = folder / "status.json"
    try:
        status = read_json(path)
        counts = [status.get(key, 0) for key in ("epoch", "epochs", "images_seen")]
        if not isinstance(status.get("state"), str) or not all(isinstance(count, int) for count in counts):
            raise DataError(f"{path} is damaged: it holds no status")
        if "epoch" in status and "epochs" not in status:
            raise DataError(f"{path} is damaged: it has no epochs")
        return status
    except FileNotFoundError:
        pass
    except DataError as error:
        warn(f"{error}. It counts as missing; training the stage again mends it.")
    return {"state": "missing"}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Which keys differ, and how: "key: before -> now", dotted where nested; the key alone where values are long."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        if (before := old.get(key)) != (now := new.get(key)):
            if isinstance(before, Mapping) and isinstance(now, Mapping):
                found += [f"{key}.{change}" for change in changes(before, now)]
            else:
                change = f"{key}: {before} -> {now}"
                found.append(change if len(change) < 100 else key)
    return found
