"""A recipe of configs.toml as frozen dataclasses: every tunable number of the program, strictly checked.

A mistake is an error that names the dotted key and the nearest valid one. Imports errors.
"""

import difflib
import json
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pneumo.errors import UsageError

Positive = "[1, inf)"
Share = "[0, 1]"
NotNegative = "[0, inf)"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldsConfig:
    """How the training images are split."""

    count: Annotated[int, "[2, inf)"]
    group: Literal["patient", "image"]
    area_bins: Annotated[int, Positive]
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
        if len(self.decoder_channels) != 5 or min(self.decoder_channels) < 1:
            raise UsageError(f"decoder_channels must be 5 positive numbers, got {list(self.decoder_channels)}")


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
    grid_steps: Annotated[int, Positive]
    grid_limit: Annotated[float, "[0, 1)"]
    optical_limit: Annotated[float, "[0, 0.3]"]
    rigid: Annotated[float, Share]
    shift: Annotated[float, "[0, 1)"]
    scale: Annotated[float, "[0, 1)"]
    rotate: Annotated[float, "[0, 180]"]

    def __post_init__(self) -> None:
        if len(self.gamma) != 2 or not 0 < self.gamma[0] <= self.gamma[1]:
            raise UsageError(f"gamma must be [low, high] with 0 < low <= high, got {list(self.gamma)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One training stage of one fold."""

    epochs: Annotated[int, Positive]
    image_size: Annotated[int, "[64, 8192]"]  # at 32 a lone image would be one pixel to the deepest batch norm
    batch_size: Annotated[int, Positive]
    accumulation: Annotated[int, Positive]
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
    positive_fraction: Annotated[float, "(0, 1]"]
    start: str

    def __post_init__(self) -> None:
        if self.image_size % 32:
            near = max(64, round(self.image_size / 32) * 32)
            raise UsageError(f"image_size must be a multiple of 32, got {self.image_size}; nearest: {near}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a run is run; nothing here but `amp` and `compile` changes the weights of best.pt."""

    amp: Literal["auto", "bf16", "fp16", "off"]
    compile: Literal["auto", "on", "off"]
    ema: Annotated[float, "[0, 1)"]
    keep_best: Annotated[int, Positive]
    checkpoint_minutes: Annotated[float, "(0, inf)"]
    checkpoint_steps: Annotated[int, NotNegative]
    nonfinite_steps: Annotated[int, Positive]
    timeout_seconds: Annotated[float, "(0, inf)"]
    gpu_reserve_gb: Annotated[float, NotNegative]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictConfig:
    """Validation and prediction."""

    batch_size: Annotated[int, Positive]
    mirror: bool
    weights: Literal["best", "ema", "average"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleConfig:
    """The decision rule; areas are pixels of the annotation grid, thresholds multiples of 1/256."""

    threshold: Annotated[float, Share]
    min_area: Annotated[int, NotNegative]
    top_threshold: Annotated[float, Share]
    top_area: Annotated[int, NotNegative]

    def __post_init__(self) -> None:
        for key in ("threshold", "top_threshold"):
            value = getattr(self, key)
            if (value * 256) % 1:
                raise UsageError(f"{key} must be a multiple of 1/256, got {value}; nearest: {round(value * 256) / 256}")


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
    draws: Annotated[int, "[100, inf)"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomConfig:
    """The synthetic data set."""

    train: Annotated[int, Positive]
    test: Annotated[int, Positive]
    side: Annotated[int, "[64, 4096]"]
    positive_fraction: Annotated[float, Share]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that a run depends on."""

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
        if list(self.stage) != list(range(1, len(self.stage) + 1)):
            raise UsageError(f"stage tables must be numbered 1, 2, ... without gaps, got {list(self.stage)}")
        if self.stages > len(self.stage):
            raise UsageError(f"stages: {self.stages} wanted, but only {len(self.stage)} are described")
        if self.stage[1].start == "previous":
            raise UsageError('stage.1.start: there is no stage before the first; "encoder" or a recipe\'s name')

    @property
    def folder(self) -> Path:
        """Where everything that this recipe computes is kept."""
        return Path(self.runs) / self.name

    @property
    def own_stages(self) -> list[int]:
        """Stages trained under this recipe's name: from the last one that starts elsewhere onwards."""
        used = range(1, self.stages + 1)
        first = max(number for number in used if self.stage[number].start != "previous")
        return list(used[first - 1 :])

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


def load(path: Path, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read one recipe.

    Args:
        path: a file like configs.toml.
        name: of a table in it.
        overrides: "key=value" with a dotted key, as "stage.2.lr=1e-4"; typed by the recipe's own value.

    Raises:
        UsageError: the file, the recipe, a key, a type or a range is wrong; names the dotted key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read recipes from {path}: {error}") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    try:
        table = _inherit(document, name, ())
        for override in overrides:
            _override(table, override)
        recipe = _build(Recipe, {"name": name, **table}, "")
    except UsageError as error:
        raise UsageError(f"{path} [{name}] {error}") from None
    return recipe


def dumps(recipe: Recipe) -> str:
    """The resolved recipe as TOML that `load` reads again."""
    lines: list[str] = []

    def emit(table: Mapping[str, Any], where: str) -> None:
        lines.append(f"[{where}]")
        for key, value in table.items():
            if not isinstance(value, dict):
                lines.append(f"{key} = {json.dumps(value)}")  # JSON's scalars and lists are TOML's
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


def stage_settings(recipe: Recipe, stage: int) -> dict[str, Any]:
    """All that decides the weights of a stage, flat, by dotted key: what a resumed run must agree with."""
    table = asdict(recipe)
    parts = {key: table[key] for key in ("seed", "folds", "model", "augment", "rule")}
    del parts["model"]["checkpointing"]  # changes memory and time alone
    parts["data"] = {"annotation_size": recipe.data.annotation_size}
    parts["train"] = {key: table["train"][key] for key in ("amp", "compile", "ema", "keep_best")}
    parts["predict"] = {"batch_size": recipe.predict.batch_size}
    parts["stage"] = {str(stage): table["stage"][stage]}
    return dict(_flatten(parts, ""))


def _flatten(table: Mapping[str, Any], where: str) -> Any:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", list(value) if isinstance(value, tuple) else value


def _inherit(document: Mapping[str, Any], name: str, above: tuple[str, ...]) -> dict[str, Any]:
    """Resolve `base` and return a recipe's own copy of its table."""
    if name not in document or not isinstance(document[name], dict):
        raise UsageError(f"no recipe {name!r}{_near(name, document)}; there are: {', '.join(document)}")
    if name in above:
        raise UsageError(f"base: a circle, {' -> '.join((*above, name))}")
    table = {key: value for key, value in document[name].items() if key != "base"}
    base = document[name].get("base")
    return _merge(_inherit(document, base, (*above, name)) if base is not None else {}, table)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged.get(key, {}), value) if both or isinstance(value, dict) else value
    return merged


def _override(table: dict[str, Any], override: str) -> None:
    """Set one "dotted.key=value" in place."""
    key, equals, text = override.partition("=")
    key, text = key.strip(), text.strip()
    if not equals:
        raise UsageError(f"--set {override}: expected key=value")
    *path, last = key.split(".")
    for part in path:
        if not isinstance(table.get(part), dict):
            raise UsageError(f"--set {override}: unknown key {key}{_near(part, table)}")
        table = table[part]
    if last not in table:
        raise UsageError(f"--set {override}: unknown key {key}{_near(last, table)}")
    old = table[last]
    if isinstance(old, dict):
        raise UsageError(f"--set {override}: {key} is a table; set one of its keys: {', '.join(old)}")
    if isinstance(old, str) and text[:1] not in ('"', "'"):
        table[last] = {"true": True, "false": False}.get(text, text) if last == "pretrained" else text
        return
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text  # a path for `pretrained`; for a number, refused where types are checked


def _build(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as `hint` wants it; `where` is its dotted key."""
    if is_dataclass(hint):
        return _build_table(hint, value, where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number = _build(arguments[0], value, where)
        if not _inside(number, arguments[1]):
            raise UsageError(f"{where} must be in {arguments[1]}, got {number}")
        return number
    if origin is Literal:
        if value not in arguments:
            raise UsageError(f"{where}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where}: expected a list, got {value!r}")
        return tuple(_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict) or not value:
            raise UsageError(f"{where}: expected tables [{where}.1], [{where}.2], ..., got {value!r}")
        if bad := [key for key in value if not str(key).isdecimal()]:
            raise UsageError(f"{where}.{bad[0]}: expected a number")
        return {int(key): _build(arguments[1], value[key], f"{where}.{key}") for key in sorted(value, key=int)}
    if origin in (Union, types.UnionType):
        if type(value) not in arguments:
            names = " or ".join(kind.__name__ for kind in arguments)
            raise UsageError(f"{where}: expected {names}, got {value!r}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # exactly, so that true is not an int
        raise UsageError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _build_table(cls: type, table: Any, where: str) -> Any:
    """Build dataclass `cls` from a TOML table, refusing unknown and missing keys."""
    if not isinstance(table, dict):
        raise UsageError(f"{where}: expected a table, got {table!r}")
    hints = get_type_hints(cls, include_extras=True)
    prefix = f"{where}." if where else ""
    for key in sorted(map(str, table.keys() - hints.keys())):
        raise UsageError(f"unknown key {prefix}{key}{_near(key, hints)}")
    if missing := [field.name for field in fields(cls) if field.name not in table]:
        raise UsageError(f"missing key {prefix}{missing[0]}")
    values = {key: _build(hints[key], item, f"{prefix}{key}") for key, item in table.items()}
    try:
        return cls(**values)
    except UsageError as error:  # from __post_init__, which does not know its table's name
        raise UsageError(f"{prefix}{error}") from None


def _inside(number: float, interval: str) -> bool:
    low, high = (float(part) for part in interval[1:-1].split(","))
    above = number > low if interval[0] == "(" else number >= low
    below = number < high if interval[-1] == ")" else number <= high
    return above and below


def _near(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, map(str, known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
