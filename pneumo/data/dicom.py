"""DICOM files to (H, W) uint8: checked as bytes first, then read with pydicom.

A DICOM may be damaged, hostile, or no image at all. So its elements are walked before anything is made of
them, every refusal says what was found and where, and nothing that identifies a patient is read or repeated.
Errors do not name the file; `images` does. Imports errors.
"""

import contextlib
import io
import logging
import re
import struct
import threading
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pneumo.errors import DataError, NoRadiographError

MAX_DEPTH = 16  # of nested sequences
MAX_ELEMENTS = 100_000  # a radiograph has hundreds
MAX_SCANS = 100  # of a progressive JPEG, each of which passes over all pixels; encoders write ten

IMPLICIT_LITTLE, EXPLICIT_LITTLE = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
EXPLICIT_BIG, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
JPEG_BASELINE, JPEG_EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
# Transfer syntaxes that optional packages decode. The plugin is pinned, so that pixels do not depend on what
# else is installed: pylibjpeg decodes 3 % of the pixels of a JPEG baseline file one grey level off Pillow's.
PLUGINS = {  # transfer syntax: name, pydicom's plugin, packages
    JPEG_EXTENDED: ("12-bit JPEG", "pylibjpeg", "pylibjpeg pylibjpeg-libjpeg"),
    "1.2.840.10008.1.2.4.57": ("JPEG lossless", "pylibjpeg", "pylibjpeg pylibjpeg-libjpeg"),
    "1.2.840.10008.1.2.4.70": ("JPEG lossless", "pylibjpeg", "pylibjpeg pylibjpeg-libjpeg"),
    "1.2.840.10008.1.2.4.80": ("JPEG-LS", "pyjpegls", "pyjpegls"),
    "1.2.840.10008.1.2.4.81": ("JPEG-LS", "pyjpegls", "pyjpegls"),
    "1.2.840.10008.1.2.4.90": ("JPEG 2000", "pillow", "pillow"),
    "1.2.840.10008.1.2.4.91": ("JPEG 2000", "pillow", "pillow"),
    "1.2.840.10008.1.2.4.201": ("high-throughput JPEG 2000", "pylibjpeg", "pylibjpeg pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.4.202": ("high-throughput JPEG 2000", "pylibjpeg", "pylibjpeg pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.4.203": ("high-throughput JPEG 2000", "pylibjpeg", "pylibjpeg pylibjpeg-openjpeg"),
    "1.2.840.10008.1.2.5": ("RLE", "pydicom", "pydicom"),
}
NOT_IMAGES = {  # SOP classes of what lies beside images, by the start of their UID
    "1.2.840.10008.1.3.10.": "a DICOMDIR, an index of other files",
    "1.2.840.10008.5.1.4.1.1.11.": "a presentation state",
    "1.2.840.10008.5.1.4.1.1.66.": "a segmentation or registration",
    "1.2.840.10008.5.1.4.1.1.88.": "a structured report",
    "1.2.840.10008.5.1.4.1.1.104.": "an encapsulated document",
    "1.2.840.10008.5.1.4.1.1.9.": "a waveform",
    "1.2.840.10008.5.1.4.38.": "a hanging protocol",
}
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
RADIOTHERAPY = "1.2.840.10008.5.1.4.1.1.481."  # images among them, but of no kind for which networks are here
NOT_IMAGE_MODALITIES = {"SR": "a structured report", "SEG": "a segmentation", "PR": "a presentation state"}
LATERAL = {"LL", "RL", "LAT", "LATERAL"}
LATERAL_WORDS = {"LAT", "LATERAL", "PROFIL"}
DESCRIPTIONS = ("SeriesDescription", "ProtocolName", "AcquisitionDeviceProcessingDescription")
FRONTAL = {"AP", "PA", "LLD", "RLD"}  # the last two: lying on one side, but seen from the front
CHEST = ("CHEST", "THORA", "TORAX", "LUNG")
NOT_RADIOGRAPHS = {"CT", "MG", "MR", "NM", "PT", "US"}
POLARITY = {"MONOCHROME1": "INVERSE", "MONOCHROME2": "IDENTITY"}  # the presentation table that goes with each
NEARLY_SQUARE = 1.02  # sides of a pixel, the longer over the shorter

_META_CLASS, _SYNTAX, _CLASS = 0x00020002, 0x00020010, 0x00080016
_ROWS, _COLUMNS, _PIXELS = 0x00280010, 0x00280011, 0x7FE00010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_MARKED = 0xFFFFFFFF  # in place of a length: an end marker follows
_LONG_VRS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}

_pydicom_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Outline:
    """What is known of a DICOM before it is decoded."""

    syntax: str  # transfer syntax UID
    order: str  # of bytes, as in `struct`
    height: int  # pixels
    width: int


def outline(data: bytes) -> Outline:
    """Walk a whole file, in memory and time that its content cannot inflate.

    Every element must lie inside the file and inside the sequence that holds it. pydicom would take what it
    gets of a truncated file, recurse, and inflate.

    Raises:
        NoRadiographError: it is of a kind without an image.
        DataError: truncated, damaged, nested too deeply, deflated, or without pixels.
    """
    found, start = _meta(data)
    syntax = _text(found.get(_SYNTAX))
    if not syntax:
        raise DataError("damaged DICOM: it does not say its transfer syntax")
    if syntax == DEFLATED:
        raise DataError(f"transfer syntax {DEFLATED} (deflated) is not read. Convert it: dcmconv +te (DCMTK)")
    _refuse_other_objects(_text(found.get(_META_CLASS)))
    order = ">" if syntax == EXPLICIT_BIG else "<"
    found = _elements(data, start, order)
    _refuse_other_objects(_text(found.get(_CLASS)))
    if _PIXELS not in found:
        raise DataError("a DICOM without pixels")
    for tag, name in ((_ROWS, "Rows"), (_COLUMNS, "Columns")):
        if len(found.get(tag, b"")) != 2:
            raise DataError(f"damaged DICOM: {name} is missing")
    height, width = (struct.unpack(order + "H", found[tag])[0] for tag in (_ROWS, _COLUMNS))
    return Outline(syntax, order, height, width)


def decode(data: bytes, known: Outline) -> tuple[np.ndarray, tuple[float, float] | None, list[str]]:
    """Decode a file whose outline was found acceptable.

    Returns:
        (H, W) uint8; millimetres from row to row and from column to column, or None; what is odd about it.

    Raises:
        DataError: not one grey image, or damaged, or pydicom or a decoder is missing.
    """
    with _pydicom() as pydicom:
        header = pydicom.dcmread(io.BytesIO(data))
        _check_header(header)
        _drop_blanks(header)
        spacing = _spacing(header)
        remarks = [*_odd_view(header), *_odd_pixels(header, spacing), *_drop_empty_window(header)]
        with_pillow = known.syntax == JPEG_BASELINE or (known.syntax == JPEG_EXTENDED and header.BitsStored == 8)
        if with_pillow:
            frame = pydicom.encaps.get_frame(header.PixelData, 0, number_of_frames=1)
        else:
            stored, more = _own_bits(_unpack(pydicom, header, known), header.BitsStored)
            remarks += more
    if with_pillow:
        stored = _decode_jpeg(frame, known, signed=header.PixelRepresentation == 1)
    with _pydicom() as pydicom:
        return _render(pydicom, header, stored, known.order), spacing, remarks


def check_scans(jpeg: bytes) -> None:
    """Refuse a JPEG that would keep the decoder busy: a few bytes a scan, each as long as a whole image.

    Raises:
        DataError: it has more scans than an encoder writes.
    """
    if (scans := jpeg.count(b"\xff\xda")) > MAX_SCANS:
        raise DataError(f"a JPEG of {scans:,} scans, made to keep a decoder busy; {MAX_SCANS} are the limit")


@contextlib.contextmanager
def _pydicom() -> Iterator[ModuleType]:
    """Lend pydicom, silenced: its warnings and errors quote values of the file, which may be a patient's.

    The lock is there because `catch_warnings` changes the state of the whole process. JPEG is decoded outside
    it.
    """
    try:
        import pydicom
    except ImportError:
        raise DataError("reading DICOM needs pydicom: pip install pydicom") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    with _pydicom_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield pydicom
        except (DataError, MemoryError):
            raise
        except Exception as error:  # nine types were seen
            raise DataError(f"damaged DICOM ({type(error).__name__} in pydicom). Copy it again.") from None


# ------------------------------------------------------------------------------------------------------------
# As bytes
# ------------------------------------------------------------------------------------------------------------


def _meta(data: bytes) -> tuple[dict[int, bytes], int]:
    """The file meta information, always explicit little endian, by tag; and where it ends."""
    found, position = {}, 132
    while data[position : position + 2] == b"\x02\x00":
        tag, _, length, position = _element(data, position, "<", implicit=False)
        if position + length > len(data):
            raise _cut_off(data, tag, position, length)
        found[tag] = data[position : position + length]
        position += length
    return found, position


def _elements(data: bytes, position: int, order: str) -> dict[int, bytes]:
    """Walk the data set and every sequence in it.

    Returns:
        Values of the tags that `outline` asks for, as far as they are there; of the pixels only that.
    """
    found = {}
    letters = data[position + 4 : position + 6]
    implicit = not (letters.isalpha() and letters.isupper())  # believe the bytes, as pydicom does
    levels = [(len(data), False, "elements", implicit)]  # end, whether marked, what it holds, without VRs
    for _ in range(MAX_ELEMENTS):
        end, marked, holds, implicit = levels[-1]
        if position == end or (len(levels) == 1 and end - position < 8):
            if marked:
                raise DataError(f"truncated: the file ends at byte {len(data):,}, in a sequence. Copy it again.")
            levels.pop()
            if not levels:
                return found
            continue
        start = position
        tag, vr, length, position = _element(data, start, order, implicit)
        if tag in (_ITEM_END, _SEQUENCE_END):
            if len(levels) == 1:
                return found  # as pydicom, which stops there
            if marked:
                levels.pop()
            continue
        stop = end if length == _MARKED else position + length
        if stop > end:
            raise _cut_off(data, tag, position, length)
        if tag == _PIXELS and len(levels) == 1:
            found[tag] = b""
        if holds == "items":
            if tag != _ITEM:
                raise DataError(f"damaged DICOM: no item of a sequence at byte {start:,}. Copy it again.")
            levels.append((stop, length == _MARKED, "elements", implicit))
        elif holds == "elements" and length == _MARKED and (tag == _PIXELS or vr in (b"OB", b"OW")):
            levels.append((stop, True, "fragments", implicit))
        elif holds == "elements" and (length == _MARKED or _is_sequence(data, position, order, tag, vr)):
            levels.append((stop, length == _MARKED, "items", implicit or vr == b"UN"))
        else:
            if len(levels) == 1 and tag in (_CLASS, _ROWS, _COLUMNS):
                found[tag] = data[position:stop]
            position = stop
        if len(levels) > 2 * MAX_DEPTH + 1:
            raise DataError(f"damaged DICOM: sequences nested more than {MAX_DEPTH} deep")
    raise DataError(f"damaged DICOM: more than {MAX_ELEMENTS:,} elements")


def _element(data: bytes, position: int, order: str, implicit: bool) -> tuple[int, bytes, int, int]:
    """Tag, VR (empty where there is none), length, and the position of the value."""
    head = data[position : position + 12]
    if len(head) < 8:
        raise DataError(f"truncated: the file ends at byte {len(data):,}, in an element. Copy it again.")
    group, number, vr, short, long = struct.unpack(order + "HH2sHL", head.ljust(12, b"\0"))
    tag = group << 16 | number
    if implicit or group == 0xFFFE or not b"AA" <= vr <= b"ZZ":
        return tag, b"", struct.unpack_from(order + "L", head, 4)[0], position + 8
    if vr in _LONG_VRS:
        return tag, vr, long, position + 12
    return tag, vr, short, position + 8


def _is_sequence(data: bytes, position: int, order: str, tag: int, vr: bytes) -> bool:
    if vr or data[position : position + 4] != struct.pack(order + "HH", 0xFFFE, 0xE000):
        return vr == b"SQ"
    with _pydicom() as pydicom:  # looks like one: the dictionary must know
        return pydicom.datadict.dictionary_has_tag(tag) and pydicom.datadict.dictionary_VR(tag) == "SQ"


def _cut_off(data: bytes, tag: int, position: int, length: int) -> DataError:
    element = f"element ({tag >> 16:04X},{tag & 0xFFFF:04X}), {length:,} bytes from byte {position:,}"
    if position + length > len(data):
        return DataError(f"truncated: the file ends at byte {len(data):,}, in {element}. Copy it again.")
    return DataError(f"damaged DICOM: {element}, reaches beyond its sequence. Copy it again.")


def _refuse_other_objects(uid: str) -> None:
    for prefix, name in NOT_IMAGES.items():
        if f"{uid}.".startswith(prefix):
            raise NoRadiographError(f"{name}, not an image")
    if f"{uid}.".startswith(RADIOTHERAPY):
        raise DataError("a radiotherapy object, not a radiograph")


def _text(value: bytes | None) -> str:
    return (value or b"").decode("ascii", "replace").strip(" \0")


# ------------------------------------------------------------------------------------------------------------
# With pydicom
# ------------------------------------------------------------------------------------------------------------


def _check_header(header: Any) -> None:
    """Refuse by name what is not one grey image."""
    modality = str(header.get("Modality") or "")
    if modality in NOT_IMAGE_MODALITIES:
        raise NoRadiographError(f"{NOT_IMAGE_MODALITIES[modality]}, not an image")
    frames, samples = int(header.get("NumberOfFrames") or 1), int(header.get("SamplesPerPixel") or 1)
    captured = str(header.get("SOPClassUID") or "").startswith(SECONDARY_CAPTURE)
    if captured and (frames != 1 or samples != 1):
        what = "in colour" if samples != 1 else f"of {frames:,} frames"
        raise NoRadiographError(
            f"a secondary capture {what}, as of a screen, not a radiograph; if it is, save it as PNG"
        )
    if frames != 1:
        raise DataError(f"{frames:,} frames; a radiograph has one")
    if samples != 1:
        raise DataError(
            f"a colour DICOM of {samples} samples a pixel; MONOCHROME1 or MONOCHROME2 is needed. Save it as grey PNG."
        )
    if header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError("a DICOM whose photometric interpretation is neither MONOCHROME1 nor MONOCHROME2")
    allocated, stored = (int(header.get(keyword) or 0) for keyword in ("BitsAllocated", "BitsStored"))
    if allocated not in (8, 16) or not 1 <= stored <= allocated:
        raise DataError(f"a DICOM of {stored} bits in {allocated} a pixel; 8 or 16 are read")
    high = int(header.get("HighBit", stored - 1))
    if high != stored - 1:  # bits below are something else
        raise DataError(f"a DICOM whose HighBit is {high}; {stored - 1} is read with {stored} bits a pixel")
    header.SamplesPerPixel = 1  # which some leave out, as the next
    if header.get("PixelRepresentation") is None:
        header.PixelRepresentation = 0


def _unpack(pydicom: ModuleType, header: Any, known: Outline) -> np.ndarray:
    """Stored values of all but 8-bit JPEG: (H, W) integers of 8 or 16 bits."""
    plugin = ""
    if known.syntax in (IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG):
        there, needed = len(header.PixelData), known.height * known.width * header.BitsAllocated // 8
        if there < needed:
            raise DataError(f"truncated: {there:,} of {needed:,} bytes of pixels are there. Copy it again.")
    elif known.syntax in PLUGINS:
        name, plugin, packages = PLUGINS[known.syntax]
        if plugin not in pydicom.pixels.get_decoder(known.syntax).available_plugins:
            raise DataError(f"transfer syntax {known.syntax} ({name}) needs a decoder: pip install {packages}")
    else:
        raise DataError("a transfer syntax that is not read. Convert it: dcmconv +te (DCMTK)")
    if known.syntax in PLUGINS and "JPEG 2000" in PLUGINS[known.syntax][0]:
        _check_codestream(pydicom.encaps.get_frame(header.PixelData, 0, number_of_frames=1), known)
    decoder = pydicom.pixels.get_decoder(known.syntax)
    stored = decoder.as_array(header, index=0, raw=True, decoding_plugin=plugin)[0]
    return stored.astype(stored.dtype.newbyteorder("="), copy=False)


def _check_codestream(frame: bytes, known: Outline) -> None:
    """Refuse a JPEG 2000 of another size than the header's: a few bytes can stand for more pixels than memory holds.

    Source:
        ISO/IEC 15444-1 A.5.1: SOC and SIZ come first; Xsiz, Ysiz, and what is left and above of the image.
    """
    start = frame.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(frame) < start + 24:
        raise DataError("damaged DICOM: no JPEG 2000 inside. Copy it again.")
    right, bottom, left, top = struct.unpack_from(">4L", frame, start + 8)
    if (right - left, bottom - top) != (known.width, known.height):
        raise DataError(
            f"damaged DICOM: its header says {known.width:,} x {known.height:,} pixels, the JPEG 2000 inside "
            f"{right - left:,} x {bottom - top:,}"
        )


def _own_bits(stored: np.ndarray, bits: int) -> tuple[np.ndarray, list[str]]:
    """Stored values without what stands in the bits above theirs, sign included; and whether anything did.

    pydicom does this where pixels are not compressed, but for JPEG 2000 and JPEG-LS, whose decoders give all bits.
    """
    above = stored.dtype.itemsize * 8 - bits
    own = (stored << above) >> above
    if np.array_equal(own, stored):
        return stored, []
    return own, [f"its pixels have more than the {bits} bits that they are said to have; the others were dropped"]


def _drop_blanks(header: Any) -> None:
    """Take what is blank out of the header, where pydicom wants numbers or a name.

    Raises:
        DataError: there is something else than numbers, or an unknown name; names the element, not what is in it.
    """
    for keyword in ("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"):
        try:
            if (value := header.get(keyword)) == "":
                delattr(header, keyword)
            elif value is not None:
                np.atleast_1d(value).astype(float)
        except (TypeError, ValueError):  # a decimal comma, or nothing in the first of several places
            raise DataError(f"a DICOM whose {keyword} is no number. Correct or remove it.") from None
    if not header.get("VOILUTFunction", "LINEAR"):
        del header.VOILUTFunction
    elif header.get("VOILUTFunction", "LINEAR") not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise DataError("a DICOM whose VOILUTFunction is unknown. Correct or remove it.")


def _drop_empty_window(header: Any) -> list[str]:
    """Take a window out of the header that shows nothing, and say so; some devices write a width of 0 for none.

    Source:
        DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3: a linear one is at least 1 wide, others are wider than 0.
    """
    if header.get("VOILUTSequence") or None in (header.get("WindowCenter"), header.get("WindowWidth")):
        return []
    width = float(np.atleast_1d(header.WindowWidth)[0])
    linear = header.get("VOILUTFunction") not in ("LINEAR_EXACT", "SIGMOID")
    if not (width < 1 if linear else width <= 0):
        return []
    del header.WindowWidth
    return [f"its window is {width:g} wide, which shows nothing; it was read as if there were none"]


def _padding(header: Any, stored: np.ndarray) -> tuple[int, int] | None:
    """The smallest and largest stored value that stand for no pixel, outside the collimator as a rule; None: none do.

    Source:
        DICOM PS3.3 C.7.5.1.1.2 (Pixel Padding Value and Range Limit, of which either may be the larger).
    """
    first, last = header.get("PixelPaddingValue"), header.get("PixelPaddingRangeLimit")
    if not isinstance(first, int):
        return None
    # through the bits: some files give a signed value as an unsigned one
    ends = [first, last if isinstance(last, int) else first]
    bits = np.array([end % (1 << 8 * stored.itemsize) for end in ends], dtype=f"u{stored.itemsize}")
    low, high = sorted(bits.view(stored.dtype).tolist())
    return low, high


def _decode_jpeg(frame: bytes, known: Outline, *, signed: bool) -> np.ndarray:
    """Decode an 8-bit JPEG with Pillow: (H, W) integers of 8 bits."""
    check_scans(frame)
    try:
        image = Image.open(io.BytesIO(frame), formats=("JPEG",))
    except UnidentifiedImageError:
        raise DataError("damaged DICOM: no 8-bit JPEG inside. Copy it again.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(
            f"damaged DICOM: its header says {known.width:,} x {known.height:,} pixels, the JPEG inside far more"
        ) from None
    if image.size != (known.width, known.height):
        raise DataError(
            f"damaged DICOM: its header says {known.width:,} x {known.height:,} pixels, "
            f"the JPEG inside {image.size[0]:,} x {image.size[1]:,}"
        )
    if image.mode != "L":
        raise DataError(f"a DICOM with a JPEG of mode {image.mode} inside; grey is needed")
    stored = np.array(image)
    return stored.view(np.int8) if signed else stored


def _render(pydicom: ModuleType, header: Any, stored: np.ndarray, order: str) -> np.ndarray:
    """Map stored values to (H, W) uint8 as the file asks, by a table over all values there can be.

    Those that pad the image are black, and where values are stretched, left out.

    Source:
        DICOM PS3.3 C.11.1 (rescale, modality table), C.11.2 (window, VOI table), C.7.6.3.1.2 (MONOCHROME1).
    """
    inverted = header.PhotometricInterpretation == "MONOCHROME1"
    modality, voi = header.get("ModalityLUTSequence"), header.get("VOILUTSequence")
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    rescaled = None not in (slope, intercept) and (slope, intercept) != (1, 0)
    windowed = None not in (header.get("WindowCenter"), header.get("WindowWidth"))
    low, high = int(stored.min()), int(stored.max())
    index = stored.view(f"u{stored.itemsize}")
    count = high + 1 if low >= 0 else 1 << 8 * stored.itemsize
    values = np.arange(count, dtype=index.dtype).view(stored.dtype).astype(np.int64)
    grey, padded = values, np.zeros(count, dtype=np.bool_)
    if ends := _padding(header, stored):
        inside = stored[(stored < ends[0]) | (stored > ends[1])]
        if inside.size:
            low, high = int(inside.min()), int(inside.max())
            padded = (values >= ends[0]) & (values <= ends[1])
    if modality:
        grey, _ = _look_up(modality[0], values, order)
    elif rescaled:
        grey = pydicom.pixels.apply_rescale(values, header)
    if voi:
        grey, white = _look_up(voi[0], np.rint(grey).astype(np.int64), order)
        black = 0
    elif windowed:
        extremes = [-1e30, 1e30]  # black and white of any window, in whatever unit pydicom gives them
        with np.errstate(over="ignore"):  # exp, far from the centre of a sigmoid
            grey = pydicom.pixels.apply_windowing(np.append(grey, extremes), header)
        grey, black, white = grey[:-2], grey[-2], grey[-1]
    elif header.BitsStored == 8 and stored.dtype.kind == "u" and not (modality or rescaled):
        black, white = 0, 255
    else:
        present = grey[(values >= low) & (values <= high) & ~padded]
        black, white = present.min(), present.max()
    if not (np.isfinite(grey).all() and np.isfinite([black, white]).all()):
        raise DataError("a DICOM whose window or rescale values are not finite")
    share = (grey - black) / ((white - black) or 1)
    table = np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)
    table = 255 - table if inverted else table
    table[padded] = 0
    return table[index]


