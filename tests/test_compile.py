"""Compilation as a GPU run does it, with a compiler that only counts: what would cost minutes there is counted here."""

import pytest
import torch
import two_processes

from pneumo import engine
from pneumo.engine import RunningStatistics
from pneumo.model.folded import FoldedUNet
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
def test_each_shape_is_compiled_once_over_epochs_and_stages(compiled):
    """Full and last micro-batches, training and validation, two epochs; then the next fold's stage of equal shapes."""
    shapes, backend = compiled
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for fold in range(2):
        torch.manual_seed(fold)
        model = UNet("resnet18", decoder_channels=(8, 8, 8, 4, 4))
        running, folded = RunningStatistics(model), FoldedUNet(model, torch.float32)
        optimizer = engine.Adam(model.parameters(), lr=1e-3)
        engine.compiled(model, backend)
        engine.compiled(folded, backend)
        for _epoch in range(2):
            for size in (3, 3, 2):
                batch = (torch.rand(size, 1, 64, 64), torch.zeros(size, 1, 64, 64))
                engine.train_step(
                    model, [batch], optimizer, scaler, running, two_processes.LOSS, torch.float32, count=1
                )
            folded.fill(model)
            with torch.inference_mode():
                for size in (4, 4, 1):
                    engine.predict_logits(folded, torch.zeros(size, 1, 64, 64, dtype=torch.uint8), torch.float32)
        seen = list(shapes)
        assert [shape[0] for shape in seen] == [3, 2, 4, 1], f"after fold {fold}: {seen}"


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


@torch._dynamo.config.patch(recompile_limit=8)  # as it is at first, and is again afterwards
def test_as_many_shapes_are_compiled_as_all_folds_have(compiled):
    shapes, backend = compiled
    for _stage in range(2):
        network = engine.compiled(Smaller(), backend)
        double = engine.compiled(lambda image: image * 2, backend)
        for size in range(1, 13):
            image = torch.zeros(size, 1, 8, 8)
            with torch.inference_mode():
                double(network(image))
    assert [shape[0] for shape in shapes] == [size for size in range(1, 13) for _ in range(2)]
