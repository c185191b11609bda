import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pneumo.data import images, pack
from pneumo.data.cases import Case
from pneumo.errors import DataError, NoSpaceError
from pneumo.kernels.runs import mask_to_runs

GRID = 128


def made_up(folder: Path, count: int = 5) -> list[Case]:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    cases = []
    for i in range(count):
        path = folder / f"c{i:x}.png"
        Image.fromarray(rng.integers(0, 256, (GRID, GRID), dtype=np.uint8)).save(path)
        mask = np.zeros((GRID, GRID), dtype=bool)
        if i % 2:
            mask[10 * i : 60, 20:90] = True
        cases.append(Case(f"c{i:x}", path, mask_to_runs(mask)))
    return cases


def open_it(folder: Path, cases: list[Case], side: int = 64, check: bool = False) -> pack.Pack:
    return pack.open_pack(folder, "train", cases, side, annotation_size=GRID, check=check)


def test_images_and_masks_by_row(tmp_path):
    cases = made_up(tmp_path / "x")
    packed = open_it(tmp_path / "p", cases)
    assert packed.image_ids == ("c0", "c1", "c2", "c3", "c4")
    assert packed.images.shape == (5, 64, 64)
    assert packed.side == 64
    for row, case in enumerate(cases):
        wanted = images.resize(images.read(case.path).pixels, 64)
        np.testing.assert_array_equal(packed.images[row], wanted)
    mask = np.unpackbits(packed.masks[3], axis=1)
    assert mask.sum() == (60 - 30) // 2 * 70 // 2
    assert mask[15, 10] == 1 and mask[14, 10] == 0


