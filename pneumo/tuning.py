"""The rule chosen on out-of-fold predictions, as a file that prediction reads: rule.toml.

Imports config, dataset, oof, decision, ensemble, checkpoint, log, errors.
"""

import math
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pneumo import checkpoint, config, log, oof
from pneumo.config import Recipe
from pneumo.dataset import Dataset
from pneumo.decision import metrics, trust, tune
from pneumo.decision.rule import Rule
from pneumo.decision.trust import Signals, Trust
from pneumo.decision.tune import Tuned
from pneumo.ensemble import Ensemble
from pneumo.errors import DataError, UsageError, one_line
from pneumo.oof import OutOfFold


@dataclass(frozen=True)
class Ruling:
    """The rule that a prediction uses.

    Attributes:
        rule: itself.
        source: the file it came from, or "recipe".
        trust: expected Dice from confidence, as learned out of fold under this rule; None if nobody learned it.
        predicted: what `_predicted` gave when it was chosen; None if no predictions chose it.
    """

    rule: Rule
    source: str
    trust: Trust | None
    predicted: dict[str, Any] | None = None


def run(recipe: Recipe, data: Dataset) -> Tuned:
    """Choose a rule on the recipe's out-of-fold predictions, print what it is worth, write rule.toml."""
    found = oof.load(recipe, data)
    tuned = search(recipe, found)
    baseline = Rule.of(recipe.rule)
    dice = metrics.bootstrap_means(tuned.dice[None], found.groups, draws=recipe.tune.draws, seed=recipe.seed)[0]
    gain = tuned.gain(found.groups, draws=recipe.tune.draws, seed=recipe.seed)
    positive = found.tables.positive
    all_empty = float((~positive).mean())
    held_out = held_out_signals(found, tuned)
    shares = _shares(positive, held_out.decided)
    plateau = int(tuned.choice.plateau.sum())
    in_sample = _shares(positive, trust.signals(found.tables, tuned.rule).decided)
    log.say(
        f"{len(found.image_ids)} cases of {len(tuned.fold_rules)} folds, {tuned.choice.plateau.size:,} rules",
        f"recipe's rule    {describe(baseline)}: mean Dice {tuned.baseline.mean():.4f} (all masks empty: "
        f"{all_empty:.4f})",
        f"chosen rule      {describe(tuned.rule)}, on a plateau of {plateau:,} rule{'s' if plateau > 1 else ''}",
        f"cross-fitted     mean Dice {dice}; in-sample {tuned.in_sample:.4f}, optimism {tuned.optimism:+.4f}",
        "by image         "
        + ", ".join(
            f"{name} {_number(value)} (in-sample {_number(in_sample[name])})" for name, value in shares.items()
        ),
        f"gain             {gain.signed} over the recipe's rule, paired",
    )
    for warning in doubts(recipe, found, tuned):
        log.warn(warning)
    learned = trust.fit(held_out, tuned.dice)  # under the chosen rule itself these cases score too well
    path = recipe.folder / "rule.toml"
    measured = {
        "cases": len(found.image_ids),
        "objective": recipe.tune.objective,
        **({} if recipe.tune.objective == "dice" else {"target": recipe.tune.target}),
        "dice_cross_fitted": dice.value,
        **({"dice_interval": [dice.low, dice.high]} if dice.has_ends else {}),
        "dice_in_sample": tuned.in_sample,
        "dice_recipe": float(tuned.baseline.mean()),
        "gain": gain.value,
        **({"gain_interval": [gain.low, gain.high]} if gain.has_ends else {}),
        "all_empty": all_empty,
        **{f"{name}_cross_fitted": value for name, value in shares.items() if value is not None},
    }
    write(path, Ruling(tuned.rule, str(path), learned, _predicted(recipe)), measured, found.sources)
    log.say(f"{path}: predict.py uses it from now on; --rule recipe goes back to the recipe's")
    return tuned


def search(recipe: Recipe, found: OutOfFold) -> Tuned:
    """Tune on out-of-fold predictions as the recipe says."""
    settings = recipe.tune
    return tune.tune(
        found.tables,
        found.folds,
        oof.grid(recipe),
        Rule.of(recipe.rule),
        objective=settings.objective,
        target=settings.target,
        tolerance=settings.tolerance,
    )


