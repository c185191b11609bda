"""PNG, JPEG and DICOM files to (H, W) uint8, and the square that the network sees of them.

Files come from anywhere: every limit is checked before memory is spent, and whatever a decoder raises becomes
an error that names the file. Imports dicom, errors.
"""

import contextlib
import io
import os
import stat
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from pneumo.data import dicom
from pneumo.errors import DataError, OutOfMemory, one_line

MAX_PIXELS = 64 * 2**20
MAX_SIDE = 16_384  # images are padded to squares: 32 x 2,000,000 pixels would become 4e12
MIN_SIDE = 32
MAX_BYTES = 256 * 2**20
DARK = 32  # of 255; X-rays have more than a hundredth of their pixels above it
FEW_LEVELS = 64  # of 256, between the darkest and the brightest hundredth of the pixels; X-rays have more
FEW_VALUES = 16  # of a mask: labels; a smoothed one has more, as an X-ray has
WHITE = 0.25  # share of pixels; X-rays have fewer at 255
CUT_ROWS = 16  # so many of one grey, neither dark nor bright as a border is, are not of an X-ray

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".dcm": "DICOM", ".dicom": "DICOM"}

_OTHERS = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WebP",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
}  # how they begin
_BARE_DICOM = (
    b"DICM",
    *(group + b"\0" + number + b"\0" for group in (b"\2", b"\x08") for number in (b"\0", b"\5", b"\x08")),
)

_PNG_GREY, _PNG_RGB, _PNG_GREY_ALPHA = 0, 2, 4  # colour types; the other of 16 bits is RGB and alpha
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_PNG_LOOKED_AT = 1000  # chunks before the pixels; encoders write ten
_ORIENTATION, _SHORT = 0x0112, 3  # EXIF: the tag, and its type, of 16 bits
_LUMA = (19595, 38470, 7471)  # ITU-R 601, in 65536ths, as Pillow has it
_TRANSPARENT = "it has transparent pixels; the transparency was ignored"
_COLOURS = "the red, green and blue channels differ: a colour photograph, or something drawn on it?"

warnings.simplefilter("error", Image.DecompressionBombWarning)  # as Pillow advises; MAX_PIXELS is lower


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """A radiograph.

    Attributes:
        pixels: (H, W) uint8; bright is dense.
        spacing: millimetres from row to row and from column to column; None where the file does not say.
        warnings: what is odd about the file, a line each, without its name.
    """

    pixels: np.ndarray
    spacing: tuple[float, float] | None
    warnings: tuple[str, ...]


