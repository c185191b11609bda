"""The small commands: `python -m pneumo recipe|verify|pack|folds|cv|oof|tune|score|check-submission|phantom|report`.

Each imports what it needs of all rooms; networks and the compiler behind them, which take seconds, only where needed.
"""

from pneumo import start

if __name__ == "__main__":
    start.prepare()

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pneumo import __version__, checkpoint, cli, config, dataset, dist, log
from pneumo.config import Recipe
from pneumo.data.problems import Problem, counted, listed, raise_fatal, some
from pneumo.errors import DataError, UsageError


def recipe(options: argparse.Namespace) -> None:
    """Print the recipe as it is with its base and all overrides; --config reads it again."""
    print(config.dumps(cli.load_recipe(options)))


def verify(options: argparse.Namespace) -> None:
    """Read every image and annotation once; list every problem by file and row."""
    from pneumo.data import cases
    from pneumo.data import folds as splits

    recipe = cli.load_recipe(options)
    data, root = recipe.data, Path(recipe.data.root)
    found, problems = dataset.find_cases(recipe)
    if (root / data.test).is_dir():
        test, _, more = cases.load_test(root, test=data.test, sample=data.sample, allow_missing=data.allow_missing)
        problems += more
    else:
        test = []
        if root.is_dir():
            log.say(f"{root / data.test}: no such folder; only training images are verified")
    # of images whose annotation is bad the pixels are looked at as well: all problems in one go
    bad = {problem.image_id for problem in problems if problem.fatal}
    suspects = [cases.Case(image_id, path, ()) for image_id, path in cases.find_images(root / data.train)[0].items()]
    more, thumbnails = cases.verify([*found, *test, *(case for case in suspects if case.image_id in bad)])
    known = thumbnails[: len(found) + len(test)]
    problems += more + splits.seen_in_training(found, test, known, recipe.folds.duplicate_correlation)
    report = recipe.folder / "data_report.csv"
    for line in listed(problems, report):
        log.say(line)
    positive, errors = sum(case.positive for case in found), sum(problem.fatal for problem in problems)
    log.say(
        f"{counted(len(found), 'training image', 'training images')}, {positive} with pneumothorax, "
        f"{counted(len(test), 'test image', 'test images')}; {counted(errors, 'error', 'errors')}, "
        f"{counted(len(problems) - errors, 'note', 'notes')}; all are in {report}"
    )
    if warning := cases.one_sided(found):
        log.warn(warning)
    raise_fatal(problems, report)


def pack(options: argparse.Namespace) -> None:
    """Decode the training and test images for every stage, and check what was packed before."""
    recipe = cli.load_recipe(options)
    found = dataset.load_cases(recipe)
    sides = {recipe.stage[1].image_size, *(recipe.stage[number].image_size for number in recipe.own_stages)}
    for side in sorted(sides):
        packed = dataset.open_pack(recipe, "train", found, side, check=True)
        log.say(f"train, {side} px: {len(packed.image_ids)} images packed and checked, digest {packed.digest[:12]}")
    if (Path(recipe.data.root) / recipe.data.test).is_dir():
        test, _ = dataset.load_test_cases(recipe)
        side = recipe.stage[recipe.stages].image_size
        packed = dataset.open_pack(recipe, "test", test, side, check=True)
        log.say(f"test, {side} px: {len(packed.image_ids)} images packed and checked, digest {packed.digest[:12]}")


def folds(options: argparse.Namespace) -> None:
    """Split the training images and write folds.csv with its audit."""
    recipe = cli.load_recipe(options)
    path = recipe.folder / "folds.csv"
    has_images = (Path(recipe.data.root) / recipe.data.train).is_dir()
    found = dataset.load_cases(recipe, need_images=has_images)
    packed = dataset.open_pack(recipe, "train", found, recipe.stage[1].image_size) if has_images else None
    if path.exists() and not options.force:
        text = dataset.audit(recipe, found, dataset.read_folds(recipe, found), packed)
        log.say(f"{path} is there and fits the data; --force splits anew", *text.splitlines())
    else:
        before = path.read_bytes() if path.exists() else None
        dataset.split(recipe, found, packed)
        trained = {file.parent for file in recipe.folder.glob("fold*/stage*/*.pt")}
        if trained and path.read_bytes() != before:
            log.warn(
                f"{counted(len(trained), 'stage was', 'stages were')} trained on another split and cannot go on: "
                f"{some(map(str, sorted(trained)))}. To train anew, delete them"
            )


