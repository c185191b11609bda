import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest
import small_run
import torch
from test_commands import run

from pneumo import checkpoint, dist, jobs
from pneumo.errors import PneumoError, Stopped, UsageError

GPUS = jobs._gpus


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setattr(jobs, "_gpus", lambda: [])


def test_lines_are_marked_and_others_go_on_after_a_failure(capsys):
    def command(fold: int) -> list[str]:
        return python(f"import sys, time; print('hello'); time.sleep({0.1 * fold}); sys.exit({[3, 0, 4][fold]})")

    with pytest.raises(PneumoError, match=r"fold 0, 2 failed.*the others are done") as caught:
        jobs.run_folds([0, 1, 2], 2, command)
    assert caught.value.exit_code == 3
    assert sorted(capsys.readouterr().out.split("\n")) == ["", *(f"[fold {fold}] hello" for fold in range(3))]


@pytest.mark.parametrize(
    ("number", "exit_code", "message"),
    [
        (signal.SIGKILL, 6, "fold 1 was killed by SIGKILL, perhaps for lack of host memory"),
        (signal.SIGSEGV, 7, "fold 1 was killed by SIGSEGV"),
    ],
)
def test_a_fold_that_was_killed_is_named(number, exit_code, message):
    def command(fold: int) -> list[str]:
        return python(
            f"import os, sys; {fold} == 1 and os.kill(os.getpid(), {int(number)}); sys.exit({4 * (fold == 2)})"
        )

    with pytest.raises(PneumoError, match=f"^{message}; the others are done. The same command goes on$") as caught:
        jobs.run_folds([0, 1], 1, command)
    assert caught.value.exit_code == exit_code
    with pytest.raises(PneumoError, match=f"^fold 2 failed, see above; {message}. Once that is mended, the") as caught:
        jobs.run_folds([2, 1], 1, command)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_fold_that_was_stopped_alone_has_not_failed(number):
    def command(fold: int) -> list[str]:
        return python(f"import sys; sys.exit({128 + number if fold == 1 else 0})")

    message = f"^fold 1 was stopped by {number.name}; the others are done. The same command goes on$"
    with pytest.raises(PneumoError, match=message) as caught:
        jobs.run_folds([0, 1], 1, command)
    assert caught.value.exit_code == 128 + number


