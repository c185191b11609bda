"""Train one stage of one fold: `python train.py --recipe seed --fold 0 --stage 1`, or the same under torchrun.

Started again with the same command, it goes on from where it was.
"""

from pneumo import start

if __name__ == "__main__":
    start.prepare()

import argparse
import sys

from pneumo import cli, dataset, dist, training
from pneumo.errors import UsageError
from pneumo.model import unet


def main(options: argparse.Namespace) -> None:
    """Train the stage that the options name."""
    recipe = cli.load_recipe(options)
    if options.fold not in range(recipe.folds.count):
        raise UsageError(f"--fold {options.fold}: the recipe has folds 0 to {recipe.folds.count - 1}")
    if options.stage not in range(1, recipe.stages + 1):
        raise UsageError(f"--stage {options.stage}: the recipe has stages 1 to {recipe.stages}")
    if options.stage not in recipe.own_stages:
        origin = recipe.stage[recipe.own_stages[0]].start
        raise UsageError(
            f"--stage {options.stage}: {recipe.name} trains from stage {recipe.own_stages[0]} on, which starts from "
            f"{origin}; nothing would use this one"
        )
    unet.check_encoder(recipe.model.encoder)
    with dist.launch(recipe.train.timeout_seconds) as device:
        training.train_stage(recipe, dataset.load(recipe), options.fold, options.stage, device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fold", type=int, default=0, help="held-out fold (default: 0)")
    parser.add_argument("--stage", type=int, default=1, help="training stage (default: 1)")
    cli.add_recipe_options(parser)
    sys.exit(cli.run(main, parser))