def is_image(path: Path) -> bool:
    """Whether a name says PNG, JPEG or DICOM, or the content DICOM, whose files often have no suffix."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with open(path, "rb") as file:
            start = file.read(132)
        return start[128:] == b"DICM" or start.startswith(_BARE_DICOM)
    except OSError:
        return False


def read(path: str | Path) -> Scan:
    """Read a radiograph, whose format is that of its content.

    PNG and JPEG: 16 bits are shifted down, so that the smallest of 8, 10, 12, 14 and 16 bits that holds the
    largest value, of colours the largest of their luma, becomes 8. Transparency is dropped, colours become luma.
    They are turned as their EXIF orientation says, as viewers do, with a warning.
    DICOM: rescaled, then seen through the first window or lookup table. Where there is none, 8 unsigned bits
    stay as they are, and others are stretched from their smallest to their largest value. MONOCHROME1 is
    inverted last.

    Raises:
        DataError: missing, damaged, too large, too small, or not one grey image; names the path.
        OutOfMemory: it does not fit in what memory is left.
    """
    with _naming(path):
        data = _load(path)
        kind = _kind(data)
        spacing = None
        if kind == "DICOM":
            known = dicom.outline(data)
            _check_size(known.height, known.width)
            pixels, spacing, remarks = dicom.decode(data, known)
        else:
            stored, remarks = _decode(data, kind)
            pixels = _to_eight_bits(stored)
        suffix = Path(path).suffix.lower()
        if SUFFIXES.get(suffix, kind) != kind:
            remarks.append(f"named {suffix}, but its content is {kind}")
        remarks += _doubts(pixels, kind)
        return Scan(pixels, spacing, tuple(remarks))


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """Open an image's file to read its bytes; what is raised meanwhile names it.

    Raises:
        DataError: missing, too large, or no regular file: to read a pipe or a device could take for ever.
    """
    with _naming(path), _opened(path) as file:
        yield file


def size(path: str | Path) -> tuple[int, int]:
    """Read the height and width of an image, turned as `read` does, without decoding it.

    Raises:
        DataError: as `read`, as far as that shows.
    """
    with opened(path) as file:
        start = file.read(1024)
        kind, exif = _kind(start), b""
        file.seek(0)
        if kind == "DICOM":
            known = dicom.outline(_read(file))
            height, width = known.height, known.width
        elif kind == "PNG":
            height, width = _png_size(start)
            exif = _png_exif(file)
        else:
            image = Image.open(file, formats=(kind,))
            width, height = image.size
            exif = image.info.get("exif", b"")
        _check_size(height, width)
        return (width, height) if _orientation(exif) >= 5 else (height, width)


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask: PNG or JPEG, of 0 and 255 or of 0 and 1; turned as an image is.

    Returns:
        (H, W) bool.

    Raises:
        DataError: as `read`; or it has colours, or other values, which are named.
    """
    with _naming(path):
        data = _load(path)
        kind = _kind(data)
        if kind == "DICOM":
            raise DataError("a DICOM; a mask must be a PNG of 0 and 255")
        pixels, remarks = _decode(data, kind)
        if _COLOURS in remarks:
            raise DataError("a mask must be grey, of 0 and 255; this one has colours")
        if _TRANSPARENT in remarks:
            raise DataError(
                "a mask must be opaque, of 0 and 255; this one has transparent pixels, and whether they or the colours "
                "are the mask is not known. Save it as grey PNG without transparency."
            )
        high = pixels.max()
        mask = pixels == high
        if high not in (0, 1, 255) or not (mask | (pixels == 0)).all():
            values = np.unique(pixels)
            shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
            raise DataError(
                f"a mask must hold nothing but 0 and 255, or 0 and 1; found {len(values)} values: {shown}. "
                + (
                    "Set the label of the pneumothorax to 255, and all others to 0."
                    if len(values) <= FEW_VALUES
                    else "Save it as PNG, resized without smoothing."
                )
            )
        return mask if high else np.zeros_like(mask)


def to_square(pixels: np.ndarray) -> np.ndarray:
    """Pad the shorter side with zeros, equally on both sides; an odd pixel goes to the right or the bottom.

    Args:
        pixels: (H, W) of any type.

    Returns:
        (L, L) of the same type, with L = max(H, W); the array itself if it is square.
    """
    height, width = pixels.shape
    if height == width:
        return pixels
    square = np.zeros((max(height, width),) * 2, dtype=pixels.dtype)
    from_square(square, height, width)[...] = pixels
    return square


