"""A submission file scored against annotations, without images. Imports data, decision, errors."""

from pathlib import Path
from typing import Any

import numpy as np

from pneumo.data import cases
from pneumo.decision.metrics import dice_runs
from pneumo.errors import DataError


def score_files(submission: Path, truth: Path, *, annotation_size: int) -> dict[str, Any]:
    """Score a submission; its ids are the cases, and rows of the truth for other ids do not matter.

    Args:
        submission, truth: CSV files of codes, perhaps gzipped; several rows of one id are united.
        annotation_size: side of the square grid of the codes, pixels.

    Returns:
        {"cases", "positives", "dice", "dice_positive", "true_negative_rate", "all_empty"}; a mean over no case is None.

    Raises:
        DataError: a file is wrong, or the truth lacks ids; names them.
    """
    decided, problems = cases.read_codes(submission, annotation_size)
    cases.raise_fatal(problems, None)
    annotated, problems = cases.read_codes(truth, annotation_size)
    cases.raise_fatal(problems, None)
    if missing := [image_id for image_id in decided if image_id not in annotated]:
        raise DataError(
            f"{truth}: no truth for {len(missing)} of {len(decided)} ids of {submission}, as {', '.join(missing[:5])}"
        )
    dice = np.array([dice_runs(runs, annotated[image_id]) for image_id, runs in decided.items()])
    positive = np.array([len(annotated[image_id]) > 0 for image_id in decided])
    return {
        "cases": len(dice),
        "positives": int(positive.sum()),
        "dice": float(dice.mean()),
        "dice_positive": float(dice[positive].mean()) if positive.any() else None,
        "true_negative_rate": float(dice[~positive].mean()) if not positive.all() else None,
        "all_empty": float((~positive).mean()),
    }
