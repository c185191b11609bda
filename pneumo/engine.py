"""One optimizer step, and one evaluation: where feed, model and decision meet on the device.

Nothing here waits for the device in a training step: what the host must know it reads two steps late. Imports data,
model, decision, dist, errors.
"""

import gc
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.modules.batchnorm import _BatchNorm

from pneumo import dist
from pneumo.data.feed import Feed, cut
from pneumo.decision import metrics
from pneumo.decision.rule import Rule, decide, decide_batch, resize_quantise
from pneumo.errors import is_gpu_full, one_line
from pneumo.model import losses

LARGEST = 16  # images of a forward pass that are enough to keep a GPU busy
GRID_BYTES = 24  # that a pixel of the annotation grid takes while an image's probabilities become tables; counted: 21


@dataclass(frozen=True)
class LossSettings:
    """Which loss, and its numbers; see `pneumo.model.losses`.

    Attributes:
        compute: `losses.loss` compiled; None for it as it stands.
    """

    kind: losses.Kind
    focal_weight: float
    gamma: float
    smooth: float
    compute: Callable[..., Tensor] | None = None


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype:
    """The type in which convolutions compute.

    Args:
        amp: "bf16", "fp16", "off", or "auto" for bf16 where the device's units compute in it, else fp16 on CUDA.
    """
    if amp == "auto":
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            amp = "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


def grad_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """What keeps gradients in float16's range; does nothing in other types.

    `dist.wrap` divides gradients by the number of processes, `train_step` multiplies by it before, so that they would
    overflow in steps that one process takes, were the scale not as many times smaller. This is exact for powers of two.

    Args:
        device: of the gradients.
        dtype: of autocast.
    """
    return torch.amp.GradScaler(device.type, init_scale=2.0**16 / dist.world(), enabled=dtype == torch.float16)


