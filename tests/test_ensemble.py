import pytest
import torch
from torch import nn

from pneumo import ensemble
from pneumo.ensemble import Ensemble
from pneumo.errors import UsageError


class LeftRight(nn.Module):
    """Logits that depend on the side: what a mirror image is for."""

    def __init__(self, left: float) -> None:
        super().__init__()
        self.left = left

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = image * 4 - 2
        logits[..., : image.shape[-1] // 2] += self.left
        return logits


def made(*models: nn.Module, mirror: bool) -> Ensemble:
    return Ensemble(models, 8, {}, torch.float32, mirror, "data", "split")


def image() -> torch.Tensor:
    return torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_probabilities_are_averaged_over_folds():
    one, two = LeftRight(0.0), LeftRight(3.0)
    alone = [ensemble.predict(made(model, mirror=False), image()) for model in (one, two)]
    torch.testing.assert_close(ensemble.predict(made(one, two, mirror=False), image()), sum(alone) / 2)
    torch.testing.assert_close(alone[0], (image() / 255 * 4 - 2).sigmoid())


def test_the_mirror_image_is_mirrored_back():
    plain = made(LeftRight(3.0), mirror=False)
    wanted = (ensemble.predict(plain, image()) + ensemble.predict(plain, image().flip(-1)).flip(-1)) / 2
    torch.testing.assert_close(ensemble.predict(made(LeftRight(3.0), mirror=True), image()), wanted)
    assert not torch.allclose(ensemble.predict(plain, image()), wanted)


def test_folds_are_parsed():
    assert ensemble.parse_folds("all", 3) == [0, 1, 2]
    assert ensemble.parse_folds("2, 0", 3) == [2, 0]
    for text in ("3", "a", "", "0,0", "-1", "0,,1"):
        with pytest.raises(UsageError, match="--folds"):
            ensemble.parse_folds(text, 3)
