import argparse
import errno
import json
import subprocess
import sys

import pytest
import torch

from pneumo import cli, config, log
from pneumo.errors import DataError, one_line, printable

CHURN = """
import resource, sys
import torch
from pneumo.cli import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
faults = []
for step in range(15):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24).sum()  # 64 MB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[7])  # the median: a small block may take the front of a hole, and the heap grows once more
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
    log.say("a\x1b[2J", "b\u202e\nERROR forged.png")
    log.warn("\udcff\x07\nerror: forged.png")
    out, err = capsys.readouterr()
    assert (out, err) == (
        "a\\x1b[2J\nb\\u202e\\nERROR forged.png\n",
        "warning: \\udcff\\x07\\nerror: forged.png\n",
    )

    def command(_options: argparse.Namespace) -> None:
        raise DataError("\x1b]0;title\x07\nerror: forged\r.png: no image")

    parser = argparse.ArgumentParser()
    cli.add_recipe_options(parser)
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    assert cli.run(command, parser, []) == 3
    assert capsys.readouterr().err == "error: \\x1b]0;title\\x07\\nerror: forged\\r.png: no image\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.EROFS, "Read-only file system", "x"), 5, "Cannot write x: Read-only file system. Allow writing"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), 5, "Cannot write x: Disk quota exceeded. Free space"),
        (PermissionError(errno.EACCES, "Permission denied", "new"), 5, "Cannot write new: Permission denied. Allow"),
        (PermissionError(errno.EACCES, "Permission denied", "no/x"), 2, "no/x: Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "x: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), 5, "Cannot write a file: No space left on device. Free"),
        (
            OSError(errno.EMFILE, "Too many open files"),
            2,
            "[Errno 24] Too many open files: allow more, as by ulimit -n",
        ),
        (
            RuntimeError("Too many open files in system"),
            2,
            "Too many open files in system: allow more, as by ulimit -n",
        ),
        (
            DataError("a.png: cannot be read: Too many open files"),
            2,
            "a.png: cannot be read: Too many open files: allow",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 6, "the host is out of memory ([Errno 12] Cannot allocate"),
        (MemoryError(), 6, "the host is out of memory (MemoryError). Lower stage.N.batch_size"),
        (RuntimeError("x.cpp:117: DefaultCPUAllocator: can't allocate memory"), 6, "the host is out of memory (x.cpp"),
        (PermissionError(errno.EPERM, "Operation not permitted"), 1, "PermissionError: [Errno 1] Operation not perm"),
    ],
)
def test_what_the_system_refuses_has_its_own_code(capsys, monkeypatch, tmp_path, error, code, words):
    def command(_options: argparse.Namespace) -> None:
        raise error

    parser = argparse.ArgumentParser()
    cli.add_recipe_options(parser)
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert cli.run(command, parser, []) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "NCCL error in: x.cpp:94\nncclUnhandledCudaError: Call to CUDA failed.\nCuda failure 2 'out of memory'",
    ],
)
def test_a_full_gpu_is_out_of_memory_whoever_asked(text):
    for error in (RuntimeError(text), torch.AcceleratorError(text)):
        known = cli._known(error)
        assert (
            known.exit_code == 6 and str(known).startswith("the GPU is out of memory (") and "batch_size" in str(known)
        )
    assert cli._known(torch.AcceleratorError("CUDA error: an illegal memory access was encountered")) is None


def test_where_cudnn_finds_nothing_memory_is_probably_short():
    known = cli._known(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert known.exit_code == 6 and str(known).startswith("the GPU is probably out of memory (GET was unable")


def test_json_for_others_has_no_infinity():
    value = {"a": [1.5, float("inf"), (float("nan"),)], "b": {"c": -float("inf"), "d": None, "e": "NaN"}}
    assert json.loads(log.dumps(value)) == {"a": [1.5, None, [None]], "b": {"c": None, "d": None, "e": "NaN"}}


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_recipe_options(parser)
    return parser.parse_args(words)


def test_recipes_are_those_of_the_working_directory_if_it_has_any(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.load_recipe(parsed()) == config.load(repo / "configs.toml", "seed")
    text = (repo / "configs.toml").read_text()
    (tmp_path / "configs.toml").write_text(f"{text}\n[mine]\nbase = 'seed'\nseed = 7\n")
    (tmp_path / "other.toml").write_text(f"{text}\n[mine]\nbase = 'seed'\nseed = 8\n")
    assert cli.load_recipe(parsed("--recipe", "mine")).seed == 7
    assert cli.load_recipe(parsed("--recipe", "mine", "--config", "other.toml")).seed == 8


def test_options_as_words_are_the_same_options(tmp_path):
    given = parsed("--recipe", "demo", "--set", "a=1", "b=c d", "--debug", "--config", "f.toml", "--set", "e=2")
    again = parsed(*cli.words(given))
    assert [item for group in again.set for item in group] == ["a=1", "b=c d", "e=2"]
    assert (again.recipe, again.config, again.debug) == (given.recipe, given.config, True)
    assert cli.words(parsed()) == ["--recipe=seed"]


def test_a_number_of_jobs_is_at_least_one():
    assert cli.positive("2") == 2
    for text in ("0", "-1", "x"):
        with pytest.raises(ValueError):
            cli.positive(text)