class RunningStatistics:
    """Batch-norm statistics that do not depend on which process saw which micro-batch.

    During training every forward pass leaves the statistics of its own micro-batch in the buffers. `fold` gathers
    them over processes and folds them into the running ones in the order of the plan, as one process would have; so
    the buffers of all processes are equal after every step.

    Args:
        model: its batch norms are taken over; their momentum is kept here.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self.counts = [norm.num_batches_tracked for norm in norms]
        self.count = self.counts[0].clone()  # micro-batches of all processes
        self.sizes = [len(buffer) for buffer in self.buffers]
        self.running = torch.cat([buffer.clone() for buffer in self.buffers])
        rates = [norm.momentum for norm in norms for _ in range(2)]
        self.momentum = torch.cat(
            [torch.full_like(buffer, rate) for buffer, rate in zip(self.buffers, rates, strict=True)]
        )
        for norm in norms:
            norm.momentum = 1.0  # a forward pass writes its own statistics

    def before_forward(self) -> None:
        """Clear the buffers: 0 * NaN, left by a bad micro-batch, would be NaN again."""
        torch._foreach_zero_(self.buffers)

    def captured(self) -> Tensor:
        """(K,) statistics that the last forward pass left."""
        return torch.cat(self.buffers)

    def fold(self, slots: Tensor, finite: Tensor) -> None:
        """Fold in one step's statistics.

        Args:
            slots: (M, K), one row for each micro-batch of the step in plan order; rows of other processes are 0.
            finite: () bool; where False the step is as if it had not been.
        """
        folded = self.running
        for slot in dist.sum_over_processes(slots):
            folded = folded.lerp(slot, self.momentum)
        self.running = torch.where(finite, folded, self.running)
        self.count = self.count + len(slots) * finite
        self.restore()

    def restore(self) -> None:
        """Put the running statistics into the buffers, whatever forward passes left there."""
        torch._foreach_copy_(self.buffers, list(self.running.split(self.sizes)))
        torch._foreach_copy_(self.counts, [self.count] * len(self.counts))


class WeightAverage:
    """Exponential moving average of a model's weights and batch-norm statistics, kept on the device.

    Args:
        model: not wrapped for distribution.
        decay: share of the old average that a step leaves, in (0, 1); smaller in the first steps, so that the random
            start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._live = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        self._average = [tensor.clone() for tensor in self._live.values()]

    @torch.no_grad()
    def update(self, taken: Tensor) -> None:
        """Take in the weights after a step; () float `taken` is 0 where the step was skipped, 1 else."""
        self.updates += 1
        keep = min(self.decay, self.updates / (self.updates + 9))
        change = torch._foreach_sub(list(self._live.values()), self._average)
        torch._foreach_mul_(change, taken * (1 - keep))
        torch._foreach_add_(self._average, change)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within, the model has the averaged weights."""
        live = list(self._live.values())
        with torch.no_grad():
            kept = [tensor.clone() for tensor in live]
            torch._foreach_copy_(live, self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(live, kept)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        weights = {name: tensor.contiguous() for name, tensor in zip(self._live, self._average, strict=True)}
        return {"updates": self.updates, "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.updates = state["updates"]
        for name, tensor in zip(self._live, self._average, strict=True):
            tensor.copy_(state["weights"][name])


class Adam(torch.optim.Adam):
    """PyTorch's fused Adam, given tensors in the order in which they lie in memory.

    On a CPU PyTorch's own copies all that is not contiguous, which in channels_last memory takes as long again as the
    step, and computes nonsense, without a word, where a gradient or a moment lies otherwise than its parameter.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, fused=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, with each moment laid out as its parameter is."""
        super().load_state_dict(state_dict)
        for parameter, moments in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(parameter).copy_(moments[name])

    def _init_group(
        self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], *others: list[Tensor]
    ) -> bool:
        """Fill the lists of what a step works on."""
        has_complex = super()._init_group(group, parameters, gradients, *others)
        moments = others[:2]
        for i, parameter in enumerate(parameters):
            if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
                for tensors in (parameters, gradients, *moments):
                    tensors[i] = tensors[i].permute(0, 2, 3, 1)
            gradients[i] = gradients[i].contiguous()
        return has_complex


class Late:
    """Small device vectors, read on the host two steps after they were made, so that no step waits.

    All processes read the same step at the same time, whatever the speed of each.
    """

    LAG = 2

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def push(self, vector: Tensor) -> list[list[float]]:
        """Add the newest vector; return those that have become old enough to read."""
        event = None
        if vector.device.type == "cuda":
            vector = torch.empty_like(vector, device="cpu", pin_memory=True).copy_(vector, non_blocking=True)
            event = torch.cuda.current_stream().record_event()
        self._waiting.append((vector, event))
        return self._read(self.LAG)

    def drain(self) -> list[list[float]]:
        """Wait for and return all that is left."""
        return self._read(0)

    def _read(self, leave: int) -> list[list[float]]:
        ready = []
        while len(self._waiting) > leave:
            vector, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            ready.append(vector.tolist())
        return ready


def compiled(
    function: Callable[..., Any], batch: int, backend: str | Callable[..., Any] = "inductor"
) -> Callable[..., Any]:
    """Compile a function, or the forward pass of a module in place, for so many images at once.

    Fewer, as the last micro-batch of an epoch, run as they stand: how many these are differs from fold to fold, and
    compiling for each takes longer than it saves.

    Args:
        function: of a batch (B, ...) first of all; a module is not to be copied or pickled afterwards.
        batch: B of what is compiled.

    Returns:
        The function that does either, or the module.
    """
    if isinstance(function, nn.Module):
        function.forward = compiled(function.forward, batch, backend)
        return function
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # float32 is meant where it is left
    fast = torch.compile(function, dynamic=False, backend=backend)

    def either(images: Tensor, *more: Any, **named: Any) -> Any:
        return (fast if len(images) == batch else function)(images, *more, **named)

    return either


@cache
def compiler_trouble(device: torch.device) -> str:
    """Why nothing can be compiled for this device; "" if it can be. Tried once, on a few numbers.

    A compiler for GPUs needs one for C as well, and Python's headers.
    """
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # many types, of the compiler, Triton and the system
        if is_gpu_full(error):
            raise
        return f"{type(error).__name__}: {one_line(error)[:200]}"
    return ""


def is_of_the_compiler(error: RuntimeError) -> bool:
    """Whether the compiler, or one of its helper processes, failed."""
    return isinstance(error, TorchDynamoException) or "SubprocPool" in str(error)


def make_room(device: torch.device) -> None:
    """Give back what earlier work of this process still holds of a GPU's memory: compiled networks are in cycles."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def share(micro_batches: Sequence[np.ndarray]) -> list[int]:
    """Which micro-batches of a step this process computes, by place in the step.

    A process for which none is left computes the first once more; `train_step` gives it no weight.
    """
    return list(range(dist.rank(), len(micro_batches), dist.world())) or [0]


