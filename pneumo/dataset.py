"""A recipe's data made ready: cases checked, images packed, folds split; one call for all commands.

Imports data, config, checkpoint, dist, log.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pneumo import checkpoint, dist, log
from pneumo.config import Recipe
from pneumo.data import cases, folds, pack
from pneumo.data.cases import Case, Problem
from pneumo.data.pack import Pack
from pneumo.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """The training images of a recipe.

    Attributes:
        cases: N cases, by id.
        folds: (N,) fold of each.
        digest: hash of all images and annotations.
        split: hash of who is in which fold.
    """

    cases: tuple[Case, ...]
    folds: np.ndarray
    digest: str
    split: str

    @property
    def positive(self) -> np.ndarray:
        """(N,) bool."""
        return np.array([case.positive for case in self.cases])


def load_cases(recipe: Recipe, *, need_images: bool = True) -> list[Case]:
    """The training cases that the recipe's data folder holds; warnings are printed.

    Raises:
        DataError: something is wrong with the folder, the annotations or the patient map; all of it is listed in
            data_report.csv of the recipe's run folder.
    """
    data = recipe.data
    found, problems = cases.load_train(
        Path(data.root),
        train=data.train,
        annotations=data.annotations,
        patients=data.patients,
        annotation_size=data.annotation_size,
        allow_missing=data.allow_missing,
        need_images=need_images,
    )
    _judge(recipe, problems)
    return found


def load_test_cases(recipe: Recipe) -> tuple[list[Case], list[str]]:
    """The test cases, and the ids that the submission must have, in the sample's order; warnings are printed."""
    data = recipe.data
    found, sample_ids, problems = cases.load_test(
        Path(data.root), test=data.test, sample=data.sample, allow_missing=data.allow_missing
    )
    _judge(recipe, problems)
    return found, sample_ids


def open_pack(
    recipe: Recipe, name: str, found: list[Case] | tuple[Case, ...], side: int, *, check: bool = False
) -> Pack:
    """The packed images of these cases at this side, made first where they are not there."""
    return pack.open_pack(
        Path(recipe.runs) / "pack",
        name,
        found,
        side,
        annotation_size=recipe.data.annotation_size,
        progress=log.bar,
        check=check,
        report=recipe.folder / "data_report.csv" if dist.is_main() else None,
    )


def load(recipe: Recipe) -> Dataset:
    """The recipe's training set, split into folds as folds.csv says; splits it first if that is not there.

    Raises:
        DataError: a file is wrong, or folds.csv is of other images.
    """
    found = load_cases(recipe)
    packed = open_pack(recipe, "train", found, recipe.stage[1].image_size)
    ids = [case.image_id for case in found]
    path = recipe.folder / "folds.csv"
    with checkpoint.wait_lock(recipe.folder / "folds.lock"):  # processes that start together: one splits
        if not path.exists():
            split(recipe, found, packed)
    fold_of = folds.load(path, ids, recipe.folds.count)
    return Dataset(tuple(found), fold_of, packed.digest, folds.fingerprint(ids, fold_of))


def split(recipe: Recipe, found: list[Case], packed: Pack | None) -> None:
    """Write folds.csv and its audit, audit.json and audit.txt, and print the audit.

    Args:
        packed: of the same cases, to find near-duplicates in; None if there are no images.
    """
    settings = recipe.folds
    ids = [case.image_id for case in found]
    areas = [case.area for case in found]
    patients = [case.patient for case in found]
    groups: list[str | None] = patients if settings.group == "patient" else [None] * len(found)
    duplicates = None
    if packed is not None:
        duplicates = folds.find_duplicates(pack.thumbnails(packed), settings.duplicate_correlation)
        groups = folds.join_groups(groups, duplicates)
    fold_of = folds.split(ids, areas, groups, count=settings.count, area_bins=settings.area_bins, seed=recipe.seed)
    report = folds.audit(fold_of, areas, patients, duplicates)
    text = folds.audit_text(report)
    checkpoint.write_atomic(recipe.folder / "audit.json", json.dumps(report, indent=1).encode() + b"\n")
    checkpoint.write_atomic(recipe.folder / "audit.txt", text.encode() + b"\n")
    checkpoint.write_atomic(recipe.folder / "folds.csv", folds.dumps(ids, fold_of, groups).encode())
    log.say(f"{recipe.folder / 'folds.csv'}: {len(ids)} images in {settings.count} folds\n{text}")


def _judge(recipe: Recipe, problems: list[Problem]) -> None:
    report = recipe.folder / "data_report.csv"
    for problem in problems:
        if not problem.fatal:
            log.warn(problem.message + (f" All are listed in {report}." if len(problem.each) > cases.SHOWN else ""))
    if problems:
        cases.raise_fatal(problems, report if dist.is_main() else None)  # one process writes it; all stop


def check_fold(recipe: Recipe, dataset: Dataset, fold: int) -> None:
    """Refuse a fold that cannot be trained and validated.

    Raises:
        DataError: nothing to train on or to validate on.
    """
    inside = dataset.folds == fold
    if not inside.any() or not (dataset.positive & ~inside).any():
        raise DataError(
            f"fold {fold} has {int(inside.sum())} images and the others {int((dataset.positive & ~inside).sum())} "
            f"positive ones; both must be at least 1. Lower folds.count (now {recipe.folds.count}) or add data."
        )
