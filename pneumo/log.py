"""What a run says: a line to read, a JSON line to plot, a bar to watch, a status file.

Imports checkpoint, dist, errors.
"""

import json
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pneumo import checkpoint, dist
from pneumo.errors import printable

tqdm.set_lock(threading.RLock())  # its own serves several processes and leaks a semaphore from one that is killed


def say(message: str) -> None:
    """Print one line on process 0, above any progress bar."""
    if dist.is_main():
        tqdm.write(printable(message), file=sys.stdout)
        sys.stdout.flush()


def warn(message: str) -> None:
    """Print one warning line to stderr on process 0."""
    if dist.is_main():
        tqdm.write(f"warning: {printable(message)}", file=sys.stderr)


def bar(items: Iterable[Any] | None = None, *, total: int | None = None, title: str, start: int = 0) -> tqdm:
    """A progress bar on process 0; silent elsewhere and where stderr is no terminal."""
    return tqdm(
        items,
        total=total,
        desc=title,
        initial=start,
        leave=False,
        dynamic_ncols=True,
        disable=None if dist.is_main() else True,  # None: only on a terminal
    )


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write all records, one JSON object a line; the whole file, so that a resumed run has no gaps and no doubles."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    checkpoint.write_atomic(path, text.encode())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read what `write_jsonl` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_status(folder: Path, state: str, **details: Any) -> None:
    """Replace status.json: `state` is running, stopped, done or failed."""
    checkpoint.write_atomic(folder / "status.json", json.dumps({"state": state, **details}).encode() + b"\n")


def read_status(folder: Path) -> dict[str, Any]:
    """The run folder's status; {"state": "missing"} where nothing ran."""
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"state": "missing"}
