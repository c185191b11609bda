"""All distributed code: one launch of one or many processes, and the identity in one process.

Started by torchrun (or with its environment variables), the processes form one group: NCCL where each has its GPU,
gloo on CPUs. They end together: the first that fails tells the others why, through the launch's key-value store. One
that is killed or hangs tells nothing, and who waits for a GPU gets no error of its own then: each watches the others.
Imports start, errors.
"""

import contextlib
import hashlib
import inspect
import json
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pneumo import start
from pneumo.errors import PeerError, Stopped, StoppedAlone, UsageError, is_gpu_full, one_line, printable

JOB = "PNEUMO_JOB"  # in the environment of a process that is to end with the one that started it: that one's number
GRACE = 3.0  # seconds in which a process may find out by itself that another failed
SLACK = timedelta(seconds=5)  # beyond the timeout; then a process hangs for those, too, that got no error of their own
ATTEMPT = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
FAILED = f"pneumo/{ATTEMPT}/failed"  # key of the store: "rank<newline>message" of the process that failed first
# in what NCCL says, where another process is the cause and not this host
_OF_A_PEER = re.compile("ncclRemoteError|closed by|reset by|refused|abort|timed? ?out", re.IGNORECASE)

_BY_TORCHRUN = "torchrun sets it; without torchrun, unset WORLD_SIZE, RANK and LOCAL_RANK."

_store: dist.Store | None = None
_watch: "_Watch | None" = None
_meetings = 0  # of all processes that this one has come to; all come to the same ones
_waits = 0  # how often the others have waited for process 0
_patient = False  # while this process waits for process 0 however long that takes
_last_words: list[Callable[[str], None]] = []


@contextmanager
def launch(timeout_seconds: float) -> Iterator[torch.device]:
    """Join the process group if there is one, and leave it at the end.

    An error within ends all processes: here it goes on as it is, in the others as a `PeerError`. The group is then
    left as it is, broken; the process has to end, best by os._exit.

    Args:
        timeout_seconds: a collective that waits longer for another process ends this one.

    Yields:
        The device of this process.

    Raises:
        UsageError: more processes than GPUs on this host, or the environment describes no launch.
        PeerError: another process failed, hangs or is gone.
    """
    global _store, _watch
    device = torch.device("cpu")
    code_hash()  # of now: the source may be edited while it runs
    if JOB in os.environ:
        _end_with_parent(int(os.environ[JOB]))
    if torch.cuda.is_available():
        local = _number("LOCAL_RANK", 0, default=0)
        device = torch.device("cuda", _gpu(local, _number("LOCAL_WORLD_SIZE", 1, default=local + 1)))
        torch.cuda.set_device(device)
    processes = _number("WORLD_SIZE", 1, default=1)
    if processes > 1 or dist.is_torchelastic_launched():
        _end_with_parent(start.parent or os.getppid())
    if processes == 1:
        yield device
        return
    _number("RANK", 0, processes - 1)
    address = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", 1, 65535)
    if not address[0]:
        raise UsageError(f"MASTER_ADDR must name the host of process 0. {_BY_TORCHRUN}")
    timeout = timedelta(seconds=timeout_seconds)
    # NCCL's own timeout aborts the process without a word, so it must not be the first
    backend, longest = ("cpu:gloo,cuda:nccl", 2 * (timeout + SLACK)) if device.type == "cuda" else ("gloo", timeout)
    try:
        with start.killable():
            dist.init_process_group(backend, timeout=longest)
            _store = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:  # gloo's own as well
        gloo = "gloo" in str(error).lower()
        hint = ". GLOO_SOCKET_IFNAME names the network's interface; no firewall may be between" if gloo else ""
        raise PeerError(
            f"the {processes} processes of the launch did not meet at {address[0]}:{address[1]}, for which they have "
            f"{longest.total_seconds():g} s ({one_line(error)[:160]}){hint}"
        ) from error
    _watch = _Watch(timeout_seconds)
    try:
        _check_gpus(gather(str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""))
        yield device
        wait_for_main()
        _watch.leave_together()
    except BaseException as error:
        if isinstance(error, Stopped) and not isinstance(error, StoppedAlone):
            try:
                _watch.leave_together()
            except RuntimeError:  # another is gone meanwhile, which changes nothing
                _watch.left.set()
            else:
                dist.destroy_process_group()
            raise
        first, _, message = _tell(error).partition("\n")
        _watch.left.set()
        if int(first) != rank() and not isinstance(error, StoppedAlone):
            raise PeerError(_follows(first)) from error
        if _from_backend(error):
            raise PeerError(message) from error
        raise
    dist.destroy_process_group()


