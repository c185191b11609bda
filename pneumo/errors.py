"""What a user can do wrong or a machine can run out of; each error knows the program's exit code.

Every message is one line: what, where, why, and what to do. Each class takes that one string, so that an error keeps
its text when it crosses a thread or process. Imports nothing from pneumo.
"""

import re
import unicodedata

import torch

# as a full GPU reads where it is not PyTorch's allocator that asks: in the driver, cuDNN and cuBLAS, Triton and NCCL
_GPU_FULL = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|CU(DNN|BLAS)_STATUS_ALLOC_FAILED|\[CUDA\]: out of memory|"
    r"Cuda failure.*out of memory",
    re.DOTALL,
)


def printable(text: str) -> str:
    """Text as one line that a terminal can show: what would steer it, or is no character, stands as its escape."""
    return "".join(ascii(sign)[1:-1] if _steers(sign) else sign for sign in text)


def _steers(sign: str) -> bool:
    """Whether it is a control or format character or half a surrogate; joiners and tabs are let through."""
    return unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp") and sign not in "\t\u200c\u200d"


def one_line(text: object) -> str:
    """What strangers' files put into a message, on one line and without words that no screen would hold."""
    words = printable(" ".join(str(text).split()))
    return re.sub(r"\S{100,}", lambda word: f"{word[0][:97]}...", words)


def is_gpu_full(error: BaseException) -> bool:
    """Whether it says that a GPU is out of memory, whoever asked for some."""
    full = isinstance(error, RuntimeError) and _GPU_FULL.search(str(error)) is not None
    return full or isinstance(error, torch.OutOfMemoryError)


class PneumoError(ValueError):
    """Base of all errors that a command prints as one line, without a traceback."""

    exit_code = 1


class UsageError(PneumoError):
    """A command line or recipe that cannot be meant."""

    exit_code = 2


class DataError(PneumoError):
    """An image, annotation, fold file or checkpoint that cannot be trusted."""

    exit_code = 3


class NoRadiographError(DataError):
    """A good file of a study that is no radiograph, as a report."""


class NotFiniteError(PneumoError):
    """A loss, weight or probability that is not a number."""

    exit_code = 4


class WriteError(PneumoError):
    """A file that could not be written; what was there before is intact."""

    exit_code = 5


class NoSpaceError(WriteError):
    """A file for which the disk has no room."""


class FolderGoneError(WriteError):
    """A run folder that was removed or replaced while a run held it."""


class OutOfMemory(PneumoError):
    """The device or the host ran out of memory."""

    exit_code = 6


class PeerError(PneumoError):
    """Another process of the launch ended, or does not answer."""

    exit_code = 7


class Stopped(PneumoError):
    """A signal ended the run after a checkpoint, all processes together; the exit code is 128 plus its number."""

    exit_code = 143


class StoppedAlone(Stopped):
    """A signal ended this process where it could not wait for the others; they end because it did."""
