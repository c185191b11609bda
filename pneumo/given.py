"""An ensemble at work on files that somebody names: a mask, an overlay and a record for each.

Imports inference, ensemble, tuning, decision, data, kernels, journal, checkpoint, log, dist, errors, config.
"""

import errno
import hashlib
import io
import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from skimage.measure import find_contours

from pneumo import checkpoint, config, dist, ensemble, inference, log
from pneumo.config import Recipe
from pneumo.data import cases, images
from pneumo.data.images import Scan
from pneumo.data.pack import pack_image
from pneumo.data.problems import counted, raise_fatal
from pneumo.decision.rule import PROBABILITY, decide
from pneumo.ensemble import Ensemble
from pneumo.errors import DataError, NoRadiographError, UsageError
from pneumo.inference import BEHIND
from pneumo.journal import Journal, open_journal
from pneumo.kernels.runs import runs_to_mask
from pneumo.tuning import Ruling

CONTOUR = (255, 64, 64)
SUFFIXES = ("_mask.png", "_overlay.png", "_probs.png")  # of the outputs of a given file, the last if it is asked for
RECORDS = "predictions.jsonl"
READERS = 2  # batches that are read ahead, each by a thread
SHOWN = 20  # remarks about files that are printed
CHEST_CM = (25, 60)  # the longer side of a film or detector, as far as chests of adults are taken on one
MADE_BY = b"Software\0pneumo"  # stands in each picture written here, which may be overwritten and is no X-ray
MARK_BYTES = 256  # of a PNG's start, which hold it
SQUARE = 2  # times as long as wide; no radiograph of a chest is longer
SHA256 = re.compile("[0-9a-f]{64}")
PICTURES = {".bmp", ".gif", ".heic", ".jp2", ".tif", ".tiff", ".webp"}  # that are not read


@dataclass(frozen=True)
class Given:
    """A file that somebody wants to have predicted.

    Attributes:
        path: where it is.
        name: of its outputs, relative to their folder, without "_mask.png" or "_overlay.png".
    """

    path: Path
    name: str


def find(arguments: Sequence[Path], out: Path, *, probs: bool = False) -> list[Given]:
    """The files that a command line names, and those in the folders that it names.

    Outputs of a file are called as it is, without suffix; those of a folder's files lie in the same folders below `out`
    as they do in it. Files of one folder that differ in their suffix alone keep it. What earlier predictions wrote is
    passed over, and in folders hidden files, what is no image, and what lies in `out`.

    Args:
        probs: pictures of probabilities will be among the outputs.

    Raises:
        UsageError: two files would have the same outputs, or an output would overwrite one of the files or anything
            else that no prediction has written.
        DataError: a folder has no image, or cannot be read; or there is only what earlier predictions wrote.
    """
    given: dict[str, Given] = {}
    place, own = out.resolve(), 0
    for argument in arguments:
        if not argument.is_dir():
            if argument.name.endswith(SUFFIXES) and _is_made(argument):
                own += 1
                continue
            given.setdefault(os.path.abspath(argument), Given(argument, cases.name_of(argument)))
            continue
        if argument.resolve() == place:
            raise UsageError(f"{argument}: the masks would lie among the X-rays. Choose another folder: --out DIR")
        found, others, problems = cases.list_images(argument)
        raise_fatal(problems, None)
        found, others = (
            [path for path in paths if not path.resolve().is_relative_to(place)] for paths in (found, others)
        )
        made = {path for path in found if path.name.endswith(SUFFIXES) and _is_made(path)}
        if made:
            found = [path for path in found if path not in made]
            log.say(f"{argument}: {len(made):,} pictures of earlier predictions were left out")
        kinds = sorted({path.suffix.lower() for path in others} & PICTURES)
        convert = f". Those in {', '.join(kinds)} can be read if they are saved as PNG" if kinds else ""
        if not found:
            raise DataError(f"{argument}: no PNG, JPEG or DICOM file in it{convert}")
        if others:
            left = counted(len(others), "file is no PNG, JPEG or DICOM", "files are no PNG, JPEG or DICOM")
            log.say(f"{argument}: {left}, left out, as {others[0]}{convert}")
        for path in found:
            name = str(path.relative_to(argument).parent / cases.name_of(path))
            given.setdefault(os.path.abspath(path), Given(path, name))
    if own:
        log.say(f"{own:,} of the given files are pictures of earlier predictions and were left out")
    if not given:
        raise DataError("none of the given files is an X-ray")
    found = _told_apart(list(given.values()))
    paths: dict[str, Path] = {}
    alike = [(paths.setdefault(one.name, one.path), one) for one in found]
    if pairs := [(path, one) for path, one in alike if path != one.path]:
        path, one = pairs[0]
        more = f" (and {len(pairs) - 1:,} more such pairs)" if len(pairs) > 1 else ""
        raise UsageError(
            f"{path} and {one.path} would both become {out / one.name}_mask.png{more}. Name the folder that holds "
            f"both, rename one, or predict them into two folders."
        )
    inputs = {one.path.resolve() for one in found}
    for one in found:
        for suffix in SUFFIXES if probs else SUFFIXES[:-1]:
            target = out / (one.name + suffix)
            if target.resolve() in inputs:
                raise UsageError(f"{target} is one of the given files. Choose another folder: --out DIR")
            if os.path.lexists(target) and not _is_made(target):
                raise UsageError(
                    f"{target} is there, and no prediction has written it, so it is not overwritten. Move it, or "
                    f"choose another folder: --out DIR"
                )
    return found


