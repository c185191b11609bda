"""Out-of-fold predictions: every training image as the networks see it that did not train on it, kept as tables.

One file for each fold, beside the checkpoints that made it. Imports config, dataset, data, decision, ensemble,
stages, checkpoint, log, dist, errors.
"""

import io
import json
import re
import warnings
import zipfile
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pneumo import checkpoint, config, dataset, dist, ensemble, log, stages
from pneumo.config import Recipe
from pneumo.data.feed import Feed, cut
from pneumo.dataset import Dataset
from pneumo.decision import metrics, tables, tune
from pneumo.decision.rule import LEVELS, Rule, level
from pneumo.decision.tables import Tables
from pneumo.decision.tune import Grid
from pneumo.errors import DataError, UsageError, one_line

FORMAT = 5
ARRAYS = {  # type and shape: N images, T levels, C components
    "levels": ("int64", "T"),
    "histogram": ("int32", "NL"),
    "true_histogram": ("int32", "NL"),
    "agreement": ("float32", "NT"),
    "counts": ("int32", "NT"),
    "area": ("int32", "C"),
    "overlap": ("int32", "C"),
}
ORIGIN = {  # of what a file tells, that is read again
    "checkpoints": dict,
    "data": str,
    "split": str,
    "mirror": bool,
    "image_size": int,
    "annotation_size": int,
    "levels": list,
    "settings": dict,
}


@dataclass(frozen=True)
class OutOfFold:
    """The out-of-fold predictions of a recipe.

    Attributes:
        image_ids: N cases, fold by fold.
        rows: (N,) int64, their places in the data set.
        folds: (N,) int64.
        groups: (N,) int64, cases that are resampled together; see `pneumo.decision.metrics.groups_of`.
        tables: of the N cases.
        sources: sha256 of each checkpoint that predicted.
        encoder: of the networks.
    """

    image_ids: tuple[str, ...]
    rows: np.ndarray
    folds: np.ndarray
    groups: np.ndarray
    tables: Tables
    sources: dict[str, str]
    encoder: str


def path_of(recipe: Recipe, fold: int) -> Path:
    """Where a fold's predictions by the weights that `predict.weights` names are kept."""
    return recipe.stage_folder(fold, recipe.stages) / f"oof-{recipe.predict.weights}.npz"


def grid(recipe: Recipe) -> Grid:
    """The rules that the recipe tries; their thresholds are those that have components in the tables."""
    return tune.make_grid(
        Rule.of(recipe.rule),
        recipe.data.annotation_size,
        thresholds=recipe.tune.thresholds,
        min_areas=recipe.tune.min_areas,
        top_thresholds=recipe.tune.top_thresholds,
        top_areas=recipe.tune.top_areas,
    )


def write(
    recipe: Recipe,
    data: Dataset,
    device: torch.device,
    *,
    folds: Sequence[int] | None = None,
    maps: bool = False,
) -> None:
    """Predict the held-out images of every fold whose last stage is done, unless that has been done already.

    Processes of a launch share the images.

    Args:
        folds: look at these only; None: at all.
        maps: write the quantised probabilities as well, a PNG on the annotation grid for each case, into a folder
            beside the tables.

    Raises:
        UsageError: no fold is done.
        DataError: the networks were trained on other data or another split.
    """
    wanted = range(recipe.folds.count) if folds is None else folds
    done = [fold for fold in wanted if stages.finished(recipe, fold, recipe.stages)]
    folds = dist.broadcast(done)  # process 0 may be about to say that the last one is
    if not folds:
        raise UsageError(f"{recipe.folder}: no fold has finished stage {recipe.stages}. Run: {recipe.command('cv')}")
    for fold in folds:
        models = ensemble.load(recipe, [fold], device)
        origin = {
            "format": FORMAT,
            "checkpoints": models.sources,
            "mirror": models.mirror,
            "image_size": models.image_size,
            "annotation_size": recipe.data.annotation_size,
            "autocast": str(models.dtype),
            "batch_size": models.batch_size,
            "data": models.data,
            "split": models.split,
            "levels": [level(threshold) for threshold in grid(recipe).thresholds],
            "settings": models.settings,
        }
        if (data.digest, data.split) != (models.data, models.split):
            raise DataError(f"{', '.join(models.sources)}: {_of_other_data(recipe)}")
        path = path_of(recipe, fold)
        if not maps and dist.broadcast(_is_current(path, origin, _command(recipe))):
            log.say(f"{path}: there already")
            continue
        _write_fold(recipe, data, fold, models, origin, device, maps)
        dist.wait_for_main()  # it joins and writes alone


def _command(recipe: Recipe) -> str:
    """What makes the predictions of a recipe."""
    weights = recipe.predict.weights
    return recipe.command("oof", *(() if weights == "best" else (f"predict.weights={weights}",)))


def _of_other_data(recipe: Recipe) -> str:
    """What is said of networks that saw other data than there are now."""
    return (
        f"trained on other images, annotations or folds than {recipe.data.root} and {recipe.folder / 'folds.csv'} now "
        f"hold; their predictions would not be out of fold. Delete the folders fold0 to "
        f"fold{recipe.folds.count - 1} of {recipe.folder} and run: {recipe.command('cv')}; or keep them, and train "
        f"into another folder: {recipe.command('cv', 'runs=DIR')}"
    )


