"""What comes before a command's long imports: Ctrl-C ends it in one line, and what it prints may have no reader.

To each of these Python itself answers with a traceback. Imports nothing from pneumo.
"""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

INTERRUPTED = 130
parent = 0  # the process that started this one, asked before it can have ended; 0 if `prepare` was not called
GONE = (errno.EPIPE, errno.ESHUTDOWN, errno.ECONNRESET, errno.EIO, errno.EBADF)  # reader, or terminal


def prepare() -> None:
    """Let Ctrl-C and the loss of a reader do no harm; call this before torch is imported, which takes seconds."""
    global parent
    parent = os.getppid()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is meant to be ignored
        signal.signal(signal.SIGINT, _end)
    while (place := os.open(os.devnull, os.O_RDWR)) <= 2:  # one was closed; the next file would have taken its place
        os.set_inheritable(place, True)
    os.close(place)
    for number, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, _stream(number, getattr(sys, name)))


def endings() -> list[signal.Signals]:
    """The signals that ask a command to end; that of a closed terminal only where it is not ignored, as by nohup.

    SIGUSR1 is what schedulers are mostly told to send before a job's time is up.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *([] if ignored else [signal.SIGHUP])]


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Within, Ctrl-C is a KeyboardInterrupt again: the imports are done."""
    return _answered_by(signal.default_int_handler, signal.getsignal(signal.SIGINT) is _end)


def killable() -> contextlib.AbstractContextManager[None]:
    """Within, Ctrl-C ends the process at once, without a word: for C code that waits where Python cannot answer."""
    in_main = threading.current_thread() is threading.main_thread()
    answered = signal.getsignal(signal.SIGINT) not in (None, signal.SIG_IGN, signal.SIG_DFL)
    return _answered_by(signal.SIG_DFL, in_main and answered)


@contextlib.contextmanager
def _answered_by(handler: Any, wanted: bool) -> Iterator[None]:
    old = signal.getsignal(signal.SIGINT)
    if wanted:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        if wanted:
            signal.signal(signal.SIGINT, old)


def _end(_number: int, _frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _stream(number: int, before: Any) -> io.TextIOWrapper:
    """Standard output or error as it was, but for what cannot be written; `before` is None where it was closed."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(number, "w", closefd=False)),
        encoding="utf-8" if before is None else before.encoding,
        errors="backslashreplace",
        line_buffering=before is not None and (before.line_buffering or before.write_through),  # or unbuffered
    )


class _Output(io.FileIO):
    """Standard output or error: once nobody reads it, what is written is lost, and that is no error."""

    def write(self, data: Any) -> int | None:
        """Write to the descriptor.

        Raises:
            OSError: anything but a reader that is gone, as a full disk; once, so that the error's line is the last.
        """
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if error.errno in GONE:
                return memoryview(data).nbytes
            error.filename = "standard output" if self.fileno() == 1 else "standard error"
            raise
