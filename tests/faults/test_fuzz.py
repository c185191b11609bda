"""Strangers' files, mutated: what reads them answers with a result or with one line that names the file.

Bits flip, lengths lie, blocks are cut, doubled and swapped between files, words of a text are replaced; where a format
has checksums, half of the mutations get right ones, so that they reach what comes after. Every mutation is seeded.
"""

import io
import json
import random
import resource
import signal
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as save_tensors
from torch import nn

from pneumo import checkpoint, config, ensemble, log, oof, stages, tuning
from pneumo.data import cases, dicom, images, pack, rle
from pneumo.data.problems import raise_fatal
from pneumo.decision import tables
from pneumo.errors import DataError, PneumoError
from pneumo.model import unet

pydicom = pytest.importorskip("pydicom")

SECONDS = 5.0  # that a case may take, on a busy machine too
MEGABYTES = 512  # that all cases together may add to the process
SECRET = "ROENTGEN"
NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
WORDS = [
    *("", "-1", "0", "nan", "inf", "-0", "1e999", "9" * 25, "9" * 5000, "0x7f", "+1", "true", "1979-05-27T07:32:00Z"),
    *("'", '"', '"""', "\0", "é", "٣", "\u2028", "\ufeff", ",", ";", "\t", "\r", "\r\n", "\n\n", "=", "#", ".", "NA"),
    *("[", "]", "[" * 3000, "{", "}", "{}", "[[x]]", "seed", "base", "rule", "ImageId", "../../x", "x" * 70_000),
]


class Hang(BaseException):
    """Not an Exception, so that nothing swallows it."""


def _alarm(_number, _frame):
    raise Hang


def mutate(content: bytes, others: list[bytes], rng: random.Random, dense: int = 0) -> bytes:
    """One to four changes; half of them within the first `dense` bytes, where headers are."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        end = len(data) if not dense or rng.random() < 0.5 else min(dense, len(data))
        if end < 8:
            return bytes(data)
        at, length = rng.randrange(end), rng.choice([1, 2, 4, 8, 32, 200])
        kind = rng.randrange(9)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)])
        elif kind == 2:  # a length field
            form = rng.choice(["<H", ">H", "<I", ">I"])
            number = rng.choice([*NUMBERS, rng.randrange(2**16)]) & (2 ** (8 * struct.calcsize(form)) - 1)
            data[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = rng.randbytes(length)
        elif kind == 5:  # a block again
            data[at:at] = bytes(data[at : at + length]) * rng.choice([1, 2, 50])
        elif kind == 6 and rng.random() < 0.3:
            del data[at:]
        elif kind == 7:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            data[at : at + length] = other[start : start + length]
        else:
            data[at : at + length] = bytes(reversed(data[at : at + length]))
    return bytes(data)


def mutate_text(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Words and lines replaced, doubled, swapped, left out; now and then bytes."""
    if rng.random() < 0.3:
        return mutate(content, others, rng)
    lines = content.decode().splitlines(keepends=True)
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(lines)), rng.randrange(6)
        if kind == 0:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind == 1:
            lines.insert(at, rng.choice(rng.choice(others).decode().splitlines(keepends=True)))
        elif kind == 2 and len(lines) > 1:
            del lines[at]
        else:
            parts = [part for part in _split(lines[at]) if part] or [""]
            where = rng.randrange(len(parts))
            parts[where] = rng.choice(WORDS) if kind != 5 else parts[where] + rng.choice(WORDS)
            lines[at] = "".join(parts)
    return "".join(lines).encode("utf-8", "surrogatepass")


def _split(line: str) -> list[str]:
    parts, word = [], ""
    for letter in line:
        if letter.isalnum() or letter in "_-":
            word += letter
        else:
            parts += [word, letter]
            word = ""
    return [*parts, word]


