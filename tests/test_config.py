import re
import tomllib
from argparse import Namespace
from dataclasses import asdict, replace

import pytest

from pneumo import cli, config
from pneumo.errors import UsageError, printable


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


SIGNS = "".join(map(chr, range(1, 256))) + "\u2028\ue000\uffff\U0001f600\U0010ffff\\ud83d\\U0001F600"


@pytest.mark.fault("C4", "paths of every control, Latin and other kind of sign, dumped and read back")
def test_every_text_is_valid_toml(repo, tmp_path, figure):
    for text in (SIGNS, "/data/\U0001f600/\u80f8\u90e8", "'", '"""', ""):
        recipe = config.load(repo / "configs.toml", "seed")
        recipe = replace(recipe, runs=text, model=replace(recipe.model, pretrained=text))
        path = tmp_path / "config.toml"
        path.write_text(config.dumps(recipe), encoding="ascii")
        assert config.load(path, "seed") == recipe, text
    values = [True, 0, -(2**62), 1e-5, 1e16, 5e300, float("inf"), [0.5, "\U0001f600"], []]
    assert tomllib.loads(f"v = {config.toml(values)}")["v"] == values
    figure(f"{len(SIGNS)} signs read back equal")


@pytest.mark.parametrize("name", ["seed", "seed-focal", "demo"])
def test_a_resolved_recipe_reads_back_the_same(repo, tmp_path, name):
    recipe = config.load(repo / "configs.toml", name, ["data.root=/a b/ü", 'model.pretrained="w.pt"'])
    (tmp_path / "config.toml").write_text(config.dumps(recipe), encoding="utf-8")
    assert config.load(tmp_path / "config.toml", name) == recipe


@pytest.mark.fault("C5", "--set of every type: int, float, text, true and false, list, either of two")
def test_overrides_take_the_type_of_what_they_replace(repo, figure):
    rows = [
        ("stage.2.epochs=1", 1),
        ("stage.1.lr=1e-3", 1e-3),
        ("stage.1.lr=1", 1.0),
        ("stage.1.positive_fraction=.5", 0.5),
        ("seed=7", 7),
        ("runs=/tmp/with space", "/tmp/with space"),
        ("runs=7", "7"),
        ('runs="7"', "7"),
        ("runs=true", "true"),
        ("data.allow_missing=True", True),
        ("predict.mirror=false", False),
        ("data.root=a=b", "a=b"),
        ("model.pretrained=false", False),
        ("model.pretrained=weights/r34.pth", "weights/r34.pth"),
        ("model.decoder_channels=[8, 8, 8, 8, 8]", (8, 8, 8, 8, 8)),
        ("augment.gamma=[1, 1]", (1.0, 1.0)),
    ]
    for override, value in rows:
        found = asdict(config.load(repo / "configs.toml", "seed", [override]))
        for key in override.partition("=")[0].split("."):
            found = found[int(key) if key.isdecimal() else key]
        assert found == value and type(found) is type(value), override
    figure(f"{len(rows)} of {len(rows)} values of the right type")