def test_a_mend_that_is_interrupted_leaves_nothing_that_is_taken_for_done(tmp_path, monkeypatch):
    cases = made_up(tmp_path / "x")
    whole = np.array(open_it(tmp_path / "p", cases).images)
    (folder,) = (tmp_path / "p").glob("train-64-*")
    os.truncate(folder / "images.npy", 1000)  # a copy that was broken off
    make = pack._array

    def interrupted(path, *of):
        if path.name == "masks.npy":
            raise KeyboardInterrupt
        return make(path, *of)

    monkeypatch.setattr(pack, "_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_it(tmp_path / "p", cases)
    monkeypatch.undo()
    np.testing.assert_array_equal(open_it(tmp_path / "p", cases).images, whole)


def test_what_is_no_square_is_known(tmp_path):
    cases = made_up(tmp_path / "x")
    Image.fromarray(np.zeros((40, 128), dtype=np.uint8)).save(cases[1].path)
    packed = open_it(tmp_path / "p", cases)
    assert packed.shapes.tolist() == [[128, 128], [40, 128], *[[128, 128]] * 3]
    assert packed.boxes(np.array([0, 2]), GRID) is None
    assert packed.boxes(np.array([2, 1]), GRID).tolist() == [[0, 128, 0, 128], [44, 84, 0, 128]]


def test_a_pack_without_shapes_is_made_anew(tmp_path, monkeypatch):
    cases = made_up(tmp_path / "x")
    first = open_it(tmp_path / "p", cases)
    next((tmp_path / "p").glob("*/shapes.npy")).unlink()
    assert np.array_equal(open_it(tmp_path / "p", cases).shapes, first.shapes)


def test_masks_at_the_grids_own_size_are_exact():
    mask = np.random.default_rng(0).random((GRID, GRID)) < 0.3
    bits = pack.pack_mask(mask_to_runs(mask), GRID, GRID)
    np.testing.assert_array_equal(np.unpackbits(bits, axis=1), mask)


def test_a_mask_follows_its_image_through_the_resize():
    mask = np.zeros((GRID, GRID), dtype=bool)
    mask[32:96, 16:48] = True
    small = np.unpackbits(pack.pack_mask(mask_to_runs(mask), GRID, 32), axis=1).astype(bool)
    picture = pack.pack_image(mask.astype(np.uint8) * 255, 32) > 127
    np.testing.assert_array_equal(small, picture)


def test_a_second_call_decodes_nothing(tmp_path, monkeypatch):
    cases = made_up(tmp_path / "x")
    first = open_it(tmp_path / "p", cases)
    monkeypatch.setattr(images, "read", None)
    assert np.array_equal(open_it(tmp_path / "p", cases).images, first.images)


def test_a_damaged_cache_of_hashes_costs_time_only(tmp_path):
    paths = [case.path for case in made_up(tmp_path / "x")]
    cache = tmp_path / "files.json"
    wanted = pack.file_hashes(cache, paths)
    good = json.loads(cache.read_text())
    damages = [b"", b"[]", b"5", b"[" * 100_000, b"\xff", b'{"a": ' + b"9" * 5000 + b"}"]
    for odd in (5, None, [], [1], {}, "x" * 3, [1, 2, 3], [0, 0, "z" * 64]):
        damages.append(json.dumps(dict.fromkeys(good, odd)).encode())
    for cut in (1, 2):  # sizes and times are right, the hash is not there
        damages.append(json.dumps({path: entry[:-cut] for path, entry in good.items()}).encode())
    for damaged in damages:
        cache.write_bytes(damaged)
        assert pack.file_hashes(cache, paths) == wanted
        assert json.loads(cache.read_text()) == good


def test_an_interrupted_pack_goes_on(tmp_path, monkeypatch):
    cases = made_up(tmp_path / "x", 12)
    read, asked = images.read, []

    def dies(path):
        asked.append(path.name)
        if path.name == "c7.png":
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(images, "read", dies)
    with pytest.raises(KeyboardInterrupt):
        open_it(tmp_path / "p", cases)
    asked.clear()
    monkeypatch.setattr(images, "read", lambda path: asked.append(path.name) or read(path))
    packed = open_it(tmp_path / "p", cases)
    assert "c7.png" in asked
    assert "c0.png" not in asked
    monkeypatch.setattr(images, "read", read)
    shutil.rmtree(tmp_path / "p")
    assert np.array_equal(open_it(tmp_path / "p", cases).images, packed.images)


def test_damage_is_found_and_made_good(tmp_path):
    cases = made_up(tmp_path / "x")
    wanted = np.array(open_it(tmp_path / "p", cases).images)
    (file,) = (tmp_path / "p").glob("*/images.npy")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert not np.array_equal(open_it(tmp_path / "p", cases).images, wanted)
    assert np.array_equal(open_it(tmp_path / "p", cases, check=True).images, wanted)


def test_the_pack_is_named_by_content(tmp_path):
    cases = made_up(tmp_path / "x")
    digest = open_it(tmp_path / "p", cases).digest
    with pytest.raises(AssertionError, match="sorted"):  # it would find that pack, whose rows are in another order
        open_it(tmp_path / "p", cases[::-1])
    assert open_it(tmp_path / "q", cases, side=32).digest == digest
    moved = [Case(c.image_id, Path(shutil.copy(c.path, tmp_path / c.path.name)), c.runs) for c in cases]
    assert open_it(tmp_path / "q", moved).digest == digest
    mask_changed = [*cases[:1], Case("c1", cases[1].path, cases[1].runs[:-1]), *cases[2:]]
    assert open_it(tmp_path / "p", mask_changed).digest != digest
    Image.fromarray(np.zeros((GRID, GRID), np.uint8)).save(cases[0].path)
    assert open_it(tmp_path / "p", cases).digest != digest


def test_a_bad_image_is_named_and_the_rest_is_kept(tmp_path):
    cases = made_up(tmp_path / "x")
    cases[2].path.write_bytes(cases[2].path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"c2\.png"):
        open_it(tmp_path / "p", cases)


def test_a_missing_image_is_named(tmp_path):
    cases = made_up(tmp_path / "x")
    cases[2].path.unlink()
    with pytest.raises(DataError, match=r"c2\.png: no such file"):
        open_it(tmp_path / "p", cases)


@pytest.mark.parametrize("size", [50, -1, -64 * 64, 1], ids="{:+d} bytes".format)
@pytest.mark.parametrize("name", ["images.npy", "masks.npy", "shapes.npy", "rows.npy"])
def test_a_file_that_was_cut_off_is_made_anew(tmp_path, name, size):
    """In its header, or in its data, as by a copy that was interrupted; or something was added to it."""
    cases = made_up(tmp_path / "x")
    first = open_it(tmp_path / "p", cases)
    wanted = np.array(first.images), np.array(first.masks), first.shapes
    (file,) = (tmp_path / "p").glob(f"*/{name}")
    content = file.read_bytes()
    file.write_bytes(content + b"x" if size == 1 else content[:size])
    again = open_it(tmp_path / "p", cases)
    for array, before in zip((again.images, again.masks, again.shapes), wanted, strict=True):
        assert np.array_equal(array, before)
    assert file.stat().st_size == len(content)


def test_space_is_reserved_in_a_file_that_has_holes(tmp_path, monkeypatch):
    """As a kill between its creation and that leaves it."""
    cases = made_up(tmp_path / "x")
    wanted = np.array(open_it(tmp_path / "p", cases).images)
    (file,) = (tmp_path / "p").glob("*/images.npy")
    size = file.stat().st_size
    os.truncate(file, 128)  # its header
    os.truncate(file, size)
    assert file.stat().st_blocks * 512 < size
    assert np.array_equal(open_it(tmp_path / "p", cases, check=True).images, wanted)
    assert file.stat().st_blocks * 512 >= size
    os.truncate(file, 128)
    os.truncate(file, size)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpaceError, match=r"images.npy \(0.02 MB\): No space left on device. Free space, then run"):
        open_it(tmp_path / "p", cases)
    assert file.stat().st_size == size


