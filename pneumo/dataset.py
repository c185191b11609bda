"""A recipe's data made ready: cases checked, images packed, folds split; one call for all commands.

Imports data, config, checkpoint, dist, log, errors.
"""

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pneumo import checkpoint, dist, log
from pneumo.config import Recipe
from pneumo.data import cases, folds, pack
from pneumo.data.cases import Case
from pneumo.data.pack import Pack
from pneumo.data.problems import SHOWN, Problem, counted, raise_fatal, some
from pneumo.errors import DataError, NoSpaceError, WriteError

PAIRS = 1000  # of near-duplicates that the audit lists
OUTSIZED = 2  # folds' shares of all images that one patient may have without a word


@dataclass(frozen=True)
class Dataset:
    """The training images of a recipe.

    Attributes:
        cases: N cases, by id.
        folds: (N,) fold of each.
        groups: N names of what belongs together: images of a patient, and near-duplicates, also where folds.csv is the
            user's own; None for an image on its own.
        digest: hash of all images and annotations.
        hashes: (N,) int64, of each image's file, as `Pack.hashes`.
        split: hash of who is in which fold.
    """

    cases: tuple[Case, ...]
    folds: np.ndarray
    groups: tuple[str | None, ...]
    digest: str
    hashes: np.ndarray
    split: str

    @property
    def positive(self) -> np.ndarray:
        """(N,) bool."""
        return np.array([case.positive for case in self.cases])


def find_cases(recipe: Recipe, *, need_images: bool = True) -> tuple[list[Case], list[Problem]]:
    """The training cases that the recipe's data folder holds, and all that is wrong with them."""
    data = recipe.data
    return cases.load_train(
        Path(data.root),
        train=data.train,
        annotations=data.annotations,
        patients=data.patients,
        annotation_size=data.annotation_size,
        allow_missing=data.allow_missing,
        unmasked=data.unmasked,
        need_images=need_images,
    )


def load_cases(recipe: Recipe, *, need_images: bool = True) -> list[Case]:
    """The training cases that the recipe's data folder holds; warnings are printed.

    Raises:
        DataError: something is wrong with the folder, the annotations or the patient map; all of it is listed in
            train_report.csv of the recipe's run folder.
    """
    found, problems = find_cases(recipe, need_images=need_images)
    _judge(problems, _report(recipe, "train"))
    if warning := cases.one_sided(found):
        log.warn(warning)
    return found


def load_test_cases(recipe: Recipe) -> tuple[list[Case], list[str]]:
    """The test cases, and the ids that the submission must have, in the sample's order; warnings are printed."""
    data = recipe.data
    found, sample_ids, problems = cases.load_test(
        Path(data.root), test=data.test, sample=data.sample, allow_missing=data.allow_missing
    )
    _judge(problems, _report(recipe, "test"))
    return found, sample_ids


def open_pack(recipe: Recipe, name: str, found: Sequence[Case], side: int, *, check: bool = False) -> Pack:
    """The packed images of these cases at this side, made first where they are not there."""
    return pack.open_pack(
        Path(recipe.runs) / "pack",
        name,
        found,
        side,
        annotation_size=recipe.data.annotation_size,
        check=check,
        report=_report(recipe, name) if dist.is_main() else None,
    )


def open_train(recipe: Recipe, data: Dataset, side: int) -> Pack:
    """The packed images of a data set at this side.

    Raises:
        DataError: they are other images than when the data set was loaded.
    """
    packed = open_pack(recipe, "train", data.cases, side)
    if packed.digest != data.digest:
        folder = Path(recipe.data.root) / recipe.data.train
        raise DataError(f"{folder}: images have changed since this command read them. Run the same command again")
    return packed


