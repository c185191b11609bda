"""What all commands share: options for the recipe, and how an error reads and ends.

Imports config, errors, log.
"""

import argparse
import ctypes
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pneumo import config
from pneumo.config import Recipe
from pneumo.errors import OutOfMemory, PneumoError, UsageError

CONFIGS = Path(__file__).resolve().parents[1] / "configs.toml"


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add --recipe, --config, --set and --debug."""
    parser.add_argument("--recipe", default="seed", metavar="NAME", help="table of configs.toml (default: seed)")
    parser.add_argument("--config", type=Path, default=None, metavar="FILE", help="another file of recipes")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        nargs="+",
        metavar="KEY=VALUE",
        help="override, as stage.2.lr=1e-4",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def load_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe that the options name."""
    local = Path("configs.toml")
    path = options.config or (local if local.exists() else CONFIGS)
    return config.load(path, options.recipe, [item for group in options.set for item in group])


def run(
    command: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a command; print an error as one line and return its exit code.

    Exit codes: 0 done, 2 usage or recipe, 3 data, 4 not finite, 5 cannot write, 6 out of memory, 130 or 143 stopped.
    """
    options = parser.parse_args(argv)
    keep_freed_memory()
    try:
        command(options)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        return _complain(
            OutOfMemory(
                f"the GPU is out of memory ({str(error).splitlines()[0][:120]}). Lower stage.N.batch_size and raise "
                f"stage.N.accumulation by the same factor, lower stage.N.image_size, or use --set train.amp=bf16"
            ),
            options.debug,
        )
    except PneumoError as error:
        return _complain(error, options.debug)
    except OSError as error:
        return _complain(UsageError(f"{error.filename or ''}: {error.strerror or error}"), options.debug)


def keep_freed_memory() -> None:
    """Let the process keep what it frees: large tensors would else be given back and mapped in anew in every step.

    On a CPU that mapping takes up to half of the time of an augmentation.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block


def _complain(error: PneumoError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    if os.environ.get("RANK") is not None:
        sys.stderr.flush()
    return error.exit_code
