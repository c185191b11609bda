"""Prediction of an image in memory; of files, and what can go wrong with them: faults/test_prediction.py."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_run
import torch
from PIL import Image

from pneumo import config, ensemble, given
from pneumo.data import images
from pneumo.decision.rule import LEVELS, Rule
from pneumo.errors import DataError, UsageError
from pneumo.tuning import Ruling

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(repo, tmp_path_factory):
    """A recipe with two finished folds of random networks, its ensemble, and a rule that finds half of all pixels."""
    folder = tmp_path_factory.mktemp("given")
    small_run.write_data(folder / "data")
    recipe = small_run.recipe(repo, folder / "data", folder / "runs", "folds.count=2")
    small_run.pretend_trained(recipe)
    models = ensemble.load(recipe, [0, 1], CPU)
    return recipe, models, Ruling(small_run.halving_rule(models, folder / "data" / "test"), "recipe", None)


@pytest.mark.parametrize("shape", [(64, 64), (200, 200), (90, 151), (151, 90), (40, 64)])
def test_an_image_in_memory_is_predicted_as_its_file(trained, tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    given.predict(*trained, given.find([tmp_path / "a.png"], tmp_path / "out"), tmp_path / "out", CPU)
    probs, mask = given.segment(*trained, images.read(tmp_path / "a.png").pixels)
    assert np.array_equal(mask, np.asarray(Image.open(tmp_path / "out" / "a_mask.png")) == 255)
    assert mask.dtype == bool and mask.any() and not mask.all()
    assert probs.dtype == np.float32 and probs.shape == mask.shape == shape
    rule = trained[2].rule
    assert (probs[mask] > rule.threshold).all()
    assert (probs > rule.threshold).sum() - mask.sum() <= shape[0] * shape[1] // 4  # what is left are small components


def test_all_of_an_oblong_image_is_there_and_nothing_of_its_padding(trained):
    recipe, models, _ = trained
    everything = Ruling(Rule(threshold=1 / LEVELS), "recipe", None)
    probs, mask = given.segment(recipe, models, everything, np.full((40, 64), 90, np.uint8))
    assert mask.all() and (probs > 1 / LEVELS).all()


@pytest.mark.parametrize(
    "pixels", [np.zeros((64, 64), np.float32), np.zeros((64, 64), np.uint16), np.zeros((3, 64, 64), np.uint8)]
)
def test_another_type_or_shape_is_refused(trained, pixels):
    with pytest.raises(ValueError, match=r"an image must be \(H, W\) uint8, as of images.read.*, got \("):
        given.segment(*trained, pixels)


def test_the_readme_shows_how(repo, trained, tmp_path):
    """Its lines run as they are, in a folder with a recipe, its run and an X-ray."""
    recipe, models, _ = trained
    (tmp_path / "configs.toml").write_text(config.dumps(recipe))
    pixels = np.random.default_rng(0).integers(0, 256, (100, 80), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    text = (repo / "README.md").read_text(encoding="utf-8")
    (lines,) = [part for part in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE) if "given.segment(" in part]
    code = re.sub("^    ", "", lines, flags=re.MULTILINE).replace("a.dcm", "a.png")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\nimport numpy; numpy.savez('found', probs, mask)"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(repo)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    own = Ruling(Rule(threshold=0.5, min_area=20), "recipe", None)
    for name, wanted in zip(("arr_0", "arr_1"), given.segment(recipe, models, own, pixels), strict=True):
        assert np.array_equal(np.load(tmp_path / "found.npz")[name], wanted)


def test_the_area_is_in_square_centimetres_of_the_files_own_pixels(trained, tmp_path, monkeypatch):
    """All of 64 x 64 pixels of 2 by 5 mm: 409.6 cm2."""
    recipe, models, _ = trained
    Image.fromarray(np.full((64, 64), 90, np.uint8)).save(tmp_path / "a.png")
    real, everything = images.read, Ruling(Rule(threshold=1 / LEVELS), "recipe", None)
    monkeypatch.setattr(images, "read", lambda path: replace(real(path), spacing=(2.0, 5.0)))
    out = tmp_path / "out"
    given.predict(recipe, models, everything, given.find([tmp_path / "a.png"], out), out, CPU)
    record = json.loads((out / "predictions.jsonl").read_text())
    assert (record["area_pixels"], record["area_cm2"], record["pneumothorax"]) == (64 * 64, 409.6, True)
    monkeypatch.setattr(images, "read", lambda path: replace(real(path), spacing=(0.5, 0.5)))
    again = tmp_path / "again"
    given.predict(recipe, models, everything, given.find([tmp_path / "a.png"], again), again, CPU)
    (warning, *_) = json.loads((again / "predictions.jsonl").read_text())["warnings"][-1:]
    assert warning.startswith("3.2 cm long by the spacing of its pixels")


@pytest.mark.parametrize(
    ("spacing", "said"),
    [
        (None, None),
        ((0.35, 0.35), None),
        ((0.26, 0.20), None),  # 26 cm high
        ((0.143, 0.143), "14.3 cm long by the spacing of its pixels, where an adult's X-ray has 25 to 60: a child, or"),
        ((0.2, 0.7), "70 cm long by the spacing"),
    ],
)
def test_a_chest_that_is_no_adults_by_its_spacing_is_warned_of(spacing, said):
    found = given._odd_size(images.Scan(np.zeros((1000, 1000), np.uint8), spacing, ()))
    assert [remark.startswith(said) for remark in found] == [True] if said else found == []


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1000, 1000), []),
        ((1000, 500), []),
        ((1000, 400), ["2.5 times as long as wide: is it a strip"]),
        ((64, 50), []),
        ((63, 50), ["only 63 px long, where the networks saw 128"]),
        ((20, 60), ["3 times as long as wide", "only 60 px long"]),
    ],
)
def test_strips_and_thumbnails_are_warned_of(shape, said):
    found = given._odd_shape(images.Scan(np.zeros(shape, np.uint8), None, ()), 128)
    assert len(found) == len(said) and all(map(str.startswith, found, said))


@pytest.mark.parametrize("shape", [(64, 64), (90, 151)])
def test_probabilities_are_written_if_they_are_asked_for(trained, tmp_path, shape):
    pixels, out = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), tmp_path / "out"
    Image.fromarray(pixels).save(tmp_path / "a.png")
    files = given.find([tmp_path / "a.png"], out)
    given.predict(*trained, files, out, CPU, probs=True)
    levels = np.asarray(Image.open(out / "a_probs.png"))
    probs, mask = given.segment(*trained, pixels)
    assert levels.dtype == np.uint8 and levels.shape == shape
    assert np.array_equal(np.where(levels, (levels + 0.5) / 256, 0).astype(np.float32), probs)
    assert (levels[mask] >= 256 * trained[2].rule.threshold).all()
    assert json.loads((out / "predictions.jsonl").read_text())["probs"] == "a_probs.png"
    assert given.find([tmp_path], out) == given.find([tmp_path / "a.png"], out)
    assert given.find([tmp_path], tmp_path / "other") == [given.Given(tmp_path / "a.png", "a")]
    given.predict(*trained, files, out, CPU)
    assert not (out / "a_probs.png").exists()  # it would be that of the networks before
    assert "probs" not in json.loads((out / "predictions.jsonl").read_text())


def test_a_picture_of_probabilities_that_no_prediction_wrote_stays(trained, tmp_path):
    pixels, out = np.zeros((64, 64), np.uint8), tmp_path / "out"
    out.mkdir()
    for path in (tmp_path / "a.png", out / "a_probs.png"):
        Image.fromarray(pixels).save(path)
    with pytest.raises(UsageError, match=r"a_probs\.png is there, and no prediction has written it, so it is not"):
        given.find([tmp_path / "a.png"], out, probs=True)
    given.predict(*trained, given.find([tmp_path / "a.png"], out), out, CPU)
    assert np.array_equal(np.asarray(Image.open(out / "a_probs.png")), pixels)


def test_reports_beside_x_rays_are_left_out(trained, tmp_path, capsys, monkeypatch):
    """As a folder of a study has them."""
    pydicom, out = pytest.importorskip("pydicom"), tmp_path / "out"
    report = pydicom.Dataset()
    report.file_meta = pydicom.dataset.FileMetaDataset()
    report.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.67"
    report.file_meta.MediaStorageSOPInstanceUID = report.SOPInstanceUID = "1.2.3"
    pydicom.dcmwrite(tmp_path / "dose.dcm", report, enforce_file_format=True)
    with pytest.raises(DataError, match=r"1 of 1 files could not be .*dose\.dcm: a structured report, not an image"):
        given.predict(*trained, given.find([tmp_path], out), out, CPU)
    Image.fromarray(np.full((64, 64), 90, np.uint8)).save(tmp_path / "a.png")
    given.predict(*trained, given.find([tmp_path], out), out, CPU)
    said = capsys.readouterr().out
    assert f"1 file is no radiograph and was left out, as {tmp_path / 'dose.dcm'}: a structured report" in said
    image, other = map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
    assert image["mask"] == "a_mask.png" and "no_radiograph" not in image
    assert other["no_radiograph"] is True and other["error"].endswith("a structured report, not an image")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    recipe, models, ruling = trained
    read, seen = images.read, []
    monkeypatch.setattr(images, "read", lambda path: seen.append(path.name) or read(path))
    for _ in range(2):
        with pytest.raises(DataError, match=r"1 of 3 files could not be predicted: .*bad\.png"):
            given.predict(recipe, replace(models, batch_size=1), ruling, given.find([tmp_path], out), out, CPU)
    assert sorted(seen) == ["a.png", "bad.png", "bad.png", "dose.dcm"]  # the report is known for one


@pytest.mark.parametrize("content", ['{"my": "labels"}', "case a: left apex", "[1, 2]", '{"file": "a.png"}'])
def test_records_of_another_program_stay(trained, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.jsonl").write_text(content + "\n")
    Image.fromarray(np.full((64, 64), 90, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(
        UsageError, match=r"predictions\.jsonl is there, and no prediction has written it, so it is not"
    ):
        given.predict(*trained, given.find([tmp_path / "a.png"], out), out, CPU)
    assert (out / "predictions.jsonl").read_text() == content + "\n" and not (out / "a_mask.png").exists()


def test_a_record_says_what_made_its_mask(trained, tmp_path):
    recipe, models, ruling = trained
    Image.fromarray(np.full((64, 64), 90, np.uint8)).save(tmp_path / "a.png")
    alone = ensemble.load(recipe, [1], CPU)
    records = []
    for number, networks in enumerate((models, alone)):
        out = tmp_path / str(number)
        given.predict(recipe, networks, ruling, given.find([tmp_path / "a.png"], out), out, CPU)
        records.append(json.loads((out / "predictions.jsonl").read_text()))
    assert [record["folds"] for record in records] == [[2, 2], [1, 2]]
    assert records[0]["networks"] != records[1]["networks"] and len(records[0]["networks"]) == 16
    expected = (True, "float32", "recipe", None)
    assert tuple(records[0][key] for key in ("mirror", "precision", "rule_source", "spacing_mm")) == expected


def test_an_overlay_outlines_the_mask_where_it_is():
    """A box off the diagonal, and one that reaches the image's edge: their outlines, and nothing else, are drawn."""
    pixels = np.random.default_rng(0).integers(0, 200, (60, 90), dtype=np.uint8)
    mask = np.zeros((60, 90), dtype=bool)
    mask[10:20, 60:80] = mask[40:60, 0:15] = True
    found = np.asarray(given.overlay(pixels, mask))
    drawn = (found == given.CONTOUR).all(axis=-1)
    np.testing.assert_array_equal(found[~drawn], np.stack([pixels] * 3, axis=-1)[~drawn])
    assert drawn[10:20, [59, 60, 79, 80]].any(axis=1).all() and drawn[[9, 10, 19, 20], 60:80].any(axis=0).all()
    assert drawn[40:60, [14, 15]].any(axis=1).all() and drawn[[39, 40], 0:15].any(axis=0).all()
    assert drawn[40:60, 0].all() and drawn[59, 0:15].all()  # the image's edge closes it
    near = np.zeros_like(mask)
    near[8:22, 58:82] = near[38:60, 0:17] = True
    near[13:17, 63:77] = near[43:57, 3:12] = False
    assert not (drawn & ~near).any()


