"""Prediction of an image in memory; of files, and what can go wrong with them: faults/test_prediction.py."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import small_run
import torch
from PIL import Image

from pneumo import config, ensemble, given
from pneumo.data import images
from pneumo.decision.rule import LEVELS, Rule
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
