"""The numbers of a report: ways to predict and decide, each scored out of fold and against the recipe's own.

Imports config, dataset, decision, oof, tuning.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pneumo import dataset, oof, tuning
from pneumo.config import Recipe
from pneumo.dataset import Dataset
from pneumo.decision import metrics, tables, trust
from pneumo.decision.metrics import Interval, Scores
from pneumo.decision.rule import Rule
from pneumo.decision.trust import Signals
from pneumo.decision.tune import Tuned
from pneumo.oof import OutOfFold


@dataclass(frozen=True)
class Decided:
    """One way to predict and decide, case by case.

    Attributes:
        name: what it is called in the table.
        found: the predictions.
        dice: (N,) of each case's decided mask.
        signals: of each case's decided mask.
    """

    name: str
    found: OutOfFold
    dice: np.ndarray
    signals: Signals

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
        theirs = dict(zip(other.found.image_ids, other.dice.tolist(), strict=True))
        if theirs.keys() != set(self.found.image_ids):
            return None
        difference = self.dice - np.array([theirs[image_id] for image_id in self.found.image_ids])
        return metrics.bootstrap_means(difference[None], self.found.groups, draws=draws, seed=seed)[0]


def by_rule(name: str, found: OutOfFold, rule: Rule) -> Decided:
    """All cases decided by one rule."""
    return Decided(name, found, tables.dice(found.tables, rule), trust.signals(found.tables, rule))


def cross_fitted(name: str, found: OutOfFold, tuned: Tuned) -> Decided:
    """Each case decided by the rule that its fold had no say in."""
    return Decided(name, found, tuned.dice, tuning.held_out_signals(found, tuned))


def other_ways(recipe: Recipe, data: Dataset, folds: np.ndarray, beside: Sequence[Recipe]) -> list[Decided]:
    """What the same folds predict with other weights, and what other recipes predict; as far as it is there.

    Args:
        folds: the folds that the recipe's own predictions cover.
    """
    ways = []
    for weights in ("best", "ema", "average"):
        other = replace(recipe, predict=replace(recipe.predict, weights=weights))
        if weights != recipe.predict.weights and all(oof.path_of(other, fold).exists() for fold in np.unique(folds)):
            ways.append(by_rule(f"weights {weights}, recipe's rule", oof.load(other, data), tuning.recipe_rule(other)))
    for other in beside:
        found = oof.load(other, dataset.load(other))
        ways.append(by_rule(f"{other.name}, its recipe's rule", found, tuning.recipe_rule(other)))
        if len(np.unique(found.folds)) > 1:
            ways.append(cross_fitted(f"{other.name}, tuned rule, cross-fitted", found, tuning.search(other, found)))
    return ways
