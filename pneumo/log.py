"""What a run says: a line to read, a JSON line to plot, a bar to watch, a status file.

Imports checkpoint, dist, errors.
"""

import json
import math
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pneumo import checkpoint, dist
from pneumo.errors import printable

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


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read what `write_jsonl` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_status(folder: Path, state: str, **details: Any) -> None:
    """Replace status.json: `state` is running, stopped, done or failed."""
    checkpoint.write_atomic(folder / "status.json", dumps({"state": state, **details}).encode() + b"\n")


def read_status(folder: Path) -> dict[str, Any]:
    """The run folder's status; {"state": "missing"} where nothing ran."""
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"state": "missing"}