def _gpu(local: int, here: int) -> int:
    """The number of this process's GPU among those that it sees.

    A scheduler may show each process one of its own, as by srun --gpus-per-task=1; which one is found out later.

    Args:
        local, here: its place among the processes of this host, and their number.

    Raises:
        UsageError: fewer GPUs than processes.
    """
    visible = torch.cuda.device_count()
    if here > visible > 1:
        raise UsageError(_shared(here, visible))
    return 0 if visible == 1 else local


def _check_gpus(used: Sequence[str]) -> None:
    """Refuse processes that would share a GPU.

    Args:
        used: the id of each one's; "" where it has none.

    Raises:
        UsageError: two are the same.
    """
    if used and (most := max(used.count(gpu) if gpu else 1 for gpu in used)) > 1:
        raise UsageError(_shared(most, 1))


def _shared(processes: int, gpus: int) -> str:
    return (
        f"{processes} processes on this host, but {gpus} GPU{'s are' if gpus > 1 else ' is'} visible to them; start at "
        f"most that many (GPUS= or --nproc_per_node=)"
    )


def wait_for_main() -> None:
    """Let the other processes wait here until process 0 comes, however long it had to work alone; no timeout counts."""
    global _waits, _patient
    if world() == 1:
        return
    _waits += 1
    key = _key("waited", _waits)
    if is_main():
        _store.set(key, "")
    _patient = True
    while not _store.check([key]):
        time.sleep(0.05)
    _patient = False


def agree(facts: Mapping[str, Any]) -> None:
    """Refuse a launch whose processes do not work on the same: each would compute a part of something else.

    Their code and version of torch are compared as well.

    Args:
        facts: what has to be equal, by name; plain Python.

    Raises:
        UsageError: names what differs, and the first process that has it otherwise than process 0.
    """
    if world() == 1:
        return
    facts = {**facts, "torch": str(torch.__version__), "the code of pneumo": code_hash()}
    everyone = gather({name: str(value) for name, value in facts.items()})
    for number, other in enumerate(everyone):
        names = sorted(name for name in facts | other if other.get(name) != everyone[0].get(name))
        if names:
            shown = [f"{name} ({other.get(name)!s:.40}, not {everyone[0].get(name)!s:.40})" for name in names[:4]]
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise UsageError(
                f"the processes of this launch do not work on the same: process {number} differs from process 0 in "
                f"{', '.join(shown)}{more}. Start all by the same command, with the same code, recipe and data"
            )


@cache
def code_hash() -> str:
    """A hash of this package's source, 64 hex digits: what a run was computed with, beside the versions of others."""
    found = Path(__file__).parent.rglob("*.py")
    sources = sorted(path for path in found if not path.name.startswith(".") and path.is_file())  # an editor's are none
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def reason(error: BaseException) -> str:
    """Why the run ends: what the process said that failed first, which may be another than this one."""
    return _tell(error).partition("\n")[2] if world() > 1 else str(error)


@contextmanager
def last_words(say: Callable[[str], None]) -> Iterator[None]:
    """Within, if this process has to end because another failed while it hangs, `say` is called with the reason."""
    _last_words.append(say)
    try:
        yield
    finally:
        _last_words.remove(say)


def rank() -> int:
    """This process's place in the launch, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes the launch has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(items: Sequence[Any]) -> Sequence[Any]:
    """This process's share of what all processes do together: every so manieth."""
    return items[rank() :: world()]


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def is_launched() -> bool:
    """Whether this process is one of several of a launch; asked before `launch`."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def another_says_it() -> bool:
    """Whether another process of this host prints an error that all meet outside of a launch's group: local rank 0."""
    return os.environ.get("LOCAL_RANK", "").strip("0").isdecimal()


