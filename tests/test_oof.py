import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import small_run
import torch
from PIL import Image

from pneumo import checkpoint, dataset, engine, ensemble, inference, log, oof
from pneumo.data import rle
from pneumo.data.feed import Feed
from pneumo.decision import metrics, tables
from pneumo.decision.rule import Rule, decide, resize_quantise
from pneumo.engine import LossSettings
from pneumo.errors import DataError, UsageError
from pneumo.kernels.runs import runs_to_mask
from pneumo.score import score_files
from pneumo.tuning import Ruling

CPU = torch.device("cpu")
SMALL = ("tune.thresholds=6", "tune.min_areas=5", "tune.top_thresholds=3", "tune.top_areas=4", "train.amp=off")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    small_run.write_data(folder)
    (folder / "patients.csv").write_text(
        "ImageId,patient_id\n" + "".join(f"train-{i:03d},p{i // 2}\n" for i in range(17))
    )
    return folder


@pytest.fixture
def recipe(repo, root, tmp_path):
    return small_run.recipe(repo, root, tmp_path, *SMALL)


def test_every_case_by_the_fold_that_did_not_see_it(recipe, capsys):
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    assert capsys.readouterr().out.count(" MB; Dice, with the mirror image, 0.") == 3
    found = oof.load(recipe, data)
    assert sorted(found.image_ids) == [case.image_id for case in data.cases]
    assert len(found.sources) == 3
    assert len(np.unique(found.groups)) == 10  # nine pairs but for one image of unknown patient
    rule = Rule.of(recipe.rule)
    dice = tables.dice(found.tables, rule)
    pack = dataset.open_train(recipe, data, 64)
    for fold in range(3):
        models = ensemble.load(recipe, [fold], CPU)
        inside = np.flatnonzero(found.folds == fold)
        ((image, _),) = Feed(pack, CPU, found.rows[inside]).batches([found.rows[inside]])
        predicted = ensemble.predict(models, image, 64, [found.image_ids[i] for i in inside])
        for place, q in zip(inside, predicted.q, strict=True):
            case = data.cases[found.rows[place]]
            assert (case.image_id, data.folds[found.rows[place]]) == (found.image_ids[place], fold)
            assert dice[place] == metrics.dice_runs(decide(q, rule), case.runs)
    # a second time nothing is computed
    before = oof.path_of(recipe, 0).stat().st_mtime_ns
    oof.write(recipe, data, CPU)
    assert oof.path_of(recipe, 0).stat().st_mtime_ns == before
    assert "there already" in capsys.readouterr().out


def test_near_duplicates_are_resampled_together(repo, root, tmp_path):
    """As the split keeps them together: else intervals would take them for as many independent cases."""
    shutil.copytree(root, tmp_path / "data")
    shutil.copy(tmp_path / "data/train/train-001.png", tmp_path / "data/train/train-017.png")  # of no known patient
    recipe = small_run.recipe(repo, tmp_path / "data", tmp_path / "runs", *SMALL)
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    found = oof.load(recipe, data)
    of = dict(zip(found.image_ids, found.groups.tolist(), strict=True))
    assert of["train-017"] == of["train-001"] == of["train-000"]  # the first two of them are one patient's
    assert len(set(of.values())) == 9


def test_tables_and_a_submission_score_alike(recipe, root, tmp_path):
    """The tables' Dice is what `score` says of a submission that holds the same masks."""
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    found = oof.load(recipe, data)
    # half of all pixels exceed it: at a fixed threshold random networks may find nothing, and nothing scores alike
    middle = np.searchsorted(found.tables.histogram.sum(axis=0).cumsum(), found.tables.histogram.sum() / 2)
    level = found.tables.levels[np.abs(found.tables.levels - middle).argmin()]
    rule = Rule(threshold=int(level) / 256, min_area=3)
    pack = dataset.open_train(recipe, data, 64)
    lines = []
    for fold in range(3):
        models = ensemble.load(recipe, [fold], CPU)
        rows = np.flatnonzero(data.folds == fold)
        ((image, _),) = Feed(pack, CPU, rows).batches([rows])
        for row, q in zip(rows, ensemble.predict(models, image, 64, [""] * len(rows)).q, strict=True):
            lines.append(f"{data.cases[row].image_id},{rle.encode_runs(decide(q, rule))}")
    assert sum(line.endswith(",-1") for line in lines) < len(lines) / 2
    (tmp_path / "s.csv").write_text("\n".join(["ImageId,EncodedPixels", *lines]) + "\n")
    scored = score_files(tmp_path / "s.csv", root / "train-rle.csv", annotation_size=64)
    assert scored["dice"] == pytest.approx(tables.dice(found.tables, rule).mean(), abs=1e-12)


