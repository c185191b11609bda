"""A folder of images and an annotation file to a checked list of cases.

Nothing is silently dropped: what is wrong or left out becomes a `Problem` that names file, line and id, and
all of them are collected before anything stops. Imports problems, rows, rle, images, kernels, log, errors.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from pneumo import log
from pneumo.data import images, rle
from pneumo.data.problems import Problem, counted, some
from pneumo.data.rows import ID, ID_RULE, read_rows
from pneumo.errors import PneumoError
from pneumo.kernels.runs import area, intersection_size, join, mask_to_runs, union

ANNOTATION_NAMES = ("train-rle", "train_rle", "stage_2_train", "stage_1_train", "train")  # .csv or .csv.gz
SAMPLE_NAMES = (
    "sample_submission",
    "sample-submission",
    "stage_2_sample_submission",
    "stage_1_sample_submission",
)
PATIENT_NAMES = ("patients",)
MASK_FOLDERS = ("mask", "masks")
LOOKED_AT = 20  # masks, to see on which grid they hang together
ENOUGH = 5  # of them
CLEARLY = 0.01  # more of each column is in the next one; on 2,621 masks of the challenge 0.002 at most, on 5 of them
THUMBNAIL = 16  # pixels; enough to know a picture again

_JUNK = {"thumbs.db", "desktop.ini", "dicomdir"}
_JUNK_FOLDERS = {"__MACOSX"}


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One X-ray.

    Attributes:
        image_id: the file's name without suffix.
        path: None if images were not asked for.
        runs: (R, 2) int64 on the annotation grid, the union of all annotations of the image.
        patient: None if not known.
    """

    image_id: str
    path: Path | None
    runs: np.ndarray
    patient: str | None = None

    @property
    def positive(self) -> bool:
        return len(self.runs) > 0

    @property
    def area(self) -> int:
        """Pixels of the annotation grid."""
        return area(self.runs)


def load_train(
    root: Path,
    *,
    train: str = "train",
    annotations: str = "",
    patients: str = "",
    annotation_size: int = 1024,
    allow_missing: bool = False,
    unmasked: str = "leave",
    need_images: bool = True,
) -> tuple[list[Case], list[Problem]]:
    """Join images, annotations and patients into cases.

    Args:
        root: all other names are relative to it.
        train: folder of images.
        annotations: CSV file of codes, or folder of masks; "": under one of the usual names, CSV first.
        patients: CSV file; "": patients.csv, if there is one.
        annotation_size: side of the grid that codes live on, and that masks are brought to, pixels.
        allow_missing: drop rows without an image with a warning.
        unmasked: "leave" images out that have no annotation, or take theirs for "empty".
        need_images: False: go by the annotations alone; paths are None.

    Returns:
        Cases by id, and all problems. The cases are of use only if no problem is fatal.
    """
    root, problems, files = Path(root), [], {}
    if not root.is_dir():
        return [], [Problem.at(root, "no such folder. Set data.root.")]
    if need_images:
        files = _find_folder(root, train, "data.train", problems)
    source = _find(root, annotations, ANNOTATION_NAMES, MASK_FOLDERS, "annotations", problems)
    if source is None:
        if not problems:
            tables = some(path.name for path in sorted(root.glob("*.csv*")))
            problems.append(
                Problem.at(
                    root,
                    f"no annotations: neither {', '.join(ANNOTATION_NAMES)} (.csv, .csv.gz) nor a folder "
                    f"{' or '.join(MASK_FOLDERS)}. CSV files there: {tables or 'none'}. Set data.annotations.",
                )
            )
        return [], problems
    if source.is_dir():
        runs_of, lines = _read_masks(source, files if need_images else None, annotation_size, problems)
    else:
        runs_of, lines = _read_codes(source, annotation_size, problems)
    bare = [image_id for image_id in files if image_id not in lines] if unmasked == "empty" and lines else []
    if bare:
        text = f"{len(bare):,} of {len(files):,} images are not in {source}; their masks are empty (data.unmasked)"
        problems.append(Problem.of_ids(root / train, text, bare, f"not in {source}, so empty", fatal=False))
    patient_of = {}
    table = _find(root, patients, PATIENT_NAMES, (), "patients", problems)
    if table is not None:
        patient_of, more = read_patients(table)
        problems += more
    ids = sorted(runs_of)
    if need_images:
        negative = "an all-black picture" if source.is_dir() else "a row with -1"
        hint = f"; a negative needs {negative} there, or --set data.unmasked=empty"
        with_bare = lines | dict.fromkeys(bare)
        ids = _match(source, list(runs_of), with_bare, root / train, files, allow_missing, problems, hint)
        if not source.is_dir():
            _check_square(source, ids, lines, runs_of, files, problems)
        runs_of |= dict.fromkeys(bare, np.zeros((0, 2), dtype=np.int64))
        ids = sorted([*ids, *bare])
    large = [image_id for image_id in ids if 2 * area(runs_of[image_id]) > annotation_size**2]
    if large:
        verb = "covers" if len(large) == 1 else "cover"
        text = f"{len(large):,} of {len(ids):,} masks {verb} more than half of the image (inverted?)"
        problems.append(Problem.of_ids(source, text, large, "covers more than half of the image", fatal=False))
    if table is not None:
        unknown = [image_id for image_id in ids if image_id not in patient_of]
        if patient_of and ids and len(unknown) == len(ids):
            text = (
                f"none of its {counted(len(patient_of), 'id', 'ids')} is that of an image: it has {min(patient_of)}, "
                f"the images have {ids[0]}. An ImageId is a file's name without suffix; correct or remove the table."
            )
            problems.append(Problem.at(table, text))
        elif unknown and (patient_of or not more):  # else the table could not be read
            lack = "has no patient there, it is" if len(unknown) == 1 else "have no patient there, each is"
            text = f"{len(unknown):,} of {len(ids):,} images {lack} taken for a patient"
            if 2 * len(unknown) > len(ids):
                text = f"fewer than half of the images have a patient, do the ids fit? {text}"
            problems.append(Problem.of_ids(table, text, unknown, "no patient_id", fatal=False))
    if not ids and not any(problem.fatal for problem in problems):
        problems.append(Problem.at(source, "not a single case"))
    cases = [Case(image_id, files.get(image_id), runs_of[image_id], patient_of.get(image_id)) for image_id in ids]
    return cases, problems


