"""All distributed code: one launch of one or many processes, and the identity in one process.

Started by torchrun (or with its environment variables), the processes form one group: NCCL where each has its GPU,
gloo on CPUs. Imports errors.
"""

import inspect
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pneumo.errors import UsageError


@contextmanager
def launch(timeout_seconds: float) -> Iterator[torch.device]:
    """Join the process group if there is one, and leave it at the end.

    Args:
        timeout_seconds: a collective that waits longer for another process ends this one.

    Yields:
        The device of this process.

    Raises:
        UsageError: more processes than GPUs on this host.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"process {local} of this host has no GPU: {torch.cuda.device_count()} are visible; "
                f"start at most that many (GPUS= or --nproc_per_node=)"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    _end_with_parent()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds)
    )
    try:
        yield device
        dist.barrier()  # nobody leaves while another still talks
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's place in the launch, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes the launch has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def wrap(model: nn.Module) -> nn.Module:
    """Let the backward passes of `model` add up gradients over processes; the model itself in one process.

    Gradients come out as the mean over processes. Buffers are left alone.
    """
    if world() == 1:
        return model
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.15 renamed it
    keep_buffers = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **keep_buffers)


@contextmanager
def sync_gradients(model: nn.Module, on: bool) -> Iterator[None]:
    """Within, a backward pass exchanges gradients only if `on`: once a step is enough."""
    if on or world() == 1:
        yield
    else:
        with model.no_sync():
            yield


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The elementwise sum over all processes, in place; on the tensor's device, without a host wait on CUDA."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(item: Any) -> list[Any]:
    """Every process's `item` (plain Python or CPU tensors), by rank, on every process."""
    if world() == 1:
        return [item]
    items: list[Any] = [None] * world()
    dist.all_gather_object(items, item)
    return items


def broadcast(item: Any) -> Any:
    """Process 0's `item` on every process."""
    if world() == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, src=0)
    return items[0]


def _end_with_parent() -> None:
    """End this process soon after its launcher died: an orphan must not go on writing."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