OVERRIDES = {
    "C1": [
        ("stage.2.epoch=1", r'unknown key stage\.2\.epoch\. Did you mean "epochs"\?$'),
        ("stage.9.epochs=1", r"unknown key stage\.9\.epochs\. There are: stage\.1, stage\.2, stage\.3$"),
        ("stage.epochs=1", r"unknown key stage\.epochs\. There are: stage\.1, stage\.2, stage\.3$"),
        ("epochs=1", r"unknown key epochs\. Did you mean stage\.1\.epochs or stage\.2\.epochs or stage\.3\.epochs\?$"),
        ("root=x", r"unknown key root\. Did you mean data\.root\?$"),
        ("train.root=x", r"unknown key train\.root\. Did you mean data\.root\?$"),
        ("wokers=8", r"unknown key wokers\. There are: seed, stages, runs, data, .*, phantom$"),
        ("augment.noise=1", r"unknown key augment\.noise\. There are: flip, intensity, .*, rotate$"),
        ("seed.x=8", r"unknown key seed\.x\.$"),
        ("seed", "expected key=value; what is none goes before --set$"),
        ("stage.2=1", "stage.2 is a table; set one of its keys: epochs, "),
    ],
    "C2": [
        ("seed=true", "seed: expected int, got 'true'"),
        ("seed=x", "seed: expected int, got 'x'"),
        ("seed=1e3", r"seed: expected int, got 1000\.0"),
        (f"seed={2**63}", "seed must be a number of 64 bits"),
        ("predict.mirror=yes", "mirror: expected true or false, got 'yes'"),
        ("stage.2.lr=fast", r"stage\.2\.lr: expected float, got 'fast'"),
        ("stage.2.lr=-1", r"stage\.2\.lr must be in \(0, inf\), got -1"),
        ("stage.2.lr=nan", r"stage\.2\.lr must be in \(0, inf\), got nan"),
        ("stage.2.positive_fraction=80", r"stage\.2\.positive_fraction must be in \[0.001, 1\], got 80"),
        ("stage.2.loss=dice", r"stage\.2\.loss: expected one of 'focal_dice', 'bce_dice', 'lovasz', got 'dice'"),
        ("rule.threshold=0.3", r"rule\.threshold must be a multiple of 1/256, got 0\.3; nearest: 0\.30078125"),
        ("stage.1.start=previous", 'stage.1.start is "previous", but there is no stage before the first'),
        ("stage.3.start=../../x", 'stage.3.start must be "encoder", "previous" or a recipe'),
        ("stages=4", "stages is 4, but only 3 are described"),
        ("model.decoder_channels=[1, 2]", r"model\.decoder_channels must be 5 numbers from 1 to 4096, got \[1, 2\]"),
        ("model.decoder_channels=8", r"model\.decoder_channels: expected a list, got 8"),
        ("augment.gamma=[2.0, 1.0]", r"augment\.gamma must be \[low, high\]"),
        ("augment.gamma=[0, 1]", r"augment\.gamma must be \[low, high\] with 0 < low"),
        ("rule.top_threshold=0.3", r"rule\.top_threshold must be a multiple of 1/256, got 0\.3; nearest: 0\.30078125"),
        ("augment.gamma=[0.5, inf]", r"augment\.gamma must be \[low, high\]"),
        ("folds.count=1000000000000", r"folds\.count must be in \[2, 1000\], got 1000000000000"),
        ("tune.draws=1000000000000000", r"tune\.draws must be in \[100, 100000\], got 1000000000000000"),
        ("stage.1.batch_size=65537", r"stage\.1\.batch_size must be in \[1, 65536\], got 65537"),
        ("train.timeout_seconds=1e300", r"train\.timeout_seconds must be in \(0, 1e6\], got 1e\+300"),
        ("train.gpu_reserve_gb=1e308", r"train\.gpu_reserve_gb must be in \[0, 1e6\], got 1e\+308"),
        (r'runs="a\u0000b"', r"runs must not hold NUL, got 'a\\x00b'"),
        (r'model.pretrained="a\u0000b"', r"model\.pretrained must not hold NUL"),
        ("data.root=/x/\udcff/y", r"data\.root: '/x/\\udcff/y' is not UTF-8 at character 3; rename the .* link to it"),
        ("augment.optical_limit=2.0", r"augment\.optical_limit must be in \[0, 0\.3\], got 2\.0"),
        ("stage.1.lr=0", r"stage\.1\.lr must be in \(0, inf\), got 0\.0$"),
        ("stage.1.smooth=0", r"stage\.1\.smooth must be in \(0, inf\), got 0\.0$"),
        ("stage.1.factor=1", r"stage\.1\.factor must be in \(0, 1\), got 1\.0$"),
        ("augment.elastic_sigma=0", r"augment\.elastic_sigma must be in \(0, inf\), got 0\.0$"),
        ("train.ema=1", r"train\.ema must be in \[0, 1\), got 1\.0$"),
        ("model.decoder_channels=[8, 8, 8, 8, 0]", r"model\.decoder_channels must be 5 numbers from 1 to 4096"),
    ],
    "C3": [
        ("stage.2.image_size=1000", r"stage\.2\.image_size must be a multiple of 32, got 1000; nearest: 992"),
        ("stage.1.image_size=32", r"stage\.1\.image_size must be in \[64, 8192\], got 32"),
    ],
}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param("C1", marks=pytest.mark.fault("C1", "unknown keys in --set")),
        pytest.param("C2", marks=pytest.mark.fault("C2", "wrong types and ranges in --set")),
        pytest.param("C3", marks=pytest.mark.fault("C3", "image_size of 1000 and of 32")),
    ],
)
def test_mistakes_in_overrides_are_named(repo, figure, row):
    for override, message in OVERRIDES[row]:
        with pytest.raises(UsageError) as caught:
            config.load(repo / "configs.toml", "seed", [override])
        assert str(caught.value).startswith(f"{repo / 'configs.toml'} [seed] --set {printable(override)}: ")
        assert re.search(message, str(caught.value)), caught.value
        assert caught.value.exit_code == 2
    figure(f"{len(OVERRIDES[row])} of {len(OVERRIDES[row])} named")


