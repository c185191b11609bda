import copy
import fcntl
import json
import os
import re
import shutil
import signal
import threading
import time
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import small_run
import timm
import torch
from small_run import differing

from pneumo import __main__ as commands
from pneumo import checkpoint, config, dataset, engine, log, oof, stages, start, training
from pneumo.data import feed as feeds
from pneumo.data.feed import Feed
from pneumo.decision.rule import Rule
from pneumo.errors import DataError, FolderGoneError, NotFiniteError, Stopped, UsageError
from pneumo.model import augment
from pneumo.resume import Position, StageFolder, of_this_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    small_run.write_data(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(recipe, fold: int = 0, stage: int = 1):
    training.train_stage(recipe, dataset.load(recipe), fold, stage, CPU)
    return recipe.stage_folder(fold, stage)


@pytest.fixture(scope="module")
def straight(repo, root, tmp_path_factory):
    """Stages 1 and 2 of fold 0, trained without a break."""
    recipe = small_run.recipe(repo, root, tmp_path_factory.mktemp("straight"))
    for stage in (1, 2):
        train(recipe, stage=stage)
    return recipe


@pytest.fixture
def copied(repo, root, straight, tmp_path):
    """A recipe whose runs folder has the finished first stage of `straight`, and the stage's folder."""
    recipe = small_run.recipe(repo, root, tmp_path)
    folder = recipe.stage_folder(0, 1)
    shutil.copytree(straight.folder / "fold0" / "stage1", folder)
    shutil.copy(straight.folder / "folds.csv", recipe.folder)
    return recipe, folder


def test_a_run_folder_holds_what_it_promises(straight):
    folder = straight.stage_folder(0, 1)
    assert {"last.pt", "best.pt", "log.jsonl", "config.toml", "status.json"} <= {p.name for p in folder.iterdir()}
    lines = log.read_jsonl(folder / "log.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2]
    wanted = "epoch loss val_loss dice dice_positive true_negative_rate all_empty lr seconds images_per_second"
    assert set(wanted.split()) <= lines[0].keys()
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "done"
    assert (folder / "config.toml").read_text().startswith('["seed"]\n')
    best = max(lines, key=lambda line: (line["dice"], line["epoch"]))
    assert checkpoint.load(folder / "best.pt")["record"]["epoch"] == best["epoch"] == status["best_epoch"]


@pytest.mark.fault("R1", "that the comparison can fail: two epochs differ")
def test_epochs_differ(straight):
    first, second = log.read_jsonl(straight.stage_folder(0, 1) / "log.jsonl")
    assert first["loss"] != second["loss"]
    assert first["val_loss"] != second["val_loss"]


def test_a_stage_that_finds_nothing_says_so(repo, root, tmp_path, capsys, monkeypatch):
    """Where every mask is empty, all epochs score alike, and the last is kept as the best."""
    blind = small_run.recipe(repo, root, tmp_path / "blind", "rule.threshold=1.0")
    folder = train(blind)
    lines = log.read_jsonl(folder / "log.jsonl")
    lowest = min(lines, key=lambda line: line["val_loss"])["epoch"]
    wanted = f"empty (Dice {lines[0]['all_empty']:.4f}), so best.pt, of epoch 2, finds next to nothing; "
    said = capsys.readouterr().err
    assert wanted + f"the validation loss was lowest in epoch {lowest}. What may help: more epochs" in said
    real = training._record
    for number, (count, found, spared, dice, wanted) in enumerate(
        (
            (1, 0.1, 1.0, 0.7, None),
            (1, 0.1, 1.0, 0.3, "finds too much; .*a higher rule.min_area"),
            (2, 0.1, 1.0, 0.3, None),
            (2, 0.01, 0.6, 0.3, "finds next to nothing; .*a lower rule.min_area"),
            (1, 0.01, 0.1, 0.3, "finds little of what is there and much that is not; .*a higher rule.min_area"),
            (2, 0.01, 0.1, 0.3, None),
            (2, 0.01, None, 0.3, "finds next to nothing;"),
        )
    ):
        values = {"dice": dice, "dice_positive": found, "true_negative_rate": spared}
        monkeypatch.setattr(training, "_record", lambda *of, values=values: {**real(*of), **values})
        train(small_run.recipe(repo, root, tmp_path / str(number), f"stages={count}", "stage.1.epochs=1"))
        said = capsys.readouterr().err
        assert ("no epoch is better" in said) == (wanted is not None) and re.search(wanted or "", said)


@pytest.mark.fault("R9", "a whole last.pt without a part of a run's state, or with one of another shape")
def test_a_checkpoint_that_is_no_state_of_a_run_is_named(copied, figure):
    recipe, folder = copied
    good = checkpoint.load(folder / "last.pt")
    good["position"]["epoch"] = 2  # one more to train
    # of use to others than a resumed run, or not used, or to be had without
    parts = good.keys() - {"format", "fold", "stage", "average", "seen", "before"}
    spoiled = [{key: value for key, value in good.items() if key != part} for part in sorted(parts)]
    spoiled.append({**good, "position": {**good["position"], "spoons": 3}})
    spoiled.append({**good, "model": {**good["model"], "head.bias": torch.zeros(2)}})
    spoiled.append({**good, "optimizer": {"state": {}, "param_groups": []}})
    spoiled.append({**good, "settings": None})
    spoiled.append({**good, "evaluation_batch": "many"})
    for state in spoiled:
        checkpoint.save(state, folder / "last.pt")
        with pytest.raises(DataError) as caught:
            train(recipe)
        assert str(caught.value).startswith(str(folder / "last.pt")) and "\n" not in str(caught.value)
    figure(f"{len(spoiled)} of {len(spoiled)} named")


@pytest.mark.fault("R15", "a last.pt with NaN in a weight, and in a moment of Adam's, made by other means")
def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(copied, figure):
    recipe, folder = copied
    good = checkpoint.load(folder / "last.pt")
    for spoil in (lambda state: state["model"]["head.bias"], lambda state: state["optimizer"]["state"][0]["exp_avg"]):
        bad = copy.deepcopy(good)
        spoil(bad).fill_(torch.nan)
        torch.save(bad, folder / "last.pt")
        with pytest.raises(NotFiniteError, match=r"last\.pt cannot be used: (model\.head\.bias|optimizer.*exp_avg) is"):
            train(recipe)
    figure("2 of 2 named, exit 4")


def test_a_run_goes_on_with_the_images_a_pass_that_it_had(repo, root, tmp_path, copied, monkeypatch):
    """Unless it is told another number, as after it ran out of memory."""
    _, folder = copied
    good = checkpoint.load(folder / "last.pt")
    assert good["evaluation_batch"] == 8
    good["position"]["epoch"] = 2
    used = []

    def evaluate(*_given, batch_size, **_more):
        used.append(batch_size)
        raise ZeroDivisionError

    monkeypatch.setattr(training.engine, "evaluate", evaluate)
    for state, more in (({**good, "evaluation_batch": 5}, ()), (good, ("predict.batch_size=1",))):
        checkpoint.save(state, folder / "last.pt")
        with pytest.raises(ZeroDivisionError):
            train(small_run.recipe(repo, root, tmp_path, *more))
    assert used == [5, 1]


def test_a_finished_stage_is_done_whatever_the_number_of_processes(copied, capsys):
    recipe, folder = copied
    state = checkpoint.load(folder / "last.pt")
    checkpoint.save({**state, "processes": 2}, folder / "last.pt")
    train(recipe)
    assert "done, nothing to do" in capsys.readouterr().out
    state["position"]["epoch"] -= 1
    checkpoint.save({**state, "processes": 2}, folder / "last.pt")
    with pytest.raises(UsageError, match="processes: 2 -> 1"):
        train(recipe)


def test_a_stage_starts_from_the_best_of_the_one_before(straight, monkeypatch):
    seen = {}
    monkeypatch.setattr(training._Run, "_train_epoch", lambda self, *_: seen.update(self.model.state_dict()) or 1 / 0)
    recipe = straight
    with pytest.raises(ZeroDivisionError):
        train(recipe, stage=3)
    best = checkpoint.load(recipe.stage_folder(0, 2) / "best.pt")["model"]
    assert all(torch.equal(best[key], seen[key]) for key in best)
    assert log.read_status(recipe.stage_folder(0, 3))["state"] == "failed"


def test_the_cosine_schedule_goes_down_over_all_steps(repo, root, tmp_path, monkeypatch):
    recipe = small_run.recipe(repo, root, tmp_path, "stage.1.schedule=cosine", "stage.1.epochs=3", "stage.1.lr=0.01")
    step, rates = engine.train_step, []

    def noted(model, micro_batches, optimizer, *more, **named):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(model, micro_batches, optimizer, *more, **named)

    monkeypatch.setattr(engine, "train_step", noted)
    train(recipe)
    assert len(rates) == 6  # 8 images an epoch in micro-batches of 3, two a step
    assert rates == pytest.approx([0.005 * (1 + np.cos(np.pi * done / 6)) for done in range(6)])


def test_validation_decides_by_the_recipes_rule_and_its_loss_moves_the_rate(repo, root, tmp_path, monkeypatch):
    """Dice rises all the time; the loss is a fifth lower in the third epoch, and no more."""
    plateau = ("stage.1.patience=1", "stage.1.factor=0.5", "stage.1.plateau_threshold=0.2", "stage.1.epochs=7")
    recipe = small_run.recipe(
        repo, root, tmp_path, *plateau, "stage.1.lr=0.008", "rule.threshold=0.25", "rule.min_area=33", "train.ema=0.9"
    )
    losses, given, weights = iter([1.0, 0.9, 0.7, 0.7, 0.7, 0.7, 0.7]), [], []

    def evaluate(model, _feed, rows, _truth, rule, loss, _dtype, *, annotation_size, **_more):
        given.append((rule, loss.kind, annotation_size))
        weights.append(torch.cat([tensor.flatten() for tensor in model.state_dict().values()]))
        averaged = len(given) % 2 == 0
        value = 5.0 if averaged else next(losses)
        dice = np.full(len(rows), len(given) / 100)
        return engine.Evaluation(rows, dice, value, np.ones(len(rows), dtype=bool))

    monkeypatch.setattr(engine, "evaluate", evaluate)
    folder = train(recipe)
    rule = Rule(threshold=0.25, min_area=33)
    assert set(given) == {(rule, "focal_dice", 64)} and len(given) == 14
    assert all(not torch.equal(live, averaged) for live, averaged in zip(weights[::2], weights[1::2], strict=True))
    lines = log.read_jsonl(folder / "log.jsonl")
    # the second epoch after it that gains no fifth halves the rate of those that follow
    assert [line["lr"] for line in lines] == pytest.approx([0.008] * 5 + [0.004] * 2)


def test_an_optimizer_as_the_recipe_says(repo, root, tmp_path):
    recipe = small_run.recipe(repo, root, tmp_path, "stage.1.weight_decay=0.03", "stage.1.lr=0.004", "seed=3")
    run = training._Run(recipe, dataset.load(recipe), 0, 1, CPU)
    run._build(None)
    (group,) = run.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.004, 0.03)
    assert len(group["params"]) == len(list(run.model.parameters()))


EMA = ("train.ema=0.9", "train.keep_best=2", "stage.1.epochs=3", "train.checkpoint_steps=1")


@pytest.fixture(scope="module")
def averaged(repo, root, tmp_path_factory):
    """Stage 1 of fold 0, three epochs, with averaged weights and two kept epochs."""
    recipe = small_run.recipe(repo, root, tmp_path_factory.mktemp("averaged"), *EMA)
    train(recipe)
    return recipe


def test_the_average_of_weights_is_what_its_formula_says(repo, root, averaged, tmp_path, monkeypatch):
    """Taken along by hand, and it leaves the weights that are trained alone."""
    recipe = small_run.recipe(repo, root, tmp_path, *EMA)
    by_hand, real = [], engine.WeightAverage.update

    def update(self, taken):
        weights = {name: tensor.double() for name, tensor in self._live.items()}
        if not by_hand:
            by_hand.append({name: tensor.double() for name, tensor in zip(self._live, self._average, strict=True)})
        keep = min(0.9, (self.updates + 1) / (self.updates + 10))
        by_hand.append({name: keep * by_hand[-1][name] + (1 - keep) * tensor for name, tensor in weights.items()})
        real(self, taken)

    monkeypatch.setattr(engine.WeightAverage, "update", update)
    folder = train(recipe)
    last, best, plain = (checkpoint.load(folder / name) for name in ("last.pt", "ema.pt", "best.pt"))
    for name, tensor in last["average"]["weights"].items():
        torch.testing.assert_close(tensor.double(), by_hand[-1][name], rtol=1e-5, atol=1e-6)
    of_epoch = by_hand[best["record"]["epoch"] * 2]  # two steps an epoch
    torch.testing.assert_close(best["model"]["head.weight"].double(), of_epoch["head.weight"], rtol=1e-5, atol=1e-6)
    assert not torch.equal(best["model"]["head.weight"], plain["model"]["head.weight"])
    lines = log.read_jsonl(folder / "log.jsonl")
    assert best["record"]["dice"] == max(line["ema_dice"] for line in lines)
    without = small_run.recipe(repo, root, tmp_path / "without", "stage.1.epochs=3")
    train(without)
    mine = [checkpoint.load(r.stage_folder(0, 1) / "last.pt")["model"] for r in (recipe, without)]
    assert differing(*mine) == []


def test_a_skipped_step_leaves_the_average_alone():
    model = torch.nn.Linear(2, 2)
    average = engine.WeightAverage(model, 0.5)
    before = average.state_dict()["weights"]["weight"].clone()
    with torch.no_grad():
        model.weight += 1
    average.update(torch.tensor(0.0))
    assert torch.equal(average.state_dict()["weights"]["weight"], before)
    average.update(torch.tensor(1.0))
    torch.testing.assert_close(average.state_dict()["weights"]["weight"], before + 1 - 2 / 11)
    with average.swapped_in():
        torch.testing.assert_close(model.weight.data, before + 1 - 2 / 11)
    torch.testing.assert_close(model.weight.data, before + 1)


def test_the_best_epochs_are_kept(averaged):
    folder = averaged.stage_folder(0, 1)
    lines = log.read_jsonl(folder / "log.jsonl")
    best = sorted(lines, key=lambda line: (line["dice"], line["epoch"]))[-2:]
    assert {path.name for path in folder.glob("epoch*.pt")} == {f"epoch{line['epoch']}.pt" for line in best}
    first = checkpoint.load(folder / f"epoch{best[-1]['epoch']}.pt")
    assert differing(first["model"], checkpoint.load(folder / "best.pt")["model"]) == []


def test_a_finished_stage_is_left_alone(straight, monkeypatch, capsys):
    monkeypatch.setattr(training._Run, "_build", None)
    before = (straight.stage_folder(0, 1) / "last.pt").stat().st_mtime_ns
    folder = train(straight)
    assert (folder / "last.pt").stat().st_mtime_ns == before
    assert "nothing to do" in capsys.readouterr().out


def test_a_finished_stage_goes_on_with_more_epochs(repo, root, tmp_path, copied):
    """And ends in the same bits as one that had them from the start."""
    _, folder = copied
    log_before = log.read_jsonl(folder / "log.jsonl")
    longer = small_run.recipe(repo, root, tmp_path, "stage.1.epochs=4")
    assert train(longer) == folder
    assert log.read_jsonl(folder / "log.jsonl")[:2] == log_before
    whole = train(small_run.recipe(repo, root, tmp_path / "whole", "stage.1.epochs=4"))
    assert differing(checkpoint.load(folder / "last.pt"), checkpoint.load(whole / "last.pt")) == []
    best, of_whole = (checkpoint.load(place / "best.pt") for place in (folder, whole))
    assert differing({**best, "settings": None}, {**of_whole, "settings": None}) == []
    assert log.read_status(folder)["epochs"] == 4 and log.read_status(folder)["state"] == "done"
    with pytest.raises(UsageError, match=r"stage\.1\.epochs: 4 -> 3"):
        train(small_run.recipe(repo, root, tmp_path, "stage.1.epochs=3"))


def test_a_cosine_schedule_has_its_length(repo, root, tmp_path):
    how = ("stage.1.schedule=cosine", "stage.1.epochs=1")
    train(small_run.recipe(repo, root, tmp_path, *how))
    with pytest.raises(UsageError, match=r"stage\.1\.epochs: 1 -> 2"):
        train(small_run.recipe(repo, root, tmp_path, *how[:1], "stage.1.epochs=2"))


@pytest.mark.fault("R21", "stage 1 trained to other weights after stage 2 began with it")
def test_a_stage_that_began_with_other_weights_is_refused(repo, root, straight, tmp_path, copied, figure):
    recipe, first = copied
    second = recipe.stage_folder(0, 2)
    shutil.copytree(straight.stage_folder(0, 2), second)
    best = checkpoint.load(first / "best.pt")
    assert checkpoint.load(second / "last.pt")["start"] == checkpoint.fingerprint(best["model"])
    assert checkpoint.load(first / "last.pt")["start"] == ""
    best["record"]["seconds"] = 0.0  # says nothing of the weights
    checkpoint.save(best, first / "best.pt")
    train(recipe, stage=2)
    best["model"]["head.bias"] += 1e-3
    checkpoint.save(best, first / "best.pt")
    with pytest.raises(UsageError, match=r"stage2/last.pt began with other weights than .*stage1/best.pt now holds"):
        train(recipe, stage=2)
    (first / "best.pt").write_bytes(b"cut off")  # not known to be other weights
    train(recipe, stage=2)
    (first / "best.pt").unlink()
    train(recipe, stage=2)
    figure("refused; with its best.pt gone it goes on")


def test_a_cuda_graph_needs_a_gpu(repo, root, tmp_path):
    recipe = small_run.recipe(repo, root, tmp_path / "runs", "train.compile=graph")
    with pytest.raises(
        UsageError,
        match=r"^train\.compile=graph records what one process does on a GPU.* start anew with train\.compile=auto$",
    ):
        train(recipe)


def test_without_a_compiler_training_goes_on_unless_the_recipe_insists(repo, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "compiler_trouble", lambda _device: "no gcc")
    for how in ("auto", "on"):
        recipe = small_run.recipe(repo, root, tmp_path / "runs", f"train.compile={how}")
        run = training._Run(recipe, dataset.load(recipe), 0, 1, CPU)
        if how == "auto":
            assert not run._can_compile()
        else:
            with pytest.raises(UsageError, match=r"^Nothing can be compiled here: no gcc\. It takes gcc and g\+\+, "):
                run._can_compile()
    assert "warning: Nothing is compiled, so training takes longer: no gcc. It takes gcc" in capsys.readouterr().err


def broken_backend(_graph, _inputs):
    raise RuntimeError("out of resource: shared memory")


def test_a_network_that_cannot_be_compiled_trains_without_unless_the_recipe_insists(
    repo, root, tmp_path, straight, monkeypatch, capsys
):
    monkeypatch.setattr(engine, "compiler_trouble", lambda _device: "")
    compiled = engine.compiled
    monkeypatch.setattr(
        engine, "compiled", lambda function, batch, backend=broken_backend: compiled(function, batch, backend)
    )
    recipe = small_run.recipe(repo, root, tmp_path / "on", "train.compile=on")
    with pytest.raises(UsageError, match=r"^This network cannot be compiled here: .*shared memory.*compile=off trains"):
        train(recipe)
    assert not recipe.stage_folder(0, 1).joinpath("last.pt").exists()

    def auto_as_on_a_gpu(run):
        choose_way(run)
        run.to_compile = True

    choose_way = training._Run._choose_way
    monkeypatch.setattr(training._Run, "_choose_way", auto_as_on_a_gpu)
    folder = train(small_run.recipe(repo, root, tmp_path / "auto"))
    assert "warning: This network is not compiled, so training takes longer: " in capsys.readouterr().err
    assert differing(*(checkpoint.load(path / "last.pt") for path in (folder, straight.stage_folder(0, 1)))) == []


def test_what_is_tried_is_what_is_trained(straight, monkeypatch):
    """A compiler that sees image and mask to be one tensor makes a form of its own, which no step would use."""
    real, seen = training.augmented, []

    def augmented(image, mask, *more):
        seen.append(image is not mask and image.data_ptr() != mask.data_ptr())
        return real(image, mask, *more)

    monkeypatch.setattr(training, "augmented", augmented)
    run = training._Run(straight, dataset.load(straight), 1, 1, CPU)
    run._build(None)
    run._choose_way()
    run._rehearse()
    assert seen == [True]


def test_trying_a_step_changes_nothing(straight):
    run = training._Run(straight, dataset.load(straight), 1, 1, CPU)
    run._build(None)
    run._choose_way()
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    assert run._rehearse() == ""
    after = run.model.state_dict()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert torch.equal(run.running.running, torch.cat([buffer for buffer in run.running.buffers]))


def test_a_stage_without_a_full_micro_batch_is_not_compiled(repo, root, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "compiler_trouble", lambda _device: "")
    for size, expected in ((12, True), (13, False)):  # fold 0 trains on 12 images
        recipe = small_run.recipe(repo, root, tmp_path / "runs", "train.compile=on", f"stage.1.batch_size={size}")
        run = training._Run(recipe, dataset.load(recipe), 0, 1, CPU)
        run._build(None)
        run._choose_way()
        assert run.to_compile is expected


def test_images_that_come_out_not_finite_are_named_and_score_nothing(repo, root, tmp_path, monkeypatch, capsys):
    """As float16 does where it overflows; taken for empty masks, they would score 1 on negatives."""
    logits_of = engine.predict_logits

    def overflowing(model, image, dtype):
        logits = logits_of(model, image, dtype)
        logits[0, 0, 0, 0] = torch.nan
        return logits

    monkeypatch.setattr(engine, "predict_logits", overflowing)
    settings = ("predict.batch_size=4", "rule.min_area=4096", "stage.1.epochs=1")  # so that all masks are empty
    folder = train(small_run.recipe(repo, root, tmp_path, *settings))
    (line,) = log.read_jsonl(folder / "log.jsonl")
    assert line["val_loss"] is None and line["true_negative_rate"] < 1  # 6 images in batches of 4 and 2
    assert line["dice"] == pytest.approx(line["true_negative_rate"] * 4 / 6)
    assert "for 2 of 6 images the network gave numbers that are not finite, which count as Dice 0: train-0" in (
        capsys.readouterr().err
    )


@pytest.mark.fault("S8", "more epochs for a stage that another has begun with: refused before anything is trained")
def test_more_epochs_do_not_ruin_the_stages_that_follow(repo, straight, tmp_path, figure):
    shutil.copytree(straight.folder, tmp_path / "seed")
    longer = small_run.recipe(
        repo, Path(straight.data.root), tmp_path, f"stage.1.epochs={straight.stage[1].epochs + 1}"
    )
    before = {path: path.read_bytes() for path in longer.stage_folder(0, 1).glob("*.pt")}
    with pytest.raises(UsageError, match=r"stage 2 began with its weights .* Delete .*stage2 first, or train into"):
        train(longer)
    assert before == {path: path.read_bytes() for path in longer.stage_folder(0, 1).glob("*.pt")}
    shutil.rmtree(longer.stage_folder(0, 2))
    assert train(longer).joinpath("last.pt").exists()
    figure("refused, every checkpoint as it was")


def test_another_encoder_than_the_stage_before_had_is_named(repo, straight, tmp_path):
    shutil.copytree(straight.stage_folder(0, 1), tmp_path / "seed" / "fold0" / "stage1")
    shutil.copy(straight.folder / "folds.csv", tmp_path / "seed")
    other = small_run.recipe(repo, Path(straight.data.root), tmp_path, "model.encoder=resnet18")
    with pytest.raises(UsageError, match=r"whose model.encoder is \S+, not resnet18, and whose weights do not fit"):
        train(other, stage=2)


def test_an_encoder_that_takes_no_single_image_is_named(repo, root, tmp_path):
    """Its batch norm takes pooled values, of which a lone image gives one."""
    recipe = small_run.recipe(
        repo, root, tmp_path, "model.encoder=skresnet18", "stage.1.batch_size=7", "stage.1.epochs=1"
    )
    with pytest.raises(UsageError, match="skresnet18 cannot train on a micro-batch of one image"):
        train(recipe)


def test_nothing_is_said_where_there_is_nothing_to_find(repo, tmp_path, capsys):
    """A fold without a positive: no mask can be better than an empty one."""
    small_run.write_data(tmp_path / "data")
    recipe = small_run.recipe(repo, tmp_path / "data", tmp_path / "runs", "stage.1.epochs=1")
    data = dataset.load(recipe)
    lone = replace(data, folds=np.where(data.positive, 1, data.folds))
    training.train_stage(recipe, lone, 0, 1, CPU)
    assert "no epoch is better" not in capsys.readouterr().err


def test_a_failing_gpu_is_no_damaged_checkpoint(tmp_path):
    for error in (torch.AcceleratorError("CUDA error: an illegal memory access"), torch.OutOfMemoryError("full")):
        with pytest.raises(type(error)), of_this_run(tmp_path):
            raise error
    with pytest.raises(DataError, match="is whole but holds no state of this run"), of_this_run(tmp_path):
        raise RuntimeError("size mismatch")


@pytest.mark.fault("R21", "stage 2 trained on other annotations, stage 3 asked for")
def test_other_data_are_refused(repo, straight, tmp_path):
    small_run.write_data(tmp_path / "data")
    table = tmp_path / "data" / "train-rle.csv"
    table.write_text(table.read_text().replace("train-001,-1", "train-001,5 5"))
    other = small_run.recipe(repo, tmp_path / "data", straight.runs)
    with pytest.raises(UsageError, match=r"images or annotations: .* -> "):
        train(other)
    with pytest.raises(DataError, match="trained on other data"):  # stage 3 would start from stage 2
        train(other, stage=3)


@pytest.mark.fault("R21", "an image replaced after a command read the data, before it trains or predicts on them")
def test_images_that_change_meanwhile_are_refused(repo, tmp_path):
    small_run.write_data(tmp_path / "data")
    recipe = small_run.recipe(repo, tmp_path / "data", tmp_path / "runs")
    data = small_run.pretend_trained(recipe)
    images = tmp_path / "data" / "train"
    shutil.copy(images / "train-001.png", images / "train-002.png")
    changed = r"data/train: images have changed since this command read them\. Run the same command again$"
    with pytest.raises(DataError, match=changed):
        training.train_stage(recipe, data, 0, 1, CPU)
    assert not (recipe.stage_folder(0, 1) / "last.pt").exists()
    with pytest.raises(DataError, match=changed):
        oof.write(recipe, data, CPU)


@pytest.mark.fault("R21", "stage 1 trained with another split than folds.csv now has")
def test_another_split_is_refused(repo, root, straight, tmp_path):
    recipe = small_run.recipe(repo, root, tmp_path)
    train(recipe)
    path = recipe.folder / "folds.csv"
    lines = path.read_text().splitlines()
    swapped = [line.translate(str.maketrans("01", "10")) if "," in line and i else line for i, line in enumerate(lines)]
    path.write_text("\n".join(f"{a.split(',')[0]},{b.split(',')[1]}," for a, b in zip(lines, swapped, strict=True)))
    path.write_text(path.read_text().replace("ImageId,fold,", "ImageId,fold,group"))
    with pytest.raises(DataError, match="trained on other folds"):
        train(recipe, stage=2)


@pytest.mark.fault("R21", "stage 2 asked for before stage 1")
def test_a_missing_stage_is_named_with_the_command(repo, root, tmp_path):
    recipe = small_run.recipe(repo, root, tmp_path)
    with pytest.raises(
        UsageError, match=r'stage 1 of seed, but .*"missing"\. Run: make train FOLD=2 STAGE=1 SET="\.\.\."$'
    ):
        train(recipe, fold=2, stage=2)


@pytest.mark.fault("R21", "stage 1 stopped half way")
def test_a_stage_that_is_half_done_is_named(repo, root, tmp_path):
    recipe = small_run.recipe(repo, root, tmp_path)
    folder = recipe.stage_folder(0, 1)
    folder.mkdir(parents=True)
    log.write_status(folder, "stopped", epoch=12, epochs=30)
    with pytest.raises(UsageError, match='says "stopped" at epoch 12 of 30'):
        train(recipe, stage=2)


def test_a_sibling_recipe_takes_over_stages(repo, root, straight):
    focal = small_run.recipe(repo, root, straight.runs, name="seed-focal")
    assert train(focal, stage=3) == focal.stage_folder(0, 3)
    assert checkpoint.load(focal.stage_folder(0, 3) / "best.pt")["split"] == dataset.load(straight).split


@pytest.mark.parametrize("change", ["stage.1.schedule=cosine", "stage.1.loss=lovasz", "stage.1.negatives=fresh"])
def test_other_choices_train(repo, root, tmp_path, change):
    recipe = small_run.recipe(repo, root, tmp_path, change, "stage.1.epochs=1")
    (line,) = log.read_jsonl(train(recipe) / "log.jsonl")
    assert line["val_loss"] > 0


def test_every_number_of_the_loss_is_used_in_training_and_validation(repo, root, tmp_path):
    """`gamma` has no meaning where the focal term has no weight."""

    def both(name: str, *more: str) -> tuple[float, float]:
        numbers = [f"stage.1.{change}" for change in ("epochs=1", *more)]
        (line,) = log.read_jsonl(train(small_run.recipe(repo, root, tmp_path / name, *numbers)) / "log.jsonl")
        return line["loss"], line["val_loss"]

    plain, gamma, smooth = both("plain"), both("gamma", "gamma=5"), both("smooth", "smooth=1000")
    light, light_gamma = both("light", "focal_weight=0"), both("light-gamma", "focal_weight=0", "gamma=5")
    assert light == light_gamma
    for other in (gamma, smooth, light):
        assert all(abs(new - old) > 0.01 for new, old in zip(other, plain, strict=True)), (other, plain)


@pytest.mark.fault("R4", "a signal while a run waits for the pack's lock, or for weights from a network that stalls")
@pytest.mark.parametrize("number", start.endings())
@pytest.mark.parametrize("wait", ["lock", "weights"])
def test_a_signal_ends_what_only_waits(repo, root, tmp_path, monkeypatch, figure, wait, number):
    def stalls(*_):
        with suppress(Exception):  # as libraries do that try again
            time.sleep(30)
        raise AssertionError("the signal was swallowed")

    recipe = small_run.recipe(repo, root, tmp_path)
    data = dataset.load(recipe)
    if wait == "weights":
        monkeypatch.setattr(training, "UNet", stalls)
    with open(tmp_path / "pack" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        free = threading.Timer(15, fcntl.flock, (lock, fcntl.LOCK_UN))
        for timer in (threading.Timer(0.5, os.kill, (os.getpid(), number)), free):
            timer.start()
        began = time.monotonic()
        with pytest.raises(
            Stopped, match=rf"by {number.name} before it trained; nothing was saved before\. "
        ) as caught:
            training.train_stage(recipe, data, 0, 1, CPU)
        free.cancel()
    assert caught.value.exit_code == 128 + number
    assert time.monotonic() - began < 10
    status = log.read_status(recipe.stage_folder(0, 1))
    assert (status["state"], status["signal"], status["step"]) == ("stopped", number, 0)
    figure(f"{wait}, {number.name}: at once, code {caught.value.exit_code}")


@pytest.mark.fault("R4", "a signal while a stage that was made ready earlier is looked at, and after its last look")
def test_a_signal_is_not_forgotten_where_nothing_is_left_to_do(copied, monkeypatch, figure):
    recipe, folder = copied
    data, load_last, look = dataset.load(recipe), StageFolder.load_last, training._stop_asked

    def signalled(self):
        signal.raise_signal(signal.SIGTERM)
        return load_last(self)

    monkeypatch.setattr(StageFolder, "load_last", signalled)
    with pytest.raises(Stopped, match="stage1: stopped by SIGTERM when it was done") as caught:
        training.train_stage(recipe, data, 0, 1, CPU)
    assert caught.value.exit_code == 143
    assert log.read_status(folder)["state"] == "done"
    monkeypatch.undo()
    monkeypatch.setattr(training, "_stop_asked", lambda: look() or signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # as it would end any command
        training.train_stage(recipe, data, 0, 1, CPU)
    figure("stopped, status done")


@pytest.mark.fault("R5", "last.pt and prev.pt of a finished stage deleted, to save space or by accident")
def test_a_finished_stage_needs_its_best_only(repo, root, tmp_path, copied, capsys, figure):
    recipe, folder = copied
    size = sum(path.stat().st_size for path in folder.iterdir())
    for name in ("last.pt", "prev.pt"):
        (folder / name).unlink()
    size -= sum(path.stat().st_size for path in folder.iterdir())
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    train(recipe)
    assert "stage1: done, nothing to do; last.pt is not there" in capsys.readouterr().out
    best = checkpoint.load(folder / "best.pt")
    best["settings"]["stage.1.epochs"] = 1  # the stage was given more since
    checkpoint.save(best, folder / "best.pt")
    train(recipe)
    checkpoint.write_atomic(folder / "best.pt", before[folder / "best.pt"])
    for change, message in (
        (
            "stage.1.epochs=3",
            r"is done with 2 epochs, and without last\.pt it cannot go on to 3\. Restore last\.pt",
        ),
        ("stage.1.epochs=1", r"stage\.1\.epochs: 2 -> 1"),
        ("stage.1.lr=1e-4", r"best\.pt was made with other settings \(stage\.1\.lr: 0\.001 -> 0\.0001\)"),
    ):
        with pytest.raises(UsageError, match=message):
            train(small_run.recipe(repo, root, tmp_path, change))
    assert {path: path.read_bytes() for path in folder.iterdir() if path.name != "lock"} == before
    train(recipe, stage=2)
    figure(f"done as before, {size / 1e6:.1f} MB less; more epochs are refused")


@pytest.mark.fault("R5", "what is needed of a stage deleted: last.pt of one that is half done, best.pt")
def test_what_a_stage_lacks_is_named(copied, figure):
    recipe, folder = copied
    (folder / "best.pt").unlink()
    with pytest.raises(DataError, match=r"best\.pt: no such file, but last\.pt tells of one\. Restore it, or delete "):
        train(recipe)
    with pytest.raises(DataError, match=r"stage1/best\.pt: no such file\. Restore it, or delete .*stage1 and train"):
        train(recipe, stage=2)
    for name in ("last.pt", "prev.pt"):
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"that is done, but no best\.pt, and neither .* Restore them, or delete"):
        train(recipe)
    log.write_status(folder, "stopped", epoch=2, epochs=2)
    with pytest.raises(DataError, match=r"stage1 holds a stage that has begun, and neither last\.pt nor prev"):
        train(recipe)
    (folder / "log.jsonl").unlink()
    train(recipe)
    figure("named, with what to restore or delete")


@pytest.mark.fault("R1", "killed after the first best.pt, before the first last.pt that the settings ask for")
def test_a_best_has_a_last_beside_it(repo, root, tmp_path, monkeypatch):
    def killed(run, *_):
        keep(run, *_)
        raise SystemExit

    recipe, keep = small_run.recipe(repo, root, tmp_path), training._Run._keep
    monkeypatch.setattr(training._Run, "_keep", killed)
    with pytest.raises(SystemExit):
        train(recipe)
    assert (recipe.stage_folder(0, 1) / "best.pt").exists()
    monkeypatch.undo()
    train(recipe)


@pytest.mark.fault("R15", "a Dice that is no number, in the last of two epochs")
def test_a_dice_that_is_no_number_never_wins(repo, root, tmp_path, monkeypatch, figure):
    real, calls = training._record, []

    def record(*arguments):
        calls.append(1)
        return {**real(*arguments), **({"dice": float("nan")} if len(calls) == 2 else {})}

    monkeypatch.setattr(training, "_record", record)
    folder = train(small_run.recipe(repo, root, tmp_path))
    assert checkpoint.load(folder / "best.pt")["record"]["epoch"] == 1
    figure("best.pt is of the other")


def test_a_run_trains_on_what_its_recipe_says(repo, root, tmp_path, monkeypatch):
    """Images of the other folds alone, in micro-batches and with random numbers that belong to their place in the plan.

    A later version has to draw the same, or a run that it goes on with ends elsewhere.
    """
    changes = ["seed=5", "augment.rigid=1", "augment.rotate=30", *(
        f"stage.2.{change}"
        for change in ("start=encoder", "negatives=fresh", "positive_fraction=0.4", "batch_size=2", "accumulation=3")
    )]  # fmt: skip
    recipe = small_run.recipe(repo, root, tmp_path, *changes)
    data, given, step = dataset.load(recipe), [], engine.train_step

    def train_step(model, micro_batches, *more, **options):
        given.append(list(micro_batches))
        return step(model, given[-1], *more, **options)

    monkeypatch.setattr(engine, "train_step", train_step)
    training.train_stage(recipe, data, 1, 2, CPU)
    feed = Feed(dataset.open_train(recipe, data, 64), CPU, np.arange(len(data.cases)))
    settings, others = asdict(recipe.augment), data.folds != 1
    for epoch in (1, 2):
        rows = (np.flatnonzero(others & data.positive), np.flatnonzero(others & ~data.positive))
        plan = feeds.epoch_plan(*rows, positive_fraction=0.4, draw="fresh", seed=5, fold=1, stage=2, epoch=epoch)
        for number, micro_batches in enumerate(feeds.steps(plan, 2, 3)):
            found = given.pop(0)
            for place, (image, mask) in enumerate(feed.batches(micro_batches)):
                generator = torch.Generator().manual_seed(feeds.key(5, 1, 2, epoch, number, place, "augment"))
                numbers = augment.random_numbers(len(image), 64, generator, **settings)
                wanted = augment.transform(image, mask, *numbers, **settings)
                assert all(map(torch.equal, found.pop(0), wanted)), (epoch, number, place)
            assert not found
    assert not given


@pytest.mark.parametrize(("bad", "ends"), [({0, 2}, False), ({1, 2}, True)])
def test_only_steps_in_a_row_end_a_run(repo, root, tmp_path, monkeypatch, bad, ends):
    """Of four steps, two an epoch, those that were not taken."""
    steps, step = iter(range(4)), engine.train_step

    def train_step(*given, **options):
        stats = step(*given, **options)
        stats[1] = float(next(steps) not in bad)
        return stats

    monkeypatch.setattr(engine, "train_step", train_step)
    recipe = small_run.recipe(repo, root, tmp_path, "train.nonfinite_steps=2")
    if not ends:
        train(recipe)
        return
    with pytest.raises(NotFiniteError, match=r"for 2 steps in a row \(to epoch 2, step 1;"):
        train(recipe)


def test_the_log_tells_positives_from_negatives():
    result = engine.Evaluation(np.arange(4), np.array([0.25, 1.0, 0.5, 0.25]), 1.5, np.ones(4, dtype=bool))
    assert training._record(result, np.array([True, False, True, False])) == {
        "val_loss": 1.5,
        "dice": 0.5,
        "dice_positive": 0.375,
        "true_negative_rate": 0.625,
    }


def test_checkpoints_are_minutes_apart_and_an_epoch_takes_what_all_its_runs_took(repo, root, tmp_path, monkeypatch):
    """Eight steps of 40 s: one is saved two steps after a minute is over; the run ends then and is started again."""

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    def train_step(*given, **options):
        if clock.now == dies:
            raise SystemExit
        clock.now += 40
        return step(*given, **options)

    clock, step, save, saved = Clock(), engine.train_step, StageFolder.save, []
    dies = 280
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(engine, "train_step", train_step)
    monkeypatch.setattr(StageFolder, "save", lambda self, at, state: saved.append(str(at)) or save(self, at, state))
    changes = ("train.checkpoint_minutes=1", "stage.1.batch_size=1", "stage.1.accumulation=1")
    recipe = small_run.recipe(repo, root, tmp_path, *changes)
    with suppress(SystemExit):
        train(recipe)
    dies = None
    train(recipe)
    assert saved == ["epoch 1, step 5", "epoch 2, step 0", "epoch 2, step 5", "epoch 3, step 0"]
    folder = recipe.stage_folder(0, 1)
    for line in log.read_jsonl(folder / "log.jsonl"):
        assert (line["seconds"], line["images_per_second"]) == (8 * 40, 8 / 320)
    assert log.read_status(folder)["images_seen"] == 16


def test_a_scale_that_is_still_being_found_is_not_complained_of(repo, root, tmp_path, capsys):
    folder = train(small_run.recipe(repo, root, tmp_path, "train.amp=fp16"))
    assert checkpoint.load(folder / "last.pt")["scaler"]["scale"] < 2**16  # steps were skipped
    assert "was skipped" not in capsys.readouterr().err


def test_of_epochs_that_score_alike_the_later_ones_are_kept(repo, root, tmp_path):
    changes = ("rule.threshold=1.0", "train.keep_best=2", "train.ema=0.9", "stage.1.epochs=3")
    folder = train(small_run.recipe(repo, root, tmp_path, *changes))
    assert sorted(path.name for path in folder.glob("epoch*.pt")) == ["epoch2.pt", "epoch3.pt"]
    assert checkpoint.load(folder / "ema.pt")["record"]["epoch"] == 3


def test_each_fold_and_seed_begins_with_weights_of_its_own(repo, root, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training._Run, "_train_epoch", lambda self, *_: seen.append(self.model.head.weight) or 1 / 0)
    for number, (seed, fold) in enumerate(((0, 0), (0, 1), (1, 0), (0, 0))):
        torch.manual_seed(number)  # which is not read
        with pytest.raises(ZeroDivisionError):
            train(small_run.recipe(repo, root, tmp_path / str(number), f"seed={seed}"), fold=fold)
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_a_step_that_was_not_taken_is_not_averaged(repo, root, tmp_path, monkeypatch):
    started, step = [], engine.train_step

    def train_step(model, *given, **options):
        started.append(started[0] if started else model.head.weight.detach().clone())
        stats = step(model, *given, **options)
        stats[1] = 0
        return stats

    monkeypatch.setattr(engine, "train_step", train_step)
    folder = train(small_run.recipe(repo, root, tmp_path, "train.ema=0.9"))
    last = checkpoint.load(folder / "last.pt")
    assert torch.equal(last["average"]["weights"]["head.weight"], started[0])
    assert not torch.equal(last["model"]["head.weight"], started[0])


def test_a_fold_that_cannot_be_trained_is_refused(straight):
    data = dataset.load(straight)
    lone = np.where(data.positive, 0, 1)
    for folds, message in (
        (np.zeros_like(data.folds), r"^fold 1 has 0 images and the others 6 positive ones; both must be at least 1"),
        (1 - lone, r"^fold 1 has 6 images and the others 0 positive ones; both must be"),
    ):
        with pytest.raises(DataError, match=message):
            training.train_stage(straight, replace(data, folds=folds), 1, 1, CPU)
    empty = tuple(case for case in data.cases if not case.positive)
    none = replace(data, cases=empty, folds=np.arange(len(empty)) % 3)
    with pytest.raises(DataError, match=r"^fold 1: not one of the 12 training images has a pneumothorax to learn from"):
        training.train_stage(straight, none, 1, 1, CPU)


def test_advice_where_all_positives_belong_together(straight):
    data = dataset.load(straight)
    groups = tuple("p" if case.positive else None for case in data.cases)
    parted = replace(data, folds=np.where(data.positive, 1, 0))
    with pytest.raises(DataError, match=r"must be at least 1\. Lower folds\.count \(now 3\) or add data\.$"):
        dataset.check_fold(straight, parted, 1)
    with pytest.raises(DataError, match=r"must be at least 1\. All positive images are of one patient, or copies of"):
        dataset.check_fold(straight, replace(parted, groups=groups), 1)


def test_a_fold_without_a_positive_to_validate_with_is_said(repo, root, tmp_path, capsys):
    recipe = small_run.recipe(repo, root, tmp_path, "stage.1.epochs=1")
    data = dataset.load(recipe)
    training.train_stage(recipe, replace(data, folds=np.where(data.positive, 1, data.folds)), 0, 1, CPU)
    assert "fold 0 holds no image with pneumothorax: its best epoch is chosen by neg" in capsys.readouterr().err


def test_all_folds_are_looked_at_before_the_first_is_trained(repo, root, tmp_path, monkeypatch):
    data = dataset.load(small_run.recipe(repo, root, tmp_path))
    monkeypatch.setattr(dataset, "load", lambda _: replace(data, folds=np.where(data.positive, 1, data.folds)))
    monkeypatch.setattr(training, "train_stage", lambda *_: pytest.fail("trained"))
    for jobs in (1, 2):
        options = Namespace(
            recipe="seed",
            config=repo / "configs.toml",
            set=[small_run.settings(root, tmp_path)],
            folds="all",
            jobs=jobs,
        )
        with pytest.raises(DataError, match=r"^fold 1 has"):
            commands.cv(options)


def test_what_fails_before_it_trains_has_failed(repo, root, tmp_path):
    recipe = small_run.recipe(repo, root, tmp_path, "model.pretrained=/no/such/w.pth")
    with pytest.raises(UsageError, match="no file"):
        train(recipe)
    status = log.read_status(recipe.stage_folder(0, 1))
    assert status["state"] == "failed" and "no file /no/such/w.pth" in status["reason"]


def test_checkpointing_is_the_recipes(repo, root, tmp_path, monkeypatch):
    """And may be switched on where a run has run out of memory."""
    seen = []
    monkeypatch.setattr(training._Run, "_train_epoch", lambda self, *_: seen.append(self.model.checkpointing) or 1 / 0)
    for how in ("false", "true"):
        with pytest.raises(ZeroDivisionError):
            train(small_run.recipe(repo, root, tmp_path, f"model.checkpointing={how}"))
    assert seen == [False, True]


def test_a_run_keeps_to_the_type_it_began_in(repo, root, tmp_path, copied, monkeypatch):
    """As on another machine, where train.amp=auto means another one. Of a finished stage nothing is left to compute."""
    recipe = small_run.recipe(repo, root, tmp_path, "stage.1.epochs=3")
    now = engine.autocast_dtype(recipe.train.amp, CPU)
    other = torch.float16 if now == torch.bfloat16 else torch.bfloat16
    monkeypatch.setattr(engine, "autocast_dtype", lambda *_: other)
    with pytest.raises(UsageError, match=rf"made with other settings \(autocast: {now} -> {other}\)"):
        train(recipe)
    train(copied[0])


def test_a_finished_stage_whose_start_was_trained_anew_is_refused_without_its_last(copied, straight):
    recipe, first = copied
    second = recipe.stage_folder(0, 2)
    shutil.copytree(straight.stage_folder(0, 2), second)
    for name in ("last.pt", "prev.pt"):
        (second / name).unlink()
    train(recipe, stage=2)
    best = checkpoint.load(first / "best.pt")
    best["model"]["head.bias"] += 1e-3
    checkpoint.save(best, first / "best.pt")
    with pytest.raises(UsageError, match=r"stage2/best\.pt began with other weights than .*stage1/best\.pt now holds"):
        train(recipe, stage=2)


def test_another_decoder_than_the_stage_before_had_is_named(repo, root, tmp_path, copied):
    other = small_run.recipe(repo, root, tmp_path, "model.decoder_channels=[8, 8, 8, 8, 4]")
    with pytest.raises(UsageError, match=r"whose model\.decoder_channels is \[8, 8, 8, 4, 4\], not \[8, 8, 8, 8, 4\]"):
        train(other, stage=2)


def test_a_stage_that_starts_from_one_of_other_settings_says_so(repo, root, tmp_path, copied, capsys, monkeypatch):
    monkeypatch.setattr(training._Run, "_train_epoch", lambda *_: 1 / 0)
    more = ("stage.1.lr=1e-2", "augment.flip=0.25", "model.upsample=plain", "stage.2.epochs=1")
    longer = checkpoint.load(copied[1] / "best.pt")  # as of a stage that got more epochs, of which none was better
    longer["settings"]["stage.1.epochs"] = 1
    checkpoint.save(longer, copied[1] / "best.pt")
    for given, said in (
        ((), None),
        (more, f"augment.flip: {copied[0].augment.flip} -> 0.25; stage.1.lr: 0.001 -> 0.01)"),
    ):
        capsys.readouterr()
        with pytest.raises(ZeroDivisionError):
            train(small_run.recipe(repo, root, tmp_path, *given), stage=2)
        lines = [line for line in capsys.readouterr().err.splitlines() if "other settings than" in line]
        assert len(lines) == (said is not None) and all(line.endswith(f"now ({said}") for line in lines)


@pytest.fixture
def begun(monkeypatch):
    """Lets training end before its first step, and gives the weights that it would have begun with."""
    seen = {}
    monkeypatch.setattr(training._Run, "_train_epoch", lambda self, *_: seen.update(self.model.state_dict()) or 1 / 0)
    return seen


def test_a_run_can_start_from_a_network_trained_on_other_images(repo, root, tmp_path, copied, begun):
    """Decoder, head and all; what it has seen, the next one has seen as well."""
    _, folder = copied
    best = checkpoint.load(folder / "best.pt")
    given, others = tmp_path / "trained.pt", torch.tensor([-5, 7])
    checkpoint.save({**best, "digest": "of others", "split": "another", "fold": 1, "seen": others}, given)
    more = (f"model.pretrained={given}", "stage.1.epochs=1")
    mine = small_run.recipe(repo, root, tmp_path / "mine", *more)
    with pytest.raises(ZeroDivisionError):
        train(mine)
    assert best["model"].keys() == begun.keys()
    assert all(torch.equal(weights, begun[name]) for name, weights in best["model"].items())
    other = small_run.recipe(repo, root, tmp_path / "other", *more, "model.decoder_channels=[8, 8, 8, 8, 4]")
    with pytest.raises(UsageError, match=r"trained\.pt, whose model\.decoder_channels is \[8, 8, 8, 4, 4\], not"):
        train(other)
    files = StageFolder(mine, dataset.load(mine), 0, 1, torch.float32)
    own = set(files.seen.tolist())
    files.load_start()
    assert set(files.seen.tolist()) == own | {-5, 7} and files.begins == f"the whole network of {given}"


def test_each_fold_can_start_from_a_network_of_its_own(repo, root, tmp_path, copied, begun):
    _, folder = copied
    best = checkpoint.load(folder / "best.pt")
    for fold in (0, 1):
        best["model"]["head.bias"] += 1
        checkpoint.save({**best, "seen": torch.tensor([fold])}, tmp_path / f"a{fold}.pt")
    mine = small_run.recipe(repo, root, tmp_path / "mine", f"model.pretrained={tmp_path}/a{{fold}}.pt")
    for fold in (0, 1):
        with pytest.raises(ZeroDivisionError):
            train(mine, fold=fold)
        assert torch.equal(begun["head.bias"], checkpoint.load(tmp_path / f"a{fold}.pt")["model"]["head.bias"])
    for fold in (0, 1):
        torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), tmp_path / f"e{fold}.pth")
    encoders = small_run.recipe(repo, root, tmp_path / "encoders", f"model.pretrained={tmp_path}/e{{fold}}.pth")
    for fold in (0, 1):
        with pytest.raises(ZeroDivisionError):
            train(encoders, fold=fold)
        wanted = torch.load(tmp_path / f"e{fold}.pth")["layer1.0.conv1.weight"]
        assert torch.equal(begun["encoder.layer1.0.conv1.weight"], wanted)
    data = dataset.load(mine)
    settings = [StageFolder(mine, data, fold, 1, torch.float32)._identity["settings"] for fold in (0, 1)]
    assert settings[0] != settings[1]
    assert config.essential(settings[0]) == config.essential(settings[1])
    assert config.essential(settings[0])["model.pretrained"] == "file by fold"