def load_test(
    root: Path, *, test: str = "test", sample: str = "", allow_missing: bool = False
) -> tuple[list[Case], list[str], list[Problem]]:
    """Join test images and the sample submission.

    Args:
        root: all other names are relative to it.
        test: folder of images.
        sample: CSV file; "": under one of the usual names, if there is one.
        allow_missing: leave out ids without an image with a warning; they stay in the list of ids.

    Returns:
        Cases by id, without runs; the ids that a submission must have, in the sample's order, or those of all images,
        sorted; and all problems.
    """
    root, problems = Path(root), []
    if not root.is_dir():
        return [], [], [Problem.at(root, "no such folder. Set data.root.")]
    files = _find_folder(root, test, "data.test", problems)
    source = find_sample(root, sample, problems)
    ids = sorted(files)
    if source is not None:
        ids, more = read_sample(source)
        problems += more
        there = set(_match(source, ids, dict.fromkeys(ids), root / test, files, allow_missing, problems))
        if not there and not any(problem.fatal for problem in problems):
            problems.append(Problem.at(source, f"not a single test image: none of its ids has one in {root / test}"))
    else:
        there = set(ids)
    nothing = np.zeros((0, 2), dtype=np.int64)
    return [Case(image_id, files[image_id], nothing) for image_id in sorted(there)], ids, problems


def find_images(folder: Path) -> tuple[dict[str, Path], list[Problem]]:
    """Find all images in a folder and the folders in it, by id.

    An id is a file's name without .png, .jpg, .jpeg, .dcm or .dicom; DICOM files are found without a suffix
    too. Hidden files and what operating systems leave behind are passed over.

    Returns:
        Paths by id, in order of the ids; problems: two files of one id, names that cannot be ids, other
        files.
    """
    found: dict[str, Path] = {}
    paths, others, problems = list_images(folder)
    for path in paths:
        image_id = name_of(path)
        if not ID.fullmatch(image_id):
            problems.append(Problem.at(path, f"{ID_RULE} Rename it."))
        elif image_id in found:
            text = f"the image of this id is there twice; the other is {found[image_id]}. Rename one, or remove a copy."
            problems.append(Problem.at(path, text, image_id=image_id))
        else:
            found[image_id] = path
    if others:
        no_image = "no PNG, JPEG or DICOM and"
        text = counted(len(others), f"file is {no_image} was left out", f"files are {no_image} were left out")
        each = tuple(Problem.at(path, "not an image", fatal=False) for path in others)
        message = f"{folder}: {text}: {some(path.name for path in others)}"
        problems.append(Problem(str(folder), None, "", message, False, each))
    return dict(sorted(found.items())), problems


