"""The folder of a stage while that trains: what the run goes on from, what is refused, what it leaves.

Imports stages, dataset, config, checkpoint, dist, log, errors.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from pneumo import checkpoint, config, dist, log, stages
from pneumo.config import Recipe
from pneumo.dataset import Dataset
from pneumo.errors import (
    DataError,
    FolderGoneError,
    NoSpaceError,
    NotFiniteError,
    PneumoError,
    UsageError,
    WriteError,
    is_gpu_full,
    one_line,
)

_KNOWN = re.compile("file( by fold)? of sha256 [0-9a-f]{16}")  # what settings say of pretrained weights from a file


@dataclass
class Position:
    """How far a run is; saved with every checkpoint.

    Attributes:
        epoch: the one to go on with, from 1.
        step: the one of it to go on with, from 0.
        loss_sum, taken, images, seconds: of this epoch so far, for its log line.
        seen: images of all epochs so far.
        skipped: steps in a row that were not finite.
        best: highest mean Dice so far, and best_epoch.
        ema_best: highest mean Dice of the averaged weights so far, and ema_best_epoch.
        kept: epochs whose weights are kept for an ensemble, the best first.
        history: log lines of the finished epochs.
    """

    epoch: int = 1
    step: int = 0
    loss_sum: float = 0.0
    taken: int = 0
    images: int = 0
    seconds: float = 0.0
    seen: int = 0
    skipped: int = 0
    best: float = -1.0
    best_epoch: int = 0
    ema_best: float = -1.0
    ema_best_epoch: int = 0
    kept: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"epoch {self.epoch}, step {self.step:,}"


@contextmanager
def of_this_run(folder: Path) -> Iterator[None]:
    """Name the checkpoint whose file is whole, but whose content is not what this program saves.

    Raises:
        DataError: in place of what reading such content raises.
    """
    try:
        yield
    except (PneumoError, torch.AcceleratorError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_gpu_full(error):
            raise
        raise DataError(
            f"{folder / 'last.pt'}, or the checkpoint it starts from, is whole but holds no state of this run "
            f"({type(error).__name__}: {one_line(error)[:200]}). Restore it, or delete {folder} to start anew."
        ) from error


class StageFolder:
    """The folder of one stage of one fold, for the run that trains it. Only the first process writes into it.

    Args:
        data: what it trains on; a checkpoint of other images, annotations or folds is refused.
        fold, stage: from 0 and from 1.
        dtype: of autocast, which a run keeps to its end.

    Raises:
        UsageError: other processes of the launch have another recipe, other data or other code.

    Attributes:
        path: of the folder.
        saved: the position that last.pt holds; None while there is none.
        start: fingerprint of the whole network's weights that this stage began with; "" where it had the encoder's.
        seen: hashes of all images that its weights were trained on, here and before, as `Dataset.hashes`.
        before: what decided the weights that it began with, besides its own settings.
        begins: with which weights, in words.
    """

    def __init__(self, recipe: Recipe, data: Dataset, fold: int, stage: int, dtype: torch.dtype) -> None:
        self.path = recipe.stage_folder(fold, stage)
        self.saved: Position | None = None
        self.start, self.begins = "", ""
        self.before: dict[str, Any] = {}
        inside = data.folds == fold
        self.seen = torch.from_numpy(np.unique(data.hashes[~inside]))
        self._held_out = {int(data.hashes[row]): data.cases[row].image_id for row in np.flatnonzero(inside)}
        self._recipe, self._fold, self._stage = recipe, fold, stage
        self._before = recipe.start_folder(fold, stage)
        given = recipe.pretrained(fold)
        self._given = Path(given) if isinstance(given, str) else None
        self._identity = {
            "settings": _settings(recipe, fold, stage),
            "digest": data.digest,
            "split": data.split,
            "fold": fold,
            "stage": stage,
        }
        self._launch = {"processes": dist.world(), "autocast": str(dtype)}
        more = {key: value for key, value in self._identity.items() if key != "settings"}  # which are of the recipe
        dist.agree({**config.of_a_launch(recipe), **more, **self._launch})

    def load_last(self) -> dict[str, Any] | None:
        """The run's own last good checkpoint, on every process the same; None if there is none.

        Raises:
            UsageError: it was made under other settings, of other data or from another start.
            DataError: neither last.pt nor prev.pt is good, or best.pt is gone.
            NotFiniteError: it holds NaN or infinity.
        """
        found = checkpoint.load_last(self.path) if dist.is_main() else None
        if found is not None:
            with of_this_run(self.path):
                self._judge(*found)
        state = dist.broadcast(None if found is None else found[0])
        if state is not None:
            with of_this_run(self.path):
                self.saved, self.start = Position(**state["position"]), state["start"]
                self.seen, self.before = state.get("seen", self.seen), state.get("before", self.before)
        return state

    def _judge(self, state: dict[str, Any], path: Path, complaints: list[str]) -> None:
        """Refuse a checkpoint that this run may not go on from, and tell what is odd."""
        position = Position(**state["position"])
        for complaint in complaints:
            earlier = log.read_status(self.path).get("images_seen", 0) - position.seen
            log.warn(
                f"{complaint} Continuing from {path.name}, {position}"
                + (f" ({earlier:,} images earlier)." if earlier > 0 else ".")
            )
        done = position.epoch > self._recipe.stage[self._stage].epochs  # then nobody goes on with it
        self._check_same({**state, **self._launch} if done else state, path)
        self._check_start(state, path)
        best = self.path / "best.pt"
        if position.best_epoch and not best.exists():
            raise DataError(f"{best}: no such file, but {path.name} tells of one. {stages.way_out(best)}")
        if name := checkpoint.not_finite(state):
            raise NotFiniteError(
                f"{path} cannot be used: {one_line(name)} is not finite. Restore it, or delete {self.path} to start "
                f"anew."
            )
        if changed := [
            f"{name} {state['versions'][name]} -> {now}"
            for name, now in _versions().items()
            if not done and state["versions"].get(name, now) != now
        ]:
            log.warn(f"{path}: made with {', '.join(changed)}; the last digits may differ")

    def outlived(self) -> bool:
        """Whether the stage is done though last.pt and prev.pt were deleted, as may be; no if it has never begun.

        Raises:
            UsageError: it is done, but under other settings or data, or with fewer epochs.
            DataError: it had begun, and nothing is left to go on from.
        """
        best, status = self.path / "best.pt", log.read_status(self.path)
        if not best.exists() and not (self.path / "log.jsonl").exists():
            return False
        if status["state"] != "done" or not best.exists():
            how = "is done, but no best.pt" if status["state"] == "done" else "has begun"
            raise DataError(
                f"{self.path} holds a stage that {how}, and neither last.pt nor prev.pt to go on from. Restore them, "
                f"or delete the folder to start this stage anew."
            )
        state = stages.load_weights(best, digest=None, split=None, fold=self._fold)
        before, now = status.get("epochs"), self._recipe.stage[self._stage].epochs
        theirs = {**state["settings"], f"stage.{self._stage}.epochs": before}  # it may have got more later
        self._check_same({**state, **self._launch, "settings": theirs}, best)
        if "start" in state:
            self._check_start(state, best)
        if now != before:
            raise UsageError(
                f"{self.path} is done with {before} epochs, and without last.pt it cannot go on to {now}. Restore "
                f"last.pt, or delete the folder to start this stage anew."
            )
        return True

    def load_start(self) -> dict[str, Any] | None:
        """The checkpoint that this stage begins with; None if it begins with an encoder alone.

        It is the best one of the stage before; where there is none, one of this program that `model.pretrained` names.
        `begins` tells.

        Raises:
            UsageError: the stage before is not done; or the network is another than the recipe's.
            DataError: the checkpoint is damaged, of other data, or has seen what this fold validates with.
        """
        state, path = (self._load_other(), self._given) if self._before is None else self._load_before()
        if state is None:
            encoder = path or ("timm's weights" if self._recipe.model.pretrained else "")
            self.begins = f"{encoder} for the encoder, random ones for the decoder" if encoder else "random weights"
            return None
        self.begins = f"the whole network of {path}"
        for key in ("model.encoder", "model.decoder_channels"):
            theirs, mine = state["settings"].get(key), self._identity["settings"][key]
            if theirs != mine:
                raise UsageError(
                    f"Stage {self._stage} of fold {self._fold} starts from {path}, whose {key} is {theirs}, not "
                    f"{mine}, and whose weights do not fit. Set that, or start from another"
                )
        self.start = checkpoint.fingerprint(state["model"])
        if _are_hashes(state.get("seen")):
            self.seen = torch.cat([self.seen, state["seen"]]).unique()
        return state

    def _load_before(self) -> tuple[dict[str, Any], Path]:
        """The best checkpoint of the stage before, and its path."""
        name, number = self._before.parent.parent.name, int(self._before.name.removeprefix("stage"))
        try:
            state = stages.load_best(
                self._before,
                digest=self._identity["digest"],
                split=self._identity["split"],
                fold=self._fold,
                command=self._recipe.command(f"train FOLD={self._fold} STAGE={number}", recipe=name),
            )
        except UsageError as error:
            raise UsageError(
                f"Stage {self._stage} of fold {self._fold} starts from stage {number} of {name}, but {error}"
            ) from None
        path = self._before / "best.pt"
        theirs, own = stages.trained_under(self._before, number, state), self._identity["settings"]
        self.before = {key: value for key, value in theirs.items() if key not in own}
        if name == self._recipe.name:  # another recipe differs on purpose
            now = config.essential(_settings(self._recipe, self._fold, number))
            if isinstance(now.get("model.pretrained"), str) and not _is_known(now["model.pretrained"]):
                del now["model.pretrained"]  # its file is gone, as it may be
            if changed := log.changes({key: theirs[key] for key in now if key in theirs}, now):
                log.warn(
                    f"stage {self._stage} of fold {self._fold} starts from {path}, which was trained under other "
                    f"settings than the recipe's of now ({'; '.join(changed)})"
                )
        return state, path

    def _load_other(self) -> dict[str, Any] | None:
        """The checkpoint of a stage that `model.pretrained` names; None if it names none, or other weights."""
        path = self._given
        if path is None or path.suffix == ".safetensors" or not stages.is_checkpoint(path):
            return None
        other = "Name other weights, or none: --set model.pretrained=false"
        state = stages.load_weights(path, digest=None, split=None, fold=None, again=other)
        if not _are_hashes(state.get("seen")):
            raise DataError(
                f"model.pretrained: {path} does not say which images it was trained on, as those of earlier versions. "
                f"{other}"
            )
        if known := [self._held_out[image] for image in state["seen"].tolist() if image in self._held_out]:
            raise DataError(
                f"model.pretrained: {path} was trained on {len(known):,} of the {len(self._held_out):,} images that "
                f"fold {self._fold} is validated with, as {min(known)}. Take the checkpoint of the same fold, and for "
                f"all images that it knows, the folds that it was trained with, in {self._recipe.folder / 'folds.csv'}"
            )
        return state

    def _check_same(self, saved: Mapping[str, Any], path: Path) -> None:
        """Refuse to go on with a run under other settings, other data or another number of processes."""
        theirs = {**saved["settings"], **{key: saved[key] for key in self._launch}}
        self._settle_pretrained(theirs)
        mine = {**self._identity["settings"], **self._launch}
        epochs, schedule = f"stage.{self._stage}.epochs", self._recipe.stage[self._stage].schedule
        if schedule == "plateau" and theirs[epochs] < mine[epochs]:
            self._check_nothing_follows(mine[epochs])
            theirs[epochs] = mine[epochs]  # as if it had had them from the start
        why = {} if schedule == "plateau" else {epochs: f", on which a {schedule} schedule depends from its start"}
        changed = [
            f"{key}: {theirs.get(key)} -> {mine.get(key)}{why.get(key, '')}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]
        changed += [
            f"{what}: {saved[key][:12]} -> {self._identity[key][:12]}"
            for key, what in (("digest", "images or annotations"), ("split", "folds.csv"))
            if saved[key] != self._identity[key]
        ]
        if changed:
            anew = f"delete {self.path} to start this stage anew"
            if any(saved[key] != self._identity[key] for key in ("digest", "split")):
                folders = f"the folders fold0 to fold{self._recipe.folds.count - 1} of {self._recipe.folder}"
                anew = f"delete {folders}, as all of its networks saw other data"
            raise UsageError(
                f"{path} was made with other settings ({'; '.join(changed)}). Go back to them, choose another "
                f"folder (--set runs=DIR), or {anew}."
            )

    def _settle_pretrained(self, theirs: dict[str, Any]) -> None:
        """Let pretrained weights be the same that are: their file may be gone once it has done its part."""
        key, mine = "model.pretrained", self._identity["settings"]
        if key not in mine:  # of an earlier version, which said it of every stage
            theirs.pop(key, None)
        elif theirs.get(key) == self._recipe.model.pretrained:  # likewise, the path of a file
            theirs[key] = mine[key]
        elif _is_known(theirs.get(key)) and isinstance(mine[key], str) and not _is_known(mine[key]):
            mine[key] = theirs[key]

    def _check_nothing_follows(self, epochs: int) -> None:
        """Refuse more epochs for a stage whose weights another one has begun with: that one could not go on."""
        for stage in self._recipe.own_stages:
            after = self._recipe.stage_folder(self._fold, stage)
            if stage > self._stage and any((after / name).exists() for name in ("last.pt", "best.pt")):
                raise UsageError(
                    f"{self.path} is not trained on to {epochs} epochs: stage {stage} began with its weights and could "
                    f"not go on. Delete {after} first, or train into another folder: --set runs=DIR"
                )

    def _check_start(self, saved: Mapping[str, Any], path: Path) -> None:
        """Refuse to go on where the stage before has been trained to other weights since.

        Where its best.pt is gone or cannot be read, nothing is compared.
        """
        if self._before is None:
            return
        try:
            now = checkpoint.fingerprint(checkpoint.load(self._before / "best.pt")["model"])
        except (DataError, LookupError, AttributeError):
            return
        if now != saved["start"]:
            raise UsageError(
                f"{path} began with other weights than {self._before / 'best.pt'} now holds. Delete {self.path} to "
                f"train this stage anew from them, or restore that file."
            )

    def save(self, position: Position, state: Mapping[str, Any]) -> None:
        """Write last.pt, keeping the one before as prev.pt.

        Args:
            state: of model, optimizer and all else that the run needs to go on.

        Raises:
            WriteError: says which checkpoint is intact.
        """
        more = {"position": asdict(position), **self._launch, **self._origin()}
        self._write({**self._identity, **more, **state}, self.path / "last.pt", keep=self.path / "prev.pt")
        self.saved = Position(**more["position"])

    def keep(self, name: str, weights: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Write weights as a checkpoint to predict from.

        Args:
            record: the log line of their validation.

        Raises:
            WriteError: as of `save`.
        """
        self._write({**self._identity, **self._origin(), "record": record, "model": weights}, self.path / name)

    def _origin(self) -> dict[str, Any]:
        """Where weights come from, for those who go on from them."""
        return {"start": self.start, "seen": self.seen, "before": self.before, "versions": _versions()}

    def prune(self, position: Position) -> None:
        """Remove kept epochs that others have overtaken, before the next is kept: the disk need not hold more."""
        checkpoint.check_held(self.path)
        for path in self.path.glob(stages.KEPT.format("*")):
            if path.name not in map(stages.KEPT.format, position.kept):
                path.unlink()

    def publish(self, position: Position) -> None:
        """Bring what is beside last.pt up to it."""
        self.prune(position)
        log.write_jsonl(self.path / "log.jsonl", position.history)

    def intact(self) -> str:
        """What a run that ends now goes on from."""
        return "nothing was saved before" if self.saved is None else f"last.pt is from {self.saved}"

    def _write(self, state: dict[str, Any], path: Path, keep: Path | None = None) -> None:
        """Save a checkpoint; on a full disk, at the price of the oldest, prev.pt, if last.pt is good."""
        try:
            try:
                checkpoint.save(state, path, keep=keep)
            except NoSpaceError as error:
                previous = self.path / "prev.pt"
                if not previous.exists() or not self._last_is_good():
                    raise
                log.warn(f"{error} Removing {previous} to make room.")
                previous.unlink()
                checkpoint.save(state, path, keep=keep)
        except FolderGoneError:
            raise
        except WriteError as error:
            keeps = self._recipe.train.keep_best > 1
            raise type(error)(
                f"{error} For this run, {self.intact()}. Free space{' or lower train.keep_best' if keeps else ''}, "
                f"then run the same command."
            ) from None

    def _last_is_good(self) -> bool:
        try:
            checkpoint.load(self.path / "last.pt")
        except DataError:
            return False
        return True


def _settings(recipe: Recipe, fold: int, stage: int) -> dict[str, Any]:
    """What decides the weights of a stage, a file of pretrained ones by its content: it may be moved, not replaced."""
    settings, path = config.stage_settings(recipe, stage), recipe.pretrained(fold)
    if "model.pretrained" in settings and isinstance(path, str) and os.path.isfile(path):
        kind = "file" if path == recipe.model.pretrained else config.BY_FOLD
        with suppress(OSError):  # who needs it will say that it cannot be read
            settings["model.pretrained"] = f"{kind} of sha256 {checkpoint.sha256(Path(path))[:16]}"
    return settings


def _is_known(pretrained: Any) -> bool:
    """Whether a setting tells the content of a file of weights, and not where it is."""
    return isinstance(pretrained, str) and _KNOWN.fullmatch(pretrained) is not None


def _are_hashes(found: Any) -> bool:
    return isinstance(found, Tensor) and found.dtype == torch.int64 and found.dim() == 1


def _versions() -> dict[str, str]:
    return {
        "torch": str(torch.__version__),
        "timm": str(timm.__version__),
        "numpy": str(np.__version__),
        "code": dist.code_hash()[:12],
    }
