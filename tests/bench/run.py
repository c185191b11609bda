"""Measure everything against what people would use instead: a table, and runs/bench.json.

    PYTHONPATH=tests python -m bench.run        BENCH=quick: at most 50 seconds; BENCH=smoke: only that it runs

Imports cli, checkpoint, engine.
"""

import gc
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench import rivals, rows
from bench.elsewhere import Elsewhere
from bench.harness import measure, table
from bench.rows import Setup

from pneumo import cli
from pneumo.checkpoint import write_atomic
from pneumo.engine import autocast_dtype

REPEATS = {"full": 5, "quick": 3, "smoke": 1}


def hardware(device: torch.device) -> str:
    """The device by name, and the CPU with its cores."""
    names = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line
    ]
    cpu = f"{torch.get_num_threads()} cores of {names[0] if names else platform.machine()}"
    return f"{torch.cuda.get_device_name(device)}, {cpu}" if device.type == "cuda" else cpu


def versions() -> dict[str, str]:
    """Of torch and of all rivals."""
    return {name: importlib.metadata.version(name) for name in ("torch", "timm", "numpy", *rivals.PACKAGES)}


def run(size: str, device: torch.device, only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Measure all rows, or those of the groups whose names hold one of `only`; each as soon as it is done."""
    groups = rows.GPU + rows.HOST if device.type == "cuda" else rows.CPU + rows.HOST
    if size == "smoke":
        groups = rows.CPU + rows.GPU + rows.HOST
    about = {"hardware": hardware(device), "versions": versions(), "date": date.today().isoformat(), "size": size}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Elsewhere("bench.rivals") as elsewhere:
        setup = Setup(device, size, Path(folder), elsewhere)
        for group in groups:
            if only and not any(name in group.__name__ for name in only):
                continue
            for row in group(setup):
                result = {**measure(row, REPEATS[size], device), **about}
                passed = f"{time.perf_counter() - start:4.0f} s "
                print(passed + table([result]).splitlines()[-1], file=sys.stderr, flush=True)
                yield result
                del row
                gc.collect()


def main() -> int:
    """Write the file and print the table; arguments name groups to measure alone, which writes nothing."""
    cli.keep_freed_memory()  # as our program does
    warnings.filterwarnings("ignore")  # the rivals' own
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for result in run(os.environ.get("BENCH") or "full", device, sys.argv[1:]):
        results.append(result)
        if not sys.argv[1:]:  # so that what was measured stays when a later row ends it
            write_atomic(Path("runs/bench.json"), (json.dumps(results, indent=1) + "\n").encode())
    if not results:
        print(f"no rows of a group named {' or '.join(sys.argv[1:])} on this device", file=sys.stderr)
        return 2
    about = results[0]
    print(table(results))
    runs = [result["runs"] for result in results if result["runs"] > 1] or [1]
    missed = sum(result["met"] is False for result in results)
    if "bf16" in "".join(result["row"] for result in results) and autocast_dtype("auto", device) != torch.bfloat16:
        print("\nThis device has no units for bf16 and imitates it, slowly; train.amp=auto does not take it here.")
    print(
        f"\n{about['hardware']}, {about['date']}, {', '.join(f'{k} {v}' for k, v in about['versions'].items())}; "
        f"{about['size']}, medians of {min(runs)} to {max(runs)}; {missed} of {len(results)} targets missed; "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