def _is_current(path: Path, origin: dict[str, Any], command: str) -> bool:
    """Whether these predictions are there already; damaged or outdated ones are made anew."""
    try:
        return path.exists() and _read(path, command)[0] == origin
    except DataError as error:
        log.warn(str(error))
        return False


def _write_fold(
    recipe: Recipe,
    data: Dataset,
    fold: int,
    models: ensemble.Ensemble,
    origin: dict[str, Any],
    device: torch.device,
    maps: bool,
) -> None:
    dist.agree({**config.of_a_launch(recipe), **origin, "checkpoints": list(origin["checkpoints"].values())})
    rows = np.flatnonzero(data.folds == fold)
    pack = dataset.open_train(recipe, data, models.image_size)
    batches = cut(rows, models.batch_size)
    mine = dist.mine(batches)
    reserve = recipe.train.gpu_reserve
    feed = Feed(pack, device, np.concatenate([rows[:0], *mine]), reserve=reserve)
    levels = np.array(origin["levels"])
    folder = path_of(recipe, fold).with_suffix("")
    if maps:
        folder.mkdir(parents=True, exist_ok=True)

    def measure(row: int, q: np.ndarray, agreement: np.ndarray) -> tuple[int, Tables]:
        if maps:
            Image.fromarray(q).save(folder / f"{data.cases[row].image_id}.png")
        return row, tables.measure(q, data.cases[row].runs, levels, agreement)

    done: list[tuple[int, Tables]] = []
    with ThreadPoolExecutor(2) as pool:  # the host measures one batch while the device computes the next
        pending: deque = deque()
        shown = log.bar(mine, total=len(mine), title=f"out of fold {fold}")
        for numbers, (image, _) in zip(shown, feed.batches(mine), strict=True):
            names = [data.cases[row].image_id for row in numbers]
            size = recipe.data.annotation_size
            found = ensemble.predict(models, image, size, names, pack.boxes(numbers, size))
            pending.append(pool.map(measure, numbers.tolist(), found.q, found.agreement[:, 0]))
            while len(pending) > 2:
                done += pending.popleft()
        for measured in pending:
            done += measured
    parts = [item for part in dist.gather(done) for item in part]
    if not dist.is_main():
        return
    parts.sort(key=lambda item: item[0])
    whole = tables.join([part for _, part in parts])
    ids = np.array([data.cases[row].image_id for row, _ in parts])
    content = io.BytesIO()
    arrays = {name: getattr(whole, name) for name in ARRAYS}
    np.savez_compressed(content, image_ids=ids, origin=np.array(json.dumps(origin)), **arrays)
    path = path_of(recipe, fold)
    checkpoint.write_atomic(path, content.getvalue())
    score = tables.dice(whole, Rule.of(recipe.rule)).mean()
    log.say(
        f"{path}: {len(whole)} images, {len(content.getvalue()) / 1e6:.1f} MB; Dice"
        f"{', with the mirror image,' if models.mirror else ''} {score:.4f} (all empty {(~whole.positive).mean():.4f})"
    )


def predicted_folds(recipe: Recipe) -> list[int]:
    """The folds whose held-out images are predicted; looks only, and writes nothing."""
    return [fold for fold in range(recipe.folds.count) if path_of(recipe, fold).exists()]


def check_predicted(recipe: Recipe) -> None:
    """Refuse a recipe without out-of-fold predictions.

    Raises:
        UsageError: gives the command that makes them.
    """
    if not predicted_folds(recipe):
        trained = any(stages.finished(recipe, fold, recipe.stages) for fold in range(recipe.folds.count))
        command = _command(recipe) if trained else recipe.command("cv")
        raise UsageError(
            f"{recipe.folder.absolute()}: no out-of-fold predictions yet. Run: {command}, or say where they are: --set "
            f"runs=DIR"
        )


