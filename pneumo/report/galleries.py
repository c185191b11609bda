"""Galleries of the report: X-rays with annotation and prediction, the best and worst found and what was mistaken.

Imports figures, page, results, config, dataset, data, decision, ensemble, kernels, dist, log, errors.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from pneumo import dataset, dist, ensemble, log
from pneumo.config import Recipe
from pneumo.data.feed import Feed
from pneumo.dataset import Dataset
from pneumo.decision.rule import Rule, decide
from pneumo.decision.tune import Tuned
from pneumo.errors import PneumoError
from pneumo.kernels.runs import runs_to_mask
from pneumo.report import figures
from pneumo.report.page import Figure
from pneumo.report.results import Decided

NAMES = [f"gallery_{kind}" for kind in ("best", "median", "worst", "false_positives", "missed")]
SHOWN = 12  # images of one gallery
THUMBNAIL = 320  # their side, pixels


def draw(
    recipe: Recipe, data: Dataset, shown: Decided, tuned: Tuned | None, folder: Path
) -> list[tuple[str, list[Figure]]]:
    """Draw the best, median and worst found, the false positives and the missed; an image is in one gallery only."""
    pictured = chosen(shown)
    wanted = np.unique(np.concatenate([places for _, places in pictured]))
    try:
        pictures = dict(_predict_again(recipe, data, shown, tuned, wanted))
    except PneumoError as error:
        log.warn(f"no galleries: {error}")
        return []
    drawn = []
    for name, (title, places) in zip(NAMES, pictured, strict=True):
        if not len(places):
            continue
        numbers = pd.DataFrame(
            {
                "ImageId": [shown.found.image_ids[i] for i in places.tolist()],
                "dice": shown.dice[places],
                "score": shown.signals.score[places],
                "true_area": shown.found.tables.true_area[places],
                "found_area": shown.signals.area[places],
            }
        )
        images, truths, masks = zip(*(pictures[i] for i in places.tolist()), strict=True)
        figures.gallery(images, truths, masks, numbers, f"{recipe.name}: {title}", folder / f"{name}.png")
        drawn.append(Figure(folder / f"{name}.png", f"{title}. Blue: annotation; orange, dashed: prediction."))
    return [("Galleries", drawn)] if drawn else []


def chosen(shown: Decided) -> list[tuple[str, np.ndarray]]:
    """Which cases to show.

    Returns:
        For each of `NAMES` its title and the places of up to `SHOWN` cases, perhaps of none. The best take theirs
        first, then the worst, and the median has the middle of what is left.
    """
    outcome, dice, area, true_area = shown.outcome, shown.dice, shown.signals.area, shown.found.tables.true_area

    def ordered(kind: str, size: np.ndarray) -> np.ndarray:
        places = np.flatnonzero(outcome == kind)
        return places[np.argsort(-size[places], kind="stable")]

    hit = ordered("true positive", dice)
    rest = hit[SHOWN:-SHOWN]
    middle = max(len(rest) // 2 - SHOWN // 2, 0)
    return [
        ("The best outlines" if len(hit) > SHOWN else "All true positives, the best outlines first", hit[:SHOWN]),
        ("Outlines around the median", rest[middle : middle + SHOWN]),
        ("The worst outlines", hit[SHOWN:][::-1][:SHOWN]),
        ("The largest false positives", ordered("false positive", area)[:SHOWN]),
        ("The largest that were missed", ordered("missed", true_area)[:SHOWN]),
    ]


def _predict_again(
    recipe: Recipe, data: Dataset, shown: Decided, tuned: Tuned | None, places: np.ndarray
) -> Iterable[tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Image, annotation and decided mask of some cases, small; each by the fold that did not see it.

    Args:
        places: of the cases in `shown`.
    """
    size, found = recipe.data.annotation_size, shown.found
    fold_rules = None if tuned is None else dict(zip(np.unique(found.folds).tolist(), tuned.fold_rules, strict=True))
    pick = np.arange(THUMBNAIL) * size // THUMBNAIL if size > THUMBNAIL else np.arange(size)
    with dist.launch(recipe.train.timeout_seconds) as device:
        for fold in np.unique(found.folds[places]).tolist():
            models = ensemble.load(recipe, [fold], device)
            pack = dataset.open_train(recipe, data, models.image_size)
            inside = places[found.folds[places] == fold]
            rule: Rule = Rule.of(recipe.rule) if fold_rules is None else fold_rules[fold]
            batches = [found.rows[[place]] for place in inside]
            feed = Feed(pack, device, found.rows[inside])
            shown_bar = log.bar(inside.tolist(), title=f"galleries, fold {fold}")
            for place, (image, _) in zip(shown_bar, feed.batches(batches), strict=True):
                boxes = pack.boxes(found.rows[[place]], size)
                predicted = ensemble.predict(models, image, size, [found.image_ids[place]], boxes)
                mask = runs_to_mask(decide(predicted.q[0], rule), size, size)
                truth = runs_to_mask(data.cases[found.rows[place]].runs, size, size)
                pixels = image[0, 0].cpu().numpy()
                near = (np.arange(len(pick)) * len(pixels)) // len(pick)
                yield place, (pixels[np.ix_(near, near)], truth[np.ix_(pick, pick)], mask[np.ix_(pick, pick)])