def list_images(folder: Path) -> tuple[list[Path], list[Path], list[Problem]]:
    """List the images in a folder and the folders in it, whatever their names.

    Returns:
        Images, and files that are none, folder by folder, each sorted; problems: folders that cannot be read.
    """
    found: list[Path] = []
    others: list[Path] = []
    problems: list[Problem] = []
    for path in _files(Path(folder), problems):
        (found if images.is_image(path) else others).append(path)
    return found, others, problems


def name_of(path: Path) -> str:
    """An image file's name without its suffix; a DICOM often has none, but dots in its name."""
    return path.stem if path.suffix.lower() in images.SUFFIXES else path.name


def read_codes(
    path: Path, annotation_size: int, *, also_empty: Collection[str] = ()
) -> tuple[dict[str, np.ndarray], list[Problem]]:
    """Read annotations: a CSV, perhaps gzipped, with columns ImageId and EncodedPixels (or fname and mask).

    Args:
        also_empty: what else than -1 codes an empty mask.

    Returns:
        Runs by id, in order of first appearance, the union of its rows, without the ids that have a fatal
        problem; and all problems.
    """
    problems: list[Problem] = []
    runs_of, _ = _read_codes(path, annotation_size, problems, also_empty)
    return runs_of, problems


def read_annotations(
    path: Path, annotation_size: int, *, also_empty: Collection[str] = ()
) -> tuple[dict[str, np.ndarray], list[Problem]]:
    """Read annotations as `read_codes` does, or a folder of mask pictures, each brought to the grid as in training."""
    if not path.is_dir():
        return read_codes(path, annotation_size, also_empty=also_empty)
    problems: list[Problem] = []
    runs_of, _ = _read_masks(path, None, annotation_size, problems)
    return runs_of, problems


def read_patients(path: Path) -> tuple[dict[str, str], list[Problem]]:
    """Read whose image is whose: a CSV, perhaps gzipped, with columns ImageId and patient_id.

    Returns:
        Patients by image id; problems: an image of two patients, an empty patient; a warning of patients that differ in
        case or leading zeros alone.
    """
    patient_of: dict[str, str] = {}
    problems: list[Problem] = []
    for line, (image_id, patient) in read_rows(path, ("ImageId", "patient_id"), problems):
        if not patient:
            text = "empty. Give the patient, or delete the row."
            problems.append(Problem.at(path, text, row=line, image_id=image_id, field="patient_id"))
        elif patient_of.setdefault(image_id, patient) != patient:
            text = "another patient than in a row before. Delete one of them."
            problems.append(Problem.at(path, text, row=line, image_id=image_id, field="patient_id"))
    first: dict[str, str] = {}  # an image of each patient, however that one is written
    alike: dict[str, str] = {}  # and one of each that is written otherwise
    for image_id, patient in patient_of.items():
        other = first.setdefault(patient.casefold().lstrip("0"), image_id)
        if patient_of[other] != patient:
            alike.setdefault(patient, f"{other} and {image_id}")
    if alike:
        differ = counted(len(alike), "patient differs", "patients differ")
        text = (
            f"{path}: {differ} from another in case or leading zeros alone, as of {some(list(alike.values()))}, and "
            f"would be on both sides of a fold if they are one. Write each in one way"
        )
        problems.append(Problem(str(path), None, "", text, False))
    return patient_of, problems


def find_sample(root: Path, sample: str, problems: list[Problem]) -> Path | None:
    """The sample submission of that name in `root`, or under a usual one; None if there is none."""
    return _find(root, sample, SAMPLE_NAMES, (), "sample", problems)


def read_sample(path: Path) -> tuple[list[str], list[Problem]]:
    """Read the ids that a submission must have: a CSV, perhaps gzipped, with a column ImageId.

    Returns:
        Each id once, in order of first appearance; problems: a warning if there were repetitions.
    """
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    repeated: list[Problem] = []
    count = 0
    for line, (image_id,) in read_rows(path, ("ImageId",), problems):
        count += 1
        if lines.setdefault(image_id, line) != line:
            text = f"repeats line {lines[image_id]}"
            repeated.append(Problem.at(path, text, row=line, image_id=image_id, fatal=False))
    if repeated:
        ids = counted(len(lines), "different id", "different ids")
        text = f"{path}: {count:,} rows have {ids}; one row each is written"
        problems.append(Problem(str(path), None, "", text, False, tuple(repeated)))
    if not lines and not problems:
        problems.append(Problem.at(path, "no rows"))
    return list(lines), problems


