import io
import logging
import random
import struct
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pneumo.data import dicom, images
from pneumo.errors import DataError, NoRadiographError

pydicom = pytest.importorskip("pydicom")

SECRET = "ROENTGEN^ANNA"
JPEG_2000 = "1.2.840.10008.1.2.4.90"


def ramp(height=48, width=40, high=255, dtype=np.uint8):
    y, x = np.mgrid[:height, :width]
    return ((7 * y + 11 * x) * high // (7 * 47 + 11 * 39)).astype(dtype)


def jpeg(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def bomb(side):
    """A JPEG whose header claims that many pixels a side."""
    content = jpeg(ramp())
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + side.to_bytes(2) * 2 + content[at + 4 :]


def make(pixels, syntax=dicom.EXPLICIT_LITTLE, *, frame=None, drop=(), vrs=None, **elements):
    """A DICOM file as bytes; `frame` is an encoded image to put in place of the pixels."""
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    header.file_meta.MediaStorageSOPClassUID = elements.get("SOPClassUID", "1.2.840.10008.5.1.4.1.1.7")
    header.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    header.PatientName = header.PatientID = SECRET
    header.PatientBirthDate = "18450327"
    header.Rows, header.Columns = pixels.shape[:2]
    header.SamplesPerPixel = 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 8 * pixels.itemsize
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    for keyword, value in elements.items():
        setattr(header, keyword, value)
    for element in header:
        for keyword, vr in (vrs or {}).items():
            if element.keyword.startswith(keyword):
                element.VR = vr
    header.HighBit = elements.get("HighBit", header.BitsStored - 1)
    if frame is not None:
        header.PixelData = pydicom.encaps.encapsulate([frame])
        header["PixelData"].is_undefined_length = True
    else:
        order = ">" if syntax == dicom.EXPLICIT_BIG else "<"
        header.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    header["PixelData"].VR = "OW" if pixels.itemsize == 2 else "OB"
    for keyword in drop:
        delattr(header, keyword)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom complains about what the tests break on purpose
        header.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.fixture
def read(tmp_path):
    def read(content, name="case.dcm"):
        (tmp_path / name).write_bytes(content)
        return images.read(tmp_path / name)

    return read


@pytest.fixture
def refusal(read, tmp_path):
    """The text of the error, which must name the file and not the patient."""

    def refusal(content):
        with pytest.raises(DataError) as caught:
            read(content)
        text = str(caught.value)
        assert text.startswith(f"{tmp_path / 'case.dcm'}: ") and "\n" not in text
        assert "ROENTGEN" not in text and "1845" not in text
        return text

    return refusal


# Pixels


@pytest.mark.parametrize("syntax", [dicom.EXPLICIT_LITTLE, dicom.IMPLICIT_LITTLE, dicom.EXPLICIT_BIG])
@pytest.mark.parametrize("shape", [(48, 40), (33, 35)])
def test_eight_bits_stay_as_they_are(read, tmp_path, syntax, shape):
    pixels = ramp(*shape) // 2 + 20
    scan = read(make(pixels, syntax, PixelSpacing=[0.2, 0.202], ViewPosition="PA", BodyPartExamined="CHEST"))
    np.testing.assert_array_equal(scan.pixels, pixels)
    assert scan.pixels.dtype == np.uint8 and scan.pixels.flags.writeable
    assert scan.spacing == (0.2, 0.202) and scan.warnings == ()
    assert images.size(tmp_path / "case.dcm") == shape


@pytest.mark.fault("D8", "one picture as PNG and as uncompressed DICOM")
def test_same_picture_as_png_and_dicom(read, tmp_path, figure):
    Image.fromarray(ramp()).save(tmp_path / "case.png")
    pixels = images.read(tmp_path / "case.png").pixels
    np.testing.assert_array_equal(read(make(ramp())).pixels, pixels)
    figure(f"largest difference {np.abs(read(make(ramp())).pixels.astype(int) - pixels).max()}")


@pytest.mark.fault("D4", "JPEG baseline: by Pillow, whatever else is installed")
@pytest.mark.parametrize("syntax", [dicom.JPEG_BASELINE, dicom.JPEG_EXTENDED])
def test_jpeg_is_decoded_as_pillow_does(read, syntax):
    frame = jpeg(ramp())
    expected = np.array(Image.open(io.BytesIO(frame)))
    np.testing.assert_array_equal(read(make(ramp(), syntax, frame=frame)).pixels, expected)


def test_suffix_and_name_do_not_matter(read):
    assert read(make(ramp()), "1.2.840.1").warnings == ()
    assert read(make(ramp()), "case.png").warnings == ("named .png, but its content is DICOM",)


@pytest.mark.fault("D1", "beside its MONOCHROME2 twin, plain, windowed, and rescaled with a negative slope")
@pytest.mark.parametrize(
    "elements",
    [
        {},
        {"WindowCenter": 100, "WindowWidth": 120},
        {"RescaleSlope": -2, "RescaleIntercept": 700, "WindowCenter": 300, "WindowWidth": 400},
    ],
)
def test_monochrome1_is_inverted_last(read, elements):
    bright = read(make(ramp(), **elements)).pixels
    dark = read(make(ramp(), PhotometricInterpretation="MONOCHROME1", **elements)).pixels
    np.testing.assert_array_equal(dark, 255 - bright)


def window(values, center, width, function):
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, as shares of the output range."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return np.clip((values - center) / width + 0.5, 0, 1)


@pytest.mark.fault("D2", "12 bits in 16, signed and unsigned, four rescales, four window functions, two windows")
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
@pytest.mark.parametrize(("slope", "intercept"), [(None, None), (1, 0), (2.5, -1000), (-1, 4095)])
def test_first_window_after_rescale(read, function, dtype, slope, intercept):
    stored = ramp(high=4095, dtype=np.int32) - (2000 if dtype is np.int16 else 0)
    elements = {"WindowCenter": [900, 5], "WindowWidth": [1500, 10], "BitsStored": 13}
    if function:
        elements["VOILUTFunction"] = function
    if slope is not None:
        elements |= {"RescaleSlope": slope, "RescaleIntercept": intercept}
    values = stored * (slope or 1) + (intercept or 0)
    expected = np.rint(255 * window(values, 900, 1500, function or "LINEAR"))
    np.testing.assert_array_equal(read(make(stored.astype(dtype), **elements)).pixels, expected)


def test_window_of_width_one_is_a_threshold(read):
    scan = read(make(ramp(), WindowCenter=100, WindowWidth=1))
    np.testing.assert_array_equal(scan.pixels, 255 * (ramp() > 99.5))


@pytest.mark.fault("D2", "no window: from the smallest to the largest value")
@pytest.mark.parametrize(("dtype", "low"), [(np.uint16, 300), (np.int16, -700)])
def test_without_a_window_the_values_are_stretched(read, dtype, low):
    stored = (ramp(high=1000, dtype=np.int32) + low).astype(dtype)
    expected = np.rint(ramp(high=1000, dtype=np.int32) * 255 / 1000)
    np.testing.assert_array_equal(read(make(stored, BitsStored=12)).pixels, expected)


@pytest.mark.fault("D2", "padding of 65535, signed -32768, said as unsigned, a range, in MONOCHROME1: left out, black")
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(
    ("dtype", "padding", "said", "limit"),
    [
        (np.uint16, [65535], 65535, None),
        (np.uint16, [0], 0, None),
        (np.uint16, [1200], 1200, None),  # between the others
        (np.int16, [-32768], -32768, None),
        (np.int16, [-32768], 32768, None),  # the same bits
        (np.uint16, [60000, 65535], 65535, 60000),
        (np.uint16, [60000, 65535], 60000, 65535),
    ],
)
def test_padding_is_left_out_of_the_stretch(read, dtype, padding, said, limit, photometric):
    stored = (ramp(high=1000, dtype=np.int32) + 300).astype(dtype)
    expected = np.rint(ramp(high=1000, dtype=np.int32) * 255 / 1000)
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    for number, value in enumerate(padding):
        stored[:, number + 1] = value
        expected[:, number + 1] = 0
    expected[stored == padding[0]] = 0
    elements = {"PhotometricInterpretation": photometric, "PixelPaddingValue": said}
    if limit is not None:
        elements["PixelPaddingRangeLimit"] = limit
    vr = "SS" if said < 0 else "US"
    for syntax in (dicom.EXPLICIT_LITTLE, dicom.EXPLICIT_BIG, dicom.IMPLICIT_LITTLE):
        if syntax == dicom.IMPLICIT_LITTLE and said == 32768 and dtype is np.int16:
            continue  # cannot be written: the pixels' type decides
        np.testing.assert_array_equal(read(make(stored, syntax, vrs={"PixelPadding": vr}, **elements)).pixels, expected)


@pytest.mark.fault("D2", "padding of 0 or 4095 in MONOCHROME1 or 2, of 8 bits, under a window, a table: black")
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("padding", [0, 4095, None])
@pytest.mark.parametrize("how", ["window", "table", "8 bits"])
def test_padding_is_black_however_the_rest_is_shown(read, photometric, padding, how):
    """What a viewer shows as black, a collimator's shutter, would be the brightest part of the picture otherwise."""
    elements, stored = {"BitsStored": 12, "WindowCenter": 2048, "WindowWidth": 4096}, ramp(high=4095, dtype=np.uint16)
    if how == "table":
        elements = {"BitsStored": 12, "VOILUTSequence": table(np.arange(4096), 0, 12)}
    if how == "8 bits":
        elements, stored, padding = {}, ramp(), padding and 255
    elements["PhotometricInterpretation"] = photometric
    padding = int(stored[20, 20]) if padding is None else padding
    vrs = {"PixelPadding": "US"}
    without = read(make(stored, **elements)).pixels
    padded = read(make(stored, vrs=vrs, PixelPaddingValue=padding, **elements)).pixels
    assert (stored == padding).any()
    np.testing.assert_array_equal(padded, np.where(stored == padding, 0, without))


def test_padding_alone_or_of_another_type_is_nothing_to_leave_out(read):
    stored = np.full((40, 40), 900, np.uint16)
    scan = read(make(stored, PixelPaddingValue=900))
    assert not scan.pixels.any() and "constant" in scan.warnings[0]
    odd = make(ramp(high=1000, dtype=np.uint16), PixelPaddingValue=[1, 2])
    np.testing.assert_array_equal(read(odd).pixels, np.rint(ramp(high=1000, dtype=np.int32) * 255 / 1000))


@pytest.mark.fault("D2", "a window 0 or 0.5 wide, of 8 and 16 bits: as if there were none, with a warning")
@pytest.mark.parametrize("width", [0, 0.5, -3, [0, 100]])
def test_a_window_that_shows_nothing_is_passed_over(read, width):
    for stored in (ramp(), ramp(high=1000, dtype=np.uint16)):
        scan = read(make(stored, WindowCenter=100, WindowWidth=width))
        np.testing.assert_array_equal(scan.pixels, read(make(stored)).pixels)
        (remark,) = scan.warnings
        assert f"its window is {np.atleast_1d(width)[0]:g} wide, which shows nothing" in remark


def test_a_narrow_window_may_be_exact(read):
    scan = read(make(ramp(), WindowCenter=127.4, WindowWidth=0.5, VOILUTFunction="LINEAR_EXACT"))
    np.testing.assert_array_equal(scan.pixels, 255 * (ramp() > 127))
    assert [remark for remark in scan.warnings if "window is" in remark] == []


@pytest.mark.parametrize(
    "blank", [{"VOILUTFunction": ""}, {"RescaleSlope": "", "RescaleIntercept": ""}, {"RescaleSlope": ""}]
)
def test_blank_elements_are_passed_over(read, blank):
    """They may be there and empty, as some devices write them."""
    stored = ramp(high=4095, dtype=np.uint16)
    window = {"WindowCenter": 2048, "WindowWidth": 4096, "BitsStored": 12}
    np.testing.assert_array_equal(read(make(stored, **window, **blank)).pixels, read(make(stored, **window)).pixels)


@pytest.mark.parametrize(
    ("keyword", "raw"), [("WindowCenter", b"2048,0"), ("WindowWidth", b"\\10"), ("RescaleSlope", b"1,5")]
)
def test_numbers_that_are_none_are_named(refusal, keyword, raw):
    """Copying the file again would not help, and what stands there is not repeated."""
    elements = {"WindowCenter": 2048, "WindowWidth": 4096, "RescaleSlope": 1, "RescaleIntercept": 0}
    content = make(ramp(high=4095, dtype=np.uint16), BitsStored=12, **{**elements, keyword: 7777})
    value = raw + b" " * (len(raw) % 2)
    tag = pydicom.tag.Tag(keyword)
    head = struct.pack("<HH2sH", tag.group, tag.elem, b"DS", 6) + b"7777.0"
    assert content.count(head) == 1
    content = content.replace(head, struct.pack("<HH2sH", tag.group, tag.elem, b"DS", len(value)) + value)
    assert refusal(content).endswith(f": a DICOM whose {keyword} is no number. Correct or remove it.")


def test_constant_without_a_window(read):
    scan = read(make(np.full((40, 40), 900, np.uint16)))
    assert not scan.pixels.any() and "constant" in scan.warnings[0]


def test_padding_bits_are_not_pixels(read):
    stored = ramp(high=4095, dtype=np.uint16)
    dirty = stored | (ramp().astype(np.uint16) % 16 << 12)  # overlays were once kept there
    expected = read(make(stored, BitsStored=12)).pixels
    np.testing.assert_array_equal(read(make(dirty, BitsStored=12)).pixels, expected)


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        (np.array([[0x8123, 0x0FFF]], np.uint16), [[0x123, 0xFFF]]),
        (np.array([[0x0FFF, 0x0001]], np.int16), [[-1, 1]]),  # the sign was not carried on
        (np.array([[-1, 2047]], np.int16), [[-1, 2047]]),
    ],
)
def test_bits_above_the_stored_ones_are_dropped(stored, own):
    found, remarks = dicom._own_bits(stored, 12)
    assert found.tolist() == own and found.dtype == stored.dtype
    assert bool(remarks) == (stored.tolist() != own)
    whole, remarks = dicom._own_bits(stored, 16)
    assert np.array_equal(whole, stored) and not remarks