def cv(options: argparse.Namespace) -> None:
    """Train all folds and stages that are not done yet, then predict each fold's held-out images."""
    from pneumo import ensemble, jobs, training
    from pneumo import oof as oofs
    from pneumo.model import unet

    recipe = cli.load_recipe(options)
    unet.check_encoder(recipe.model.encoder)
    chosen = ensemble.parse_folds(options.folds, recipe.folds.count)
    if options.jobs > 1:
        if dist.is_launched():
            raise UsageError("--jobs starts processes of its own: run it without torchrun (make cv JOBS=5, no GPUS=)")
        data = dataset.load(recipe)  # split and packed once, before the folds ask for it
        for fold in chosen:
            dataset.check_fold(recipe, data, fold)
        jobs.run_folds(chosen, options.jobs, lambda fold: jobs.python("cv", "--folds", str(fold), *cli.words(options)))
        return
    with dist.launch(recipe.train.timeout_seconds) as device:
        data = dataset.load(recipe)
        for fold in chosen:  # before the first is trained
            dataset.check_fold(recipe, data, fold)
        for fold in chosen:
            for stage in recipe.own_stages:
                training.train_stage(recipe, data, fold, stage, device)
        oofs.write(recipe, data, device, folds=chosen)


def oof(options: argparse.Namespace) -> None:
    """Predict the held-out images of every finished fold, and keep what rules are chosen from."""
    from pneumo import oof as oofs

    recipe = cli.load_recipe(options)
    with dist.launch(recipe.train.timeout_seconds) as device:
        oofs.write(recipe, dataset.load(recipe), device, maps=options.maps)


def tune(options: argparse.Namespace) -> None:
    """Score every rule on the out-of-fold predictions, cross-fitted, and write the best as rule.toml."""
    from pneumo import oof as oofs
    from pneumo import tuning

    recipe = cli.load_recipe(options)
    oofs.check_predicted(recipe)  # before anything is packed or split for nothing
    tuning.run(recipe, dataset.load(recipe))


def score(options: argparse.Namespace) -> None:
    """Score a submission against the truth; needs no images."""
    from pneumo.score import score_files

    recipe = cli.load_recipe(options)
    truth = options.truth or Path(recipe.data.root) / "test-truth.csv"
    if options.truth is None and (options.submission is not None or not truth.is_file()):
        raise UsageError("name both files: score SUBMISSION TRUTH, or make score SUBMISSION=a.csv TRUTH=b.csv")
    result = score_files(
        options.submission or recipe.folder / "submission.csv",
        truth,
        annotation_size=recipe.data.annotation_size,
        unmasked=recipe.data.unmasked,
        patients=options.patients,
        draws=recipe.tune.draws,
        seed=recipe.seed,
    )
    if options.json:
        print(log.dumps(result))
        return

    def shown(name: str) -> str:
        if result[name] is None:
            return "-"
        ends = result[f"{name}_interval"]
        return f"{result[name]:.4f}" + ("" if ends is None else f" ({ends[0]:.4f} to {ends[1]:.4f})")

    print(
        f"{result['cases']} cases, {result['positives']} positive; 95 % intervals\n"
        f"mean Dice            {shown('dice')}; all masks empty: {result['all_empty']:.4f}\n"
        f"Dice on positives    {shown('dice_positive')}\n"
        f"true-negative rate   {shown('specificity')}\n"
        f"sensitivity          {shown('sensitivity')}"
    )


def check_submission(options: argparse.Namespace) -> None:
    """Check a submission's rows, ids and codes, and print what it says."""
    from pneumo import submission
    from pneumo.data import cases

    recipe = cli.load_recipe(options)
    data, root = recipe.data, Path(recipe.data.root)
    path = options.submission or recipe.folder / "submission.csv"
    problems: list[Problem] = []
    sample, sample_ids = options.sample, None
    if sample is None and root.is_dir():
        sample = cases.find_sample(root, data.sample, problems)
    if sample is not None:
        sample_ids, more = cases.read_sample(sample)
        problems += more
    checked = submission.check(path, sample_ids, data.annotation_size)
    problems += checked.problems
    for problem in problems:
        log.say(f"{'ERROR' if problem.fatal else 'note '} {problem.message}")
    what = submission.summary(checked.codes, data.annotation_size) if checked.codes else "no row is good"
    counts = f"{counted(checked.rows, 'row', 'rows')}, {counted(checked.ids, 'id', 'ids')}"
    log.say(f"{path}: {counts}; {what}")
    if sample_ids is None:
        log.say("no sample submission: ids were not compared")
    else:
        log.say(f"{sample}: {counted(len(sample_ids), 'id', 'ids')}")
    empty = _empty(options.truth, recipe)
    log.say("no annotations" if empty is None else f"all masks empty: Dice {empty[0]:.4f} on {empty[1]}")
    origin = path.with_suffix(".json")
    if origin.is_file() and path.is_file():
        try:
            made = log.read_json(origin)
            same = made.get("sha256") == checkpoint.sha256(path)
            match made.get("folds"):
                case [int(used), int(count)]:
                    what = f"what made it, networks of {used} of {count} folds"
                case _:  # of an earlier version
                    what = "what made it"
            log.say(f"{origin}: {what if same else 'tells of another file, which this one has replaced'}")
        except DataError as error:
            log.say(f"note  {error}, so what made the submission is not known; make submit writes both anew")
    raise_fatal(problems, None)