def right_checksums(data: bytes) -> bytes:
    """A PNG's chunks with their CRCs made right, as far as chunks can be told."""
    fixed, position = bytearray(data[:8]), 8
    while position + 12 <= len(data):
        length = min(int.from_bytes(data[position : position + 4]), len(data) - position - 12)
        body = data[position + 4 : position + 8 + length]
        fixed += length.to_bytes(4) + body + zlib.crc32(body).to_bytes(4)
        position += 12 + length
    return bytes(fixed)


def mutate_png(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """As `mutate`; half with right CRCs, and of these half with the pixels' own stream changed inside."""
    if rng.random() < 0.5:
        return mutate(content, others, rng, dense=64)
    if rng.random() < 0.5:
        return content[:8] + right_checksums(content[:8] + mutate(content[8:], others, rng, dense=40))[8:]
    start = content.index(b"IDAT")
    length = int.from_bytes(content[start - 4 : start])
    pixels = zlib.decompress(content[start + 4 : start + 4 + length])
    packed = zlib.compress(mutate(pixels, [pixels], rng))
    body = b"IDAT" + packed
    return content[: start - 4] + len(packed).to_bytes(4) + body + zlib.crc32(body).to_bytes(4) + content[-12:]


def mutate_zip(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """As `mutate`; most with right CRCs, the pickle or a tensor changed inside the archive."""
    if rng.random() < 0.3:
        return mutate(content, others, rng)
    rebuilt = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(rebuilt, "w") as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        target = pickles[0] if pickles and rng.random() < 0.8 else rng.choice(names)
        for name in names:
            body = old.read(name)
            if name == target:
                body = mutate(body, [body], rng)
            pressed = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED
            if rng.random() > 0.01:
                new.writestr(name, body, pressed)
    return rebuilt.getvalue()


def fuzz(
    folder: Path,
    name: str,
    contents: list[bytes],
    change: Callable[[bytes, list[bytes], random.Random], bytes],
    read: Callable[[Path], object],
    count: int,
    seed: int = 0,
) -> str:
    """Read `count` mutated files; anything but a result or a PneumoError that names the file fails the test.

    Returns:
        What came out, in words.
    """
    rng = random.Random(seed)
    path = folder / name
    for content in contents:
        path.write_bytes(content)
        read(path)  # as they are, they are good
    good = refused = 0
    slowest = 0.0
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory from here on
    before = _peak_kilobytes()
    old = signal.signal(signal.SIGALRM, _alarm)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * MEGABYTES * 2**20, limits[1]))
    try:
        for number in range(count):
            content = change(rng.choice(contents), contents, rng)
            path.write_bytes(content)
            started = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                read(path)
                good += 1
            except PneumoError as error:
                text = str(error)
                assert name in text and "\n" not in text and len(text) < 2_000 and SECRET not in text, text
                refused += 1
            except (Exception, Hang) as error:
                signal.setitimer(signal.ITIMER_REAL, 0)
                (folder / "culprit").write_bytes(content)
                raise AssertionError(f"mutation {number} of {folder / 'culprit'}: {error!r}") from error
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.perf_counter() - started)
    finally:
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    grown = (_peak_kilobytes() - before) / 1024
    assert grown < MEGABYTES
    assert refused > count // 10
    return (
        f"{count:,} mutations: {refused:,} refused, {good:,} read, 0 foreign exceptions, 0 hangs (slowest "
        f"{slowest * 1000:.0f} ms), memory +{grown:.0f} MB"
    )


def _peak_kilobytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


COUNTS = [100, pytest.param(10_000, marks=pytest.mark.slow)]