def table(entries, first, bits):
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = np.asarray(entries, dtype="<u2").tobytes()
    item["LUTData"].VR = "OW"
    return pydicom.Sequence([item])


@pytest.mark.fault("D2", "VOI tables of 8, 10, 12 and 16 bits")
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_voi_table(read, bits):
    entries = np.linspace(2**bits - 1, 0, 4096).astype(np.uint16)  # more entries than 8 bits can count
    stored = ramp(high=4095, dtype=np.uint16)
    expected = np.rint(entries[stored] * 255.0 / (2**bits - 1))
    scan = read(make(stored, BitsStored=12, VOILUTSequence=table(entries, 0, bits)))
    np.testing.assert_array_equal(scan.pixels, expected)


def test_voi_table_holds_its_ends(read):
    entries = np.arange(100, 200)
    scan = read(make(ramp(), VOILUTSequence=table(entries, 50, 8)))
    np.testing.assert_array_equal(scan.pixels, np.clip(ramp().astype(int) - 50, 0, 99) + 100)


@pytest.mark.fault("D2", "a modality table and a window")
def test_modality_table_comes_before_the_window(read):
    entries = np.arange(256) * 4
    elements = {"ModalityLUTSequence": table(entries, 0, 12), "ModalityLUTType": "US"}
    scan = read(make(ramp(), WindowCenter=400, WindowWidth=300, **elements))
    expected = np.rint(255 * window(ramp() * 4.0, 400, 300, "LINEAR"))
    np.testing.assert_array_equal(scan.pixels, expected)


