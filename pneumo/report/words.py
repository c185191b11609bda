"""The words and tables of a report: what it is of, what it found, what to beware of.

Imports config, dataset, data, decision, oof, tuning, results, errors.
"""

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from pneumo import tuning
from pneumo.config import Recipe
from pneumo.data.cases import one_sided
from pneumo.data.problems import counted
from pneumo.dataset import Dataset
from pneumo.decision.metrics import Interval, Scores
from pneumo.decision.rule import Rule
from pneumo.decision.tune import Tuned
from pneumo.errors import DataError
from pneumo.oof import OutOfFold
from pneumo.report.results import Decided


def summary(
    recipe: Recipe, data: Dataset, shown: Decided, scores: Scores, tuned: Tuned | None, note: str
) -> tuple[str, ...]:
    """Sentences for the head of the page."""
    sentences = [
        f"{scores.cases:,} images, {scores.positives:,} with pneumothorax{note}, each predicted by the networks that "
        f"did not train on it, in {counted(len(np.unique(shown.found.folds)), 'fold', 'folds')} "
        f"({_split_by(recipe, data)}; see the audit).",
        f"Mean Dice {scores.dice}, {shown.name}; with all masks empty it would be {scores.all_empty:.4f}. "
        f"{_predictive_values(shown)}",
    ]
    if tuned is not None:
        sentences.append(
            f"Chosen rule: {tuning.describe(tuned.rule)}{_objective(recipe, tuned)}. On the data that chose it its "
            f"mean Dice is {tuned.in_sample:.4f}, {round(tuned.optimism, 4) + 0.0:+.4f} to the cross-fitted one: what "
            f"choosing on the same cases overstates, and where the folds' networks differ."
        )
    groups = len(np.unique(shown.found.groups))
    if recipe.predict.weights != "last":
        chosen = (
            " The epoch of each network was chosen by its Dice on the same images, which flatters all figures here a "
            "little; predict.weights=last does without, in the last stage, but for the learning rate's drops."
        )
    elif recipe.stages > 1:
        chosen = (
            " Each stage began with the epoch of the stage before that had the best Dice on the same images, which "
            "flatters all figures here a little."
        )
    else:
        chosen = ""
    sentences.append(
        f"Intervals hold 95 %, of these networks and rules; networks trained anew would differ by more, and the gain's "
        f"is too narrow where rules score nearly alike. They resample {groups:,} patients or single images, "
        f"near-duplicates together; those of shares are Wilson's.{chosen}"
    )
    sentences += [
        "Out of fold one fold's networks predict an image, predict.py averages those of all folds. So the rule and "
        "these figures are of single folds; the average is mostly better, and another rule may suit it more.",
        "For research. Not a medical device: nothing here may decide about a patient.",
    ]
    return tuple(sentences)


def origin(recipe: Recipe, data: Dataset, encoder: str) -> str:
    """When, on what and by which networks."""
    sides = ", ".join(str(recipe.stage[number].image_size) for number in range(1, recipe.stages + 1))
    return (
        f"Report of {date.today().isoformat()}. Data: {Path(recipe.data.root).absolute().name}, {len(data.cases):,} "
        f"training images. Encoder: {encoder}. Image sizes of the stages: {sides} px."
    )


def _objective(recipe: Recipe, tuned: Tuned) -> str:
    """What a rule was chosen for, if not for Dice."""
    if recipe.tune.objective == "dice":
        return ""
    missed = "" if tuned.choice.reached else ", which no rule reaches"
    return f", of the best Dice among those of a {recipe.tune.objective} of {recipe.tune.target:g} by image{missed}"


def _predictive_values(shown: Decided) -> str:
    """What a mask, and none, mean at the data's share of positive images."""
    counts = {name: int((shown.outcome == name).sum()) for name in np.unique(shown.outcome).tolist()}
    right, wrong, missed, quiet = (
        counts.get(name, 0) for name in ("true positive", "false positive", "missed", "true negative")
    )
    given = f", of which {right / (right + wrong):.1%} have pneumothorax" if right + wrong else ""
    empty = f", of which {quiet / (quiet + missed):.1%} have none" if quiet + missed else ""
    was, left = ("was" if count == 1 else "were" for count in (right + wrong, quiet + missed))
    images = counted(right + wrong, "image", "images")
    return f"{images} {was} given a mask{given}; {quiet + missed:,} {left} left empty{empty}."


