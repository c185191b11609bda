"""Order that must not matter, and folds that must not leak."""

import argparse
import collections
import csv
import json
import random
import re
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
import small_run
from PIL import Image

from pneumo import __main__ as commands
from pneumo import dataset
from pneumo.data import folds, rle
from pneumo.errors import DataError


@pytest.mark.fault("R19", "CSV rows shuffled, files written in another order, 1 and 4 threads; trained to the end")
def test_order_and_threads_do_not_matter(data, tmp_path, figure):
    straight = tmp_path / "straight"
    assert forked.start(*forked.train(data, straight), cwd=straight).wait() == 0
    for seed, threads in enumerate((1, 4)):
        root, runs = tmp_path / f"data{seed}", tmp_path / f"runs{seed}"
        for part in ("train", "test"):
            (root / part).mkdir(parents=True)
            paths = sorted((data / part).iterdir())
            random.Random(seed).shuffle(paths)
            for path in paths:
                shutil.copy(path, root / part / path.name)
        header, *rows = (data / "train-rle.csv").read_text().splitlines()
        random.Random(seed).shuffle(rows)
        (root / "train-rle.csv").write_text("\n".join([header, *rows]))
        job = forked.start(*forked.train(root, runs), cwd=runs, hook=forked.Threads(threads))
        assert job.wait() == 0, job.text
        assert (runs / "seed" / "folds.csv").read_bytes() == (straight / "seed" / "folds.csv").read_bytes()
        assert forked.differing_files(straight, runs) == []
    figure("2 of 2: same folds.csv, same weights")


