"""Memory that runs out, weights that cannot be had, odd surroundings, and errors that nobody foresaw."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import forked
import pytest
import small_run
import torch

from pneumo import checkpoint, dataset
from pneumo.errors import DataError

STAGE = Path("seed") / "fold0" / "stage1"


@pytest.mark.fault("R17", "out of memory on GPU and host, raised in the third step; and a real allocation that fails")
@pytest.mark.parametrize("kind", ["gpu", "MemoryError", "allocator"])
def test_out_of_memory(data, tmp_path, figure, kind):
    hook = {
        "gpu": partial(
            forked.raise_at_step, 3, "torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB"
        ),
        "MemoryError": partial(forked.raise_at_step, 3, "builtins.MemoryError", ""),
        "allocator": partial(forked.allocate_at_step, 3),
    }[kind]
    job = forked.start(*forked.train(data, tmp_path), cwd=tmp_path, hook=hook)
    assert job.wait() == 6
    (line,) = job.complaints
    assert "out of memory" in line
    third = "train.amp=bf16" if kind == "gpu" else "fewer processes (GPUS=)"
    remedies = ("Lower stage.N.batch_size and raise stage.N.accumulation", "lower stage.N.image_size", third)
    assert all(remedy in line for remedy in remedies)
    assert checkpoint.load(tmp_path / STAGE / "last.pt")["position"]["epoch"] == 2
    assert forked.status(tmp_path / STAGE)["state"] == "failed"
    figure(f"{kind}: 3 remedies, exit 6")


@pytest.mark.fault("R17", "one of two processes killed, as the kernel does where the host's memory ends")
def test_a_process_is_killed_for_memory(data, tmp_path, figure):
    hooks = {1: partial(forked.signal_at_step, 2, signal.SIGKILL)}
    jobs = forked.launch(*forked.train(data, tmp_path), cwd=tmp_path, hooks=hooks)
    assert [job.wait() for job in jobs] == [7, -9]
    (line,) = jobs[0].complaints
    reason = "process 1 of 2 ended without a message: it was killed, perhaps for lack of host memory"
    assert line == f"error: {reason}"
    assert forked.status(tmp_path / STAGE)["reason"] == reason
    figure("named")


@pytest.mark.fault("R23", "a truncated image read by a thread of the pack; last line of the output")
def test_a_bad_image_in_a_thread(data, tmp_path, figure):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    bad = root / "train" / "train-007.png"
    bad.write_bytes(bad.read_bytes()[:900])
    job = forked.start(*forked.train(root, tmp_path), cwd=tmp_path)
    assert job.wait() == 3
    (line,) = job.complaints
    assert line.startswith("error: ") and "train-007.png" in line and "Error" not in line
    bad.write_bytes((data / "train" / "train-007.png").read_bytes())
    assert forked.start(*forked.train(root, tmp_path), cwd=tmp_path).wait() == 0
    figure("named in the last line, exit 3")


@pytest.mark.fault(
    "R22", "no cache and a hub that does not answer; offline by choice; missing and HTML files of weights"
)
@pytest.mark.parametrize("kind", ["no answer", "offline", "missing", "html"])
def test_weights_that_cannot_be_had(data, tmp_path, figure, kind):
    pretrained, environment = "true", {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    if kind == "no answer":
        environment |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    if kind in ("missing", "html"):
        pretrained = str(tmp_path / "weights.pth")
    if kind == "html":
        Path(pretrained).write_text("<html>404</html>")
    command = forked.train(data, tmp_path, "model.encoder=resnet34", f"model.pretrained={pretrained}")
    job = forked.start(*command, cwd=tmp_path, hook=partial(forked.hub, environment))
    assert job.wait() == (3 if kind == "html" else 2)
    seconds = time.monotonic() - job.began
    (line,) = job.complaints
    if pretrained == "true":
        assert "model.safetensors of timm/resnet34.a1_in1k" in line and str(tmp_path / "hub") in line
        assert "pass --set model.pretrained=FILE" in line
    else:
        assert pretrained in line
    assert "model.pretrained=false" in line
    assert seconds < 10
    figure(f"{kind}: path and 2 remedies after {seconds:.1f} s")


@pytest.mark.slow
@pytest.mark.fault(
    "R24", "LC_ALL=C, no HOME, blanks and umlauts in paths, linked images in a folder that cannot be written"
)
def test_odd_surroundings(data, tmp_path, figure):
    root, runs = tmp_path / "ver línkt" / "data", tmp_path / "läufe hier"
    root.mkdir(parents=True)
    for name in ("train", "test"):
        (root / name).symlink_to(data / name)
    for name in ("train-rle.csv", "sample_submission.csv"):
        (root / name).symlink_to(data / name)
    runs.mkdir()
    before = sorted(path.name for path in data.rglob("*"))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(forked.REPO), "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    command = forked.train(root, runs, "stage.1.epochs=1")
    root.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, str(forked.REPO / command[0]), *command[1:]],
            cwd=runs, env=environment, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        root.chmod(0o755)
    assert done.returncode == 0, done.stderr.decode()
    assert forked.status(runs / STAGE)["state"] == "done"
    assert "läufe hier" in (done.stdout + done.stderr).decode()
    assert sorted(path.name for path in data.rglob("*")) == before  # nothing is written beside the images
    figure("pass")


@pytest.mark.fault("R24", "runs/ that cannot be written, for a command that only reads")
def test_a_report_that_cannot_be_written_hides_nothing(repo, data, tmp_path, capsys, figure):
    (tmp_path / "file").touch()
    recipe = small_run.recipe(repo, data, tmp_path / "file" / "runs")
    assert len(dataset.load_cases(recipe)) == 18
    assert "1 image has rows that overlap" in capsys.readouterr().err
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "train-003.png").unlink()
    with pytest.raises(DataError, match="train-003"):
        dataset.load_cases(small_run.recipe(repo, tmp_path / "data", tmp_path / "file" / "runs"))
    figure("warned and read; an error is named as ever")


@pytest.mark.slow
@pytest.mark.fault("R24", "a recipe that insists on compilation, on a machine without a C++ compiler")
def test_no_compiler(data, tmp_path, figure):
    environment = os.environ | {"CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = forked.train(data, tmp_path, "train.compile=on", "stage.1.epochs=1")
    done = subprocess.run(
        [sys.executable, str(forked.REPO / command[0]), *command[1:]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: Nothing can be compiled here: ") and "/nonexistent/g++" in line
    assert "It takes gcc and g++" in line and line.endswith("; or --set train.compile=off")
    figure("named, with what it takes, exit 2")


def compilers_of(group: int) -> list[Path]:
    """Running C++ compilers of a process group."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            name, fields = (place / "stat").read_text().rsplit(") ", 1)
            if name.endswith("(cc1plus") and int(fields.split()[2]) == group:
                found.append(place)
    return found