def test_threads_read_the_same(tmp_path):
    paths = []
    for i in range(24):
        paths.append(tmp_path / f"{i}.dcm")
        paths[-1].write_bytes(make(np.roll(ramp(), i), WindowCenter=100 + i, WindowWidth=90))
    before = list(warnings.filters)
    alone = [images.read(path).pixels for path in paths]
    with ThreadPoolExecutor(8) as pool:
        for pixels, scan in zip(alone, pool.map(images.read, paths), strict=True):
            np.testing.assert_array_equal(scan.pixels, pixels)
    assert warnings.filters == before


# What else it says


@pytest.mark.parametrize(
    ("elements", "spacing"),
    [
        ({"ImagerPixelSpacing": [0.3, 0.4]}, (0.3, 0.4)),
        ({"PixelSpacing": [0.1, 0.2], "ImagerPixelSpacing": [0.3, 0.4]}, (0.1, 0.2)),
        ({"ImagerPixelSpacing": [0.3, 0.6], "EstimatedRadiographicMagnificationFactor": 1.5}, (0.3 / 1.5, 0.6 / 1.5)),
        ({"ImagerPixelSpacing": [0.3, 0.4], "EstimatedRadiographicMagnificationFactor": 0}, (0.3, 0.4)),
        ({"PixelSpacing": [0.1, 0.2], "EstimatedRadiographicMagnificationFactor": 1.5}, (0.1, 0.2)),
        (
            {f"{of}PixelSpacing": [0.3, 0.6] for of in ("", "Imager")}
            | {"EstimatedRadiographicMagnificationFactor": 1.5},
            (0.3 / 1.5, 0.6 / 1.5),
        ),
        ({"PixelSpacing": [0.3, 0.6], "ImagerPixelSpacing": [0.3, 0.6]}, (0.3, 0.6)),
        ({"NominalScannedPixelSpacing": [0.1, 0.2]}, (0.1, 0.2)),
        ({"NominalScannedPixelSpacing": [0.1, 0.2], "ImagerPixelSpacing": [0.3, 0.4]}, (0.3, 0.4)),
        ({"PixelSpacing": [0, 0]}, None),
        ({"PixelSpacing": ""}, None),
        ({}, None),
    ],
)
def test_spacing(read, elements, spacing):
    assert read(make(ramp(), **elements)).spacing == spacing


