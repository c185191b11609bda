"""One stage of one fold: chained to the stage before it, resumable at any step, stopped cleanly by a signal.

Imports config, dataset, engine, checkpoint, log, dist, model, data, decision, kernels.
"""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pneumo import checkpoint, config, dataset, dist, engine, log
from pneumo.config import AugmentConfig, Recipe, StageConfig
from pneumo.data import feed as feeds
from pneumo.data.feed import Feed
from pneumo.dataset import Dataset
from pneumo.decision.rule import Rule
from pneumo.engine import LossSettings, RunningStatistics
from pneumo.errors import DataError, NotFiniteError, PneumoError, UsageError
from pneumo.kernels.upconv import is_faster
from pneumo.model import augment
from pneumo.model.folded import FoldedUNet
from pneumo.model.unet import UNet

KEPT = "epoch{}.pt"  # one of the `train.keep_best` epochs that an ensemble may average


class Stopped(PneumoError):
    """A signal ended the run after a checkpoint."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + _signals.number


class _Signals:
    """Remembers a SIGTERM or SIGINT; the step in hand is finished first."""

    number = 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        self.number = 0

        def remember(number: int, _frame: object) -> None:
            self.number = number

        old = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


_signals = _Signals()


@dataclass
class Position:
    """How far a run is; saved with every checkpoint.

    Attributes:
        epoch: the one to go on with, from 1.
        step: the one of it to go on with, from 0.
        loss_sum, taken, images, seconds: of this epoch so far, for its log line.
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
    skipped: int = 0
    best: float = -1.0
    best_epoch: int = 0
    ema_best: float = -1.0
    ema_best_epoch: int = 0
    kept: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


def train_stage(recipe: Recipe, data: Dataset, fold: int, stage: int, device: torch.device) -> None:
    """Train one stage of one fold to its end, from where it was left if it was started before.

    Writes last.pt, best.pt, log.jsonl, config.toml and status.json into the recipe's run folder, and ema.pt and the
    kept epochs where the recipe asks for them.

    Raises:
        UsageError: the folder is in use, belongs to other settings, or the stage before is not done.
        DataError: a checkpoint is damaged or of other data.
        NotFiniteError: too many steps in a row were not finite.
        Stopped: after SIGTERM or SIGINT, with a checkpoint.
    """
    folder = recipe.stage_folder(fold, stage)
    dataset.check_fold(recipe, data, fold)
    if dist.is_main():
        with checkpoint.lock(folder), _signals.caught(), _true_status(folder):
            _Run(recipe, data, fold, stage, device).train()
    else:
        with _signals.caught():
            _Run(recipe, data, fold, stage, device).train()


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
        raise UsageError(f'{folder / "status.json"} says "{status["state"]}"{where}. Run: {command}')


def load_weights(path: Path, *, digest: str | None, split: str | None, fold: int) -> dict[str, Any]:
    """Read a checkpoint to predict or to start from, and refuse one that saw other data.

    Args:
        digest, split: hashes of data and split it must have been trained on; None where nothing is to be compared.
        fold: it must have been trained for.

    Raises:
        DataError: damaged, or trained on other data, another split or another fold.
    """
    state = checkpoint.load(path)
    for what, saved, wanted in (
        ("data", state["digest"], digest),
        ("folds", state["split"], split),
        ("fold", state["fold"], fold),
    ):
        if wanted is not None and saved != wanted:
            raise DataError(
                f"{path} was trained on other {what} ({str(saved)[:12]}, not {str(wanted)[:12]}): it "
                f"may have seen this fold's validation images. Restore the data or train from stage 1 again."
            )
    return state