def verify(cases: Sequence[Case]) -> tuple[list[Problem], np.ndarray]:
    """Read every image, as training will, and list all that cannot be read and all that is odd.

    Returns:
        Problems in order of the cases; (N, 16, 16) uint8 thumbnails, of one value where there is no image.
    """
    thumbnails = np.zeros((len(cases), THUMBNAIL, THUMBNAIL), dtype=np.uint8)

    def check(place: int) -> list[Problem]:
        case = cases[place]
        try:
            scan = images.read(case.path)
        except PneumoError as error:
            return [Problem(str(case.path), None, case.image_id, str(error), True)]
        thumbnails[place] = images.resize(images.to_square(scan.pixels), THUMBNAIL)
        return [
            Problem(str(case.path), None, case.image_id, f"{case.path}: {remark}", False) for remark in scan.warnings
        ]

    problems = [problem for found in log.in_threads(check, range(len(cases)), "verify") for problem in found]
    return problems, thumbnails


def one_sided(cases: Sequence[Case]) -> str:
    """What to warn of where all cases are positive, or none is; "" where there are both."""
    if not cases or 0 < sum(case.positive for case in cases) < len(cases):
        return ""
    if not cases[0].positive:
        return (
            f"NOT ONE of the {len(cases):,} training images has a pneumothorax: nothing can be trained on them. Are "
            f"these the annotations that belong to the images?"
        )
    return (
        f"NOT ONE of the {len(cases):,} training images is without pneumothorax: networks would learn to find one in "
        f"every image, and no score would show it. Add negatives: all-black mask pictures, rows with -1, or --set "
        f"data.unmasked=empty for images that have neither"
    )


# ------------------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------------------


def _find(
    root: Path, given: str, stems: Sequence[str], folders: Sequence[str], key: str, problems: list[Problem]
) -> Path | None:
    """The file or folder that the recipe names, else the only one of a usual name, files first; None if there is none.

    A folder that is passed over for a file is noted.
    """
    if given:
        if (root / given).exists():
            return root / given
        problems.append(Problem.at(root / given, f"not there. data.{key} is relative to data.root."))
        return None
    names = {stem + suffix for stem in stems for suffix in (".csv", ".csv.gz")}
    entries = sorted(root.iterdir())
    files = [path for path in entries if path.name.lower() in names and path.is_file()]
    beside = [path for path in entries if path.name.lower() in folders and path.is_dir()]
    found = files or beside
    if len(found) > 1:
        text = f"{' and '.join(path.name for path in found)} could all be meant. Set data.{key} to one of them."
        problems.append(Problem.at(root, text))
        return None
    if files and beside:
        text = f"{files[0].name} is read, {beside[0].name}/ beside it is not. data.{key} says which."
        problems.append(Problem.at(root, text, fatal=False))
    return found[0] if found else None


def _find_folder(root: Path, name: str, key: str, problems: list[Problem]) -> dict[str, Path]:
    """The images of a folder that must be there and have some."""
    folder = root / name
    if not folder.is_dir():
        there = some(path.name for path in sorted(root.iterdir()) if path.is_dir())
        problems.append(Problem.at(folder, f"no such folder; {root} has: {there or 'none'}. Set {key}."))
        return {}
    found, more = find_images(folder)
    problems += more
    if not found and not any(problem.fatal for problem in more):
        problems.append(Problem.at(folder, "no PNG, JPEG or DICOM file in it"))
    return found


def _files(folder: Path, problems: list[Problem]) -> Iterator[Path]:
    """Every file of a folder and the folders in it but hidden ones, sorted; links are followed, once."""

    def complain(error: OSError) -> None:
        problems.append(Problem.at(Path(error.filename), f"cannot be read: {error.strerror}"))

    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=complain):
        stat = os.stat(place)
        if (stat.st_dev, stat.st_ino) in seen:  # a link back up would go round for ever
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in _JUNK_FOLDERS)
        for name in sorted(names):
            if name[0] != "." and name.lower() not in _JUNK:
                yield Path(place, name)


