"""The Triton kernels for GPUs that are not there: built, never run."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from pneumo.kernels import thin_conv

# kB of shared memory that a program can have, by compute capability: CUDA C++ Programming Guide, technical
# specifications; A100, RTX 3090, RTX 4090, H100, B200, RTX 5090
SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
TURING = (7, 5)  # T4, RTX 2080 Ti


@pytest.fixture(scope="module")
def built(repo, tmp_path_factory) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """What is known of the network's kernels, built for each card."""
    if thin_conv.triton is None:
        pytest.skip("no Triton")
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(repo)}
    cards = [TURING, *SHARED]
    command = [sys.executable, repo / "tests" / "built_kernels.py", *("{}{}".format(*card) for card in cards)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    kernels = [json.loads(line) for line in ended.stdout.splitlines()]
    by_card = {card: [kernel for kernel in kernels if kernel["card"] == 10 * card[0] + card[1]] for card in cards}
    for found in by_card.values():
        assert {kernel["kernel"] for kernel in found} == {"_patches", "_patches_weight"}
    return by_card


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_a_card_can_take_the_kernels(built, capability):
    assert len(built[capability]) > 10
    for kernel in built[capability]:
        assert kernel["shared"] <= SHARED[capability] * 1024, kernel
        assert kernel["products"] and not kernel["drops_nan"], kernel


@pytest.mark.slow
def test_on_an_older_card_nothing_would_multiply_on_tensor_cores(built):
    assert not any(kernel["products"] for kernel in built[TURING])


class Half:
    is_cuda, device, dtype = True, torch.device("cuda"), torch.float16


@pytest.mark.parametrize(("capability", "taken"), [((7, 0), False), (TURING, False), ((8, 0), True), ((12, 0), True)])
def test_an_older_card_is_left_to_cudnn(monkeypatch, capability, taken):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert thin_conv.has_products(Half.device) is taken
    if not taken:
        assert not thin_conv._tried.__wrapped__(Half.device, Half.dtype)  # and without a warning


@pytest.mark.parametrize("answer", [True, False])
def test_a_compiler_asks_what_was_tried_and_takes_it_for_good(monkeypatch, answer):
    asked = []

    def tried(*given: object) -> bool:
        asked.append(torch.compiler.is_compiling())
        assert given == (Half.device, Half.dtype)
        return answer

    monkeypatch.setattr(thin_conv, "triton", object())
    monkeypatch.setattr(thin_conv, "compute_dtype", lambda _x: Half.dtype)
    monkeypatch.setattr(thin_conv, "_tried", tried)

    def choose(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if thin_conv.works(Half.device, Half.dtype) else x * 1

    torch._dynamo.reset()
    compiled = torch.compile(choose, fullgraph=True, dynamic=False, backend="eager")
    assert [compiled(torch.zeros(2)).tolist() for _ in range(2)] == [[int(answer)] * 2] * 2
    assert len(asked) == 1
    assert thin_conv.is_thin(Half, 16, 16) is answer
