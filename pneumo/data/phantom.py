"""Synthetic chest X-rays with pneumothorax, in the challenge's layout, for the demo and the tests.

Pictures are drawn, not derived from patients. A pneumothorax is what it is on film: a crescent between the chest wall
and a thin bright pleural line in which the lung's vessels are missing. Its grey is that of lung and of the air beside
the body, so no threshold finds it. Every picture has SYNTHETIC burnt in, and every id begins with it.

Imports images, rle, checkpoint, errors.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pneumo import checkpoint
from pneumo.data import images, rle
from pneumo.errors import UsageError

PREFIX = "SYNTHETIC-"
MARK_FILE = "SYNTHETIC.txt"
MARK = "This folder holds synthetic X-rays drawn by `python -m pneumo phantom`. They show no patient.\n"


@dataclass(frozen=True)
class Phantom:
    """One drawn X-ray.

    Attributes:
        image: (S, S) float32 in [0, 1]; bright is dense.
        mask: (S, S) bool, the pneumothorax.
    """

    image: np.ndarray
    mask: np.ndarray


def draw(rng: np.random.Generator, side: int, positive: bool) -> Phantom:
    """Draw one frontal X-ray.

    Args:
        rng: decides everything but what follows.
        side: of the square picture, pixels; at least 64.
        positive: whether there is a pneumothorax.
    """
    x, y = _positions(rng, side)
    shoulders = 0.11 + 0.37 / (1 + np.exp(-(y + rng.uniform(0.38, 0.41)) / 0.035))
    body = _soft(shoulders - np.abs(x) - 0.05 * np.clip(y, 0, 1), 0.03)
    texture = _vessels(rng, side)
    image = 0.10 + 0.62 * body * (0.92 + 0.06 * _noise(rng, side, 5))
    bones = _ribs(x, y, rng)

    wanted = rng.integers(2) if positive else -1  # which lung
    mask = np.zeros((side, side), dtype=bool)
    pleura = np.zeros((side, side), dtype=np.float32)
    air = rng.uniform(0.30, 0.40)
    for number, direction in enumerate((-1, 1)):
        lung = _Lung(rng, direction)
        inside = lung.depth(x, y)  # > 0 within
        lit = _soft(inside, 0.015)
        tissue = 0.04 + 0.28 * texture[number] * (0.75 + 0.25 * np.exp(-((np.abs(x) - 0.09) ** 2) / 0.02))
        if number == wanted:
            collapsed = lung.collapsed(rng, x, y)
            gone = (inside > 0) & (collapsed < 0)
            mask |= gone
            tissue = tissue * _soft(collapsed, 0.006) + 0.035 * (1 - _soft(collapsed, 0.006))
            pleura += 0.16 * np.exp(-((collapsed / 0.007) ** 2)) * (inside > 0)
        elif rng.random() < 0.08:  # a skin fold: a line with vessels on both sides
            collapsed = lung.collapsed(rng, x, y)
            pleura += rng.uniform(0.05, 0.12) * np.exp(-((collapsed / 0.012) ** 2)) * (inside > 0)
        level = air * rng.uniform(0.94, 1.06) - 0.10
        image = image * (1 - lit) + (level + tissue + 0.04 * _noise(rng, side, 4)) * lit
    image += pleura + (0.03 + 0.06 * (image < 0.5)) * bones * body
    image = _heart_and_spine(x, y, rng, image, mask)
    image += _devices(rng, side, drain=rng.random() < (0.4 if positive else 0.1))
    image = _expose(rng, image)
    return Phantom(_mark(image), mask)


def made_with(**settings: float) -> str:
    """The last line of a data set's `MARK_FILE`: the settings that `write` was given."""
    return " ".join(f"{key}={value}" for key, value in settings.items())


