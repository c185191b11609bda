"""Signals that ask a run to end, remembered until it can. Imports start."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pneumo import start


class Interrupted(BaseException):
    """A signal came where the run may end at once; no handler of what it calls is to take it for an error."""


class Signals:
    """Remembers the first signal that asks a run to end; the step in hand is finished first, whatever comes after it.

    Attributes:
        number: of that signal; 0 if none came.
    """

    number = 0
    _waited_for = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within, signals are remembered; one that nobody has acted on at the end is raised again."""
        self.number = 0

        def remember(number: int, _frame: object) -> None:
            first, self.number = not self.number, self.number or number
            if first and self._waited_for:
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
        """Within, where a run may wait for long and has nothing to lose, a signal raises `Interrupted`."""
        self._waited_for = True
        try:
            if self.number:
                raise Interrupted
            yield
        finally:
            self._waited_for = False
