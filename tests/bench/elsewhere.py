"""Callables that live in a process of their own, as a rival does where it is used. Imports nothing from pneumo.

What our program does to its process, as keeping the memory that it frees, would else be done for the rival as well.
"""

import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Elsewhere:
    """A process that holds one callable at a time, and calls it when asked to.

    Use as a context manager; the process starts with the first callable.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()

    def make(self, make: Callable[..., Callable[[], Any]], *given: Any) -> Callable[[], None]:
        """Let the process call `make` with what is given, and keep what that returns instead of what it had.

        Args:
            make: of the top level of a module.

        Returns:
            Calls what was made, there, and waits for its end.
        """
        if self._process.pid is None:
            self._process.start()
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
                call = None  # its memory first
                call = work[0](*work[1])
            pipe.send("")
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
