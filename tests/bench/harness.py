"""A benchmark as data: two callables on the same inputs, run in alternation, compared by their medians.

Imports nothing from pneumo.
"""

import operator
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

LONG = 9.0  # seconds for both sides once, on a slow machine: the whole has to end within minutes
COMPARE = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is compared with what.

    Attributes:
        row, rival: what is measured, and against what.
        ours, theirs: do the same work on the same inputs. For units of time and rate their time counts, for any other
            unit the number that they return.
        unit: "ms" an item, "images/s", or what the numbers are.
        items: how many one call handles.
        target: as "ratio >= 1.7; ours <= 5"; "" if there is none. A ratio above 1 is in our favour.
        batch: what one call handles, in words.
        detail: anything else for the file; the callables may fill it.
        once: one run is enough, as it repeats by itself.
        times: so many times the usual runs, where the two sides are nearly alike; not where one takes `LONG`.
    """

    row: str
    rival: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    unit: str = "ms"
    items: int = 1
    target: str = ""
    batch: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    once: bool = False
    times: int = 1


def measure(row: Row, repeats: int, device: torch.device) -> dict[str, Any]:
    """Run both sides in alternation, after one run of each that does not count; what takes `LONG`, at most three times.

    Returns:
        row, rival, ours, theirs, unit, ratio, target, met, runs, spread, batch, detail and device; `met` is None
        without a target, `spread` the lowest and highest of each side.
    """

    def value(call: Callable[[], Any]) -> float:
        wait(device)
        start = time.perf_counter()
        result = call()
        wait(device)
        seconds = time.perf_counter() - start
        if row.unit == "ms":
            return seconds / row.items * 1000
        return row.items / seconds if row.unit.endswith("/s") else float(result)

    if not row.once:
        value(row.ours), value(row.theirs)
    start = time.perf_counter()
    pairs = [(value(row.ours), value(row.theirs))]
    runs = 1 if row.once else min(repeats, 3) if time.perf_counter() - start > LONG else repeats * row.times
    pairs += [(value(row.ours), value(row.theirs)) for _ in range(runs - 1)]
    own, other = zip(*pairs, strict=True)
    ours, theirs = statistics.median(own), statistics.median(other)
    ratio = ours / theirs if row.unit.endswith("/s") else theirs / ours
    return {
        "row": row.row,
        "rival": row.rival,
        "ours": ours,
        "theirs": theirs,
        "unit": row.unit,
        "ratio": ratio,
        "target": row.target,
        "met": met(row.target, ours=ours, ratio=ratio) if row.target else None,
        "runs": runs,
        "spread": {"ours": [min(own), max(own)], "theirs": [min(other), max(other)]},
        "batch": row.batch,
        "detail": row.detail,
        "device": device.type,
    }


def met(target: str, **values: float) -> bool:
    """Whether every part of a target, as "ratio >= 1.7; ours <= 5", holds."""
    parts = [part.split() for part in target.split(";")]
    return all(COMPARE[sign](values[name], float(number)) for name, sign, number in parts)


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table; a missed target is marked."""
    lines = ["| row | rival | ours | theirs | unit | ratio | target |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for result in results:
        mark = {True: "", False: " **MISSED**", None: ""}[result["met"]]
        lines.append(
            f"| {result['row']} | {result['rival']} | {result['ours']:.4g} | {result['theirs']:.4g} | {result['unit']} "
            f"| {result['ratio']:.2f} | {result['target'] or 'report'}{mark} |"
        )
    return "\n".join(lines)


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