def load(recipe: Recipe) -> Dataset:
    """The recipe's training set, split into folds as folds.csv says; splits it first if that is not there.

    Raises:
        DataError: a file is wrong, or folds.csv is of other images or parts those of a patient.
    """
    found = load_cases(recipe)
    packed = open_pack(recipe, "train", found, recipe.stage[1].image_size)
    ids = [case.image_id for case in found]
    path = recipe.folder / "folds.csv"
    with checkpoint.wait_lock(recipe.folder / "folds.lock", log.say):  # processes that start together: one splits
        if not path.exists():
            split(recipe, found, packed)
    fold_of = read_folds(recipe, found)
    fingerprint = folds.fingerprint(ids, fold_of)
    together = folds.kept_together(path, ids)
    if together is None or _made(path, fingerprint).get("digest") != packed.digest:  # split otherwise, or of others
        duplicates = _duplicates(recipe, packed)
        together = [*(together or ()), *duplicates]
        if parted := [f"{ids[a]} and {ids[b]}" for a, b in duplicates if fold_of[a] != fold_of[b]]:
            log.warn(
                f"{path}: {counted(len(parted), 'pair', 'pairs')} of near-duplicate images are in different folds, so "
                f"that one is trained on and the other validated with: {some(parted)}. {_redo(recipe)}"
            )
    groups = folds.join_groups([case.patient for case in found], together)
    return Dataset(tuple(found), fold_of, tuple(groups), packed.digest, packed.hashes, fingerprint)


def _redo(recipe: Recipe) -> str:
    return (
        f"To split anew: `{recipe.program('folds')} --force`; earlier runs cannot go on then. To keep those, choose "
        f"another folder: --set runs=DIR."
    )


def read_folds(recipe: Recipe, found: Sequence[Case]) -> np.ndarray:
    """(N,) fold of each case, as folds.csv says.

    Raises:
        DataError: it is damaged, of other images, or parts those of a patient where folds.group is "patient".
    """
    path, ids = recipe.folder / "folds.csv", [case.image_id for case in found]
    redo = _redo(recipe)
    fold_of = folds.load(path, ids, recipe.folds.count, redo=redo)
    if recipe.folds.group == "patient":
        folds.check_patients(path, ids, fold_of, [case.patient for case in found], redo=redo)
    settings = _made(path, folds.fingerprint(ids, fold_of)).get("settings", {})
    if changed := [
        f"{key}: {settings[key]} -> {value}" for key, value in _settings(recipe) if settings.get(key, value) != value
    ]:
        log.warn(f"{path} is used as it is, but was split with other settings ({'; '.join(changed)}). {redo}")
    return fold_of


def _settings(recipe: Recipe) -> list[tuple[str, Any]]:
    """What a split depends on, besides the data."""
    return [("seed", recipe.seed), *((f"folds.{key}", value) for key, value in asdict(recipe.folds).items())]


def _made(path: Path, split: str) -> dict[str, Any]:
    """How this folds.csv was made: "settings", and "digest" of the images; nothing where it is the user's own.

    Args:
        split: hash of who is in which fold.
    """
    try:
        made = log.read_json(path.with_suffix(".json"))
    except (FileNotFoundError, DataError):
        return {}
    return made if made.get("split") == split and isinstance(made.get("settings"), dict) else {}


def split(recipe: Recipe, found: Sequence[Case], packed: Pack | None) -> None:
    """Write folds.csv, the settings that made it as folds.json, and its audit, and print the audit.

    Args:
        packed: of the same cases, to find near-duplicates in; None if there are no images.
    """
    settings = recipe.folds
    ids, areas = [case.image_id for case in found], [case.area for case in found]
    groups: list[str | None] = [case.patient if settings.group == "patient" else None for case in found]
    known = Counter(group for group in groups if group is not None)
    if known and (most := known.most_common(1)[0])[1] * settings.count > OUTSIZED * len(ids):
        log.warn(
            f"{most[1]:,} of {len(ids):,} images are of one patient, {most[0]}, and stay in one fold, so folds differ "
            f"much in size. Is that a placeholder? Then give these images no patient, or set folds.group=image"
        )
    duplicates = None if packed is None else _duplicates(recipe, packed)
    groups = groups if duplicates is None else folds.join_groups(groups, duplicates)
    fold_of = folds.split(ids, areas, groups, count=settings.count, area_bins=settings.area_bins, seed=recipe.seed)
    checkpoint.write_atomic(recipe.folder / "folds.csv", folds.dumps(ids, fold_of, groups).encode())
    made = {
        "split": folds.fingerprint(ids, fold_of),
        "settings": dict(_settings(recipe)),
        "digest": None if packed is None else packed.digest,
    }
    log.write_json(recipe.folder / "folds.json", made)
    text = _write_audit(recipe, found, fold_of, duplicates)
    log.say(f"{recipe.folder / 'folds.csv'}: {len(ids)} images in {settings.count} folds", *text.splitlines())


