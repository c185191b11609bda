"""One stage of one fold: chained to the stage before it, resumable at any step, stopped cleanly by a signal.

Imports resume, config, dataset, engine, measured, stages, signals, checkpoint, log, dist, model, data, decision,
kernels, errors.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pneumo import checkpoint, config, dataset, dist, engine, log, measured, stages
from pneumo.config import AugmentConfig, Recipe, StageConfig
from pneumo.data import feed as feeds
from pneumo.data.feed import Feed
from pneumo.dataset import Dataset
from pneumo.decision.rule import Rule
from pneumo.engine import LossSettings, RunningStatistics
from pneumo.errors import (
    NotFiniteError,
    Stopped,
    StoppedAlone,
    UsageError,
    WriteError,
    is_gpu_full,
    one_line,
)
from pneumo.kernels import thin_conv
from pneumo.model import augment, losses
from pneumo.model.folded import FoldedUNet
from pneumo.model.unet import UNet
from pneumo.resume import Position, StageFolder, of_this_run
from pneumo.signals import Interrupted, Signals

FOUND = 0.05  # Dice on positives below which next to nothing of them is found
SPARED = 0.5  # of the negatives, share with an empty mask below which a network marks too many healthy images
COMPILER = "It takes gcc and g++, Python's headers (python3-dev) and, on a GPU, one that Triton knows"


class _StopAsked(Exception):
    """A signal came during validation."""


_signals = Signals()


def train_stage(recipe: Recipe, data: Dataset, fold: int, stage: int, device: torch.device) -> None:
    """Train one stage of one fold to its end, from where it was left if it was started before.

    A stage that is done goes on if it is given more epochs: on a plateau schedule an epoch does not depend on how many
    follow, so it ends as if it had had them from the start. One that gets no more of them needs last.pt and prev.pt no
    longer.

    Writes last.pt, best.pt, log.jsonl, config.toml and status.json into the recipe's run folder, and ema.pt and the
    kept epochs where the recipe asks for them.

    Raises:
        UsageError: the folder is in use, belongs to other settings, or the stage before is not done.
        DataError: a checkpoint is damaged, of other data or gone.
        NotFiniteError: too many steps in a row were not finite.
        Stopped: after a signal that asks to end, with a checkpoint; or when the stage is done.
    """
    folder = recipe.stage_folder(fold, stage)
    dataset.check_fold(recipe, data, fold)
    if not data.positive[data.folds == fold].any():
        log.warn(f"fold {fold} holds no image with pneumothorax: its best epoch is chosen by negatives alone")
    engine.make_room(device)
    if dist.is_main():
        with checkpoint.lock(folder), _signals.caught(), _true_status(folder):
            _Run(recipe, data, fold, stage, device).train()
    else:
        with _signals.caught():
            _Run(recipe, data, fold, stage, device).train()


class _Run:
    """The state of one stage while it trains."""

    def __init__(self, recipe: Recipe, data: Dataset, fold: int, stage: int, device: torch.device) -> None:
        self.recipe, self.data, self.fold, self.stage, self.device = recipe, data, fold, stage, device
        self.settings: StageConfig = recipe.stage[stage]
        self.loss = LossSettings(
            self.settings.loss,
            focal_weight=self.settings.focal_weight,
            gamma=self.settings.gamma,
            smooth=self.settings.smooth,
        )
        self.rule = Rule.of(recipe.rule)
        self.dtype = engine.autocast_dtype(recipe.train.amp, device)
        self.files = StageFolder(recipe, data, fold, stage, self.dtype)
        self.folder = self.files.path
        inside = data.folds == fold
        self.training, self.validation = np.flatnonzero(~inside), np.flatnonzero(inside)
        self.transform = augment.transform
        self.position = Position()
        self.noted = 0  # the step of the epoch whose numbers the host reads next
        self.done = False

    def train(self) -> None:
        """Run all epochs that are left."""
        try:
            self._train()
        except Interrupted:
            self._leave_alone("before it trained")
        except RuntimeError as error:
            if not (_signals.number and engine.is_of_the_compiler(error)):
                raise
            self._leave_alone("while it compiled")
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                f"{self.recipe.model.encoder} cannot train on a micro-batch of one image: its batch norm takes single "
                f"values. An epoch's last micro-batch has what is left of its images; choose another "
                f"stage.{self.stage}.batch_size, by which that is more than one, or another model.encoder"
            ) from error
        if _stop_asked():
            self._stop()

    def _train(self) -> None:
        saved = self.files.load_last()
        if saved is not None:
            self.position = Position(**saved["position"])
        elif dist.broadcast(dist.is_main() and self.files.outlived()):
            self.done = True
            log.say(f"{self.folder}: done, nothing to do; last.pt is not there, so it cannot be given more epochs")
            return
        if self.position.epoch > self.settings.epochs:
            if dist.is_main():
                self.files.publish(self.position)  # in case that the run ended just before
            self._finish()
            log.say(f"{self.folder}: done, nothing to do")
            return
        with _signals.at_once():
            self._build(saved)
        self._choose_way()
        if dist.is_main():
            checkpoint.write_atomic(self.folder / "config.toml", config.dumps(self.recipe).encode())
            settings = ", ".join(f"{key} {value}" for key, value in asdict(self.settings).items())
            log.say(f"{self.folder / 'config.toml'}: {settings}")
            self._status("running")
        reserve = self.recipe.train.gpu_reserve
        with _signals.at_once():
            pack = dataset.open_train(self.recipe, self.data, self.settings.image_size)
            feed = Feed(pack, self.device, np.arange(len(self.data.cases)), reserve=reserve)
        log.say(
            f"fold {self.fold} stage {self.stage}: {len(self.training)} images to train on, {len(self.validation)} to "
            f"validate, {self.settings.image_size} px {feed}; {dist.world()} x {self.device.type}, "
            f"{str(self.dtype).removeprefix('torch.')}, "
            f"{sum(self.merged)} of {len(self.merged)} blocks merged, validation by {self.evaluation_batch}"
            + (f"; goes on at epoch {self.position.epoch}, step {self.position.step}" if saved else "")
        )
        if self.to_compile:
            self._compile()
        self.recorded = (
            engine.RecordedGradient(
                self.model, self.settings.batch_size, self.scaler, self.running, self.loss, self.dtype
            )
            if self.to_record
            else None
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
        self._finish()
        self._warn_of_nothing()

    def _finish(self) -> None:
        self.done = True
        if dist.is_main():
            self._status("done")

    def _warn_of_nothing(self) -> None:
        """Say that the best epoch is no better than masks that are all empty, which is easily taken for a result.

        A stage that others follow may well mark too much; it is worth a word only if it finds nothing.
        """
        position, all_empty = self.position, float((~self.data.positive[self.validation]).mean())
        if all_empty == 1:
            return  # no mask can be better
        best = next((line for line in position.history if line["epoch"] == position.best_epoch), {})
        found = best.get("dice_positive") or 0.0
        spared = best.get("true_negative_rate")
        if found > FOUND:
            what, other = "too much", "a higher"
        elif spared is not None and spared < SPARED:
            what, other = "little of what is there and much that is not", "a higher"
        else:
            what, other = "next to nothing", "a lower"
        if position.best > all_empty or (self.stage < self.recipe.stages and other == "a higher"):
            return
        losses = [(line["val_loss"], line["epoch"]) for line in position.history if line["val_loss"] is not None]
        lowest = f"; the validation loss was lowest in epoch {min(losses)[1]}" if losses else ""
        log.warn(
            f"{self.folder}: no epoch is better than all masks empty (Dice {all_empty:.4f}), so best.pt, of epoch "
            f"{position.best_epoch}, finds {what}{lowest}. What may help: more epochs, {other} rule.min_area or "
            f"rule.threshold, more data"
        )

    def _build(self, saved: dict[str, Any] | None) -> None:
        """Make model, optimizer and schedule, and put them where a checkpoint left them."""
        begin = None if saved is not None else self.files.load_start()
        known = saved is not None or begin is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(feeds.key(self.recipe.seed, self.fold, "model"))
            model = UNet(
                self.recipe.model.encoder,
                False if known else self.recipe.pretrained(self.fold),
                self.recipe.model.decoder_channels,
                self.recipe.model.checkpointing,
            )
        if known:
            with of_this_run(self.folder):
                model.load_state_dict((saved or begin)["model"])
        if saved is None:
            log.say(f"fold {self.fold} stage {self.stage} begins with {self.files.begins}")
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.merged = (
            measured.merged_blocks(self.recipe, self.stage, self.model, self.dtype, self.device)
            if saved is None
            else saved.get("merged")
        )
        with of_this_run(self.folder):
            for block, merged in zip(self.model.blocks, self.merged, strict=True):
                block.merged = merged
        self.folded = FoldedUNet(self.model, self.dtype)
        with of_this_run(self.folder):
            before = 0 if saved is None else int(saved["evaluation_batch"])
        self.evaluation_batch = (
            self.recipe.predict.batch_size
            or before
            or measured.evaluation_batch(self.recipe, self.folded, self.settings.image_size, self.dtype, self.device)
        )
        self.running = RunningStatistics(self.model)
        self.optimizer = engine.Adam(self.model.parameters(), self.settings.lr, self.settings.weight_decay)
        self.average = engine.WeightAverage(self.model, self.recipe.train.ema) if self.recipe.train.ema else None
        self.scaler = engine.grad_scaler(self.device, self.dtype)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer,
            factor=self.settings.factor,
            patience=self.settings.patience,
            threshold=self.settings.plateau_threshold,
        )
        if saved is not None:
            with of_this_run(self.folder):
                self.optimizer.load_state_dict(saved["optimizer"])
                self.plateau.load_state_dict(saved["plateau"])
                self.scaler.load_state_dict(saved["scaler"])
                if self.average is not None:
                    self.average.load_state_dict(saved["average"])

    def _choose_way(self) -> None:
        """Decide whether the step is compiled and recorded, as the recipe says; wrap it for several processes.

        Raises:
            UsageError: the recipe insists on what cannot be.
        """
        how, gpu = self.recipe.train.compile, self.device.type == "cuda"
        recordable = gpu and dist.world() == 1 and not self.recipe.model.checkpointing
        if how == "graph" and not recordable:
            raise UsageError(
                "train.compile=graph records what one process does on a GPU, without model.checkpointing. Train so, or "
                "start anew with train.compile=auto"
            )
        self.wrapped: nn.Module = dist.wrap(self.model)
        full = len(self.training) >= self.settings.batch_size  # else there is nothing that would run compiled
        self.to_compile = full and (how in ("on", "graph") or (how == "auto" and gpu)) and self._can_compile()
        self.to_record = how == "graph" or (how == "auto" and recordable)

    def _compile(self) -> None:
        """Compile the step, all of it now; where that fails, train without.

        Raises:
            UsageError: it fails, and the recipe insists.
        """
        batch, plain = self.settings.batch_size, (self.transform, self.loss)
        engine.compiled(self.model, batch)
        if self.device.type == "cuda":
            if self.dtype in thin_conv.HALVES:
                thin_conv.works(self.device, self.dtype)  # found out here, not while the compiler traces
            self.transform = engine.compiled(augment.transform, batch)
            self.loss = replace(self.loss, compute=engine.compiled(losses.loss, batch))
        trouble = self._rehearse()
        if trouble and self.recipe.train.compile != "auto":
            raise UsageError(f"This network cannot be compiled here: {trouble}. --set train.compile=off trains without")
        if trouble:
            del self.model.forward  # the compiled one
            self.transform, self.loss = plain
            log.warn(f"This network is not compiled, so training takes longer: {trouble}")

    def _rehearse(self) -> str:
        """Take a full micro-batch, which counts for nothing, through the step; leave all as it was.

        Returns:
            Why that cannot be done; "" if it can.
        """
        side = self.settings.image_size
        blank = torch.zeros(self.settings.batch_size, 1, side, side, dtype=torch.uint8, device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        try:
            image, mask = augmented(blank, blank.clone(), self.recipe.augment, generator, self.transform)
            with dist.sync_gradients(self.wrapped, False):
                engine.add_gradient(self.wrapped, image, mask, 0.0, self.scaler, self.running, self.loss, self.dtype)
        except Exception as error:  # many types, of the compiler, Triton and the system
            if _signals.number or is_gpu_full(error):
                raise
            return f"{type(error).__name__}: {one_line(error)[:200]}"
        finally:
            self.model.zero_grad()
            self.running.restore()
        engine.make_room(self.device)
        return ""

    def _can_compile(self) -> bool:
        """Whether anything can be compiled for this device.

        Raises:
            UsageError: nothing can, and the recipe insists.
        """
        trouble = engine.compiler_trouble(self.device)
        if trouble and _signals.number:
            self._leave_alone("while it compiled")
        if trouble and self.recipe.train.compile != "auto":
            raise UsageError(f"Nothing can be compiled here: {trouble}. {COMPILER}; or --set train.compile=off")
        if trouble:
            log.warn(f"Nothing is compiled, so training takes longer: {trouble}. {COMPILER}.")
        return not trouble

    def _train_epoch(self, feed: Feed, plan: list[list[np.ndarray]]) -> None:
        """Take the steps of the epoch that are left."""
        epoch, position = self.position.epoch, self.position
        self.noted = position.step
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
                recorded=self.recorded,
            )
            if self.average is not None:
                self.average.update(stats[1])
            position.step = step + 1
            position.images += sum(map(len, plan[step]))
            position.seen += sum(map(len, plan[step]))
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
            yield augmented(image, mask, self.recipe.augment, generator, self.transform)

    def _note(self, finished_steps: list[list[float]], plan: list[list[np.ndarray]]) -> tuple[bool, bool]:
        """Take in what the host now knows of earlier steps; return whether to stop and whether to save."""
        stop = save = False
        for loss, taken, _norm, stop_flags, save_flags in finished_steps:
            step, self.noted = self.noted, self.noted + 1
            stop, save = stop or stop_flags > 0, save or save_flags > 0
            if taken:
                self.position.loss_sum += loss
                self.position.taken += 1
                self.position.skipped = 0
                continue
            self.position.skipped += 1
            limit = self.recipe.train.nonfinite_steps
            ids = [self.data.cases[row].image_id for row in np.concatenate(plan[step])]
            where = f"epoch {self.position.epoch}, step {step + 1:,}"
            if self.position.skipped >= limit:
                raise NotFiniteError(
                    f"Loss or gradient was not finite for {limit} steps in a row (to {where}; last ids "
                    f"{', '.join(ids[:4])}, ...). No bad weights were saved; {self.files.intact()}. "
                    f"Try --set train.amp=off or a lower stage.{self.stage}.lr."
                )
            if not (self.scaler.is_enabled() and math.isfinite(loss)):  # else the scaler is finding its scale
                log.warn(f"{where} was skipped: loss or gradient is not finite, of {', '.join(ids)}")
        return stop, save

    def _finish_epoch(self, feed: Feed) -> None:
        """Validate, log, keep the best, and save."""
        position, epoch = self.position, self.position.epoch
        if self.files.saved is None:
            self._save()  # so that there is no best.pt without it
        try:
            result = self._validate(feed)
            if self.average is not None:
                with self.average.swapped_in():
                    averaged = self._validate(feed)
        except _StopAsked:  # goes on with this validation
            self._save()
            self._stop()
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
            record["peak_gb"] = torch.cuda.max_memory_reserved(self.device) / 2**30  # taken from the GPU so far
        if self.settings.schedule == "plateau":
            self.plateau.step(result.loss)
        new = Position(
            epoch=epoch + 1,
            seen=position.seen,
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
            values = _record(averaged, positive)
            if values["dice"] >= position.ema_best:
                new.ema_best, new.ema_best_epoch = values["dice"], epoch
                with self.average.swapped_in():
                    self._keep("ema.pt", {"epoch": epoch, **values})
            record |= {f"ema_{key}": value for key, value in values.items()}
        new.history = [*position.history, record]
        if self.recipe.train.keep_best > 1:
            ranked = sorted(new.history, key=lambda line: (line["dice"], line["epoch"]), reverse=True)
            new.kept = [line["epoch"] for line in ranked[: self.recipe.train.keep_best]]
        self.position = new
        if dist.is_main():
            self.files.prune(new)
            if epoch in new.kept:
                self._keep(stages.KEPT.format(epoch), record)
            self._save()
            self.files.publish(new)
        log.say(self._line(record, improved))
        if _stop_asked():
            self._stop()

    def _validate(self, feed: Feed) -> engine.Evaluation:
        """Score the fold's held-out images with the model's present weights, as a prediction without mirror would.

        Raises:
            _StopAsked: on every process, after a signal to one.
        """
        self.folded.fill(self.model)
        result = engine.evaluate(
            self.folded,
            feed,
            self.validation,
            lambda row: self.data.cases[row].runs,
            self.rule,
            self.loss,
            self.dtype,
            annotation_size=self.recipe.data.annotation_size,
            batch_size=self.evaluation_batch,
            progress=lambda items: log.bar(items, total=len(items), title="validate"),
            stopped=lambda: _signals.number > 0,
        )
        if result is None:
            raise _StopAsked
        if not result.finite.all():
            ids = [self.data.cases[row].image_id for row in result.rows[~result.finite]]
            more = ", ..." if len(ids) > 4 else ""
            log.warn(
                f"{self._title(self.position.epoch)}: for {len(ids)} of {len(result.rows)} images the network gave "
                f"numbers that are not finite, which count as Dice 0: {', '.join(ids[:4])}{more}. Try train.amp=off"
            )
        return result

    def _keep(self, name: str, record: dict[str, Any]) -> None:
        """Keep the weights that the model now has, to predict from."""
        if dist.is_main():
            self.files.keep(name, self._weights(), record)

    def _save(self) -> None:
        """Save all that this run needs to go on from here."""
        if not dist.is_main():
            return
        state = {
            "model": self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "merged": self.merged,
            "evaluation_batch": self.evaluation_batch,
        }
        self.files.save(self.position, state)
        self._status("running")

    def _stop(self) -> None:
        """Leave after a signal to any process; the checkpoint has been written."""
        numbers = [number for number in dist.gather(_signals.number) if number]
        _signals.number = _signals.number or numbers[0]
        where = "when it was done" if self.done else f"at {self.position}"
        self._leave(f"{where}. The same command goes on from there.")

    def _leave_alone(self, where: str) -> None:
        """Leave after a signal where nothing is saved: while the run waits, or where it ended the compiler, too."""
        self.position = self.files.saved or Position()
        intact = f"; {self.files.intact()}" if dist.is_main() else ""  # which the others do not know
        self._leave(f"{where}{intact}. The same command goes on.", StoppedAlone)

    def _leave(self, where: str, kind: type[Stopped] = Stopped) -> None:
        if dist.is_main() and not self.done:
            self._status("stopped", signal=_signals.number)
        stopped = kind(f"{self.folder}: stopped by {signal.Signals(_signals.number).name} {where}")
        stopped.exit_code = 128 + _signals.number
        raise stopped

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
            images_seen=position.seen,
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
    image: Tensor,
    mask: Tensor,
    settings: AugmentConfig,
    generator: torch.Generator,
    transform: Callable[..., tuple[Tensor, Tensor]] = augment.transform,
) -> tuple[Tensor, Tensor]:
    """Augment a batch as a recipe says.

    Args:
        image, mask: (B, 1, S, S) uint8.
        generator: on the same device.
        transform: `augment.transform`, or that compiled.

    Returns:
        (B, 1, S, S) float32 in [0, 1], channels_last, and (B, 1, S, S) float32 of 0 and 1.
    """
    values = asdict(settings)
    numbers = augment.random_numbers(len(image), image.shape[-1], generator, **values)
    image, mask = transform(image, mask, *numbers, **values)
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
    """Say in status.json when a run ends by an error, also by one of another process."""

    def failed(reason: str) -> None:
        old = log.read_status(folder)
        if old["state"] in ("running", "missing"):
            with suppress(WriteError):  # the disk may be the reason
                log.write_status(folder, **{**old, "state": "failed"}, reason=reason[:500])

    try:
        with dist.last_words(failed):
            yield
    except Stopped:
        raise
    except BaseException as error:
        failed(dist.reason(error) or type(error).__name__)
        raise
