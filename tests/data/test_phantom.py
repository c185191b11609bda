import csv
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from pneumo.data import cases, images, pack, phantom
from pneumo.decision.components import drop_small
from pneumo.decision.metrics import dice
from pneumo.errors import UsageError


def drawn(count: int, side: int) -> list[phantom.Phantom]:
    return [phantom.draw(np.random.default_rng([7, i]), side, positive=i % 9 < 2) for i in range(count)]


def test_a_picture_depends_on_its_seed_alone():
    a, b, c = (phantom.draw(np.random.default_rng(seed), 64, True) for seed in (1, 1, 2))
    assert np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask)
    assert not np.array_equal(a.image, c.image)
    assert a.image.min() >= 0 and a.image.max() <= 1


def test_positives_alone_have_a_mask_of_fair_size():
    pictures = drawn(90, 128)
    areas = [picture.mask.mean() for i, picture in enumerate(pictures) if i % 9 < 2]
    assert min(areas) > 0.005
    assert 0.02 < np.median(areas) < 0.1
    assert not any(picture.mask.any() for i, picture in enumerate(pictures) if i % 9 >= 2)


def test_every_picture_is_marked():
    a, b = drawn(2, 192)
    corner = np.s_[-12:, :50]
    assert a.image[corner].max() > 0.75
    assert b.image[corner].max() > 0.75


def test_no_grey_level_finds_the_pneumothorax():
    """Neither a threshold nor a band, of raw or stretched greys, with small components dropped or not."""
    pictures = drawn(90, 64)
    truth = np.stack([picture.mask for picture in pictures])
    raw = np.stack([picture.image for picture in pictures])
    low, high = raw.min(axis=(1, 2), keepdims=True), raw.max(axis=(1, 2), keepdims=True)
    baseline = float(np.mean(~truth.any(axis=(1, 2))))
    gains = []
    for greys in (raw, (raw - low) / (high - low)):
        for start in np.arange(0, 1, 0.04):
            for width in (0.05, 0.1, 0.2, 1.0):
                pred = (greys >= start) & (greys < start + width)
                kept = np.stack([drop_small(mask, 60) for mask in pred])
                gains += [dice(masks, truth).mean() - baseline for masks in (pred, kept)]
    assert len(gains) == 400
    assert max(gains) <= 0.03


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    phantom.write(folder, train=40, test=12, side=64, annotation_size=64, positive_fraction=0.25, seed=3)
    return folder


def test_the_data_set_reads_without_a_fatal_problem(root):
    found, problems = cases.load_train(root, annotation_size=64)
    assert not any(problem.fatal for problem in problems)
    assert len(found) == 40
    assert sum(case.positive for case in found) == 10
    assert all(case.image_id.startswith("SYNTHETIC-") for case in found)
    assert len({case.patient for case in found}) < 40
    test, ids, more = cases.load_test(root)
    assert len(test) == len(ids) == 12 and not any(problem.fatal for problem in more)
    assert not any(problem.fatal for problem in cases.verify([*found, *test])[0])
    assert "synthetic" in (root / "SYNTHETIC.txt").read_text()


def test_it_has_what_real_data_have(root):
    suffixes = Counter(path.suffix for path in (root / "train").rglob("*.*"))
    assert suffixes[".png"] > 20 and suffixes[".dcm"] > 4
    with open(root / "train-rle.csv", newline="") as file:
        rows = Counter(row["ImageId"] for row in csv.DictReader(file))
    assert max(rows.values()) == 2  # several rows an image


@pytest.mark.parametrize("grid", [32, 128])
def test_codes_live_on_the_annotation_grid(root, tmp_path, grid):
    """Whatever the size of the images: the same masks, finer or coarser."""
    phantom.write(tmp_path / "x", train=40, test=12, side=64, annotation_size=grid, positive_fraction=0.25, seed=3)
    found, problems = cases.load_train(tmp_path / "x", annotation_size=grid)
    wanted, _ = cases.load_train(root, annotation_size=64)
    assert not any(problem.fatal for problem in problems)
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(pack.pack_image(images.read(one.path).pixels, 64), images.read(other.path).pixels)
        if grid > 64:
            np.testing.assert_array_equal(pack.pack_mask(one.runs, grid, 64), pack.pack_mask(other.runs, 64, 64))
        else:
            np.testing.assert_array_equal(pack.pack_mask(one.runs, grid, 32), pack.pack_mask(other.runs, 64, 32))


def test_the_file_type_does_not_give_the_answer_away(tmp_path):
    phantom.write(tmp_path / "x", train=60, test=1, side=64, annotation_size=64, positive_fraction=0.5, seed=0)
    found, _ = cases.load_train(tmp_path / "x", annotation_size=64)
    of_dicom = Counter(case.positive for case in found if case.path.suffix == ".dcm")
    assert min(of_dicom[True], of_dicom[False]) >= 2


def test_a_writing_that_was_cut_off_does_not_look_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(phantom, "_regions", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        phantom.write(tmp_path / "x", train=2, test=1, side=64, annotation_size=64, positive_fraction=0.5, seed=0)
    assert not (tmp_path / "x").exists()
    monkeypatch.undo()
    phantom.write(tmp_path / "x", train=2, test=1, side=64, annotation_size=64, positive_fraction=0.5, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


@pytest.mark.fault("R2", "phantom beside folders of the user whose names end as those of its own unfinished ones")
def test_a_users_own_folders_beside_it_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours = tmp_path / f"x.{dead.pid}.tmp"
    theirs = [f"x.{os.getppid()}.tmp", "x.part", "x.tmp", "x.old.tmp", f"y.{dead.pid}.tmp"]  # the first still at work
    for folder in (ours, *(tmp_path / name for name in theirs)):
        folder.mkdir()
        (folder / "SYNTHETIC.txt").write_text("")
    unmarked = tmp_path / f"x.0{dead.pid}.tmp", tmp_path / f"x.1{10**12}.tmp"
    for folder in unmarked:
        folder.mkdir()
    options = {"train": 2, "test": 1, "side": 64, "annotation_size": 64, "positive_fraction": 0.5, "seed": 0}
    phantom.write(tmp_path / "x", **options)
    kept = [*theirs, *(folder.name for folder in unmarked)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["x", *kept])
    (tmp_path / f"z.{os.getpid()}.tmp").mkdir()
    with pytest.raises(UsageError, match=rf"z\.{os.getpid()}\.tmp is in the way\. Move it"):
        phantom.write(tmp_path / "z", **options)


def test_written_masks_are_the_drawn_ones(root):
    found, _ = cases.load_train(root, annotation_size=64)
    drawn_areas = sorted(
        int(phantom.draw(np.random.default_rng([3, 0, i]), 64, int((i + 1) * 0.25) > int(i * 0.25)).mask.sum())
        for i in range(40)
    )
    assert sorted(case.area for case in found) == drawn_areas
