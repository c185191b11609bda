"""Predict with all folds of a recipe's last stage.

`python predict.py --recipe seed` writes <runs>/<recipe>/submission.csv for the test images of the data folder;
`python predict.py scans/ a.dcm --out masks/` writes a mask, an overlay and a line of predictions.jsonl for each file.
The same command goes on where an interrupted one was.
"""

from pneumo import start

if __name__ == "__main__":
    start.prepare()

import argparse
import sys
from pathlib import Path

from pneumo import cli, dist, ensemble, given, inference, tuning
from pneumo.errors import UsageError


def main(options: argparse.Namespace) -> None:
    """Predict what the options name."""
    recipe = cli.load_recipe(options)
    folds = ensemble.parse_folds(options.folds, recipe.folds.count)
    if options.files and options.out is None:
        raise UsageError("say where the masks of the given files go: --out DIR")
    if options.probs and not options.files:
        raise UsageError("--probs is for given files, and no file is given")
    if options.out is not None and not options.files:
        raise UsageError("--out is for the masks of given files, and no file is given")
    with dist.launch(recipe.train.timeout_seconds) as device:
        models = ensemble.load(recipe, folds, device)
        ruling = tuning.ruling_for(recipe, models, options.rule)
        if options.files:
            files = given.find(options.files, options.out, probs=options.probs)
            given.predict(recipe, models, ruling, files, options.out, device, probs=options.probs)
        else:
            inference.predict_test(recipe, models, ruling, device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", nargs="*", type=Path, help="X-rays (PNG, JPEG, DICOM) or folders; none: the data's test images"
    )
    parser.add_argument("--out", type=Path, help="folder for the masks of given files")
    parser.add_argument("--probs", action="store_true", help="write each file's probabilities as well, as a grey PNG")
    parser.add_argument("--folds", default="all", help="all (default), or some as 0,1")
    parser.add_argument(
        "--rule", default="auto", help="auto (default): the tuned rule.toml if there is one | recipe | a rule file"
    )
    cli.add_recipe_options(parser)
    sys.exit(cli.run(main, parser))