def wrap(model: nn.Module) -> nn.Module:
    """Let the backward passes of `model` add up gradients over processes; the model itself in one process.

    Gradients come out as the mean over processes. Buffers are left alone.
    """
    if world() == 1:
        return model
    for parameter in model.parameters():
        if 1 in parameter.shape:
            parameter.register_hook(partial(_strided, parameter.stride()))
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.15 renamed it
    keep_buffers = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **keep_buffers)


def _strided(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    """The gradient with exactly these strides; where a side is 1 long, autograd lets any pass, but DDP warns of it."""
    if gradient.stride() == strides:
        return gradient
    return gradient.new_empty_strided(gradient.shape, strides).copy_(gradient)


@contextmanager
def sync_gradients(model: nn.Module, on: bool) -> Iterator[None]:
    """Within, a backward pass exchanges gradients only if `on`: once a step is enough."""
    if on or world() == 1:
        yield
    else:
        with model.no_sync():
            yield


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The elementwise sum over all processes, in place; on the tensor's device, without a host wait on CUDA."""
    if world() > 1:
        _meet()
        dist.all_reduce(tensor)
    return tensor


def gather(item: Any) -> list[Any]:
    """Every process's `item` (plain Python or CPU tensors), by rank, on every process."""
    if world() == 1:
        return [item]
    _meet()
    items: list[Any] = [None] * world()
    dist.all_gather_object(items, item)
    return items


def broadcast(item: Any) -> Any:
    """Process 0's `item` on every process."""
    if world() == 1:
        return item
    _meet()
    items = [item]
    dist.broadcast_object_list(items, src=0)
    return items[0]


def _meet() -> None:
    """Count a meeting of all processes, just before it."""
    global _meetings
    _meetings += 1


def _number(name: str, low: int, high: int = 999_999, *, default: int | None = None) -> int:
    """A number that torchrun puts into the environment.

    Raises:
        UsageError: not there and without a default, or no number from `low` to `high`.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if not re.fullmatch("[0-9]{1,6}", text or "") or not low <= int(text) <= high:
        found = "it is not set" if text is None else f"got {one_line(repr(text))}"
        raise UsageError(f"{name} must be a number from {low} to {high}, {found}. {_BY_TORCHRUN}")
    return int(text)


def _end_with_parent(parent: int) -> None:
    """End this process soon after its launcher died, or at once: an orphan must not go on writing."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _tell(error: BaseException) -> str:
    """Tell the others why this process ends, unless one told before; return "rank<newline>message" of the first."""
    try:
        if _store.check([FAILED]):
            return _store.get(FAILED).decode()
        text = _blame(error) if _from_backend(error) else printable(str(error)) or type(error).__name__
        return _store.compare_set(FAILED, "", f"{rank()}\n{text}").decode()
    except dist.DistError:  # process 0 kept the store
        return "0\nprocess 0 ended"


def _blame(error: BaseException) -> str:
    """What broke the group, or which processes: those that are gone, or do not notice that it is broken."""
    nccl = "NCCL" in str(error)
    if nccl and not _OF_A_PEER.search(str(error)):
        return (
            f"the GPUs of the launch cannot exchange data: {one_line(error)[-250:]} (NCCL_DEBUG=INFO tells more; a "
            f"container needs shared memory for it, as by docker run --ipc=host)"
        )
    silent = _watch.gone()
    if not silent and not nccl:
        alive = [_key("alive", number) for number in range(world())]
        _store.set(alive[rank()], "")
        time.sleep(1.0)  # the others wait in the same collective, so they notice at the same time
        silent = [number for number, key in enumerate(alive) if not _store.check([key])]
    return _hangs(silent, _watch.timeout) if "timed out" in str(error).lower() else _was_killed(silent)


def _was_killed(which: list[int]) -> str:
    return f"{_processes(which)} ended without a message: it was killed, perhaps for lack of host memory"


def _hangs(which: list[int], seconds: float) -> str:
    who = _processes(which)
    return f"{who} did not answer for {seconds:g} s (train.timeout_seconds): it hangs, or was suspended"


def _processes(which: list[int]) -> str:
    return f"process {', '.join(map(str, which))} of {world()}" if which else "another process"


def _from_backend(error: BaseException) -> bool:
    """Whether gloo, NCCL or the store raised it, and not for lack of this GPU's memory."""
    if is_gpu_full(error):
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))
    )


def _follows(first: str) -> str:
    return f"process {rank()} ends because process {first} of {world()} did; its message, if it left one, has the cause"


