"""What was measured on a device, kept beside the runs, so that the next run there computes the same.

Imports config, checkpoint, dist, engine, kernels, log, errors.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pneumo import checkpoint, dist, engine, log
from pneumo.config import Recipe
from pneumo.errors import DataError, WriteError
from pneumo.kernels import thin_conv
from pneumo.kernels.upconv import is_faster

FILE = "measured.json"


def once(runs: Path, key: str, measure: Callable[[], Any]) -> Any:
    """What `measure` gave when it was first asked under this key; all processes of a launch call this together.

    Args:
        runs: the folder of all runs; its measured.json holds the answers.
        key: names the device and all else that the answer depends on.
        measure: gives JSON; is called by one process.

    Returns:
        The same on every process. Where nothing can be written it is measured each time.
    """
    return dist.broadcast(_once(runs / FILE, key, measure) if dist.is_main() else None)


def evaluation_batch(recipe: Recipe, model: nn.Module, side: int, dtype: torch.dtype, device: torch.device) -> int:
    """Images of a forward pass in validation and prediction; all processes of a launch call this together.

    That is predict.batch_size, or where it is 0, 8 on a CPU, and on a GPU as many as half of train.gpu_reserve_gb
    holds, or half of what was free, where that was less, when this was first asked for such networks.

    Args:
        model: a `FoldedUNet`.
        side: of the images, pixels.
    """
    if recipe.predict.batch_size or device.type == "cpu":
        return recipe.predict.batch_size or 8

    grid = recipe.data.annotation_size
    free, all_of_it = torch.cuda.mem_get_info(device)
    room = min(free, recipe.train.gpu_reserve) // 2
    network = f"{recipe.model.encoder} {list(recipe.model.decoder_channels)} at {side} px, to {grid}"
    card = f"{_name(device, dtype)} of {all_of_it >> 30} GB"  # there are cards of one name and two sizes
    key = f"{card}, batch of {network} in {recipe.train.gpu_reserve_gb} GB"
    measure = partial(engine.fitting_batch, model, side, grid, dtype, device, room)
    return once(Path(recipe.runs), key, measure)


def merged_blocks(recipe: Recipe, stage: int, model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[bool]:
    """Which blocks of the decoder train in their merged form; all processes of a launch call this together.

    Args:
        model: a `UNet`.
        dtype: autocast type.
    """
    settings = recipe.stage[stage]
    how, blocks = recipe.model.upsample, model.block_shapes(settings.batch_size, settings.image_size)
    if how != "auto":
        return [how == "merged"] * len(blocks)
    if device.type == "cpu":
        return [is_faster(*block, device, dtype) for block in blocks]
    runs, where = Path(recipe.runs), _name(device, dtype)
    return [once(runs, f"{where}, {block}", partial(is_faster, *block, device, dtype)) for block in blocks]


def _name(device: torch.device, dtype: torch.dtype) -> str:
    """All that a time measured on a GPU depends on, besides shapes."""
    kernels = dtype in thin_conv.HALVES and thin_conv.works(device, dtype)
    card = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {dtype}"
    return f"{card}, thin_conv {thin_conv.VERSION if kernels else 'not used'}"


def _once(path: Path, key: str, measure: Callable[[], Any]) -> Any:
    known = _read(path)
    if key in known:
        return known[key]
    answer: Any = None
    try:
        with checkpoint.wait_lock(path.with_suffix(".lock"), log.say):  # another run may be measuring the same
            known = _read(path)
            if key not in known:
                answer = known[key] = measure()
                log.write_json(path, known)
            return known[key]
    except WriteError:
        return measure() if answer is None else answer


def _read(path: Path) -> dict[str, Any]:
    try:
        return log.read_json(path)
    except (OSError, DataError):  # not there, or damaged: measured anew
        return {}
