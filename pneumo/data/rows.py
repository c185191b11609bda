"""Rows of a CSV, read so that nothing is guessed, padded or shifted, whatever a download turned out to be.

Imports problems, errors.
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from pneumo.data.problems import Problem, counted
from pneumo.errors import DataError

ALIASES = {"fname": "ImageId", "mask": "EncodedPixels"}
MAX_BYTES = 256 * 2**20  # of a CSV, unpacked
MAX_ROWS = 1_000_000  # of a CSV; a row that packs to a few bits takes hundreds of bytes of memory
ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
ID_RULE = "an ImageId is 1 to 128 of A-Z, a-z, 0-9, dot, underscore and hyphen, and begins with no dot."

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}

csv.field_size_limit(MAX_BYTES)  # its default of 128 KiB is less than a speckled mask can take


def read_rows(
    path: Path, columns: Sequence[str], problems: list[Problem], *, blanks: bool = True
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line number and values of the named columns of each row; the first is an id, and checked.

    Every value is text, and a row must have as many fields as the header: nothing is guessed, padded or
    shifted.

    Args:
        path: of a CSV, perhaps gzipped.
        columns: names, the id's first; others are passed over.
        problems: gets what is wrong; a row that is wrong is left out.
        blanks: values are stripped, and may be quoted after a blank; else blanks and such quotes are part of them, as
            others read them.
    """
    try:
        content = io.StringIO(_text(path), newline="")
        reader = csv.reader(content, strict=True, skipinitialspace=blanks)
        header: list[str] | None = None
        for count, fields in enumerate(reader):
            if count > MAX_ROWS:
                raise DataError(f"more than {MAX_ROWS:,} rows")
            stripped = [field.strip() for field in fields]
            if not any(stripped):
                continue
            if blanks or header is None:
                fields = stripped
            if header is None:
                header = [name if (name := ALIASES.get(field, field)) not in fields else field for field in fields]
                places = _places(header, columns)
                continue
            if len(fields) != len(header):
                there = counted(len(fields), "field", "fields")
                text = f"{there}, the header has {len(header)}: a comma too many or too few"
                problems.append(Problem.at(path, text, row=reader.line_num))
                continue
            values = tuple(fields[place] for place in places)
            if not ID.fullmatch(values[0]):
                shown = values[0] if len(values[0]) <= 40 else values[0][:37] + "..."
                text = f"{columns[0]} {shown!a}: {ID_RULE}"
                problems.append(Problem.at(path, text, row=reader.line_num))
                continue
            yield reader.line_num, values
        if header is None:
            raise DataError("empty")
    except csv.Error as error:
        problems.append(Problem.at(path, f"not a CSV: {error}", row=reader.line_num))
    except DataError as error:
        problems.append(Problem.at(path, f"{error}. Expected: a CSV with columns {', '.join(columns)}."))


def first_line(path: Path) -> str:
    """The first line of a file that `read_rows` reads, as it stands there, with a byte order mark if it has one.

    Raises:
        DataError: it is no such file.
    """
    return _text(path, "utf-8").partition("\n")[0].rstrip("\r")


def _places(header: list[str], columns: Sequence[str]) -> list[int]:
    for column in columns:
        if header.count(column) != 1:
            shown = ", ".join(header)
            hint = next(
                (f"columns are separated by {name}" for mark, name in _SEPARATORS.items() if mark in shown),
                "",
            )
            found = shown if len(shown) <= 100 else shown[:97] + "..."
            what = "is there twice" if column in header else "is missing"
            raise DataError(f"column {column} {what}; found {found!a}{', ' if hint else ''}{hint}")
    return [header.index(column) for column in columns]


def _bounded(file: IO[bytes]) -> bytes:
    """All of a file, which may unpack to thousands of times its size, unless that is too much."""
    parts, size = [], 0
    while part := file.read(2**20):
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise DataError(f"larger than {MAX_BYTES // 2**20} MB")
    return b"".join(parts)


def _text(path: Path, encoding: str = "utf-8-sig") -> str:
    """The text of a UTF-8 file, perhaps gzipped; what else downloads turn out to be is refused by name."""
    try:
        if Path(path).is_dir():
            raise DataError("a folder, not a file")
        if not Path(path).is_file():  # to open a pipe is to wait for ever
            raise DataError("no such file")
        with open(path, "rb") as file:
            data = _bounded(file)
        if data.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(data)) as file:
                data = _bounded(file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"damaged gzip file ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    if not data.strip():
        raise DataError("empty")
    if data.startswith(b"version https://git-lfs"):
        raise DataError("a git-LFS pointer, not the file itself; run: git lfs pull")
    if data[:1024].lstrip().startswith(b"<"):
        raise DataError("an HTML page; did the download need a login?")
    if data.startswith(b"PK\x03\x04"):
        raise DataError("a ZIP archive; unpack it")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:1024]:
        raise DataError("UTF-16 or binary; save it as UTF-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start:,}; save it as UTF-8") from None