def _look_up(item: Any, values: np.ndarray, order: str) -> tuple[np.ndarray, int]:
    """Apply a lookup table: the new values, and the largest that its bits allow.

    Not by pydicom: its modality table fails for 10 to 15 bits, its VOI table of 8 bits wraps beyond 256
    entries.
    """
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    entries = item.LUTData
    if isinstance(entries, bytes):
        wide = len(entries) >= 2 * (count or 2**16)
        entries = np.frombuffer(entries, order + "u2" if wide else np.uint8)
    table = np.atleast_1d(np.asarray(entries, dtype=np.int64))[: count or 2**16]
    if not 1 <= bits <= 16 or table.size == 0:
        raise DataError(f"a DICOM with a lookup table of {table.size} entries of {bits} bits")
    return table[np.clip(values - first, 0, table.size - 1)], 2**bits - 1


def _spacing(header: Any) -> tuple[float, float] | None:
    """Millimetres from row to row and from column to column, in the patient as far as the file tells.

    Source:
        DICOM PS3.3 10.7.1.1 and 10.7.1.3: ImagerPixelSpacing is that of the detector, on which the patient is
        magnified; a PixelSpacing that repeats it was not corrected for that. NominalScannedPixelSpacing is of films.
    """
    try:
        magnified = float(header.get("EstimatedRadiographicMagnificationFactor"))
    except (TypeError, ValueError):
        magnified = 1.0
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        try:
            row, column = (float(value) for value in header.get(keyword))
        except (TypeError, ValueError):
            continue  # absent, empty, not two, or no numbers
        if keyword == "PixelSpacing" and header.get(keyword) == header.get("ImagerPixelSpacing"):
            continue
        if keyword == "ImagerPixelSpacing" and 1 <= magnified < float("inf"):
            row, column = row / magnified, column / magnified
        if 0 < row < float("inf") and 0 < column < float("inf"):
            return row, column
    return None


