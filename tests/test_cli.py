import argparse
import subprocess
import sys

import pytest

from pneumo import cli, log
from pneumo.errors import DataError, one_line, printable

CHURN = """
import resource, sys
import torch
from pneumo.cli import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(10):
    if step == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24).sum()  # 64 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
def test_freed_memory_is_used_again(repo):
    def faults(what: str) -> int:
        done = subprocess.run([sys.executable, "-c", CHURN, what], capture_output=True, text=True, check=True, cwd=repo)
        return int(done.stdout)

    assert faults("keep") < 1000 < faults("return")  # 64 MB are 16,384 pages


def test_what_is_shown_cannot_move_the_cursor(capsys, monkeypatch):
    assert one_line("a\x1b[2J\n b\tü\udcff") == r"a\x1b[2J b ü\udcff"
    for text in ("胸部X線　左.png", "a\xa0b", "u\u0308", "👨\u200d👩\u200d👧", "नमस्ते क्\u200dष", "naïve ❤️ \U0001fae9"):
        assert printable(text) == text
    log.say("a\x1b[2J\nb\u202e")
    log.warn("\udcff\x07.png")
    out, err = capsys.readouterr()
    assert (out, err) == ("a\\x1b[2J\nb\\u202e\n", "warning: \\udcff\\x07.png\n")

    def command(_options: argparse.Namespace) -> None:
        raise DataError("\x1b]0;title\x07.png: no image")

    parser = argparse.ArgumentParser()
    cli.add_recipe_options(parser)
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    assert cli.run(command, parser, []) == 3
    assert capsys.readouterr().err == "error: \\x1b]0;title\\x07.png: no image\n"
