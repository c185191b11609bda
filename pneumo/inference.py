"""An ensemble at work: on a data set's test images for a submission, or on files that somebody names.

Imports config, dataset, ensemble, tuning, decision, data, kernels, submission, checkpoint, log, dist, errors.
"""

import csv
import io
import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage.measure import find_contours

from pneumo import checkpoint, dataset, dist, ensemble, log, submission
from pneumo.config import Recipe
from pneumo.data import images, rle
from pneumo.data.feed import Feed, cut
from pneumo.data.images import Scan
from pneumo.data.pack import pack_image
from pneumo.decision import tables, trust
from pneumo.decision.rule import decide, level
from pneumo.ensemble import Ensemble
from pneumo.errors import DataError, UsageError
from pneumo.kernels.runs import runs_to_mask
from pneumo.tuning import Ruling

CONTOUR = (255, 64, 64)


def predict_test(recipe: Recipe, models: Ensemble, ruling: Ruling, device: torch.device) -> None:
    """Write submission.csv for the test images, submission.json on what made it, and referral.csv.

    Processes of a launch share the images. The host decides on one batch while the device computes the next.

    Raises:
        DataError: the folder or the sample is wrong, or they do not fit each other.
        NotFiniteError: a network's probability is not a number.
    """
    found, sample_ids = dataset.load_test_cases(recipe)
    size = recipe.data.annotation_size
    pack = dataset.open_pack(recipe, "test", found, models.image_size)
    rows = np.arange(len(found))
    batches = cut(rows, recipe.predict.batch_size)
    mine = batches[dist.rank() :: dist.world()]
    reserve = int(recipe.train.gpu_reserve_gb * 2**30)
    feed = Feed(pack, device, np.concatenate([rows[:0], *mine]), reserve=reserve)

    def code(row: int, q: np.ndarray, agreement: np.ndarray) -> tuple[dict[str, Any], str]:
        runs = decide(q, ruling.rule)
        return {"ImageId": found[row].image_id, **_describe(q, agreement, ruling)}, rle.encode_runs(runs)

    written: list[tuple[dict[str, Any], str]] = []
    with ThreadPoolExecutor(1) as pool:
        pending: deque = deque()
        for numbers, (image, _) in zip(log.bar(mine, title="predict"), feed.batches(mine), strict=True):
            predicted = ensemble.predict(models, image, size, [found[row].image_id for row in numbers])
            pending.append(pool.map(code, numbers.tolist(), predicted.q, predicted.agreement))
            while len(pending) > 2:
                written += pending.popleft()
        for coded in pending:
            written += coded
    written = [item for part in dist.gather(written) for item in part]
    # ids of the sample without an image, which `load_test_cases` let pass with a warning, are empty
    codes = dict.fromkeys(set(sample_ids) - {case.image_id for case in found}, rle.EMPTY)
    codes |= {record["ImageId"]: text for record, text in written}
    if dist.is_main():
        path = recipe.folder / "submission.csv"
        submission.write(path, codes, sample_ids, size)
        origin = {
            "checkpoints": models.sources,
            "rule": asdict(ruling.rule),
            "rule_source": ruling.source,
            "mirror": models.mirror,
            "image_size": models.image_size,
            "data": models.data,
            "split": models.split,
        }
        checkpoint.write_atomic(path.with_suffix(".json"), json.dumps(origin, indent=1).encode() + b"\n")
        _write_referrals([record for record, _ in written], recipe.folder / "referral.csv")
        log.say(
            f"{path}: {submission.summary(codes, size)}; networks: {len(models.models)}, rule of "
            f"{'the recipe' if ruling.source == 'recipe' else ruling.source}"
        )