def _empty(truth: Path | None, recipe: Recipe) -> tuple[float, str] | None:
    """Mean Dice of empty masks on the given or the training annotations, and which these are; None without any.

    Raises:
        DataError: the given ones are not there or wrong.
    """
    from pneumo.data import cases

    data, root = recipe.data, Path(recipe.data.root)
    if truth is None and not root.is_dir():
        return None
    if truth is not None:
        runs_of, problems = cases.read_annotations(truth, data.annotation_size)
        raise_fatal(problems, None)
        positive = [len(runs) > 0 for runs in runs_of.values()]
    else:
        lenient = replace(recipe, data=replace(data, allow_missing=True))
        found, problems = dataset.find_cases(lenient, need_images=data.unmasked == "empty")
        positive = [case.positive for case in found]
    image = "image" if truth else "training image"
    if not positive or any(problem.fatal for problem in problems):
        return None
    return 1 - sum(positive) / len(positive), f"{counted(len(positive), image, f'{image}s')} of {truth or root}"


def phantom(options: argparse.Namespace) -> None:
    """Write synthetic X-rays with annotations into the recipe's data folder."""
    from pneumo.data import phantom as phantoms

    recipe = cli.load_recipe(options)
    root, asked = Path(recipe.data.root), recipe.phantom
    settings = {
        "train": asked.train,
        "test": asked.test,
        "side": asked.side,
        "annotation_size": recipe.data.annotation_size,
        "positive_fraction": asked.positive_fraction,
        "seed": recipe.seed,
    }
    if root.exists() and any(root.iterdir()):
        mark = root / phantoms.MARK_FILE
        if not mark.exists():
            raise DataError(
                f"{root} holds something that is no synthetic data; choose another with --set data.root=DIR"
            )
        if (there := (mark.read_text().splitlines() or [""])[-1]) != (wanted := phantoms.made_with(**settings)):
            raise DataError(
                f"{root} holds synthetic data of other settings ({there}; now {wanted}). Delete it, or choose another "
                f"with --set data.root=DIR"
            )
        log.say(f"{root}: there already")
        return
    phantoms.write(root, **settings)
    log.say(f"{root}: {asked.train} training and {asked.test} test images, all SYNTHETIC")


def report(options: argparse.Namespace) -> None:
    """Write report.html and the recipe's figures, with their numbers as CSV."""
    from pneumo import report as reports

    recipe = cli.load_recipe(options)
    beside = [cli.load_recipe(argparse.Namespace(**{**vars(options), "recipe": name})) for name in options.beside]
    reports.write(recipe, beside)


COMMANDS = (recipe, verify, pack, folds, cv, oof, tune, score, check_submission, phantom, report)


def _name(command: Callable) -> str:
    return command.__name__.replace("_", "-")


def main() -> int:
    """Read the command line and run one command."""
    parser = argparse.ArgumentParser(
        prog="python -m pneumo",
        description="The small commands; train.py trains one stage of one fold, predict.py predicts and submits.",
    )
    parser.add_argument("--version", action="version", version=f"pneumo {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(map(_name, COMMANDS)))
    for command in COMMANDS:
        subparser = subparsers.add_parser(_name(command), help=command.__doc__, description=command.__doc__)
        subparser.set_defaults(run=command)
        cli.add_recipe_options(subparser)
        if command is folds:
            subparser.add_argument("--force", action="store_true", help="split anew though folds.csv is there")
        if command is cv:
            subparser.add_argument("--folds", default="all", help="all (default), or some as 0,1")
            subparser.add_argument("--jobs", type=cli.positive, default=1, help="folds side by side, a GPU each")
        if command is oof:
            subparser.add_argument("--maps", action="store_true", help="keep each case's probabilities as a PNG, too")
        if command is report:
            subparser.add_argument(
                "--beside", nargs="+", default=[], metavar="RECIPE", help="recipes to score in the same table"
            )
        if command is score:
            subparser.add_argument("submission", type=Path, nargs="?", help="CSV file (default: the recipe's)")
            subparser.add_argument(
                "truth",
                type=Path,
                nargs="?",
                help="CSV file of annotations, or folder of mask pictures (default: synthetic data's)",
            )
            subparser.add_argument("--patients", type=Path, help="CSV file: ImageId,patient_id, for the intervals")
            subparser.add_argument("--json", action="store_true", help="print one JSON object")
        if command is check_submission:
            subparser.add_argument("submission", type=Path, nargs="?", help="CSV file (default: the recipe's)")
            subparser.add_argument("--sample", type=Path, help="CSV file of ids (default: the data folder's)")
            subparser.add_argument(
                "--truth",
                type=Path,
                help="CSV file of annotations, or folder of mask pictures (default: the data folder's)",
            )
    return cli.run(lambda options: options.run(options), parser)


if __name__ == "__main__":
    sys.exit(main())