def test_thumbnails_are_block_means(tmp_path):
    packed = open_it(tmp_path / "p", made_up(tmp_path / "x"))
    small = pack.thumbnails(packed)
    assert small.shape == (5, 16, 16)
    assert small[1, 2, 3] == pytest.approx(packed.images[1, 8:12, 12:16].mean())


@pytest.mark.parametrize("shape", [(40, 128), (128, 40)])
def test_an_oblong_image_is_padded_and_not_cut(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)
    square = np.zeros((128, 128), dtype=np.uint8)
    square[44:84] = pixels if shape[0] == 40 else pixels.T
    square = square if shape[0] == 40 else square.T
    np.testing.assert_array_equal(pack.pack_image(pixels, 128), square)
    np.testing.assert_array_equal(pack.pack_image(pixels, 64), images.resize(square, 64))


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_smaller_mask_is_where_it_was(factor):
    """Its middle, in pixels of the larger one; of even factors the nearest pixel would be half a pixel off."""
    side = 32 * factor
    y, x = np.mgrid[:side, :side]
    shifts = []
    for row, column in np.random.default_rng(0).uniform(0.4, 0.6, (40, 2)) * side:
        mask = (y - row) ** 2 / 4 + (x - column) ** 2 < (0.12 * side) ** 2
        small = images.resize_mask(mask, 32)
        middles = (np.mean(np.nonzero(part), axis=1) + 0.5 for part in (small, mask))
        shifts.append(next(middles) * factor - next(middles))
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.15
    assert images.resize_mask(mask, side) is mask
    nearest = images.resize_mask(mask, side - 7)
    assert nearest.shape == (side - 7,) * 2 and nearest.mean() == pytest.approx(mask.mean(), rel=0.05)


def test_a_pixel_of_a_smaller_mask_is_half_covered():
    """Edges that are no multiple of 4 pixels: as the image, of which half or more must be in it."""
    mask = np.zeros((GRID, GRID), dtype=bool)
    mask[33:97, 19:46] = True
    small = np.unpackbits(pack.pack_mask(mask_to_runs(mask), GRID, 32), axis=1).astype(bool)
    expected = np.zeros((32, 32), dtype=bool)
    expected[8:24, 5:12] = True
    expected[8, 11] = False  # a corner: 6 of 16 pixels
    np.testing.assert_array_equal(small, expected)


def test_damage_to_any_part_is_found(tmp_path):
    cases = made_up(tmp_path / "x")
    for name in ("images", "masks", "shapes"):
        wanted = np.array(getattr(open_it(tmp_path / "p", cases, check=True), name))
        (file,) = (tmp_path / "p").glob(f"*/{name}.npy")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert np.array_equal(getattr(open_it(tmp_path / "p", cases, check=True), name), wanted), name


def test_codes_of_another_grid_are_other_data(tmp_path):
    cases = made_up(tmp_path / "x")
    hashes = dict.fromkeys([str(case.path) for case in cases], "0" * 64)
    digests = {pack.content_digest(cases, hashes, size) for size in (128, 256)}
    assert len(digests) == 2 and pack.content_digest(cases[::-1], hashes, 128) in digests