FILES = {
    "C1": [
        (
            "seed",
            "[seed.stage.2]\nepochs",
            "[seed.stage.2]\nepoch",
            '[seed.stage.2] unknown key "epoch". Did you mean "epochs"?',
        ),
        (
            "demo",
            "[seed.stage.2]\nepochs",
            "[seed.stage.2]\nepoch",
            '[seed.stage.2] unknown key "epoch". Did you mean "epochs"?',
        ),
        ("demo", "min_area = 300 ", "min_aera = 300 ", '[demo.rule] unknown key "min_aera". Did you mean "min_area"?'),
        ("seed", "flip = 0.5 ", "# ", '[seed.augment] missing key "flip"'),
        ("seed", "[seed.stage.3]", "[seed.stage.three]", "[seed.stage] three: expected a number"),
        ("seed", "[seed.stage.3]", "[seed.stage.03]", "[seed.stage] 03: expected a number"),
        (
            "demo",
            '[demo]\nbase = "seed"',
            '[demo]\nbase = "sed"',
            "[demo] base: no recipe 'sed'. Did you mean \"seed\"? There are: seed, ",
        ),
        (
            "demo",
            '[demo]\nbase = "seed"',
            '[demo]\nbase = "dem"',
            "[demo] base: no recipe 'dem'. There are: seed, ",
        ),
        ("demo", '[demo]\nbase = "seed"', "[demo]\nbase = 3", "[demo] base: expected a recipe's name, got 3"),
        (
            "demo",
            '[demo]\nbase = "seed"',
            '[demo]\nbase = "demo-focal"',
            "[demo-focal] base: a circle, demo -> demo-focal -> demo",
        ),
        ("seed", "[seed]\n", "lr = 1\n[seed]\n", '"lr" stands in no recipe. Put it under [seed].'),
        ("a/b", "[seed]\n", "['a/b']\nbase = 'seed'\n[seed]\n", "[a/b] name must be of A-Z, a-z, 0-9, dot, "),
    ],
    "C2": [
        ("demo", "rotate = 45.0", "rotate = 450.0", ""),
        ("demo", "rotate = 8.0", "rotate = 450.0", "[demo.augment] rotate must be in [0, 180], got 450.0"),
        ("demo", "contrast = 0.2", "contrast = 2", "[seed.augment] contrast must be in [0, 1), got 2.0"),
        ("seed", "gamma = [0.8, 1.2]", 'gamma = [0.8, "x"]', "[seed.augment] gamma[1]: expected float, got 'x'"),
        ("seed", "mirror = true", "mirror = 1", "[seed.predict] mirror: expected true or false, got 1"),
        (
            "seed",
            "pretrained = true ",
            "pretrained = 3 ",
            "[seed.model] pretrained: expected true or false or str, got 3",
        ),
        (
            "seed",
            'group = "patient"',
            'group = "patents"',
            "[seed.folds] group: expected one of 'patient', 'image', got 'patents'",
        ),
        (
            "seed",
            "[seed.stage.3]",
            "[seed.stage.4]",
            "[seed] stage must have tables numbered 1, 2, ... without gaps, got [1, 2, 4]",
        ),
        ("demo", "rotate = 8.0", "rotate.0 = 1", "[demo.augment] rotate: expected float, got {'0': 1}"),
        ("seed", "[seed]\nseed = 0", "[seed]\nseed = = 0", "not valid TOML: Invalid value (at line 8, column 8)"),
        ("seed", "[seed]\nseed = 0", "[seed]\nseed = " + "9" * 5000, "not valid TOML: "),
        ("seed", "[seed]\nseed = 0", "[seed]\nseed = " + "[" * 5000, "not valid TOML: "),
    ],
    "C3": [
        (
            "seed",
            "image_size = 512",
            "image_size = 500",
            "[seed.stage.1] image_size must be a multiple of 32, got 500; nearest: 512",
        )
    ],
}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            "C1",
            marks=pytest.mark.fault(
                "C1", "unknown and missing keys in the file, in a recipe's own and its base's tables"
            ),
        ),
        pytest.param("C2", marks=pytest.mark.fault("C2", "wrong types, ranges, and no TOML at all in the file")),
        pytest.param("C3", marks=pytest.mark.fault("C3", "image_size of 500 in the file")),
    ],
)
def test_mistakes_in_the_file_are_named(repo, tmp_path, figure, row):
    text = (repo / "configs.toml").read_text(encoding="utf-8")
    path = tmp_path / "c.toml"
    for name, old, new, message in FILES[row]:
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        if not message:  # overridden by the recipe that is read
            config.load(path, name)
            continue
        with pytest.raises(UsageError) as caught:
            config.load(path, name)
        assert str(caught.value).startswith(str(path)) and message in str(caught.value), caught.value
    named = sum(bool(message) for *_, message in FILES[row])
    figure(f"{named} of {named} named")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("[seed]".encode("utf-16"), "not UTF-8 at byte 0"),
        (b"", ": no recipe 'seed'. There are: none"),
        (
            b'[seed]\nbase = "first"',
            "[seed] base: no recipe 'first'. There are: seed. A base must be in the same file: copy [first] and its "
            "sections into it, or add [seed] to configs.toml",
        ),
        (b"<!DOCTYPE html>", "not valid TOML"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, content, message):
    path = tmp_path / "other.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        config.load(path, "seed")
    assert "other.toml" in str(caught.value) and message in str(caught.value)


