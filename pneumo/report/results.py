"""The numbers of a report: ways to predict and decide, each scored out of fold and against the recipe's own.

Imports config, dataset, decision, oof, tuning, log, errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pneumo import dataset, log, oof, tuning
from pneumo.config import Recipe
from pneumo.dataset import Dataset
from pneumo.decision import metrics, tables, trust
from pneumo.decision.metrics import Interval, Scores
from pneumo.decision.rule import Rule
from pneumo.decision.trust import Signals
from pneumo.decision.tune import Tuned
from pneumo.errors import DataError
from pneumo.oof import OutOfFold


@dataclass(frozen=True)
class Decided:
    """One way to predict and decide, case by case.

    Attributes:
        name: what it is called in the table.
        found: the predictions.
        dice: (N,) of each case's decided mask.
        signals: of each case's decided mask.
        tuned: whether by rules chosen on the predictions themselves, cross-fitted.
    """

    name: str
    found: OutOfFold
    dice: np.ndarray
    signals: Signals
    tuned: bool = False

    @property
    def outcome(self) -> np.ndarray:
        """(N,) str: true positive, missed, false positive or true negative."""
        positive, decided = self.found.tables.positive, self.signals.decided
        return np.where(
            positive,
            np.where(decided, "true positive", "missed"),
            np.where(decided, "false positive", "true negative"),
        )

    def scores(self, *, draws: int, seed: int) -> Scores:
        """Its aggregate."""
        return metrics.summarise(
            self.dice,
            self.found.tables.positive,
            self.signals.decided,
            self.signals.score,
            self.found.groups,
            draws=draws,
            seed=seed,
        )

    def gain_over(self, other: "Decided", *, draws: int, seed: int) -> Interval | None:
        """Mean difference of Dice with its paired interval; None if the cases are not the same."""
        if self.cases_beside(other):
            return None
        theirs = dict(zip(other.found.image_ids, other.dice.tolist(), strict=True))
        difference = self.dice - np.array([theirs[image_id] for image_id in self.found.image_ids])
        return metrics.bootstrap_means(difference[None], self.found.groups, draws=draws, seed=seed)[0]

    def cases_beside(self, other: "Decided") -> str:
        """Which cases it is of, and what all masks empty score there; empty where they are those of the other."""
        mine, theirs = (
            dict(zip(way.found.image_ids, way.found.tables.true_area.tolist(), strict=True)) for way in (self, other)
        )
        empty = f"all masks empty: {(~self.found.tables.positive).mean():.4f}"
        if mine.keys() != theirs.keys():
            both = len(mine.keys() & theirs.keys())
            return f"on {len(mine):,} images, {both:,} of them among the recipe's {len(theirs):,}; {empty}"
        other_areas = sum(theirs[image_id] != area for image_id, area in mine.items())
        return f"on other annotations of {other_areas:,} of the images; {empty}" if other_areas else ""


def by_rule(name: str, found: OutOfFold, rule: Rule) -> Decided:
    """All cases decided by one rule."""
    return Decided(name, found, tables.dice(found.tables, rule), trust.signals(found.tables, rule))


def cross_fitted(name: str, found: OutOfFold, tuned: Tuned) -> Decided:
    """Each case decided by the rule that its fold had no say in."""
    return Decided(name, found, tuned.dice, tuning.held_out_signals(found, tuned), tuned=True)


def other_ways(recipe: Recipe, data: Dataset, folds: np.ndarray, beside: Sequence[Recipe]) -> list[Decided]:
    """What the same folds predict with other weights, and what other recipes predict; as far as it is there.

    Each is scored on all images that it has, which may be others than the recipe's where a recipe beside it has done
    other folds: `Decided.cases_beside` then says so. Predictions with other weights that no longer fit are left out.

    Args:
        folds: the folds that the recipe's own predictions cover.
        beside: recipes that have out-of-fold predictions.
    """
    ways = []
    for weights in ("best", "last", "ema", "average"):
        other = recipe.with_weights(weights)
        if weights == recipe.predict.weights or not all(oof.path_of(other, fold).exists() for fold in np.unique(folds)):
            continue
        try:
            found = oof.load(other, data)
        except DataError as error:
            log.warn(f"the report leaves out weights {weights}: {error}")
            continue
        ways.append(by_rule(f"weights {weights}, recipe's rule", found, Rule.of(other.rule)))
    for other in beside:
        found = oof.load(other, dataset.load(other))
        ways.append(by_rule(f"{other.name}, its recipe's rule", found, Rule.of(other.rule)))
        if len(np.unique(found.folds)) > 1:
            ways.append(cross_fitted(f"{other.name}, tuned rule, cross-fitted", found, tuning.search(other, found)))
    return ways
