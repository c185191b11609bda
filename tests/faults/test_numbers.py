"""Losses and weights that are not numbers, and half precision."""

import math
from functools import partial
from pathlib import Path

import forked
import pytest
import torch

from pneumo import checkpoint

STAGE = Path("seed") / "fold0" / "stage1"


def check_finite(path: Path) -> dict:
    state = checkpoint.load(path)
    tensors = [value for _, value in checkpoint.leaves(state) if isinstance(value, torch.Tensor)]
    assert len(tensors) > 100
    assert all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point())
    return state


@pytest.mark.fault("R15", "an infinite loss, and NaN pixels, in one step on one process of two; the run goes on")
@pytest.mark.parametrize("kind", ["loss", "pixel"])
def test_one_bad_step_is_skipped_by_all(data, tmp_path, figure, kind):
    jobs = forked.launch(*forked.train(data, tmp_path), cwd=tmp_path, hooks={1: partial(forked.spoil, kind, 3, 3)})
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].text
    lines = [line for line in jobs[0].text.splitlines() if "was skipped" in line]
    assert len(lines) == 1
    assert "epoch 2, step 1 was skipped: loss or gradient is not finite, of train-" in lines[0]
    assert lines[0].count("train-") == 6  # the images of both processes
    state = check_finite(tmp_path / STAGE / "last.pt")
    assert state["position"]["history"][1]["loss"] > 0
    check_finite(tmp_path / STAGE / "best.pt")
    figure(f"{kind}: skipped by both, its 6 images named, last.pt and batch-norm buffers finite")


@pytest.mark.fault("R15", "a loss that is never finite again: exit 4 after nonfinite_steps, nothing bad saved")
@pytest.mark.parametrize("kind", ["loss", "pixel"])
def test_a_loss_that_is_never_finite_again(data, tmp_path, figure, kind):
    command = forked.train(data, tmp_path, "stage.1.epochs=20")
    job = forked.start(*command, cwd=tmp_path, hook=partial(forked.spoil, kind, 4, 10**9))
    assert job.wait() == 4
    (line,) = job.complaints
    assert "not finite for 10 steps in a row (to epoch 7, step 1; last ids train-" in line
    assert "No bad weights were saved; last.pt is from epoch " in line and "--set train.amp=off or a lower" in line
    assert job.text.count("was skipped") == 9
    check_finite(tmp_path / STAGE / "last.pt")
    status = forked.status(tmp_path / STAGE)
    assert status["state"] == "failed" and "not finite" in status["reason"]
    figure(f"{kind}: exit 4 after 10, last.pt finite")


def test_a_dice_that_is_no_number_never_wins():
    assert not math.nan >= -1.0  # what training compares: a later epoch on ties, never NaN


@pytest.mark.fault("R15", "weights spoilt outside of a step: not saved, exit 4")
def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, figure):
    job = forked.start(*forked.train(data, tmp_path), cwd=tmp_path, hook=partial(forked.spoil_weights, 3))
    assert job.wait() == 4
    (line,) = job.complaints
    assert "last.pt was not written: model.head.bias is not finite. The previous one is intact." in line
    assert check_finite(tmp_path / STAGE / "last.pt")["position"]["epoch"] == 2
    figure("exit 4, the one before finite")


@pytest.mark.slow
@pytest.mark.fault("R16", "fp16 with a loss scale: killed at each of 4 steps; the scaler's state among the leaves")
def test_a_killed_fp16_run_ends_equal(data, tmp_path, figure):
    settings = ("train.amp=fp16",)
    straight = tmp_path / "straight"
    assert forked.start(*forked.train(data, straight, *settings), cwd=straight).wait() == 0
    scaler = checkpoint.load(straight / STAGE / "last.pt")["scaler"]
    assert scaler["scale"] > 0
    for step in (1, 2, 3, 4):
        runs = tmp_path / str(step)
        hook = partial(forked.signal_at_step, step, 9)
        assert forked.start(*forked.train(data, runs, *settings), cwd=runs, hook=hook).wait() == -9
        assert forked.start(*forked.train(data, runs, *settings), cwd=runs).wait() == 0
        assert forked.differing_files(straight, runs) == []
        assert checkpoint.load(runs / STAGE / "last.pt")["scaler"] == scaler
    figure(f"4 of 4 equal, scale {scaler['scale']:g}")