def write(
    root: Path, *, train: int, test: int, side: int, annotation_size: int, positive_fraction: float, seed: int
) -> None:
    """Write a data set: train/, test/, train-rle.csv, patients.csv, sample_submission.csv, test-truth.csv.

    Most images are 8-bit PNG; some are 16-bit PNG, some DICOM, of 8 or 12 bits, a few with inverted grey, in nested
    folders as the challenge has them. Image i depends on (seed, i) alone.

    Args:
        root: folder to make, or an empty one; `MARK_FILE` in it says what it holds.
        train, test: how many images.
        side: of the images, pixels.
        annotation_size: side of the grid of the codes, pixels.
        positive_fraction: share of images with pneumothorax, exact to one image in either part.

    Raises:
        UsageError: pydicom is not installed, or a user's own folder has the name that is used meanwhile.
    """
    for left, name in checkpoint.abandoned(root.parent.glob("*.tmp")):
        if name == root.name and (left / MARK_FILE).is_file():
            shutil.rmtree(left)
    final, root = root, checkpoint.temporary(root)  # what is cut off never looks complete
    try:
        root.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"{root} is in the way. Move it, or choose another folder: --set data.root=DIR") from None
    settings = made_with(
        train=train,
        test=test,
        side=side,
        annotation_size=annotation_size,
        positive_fraction=positive_fraction,
        seed=seed,
    )
    (root / MARK_FILE).write_text(f"{MARK}{settings}\n")
    tables: dict[str, list[str]] = {"train": ["ImageId,EncodedPixels"], "test": ["ImageId,EncodedPixels"]}
    sample, patients = ["ImageId,EncodedPixels"], ["ImageId,patient_id"]
    patient = 0
    for part, count in (("train", train), ("test", test)):
        for index in range(count):
            rng = np.random.default_rng(_key(seed, part, index))
            positive = int((index + 1) * positive_fraction) > int(index * positive_fraction)
            drawn = draw(rng, side, positive)
            image_id = f"{PREFIX}{hashlib.sha256(f'{seed} {part} {index}'.encode()).hexdigest()[:12]}"
            # the file type must not give the answer away: types are dealt anew to every ten images
            turns = np.random.default_rng([*_key(seed, part, index // 10), 10]).permutation(10)
            _write_image(root / part, image_id, drawn.image, index, int(turns[index % 10]))
            regions = (images.resize_mask(region, annotation_size) for region in _regions(drawn.mask, rng))
            codes = [rle.encode(region) for region in regions]
            found = [code for code in codes if code != rle.EMPTY] or [rle.EMPTY]  # a coarse grid may miss a small one
            tables[part] += [f"{image_id},{code}" for code in found]
            if part == "test":
                sample.append(f"{image_id},{rle.EMPTY}")
            else:
                patient += index == 0 or rng.random() < 0.8  # else one more image of the patient before
                patients.append(f"{image_id},P{patient:05d}")
    for name, lines in (
        ("train-rle.csv", tables["train"]),
        ("test-truth.csv", tables["test"]),
        ("sample_submission.csv", sample),
        ("patients.csv", patients),
    ):
        (root / name).write_text("\n".join(lines) + "\n")
    if final.exists():
        final.rmdir()
    os.replace(root, final)


class _Lung:
    """The outline of a lung and of what is left of it when it collapses; lengths are parts of the picture's side."""

    def __init__(self, rng: np.random.Generator, direction: int) -> None:
        self.direction = direction
        self.centre = (direction * rng.uniform(0.20, 0.215), rng.uniform(-0.05, -0.02))
        self.radii = (rng.uniform(0.155, 0.175), rng.uniform(0.32, 0.36))
        self.base = rng.uniform(0.19, 0.25)  # height of the diaphragm

    def depth(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """About how far a place lies within the lung; negative outside."""
        u, v = (x - self.centre[0]) / self.radii[0], (y - self.centre[1]) / self.radii[1]
        wall = (1 - (np.abs(u) ** 2.4 + np.abs(v) ** 2.4) ** (1 / 2.4)) * self.radii[0]
        dome = self.base - 0.5 * (x - self.centre[0] + 0.03 * self.direction) ** 2 / self.radii[0] - y
        return np.minimum(wall, dome)

    def collapsed(self, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """`depth` of the lung drawn together towards a point of its edge, opposite to the air."""
        kind = rng.choice(3, p=[0.6, 0.33, 0.07])  # lateral and apical, apical, basal
        medial = self.centre[0] - self.direction * self.radii[0]
        target = [
            (medial, rng.uniform(0.12, 0.22)),
            (self.centre[0] - 0.06 * self.direction, self.base),
            (medial, self.centre[1] - 0.9 * self.radii[1]),
        ][kind]
        share = 1 - np.clip(rng.lognormal(np.log(0.25), 0.35), 0.13, 0.5)
        bend = 0.012 * np.sin(rng.uniform(8, 16) * y + rng.uniform(0, 6)) * (1 - share) / 0.2
        return self.depth((x - target[0]) / share + target[0] + bend, (y - target[1]) / share + target[1])


def _positions(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel positions from the picture's centre, in sides, after the patient's own shift, turn and size."""
    along = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    x, y = np.meshgrid(along, along)
    angle, size = np.deg2rad(rng.normal(0, 2.5)), rng.uniform(0.92, 1.08)
    x, y = x - rng.normal(0, 0.012), y - rng.normal(0, 0.015)
    return (np.cos(angle) * x - np.sin(angle) * y) / size, (np.sin(angle) * x + np.cos(angle) * y) / size


def _noise(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Smooth noise with about `cells` bumps a side: (S, S) float32 of mean 0 and deviation about 0.6."""
    coarse = rng.normal(size=(cells + 1, cells + 1)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def _vessels(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The branching texture of two lungs: (S, S) float32 of about 0 to 1, coarse enough to be seen at 64 px."""

    def ridges(cells: int) -> np.ndarray:
        return np.clip(1 - np.abs(_noise(rng, side, cells)) * 2.2, 0, 1)

    def lung() -> np.ndarray:
        return 0.65 * ridges(18) + 0.55 * ridges(30) * (0.5 + 0.5 * ridges(9)) + 0.2 * np.abs(_noise(rng, side, 60))

    return lung(), lung()


def _ribs(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Arcs over both lungs, and the clavicles: (S, S) float32 of 0 to 1."""
    spread, phase, slope = rng.uniform(0.075, 0.09), rng.uniform(0, 1), rng.uniform(0.9, 1.4)
    across = np.abs(x)
    place = (y + slope * (across - 0.12) ** 2 * 2 - 0.25 * across) / spread + phase
    arc = np.clip(np.abs(place - np.round(place)) * -8 + 1.6, 0, 1) * (across > 0.06)
    clavicle = np.clip(1 - np.abs(y + 0.29 + 0.16 * (across - 0.18)) / 0.012, 0, 1) * (across < 0.33) * (across > 0.03)
    return (0.8 * arc + 0.9 * clavicle).astype(np.float32)


def _heart_and_spine(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, image: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Lay mediastinum, heart and vertebrae over the lungs; takes what they hide from the mask, in place."""
    width = rng.uniform(0.055, 0.07)
    middle = width * (1 + 0.2 * np.sin(9 * y)) - np.abs(x)
    left, low, broad = rng.uniform(0.05, 0.07), rng.uniform(0.13, 0.17), rng.uniform(0.13, 0.16)
    tilted = y - low - 0.35 * (x - left)
    heart = (1 - (((x - left) / broad) ** 2 + (tilted / 0.15) ** 2) ** 0.5) * 0.1
    solid = np.maximum(middle, heart)
    mask &= solid < 0
    cover = _soft(solid, 0.01)
    dense = 0.74 + 0.05 * np.cos(2 * np.pi * y / 0.055) * (np.abs(x) < 0.035)
    return image * (1 - cover) + dense * cover


def _devices(rng: np.random.Generator, side: int, drain: bool) -> np.ndarray:
    """Tubes, leads and electrodes laid on the chest: (S, S) float32 to be added."""
    scale = 2  # drawn at twice the size, for smooth edges
    canvas = Image.new("L", (side * scale, side * scale))
    pen = ImageDraw.Draw(canvas)

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [((px + 0.5) * side * scale, (py + 0.5) * side * scale) for px, py in points]

    def curve(start: tuple[float, float], middle: tuple[float, float], end: tuple[float, float], width: float) -> None:
        t = np.linspace(0, 1, 24)[:, None]
        points = (1 - t) ** 2 * start + 2 * t * (1 - t) * np.array(middle) + t**2 * end
        pen.line(at(*map(tuple, points.tolist())), fill=120, width=max(1, round(width * side * scale)))

    if drain:
        hand = rng.choice([-1, 1])
        curve((hand * 0.45, rng.uniform(0.1, 0.3)), (hand * 0.3, 0.1), (hand * 0.2, rng.uniform(-0.3, 0)), 0.011)
    if rng.random() < 0.35:  # a line to the heart
        curve((rng.uniform(-0.25, -0.15), -0.45), (0.0, -0.25), (0.03, rng.uniform(-0.05, 0.1)), 0.006)
    for _ in range(rng.integers(0, 4)):  # electrodes and their leads
        px, py = rng.uniform(-0.33, 0.33), rng.uniform(-0.35, 0.35)
        (cx, cy), radius = at((px, py))[0], 0.012 * side * scale
        pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=140)
        curve((px, py), (px + rng.uniform(-0.2, 0.2), py - 0.1), (rng.uniform(-0.4, 0.4), -0.5), 0.004)
    small = canvas.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255 * 0.6


def _expose(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Film and exposure: an uneven field, gain, gamma, grain."""
    side = len(image)
    image = image * (1 + 0.05 * _noise(rng, side, 2)) * rng.uniform(0.85, 1.15) + rng.uniform(-0.03, 0.05)
    image = np.clip(image, 0, 1) ** rng.uniform(0.8, 1.25)
    return np.clip(image + rng.normal(0, rng.uniform(0.008, 0.02), image.shape), 0, 1).astype(np.float32)


def _mark(image: np.ndarray) -> np.ndarray:
    """Burn SYNTHETIC into the lower left corner."""
    side = len(image)
    label = Image.new("L", (58, 11))
    ImageDraw.Draw(label).text((1, 0), "SYNTHETIC", fill=255)
    width = max(48, round(side * 0.25))
    label = label.resize((width, round(width * 11 / 58)), Image.Resampling.BILINEAR)
    stamp = np.asarray(label, dtype=np.float32) / 255
    corner = image[-stamp.shape[0] - 1 : -1, 1 : stamp.shape[1] + 1]
    corner += stamp * (0.9 - corner)
    return image


def _regions(mask: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The masks of an image's annotation rows: one, or two that overlap, as annotators leave them."""
    rows = np.flatnonzero(mask.any(axis=1))
    if len(rows) < 8 or rng.random() < 0.75:
        return [mask]
    cut = int(rows[len(rows) // 2])
    upper, lower = mask.copy(), mask.copy()
    upper[cut + 2 :] = False
    lower[:cut] = False
    return [upper, lower]


def _write_image(folder: Path, image_id: str, image: np.ndarray, index: int, turn: int) -> None:
    """Write one picture in the file type that is its turn, of 10."""
    if turn < 2:
        place = folder / f"study-{index:05d}" / "series-000001"
        place.mkdir(parents=True, exist_ok=True)
        _write_dicom(place / f"{image_id}.dcm", image, twelve_bit=turn == 1, inverted=turn == 1 and index % 20 < 10)
        return
    folder.mkdir(parents=True, exist_ok=True)
    deep = turn == 2
    levels = np.rint(image * 65535).astype(np.uint16) if deep else np.rint(image * 255).astype(np.uint8)
    Image.fromarray(levels).save(folder / f"{image_id}.png")


def _write_dicom(path: Path, image: np.ndarray, *, twelve_bit: bool, inverted: bool) -> None:
    try:
        import pydicom
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian
    except ImportError:
        raise UsageError("synthetic data hold DICOM files, which need pydicom: pip install pydicom") from None
    bits = 12 if twelve_bit else 8
    stored = np.rint((1 - image if inverted else image) * (2**bits - 1)).astype(np.uint16 if twelve_bit else np.uint8)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[path.stem])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    header.Modality, header.PatientName, header.PatientID = "CR", "SYNTHETIC", "SYNTHETIC"
    header.ViewPosition, header.BodyPartExamined = "PA", "CHEST"
    header.Rows, header.Columns = image.shape
    header.PixelSpacing = [350 / len(image)] * 2  # a chest of 35 cm
    header.SamplesPerPixel, header.PixelRepresentation = 1, 0
    header.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16 if twelve_bit else 8, bits, bits - 1
    if twelve_bit:
        header.WindowCenter, header.WindowWidth = 2048, 4096
    header.PixelData = stored.tobytes()
    header.save_as(path, enforce_file_format=True)


def _soft(depth: np.ndarray, width: float) -> np.ndarray:
    """A step at 0, `width` broad: (S, S) to float32 in [0, 1]."""
    return np.clip(depth / width + 0.5, 0, 1).astype(np.float32)


def _key(seed: int, part: str, index: int) -> list[int]:
    return [seed, int(part == "test"), index]
