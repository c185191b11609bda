from dataclasses import asdict

import pytest

from pneumo import config
from pneumo.errors import UsageError


def test_seed_is_the_reports_recipe(repo):
    recipe = config.load(repo / "configs.toml", "seed")
    one, two, three = recipe.stage.values()
    assert [s.image_size for s in (one, two, three)] == [512, 1024, 1024]
    assert [s.epochs for s in (one, two, three)] == [20, 30, 20]
    assert [(s.batch_size, s.accumulation) for s in (one, two, three)] == [(16, 2), (4, 4), (4, 4)]
    assert [s.loss for s in (one, two, three)] == ["focal_dice", "focal_dice", "bce_dice"]
    assert [s.start for s in (one, two, three)] == ["encoder", "previous", "previous"]
    for stage in (one, two, three):
        assert (stage.lr, stage.weight_decay, stage.factor, stage.patience) == (5e-4, 0, 0.1, 3)
        assert (stage.plateau_threshold, stage.focal_weight, stage.gamma, stage.smooth) == (1e-4, 10, 2, 1)
        assert (stage.schedule, stage.negatives, stage.positive_fraction) == ("plateau", "fixed", 0.5)
    rule = recipe.rule
    assert (rule.threshold, rule.min_area, rule.top_area) == (0.5, 3500, 0)
    assert recipe.model.decoder_channels == (256, 128, 64, 32, 16)
    assert (recipe.folds.count, recipe.stages, recipe.predict.mirror) == (5, 3, True)


def test_seed_focal_differs_in_the_loss_of_stage_3_alone(repo):
    seed, focal = (config.load(repo / "configs.toml", name) for name in ("seed", "seed-focal"))
    settings = [config.stage_settings(recipe, 3) for recipe in (seed, focal)]
    changed = {key for key in settings[0] if settings[0][key] != settings[1][key]}
    assert changed == {"stage.3.loss", "stage.3.start"}
    assert focal.own_stages == [3]
    assert focal.start_folder(2, 3) == seed.stage_folder(2, 2)


@pytest.mark.parametrize("name", ["seed", "seed-focal", "demo"])
def test_a_resolved_recipe_reads_back_the_same(repo, tmp_path, name):
    recipe = config.load(repo / "configs.toml", name, ["data.root=/a b/ü", 'model.pretrained="w.pt"'])
    (tmp_path / "config.toml").write_text(config.dumps(recipe), encoding="utf-8")
    assert config.load(tmp_path / "config.toml", name) == recipe


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("stage.2.epochs=1", ("stage", 2, "epochs"), 1),
        ("stage.1.lr=1e-3", ("stage", 1, "lr"), 1e-3),
        ("stage.1.lr=1", ("stage", 1, "lr"), 1.0),
        ("seed=7", ("seed",), 7),
        ("runs=/tmp/with space", ("runs",), "/tmp/with space"),
        ("runs=7", ("runs",), "7"),
        ("data.allow_missing=true", ("data", "allow_missing"), True),
        ("data.root=a=b", ("data", "root"), "a=b"),
        ("model.pretrained=false", ("model", "pretrained"), False),
        ("model.pretrained=weights/r34.pth", ("model", "pretrained"), "weights/r34.pth"),
        ("model.decoder_channels=[8, 8, 8, 8, 8]", ("model", "decoder_channels"), (8, 8, 8, 8, 8)),
        ("augment.gamma=[1, 1]", ("augment", "gamma"), (1.0, 1.0)),
    ],
)
def test_overrides_take_the_type_of_what_they_replace(repo, override, where, value):
    table = asdict(config.load(repo / "configs.toml", "seed", [override]))
    for key in where:
        table = table[key]
    assert table == value
    assert type(table) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.2.epoch=1", r"unknown key stage\.2\.epoch \(did you mean 'epochs'\?\)"),
        ("stage.9.epochs=1", r"unknown key stage\.9\.epochs"),
        ("wokers=8", "unknown key wokers"),
        ("seed", "expected key=value"),
        ("stage.2=1", "is a table"),
        ("seed=true", "seed: expected int, got True"),
        ("seed=x", "seed: expected int, got 'x'"),
        ("stage.2.lr=fast", r"stage\.2\.lr: expected float"),
        ("stage.2.lr=-1", r"stage\.2\.lr must be in \(0, inf\), got -1"),
        ("stage.2.positive_fraction=80", r"stage\.2\.positive_fraction must be in \(0, 1\]"),
        ("stage.2.image_size=1000", r"stage\.2\.image_size must be a multiple of 32, got 1000; nearest: 992"),
        ("stage.2.loss=dice", r"stage\.2\.loss: expected one of 'focal_dice', 'bce_dice', 'lovasz'"),
        ("rule.threshold=0.3", r"rule\.threshold must be a multiple of 1/256"),
        ("stage.1.start=previous", "there is no stage before the first"),
        ("stages=4", "only 3 are described"),
        ("model.decoder_channels=[1, 2]", r"model\.decoder_channels must be 5"),
        ("augment.gamma=[2.0, 1.0]", r"augment\.gamma must be \[low, high\]"),
        ("augment.optical_limit=2.0", r"augment\.optical_limit must be in \[0, 0\.3\]"),
        ("model.pretrained=3", "model.pretrained: expected bool or str"),
    ],
)
def test_mistakes_in_overrides_are_named(repo, override, message):
    with pytest.raises(UsageError, match=message) as caught:
        config.load(repo / "configs.toml", "seed", [override])
    assert "configs.toml [seed]" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[seed.stage.1]\nepochs = 20", "[seed.stage.1]\nepoch = 20", "unknown key stage.1.epoch"),
        ("flip = 0.5", "", r"missing key augment\.flip"),
        ("[seed.stage.3]", "[seed.stage.4]", "without gaps"),
        ("[seed.stage.3]", "[seed.stage.three]", "stage.three: expected a number"),
        ('base = "seed"', 'base = "sed"', r"no recipe 'sed' \(did you mean 'seed'\?\)"),
        ('base = "seed"', 'base = "demo"', "a circle"),
        ("seed = 0", "seed = = 0", "not valid TOML"),
    ],
)
def test_mistakes_in_the_file_are_named(repo, tmp_path, old, new, message):
    text = (repo / "configs.toml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "c.toml").write_text(text.replace(old, new, 1 if "stage" in old else -1), encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        config.load(tmp_path / "c.toml", "demo" if "base" in old else "seed")


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no-such\.toml"):
        config.load(tmp_path / "no-such.toml", "seed")


def test_settings_of_a_stage_leave_out_what_changes_no_weight(repo):
    base = config.load(repo / "configs.toml", "seed")
    for harmless in ("runs=elsewhere", "stage.1.epochs=3", "train.checkpoint_minutes=1", "data.root=x"):
        other = config.load(repo / "configs.toml", "seed", [harmless])
        assert config.stage_settings(other, 2) == config.stage_settings(base, 2), harmless
    for telling in ("seed=1", "stage.2.epochs=3", "augment.flip=0", "rule.min_area=0", "folds.count=4"):
        other = config.load(repo / "configs.toml", "seed", [telling])
        assert config.stage_settings(other, 2) != config.stage_settings(base, 2), telling