def test_padding_counts_nowhere(repo, root, tmp_path):
    """Validation, out-of-fold tables and submission, of images that are not square and with all of them found."""
    shutil.copytree(root, tmp_path / "data")
    (tmp_path / "data" / "train-rle.csv").unlink()  # its codes are of a square
    (tmp_path / "data" / "mask").mkdir()
    for path in sorted(tmp_path.glob("data/t*/*.png")):
        whole = path.stem == "train-000"
        pixels = np.asarray(Image.open(path))[slice(None) if whole else slice(12, 51)]  # 39 of 64 rows
        Image.fromarray(pixels).save(path)
        if path.parent.name == "train":
            Image.fromarray(np.uint8(pixels > 110) * 255).save(tmp_path / "data" / "mask" / path.name)
    recipe = small_run.recipe(repo, tmp_path / "data", tmp_path / "runs", *SMALL)
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    found, everything = oof.load(recipe, data), Rule(threshold=1 / 256)
    wanted = np.where(found.rows == 0, 64 * 64, 39 * 64)
    assert found.tables.histogram[:, 1:].sum(axis=1).tolist() == wanted.tolist()
    place = found.tables.place(0.5)

    models = ensemble.load(recipe, [0], CPU)
    rows = np.flatnonzero(data.folds == 0)
    pack = dataset.open_train(recipe, data, 64)
    ((image, _),) = Feed(pack, CPU, rows).batches([rows])
    ((plain, mirrored),) = ensemble._views(models, models.models[0], image)
    for row, first, second in zip(rows, *(resize_quantise(probs, 64) for probs in (plain, mirrored)), strict=True):
        inside = slice(None) if row == 0 else slice(12, 51)
        alike = float(metrics.dice(first[inside].numpy() >= 128, second[inside].numpy() >= 128))
        assert found.tables.agreement[found.rows.tolist().index(row), place] == pytest.approx(alike, abs=1e-6)

    scored = engine.evaluate(
        models.models[0][0],
        Feed(pack, CPU, rows),
        rows,
        lambda row: data.cases[row].runs,
        everything,
        LossSettings("focal_dice", 10.0, 2.0, 1.0),
        torch.float32,
        annotation_size=64,
        batch_size=4,
        progress=lambda items: items,
    )
    for row, dice in zip(scored.rows, scored.dice, strict=True):
        picture = np.zeros((64, 64), dtype=bool)
        picture[slice(None) if row == 0 else slice(12, 51)] = True
        assert dice == metrics.dice(picture, runs_to_mask(data.cases[row].runs, 64, 64))

    inference.predict_test(recipe, models, Ruling(everything, "recipe", None), CPU)
    lines = (recipe.folder / "submission.csv").read_text().splitlines()[1:]
    areas = [int(rle.decode(line.split(",")[1], 64, 64).sum()) for line in lines]
    assert areas == [39 * 64] * 4


def test_mirror_agreement_is_recorded(recipe):
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    models = ensemble.load(recipe, [0], CPU)
    rows = np.flatnonzero(data.folds == 0)
    pack = dataset.open_train(recipe, data, 64)
    ((image, _),) = Feed(pack, CPU, rows).batches([rows])
    ((plain, mirrored),) = ensemble._views(models, models.models[0], image)
    plain, mirrored = (resize_quantise(probs, 64) for probs in (plain, mirrored))
    found = oof.load(recipe, data)
    place = found.tables.place(0.5)
    for i, row in enumerate(rows):
        wanted = float(metrics.dice(plain[i].numpy() >= 128, mirrored[i].numpy() >= 128))
        mine = found.tables.agreement[found.rows.tolist().index(row), place]
        assert mine == pytest.approx(wanted, abs=1e-6)


