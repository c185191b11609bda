"""Random probability maps with annotations, for the tests of decisions."""

import numpy as np
from scipy import ndimage

from pneumo.decision import tables
from pneumo.decision.tables import Tables
from pneumo.kernels.runs import mask_to_runs


def draw(rng: np.random.Generator, count: int, side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Maps with blobs and specks, and an annotation that overlaps some blobs; a third of the cases have none.

    Returns:
        `count` pairs of (side, side) uint8 and (R, 2) runs.
    """
    cases = []
    for _ in range(count):
        smooth = ndimage.gaussian_filter(rng.normal(size=(side, side)), 2)
        noise = rng.normal(size=(side, side)) * rng.choice([0.0, 0.1])
        field = (smooth / smooth.std() + noise) * rng.uniform(20, 80) + rng.uniform(0, 160)
        q = field.clip(0, 255).astype(np.uint8)
        truth = np.roll(smooth, rng.integers(0, 4), axis=rng.integers(2)) > rng.uniform(0.5, 1.5) * smooth.std()
        cases.append((q, mask_to_runs(truth & (rng.random() > 1 / 3))))
    return cases


def measured(cases: list[tuple[np.ndarray, np.ndarray]], levels: list[int]) -> Tables:
    """The tables of all cases."""
    return tables.join([tables.measure(q, truth, np.array(levels)) for q, truth in cases])


def many(count: int, levels: list[int]) -> Tables:
    """Tables of many cases on a 1024 px grid, made up: a fifth positive, three components at each level on average."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(3, (count, len(levels))).astype(np.int32)
    area = np.exp(rng.normal(5, 2.5, counts.sum())).astype(np.int32) + 1
    positive = rng.random(count) < 0.22
    histogram = rng.multinomial(1024**2, [0.95] + [0.05 / 255] * 255, size=count).astype(np.int32)
    overlap = area * np.repeat(positive, counts.sum(axis=1)) * rng.random(len(area))
    return Tables(
        np.array(levels),
        histogram,
        (histogram * positive[:, None] // 20).astype(np.int32),
        rng.random(counts.shape).astype(np.float32),
        counts,
        area,
        overlap.astype(np.int32),
    )
