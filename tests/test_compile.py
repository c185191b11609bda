"""Compilation as a GPU run does it, with a compiler that only counts: what would cost minutes there is counted here."""

import pytest
import torch
import two_processes

from pneumo import engine
from pneumo.engine import RunningStatistics
from pneumo.model.unet import UNet


@pytest.fixture
def compiled():
    """Shapes of the image of every graph that was compiled, and the compiler."""
    shapes: list[tuple[int, ...]] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        tensors = [given for given in inputs if isinstance(given, torch.Tensor)]  # a size, where it may vary
        shapes.append(tuple(next(tensor.shape for tensor in tensors if tensor.dim() == 4 and tensor.shape[1] == 1)))
        return graph.forward

    torch._dynamo.reset()
    yield shapes, count
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_full_micro_batch_is_compiled_once_over_epochs_and_stages(compiled):
    """Full and last micro-batches, two epochs; then the next fold's stage of equal shapes."""
    shapes, backend = compiled
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for fold in range(2):
        torch.manual_seed(fold)
        model = UNet("resnet18", decoder_channels=(8, 8, 8, 4, 4))
        running = RunningStatistics(model)
        optimizer = engine.Adam(model.parameters(), lr=1e-3)
        engine.compiled(model, 3, backend)
        for _epoch in range(2):
            for size in (2, 3, 3, 2):
                batch = (torch.rand(size, 1, 64, 64), torch.zeros(size, 1, 64, 64))
                engine.train_step(
                    model, [batch], optimizer, scaler, running, two_processes.LOSS, torch.float32, count=1
                )
        assert [shape[0] for shape in shapes] == [3], f"after fold {fold}: {shapes}"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_only_a_full_batch_goes_the_compiled_way(compiled, size):
    shapes, backend = compiled
    network, image = engine.compiled(Smaller(), 2, backend), torch.rand(size, 1, 9, 9)
    scaled = engine.compiled(lambda image, factor, *, more: image * factor + more, 2, backend)
    assert torch.equal(scaled(network(image), 2.0, more=1.0), Smaller()(image) * 2 + 1)
    assert len(shapes) == (2 if size == 2 else 0)


def test_what_cannot_be_compiled_is_tried_once_and_said(monkeypatch):
    cpu, calls = torch.device("cpu"), []

    def broken(*_given, **_more):
        calls.append(1)
        raise RuntimeError("no\ncompiler")

    engine.compiler_trouble.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_more: function)
    assert engine.compiler_trouble(cpu) == ""
    monkeypatch.setattr(torch, "compile", broken)
    assert engine.compiler_trouble(cpu) == "" and not calls
    engine.compiler_trouble.cache_clear()
    assert {engine.compiler_trouble(cpu) for _ in range(3)} == {"RuntimeError: no compiler"} and len(calls) == 1
    engine.compiler_trouble.cache_clear()
    monkeypatch.setattr(torch, "compile", full)
    with pytest.raises(torch.OutOfMemoryError):
        engine.compiler_trouble(cpu)
    engine.compiler_trouble.cache_clear()


def full(*_given, **_more):
    raise torch.OutOfMemoryError("on a card")


class Smaller(torch.nn.Module):  # torch 2.11 does not compile a layer of its own
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(image, 3)