def test_what_lies_in_the_output_folder_is_no_input(tmp_path):
    """Whoever made it: the folder is one of those that are searched."""
    (tmp_path / "x" / "out").mkdir(parents=True)
    for name in ("a.png", "out/b.png"):
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "x" / name)
    assert [one.name for one in given.find([tmp_path / "x"], tmp_path / "x" / "out")] == ["a"]


def test_a_file_that_is_named_twice_is_predicted_once(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "x" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert len(given.find([tmp_path / "x", Path("x"), Path("x/a.png")], tmp_path / "out")) == 1


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, locked_refused):
    (tmp_path / "x" / "locked").mkdir(parents=True)
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "x" / "a.png")
    with pytest.raises(DataError, match="locked: cannot be read: Permission denied"):
        given.find([tmp_path / "x"], tmp_path / "out")


def test_a_file_of_any_name_is_predicted(trained, tmp_path):
    """Also of bytes that are no UTF-8, as old archives have them."""
    name = os.fsdecode(b"aufnahme-\xe4.png")
    Image.fromarray(np.full((64, 64), 90, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / name)
    out = tmp_path / "out"
    given.predict(*trained, given.find([tmp_path / name], out), out, CPU)
    assert (out / os.fsdecode(b"aufnahme-\xe4_mask.png")).is_file()