def _odd_view(header: Any) -> list[str]:
    """Say where a file is not of what a chest model was made for, in words of our own."""
    remarks = []
    view = str(header.get("ViewPosition") or "").upper().strip()
    codes = header.get("ViewCodeSequence") or ()
    meant = [str(code.get("CodeMeaning") or "").lower() for code in codes if hasattr(code, "get")]
    told = " ".join(str(header.get(keyword) or "") for keyword in DESCRIPTIONS).upper()
    words = set(re.findall("[A-Z]+", told))  # never repeated: people write names there
    across, down = _orientation(header)
    part = unicodedata.normalize("NFD", str(header.get("BodyPartExamined") or "").upper())
    part = "".join(sign for sign in part if not unicodedata.combining(sign))  # accents, as in Spanish
    if view in LATERAL:
        remarks.append(f"a lateral view (ViewPosition {view}); frontal ones are expected")
    elif any("lateral" in text and "decubitus" not in text for text in meant):
        remarks.append("a lateral view by its ViewCodeSequence; frontal ones are expected")
    elif across and across in "AP":
        remarks.append("a lateral view by its PatientOrientation; frontal ones are expected")
    elif not view and words & LATERAL_WORDS and not (words & FRONTAL or "DECUB" in told):
        remarks.append("a lateral view by its description; frontal ones are expected")
    elif view and view not in FRONTAL:
        remarks.append("not a frontal view by its ViewPosition")
    elif across + down not in ("", "LF"):
        remarks.append(
            f"turned or mirrored: its PatientOrientation says that rows go to {across} and columns to {down}, where "
            f"L and F are usual; it was not turned back"
        )
    if part and not any(word in part for word in CHEST):
        remarks.append("not a chest by its BodyPartExamined")
    if "LOCALIZER" in np.atleast_1d(header.get("ImageType") or ""):
        remarks.append("a localizer by its ImageType, not a radiograph")
    if header.get("Modality") in NOT_RADIOGRAPHS:
        remarks.append(f"not a radiograph by its Modality {header.Modality}")
    return remarks


