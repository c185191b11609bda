import json
from contextlib import contextmanager

import pytest
import small_run
import torch

from pneumo import checkpoint, engine, measured
from pneumo.errors import WriteError
from pneumo.model.folded import FoldedUNet
from pneumo.model.unet import UNet


def refuse():
    raise AssertionError("measured twice")


def test_the_first_answer_stays(tmp_path):
    assert measured.once(tmp_path, "a card, a shape", lambda: True) is True
    assert measured.once(tmp_path, "another card", lambda: [1, 2]) == [1, 2]
    assert measured.once(tmp_path, "a card, a shape", refuse) is True
    assert json.loads((tmp_path / measured.FILE).read_text()) == {"a card, a shape": True, "another card": [1, 2]}


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"[]"])
def test_a_damaged_file_is_measured_anew(tmp_path, damage):
    (tmp_path / measured.FILE).write_bytes(damage)
    assert measured.once(tmp_path, "a card", lambda: 3) == 3
    assert measured.once(tmp_path, "a card", refuse) == 3


def test_what_fails_is_not_kept(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        measured.once(tmp_path, "a card", lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    assert measured.once(tmp_path, "a card", lambda: 4) == 4


def test_where_nothing_can_be_written_it_is_measured_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for answer in (1, False):
        assert measured.once(tmp_path / "file" / "runs", "a card", lambda answer=answer: answer) is answer

    def full(*_given):
        raise WriteError("no space")

    measured.once(tmp_path, "a card", lambda: 2)
    monkeypatch.setattr(checkpoint, "write_atomic", full)
    calls = iter([False])  # measured once, though it cannot be kept
    assert measured.once(tmp_path, "another card", lambda: next(calls)) is False
    monkeypatch.setattr(checkpoint, "wait_lock", full)
    assert measured.once(tmp_path, "a card", refuse) == 2  # what is known is only read


@pytest.fixture
def network() -> FoldedUNet:
    return FoldedUNet(UNet("test_resnet", decoder_channels=(8, 8, 8, 4, 4)), torch.float32)


@pytest.mark.parametrize(
    ("memory", "grid", "batch"),
    [
        *((0, 0, 1), (999, 0, 1), (1000, 0, 1), (2500, 0, 2), (4000, 0, 4), (15_999, 0, 8), (16_000, 0, 16)),
        *((10**9, 0, 16), (15_999, 10, 4), (2500, 1000, 1)),
    ],
)
def test_a_batch_fits_into_memory(monkeypatch, network, memory, grid, batch):
    """A pass takes 1,000 bytes an image of this card, above what was there before, and 24 a pixel of the grid."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 700)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 1700)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: None)
    assert engine.fitting_batch(network, 64, grid, torch.float32, torch.device("cpu"), memory) == batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_less_memory_takes_fewer_images(network):
    device = torch.device("cuda")
    many, few = (
        engine.fitting_batch(network.to(device), 256, 64, torch.float32, device, room) for room in (1 << 32, 1)
    )
    assert (many, few) == (engine.LARGEST, 1)


def test_a_cpu_takes_eight_images_unless_told_otherwise(repo, data, tmp_path):
    cpu = torch.device("cpu")
    for settings, batch in (((), 8), (("predict.batch_size=3",), 3)):
        recipe = small_run.recipe(repo, data, tmp_path, *settings)
        assert measured.evaluation_batch(recipe, None, 64, torch.float32, cpu) == batch
    assert not (tmp_path / measured.FILE).exists()


def test_a_gpu_is_asked_once(repo, data, tmp_path, monkeypatch):
    gpu, asked = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a card")
    monkeypatch.setattr(engine, "fitting_batch", lambda *given: asked.append(given[-1] >> 30) or 4)
    for reserve, side, size in ((24, 64, 11), (24, 64, 11), (2, 64, 11), (2, 128, 11), (2, 128, 11), (24, 64, 8)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, size=size: ((size - 1) << 30, size << 30))
        recipe = small_run.recipe(repo, data, tmp_path, f"train.gpu_reserve_gb={reserve}")
        assert measured.evaluation_batch(recipe, None, side, torch.float32, gpu) == 4
    assert asked == [5, 1, 1, 3]  # half of what is free, or half of what images leave free; each card for itself


def test_which_blocks_are_merged(repo, data, tmp_path, monkeypatch):
    """As the recipe says, or on a CPU by the rule, asked with each block's shape in this stage's micro-batches."""
    cpu, asked = torch.device("cpu"), []
    model = UNet("test_resnet", decoder_channels=(8, 8, 8, 4, 4))
    monkeypatch.setattr(measured, "is_faster", lambda x, *more: asked.append((x, *more)) or x[-1] > 8)
    found = {}
    for how in ("merged", "plain", "auto"):
        recipe = small_run.recipe(repo, data, tmp_path, f"model.upsample={how}", "stage.2.image_size=128")
        found[how] = measured.merged_blocks(recipe, 2, model, torch.float32, cpu)
    assert found == {"merged": [True] * 5, "plain": [False] * 5, "auto": [False, False, True, True, True]}
    assert asked == [(*shape, cpu, torch.float32) for shape in model.block_shapes(3, 128)]


def test_what_another_run_measured_meanwhile_is_taken(tmp_path, monkeypatch):
    @contextmanager
    def waits(*_given):
        (tmp_path / measured.FILE).write_text('{"a card": 5, "another": 6}')
        yield

    monkeypatch.setattr(checkpoint, "wait_lock", waits)
    assert measured.once(tmp_path, "a card", refuse) == 5
    assert measured.once(tmp_path, "a third", lambda: 7) == 7
    assert json.loads((tmp_path / measured.FILE).read_text())["another"] == 6
