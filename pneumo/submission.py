"""Decided masks to submission.csv, checked id by id against the sample. Imports checkpoint, data, errors."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pneumo import checkpoint
from pneumo.data import rle
from pneumo.errors import DataError

HEADER = "ImageId,EncodedPixels"


def write(path: Path, codes: Mapping[str, str], sample_ids: Sequence[str], annotation_size: int) -> None:
    """Write a submission: one row per id of the sample, in its order.

    Args:
        codes: run-length code of each id; "-1" for an empty mask.
        sample_ids: ids that the submission must have, each once.
        annotation_size: side of the square grid of the codes, pixels.

    Raises:
        DataError: ids are missing or left over, or a code does not decode; nothing is written.
        WriteError: the disk is full; what was there is intact.
    """
    for what, odd in (
        ("has no prediction for ids of the sample", [i for i in sample_ids if i not in codes]),
        ("has ids that the sample does not", sorted(codes.keys() - set(sample_ids))),
    ):
        if odd:
            raise DataError(f"{path}: the submission {what}: {len(odd)}, as {', '.join(odd[:5])}")
    text = io.StringIO()
    text.write(HEADER + "\n")
    for image_id in sample_ids:
        runs = rle.decode_runs(codes[image_id], annotation_size, annotation_size)
        if rle.encode_runs(runs) != codes[image_id]:
            raise DataError(f"{path}: the code of {image_id} does not decode to the mask it came from")
        text.write(f"{image_id},{codes[image_id]}\n")
    checkpoint.write_atomic(path, text.getvalue().encode())


def summary(codes: Mapping[str, str], annotation_size: int) -> str:
    """One line about a submission: rows, share of empty masks, median area of the others in pixels."""
    areas = np.array([_area(code, annotation_size) for code in codes.values()])
    found = areas[areas > 0]
    median = f"{int(np.median(found)):,} px" if found.size else "-"
    return f"{len(areas)} images, {(areas == 0).mean():.1%} empty, median area of the others {median}"


def _area(code: str, size: int) -> int:
    runs = rle.decode_runs(code, size, size)
    return int((runs[:, 1] - runs[:, 0]).sum())
