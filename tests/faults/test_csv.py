"""Tables and codes that lie about their size, and masks made for another one."""

import gzip
import random
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from pneumo.data import cases, pack, rle, rows
from pneumo.decision.metrics import dice_runs
from pneumo.kernels.runs import mask_to_runs, runs_to_mask, union

GRID = 1024


def ellipse(rng: np.random.Generator) -> np.ndarray:
    """A mask of a pneumothorax's size on the annotation grid."""
    y, x = np.mgrid[:GRID, :GRID]
    (cy, cx), (ry, rx) = rng.uniform(150, 870, 2), rng.uniform(30, 140, 2)
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1


@pytest.mark.fault("I4", "random rows of one image, overlapping and repeated")
def test_the_union_is_exact(tmp_path, figure):
    rng = np.random.default_rng(0)
    pixels = overlapping = 0
    for trial in range(200):
        masks = [rng.random((16, 16)) < 0.2 for _ in range(rng.integers(2, 6))]
        masks.append(masks[0])
        path = tmp_path / f"{trial}.csv"
        path.write_text("ImageId,EncodedPixels\n" + "".join(f"a,{rle.encode(mask)}\n" for mask in masks))
        found, problems = cases.read_codes(path, 16)
        expected = np.logical_or.reduce(masks)
        np.testing.assert_array_equal(runs_to_mask(found["a"], 16, 16), expected)
        (problem,) = problems
        twice = sum(mask.sum() for mask in masks) - expected.sum()
        assert f"1 image has rows that overlap ({twice:,} pixels) or repeat (1 row)" in problem.message
        pixels += expected.sum()
        overlapping += twice
    figure(f"{pixels:,} pixels exact in 200 of 200 images, {overlapping:,} overlapping ones counted, one warning each")


@pytest.mark.fault("I9", "a 512 px image with a code for 1024 px: packed, brought back, compared")
def test_a_mask_outlives_a_smaller_image(tmp_path, figure):
    Image.fromarray(np.zeros((512, 512), np.uint8)).save(tmp_path / "a.png")
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(20):
        runs = mask_to_runs(ellipse(rng))
        small = np.unpackbits(pack.pack_mask(runs, GRID, 512), axis=1).astype(bool)
        scores.append(float(dice_runs(mask_to_runs(small.repeat(2, 0).repeat(2, 1)), runs)))
    assert min(scores) > 0.98
    figure(f"Dice of the round trip 1024 -> 512 -> 1024: mean {np.mean(scores):.4f}, lowest {min(scores):.4f}")


@pytest.mark.fault("I9", "codes for 1024 px read as of 512 px, and the other way round")
def test_masks_of_another_grid_are_noticed(tmp_path, figure):
    rng = np.random.default_rng(0)
    masks = [ellipse(rng) for _ in range(30)]
    path = tmp_path / "train-rle.csv"

    def write(pictures):
        rows = (f"{i},{rle.encode(picture)}\n" for i, picture in enumerate(pictures))
        path.write_text("ImageId,EncodedPixels\n" + "".join(rows))

    write(masks)
    _, problems = cases.read_codes(path, 512)
    refused = [problem for problem in problems if "past 512×512 = 262,144" in problem.message]
    assert refused and all(problem.fatal and "Set data.annotation_size" in problem.message for problem in refused)
    assert cases.read_codes(path, GRID)[1] == []
    for side in (GRID // 4, GRID // 2, 640, 768, 900, 1000, 1020):
        centres = (2 * np.arange(side) + 1) * GRID // (2 * side)
        write([mask[np.ix_(centres, centres)] for mask in masks])
        (problem,) = cases.read_codes(path, GRID)[1]
        assert not problem.fatal and f"hang together on a grid of {side}×{side}, not of" in problem.message
        assert problem.message.endswith(f"Set data.annotation_size={side}")
        write([mask[np.ix_(centres, centres)] for mask in masks[:4]])  # too few to tell
        assert cases.read_codes(path, GRID)[1] == []
    figure(f"{len(refused)} of 30 codes past the end named; tables for 7 of 7 smaller grids, with their sides")


@pytest.mark.parametrize("side", [16, 64, 1024])
def test_tall_thin_masks_are_of_no_other_grid(tmp_path, side):
    """A column wide: none is like the next one, and each is much like itself an eighth further down."""
    masks = np.zeros((8, side, side), dtype=bool)
    for place, mask in enumerate(masks):
        mask[side // 16 :, place * side // 8] = True
    path = tmp_path / "train-rle.csv"
    path.write_text("ImageId,EncodedPixels\n" + "".join(f"{i},{rle.encode(mask)}\n" for i, mask in enumerate(masks)))
    assert cases.read_codes(path, side)[1] == []


@pytest.mark.fault("I2", "a gzip of 300 kB that unpacks to 300 MB, a million rows, a code of 50 MB")
def test_bombs_are_refused_within_bounds(tmp_path, figure, monkeypatch):
    monkeypatch.setattr(rows, "MAX_BYTES", 8 * 2**20)  # so that the test is quick; what is measured scales with it
    monkeypatch.setattr(rows, "MAX_ROWS", 10_000)
    path = tmp_path / "train-rle.csv"
    header = b"ImageId,EncodedPixels\n"
    bombs = [
        (gzip.compress(header + b"a,-1\n" * 60_000_000, compresslevel=1), "larger than 8 MB"),
        (gzip.compress(header + b"a,-1\n" * 20_000), "more than 10,000 rows"),
        (header + b"a," + b"1 " * 3_000_000, "characters, more than any mask of 1024×1024 needs"),
        (b"x," * 4_000_000, "column ImageId is missing"),
    ]
    peaks = []
    for content, reason in bombs:
        path.write_bytes(content)
        tracemalloc.start()
        _, problems = cases.read_codes(path, GRID)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert any(problem.fatal and reason in problem.message for problem in problems), problems[:3]
    assert max(peaks) < 40 * rows.MAX_BYTES
    figure(
        f"{len(bombs)} of {len(bombs)} refused; memory at most {max(peaks) / rows.MAX_BYTES:.0f} x the limit of 8 MB"
    )


@pytest.mark.fault("I3", "codes of random tokens, and of every length a grid can need")
def test_random_tokens_are_decoded_or_refused(figure):
    rng = random.Random(0)
    words = ["0", "1", "2", "17", "-1", "-0", "+1", "1.5", "1e3", "0x1", "nan", "9" * 30, "", "٣", "1_0", "\x00", "²"]
    decoded = refused = 0
    for _ in range(3_000):
        code = " ".join(rng.choices(words, weights=[9] * 4 + [1] * 13, k=rng.randrange(9)))
        try:
            runs = rle.decode_runs(code, 8, 8)
            np.testing.assert_array_equal(union([runs]), mask_to_runs(runs_to_mask(runs, 8, 8)))
            decoded += 1
        except ValueError as error:
            assert type(error) is ValueError and "\n" not in str(error)
            refused += 1
    assert decoded > 200 and refused > 1_000
    figure(f"{decoded:,} decoded, {refused:,} refused, 0 foreign exceptions")


def test_the_limits_let_the_largest_real_table_through():
    """A million rows, and a code that changes at every pixel."""
    checkered = rle.encode(np.indices((GRID, GRID)).sum(axis=0) % 2 == 0)
    assert len(rle.decode_runs(checkered, GRID, GRID)) > 500_000
    assert len(checkered) < 3 * 2**20 < rows.MAX_BYTES
    assert rows.MAX_ROWS > 50 * 12_877