class _Run:
    """The state of one stage while it trains."""

    def __init__(self, recipe: Recipe, data: Dataset, fold: int, stage: int, device: torch.device) -> None:
        self.recipe, self.data, self.fold, self.stage, self.device = recipe, data, fold, stage, device
        self.folder = recipe.stage_folder(fold, stage)
        self.settings: StageConfig = recipe.stage[stage]
        self.loss = LossSettings(
            self.settings.loss, self.settings.focal_weight, self.settings.gamma, self.settings.smooth
        )
        self.rule = Rule(**asdict(recipe.rule))
        self.dtype = engine.autocast_dtype(recipe.train.amp, device)
        self.identity = {
            "settings": config.stage_settings(recipe, stage),
            "digest": data.digest,
            "split": data.split,
            "fold": fold,
            "stage": stage,
        }
        inside = data.folds == fold
        self.training, self.validation = np.flatnonzero(~inside), np.flatnonzero(inside)
        self.position = Position()

    def train(self) -> None:
        """Run all epochs that are left."""
        saved = self._load_last()
        if saved is not None and saved["position"]["epoch"] > self.settings.epochs:
            if dist.is_main():
                self._status("done")
            log.say(f"{self.folder}: done, nothing to do")
            return
        self._build(saved)
        if dist.is_main():
            checkpoint.write_atomic(self.folder / "config.toml", config.dumps(self.recipe).encode())
            self._status("running")
        pack = dataset.open_pack(self.recipe, "train", self.data.cases, self.settings.image_size)
        reserve = int(self.recipe.train.gpu_reserve_gb * 2**30)
        feed = Feed(pack, self.device, np.arange(len(self.data.cases)), reserve=reserve)
        log.say(
            f"fold {self.fold} stage {self.stage}: {len(self.training)} images to train on, {len(self.validation)} to "
            f"validate, {self.settings.image_size} px {feed}; {dist.world()} x {self.device.type}, "
            f"{str(self.dtype).removeprefix('torch.')}, "
            f"{sum(self.merged)} of {len(self.merged)} blocks merged"
            + (f"; goes on at epoch {self.position.epoch}, step {self.position.step}" if saved else "")
        )
        positive = self.data.positive
        for epoch in range(self.position.epoch, self.settings.epochs + 1):
            plan = feeds.epoch_plan(
                self.training[positive[self.training]],
                self.training[~positive[self.training]],
                positive_fraction=self.settings.positive_fraction,
                draw=self.settings.negatives,
                seed=self.recipe.seed,
                fold=self.fold,
                stage=self.stage,
                epoch=epoch,
            )
            self._train_epoch(feed, feeds.steps(plan, self.settings.batch_size, self.settings.accumulation))
            self._finish_epoch(feed)
        if dist.is_main():
            self._status("done")

    def _build(self, saved: dict[str, Any] | None) -> None:
        """Make model, optimizer and schedule, and put them where a checkpoint left them."""
        begin = None if saved is not None else self._start_weights()
        known = saved is not None or begin is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(feeds.key(self.recipe.seed, self.fold, "model"))
            model = UNet(
                self.recipe.model.encoder,
                False if known else self.recipe.model.pretrained,
                self.recipe.model.decoder_channels,
                self.recipe.model.checkpointing,
            )
        if known:
            model.load_state_dict((saved or begin)["model"])
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.merged = saved["merged"] if saved is not None else self._merged_blocks()
        for block, merged in zip(self.model.blocks, self.merged, strict=True):
            block.merged = merged
        self.folded = FoldedUNet(self.model, self.dtype)
        self.running = RunningStatistics(self.model)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=self.settings.lr, weight_decay=self.settings.weight_decay, fused=True
        )
        self.average = engine.WeightAverage(self.model, self.recipe.train.ema) if self.recipe.train.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer,
            factor=self.settings.factor,
            patience=self.settings.patience,
            threshold=self.settings.plateau_threshold,
        )
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.plateau.load_state_dict(saved["plateau"])
            self.scaler.load_state_dict(saved["scaler"])
            if self.average is not None:
                self.average.load_state_dict(saved["average"])
            self.position = Position(**saved["position"])
        if self.recipe.train.compile == "on" or (self.recipe.train.compile == "auto" and self.device.type == "cuda"):
            # each shape once: a full micro-batch and the last one of an epoch, in training and in validation
            self.model.compile(dynamic=False)
            self.folded.compile(dynamic=False)
        self.wrapped: nn.Module = dist.wrap(self.model)

    def _merged_blocks(self) -> list[bool]:
        """Which blocks of the decoder train in their merged form; the same on every process.

        What was timed on a GPU is kept beside the packed images, so that a second run there computes the same.
        """
        how, blocks = (
            self.recipe.model.upsample,
            self.model.block_shapes(self.settings.batch_size, self.settings.image_size),
        )
        if how != "auto":
            return [how == "merged"] * len(blocks)
        if self.device.type == "cpu":
            return [is_faster(*block, self.device, self.dtype) for block in blocks]
        path = Path(self.recipe.runs) / "upsample.json"
        device = f"{torch.cuda.get_device_name(self.device)}, torch {torch.__version__}, {self.dtype}"
        if dist.is_main():
            with checkpoint.wait_lock(path.with_suffix(".lock")):
                known = json.loads(path.read_text()) if path.exists() else {}
                for block in blocks:
                    if f"{device}, {block}" not in known:
                        known[f"{device}, {block}"] = is_faster(*block, self.device, self.dtype)
                checkpoint.write_atomic(path, json.dumps(known, indent=1).encode())
        return dist.broadcast([known[f"{device}, {block}"] for block in blocks] if dist.is_main() else None)

    def _start_weights(self) -> dict[str, Any] | None:
        """The best checkpoint of the stage before; None if this stage starts from the encoder."""
        before = self.recipe.start_folder(self.fold, self.stage)
        if before is None:
            return None
        name, number = before.parent.parent.name, int(before.name.removeprefix("stage"))
        recipe_word = "" if name == "seed" else f" RECIPE={name}"
        try:
            return load_best(
                before,
                digest=self.data.digest,
                split=self.data.split,
                fold=self.fold,
                command=f"make train FOLD={self.fold} STAGE={number}{recipe_word}",
            )
        except UsageError as error:
            raise UsageError(
                f"Stage {self.stage} of fold {self.fold} starts from stage {number} of {name}, but {error}"
            ) from None

    def _load_last(self) -> dict[str, Any] | None:
        """The run's own last good checkpoint, on every process the same, if its settings are the recipe's."""
        found = checkpoint.load_last(self.folder) if dist.is_main() else None
        if found is not None:
            saved, path, complaints = found
            for complaint in complaints:
                log.warn(
                    f"{complaint} Continuing from {path.name}, epoch {saved['position']['epoch']}, "
                    f"step {saved['position']['step']}."
                )
            self._check_same(saved, path)
        return dist.broadcast(None if found is None else saved)

    def _check_same(self, saved: dict[str, Any], path: Path) -> None:
        """Refuse to go on with a run under other settings, other data or another number of processes."""
        mine = {**self.identity["settings"], "processes": dist.world(), "autocast": str(self.dtype)}
        theirs = {**saved["settings"], "processes": saved["processes"], "autocast": saved["autocast"]}
        changed = [
            f"{key}: {theirs.get(key)} -> {mine.get(key)}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]
        changed += [
            f"{what}: {saved[key][:12]} -> {self.identity[key][:12]}"
            for key, what in (("digest", "images or annotations"), ("split", "folds.csv"))
            if saved[key] != self.identity[key]
        ]
        if changed:
            raise UsageError(
                f"{path} was made with other settings ({'; '.join(changed)}). Go back to them, choose another "
                f"folder (--set runs=DIR), or delete {self.folder} to start this stage anew."
            )

    def _train_epoch(self, feed: Feed, plan: list[list[np.ndarray]]) -> None:
        """Take the steps of the epoch that are left."""
        epoch, position = self.position.epoch, self.position
        batches = iter(feed.batches(list(engine.own_steps(plan, position.step))))
        late = engine.Late()
        started = saved_at = time.perf_counter()
        bar = log.bar(total=len(plan), title=self._title(epoch), start=position.step)
        first, before = position.step, position.seconds
        for step in range(first, len(plan)):
            if self.settings.schedule == "cosine":
                done = ((epoch - 1) * len(plan) + step) / (self.settings.epochs * len(plan))
                self._set_lr(self.settings.lr * engine.cosine(done))
            minutes = (time.perf_counter() - saved_at) / 60
            stats = engine.train_step(
                self.wrapped,
                self._augmented(batches, plan[step], epoch, step),
                self.optimizer,
                self.scaler,
                self.running,
                self.loss,
                self.dtype,
                count=len(plan[step]),
                flags=(
                    float(_signals.number > 0),
                    float(dist.is_main() and minutes >= self.recipe.train.checkpoint_minutes),
                ),
            )
            if self.average is not None:
                self.average.update(stats[1])
            position.step = step + 1
            position.images += sum(map(len, plan[step]))
            stop, save = self._note(late.push(stats), plan)
            every = self.recipe.train.checkpoint_steps
            if stop or save or (every and (step + 1) % every == 0):
                more = self._note(late.drain(), plan)
                stop = stop or more[0]
                position.seconds = before + time.perf_counter() - started
                self._save()
                saved_at = time.perf_counter()
            if stop:
                self._stop()
            bar.update()
            if position.taken:
                bar.set_postfix(loss=f"{position.loss_sum / position.taken:.4f}", lr=f"{self._lr():.1e}", refresh=False)
        self._note(late.drain(), plan)
        position.seconds = before + time.perf_counter() - started
        bar.close()

    def _augmented(
        self, batches: Iterator[tuple[Tensor, Tensor]], micro_batches: list[np.ndarray], epoch: int, step: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's micro-batches of a step, augmented by randomness keyed to their place in the plan."""
        for place in engine.share(micro_batches):
            image, mask = next(batches)
            seed = feeds.key(self.recipe.seed, self.fold, self.stage, epoch, step, place, "augment")
            generator = torch.Generator(self.device).manual_seed(seed)
            yield augmented(image, mask, self.recipe.augment, generator)

    def _note(self, finished_steps: list[list[float]], plan: list[list[np.ndarray]]) -> tuple[bool, bool]:
        """Take in what the host now knows of earlier steps; return whether to stop and whether to save."""
        stop = save = False
        for loss, taken, _norm, stop_flags, save_flags in finished_steps:
            stop, save = stop or stop_flags > 0, save or save_flags > 0
            if taken:
                self.position.loss_sum += loss
                self.position.taken += 1
                self.position.skipped = 0
                continue
            self.position.skipped += 1
            limit = self.recipe.train.nonfinite_steps
            if self.position.skipped >= limit:
                last = plan[min(self.position.step, len(plan)) - 1]
                ids = ", ".join(self.data.cases[row].image_id for row in np.concatenate(last)[:4])
                raise NotFiniteError(
                    f"Loss or gradient was not finite for {limit} steps in a row (epoch {self.position.epoch}, to step "
                    f"{self.position.step}; last ids {ids}, ...). No bad weights were saved. "
                    f"Try --set train.amp=off or a lower stage.{self.stage}.lr."
                )
        return stop, save

    def _finish_epoch(self, feed: Feed) -> None:
        """Validate, log, keep the best, and save."""
        position, epoch = self.position, self.position.epoch
        result = self._validate(feed)
        positive = self.data.positive[result.rows]
        record = {
            "epoch": epoch,
            "loss": position.loss_sum / position.taken if position.taken else None,
            **_record(result, positive),
            "all_empty": float((~positive).mean()),
            "lr": self._lr(),
            "seconds": position.seconds,
            "images_per_second": position.images / position.seconds,
        }
        if self.device.type == "cuda":
            record["peak_gb"] = torch.cuda.max_memory_allocated(self.device) / 2**30  # of this process so far
        if self.settings.schedule == "plateau":
            self.plateau.step(result.loss)
        new = Position(
            epoch=epoch + 1,
            skipped=position.skipped,
            best=position.best,
            best_epoch=position.best_epoch,
            ema_best=position.ema_best,
            ema_best_epoch=position.ema_best_epoch,
        )
        improved = record["dice"] >= position.best  # the later epoch on ties; NaN never wins
        if improved:
            new.best, new.best_epoch = record["dice"], epoch
            self._keep("best.pt", record)
        if self.average is not None:
            with self.average.swapped_in():
                averaged = _record(self._validate(feed), positive)
                if averaged["dice"] >= position.ema_best:
                    new.ema_best, new.ema_best_epoch = averaged["dice"], epoch
                    self._keep("ema.pt", {"epoch": epoch, **averaged})
            record |= {f"ema_{key}": value for key, value in averaged.items()}
        new.history = [*position.history, record]
        if self.recipe.train.keep_best > 1:
            ranked = sorted(new.history, key=lambda line: (line["dice"], line["epoch"]), reverse=True)
            new.kept = [line["epoch"] for line in ranked[: self.recipe.train.keep_best]]
            if epoch in new.kept:
                self._keep(KEPT.format(epoch), record)
        self.position = new
        if dist.is_main():
            self._save()
            for path in self.folder.glob(KEPT.format("*")):  # those that others have overtaken
                if path.name not in map(KEPT.format, new.kept):
                    path.unlink()
            log.write_jsonl(self.folder / "log.jsonl", new.history)
        log.say(self._line(record, improved))
        if _stop_asked():
            self._stop()

    def _validate(self, feed: Feed) -> engine.Evaluation:
        """Score the fold's held-out images with the weights that the model now has, as a prediction would."""
        self.folded.fill(self.model)
        return engine.evaluate(
            self.folded,
            feed,
            self.validation,
            lambda row: self.data.cases[row].runs,
            self.rule,
            self.loss,
            self.dtype,
            annotation_size=self.recipe.data.annotation_size,
            batch_size=self.recipe.predict.batch_size,
            progress=lambda items: log.bar(items, total=len(items), title="validate"),
        )

    def _keep(self, name: str, record: dict[str, Any]) -> None:
        """Write the weights that the model now has as a checkpoint to predict from."""
        if dist.is_main():
            checkpoint.save({**self.identity, "model": self._weights(), "record": record}, self.folder / name)

    def _save(self) -> None:
        """Write last.pt, keeping the one before as prev.pt."""
        if not dist.is_main():
            return
        state = {
            **self.identity,
            "model": self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "position": asdict(self.position),
            "merged": self.merged,
            "processes": dist.world(),
            "autocast": str(self.dtype),
            "versions": {"torch": str(torch.__version__), "numpy": str(np.__version__)},
        }
        checkpoint.save(state, self.folder / "last.pt", keep=self.folder / "prev.pt")
        self._status("running")

    def _stop(self) -> None:
        """Leave after a signal; the checkpoint has been written."""
        numbers = [number for number in dist.gather(_signals.number) if number]
        _signals.number = _signals.number or numbers[0]
        if dist.is_main():
            self._status("stopped", signal=_signals.number)
        raise Stopped(
            f"{self.folder}: stopped by {signal.Signals(_signals.number).name} at epoch {self.position.epoch}, step "
            f"{self.position.step}. The same command goes on from there."
        )

    def _weights(self) -> dict[str, Tensor]:
        return {key: tensor.contiguous() for key, tensor in self.model.state_dict().items()}

    def _status(self, state: str, **details: Any) -> None:
        position = self.position
        log.write_status(
            self.folder,
            state,
            epoch=min(position.epoch, self.settings.epochs),
            epochs=self.settings.epochs,
            step=position.step,
            best_dice=position.best if position.best_epoch else None,
            best_epoch=position.best_epoch,
            process=os.getpid(),
            **details,
        )

    def _lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _title(self, epoch: int) -> str:
        return f"fold {self.fold} stage {self.stage} epoch {epoch}/{self.settings.epochs}"

    def _line(self, record: dict[str, Any], improved: bool) -> str:
        def show(value: float | None, digits: int = 4) -> str:
            return "-" if value is None else f"{value:.{digits}f}"

        return (
            f"{self._title(record['epoch'])}: loss {show(record['loss'])}, val {show(record['val_loss'])}, "
            f"Dice {show(record['dice'])} (all empty {show(record['all_empty'])}), "
            f"positives {show(record['dice_positive'])}, true negatives {show(record['true_negative_rate'])}, "
            f"lr {record['lr']:.0e}, {record['seconds']:.0f} s, {record['images_per_second']:.1f} images/s"
            + (f", peak {record['peak_gb']:.1f} GB" if "peak_gb" in record else "")
            + (" *" if improved else "")
        )


def augmented(
    image: Tensor, mask: Tensor, settings: AugmentConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Augment a batch as a recipe says.

    Args:
        image, mask: (B, 1, S, S) uint8.
        generator: on the same device.

    Returns:
        (B, 1, S, S) float32 in [0, 1], channels_last, and (B, 1, S, S) float32 of 0 and 1.
    """
    low, high = settings.gamma
    values = {**asdict(settings), "gamma": (low, high)}
    warp = augment.draw(len(image), image.shape[-1], generator, **values)
    image, mask = augment.apply(image, mask, warp)
    return image.contiguous(memory_format=torch.channels_last), mask


def _record(result: engine.Evaluation, positive: np.ndarray) -> dict[str, Any]:
    """Log values of one validation; a mean over no image is None."""
    return {
        "val_loss": result.loss if math.isfinite(result.loss) else None,
        "dice": float(result.dice.mean()),
        "dice_positive": float(result.dice[positive].mean()) if positive.any() else None,
        "true_negative_rate": float(result.dice[~positive].mean()) if not positive.all() else None,
    }


def _stop_asked() -> bool:
    return any(dist.gather(_signals.number))


@contextmanager
def _true_status(folder: Path) -> Iterator[None]:
    """Say in status.json when a run ends by an error."""
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        old = log.read_status(folder)
        if old["state"] == "running":
            log.write_status(
                folder, "failed", **{k: v for k, v in old.items() if k != "state"}, reason=str(error)[:500]
            )
        raise
