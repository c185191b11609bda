"""What is wrong or odd with a user's files, collected so that all of it can be told before anything stops.

Imports checkpoint, errors.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pneumo import checkpoint
from pneumo.errors import DataError

SHOWN = 5  # ids in a message; the report has all
LISTED = 20  # problems of one kind on a terminal; there may be one for each image

_VARIES = re.compile(r"""'[^']*'|"[^"]*"|\S*/\S*|[\d.,]+""")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong or odd, and where.

    Attributes:
        row: line of the file, the header's being 1; None if it is about all of it.
        image_id: "" if it is about several.
        message: one line that says all of it, file and line included.
        fatal: whether nothing may be done with these data.
        each: the single problems that this one sums up, for the report.
    """

    file: str
    row: int | None
    image_id: str
    message: str
    fatal: bool
    each: tuple["Problem", ...] = ()

    @classmethod
    def at(
        cls, file: Path, text: str, *, row: int | None = None, image_id: str = "", field: str = "", fatal: bool = True
    ) -> "Problem":
        """One whose message begins with where it is: file, line, id and column."""
        where = f"{file}{f' line {row}' if row else ''}{f', ImageId {image_id}' if image_id else ''}"
        where += f", {field}" if field else ""
        return cls(str(file), row, image_id, f"{where}: {text}", fatal)

    @classmethod
    def of_ids(
        cls,
        file: Path,
        text: str,
        ids: Sequence[str],
        each: str,
        *,
        fatal: bool,
        lines: Mapping[str, int | None] | None = None,
    ) -> "Problem":
        """One that many ids have.

        Args:
            text: of all of them; the first ids are told after it.
            each: of a single one, for the report.
            lines: of the file, by id, where they are known.
        """
        lines = lines or {}
        single = tuple(cls.at(file, each, row=lines.get(i), image_id=i, fatal=fatal) for i in ids)
        return cls(str(file), None, "", f"{file}: {text}: {some(ids)}.", fatal, single)


def counted(number: int, one: str, many: str) -> str:
    """A number and what it counts, as 1 image or 1,204 images."""
    return f"{number:,} {one if number == 1 else many}"


def some(names: Iterable[str]) -> str:
    """The first `SHOWN` names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def listed(problems: Sequence[Problem], report: Path) -> list[str]:
    """Lines that tell the problems: of each kind the first `LISTED`, and how many more the report has."""
    kinds = [_kind(problem) for problem in problems]
    left = Counter(kinds)
    seen: Counter[tuple[bool, str]] = Counter()
    lines = []
    for problem, kind in zip(problems, kinds, strict=True):
        grade = "ERROR" if problem.fatal else "note "
        seen[kind] += 1
        left[kind] -= 1
        if seen[kind] <= LISTED:
            lines.append(f"{grade} {problem.message}")
        if seen[kind] == LISTED and left[kind]:
            lines.append(f"{grade} {left[kind]:,} more like this one; all are in {report}")
    return lines


def _kind(problem: Problem) -> tuple[bool, str]:
    """Its message without what differs from case to case: names, numbers and values in quotes."""
    text = problem.message.replace(problem.file, "") if problem.file else problem.message
    if problem.image_id:
        text = re.sub(rf"(?<![\w.-]){re.escape(problem.image_id)}(?!\w)", "", text)
    return problem.fatal, _VARIES.sub("", text)


def raise_fatal(problems: Sequence[Problem], report: Path | None) -> None:
    """Stop if there is a fatal problem.

    Args:
        report: where to write all problems, fatal or not, as CSV; None: nowhere.

    Raises:
        DataError: the first fatal problem, how many others there are, and where they are listed.
        WriteError: the report could not be written.
    """
    if report is not None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file", "row", "image_id", "message", "fatal"])
        for problem in problems:
            for one in problem.each or (problem,):
                writer.writerow([one.file, one.row, one.image_id, one.message, str(one.fatal).lower()])
        checkpoint.write_atomic(report, text.getvalue().encode("utf-8", "surrogateescape"))
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        others = sum(len(problem.each) or 1 for problem in fatal[1:])
        place = f" listed in {report}" if report is not None else ""
        message = fatal[0].message.rstrip(".") + "."
        if others:
            message += f" {others:,} more problem{'s are' if others > 1 else ' is'}{place or ' there'}."
        elif fatal[0].each and place:
            message += f" All are{place}."
        raise DataError(message)
