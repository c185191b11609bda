import io

import pytest

from pneumo import log


class Clock:
    """Time that passes by a step at each look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock(20.0)
    monkeypatch.setattr(log, "time", clock)
    return clock


def test_without_a_terminal_there_is_a_line_a_minute(clock, capsys):
    assert list(log.bar(range(9), title="predict")) == list(range(9))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "predict: 3 of 9 in 01:00, 02:00 left",
        "predict: 6 of 9 in 02:00, 01:00 left",
        "predict: 9 of 9 in 03:00, 00:00 left",
    ]


def test_what_was_there_counts_as_done_but_not_as_work(clock, capsys):
    bar = log.bar(total=30, title="fold 0\nstage 1", start=20)
    bar.set_postfix(loss="0.5", refresh=False)
    for _ in range(3):
        bar.update(2)
    bar.close()
    assert capsys.readouterr().err == "fold 0\\nstage 1: 26 of 30 in 01:00, 00:40 left, loss=0.5\n"


def test_what_takes_less_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(log, "time", Clock(1.0))
    assert list(log.bar(iter("abc"), title="predict")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_other_processes_are_silent(clock, capsys, monkeypatch):
    monkeypatch.setattr(log.dist, "is_main", lambda: False)
    assert list(log.bar(range(9), title="predict")) == list(range(9))
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(log.sys, "stderr", terminal)
    assert list(log.bar(range(3), title="predict")) == [0, 1, 2]
    assert "predict:   0%|" in terminal.getvalue()


def test_only_the_first_process_says_and_warns(capsys, monkeypatch):
    log.say("one")
    log.warn("two")
    monkeypatch.setattr(log.dist, "is_main", lambda: False)
    log.say("three")
    log.warn("four")
    assert capsys.readouterr() == ("one\n", "warning: two\n")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"state": 1}', '{"state": "done", "epoch": 2}', '{"state": "done", "epoch": "2", "epochs": 2}'],
)
def test_a_damaged_status_counts_as_missing(tmp_path, capsys, text):
    (tmp_path / "status.json").write_text(text)
    assert log.read_status(tmp_path) == {"state": "missing"}
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {tmp_path}/status.json is damaged: ") and "counts as missing; training" in said
