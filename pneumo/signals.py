"""Signals that ask a run to end, remembered until it can. Imports start."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pneumo import start

AGAIN = 0.1  # seconds until what was lost in a callback is raised once more


class Interrupted(BaseException):
    """A signal came where the run may end at once; no handler of what it calls is to take it for an error."""


class Signals:
    """Remembers the first signal that asks a run to end; the step in hand is finished first, whatever comes after it.

    Attributes:
        number: of that signal; 0 if none came.
    """

    number = 0
    _waited_for = _raised = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within, signals are remembered; one that nobody has acted on at the end is raised again."""
        self.number = 0
        self._raised = False

        def remember(number: int, _frame: object) -> None:
            self.number = self.number or number
            if self._waited_for and not self._raised:
                self._raised = True
                raise Interrupted

        old = {number: signal.signal(number, remember) for number in start.endings()}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        if self.number:  # it came after the run had looked for the last time
            signal.raise_signal(self.number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, where a run may wait for long and has nothing to lose, a signal raises `Interrupted`.

        A signal that comes while the garbage collector calls back is raised there, where Python ignores it; so it comes
        once more.
        """
        elsewhere, main, timers = sys.unraisablehook, threading.get_ident(), []

        def ignored(lost: Any) -> None:
            if not isinstance(lost.exc_value, Interrupted):
                return elsewhere(lost)
            self._raised = False
            timers.append(threading.Timer(AGAIN, signal.pthread_kill, (main, self.number)))
            timers[-1].start()
            return None

        sys.unraisablehook = ignored
        self._waited_for = True
        try:
            if self.number:
                raise Interrupted
            yield
        finally:
            self._waited_for = False
            for timer in timers:
                timer.join()  # its signal finds the handler that it is meant for
            sys.unraisablehook = elsewhere
