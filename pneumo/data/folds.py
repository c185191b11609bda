"""Stratified folds that keep a patient, and near-duplicate images, on one side; and the audit that shows it.

By image and never by annotation row; the order of the input does not matter. Imports cases, problems, rows, errors.
"""

import csv
import hashlib
import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pneumo.data.cases import Case
from pneumo.data.problems import Problem, counted, raise_fatal, some
from pneumo.data.rows import read_rows
from pneumo.errors import DataError, UsageError

BLOCK = 1024  # rows of a table of correlations that are computed at a time
MOST_PAIRS = 1_000_000  # of near-duplicates; of more, nothing sensible can be made


def split(
    image_ids: Sequence[str],
    areas: Sequence[int],
    groups: Sequence[str | None] | None = None,
    *,
    count: int = 5,
    area_bins: int = 4,
    seed: int = 0,
) -> np.ndarray:
    """Assign every image to a fold.

    Strata are the negative images and `area_bins` quantiles of mask area. Groups are dealt out one by one, those that
    hold most images first, each to the fold that it brings closest to an equal share of every stratum; single images
    come last and level what is left. Where nothing is grouped, any two folds differ by at most one image in each
    stratum.

    Args:
        image_ids: N different ids.
        areas: N mask areas, pixels; 0 for an image without pneumothorax.
        groups: N names; images of one name stay together. None is a group of its own.
        count: how many folds.
        area_bins: how many strata of positive images.
        seed: another seed deals otherwise.

    Returns:
        (N,) int64, folds 0 .. count - 1, in the order of `image_ids`.

    Raises:
        UsageError: fewer groups than folds.
        ValueError: ids repeat or lengths differ.
    """
    if len(set(image_ids)) != len(image_ids):
        raise ValueError("image_ids must be different")
    names = [None] * len(image_ids) if groups is None else groups
    if not len(image_ids) == len(areas) == len(names):
        raise ValueError(f"lengths differ: {len(image_ids)} ids, {len(areas)} areas, {len(names)} groups")
    members: dict[tuple[bool, str], list[int]] = {}
    for index, (image_id, name) in enumerate(zip(image_ids, names, strict=True)):
        members.setdefault((name is None, image_id if name is None else name), []).append(index)
    if len(members) < count:
        raise UsageError(f"{len(members)} independent images or groups cannot fill folds.count = {count} folds")

    strata = _strata(np.asarray(areas), area_bins, image_ids)
    contents = {key: np.bincount(strata[rows], minlength=area_bins + 1) for key, rows in members.items()}
    shuffled = sorted(members, key=lambda key: _hash(seed, *sorted(image_ids[row] for row in members[key])))
    # large groups first while there is room to level them, rare strata (large areas) before common ones
    order = sorted(shuffled, key=lambda key: (-len(members[key]), *(-contents[key][::-1])))

    target = np.bincount(strata, minlength=area_bins + 1) / count
    scale = 1 / np.maximum(target, 1e-9)
    filled = np.zeros((count, area_bins + 1))
    folds = np.empty(len(image_ids), dtype=np.int64)
    for key in order:
        content = contents[key]
        # growth of sum over strata of (filled - target)^2 / target, from adding this group to each fold ...
        growth = (content * (content + 2 * (filled - target)) * scale).sum(axis=1)
        # ... then of the squared count of all images and of positives, so that strata's leftovers even out
        sizes, positives = filled.sum(axis=1), filled[:, 1:].sum(axis=1)
        best = min(range(count), key=lambda fold: (round(growth[fold], 9), positives[fold], sizes[fold], fold))
        filled[best] += content
        folds[members[key]] = best
    return folds


def find_duplicates(image_ids: Sequence[str], thumbnails: np.ndarray, correlation: float) -> list[tuple[int, int]]:
    """Find pairs of images that are nearly the same picture.

    Args:
        image_ids: of the N images, for the error.
        thumbnails: (N, h, w) grey, small (16 x 16) versions of the images.
        correlation: pairs whose thumbnails' Pearson correlation exceeds it are duplicates; at 1.0, equal ones only.

    Returns:
        Pairs (i, j), i < j.

    Raises:
        DataError: there are more than `MOST_PAIRS`; names the image with most of them.
    """
    flat, limit = _standardized(thumbnails), _limit(correlation)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(flat), BLOCK):
        similar = np.triu(flat[start : start + BLOCK] @ flat[start:].T > limit, k=1)
        if len(pairs) + np.count_nonzero(similar) > MOST_PAIRS:
            copies = similar.sum(axis=1)
            most = int(copies.argmax())
            raise DataError(
                f"more than {MOST_PAIRS:,} pairs of images are nearly the same picture, as {image_ids[start + most]} "
                f"and {copies[most]:,} others: they correlate above {correlation:g}, as hardly do X-rays of different "
                f"people. Remove the copies, or raise folds.duplicate_correlation"
            )
        rows, columns = np.nonzero(similar)
        pairs += [(start + int(row), start + int(column)) for row, column in zip(rows, columns, strict=True)]
    return pairs