def predict_files(
    recipe: Recipe, models: Ensemble, ruling: Ruling, paths: Sequence[Path], out: Path, device: torch.device
) -> None:
    """Write <stem>_mask.png, <stem>_overlay.png and a line of predictions.jsonl for each file.

    Masks have the size of the file's own image. An image that is not square is padded to one for the network; the
    rule's areas are pixels of the annotation grid over that square.

    Raises:
        DataError: some files cannot be read; the others have been written.
        UsageError: two files have one name.
    """
    stems = [path.stem for path in paths]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UsageError(f"two files are called {twice[0]}: their masks would overwrite each other")
    size = recipe.data.annotation_size
    out.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    complaints: list[str] = []
    for path in log.bar(list(paths)[dist.rank() :: dist.world()], title="predict"):
        try:
            scan = images.read(path)
        except DataError as error:
            complaints.append(str(error))
            continue
        for warning in scan.warnings:
            log.warn(f"{path}: {warning}")
        image = torch.from_numpy(pack_image(scan.pixels, models.image_size))[None, None].to(device)
        predicted = ensemble.predict(models, image, size, [str(path)])
        records.append(_write_file(path, scan, predicted.q[0], predicted.agreement[0], ruling, out))
    records = sorted((record for part in dist.gather(records) for record in part), key=lambda r: r["file"])
    complaints = [message for part in dist.gather(complaints) for message in part]
    if dist.is_main():
        log.write_jsonl(out / "predictions.jsonl", records)
        positive = sum(record["area_pixels"] > 0 for record in records)
        log.say(f"{out}: {len(records)} files, {positive} with pneumothorax. For research, not for diagnosis.")
    if complaints:
        raise DataError(f"{len(complaints)} of {len(paths)} files could not be read: {' | '.join(complaints[:5])}")


def _describe(q: np.ndarray, agreement: np.ndarray, ruling: Ruling) -> dict[str, Any]:
    """How sure the ensemble is of one image, and how good its mask probably is."""
    unknown = np.empty((0, 2), dtype=np.int64)
    table = tables.measure(q, unknown, np.array([level(ruling.rule.threshold)]), agreement)
    signals = trust.signals(table, ruling.rule)
    return {
        "score": float(signals.score[0]),
        "pneumothorax": bool(signals.decided[0]),
        "area_grid": int(signals.area[0]),
        "agreement": float(signals.agreement[0]),
        "expected_dice": None if ruling.trust is None else float(ruling.trust.expected_dice(signals)[0]),
    }


def _write_referrals(records: list[dict[str, Any]], path: Path) -> None:
    """The referral queue: images of lowest expected Dice first; without a learned one, nothing is written."""
    if any(record["expected_dice"] is None for record in records):
        path.unlink(missing_ok=True)  # one of an earlier prediction would be wrong now
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, ["place", *records[0]], lineterminator="\n")
    writer.writeheader()
    queue = sorted(records, key=lambda record: (record["expected_dice"], record["ImageId"]))
    writer.writerows({"place": place, **record} for place, record in enumerate(queue, 1))
    checkpoint.write_atomic(path, text.getvalue().encode())


def _write_file(
    path: Path, scan: Scan, q: np.ndarray, agreement: np.ndarray, ruling: Ruling, out: Path
) -> dict[str, Any]:
    """Write mask and overlay of one file; return its record."""
    height, width = scan.pixels.shape
    decided = runs_to_mask(decide(q, ruling.rule), *q.shape)
    longer = max(height, width)
    square = Image.fromarray(decided).resize((longer, longer), Image.Resampling.NEAREST)
    mask = images.from_square(np.asarray(square), height, width)
    area = int(mask.sum())
    _write_png(Image.fromarray(mask.astype(np.uint8) * 255), out / f"{path.stem}_mask.png")
    _write_png(overlay(scan.pixels, mask), out / f"{path.stem}_overlay.png")
    return {
        "file": str(path),
        **_describe(q, agreement, ruling),
        "pneumothorax": area > 0,  # in the file's own pixels, as its mask
        "area_pixels": area,
        "area_cm2": None if scan.spacing is None else area * scan.spacing[0] * scan.spacing[1] / 100,
        "height": height,
        "width": width,
        "rule": asdict(ruling.rule),
        "rule_source": ruling.source,
    }


def overlay(pixels: np.ndarray, mask: np.ndarray) -> Image.Image:
    """The X-ray with the mask's outline: (H, W) uint8 and (H, W) bool to an RGB picture."""
    picture = Image.fromarray(pixels).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for contour in find_contours(np.pad(mask, 1).astype(np.float32), 0.5):
        points = [(float(x) - 1, float(y) - 1) for y, x in contour]
        draw.line(points, fill=CONTOUR, width=max(1, round(max(pixels.shape) / 400)))
    return picture


def _write_png(picture: Image.Image, path: Path) -> None:
    content = io.BytesIO()
    picture.save(content, "PNG")
    checkpoint.write_atomic(path, content.getvalue())
