"""Real processes for the fault tests: forked from a server that has torch and timm imported already.

Each runs a command of the project as a user would start it, and can be killed as one. What goes wrong in it on purpose
is a hook: a function of this module that is called in the child before the command is.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import small_run

from pneumo import checkpoint

REPO = Path(__file__).resolve().parents[1]
Hook = Callable[[], None]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["forked", "pneumo.inference", "pneumo.report"])


@dataclass
class Job:
    """A started process; its output goes to `path`.out and `path`.err."""

    process: Any
    path: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.process.is_alive():
            os.kill(self.pid, number)

    def wait(self, timeout: float = 60.0) -> int:
        """The exit code, -9 for SIGKILL; a process that takes longer is killed and fails the test."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)
            self.process.join()
            raise AssertionError(f"still running after {timeout} s: {self.text}")
        return self.process.exitcode

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.path.with_suffix(".out").read_text() + self.path.with_suffix(".err").read_text()

    @property
    def complaints(self) -> list[str]:
        """Lines of its stderr that are no warnings."""
        lines = self.path.with_suffix(".err").read_text().splitlines()
        return [line for line in lines if not line.startswith("warning: ")]


def start(
    *arguments: str,
    cwd: Path,
    hook: Hook | None = None,
    environment: dict[str, str] | None = None,
) -> Job:
    """Start `python ARGUMENTS`: a script of the project, or "pneumo" for -m pneumo."""
    cwd.mkdir(parents=True, exist_ok=True)
    path = cwd / f"job-{time.monotonic_ns()}"
    for suffix in (".out", ".err"):
        path.with_suffix(suffix).touch()
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "tests")])  # where the server starts now
    try:
        process = _server.Process(target=_child, args=(arguments, cwd, path, hook, environment or {}))
        process.start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return Job(process, path)


def launch(
    *arguments: str,
    cwd: Path,
    world: int = 2,
    hooks: dict[int, Hook] | None = None,
) -> list[Job]:
    """Start the processes of a launch without torchrun, which is slow."""
    port = free_port()
    return [
        start(*arguments, cwd=cwd, hook=(hooks or {}).get(rank), environment=place(rank, world, port))
        for rank in range(world)
    ]


def place(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would tell a process of its place."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def train(root: Path, runs: Path, *more: str, fold: int = 0, stage: int = 1) -> list[str]:
    """The command line that trains a stage on the data of `small_run`, saving after every step."""
    options = [*small_run.settings(root, runs), "train.checkpoint_steps=1", *more]
    return ["train.py", "--fold", str(fold), "--stage", str(stage), "--set", *options]


def cross_validate(root: Path, runs: Path, *more: str) -> list[str]:
    """The command line that trains stages 1 and 2 of both of two folds."""
    options = [*small_run.settings(root, runs), "train.checkpoint_steps=1", "stages=2", "folds.count=2", *more]
    return ["pneumo", "cv", "--set", *options]


def differing_files(a: Path, b: Path) -> list[str]:
    """Names and leaves that are not the same in two runs folders' checkpoints and logs; prev.pt is of no matter."""
    files = [sorted(path.relative_to(runs) for path in runs.glob("*/fold*/*/*.pt")) for runs in (a, b)]
    wrong = [] if files[0] == files[1] else [f"{files[0]} are not {files[1]}"]
    assert len(files[0]) >= 2
    for path in files[0]:
        if path.name != "prev.pt" and (b / path).exists():
            states = [checkpoint.load(runs / path) for runs in (a, b)]
            wrong += [f"{path} {key}" for key in small_run.differing(*states)]
    for path in sorted(a.glob("*/fold*/*/log.jsonl")):
        lines = [(runs / path.relative_to(a)).read_text().splitlines() for runs in (a, b)]
        epochs = [[json.loads(line)["epoch"] for line in part] for part in lines]
        wrong += [] if epochs[0] == epochs[1] else [f"{path.name} has epochs {epochs[1]}"]
    return wrong


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], Any], timeout: float = 30.0) -> Any:
    """The first true value of `condition`, asked again and again."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return value


def _child(arguments: Sequence[str], cwd: Path, path: Path, hook: Hook | None, environment: dict[str, str]) -> None:
    for number, name, suffix in ((1, "stdout", ".out"), (2, "stderr", ".err")):
        os.dup2(os.open(path.with_suffix(suffix), os.O_WRONLY | os.O_APPEND), number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, encoding="utf-8", closefd=False))
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    os.chdir(cwd)
    if hook is not None:
        hook()
    first, *rest = arguments
    sys.argv = [first, *rest]
    if first.endswith(".py"):
        sys.argv[0] = str(REPO / first)
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(first, run_name="__main__", alter_sys=True)


# Hooks. ---------------------------------------------------------------------------------------------------------


def before(module: Any, name: str, action: Callable[..., None]) -> None:
    """Call `action` with a function's arguments each time before the function itself."""
    real = getattr(module, name)

    def both(*arguments: Any, **options: Any) -> Any:
        action(*arguments, **options)
        return real(*arguments, **options)

    setattr(module, name, both)


