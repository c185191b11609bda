import csv
import gzip

import numpy as np
import pytest

from pneumo.data import rle
from pneumo.kernels.runs import mask_to_runs


def test_column_major_gap_length():
    mask = np.zeros((3, 4), dtype=bool)
    mask[1:3, 0] = mask[0, 1] = mask[2, 3] = True  # column 0 runs on into column 1
    assert rle.encode(mask) == "1 3 7 1"


def test_golden():
    mask = np.zeros((1024, 1024), dtype=bool)
    mask[2:4, 1] = mask[0, 3] = mask[5:7, 1023] = True
    assert rle.encode(mask) == "1026 2 2044 1 1044484 2"


@pytest.mark.fault(
    "I10", "random masks of every density and shape up to 8 x 8, with last pixel, full, single pixel, checkerboard"
)
def test_round_trip(figure):
    rng = np.random.default_rng(0)
    masks = [rng.random(rng.integers(1, 9, 2)) < rng.choice([0, 0.02, 0.5, 0.98, 1]) for _ in range(9_000)]
    for shape in [(height, width) for height in range(1, 11) for width in range(1, 11)]:
        pixels = np.arange(shape[0] * shape[1]).reshape(shape)
        single = int(rng.integers(pixels.size))
        masks += [pixels == pixels[-1, -1], pixels >= 0, pixels == single, np.indices(shape).sum(axis=0) % 2 == 1]
        masks += [pixels != pixels[-1, -1], pixels != pixels[0, 0], pixels == pixels[0, 0], pixels < 0]
        masks += [pixels % 2 == 0, pixels != single]
    exact = 0
    for mask in masks:
        np.testing.assert_array_equal(rle.decode(rle.encode(mask), *mask.shape), mask)
        exact += 1
    figure(f"{exact:,}/{len(masks):,}")


@pytest.mark.parametrize("corner", [(0, 0), (-1, -1)])
def test_run_at_either_end_is_kept(corner):
    mask = np.zeros((4, 3), dtype=bool)
    mask[corner] = True
    np.testing.assert_array_equal(rle.decode(rle.encode(mask), 4, 3), mask)


def test_empty():
    assert rle.encode(np.zeros((4, 3), dtype=bool)) == "-1"
    assert not rle.decode(" -1", 4, 3).any()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "empty code"),
        ("1", r'^1 number; gap/length pairs need an even count \(last token "1"\)'),
        ("1 2 3", r'3 numbers.*last token "3"'),
        ("-2 3", 'token 1 is negative: "-2"'),
        ("1 -3", 'token 2 is negative: "-3"'),
        ("1 1 3 0", "run 2 has length 0"),
        (
            "0 13",
            r'token 2 is larger than 4×3 = 12 pixels: "13"\. Was the mask made for another size\? Set data\.annota',
        ),
        ("1 1 5 6", r"run 2 ends at pixel 13, past 4×3 = 12.*data\.annotation_size"),
        ("1 b", 'token 2 is not a whole number of up to 18 digits: "b"'),
        ("1.5 2", 'token 1 is not a whole number of up to 18 digits: "1.5"'),
        ("1_0 2", 'token 1 is not a whole number of up to 18 digits: "1_0"'),
        ("1 +3", "token 2 is not a whole number"),
        ("1 \u0663", "token 2 is not a whole number"),
        ("1\x853", "neither a digit nor a plain blank"),
        ("1- 3", "token 1 is not a whole number"),
        ("9" * 20 + " 1", "token 1 is not a whole number of up to 18 digits"),
    ],
)
def test_bad_code_is_refused(code, message):
    with pytest.raises(ValueError, match=message):
        rle.decode(code, 4, 3)


def test_other_masks_are_refused():
    with pytest.raises(TypeError, match="bool"):
        rle.encode(np.full((4, 3), 255, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        rle.encode(np.zeros((1, 4, 3), dtype=bool))


def test_every_real_code_survives(siim):
    with gzip.open(siim / "train-rle-real.csv.gz", "rt") as file:
        codes = [code.strip() for _, code in list(csv.reader(file))[1:]]
    assert len(codes) == 12_877
    assert [code for code in codes if rle.encode_runs(rle.decode_runs(code, 1024, 1024)) != code] == []
    for code in codes[:: len(codes) // 40]:
        assert rle.encode(rle.decode(code, 1024, 1024)) == code


def test_absolute_starts_are_told_from_another_size():
    """As most other challenges have them, counted from 1."""
    mask = np.zeros((64, 64), dtype=bool)
    mask[5:30, 7:25] = True
    runs = mask_to_runs(mask)
    code = " ".join(f"{start + 1} {end - start}" for start, end in runs)
    with pytest.raises(ValueError, match=r"past 64×64 = 4,096. They look like starts and lengths, as other"):
        rle.decode_runs(code, 64, 64)
    with pytest.raises(ValueError, match=r"Was the mask made for another size"):
        rle.decode_runs(rle.encode(mask), 20, 20)
