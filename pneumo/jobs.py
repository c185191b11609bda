"""Folds side by side on one host: a process for each, on a GPU of its own where there are any.

Imports dist, log, start, errors.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for

import torch

from pneumo import dist, log, start
from pneumo.errors import OutOfMemory, PeerError, PneumoError, Stopped, UsageError


def run_folds(folds: Sequence[int], jobs: int, command: Callable[[int], Sequence[str]]) -> None:
    """Run a command for each fold, several at a time; what they print is shown, marked by its fold.

    Each has a GPU of its own; on a CPU they share the cores. A fold that fails does not stop the others. A
    signal that asks to end is passed on, and no further fold is started.

    Args:
        folds: in the order in which they start.
        jobs: how many run at a time.
        command: gives the words of a fold's command.

    Raises:
        UsageError: fewer GPUs than jobs.
        PneumoError: folds failed, or were stopped by a signal of their own; has the exit code of the first, where a
            signal killed it that of a lack of memory (SIGKILL) or of a process that is gone.
        Stopped: after a signal.
    """
    gpus = _gpus()
    if gpus and len(gpus) < jobs:
        raise UsageError(f"{jobs} jobs want a GPU each, but {len(gpus)} are visible; use JOBS={len(gpus)} or fewer")
    threads = max(len(os.sched_getaffinity(0)) // jobs, 1)
    free = list(reversed(gpus)) if gpus else [""] * jobs
    running: dict[int, subprocess.Popen] = {}
    failed: list[tuple[int, int]] = []
    caught: list[int] = []
    lock = threading.Lock()

    def one(fold: int) -> None:
        with lock:
            if caught:
                return
            gpu = free.pop()
            environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
            environment[dist.JOB] = str(os.getpid())
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpu
            process = running[fold] = subprocess.Popen(
                command(fold),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a Ctrl-C comes through here, once
            )
            if caught:  # while it started
                process.send_signal(caught[0])
        with process:
            for line in process.stdout:
                log.say(f"[fold {fold}] {line.rstrip()}")
        code = process.returncode
        with lock:
            del running[fold]
            free.append(gpu)
            if code:
                failed.append((fold, code))

    def pass_on(number: int, _frame: object) -> None:
        caught.append(number)
        for process in list(running.values()):
            process.send_signal(number)

    old = {number: signal.signal(number, pass_on) for number in start.endings()}
    try:
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(one, fold) for fold in folds]
            while wait_for(futures, timeout=0.5).not_done:  # a wait without end would hold back the signal
                pass
        for future in futures:
            future.result()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    if caught:
        stopped = Stopped(f"stopped by {signal.Signals(caught[0]).name}; the same command goes on")
        stopped.exit_code = 128 + caught[0]
        raise stopped
    if failed:
        raise _failure(failed, len(folds))


def _failure(failed: Sequence[tuple[int, int]], count: int) -> PneumoError:
    """What to say of folds that did not end well.

    Args:
        failed: folds and their return codes, in the order in which they ended.
        count: of all folds.
    """
    stopped = {128 + number: number for number in start.endings()}
    ended = [str(fold) for fold, code in sorted(failed) if code > 0 and code not in stopped]
    parts = [f"fold {', '.join(ended)} failed, see above"] if ended else []
    for fold, code in sorted(failed):
        if code < 0:
            why = ", perhaps for lack of host memory" if -code == signal.SIGKILL else ""
            parts.append(f"fold {fold} was killed by {signal.Signals(-code).name}{why}")
        elif code in stopped:
            parts.append(f"fold {fold} was stopped by {stopped[code].name}")
    others = "; the others are done" if len(failed) < count else ""
    again = "Once that is mended, the same command goes on" if ended else "The same command goes on"
    error = PneumoError(f"{'; '.join(parts)}{others}. {again}")
    first = failed[0][1]
    killed = OutOfMemory if -first == signal.SIGKILL else PeerError
    error.exit_code = first if first > 0 else killed.exit_code
    return error


def python(*words: str) -> list[str]:
    """A command of this program, by the interpreter that runs."""
    return [sys.executable, "-m", "pneumo", *words]


def _gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if named and named[0].startswith("MIG-"):
        return named  # CUDA shows a process one part of a GPU alone, however many are named
    return named[:count] if named else [str(number) for number in range(count)]