def write_random(root: Path, seed: int) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Images of patients, some twice over, with several rows each; returns patients and pairs of equal pictures."""
    rng = np.random.default_rng(seed)
    (root / "train").mkdir(parents=True)
    ids = [f"{rng.integers(10**9):09d}-{i}" for i in range(int(rng.integers(30, 70)))]
    patient = {image_id: f"p{rng.integers(len(ids) // 2)}" for image_id in ids if rng.random() < 0.8}
    rows, pairs, pictures = [], [], {}
    for image_id in ids:
        pixels = rng.integers(0, 200, (64, 64), dtype=np.uint8)
        if pictures and rng.random() < 0.15:
            twin = str(rng.choice(list(pictures)))
            pixels = np.clip(pictures[twin] * 0.9 + 5 + rng.normal(0, 1, (64, 64)), 0, 255).astype(np.uint8)
            pairs.append((twin, image_id))
        pictures[image_id] = pixels
        Image.fromarray(pixels).save(root / "train" / f"{image_id}.png")
        if rng.random() < 0.6:
            rows.append((image_id, "-1"))
            continue
        for _ in range(int(rng.integers(1, 4))):
            mask = np.zeros((64, 64), dtype=bool)
            y, x = rng.integers(0, 50, 2)
            mask[y : y + 10, x : x + int(rng.integers(2, 12))] = True
            rows.append((image_id, rle.encode(mask)))
    rng.shuffle(rows)
    for name, header, lines in (
        ("train-rle.csv", ("ImageId", "EncodedPixels"), rows),
        ("patients.csv", ("ImageId", "patient_id"), patient.items()),
    ):
        with open(root / name, "w", newline="") as file:
            csv.writer(file).writerows([header, *lines])
    return patient, pairs


@pytest.mark.fault("R20", "random CSVs with several rows an id, the same picture twice, patients.csv; 10 seeds")
def test_nothing_is_in_two_folds(repo, tmp_path, figure):
    spreads, images = [], 0
    for seed in range(10):
        root = tmp_path / str(seed)
        patient, pairs = write_random(root, seed)
        recipe = small_run.recipe(repo, root, tmp_path / f"runs{seed}")
        loaded = dataset.load(recipe)
        with open(recipe.folder / "folds.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        fold = {row["ImageId"]: row["fold"] for row in rows}
        assert len(rows) == len(fold) == len(loaded.cases)  # each id once
        places: dict[str, set[str]] = {}
        for image_id, name in patient.items():
            places.setdefault(name, set()).add(fold[image_id])
        assert max(map(len, places.values())) == 1
        assert len(pairs) > 0 and all(fold[a] == fold[b] for a, b in pairs)
        shares = [loaded.positive[loaded.folds == number].mean() for number in range(recipe.folds.count)]
        spreads.append(max(shares) - min(shares))
        images += len(fold)
    assert np.mean(spreads) < 0.1  # of some 17 images a fold
    figure(f"{images} ids in 10 splits: 0 in two folds, 0 patients, 0 pairs; prevalence within {np.mean(spreads):.1%}")


@pytest.mark.fault("R20", "the same picture twice, annotated with a pneumothorax and without")
def test_copies_that_contradict_each_other_are_named(repo, data, tmp_path, capsys, figure):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    before = json.loads(audit_of(repo, root, tmp_path / "before"))
    assert before["duplicates"] == [] and "near-duplicate images" not in capsys.readouterr().err
    with open(root / "train-rle.csv", newline="") as file:
        positive = next(row["ImageId"] for row in csv.DictReader(file) if row["EncodedPixels"] != "-1")
    source = next((root / "train").glob(f"{positive}.*"))
    shutil.copy(source, source.with_name(f"copy{source.suffix}"))
    with open(root / "train-rle.csv", "a", newline="") as file:
        file.write("copy,-1\n")
    audit = json.loads(audit_of(repo, root, tmp_path / "after"))
    assert audit["duplicates"] == [sorted([positive, "copy"])] and audit["duplicates_contradicting"] == 1
    said = capsys.readouterr().err
    assert "of 1 pair of near-duplicate images one is annotated with a pneumothorax, the other without: " in said
    assert positive in said
    figure("named")


def audit_of(repo: Path, root: Path, runs: Path) -> str:
    """The audit of a new split."""
    recipe = small_run.recipe(repo, root, runs)
    dataset.load(recipe)
    return (recipe.folder / "audit.json").read_text()


@pytest.mark.fault("R20", "folds --force on a run that has trained networks")
def test_a_new_split_names_the_stages_that_it_leaves(repo, data, tmp_path, capsys, figure):
    settings = small_run.settings(data, tmp_path)
    small_run.pretend_trained(small_run.recipe(repo, data, tmp_path))
    for more, stale in (((), False), (("seed=1",), True)):
        options = argparse.Namespace(
            recipe="seed", config=repo / "configs.toml", set=[[*settings, *more]], debug=False, force=True
        )
        commands.folds(options)
        said = capsys.readouterr().err
        assert ("3 stages were trained on another split and cannot go on: " in said) == stale
        assert (str(tmp_path / "seed" / "fold0" / "stage3") in said) == stale
    figure("3 of 3 named")


@pytest.mark.fault("R20", "patients.csv written after the split: train, tune and folds refuse it; --force splits anew")
def test_patients_that_become_known_are_not_parted(data, tmp_path, figure):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    recipe = small_run.recipe(forked.REPO, root, tmp_path / "runs")
    dataset.load(recipe)
    ids = sorted(path.stem for path in (root / "train").iterdir())
    rows = "".join(f"{image_id},secret-{i % 3}\n" for i, image_id in enumerate(ids))
    (root / "patients.csv").write_text("ImageId,patient_id\n" + rows)
    with pytest.raises(
        DataError, match=r"folds\.csv: \d+ images are in another fold than one of the same patient, as"
    ) as e:
        dataset.load(recipe)
    assert (
        "secret" not in str(e.value) and "\n" not in str(e.value) and str(e.value).endswith("--set folds.group=image")
    )
    by_image = small_run.recipe(forked.REPO, root, tmp_path / "runs", "folds.group=image")
    found = dataset.load_cases(by_image)
    text = dataset.audit(by_image, found, dataset.read_folds(by_image, found), None)
    assert "patients known: 3, in more than one fold: 3" in text
    assert text + "\n" == (tmp_path / "runs" / "seed" / "audit.txt").read_text()
    dataset.split(recipe, found, None)
    assert "in more than one fold: 0" in (tmp_path / "runs" / "seed" / "audit.txt").read_text()
    dataset.load(recipe)
    figure("refused by two images' names, no patient's; split anew: 0 of 3 patients parted")


@pytest.mark.fault("R20", "settings of the split changed after it; folds.csv replaced by the user's own")
def test_a_split_of_other_settings_is_said(repo, data, tmp_path, capsys, figure):
    def warnings(*more: str) -> str:
        dataset.load(small_run.recipe(repo, data, tmp_path, *more))
        return "".join(line for line in capsys.readouterr().err.splitlines(True) if "folds.csv" in line)

    path = tmp_path / "seed" / "folds.csv"
    assert warnings() == warnings("tune.draws=500") == ""
    first = path.read_bytes()
    assert warnings("seed=1", "folds.area_bins=2") == (
        f"warning: {path} is used as it is, but was split with other settings (seed: 0 -> 1; folds.area_bins: 4 -> 2). "
        "To split anew: `python -m pneumo folds --recipe seed --set ... --force`; earlier runs cannot go on then. "
        "To keep those, choose another folder: --set runs=DIR.\n"
    )
    assert path.read_bytes() == first
    path.write_text(re.sub(",([01]),", lambda found: f",{1 - int(found[1])},", first.decode()))
    assert warnings("seed=1") == ""  # another split, so folds.json tells nothing of it
    path.write_bytes(first)
    path.with_suffix(".json").write_text("{")
    assert warnings("seed=1") == ""
    path.with_suffix(".json").unlink()
    assert warnings("seed=1") == ""
    figure("said once and used; the user's own in silence")


def test_near_duplicates_are_known_where_the_users_own_folds_have_no_groups(repo, data, tmp_path):
    """An image and its copy count as one for every interval, whoever split them."""
    root = tmp_path / "data"
    shutil.copytree(data, root)
    shutil.copy(root / "train" / "train-000.png", root / "train" / "train-003.png")
    recipe = small_run.recipe(repo, root, tmp_path)
    split = dataset.load(recipe)
    path = recipe.folder / "folds.csv"
    rows = [row.split(",")[:2] for row in path.read_text().splitlines()]
    path.write_text("".join(",".join(row) + "\n" for row in rows))
    own = dataset.load(recipe)
    for found in (split, own):
        counts = collections.Counter(group for group in found.groups if group is not None)
        assert list(counts.values()) == [2]
        assert found.groups[0] == found.groups[3] is not None


@pytest.mark.fault("R20", "near-duplicates parted: images replaced after the split, split without them, the user's own")
@pytest.mark.parametrize("how", ["replaced", "no images", "own"])
def test_near_duplicates_that_the_folds_part_are_said(repo, data, tmp_path, capsys, figure, how):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    recipe, images = small_run.recipe(repo, root, tmp_path), root / "train"
    path = recipe.folder / "folds.csv"
    first = dataset.load(recipe)
    assert "near-duplicate" not in capsys.readouterr().err
    other = next(row for row in range(18) if first.folds[row] != first.folds[0] and row % 3)
    shutil.copy(images / "train-000.png", images / f"train-{other:03d}.png")
    if how == "no images":
        dataset.split(recipe, dataset.load_cases(recipe, need_images=False), None)
    if how == "own":
        rows = [f"{image_id},{fold}\n" for image_id, fold, _ in csv.reader(path.read_text().splitlines()[1:])]
        path.write_text("ImageId,fold\n" + "".join(rows))
        path.with_suffix(".json").unlink()
    found = dataset.load(recipe)
    said = capsys.readouterr().err
    assert "1 pair of near-duplicate images are in different folds, so that one is trained on and the other" in said
    assert f"train-000 and train-{other:03d}. To split anew: `python -m pneumo folds" in said
    assert found.groups[0] == found.groups[other] is not None
    dataset.split(recipe, found.cases, dataset.open_train(recipe, found, 64))
    capsys.readouterr()
    dataset.load(recipe)
    assert "near-duplicate" not in capsys.readouterr().err
    figure(f"{how}: said, with the command; counted as one case; split anew: nothing to say")


def test_the_split_is_the_one_that_the_recipe_asks_for(repo, data, tmp_path, monkeypatch):
    root, asked, split = tmp_path / "data", {}, folds.split
    shutil.copytree(data, root)
    (root / "patients.csv").write_text("ImageId,patient_id\ntrain-000,a\ntrain-001,a\n")

    def noted(ids, areas, groups, **settings):
        asked.update(settings, groups={group for group in groups if group is not None})
        return split(ids, areas, groups, **settings)

    monkeypatch.setattr(folds, "split", noted)
    for group, found in (("patient", 1), ("image", 0)):
        changes = ("seed=3", "folds.count=4", "folds.area_bins=2", f"folds.group={group}")
        dataset.load(small_run.recipe(repo, root, tmp_path / group, *changes))
        assert len(asked.pop("groups")) == found
        assert asked == {"count": 4, "area_bins": 2, "seed": 3}
