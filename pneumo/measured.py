"""What was measured on a device, kept beside the runs, so that the next run there computes the same.

Imports checkpoint, dist, log, errors.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pneumo import checkpoint, dist, log
from pneumo.errors import DataError, WriteError

FILE = "measured.json"


def once(runs: Path, key: str, measure: Callable[[], Any]) -> Any:
    """What `measure` gave when it was first asked under this key; all processes of a launch call this together.

    Args:
        runs: the folder of all runs; its measured.json holds the answers.
        key: names the device and all else that the answer depends on.
        measure: gives JSON; is called by one process.

    Returns:
        The same on every process. Where nothing can be written it is measured each time.
    """
    return dist.broadcast(_once(runs / FILE, key, measure) if dist.is_main() else None)


def _once(path: Path, key: str, measure: Callable[[], Any]) -> Any:
    known = _read(path)
    if key in known:
        return known[key]
    answer: Any = None
    try:
        with checkpoint.wait_lock(path.with_suffix(".lock"), log.say):  # another run may be measuring the same
            known = _read(path)
            if key not in known:
                answer = known[key] = measure()
                checkpoint.write_atomic(path, json.dumps(known, indent=1).encode())
            return known[key]
    except WriteError:
        return measure() if answer is None else answer


def _read(path: Path) -> dict[str, Any]:
    try:
        return log.read_json(path)
    except (OSError, DataError):  # not there, or damaged: measured anew
        return {}
