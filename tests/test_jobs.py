import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import small_run
import torch

from pneumo import checkpoint, jobs
from pneumo.jobs import JobFailed


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_lines_carry_the_name_and_no_more_than_so_many_run_at_once(capfd, tmp_path):
    code = f"""
import os, time, pathlib
mine = pathlib.Path({str(tmp_path)!r}, str(os.getpid()))
mine.touch(); print(len(list(mine.parent.iterdir())), 'at work'); time.sleep(0.3); mine.unlink()
"""
    jobs.run([(f"fold {i}", python(code)) for i in range(4)], 2)
    lines = capfd.readouterr().out.splitlines()
    assert sorted(line.split(":")[0] for line in lines) == [f"fold {i}" for i in range(4)]
    assert max(int(line.split()[2]) for line in lines) == 2


def test_the_first_failure_stops_the_others_and_gives_its_code(tmp_path):
    waits = f"""
import signal, sys, time
def save(*_): open({str(tmp_path / "saved")!r}, 'w').close(); sys.exit(143)
signal.signal(signal.SIGTERM, save); open({str(tmp_path / "ready")!r}, 'w').close(); time.sleep(60)
"""
    fails = f"""
import os, sys, time
while not os.path.exists({str(tmp_path / "ready")!r}): time.sleep(0.01)
sys.exit(3)
"""
    never = f"open({str(tmp_path / 'never')!r}, 'w').close()"
    with pytest.raises(JobFailed, match="fold 1 ended with exit code 3") as caught:
        jobs.run([("fold 0", python(waits)), ("fold 1", python(fails)), ("fold 2", python(never))], 2)
    assert caught.value.exit_code == 3
    assert (tmp_path / "saved").exists() and not (tmp_path / "never").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all(tmp_path, number):
    code = f"""
import os, pathlib, signal, sys, time
place = pathlib.Path({str(tmp_path)!r})
def save(*_): (place / f'saved{{os.getpid()}}').touch(); sys.exit(143)
signal.signal(signal.SIGTERM, save); (place / f'ready{{os.getpid()}}').touch(); time.sleep(60)
"""

    def interrupt() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(JobFailed, match=f"stopped by {number.name}") as caught:
        jobs.run([("a", python(code)), ("b", python(code))], 2)
    assert caught.value.exit_code == 128 + number
    assert len(list(tmp_path.glob("saved*"))) == 2


@pytest.mark.slow
def test_folds_side_by_side_train_the_same_weights(repo, tmp_path):
    small_run.write_data(tmp_path / "data")
    best = {}
    for count in (1, 2):
        one_epoch = [f"stage.{number}.epochs=1" for number in (1, 2, 3)]
        settings = [*small_run.settings(tmp_path / "data", tmp_path / str(count)), *one_epoch]
        command = [sys.executable, "-m", "pneumo", "cv", "--jobs", str(count), "--set", *settings]
        done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (count > 1) == ("fold 1: fold 1 stage 1 epoch 1/1" in done.stdout)
        for fold in range(3):
            state = checkpoint.load(tmp_path / str(count) / "seed" / f"fold{fold}" / "stage3" / "best.pt")
            best[count, fold] = state["model"]
    for fold in range(3):
        assert all(torch.equal(best[1, fold][key], tensor) for key, tensor in best[2, fold].items())
