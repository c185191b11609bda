"""Callables that live in a process of their own, as a rival does where it is used. Imports nothing from pneumo.

What our program does to its process, as keeping the memory that it frees, would else be done for the rival as well; and
what one row leaves in a process would change the next.
"""

import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Elsewhere:
    """A process that holds one callable, and calls it when asked to; a new process for each callable.

    Use as a context manager.

    Args:
        preload: modules that all processes have imported before they start.
    """

    def __init__(self, *preload: str) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self._process: multiprocessing.Process | None = None

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()

    def make(self, make: Callable[..., Callable[[], Any]], *given: Any) -> Callable[[], None]:
        """Let a new process call `make` with what is given, and keep what that returns; the process before it ends.

        Args:
            make: of the top level of a module.

        Returns:
            Calls what was made, there, and waits for its end.
        """
        self.__exit__()
        self._pipe, other = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self._ask((make, given))
        return lambda: self._ask(None)

    def _ask(self, work: Any) -> None:
        self._pipe.send(work)
        if error := self._pipe.recv():
            raise RuntimeError(f"in the rival's process: {error}")


def _serve(pipe: Connection) -> None:
    warnings.filterwarnings("ignore")
    call: Callable[[], Any] | None = None
    while True:
        work = pipe.recv()
        try:
            if work is None:
                call()
            else:
                call = work[0](*work[1])
            pipe.send("")
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