def load(recipe: Recipe, data: Dataset) -> OutOfFold:
    """Read the out-of-fold predictions of every fold that has them.

    Raises:
        DataError: a file is damaged or outdated; or a fold lacks a prediction of one of its images, or has one of an
            image that is not its own: names the ids.
        UsageError: there are none.
    """
    check_predicted(recipe)
    folds, command = predicted_folds(recipe), _command(recipe)
    levels = {level(threshold) for threshold in grid(recipe).thresholds}
    row_of = {case.image_id: row for row, case in enumerate(data.cases)}
    parts, rows, sources, origins, trained = [], [], {}, [], {}
    for fold in folds:
        path = path_of(recipe, fold)
        origin, image_ids, table = _read(path, command)
        again = f"Run again: {command}"
        for source, digest in origin["checkpoints"].items():
            now = path.with_name(Path(source).name)  # the run folder may have been moved
            if now.is_file() and checkpoint.sha256(now) != digest:
                raise DataError(f"{path} was made by another {now} than there is now. {again}")
        if (origin["data"], origin["split"]) != (data.digest, data.split):
            raise DataError(f"{path} is of networks that were {_of_other_data(recipe)}")
        if origin["mirror"] != recipe.predict.mirror:
            raise DataError(
                f"{path} was made with predict.mirror={str(origin['mirror']).lower()}, which is now "
                f"{str(recipe.predict.mirror).lower()}. {again}"
            )
        if not levels <= set(origin["levels"]):
            raise DataError(
                f"{path} was made for other thresholds than tune.thresholds, rule.threshold and rule.top_threshold now "
                f"ask for. {again}"
            )
        wanted = {data.cases[row].image_id for row in np.flatnonzero(data.folds == fold)}
        for what, odd in (
            ("has no prediction of", sorted(wanted - set(image_ids))),
            ("has predictions of images that are not of its fold,", sorted(set(image_ids) - wanted)),
        ):
            if odd:
                raise DataError(f"{path} {what} {len(odd)} images, as {', '.join(odd[:5])}. {again}")
        parts.append(table)
        rows += [row_of[image_id] for image_id in image_ids]
        sources |= origin["checkpoints"]
        trained[fold] = origin["settings"]
        origins.append({key: origin[key] for key in ("mirror", "image_size", "annotation_size", "levels")})
    if any(origin != origins[0] for origin in origins):
        raise DataError(f"{recipe.folder}: the folds' predictions were made with different settings. {again}")
    ensemble.warn_of_differences(recipe.folder, trained)
    order = np.array(rows)
    return OutOfFold(
        image_ids=tuple(data.cases[row].image_id for row in rows),
        rows=order,
        folds=data.folds[order],
        groups=metrics.groups_of([data.groups[row] for row in rows]),
        tables=tables.join(parts),
        sources=sources,
        encoder=" and ".join(sorted({settings["model.encoder"] for settings in trained.values()})),
    )


def _read(path: Path, command: str) -> tuple[dict[str, Any], Sequence[str], Tables]:
    """A file's origin, image ids and tables.

    Args:
        command: that would make it anew, for the error.

    Raises:
        DataError: damaged, of another format, or no such file.
    """
    try:
        return _checked(*_content(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)[:200]}). To make it anew, run: {command}") from None


def _content(path: Path) -> tuple[str, Any, dict[str, np.ndarray]]:
    """A file's origin, ids and tables, whatever they are.

    Raises:
        ValueError: damaged, or no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum differs")
        with warnings.catch_warnings(), np.load(path, allow_pickle=False) as arrays:
            warnings.simplefilter("ignore")
            return (
                str(arrays["origin"]),
                arrays["image_ids"].tolist(),
                {name: np.asarray(arrays[name]) for name in ARRAYS},
            )
    except Exception as error:  # zipfile and numpy raise a dozen types on damaged files
        raise ValueError(str(error) or type(error).__name__) from error


def _checked(text: str, ids: Any, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], Sequence[str], Tables]:
    """The origin, ids and tables of a file.

    Raises:
        ValueError: they do not fit each other.
    """
    origin = json.loads(text)
    if not isinstance(origin, dict) or origin.get("format") != FORMAT:
        raise ValueError(f"not of format {FORMAT}")
    if wrong := [key for key, kind in ORIGIN.items() if type(origin.get(key)) is not kind]:
        raise ValueError(f"its origin has no {wrong[0]}")
    if not all(re.fullmatch("[0-9a-f]{64}", str(digest)) for digest in origin["checkpoints"].values()):
        raise ValueError("its checkpoints have no hashes")
    if not isinstance(origin["settings"].get("model.encoder"), str):
        raise ValueError("its settings name no encoder")
    if not isinstance(ids, list) or not all(isinstance(image_id, str) for image_id in ids) or len(set(ids)) < len(ids):
        raise ValueError("image_ids are not different names")
    found = Tables(*(arrays[name] for name in ARRAYS))
    sizes = {"N": len(ids), "T": len(origin["levels"]), "L": LEVELS, "C": found.area.size}
    for name, (kind, letters) in ARRAYS.items():
        array, shape = arrays[name], tuple(sizes[letter] for letter in letters)
        if array.dtype != kind or array.shape != shape:
            raise ValueError(f"{name} is {array.dtype} of {array.shape}, not {kind} of {shape}")
    pixels = found.histogram.sum(axis=1, dtype=np.int64)
    levels = np.unique(found.levels.clip(0, LEVELS)).tolist()
    for name, good in (
        ("levels", origin["levels"] == found.levels.tolist() == levels != []),
        ("histogram", (found.histogram >= 0).all() and (pixels == origin["annotation_size"] ** 2).all()),
        ("true_histogram", ((found.true_histogram >= 0) & (found.true_histogram <= found.histogram)).all()),
        ("agreement", ((found.agreement >= 0) & (found.agreement <= 1)).all()),
        ("counts", (found.counts >= 0).all() and found.counts.sum(dtype=np.int64) == len(found.area)),
        ("overlap", ((found.overlap >= 0) & (found.overlap <= found.area)).all()),
    ):
        if not good:
            raise ValueError(f"{name} holds what no prediction gives")
    return origin, ids, found