@pytest.mark.slow
@pytest.mark.fault("R4", "Ctrl-C, which a terminal sends to the whole group, while the networks compile")
def test_a_signal_to_the_group_while_it_compiles(data, tmp_path, figure):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = forked.train(data, tmp_path, "train.compile=on", "stage.1.epochs=1")
    job = subprocess.Popen(
        [sys.executable, str(forked.REPO / command[0]), *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=tmp_path, env=environment, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert any("images to train on" in line for line in job.stdout)
        forked.wait_for(lambda: compilers_of(job.pid), 150)
        os.killpg(job.pid, signal.SIGINT)
        _, complaints = job.communicate(timeout=200)  # it takes 40 where others compute as well
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 130, complaints
    line = complaints.splitlines()[-1]
    assert "stopped by SIGINT while it compiled; nothing was saved before" in line
    assert forked.status(tmp_path / STAGE)["state"] == "stopped"
    figure("code 130, one line")


@pytest.mark.slow
@pytest.mark.fault("R24", "the clock set back by a year between two starts")
def test_a_clock_that_goes_back(data, tmp_path, figure):
    straight, runs = tmp_path / "straight", tmp_path / "runs"
    assert forked.start(*forked.train(data, straight), cwd=straight).wait() == 0
    job = forked.start(*forked.train(data, runs), cwd=runs, hook=partial(forked.signal_at_step, 3, signal.SIGKILL))
    assert job.wait() == -9
    assert forked.start(*forked.train(data, runs), cwd=runs, hook=forked.clock_a_year_back).wait() == 0
    assert forked.differing_files(straight, runs) == []
    figure("equal")


def test_an_error_that_nobody_foresaw_is_one_line(data, tmp_path):
    hook = partial(forked.raise_at_step, 2, "builtins.ZeroDivisionError", "by zero")
    job = forked.start(*forked.train(data, tmp_path / "runs"), cwd=tmp_path, hook=hook)
    assert job.wait() == 1
    path = tmp_path / "runs" / "seed" / "error.log"
    assert job.complaints == [
        f"error: ZeroDivisionError: by zero (an error of this program; the traceback is in {path})"
    ]
    assert "Traceback" in path.read_text() and "in train_stage" in path.read_text()
    assert forked.status(tmp_path / "runs" / STAGE)["reason"] == "by zero"
    shown = forked.start(*forked.train(data, tmp_path / "runs"), "--debug", cwd=tmp_path, hook=hook)
    assert shown.wait() == 1
    assert "in train_stage" in shown.text and shown.complaints[-1].startswith("error: ZeroDivisionError")


def test_an_interrupted_command_ends_with_its_own_code(data, tmp_path):
    job = forked.start(*forked.train(data, tmp_path), cwd=tmp_path, hook=partial(forked.interrupt_in, "dataset.split"))
    assert job.wait() == 130
    assert job.complaints == ["interrupted"]


@pytest.mark.fault("R4", "Ctrl-C in the first seconds, while torch is imported; train.py, predict.py, -m pneumo")
@pytest.mark.parametrize("command", [["train.py", "--help"], ["predict.py"], ["-m", "pneumo", "verify"]])
def test_an_interrupted_import_ends_in_one_line(repo, tmp_path, figure, command):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path), str(repo)])
    command = [str(repo / word) if word.endswith(".py") else word for word in command]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    figure(f"{Path(command[0]).name if len(command) < 3 else 'pneumo'}: one line, exit 130")