def _split_by(recipe: Recipe, data: Dataset) -> str:
    if recipe.folds.group == "image":
        return "split by image, so that a patient may be on both sides"
    known = sum(case.patient is not None for case in data.cases)
    if not known:
        return "split by image: no patients are known, so one may be on both sides"
    return "a patient stays in one fold" + ("" if known == len(data.cases) else f", known for {known:,} images")


def result_rows(
    ways: Sequence[Decided],
    scores: dict[str, Scores],
    gains: dict[str, Interval | None],
    tuned_gains: dict[str, Interval | None],
) -> list[list[str]]:
    """The main table, its columns' names first.

    Args:
        ways: the recipe's own first; one on other images than that says so below its name.
        scores, gains, tuned_gains: by name of the way; gains over the first, and of tuned ways over the recipe's tuned
            one. The latter's column is left out if it is empty.
    """
    head = "mean Dice|gain, paired|Dice on positives|sensitivity|true-negative rate|ROC AUC|average precision"
    rows = [["out of fold", *head.split("|"), "calibration error"]]
    first = scores[ways[0].name]
    none, all_ = ("0" if first.positives else "-"), ("1" if first.positives < first.cases else "-")
    rows.append(["all masks empty", f"{first.all_empty:.4f}", "", none, none, all_, "", "", ""])
    for way in ways:
        found, gain = scores[way.name], gains.get(way.name)
        change = "" if gain is None else gain.signed
        values = (found.dice, change, found.dice_positive, found.sensitivity, found.specificity)
        values += (found.roc_auc, found.average_precision, f"{found.calibration_error:.3f}")
        cases = way.cases_beside(ways[0])
        name = f"{way.name} ({cases})" if cases else way.name
        rows.append([name, *("" if value is None else str(value) for value in values)])
    if any(tuned_gains.values()):
        over = [tuned_gains.get(way.name) for way in ways]
        column = ["tuned over tuned", "", *("" if gain is None else gain.signed for gain in over)]
        for row, cell in zip(rows, column, strict=True):
            row.insert(3, cell)
    return rows


def fold_rows(shown: Decided, baseline: Decided, tuned: Tuned | None, epochs: Mapping[int, int]) -> list[list[str]]:
    """The folds one by one, columns' names first.

    Args:
        shown, baseline: the way that the page shows, and the recipe's own.
        epochs: of the weights that predict, by fold; none where they are of several.
    """
    names = ["fold", "epoch", "images", "positive", "Dice", "Dice, recipe's rule", "sensitivity"]
    rows = [[*names, "true-negative rate", "rule chosen on the others"]]
    positive, decided = shown.found.tables.positive, shown.signals.decided
    for place, fold in enumerate(np.unique(shown.found.folds).tolist()):
        inside = shown.found.folds == fold
        shares = [right[inside & some] for right, some in ((decided, positive), (~decided, ~positive))]
        rows.append(
            [
                f"{fold}",
                str(epochs.get(fold, "")),
                f"{inside.sum():,}",
                f"{(inside & positive).sum():,}",
                f"{shown.dice[inside].mean():.4f}",
                f"{baseline.dice[inside].mean():.4f}",
                *(f"{share.mean():.4f}" if len(share) else "-" for share in shares),
                "" if tuned is None else tuning.describe(tuned.fold_rules[place]),
            ]
        )
    return rows


