"""Run-length codec of the SIIM-ACR pneumothorax challenge.

A mask is read column by column, top to bottom, left to right. Its code is pairs "gap length": `gap` background pixels
since the end of the previous run (since the start, for the first), then `length` foreground pixels. "-1" codes the
empty mask. Imports kernels.
"""

import re

import numpy as np

from pneumo.kernels.runs import mask_to_runs, runs_to_mask

EMPTY = "-1"
TELLING = 5  # pairs that ascend as starts do are no chance any more
_OTHER_SIZE = ". Was the mask made for another size? Set data.annotation_size"
_ABSOLUTE = (
    ". They look like starts and lengths, as other challenges have them; here the first of a pair is the gap since the "
    "end of the run before: start minus start and length of the pair before it"
)
_PLAIN = re.compile(r"[-0-9\s]*", re.ASCII)


def encode(mask: np.ndarray) -> str:
    """Encode a mask.

    Args:
        mask: (H, W) bool.

    Returns:
        "gap length gap length ...", or "-1" if no pixel is set.

    Raises:
        TypeError: `mask` is not bool: a 0/255 mask must be compared by the caller.
        ValueError: `mask` is not two-dimensional.
    """
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.ndim != 2:
        raise ValueError(f"mask must be (H, W), got {mask.shape}")
    return encode_runs(mask_to_runs(mask))


def decode(code: str, height: int, width: int) -> np.ndarray:
    """Decode a mask; the inverse of `encode`.

    Args:
        code: "gap length ...", or "-1"; surrounding spaces are ignored, as train-rle.csv has them.
        height, width: size of the mask, in pixels.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: as `decode_runs`.
    """
    return runs_to_mask(decode_runs(code, height, width), height, width)


def encode_runs(runs: np.ndarray) -> str:
    """Encode runs: (R, 2) int64, sorted, disjoint and maximal, to a code."""
    if len(runs) == 0:
        return EMPTY
    edges = runs.reshape(-1)
    return " ".join(map(str, np.diff(edges, prepend=0).tolist()))


def decode_runs(code: str, height: int, width: int) -> np.ndarray:
    """Decode to runs.

    A later gap of 0, which no encoder needs, is accepted; its two runs stay apart.

    Returns:
        (R, 2) int64, sorted and disjoint.

    Raises:
        ValueError: the code has an odd count of numbers, a token that is no whole number, a negative gap, an empty
            run, or does not fit in height * width pixels, or is longer than any such mask needs; says which token or
            run.
    """
    if code.strip() == EMPTY:
        return np.empty((0, 2), dtype=np.int64)
    size = height * width
    if len(code) > 4 * size + 64:  # "0 1 " for every pixel: before memory is spent on it
        raise ValueError(f"{len(code):,} characters, more than any mask of {height}×{width} needs{_OTHER_SIZE}")
    tokens = code.split()
    if not _PLAIN.fullmatch(code):  # int() would take 1_0, +3 and the digits of other scripts
        raise ValueError(_not_whole(tokens))
    try:
        counts = np.array(list(map(int, tokens)), dtype=np.int64)
    except (ValueError, OverflowError):
        raise ValueError(_not_whole(tokens)) from None
    if counts.size == 0:
        raise ValueError(f'an empty code; an empty mask is "{EMPTY}"')
    if counts.size % 2:
        numbers = "1 number" if counts.size == 1 else f"{counts.size} numbers"
        raise ValueError(f'{numbers}; gap/length pairs need an even count (last token "{tokens[-1]}")')
    if (bad := np.flatnonzero((counts < 0) | (counts > size))).size:
        negative = counts[bad[0]] < 0
        what = "negative" if negative else f"larger than {height}×{width} = {size:,} pixels"
        raise ValueError(f'token {bad[0] + 1} is {what}: "{tokens[bad[0]]}"{"" if negative else _OTHER_SIZE}')
    if (bad := np.flatnonzero(counts[1::2] == 0)).size:
        raise ValueError(
            f'run {bad[0] + 1} has length 0 (token {2 * bad[0] + 2}: "{tokens[2 * bad[0] + 1]}"); '
            f"not pairs of gap and length"
        )
    edges = np.cumsum(counts)
    if edges[-1] > size:
        run = int(np.flatnonzero(edges[1::2] > size)[0])
        starts, ends = counts[::2], counts[::2] + counts[1::2]
        absolute = len(starts) >= TELLING and (starts[1:] >= ends[:-1]).all() and ends[-1] <= size + 1  # counted from 1
        raise ValueError(
            f"run {run + 1} ends at pixel {edges[2 * run + 1]:,}, past {height}×{width} = {size:,}"
            f"{_ABSOLUTE if absolute else _OTHER_SIZE}"
        )
    return edges.reshape(-1, 2)


def _not_whole(tokens: list[str]) -> str:
    """Name the first token that is no whole number of at most 18 digits, or what is odd between them."""
    for number, token in enumerate(tokens, start=1):
        if re.fullmatch(r"-?[0-9]{1,18}", token):
            continue
        return f'token {number} is not a whole number of up to 18 digits: "{token[:40]}"'
    return "a character that is neither a digit nor a plain blank is between the numbers"
