"""Fixtures shared by all tests."""

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: subprocesses of the tests inherit it
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

# before Triton is imported: without a GPU its kernels run in Python, on the CPU
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import pytest
import small_run
from fault_table import (  # noqa: F401 - fixtures and hooks
    figure,
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_makereport,
)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in the background deaf to it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and so does nohup

WITH_GPUS = dict(os.environ)  # for those commands that are to see them

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def commands_on_cpu() -> Iterator[None]:
    """The commands that tests start see no GPU unless a test says otherwise: on a CPU two can share what there is.

    This process, in which the tests marked gpu compute, keeps it. Not done on import: pytest-xdist's first process
    imports this file as well, and the others would inherit it.
    """
    if not torch.cuda.is_available():
        yield
        return
    from torch._inductor import config

    config.compile_threads = 1  # in this process alone: the compiler's helpers would not see the card
    torch.cuda.init()
    torch.cuda.device_count()  # kept from now on
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="session")
def repo() -> Path:
    """The folder that holds train.py, predict.py and configs.toml."""
    return REPO


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of `small_run`, in a folder with a blank and an umlaut in its name; not to be changed."""
    folder = tmp_path_factory.mktemp("dät a")
    small_run.write_data(folder)
    return folder


@pytest.fixture(scope="session")
def siim() -> Path:
    """Real X-rays of the challenge, which may not be passed on: present on some machines only."""
    folder = REPO.parent / "shared" / "data" / "siim"
    if not folder.is_dir():
        pytest.skip(f"no real X-rays at {folder}")
    return folder


@pytest.fixture
def with_gpus() -> dict[str, str]:
    """The environment of a command that computes on a GPU where there is one."""
    return dict(WITH_GPUS)


@pytest.fixture
def waiting_refused() -> Callable[[], AbstractContextManager[None]]:
    """Within what it gives, whatever makes the host wait for a GPU raises an error."""

    @contextmanager
    def refused() -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the mode is said to be a prototype
                torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return refused


@pytest.fixture
def locked_refused(monkeypatch):
    """Folders called "locked" cannot be listed, as where the user may not; root, who may run the tests, always may."""
    real = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