def seen_in_training(
    train: Sequence[Case], test: Sequence[Case], thumbnails: np.ndarray, correlation: float
) -> list[Problem]:
    """Note the test images that are nearly the same picture as a training image, which make a score too good.

    Args:
        thumbnails: of the training and then the test images, as of `find_duplicates`.
        correlation: as of `find_duplicates`.

    Returns:
        A note for each such test image, not fatal.
    """
    flat, limit = _standardized(thumbnails), _limit(correlation)
    notes: list[Problem] = []
    for start in range(len(train), len(flat) if train else 0, BLOCK):
        likeness = flat[start : start + BLOCK] @ flat[: len(train)].T
        count, nearest = (likeness > limit).sum(axis=1), likeness.argmax(axis=1)
        for row in np.flatnonzero(count).tolist():
            case = test[start - len(train) + row]
            more = f" and {count[row] - 1:,} more" if count[row] > 1 else ""
            text = (
                f"{case.path}: nearly the same picture as {train[nearest[row]].path}{more}, so that no score of it is "
                f"one of an unseen image. Take it out of one of the two"
            )
            notes.append(Problem(str(case.path), None, case.image_id, text, False))
    return notes


def _standardized(thumbnails: np.ndarray) -> np.ndarray:
    """(N, h * w) float32 whose products are Pearson correlations; a constant picture is 0 and resembles none."""
    flat = thumbnails.reshape(len(thumbnails), math.prod(thumbnails.shape[1:])).astype(np.float32)
    flat = flat - flat.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.divide(flat, norm, out=np.zeros_like(flat), where=norm > 0)


def _limit(correlation: float) -> float:
    return min(correlation, 1 - 1e-6)  # float32 products of equal rows are not exactly 1


