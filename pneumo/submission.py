"""Decided masks to submission.csv, checked id by id against the sample. Imports checkpoint, data, kernels, errors."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pneumo import checkpoint
from pneumo.data import rle
from pneumo.data.problems import Problem, counted, some
from pneumo.data.rows import first_line, read_rows
from pneumo.errors import DataError
from pneumo.kernels.runs import area, join

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


@dataclass(frozen=True)
class Checked:
    """A submission that somebody wrote.

    Attributes:
        rows: how many.
        ids: how many different ones.
        codes: of each id whose row is good, in the file's order.
        problems: fatal or not.
    """

    rows: int
    ids: int
    codes: dict[str, str]
    problems: list[Problem]


def check(path: Path, sample_ids: Sequence[str] | None, annotation_size: int) -> Checked:
    """Read a submission, whoever wrote it, as strictly as who will grade it might.

    Problems are no rows, rows that are wrong, second rows of an id, codes that do not decode or are not written as
    `rle.encode` would, ids that are missing or left over, a first line that is not `HEADER`.

    Args:
        sample_ids: ids that it must have; None where they are not known.
    """
    rows = 0
    problems: list[Problem] = []
    codes: dict[str, str] = {}
    lines: dict[str, int] = {}

    def complain(text: str, row: int | None = None, image_id: str = "", **more: Any) -> None:
        problems.append(Problem.at(path, text, row=row, image_id=image_id, **more))

    found = read_rows(path, ("ImageId", "EncodedPixels"), problems, blanks=False)
    for line, (image_id, code) in found:
        rows += 1
        if lines.setdefault(image_id, line) != line:
            complain(f"a second row for this id, which has one on line {lines[image_id]}. Unite them.", line, image_id)
            continue
        try:
            runs = rle.decode_runs(code, annotation_size, annotation_size)
        except ValueError as error:
            complain(str(error), line, image_id, field="EncodedPixels")
            continue
        codes[image_id] = rle.encode_runs(join(runs))
        if codes[image_id] != code:
            text = "runs that touch, or zeros or blanks too many. Encode it anew."
            complain(text, line, image_id, field="EncodedPixels")
    if not lines and not problems:
        complain("no rows")
    if lines:
        first = first_line(path)
        if first != HEADER:
            complain(f"the first line must be {HEADER}, it is {first[:100]!a}", 1)
    if sample_ids is not None and lines:
        wanted = set(sample_ids)
        for what, odd in (
            (
                ("id of the sample is missing", "ids of the sample are missing"),
                [i for i in sample_ids if i not in lines],
            ),
            (("id is not in the sample", "ids are not in the sample"), [i for i in lines if i not in wanted]),
        ):
            if odd:
                complain(f"{counted(len(odd), *what)}: {some(odd)}")
        if list(lines) != list(sample_ids) and set(lines) == wanted:
            complain("its rows are not in the sample's order", fatal=False)
    return Checked(rows, len(lines), codes, problems)


def summary(codes: Mapping[str, str], annotation_size: int) -> str:
    """One line about a submission: rows, share of empty masks, median area of the others in pixels."""
    areas = np.array([_area(code, annotation_size) for code in codes.values()])
    found = areas[areas > 0]
    median = f"{int(np.median(found)):,} px" if found.size else "-"
    there = counted(len(areas), "image", "images")
    return f"{there}, {(areas == 0).mean():.1%} empty, median area of the others {median}"


def _area(code: str, size: int) -> int:
    runs = rle.decode_runs(code, size, size)
    return area(runs)