@pytest.mark.fault("R24", "standard output and error closed, or a pipe that nobody reads")
@pytest.mark.parametrize("kind", ["closed", "gone"])
def test_a_run_that_nobody_listens_to_goes_on(data, tmp_path, figure, kind):
    hook = partial(forked.outputs, kind)
    runs = tmp_path / "runs"
    job = forked.start(*forked.train(data, runs), cwd=tmp_path, hook=hook)
    assert job.wait() == 0 and job.text == ""
    assert forked.status(runs / STAGE)["state"] == "done"
    assert len((runs / STAGE / "log.jsonl").read_text().splitlines()) == 2
    assert forked.start("pneumo", "recipe", cwd=tmp_path, hook=hook).wait() == 0
    refused = forked.start("train.py", "--fold", "9", cwd=tmp_path, hook=hook)
    assert refused.wait() == 2
    assert not list(tmp_path.glob("**/error.log"))
    figure(f"{kind}: done; the others end with their own code")


@pytest.mark.fault("R7", "the disk full that standard output goes to")
def test_a_full_disk_behind_the_output_is_named(data, tmp_path, figure):
    hook = partial(forked.outputs, "full")
    line = "error: Cannot write standard output: No space left on device. Free space, then run the same command."
    job = forked.start(*forked.train(data, tmp_path), cwd=tmp_path, hook=hook)
    assert job.wait() == 5 and job.complaints == [line]
    assert forked.start(*forked.train(data, tmp_path), cwd=tmp_path).wait() == 0
    job = forked.start("pneumo", "recipe", cwd=tmp_path, hook=hook)
    assert job.wait() == 5 and job.complaints == [line]
    figure("named, exit 5; then the same command is done")


@pytest.mark.fault("R24", "an output that takes ASCII only")
def test_what_cannot_be_encoded_is_escaped(data, tmp_path, figure):
    hook = partial(forked.outputs, "ascii")
    options = ["--set", *small_run.settings(data, tmp_path / "läufe")]
    job = forked.start("pneumo", "verify", *options, cwd=tmp_path, hook=hook)
    assert job.wait() == 0, job.text
    assert r"l\xe4ufe/seed/data_report.csv" in job.text
    job = forked.start("pneumo", "verify", "--set", "data.root=nöwhere", cwd=tmp_path, hook=hook)
    assert job.wait() == 3, job.text
    assert r"n\xf6where" in job.text
    figure("escaped, exit codes as always")


def test_weights_in_the_hubs_cache_are_used_without_a_network(monkeypatch, tmp_path):
    import huggingface_hub
    import timm

    from pneumo.model import unet

    state = timm.create_model("resnet18", pretrained=False).state_dict()
    torch.save(state, tmp_path / "w.bin")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "w.bin"))
    monkeypatch.setattr(unet.socket, "create_connection", None)
    model = unet.UNet("resnet18", True, (8, 8, 8, 4, 4))
    assert torch.equal(model.encoder.conv1.weight, state["conv1.weight"])
