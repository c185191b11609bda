"""A submission file scored against annotations, without images. Imports data, decision, kernels, log, errors."""

from pathlib import Path
from typing import Any

import numpy as np

from pneumo import log
from pneumo.data import cases
from pneumo.data.problems import Problem, raise_fatal, some
from pneumo.data.rows import read_rows
from pneumo.decision import metrics
from pneumo.errors import DataError
from pneumo.kernels.runs import area

EMPTY_SPELLINGS = ("", "-1.0", "nan", "NaN")  # what table programs make of an empty mask's -1, besides -1 itself


def score_files(
    submission: Path,
    truth: Path,
    *,
    annotation_size: int,
    unmasked: str = "leave",
    patients: Path | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score a submission; its ids are the cases, and rows of the truth for other ids are not scored, which is said.

    Args:
        submission, truth: CSV files of codes, perhaps gzipped; several rows of one id are united. The truth may be a
            folder of mask pictures.
        annotation_size: side of the square grid of the codes, pixels.
        unmasked: "empty": ids that the truth lacks have an empty mask.
        patients: CSV file of ImageId,patient_id; intervals then resample patients.
        draws: bootstrap samples of an interval.

    Returns:
        "cases", "positives", "dice", "dice_positive", "true_negative_rate", "sensitivity", "specificity" (of the
        images' decisions; the latter is the true-negative rate), "all_empty", and [low, high] as "dice_interval",
        "dice_positive_interval", "sensitivity_interval", "specificity_interval"; None for a mean over no case, and for
        an interval of too few.

    Raises:
        DataError: a file is wrong, or the truth lacks ids; names them.
    """
    decided, problems = cases.read_codes(submission, annotation_size, also_empty=EMPTY_SPELLINGS)
    raise_fatal(problems, None)
    annotated, problems = cases.read_annotations(truth, annotation_size, also_empty=EMPTY_SPELLINGS)
    raise_fatal(_of(decided, problems), None)
    if missing := [image_id for image_id in decided if image_id not in annotated]:
        text = f"{truth}: no truth for {len(missing)} of {len(decided)} ids of {submission}, as {some(missing)}"
        if unmasked != "empty":
            negative = "an all-black picture" if truth.is_dir() else "a row with -1"
            raise DataError(f"{text}. A negative needs {negative} there, or --set data.unmasked=empty")
        log.warn(f"{text}; their masks are taken for empty (data.unmasked)")
        annotated |= dict.fromkeys(missing, np.zeros((0, 2), dtype=np.int64))
    rows = sum(1 for _ in read_rows(submission, ("ImageId",), []))
    if rows > len(decided):
        log.warn(f"{submission}: {rows:,} rows of {len(decided):,} ids; several of one id were united")
    if more := [image_id for image_id in annotated if image_id not in decided]:
        log.warn(
            f"{submission}: no row for {len(more):,} of {len(annotated):,} ids of {truth}, as {', '.join(more[:5])}; "
            f"they are not scored"
        )
    patient_of: dict[str, str] = {}
    if patients is not None:
        patient_of, problems = cases.read_patients(patients)
        raise_fatal(_of(decided, problems), None)
        unknown = [image_id for image_id in decided if image_id not in patient_of]
        if len(unknown) == len(decided):
            raise DataError(f"{patients}: none of its ids is one of {submission}, which has {some(unknown[:1])}")
        if unknown:
            log.warn(f"{patients}: {len(unknown):,} of {len(decided):,} ids have no patient, as {some(unknown)}")
    scores = metrics.summarise(
        np.array([metrics.dice_runs(runs, annotated[image_id]) for image_id, runs in decided.items()]),
        np.array([area(annotated[image_id]) > 0 for image_id in decided]),
        np.array([area(runs) > 0 for runs in decided.values()]),
        None,
        metrics.groups_of([patient_of.get(image_id) for image_id in decided]),
        draws=draws,
        seed=seed,
    )
    result: dict[str, Any] = {"cases": scores.cases, "positives": scores.positives, "all_empty": scores.all_empty}
    for name in ("dice", "dice_positive", "sensitivity", "specificity"):
        found = getattr(scores, name)
        result[name] = None if np.isnan(found.value) else found.value
        result[f"{name}_interval"] = [found.low, found.high] if found.has_ends else None
    result["true_negative_rate"] = result["specificity"]
    return result


def _of(decided: dict[str, np.ndarray], problems: list[Problem]) -> list[Problem]:
    """Problems of the file as a whole and of the ids that are scored."""
    return [problem for problem in problems if not problem.image_id or problem.image_id in decided]