def test_what_a_run_begins_with_is_said(repo, root, tmp_path, copied, begun, capsys):
    given = tmp_path / "w.pth"
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), given)
    for number, (more, stage, said) in enumerate(
        (
            ((), 1, "random weights"),
            ((f"model.pretrained={given}",), 1, f"{given} for the encoder, random ones for the decoder"),
            ((), 2, f"the whole network of {copied[1] / 'best.pt'}"),
        )
    ):
        runs = tmp_path if stage == 2 else tmp_path / str(number)
        with pytest.raises(ZeroDivisionError):
            train(small_run.recipe(repo, root, runs, *more), stage=stage)
        assert f"fold 0 stage {stage} begins with {said}\n" in capsys.readouterr().out


def test_what_decided_earlier_stages_goes_with_a_network(repo, root, tmp_path, copied, capsys):
    """Also a file of pretrained weights that is gone by then, or another one."""
    recipe, folder = copied
    state = checkpoint.load(folder / "best.pt")
    known = "file of sha256 0123456789abcdef"
    state["settings"] |= {"model.pretrained": known, "stage.1.lr": 0.25}
    checkpoint.save(state, folder / "best.pt")
    gone = ("model.pretrained=/gone/w.pth", "stage.1.lr=0.25")
    train(small_run.recipe(repo, root, tmp_path, *gone), stage=2)
    assert "other settings" not in capsys.readouterr().err
    before = checkpoint.load(recipe.stage_folder(0, 2) / "best.pt")["before"]
    assert before["stage.1.lr"] == 0.25 and before["model.pretrained"] == known
    assert not {"seed", "stage.2.lr", "train.amp"} & before.keys()
    train(small_run.recipe(repo, root, tmp_path, *gone), stage=3)
    last = stages.trained_under(recipe.stage_folder(0, 3), 3, checkpoint.load(recipe.stage_folder(0, 3) / "best.pt"))
    assert (last["stage.1.lr"], last["stage.2.lr"], last["stage.3.lr"]) == (0.25, 1e-3, 1e-3)
    shutil.rmtree(recipe.stage_folder(0, 2))
    train(small_run.recipe(repo, root, tmp_path, "stage.1.lr=0.25"), stage=2)
    assert f"now (model.pretrained: {known} -> False)" in capsys.readouterr().err


