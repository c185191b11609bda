"""Which cases an epoch shows, in which steps, and their batches on the device.

A plan depends on (seed, fold, stage, epoch) alone, never on a process, so a resumed run and any number of processes
see the same micro-batches. No worker processes: the packed images are in memory. Imports pack.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pneumo.data.pack import Pack


def key(*parts: int | str) -> int:
    """Hash numbers and words into 63 bits: the seed of what is random at that place, and only there."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def epoch_plan(
    positives: np.ndarray,
    negatives: np.ndarray,
    *,
    positive_fraction: float,
    draw: str,
    seed: int,
    fold: int,
    stage: int,
    epoch: int,
) -> np.ndarray:
    """Choose the cases of an epoch and their order: every positive once, and a share of the negatives.

    Args:
        positives, negatives: row numbers of the training cases with and without pneumothorax.
        positive_fraction: share of positives in the epoch, in (0, 1]; all negatives at most.
        draw: "fixed" takes the same negatives in every epoch of every stage; "fresh" goes on through a shuffled
            list of all of them, epoch by epoch, and shuffles again when all were seen; in an epoch none comes twice.
        epoch: from 1.

    Returns:
        (N,) int64, shuffled row numbers.
    """
    wanted = round(len(positives) * (1 - positive_fraction) / positive_fraction)
    count = min(wanted, len(negatives)) if len(positives) else len(negatives)
    if draw == "fixed":
        chosen = _shuffled(negatives, key(seed, fold, "negatives"))[:count]
    else:
        chosen = _deal(negatives, count, epoch, key(seed, fold, stage, "negatives"))
    return _shuffled(np.concatenate([positives, chosen]), key(seed, fold, stage, epoch, "order"))


def steps(plan: np.ndarray, batch_size: int, accumulation: int) -> list[list[np.ndarray]]:
    """Cut a plan into steps of micro-batches; the last step and the last micro-batch take what is left.

    Returns:
        One list per optimizer step, of at most `accumulation` arrays of at most `batch_size` row numbers.
    """
    micro_batches = cut(plan, batch_size)
    return [micro_batches[start : start + accumulation] for start in range(0, len(micro_batches), accumulation)]


def cut(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut row numbers into batches in order; the last takes what is left."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


class Feed:
    """The packed images and masks, as batches on a device.

    On a GPU they stay in its memory where that leaves `reserve` bytes free; else each batch is copied from the memory
    map through pinned memory, the next one while the device computes. On a CPU they are read from the map.

    Args:
        pack: from `open_pack`.
        device: where batches go.
        rows: the row numbers that will be asked for; only those are kept on the device.
        reserve: bytes of GPU memory to leave to the model.
    """

    def __init__(self, pack: Pack, device: torch.device, rows: np.ndarray, *, reserve: int = 0) -> None:
        self.pack = pack
        self.device = device
        self._shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
        self._resident: tuple[Tensor, Tensor] | None = None
        if device.type == "cuda":
            need = len(rows) * (pack.side**2 + pack.side**2 // 8)
            if need + reserve < torch.cuda.mem_get_info(device)[0]:
                self._place = np.full(len(pack.image_ids), -1, dtype=np.int64)
                self._place[rows] = np.arange(len(rows))
                self._resident = (self._upload(pack.images, rows), self._upload(pack.masks, rows))

    def __str__(self) -> str:
        if self.device.type == "cpu":
            return "from the memory map"
        return "resident on the GPU" if self._resident is not None else "streamed to the GPU through pinned memory"

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and masks of each array of row numbers, in order.

        Yields:
            image: (B, 1, S, S) uint8, and mask: (B, 1, S, S) uint8 of 0 and 1, on the device.
        """
        if self.device.type == "cuda" and self._resident is None:
            yield from self._streamed(plan)
            return
        for rows in plan:
            if self._resident is not None:
                index = torch.from_numpy(self._place[rows]).pin_memory().to(self.device, non_blocking=True)
                images, bits = (part.index_select(0, index) for part in self._resident)
                yield self._unpack(images, bits)
            else:
                masks = np.unpackbits(self.pack.masks[rows], axis=2)  # a sixth of the time of `_unpack` on a CPU
                yield torch.from_numpy(self.pack.images[rows]).unsqueeze(1), torch.from_numpy(masks).unsqueeze(1)

    def _streamed(self, plan: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Copy batch i + 1 on a stream of its own while the device computes on batch i."""
        stream = _copy_stream(self.device)

        def start(rows: np.ndarray) -> tuple[Tensor, Tensor, torch.cuda.Event]:
            pinned = [torch.from_numpy(part[rows]).pin_memory() for part in (self.pack.images, self.pack.masks)]
            with torch.cuda.stream(stream):
                images, bits = (part.to(self.device, non_blocking=True) for part in pinned)
                return images, bits, stream.record_event()

        ahead = start(plan[0]) if len(plan) else None
        for i in range(len(plan)):
            images, bits, copied = ahead
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            images.record_stream(current)
            bits.record_stream(current)
            batch = self._unpack(images, bits)
            ahead = start(plan[i + 1]) if i + 1 < len(plan) else None
            yield batch

    def _unpack(self, images: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        masks = (bits.unsqueeze(-1) >> self._shifts & 1).flatten(-2)
        return images.unsqueeze(1), masks.unsqueeze(1)

    def _upload(self, array: np.ndarray, rows: np.ndarray) -> Tensor:
        """Copy rows to the device in pieces that need little host memory."""
        whole = torch.empty((len(rows), *array.shape[1:]), dtype=torch.uint8, device=self.device)
        for start in range(0, len(rows), 256):
            piece = torch.from_numpy(array[rows[start : start + 256]])
            whole[start : start + len(piece)].copy_(piece)
        return whole


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for copies: memory that was freed on a stream serves that stream alone again."""
    return torch.cuda.Stream(device)


def _shuffled(rows: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(rows)


def _deal(rows: np.ndarray, count: int, epoch: int, seed: int) -> np.ndarray:
    """The `count` rows that an epoch takes, none twice, from shuffled decks of all rows, one after the other.

    Where a deck does not last, those that the epoch has from it come last in the next one.
    """
    hand, left, decks = rows[:0], rows[:0], 0
    for _ in range(epoch):
        hand, left = left[:count], left[count:]
        if len(hand) < count:
            deck = _shuffled(rows, key(seed, decks))
            decks += 1
            held = np.isin(deck, hand)
            deck = np.concatenate([deck[~held], deck[held]])
            more = count - len(hand)
            hand, left = np.concatenate([hand, deck[:more]]), deck[more:]
    return hand