def join_groups(groups: Sequence[str | None], pairs: Sequence[tuple[int, int]]) -> list[str | None]:
    """Join the groups of images that belong together.

    Args:
        groups: N names, None for an image on its own.
        pairs: of indices whose images must stay together.

    Returns:
        N names; joined groups have the name of one of them.
    """
    parent = list(range(len(groups)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[str, int] = {}
    same_name = [(first.setdefault(name, i), i) for i, name in enumerate(groups) if name is not None]
    for a, b in [*same_name, *pairs]:
        parent[max(root(a), root(b))] = min(root(a), root(b))
    sizes = Counter(map(root, range(len(groups))))
    return [
        None if name is None and sizes[root(index)] == 1 else groups[root(index)] or f"duplicate {root(index)}"
        for index, name in enumerate(groups)
    ]


def audit(
    folds: np.ndarray,
    areas: Sequence[int],
    patients: Sequence[str | None],
    duplicates: Sequence[tuple[int, int]] | None,
) -> dict[str, Any]:
    """Count what each fold holds and what crosses folds.

    Args:
        folds: (N,) fold of each image.
        areas: N mask areas.
        patients: N patients, None where unknown.
        duplicates: index pairs of near-duplicates; None if nobody looked.

    Returns:
        {"folds": [{"fold", "images", "positives", "positive_share", "patients"}], "patients_known",
        "patients_crossing", "duplicate_pairs", "duplicates_crossing", "duplicates_contradicting": pairs of which one
        has a mask}; the last three None if nobody looked.
    """
    positive = np.asarray(areas) > 0
    where: dict[str, set[int]] = {}
    for fold, patient in zip(folds.tolist(), patients, strict=True):
        if patient is not None:
            where.setdefault(patient, set()).add(fold)
    rows = []
    for fold in range(int(folds.max()) + 1):
        inside = folds == fold
        rows.append(
            {
                "fold": fold,
                "images": int(inside.sum()),
                "positives": int(positive[inside].sum()),
                "positive_share": float(positive[inside].mean()) if inside.any() else 0.0,
                "patients": sum(fold in places for places in where.values()),
            }
        )
    crossing = contradicting = None
    if duplicates is not None:
        crossing = sum(int(folds[a] != folds[b]) for a, b in duplicates)
        contradicting = sum(int(positive[a] != positive[b]) for a, b in duplicates)
    return {
        "folds": rows,
        "patients_known": len(where),
        "patients_crossing": sum(len(places) > 1 for places in where.values()),
        "duplicate_pairs": None if duplicates is None else len(duplicates),
        "duplicates_crossing": crossing,
        "duplicates_contradicting": contradicting,
    }


def audit_text(report: dict[str, Any]) -> str:
    """The audit as a small table."""
    lines = ["fold  images  positives  share    patients"]
    for row in report["folds"]:
        lines.append(
            f"{row['fold']:4d}  {row['images']:6d}  {row['positives']:9d}  "
            f"{row['positive_share']:6.2%}  {row['patients']:8d}"
        )
    lines.append(f"patients known: {report['patients_known']}, in more than one fold: {report['patients_crossing']}")
    if report["duplicate_pairs"] is None:
        lines.append("near-duplicate images: not looked for (no images)")
    else:
        lines.append(
            f"near-duplicate pairs: {report['duplicate_pairs']}, in more than one fold: "
            f"{report['duplicates_crossing']}, annotated empty and not: {report['duplicates_contradicting']}"
        )
    return "\n".join(lines)


def dumps(image_ids: Sequence[str], folds: np.ndarray, groups: Sequence[str | None]) -> str:
    """folds.csv's content: ImageId,fold,group; a group goes by the id of its first image, never by a patient's."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ImageId", "fold", "group"])
    first: dict[str, str] = {}
    for image_id, fold, group in zip(image_ids, folds.tolist(), groups, strict=True):
        writer.writerow([image_id, fold, "" if group is None else first.setdefault(group, image_id)])
    return text.getvalue()


def load(path: Path, image_ids: Sequence[str], count: int, *, redo: str) -> np.ndarray:
    """Read folds.csv for exactly these images.

    Args:
        redo: says how to split anew, for the error.

    Returns:
        (N,) int64 in the order of `image_ids`.

    Raises:
        DataError: not a fold file, of other images, or of fewer folds; names the first that differ and what to do.
    """
    folds: dict[str, int] = {}
    problems: list[Problem] = []
    for line, (image_id, fold) in read_rows(path, ("ImageId", "fold"), problems):
        if fold not in map(str, range(count)):
            raise DataError(
                f"{path} line {line}, ImageId {image_id}, fold: expected one from 0 to {count - 1}, got "
                f'"{fold[:40]}". {redo}'
            )
        if image_id in folds:
            raise DataError(f"{path} line {line}, ImageId {image_id}: it stands there twice. {redo}")
        folds[image_id] = int(fold)
    raise_fatal(problems, None)
    for one, many, odd in (
        ("image has no fold", "images have no fold", [i for i in image_ids if i not in folds]),
        ("fold is of an unknown image", "folds are of unknown images", sorted(folds.keys() - set(image_ids))),
    ):
        if odd:
            raise DataError(f"{path}: {counted(len(odd), one, many)}: {some(odd)}. {redo}")
    there = set(folds.values())
    if len(there) < count:
        empty = min(set(range(count)) - there)
        keep = f"Set folds.count={empty} to keep them. " if len(there) == empty > 1 else ""
        raise DataError(
            f"{path} has {counted(len(there), 'fold', 'folds')}, but folds.count is {count}: fold {empty} has no "
            f"image. {keep}{redo}"
        )
    return np.array([folds[image_id] for image_id in image_ids], dtype=np.int64)


def kept_together(path: Path, image_ids: Sequence[str]) -> list[tuple[int, int]] | None:
    """Pairs of images that folds.csv has in one group, as those of a patient and near-duplicates; None without groups.

    Args:
        image_ids: N ids; a pair is two places among them.
    """
    place = {image_id: index for index, image_id in enumerate(image_ids)}
    first: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    problems: list[Problem] = []
    for _, (image_id, group) in read_rows(path, ("ImageId", "group"), problems):
        if group and image_id in place:
            pairs.append((first.setdefault(group, place[image_id]), place[image_id]))
    return None if problems else pairs  # `load` has read the file, so what is wrong is that the column is not there


def check_patients(
    path: Path, image_ids: Sequence[str], folds: np.ndarray, patients: Sequence[str | None], *, redo: str
) -> None:
    """Refuse folds that part the images of a patient.

    Args:
        path, redo: of folds.csv, and how to split anew, for the error.
        image_ids, folds, patients: of N images; None where the patient is not known.

    Raises:
        DataError: gives two such images, never the patient.
    """
    first: dict[str, int] = {}
    parted = []
    for index, patient in enumerate(patients):
        if patient is not None and folds[other := first.setdefault(patient, index)] != folds[index]:
            parted.append((image_ids[other], image_ids[index]))
    if parted:
        raise DataError(
            f"{path}: {counted(len(parted), 'image is', 'images are')} in another fold than one of the same patient, "
            f"as {' and '.join(parted[0])}. {redo} Or, if that is meant, as to finish a run that has begun: --set "
            f"folds.group=image"
        )


def fingerprint(image_ids: Sequence[str], folds: np.ndarray) -> str:
    """A hash of who is in which fold, 64 hex digits, whatever the order."""
    lines = sorted(f"{image_id} {fold}" for image_id, fold in zip(image_ids, folds.tolist(), strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _strata(areas: np.ndarray, bins: int, image_ids: Sequence[str]) -> np.ndarray:
    """0 for empty masks, 1 .. bins by rank of area, so that strata of positives are of equal size."""
    strata = np.zeros(len(areas), dtype=np.int64)
    positive = sorted(np.flatnonzero(areas > 0).tolist(), key=lambda i: (areas[i], image_ids[i]))
    for rank, index in enumerate(positive):
        strata[index] = 1 + rank * bins // len(positive)
    return strata


def _hash(seed: int, *words: str) -> bytes:
    return hashlib.sha256("\0".join([str(seed), *words]).encode()).digest()