def test_why_a_cosine_schedule_gets_no_more_epochs_is_said(repo, root, tmp_path):
    settings = ("stage.1.schedule=cosine", "stage.1.epochs=1")
    train(small_run.recipe(repo, root, tmp_path, *settings))
    with pytest.raises(
        UsageError, match=r"\(stage\.1\.epochs: 1 -> 2, on which a cosine schedule depends from its start\)"
    ):
        train(small_run.recipe(repo, root, tmp_path, *settings[:1], "stage.1.epochs=2"))


def test_a_checkpoint_says_which_files_it_was_trained_on(copied):
    recipe, folder = copied
    data = dataset.load(recipe)
    wanted = sorted(
        int.from_bytes(bytes.fromhex(checkpoint.sha256(case.path)[:16]), signed=True)
        for case, fold in zip(data.cases, data.folds, strict=True)
        if fold != 0
    )
    for name in ("best.pt", "last.pt"):
        assert checkpoint.load(folder / name)["seen"].tolist() == wanted


def test_a_run_does_not_start_from_a_network_that_knows_what_it_validates_with(repo, root, tmp_path, copied, begun):
    """Whatever else has changed: its annotations, their grid, or the images around."""
    recipe, folder = copied
    given, best = tmp_path / "trained.pt", checkpoint.load(folder / "best.pt")
    mine = small_run.recipe(repo, root, tmp_path / "mine", f"model.pretrained={given}", "data.annotation_size=96")
    mine.folder.mkdir(parents=True)
    shutil.copy(recipe.folder / "folds.csv", mine.folder)
    data = dataset.load(mine)
    held_out = np.flatnonzero(data.folds == 0)
    first = min(data.cases[row].image_id for row in held_out[:2])
    for seen, message in (
        (
            torch.from_numpy(data.hashes[held_out[:2]]),
            rf"trained on 2 of the 6 images that fold 0 .*, as {first}\. Take",
        ),
        (None, "does not say which images it was trained on, as those of earlier versions"),
    ):
        checkpoint.save({**best, "digest": "of others", "seen": seen}, given)
        with pytest.raises(DataError, match=message):
            train(mine)
    checkpoint.save(best, given)
    with pytest.raises(ZeroDivisionError):
        train(mine)
    assert begun.keys() == best["model"].keys()


