"""A run that is killed or stopped at any moment, and started again with the same command, ends in the same weights."""

import random
import signal
import time
from functools import partial
from pathlib import Path

import forked
import pytest
import soak

from pneumo import checkpoint

VARIANTS = {
    "float32": ("train.amp=off",),
    "bf16": ("train.amp=bf16", "train.checkpoint_steps=2"),
    "fp16": ("train.amp=fp16",),
    "averaged": ("train.amp=bf16", "train.ema=0.9", "train.keep_best=2", "stage.1.epochs=3", "stage.1.schedule=cosine"),
}


class Straight:
    """Runs without a break: `straight(name, command)` gives the runs folder and the moments of each process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known = folder, {}

    def __call__(self, name: str, command, world: int = 1) -> tuple[Path, list[list[str]]]:
        if name not in self.known:
            runs = self.folder / name
            logs = [self.folder / f"{name}-{rank}.txt" for rank in range(world)]
            hooks = {rank: partial(forked.moments, log) for rank, log in enumerate(logs)}
            if world == 1:
                jobs = [forked.start(*command(runs), cwd=runs, hook=hooks[0])]
            else:
                jobs = forked.launch(*command(runs), cwd=runs, world=world, hooks=hooks)
            assert [job.wait() for job in jobs] == [0] * world, jobs[0].text
            self.known[name] = runs, [log.read_text().splitlines() for log in logs]
        return self.known[name]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return Straight(tmp_path_factory.mktemp("straight"))


def chosen(moments: list[str], count: int, seed: int = 0) -> list[int]:
    """Some moments drawn from a seed, and always: the first step, within validation, while a checkpoint is saved."""
    always = ["step", "within validation", "before last.pt", "after last.pt", "before log.jsonl", "after best.pt"]
    last = [len(moments) - 1 - moments[::-1].index(name) for name in ("after last.pt", "before status.json")]
    first = [moments.index(name) for name in always]
    drawn = random.Random(seed).sample(range(len(moments)), len(moments))
    return list(dict.fromkeys([*first[:3], last[0], *first[3:], last[1], *drawn]))[:count]


def kill_and_go_on(command, runs: Path, at: int) -> int:
    """Kill a run at a moment, start it again, and return how many steps were taken twice."""
    logs = [runs / "first.txt", runs / "second.txt"]
    killed = forked.start(*command(runs), cwd=runs, hook=partial(forked.moments, logs[0], at))
    assert killed.wait() == -9, killed.text
    again = forked.start(*command(runs), cwd=runs, hook=partial(forked.moments, logs[1]))
    assert again.wait() == 0, again.text
    moments = [log.read_text().splitlines() if log.exists() else [] for log in logs]
    return sum(part.count("step") for part in moments) - (moments[0][-1] == "step")  # killed before that one


def check_kills(data: Path, folder: Path, straight: Straight, variant: str, count: int, seed: int, figure) -> None:
    command = partial(forked.train, data, **{})
    settings = VARIANTS[variant]
    reference, (moments,) = straight(variant, lambda runs: command(runs, *settings))
    every = 2 if variant == "bf16" else 1
    equal, lost = 0, []
    points = chosen(moments, count, seed)
    for at in points:
        runs = folder / str(at)
        lost.append(kill_and_go_on(lambda runs: command(runs, *settings), runs, at) - moments.count("step"))
        assert forked.differing_files(reference, runs) == [], moments[: at + 1]
        equal += 1
    assert max(lost) <= every
    figure(f"{variant}: {equal} of {len(points)} equal, {max(lost)} steps lost at most (saved every {every})")


@pytest.mark.fault("R1", "killed at moments in training, validation and saving; started again; every leaf compared")
@pytest.mark.parametrize(("variant", "count"), [("float32", 5), ("bf16", 1)])
def test_a_killed_run_ends_in_the_same_weights(data, tmp_path, straight, figure, variant, count):
    check_kills(data, tmp_path, straight, variant, count, 0, figure)


@pytest.mark.slow
@pytest.mark.fault("R1", "the same at more moments, drawn from another seed")
@pytest.mark.parametrize("variant", ["float32", "bf16", "averaged"])
def test_a_killed_run_ends_in_the_same_weights_at_more_moments(data, tmp_path, straight, figure, variant):
    check_kills(data, tmp_path, straight, variant, 10, 1, figure)


@pytest.mark.slow
@pytest.mark.fault("R1", "two folds of two stages killed at moments of all of them; leaves of all checkpoints compared")
def test_killed_across_stages_and_folds(data, tmp_path, straight, figure):
    command = partial(forked.cross_validate, data)
    reference, (moments,) = straight("cv", command)
    stages = [i for i, name in enumerate(moments) if name == "before config.toml"]
    assert len(stages) == 4
    points = [stages[1] - 1, stages[1], stages[2] - 2, stages[2], *chosen(moments, 7, 2)]
    for at in points:
        kill_and_go_on(command, tmp_path / str(at), at)
        assert forked.differing_files(reference, tmp_path / str(at)) == [], moments[: at + 1]
    figure(f"{len(points)} of {len(points)} equal, 4 of them at the stage's edge")


def check_two(data: Path, folder: Path, straight: Straight, points: list[tuple[int, str, int]], figure) -> None:
    """Kill one of two processes, at the n-th moment of a name; the other ends; both start again."""
    settings = ("train.amp=bf16",)
    reference, _ = straight("two", lambda runs: forked.train(data, runs, *settings), 2)
    gone = []
    for number, (rank, what, at) in enumerate(points):
        runs = folder / str(number)
        command = forked.train(data, runs, *settings)
        hook = partial(forked.moments, runs / "moments.txt", at, what=what)
        jobs = forked.launch(*command, cwd=runs, hooks={rank: hook})
        assert jobs[rank].wait() == -9, (rank, what, at)
        began = time.monotonic()
        assert jobs[1 - rank].wait(20) == 7, jobs[1 - rank].text
        gone.append(time.monotonic() - began)
        assert len(jobs[1 - rank].complaints) == 1
        again = forked.launch(*command, cwd=runs)
        assert [job.wait() for job in again] == [0, 0], again[0].text + again[1].text
        assert forked.differing_files(reference, runs) == [], (rank, what, at)
    figure(f"{len(points)} of {len(points)} equal; the other process gone within {max(gone):.1f} s")


@pytest.mark.fault("R1", "one of two processes killed; both started again")
def test_one_of_two_processes_killed(data, tmp_path, straight, figure):
    check_two(data, tmp_path, straight, [(1, "step", 2)], figure)


@pytest.mark.slow
@pytest.mark.fault("R1", "the same for either process, at more moments")
def test_one_of_two_processes_killed_at_more_moments(data, tmp_path, straight, figure):
    points = [(0, "step", 0), (0, "within validation", 3), (0, "before last.pt", 2), (0, "after prev.pt", 4)]
    points += [(0, "before best.pt", 0), (1, "step", 1), (1, "step", 3), (1, "validation", 0), (1, "validation", 1)]
    check_two(data, tmp_path, straight, points, figure)


def check_saving(data: Path, folder: Path, straight: Straight, saves: int, figure) -> None:
    """Kill one run three times at each of its first saves, where it is most delicate."""
    settings = ("train.amp=off", f"stage.1.epochs={saves // 2 + 1}", "train.checkpoint_steps=1")
    reference, _ = straight(f"saves{saves}", lambda runs: forked.train(data, runs, *settings))
    stage, good, found = folder / "seed" / "fold0" / "stage1", 0, []
    command = forked.train(data, folder, *settings)
    for number in range(saves):
        for place in ("written", "between", "after"):
            job = forked.start(*command, cwd=folder, hook=partial(forked.die_while_saving, place))
            assert job.wait() == -9, job.text
            assert (stage / "last.pt").exists() == (number + (place == "after") > 0 and place != "between")
            if number or place == "after":
                state, path, _ = checkpoint.load_last(stage)
                found.append((state["position"]["seen"], path.name))
            else:
                assert checkpoint.load_last(stage) is None  # nothing has been saved yet
            good += 1
            if place == "between" and number:
                assert found[-1][1] == "prev.pt"
    assert [seen for seen, _ in found] == sorted(seen for seen, _ in found)  # never back
    job = forked.start(*command, cwd=folder)
    assert job.wait() == 0, job.text
    assert forked.differing_files(reference, folder) == []
    assert not list(stage.glob("*.tmp"))
    figure(f"{good} of {3 * saves} kills left a good checkpoint, or none before the first; the end is equal")


@pytest.mark.fault("R2", "one run killed with last.pt written beside, between its two renames, and after; at two saves")
def test_killed_while_saving(data, tmp_path, straight, figure):
    check_saving(data, tmp_path, straight, 2, figure)


@pytest.mark.slow
@pytest.mark.fault("R2", "the same at each of 20 saves")
def test_killed_while_saving_again_and_again(data, tmp_path, straight, figure):
    check_saving(data, tmp_path, straight, 20, figure)


@pytest.mark.fault("R2", "started again from prev.pt alone, as a kill between the renames leaves it")
def test_a_start_from_the_checkpoint_before_is_said(data, tmp_path, straight, figure):
    command = forked.train(data, tmp_path, *VARIANTS["float32"])
    reference, (moments,) = straight("float32", lambda runs: forked.train(data, runs, *VARIANTS["float32"]))
    at = moments.index("after prev.pt")
    assert forked.start(*command, cwd=tmp_path, hook=partial(forked.moments, tmp_path / "m", at)).wait() == -9
    again = forked.start(*command, cwd=tmp_path)
    assert again.wait() == 0
    assert "last.pt is not there: the run ended while it was replaced. Continuing from prev.pt, epoch 1, step 1" in (
        again.text
    )
    assert forked.differing_files(reference, tmp_path) == []
    figure("said, and equal")


@pytest.mark.fault("R18", "a run folder deleted while the run is alive, and another started there")
@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_deleted_under_a_run(data, tmp_path, figure, again):
    folder, command = tmp_path / "seed" / "fold0" / "stage1", forked.train(data, tmp_path)
    job = forked.start(*command, cwd=tmp_path, hook=partial(forked.lose_folder_at_step, 2, folder, again))
    assert job.wait() == 5
    (line,) = job.complaints
    assert line == f"error: {folder}: the folder was removed or replaced under this run, which ends here."
    assert sorted(path.name for path in folder.parent.glob("stage1/*")) == (["lock"] if again else [])
    figure("replaced: left alone, exit 5" if again else "not made again, exit 5")


SIGNALS = {
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "SIGHUP": (signal.SIGHUP,),
    "SIGINT, then SIGTERM": (signal.SIGINT, signal.SIGTERM, signal.SIGTERM),
}


@pytest.mark.fault("R4", "signals at a step that saves nothing by itself; saved, started again, every leaf compared")
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_stops_with_a_checkpoint(data, tmp_path, straight, figure, name):
    settings = ("train.amp=off", "train.checkpoint_steps=0")
    reference, _ = straight("signals", lambda runs: forked.train(data, runs, *settings))
    command = forked.train(data, tmp_path, *settings)
    job = forked.start(*command, cwd=tmp_path, hook=partial(forked.signal_at_step, 1, *SIGNALS[name]))
    assert job.wait() == 128 + SIGNALS[name][0]
    (line,) = job.complaints
    assert "The same command goes on from there" in line and SIGNALS[name][0].name in line
    status = forked.status(tmp_path / "seed" / "fold0" / "stage1")
    assert (status["state"], status["signal"]) == ("stopped", SIGNALS[name][0])
    assert 0 < status["images_seen"] < 16
    assert forked.start(*command, cwd=tmp_path).wait() == 0
    assert forked.differing_files(reference, tmp_path) == []
    figure(f"{name}: code {128 + SIGNALS[name][0]}, equal")


COMPILER = {
    "g++": ("torch._dynamo.exc.TorchDynamoException", "CppCompileError: g++"),
    "helpers": ("builtins.RuntimeError", "SubprocPool closed"),
}


@pytest.mark.fault("R4", "a signal that the compiler's own processes have as well, so that it fails")
@pytest.mark.parametrize(("name", "step"), [("g++", 1), ("helpers", 2)])
def test_a_signal_ends_the_compiler_too(data, tmp_path, straight, figure, name, step):
    reference, _ = straight("float32-1", lambda runs: forked.train(data, runs, "train.amp=off"))
    command = forked.train(data, tmp_path, "train.amp=off")
    hook = partial(forked.raise_at_step, step, *COMPILER[name], signal.SIGINT)
    job = forked.start(*command, cwd=tmp_path, hook=hook)
    assert job.wait() == 130
    (line,) = job.complaints
    where = {1: "nothing was saved before", 2: "last.pt is from epoch 1, step 1"}[step]
    assert line.endswith(f"stage1: stopped by SIGINT while it compiled; {where}. The same command goes on.")
    status = forked.status(tmp_path / "seed" / "fold0" / "stage1")
    assert (status["state"], status["signal"], status["step"]) == ("stopped", signal.SIGINT, step - 1)
    assert forked.start(*command, cwd=tmp_path).wait() == 0
    assert forked.differing_files(reference, tmp_path) == []
    figure(f"{name}: code 130, equal")


@pytest.mark.fault("R4", "the same in both of two processes, and in one while the other waits for it")
@pytest.mark.parametrize("hit", [(0, 1), (0,), (1,)])
def test_a_signal_ends_the_compiler_of_one_of_two(data, tmp_path, straight, figure, hit):
    reference, _ = straight("compiled-2", lambda runs: forked.train(data, runs), 2)
    command = forked.train(data, tmp_path)
    hook = partial(forked.raise_at_step, 2, *COMPILER["helpers"], signal.SIGTERM)
    jobs = forked.launch(*command, cwd=tmp_path, hooks=dict.fromkeys(hit, hook))
    assert [job.wait(20) for job in jobs] == [143 if rank in hit else 7 for rank in range(2)]
    for rank, job in enumerate(jobs):
        (line,) = job.complaints
        assert ("stopped by SIGTERM while it compiled" in line) is (rank in hit)
        assert ("last.pt is from epoch 1, step 1" in line) is (rank == 0 and rank in hit)
    status = forked.status(tmp_path / "seed" / "fold0" / "stage1")
    assert status["state"] == ("stopped" if 0 in hit else "failed") and status["step"] == 1
    jobs = forked.launch(*command, cwd=tmp_path)
    assert [job.wait() for job in jobs] == [0, 0]
    assert forked.differing_files(reference, tmp_path) == []
    figure(f"processes {hit} of 2: all gone at once, equal")


@pytest.mark.parametrize("name", COMPILER)
def test_a_compiler_that_fails_by_itself_is_an_error(data, tmp_path, name):
    job = forked.start(
        *forked.train(data, tmp_path), cwd=tmp_path, hook=partial(forked.raise_at_step, 1, *COMPILER[name])
    )
    assert job.wait() == 1 and "an error of this program" in job.text


@pytest.mark.fault("R4", "SIGTERM within validation: it is broken off, saved, and made again")
@pytest.mark.parametrize("variant", [pytest.param("float32", marks=pytest.mark.slow), "averaged"])
def test_a_signal_within_validation(data, tmp_path, straight, figure, variant):
    settings = (*VARIANTS[variant], "predict.batch_size=2")
    reference, (moments,) = straight(f"{variant}-2", lambda runs: forked.train(data, runs, *settings))
    command = forked.train(data, tmp_path, *settings)
    scored = [i for i, name in enumerate(moments) if name == "within validation"]
    at = scored[7 if variant == "averaged" else 1]  # 6 images: the eighth is scored with the average's weights
    hook = partial(forked.moments, tmp_path / "m", at, signal.SIGTERM)
    job = forked.start(*command, cwd=tmp_path, hook=hook)
    assert job.wait() == 143
    status = forked.status(tmp_path / "seed" / "fold0" / "stage1")
    assert (status["state"], status["epoch"], status["step"]) == ("stopped", 1, 2)
    assert forked.start(*command, cwd=tmp_path).wait() == 0
    assert forked.differing_files(reference, tmp_path) == []
    figure(f"{variant}: equal")


@pytest.mark.fault("R4", "SIGTERM to one of two processes: both save and leave")
def test_a_signal_to_one_of_two_processes(data, tmp_path, straight, figure):
    settings = ("train.amp=bf16",)
    reference, _ = straight("two", lambda runs: forked.train(data, runs, *settings), 2)
    command = forked.train(data, tmp_path, *settings)
    began = time.monotonic()
    jobs = forked.launch(*command, cwd=tmp_path, hooks={1: partial(forked.signal_at_step, 1, signal.SIGTERM)})
    assert [job.wait() for job in jobs] == [143, 143]
    seconds = time.monotonic() - began
    assert [len(job.complaints) for job in jobs] == [1, 0]
    assert [job.wait() for job in forked.launch(*command, cwd=tmp_path)] == [0, 0]
    assert forked.differing_files(reference, tmp_path) == []
    figure(f"both gone {seconds:.1f} s after the start; equal")


@pytest.mark.slow
@pytest.mark.fault("R25", "8 of the cycles of `make soak`: random moments and signals, one process and two")
def test_soak(tmp_path, figure):
    result = soak.soak(tmp_path, 8, 1)
    assert result.wrong == []
    assert result.equal == result.cycles == 8
    figure(str(result))
