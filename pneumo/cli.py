"""What all commands share: options for the recipe, and how an error reads and ends.

Imports config, checkpoint, dist, start, errors.
"""

import argparse
import contextlib
import ctypes
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from pneumo import checkpoint, config, dist, start
from pneumo.config import Recipe
from pneumo.errors import OutOfMemory, PneumoError, Stopped, UsageError, is_gpu_full, one_line, printable

BUG = 1
_NOTHING_FITS = "unable to find an engine"  # cuDNN has tried all of its ways; what each lacked, mostly memory, is lost
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
        help="overrides, as stage.2.lr=1e-4; put files before it",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse wants its types."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def words(options: argparse.Namespace) -> list[str]:
    """The options of `add_recipe_options` as words of a command line."""
    return [
        f"--recipe={options.recipe}",
        *([f"--config={options.config}"] if options.config else []),
        *(f"--set={item}" for group in options.set for item in group),
        *(["--debug"] if options.debug else []),
    ]


def load_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe that the options name."""
    local = Path("configs.toml")
    path = options.config or (local if local.exists() else CONFIGS)
    recipe = config.load(path, options.recipe, [item for group in options.set for item in group])
    object.__setattr__(recipe, "file", str(options.config or ""))
    return recipe


def run(
    command: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a command; print an error as one line and return its exit code.

    Exit codes: 0 done, 1 an error of this program, 2 usage or recipe, 3 data, 4 not finite, 5 cannot write, 6 out of
    memory, 7 another process of the launch failed, 129, 130 or 143 stopped by a signal.
    """
    options = parser.parse_args(argv)
    with start.interruptible():
        return _run(command, options)


def _run(command: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    keep_freed_memory()
    try:
        command(options)
        sys.stdout.flush()  # here, where an error has its line
        return 0
    except KeyboardInterrupt:
        message, code = "interrupted", start.INTERRUPTED
    except Exception as error:
        known = _known(error)
        if options.debug:
            traceback.print_exc()
        if known is None:
            message, code = _bug(error, options), BUG
        else:
            message, code = str(known), known.exit_code
            if isinstance(known, (UsageError, Stopped)) and dist.world() == 1 and dist.another_says_it():
                message = ""
            elif not isinstance(known, Stopped):
                message = f"error: {message}"
    with contextlib.suppress(OSError):  # the code tells it as well
        if message:
            print(printable(message), file=sys.stderr, flush=True)
        sys.stdout.flush()
    if dist.world() > 1:  # the group is broken; leaving it in an orderly way could wait for who is gone
        os._exit(code)
    return code


def _known(error: Exception) -> PneumoError | None:
    """The error in our words; None for one that nobody foresaw."""
    text = one_line(error)
    if os.strerror(errno.EMFILE) in text:  # also of an image that could not be opened; ENFILE's begins so
        return UsageError(f"{text[:160]}: allow more, as by ulimit -n 4096 in this shell, or close other programs")
    if isinstance(error, PneumoError):
        return error
    nothing_fits = isinstance(error, RuntimeError) and _NOTHING_FITS in text
    if nothing_fits or is_gpu_full(error):
        return OutOfMemory(
            f"the GPU is {'probably ' if nothing_fits else ''}out of memory ({text[:120]}). Lower stage.N.batch_size "
            f"and raise stage.N.accumulation by the same factor (set predict.batch_size, as to 1, if it happened in "
            f"validation or prediction), lower stage.N.image_size, or use --set train.amp=bf16"
        )
    if (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)  # as of mmap and fork
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text)
    ):
        return OutOfMemory(
            f"the host is out of memory ({text[:160] or 'MemoryError'}). Lower stage.N.batch_size and raise "
            f"stage.N.accumulation by the same factor (set predict.batch_size, as to 1, if it happened in validation "
            f"or prediction), lower stage.N.image_size, or start fewer processes (GPUS=)"
        )
    if isinstance(error, OSError):
        if _came_of_writing(error):
            return checkpoint.refusal(error.filename or "a file", error)
        if error.filename is not None:  # else it is nothing that the user named
            return UsageError(f"{error.filename}: {error.strerror or error}")
    return None


def _came_of_writing(error: OSError) -> bool:
    """Whether the system refused to write a file or to make it, and not to read it."""
    path = error.filename
    if not isinstance(error, PermissionError) or not isinstance(path, str):
        return error.errno in (errno.EROFS, *checkpoint.NO_SPACE)
    new = not os.path.lexists(path) and os.access(os.path.dirname(path) or ".", os.X_OK)  # to read, it is just missing
    return new or os.access(path, os.R_OK)


def keep_freed_memory() -> None:
    """Let the process keep what it frees: large tensors would else be given back and mapped in anew in every step.

    On a CPU that mapping takes up to half of the time of an augmentation.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block


def _bug(error: Exception, options: argparse.Namespace) -> str:
    """Keep the traceback of an error that nobody foresaw in error.log of the run folder, else of this one."""
    folder = Path()
    with contextlib.suppress(Exception):
        folder = load_recipe(options).folder
    path = (folder if folder.is_dir() else Path()) / "error.log"
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}: {' '.join(sys.argv)}\n")
            traceback.print_exception(error, file=file)
        where = f"the traceback is in {path}"
    except OSError:
        where = "--debug shows the traceback"
    text = one_line(error)[:300]
    return f"error: {type(error).__name__}: {text} (an error of this program; {where})"