def test_a_run_of_an_earlier_version_goes_on(repo, root, tmp_path, copied):
    """Which named pretrained weights by their path, and in every stage."""
    _, folder = copied
    given = tmp_path / "w.pth"
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), given)
    recipe = small_run.recipe(repo, root, tmp_path, f"model.pretrained={given}", "stage.2.epochs=1")
    state = checkpoint.load(folder / "last.pt")
    state["settings"]["model.pretrained"] = str(given)
    del state["seen"], state["versions"]["code"]
    checkpoint.save(state, folder / "last.pt")
    train(recipe)
    train(recipe, stage=2)
    second = recipe.stage_folder(0, 2)
    state = checkpoint.load(second / "last.pt")
    state["settings"]["model.pretrained"] = str(given)
    checkpoint.save(state, second / "last.pt")
    train(small_run.recipe(repo, root, tmp_path, f"model.pretrained={given}", "stage.2.epochs=2"), stage=2)
    assert log.read_status(second)["epochs"] == 2


def test_a_pretrained_file_that_cannot_be_read_stops_no_stage_that_has_begun(repo, root, tmp_path, copied, monkeypatch):
    _, folder = copied
    given = tmp_path / "w.pth"
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), given)
    state = checkpoint.load(folder / "last.pt")
    state["settings"]["model.pretrained"] = f"file of sha256 {checkpoint.sha256(given)[:16]}"
    checkpoint.save(state, folder / "last.pt")

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "sha256", refused)
    train(small_run.recipe(repo, root, tmp_path, f"model.pretrained={given}"))
    train(small_run.recipe(repo, root, tmp_path, f"model.pretrained={given}", "stage.2.epochs=1"), stage=2)


