"""How good a decided mask probably is: expected Dice of each image, and what referring the doubtful ones is worth.

Imports rule, tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from pneumo.decision import tables
from pneumo.decision.rule import PROBABILITY, Rule, image_score, level
from pneumo.decision.tables import Tables


@dataclass(frozen=True)
class Signals:
    """What tells without the truth how good each of N decided masks is.

    Attributes:
        decided: (N,) bool, whether pneumothorax was found.
        area: (N,) int64, pixels decided.
        score: (N,) float, of the image.
        agreement: (N,) float in [0, 1], Dice of the mask of the image and that of its mirror image, the mean over
            networks; 1 without mirror.
        soft_dice: (N,) float in [0, 1], Dice of the mask if the probabilities were true; no area filter.
    """

    decided: np.ndarray
    area: np.ndarray
    score: np.ndarray
    agreement: np.ndarray
    soft_dice: np.ndarray

    def take(self, rows: np.ndarray) -> "Signals":
        """Those of some masks: (K,) places or (N,) bool."""
        return Signals(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    @property
    def confidence(self) -> np.ndarray:
        """(N,) float in [0, 1], by which images of one decision are ranked."""
        return np.where(self.decided, self.agreement * self.soft_dice, 1 - self.score)


def signals(data: Tables, rule: Rule) -> Signals:
    """Read the signals for a rule's masks off the tables."""
    area, _ = tables.filtered(data, rule)
    return Signals(
        decided=area > 0,
        area=area,
        score=image_score(data.histogram),
        agreement=data.agreement[:, data.place(rule.threshold)].astype(np.float64),
        soft_dice=soft_dice(data.histogram, level(rule.threshold)),
    )


def soft_dice(histogram: np.ndarray, at: int) -> np.ndarray:
    """Dice of the mask of all pixels of a level or more, if the probabilities were true.

    Args:
        histogram: (..., 256) int, pixels by quantised probability.
        at: the level, 1 .. 256.

    Returns:
        (...) float64 in [0, 1]; 0 where no pixel is of that level.
    """
    inside, area = histogram[..., at:] @ PROBABILITY[at:], histogram[..., at:].sum(axis=-1)
    return 2 * inside / np.maximum(area + histogram @ PROBABILITY, 1)


@dataclass(frozen=True)
class Trust:
    """Expected Dice as a rising function of confidence, one for images decided negative and one for positive ones.

    Attributes:
        knots: for negative, then positive: ascending confidences and the Dice at each, of equal length; linear
            between, constant beyond.
    """

    knots: tuple[tuple[tuple[float, ...], tuple[float, ...]], tuple[tuple[float, ...], tuple[float, ...]]]

    def expected_dice(self, found: Signals) -> np.ndarray:
        """(N,) float in [0, 1]."""
        negative, positive = (np.interp(found.confidence, *knots) for knots in self.knots)
        return np.where(found.decided, positive, negative)


def fit(found: Signals, dice: np.ndarray) -> Trust:
    """Learn the two functions from cases with known Dice: isotonic regression."""
    return Trust(tuple(_rising(found.confidence[some], dice[some], dice) for some in (~found.decided, found.decided)))


def cross_fitted(found: Signals, dice: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(N,) expected Dice of each case, learned on the other folds."""
    expected = np.empty(len(dice))
    for fold in np.unique(folds):
        inside = folds == fold
        expected[inside] = fit(found.take(~inside), dice[~inside]).expected_dice(found.take(inside))
    return expected


def risk_coverage(expected: np.ndarray, dice: np.ndarray) -> dict[str, np.ndarray]:
    """Mean Dice of what is left when the images of lowest expected Dice are referred to a reader.

    Images of one expected Dice come in any order: each counts as the mean of them.

    Returns:
        (N,) each, by share kept: "coverage" in (0, 1], "dice" of the kept, "oracle": the same had the true Dice
        chosen, "random": had chance.
    """
    count = np.arange(1, len(dice) + 1)

    def kept(by: np.ndarray) -> np.ndarray:
        _, place, size = np.unique(by, return_inverse=True, return_counts=True)
        alike = (np.bincount(place, weights=dice) / size)[place]
        return alike[np.argsort(-by, kind="stable")].cumsum() / count

    return {
        "coverage": count / len(dice),
        "dice": kept(expected),
        "oracle": kept(dice),
        "random": np.full(len(dice), dice.mean()),
    }


def _rising(
    confidence: np.ndarray, dice: np.ndarray, everything: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Knots of the rising function closest to the points; without points, the mean of `everything`."""
    if not len(dice):
        return (0.0,), (float(np.mean(everything)),)
    at, place = np.unique(confidence, return_inverse=True)
    weight = np.bincount(place)
    result = isotonic_regression(np.bincount(place, weights=dice) / weight, weights=weight)
    ends = np.unique(np.concatenate([result.blocks[:-1], result.blocks[1:] - 1]))  # both ends of each flat stretch
    return tuple(at[ends].tolist()), tuple(result.x[ends].tolist())