def size_rows(sizes: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table of `pneumo.decision.metrics.by_size`, its columns' names first; empty without rows."""
    if not sizes:
        return []
    rows = [["pixels", "images", "Dice", "sensitivity", "ROC AUC", "average precision", "calibration gap"]]
    for row in sizes:
        ranked = [row["roc_auc"], row["average_precision"], row["calibration_gap"]]
        rows.append(
            [
                f"{row['smallest']:,} to {row['largest']:,}",
                f"{row['cases']:,}",
                str(row["dice"]),
                str(row["sensitivity"]),
                *("" if value is None else f"{value:.3f}" for value in ranked),
            ]
        )
    return rows


def case_rows(shown: Decided, expected: np.ndarray | None) -> list[list[Any]]:
    """The per-case table, without its columns' names."""
    signals, found = shown.signals, shown.found
    columns = [
        list(found.image_ids),
        found.folds.tolist(),
        shown.outcome.tolist(),
        shown.dice.round(4).tolist(),
        [None] * len(shown.dice) if expected is None else expected.round(4).tolist(),
        signals.score.round(4).tolist(),
        signals.agreement.round(4).tolist(),
        found.tables.true_area.tolist(),
        signals.area.tolist(),
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def worth(curve: dict[str, np.ndarray]) -> str:
    """What referring a tenth and a fifth of the images gains."""
    whole = curve["dice"][-1]
    kept = [curve["dice"][max(round(len(curve["dice"]) * share) - 1, 0)] for share in (0.9, 0.8)]
    return (
        f"Referring the 10 % of lowest expected Dice leaves a mean Dice of {kept[0]:.4f}, 20 % {kept[1]:.4f}, none "
        f"{whole:.4f}."
    )


def warnings(
    recipe: Recipe, data: Dataset, found: OutOfFold, tuned: Tuned | None, ways: Sequence[Decided]
) -> list[str]:
    """What a reader of the page could take wrongly: one-sided data, predict.py's other rule, rows of other cases."""
    said = [one_sided(data.cases)] if one_sided(data.cases) else []
    if tuned is None:
        said.append(
            f"Only fold {found.folds[0]} has out-of-fold predictions: no rule can be tuned on one fold and tried on "
            f"another, so there is no rule explorer and no expected Dice. Run: {recipe.command('cv')}"
        )
    path = recipe.folder / "rule.toml"
    used = Rule.of(recipe.rule) if tuned is None else tuned.rule
    own = Rule.of(recipe.rule)
    if not path.exists():
        if not _same_rule(own, used):
            said.append(
                f"predict.py uses another rule than this report, the recipe's, as there is no {path}: "
                f"{tuning.describe(own)}. Run: {recipe.command('tune')}"
            )
    else:
        try:
            ruling, sources = tuning.read(path, own)
        except DataError as error:
            said.append(f"{error}. predict.py will stop at it. Run: {recipe.command('tune')}")
        else:
            if trouble := tuning.misfit(recipe, ruling, sources, found.sources):
                said.append(f"predict.py will stop: {path} {trouble}")
            elif not _same_rule(ruling.rule, used):
                same = set(sources.values()) == set(found.sources.values())
                given = "was given other settings of tune or rule" if same else "is of other folds"
                said.append(
                    f"predict.py uses another rule than this report, that of {path}: {tuning.describe(ruling.rule)}. "
                    f"This report {given} than make tune was."
                )
    for way in ways[1:]:
        if cases := way.cases_beside(ways[0]):
            said.append(f"{way.name}: {cases}. Its row cannot be compared with the recipe's own.")
    return said


def _same_rule(one: Rule, other: Rule) -> bool:
    """Whether two rules decide alike."""
    return (one.threshold, one.min_area) == (other.threshold, other.min_area) and same_top(one, other)


def same_top(one: Rule, other: Rule) -> bool:
    """Whether two rules let the same images through; at a top threshold of 0 that is all, whatever the top area."""
    if one.top_threshold != other.top_threshold:
        return False
    return one.top_threshold == 0 or one.top_area == other.top_area


def top(rule: Rule) -> str:
    """A rule's top rule in words."""
    if not rule.top_threshold:
        return "none, so that any component makes an image positive"
    return f"an image is positive only if more than {rule.top_area:,} px exceed {rule.top_threshold:g}"
