import importlib.util
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from bench import harness
from bench.elsewhere import Elsewhere
from bench.harness import Row

CPU = torch.device("cpu")
RIVALS = ("segmentation_models_pytorch", "albumentations", "kornia", "cc3d", "cv2", "pycocotools")


def fake(monkeypatch, ours: list[float], theirs: list[float], **changes) -> tuple[dict, list[str]]:
    """The result of a row whose sides take these seconds, the first of each for warming up; and who ran when."""
    clock, calls = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def side(name: str, seconds: list[float]):
        left = iter(seconds)

        def run() -> None:
            calls.append(name)
            clock[0] += next(left)

        return run

    row = Row(row="a", rival="b", ours=side("A", ours), theirs=side("B", theirs), **changes)
    return harness.measure(row, len(ours) - 1, CPU), calls


def test_a_row_by_hand(monkeypatch):
    result, calls = fake(
        monkeypatch, [9, 1, 4, 2], [9, 6, 5, 30], items=10, target="ratio >= 3; ours <= 250", batch="10 pieces"
    )
    assert "".join(calls) == "AB" * 4
    assert json.loads(json.dumps(result)) == {
        "row": "a",
        "rival": "b",
        "ours": pytest.approx(200),  # median of 1, 4, 2 seconds for 10, in milliseconds
        "theirs": pytest.approx(600),
        "unit": "ms",
        "ratio": pytest.approx(3),
        "target": "ratio >= 3; ours <= 250",
        "met": True,
        "runs": 3,
        "spread": {"ours": pytest.approx([100, 400]), "theirs": pytest.approx([500, 3000])},
        "batch": "10 pieces",
        "detail": {},
        "device": "cpu",
    }


@pytest.mark.parametrize(("seconds", "runs"), [(harness.LONG - 2.5, 3), (harness.LONG / 2 - 0.5, 5), (0.1, 5)])
def test_what_takes_long_is_run_less_often(monkeypatch, seconds, runs):
    first = [60.0, seconds]  # what compiles at first does not count
    result, calls = fake(monkeypatch, [*first, *[3.0] * 4], [*first, *[3.0] * 4])
    assert result["runs"] == runs and len(calls) == 2 * (runs + 1)


@pytest.mark.parametrize("target", ["ratio >= 3.1", "ours >= 6", "ratio >= 3; ours <= 4"])
def test_a_missed_target_is_marked(monkeypatch, target):
    result, _ = fake(monkeypatch, [1, 2], [1, 6], items=10, unit="images/s", target=target)
    assert (result["ours"], result["ratio"], result["met"]) == (5, 3, False)
    assert harness.table([result]).splitlines()[-1] == f"| a | b | 5 | 1.667 | images/s | 3.00 | {target} **MISSED** |"


def test_without_a_target_nothing_is_missed(monkeypatch):
    result, _ = fake(monkeypatch, [1, 2], [1, 6])
    assert result["met"] is None
    assert harness.table([result]).endswith("| 3.00 | report |")


def test_other_units_are_what_the_sides_return():
    row = Row(row="a", rival="b", ours=lambda: 4.0, theirs=lambda: 10.0, unit="GB", target="ours <= 8", once=True)
    result = harness.measure(row, 5, CPU)
    assert (result["ours"], result["ratio"], result["met"], result["runs"]) == (4.0, 2.5, True, 1)


def test_a_rival_lives_in_a_process_of_its_own(tmp_path):
    here = os.getcwd()
    with Elsewhere() as elsewhere:
        elsewhere.make(partial, os.chdir, str(tmp_path))()
        first, path = elsewhere._process, tmp_path / "made"
        call = elsewhere.make(partial, os.mkdir, str(path))
        assert os.getcwd() == here and not first.is_alive() and not path.exists()
        call()
        assert path.is_dir()
        with pytest.raises(RuntimeError, match=r"in the rival's process: FileExistsError"):
            call()
        path.rmdir()
        call()  # an error does not end it
        assert path.is_dir()
        second = elsewhere._process
    assert not second.is_alive()


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
    assert len(results) > 20 and all(result["rival"] for result in results)
    measured = [result for result in results if result["unit"] != "exponent"]  # of 2 and 4 images, it may be below 0
    assert len(measured) > 15 and all(result["ratio"] > 0 for result in measured)


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, RIVALS)), reason="rivals are not installed: make bench does")
def test_what_was_measured_stays_when_a_later_row_fails(monkeypatch, tmp_path):
    from bench import rows, run

    def group(_setup):
        yield Row(row="a", rival="b", ours=int, theirs=int)
        raise RuntimeError("the rival is out of memory")

    for name in ("CPU", "GPU", "HOST"):
        monkeypatch.setattr(rows, name, (group,) if name == "HOST" else ())
    monkeypatch.setenv("BENCH", "smoke")
    monkeypatch.setattr(sys, "argv", ["run"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.main()
    assert [result["row"] for result in json.loads((tmp_path / "runs" / "bench.json").read_text())] == ["a"]
