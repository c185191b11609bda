"""Several processes: one fails, hangs, is killed or works alone; two launches want one folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import forked
import pytest
import small_run

from pneumo import dist

STAGE = Path("seed") / "fold0" / "stage1"


def gone_after(jobs: list[forked.Job]) -> float:
    """Seconds from the start of a launch to the end of its last process."""
    for job in jobs:
        job.wait()
    return time.monotonic() - min(job.began for job in jobs)


@pytest.mark.fault("R10", "one process of two raises the error of a bad image; exit codes, messages, status.json")
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_fails(data, tmp_path, figure, rank):
    message = "train/x.png: image is truncated. Copy it again."
    hooks = {rank: partial(forked.fail_at_step, 3, message)}
    jobs = forked.launch(*forked.train(data, tmp_path), cwd=tmp_path, hooks=hooks)
    seconds = gone_after(jobs)
    assert [jobs[rank].wait(), jobs[1 - rank].wait()] == [3, 7]
    assert jobs[rank].complaints == [f"error: {message}"]
    (line,) = jobs[1 - rank].complaints
    assert (
        line
        == f"error: process {1 - rank} ends because process {rank} of 2 did; its message, if it left one, has the cause"
    )
    status = forked.status(tmp_path / STAGE)
    assert (status["state"], status["reason"]) == ("failed", message)
    assert seconds < 15
    figure(f"process {rank}: all gone {seconds:.1f} s after the start")


@pytest.mark.fault("R10", "both meet the same truncated image: one message")
def test_all_processes_fail_alike(data, tmp_path, figure):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    bad = root / "train" / "train-004.png"
    bad.write_bytes(bad.read_bytes()[:700])
    jobs = forked.launch(*forked.train(root, tmp_path), cwd=tmp_path)
    seconds = gone_after(jobs)
    lines = [line for job in jobs for line in job.complaints]
    assert sorted(job.wait() for job in jobs) == [3, 7]
    assert len(lines) == 2 and sum("train-004.png" in line for line in lines) == 1
    figure(f"named once; all gone {seconds:.1f} s after the start")


@pytest.mark.fault("R10", "a mistake on the command line of two processes is said once")
def test_a_mistake_is_said_once(data, tmp_path, figure):
    jobs = forked.launch(*forked.train(data, tmp_path, "stage.1.epoch=3"), cwd=tmp_path)
    assert [job.wait() for job in jobs] == [2, 2]
    assert [len(job.complaints) for job in jobs] == [1, 0]
    figure("one line")


@pytest.mark.fault("R10", "two processes of a launch that do not work on the same: settings, data, split, weights")
@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["stage.1.lr=1e-1"], "stage.1.lr (0.1, not 0.001)"),
        (["stage.1.batch_size=2"], "stage.1.batch_size (2, not 3)"),
        (["train.amp=bf16"], "autocast (torch.bfloat16, not torch.float32)"),
        (["seed=7"], "seed (7, not 0)"),
        ([], "split ("),
        ([], "digest ("),
    ],
)
def test_processes_that_are_not_about_the_same(data, tmp_path, figure, more, named):
    """Each on a host with a folder of its own, as where runs/ is not shared."""
    roots, runs = [data, tmp_path / "data"], [tmp_path / "0", tmp_path / "1"]
    shutil.copytree(data, roots[1])
    if named == "split (":
        for place in runs:
            assert forked.start("pneumo", "folds", *forked.train(data, place)[5:], cwd=place).wait() == 0
        path = runs[1] / "seed" / "folds.csv"
        rows = [row.split(",")[:2] for row in path.read_text().splitlines()[1:]]
        turned = [f"{image_id},{(int(fold) + 1) % 3}" for image_id, fold in rows]
        path.write_text("\n".join(["ImageId,fold", *turned]) + "\n")
    if named == "digest (":
        rows = (roots[1] / "train-rle.csv").read_text().splitlines()
        text = "\n".join("train-000,-1" if row.startswith("train-000,") else row for row in rows)
        (roots[1] / "train-rle.csv").write_text(text + "\n")
    port = forked.free_port()
    jobs = [
        forked.start(
            *forked.train(roots[rank], runs[rank], "train.amp=off", *(more if rank else [])),
            cwd=runs[rank],
            environment=forked.place(rank, 2, port),
        )
        for rank in range(2)
    ]
    assert sorted(job.wait() for job in jobs) == [2, 7]
    (line,) = [line for job in jobs for line in job.complaints if "do not work on" in line]
    assert "process 1 differs from process 0 in " in line and named in line
    assert not list(tmp_path.rglob("*.pt"))
    figure(f"{named.partition(' ')[0]}: named, exit 2, nothing trained")


@pytest.mark.fault("R10", "two processes that predict by other networks")
def test_processes_that_predict_by_other_networks(repo, data, tmp_path, figure):
    jobs, port = [], forked.free_port()
    for rank in range(2):
        runs = tmp_path / str(rank)
        recipe = small_run.recipe(repo, data, runs)
        small_run.pretend_trained(recipe, *(["ema.pt", "best.pt"] if rank else []))  # the second file has other weights
        command = ["predict.py", "--set", *small_run.settings(data, runs)]
        jobs.append(forked.start(*command, cwd=runs, environment=forked.place(rank, 2, port)))
    assert sorted(job.wait() for job in jobs) == [2, 7]
    (line,) = [line for job in jobs for line in job.complaints if "do not work on" in line]
    assert "process 1 differs from process 0 in checkpoints (" in line
    assert not list(tmp_path.rglob("submission.csv"))
    figure("named, exit 2, nothing predicted")


@pytest.mark.fault("R10", "an error that names a file whose name is no text, met by two processes")
def test_a_name_that_is_no_text(data, tmp_path, figure):
    shutil.copytree(data, tmp_path / "data")
    shutil.copy(data / "train" / "train-000.png", os.fsencode(tmp_path / "data" / "train") + b"/b\xff.png")
    jobs = forked.launch(*forked.train(tmp_path / "data", tmp_path / "runs"), cwd=tmp_path)
    assert sorted(job.wait() for job in jobs) == [3, 7]
    assert sum("b\\udcff.png: an ImageId is" in line for job in jobs for line in job.complaints) == 1
    figure("named once, by its escape")


@pytest.mark.fault("R10", "a network interface that is not there")
def test_processes_that_cannot_meet(data, tmp_path, figure):
    port = forked.free_port()
    jobs = [
        forked.start(
            *forked.train(data, tmp_path),
            cwd=tmp_path,
            environment={**forked.place(rank, 2, port), "GLOO_SOCKET_IFNAME": "nope"},
        )
        for rank in range(2)
    ]
    assert [job.wait() for job in jobs] == [7, 7]
    for job in jobs:
        line = job.complaints[-1]
        assert line.startswith("error: the 2 processes of the launch did not meet at 127.0.0.1:")
        assert "GLOO_SOCKET_IFNAME names the network's interface" in line
    figure("named, exit 7")


@pytest.mark.fault("R10", "Ctrl-C while a process waits for others that never come")
def test_who_waits_for_the_others_can_be_interrupted(data, tmp_path, figure):
    port = forked.free_port()
    job = forked.start(*forked.train(data, tmp_path), cwd=tmp_path, environment=forked.place(0, 2, port))
    listens = re.compile(f":{port:04X} 0+:0000 0A ")
    forked.wait_for(lambda: any(listens.search(Path(f"/proc/net/{table}").read_text()) for table in ("tcp", "tcp6")))
    began = time.monotonic()
    job.signal(signal.SIGINT)
    assert job.wait(30) == -signal.SIGINT
    assert not job.complaints
    figure(f"gone after {time.monotonic() - began:.1f} s")


@pytest.mark.slow
@pytest.mark.fault("R11", "process 0, which keeps the store, is suspended: the other cannot even ask it")
def test_the_keeper_of_the_store_is_suspended(data, tmp_path, figure):
    hooks = {0: partial(forked.signal_at_step, 2, signal.SIGSTOP)}
    jobs = forked.launch(*forked.train(data, tmp_path, "train.timeout_seconds=3"), cwd=tmp_path, hooks=hooks)
    try:
        assert jobs[1].wait(40) == 7
        (line,) = jobs[1].complaints
        assert (
            line == "error: process 0 of 2 did not answer for 3 s (train.timeout_seconds): it hangs, or was suspended"
        )
        seconds = time.monotonic() - jobs[1].began
    finally:
        jobs[0].signal(signal.SIGKILL)
    figure(f"the other is gone {seconds:.1f} s after the start, of which 8 s until it is said to hang")


@pytest.mark.fault("R17", "torchrun is killed while its process still imports")
def test_a_launcher_that_dies_early(repo, figure):
    code = (
        "from pneumo import start; start.prepare(); start.parent += 1\n"  # as if that one had ended meanwhile
        "import time\nfrom pneumo import dist\nwith dist.launch(60.0): time.sleep(30)"
    )
    began = time.monotonic()
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": str(repo)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False, timeout=25).returncode == 1
    figure(f"gone {time.monotonic() - began:.1f} s after its start")


@pytest.mark.fault("R10", "an environment that describes no launch: words for numbers, a variable that is missing")
def test_an_environment_that_describes_no_launch(data, tmp_path, figure):
    good = forked.place(0, 2, forked.free_port())
    changes = {
        "WORLD_SIZE": ("abc", "WORLD_SIZE must be a number from 1 to 999999, got 'abc'. torchrun sets it; without "),
        "RANK": (None, "RANK must be a number from 0 to 1, it is not set."),
        "MASTER_PORT": ("9" * 5000, "MASTER_PORT must be a number from 1 to 65535, got '999"),
        "MASTER_ADDR": (None, "MASTER_ADDR must name the host of process 0. torchrun sets it; without torchrun, "),
    }
    for name, (value, message) in changes.items():
        environment = {key: text for key, text in {**good, name: value}.items() if text is not None}
        job = forked.start(*forked.train(data, tmp_path), cwd=tmp_path, environment=environment)
        assert job.wait() == 2, job.text
        (line,) = job.complaints
        assert line.startswith(f"error: {message}") and "unset WORLD_SIZE" in line and len(line) < 250
    job = forked.start(
        *forked.train(data, tmp_path), cwd=tmp_path, environment={**good, "RANK": "2", "LOCAL_RANK": "x"}
    )
    assert job.wait() == 2 and "RANK must be a number from 0 to 1, got '2'" in job.text
    figure("5 of 5 named, exit 2")


@pytest.mark.slow
@pytest.mark.fault("R11", "one process of two hangs for good, train.timeout_seconds = 3")
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_hangs(data, tmp_path, figure, rank):
    hooks = {rank: partial(forked.sleep_at_step, 2, 600)}
    command = forked.train(data, tmp_path, "train.timeout_seconds=3")
    jobs = forked.launch(*command, cwd=tmp_path, hooks=hooks)
    seconds = gone_after(jobs)
    assert [job.wait() for job in jobs] == [7, 7]
    (line,) = jobs[1 - rank].complaints
    reason = f"process {rank} of 2 did not answer for 3 s (train.timeout_seconds): it hangs, or was suspended"
    assert line == f"error: {reason}"
    assert len(jobs[rank].complaints) == 1
    assert (forked.status(tmp_path / STAGE)["state"], forked.status(tmp_path / STAGE)["reason"]) == ("failed", reason)
    assert seconds < 20
    figure(f"process {rank} hangs: all gone {seconds:.1f} s after the start, of which 3 s the timeout")


@pytest.mark.slow
@pytest.mark.fault("R11", "one process of two hangs, the other waits for GPUs, which raise nothing")
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_hangs_while_the_other_waits_for_gpus(data, tmp_path, figure, rank):
    hooks = {rank: partial(forked.sleep_at_step, 2, 600), 1 - rank: partial(forked.wait_for_gpus, 2, 600)}
    jobs = forked.launch(*forked.train(data, tmp_path, "train.timeout_seconds=3"), cwd=tmp_path, hooks=hooks)
    seconds = gone_after(jobs)
    assert [job.wait() for job in jobs] == [7, 7]
    reason = f"process {rank} of 2 did not answer for 3 s (train.timeout_seconds): it hangs, or was suspended"
    assert jobs[1 - rank].complaints == [f"error: {reason}"]
    assert len(jobs[rank].complaints) == 1
    assert (forked.status(tmp_path / STAGE)["state"], forked.status(tmp_path / STAGE)["reason"]) == ("failed", reason)
    assert seconds < 30
    figure(f"process {rank} hangs: all gone {seconds:.1f} s after the start, of which 8 s until it is said to hang")


@pytest.mark.fault("R17", "one of two processes killed, the other waits for GPUs, which raise nothing")
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_is_killed_while_the_other_waits_for_gpus(data, tmp_path, figure, rank):
    hooks = {rank: partial(forked.signal_at_step, 2, signal.SIGKILL), 1 - rank: partial(forked.wait_for_gpus, 2, 600)}
    jobs = forked.launch(*forked.train(data, tmp_path), cwd=tmp_path, hooks=hooks)
    seconds = gone_after(jobs)
    assert [jobs[rank].wait(), jobs[1 - rank].wait()] == [-9, 7]
    (line,) = jobs[1 - rank].complaints
    if rank:
        reason = "process 1 of 2 ended without a message: it was killed, perhaps for lack of host memory"
        assert line == f"error: {reason}"
        status = forked.status(tmp_path / STAGE)
        assert (status["state"], status["reason"]) == ("failed", reason)
    else:  # which kept the store
        assert line == "error: process 1 ends because process 0 of 2 did; its message, if it left one, has the cause"
    assert seconds < 20
    figure(f"process {rank} killed: all gone {seconds:.1f} s after the start")


@pytest.mark.slow
@pytest.mark.fault("R11", "process 0 of two is slow to leave, the other has left")
def test_one_that_has_left_is_not_gone(data, tmp_path, figure):
    hooks = {0: partial(forked.late_after_the_last_meeting, 6.0)}
    jobs = forked.launch(*forked.train(data, tmp_path), cwd=tmp_path, hooks=hooks)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].text
    figure("done")


@pytest.mark.slow
@pytest.mark.fault("R11", "process 0 goes ahead alone, and then works for longer than the timeout")
def test_nobody_hangs_whom_nobody_waits_for(data, tmp_path, figure):
    ahead, behind = partial(forked.after_a_wait, 0.0, 14.0), partial(forked.after_a_wait, 14.0, 0.0)
    command = forked.train(data, tmp_path, "train.timeout_seconds=3", "stage.1.epochs=1")
    jobs = forked.launch(*command, cwd=tmp_path, hooks={0: ahead, 1: behind})
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].text + jobs[1].text
    figure("done")


def test_who_has_ended_is_known_of_this_host_alone(monkeypatch):
    child = subprocess.Popen(["sleep", "600"])
    assert dist._started(child.pid) == dist._started(child.pid) is not None
    child.kill()
    forked.wait_for(lambda: not alive(child.pid))
    assert dist._started(child.pid) is None  # though nobody has asked for its end yet
    child.wait()
    assert dist._started(child.pid) is None
    assert dist._host() == dist._host()
    assert not dist._has_ended(os.getpid(), dist._started(os.getpid())) and dist._has_ended(os.getpid(), "0")
    monkeypatch.setattr(Path, "read_bytes", refused)
    assert not dist._has_ended(os.getpid(), "0")  # as where no more files can be opened
    monkeypatch.setattr(dist.os, "getpid", lambda: 1 << 30)  # as in a container that sees another's /proc
    assert dist._host() != dist._host()
    monkeypatch.setattr(dist.os, "readlink", refused)
    assert dist._host() != dist._host()


@pytest.mark.fault("R10", "NCCL that finds no shared memory on this host, and one that says that a peer is gone")
def test_what_nccl_says_is_passed_on(data, tmp_path, figure):
    said = "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error, NCCL version 2.28.9\nncclSystemError\n"
    here = f"{said}Last error:\nError while creating shared memory segment /dev/shm/nccl-x: No space left on device"
    hook = partial(forked.raise_at_step, 2, "torch.distributed.DistBackendError", here)
    jobs = forked.launch(*forked.train(data, tmp_path / "a"), cwd=tmp_path, hooks={1: hook})
    assert [job.wait() for job in jobs] == [7, 7]
    (line,) = jobs[1].complaints
    assert line.startswith("error: the GPUs of the launch cannot exchange data: ") and "docker run --ipc=host" in line
    assert "/dev/shm/nccl-x: No space left on device" in line
    assert "process 0 ends because process 1 of 2 did" in jobs[0].text
    there = (
        f"{said}ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
    )
    hook = partial(forked.raise_at_step, 2, "torch.distributed.DistBackendError", there)
    jobs = forked.launch(*forked.train(data, tmp_path / "b"), cwd=tmp_path, hooks={1: hook})
    assert [job.wait() for job in jobs] == [7, 7]
    (line,) = jobs[1].complaints
    assert line == "error: another process ended without a message: it was killed, perhaps for lack of host memory"
    figure("its own words where it is this host; else another process")


@pytest.mark.slow
@pytest.mark.fault("R11", "one process of two is slow, but less so than the timeout")
def test_a_slow_process_is_waited_for(data, tmp_path, figure):
    hooks = {1: partial(forked.sleep_at_step, 2, 2.0)}
    jobs = forked.launch(*forked.train(data, tmp_path, "train.timeout_seconds=8"), cwd=tmp_path, hooks=hooks)
    assert [job.wait() for job in jobs] == [0, 0]
    figure("done")


@pytest.mark.fault("R14", "cv of two processes, process 0 late with each status.json; the other reads them")
def test_no_process_acts_on_what_it_reads_too_early(data, tmp_path, figure):
    command = forked.cross_validate(data, tmp_path, "stages=1", "stage.1.epochs=1", "train.checkpoint_steps=0")
    jobs = forked.launch(*command, cwd=tmp_path, hooks={0: partial(forked.slow_at, ("log.write_status",), 0.3)})
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].text + jobs[1].text
    assert jobs[0].text.count("oof-best.npz") == 2
    figure("both agree")


@pytest.mark.slow
@pytest.mark.fault("R14", "cv of two processes: one splits, then process 0 writes, for three timeouts each")
def test_long_work_of_one_process_times_nobody_out(data, tmp_path, figure):
    sleep = partial(forked.slow_at, ("dataset.split", "oof.np.savez_compressed"), 9.0)
    command = forked.cross_validate(data, tmp_path, "train.timeout_seconds=3", "stage.1.epochs=1", "stage.2.epochs=1")
    jobs = forked.launch(*command, cwd=tmp_path, hooks={0: sleep, 1: sleep})
    assert [job.wait(120) for job in jobs] == [0, 0], jobs[0].text + jobs[1].text
    seconds = time.monotonic() - jobs[0].began
    assert seconds > 27
    assert jobs[0].text.count("oof-best.npz") == 2
    figure(f"no timeout of 3 s in {seconds:.0f} s, 27 s of them alone")


@pytest.mark.fault("R18", "a second run in the folder of one that trains: train.py and cv, one process and two")
def test_two_runs_in_one_folder(data, tmp_path, figure):
    command = forked.train(data, tmp_path)
    first = forked.start(*command, cwd=tmp_path, hook=partial(forked.sleep_at_step, 3, 600))
    try:
        forked.wait_for(lambda: (tmp_path / STAGE / "log.jsonl").exists())  # the last save before the third step
        before = (tmp_path / STAGE / "last.pt").read_bytes()
        cv = ["pneumo", "cv", *command[command.index("--set") :]]
        others = [forked.start(*command, cwd=tmp_path), forked.start(*cv, cwd=tmp_path)]
        others += forked.launch(*command, cwd=tmp_path)
        codes = [job.wait() for job in others]
        assert codes == [2, 2, 2, 7]
        refusal = re.compile(rf"stage1 is in use by process {first.pid} \(since \d\d:\d\d\)\. Stop it, or")
        assert [bool(refusal.search(job.complaints[0])) for job in others[:3]] == [True] * 3
        assert (tmp_path / STAGE / "last.pt").read_bytes() == before
        assert forked.status(tmp_path / STAGE)["state"] == "running"
        assert first.process.exitcode is None
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert forked.start(*command, cwd=tmp_path).wait() == 0  # killed, it holds nothing
    figure("3 of 3 refused with the first one's number, the first unharmed")


def refused(*_given):
    raise PermissionError


def torchrun(*arguments: str, cwd: Path, world: int = 2) -> subprocess.Popen:
    """Start a real launch."""
    script = [str(forked.REPO / arguments[0]), *arguments[1:]]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", *script]
    with open(cwd / "torchrun.txt", "a") as output:
        environment = {**os.environ, "PYTHONPATH": str(forked.REPO), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT)


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.fault("R3", "torchrun's agent killed -9 in the middle, started again at once")
def test_an_agent_is_killed(data, tmp_path, figure):
    command = forked.train(data, tmp_path, "stage.1.epochs=400", "train.amp=off")
    agent = torchrun(*command, cwd=tmp_path)
    forked.wait_for(lambda: (tmp_path / STAGE / "prev.pt").exists(), 90)
    ranks = children(agent.pid)
    writer = forked.status(tmp_path / STAGE)["process"]
    assert len(ranks) == 2 and writer in ranks
    agent.kill()
    killed = time.monotonic()
    again = forked.start(*command, cwd=tmp_path, environment=forked.place(0, 1, forked.free_port()))
    forked.wait_for(lambda: not any(map(alive, ranks)), 30)
    life = time.monotonic() - killed
    agent.wait()
    assert again.wait() == 2
    text = again.complaints[0]  # refused: the orphan held the folder, or it was gone and 2 processes are wanted
    assert f"in use by process {writer}" in text or "processes: 2 -> 1" in text
    assert life < 5
    shorter = forked.launch(*command, cwd=tmp_path, hooks={0: partial(forked.signal_at_step, 3, signal.SIGTERM)})
    assert [job.wait() for job in shorter] == [143, 143], shorter[0].text
    assert not list((tmp_path / STAGE).glob("*.corrupt"))
    figure(f"orphans lived {life:.1f} s, the second was refused, 0 damaged files")


@pytest.mark.slow
@pytest.mark.fault("R3", "torchrun's agent of one process killed -9")
def test_an_agent_of_one_process_is_killed(data, tmp_path, figure):
    agent = torchrun(*forked.train(data, tmp_path, "stage.1.epochs=400", "train.amp=off"), cwd=tmp_path, world=1)
    forked.wait_for(lambda: (tmp_path / STAGE / "prev.pt").exists(), 90)
    (rank,) = children(agent.pid)
    agent.kill()
    killed = time.monotonic()
    agent.wait()
    try:
        forked.wait_for(lambda: not alive(rank), 10)
    finally:
        if alive(rank):
            os.kill(rank, signal.SIGKILL)
    figure(f"the orphan lived {time.monotonic() - killed:.1f} s")


@pytest.mark.slow
@pytest.mark.fault("R4", "a signal to torchrun's agent, then the same command again")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_torchrun(data, tmp_path, figure, number):
    settings = ("train.amp=bf16", "train.checkpoint_steps=0", "stage.1.epochs=12")
    reference = forked.launch(*forked.train(data, tmp_path / "straight", *settings), cwd=tmp_path / "straight")
    assert [job.wait() for job in reference] == [0, 0]
    command = forked.train(data, tmp_path / "runs", *settings)
    agent = torchrun(*command, cwd=tmp_path)
    forked.wait_for(lambda: (tmp_path / "runs" / STAGE / "log.jsonl").exists(), 90)
    agent.send_signal(number)
    sent = time.monotonic()
    assert agent.wait(60) != 0
    seconds = time.monotonic() - sent
    assert forked.status(tmp_path / "runs" / STAGE)["state"] == "stopped"
    assert [job.wait() for job in forked.launch(*command, cwd=tmp_path / "runs")] == [0, 0]
    assert forked.differing_files(tmp_path / "straight", tmp_path / "runs") == []
    figure(f"{number.name}: gone after {seconds:.1f} s; equal")


@pytest.mark.slow
@pytest.mark.fault("R10", "a truncated image under torchrun: the line that names it, once, and the record")
def test_a_bad_image_under_torchrun(data, tmp_path, figure):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    bad = root / "train" / "train-004.png"
    bad.write_bytes(bad.read_bytes()[:700])
    began = time.monotonic()
    assert torchrun(*forked.train(root, tmp_path / "runs"), cwd=tmp_path).wait(90) != 0
    seconds = time.monotonic() - began
    text = (tmp_path / "torchrun.txt").read_text()
    assert len([line for line in text.splitlines() if line.startswith("error: ") and "train-004.png" in line]) == 1
    assert json.dumps("Connection closed") not in text and "gloo" not in text
    figure(f"named once; all gone {seconds:.1f} s after the start")
