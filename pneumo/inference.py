"""An ensemble at work: on a data set's test images for a submission, or on files that somebody names.

Imports config, dataset, ensemble, decision, data, submission, checkpoint, log, dist.
"""

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
from torch import Tensor

from pneumo import checkpoint, dataset, dist, ensemble, log, submission
from pneumo.config import Recipe
from pneumo.data import images, rle
from pneumo.data.feed import Feed, cut
from pneumo.data.images import Scan
from pneumo.data.pack import pack_image
from pneumo.decision.rule import Rule, decide, image_score, resize_quantise
from pneumo.ensemble import Ensemble
from pneumo.errors import DataError, NotFiniteError, UsageError
from pneumo.kernels.runs import runs_to_mask

CONTOUR = (255, 64, 64)


def predict_test(recipe: Recipe, models: Ensemble, device: torch.device) -> None:
    """Write submission.csv for the test images, and submission.json on what made it.

    Processes of a launch share the images. The host decides on one batch while the device computes the next.

    Raises:
        DataError: the folder or the sample is wrong, or they do not fit each other.
        NotFiniteError: a network's probability is not a number.
    """
    found, sample_ids = dataset.load_test_cases(recipe)
    rule, size = Rule(**asdict(recipe.rule)), recipe.data.annotation_size
    pack = dataset.open_pack(recipe, "test", found, models.image_size)
    rows = np.arange(len(found))
    batches = cut(rows, recipe.predict.batch_size)
    mine = batches[dist.rank() :: dist.world()]
    reserve = int(recipe.train.gpu_reserve_gb * 2**30)
    feed = Feed(pack, device, np.concatenate([rows[:0], *mine]), reserve=reserve)

    def code(row: int, q: np.ndarray) -> tuple[str, str]:
        return found[row].image_id, rle.encode_runs(decide(q, rule))

    written: list[tuple[str, str]] = []
    with ThreadPoolExecutor(1) as pool:
        pending: deque = deque()
        for numbers, (image, _) in zip(log.bar(mine, title="predict"), feed.batches(mine), strict=True):
            maps = quantised(models, image, size, [found[row].image_id for row in numbers])
            pending.append(pool.map(code, numbers.tolist(), maps))
            while len(pending) > 2:
                written += pending.popleft()
        for coded in pending:
            written += coded
    # ids of the sample without an image, which `load_test_cases` let pass with a warning, are empty
    codes = dict.fromkeys(set(sample_ids) - {case.image_id for case in found}, rle.EMPTY)
    for part in dist.gather(written):
        codes.update(part)
    if dist.is_main():
        path = recipe.folder / "submission.csv"
        submission.write(path, codes, sample_ids, size)
        origin = {
            "checkpoints": models.sources,
            "rule": asdict(rule),
            "mirror": models.mirror,
            "image_size": models.image_size,
            "data": models.data,
            "split": models.split,
        }
        checkpoint.write_atomic(path.with_suffix(".json"), json.dumps(origin, indent=1).encode() + b"\n")
        log.say(f"{path}: {submission.summary(codes, size)}; {len(models.models)} folds")


def predict_files(recipe: Recipe, models: Ensemble, paths: Sequence[Path], out: Path, device: torch.device) -> None:
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
    rule, size = Rule(**asdict(recipe.rule)), recipe.data.annotation_size
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
        q = quantised(models, image, size, [str(path)])[0]
        records.append(_write_file(path, scan, q, rule, out))
    records = sorted((record for part in dist.gather(records) for record in part), key=lambda r: r["file"])
    complaints = [message for part in dist.gather(complaints) for message in part]
    if dist.is_main():
        log.write_jsonl(out / "predictions.jsonl", records)
        positive = sum(record["area_pixels"] > 0 for record in records)
        log.say(f"{out}: {len(records)} files, {positive} with pneumothorax. For research, not for diagnosis.")
    if complaints:
        raise DataError(f"{len(complaints)} of {len(paths)} files could not be read: {' | '.join(complaints[:5])}")


def quantised(models: Ensemble, image: Tensor, size: int, names: Sequence[str]) -> np.ndarray:
    """The ensemble's probabilities on the annotation grid, in 256 levels.

    Args:
        image: (B, 1, S, S) uint8, on the models' device.
        size: side of the annotation grid, A.
        names: of the B images, for the error.

    Returns:
        (B, A, A) uint8, on the host.

    Raises:
        NotFiniteError: a probability is not a number; it would have become an innocent empty mask.
    """
    probs = ensemble.predict(models, image)
    finite = probs.isfinite().flatten(1).all(dim=1).tolist()
    if bad := [name for name, good in zip(names, finite, strict=True) if not good]:
        raise NotFiniteError(f"the networks' probabilities of {', '.join(bad[:5])} are not numbers")
    return resize_quantise(probs, size).cpu().numpy()


def _write_file(path: Path, scan: Scan, q: np.ndarray, rule: Rule, out: Path) -> dict[str, Any]:
    """Write mask and overlay of one file; return its record."""
    height, width = scan.pixels.shape
    decided = runs_to_mask(decide(q, rule), *q.shape)
    longer = max(height, width)
    square = Image.fromarray(decided).resize((longer, longer), Image.Resampling.NEAREST)
    mask = images.from_square(np.asarray(square), height, width)
    area = int(mask.sum())
    _write_png(Image.fromarray(mask.astype(np.uint8) * 255), out / f"{path.stem}_mask.png")
    _write_png(overlay(scan.pixels, mask), out / f"{path.stem}_overlay.png")
    return {
        "file": str(path),
        "probability": image_score(q),
        "pneumothorax": area > 0,
        "area_pixels": area,
        "area_cm2": None if scan.spacing is None else area * scan.spacing[0] * scan.spacing[1] / 100,
        "height": height,
        "width": width,
        "rule": asdict(rule),
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