def doubts(recipe: Recipe, found: OutOfFold, tuned: Tuned) -> list[str]:
    """Why the chosen rule may not be worth using, or another be better; a sentence each."""
    said = []
    if missing := sorted(set(range(recipe.folds.count)) - set(found.folds.tolist())):
        said.append(
            f"no out-of-fold predictions of fold {', '.join(map(str, missing))}: the rule is chosen without, and "
            f"prediction can use it with --folds {','.join(map(str, np.unique(found.folds)))} only. To make them: "
            f"{recipe.command('cv')}"
        )
    settings, choice, positive = recipe.tune, tuned.choice, found.tables.positive
    grid, own = tuned.grid, Rule.of(recipe.rule)
    gain = tuned.gain(found.groups, draws=settings.draws, seed=recipe.seed)
    fulfils = settings.objective == "dice" or (  # else the recipe's rule is no alternative
        _shares(positive, trust.signals(found.tables, own).decided)[settings.objective] >= settings.target
    )
    if gain.value < 0 and fulfils:
        verb, then = ("is worse than", "use") if gain.high < 0 else ("gains nothing over", "as good may be")
        said.append(
            f"the chosen rule {verb} the recipe's on folds that had no say in it ({gain.signed}): {then} --rule recipe"
        )
    marks = trust.signals(found.tables, tuned.rule).decided.any()
    if not marks:
        said.append("the chosen rule leaves every mask empty: nothing that the networks find is worth marking")
    if settings.objective == "dice":
        over = metrics.bootstrap_means(
            (tuned.dice - ~positive)[None], found.groups, draws=settings.draws, seed=recipe.seed
        )[0]
        if over.value <= 0:
            said.append("on folds that had no say in it, the chosen rule is no better than leaving all masks empty")
        elif marks and not over.low > 0:
            said.append(
                f"on folds that had no say in it, the chosen rule is not clearly better than leaving all masks empty: "
                f"{over.signed}"
            )
    else:
        goal = f"a {settings.objective} of {settings.target}"
        if not choice.reached:
            said.append(f"no rule reaches {goal}; the rules that come closest were taken")
        elif tuned.short:
            folds = " or ".join(map(str, tuned.short))
            said.append(f"{goal} is reached by no rule on all folds but {folds}; those that come closest score these")
        share = _shares(positive, held_out_signals(found, tuned).decided)[settings.objective]
        if share is not None and share < settings.target:
            said.append(
                f"{goal} is missed on folds that had no say in the rule, where it is {share:.4f}: expect no more on "
                f"new images, or ask for more by a higher tune.target"
            )
    edges = [
        f"{name}={value}, the {end} tried"
        for name, value, edge, end in (
            ("threshold", tuned.rule.threshold, grid.thresholds[0], "smallest"),
            ("threshold", tuned.rule.threshold, grid.thresholds[-1], "largest"),
            ("min_area", tuned.rule.min_area, grid.min_areas[-1], "largest"),
            ("top_area", tuned.rule.top_area if tuned.rule.top_threshold else -1, grid.top_areas[-1], "largest"),
        )
        if value == edge != getattr(own, name)
    ]
    if edges:
        keys = " and ".join(f"rule.{edge.partition('=')[0]}" for edge in edges)
        said.append(
            f"the chosen rule stands on the edge of the grid ({'; '.join(edges)}): a better one may lie beyond. To try "
            f"one there, set {keys} to it, and run again, with that in SET: {recipe.command('oof')} and "
            f"{recipe.command('tune')}"
        )
    return said


def held_out_signals(found: OutOfFold, tuned: Tuned) -> Signals:
    """The signals of each case under the rule that its fold had no say in."""
    parts = []
    order = []
    for fold, rule in zip(np.unique(found.folds), tuned.fold_rules, strict=True):
        rows = np.flatnonzero(found.folds == fold)
        parts.append(trust.signals(found.tables.take(rows), rule))
        order.append(rows)
    back = np.argsort(np.concatenate(order))
    return Signals(
        *(np.concatenate([getattr(part, name) for part in parts])[back] for name in Signals.__dataclass_fields__)
    )


def write(path: Path, ruling: Ruling, measured: dict[str, Any], sources: dict[str, str]) -> None:
    """Write a rule with what is known of it."""
    negative, positive = ruling.trust.knots
    sections = {
        "rule": asdict(ruling.rule),
        "measured": measured,
        **({} if ruling.predicted is None else {"predicted": ruling.predicted}),
        "trust.negative": {"confidence": negative[0], "dice": negative[1]},
        "trust.positive": {"confidence": positive[0], "dice": positive[1]},
        "checkpoints": sources,
    }
    lines = ["# Chosen on out-of-fold predictions; predict.py uses it with these checkpoints only."]
    for name, table in sections.items():
        lines += ["", f"[{name}]", *(f"{_key(key)} = {config.toml(value)}" for key, value in table.items())]
    checkpoint.write_atomic(path, "\n".join(lines).encode() + b"\n")


def ruling_for(recipe: Recipe, models: Ensemble, choice: str) -> Ruling:
    """The rule to predict with.

    Args:
        choice: "auto": rule.toml of the recipe's run folder if it is there, else the recipe's; "recipe"; or a file,
            whose rule is used on any predictions, with a warning, but its trust on those only that it was learned on.

    Raises:
        UsageError: rule.toml was chosen for other checkpoints, with other weights of them, without the mirror, or on
            another annotation grid.
        DataError: the file is wrong.
    """
    own = recipe.folder / "rule.toml"
    if choice == "recipe" or (choice == "auto" and not own.exists()):
        return Ruling(Rule.of(recipe.rule), "recipe", None)
    path = own if choice == "auto" else Path(choice)
    ruling, sources = read(path, Rule.of(recipe.rule))
    trouble = misfit(recipe, ruling, sources, models.sources)
    if trouble and choice == "auto":
        raise UsageError(f"{path} {trouble}, or use --rule recipe")
    if trouble and sources:  # a file with nothing but a rule claims nothing
        log.warn(f"{path} {trouble}. Its rule is used as you ask, without expected Dice, which was learned on others")
    return replace(ruling, trust=None) if trouble else ruling  # which was learned on other predictions