def _kill(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def moments(log: Path, at: int = -1, number: int = signal.SIGKILL, what: str | None = None) -> None:
    """Count the moments of a run at which something may be half done, write them to `log`, and end at one of them.

    Before each training step, before and within each validation, with each file written but not yet in place, between
    the renames that put a checkpoint there, and after them. With `what`, only moments of that name are counted: of
    several processes, the one that comes first prepares the data, so that the number of all moments varies.
    """
    from pneumo import checkpoint, engine
    from pneumo.decision import metrics

    count = 0

    def moment(name: str) -> None:
        nonlocal count
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")
        if what in (None, name):
            if count == at:
                _kill(number)
            count += 1

    class Os:
        """The module os as checkpoint sees it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def replace(self, source: Path, target: Path) -> None:
            moment(f"before {target.name}")
            os.replace(source, target)
            moment(f"after {target.name}")

    checkpoint.os = Os()
    before(engine, "train_step", lambda *_, **__: moment("step"))
    before(engine, "evaluate", lambda *_, **__: moment("validation"))
    before(metrics, "dice_runs", lambda *_, **__: moment("within validation"))


def die_while_saving(place: str) -> None:
    """End while last.pt is replaced for the first time: "written" (beside it), "between" the renames, or "after"."""
    from pneumo import checkpoint

    class Os:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def replace(self, source: Path, target: Path) -> None:
            if place == "written" and target.name in ("prev.pt", "last.pt"):
                _kill()
            if place == "between" and target.name == "last.pt":
                _kill()
            os.replace(source, target)
            if place == "after" and target.name == "last.pt":
                _kill()

    checkpoint.os = Os()


def at_step(step: int, action: Callable[[], None]) -> None:
    """Do something before the step of this number, from 1, of this process."""
    from pneumo import engine

    taken = 0

    def count(*_: Any, **__: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            action()

    before(engine, "train_step", count)


def fail_at_step(step: int, message: str) -> None:
    """Raise a DataError, as a bad image would."""
    from pneumo.errors import DataError

    def fail() -> None:
        raise DataError(message)

    at_step(step, fail)


def sleep_at_step(step: int, seconds: float) -> None:
    at_step(step, partial(time.sleep, seconds))


def wait_for_gpus(step: int, seconds: float) -> None:
    """Wait for the other processes before a step, and get no error if they do not come: as one does through NCCL."""
    from pneumo import dist

    def wait() -> None:
        dist._meet()
        time.sleep(seconds)

    at_step(step, wait)


def after_a_wait(before_it: float, after_it: float) -> None:
    """Before the first step wait for process 0, and work alone for so many seconds before and after that."""
    from pneumo import dist

    def wait() -> None:
        time.sleep(before_it)
        dist.wait_for_main()
        time.sleep(after_it)

    at_step(1, wait)


def late_after_the_last_meeting(seconds: float) -> None:
    """Take a while to leave after all have said good-bye."""
    import torch.distributed

    meet = torch.distributed.barrier

    def slowly() -> None:
        meet()
        time.sleep(seconds)

    torch.distributed.barrier = slowly


def signal_at_step(step: int, *numbers: int) -> None:
    def send() -> None:
        for number in numbers:
            _kill(number)

    at_step(step, send)


def lose_folder_at_step(step: int, folder: Path, again: bool) -> None:
    """Delete a run folder before a step, and make it again as the next run does."""

    def lose() -> None:
        shutil.rmtree(folder)
        if again:
            folder.mkdir()
            (folder / "lock").touch()

    at_step(step, lose)


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def slow_at(names: Sequence[str], seconds: float) -> None:
    """Sleep before these functions of pneumo, each "module.name", or "module.np.name" for one of numpy's."""
    for name in names:
        module, _, function = name.rpartition(".")
        room = np if module.endswith(".np") else importlib.import_module(f"pneumo.{module}")
        before(room, function, lambda *_, **__: time.sleep(seconds))


def damage_last_before_saving() -> None:
    """Damage last.pt once there is a prev.pt, before something is saved."""

    def damage(_state: Any, path: Path, **_: Any) -> None:
        last = path.parent / "last.pt"
        if last.exists() and (path.parent / "prev.pt").exists():
            last.write_bytes(last.read_bytes()[:-9])

    before(checkpoint, "save", damage)


def raise_at_step(step: int, name: str, message: str, number: int = 0) -> None:
    """Raise an exception, "module.name", after a signal if one is given."""
    module, _, kind = name.rpartition(".")
    error = getattr(importlib.import_module(module), kind)(message)

    def fail() -> None:
        if number:
            _kill(number)
        raise error

    at_step(step, fail)


def allocate_at_step(step: int) -> None:
    """Ask for more memory than any host has."""
    import torch

    at_step(step, lambda: torch.empty(1 << 50))


def interrupt_in(name: str) -> None:
    """Ctrl-C within a function of pneumo, "module.name"."""
    module, _, function = name.rpartition(".")
    before(importlib.import_module(f"pneumo.{module}"), function, lambda *_, **__: _kill(signal.SIGINT))


def clock_a_year_back() -> None:
    real = time.time
    time.time = lambda: real() - 365 * 86400


def hub(environment: dict[str, str]) -> None:
    """Look at the hub as if the program had been started with these variables; they are read on import."""
    import huggingface_hub

    constants = huggingface_hub.constants
    constants.HF_HUB_OFFLINE = environment["HF_HUB_OFFLINE"] == "1"
    constants.HF_HUB_CACHE = environment["HF_HUB_CACHE"]
    constants.ENDPOINT = environment.get("HF_ENDPOINT", constants.ENDPOINT)


def spoil(kind: str, first: int, last: int) -> None:
    """Make the "loss" infinite, or "pixel"s NaN, in the steps of these numbers, from 1, of this process."""
    from pneumo import engine, training
    from pneumo.model import losses

    taken = 0
    real_loss, real_augmented = losses.loss, training.augmented

    def count(*_: Any, **__: Any) -> None:
        nonlocal taken
        taken += 1

    def loss(*arguments: Any, **options: Any) -> Any:
        return real_loss(*arguments, **options) * (float("inf") if kind == "loss" and first <= taken <= last else 1.0)

    def augmented(*arguments: Any) -> Any:
        image, mask = real_augmented(*arguments)
        if kind == "pixel" and first <= taken <= last:
            image[0, 0, 5, 5] = float("nan")
        return image, mask

    before(engine, "train_step", count)
    losses.loss, training.augmented = loss, augmented


def spoil_weights(step: int) -> None:
    """A NaN in the weights after the step before this one."""
    from pneumo import engine

    taken = 0

    def spoil_now(model: Any, *_: Any, **__: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            model.head.bias.data.fill_(float("nan"))

    before(engine, "train_step", spoil_now)


@dataclass
class Threads:
    """As on a host of so many cores; a hook."""

    count: int

    def __call__(self) -> None:
        os.sched_getaffinity = lambda _: set(range(self.count))


def outputs(kind: str) -> None:
    """Have standard output and error "closed", their reader "gone", the "full" disk behind the first, or "ascii"."""
    if kind == "closed":
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = None
    elif kind == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
    elif kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    else:
        sys.stdout.reconfigure(encoding="ascii", errors="strict")
        sys.stderr.reconfigure(encoding="ascii", errors="strict")