class _Watch:
    """A thread that ends this process soon after another failed, is gone or hangs, whatever this one is doing.

    Gone is known of processes of this host, by their numbers. One hangs that has come to fewer meetings than this
    one, which has waited for longer than the timeout.

    Args:
        timeout: seconds that a process may take to come to a meeting.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.left = threading.Event()
        self._neighbours: dict[int, list[Any]] = {}
        self._seen, self._since = -1, 0.0  # meetings of this process, and since when they are as many
        self._rounds = 0  # that the watch has made; it waits for the store
        self._host = _host()
        _store.set(_key("place", rank()), json.dumps([self._host, os.getpid(), _started(os.getpid())]))
        threading.Thread(target=self._run, daemon=True).start()
        threading.Thread(target=self._look_after_store, daemon=True).start()

    def leave_together(self) -> None:
        """Wait for all, so that nobody leaves while another still talks, and look after them no longer."""
        _store.set(_key("leaves", rank()), "")
        dist.barrier()
        self.left.set()

    def gone(self) -> list[int]:
        """Processes of this host that have ended, but not in the end that all came to."""
        for number in range(world()):
            if number not in self._neighbours and _store.check([_key("place", number)]):
                self._neighbours[number] = json.loads(_store.get(_key("place", number)))
        return [
            number
            for number, (host, process, started) in list(self._neighbours.items())
            if number != rank()
            and host == self._host
            and _has_ended(process, started)
            and not _store.check([_key("leaves", number)])
        ]

    def _late(self) -> list[int]:
        """Processes that this one has waited for, for too long."""
        now, met = time.monotonic(), _meetings
        if met != self._seen or _patient:
            _store.set(_key("met", rank()), str(met))
            self._seen, self._since = met, now
        if now - self._since <= self.timeout + SLACK.total_seconds():
            return []
        keys = [_key("met", number) for number in range(world())]
        return [number for number, key in enumerate(keys) if not _store.check([key]) or int(_store.get(key)) < met]

    def _trouble(self) -> str:
        """What is wrong with the others; "" if nothing is."""
        if gone := self.gone():
            return _was_killed(gone)
        late = self._late()
        return _hangs(late, self.timeout) if late else ""

    def _run(self) -> None:
        while not self.left.wait(0.5):
            self._rounds += 1
            first, message = "0", "process 0 ended"  # it keeps the store
            with contextlib.suppress(dist.DistError):
                if not _store.check([FAILED]):
                    if not (trouble := self._trouble()):
                        continue
                    _store.compare_set(FAILED, "", f"{rank()}\n{trouble}")
                first, _, message = _store.get(FAILED).decode().partition("\n")
            if self.left.wait(GRACE):
                return
            self._end(message, message if int(first) == rank() else _follows(first))

    def _look_after_store(self) -> None:
        """End this process where the store no longer answers: process 0, which keeps it, is suspended or cut off."""
        seen, silent = 0, 0.0  # seconds of this process, which may have been suspended itself
        while not self.left.wait(0.5):
            silent = silent + 0.5 if self._rounds == seen else 0.0
            seen = self._rounds
            if silent > self.timeout + SLACK.total_seconds():
                message = _hangs([0], self.timeout)
                self._end(message, message)

    def _end(self, message: str, line: str) -> None:
        for say in _last_words:
            with contextlib.suppress(Exception):
                say(message)
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(PeerError.exit_code)


def _key(what: str, number: int) -> str:
    return f"pneumo/{ATTEMPT}/{what}/{number}"


def _host() -> str:
    """Names the machine, as long as it runs, and within it the container, whose processes have numbers of their own.

    Where the kernel does not tell, each process is taken to be on a machine of its own.
    """
    try:
        boot, container = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
        if os.readlink("/proc/self") == str(os.getpid()):  # else /proc shows the processes of a container outside
            return f"{boot} {container}"
    except OSError:
        pass
    return uuid.uuid4().hex


def _has_ended(process: int, started: str | None) -> bool:
    """Whether a process of this host is gone, or only its number is there; no where it cannot be known."""
    try:
        return _started(process) != started
    except OSError:
        return False


def _started(process: int) -> str | None:
    """When a process of this host started, in the kernel's ticks; None if it has ended."""
    try:
        state, *numbers = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else numbers[18]