def test_a_signal_reaches_a_fold_that_is_just_starting(monkeypatch):
    def started(*words, **options):
        process = popen(*words, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # in which the main thread passes it on to all that it knows of
        return process

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", started)
    began = time.perf_counter()
    with pytest.raises(Stopped):
        jobs.run_folds([0, 1], 1, lambda fold: python("import time; time.sleep(20)"))
    assert time.perf_counter() - began < 10


def test_no_more_at_a_time_than_asked_for_and_each_on_its_own_gpu(monkeypatch, capsys):
    monkeypatch.setattr(jobs, "_gpus", lambda: ["4", "6"])
    code = (
        "import os, time; t = time.time(); time.sleep(0.2); print(os.environ['CUDA_VISIBLE_DEVICES'], t, time.time())"
    )
    jobs.run_folds(range(4), 2, lambda fold: python(code))
    seen = [line.split("] ")[1].split() for line in capsys.readouterr().out.splitlines()]
    assert {gpu for gpu, *_ in seen} == {"4", "6"}
    for gpu in ("4", "6"):  # one after the other
        spans = sorted((float(start), float(end)) for name, start, end in seen if name == gpu)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    with pytest.raises(UsageError, match="3 jobs want a GPU each, but 2 are visible"):
        jobs.run_folds(range(4), 3, lambda fold: python(code))


@pytest.mark.parametrize(
    ("named", "count", "gpus"),
    [
        (None, 2, ["0", "1"]),
        ("", 0, []),
        ("3, 5,7", 2, ["3", "5"]),
        ("1,-1,2", 1, ["1"]),  # what comes after -1 does not count
        ("GPU-8a,GPU-9b", 2, ["GPU-8a", "GPU-9b"]),
        ("MIG-a,MIG-b", 1, ["MIG-a", "MIG-b"]),  # a process sees one part of a GPU at most
    ],
)
def test_gpus_as_they_are_named(monkeypatch, named, count, gpus):
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert GPUS() == gpus


@pytest.mark.parametrize(
    ("local", "here", "visible", "gpu"),
    [
        (0, 1, 1, 0),
        (1, 2, 2, 1),
        (3, 4, 8, 3),
        (3, 4, 1, 0),  # a scheduler shows each process its own
        (1, 3, 2, None),
    ],
)
def test_which_gpu_a_process_of_a_launch_takes(monkeypatch, local, here, visible, gpu):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    if gpu is None:
        with pytest.raises(
            UsageError, match=r"^3 processes on this host, but 2 GPUs are visible to them; start at most"
        ):
            dist._gpu(local, here)
    else:
        assert dist._gpu(local, here) == gpu


@pytest.mark.parametrize(("size", "launched"), [(None, False), ("1", False), ("2", True)])
def test_one_process_alone_is_no_launch(monkeypatch, size, launched):
    """Schedulers set WORLD_SIZE=1, too; then folds may well run side by side."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert dist.is_launched() is launched


def test_the_hash_of_the_code_is_of_its_source_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "__file__", str(tmp_path / "dist.py"))
    found = []
    for name, text in (("a.py", "x"), ("b.txt", "y"), ("c.py", "z")):
        (tmp_path / name).write_text(text)
        found.append(dist.code_hash.__wrapped__())
    (tmp_path / ".#a.py").symlink_to("nobody@nowhere")  # an editor's lock
    found.append(dist.code_hash.__wrapped__())
    assert found[0] == found[1] != found[2] == found[3]


def test_processes_that_would_share_a_gpu_are_refused():
    for fine in (["a", "b", "c", "d"], ["", "", "a"], []):
        dist._check_gpus(fine)
    with pytest.raises(UsageError, match=r"^2 processes on this host, but 1 GPU is visible to them"):
        dist._check_gpus(["a", "b", "a"])


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_reaches_every_fold_and_no_other_is_started(capsys, number, exit_code):
    code = (
        "import signal, sys, time\n"
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\n"
        "    signal.signal(number, lambda n, _: (print('got', n), sys.exit(128 + n)))\n"
        "print('up'); time.sleep(30)"
    )
    threading.Timer(0.7, lambda: os.kill(os.getpid(), number)).start()
    started = time.perf_counter()
    with pytest.raises(Stopped) as caught:
        jobs.run_folds([0, 1, 2], 2, lambda fold: python(code))
    assert caught.value.exit_code == exit_code
    assert time.perf_counter() - started < 10
    lines = [f"[fold {fold}] {word}" for fold in (0, 1) for word in (f"got {number.value}", "up")]
    assert sorted(capsys.readouterr().out.splitlines()) == lines


@pytest.mark.slow
@pytest.mark.parametrize("when", ["within the launch", "before it"])
def test_a_fold_ends_with_the_one_that_started_it(when):
    """kill -9 of the parent: its child, within `dist.launch` or on the way to it, ends by itself."""
    tell, orphaned = "print(os.getpid(), flush=True)", "while os.getppid() == parent: time.sleep(0.1)"
    before, within = ("", tell) if when == "within the launch" else (f"{tell}\n{orphaned}", "")
    child = (
        f"import os, time\nparent = os.getppid()\n{before}\n"
        f"from pneumo import dist\nwith dist.launch(5.0):\n    {within}\n    time.sleep(60)"
    )
    parent = (
        "import sys\nfrom pneumo import jobs\njobs._gpus = lambda: []\n"
        f"jobs.run_folds([0], 1, lambda fold: [sys.executable, '-c', {child!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline().split("] ")[1])
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.time() + 10
    while os.path.exists(f"/proc/{pid}") and time.time() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.slow
def test_folds_side_by_side_are_those_one_after_the_other(tmp_path):
    small_run.write_data(tmp_path / "data")
    leaves = []
    for name, more in (("one", []), ("two", ["--jobs", "2"])):
        options = small_run.settings(tmp_path / "data", tmp_path / name)
        options += ["folds.count=2", *(f"stage.{number}.epochs=1" for number in (1, 2, 3))]
        printed = run("pneumo", "cv", *more, "--set", *options, cwd=tmp_path)
        assert ("[fold 1] fold 1 stage 3 epoch 1/1" in printed) == bool(more)
        paths = sorted((tmp_path / name / "seed").glob("fold*/stage*/best.pt"))
        assert len(paths) == 6
        assert len(list((tmp_path / name / "seed").glob("fold*/stage3/oof-best.npz"))) == 2
        leaves.append([dict(checkpoint.leaves(checkpoint.load(path)["model"])) for path in paths])
    for one, two in zip(*leaves, strict=True):
        assert one.keys() == two.keys()
        assert all(bool((one[key] == two[key]).all()) for key in one)


def test_what_a_fold_is_started_with(monkeypatch, capsys):
    """Its share of the cores that may be used, unless the user says otherwise, lines as they are printed, a session."""
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda _: set(range(7)))
    code = (
        "import os; e = os.environ; print(e['OMP_NUM_THREADS'], e['PYTHONUNBUFFERED'], os.getsid(0) == os.getpid());"
        "os.write(1, b'\\xff\\n')"
    )
    for threads in (None, "5"):
        if threads is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", threads)
        jobs.run_folds([0], 2, lambda fold: python(code))
        assert capsys.readouterr().out == f"[fold 0] {threads or 3} 1 True\n[fold 0] \ufffd\n"
    monkeypatch.delenv("OMP_NUM_THREADS")
    jobs.run_folds([0], 9, lambda fold: python(code))
    assert capsys.readouterr().out.startswith("[fold 0] 1 1 ")


def test_signals_are_the_users_again_afterwards_and_the_first_one_counts(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    jobs.run_folds([0], 1, lambda fold: python(""))
    assert {number: signal.getsignal(number) for number in before} == before
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(30)"
    for delay, number in ((0.7, signal.SIGTERM), (1.2, signal.SIGINT)):
        threading.Timer(delay, os.kill, (os.getpid(), number)).start()
    with pytest.raises(Stopped, match="stopped by SIGTERM") as caught:
        jobs.run_folds([0], 1, lambda fold: python(code))
    assert caught.value.exit_code == 143
    assert {number: signal.getsignal(number) for number in before} == before