def _is_made(path: Path) -> bool:
    """Whether a picture is one that `_write_png` wrote."""
    try:
        with open(path, "rb") as file:
            return MADE_BY in file.read(MARK_BYTES)
    except OSError:
        return False


def _told_apart(given: Sequence[Given]) -> list[Given]:
    """The same files; where several of one folder would have one name, these are named with their suffix."""
    keys = [(os.path.dirname(os.path.abspath(one.path)), one.name) for one in given]
    count = Counter(keys)
    found = [
        replace(one, name=str(Path(one.name).with_name(one.path.name))) if count[key] > 1 else one
        for one, key in zip(given, keys, strict=True)
    ]
    if changed := [one for one, key in zip(found, keys, strict=True) if count[key] > 1]:
        log.say(
            f"{len(changed):,} files have another beside them that differs in its suffix alone; their masks keep it, "
            f"as {changed[0].name}{SUFFIXES[0]}"
        )
    return found


def predict(
    recipe: Recipe,
    models: Ensemble,
    ruling: Ruling,
    given: Sequence[Given],
    out: Path,
    device: torch.device,
    *,
    probs: bool = False,
) -> None:
    """Write <name>_mask.png, <name>_overlay.png and a line of predictions.jsonl for each file.

    Of a file that cannot be read the line has the error, and no mask is made; one of what the file was before, and is
    no longer, goes. Objects of a study that are no images, as reports, are no trouble beside others that are.

    Masks have the size of the file's own image. An image that is not square is padded to one for the network, and
    nothing is found in the padding; the rule's areas are pixels of the annotation grid over that square.

    Records of earlier predictions into the same folder stay, but for those of the same masks or files, whose masks and
    overlays go where they would be called otherwise now.

    Files are read ahead and results written behind the device, a few batches each. Batches are cut by position and
    finished as a whole, so an interrupted prediction goes on with the same ones, unless a file in it has changed or
    could not be read.

    Args:
        given: from `find`.
        probs: write <name>_probs.png as well, of the file's size, 8 bits: where v is not 0, the probability lies
            between v / 256 and (v + 1) / 256, and a threshold of t takes the pixels of 256 t and more.

    Raises:
        DataError: some files cannot be read, or have too long a name; the others have been written.
        NotFiniteError: a network's probability is not a number.
        UsageError: another prediction into this folder is running, or it holds a mask of another file, or records of
            another program, that would be overwritten.
    """
    count = models.batch_size
    batches = [given[start : start + count] for start in range(0, len(given), count)]
    basis = {**inference.basis(recipe, models, ruling, device), "probs": probs}
    dist.agree({**config.of_a_launch(recipe), **inference.shared(basis), "files": [str(file.path) for file in given]})
    with (
        open_journal(out / ".predict", basis, instead="another --out DIR") as journal,
        ThreadPoolExecutor(READERS) as readers,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as writers,
    ):
        if dist.is_main():
            checkpoint.clean(out.rglob("*.tmp"), RECORDS, *(f"*{suffix}" for suffix in SUFFIXES))
        others, earlier = _others(given, out)
        planned = {one.name + SUFFIXES[0]: one.path for one in given}
        origin = _origin(recipe, models, ruling)
        dist.gather(None)  # until all are here nobody writes
        done: list[dict[str, Any]] = []
        kept, forgotten = 0, False  # files whose results were there
        pending: deque = deque()

        def settle() -> None:
            key, failed, tasks = pending.popleft()
            results = [task.result() for task in tasks]
            part = {
                "records": [record for record, _ in results],
                "sizes": {name: length for _, sizes in results for name, length in sizes.items()},
                "failed": failed,
            }
            journal.add(key, part)
            done.append(part)

        def read(batch: Sequence[Given]) -> _Read:
            return _read(batch, models.image_size, journal, out)

        bar = log.bar(total=len(given), title="predict")
        for found in _ahead(readers, read, dist.mine(batches)):
            if found.part is not None:
                done.append(found.part)
                kept += found.count
            else:
                tasks = []
                if found.scans:
                    image = torch.from_numpy(np.stack(found.squares))[:, None].to(device)
                    names = [str(one.path) for one, *_ in found.scans]
                    shapes = np.array([scan.pixels.shape for _, scan, _ in found.scans])
                    boxes = images.boxes(shapes, recipe.data.annotation_size)
                    predicted = ensemble.predict(models, image, recipe.data.annotation_size, names, boxes)
                    if not forgotten:  # an earlier one's records would be of other masks
                        _remove(earlier.keys() - planned.keys(), out)
                        _write_records(others, out)
                        forgotten = True
                    tasks = [
                        writers.submit(_write_file, *one, of, ruling, origin, models.image_size, out, probs)
                        for one, *of in zip(found.scans, *predicted, strict=True)
                    ]
                pending.append((found.key, found.failed, tasks))
                while len(pending) > BEHIND:
                    settle()
            bar.update(found.count * dist.world())
        while pending:
            settle()
        bar.close()
        done = [part for some in dist.gather(done) for part in some]
        kept = sum(dist.gather(kept))
        failed = [record for part in done for record in part["failed"]]
        records = [record for part in done for record in part["records"]]
        left_out = sorted(record["error"] for record in failed if records and "no_radiograph" in record)
        complaints = sorted(record["error"] for record in failed if not records or "no_radiograph" not in record)
        if dist.is_main():
            missing = (planned.keys() - {record["mask"] for record in records}) & earlier.keys()
            now = {mask: _content(planned[mask]) for mask in missing}  # of a file that is away for a while, no hash
            _remove([mask for mask in missing if SHA256.fullmatch(now[mask]) and now[mask] != earlier[mask]], out)
            _report(records, [*others, *failed], out, kept, inference.by_what(models, ruling))
            if left_out:
                files = counted(len(left_out), "file is no radiograph and was", "files are no radiographs and were")
                log.say(f"{files} left out, as {left_out[0]}")
            _warn_of(complaints if len(complaints) > 1 else (), out)
            if not complaints:  # else the good files need not be done again when the bad ones are mended
                journal.finish()
    if complaints:
        raise DataError(f"{len(complaints)} of {len(given)} files could not be predicted: {complaints[0]}")