def audit(recipe: Recipe, found: Sequence[Case], fold_of: np.ndarray, packed: Pack | None) -> str:
    """Audit the folds anew, of the data as they are now: patients may have become known since the split.

    Args:
        packed: as of `split`.

    Returns:
        The audit in words; writes it as audit.txt, its numbers as audit.json.
    """
    return _write_audit(recipe, found, fold_of, None if packed is None else _duplicates(recipe, packed))


def _write_audit(
    recipe: Recipe, found: Sequence[Case], fold_of: np.ndarray, duplicates: list[tuple[int, int]] | None
) -> str:
    areas, patients = [case.area for case in found], [case.patient for case in found]
    report = folds.audit(fold_of, areas, patients, duplicates)
    text = folds.audit_text(report)
    if duplicates is not None:
        report["duplicates"] = [[found[a].image_id, found[b].image_id] for a, b in duplicates[:PAIRS]]
        if odd := [f"{a} and {b}" for a, b in _contradicting(found, duplicates)]:
            log.warn(
                f"of {counted(len(odd), 'pair', 'pairs')} of near-duplicate images one is annotated with a "
                f"pneumothorax, the other without: {some(odd)}. {recipe.folder / 'audit.json'} has the pairs"
            )
    log.write_json(recipe.folder / "audit.json", report)
    checkpoint.write_atomic(recipe.folder / "audit.txt", text.encode() + b"\n")
    return text


def _contradicting(found: Sequence[Case], pairs: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
    """The ids of pairs of which one image alone is positive."""
    return [(found[a].image_id, found[b].image_id) for a, b in pairs if found[a].positive != found[b].positive]


def _duplicates(recipe: Recipe, packed: Pack) -> list[tuple[int, int]]:
    return folds.find_duplicates(packed.image_ids, pack.thumbnails(packed), recipe.folds.duplicate_correlation)


def _report(recipe: Recipe, part: str) -> Path:
    """Where problems of "train" or "test" are listed; verify lists those of both."""
    return recipe.folder / f"{part}_report.csv"


def _judge(problems: list[Problem], report: Path) -> None:
    """Print notes, stop at errors, and list all in the report; where there are none, there is no report."""
    for problem in problems:
        if not problem.fatal:
            more = len(problem.each) > SHOWN
            log.warn(f"{problem.message.rstrip('.')}. All are listed in {report}." if more else problem.message)
    if problems:
        try:
            raise_fatal(problems, report if dist.is_main() else None)  # one process writes it; all stop
        except NoSpaceError:
            raise
        except WriteError:  # a folder that is only read
            raise_fatal(problems, None)
    elif dist.is_main():
        with contextlib.suppress(OSError):  # likewise
            report.unlink(missing_ok=True)  # of problems that have been mended


def check_fold(recipe: Recipe, dataset: Dataset, fold: int) -> None:
    """Refuse a fold that cannot be trained and validated.

    Raises:
        DataError: nothing to train on or to validate on.
    """
    inside = dataset.folds == fold
    if not dataset.positive.any():
        raise DataError(f"fold {fold}: not one of the {len(inside):,} training images has a pneumothorax to learn from")
    if not inside.any() or not (dataset.positive & ~inside).any():
        groups = {dataset.groups[row] or str(row) for row in np.flatnonzero(dataset.positive)}
        fewer = f"Lower folds.count (now {recipe.folds.count}) or add data."
        alone = "All positive images are of one patient, or copies of one picture: add others."
        raise DataError(
            f"fold {fold} has {int(inside.sum())} images and the others {int((dataset.positive & ~inside).sum())} "
            f"positive ones; both must be at least 1. {fewer if len(groups) > 1 else alone}"
        )
