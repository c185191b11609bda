"""Images of odd sizes, folders with many bad files, and what must not come out of a file again."""

import csv
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import small_run
from PIL import Image, PngImagePlugin

from pneumo import config
from pneumo.data import cases, images, pack
from pneumo.data.cases import Case
from pneumo.errors import DataError
from pneumo.kernels.runs import mask_to_runs, runs_to_mask

pydicom = pytest.importorskip("pydicom")

MARKERS = ("ROENTGEN^ANNA", "19450327", "ST-HEDWIG", "4711-0815")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


@pytest.mark.fault(
    "P6", "3000 x 2500, 2500 x 3000, 33 x 900, square: padded, packed, and a mask brought back to the image"
)
def test_a_mask_fits_its_image_whatever_its_shape(tmp_path, figure):
    shapes = [(3000, 2500), (2500, 3000), (33, 900), (64, 64)]
    lowest = 1.0
    for number, (height, width) in enumerate(shapes):
        path = tmp_path / f"{number}.png"
        Image.fromarray(noise(height, width)).save(path)
        pixels = images.read(path).pixels
        assert pixels.shape == images.size(path) == (height, width)
        assert pack.pack_image(pixels, 256).shape == (256, 256)
        mask = np.zeros((height, width), dtype=bool)
        mask[height // 5 : height // 2, width // 3 : width // 2] = True
        square = Image.fromarray(images.to_square(mask)).resize((1024, 1024), Image.Resampling.NEAREST)
        grid = runs_to_mask(mask_to_runs(np.asarray(square)), 1024, 1024)  # as a network would decide it
        longer = max(height, width)
        back = np.asarray(Image.fromarray(grid).resize((longer, longer), Image.Resampling.NEAREST))
        back = images.from_square(back, height, width)
        assert back.shape == mask.shape
        lowest = min(lowest, 2 * (back & mask).sum() / (back.sum() + mask.sum()))
    assert lowest > 0.97
    for height, width in ((5, 5), (31, 400), (400, 31)):
        Image.fromarray(noise(height, width)).save(tmp_path / "small.png")
        with pytest.raises(DataError, match=rf"{width} x {height} pixels; at least 32 a side are needed"):
            images.read(tmp_path / "small.png")
    figure(
        f"{len(shapes)} of {len(shapes)} shapes, Dice of there and back at least {lowest:.4f}; 3 of 3 too small refused"
    )


def spoiled(root: Path, count: int) -> dict[str, str]:
    """A folder of `count` images, every hundredth of them bad in one of six ways; what is said of it, by id."""
    (root / "train").mkdir(parents=True)
    good = root / "train" / "good.png"
    Image.fromarray(noise(64, 64)).save(good)
    content = good.read_bytes()
    good.unlink()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    ways = [
        (content[: len(content) // 2], "image file is truncated (2,"),
        (bytes(flipped), "image file is damaged (CRC of the chunk at byte 33 differs). Copy it again."),
        (b"", "the file is empty. Copy it again."),
        (b"<!DOCTYPE html><html>Sign in</html>", "an HTML page, not an image. Did the download need a login?"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer, not the image. Run: git lfs pull"),
        (b"GIF89a" + bytes(99), "a GIF file, not a PNG, JPEG or DICOM. Save it as PNG"),
    ]
    bad = {}
    rows = ["ImageId,EncodedPixels"]
    for number in range(count):
        image_id = f"case-{number:05d}"
        rows.append(f"{image_id},-1")
        way = number // 100 % len(ways)
        if number % 100 == 50:
            bad[image_id] = ways[way][1]
        (root / "train" / f"{image_id}.png").write_bytes(ways[way][0] if image_id in bad else content)
    # a row and the image of it, both bad: all of it is said in one go
    image_id = f"case-{count:05d}"
    rows.append(f"{image_id},1 2 3")
    (root / "train" / f"{image_id}.png").write_bytes(b"")
    bad[image_id] = "the file is empty. Copy it again."
    (root / "train-rle.csv").write_text("\n".join(rows) + "\n")
    return bad


@pytest.mark.fault(
    "P1", "verify of a folder with one bad file in a hundred, of six kinds, and a bad row; on a terminal"
)
@pytest.mark.slow
def test_verify_lists_all_in_one_go(repo, tmp_path, figure):
    count = 12_000
    bad = spoiled(tmp_path / "data", count)
    settings = small_run.settings(tmp_path / "data", tmp_path / "runs")
    command = [sys.executable, "-m", "pneumo"]
    *_, own_seconds, own_peak = on_a_terminal([*command, "recipe"], cwd=tmp_path, repo=repo)
    code, printed, shown, seconds, peak = on_a_terminal(
        [*command, "verify", "--set", *settings], cwd=tmp_path, repo=repo
    )
    assert peak - own_peak < 200
    assert code == 3 and "Traceback" not in shown
    assert re.search(rf"verify: +\d+%.*/{count + 1} ", shown)
    named = [line for line in printed.splitlines() if line.startswith("ERROR")]
    report = tmp_path / "runs" / "seed" / "data_report.csv"
    with open(report, newline="") as file:
        listed = {row["image_id"]: row["message"] for row in csv.DictReader(file) if row["file"].endswith(".png")}
    assert listed.keys() == bad.keys()
    for image_id, message in bad.items():
        path = tmp_path / "data" / "train" / f"{image_id}.png"
        assert listed[image_id].startswith(f"{path}: {message}")
    over = [image_id for image_id, message in listed.items() if f"ERROR {message}" not in named]
    assert over == [f"case-{count:05d}"]  # the 21st of its kind
    assert f"ERROR 1 more like this one; all are in {report}" in named
    assert f"line {count + 2}, ImageId case-{count:05d}, EncodedPixels: 3 numbers" in printed
    assert len(named) == len(bad) + 1
    last = shown.strip().splitlines()[-1]
    assert f"{len(bad)} more problems are listed in {report}." in last
    figure(
        f"{count:,} files: {len(named)} of {len(bad) + 1} problems listed in {seconds - own_seconds:.0f} s and "
        f"{peak - own_peak:.0f} MB besides the program's own start"
    )


def on_a_terminal(command: list[str], *, cwd: Path, repo: Path) -> tuple[int, str, str, float, float]:
    """Run with stderr on a terminal: exit code, stdout, stderr, seconds and highest memory in MB."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    with open(cwd / "printed", "w+b") as out:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=out, stderr=theirs)
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 2**16):
                shown += part
        except OSError:
            pass  # the other end was closed
        os.close(ours)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        printed = out.read().decode()
    seconds = usage.ru_utime + usage.ru_stime
    return process.returncode, printed, shown.decode(), seconds, usage.ru_maxrss / 1024


@pytest.mark.fault("P1", "pack of a folder with bad files: the same words as verify's, all listed, the good ones kept")
def test_pack_says_what_verify_says(tmp_path, figure):
    bad = spoiled(tmp_path / "data", 600)
    found, _ = cases.load_train(tmp_path / "data", annotation_size=64)
    verified = {problem.image_id: problem.message for problem in cases.verify(found)[0]}
    report = tmp_path / "data_report.csv"
    with pytest.raises(DataError, match=rf"case-00050\.png: .* 5 more problems are listed in {report}\."):
        pack.open_pack(tmp_path / "pack", "train", found, 64, annotation_size=64, report=report)
    with open(report, newline="") as file:
        listed = {row["image_id"]: row["message"] for row in csv.DictReader(file)}
    assert listed == verified and len(listed) == 6 == len(bad) - 1
    (rows,) = (tmp_path / "pack").glob("*/rows.npy")
    assert (np.load(rows) != pack.UNDONE).sum() == 594
    found[50].path.unlink()
    with pytest.raises(DataError, match=r"case-00050\.png: no such file\.$"):
        pack.open_pack(tmp_path / "pack", "train", found, 64, annotation_size=64, report=report)
    figure("6 of 6 listed in the same words, 594 of 594 good ones kept")


@pytest.mark.fault("P1", "a pipe, a link to /dev/zero and a folder named as an image or a mask: pack, and each reader")
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, figure):
    small_run.write_data(tmp_path / "data", train=9)
    odd = [tmp_path / "data" / "train" / f"train-00{number}.png" for number in range(3)]
    for path in odd:
        path.unlink()
    os.mkfifo(odd[0])
    odd[1].symlink_to("/dev/zero")
    odd[2].mkdir()
    for path in odd:
        for reader in (images.read, images.read_mask, images.size, lambda path: images.opened(path).__enter__()):
            with pytest.raises(DataError, match=rf"^{path}: not a file$"):
                reader(path)
    odd[2].rmdir()
    small_run.write_data(tmp_path / "masks", train=9)
    (tmp_path / "masks" / "train-rle.csv").unlink()
    (tmp_path / "masks" / "mask").mkdir()
    for path in sorted((tmp_path / "masks" / "train").iterdir())[2:]:
        Image.new("L", (64, 64)).save(tmp_path / "masks" / "mask" / path.name)
    os.mkfifo(tmp_path / "masks" / "mask" / "train-000.png")
    (tmp_path / "masks" / "mask" / "train-001.png").symlink_to("/dev/zero")
    for data, named in (("data", odd[0]), ("masks", tmp_path / "masks" / "mask" / "train-000.png")):
        settings = small_run.settings(tmp_path / data, tmp_path / "runs")
        command = [sys.executable, "-m", "pneumo", "pack", "--set", *settings, "data.allow_missing=true"]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)  # it hung for ever
        assert ended.returncode == 3, ended.stderr
        listed = tmp_path / "runs" / "seed" / "train_report.csv"
        assert ended.stderr.endswith(f"{named}: not a file. 1 more problem is listed in {listed}.\n")
    figure("3 of 3 kinds refused by 4 of 4 readers; pack ended with 3 for images and masks")


@pytest.mark.fault("R24", "two files of one size and one time of change, as `cp -p` leaves them, change places")
def test_files_that_change_places_are_read_anew(tmp_path, figure):
    paths = [tmp_path / name for name in ("a.dcm", "b.dcm")]
    for path, content in zip(paths, (b"first", b"other"), strict=True):
        path.write_bytes(content)
        os.utime(path, (1_700_000_000, 1_700_000_000))

    def hashes() -> list[str]:
        found = pack.file_hashes(tmp_path / "files.json", paths)
        return [found[str(path)] for path in paths]

    first = hashes()
    os.rename(paths[0], tmp_path / "c")
    os.rename(paths[1], paths[0])
    os.rename(tmp_path / "c", paths[1])
    assert hashes() == first[::-1]
    old = {str(path): [5, 1_700_000_000 * 10**9, "0" * 64] for path in paths}  # as it was before inodes were noted
    (tmp_path / "files.json").write_text(json.dumps(old))
    assert hashes() == first[::-1]
    figure("2 of 2 seen")


def test_pack_warns_of_what_is_odd(tmp_path, capsys):
    for name in ("a", "b"):
        Image.fromarray(np.full((64, 64), 9, np.uint8)).save(tmp_path / f"{name}.png")
    found = [Case(name, tmp_path / f"{name}.png", np.zeros((0, 2), np.int64)) for name in ("a", "b")]
    pack.open_pack(tmp_path / "pack", "train", found, 64, annotation_size=64)
    warning = f"{tmp_path / 'a.png'}: a constant image: every pixel is 9 and 1 more; `make verify` lists all"
    assert warning in capsys.readouterr().err


def private_files(folder: Path) -> list[Path]:
    """A DICOM, a damaged one, a PNG and a JPEG that say whose they are."""
    name, born, place, number = MARKERS
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    header.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    header.PatientName, header.PatientID, header.PatientBirthDate = name, number, born
    header.InstitutionName, header.StudyDescription, header.BodyPartExamined = place, name, "KNEE"
    header.Rows, header.Columns, header.SamplesPerPixel = 64, 64, 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 8, 8, 7, 0
    header.PixelData = noise(64, 64).tobytes()
    header["PixelData"].VR = "OB"
    header.save_as(folder / "scan.dcm", enforce_file_format=True)
    content = (folder / "scan.dcm").read_bytes()
    (folder / "cut.dcm").write_bytes(content[:-99])
    (folder / "odd.dcm").write_bytes(content.replace(b"MONOCHROME2 ", f"{name[:12]}".encode()))
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", name)
    text.add_itxt("Comment", f"{born} {place} {number}")
    Image.fromarray(noise(64, 64, 1)).save(folder / "picture.png", pnginfo=text)
    exif = Image.Exif()
    exif[0x013B] = name  # artist
    Image.fromarray(noise(64, 64, 2)).save(folder / "photo.jpg", comment=place, exif=exif)
    return sorted(folder.iterdir())


@pytest.mark.slow
@pytest.mark.fault("D7", "predict on a file that is not of a chest: a warning, without the file's own words")
@pytest.mark.fault("D6", "verify, pack, folds and predict on files that name a patient: outputs and messages searched")
def test_no_patient_comes_out_again(repo, tmp_path, figure):
    data = tmp_path / "data"
    small_run.write_data(data)
    files = private_files(data / "test")
    (data / "sample_submission.csv").unlink()
    rows = "".join(f"train-{i:03d},{MARKERS[3]}-{i // 2}\n" for i in range(18))
    (data / "patients.csv").write_text("ImageId,patient_id\n" + rows)
    settings = [*small_run.settings(data, tmp_path / "runs"), "folds.count=2"]
    small_run.pretend_trained(config.load(repo / "configs.toml", "seed", settings))
    printed = ""
    commands = [
        (["-m", "pneumo", "verify"], 3),
        (["-m", "pneumo", "pack"], 3),
        (["-m", "pneumo", "folds", "--force"], 0),
        ([str(repo / "predict.py"), *map(str, files), "--out", str(tmp_path / "masks")], 3),
    ]
    for command, code in commands:
        done = subprocess.run(
            [sys.executable, *command, "--set", *settings],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(repo)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        printed += done.stdout + done.stderr
    assert "cut.dcm: truncated" in printed and "odd.dcm: " in printed and "not a chest" in printed
    outputs = [path for place in ("runs", "masks") for path in (tmp_path / place).rglob("*") if path.is_file()]
    assert {path.name for path in outputs} >= {"scan_mask.png", "picture_overlay.png", "predictions.jsonl", "folds.csv"}
    searched = printed.encode() + b"".join(path.read_bytes() for path in outputs)
    for marker in (*MARKERS, "ROENTGEN"):
        assert marker.encode() not in searched, marker
    for path in outputs:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.info.items() <= {("Software", "pneumo")}  # as given.find knows its own
    figure(f"{len(MARKERS)} markers, {len(outputs)} output files and {len(printed.splitlines())} lines: 0 found")