def coded(meaning):
    item = pydicom.Dataset()
    item.CodeMeaning = meaning
    return item


@pytest.mark.parametrize(
    ("elements", "warning"),
    [
        ({"ViewPosition": "LL"}, "lateral view (ViewPosition LL)"),
        ({"ViewPosition": "ANNA"}, "not a frontal view"),
        ({"ViewCodeSequence": [coded("Left Lateral")]}, "a lateral view by its ViewCodeSequence"),
        ({"SeriesDescription": "Anna LAT"}, "a lateral view by its description"),
        ({"ViewPosition": "", "ProtocolName": "Thorax lateral"}, "a lateral view by its description"),
        ({"AcquisitionDeviceProcessingDescription": "PROFIL"}, "a lateral view by its description"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "a localizer by its ImageType"),
        ({"PatientOrientation": ["A", "F"]}, "a lateral view by its PatientOrientation"),
        ({"PatientOrientation": ["R", "F"]}, "turned or mirrored: its PatientOrientation says that rows go to R and"),
        ({"PatientOrientation": ["H", "L"]}, "rows go to H and columns to L, where L and F are usual"),
        ({"PresentationIntentType": "FOR PROCESSING"}, "often inverted; a picture for presentation is expected"),
        ({"PresentationLUTShape": "INVERSE"}, "MONOCHROME2, but with PresentationLUTShape INVERSE"),
        (
            {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "IDENTITY"},
            "MONOCHROME1, but with PresentationLUTShape IDENTITY",
        ),
        ({"PixelSpacing": [0.2, 0.4]}, "its pixels are not square, but 2 times as long one way"),
        ({"PixelAspectRatio": [1, 3]}, "its pixels are not square, but 3 times as long one way"),
        ({"BodyPartExamined": "KNEE"}, "not a chest"),
        ({"Modality": "CT"}, "Modality CT"),
    ],
)
def test_odd_views_warn_without_repeating_foreign_text(read, elements, warning):
    (remark,) = read(make(ramp(), **elements)).warnings
    assert warning in remark and "ANNA" not in remark and "KNEE" not in remark


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")  # lower case, which files have none the less
@pytest.mark.parametrize("view", ["PA", "ap ", "LLD", ""])
def test_frontal_views_do_not(read, view):
    assert read(make(ramp(), ViewPosition=view, BodyPartExamined="CHEST AP", Modality="DX")).warnings == ()


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
@pytest.mark.parametrize(
    "elements",
    [
        {"BodyPartExamined": "T\u00d3RAX", "SpecificCharacterSet": "ISO_IR 100"},
        {"ViewCodeSequence": "antero-posterior"},
        {"ViewCodeSequence": "left lateral decubitus"},
        {"SeriesDescription": "Chest PA and LAT"},
        {"SeriesDescription": "Lateral Decubitus"},
        {"SeriesDescription": "Platte, bilateral", "ImageType": ["ORIGINAL", "PRIMARY"]},
        {"SeriesDescription": "LAT", "ViewPosition": "PA"},
        {"PatientOrientation": ["L", "F"]},
        {"PatientOrientation": ["L", "FP"]},
        {"PatientOrientation": ["", ""]},
        {"PatientOrientation": ["X", "ANNA"]},
        {"PresentationIntentType": "FOR PRESENTATION", "PresentationLUTShape": "IDENTITY"},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
        {"PresentationLUTShape": ""},
        {"PixelSpacing": [0.2, 0.203]},
        {"PixelAspectRatio": [0, 0]},
        {"PixelAspectRatio": [1, 1], "PixelSpacing": ""},
    ],
)
def test_what_is_as_usual_is_not_warned_of(read, elements):
    if text := elements.get("ViewCodeSequence"):
        elements = {"ViewCodeSequence": [coded(text)]}
    assert read(make(ramp(), **elements)).warnings == ()