def _match(
    source: Path,
    annotated: Collection[str],
    lines: Mapping[str, int | None],
    folder: Path,
    files: dict[str, Path],
    allow_missing: bool,
    problems: list[Problem],
    hint: str = "",
) -> list[str]:
    """Annotated ids that have an image, sorted; what is without the other is a problem.

    Args:
        hint: what else can be done about images that are left out.
        lines: where the ids are in `source`, those included whose annotation is bad, which was said already.
    """
    if not files:
        return []  # said already
    missing = [image_id for image_id in annotated if image_id not in files]
    if missing:
        one = len(missing) == 1
        text = f"{len(missing):,} of {len(annotated):,} ids {'has' if one else 'have'} no image in {folder}"
        if len(missing) == len(annotated):
            text += f" (which has {len(files):,}, the first being {next(iter(files))})"
        if allow_missing:
            text += ", it is left out" if one else ", they are left out"
        else:
            text += f"; copy {'it' if one else 'them'}, or set data.allow_missing"
        each = f"no image in {folder}"
        problems.append(Problem.of_ids(source, text, missing, each, fatal=not allow_missing, lines=lines))
    extra = [image_id for image_id in files if image_id not in lines]
    if extra and lines:  # else nothing of it could be read, which was said already
        verb = "is" if len(extra) == 1 else "are"
        text = f"{len(extra):,} of {len(files):,} images {verb} not in {source} and {verb} left out{hint}"
        problems.append(Problem.of_ids(folder, text, extra, f"not in {source}", fatal=False))
    return sorted(image_id for image_id in annotated if image_id in files)


def _check_square(
    source: Path,
    ids: Sequence[str],
    lines: Mapping[str, int | None],
    runs_of: dict[str, np.ndarray],
    files: dict[str, Path],
    problems: list[Problem],
) -> None:
    """Codes live on a square grid: on an image of another shape nobody knows what they mean."""
    for image_id in ids:
        if len(runs_of[image_id]) == 0:
            continue
        try:
            height, width = images.size(files[image_id])
        except PneumoError:
            continue  # who reads the image will say so
        if height != width:
            text = (
                f"a code, but {files[image_id]} is {width} x {height} pixels and not square. Give all masks as "
                f"pictures, each of its image's size, in place of the CSV (data.annotations={MASK_FOLDERS[0]}), or "
                f"take this image and its rows away."
            )
            problems.append(Problem.at(source, text, row=lines.get(image_id), image_id=image_id))


# ------------------------------------------------------------------------------------------------------------
# Annotations
# ------------------------------------------------------------------------------------------------------------