@pytest.mark.fault("R24", "data.root and runs that begin with ~, in the file and in --set")
def test_home_is_expanded(repo, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    text = (repo / "configs.toml").read_text().replace('root = "data"', 'root = "~/x rays"')
    (tmp_path / "configs.toml").write_text(text)
    recipe = config.load(tmp_path / "configs.toml", "seed", ["runs=~"])
    assert (recipe.data.root, recipe.runs) == ("/home/anna/x rays", "/home/anna")
    recipe = config.load(repo / "configs.toml", "seed", ["model.pretrained=~/w.pth"])
    assert recipe.model.pretrained == "/home/anna/w.pth"
    recipe = config.load(repo / "configs.toml", "seed", ["data.root=~anna/x", "runs=a/~"])
    assert (recipe.data.root, recipe.runs) == ("~anna/x", "a/~")


def test_a_recipe_that_only_a_run_knows_is_found(repo, tmp_path, monkeypatch):
    for place in ("runs/hospital/fold0/stage0", "runs/hospital/fold0/stage1", "my runs/hospital/fold1/stage2"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.toml").write_text(
            config.dumps(config.load(repo / "configs.toml", "demo")).replace("demo", "hospital")
        )
    monkeypatch.chdir(tmp_path)
    for overrides, kept in (
        ([], "runs/hospital/fold0/stage1/config.toml"),
        (["runs=my runs"], "my runs/hospital/fold1/stage2/config.toml"),
    ):
        with pytest.raises(UsageError, match=rf"no recipe 'hospital'\. .*: --config {kept}$"):
            config.load(repo / "configs.toml", "hospital", overrides)
        assert config.load(tmp_path / kept, "hospital", overrides).name == "hospital"
    for name, overrides in (("hospital", ["runs=none"]), ("../runs/hospital", [])):
        with pytest.raises(UsageError, match=r"no recipe .* There are: seed, "):
            config.load(repo / "configs.toml", name, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"\[mine\] missing key \"seed\", and no base: .* needs base = \"seed\"$"),
        ('bsae = "seed"\n', r"\[mine\] unknown key \"bsae\", and no base: .* needs base = \"seed\"$"),
    ],
)
def test_a_recipe_without_a_base_is_told_of_it(repo, tmp_path, text, message):
    whole = (repo / "configs.toml").read_text()
    (tmp_path / "c.toml").write_text(f"{whole}\n[mine]\n{text}[mine.data]\nroot = '/x'\n")
    for overrides in ([], ["data.test=t"], ["stages=1"]):
        with pytest.raises(UsageError, match=message):
            config.load(tmp_path / "c.toml", "mine", overrides)


