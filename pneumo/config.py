"""A recipe of configs.toml as frozen dataclasses: every tunable number of the program, strictly checked.

A mistake is an error that names the file, the section, the key, its value and what is allowed, and of an unknown key
the nearest known one. Imports errors.
"""

import difflib
import os
import re
import shlex
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from pneumo.errors import UsageError, one_line

Positive = "[1, inf)"
Batch = "[1, 65536]"
Share = "[0, 1]"
NotNegative = "[0, inf)"

_SHOWN = 5  # keys in a message
_MOST = 120  # letters of overrides in a command that is suggested
_MORE = "..."  # stands for more

BY_FOLD = "file by fold"  # begins what is said of pretrained weights that each fold has its own of

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")  # of a recipe: it becomes a folder's
_INDIFFERENT = {"model.upsample", "train.amp", "train.compile"}  # to networks that work together


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where the X-rays and their annotations are."""

    root: str
    train: str
    test: str
    annotations: str
    sample: str
    patients: str
    annotation_size: Annotated[int, "[32, 8192]"]
    allow_missing: bool
    unmasked: Literal["leave", "empty"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldsConfig:
    """How the training images are split."""

    count: Annotated[int, "[2, 1000]"]
    group: Literal["patient", "image"]
    area_bins: Annotated[int, "[1, 1000]"]
    duplicate_correlation: Annotated[float, "(0, 1]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The network."""

    encoder: str
    pretrained: bool | str
    decoder_channels: tuple[int, ...]
    upsample: Literal["auto", "merged", "plain"]
    checkpointing: bool

    def __post_init__(self) -> None:
        if len(self.decoder_channels) != 5 or not all(1 <= count <= 4096 for count in self.decoder_channels):
            raise UsageError(f"decoder_channels must be 5 numbers from 1 to 4096, got {list(self.decoder_channels)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """Ranges and probabilities of the training augmentation."""

    flip: Annotated[float, Share]
    intensity: Annotated[float, Share]
    contrast: Annotated[float, "[0, 1)"]
    gamma: tuple[float, ...]
    brightness: Annotated[float, "[0, 1)"]
    distort: Annotated[float, Share]
    elastic_alpha: Annotated[float, NotNegative]
    elastic_sigma: Annotated[float, "(0, inf)"]
    elastic_affine: Annotated[float, NotNegative]
    grid_steps: Annotated[int, "[1, 1000]"]
    grid_limit: Annotated[float, "[0, 1)"]
    optical_limit: Annotated[float, "[0, 0.3]"]
    rigid: Annotated[float, Share]
    shift: Annotated[float, "[0, 1)"]
    scale: Annotated[float, "[0, 1)"]
    rotate: Annotated[float, "[0, 180]"]

    def __post_init__(self) -> None:
        if len(self.gamma) != 2 or not 0 < self.gamma[0] <= self.gamma[1] <= 10:
            raise UsageError(f"gamma must be [low, high] with 0 < low <= high <= 10, got {list(self.gamma)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One training stage of one fold."""

    epochs: Annotated[int, "[1, 100000]"]
    image_size: Annotated[int, "[64, 8192]"]  # at 32 a lone image would be one pixel to the deepest batch norm
    batch_size: Annotated[int, Batch]
    accumulation: Annotated[int, Batch]
    loss: Literal["focal_dice", "bce_dice", "lovasz"]
    focal_weight: Annotated[float, NotNegative]
    gamma: Annotated[float, NotNegative]
    smooth: Annotated[float, "(0, inf)"]
    lr: Annotated[float, "(0, inf)"]
    weight_decay: Annotated[float, NotNegative]
    schedule: Literal["plateau", "cosine"]
    factor: Annotated[float, "(0, 1)"]
    patience: Annotated[int, NotNegative]
    plateau_threshold: Annotated[float, NotNegative]
    negatives: Literal["fixed", "fresh"]
    positive_fraction: Annotated[float, "[0.001, 1]"]
    start: str

    def __post_init__(self) -> None:
        if self.image_size % 32:
            near = max(64, round(self.image_size / 32) * 32)
            raise UsageError(f"image_size must be a multiple of 32, got {self.image_size}; nearest: {near}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a run is run; beyond last digits nothing here but `amp`, `ema` and `keep_best` changes what it gives."""

    amp: Literal["auto", "bf16", "fp16", "off"]
    compile: Literal["auto", "on", "off", "graph"]
    ema: Annotated[float, "[0, 1)"]
    keep_best: Annotated[int, Positive]
    checkpoint_minutes: Annotated[float, "(0, inf)"]
    checkpoint_steps: Annotated[int, NotNegative]
    nonfinite_steps: Annotated[int, Positive]
    timeout_seconds: Annotated[float, "(0, 1e6]"]
    gpu_reserve_gb: Annotated[float, "[0, 1e6]"]

    @property
    def gpu_reserve(self) -> int:
        """The same in bytes."""
        return int(self.gpu_reserve_gb * 2**30)


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictConfig:
    """Validation and prediction."""

    batch_size: Annotated[int, "[0, 65536]"]
    mirror: bool
    weights: Literal["best", "last", "ema", "average"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleConfig:
    """The decision rule; areas are pixels of the annotation grid, thresholds multiples of 1/256."""

    threshold: Annotated[float, "(0, 1]"]
    min_area: Annotated[int, NotNegative]
    top_threshold: Annotated[float, Share]
    top_area: Annotated[int, NotNegative]

    def __post_init__(self) -> None:
        for key in ("threshold", "top_threshold"):
            value = getattr(self, key)
            if (value * 256) % 1:
                nearest = max(round(value * 256), key == "threshold") / 256
                raise UsageError(f"{key} must be a multiple of 1/256, got {value}; nearest: {nearest}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """How a rule is chosen on out-of-fold predictions."""

    thresholds: Annotated[int, "[1, 241]"]
    min_areas: Annotated[int, "[3, 1000]"]
    top_thresholds: Annotated[int, "[2, 185]"]
    top_areas: Annotated[int, "[3, 1000]"]
    objective: Literal["dice", "sensitivity", "specificity"]
    target: Annotated[float, Share]
    tolerance: Annotated[float, NotNegative]
    draws: Annotated[int, "[100, 100000]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomConfig:
    """The synthetic data set."""

    train: Annotated[int, "[1, 1000000]"]
    test: Annotated[int, "[1, 1000000]"]
    side: Annotated[int, "[64, 4096]"]
    positive_fraction: Annotated[float, Share]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run depends on.

    Attributes:
        typed: the overrides as they were given, for commands that are suggested; no part of what is run or compared.
        file: that the recipe is from, likewise; "" where commands find it themselves.
    """

    typed: ClassVar[tuple[str, ...]] = ()
    file: ClassVar[str] = ""
    name: str
    seed: Annotated[int, NotNegative]
    runs: str
    stages: Annotated[int, Positive]
    data: DataConfig
    folds: FoldsConfig
    model: ModelConfig
    augment: AugmentConfig
    stage: dict[int, StageConfig]
    train: TrainConfig
    predict: PredictConfig
    rule: RuleConfig
    tune: TuneConfig
    phantom: PhantomConfig

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(f"name must be of A-Z, a-z, 0-9, dot, underscore and hyphen, got {self.name!r}")
        if list(self.stage) != list(range(1, len(self.stage) + 1)):
            raise UsageError(f"stage must have tables numbered 1, 2, ... without gaps, got {list(self.stage)}")
        if self.stages > len(self.stage):
            raise UsageError(f"stages is {self.stages}, but only {len(self.stage)} are described")
        if self.stage[1].start == "previous":
            raise UsageError('stage.1.start is "previous", but there is no stage before the first')
        for number, stage in self.stage.items():
            if stage.start == self.name:
                way = '"previous"' if number > 1 else '"encoder"'
                raise UsageError(f"stage.{number}.start is this recipe itself; {way} is meant, or another recipe")
            if not _NAME.fullmatch(stage.start):
                raise UsageError(f'stage.{number}.start must be "encoder", "previous" or a recipe, got {stage.start!r}')

    @property
    def folder(self) -> Path:
        """Where everything that this recipe computes is kept."""
        return Path(self.runs) / self.name

    def with_weights(self, weights: str) -> "Recipe":
        """The same but for `predict.weights`."""
        other = replace(self, predict=replace(self.predict, weights=weights))
        object.__setattr__(other, "typed", (*self.typed, f"predict.weights={weights}"))
        object.__setattr__(other, "file", self.file)
        return other

    def pretrained(self, fold: int) -> bool | str:
        """`model.pretrained` for a fold, whose number stands in a path for {fold}."""
        given = self.model.pretrained
        return given.replace("{fold}", str(fold)) if isinstance(given, str) else given

    @property
    def own_stages(self) -> list[int]:
        """Stages trained under this recipe's name: from the last one that starts elsewhere onwards."""
        used = range(1, self.stages + 1)
        first = max(number for number in used if self.stage[number].start != "previous")
        return list(used[first - 1 :])

    def command(self, target: str, *overrides: str, recipe: str = "") -> str:
        """What to type for a target of the Makefile, as make cv RECIPE=demo SET=stage.1.lr=1e-4.

        Args:
            overrides: besides those that were typed for this recipe, or in their place.
            recipe: the name of another one, for which the same was typed.
        """
        name = recipe or self.name
        keys = {override.partition("=")[0] for override in overrides}
        if recipe and recipe != self.name:  # where this one starts from concerns no other
            keys |= {f"stage.{number}.start" for number in self.stage}
        typed = _brief([word for word in self.typed if word.partition("=")[0].strip() not in keys])
        words = " ".join([*typed, *overrides])
        plain = len(words.split()) == 1 and "'" not in words and words != _MORE
        setting = "" if not words else f" SET={words}" if plain else f' SET="{words}"'
        quoted = shlex.quote(self.file)
        file = "" if not self.file else f" CONFIG={quoted}" if quoted == self.file else f' CONFIG="{quoted}"'
        return f"make {target}" + ("" if name == "seed" else f" RECIPE={name}") + file + setting

    def program(self, command: str) -> str:
        """As `command`, for options that the Makefile does not pass: python -m pneumo folds --recipe demo."""
        file = ["--config", shlex.quote(self.file)] if self.file else []
        overrides = ["--set", *_brief(self.typed)] if self.typed else []
        return " ".join(["python -m pneumo", command, *file, "--recipe", self.name, *overrides])

    def stage_folder(self, fold: int, stage: int) -> Path:
        """The run folder of one stage of one fold: holds last.pt, best.pt, log.jsonl, ..."""
        return self.folder / f"fold{fold}" / f"stage{stage}"

    def start_folder(self, fold: int, stage: int) -> Path | None:
        """The run folder whose best weights `stage` starts from; None if it starts from the encoder."""
        start = self.stage[stage].start
        if start == "encoder":
            return None
        name = self.name if start == "previous" else start
        return Path(self.runs) / name / f"fold{fold}" / f"stage{max(stage - 1, 1)}"


def _brief(overrides: Sequence[str]) -> list[str]:
    """Overrides as words for a shell; so many that nobody would read them are left out."""
    words = [shlex.quote(override) for override in overrides]
    return words if sum(map(len, words)) <= _MOST else [_MORE]


def load(path: Path, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read one recipe.

    Args:
        path: a file like configs.toml.
        name: of a table in it.
        overrides: "key=value" with a dotted key, as "stage.2.lr=1e-4"; typed by the recipe's own value.

    Raises:
        UsageError: the file, the recipe, a key, a type or a range is wrong; says where it stands, and what is allowed.
    """
    try:
        recipe = _load(Path(path), name, overrides)
    except UsageError as error:
        text = one_line(error)
        raise UsageError(f"{path}{' ' if text[:1] == '[' else ': '}{text}") from None
    object.__setattr__(recipe, "typed", tuple(overrides))
    return recipe


def _load(path: Path, name: str, overrides: Sequence[str]) -> Recipe:
    """As `load`; errors do not name the file."""
    try:
        if not path.is_file():  # to open a pipe is to wait for ever
            raise UsageError("no such file. Say --config FILE.")
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 at byte {error.start:,}") from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}") from None
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:  # of numbers of thousands of digits, and brackets as deep
        raise UsageError(f"not valid TOML: {error}") from None
    if loose := [key for key, value in document.items() if not isinstance(value, dict)]:
        raise UsageError(f'"{loose[0]}" stands in no recipe. Put it under [{name}].')
    if name not in document and (kept := _kept(name, overrides)):
        if kept.resolve() == path.resolve():
            held = " or ".join(f"--recipe {title}" for title in document)
            raise UsageError(f"no recipe {name!r}. Say {held}; the folder of its run must be called alike")
        raise UsageError(f"no recipe {name!r}. A run of it kept its own: --config {kept}")
    tables = _lineage(document, name)
    if len(tables) == 1 and name != "seed":
        _check_whole(*tables[0])
    table: dict[str, Any] = {}
    for title, own in reversed(tables):
        if "name" in own:
            raise UsageError(f"[{title}] name: a recipe is called as its table is; remove this key")
        table = _merge(table, own)
    for override in overrides:
        _override(name, table, override)
    _expand_home(table)
    try:
        return _build(Recipe, {"name": name, **table}, "")
    except _Mistake as mistake:
        raise UsageError(mistake.told(tables, overrides)) from None


class _Mistake(Exception):
    """Something is wrong with a key; `before` and `after` its name, they make a sentence.

    Attributes:
        key: dotted, within the recipe.
    """

    def __init__(self, key: str, before: str, after: str) -> None:
        self.key, self.before, self.after = key, before, after

    def told(self, tables: Sequence[tuple[str, dict[str, Any]]], overrides: Sequence[str]) -> str:
        """The sentence, with the place where the key has its value from: an override, a recipe, or a base of it."""
        for override in reversed(overrides):
            if override.partition("=")[0].strip() == self.key:
                return f"[{tables[0][0]}] --set {override}: {self.before}{self.key}{self.after}"
        section, _, last = self.key.rpartition(".")
        name = next(
            (name for name, table in tables if _has(table, self.key.partition("[")[0].split("."))), tables[0][0]
        )
        return f"[{name}{'.' if section else ''}{section}] {self.before}{last}{self.after}"


def dumps(recipe: Recipe) -> str:
    """The resolved recipe as TOML that `load` reads again."""
    lines: list[str] = []

    def emit(table: Mapping[str, Any], where: str) -> None:
        lines.append(f"[{where}]")
        for key, value in table.items():
            if not isinstance(value, dict):
                lines.append(f"{key} = {toml(value)}")
        lines.append("")
        for key, value in table.items():
            if isinstance(value, dict) and all(isinstance(item, dict) for item in value.values()):
                for number, item in value.items():
                    emit(item, f"{where}.{key}.{number}")
            elif isinstance(value, dict):
                emit(value, f"{where}.{key}")

    table = asdict(recipe)
    emit(table, f'"{table.pop("name")}"')
    return "\n".join(lines)


def toml(value: str | float | Sequence[Any]) -> str:
    """A scalar or list as a TOML value, in ASCII: the paths of any user go through any terminal and editor."""
    if isinstance(value, str):
        return f'"{"".join(map(_toml_sign, value))}"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml, value))}]"
    return str(value).lower()  # true, nan, inf


def _toml_sign(sign: str) -> str:
    """One sign within quotes. JSON's escapes will not do: beyond U+FFFF they are two halves, which TOML refuses."""
    if sign in '"\\':
        return f"\\{sign}"
    if " " <= sign <= "~":
        return sign
    return f"\\u{ord(sign):04x}" if sign <= "\uffff" else f"\\U{ord(sign):08x}"


def of_a_launch(recipe: Recipe) -> dict[str, Any]:
    """What processes of a launch must agree in, flat, by dotted key: all but where things lie, and memory kept free."""
    places = {"runs", "data.root", "model.pretrained", "train.gpu_reserve_gb"}
    return {key: value for key, value in _flatten(asdict(recipe), "") if key not in places}


def stage_settings(recipe: Recipe, stage: int) -> dict[str, Any]:
    """All that decides the weights of a stage, flat, by dotted key: what a resumed run must agree with.

    How folds were made is not in it: who is in which fold is compared by itself. Nor are an encoder's weights where
    the stage begins with those of another one.
    """
    table = asdict(recipe)
    parts = {key: table[key] for key in ("seed", "model", "augment", "rule")}
    del parts["model"]["checkpointing"]  # changes memory and time alone
    if recipe.stage[stage].start != "encoder":
        del parts["model"]["pretrained"]
    parts["data"] = {"annotation_size": recipe.data.annotation_size}
    parts["train"] = {key: table["train"][key] for key in ("amp", "compile", "ema", "keep_best")}
    parts["stage"] = {str(stage): table["stage"][stage]}
    return dict(_flatten(parts, ""))


def essential(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a stage's settings those in which networks should agree that work together, in a chain or an ensemble."""
    found = {key: value for key, value in settings.items() if key not in _INDIFFERENT}
    if str(found.get("model.pretrained")).startswith(BY_FOLD):
        found["model.pretrained"] = BY_FOLD
    return found


def _flatten(table: Mapping[str, Any], where: str) -> Any:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", list(value) if isinstance(value, tuple) else value


def _lineage(document: Mapping[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    """A recipe's own table and, one after the other, those of its bases; with their names."""
    found: list[tuple[str, dict[str, Any]]] = []
    while True:
        if name not in document:
            above = [above for above, _ in found]
            near = _near(name, [other for other in document if other not in above])
            where = f"[{above[-1]}] base: " if found else ""
            text = f"{where}no recipe {name!r}.{near} There are: {', '.join(document) or 'none'}"
            if found and not near:
                text += (
                    f". A base must be in the same file: copy [{name}] and its sections into it, or add [{above[0]}] "
                    f"to configs.toml"
                )
            raise UsageError(text)
        if name in [above for above, _ in found]:
            circle = " -> ".join([above for above, _ in found] + [name])
            raise UsageError(f"[{found[-1][0]}] base: a circle, {circle}")
        table = dict(document[name])
        base = table.pop("base", None)
        found.append((name, table))
        if base is None:
            return found
        if not isinstance(base, str):
            raise UsageError(f"[{name}] base: expected a recipe's name, got {base!r}")
        name = base


def _kept(name: str, overrides: Sequence[str]) -> Path | None:
    """The recipe that the last of the stages trained under that name was trained with; None if none was."""
    if not _NAME.fullmatch(name):
        return None
    runs = {"runs": "runs"}
    for override in overrides:
        if override.partition("=")[0].strip() == "runs":
            _override(name, runs, override)
    _expand_home(runs)
    return max(Path(runs["runs"], name).glob("fold*/stage*/config.toml"), default=None)


def _check_whole(name: str, table: Mapping[str, Any]) -> None:
    """Refuse a recipe without a base that leaves out what only a base can give."""
    known = [field.name for field in fields(Recipe) if field.name != "name"]
    if missing := [key for key in known if key not in table]:
        odd = [key for key in table if key not in known]
        what = f'unknown key "{odd[0]}"' if odd else f'missing key "{missing[0]}"'
        raise UsageError(f'[{name}] {what}, and no base: a recipe that does not state everything needs base = "seed"')


def _has(table: Any, path: Sequence[str]) -> bool:
    """Whether nested tables have a key."""
    for part in path:
        if not isinstance(table, dict) or part not in table:
            return False
        table = table[part]
    return True


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict):
            inside = merged.get(key)
            value = _merge(inside if isinstance(inside, dict) else {}, value)
        merged[key] = value
    return merged


def _override(name: str, table: dict[str, Any], override: str) -> None:
    """Set one "dotted.key=value" in place; the value takes the type of the one that was there."""
    where = f"[{name}] --set {override}"
    key, equals, text = override.partition("=")
    key, text = key.strip(), text.strip()
    if not equals:
        raise UsageError(f"{where}: expected key=value; what is none goes before --set")
    parts = key.split(".")
    found: Any = table
    for at, part in enumerate(parts):
        if not isinstance(found, dict) or part not in found:
            raise UsageError(f"{where}: unknown key {key}.{_meant(table, parts, at, found)}")
        inside, found = found, found[part]
    if isinstance(found, dict):
        raise UsageError(f"{where}: {key} is a table; set one of its keys: {', '.join(found)}")
    inside[parts[-1]] = _typed(text, found, parts[-1])


def _meant(table: Mapping[str, Any], parts: Sequence[str], at: int, found: Any) -> str:
    """What an unknown key may stand for, `parts[at]` of which is not in `found`, a value of `table`."""
    known = list(found) if isinstance(found, dict) else []
    if known and all(map(str.isdecimal, known)):
        return f" There are: {', '.join('.'.join([*parts[:at], number]) for number in known[:_SHOWN])}"
    whole = [key for key, _ in _flatten(table, "") if key.rpartition(".")[2] == parts[-1]]
    if whole:
        return f" Did you mean {' or '.join(whole[:_SHOWN])}?"
    return _near_or_all(parts[at], known)


def _expand_home(table: Mapping[str, Any]) -> None:
    """Put the user's home folder for ~ in place, which no shell does behind a key and in a file."""
    for inside, key in ((table.get("data"), "root"), (table.get("model"), "pretrained"), (table, "runs")):
        if isinstance(inside, dict) and isinstance(path := inside.get(key), str) and f"{path}/".startswith("~/"):
            inside[key] = os.path.expanduser(path)


def _typed(text: str, old: Any, key: str) -> Any:
    """A value as text to a value of the type of `old`; what it cannot be stays text, to be refused with all others."""
    if (isinstance(old, bool) or key == "pretrained") and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if isinstance(old, list) or text[:1] in ('"', "'"):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            return text
    if isinstance(old, (int, float)) and not isinstance(old, bool):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _build(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as `hint` wants it; `where` is its dotted key."""
    if is_dataclass(hint):
        return _build_table(hint, value, where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number = _build(arguments[0], value, where)
        if not _inside(number, arguments[1]):
            raise _Mistake(where, "", f" must be in {arguments[1]}, got {number}")
        return number
    if origin is Literal:
        if value not in arguments:
            raise _Mistake(where, "", f": expected one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _Mistake(where, "", f": expected a list, got {value!r}")
        return tuple(_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict) or not value:
            raise _Mistake(where, "", f": expected tables [{where}.1], [{where}.2], ..., got {value!r}")
        if bad := [key for key in value if not re.fullmatch("[1-9][0-9]{0,2}", key)]:
            raise _Mistake(f"{where}.{bad[0]}", "", ": expected a number")
        return {int(key): _build(arguments[1], value[key], f"{where}.{key}") for key in sorted(value, key=int)}
    if origin in (Union, types.UnionType):
        if type(value) not in arguments:
            raise _Mistake(where, "", f": expected {' or '.join(map(_called, arguments))}, got {value!r}")
        return _build(type(value), value, where)
    if type(value) is int and abs(value) >= 2**63:
        raise _Mistake(where, "", " must be a number of 64 bits")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # exactly, so that true is not an int
        raise _Mistake(where, "", f": expected {_called(hint)}, got {value!r}")
    if hint is str and "\0" in value:
        raise _Mistake(where, "", f" must not hold NUL, got {value!r}")
    if hint is str and (half := re.search("[\ud800-\udfff]", value)):  # as Python reads a byte that is not UTF-8
        text = f"{value!r} is not UTF-8 at character {half.start()}; rename the file or folder, or set a link to it"
        raise _Mistake(where, "", f": {text}")
    return value


def _build_table(cls: type, table: Any, where: str) -> Any:
    """Build dataclass `cls` from a TOML table, refusing unknown and missing keys."""
    if not isinstance(table, dict):
        raise _Mistake(where, "", f": expected a table, got {table!r}")
    kinds = get_type_hints(cls, include_extras=True)
    hints = {field.name: kinds[field.name] for field in fields(cls)}
    prefix = f"{where}." if where else ""
    for key in sorted(table.keys() - hints.keys()):
        raise _Mistake(f"{prefix}{key}", 'unknown key "', f'".{_near_or_all(key, hints)}')
    if missing := [name for name in hints if name not in table]:
        raise _Mistake(f"{prefix}{missing[0]}", 'missing key "', '"')
    values = {key: _build(hints[key], item, f"{prefix}{key}") for key, item in table.items()}
    try:
        return cls(**values)
    except UsageError as error:  # from __post_init__, which begins with the key but does not know its table's name
        key, _, text = str(error).partition(" ")
        raise _Mistake(f"{prefix}{key}", "", f" {text}") from None


def _called(kind: type) -> str:
    return "true or false" if kind is bool else kind.__name__


def _inside(number: float, interval: str) -> bool:
    low, high = (float(part) for part in interval[1:-1].split(","))
    above = number > low if interval[0] == "(" else number >= low
    below = number < high if interval[-1] == ")" else number <= high
    return above and below


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


def _near_or_all(word: str, known: Iterable[str]) -> str:
    """The key that is probably meant, else all that there are."""
    known = list(known)
    return _near(word, known) or (f" There are: {', '.join(known)}" if known else "")
