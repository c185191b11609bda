"""Predictions killed at chosen moments and started again: `python killed_predictions.py PLACE KIND PROCESSES EVERY`.

KIND is test (a submission) or given (files). A run's steps are its calls of os.write, fsync, replace and unlink; a run
is killed (SIGKILL) at every EVERYth of them, half of what it was writing on the disk, and another goes on after each.
Runs are forked, so that they import nothing. Prints one JSON object.
"""

import json
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import small_run
import torch
from PIL import Image

from pneumo import dist, ensemble, given, inference
from pneumo.decision.trust import Trust
from pneumo.tuning import Ruling

IMAGES = 7
BATCH = 2
TRUST = Trust((((0.0, 1.0), (0.3, 0.9)), ((0.0, 1.0), (0.1, 0.8))))


class Steps:
    """Counts the steps of this process; at the last one it may take, it dies within it."""

    def __init__(self, last: int | None) -> None:
        self.last, self.taken, self.lock = last, 0, threading.Lock()
        for name in ("write", "fsync", "replace", "unlink"):
            setattr(os, name, self._counted(getattr(os, name), name))

    def _counted(self, call, name: str):
        def counted(*arguments, **options):
            with self.lock:
                self.taken += 1
                if self.taken == self.last:
                    if name == "write":
                        call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    elif name == "replace":
                        os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted


class Place:
    """Data, networks and outputs of the runs."""

    def __init__(self, place: Path, kind: str) -> None:
        self.kind, self.out = kind, place / "masks"
        small_run.write_data(place / "data", test=IMAGES)
        nested = place / "data" / "test" / "nested"
        nested.mkdir()
        wide = np.random.default_rng(0).integers(0, 256, (50, 90), dtype=np.uint8)
        Image.fromarray(wide).save(nested / "test-006.png")
        (place / "data" / "test" / "test-006.png").unlink()
        repo = Path(__file__).resolve().parents[1]
        settings = (f"predict.batch_size={BATCH}", "folds.count=2")
        self.recipe = small_run.recipe(repo, place / "data", place / "runs", *settings)
        small_run.pretend_trained(self.recipe)
        self.models = ensemble.load(self.recipe, [0, 1], torch.device("cpu"))
        rule = small_run.halving_rule(self.models, place / "data" / "test")
        self.ruling = Ruling(rule, "recipe", TRUST)
        self.files = given.find([place / "data" / "test"], self.out)
        self.notes = place / "notes"
        self.notes.mkdir()

    def predict(self, last: int | None) -> None:
        """One process's part of one run; notes how many steps it took and how many images it predicted."""
        steps, real = Steps(last), ensemble.predict

        def counted(models, image, size, names, boxes):
            with open(self.notes / f"images-{os.getpid()}", "ab", buffering=0) as note:
                note.write(b"." * len(image))  # a kill leaves no half of it
            return real(models, image, size, names, boxes)

        ensemble.predict = counted
        with dist.launch(30.0) as device:
            if self.kind == "test":
                inference.predict_test(self.recipe, self.models, self.ruling, device)
            else:
                given.predict(self.recipe, self.models, self.ruling, self.files, self.out, device)
        (self.notes / f"steps-{os.environ.get('RANK', 0)}").write_text(str(steps.taken))

    def run(self, processes: int, last: int | None = None, victim: int = 0) -> list[int]:
        """One run in its own processes; returns how they ended, as os.wait says. One that lost another is killed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                if processes > 1:
                    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                    os.environ |= {k: str(v) for k, v in {**where, "RANK": rank, "WORLD_SIZE": processes}.items()}
                log = os.open(self.notes / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
                os.dup2(log, 1)
                os.dup2(log, 2)
                try:
                    self.predict(last if rank == victim else None)
                    code = 0
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    code = 1
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            pids.append(pid)
        ends: dict[int, int] = {}
        while len(ends) < processes:
            pid, status = os.wait()
            ends[pid] = status
            if status:
                for other in set(pids) - ends.keys():
                    os.kill(other, signal.SIGKILL)
        return [ends[pid] for pid in pids]

    def outputs(self) -> dict[str, bytes]:
        """Every file that a run leaves, but for the locks."""
        if self.kind == "test":
            folders = [path for path in self.recipe.folder.glob("*") if path.is_file()]
            paths = [*folders, *(self.recipe.folder / "predict").rglob("*")]
        else:
            paths = list(self.out.rglob("*"))
        return {str(path): path.read_bytes() for path in paths if path.is_file() and not path.name.endswith("lock")}

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.recipe.folder / "predict", ignore_errors=True)
        for pattern in ("submission*", "referral*"):
            for path in self.recipe.folder.glob(pattern):
                path.unlink()

    def images(self) -> int:
        """Images predicted since the last call."""
        notes = list(self.notes.glob("images-*"))
        count = sum(note.stat().st_size for note in notes)
        for note in notes:
            note.unlink()
        return count


def moments(steps: int, every: int) -> Iterator[int]:
    """Every so many steps, the last one of all included."""
    yield from sorted({*range(1, steps + 1, every), steps})


def main(place: Path, kind: str, processes: int, every: int) -> dict[str, int]:
    """Kill and go on; how often the outputs were those of a run that was not killed, and what it cost."""
    runs = Place(place, kind)
    assert runs.run(processes) == [0] * processes, (runs.notes / "log").read_text()
    wanted = runs.outputs()
    assert runs.images() == IMAGES
    found = [content for name, content in wanted.items() if name.endswith(("submission.csv", "predictions.jsonl"))]
    assert not any(text in found[0] for text in (b",-1\n", b'"area_pixels": 0,')), "an empty mask shows nothing"
    result = {"identical": 0, "trials": 0, "images_again": 0, "half_written": 0}
    for victim in range(processes):
        steps = int((runs.notes / f"steps-{victim}").read_text())
        for step in moments(steps, every):
            runs.clear()
            runs.images()  # of a trial that was skipped: they are no part of this one
            ends = runs.run(processes, step, victim)
            if ends[victim] != signal.SIGKILL:  # threads took their steps in another order, and fewer
                continue
            for name, content in runs.outputs().items():  # at any moment each file is whole, or not there
                if name in wanted and kind == "test":
                    result["half_written"] += content != wanted[name]
            assert runs.run(processes) == [0] * processes, (runs.notes / "log").read_text()
            result["trials"] += 1
            result["identical"] += runs.outputs() == wanted
            result["images_again"] = max(result["images_again"], runs.images() - IMAGES)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