def add_gradient(
    model: nn.Module,
    image: Tensor,
    mask: Tensor,
    weight: float | Tensor,
    scaler: torch.amp.GradScaler,
    running: RunningStatistics,
    loss: LossSettings,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of one micro-batch's loss, times `weight`, to that of the parameters.

    Returns:
        () the loss, without the weight, and (K,) the statistics that the pass left in the batch norms.
    """
    running.before_forward()
    with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(image)
    value = (loss.compute or losses.loss)(
        logits, mask, loss.kind, focal_weight=loss.focal_weight, gamma=loss.gamma, smooth=loss.smooth
    )
    scaler.scale(value * weight).backward()
    return value.detach(), running.captured()


class RecordedGradient:
    """`add_gradient` recorded once as a CUDA graph: replayed, its hundreds of kernels cost the host a single launch.

    A smaller micro-batch, as the last of an epoch, goes the plain way. Gradients stay the tensors that they are: they
    are set to zero between steps, not to None.

    Args:
        model: not wrapped for distribution, on a GPU.
        batch: images of a full micro-batch.
        scaler, running, loss, dtype: as of `add_gradient`.
    """

    WARM_UP = 3  # passes before recording: compilation, choice of algorithms, memory of libraries

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        scaler: torch.amp.GradScaler,
        running: RunningStatistics,
        loss: LossSettings,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.batch = model, batch
        self.how = (scaler, running, loss, dtype)
        self.given: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, image: Tensor, mask: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """As `add_gradient`; what it returns is overwritten by the next call."""
        if len(image) != self.batch:
            return add_gradient(self.model, image, mask, weight, *self.how)
        if self.given is None:
            self._begin(image, mask)
        self.given[0].copy_(image)
        self.given[1].copy_(mask)
        self.given[2].fill_(weight)
        return self._replay()

    def _begin(self, image: Tensor, mask: Tensor) -> None:
        """Record the first full micro-batch; its weight is 0 meanwhile, so that nothing is added that is finite."""
        self.given = image.clone(), mask.clone(), torch.zeros((), device=image.device)
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._replay = self._record(lambda: add_gradient(self.model, *self.given, *self.how))

    def _record(self, work: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, Tensor]]:
        """Record `work`; return what replays it and gives the tensors that it writes its results into."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(self.WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = work()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return results

        return replay


def train_step(
    model: nn.Module,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    running: RunningStatistics,
    loss: LossSettings,
    dtype: torch.dtype,
    *,
    count: int,
    flags: Sequence[float] = (),
    recorded: RecordedGradient | None = None,
) -> Tensor:
    """Take one optimizer step, without waiting for the device.

    The gradient is the mean over the step's micro-batches, each of which pools its own pixels in batch norm and
    Dice; so the step is the same whichever process computes which. A step whose loss or gradient is not finite
    changes nothing.

    Args:
        model: maps (B, 1, H, W) to logits (B, 1, H, W); wrapped by `dist.wrap`.
        micro_batches: (image, mask) pairs on the model's device, those that `share` gave this process.
        optimizer: fused, so that it can skip a step on the device.
        scaler: enabled only if `dtype`, the autocast type, is float16.
        count: micro-batches of the step over all processes.
        flags: numbers of this process to be summed over processes.
        recorded: computes gradients in place of `add_gradient`, of the same model; in a launch of one process.

    Returns:
        (3 + len(flags),) float32 on the device: mean loss, 1 if the step was taken, gradient norm, flag sums.
    """
    optimizer.zero_grad(set_to_none=recorded is None)
    own = range(dist.rank(), count, dist.world())
    slots = running.running.new_zeros(count, len(running.running))
    total = running.running.new_zeros(())
    passes = max(len(own), 1)
    weight = dist.world() / count if own else 0.0  # gradients are averaged over processes
    for i, (image, mask) in enumerate(micro_batches):
        with dist.sync_gradients(model, i == passes - 1):
            if recorded is None:
                value, statistics = add_gradient(model, image, mask, weight, scaler, running, loss, dtype)
            else:
                value, statistics = recorded(image, mask, weight)
        if own:
            slots[own[i]] = statistics
            total = total + value
    scaler.unscale_(optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    sums = torch.cat([total.float()[None] / count, _to_device(flags, total.device)])
    sums = dist.sum_over_processes(sums)
    finite = norm.isfinite() & sums[0].isfinite()
    optimizer.found_inf = (~finite).float()
    optimizer.grad_scale = None
    optimizer.step()
    if scaler.is_enabled():
        scaler.update()
    running.fold(slots, finite)
    return torch.cat([sums[:1], finite.float()[None], norm.float()[None], sums[1:]])


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a fold gives.

    Attributes:
        rows: (N,) the evaluated row numbers, each once.
        dice: (N,) float64, the challenge's Dice of each under the rule; 0 where the network gave what is not finite.
        loss: one value over all pixels of the fold.
        finite: (N,) bool.
    """

    rows: np.ndarray
    dice: np.ndarray
    loss: float
    finite: np.ndarray


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    feed: Feed,
    rows: np.ndarray,
    truth: Callable[[int], np.ndarray],
    rule: Rule,
    loss: LossSettings,
    dtype: torch.dtype,
    *,
    annotation_size: int,
    batch_size: int,
    progress: Callable[..., Iterable],
    stopped: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Score every image once, whatever the number of processes, by the code that writes a submission.

    Batches are the same for any number of processes, so per-image values are, too.

    Args:
        model: not wrapped for distribution; is set to evaluation and back to training.
        rows: (N,) row numbers of the feed.
        truth: gives a row's runs on the annotation grid.
        progress: makes a bar, as `log.bar`.
        stopped: asked after every batch; once it says yes on one process, nothing comes of this.

    Returns:
        The same on every process; None if one was stopped.
    """
    model.eval()
    batches = cut(rows, batch_size)
    mine = list(range(dist.rank(), len(batches), dist.world()))
    scores: list[tuple[int, list[float], list[float], list[float]]] = []  # batch number, loss sums, finite, Dice

    def score(number: int, sums: list[float], finite: list[float], decided: Iterable[np.ndarray]) -> None:
        found = zip(finite, decided, batches[number].tolist(), strict=True)
        scores.append((number, sums, finite, [good * metrics.dice_runs(runs, truth(row)) for good, runs, row in found]))

    with ThreadPoolExecutor(1) as pool:  # the host decides on one batch while the device computes the next
        pending: deque = deque()
        for number, (image, mask) in zip(progress(mine), feed.batches([batches[i] for i in mine]), strict=True):
            logits = predict_logits(model, image, dtype)
            sums = losses.loss_sums(logits, mask, loss.kind, gamma=loss.gamma).double()
            finite = logits.isfinite().flatten(1).all(dim=1)
            numbers = torch.cat([sums, finite.double()]).tolist()  # waits for the device, once
            q = resize_quantise(logits.sigmoid(), annotation_size, feed.pack.boxes(batches[number], annotation_size))
            decided = decide_batch(q, rule) if q.is_cuda else pool.map(decide, q.numpy(), repeat(rule))
            pending.append((number, numbers[: len(sums)], numbers[len(sums) :], decided))
            if stopped():
                break
            while len(pending) > 2:
                score(*pending.popleft())
        for batch in pending:
            score(*batch)
    model.train()
    if any(dist.gather(stopped())):
        return None
    everyone = sorted(item for part in dist.gather(scores) for item in part)  # adds up in one order everywhere
    total = np.sum([sums for _, sums, _, _ in everyone], axis=0)
    value = losses.loss_from_sums(
        torch.from_numpy(total), loss.kind, focal_weight=loss.focal_weight, smooth=loss.smooth
    )
    good, dice = (np.array([value for item in everyone for value in item[place]]) for place in (2, 3))
    return Evaluation(np.concatenate(batches), dice, float(value), good > 0)


def predict_logits(model: nn.Module, image: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of uint8 images, as float32.

    Args:
        image: (B, 1, S, S) uint8.

    Raises:
        TypeError: they are not uint8; in [0, 1] they would be all but black.
    """
    if image.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 grey levels, got {image.dtype}")
    with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
        return model(to_input(image)).float()


@torch.inference_mode()
def fitting_batch(model: nn.Module, side: int, grid: int, dtype: torch.dtype, device: torch.device, memory: int) -> int:
    """How many images, each with its mirror image, a forward pass on a GPU can take: a power of two up to `LARGEST`.

    Args:
        model: in evaluation.
        side: of the images, pixels.
        grid: side of the annotation grid that the probabilities go to.
        memory: bytes for the pass and what goes to the annotation grid.
    """
    pair = torch.zeros(2, 1, side, side, dtype=torch.uint8, device=device)
    predict_logits(model, pair, dtype)  # what libraries keep for themselves is there from now on
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    predict_logits(model, pair, dtype)
    each = torch.cuda.max_memory_allocated(device) - before + GRID_BYTES * grid**2
    return 1 << (max(1, min(memory // each, LARGEST)).bit_length() - 1)


def to_input(image: Tensor) -> Tensor:
    """uint8 grey levels as the model takes them: float32 in [0, 1], in channels_last memory."""
    return (image.float() / 255).contiguous(memory_format=torch.channels_last)


def cosine(done: float) -> float:
    """Factor of the learning rate when a share `done` of all steps is taken: from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


def own_steps(plan: Sequence[Sequence[np.ndarray]], start: int) -> Iterator[np.ndarray]:
    """This process's micro-batches from step `start` on, in order."""
    for micro_batches in plan[start:]:
        yield from (micro_batches[i] for i in share(micro_batches))


def _to_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    vector = torch.tensor(numbers, dtype=torch.float32)
    return vector.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else vector
