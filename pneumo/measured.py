"""What was measured on a device, kept beside the runs, so that the next run there computes the same.

Imports checkpoint, dist, log, errors.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pneumo import checkpoint, dist, log
from pneumo.errors import DataError

FILE = "measured.json"


def once(runs: Path, key: str, measure: Callable[[], Any]) -> Any:
    """What `measure` gave when it was first asked under this key; all processes of a launch call this together.

    Args:
        runs: the folder of all runs; its measured.json holds the answers.
        key: names the device and all else that the answer depends on.
        measure: gives JSON; is called by one process.

    Returns:
        The same on every process.

    Raises:
        WriteError: no space or no permission.
    """
    answer = None
    if dist.is_main():
        path = runs / FILE
        with checkpoint.wait_lock(path.with_suffix(".lock")):
            known = {}
            with suppress(FileNotFoundError, DataError):  # damaged: measured anew
                known = log.read_json(path)
            if key not in known:
                known[key] = measure()
                checkpoint.write_atomic(path, json.dumps(known, indent=1).encode())
            answer = known[key]
    return dist.broadcast(answer)