def test_a_byte_order_mark_is_passed_over(repo, tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf" + (repo / "configs.toml").read_bytes())
    assert config.load(tmp_path / "c.toml", "seed") == config.load(repo / "configs.toml", "seed")


def test_settings_of_a_stage_leave_out_what_changes_no_weight(repo):
    base = config.load(repo / "configs.toml", "seed")
    for harmless in (
        "runs=elsewhere",
        "stage.1.epochs=3",
        "train.checkpoint_minutes=1",
        "data.root=x",
        "model.checkpointing=true",
    ):
        other = config.load(repo / "configs.toml", "seed", [harmless])
        assert config.stage_settings(other, 2) == config.stage_settings(base, 2), harmless
    for telling in (
        *("seed=1", "stage.2.epochs=3", "augment.flip=0", "rule.min_area=0", "model.upsample=plain"),
        *("data.annotation_size=512", "train.amp=off", "train.compile=off", "train.ema=0.9", "train.keep_best=2"),
    ):
        other = config.load(repo / "configs.toml", "seed", [telling])
        assert config.stage_settings(other, 2) != config.stage_settings(base, 2), telling
    random = config.load(repo / "configs.toml", "seed", ["model.pretrained=false"])
    for stage, same in ((1, False), (2, True)):  # which begins with the weights of the first
        assert (config.stage_settings(random, stage) == config.stage_settings(base, stage)) is same


@pytest.mark.parametrize(
    ("name", "typed", "target", "more", "command"),
    [
        ("seed", [], "cv", [], "make cv"),
        ("demo", ["runs=r"], "cv FOLDS=1", [], "make cv FOLDS=1 RECIPE=demo SET=runs=r"),
        ("seed", ["runs=r", "folds.count=3"], "oof", [], 'make oof SET="runs=r folds.count=3"'),
        ("seed", ["runs=a b"], "oof", [], """make oof SET="'runs=a b'\""""),
        ("seed", ["runs=a", "seed=1"], "cv", ["runs=DIR"], 'make cv SET="seed=1 runs=DIR"'),
        ("seed", [f"runs={'r' * 120}"], "cv", [], 'make cv SET="..."'),
        ("seed", [f"runs={'r' * 120}"], "cv", ["seed=1"], 'make cv SET="... seed=1"'),
    ],
)
def test_a_suggested_command_has_what_was_typed(repo, tmp_path, name, typed, target, more, command):
    recipe = config.load(repo / "configs.toml", name, typed)
    assert recipe.command(target, *more) == command
    assert "typed" not in config.dumps(recipe)
    with pytest.raises(UsageError, match="unknown key"):
        config.load(repo / "configs.toml", name, ["typed=1"])


def test_a_suggested_command_has_the_file_that_was_named(repo, tmp_path):
    path = tmp_path / "my own.toml"
    path.write_text((repo / "configs.toml").read_text())
    options = Namespace(config=path, recipe="demo", set=[["seed=1"]])
    recipe = cli.load_recipe(options).with_weights("ema")
    assert recipe.command("cv") == f"""make cv RECIPE=demo CONFIG="'{path}'" SET="seed=1 predict.weights=ema\""""
    assert recipe.program("folds").startswith(f"python -m pneumo folds --config '{path}' --recipe demo --set seed=1")
    assert str(path) not in config.dumps(recipe)
    plain = cli.load_recipe(Namespace(config=None, recipe="demo", set=[]))
    assert plain.command("cv") == "make cv RECIPE=demo"


def test_a_suggested_command_beside_the_makefile(repo):
    assert config.load(repo / "configs.toml", "seed").program("folds") == "python -m pneumo folds --recipe seed"
    given = config.load(repo / "configs.toml", "demo", ["runs=a b", "seed=1"])
    assert given.program("folds") == "python -m pneumo folds --recipe demo --set 'runs=a b' seed=1"


def test_a_recipe_cannot_start_from_itself(repo):
    for override, way in (("stage.2.start=seed", "previous"), ("stage.1.start=seed", "encoder")):
        with pytest.raises(UsageError, match=f'is this recipe itself; "{way}" is meant'):
            config.load(repo / "configs.toml", "seed", [override])


def test_a_command_of_another_recipe_starts_where_that_one_does(repo):
    recipe = config.load(repo / "configs.toml", "demo", ["stage.1.start=seed", "runs=elsewhere"])
    assert recipe.command("train", recipe="seed") == "make train SET=runs=elsewhere"
    assert "stage.1.start=seed" in recipe.command("train")


def test_a_recipe_is_called_as_its_table(repo, tmp_path):
    path = tmp_path / "configs.toml"
    path.write_text(
        (repo / "configs.toml").read_text() + '\n[mine]\nbase = "seed"\nname = "seed"\n[other]\nbase = "mine"\n'
    )
    for name in ("mine", "other"):
        with pytest.raises(UsageError, match=r"\[mine\] name: a recipe is called as its table is"):
            config.load(path, name)


def test_the_nearest_threshold_is_one_that_may_be(repo):
    with pytest.raises(UsageError, match=r"rule.threshold must be a multiple of 1/256, got 0.001; nearest: 0.00390625"):
        config.load(repo / "configs.toml", "seed", ["rule.threshold=0.001"])


def test_a_first_stage_may_start_from_that_of_another_recipe(repo):
    recipe = config.load(repo / "configs.toml", "demo", ["stage.1.start=seed", "runs=r"])
    assert str(recipe.start_folder(2, 1)) == "r/seed/fold2/stage1"
    assert str(recipe.start_folder(2, 2)) == "r/demo/fold2/stage1"


def test_stages_may_stand_in_any_order(repo, tmp_path):
    text = (repo / "configs.toml").read_text()
    place, end = text.index("[seed.stage.1]"), text.index("[seed.stage.2]")
    (tmp_path / "c.toml").write_text(text[:place] + text[end:] + "\n" + text[place:end])
    assert config.load(tmp_path / "c.toml", "seed") == config.load(repo / "configs.toml", "seed")


def test_of_several_overrides_the_last_one_counts_and_is_named(repo):
    assert config.load(repo / "configs.toml", "seed", ["seed=1", "seed=2"]).seed == 2
    with pytest.raises(UsageError, match=r"--set seed=-2: seed must be"):
        config.load(repo / "configs.toml", "seed", ["seed=-1", "seed=-2"])


def test_a_kept_recipe_of_another_name_than_its_folder_is_told(repo, tmp_path):
    path = tmp_path / "renamed" / "fold0" / "stage3" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(config.dumps(config.load(repo / "configs.toml", "demo")))
    with pytest.raises(
        UsageError, match=r"no recipe 'renamed'\. Say --recipe demo; the folder of its run must be called"
    ):
        config.load(path, "renamed", [f"runs={tmp_path}"])
