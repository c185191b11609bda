import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from bench import harness
from bench.harness import Row

CPU = torch.device("cpu")
RIVALS = ("segmentation_models_pytorch", "albumentations", "kornia", "cc3d", "cv2", "pycocotools")


def test_a_row_by_hand():
    """Ours sleeps 10 ms for 5 items, the rival 40 ms."""
    calls = []

    def sleeper(name: str, seconds: float):
        return lambda: (calls.append(name), time.sleep(seconds))

    row = Row(
        row="sleep", rival="sleep longer", ours=sleeper("a", 0.01), theirs=sleeper("b", 0.04), items=5,
        target="ratio >= 1.5; ours <= 20",
    )  # fmt: skip
    result = harness.measure(row, 3, CPU)
    assert calls == ["a", "b"] * 4  # one pair that does not count, then in alternation
    assert 2 <= result["ours"] < 6 and 8 <= result["theirs"] < 20  # ms an item
    assert result["ratio"] == pytest.approx(result["theirs"] / result["ours"])
    assert result["met"] is True and result["runs"] == 3
    wanted = {"row", "rival", "ours", "theirs", "unit", "ratio", "target", "device"}
    assert wanted <= result.keys() and json.dumps(result)


def test_rates_and_numbers_turn_the_ratio_round():
    rate = harness.measure(
        Row(row="r", rival="x", ours=lambda: time.sleep(0.02), theirs=lambda: time.sleep(0.01), unit="images/s"), 1, CPU
    )
    assert rate["ratio"] == pytest.approx(rate["ours"] / rate["theirs"]) and rate["ratio"] < 0.9
    number = harness.measure(
        Row(row="r", rival="x", ours=lambda: 4, theirs=lambda: 8, unit="GB", once=True, target="ours <= 3"), 9, CPU
    )
    assert (number["ours"], number["ratio"], number["met"], number["runs"]) == (4, 2, False, 1)
    assert "**MISSED**" in harness.table([number]) and "report" in harness.table(
        [{**number, "target": "", "met": None}]
    )


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, RIVALS)), reason="rivals are not installed: make bench does")
def test_every_row_runs(repo, tmp_path):
    """All rows, those of a GPU too, at sizes that measure nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(repo), str(repo / "tests")]), "BENCH": "smoke"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs" / "bench.json").read_text())
    assert len(results) > 20 and all(result["rival"] and result["ratio"] > 0 for result in results)