def test_pretrained_weights_may_be_moved_or_deleted_but_not_replaced(repo, root, tmp_path, capsys):
    encoder = timm.create_model("test_resnet", pretrained=False)
    first, moved = tmp_path / "a.pth", tmp_path / "b.pth"

    def run(path, epochs):
        more = (f"model.pretrained={path}", f"stage.1.epochs={epochs}", "stage.1.schedule=plateau")
        return train(small_run.recipe(repo, root, tmp_path / "runs", *more))

    torch.save(encoder.state_dict(), first)
    folder = run(first, 1)
    first.rename(moved)
    run(moved, 2)
    said = checkpoint.load(folder / "last.pt")["settings"]["model.pretrained"]
    assert said == f"file of sha256 {checkpoint.sha256(moved)[:16]}"
    moved.unlink()
    run(moved, 3)
    assert checkpoint.load(folder / "last.pt")["settings"]["model.pretrained"] == said
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), moved)
    with pytest.raises(UsageError, match=rf"\(model\.pretrained: {said} -> file of sha256 (?!{said[-16:]})\w{{16}}\)"):
        run(moved, 4)
    with pytest.raises(UsageError, match=rf"\(model\.pretrained: {said} -> True\)"):
        run("true", 4)


def test_a_run_that_goes_on_with_other_code_is_told(repo, root, tmp_path, copied, capsys, monkeypatch):
    recipe, folder = copied
    assert checkpoint.load(folder / "best.pt")["versions"] == checkpoint.load(folder / "last.pt")["versions"]
    capsys.readouterr()
    train(recipe)
    assert "made with" not in capsys.readouterr().err
    monkeypatch.setattr(training.dist, "code_hash", lambda: "0123456789")
    train(recipe)
    assert "made with" not in capsys.readouterr().err  # as nobody goes on with it
    train(small_run.recipe(repo, root, tmp_path, "stage.1.epochs=3"))
    assert re.search(r"last\.pt: made with code \w{12} -> 0123456789; the last digits", capsys.readouterr().err)


def test_a_stage_whose_images_changed_their_folds_is_refused(copied):
    recipe, _ = copied
    data = dataset.load(recipe)
    with pytest.raises(UsageError, match=r"\(folds\.csv: \w{12} -> other\)\. .* delete the folders fold0 to fold2 of"):
        training.train_stage(recipe, replace(data, split="other"), 0, 1, CPU)


def test_a_stage_does_not_start_from_another_folds(repo, root, tmp_path, copied):
    """Whose network was trained on what this one is validated with."""
    recipe, folder = copied
    shutil.copytree(folder, recipe.stage_folder(1, 1))
    with pytest.raises(DataError, match=r"fold1/stage1/best\.pt was trained on other fold \(0, not 1\)"):
        train(recipe, fold=1, stage=2)


def test_a_folder_that_was_replaced_loses_no_kept_epoch(copied):
    recipe, folder = copied
    files = StageFolder(recipe, dataset.load(recipe), 0, 1, torch.float32)
    with checkpoint.lock(folder):
        (folder / "lock").unlink()
        (folder / "epoch7.pt").touch()
        with pytest.raises(FolderGoneError):
            files.prune(Position(kept=[]))
    assert (folder / "epoch7.pt").exists()