@pytest.fixture
def folder(tmp_path):
    """In memory where there is such a place: thousands of files are written."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield tmp_path
        return
    place = shared / f"pneumo-fuzz-{tmp_path.name}-{time.time_ns()}"
    place.mkdir()
    yield place
    for path in place.rglob("*"):
        path.unlink()
    place.rmdir()


def picture(height: int = 40, width: int = 36) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((3 * y + 5 * x + np.random.default_rng(0).integers(0, 40, (height, width))) % 256).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read_image(path: Path) -> None:
    scan = images.read(path)
    assert scan.pixels.dtype == np.uint8 and scan.pixels.shape == images.size(path)
    images.read_mask(path)


def read_scan(path: Path) -> None:
    scan = images.read(path)
    assert scan.pixels.dtype == np.uint8 and scan.pixels.shape == images.size(path)


@pytest.mark.fault("P1", "fuzz: PNG, half of it with right CRCs")
@pytest.mark.parametrize("count", COUNTS)
def test_png(folder, figure, count):
    mask = Image.fromarray(np.where(picture() > 128, 255, 0).astype(np.uint8))
    contents = [
        saved(mask, "PNG"),
        saved(mask.convert("RGB"), "PNG"),
        saved(mask.convert("P"), "PNG"),
        saved(mask.convert("1"), "PNG"),
        saved(mask.convert("LA"), "PNG"),
    ]
    figure("PNG: " + fuzz(folder, "case.png", contents, mutate_png, read_image, count))


@pytest.mark.fault("P1", "fuzz: JPEG, plain, progressive, in colour")
@pytest.mark.parametrize("count", COUNTS)
def test_jpeg(folder, figure, count):
    grey = Image.fromarray(picture())
    contents = [
        saved(grey, "JPEG", quality=70),
        saved(grey, "JPEG", progressive=True, comment=SECRET),
        saved(grey.convert("RGB"), "JPEG"),
    ]

    def change(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
        return mutate(content, others, rng, dense=400)

    figure("JPEG: " + fuzz(folder, "case.jpg", contents, change, read_scan, count))


def make_dicom(pixels: np.ndarray, syntax: str, frame: bytes | None = None, **elements) -> bytes:
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    header.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    header.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    header.PatientName = header.PatientID = header.InstitutionName = SECRET
    header.Rows, header.Columns = pixels.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 8 * pixels.itemsize
    header.HighBit, header.PixelRepresentation = header.BitsStored - 1, int(pixels.dtype.kind == "i")
    header.ViewPosition, header.BodyPartExamined, header.Modality, header.PixelSpacing = "PA", "CHEST", "CR", [0.1, 0.1]
    for keyword, value in elements.items():
        setattr(header, keyword, value)
    order = ">" if syntax == dicom.EXPLICIT_BIG else "<"
    header.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    header["PixelData"].VR = "OW" if pixels.itemsize == 2 else "OB"
    if frame is not None:
        header.PixelData = pydicom.encaps.encapsulate([frame])
        header["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.fault("D3", "fuzz: DICOM of five kinds; a patient's name is in no message")
@pytest.mark.parametrize("count", COUNTS)
def test_dicom(folder, figure, count):
    small, deep = picture(), picture().astype(np.uint16) * 16
    code, table = pydicom.Dataset(), pydicom.Dataset()
    code.CodeValue = code.CodeMeaning = SECRET
    table.LUTDescriptor, table.LUTData = [4096, 0, 8], np.arange(4096, dtype="<u2").tobytes()
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "OW"
    window = {"WindowCenter": [900, 5], "WindowWidth": [1500, 10], "RescaleSlope": 2, "RescaleIntercept": -9}
    contents = [
        make_dicom(small, dicom.EXPLICIT_LITTLE, PhotometricInterpretation="MONOCHROME1"),
        make_dicom(small, dicom.JPEG_BASELINE, saved(Image.fromarray(small), "JPEG")),
        make_dicom(deep, dicom.EXPLICIT_LITTLE, VOILUTSequence=[table], BitsStored=12, HighBit=11),
        make_dicom(deep.astype(np.int16), dicom.IMPLICIT_LITTLE, ConceptCodeSequence=[code], **window),
        make_dicom(deep, dicom.EXPLICIT_BIG, VOILUTFunction="SIGMOID", **window),
    ]

    def change(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
        return content[:132] + mutate(content[132:], others, rng, dense=600)

    figure("DICOM: " + fuzz(folder, "case.dcm", contents, change, read_scan, count))


@pytest.mark.fault("I2", "fuzz: annotations, sample submission and patients, a word or a line at a time")
@pytest.mark.parametrize("count", COUNTS)
def test_csv(folder, figure, count):
    rng = random.Random(1)
    codes = [rle.encode(np.random.default_rng(i).random((16, 16)) < 0.2) for i in range(4)]
    rows = [f"1.2.276.0.{i},{rng.choice([' -1', '-1', *codes])}" for i in range(12)]
    contents = [
        ("\n".join(["ImageId, EncodedPixels", *rows]) + "\n").encode(),
        ("\r\n".join(["\ufefffname,mask", *rows, *rows[:3]])).encode(),
        ("ImageId,EncodedPixels\n" + "".join(f"id_{i},-1\n" for i in (3, 1, 2, 3))).encode(),
        ("ImageId,patient_id\n" + "".join(f"id_{i},{i // 2:04}\n" for i in range(6))).encode(),
    ]

    def read(path: Path) -> None:
        for reader in (lambda path: cases.read_codes(path, 16), cases.read_sample, cases.read_patients):
            _, problems = reader(path)
            for problem in problems:
                assert problem.message.startswith(str(path)) and "\n" not in problem.message
                assert len(problem.message) < 1_000
        _, problems = cases.read_codes(path, 16)
        raise_fatal(problems, None)

    def read_sample_or_patients(path: Path) -> None:
        _, problems = cases.read_patients(path) if b"patient_id" in path.read_bytes() else cases.read_sample(path)
        raise_fatal(problems, None)

    figure("annotations: " + fuzz(folder, "table.csv", contents[:2], mutate_text, read, count // 2))
    figure("others: " + fuzz(folder, "other.csv", contents, mutate_text, read_sample_or_patients, count // 2))


@pytest.mark.fault("C2", "fuzz: recipes and rule files, a word or a line at a time")
@pytest.mark.parametrize("count", COUNTS)
def test_toml(repo, folder, figure, count):
    recipes = (repo / "configs.toml").read_bytes()
    rule = (
        b"[rule]\nthreshold = 0.5\nmin_area = 3500\ntop_threshold = 0.25\ntop_area = 100\n\n[measured]\ncases = 4\n\n"
        b"[trust.negative]\nconfidence = [0.1, 0.5]\ndice = [0.2, 0.9]\n\n[trust.positive]\nconfidence = [0.1]\n"
        b'dice = [0.3]\n\n[checkpoints]\n"fold0/best.pt" = "00ff"\n'
    )

    def read_recipe(path: Path) -> None:
        for name in ("demo-focal", "seed"):
            recipe = config.load(path, name)
            dumped = path.with_suffix(".again")
            dumped.write_text(config.dumps(recipe), encoding="utf-8")
            assert config.load(dumped, name) == recipe

    figure("recipes: " + fuzz(folder, "configs.toml", [recipes], mutate_text, read_recipe, count // 2))
    figure("rules: " + fuzz(folder, "rule.toml", [rule], mutate_text, tuning.read, count // 2))


class Small(nn.Module):
    """In place of the network, so that thousands are built in a minute."""

    def __init__(self, *_arguments, **_options) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 1, 3)
        self.norm = nn.BatchNorm2d(1)


@pytest.mark.fault("R8", "fuzz: checkpoints, most with right CRCs, read and built as for a prediction")
@pytest.mark.parametrize("count", COUNTS)
def test_checkpoint(repo, folder, figure, monkeypatch, count):
    monkeypatch.setattr(ensemble, "UNet", Small)
    recipe = config.load(repo / "configs.toml", "seed", [f"runs={folder}"])
    state = {
        "settings": config.stage_settings(recipe, 3),
        "digest": "d" * 64,
        "split": "s" * 64,
        "fold": 0,
        "stage": 3,
        "model": Small().state_dict(),
        "record": {"epoch": 1, "dice": 0.5},
    }
    content = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, **state}, content)
    legacy = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, **state}, legacy, _use_new_zipfile_serialization=False)

    def change(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
        return (mutate_zip if content.startswith(b"PK") else mutate)(content, others, rng)

    def read(path: Path) -> None:
        state = stages.load_weights(path, digest=None, split=None, fold=0)
        ensemble.build(state, path)

    contents = [content.getvalue(), content.getvalue(), legacy.getvalue()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure("checkpoints: " + fuzz(folder, "best.pt", contents, change, read, count))


@pytest.mark.fault("R22", "fuzz: an encoder's weights, PyTorch and safetensors")
@pytest.mark.parametrize("count", COUNTS)
def test_encoder_weights(folder, figure, count):
    state = Small().state_dict()
    content = io.BytesIO()
    torch.save({"state_dict": state}, content)
    figure("weights .pt: " + fuzz(folder, "w.pt", [content.getvalue()], mutate_zip, unet.read_weights, count // 2))

    def change(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
        return mutate(content, others, rng, dense=300)

    tensors = save_tensors(state)
    figure("safetensors: " + fuzz(folder, "w.safetensors", [tensors], change, unet.read_weights, count // 2))


@pytest.mark.fault("S8", "fuzz: out-of-fold files, most with right CRCs, read")
@pytest.mark.parametrize("count", COUNTS)
def test_out_of_fold(folder, figure, count):
    levels, rng = np.array([8, 128, 250]), np.random.default_rng(0)
    truth = np.array([[3, 40]])
    measured = [tables.measure(rng.integers(0, 256, (8, 8), dtype=np.uint8), truth, levels) for _ in range(4)]
    origin = {"format": oof.FORMAT, "checkpoints": {"best.pt": "d" * 64}, "mirror": True, "image_size": 64}
    origin |= {"annotation_size": 8, "data": "d" * 64, "split": "s" * 64, "levels": levels.tolist()}
    origin["settings"] = {"model.encoder": "test_resnet"}
    arrays = {name: getattr(tables.join(measured), name) for name in oof.ARRAYS}
    content = io.BytesIO()
    np.savez(content, image_ids=np.array(list("abcd")), origin=np.array(json.dumps(origin)), **arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = partial(oof._read, command="make oof")
        figure("tables: " + fuzz(folder, "oof-best.npz", [content.getvalue()], mutate_zip, reader, count))


@pytest.mark.fault("R24", "fuzz: the run folder's JSON: status, log lines, hashes of files")
@pytest.mark.parametrize("count", COUNTS)
def test_json(folder, figure, monkeypatch, count):
    status = b'{"state": "done", "epoch": 2, "epochs": 2, "images_seen": 18, "best_dice": 0.5}\n'
    lines = b'{"epoch": 1, "loss": 0.5, "val_loss": null}\n{"epoch": 2, "loss": 0.4, "val_loss": 1e-3}\n'
    monkeypatch.setattr(log, "warn", lambda _: None)  # thousands of them
    image = folder / "a.png"
    image.write_bytes(b"")
    hashes = {str(image): [0, image.stat().st_mtime_ns, "0" * 64], "b.png": [7, 7, "1" * 64]}

    def read_status(path: Path) -> None:
        if log.read_status(path.parent)["state"] == "missing":
            raise DataError(f"{path}: as if it were not there")

    def read_hashes(path: Path) -> None:
        known = pack._known(path)
        assert len(pack.file_hashes(path, [image])[str(image)]) == 64
        if len(known) < 2:
            raise DataError(f"{path}: thrown away, or an entry of it")

    for name, content, read in (
        ("status.json", status, read_status),
        ("log.jsonl", lines, log.read_jsonl),
        ("files.json", json.dumps(hashes, indent=0).encode(), read_hashes),
    ):
        figure(f"{name}: " + fuzz(folder, name, [content], mutate_text, read, count // 3))
