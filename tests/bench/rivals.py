"""What people would use instead, written as they would write it. Imports nothing from pneumo.

Needs the extra `bench`.
"""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for its newest version

import albumentations
import cc3d
import cv2
import kornia.augmentation
import numpy as np
import segmentation_models_pytorch
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

PACKAGES = (
    "segmentation-models-pytorch",
    "albumentations",
    "kornia",
    "connected-components-3d",
    "opencv-python-headless",
    "pycocotools",
    "scikit-image",
)


def smp_unet(device: torch.device, *, channels_last: bool = False) -> nn.Module:
    """segmentation_models.pytorch's Unet over a ResNet34, random weights, as the report used it."""
    model = segmentation_models_pytorch.Unet("resnet34", encoder_weights=None, in_channels=3, classes=1)
    return model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def smp_step(image: Tensor, mask: Tensor, dtype: torch.dtype, channels_last: bool) -> Callable[[], None]:
    """A training step of a new network with stage 1's loss and Adam.

    Args:
        image: (B, 3, S, S) float32, normalized, on the device.
        mask: (B, 1, S, S) float32.
        dtype: autocast type; float32 means none, and no TF32.
        channels_last: that memory format, and compiled on a GPU.
    """
    model = smp_unet(image.device, channels_last=channels_last)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
        if image.is_cuda:
            model.compile(dynamic=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)

    def step() -> None:
        torch.backends.cudnn.allow_tf32 = dtype != torch.float32
        with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(image)
        bce = F.binary_cross_entropy_with_logits(logits.float(), mask, reduction="none")
        probs = logits.float().sigmoid()
        dice = (2 * (probs * mask).sum() + 1) / (probs.sum() + mask.sum() + 1)
        loss = 10 * ((1 - (-bce).exp()) ** 2 * bce).mean() - dice.log()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.backends.cudnn.allow_tf32 = True

    return step


def smp_predict(image: Tensor, count: int) -> Callable[[], np.ndarray]:
    """The mean of `count` networks and mirror images, float32: (B, 3, S, S) to (B, S, S) on the host."""
    models = [smp_unet(image.device).eval() for _ in range(count)]

    def predict() -> np.ndarray:
        torch.backends.cudnn.allow_tf32 = False
        with torch.inference_mode():
            total = sum(model(image).sigmoid() + model(image.flip(-1)).sigmoid().flip(-1) for model in models)
        torch.backends.cudnn.allow_tf32 = True
        return (total / (2 * count))[:, 0].cpu().numpy()

    return predict


def albumentations_recipe(side: int) -> albumentations.Compose:
    """The recipe's augmentation in albumentations 2, whose names changed since the report."""
    border = {"border_mode": cv2.BORDER_REFLECT_101}
    return albumentations.Compose(
        [
            albumentations.HorizontalFlip(p=0.5),
            albumentations.OneOf(
                [
                    albumentations.RandomBrightnessContrast(brightness_limit=0, contrast_limit=0.2, p=1),
                    albumentations.RandomGamma(gamma_limit=(80, 120), p=1),
                    albumentations.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0, p=1),
                ],
                p=0.3,
            ),
            albumentations.OneOf(
                [
                    albumentations.ElasticTransform(alpha=120, sigma=6, p=1, **border),
                    albumentations.GridDistortion(num_steps=5, distort_limit=0.3, p=1, **border),
                    albumentations.OpticalDistortion(distort_limit=0.3, p=1, **border),
                ],
                p=0.3,
            ),
            albumentations.Affine(
                scale=(0.9, 1.1), translate_percent=(-0.0625, 0.0625), rotate=(-45, 45), p=0.5, **border
            ),
        ]
    )


def albumentations_batch(
    transform: albumentations.Compose, images: np.ndarray, masks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Augment (B, S, S) uint8 images and masks one after the other, to float32 in [0, 1]."""
    done = [transform(image=image, mask=mask) for image, mask in zip(images, masks, strict=True)]
    return np.stack([item["image"] for item in done]) / np.float32(255), np.stack([item["mask"] for item in done])


def kornia_recipe(side: int) -> nn.Module:
    """The recipe's augmentation in kornia; a perspective stands for grid and lens, which it cannot do to masks."""
    k = kornia.augmentation
    return k.AugmentationSequential(
        k.RandomHorizontalFlip(p=0.5),
        k.RandomContrast((0.8, 1.2), p=0.1),
        k.RandomGamma((0.8, 1.2), p=0.1),
        k.RandomBrightness((0.8, 1.2), p=0.1),
        k.RandomElasticTransform((49, 49), (6.0, 6.0), (240 / side, 240 / side), padding_mode="reflection", p=0.1),
        k.RandomPerspective(0.3, p=0.2),
        k.RandomAffine(45.0, (0.0625, 0.0625), (0.9, 1.1), padding_mode="reflection", p=0.5),
        data_keys=["input", "mask"],
    )


def kornia_batch(transform: nn.Module, images: Tensor, masks: Tensor) -> list[Tensor]:
    """Augment (B, 1, S, S) uint8 images and masks, to float32 in [0, 1]."""
    return transform(images.float() / 255, masks.float())


class PngDataset(Dataset):
    """Pairs of PNG files, decoded when asked for."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = (self.folder / "image" / f"{index}.png", self.folder / "mask" / f"{index}.png")
        image, mask = (torch.from_numpy(np.array(Image.open(path)))[None] for path in pair)
        return image, (mask > 0).to(torch.uint8)


def png_loader(folder: Path, count: int, batch_size: int) -> DataLoader:
    """A shuffling loader with 2 worker processes, which live on from epoch to epoch."""
    dataset = PngDataset(folder, count)
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=2, persistent_workers=True)


def post_process(probability: np.ndarray, threshold: float, min_size: int) -> np.ndarray:
    """The report's filter: threshold, label, and look for each component in the whole image."""
    mask = cv2.threshold(probability, threshold, 1, cv2.THRESH_BINARY)[1]
    count, labels = cv2.connectedComponents(mask.astype(np.uint8))
    kept = np.zeros(mask.shape, np.float32)
    for number in range(1, count):
        component = labels == number
        if component.sum() > min_size:
            kept[component] = 1
    return kept


def run_length_encode(mask: np.ndarray) -> str:
    """The encoder in NumPy that the challenge's public solutions share; the organisers' own reads pixel by pixel."""
    pixels = mask.T.flatten()
    starts = np.where(pixels[1:] > pixels[:-1])[0] + 1
    ends = np.where(pixels[:-1] > pixels[1:])[0] + 1
    numbers = []
    for i in range(len(starts)):
        numbers.extend([starts[i] - (ends[i - 1] if i else 0), ends[i] - starts[i]])
    return " ".join([str(number) for number in numbers]) or "-1"


def dust(mask: np.ndarray, min_size: int) -> np.ndarray:
    """connected-components-3d's filter: the 8-connected components of more than `min_size` pixels."""
    return cc3d.dust(mask, threshold=min_size + 1, connectivity=8)


def coco_decode(code: str, height: int, width: int) -> np.ndarray:
    """The challenge's code to (H, W) uint8 by pycocotools, whose runs are counts of both colours in turn."""
    counts = list(map(int, code.split()))
    counts.append(height * width - sum(counts))
    return coco.decode(coco.frPyObjects({"size": [height, width], "counts": counts}, height, width))


def coco_encode(mask: np.ndarray) -> dict:
    """(H, W) bool to pycocotools' own code."""
    return coco.encode(np.asfortranarray(mask.view(np.uint8)))
