from dataclasses import replace

import numpy as np
import pytest
import small_run
import torch
from torch import nn

from pneumo import checkpoint, config, engine, ensemble, inference
from pneumo.decision import trust
from pneumo.decision.rule import Rule, image_score, quantise
from pneumo.decision.trust import Trust
from pneumo.ensemble import Ensemble
from pneumo.errors import DataError, NotFiniteError, UsageError
from pneumo.model.folded import FoldedUNet
from pneumo.model.unet import UNet
from pneumo.tuning import Ruling


class LeftRight(nn.Module):
    """Logits that depend on the side: what a mirror image is for."""

    def __init__(self, left: float) -> None:
        super().__init__()
        self.left = left

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = image * 4 - 2
        logits[..., : image.shape[-1] // 2] += self.left
        return logits


def made(*models: nn.Module, mirror: bool) -> Ensemble:
    return Ensemble(tuple((model,) for model in models), 8, {}, torch.float32, mirror, "data", "split", 8, {})


def image() -> torch.Tensor:
    return torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def probs_of(left: float, picture: torch.Tensor) -> torch.Tensor:
    """What one network says."""
    return LeftRight(left)(picture.float() / 255).sigmoid()


def quantised(models: Ensemble) -> torch.Tensor:
    return torch.from_numpy(ensemble.predict(models, image(), 8, "abc").q)


def test_probabilities_are_averaged_over_folds():
    wanted = (probs_of(0.0, image()) + probs_of(3.0, image())) / 2
    assert torch.equal(quantised(made(LeftRight(0.0), LeftRight(3.0), mirror=False)), quantise(wanted)[:, 0])


def test_the_mirror_image_is_mirrored_back():
    plain = probs_of(3.0, image())
    wanted = (plain + probs_of(3.0, image().flip(-1)).flip(-1)) / 2
    assert torch.equal(quantised(made(LeftRight(3.0), mirror=True)), quantise(wanted)[:, 0])
    assert not torch.equal(quantise(plain), quantise(wanted))


def test_agreement_is_whole_only_if_all_views_are_alike():
    models = (LeftRight(0.0), LeftRight(0.0))
    assert (ensemble.predict(made(*models, mirror=True), image(), 8, "abc").agreement == 1).all()
    assert (ensemble.predict(made(*models, mirror=False), image(), 8, "abc").agreement == np.ones((3, 2, 257))).all()


def test_agreement_means_the_same_of_one_network_as_of_many():
    one, other = (ensemble.predict(made(LeftRight(left), mirror=True), image(), 8, "abc") for left in (1.0, 3.0))
    folds = made(LeftRight(1.0), LeftRight(3.0), mirror=True)
    both = ensemble.predict(folds, image(), 8, "abc")
    assert np.array_equal(both.agreement, np.concatenate([one.agreement, other.agreement], axis=1))
    assert one.agreement[:, 0, 128].max() < 1 and other.agreement[:, 0, 128].max() < 1
    networks = tuple(network for (network,) in folds.models)
    pair = ensemble.predict(replace(folds, models=(networks,)), image(), 8, "abc")  # of one fold
    assert pair.agreement == pytest.approx((one.agreement + other.agreement) / 2, abs=1e-12)


def test_expected_dice_is_the_mean_of_what_each_fold_alone_would_say():
    """Of the average of networks that disagree it would be another, lower as a rule: outlines are blurred."""
    networks = (LeftRight(-3.0), LeftRight(-1.0), LeftRight(3.0))
    alone = [ensemble.predict(made(network, mirror=False), image(), 8, "abc") for network in networks]
    folds = Ensemble(((networks[0],), networks[1:]), 8, {}, torch.float32, False, "data", "split", 8, {})
    found = ensemble.predict(folds, image(), 8, "abc")
    pair = ensemble.predict(
        Ensemble((networks[1:],), 8, {}, torch.float32, False, "data", "split", 8, {}), image(), 8, "abc"
    )
    assert found.histograms.shape == (3, 2, 256)
    np.testing.assert_array_equal(found.histograms, np.concatenate([alone[0].histograms, pair.histograms], axis=1))
    probs = (probs_of(-3.0, image()) + (probs_of(-1.0, image()) + probs_of(3.0, image())) / 2) / 2
    assert torch.equal(torch.from_numpy(found.q), quantise(probs)[:, 0])
    learned = Trust((((0.0, 1.0), (0.0, 1.0)), ((0.0, 1.0), (0.0, 0.5))))  # half of its confidence, of a mask
    first = (found.q[0], np.linspace([0.0, 1.0], [0.5, 1.0], 257, axis=1), found.histograms[0])
    empty = inference.describe(*first, Ruling(Rule(threshold=1.0), "", learned))
    assert not empty["pneumothorax"]
    assert empty["expected_dice"] == pytest.approx(1 - image_score(found.histograms[0]).mean())
    assert empty["score"] == image_score(np.bincount(found.q[0].ravel(), minlength=256))
    marked = inference.describe(*first, Ruling(Rule(threshold=0.25), "", learned))
    by_hand = [alike * trust.soft_dice(part, 64) / 2 for alike, part in zip((0.125, 1.0), first[2], strict=True)]
    assert marked["pneumothorax"] and marked["expected_dice"] == pytest.approx(np.mean(by_hand))
    assert marked["agreement"] == pytest.approx((0.125 + 1) / 2) and by_hand[0] != by_hand[1]


@pytest.mark.fault("S4", "one pixel of one image not a number in one of two networks")
def test_a_probability_that_is_no_number_is_never_an_empty_mask():
    class Broken(LeftRight):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits = super().forward(image)
            logits[1, 0, 2, 3] = float("nan")
            return logits

    with pytest.raises(NotFiniteError, match="probabilities of b are not numbers"):
        ensemble.predict(made(LeftRight(0.0), Broken(0.0), mirror=False), image(), 8, "abc")


def test_grey_levels_in_0_to_1_are_refused():
    with pytest.raises(TypeError, match=r"must be uint8 grey levels, got torch\.float32"):
        ensemble.predict(made(LeftRight(0.0), mirror=False), image() / 255, 8, "abc")


def test_a_run_folder_that_is_not_there_is_named_in_full(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = config.load(repo / "configs.toml", "seed")
    for folds, command in (([0, 1, 2, 3, 4], "make cv,"), ([0, 2], "make cv FOLDS=0,2,")):
        with pytest.raises(UsageError, match=f"^{tmp_path}/runs/seed: no such folder, .* Run: {command} or say where"):
            ensemble.load(recipe, folds, torch.device("cpu"))


def test_folds_are_parsed():
    assert ensemble.parse_folds("all", 3) == [0, 1, 2]
    assert ensemble.parse_folds("2, 0", 3) == [2, 0]
    for text in ("3", "a", "", "0,0", "0,00", "-1", "0,,1", "\u0661", "0" * 5000, "9" * 5000):
        with pytest.raises(UsageError, match="--folds") as caught:
            ensemble.parse_folds(text, 3)
        assert len(str(caught.value)) < 200


def test_nothing_is_found_in_the_padding_by_several_networks():
    boxes = np.array([[0, 8, 2, 6]] * 3)
    found = ensemble.predict(made(LeftRight(9.0), LeftRight(9.0), mirror=True), image(), 8, "abc", boxes).q
    assert found[:, :, 2:6].any() and not found[:, :, :2].any() and not found[:, :, 6:].any()


def test_networks_that_do_not_belong_together_are_refused(repo, data, tmp_path):
    recipe = small_run.recipe(repo, data, tmp_path)
    small_run.pretend_trained(recipe)
    path = recipe.stage_folder(1, 3) / "best.pt"
    good, cpu = checkpoint.load(path), torch.device("cpu")
    for key in ("digest", "split"):
        checkpoint.save({**good, key: "other"}, path)
        assert len(ensemble.load(recipe, [1], cpu).models) == 1
        with pytest.raises(
            DataError, match=r"^the folds \[0, 1, 2\] of .* were not trained on one split of one data set"
        ):
            ensemble.load(recipe, [0, 1, 2], cpu)
    checkpoint.save({**good, "fold": 0}, path)
    with pytest.raises(DataError, match=r"best\.pt was trained on other fold \(0, not 1\)"):
        ensemble.load(recipe, [1], cpu)
    checkpoint.save({**good, "settings": {**good["settings"], "stage.3.image_size": 96}}, path)
    with pytest.raises(UsageError, match=r"was trained at 96 px, the recipe now says stage\.3\.image_size=64$"):
        ensemble.load(recipe, [1], cpu)
    checkpoint.save(good, path)
    other = replace(recipe, data=replace(recipe.data, annotation_size=96))
    with pytest.raises(UsageError, match=r"grid of 64 px, the recipe now says data\.annotation_size=96$"):
        ensemble.load(other, [1], cpu)


def test_folds_that_were_trained_otherwise_are_warned_of(repo, data, tmp_path, capsys):
    recipe, cpu = small_run.recipe(repo, data, tmp_path), torch.device("cpu")
    small_run.pretend_trained(recipe)
    ensemble.load(recipe, [0, 1, 2], cpu)
    assert "otherwise" not in capsys.readouterr().err
    path = recipe.stage_folder(1, 3) / "best.pt"
    state = checkpoint.load(path)
    changed = {"stage.3.lr": 0.5, "augment.rotate": 7.0, "train.amp": "fp16"}
    before = {"stage.1.lr": 0.1, "model.pretrained": False}
    checkpoint.save({**state, "settings": {**state["settings"], **changed}, "before": before}, path)
    ensemble.load(recipe, [0, 1, 2], cpu)
    (line,) = capsys.readouterr().err.splitlines()
    said = (
        f"augment.rotate: {recipe.augment.rotate} -> 7.0; model.pretrained: None -> False; "
        f"stage.1.lr: None -> 0.1; stage.3.lr: {recipe.stage[3].lr} -> 0.5"
    )
    assert line.endswith(f"{recipe.folder} was trained otherwise than fold 0 ({said})") and "fold 1 of" in line


def test_probabilities_are_as_fine_as_float32_has_them_whatever_convolutions_compute_in():
    model = UNet("test_resnet", decoder_channels=(8, 8, 8, 4, 4)).eval()
    pixels = torch.randint(0, 256, (1, 1, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        logits = engine.predict_logits(FoldedUNet(model, torch.bfloat16), pixels, torch.bfloat16)
        wanted = engine.predict_logits(model, pixels, torch.float32)
    assert logits.dtype == torch.float32
    assert 0 < float((logits - wanted).abs().max()) < 0.1 * float(wanted.abs().max())