def test_a_header_that_leaves_out_what_is_always_the_same(read):
    """SamplesPerPixel is 1 for every radiograph."""
    np.testing.assert_array_equal(read(make(ramp(), drop=["SamplesPerPixel"])).pixels, ramp())


@pytest.mark.parametrize("start", [128, 132], ids=["DICM", "group 2"])
def test_a_missing_preamble_is_named(refusal, start):
    assert refusal(make(ramp())[start:]).endswith(
        "a DICOM, as it seems, without its preamble of 128 bytes. Write it anew: dcmconv (DCMTK)"
    )


@pytest.mark.parametrize(("content", "is_one"), [(make(ramp()), True), (make(ramp())[132:], True), (b"a" * 200, False)])
def test_a_file_without_suffix_is_listed_by_its_content(tmp_path, content, is_one):
    (tmp_path / "IM0001").write_bytes(content)
    assert images.is_image(tmp_path / "IM0001") is is_one


def test_pydicom_says_nothing_itself(read, caplog):
    caplog.set_level(logging.DEBUG)
    content = bytearray(make(ramp(), PixelSpacing=[0.1, 0.1], SpecificCharacterSet="ISO_IR 100"))
    at = content.index(b"ISO_IR 100")
    content[at : at + 10] = b"ROENTGEN  "  # pydicom would warn of an unknown encoding, and quote it
    content += bytes(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(bytes(content))
    assert not caplog.records


# Refusals


@pytest.mark.fault(
    "D5",
    "colour, frames, SEG, PR, SR, DICOMDIR, no or too few pixels, 65,535 squared, a JPEG of another size, a HighBit",
)
@pytest.mark.parametrize(
    ("pixels", "options", "reason"),
    [
        (
            np.zeros((40, 40, 3), np.uint8),
            {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"},
            "colour",
        ),
        (ramp(), {"PhotometricInterpretation": "PALETTE COLOR"}, "neither MONOCHROME1 nor MONOCHROME2"),
        (np.zeros((80, 40), np.uint8), {"NumberOfFrames": 2, "Rows": 40}, "2 frames"),
        (np.zeros((40, 40), np.uint32), {}, "32 bits in 32"),
        (ramp(), {"BitsStored": 9}, "9 bits in 8"),
        (
            ramp(high=4095, dtype=np.uint16) << 4,
            {"BitsStored": 12, "HighBit": 15, "WindowCenter": 2048, "WindowWidth": 4096},
            "HighBit is 15; 11 is read with 12 bits a pixel",
        ),
        (ramp(), {"HighBit": 0}, "HighBit is 0; 7 is read with 8 bits a pixel"),
        (ramp(), {"drop": ["PixelData"]}, "without pixels"),
        (ramp(), {"drop": ["Rows"]}, "Rows is missing"),
        (ramp(), {"drop": ["BitsStored"]}, "0 bits in 8"),
        (ramp(20, 40), {}, "40 x 20 pixels; at least 32"),
        (ramp(), {"Rows": 65535, "Columns": 65535}, "65,535 x 65,535 pixels; 64 Mpx"),
        (ramp(), {"Rows": 100}, "truncated: 1,920 of 4,000 bytes of pixels"),
        (ramp(), {"Modality": "SR"}, "a structured report, not an image"),
        (ramp(), {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"}, "a segmentation or registration"),
        (ramp(), {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.11.1"}, "a presentation state"),
        (ramp(), {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}, "a structured report"),
        (ramp(), {"SOPClassUID": "1.2.840.10008.1.3.10"}, "a DICOMDIR"),
        (
            ramp(),
            {"WindowCenter": 100, "WindowWidth": 9, "VOILUTFunction": "ODD"},
            "whose VOILUTFunction is unknown. Correct",
        ),
        (ramp(), {"syntax": dicom.DEFLATED}, "dcmconv"),
        (
            ramp(),
            {"syntax": "1.2.840.10008.1.2.4.100", "frame": bytes(100)},
            "a transfer syntax that is not read",
        ),
        (ramp(), {"syntax": dicom.JPEG_BASELINE, "frame": jpeg(ramp(50, 40))}, "JPEG inside 40 x 50"),
        (ramp(), {"syntax": dicom.JPEG_BASELINE, "frame": bomb(12_000)}, "40 x 48 pixels, the JPEG inside far more"),
        (ramp(), {"syntax": dicom.JPEG_BASELINE, "frame": bomb(65_500)}, "40 x 48 pixels, the JPEG inside far more"),
        (ramp(), {"syntax": dicom.JPEG_BASELINE, "frame": jpeg(ramp()) + 101 * b"\xff\xda"}, "102 scans"),
        (ramp(), {"syntax": dicom.JPEG_BASELINE, "frame": jpeg(np.stack([ramp()] * 3, -1))}, "mode RGB"),
        (
            ramp(),
            {"syntax": dicom.JPEG_BASELINE, "frame": b"\xff\xd8\xff" + bytes(50)},
            "no 8-bit JPEG inside",
        ),
    ],
)
def test_what_is_not_one_grey_image_is_named(refusal, pixels, options, reason):
    assert reason in refusal(make(pixels, **options))


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("1.2.840.10008.5.1.4.1.1.7", True),  # secondary capture
        ("1.2.840.10008.5.1.4.1.1.7.4", True),
        ("1.2.840.10008.5.1.4.1.1.1", False),  # computed radiography: something is wrong with it
    ],
)
def test_a_captured_screen_is_known_as_no_radiograph(kind, left_out):
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "SOPClassUID": kind}
    frames = {"NumberOfFrames": 2, "Rows": 40, "SOPClassUID": kind}
    for data in (make(np.zeros((40, 40, 3), np.uint8), **colour), make(np.zeros((80, 40), np.uint8), **frames)):
        with pytest.raises(DataError) as caught:
            dicom.decode(data, dicom.outline(data))
        assert isinstance(caught.value, NoRadiographError) is left_out
    grey = make(ramp(), SOPClassUID=kind)
    assert dicom.decode(grey, dicom.outline(grey))[0].shape == (48, 40)


def test_objects_of_a_study_that_are_left_out_and_others_that_are_not():
    for kind, left_out in (("88.67", True), ("9.1.1", True), ("104.1", True), ("66.4", True), ("481.1", False)):
        with pytest.raises(DataError) as caught:
            dicom.outline(make(ramp(), SOPClassUID=f"1.2.840.10008.5.1.4.1.1.{kind}"))
        assert isinstance(caught.value, NoRadiographError) is left_out


@pytest.mark.fault("D4", "every transfer syntax that needs a package which is not there")
@pytest.mark.parametrize("syntax", sorted(dicom.PLUGINS))
def test_missing_decoder_names_the_package(refusal, syntax):
    name, plugin, packages = dicom.PLUGINS[syntax]
    if plugin in pydicom.pixels.get_decoder(syntax).available_plugins:
        pytest.skip(f"{plugin} is installed")
    text = refusal(make(ramp(dtype=np.uint16), syntax, frame=bytes(100)))
    assert f"transfer syntax {syntax} ({name}) needs a decoder: pip install {packages}" in text


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_jpeg_2000_needs_no_other_package(read, dtype, syntax):
    pixels, buffer = ramp(64, 64, dtype=dtype), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG2000", no_jp2=True, irreversible=False)
    assert np.array_equal(read(make(pixels, syntax, frame=buffer.getvalue())).pixels, read(make(pixels)).pixels)


def test_a_jpeg_2000_of_another_size_is_not_decoded(refusal, monkeypatch):
    """Of more pixels than the header says, and of as many; and none at all."""
    monkeypatch.setattr(pydicom.pixels, "get_decoder", lambda _: Plugged())
    for shape in ((480, 400), (40, 48)):
        buffer = io.BytesIO()
        Image.fromarray(ramp(*shape)).save(buffer, "JPEG2000", no_jp2=True)
        text = refusal(make(ramp(48, 40), JPEG_2000, frame=buffer.getvalue()))
        assert f"its header says 40 x 48 pixels, the JPEG 2000 inside {shape[1]} x {shape[0]}" in text
    assert "no JPEG 2000 inside" in refusal(make(ramp(), JPEG_2000, frame=bytes(100)))


class Plugged:
    """A decoder that is there, and decodes nothing."""

    available_plugins = ("pillow",)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_run_lengths_need_no_other_package(read, dtype):
    pixels = ramp(dtype=dtype)
    plain = make(pixels)
    header = pydicom.dcmread(io.BytesIO(plain))
    header.compress(pydicom.uid.RLELossless, encoding_plugin="pydicom")
    buffer = io.BytesIO()
    header.save_as(buffer)
    assert header.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless
    assert np.array_equal(read(buffer.getvalue()).pixels, read(plain).pixels)


def test_without_pydicom_it_is_named(refusal, monkeypatch):
    content = make(ramp())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pip install pydicom" in refusal(content)


@pytest.mark.fault("D5", "sequences nested 16 and 17 deep")
@pytest.mark.parametrize("syntax", [dicom.EXPLICIT_LITTLE, dicom.IMPLICIT_LITTLE, dicom.EXPLICIT_BIG])
@pytest.mark.parametrize("marked", [True, False])
def test_nesting_is_limited(read, refusal, syntax, marked):
    def nested(depth):
        inner = pydicom.Dataset()
        inner.CodeValue = "X"
        for _ in range(depth):
            outer = pydicom.Dataset()
            outer.ConceptCodeSequence = [inner]
            outer["ConceptCodeSequence"].is_undefined_length = marked
            inner.is_undefined_length_sequence_item = marked
            inner = outer
        return inner.ConceptCodeSequence

    assert read(make(ramp(), syntax, ConceptCodeSequence=nested(dicom.MAX_DEPTH))).warnings == ()
    content = make(ramp(), syntax, ConceptCodeSequence=nested(dicom.MAX_DEPTH + 1))
    assert "nested more than 16 deep" in refusal(content)


@pytest.mark.fault("D5", "sequences nested 100,000 deep")
def test_bottomless_nesting_is_refused_at_once(refusal):
    content = make(ramp())
    sequence = struct.pack("<HH2sHL", 0x0040, 0xA168, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    at = content.index(struct.pack("<HH2s", 0x0028, 0x0002, b"US"))
    assert "nested more than 16" in refusal(content[:at] + sequence * 100_000 + content[at:])


def test_countless_elements_are_refused(refusal):
    element = struct.pack("<HH2sH", 0x0009, 0x1001, b"CS", 0)
    assert "more than 100,000 elements" in refusal(make(ramp()) + element * 100_001)


@pytest.mark.fault("D3", "cut at every 1 %, and at random places, in files of three transfer syntaxes")
@pytest.mark.parametrize("more", [100, pytest.param(1_300, marks=pytest.mark.slow)])
def test_every_truncation_is_refused_with_its_place(refusal, figure, more):
    contents = [
        make(ramp()),
        make(ramp(), dicom.JPEG_BASELINE, frame=jpeg(ramp())),
        make(ramp(high=4095, dtype=np.uint16), dicom.IMPLICIT_LITTLE, WindowCenter=9, WindowWidth=99),
    ]
    rng = random.Random(0)
    places = [(content, len(content) * percent // 100) for content in contents[:2] for percent in range(100)]
    places += [(content, rng.randrange(len(content))) for content in rng.choices(contents, k=more)]
    placed = 0
    for content, cut in places:
        text = refusal(content[:cut])
        known = cut >= 132 and "does not say its transfer syntax" not in text  # for a DICOM, and as which
        assert f"byte {cut:,}" in text or not known or "without pixels" in text or "is missing" in text, text
        placed += f"byte {cut:,}" in text
    figure(f"{len(places):,} cuts: 0 foreign exceptions, {placed:,} with their byte")


def test_element_beyond_its_sequence_is_refused(refusal):
    item = pydicom.Dataset()
    item.CodeMeaning = "meaning."
    content = bytearray(make(ramp(), ConceptCodeSequence=[item]))
    content[content.index(b"meaning.") - 2] = 90
    assert "reaches beyond its sequence" in refusal(bytes(content))


@pytest.mark.fault("D6", "a marker as name and id of the patient, in damaged files: in no message")
def test_damage_never_raises_anything_else(read, tmp_path):
    rng = random.Random(0)
    deep = ramp(high=4095, dtype=np.uint16)
    item = pydicom.Dataset()
    item.CodeValue = "X"
    contents = [
        make(ramp()),
        make(ramp(), dicom.JPEG_BASELINE, frame=jpeg(ramp())),
        make(
            deep,
            RescaleSlope=2,
            RescaleIntercept=1,
            WindowCenter=[9, 8],
            WindowWidth=[99, 5],
            PixelSpacing=[1, 1],
        ),
        make(deep.astype(np.int16), dicom.IMPLICIT_LITTLE, ConceptCodeSequence=[item], ViewPosition="PA"),
        make(deep, dicom.EXPLICIT_BIG, VOILUTSequence=table(range(100), 0, 8)),
    ]
    refused = 0
    for _ in range(300):
        content = bytearray(rng.choice(contents))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(100, rng.choice([len(content), 700]))
            content[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        try:
            read(bytes(content))
        except DataError as error:
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
            assert "ROENTGEN" not in str(error)
            refused += 1
    assert refused > 100


# Real files


@pytest.mark.fault("D8", "real X-rays, where they are: DICOM with JPEG inside, and the published PNG")
def test_real_dicom_and_png_are_the_same(siim):
    for part in ("train", "test"):
        for path in sorted((siim / "gold-1024" / f"dicom-{part}").iterdir()):
            scan = images.read(path)
            png = images.read(siim / "gold-1024" / part / f"{path.stem}.png")
            np.testing.assert_array_equal(scan.pixels, png.pixels)
            assert scan.spacing is not None and scan.warnings == ()


def test_a_rescale_that_changes_nothing_changes_no_eight_bits(read):
    """As most files have it: a slope of 1 and an intercept of 0."""
    pixels = ramp() // 2 + 20
    np.testing.assert_array_equal(read(make(pixels, RescaleSlope=1, RescaleIntercept=0)).pixels, pixels)


@pytest.mark.parametrize("syntax", [dicom.EXPLICIT_LITTLE, dicom.JPEG_BASELINE])
def test_signed_eight_bits_are_stretched(read, syntax):
    stored = np.where(np.arange(40) < 20, -100, 100).astype(np.int8)[None].repeat(48, 0)
    frame = None if syntax == dicom.EXPLICIT_LITTLE else jpeg(stored.view(np.uint8))
    pixels = read(make(stored, syntax, frame=frame)).pixels
    assert (pixels[:, :16] < 20).all() and (pixels[:, 24:] > 235).all()


def test_a_voi_table_comes_before_a_window(read):
    """PS3.3 C.11.2: a file may have both, as alternatives; pydicom prefers the table as well."""
    elements = {"VOILUTSequence": table(np.arange(256)[::-1], 0, 8)}
    wanted = read(make(ramp(), **elements)).pixels
    np.testing.assert_array_equal(wanted, 255 - ramp())
    for width in (30, 0):
        scan = read(make(ramp(), WindowCenter=100, WindowWidth=width, **elements))
        np.testing.assert_array_equal(scan.pixels, wanted)
        assert scan.warnings == ()


def test_numbers_beyond_all_bounds_are_refused(refusal):
    content = make(ramp(high=4095, dtype=np.uint16), BitsStored=12, RescaleSlope="1e308", RescaleIntercept="0")
    assert "window or rescale values are not finite" in refusal(content)


@pytest.mark.parametrize("syntax", [dicom.EXPLICIT_LITTLE, dicom.IMPLICIT_LITTLE])
def test_an_icon_in_a_file_is_not_its_image(read, refusal, tmp_path, syntax):
    icon = pydicom.Dataset()
    icon.Rows = icon.Columns = 64
    icon.SamplesPerPixel, icon.PhotometricInterpretation = 1, "MONOCHROME2"
    icon.BitsAllocated = icon.BitsStored = 8
    icon.HighBit, icon.PixelRepresentation = 7, 0
    icon.PixelData = bytes(64 * 64)
    icon["PixelData"].VR = "OB"
    content = make(ramp(), syntax, IconImageSequence=[icon])
    np.testing.assert_array_equal(read(content).pixels, ramp())
    assert images.size(tmp_path / "case.dcm") == (48, 40)
    assert "a DICOM without pixels" in refusal(make(ramp(), syntax, IconImageSequence=[icon], drop=["PixelData"]))


@pytest.mark.parametrize("spacing", [[0, 0.2], [0.2, 0], [-0.1, 0.2]])
def test_pixels_of_no_size_have_none(read, spacing):
    assert read(make(ramp(), PixelSpacing=spacing)).spacing is None


def test_a_table_longer_than_it_says_ends_where_it_says(read):
    item = table(np.arange(256), 0, 8)
    item[0].LUTDescriptor = [100, 0, 8]
    item[0]["LUTDescriptor"].VR = "US"
    np.testing.assert_array_equal(read(make(ramp(), VOILUTSequence=item)).pixels, np.clip(ramp(), 0, 99))


@pytest.mark.parametrize("where", ["meta", "data set"])
def test_either_class_tells_an_object_that_is_no_image(refusal, where):
    report, image = b"1.2.840.10008.5.1.4.1.1.88.11", b"1.2.840.10008.5.1.4.1.1.1.1.1"
    content = make(ramp(), SOPClassUID=report.decode())
    first, second = content.index(report), content.rindex(report)
    at = second if where == "meta" else first
    assert first != second and "a structured report" in refusal(content[:at] + image + content[at + len(image) :])


def test_a_sequence_of_unknown_type_is_walked(read):
    """PS3.5 6.2.2, note: what an UN of undefined length holds is implicit little endian."""
    item = struct.pack("<HHL", 0x0008, 0x0100, 4) + b"CODE"
    item = struct.pack("<HHL", 0xFFFE, 0xE000, len(item)) + item
    un = struct.pack("<HH2sHL", 0x0009, 0x1010, b"UN", 0, 0xFFFFFFFF) + item + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    content = make(ramp())
    at = content.index(struct.pack("<HH", 0x0010, 0x0010))
    np.testing.assert_array_equal(read(content[:at] + un + content[at:]).pixels, ramp())


def test_errors_of_pydicom_are_not_logged(read, caplog):
    with dicom._pydicom():
        logging.getLogger("pydicom").error("ROENTGEN")
    assert not caplog.records
