"""Commands side by side on one host, each on its own GPU, or on its share of the cores.

Imports errors.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from queue import Queue

import torch

from pneumo.errors import PneumoError


class JobFailed(PneumoError):
    """A command ended with an exit code other than 0."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def run(commands: Sequence[tuple[str, list[str]]], jobs: int) -> None:
    """Run commands, at most `jobs` at a time; each line that they print comes out with the command's name.

    The first failure stops all: the others get SIGTERM, as they do when this process gets it or is interrupted, and
    are waited for, so that each saves its checkpoint.

    Args:
        commands: name and arguments of each.

    Raises:
        JobFailed: the first command that failed, with its exit code; 128 + n after signal n.
    """
    waiting, ended = list(reversed(commands)), Queue()
    running: dict[int, tuple[str, subprocess.Popen]] = {}  # by place: a GPU, or a share of the cores
    failure: JobFailed | None = None
    stopped = [0]

    def stop(number: int, _frame: object = None) -> None:
        stopped[0] = stopped[0] or number
        for _, process in running.values():
            process.terminate()

    old = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while running or (waiting and failure is None and not stopped[0]):
            while waiting and len(running) < jobs and failure is None and not stopped[0]:
                place = min(set(range(jobs)) - running.keys())
                name, arguments = waiting.pop()
                running[place] = name, _start(name, arguments, place, jobs, ended)
                if stopped[0]:  # the signal came while it was started
                    running[place][1].terminate()
            place = ended.get()
            name, process = running.pop(place)
            code = process.wait()
            if code and failure is None:
                code = code if code > 0 else 128 - code
                failure = JobFailed(f"{name} ended with exit code {code}; see its lines above", code)
                stop(0)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    if stopped[0]:
        raise JobFailed(f"stopped by {signal.Signals(stopped[0]).name}", 128 + stopped[0])
    if failure is not None:
        raise failure


def _start(name: str, arguments: list[str], place: int, jobs: int, ended: Queue) -> subprocess.Popen:
    """Start one command, and a thread that passes its lines on and reports its end."""
    process = subprocess.Popen(
        arguments,
        env={**os.environ, **_share(place, jobs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches it through this process alone, once
    )

    def pass_on() -> None:
        for line in process.stdout:
            sys.stdout.write(f"{name}: {line}")
            sys.stdout.flush()
        process.stdout.close()
        ended.put(place)

    threading.Thread(target=pass_on, daemon=True).start()
    return process


def _share(place: int, jobs: int) -> dict[str, str]:
    """The environment that gives a command its part of this host."""
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        return {"CUDA_VISIBLE_DEVICES": names[place % len(names)]}
    threads = max((os.cpu_count() or 1) // jobs, 1)
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