def misfit(recipe: Recipe, ruling: Ruling, chosen_for: dict[str, str], used: dict[str, str]) -> str:
    """Why a rule does not fit the predictions of a recipe, and what to do; "" if it does.

    Args:
        ruling, chosen_for: from `read`.
        used: sha256 by path of the checkpoints that predict.
    """
    commands = f"{recipe.command('oof')} and {recipe.command('tune')}"
    again, now = f"Run again: {commands}", _predicted(recipe)
    if ruling.predicted is None or not now.keys() <= ruling.predicted.keys():
        return f"is of an earlier version and does not say whether it was chosen with {_settings(now)}. {again}"
    if other := [key for key in now if ruling.predicted[key] != now[key]]:
        theirs, mine = (_settings({key: settings[key] for key in other}) for settings in (ruling.predicted, now))
        return f"was chosen on predictions with {theirs}, not {mine}. Set those, or run again: {commands}"
    if not set(used.values()) <= set(chosen_for.values()):
        return f"was chosen for other checkpoints than {', '.join(used)}. {again}"
    return ""


def _predicted(recipe: Recipe) -> dict[str, Any]:
    """What a rule is for besides the checkpoints; its areas are pixels of the annotation grid."""
    return {
        "weights": recipe.predict.weights,
        "mirror": recipe.predict.mirror,
        "annotation_size": recipe.data.annotation_size,
    }


def _settings(predicted: dict[str, Any]) -> str:
    table = {"annotation_size": "data"}
    return " ".join(
        f"{table.get(key, 'predict')}.{key}={config.toml(value).strip(chr(34))}" for key, value in predicted.items()
    )


def read(path: Path, base: Rule | None = None) -> tuple[Ruling, dict[str, str]]:
    """Read what `write` wrote; a file with nothing but [rule] will do.

    Args:
        base: has what the file's [rule] leaves out; None: `Rule()`.

    Raises:
        DataError: no such file, or not such a file; names the key.
    """
    try:
        if not path.is_file():  # to open a pipe is to wait for ever
            raise DataError(f"{path}: no such rule file")
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, no TOML, numbers and brackets without end
        raise DataError(f"{path}: not a rule file: {one_line(error)}") from None
    try:
        table = document["rule"]
        if odd := table.keys() - asdict(Rule()).keys():
            raise ValueError(f"unknown key rule.{min(odd)}")
        kinds = {"threshold": float, "top_threshold": float, "min_area": int, "top_area": int}
        for key, value in table.items():
            if type(value) is not kinds[key] and not (kinds[key] is float and type(value) is int):
                raise ValueError(f"rule.{key}: expected {kinds[key].__name__}, got {value!r}")
        rule = replace(base or Rule(), **table)
        learned = None
        if "trust" in document:
            knots = [document["trust"][side] for side in ("negative", "positive")]
            learned = Trust(tuple((tuple(map(float, k["confidence"])), tuple(map(float, k["dice"]))) for k in knots))
            if any(len(at) != len(value) or not at or list(at) != sorted(at) for at, value in learned.knots):
                raise ValueError("trust: confidence must rise, and have as many values as dice")
            for at, value in learned.knots:
                if not all(map(math.isfinite, at)) or not all(0 <= dice <= 1 for dice in value):
                    raise ValueError("trust: confidence must be of finite numbers, dice of numbers from 0 to 1")
        sources = {str(key): str(value) for key, value in document.get("checkpoints", {}).items()}
        predicted = document.get("predicted")
        if predicted is not None and not all(isinstance(value, (str, int)) for value in predicted.values()):
            raise ValueError("predicted: expected texts, whole numbers, true or false")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:  # the last of endless numbers
        reason = f"no [{error.args[0]}]" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: not a rule file: {one_line(reason)}") from None
    return Ruling(rule, str(path), learned, predicted), sources


def describe(rule: Rule) -> str:
    """A rule in words."""
    top = f", positive if > {rule.top_area:,} px above {rule.top_threshold:g}" if rule.top_threshold else ""
    return f"threshold {rule.threshold:g}, components > {rule.min_area:,} px{top}"


def _shares(positive: np.ndarray, decided: np.ndarray) -> dict[str, float | None]:
    """Sensitivity and specificity of (N,) decisions by image; None where there is no case."""
    return {
        name: float(right.mean()) if len(right) else None
        for name, right in (("sensitivity", decided[positive]), ("specificity", ~decided[~positive]))
    }


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _key(key: str) -> str:
    return key if key.isidentifier() and key.isascii() else config.toml(key)
