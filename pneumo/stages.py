"""What a stage leaves in its run folder, as other commands and the next stage read it.

Imports config, checkpoint, log, errors.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pneumo import checkpoint, config, log
from pneumo.config import Recipe
from pneumo.errors import DataError, NotFiniteError, UsageError, one_line

WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)  # types in a checkpoint's model
KEPT = "epoch{}.pt"  # one of the `train.keep_best` epochs that an ensemble may average


def finished(recipe: Recipe, fold: int, stage: int) -> bool:
    """Whether this stage has run to its end."""
    return log.read_status(recipe.stage_folder(fold, stage))["state"] == "done"


def load_best(folder: Path, *, digest: str, split: str, fold: int, command: str) -> dict[str, Any]:
    """Read the best checkpoint of a finished stage, and refuse one that saw other data.

    Raises:
        UsageError: as `check_finished`.
        DataError: as `load_weights`.
    """
    check_finished(folder, command)
    return load_weights(folder / "best.pt", digest=digest, split=split, fold=fold)


def check_finished(folder: Path, command: str) -> None:
    """Refuse the run folder of a stage that has not run to its end.

    Raises:
        UsageError: says how far it is and gives the command.
    """
    status = log.read_status(folder)
    if status["state"] != "done":
        where = f" at epoch {status['epoch']} of {status['epochs']}" if "epoch" in status else ""
        again = f"{command}, with the settings that it was started with" if where else command
        raise UsageError(f'{folder / "status.json"} says "{status["state"]}"{where}. Run: {again}')


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a good checkpoint of a stage, and not weights of another program."""
    try:
        return {"settings", "digest", "split", "fold", "model"} <= checkpoint.load(path).keys()
    except DataError:
        return False


def trained_under(folder: Path, stage: int, state: dict[str, Any]) -> dict[str, Any]:
    """What decided the weights of a finished stage's checkpoint, in it and before, as far as it is `config.essential`.

    The epochs are those that the stage has had since, as if it had had them from the start.
    """
    key, before = f"stage.{stage}.epochs", state.get("before")
    settings = {**(before if isinstance(before, dict) else {}), **state["settings"]}
    settings[key] = log.read_status(folder).get("epochs", settings.get(key))
    plain = (bool, int, float, str, list, type(None))
    return config.essential({str(name): value for name, value in settings.items() if isinstance(value, plain)})


def load_weights(
    path: Path, *, digest: str | None, split: str | None, fold: int | None, again: str = ""
) -> dict[str, Any]:
    """Read a checkpoint to predict or to start from, and refuse one that saw other data.

    Args:
        digest, split: hashes of data and split it must have been trained on; None where nothing is to be compared.
        fold: it must have been trained for; None: any.
        again: what to do about a bad one, for the error; "": train that stage again.

    Raises:
        DataError: damaged, or trained on other data, another split or another fold.
        NotFiniteError: a weight is NaN or infinite.
    """
    again = again or way_out(path)
    if not path.exists():
        raise DataError(f"{path}: no such file. {again}")
    state = checkpoint.load(path)
    if missing := [key for key in ("settings", "digest", "split", "fold", "model") if key not in state]:
        raise DataError(f"{path} is no checkpoint of a stage: it has no {missing[0]}. {again}")
    for key, kind in (("settings", dict), ("digest", str), ("split", str), ("fold", int), ("model", dict)):
        if not isinstance(state[key], kind):
            raise DataError(f"{path} is no checkpoint of a stage: its {key} is something else. {again}")
    for name, weight in state["model"].items():
        plain = isinstance(weight, Tensor) and weight.layout is torch.strided and weight.device.type == "cpu"
        if not plain or weight.dtype not in WEIGHTS:
            raise DataError(f"{path} is no checkpoint of a stage: {one_line(name)} holds no weights. {again}")
        if not weight.isfinite().all():
            raise NotFiniteError(f"{path} cannot be used: {one_line(name)} is not finite. {again}")
    for what, saved, wanted in (
        ("data", state["digest"], digest),
        ("folds", state["split"], split),
        ("fold", state["fold"], fold),
    ):
        if wanted is not None and saved != wanted:
            raise DataError(
                f"{path} was trained on other {what} ({one_line(saved)[:12]}, not {one_line(wanted)[:12]}): it "
                f"may have seen this fold's validation images. Restore the data or train from stage 1 again."
            )
    return state


def way_out(path: Path) -> str:
    """What to do where a checkpoint is lost or damaged."""
    return f"Restore it, or delete {path.parent} and train that stage again."