def test_weights_are_chosen_by_name(recipe):
    data = small_run.pretend_trained(recipe, "best.pt", "ema.pt", "epoch1.pt", "epoch2.pt", "last.pt")
    found = {}
    for weights in ("best", "ema", "average", "last"):
        chosen = replace(recipe, predict=replace(recipe.predict, weights=weights, mirror=False))
        oof.write(chosen, data, CPU)
        found[weights] = oof.load(chosen, data)
    assert [len(one.sources) for one in found.values()] == [3, 3, 6, 3]
    for other in ("ema", "last"):
        assert not np.array_equal(found["best"].tables.histogram, found[other].tables.histogram)
    average = replace(recipe, predict=replace(recipe.predict, weights="average", mirror=False))
    models = ensemble.load(average, [1], CPU)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, 64, 64), dtype=np.uint8))
    views = ensemble._views(models, models.models[0], image)
    (first,), (second,) = ([probs.double() for probs in of_one] for of_one in views)
    q = ensemble.predict(models, image, 64, ["a", "b"]).q
    np.testing.assert_array_equal(q, resize_quantise(((first + second) / 2).float(), 64).numpy())


@pytest.mark.parametrize(("weights", "hint"), [("ema", "train.ema above 0"), ("average", "train.keep_best above 1")])
def test_weights_that_were_not_kept_are_named(recipe, weights, hint):
    small_run.pretend_trained(recipe)
    chosen = replace(recipe, predict=replace(recipe.predict, weights=weights))
    with pytest.raises(UsageError, match=hint):
        ensemble.load(chosen, [0], CPU)


@pytest.mark.fault("S8", "out-of-fold files that lack an image or have one of another fold, or of none")
def test_what_is_missing_or_strange_is_named(recipe, root, tmp_path):
    data = small_run.pretend_trained(recipe)
    with pytest.raises(UsageError, match=r'no out-of-fold predictions yet\. Run: make oof SET="\.\.\.", or say where'):
        oof.load(recipe, data)
    oof.write(recipe, data, CPU)
    path = oof.path_of(recipe, 1)
    with np.load(path) as arrays:
        content = dict(arrays)
    gone, others = content["image_ids"][0], content["image_ids"].copy()
    others[0] = "stranger"
    np.savez(path, **{**content, "image_ids": others})
    with pytest.raises(DataError, match=rf"oof-best.npz has no prediction of 1 images, as {gone}\. Run again"):
        oof.load(recipe, data)
    one_more = {
        name: np.concatenate([content[name], content[name][:1] * (name != "counts")])
        for name in ("histogram", "true_histogram", "agreement", "counts")
    }
    np.savez(path, **{**content, **one_more, "image_ids": np.append(content["image_ids"], "stranger")})
    with pytest.raises(DataError, match="has predictions of images that are not of its fold, 1 images, as stranger"):
        oof.load(recipe, data)


@pytest.mark.fault("S8", "out-of-fold files of a checkpoint that has been replaced, or that saw another split")
def test_outdated_and_damaged_files_are_refused_and_made_anew(recipe, capsys):
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    path = oof.path_of(recipe, 2)
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], b"", b"<html>", good[:200] + bytes([good[200] ^ 1]) + good[201:]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"oof-best.npz cannot be read .* run: make oof"):
            oof.load(recipe, data)
    oof.write(recipe, data, CPU)
    assert "cannot be read" in capsys.readouterr().err
    oof.load(recipe, data)
    best = recipe.stage_folder(0, 3) / "best.pt"
    state = checkpoint.load(best)
    checkpoint.save({**state, "record": {"epoch": 2, "dice": 0.6}}, best)
    with pytest.raises(DataError, match=r"was made by another .*best.pt than there is now"):
        oof.load(recipe, data)
    oof.write(recipe, data, CPU)
    oof.load(recipe, data)
    checkpoint.save({**state, "split": "another"}, best)
    with pytest.raises(DataError, match="would not be out of fold"):
        oof.write(recipe, data, CPU)


@pytest.mark.fault("S8", "out-of-fold files of networks that saw other annotations than there are now: no circle")
def test_a_corrected_mask_asks_for_new_networks(repo, root, tmp_path):
    """Neither command sends to the other: predictions of the same networks would be no better."""
    shutil.copytree(root, tmp_path / "data")
    recipe = small_run.recipe(repo, tmp_path / "data", tmp_path / "runs", *SMALL)
    oof.write(recipe, small_run.pretend_trained(recipe), CPU)
    annotations = tmp_path / "data" / "train-rle.csv"
    annotations.write_text(annotations.read_text().replace("train-001,-1", "train-001,70 3"))
    data = dataset.load(recipe)
    for command in (oof.load, lambda *of: oof.write(*of, CPU)):
        with pytest.raises(
            DataError,
            match=r"best.*Delete the folders fold0 to fold2 .*seed and run: make cv.*; .* make cv.*runs=DIR",
        ) as at:
            command(recipe, data)
        assert "make oof" not in str(at.value)