def _orientation(header: Any) -> tuple[str, str]:
    """To which side of the patient rows and columns go: first letters of PatientOrientation; blank where unknown.

    Source:
        DICOM PS3.3 C.7.6.1.1.1: Anterior, Posterior, Right, Left, Head, Foot.
    """
    given = header.get("PatientOrientation")
    if given is None or isinstance(given, str) or len(given) != 2:
        return "", ""
    across, down = (str(value).strip()[:1].upper() for value in given)
    return (across, down) if {across, down} <= set("APRLHF") else ("", "")


def _odd_pixels(header: Any, spacing: tuple[float, float] | None) -> list[str]:
    """Say where grey levels are probably not those that a viewer shows, or pixels not square."""
    remarks = []
    if header.get("PresentationIntentType") == "FOR PROCESSING":
        remarks.append("what a detector gave (FOR PROCESSING), often inverted; a picture for presentation is expected")
    shape, kind = header.get("PresentationLUTShape"), header.PhotometricInterpretation
    if shape in POLARITY.values() and shape != POLARITY[kind]:
        remarks.append(
            f"{kind}, but with PresentationLUTShape {shape}: it may have to be inverted; {kind} was believed"
        )
    try:
        height, width = spacing or (float(value) for value in header.get("PixelAspectRatio"))
        ratio = max(height / width, width / height)
    except (TypeError, ValueError, ZeroDivisionError):
        return remarks
    if ratio > NEARLY_SQUARE:
        remarks.append(f"its pixels are not square, but {ratio:.3g} times as long one way: it is seen as if they were")
    return remarks