def _read_codes(
    path: Path, annotation_size: int, problems: list[Problem], also_empty: Collection[str] = ()
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Runs by id, and the line on which an id first appears, those with a fatal problem included."""
    rows: dict[str, list[tuple[int, str, np.ndarray]]] = {}
    lines: dict[str, int] = {}
    bad = set()
    for line, (image_id, code) in read_rows(path, ("ImageId", "EncodedPixels"), problems):
        lines.setdefault(image_id, line)
        try:
            code = rle.EMPTY if code.strip() in also_empty else code
            runs = rle.decode_runs(code, annotation_size, annotation_size)
        except ValueError as error:
            bad.add(image_id)
            problems.append(Problem.at(path, str(error), row=line, image_id=image_id, field="EncodedPixels"))
            continue
        rows.setdefault(image_id, []).append((line, code, runs))

    runs_of: dict[str, np.ndarray] = {}
    overlaps: list[Problem] = []
    twice = repeated = 0  # pixels, rows
    for image_id, its in rows.items():
        if image_id in bad:
            continue
        if len(its) == 1:
            runs_of[image_id] = join(its[0][2])
            continue
        empty = [line for line, _, runs in its if len(runs) == 0]
        if empty and len(empty) < len(its):
            other = next(line for line, _, runs in its if len(runs))
            text = f"empty here, but line {other} has a mask of it. Delete one of them."
            problems.append(Problem.at(path, text, row=empty[0], image_id=image_id, field="EncodedPixels"))
            continue
        runs_of[image_id] = union([runs for _, _, runs in its])
        pixels = sum(area(runs) for _, _, runs in its) - area(runs_of[image_id])
        same = len(its) - len({code for _, code, _ in its})
        if pixels or same:
            twice, repeated = twice + pixels, repeated + same
            text = f"{_pixels(pixels)} in more than one row, {_rows(same)} repeated; united"
            overlaps.append(Problem.at(path, text, row=its[0][0], image_id=image_id, fatal=False))
    if overlaps:
        message = (
            f"{path}: {counted(len(overlaps), 'image has', 'images have')} rows that overlap ({_pixels(twice)}) or "
            f"repeat ({_rows(repeated)}); they were united"
        )
        problems.append(Problem(str(path), None, "", message, False, tuple(overlaps)))
    if not lines and not any(problem.fatal for problem in problems if problem.file == str(path)):
        problems.append(Problem.at(path, "no rows"))
    masks = [runs for runs in runs_of.values() if len(runs)]
    if (side := _grid_of(masks[:: len(masks) // LOOKED_AT + 1], annotation_size)) != annotation_size:
        text = (
            f"the masks hang together on a grid of {side}×{side}, not of {annotation_size}×{annotation_size}: they "
            f"were probably made for that size. Set data.annotation_size={side}"
        )
        problems.append(Problem.at(path, text, fatal=False))
    return runs_of, lines


def _grid_of(masks: Sequence[np.ndarray], side: int) -> int:
    """The side of the grid on which masks hang together: a column of a mask is much like the next one.

    On another grid each column lies further down than the one before, and masks fall to shreds.

    Args:
        masks: (R, 2) runs each, none empty.
        side: of the grid that they are said to live on; it is that one unless another fits clearly better.
    """
    total = sum(map(area, masks))

    @cache
    def alike(shift: int) -> float:
        return sum(intersection_size(runs, runs + shift) for runs in masks) / total

    # those near it, and those that it is a multiple of, on which it would be alike as well
    others = [side + more for more in (-8, -2, 2, 8)] + [side // part for part in (2, 3, 4)]
    if len(masks) < ENOUGH or (alike(side) > 0.5 and alike(side) + CLEARLY >= max(map(alike, others))):
        return side
    best = max(range(side // 8, side, 4), key=alike)  # codes of a larger one would end beyond it
    best = max(range(max(best - 3, 1), best + 4), key=alike)
    # half a column down nothing is alike, but for masks so tall that they are alike a little further down as well
    return best if alike(best) > max(0.5, alike(side) + CLEARLY, alike(best // 2)) else side


def _pixels(number: int) -> str:
    return counted(number, "pixel", "pixels")


def _rows(number: int) -> str:
    return counted(number, "row", "rows")


def _read_masks(
    folder: Path, files: dict[str, Path] | None, annotation_size: int, problems: list[Problem]
) -> tuple[dict[str, np.ndarray], dict[str, None]]:
    """Runs on the annotation grid of every mask in a folder; of those with an image, if `files` is given. All ids.

    A mask goes the way of its image: padded to a square, then brought to the grid by `images.resize_mask`.
    """
    masks, more = find_images(folder)
    problems += more
    if not masks:
        problems.append(Problem.at(folder, "no masks in it"))

    def read(image_id: str) -> tuple[np.ndarray, bool] | Problem:
        """Runs on the grid, and whether the picture itself is empty."""
        path = masks[image_id]
        if files is not None and image_id not in files:
            return np.zeros((0, 2), dtype=np.int64), True  # reported as such by `_match`
        try:
            mask = images.read_mask(path)
        except PneumoError as error:
            return Problem(str(path), None, image_id, str(error), True)
        if files is not None:
            try:
                shape = images.size(files[image_id])
            except PneumoError:
                shape = mask.shape  # who reads the image will say so
            if mask.shape != shape:
                text = (
                    f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels, its image {files[image_id]} is "
                    f"{shape[1]} x {shape[0]}. They must be of one size: resize the mask to the image's, each pixel "
                    f"taking its nearest (no smoothing), or give the image in full size."
                )
                if mask.shape == shape[::-1]:
                    text += " If the image's EXIF orientation turns it, turn the mask instead, or remove that tag."
                return Problem.at(path, text, image_id=image_id)
        square = images.resize_mask(images.to_square(mask), annotation_size)
        return mask_to_runs(square), not mask.any()

    runs_of, lost = {}, []
    for image_id, result in zip(masks, log.in_threads(read, list(masks), "masks"), strict=True):
        if isinstance(result, Problem):
            problems.append(result)
        else:
            runs_of[image_id], empty = result
            if not empty and len(runs_of[image_id]) == 0:
                lost.append(image_id)
    if lost:
        verb = "has" if len(lost) == 1 else "have"
        text = (
            f"{len(lost):,} of {len(masks):,} masks {verb} no pixel left on the annotation grid of {annotation_size} x "
            f"{annotation_size}, so that the image counts as negative; a larger data.annotation_size keeps it"
        )
        problems.append(Problem.of_ids(folder, text, lost, "no pixel left on the annotation grid", fatal=False))
    return runs_of, dict.fromkeys(masks)