@pytest.mark.fault("S8", "a run folder moved, then a checkpoint in it replaced: its out-of-fold file is outdated")
def test_a_moved_run_is_compared_with_its_own_checkpoints(repo, root, recipe, tmp_path):
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    (tmp_path / "seed").rename(tmp_path / "moved")
    moved = small_run.recipe(repo, root, tmp_path / "elsewhere", *SMALL)
    moved.folder.parent.mkdir(parents=True)
    (tmp_path / "moved").rename(moved.folder)
    oof.load(moved, data)
    best = moved.stage_folder(0, 3) / "best.pt"
    checkpoint.save({**checkpoint.load(best), "record": {"epoch": 2, "dice": 0.6}}, best)
    with pytest.raises(DataError, match=r"was made by another .*elsewhere.*best.pt than there is now"):
        oof.load(moved, data)


@pytest.mark.fault("S8", "out-of-fold files that are whole, but hold what no prediction gives")
def test_files_of_strange_content_are_refused(recipe, capsys, figure):
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    path = oof.path_of(recipe, 1)
    good = path.read_bytes()
    with np.load(path) as arrays:
        content = dict(arrays)
    origin = json.loads(str(content["origin"]))
    damages = [
        ({"histogram": content["histogram"][:, :10]}, r"histogram is int32 of \(6, 10\), not int32 of \(6, 256\)"),
        ({"histogram": content["histogram"] - 1}, "histogram holds what no prediction gives"),
        ({"true_histogram": content["true_histogram"] - 1}, "true_histogram holds what no"),
        ({"area": np.full(content["area"].shape, np.nan)}, "area is float64"),
        ({"counts": content["counts"][:1]}, r"counts is int32 of \(1, "),
        ({"counts": content["counts"] * 2}, "counts holds what no"),
        ({"overlap": content["area"] + 1}, "overlap holds what no"),
        ({"agreement": content["agreement"] * np.float32("nan")}, "agreement holds what no"),
        ({"levels": content["levels"][::-1]}, "levels holds what no"),
        ({"image_ids": np.arange(6)}, "image_ids are not different names"),
        ({"image_ids": content["image_ids"][[0, 0, 2, 3, 4, 5]]}, "image_ids are not different names"),
        ({"origin": np.array("[" * 100_000)}, "recursion"),
        ({"origin": np.array(json.dumps({**origin, "checkpoints": {"a": 5}}))}, "its checkpoints have no hashes"),
        *(
            ({"origin": np.array(json.dumps({**origin, key: None}))}, f"its origin has no {key}")
            for key in ("checkpoints", "data", "split", "mirror", "image_size", "annotation_size", "levels")
        ),
    ]
    files = []
    for change, reason in damages:
        np.savez(path, **{**content, **change})
        files.append((path.read_bytes(), reason))
    entry = good.index(b"PK\x01\x02")
    for offset, byte, reason in ((10, 99, "compression method"), (8, 1, "encrypted")):
        files.append((good[: entry + offset] + bytes([byte]) + good[entry + offset + 1 :], reason))
    for bad, reason in files:
        path.write_bytes(bad)
        with pytest.raises(
            DataError, match=rf'oof-best\.npz cannot be read \(.*{reason}.*\)\. .* run: make oof SET="\.{{3}}"$'
        ):
            oof.load(recipe, data)
    oof.write(recipe, data, CPU)
    assert "cannot be read" in capsys.readouterr().err
    oof.load(recipe, data)
    figure(f"{len(files)} of {len(files)} named, made anew by make oof")


def test_only_finished_folds_are_predicted(recipe):
    data = small_run.pretend_trained(recipe)
    log.write_status(recipe.stage_folder(1, 3), "running", epoch=1, epochs=2)
    oof.write(recipe, data, CPU)
    assert set(oof.load(recipe, data).folds) == {0, 2}
    for fold in (0, 2):
        log.write_status(recipe.stage_folder(fold, 3), "running", epoch=1, epochs=2)
    with pytest.raises(UsageError, match="no fold has finished stage 3"):
        oof.write(recipe, data, CPU)


