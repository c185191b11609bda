"""An ensemble at work on a data set's test images, for a submission.

Imports config, dataset, ensemble, tuning, decision, data, submission, journal, checkpoint, log, dist.
"""

import csv
import io
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from pneumo import checkpoint, config, dataset, dist, ensemble, log, submission, tuning
from pneumo.config import Recipe
from pneumo.data import rle
from pneumo.data.feed import Feed, cut
from pneumo.decision import tables, trust
from pneumo.decision.rule import decide, image_score, level
from pneumo.decision.trust import Signals
from pneumo.ensemble import Ensemble
from pneumo.journal import open_journal
from pneumo.tuning import Ruling

FORMAT = 7  # of what is kept of an interrupted prediction; change it when the same files would give other results
BEHIND = 2  # batches whose results are being made while the device computes


def predict_test(recipe: Recipe, models: Ensemble, ruling: Ruling, device: torch.device) -> None:
    """Write submission.csv for the test images, submission.json on what made it, and referral.csv.

    Processes of a launch share the images. The host decides on one batch while the device computes the next. An
    interrupted prediction goes on, batch by batch: these are cut by position, so that each holds the same images.

    Raises:
        DataError: the folder or the sample is wrong, or they do not fit each other.
        NotFiniteError: a network's probability is not a number.
        UsageError: another prediction of this recipe is running.
    """
    found, sample_ids = dataset.load_test_cases(recipe)
    size = recipe.data.annotation_size
    pack = dataset.open_pack(recipe, "test", found, models.image_size)
    batches = cut(np.arange(len(found)), models.batch_size)
    depends_on = {**basis(recipe, models, ruling, device), "data": pack.digest}

    def code(row: int, *of: np.ndarray) -> tuple[dict[str, Any], str]:
        return {"ImageId": found[row].image_id, **describe(*of, ruling)}, rle.encode_runs(decide(of[0], ruling.rule))

    dist.agree({**config.of_a_launch(recipe), **shared(depends_on)})
    with (
        open_journal(recipe.folder / "predict", depends_on, instead="another recipe or --set runs=DIR") as journal,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        left = [place for place in range(len(batches)) if str(place) not in journal.parts]
        if journal.parts:
            log.say(f"{recipe.folder}: goes on; {len(batches) - len(left)} of {len(batches)} batches are there")
        mine = dist.mine(left)
        plan = [batches[place] for place in mine]
        reserve = recipe.train.gpu_reserve
        feed = Feed(pack, device, np.concatenate([batches[0][:0], *plan]), reserve=reserve)
        coded: dict[str, list[tuple[dict[str, Any], str]]] = {}
        pending: deque = deque()

        def settle() -> None:
            place, results = pending.popleft()
            coded[str(place)] = list(results)
            journal.add(str(place), coded[str(place)])

        shown = log.bar(
            mine, title="predict", start=len(batches) - len(left), total=len(batches) - len(left) + len(mine)
        )
        for place, (image, _) in zip(shown, feed.batches(plan), strict=True):
            rows = batches[place].tolist()
            names, boxes = [found[row].image_id for row in rows], pack.boxes(batches[place], size)
            predicted = ensemble.predict(models, image, size, names, boxes)
            pending.append((place, pool.map(code, rows, *predicted)))
            while len(pending) > BEHIND:
                settle()
        while pending:
            settle()
        parts = {key: part for some in dist.gather(coded) for key, part in some.items()}
        if dist.is_main():
            written = [item for part in {**journal.parts, **parts}.values() for item in part]
            _write_submission(recipe, models, ruling, sample_ids, written)
        journal.finish()


def _write_submission(
    recipe: Recipe,
    models: Ensemble,
    ruling: Ruling,
    sample_ids: Sequence[str],
    written: Sequence[tuple[dict[str, Any], str]],
) -> None:
    """Write the files of a submission from each test image's record and code, in any order."""
    size, path = recipe.data.annotation_size, recipe.folder / "submission.csv"
    checkpoint.clean(recipe.folder.glob("*.tmp"), path.name, "submission.json", "referral.csv")
    codes = {record["ImageId"]: code for record, code in written}
    # ids of the sample without an image, which `load_test_cases` let pass with a warning, are empty
    codes |= {image_id: rle.EMPTY for image_id in sample_ids if image_id not in codes}
    submission.write(path, codes, sample_ids, size)
    origin = {
        "sha256": checkpoint.sha256(path),
        "checkpoints": models.sources,
        "folds": [len(models.models), recipe.folds.count],
        "rule": asdict(ruling.rule),
        "rule_source": ruling.source,
        "mirror": models.mirror,
        "image_size": models.image_size,
        "data": models.data,
        "split": models.split,
    }
    log.write_json(path.with_suffix(".json"), origin)
    _write_referrals([record for record, _ in written], recipe.folder / "referral.csv")
    log.say(f"{path}: {submission.summary(codes, size)}; {by_what(models, ruling)}")
    if len(models.models) < recipe.folds.count:
        log.warn(f"{path} is of {len(models.models)} of {recipe.folds.count} folds; make submit writes it of all")


def by_what(models: Ensemble, ruling: Ruling) -> str:
    """How many networks predicted and by which rule, in words."""
    source = "the recipe" if ruling.source == "recipe" else ruling.source
    return f"networks: {sum(map(len, models.models))}, rule of {source}: {tuning.describe(ruling.rule)}"


def basis(recipe: Recipe, models: Ensemble, ruling: Ruling, device: torch.device) -> dict[str, Any]:
    """All that a prediction depends on besides the images, for a journal."""
    return {
        "format": FORMAT,
        "checkpoints": list(models.sources.values()),
        "image_size": models.image_size,
        "annotation_size": recipe.data.annotation_size,
        "mirror": models.mirror,
        "autocast": str(models.dtype),
        "batch_size": models.batch_size,
        "rule": asdict(ruling.rule),
        "rule_source": ruling.source,
        "trust": None if ruling.trust is None else asdict(ruling.trust),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        "versions": {
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "code": dist.code_hash(),
        },
    }


def shared(depends_on: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a prediction depends on, that in which processes of a launch must agree; hosts and paths may differ."""
    return {key: value for key, value in depends_on.items() if key not in ("device", "rule_source")}


def describe(q: np.ndarray, agreement: np.ndarray, histograms: np.ndarray, ruling: Ruling) -> dict[str, Any]:
    """How sure the ensemble is of one image, and how good its mask probably is.

    Expected Dice is the mean of what each fold's networks alone would say of a mask, or of an empty one, as decided.

    Args:
        q, agreement, histograms: of one image, as of `ensemble.Prediction`.
    """
    unknown, at = np.empty((0, 2), dtype=np.int64), level(ruling.rule.threshold)
    signals = trust.signals(tables.measure(q, unknown, np.array([at]), agreement.mean(axis=0)), ruling.rule)
    by_fold = Signals(
        *(np.repeat(of_all, len(histograms)) for of_all in (signals.decided, signals.area)),
        score=image_score(histograms),
        agreement=agreement[:, at],
        soft_dice=trust.soft_dice(histograms, at),
    )
    return {
        "score": float(signals.score[0]),
        "pneumothorax": bool(signals.decided[0]),
        "area_grid": int(signals.area[0]),
        "agreement": float(signals.agreement[0]),
        "expected_dice": None if ruling.trust is None else float(ruling.trust.expected_dice(by_fold).mean()),
    }


def _write_referrals(records: list[dict[str, Any]], path: Path) -> None:
    """The referral queue: images of lowest expected Dice first; without a learned one, nothing is written."""
    if any(record["expected_dice"] is None for record in records):
        path.unlink(missing_ok=True)  # one of an earlier prediction would be wrong now
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, ["rank", *records[0]], lineterminator="\n")
    writer.writeheader()
    queue = sorted(records, key=lambda record: (record["expected_dice"], record["ImageId"]))
    writer.writerows({"rank": rank, **record} for rank, record in enumerate(queue, 1))
    checkpoint.write_atomic(path, text.getvalue().encode())
