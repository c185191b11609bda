"""Images decoded once into a memory-mapped uint8 array, their masks into bits beside it.

A pack is a folder named by the content of what is in it, so a changed image, mask or list of images makes another one.
Packing can be interrupted at any point and goes on where it was. Imports cases, problems, images, kernels,
checkpoint, log, errors.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from pneumo import checkpoint, log
from pneumo.data import images
from pneumo.data.cases import THUMBNAIL, Case
from pneumo.data.problems import Problem, raise_fatal
from pneumo.errors import DataError
from pneumo.kernels.runs import runs_to_mask

FORMAT = 4  # change it when the same files would give other pixels
UNDONE = 0  # as a new file is
FLUSH_EVERY = 256  # rows between two moments at which finished rows are made durable


@dataclass(frozen=True)
class Pack:
    """The decoded images of a list of cases, by row.

    Attributes:
        image_ids: N ids; row i of the arrays is case i.
        images: (N, S, S) uint8, memory-mapped.
        masks: (N, S, S // 8) uint8, memory-mapped; 8 pixels of a row a byte, the leftmost in the highest bit.
        shapes: (N, 2) int32, height and width of each file's picture.
        digest: hash of the files and annotations it was made from, the same for every side.
        hashes: (N,) int64, the first 8 bytes of each file's sha256.
    """

    image_ids: tuple[str, ...]
    images: np.ndarray
    masks: np.ndarray
    shapes: np.ndarray
    digest: str
    hashes: np.ndarray

    @property
    def side(self) -> int:
        return self.images.shape[1]

    def boxes(self, rows: np.ndarray, side: int) -> np.ndarray | None:
        """Where the images of some rows lie on a grid of this side, as `images.boxes` has it."""
        return images.boxes(self.shapes[rows], side)


def open_pack(
    folder: Path,
    name: str,
    cases: Sequence[Case],
    side: int,
    *,
    annotation_size: int,
    check: bool = False,
    report: Path | None = None,
) -> Pack:
    """Open the pack of these cases at this side, making what is missing of it first.

    Several processes may call this at once: one works, the others wait for it. One that is complete may be on a
    read-only file system.

    Args:
        folder: holds packs, and the hashes of files seen before.
        cases: by id; a pack's name does not tell their order, its rows do.
        name: for people, the first part of the pack's folder name.
        side: of the square images, pixels; a multiple of 32.
        annotation_size: side of the grid that the cases' runs live on.
        check: compare every finished row with its checksum, and make anew what differs.
        report: where to list, as CSV, the images that cannot be read; None: nowhere.

    Raises:
        DataError: images cannot be read; names the first, and lists all. What could be decoded is kept.
        WriteError: the disk is full.
    """
    assert all(a.image_id < b.image_id for a, b in pairwise(cases)), "cases must be sorted by id"
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.wait_lock(folder / "lock", log.say):
        hashes = file_hashes(folder / "files.json", [case.path for case in cases], report=report)
        digest = content_digest(cases, hashes, annotation_size)
        place = folder / f"{name}-{side}-{digest[:12]}"
        place.mkdir(exist_ok=True)
        count = len(cases)
        wanted = {
            "images": (np.uint8, (count, side, side)),
            "masks": (np.uint8, (count, side, side // 8)),
            "shapes": (np.int32, (count, 2)),
        }
        rows = _array(place / "rows.npy", np.int64, (count,))
        if (
            rows.any()
            and rows.flags.writeable
            and not all(_is_whole(place / f"{name}.npy", *of) for name, of in wanted.items())
        ):
            rows[:] = UNDONE
            rows.flush()  # before any array is made: an interruption must not leave one of zeros that is taken for done
        arrays = tuple(_array(place / f"{name}.npy", *of) for name, of in wanted.items())
        todo = [i for i in range(count) if rows[i] == UNDONE or (check and rows[i] != _crc(*arrays, i))]
        if todo:
            if not rows.flags.writeable:
                raise checkpoint.refusal(place, OSError(errno.EROFS, os.strerror(errno.EROFS)))
            rows[todo] = UNDONE
            problems = _fill(cases, todo, side, annotation_size, arrays, rows)
            _judge(problems, report)
    return Pack(
        tuple(case.image_id for case in cases),
        np.load(place / "images.npy", mmap_mode="r"),
        np.load(place / "masks.npy", mmap_mode="r"),
        np.load(place / "shapes.npy"),
        digest,
        np.array([int(hashes[str(case.path)][:16], 16) for case in cases], dtype=np.uint64).view(np.int64),
    )


def content_digest(cases: Sequence[Case], hashes: dict[str, str], annotation_size: int) -> str:
    """Hash what a pack is made from: every file's content and every mask, by id.

    Args:
        hashes: sha256 of each file, by path, from `file_hashes`.

    Returns:
        64 hex digits; the order of the cases does not matter.
    """
    lines = [
        f"{case.image_id} {hashes[str(case.path)]} {hashlib.sha256(case.runs.astype('<i8').tobytes()).hexdigest()}"
        for case in cases
    ]
    text = "\n".join([f"pack {FORMAT} {annotation_size}", *sorted(lines)])
    return hashlib.sha256(text.encode()).hexdigest()


def file_hashes(cache: Path, paths: Sequence[Path], *, report: Path | None = None) -> dict[str, str]:
    """The sha256 of every file, read only where another file or content is at its path since the cache was written.

    Size and time of change do not show that: copies of two files may share both, and change places.

    Returns:
        Hashes by path as text.

    Raises:
        DataError: files cannot be read; names the first, and lists all in `report`.
    """
    known = _known(cache)

    def entry(path: Path) -> list | Problem:
        try:
            with images.opened(path) as file:
                stat = os.fstat(file.fileno())
                known_by = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
                old = known.get(os.path.abspath(path))
                if old is not None and old[:-1] == known_by:
                    return old
                return [*known_by, hashlib.file_digest(file, "sha256").hexdigest()]
        except DataError as error:
            return Problem(str(path), None, "", str(error), True)

    entries = list(log.in_threads(entry, paths, "hash"))
    _judge([found for found in entries if isinstance(found, Problem)], report)
    fresh = {os.path.abspath(path): value for path, value in zip(paths, entries, strict=True)}
    if any(known.get(path) != value for path, value in fresh.items()):
        checkpoint.write_atomic(cache, json.dumps({**known, **fresh}).encode())
    return {str(path): value[-1] for path, value in zip(paths, entries, strict=True)}


def _known(cache: Path) -> dict[str, list]:
    """What `file_hashes` wrote, the hash last in each entry; only a cache, so what is damaged in it costs time."""
    try:
        found = log.read_json(cache)
    except (FileNotFoundError, DataError):
        return {}

    return {path: entry for path, entry in found.items() if isinstance(entry, list) and _is_hash(entry[-1:])}


def _is_hash(found: list) -> bool:
    return len(found) == 1 and isinstance(found[0], str) and re.fullmatch("[0-9a-f]{64}", found[0]) is not None


def pack_image(pixels: np.ndarray, side: int) -> np.ndarray:
    """One image as the network sees it: (H, W) uint8, padded to a square and resized to (side, side)."""
    return images.resize(images.to_square(pixels), side)


def pack_mask(runs: np.ndarray, annotation_size: int, side: int) -> np.ndarray:
    """One mask: runs on the annotation grid to (side, side // 8) uint8 bits, as `images.resize_mask` has it."""
    if not len(runs):
        return np.zeros((side, side // 8), dtype=np.uint8)
    mask = images.resize_mask(runs_to_mask(runs, annotation_size, annotation_size), side)
    return np.packbits(mask, axis=1)


def thumbnails(pack: Pack, side: int = THUMBNAIL) -> np.ndarray:
    """Block means of the packed images: (N, side, side) float32, for finding near-duplicates."""
    block = pack.side // side
    blocks = pack.images.reshape(len(pack.images), side, block, side, block)
    return np.stack([image.mean(axis=(1, 3), dtype=np.float32) for image in blocks])


def _fill(
    cases: Sequence[Case],
    todo: Sequence[int],
    side: int,
    annotation_size: int,
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray],
    rows: np.ndarray,
) -> list[Problem]:
    """Decode rows `todo`; a row counts as done only after its pixels are on the disk.

    Args:
        arrays: pictures, masks and shapes of all cases, which are filled.
        rows: checksums of what is done.

    Returns:
        What cannot be read, which does not stop the others, and what is odd.
    """
    problems: list[Problem] = []
    pictures, masks, shapes = arrays

    def decode(row: int) -> int | None:
        case = cases[row]
        try:
            scan = images.read(case.path)
        except DataError as error:
            problems.append(Problem(str(case.path), None, case.image_id, str(error), True))
            return None
        problems.extend(
            Problem(str(case.path), None, case.image_id, f"{case.path}: {remark}", False) for remark in scan.warnings
        )
        pictures[row] = pack_image(scan.pixels, side)
        masks[row] = pack_mask(case.runs, annotation_size, side)
        shapes[row] = scan.pixels.shape
        return row

    finished: list[int] = []

    def make_durable() -> None:
        for array in arrays:
            array.flush()
        for row in finished:
            rows[row] = _crc(*arrays, row)
        rows.flush()
        finished.clear()

    try:
        with contextlib.closing(log.in_threads(decode, todo, f"pack {side} px")) as decoded:
            for row in decoded:
                if row is not None:
                    finished.append(row)
                if len(finished) == FLUSH_EVERY:
                    make_durable()
    finally:
        make_durable()
    return sorted(problems, key=lambda problem: problem.file)


def _judge(problems: Sequence[Problem], report: Path | None) -> None:
    """Warn once of what is odd; stop if something cannot be read."""
    odd = [problem.message for problem in problems if not problem.fatal]
    if odd:
        more = f" and {len(odd) - 1:,} more; `make verify` lists all" if len(odd) > 1 else ""
        log.warn(f"{odd[0]}{more}")
    if fatal := [problem for problem in problems if problem.fatal]:
        raise_fatal(fatal, report)


def _array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Open, or create full of zeros, a memory-mapped array with its space reserved.

    On a read-only file system one that is there cannot be written to.
    """
    new = not _is_whole(path, dtype, shape)
    if not new and checkpoint.is_read_only(path.parent):
        return np.load(path, mmap_mode="r")
    try:
        if new:
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        with open(path, "r+b") as file:
            found = os.fstat(file.fileno())
            if found.st_blocks * 512 < found.st_size:  # a full disk says so here, not as a bus error
                os.posix_fallocate(file.fileno(), 0, found.st_size)
    except OSError as error:
        if new:
            path.unlink(missing_ok=True)
        need = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raise checkpoint.refusal(f"{path} ({checkpoint.megabytes(need)})", error) from None
    return np.load(path, mmap_mode="r+")


def _is_whole(path: Path, dtype: type, shape: tuple[int, ...]) -> bool:
    """Whether a file is such an array; numpy itself would fill up one that was cut off, as by a copy, with zeros."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return False
    return array.dtype == dtype and array.shape == shape and array.offset + array.nbytes == path.stat().st_size


def _crc(pictures: np.ndarray, masks: np.ndarray, shapes: np.ndarray, row: int) -> int:
    crc = 0
    for array in (pictures, masks, shapes):
        crc = zlib.crc32(array[row].tobytes(), crc)
    return 1 + crc  # never UNDONE
