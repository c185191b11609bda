"""A recipe from training to submission in real processes, stopped and gone on with: on a CPU, and on a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import small_run
import torch

from pneumo import log

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
SECONDS = 300  # for one command, compilation included


class Commands:
    """Runs commands of the project, all with one recipe.

    Args:
        environment: theirs.
        options: overrides of the recipe.
        folder: for what they print.
    """

    def __init__(self, environment: dict[str, str], options: list[str], folder: Path) -> None:
        places = os.pathsep.join([str(forked.REPO), *filter(None, [environment.get("PYTHONPATH")])])
        self.environment = {**environment, "PYTHONPATH": places, "TRITON_INTERPRET": "0"}
        self.options, self.path = options, folder / "printed.txt"

    def start(self, *words: str) -> subprocess.Popen:
        """Start one."""
        with open(self.path, "a") as output:
            command = [sys.executable, *words, "--set", *self.options]
            return subprocess.Popen(command, cwd=forked.REPO, env=self.environment, stdout=output, stderr=output)

    def run(self, *words: str) -> None:
        """Run one to its end, which has to be a good one."""
        assert self.start(*words).wait(SECONDS) == 0, self.path.read_text()


@pytest.mark.parametrize("device", DEVICES)
def test_a_recipe_that_is_stopped_goes_on_to_its_submission(data, tmp_path, with_gpus, device):
    """Two stages of two folds in one process, with averaged weights, then everything that comes of them."""
    runs = tmp_path / "runs"
    more = ("stages=2", "folds.count=2", "train.ema=0.9", "train.checkpoint_steps=1", "stage.1.epochs=60")
    environment = with_gpus if device == "cuda" else {**with_gpus, "CUDA_VISIBLE_DEVICES": ""}
    commands = Commands(environment, [*small_run.settings(data, runs), *more], tmp_path)
    stage = runs / "seed" / "fold0" / "stage1"
    training = commands.start("-m", "pneumo", "cv")
    try:
        forked.wait_for(lambda: (stage / "log.jsonl").exists() or training.poll() is not None, SECONDS)
        training.send_signal(signal.SIGTERM)
        assert training.wait(30) == 143, commands.path.read_text()
    finally:
        training.kill()
    stopped = log.read_status(stage)
    assert stopped["state"] == "stopped" and 1 < stopped["epoch"] < 60
    began = time.monotonic()
    commands.run("-m", "pneumo", "cv")
    for fold in range(2):
        for number, epochs in ((1, 60), (2, 2)):
            folder = runs / "seed" / f"fold{fold}" / f"stage{number}"
            assert log.read_status(folder)["state"] == "done"
            records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            assert [record["epoch"] for record in records] == list(range(1, epochs + 1))
            assert all(0 <= record["dice"] <= 1 and 0 <= record["ema_dice"] <= 1 for record in records)
            assert all(("peak_gb" in record) is (device == "cuda") for record in records)
            assert records[-1]["loss"] < records[0]["loss"] or epochs < 60
    commands.run("-m", "pneumo", "tune")
    commands.run("predict.py")
    commands.run("-m", "pneumo", "report")
    printed = commands.path.read_text()
    assert f"1 x {device}" in printed and "goes on at epoch" in printed
    assert not any(words in printed for words in ("Nothing is compiled", "kernels are not used", "Warning"))
    assert len((runs / "seed" / "submission.csv").read_text().splitlines()) == 5
    assert (runs / "seed" / "report" / "report.html").stat().st_size > 100_000
    print(f"{device}: {time.monotonic() - began:.0f} s after the interruption")
