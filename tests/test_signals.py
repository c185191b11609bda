import os
import signal
import sys
import threading
import time

import pytest

from pneumo import start
from pneumo.signals import Interrupted, Signals


class Calls:
    """Calls back when it is no longer needed, as objects of libraries do."""

    def __init__(self, back) -> None:
        self.back = back

    def __del__(self) -> None:
        self.back()


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = {number: signal.getsignal(number) for number in start.endings()}, sys.unraisablehook
    yield
    assert before == ({number: signal.getsignal(number) for number in start.endings()}, sys.unraisablehook)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def acted_on(signals: Signals) -> None:
    """As a run that ends: nothing is to be raised again."""
    signals.number = 0


def test_a_signal_is_remembered_and_the_first_counts():
    signals = Signals()
    with signals.caught():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert signals.number == signal.SIGTERM
        acted_on(signals)


def test_one_that_nobody_acted_on_is_raised_again():
    seen = []
    old = signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    try:
        with Signals().caught():
            signal.raise_signal(signal.SIGTERM)
            assert not seen
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, old)


@pytest.mark.parametrize("number", start.endings())
def test_where_nothing_is_lost_it_ends_at_once(number):
    signals = Signals()
    with signals.caught():
        with pytest.raises(Interrupted), signals.at_once():
            signal.raise_signal(number)
        signal.raise_signal(number)  # no more within
        with pytest.raises(Interrupted), signals.at_once():
            pytest.fail("the signal came before")
        acted_on(signals)


def test_a_second_signal_leaves_the_first_ones_way_out_alone():
    signals, left = Signals(), []
    with signals.caught():
        with pytest.raises(Interrupted), signals.at_once():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)
                left.append("in order")
        acted_on(signals)
    assert left == ["in order"]


def test_one_that_comes_in_a_callback_of_the_garbage_collector_is_not_lost():
    signals = Signals()
    with signals.caught():
        began = time.monotonic()
        with pytest.raises(Interrupted), signals.at_once():
            Calls(lambda: os.kill(os.getpid(), signal.SIGTERM))
            time.sleep(10)
        assert time.monotonic() - began < 5 and signals.number == signal.SIGTERM
        acted_on(signals)


def test_one_lost_in_a_callback_just_before_the_wait_ends_is_remembered():
    signals = Signals()
    with signals.caught():
        with signals.at_once():
            Calls(lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert signals.number == signal.SIGTERM
        acted_on(signals)


def test_other_exceptions_that_python_ignores_are_reported_as_ever(monkeypatch):
    reported, signals = [], Signals()
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: reported.append(repr(lost.exc_value)))
    with signals.caught(), signals.at_once():
        Calls(lambda: 1 / 0)
    assert reported == ["ZeroDivisionError('division by zero')"]