def from_square(square: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut out of a square what `to_square` had put there: (height, width), a view.

    Raises:
        ValueError: `square` is not (L, L) with L = max(height, width).
    """
    side = max(height, width)
    if square.shape != (side, side):
        raise ValueError(f"the square of ({height}, {width}) is {(side, side)}, got {square.shape}")
    top, left = (side - height) // 2, (side - width) // 2
    return square[top : top + height, left : left + width]


def boxes(shapes: np.ndarray, side: int) -> np.ndarray | None:
    """Where images lie on a grid over the squares that `to_square` makes of them.

    Args:
        shapes: (N, 2) int, height and width of each image.
        side: of the grid, pixels.

    Returns:
        (N, 4) int64: first row, row behind the last, first column, column behind the last, of the grid's pixels whose
        centres are in the image; None where all images are square.
    """
    if (shapes[:, 0] == shapes[:, 1]).all():
        return None
    shapes = np.asarray(shapes, dtype=np.int64)
    longer = shapes.max(axis=1, keepdims=True)
    first = (longer - shapes) // 2
    ends = np.stack([first, first + shapes], axis=2).reshape(-1, 4)
    return -((longer - 2 * side * ends) // (2 * longer))  # rounded up


def resize(pixels: np.ndarray, side: int) -> np.ndarray:
    """Resize a square image, smoothing where it shrinks.

    Args:
        pixels: (L, L) uint8.
        side: pixels.

    Returns:
        (side, side) uint8; the array itself if it has that size.
    """
    if pixels.shape == (side, side):
        return pixels
    return np.array(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """Resize a square mask.

    To a side that divides its own, a pixel is of the mask where at least half of its area is: where that is an even
    number of pixels wide, its centre lies between pixels, and to take the nearest would move the mask by half of one.
    To another side it is the pixel at its centre.

    Args:
        mask: (L, L) bool.
        side: pixels.

    Returns:
        (side, side) bool; the array itself if it has that size.
    """
    longer = len(mask)
    if longer == side:
        return mask
    if longer % side:
        centres = (2 * np.arange(side) + 1) * longer // (2 * side)
        return mask[np.ix_(centres, centres)]
    block, covered = longer // side, np.zeros((side, side), dtype=np.int32)
    for row in range(block):
        for column in range(block):
            covered += mask[row::block, column::block]
    return 2 * covered >= block**2


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Turn whatever is raised inside into an error that names the file."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{path}: {error}") from None
    except MemoryError:
        raise OutOfMemory(f"{path}: not enough memory to decode it. Close other programs.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{path}: far more pixels than the limit of {MAX_PIXELS // 2**20} Mpx") from None
    except UnidentifiedImageError:  # its text is the address of a buffer
        raise DataError(
            f"{path}: the header is damaged, or its kind not read. Copy it again, or save it as PNG."
        ) from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        reason = one_line(error)[:200] or type(error).__name__
        raise DataError(f"{path}: {reason}. Copy it again.") from error


def _opened(path: str | Path) -> BinaryIO:
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):  # to open a pipe is to wait for ever
            raise DataError("not a file")
        if status.st_size > MAX_BYTES:
            raise DataError(f"larger than {MAX_BYTES // 2**20} MB")
        return open(path, "rb")
    except FileNotFoundError:
        raise DataError("no such file") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None


def _load(path: str | Path) -> bytes:
    with _opened(path) as file:
        return _read(file)


def _read(file: BinaryIO) -> bytes:
    return file.read(os.fstat(file.fileno()).st_size)  # read(MAX_BYTES) would set as much memory aside


def _kind(data: bytes) -> str:
    """PNG, JPEG or DICOM, by the first bytes; what else is found in downloads is refused by name."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[128:132] == b"DICM":
        return "DICOM"
    if data.startswith(_BARE_DICOM):
        raise DataError("a DICOM, as it seems, without its preamble of 128 bytes. Write it anew: dcmconv (DCMTK)")
    if not data:
        raise DataError("the file is empty. Copy it again.")
    for start, name in _OTHERS.items():
        if data.startswith(start):
            raise DataError(f"a {name} file, not a PNG, JPEG or DICOM. Save it as PNG, 16 bits as 16 bits.")
    if data.startswith(b"version https://git-lfs"):
        raise DataError("a git-LFS pointer, not the image. Run: git lfs pull")
    if data[:1024].lstrip()[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise DataError("an HTML page, not an image. Did the download need a login?")
    raise DataError("not a PNG, JPEG or DICOM file")


def _check_size(height: int, width: int) -> None:
    shape = f"{width:,} x {height:,} pixels"
    if min(height, width) < MIN_SIDE:
        raise DataError(f"{shape}; at least {MIN_SIDE} a side are needed")
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise DataError(f"{shape}; {MAX_PIXELS // 2**20} Mpx and {MAX_SIDE:,} pixels a side are the limit")


def _doubts(pixels: np.ndarray, kind: str) -> list[str]:
    """What makes (H, W) uint8 pixels look as if something went wrong with them."""
    if pixels.min() == pixels.max():
        return [f"a constant image: every pixel is {pixels[0, 0]}"]
    remarks = []
    histogram = Image.fromarray(pixels).histogram()
    share = np.cumsum(histogram) / pixels.size
    low, high = np.searchsorted(share, (0.01, 0.99)).tolist()
    if high < DARK:
        remarks.append(
            f"nearly black: 99 of 100 pixels are below {DARK} of 255. A mark far brighter than the X-ray takes up the "
            f"range, or too many bits are in use"
        )
    elif 1 - share[254] > WHITE:
        remarks.append(
            f"{1 - share[254]:.0%} of its pixels are white. Its window or lookup table may be that of other values"
        )
    elif high - low < FEW_LEVELS:
        remarks.append(
            f"of little contrast: 98 of 100 pixels are from {low} to {high} of 255. A mark far brighter than the X-ray "
            f"takes up the range, or its window, lookup table or number of bits is that of other values"
        )
    elif (used := np.count_nonzero(histogram)) <= FEW_VALUES:
        remarks.append(f"of {used} grey levels alone: a mask or a drawing, and not an X-ray?")
    last = int(pixels[-1, 0])
    if kind != "PNG" and DARK <= last < 256 - DARK and (pixels[-CUT_ROWS:] == last).all():
        rows = int((pixels != last).any(axis=1)[::-1].argmax())
        remarks.append(f"its lowest {rows} rows are all of grey {last}, as of a file that was cut off")
    return remarks


def _decode(data: bytes, kind: str) -> tuple[np.ndarray, list[str]]:
    """Decode a PNG or JPEG of acceptable size: (H, W) uint8 or uint16 as stored, upright; and what is odd about it."""
    exif = b""
    if kind == "PNG":
        exif = _png_exif(io.BytesIO(data))
        data = _essence(data)
        _check_size(*_png_size(data))
    else:
        dicom.check_scans(data)
    image = Image.open(io.BytesIO(data), formats=(kind,))  # the header only
    width, height = image.size
    _check_size(height, width)
    if kind == "PNG" and data[24] == 16 and data[25] != _PNG_GREY:
        channels = np.moveaxis(_sixteen_bits(data, data[25]), -1, 0)
        pixels, remarks = _one_channel(channels, alpha=data[25] != _PNG_RGB)
    else:
        image.load()
        pixels, remarks = _to_grey(image)
    orientation = _orientation(exif or image.info.get("exif", b""))
    if orientation != 1:
        remarks.append(f"turned or mirrored as its EXIF orientation {orientation} asks, as viewers do")
    return _upright(pixels, orientation), remarks


def _orientation(exif: bytes) -> int:
    """The orientation of an EXIF block, 1 to 8; 1, upright, where it gives none or is damaged, as viewers have it.

    Not by Pillow, which unpacks all of the block.

    Source:
        TIFF 6.0, pages 13 to 16 and 36.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])
    if order is None:
        return 1

    def number(start: int, length: int) -> int:
        return int.from_bytes(tiff[start : start + length], order)

    first = number(4, 4)
    for entry in range(first + 2, min(first + 2 + 12 * number(first, 2), len(tiff)), 12):
        if number(entry, 2) == _ORIENTATION:
            value = number(entry + 8, 2)
            return value if number(entry + 2, 2) == _SHORT and number(entry + 4, 4) == 1 and 1 <= value <= 8 else 1
    return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W) pixels as stored into those to be seen: (W, H) where `orientation` is 5 or more."""
    if orientation >= 5:
        pixels = pixels.T
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _sixteen_bits(data: bytes, colours: int) -> np.ndarray:
    """Decode a PNG of several channels of 16 bits: (H, W, C) uint16.

    Pillow keeps the upper byte of each alone, which is 0 to 15 of a detector's 12 bits. But which bytes it takes can
    be chosen, so it is asked twice.
    """

    def unpacked(layout: str) -> np.ndarray:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        image.tile = [tile._replace(args=layout) for tile in image.tile]
        image.load()
        return np.array(image)

    if colours == _PNG_GREY_ALPHA:  # four bytes a pixel, as four channels of 8 bits have
        return unpacked("RGBA").view(">u2").astype(np.uint16)
    mode = "RGB" if colours == _PNG_RGB else "RGBA"
    stored = unpacked(f"{mode};16B").astype(np.uint16)  # the first byte of two, as a PNG's upper one is
    stored <<= 8
    stored |= unpacked(f"{mode};16L")  # the second
    return stored


def _png_size(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR" or len(data) < 24:
        raise DataError("the header is damaged. Copy it again.")
    return int.from_bytes(data[20:24]), int.from_bytes(data[16:20])


def _png_exif(file: BinaryIO) -> bytes:
    """The EXIF block of a PNG, as much of it as a JPEG can hold; empty if none stands before the pixels."""
    file.seek(8)
    for _ in range(_PNG_LOOKED_AT):
        head = file.read(8)
        length, name = int.from_bytes(head[:4]), head[4:]
        if name == b"eXIf":
            return file.read(min(length, 2**16))
        if len(name) < 4 or name == b"IDAT":
            break
        file.seek(length + 4, os.SEEK_CUR)
    return b""


def _essence(data: bytes) -> bytes:
    """A PNG without what its pixels do not need: texts, names, profiles, animation.

    Pillow would unpack those, is content with less than the whole once it has all rows, and does not compare the
    pixels' checksum: of all single flipped bits of a small file it let 31 through into the pixels.

    Raises:
        DataError: truncated or damaged.
    """
    kept, position, name = [data[:8]], 8, b""
    while name != b"IEND":
        end = position + 12 + int.from_bytes(data[position : position + 4])
        name = data[position + 4 : position + 8]
        if end > len(data) or len(name) < 4:
            needed = f" of at least {end:,}" if len(name) == 4 and name.isalpha() else ""
            raise DataError(f"image file is truncated ({len(data):,}{needed} bytes are there). Copy it again.")
        if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise DataError(f"image file is damaged (CRC of the chunk at byte {position:,} differs). Copy it again.")
        if name in _PNG_CHUNKS:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def _to_grey(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    """Make (H, W) uint8 or uint16 of a decoded image; and what is odd about it."""
    if image.mode == "L" or image.mode.startswith("I;16"):
        return np.array(image), []
    if image.mode == "1":
        return np.array(image.convert("L")), []
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode not in ("LA", "RGB", "RGBA"):
        raise DataError(f"pixels of mode {image.mode}; grey or RGB is needed. Convert it to 8-bit grey.")
    return _one_channel([np.asarray(channel) for channel in image.split()], alpha=image.mode != "RGB")


def _one_channel(channels: Iterable[np.ndarray], *, alpha: bool) -> tuple[np.ndarray, list[str]]:
    """Make one of grey, or of red, green and blue, each (H, W) of one type; and what is odd about them.

    Args:
        alpha: whether another one follows, which says how opaque a pixel is.
    """
    channels, remarks = list(channels), []
    if alpha and (opacity := channels.pop()).min() < np.iinfo(opacity.dtype).max:
        remarks.append(_TRANSPARENT)
    first, *others = channels
    if all(np.array_equal(channel, first) for channel in others):
        return np.array(first), remarks
    luma = np.full(first.shape, 1 << 15, dtype=np.uint32)  # as Pillow rounds; 16 bits and 16 of the weights fit
    for channel, weight in zip(channels, _LUMA, strict=True):
        luma += channel.astype(np.uint32) * weight
    return (luma >> 16).astype(first.dtype), [*remarks, _COLOURS]


def _to_eight_bits(stored: np.ndarray) -> np.ndarray:
    """Shift 16 bits down by those that are used: (H, W) uint8; the array itself if it has 8."""
    if stored.dtype == np.uint8:
        return stored
    high = int(stored.max())
    bits = next(bits for bits in (8, 10, 12, 14, 16) if high < 1 << bits)
    return (stored >> (bits - 8)).astype(np.uint8)