def test_maps_are_the_probabilities_that_were_measured(recipe):
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU, maps=True)
    found = oof.load(recipe, data)
    for place, image_id in enumerate(found.image_ids):
        path = oof.path_of(recipe, found.folds[place]).with_suffix("") / f"{image_id}.png"
        with Image.open(path) as picture:
            q = np.asarray(picture)
        np.testing.assert_array_equal(np.bincount(q.ravel(), minlength=256), found.tables.histogram[place])


def test_the_file_says_what_made_it(recipe):
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    with np.load(oof.path_of(recipe, 0)) as arrays:
        origin = json.loads(str(arrays["origin"]))
    (source,) = origin["checkpoints"]
    assert origin["checkpoints"][source] == checkpoint.sha256(recipe.stage_folder(0, 3) / "best.pt")
    assert (origin["mirror"], origin["image_size"], origin["annotation_size"]) == (True, 64, 64)


def change(path, **arrays):
    with np.load(path) as found:
        content = dict(found)
    origin = json.loads(str(content["origin"]))
    origin.update(arrays.pop("origin", {}))
    np.savez(path, **{**content, **arrays, "origin": np.array(json.dumps(origin))})


def test_tables_of_another_split_are_refused(recipe):
    """In which images that a network was trained on are held out."""
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    for other in ({"split": "another"}, {"digest": "another"}):
        with pytest.raises(
            DataError, match=r"oof-best\.npz is of networks that were trained on other images, annotations"
        ):
            oof.load(recipe, replace(data, **other))


def test_maps_are_written_though_tables_are_there(recipe):
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    oof.write(recipe, data, CPU, maps=True)
    assert len(list(recipe.folder.glob("fold*/stage3/oof-best/*.png"))) == 18


def test_folds_that_were_predicted_otherwise_are_not_mixed(recipe):
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    change(oof.path_of(recipe, 1), origin={"image_size": 32})
    with pytest.raises(DataError, match="the folds' predictions were made with different settings"):
        oof.load(recipe, data)


def test_folds_that_were_trained_otherwise_are_warned_of(recipe, capsys):
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    assert oof.load(recipe, data).encoder == recipe.model.encoder
    assert "otherwise" not in capsys.readouterr().err
    path = recipe.stage_folder(1, 3) / "best.pt"
    state = checkpoint.load(path)
    checkpoint.save({**state, "settings": {**state["settings"], "stage.3.lr": 0.5, "train.amp": "bf16"}}, path)
    oof.write(recipe, data, CPU)
    assert capsys.readouterr().err == ""  # each fold is predicted by itself
    oof.load(recipe, data)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"fold 1 of {recipe.folder} was trained otherwise than fold 0 (stage.3.lr: 0.001 -> 0.5)")


def test_predictions_made_in_other_batches_or_numbers_are_made_anew(recipe, capsys):
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    capsys.readouterr()
    oof.write(replace(recipe, predict=replace(recipe.predict, batch_size=2)), data, CPU)
    assert "there already" not in capsys.readouterr().out
    change(oof.path_of(recipe, 1), origin={"autocast": "torch.bfloat16"})
    oof.write(replace(recipe, predict=replace(recipe.predict, batch_size=2)), data, CPU)
    assert capsys.readouterr().out.count("there already") == 2


@pytest.mark.parametrize("part", ["image_ids", "area"])
def test_a_file_of_objects_runs_nothing(recipe, tmp_path, part):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    evil = np.empty(1, dtype=object)
    evil[0] = Evil()
    change(oof.path_of(recipe, 1), **{part: evil})
    with pytest.raises(DataError, match="cannot be read"):
        oof.load(recipe, data)
    assert not (tmp_path / "ran").exists()


def test_more_strange_contents(recipe):
    data = small_run.pretend_trained(recipe)
    oof.write(recipe, data, CPU)
    path = oof.path_of(recipe, 1)
    good = path.read_bytes()
    with np.load(path) as arrays:
        histogram, agreement = arrays["histogram"], arrays["agreement"]
    for changed, reason in (
        ({"origin": {"format": oof.FORMAT - 1}}, f"not of format {oof.FORMAT}"),
        ({"histogram": histogram + 1}, "histogram holds what no"),
        ({"true_histogram": histogram + 1}, "true_histogram holds what no"),
        ({"agreement": agreement + 1.5}, "agreement holds what no"),
        ({"origin": {"settings": {}}}, "its settings name no encoder"),
    ):
        path.write_bytes(good)
        change(path, **changed)
        with pytest.raises(DataError, match=reason):
            oof.load(recipe, data)
