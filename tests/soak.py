"""Kill and start again, over and over: `make soak`, or `python tests/soak.py CYCLES SEED`.

Each cycle trains two stages of two folds, on one process or two, kills or stops them at a random moment by a random
signal, starts the same command again until it is done, and compares every leaf of every checkpoint with a run that
nobody disturbed.
"""

import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import forked
import small_run

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EVERY = 2  # steps between checkpoints


@dataclass
class Result:
    """What came out of the cycles so far."""

    cycles: int = 0
    equal: int = 0
    early: int = 0  # the run had ended, or not begun, when the signal came
    lost: list[int] = field(default_factory=list)
    signals: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sent = ", ".join(f"{count} {name}" for name, count in sorted(self.signals.items()))
        return (
            f"cycles {self.cycles} ({sent}; {self.early} of them before or after the training), "
            f"equal endings {self.equal} of {self.cycles}, "
            f"lost steps mean {statistics.mean(self.lost):.2f}, max {max(self.lost)}"
        )


def command(data: Path, runs: Path, world: int) -> list[str]:
    """Two stages of two folds; accumulation, an average of weights, bf16."""
    settings = (f"train.checkpoint_steps={EVERY}", "train.amp=bf16", "train.ema=0.9", "train.keep_best=2")
    return forked.cross_validate(data, runs, *settings, *(["stage.2.schedule=cosine"] if world == 2 else []))


def start(data: Path, runs: Path, world: int, log: Path) -> list[forked.Job]:
    """Start the processes; rank 0 writes the moments it passes to `log`."""
    hook = partial(forked.moments, log)
    arguments = command(data, runs, world)
    if world == 1:
        return [forked.start(*arguments, cwd=runs, hook=hook)]
    return forked.launch(*arguments, cwd=runs, hooks={0: hook})


def steps(log: Path) -> int:
    """Training steps begun."""
    return log.read_text().splitlines().count("step") if log.exists() else 0


def soak(folder: Path, cycles: int, seed: int) -> Result:
    """Run the cycles."""
    data, draw, result = folder / "data", random.Random(seed), Result()
    small_run.write_data(data)
    reference, seconds, wanted = {}, {}, {}
    for world in (1, 2):
        for name in ("warm", "straight"):  # the first start imports everything
            reference[world], log = folder / f"{name}{world}", folder / f"{name}{world}.txt"
            jobs = start(data, reference[world], world, log)
            assert [job.wait(300) for job in jobs] == [0] * world, jobs[0].text
            seconds[world], wanted[world] = time.monotonic() - jobs[0].began, steps(log)
    for cycle in range(cycles):
        world, number = draw.choice((1, 1, 2)), draw.choice(SIGNALS)
        runs, logs = folder / f"cycle{cycle}", [folder / f"cycle{cycle}-{part}.txt" for part in range(2)]
        jobs = start(data, runs, world, logs[0])
        victim = draw.choice(jobs)
        time.sleep(draw.uniform(0.05, 1.0) * seconds[world])
        victim.signal(number)
        codes = [job.wait(120) for job in jobs]
        ended = all(code == 0 for code in codes)
        jobs = start(data, runs, world, logs[1])
        again = [job.wait(300) for job in jobs]
        wrong = (
            [f"ended with {again}: {jobs[0].complaints}"]
            if any(again)
            else forked.differing_files(reference[world], runs)
        )
        result.cycles += 1
        result.signals[number.name] = result.signals.get(number.name, 0) + 1
        result.equal += not wrong
        result.early += ended or not steps(logs[0])
        result.lost.append(max(0, steps(logs[0]) + steps(logs[1]) - wanted[world]))
        result.wrong += [f"cycle {cycle} ({world} processes, {number.name}): {line}" for line in wrong]
        print(
            f"{cycle + 1}: {world} x, {number.name}, codes {codes}: {'equal' if not wrong else 'NOT EQUAL'}", flush=True
        )
        if not wrong:
            shutil.rmtree(runs)
    return result


def main() -> int:
    """Soak as the command line says; 1 where an ending differs."""
    cycles, seed = (int(word) for word in sys.argv[1:3])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), cycles, seed)
    print("\n".join([*result.wrong, f"{result}; {time.monotonic() - began:.0f} s"]))
    return int(result.equal < result.cycles)


if __name__ == "__main__":
    sys.exit(main())