def segment(recipe: Recipe, models: Ensemble, ruling: Ruling, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predict one image that is in memory, as `predict` does those in files.

    Args:
        pixels: (H, W) uint8, bright is dense, as `images.read(path).pixels` gives it.

    Returns:
        (H, W) float32 probabilities, in 256 levels, and (H, W) bool, the mask; each pixel as the nearest one of the
        annotation grid.

    Raises:
        ValueError: of another type or shape.
        NotFiniteError: a network's probability is not a number.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 2:
        raise ValueError(
            f"an image must be (H, W) uint8, as of images.read(path).pixels, got {pixels.shape} {pixels.dtype}"
        )
    size = recipe.data.annotation_size
    device = next(models.models[0][0].parameters()).device
    image = torch.from_numpy(pack_image(pixels, models.image_size))[None, None].to(device)
    boxes = images.boxes(np.array([pixels.shape]), size)
    q = ensemble.predict(models, image, size, ["the image"], boxes).q[0]
    return _on_image(PROBABILITY[q].astype(np.float32), pixels), _on_image(_mask(q, ruling), pixels)


@dataclass(frozen=True)
class _Read:
    """A batch of given files, read.

    Attributes:
        key: tells its files and their contents.
        count: of its files, good and bad.
        part: what the journal knows of it, all of them good and all outputs in place; None if it must be done.
        scans: the good files with their sha256, and `squares`, (S, S) uint8, what the network sees of them.
        failed: records of the bad files.
    """

    key: str
    count: int
    part: dict[str, Any] | None
    scans: Sequence[tuple[Given, Scan, str]] = ()
    squares: Sequence[np.ndarray] = ()
    failed: Sequence[dict[str, Any]] = ()


def _read(batch: Sequence[Given], image_size: int, journal: Journal, out: Path) -> _Read:
    """Read a batch of files, unless its results are there."""
    contents = [[one.name, str(one.path), _content(one.path)] for one in batch]
    key = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    part = journal.parts.get(key)
    # a file that could not be read may be readable now: a decoder was installed, a disk is there again
    if (
        part is not None
        and all("no_radiograph" in record for record in part["failed"])
        and all(_length(out / name) == length for name, length in part["sizes"].items())
    ):
        return _Read(key, len(batch), part)
    scans, squares, failed = [], [], []
    for one, (*_, digest) in zip(batch, contents, strict=True):
        try:
            scan = images.read(one.path)
            _check_names(one, out)
        except DataError as error:
            record = {"file": str(one.path), "path_hash": _path_hash(one.path), "error": str(error)}
            failed.append({**record, **({"no_radiograph": True} if isinstance(error, NoRadiographError) else {})})
            continue
        scans.append((one, scan, digest))
        squares.append(pack_image(scan.pixels, image_size))
    return _Read(key, len(batch), None, scans, squares, failed)


def _check_names(one: Given, out: Path) -> None:
    """Refuse a file whose outputs have names that the file system cannot hold, before they are computed."""
    last = checkpoint.temporary(Path(one.name + max(SUFFIXES, key=len)))  # the longest that is written
    for name in (last, *last.parts):  # in a folder that is yet to be made, only a part alone tells
        try:
            os.lstat(out / name)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise DataError(f"{one.path}: the names of its mask and overlay are too long. Rename it.") from None


def _path_hash(path: Path) -> str:
    """A hash of where a file is: tells it from another of its name, but not the names of folders, as a patient's."""
    return hashlib.sha256(os.path.abspath(path).encode(errors="surrogateescape")).hexdigest()


def _content(path: Path) -> str:
    """A file's hash, or why it has none."""
    try:
        return checkpoint.sha256(path) if path.is_file() else "no file"
    except OSError as error:
        return str(error.strerror)


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _ahead(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Results of `work`, in order, while the pool works on a few items more."""
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > READERS:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _others(given: Sequence[Given], out: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Records in a folder of masks that are not about to be made, and are still there.

    And the masks that are there of files that are given now, which may have other names now, with the sha256 of what
    these files were.

    Raises:
        UsageError: a mask is about to be overwritten by that of another file, or the records are somebody else's.
    """
    try:
        lines = (out / RECORDS).read_bytes().splitlines()
    except OSError:  # none yet
        return [], {}
    if lines and not any(map(_is_record, lines)):
        raise UsageError(
            f"{out / RECORDS} is there, and no prediction has written it, so it is not overwritten. Move it, or choose "
            f"another folder: --out DIR"
        )
    paths = {one.name + SUFFIXES[0]: one.path for one in given}
    hashes = {_path_hash(one.path) for one in given}
    left, earlier = [], {}
    for count, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            keys = ("mask", "file", "path_hash", "sha256", "error")
            mask, file, path_hash, digest, trouble = (str(record.get(key, "")) for key in keys)
            there = (out / mask).is_file()
        except (ValueError, RecursionError, AttributeError, OSError):  # cut, no JSON, no object, no file's name
            log.warn(f"{out / RECORDS} line {count} is damaged and is dropped; its mask is not looked after")
            continue
        path = paths.get(mask)
        if path_hash not in hashes and ((path is None and mask and there) or trouble):
            left.append(record)
        elif path is not None and there and path_hash not in ("", _path_hash(path)) and digest != _content(path):
            raise UsageError(
                f"{out / mask} is the mask of {file} and would become that of {path}. Choose another folder, --out "
                f"DIR, or name a folder that holds both"
            )
        elif path_hash in hashes and mask and there:
            earlier[mask] = digest
    return left, earlier


def _is_record(line: bytes) -> bool:
    """Whether a line of predictions.jsonl is one that a prediction wrote."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "file" in found and ("mask" in found or "error" in found)


def _remove(masks: Iterable[str], out: Path) -> None:
    """Remove masks, named as in the records, and what is beside them, as far as a prediction wrote it."""
    for mask in masks:
        if Path(mask).is_absolute() or ".." in Path(mask).parts:
            continue  # records may come from anywhere
        for suffix in SUFFIXES:
            path = out / (mask.removesuffix(SUFFIXES[0]) + suffix)
            if _is_made(path):
                path.unlink(missing_ok=True)


def _write_records(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Write predictions.jsonl, by file; without records, none."""
    if records:
        log.write_jsonl(out / RECORDS, sorted(records, key=lambda record: str(record.get("file"))))
    else:
        (out / RECORDS).unlink(missing_ok=True)


def _report(records: list[dict[str, Any]], others: Sequence[dict[str, Any]], out: Path, kept: int, by: str) -> None:
    """Write predictions.jsonl, with the records of other and bad files in it; say what was found and what is odd."""
    _write_records([*others, *records], out)
    if not records:
        return
    records.sort(key=lambda record: record["file"])
    _warn_of([f"{record['file']}: {warning}" for record in records for warning in record["warnings"]], out)
    positive = sum(record["area_pixels"] > 0 for record in records)
    there = f"; {kept} were there from before" if kept else ""
    files = counted(len(records), "file", "files")
    log.say(f"{out}: {files}, {positive} with pneumothorax{there}; {by}. For research, not for diagnosis.")


def _warn_of(remarks: Sequence[str], out: Path) -> None:
    """Warn of files' oddities or errors, a line each, as far as anybody would read them."""
    for remark in remarks[:SHOWN]:
        log.warn(remark)
    if len(remarks) > SHOWN:
        log.warn(f"{len(remarks) - SHOWN:,} more like these are in {out / RECORDS}")


def _origin(recipe: Recipe, models: Ensemble, ruling: Ruling) -> dict[str, Any]:
    """What made a mask, for its record."""
    checkpoints = "".join(models.sources.values())
    return {
        "rule": asdict(ruling.rule),
        "rule_source": ruling.source,
        "networks": hashlib.sha256(checkpoints.encode()).hexdigest()[:16],
        "folds": [len(models.models), recipe.folds.count],
        "mirror": models.mirror,
        "precision": str(models.dtype).removeprefix("torch."),
    }


def _write_file(
    given: Given,
    scan: Scan,
    digest: str,
    of: Sequence[np.ndarray],
    ruling: Ruling,
    origin: dict[str, Any],
    image_size: int,
    out: Path,
    probs: bool,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Write the outputs of one file; return its record, and the outputs' lengths in bytes by name.

    Args:
        of: of the file, the parts of `ensemble.Prediction`.
        origin: from `_origin`.
        image_size: of what the networks see.
    """
    height, width = scan.pixels.shape
    mask = _on_image(_mask(of[0], ruling), scan.pixels)
    area = int(mask.sum())
    pictures = [Image.fromarray(mask.astype(np.uint8) * 255), overlay(scan.pixels, mask)]
    names = [given.name + suffix for suffix in SUFFIXES]
    if probs:
        pictures.append(Image.fromarray(_on_image(of[0], scan.pixels)))
    elif _is_made(out / names[-1]):
        (out / names[-1]).unlink()  # of an earlier prediction, perhaps by other networks
    record = {
        "file": str(given.path),
        "path_hash": _path_hash(given.path),
        "sha256": digest,
        "mask": names[0],
        **({"probs": names[-1]} if probs else {}),
        **inference.describe(*of, ruling),
        "pneumothorax": area > 0,  # in the file's own pixels, as its mask
        "area_pixels": area,
        "area_cm2": None if scan.spacing is None else area * scan.spacing[0] * scan.spacing[1] / 100,
        "spacing_mm": scan.spacing,
        "height": height,
        "width": width,
        **origin,
        "warnings": [*scan.warnings, *_odd_shape(scan, image_size), *_odd_size(scan)],
    }
    return record, {
        name: _write_png(picture, out / name) for name, picture in zip(names[: len(pictures)], pictures, strict=True)
    }


def _odd_shape(scan: Scan, image_size: int) -> list[str]:
    """Doubt about images that are no whole X-ray, or that lack what the networks look for."""
    shorter, longer = sorted(scan.pixels.shape)
    remarks = []
    if longer > SQUARE * shorter:
        remarks.append(f"{longer / shorter:.3g} times as long as wide: is it a strip of an X-ray?")
    if 2 * longer < image_size:
        remarks.append(f"only {longer} px long, where the networks saw {image_size}: enlarged, it has no details")
    return remarks


def _odd_size(scan: Scan) -> list[str]:
    """Doubt about areas in cm2 where an X-ray is too small or too large for a chest by its pixels' spacing.

    Those of the challenge are: resized to 1024 pixels, they kept the spacing of the detector.
    """
    if scan.spacing is None:
        return []
    longer = max(side * spacing / 10 for side, spacing in zip(scan.pixels.shape, scan.spacing, strict=True))
    if CHEST_CM[0] <= longer <= CHEST_CM[1]:
        return []
    return [
        f"{longer:.3g} cm long by the spacing of its pixels, where an adult's X-ray has {CHEST_CM[0]} to "
        f"{CHEST_CM[1]}: a child, or it was cropped or resized; if resized, area_cm2 is wrong"
    ]


def _mask(q: np.ndarray, ruling: Ruling) -> np.ndarray:
    """(A, A) bool, the mask of one image on the annotation grid, from (A, A) uint8 quantised probabilities."""
    return runs_to_mask(decide(q, ruling.rule), *q.shape)


def _on_image(grid: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Bring what is on the (A, A) annotation grid to an image's own (H, W) pixels, to each from the nearest."""
    longer = max(pixels.shape)
    square = Image.fromarray(grid).resize((longer, longer), Image.Resampling.NEAREST)
    return images.from_square(np.asarray(square), *pixels.shape)


def overlay(pixels: np.ndarray, mask: np.ndarray) -> Image.Image:
    """The X-ray with the mask's outline: (H, W) uint8 and (H, W) bool to an RGB picture."""
    picture = Image.fromarray(pixels).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for contour in find_contours(np.pad(mask, 1).astype(np.float32), 0.5):
        points = [(float(x) - 1, float(y) - 1) for y, x in contour]
        draw.line(points, fill=CONTOUR, width=max(1, round(max(pixels.shape) / 400)))
    return picture


def _write_png(picture: Image.Image, path: Path) -> int:
    """Write a picture, marked as ours; return its length in bytes."""
    content, mark = io.BytesIO(), PngInfo()
    mark.add(b"tEXt", MADE_BY)
    # level 1 takes a quarter of the time of 6; an overlay is a quarter larger
    picture.save(content, "PNG", pnginfo=mark, compress_level=1)
    checkpoint.write_atomic(path, content.getvalue())
    return len(content.getvalue())
