"""What one process of a launch does in test_engine.py: `python two_processes.py OUT`, placed by its environment.

Trains and validates a small net on made-up images and writes what test_engine compares.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from pneumo import dist, engine
from pneumo.data import feed as feeds
from pneumo.data.feed import Feed
from pneumo.data.pack import Pack
from pneumo.decision.rule import Rule
from pneumo.engine import LossSettings, RunningStatistics
from pneumo.kernels.runs import mask_to_runs
from pneumo.model.unet import UNet

LOSS = LossSettings("focal_dice", 10.0, 2.0, 1.0)
CPU = torch.device("cpu")
SMALL = "test_resnet"  # an encoder
SIZES = range(1, 14)  # of a validation fold; with 2 in a batch and 2 processes, one has none at the first two


def made_up(count: int, side: int) -> tuple[Pack, np.ndarray]:
    rng = np.random.default_rng(3)
    images = rng.integers(0, 120, (count, side, side), dtype=np.uint8)
    masks = np.zeros((count, side, side), dtype=bool)
    masks[::3, 8:20, 4:24] = True
    images[masks] += 100
    ids, shapes = tuple(map(str, range(count))), np.full((count, 2), side)
    return Pack(ids, images, np.packbits(masks, axis=2), shapes, "digest", np.arange(len(ids))), masks


def counted_allreduce(
    reductions: list[int], bucket: torch.distributed.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """What DDP does with gradients by itself, noted once for each backward pass that does it."""
    if bucket.is_last():
        reductions.append(bucket.index())
    return allreduce_hook(torch.distributed.group.WORLD, bucket)


class OtherStride(torch.autograd.Function):
    """A (1, C, 3, 3) weight as it is; its gradient has another stride on the side of length 1, as a kernel's may."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor) -> torch.Tensor:
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        channels = gradient.shape[1]
        return gradient.new_empty_strided(gradient.shape, (channels, 1, 3 * channels, channels)).copy_(gradient)


class Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 1, 3, bias=False).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, OtherStride.apply(self.conv.weight))


def wrapped_head() -> dict[str, torch.Tensor]:
    """How often DDP warns of a gradient whose strides are not its parameter's, and that gradient."""
    torch.manual_seed(0)
    head = Head()
    wrapped = dist.wrap(head)  # what it does ends with it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped(torch.full((1, 8, 4, 4), 1.0 + dist.rank())).sum().backward()
    return {"warnings": torch.tensor(len(caught)), "gradient": head.conv.weight.grad}


def train(
    encoder: str, dtype: torch.dtype, step_count: int, autocast: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Train; 13 images in micro-batches of 2, 3 micro-batches a step: the last step leaves a process idle."""
    pack, _ = made_up(13, 64)
    torch.manual_seed(0)
    model = UNet(encoder, decoder_channels=(8, 8, 8, 4, 4)).to(dtype)
    running = RunningStatistics(model)
    optimizer = engine.Adam(model.parameters(), lr=1e-3)
    scaler = engine.grad_scaler(CPU, autocast)
    wrapped = dist.wrap(model)
    reductions = []
    if dist.world() > 1:
        wrapped.register_comm_hook(reductions, counted_allreduce)
    feed, late, read, gradients = Feed(pack, CPU, np.arange(13)), engine.Late(), [], None
    epoch = 0
    while len(read) + late.LAG < step_count:
        epoch += 1
        order = np.random.default_rng(epoch).permutation(13)
        plan = feeds.steps(order, batch_size=2, accumulation=3)
        batches = iter(feed.batches(list(engine.own_steps(plan, 0))))
        for step in plan:
            micro_batches = (
                (image.to(dtype) / 255, mask) for image, mask in (next(batches) for _ in engine.share(step))
            )
            stats = engine.train_step(
                wrapped, micro_batches, optimizer, scaler, running, LOSS, autocast, count=len(step)
            )
            if gradients is None:
                gradients = {f"grad {n}": p.grad.clone() for n, p in model.named_parameters()}
            read += late.push(stats)
    read += late.drain()
    losses, taken = (torch.tensor([stats[i] for stats in read], dtype=torch.float64) for i in (0, 1))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return {**state, **gradients, "losses": losses, "taken": taken, "reductions": torch.tensor(len(reductions))}


def evaluate(model: UNet, count: int) -> dict[str, torch.Tensor]:
    """Validate `count` images in batches of 2."""
    pack, masks = made_up(count, 64)
    result = engine.evaluate(
        model,
        Feed(pack, CPU, np.arange(count)),
        np.arange(count),
        lambda row: mask_to_runs(masks[row]),
        Rule(threshold=0.5, min_area=5),
        LOSS,
        torch.float32,
        annotation_size=64,
        batch_size=2,
        progress=lambda items: items,
    )
    return {
        "rows": torch.from_numpy(result.rows),
        "dice": torch.from_numpy(result.dice),
        "loss": torch.tensor([result.loss], dtype=torch.float64),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with dist.launch(60.0):
        torch.manual_seed(0)
        small = UNet(SMALL, decoder_channels=(8, 8, 8, 4, 4))
        results = {
            "float64": train(SMALL, torch.float64, 20),  # the CPU's float64 convolution is slow
            "float32": train("resnet18", torch.float32, 3),
            "float16": train(SMALL, torch.float32, 3, torch.float16),
            "head": wrapped_head(),
            **{f"evaluate {count}": evaluate(small, count) for count in SIZES},
        }
        torch.save(results, Path(sys.argv[1]) / f"{dist.rank()}-of-{dist.world()}.pt")
