"""The rows of the benchmark: each group prepares its inputs and yields what is compared on them.

Imports config, data, decision, model, engine, ensemble, training, kernels.
"""

import copy
import csv
import gzip
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import maps
import numpy as np
import torch
from bench import rivals
from bench.elsewhere import Elsewhere
from bench.harness import Row, wait
from PIL import Image
from scipy import ndimage
from torch import Tensor

from pneumo import config, engine, ensemble, training
from pneumo.data import pack as packs
from pneumo.data import phantom, rle
from pneumo.data.cases import Case
from pneumo.data.feed import Feed, cut
from pneumo.data.pack import Pack
from pneumo.decision import tune
from pneumo.decision.rule import Rule, decide, decide_batch, quantise
from pneumo.engine import LossSettings, RunningStatistics
from pneumo.ensemble import Ensemble
from pneumo.kernels.runs import mask_to_runs
from pneumo.kernels.upconv import is_faster
from pneumo.model import augment, losses
from pneumo.model.folded import FoldedUNet
from pneumo.model.unet import UNet

REPO = Path(__file__).resolve().parents[2]
SIIM = REPO.parent / "shared" / "data" / "siim"  # real X-rays, on some machines
REPORT = Rule(threshold=0.5, min_area=3500)
LOSS = LossSettings("focal_dice", 10.0, 2.0, 1.0)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
HALF, WHOLE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Setup:
    """Where and how much: `size` is "full", "quick", or "smoke", which only shows that all of it runs."""

    device: torch.device
    size: str
    folder: Path
    elsewhere: Elsewhere

    def pick(self, full: Any, quick: Any, smoke: Any) -> Any:
        """What the size asks for."""
        return {"full": full, "quick": quick, "smoke": smoke}[self.size]

    def rival(self, make: Callable[..., Callable[[], Any]], *given: Any) -> Callable[[], Any]:
        """A rival's networks: on a CPU in a process of their own, one at a time; a GPU's memory is managed alike."""
        return make(*given) if self.device.type == "cuda" else self.elsewhere.make(make, *given)


@contextmanager
def one_thread() -> Iterator[None]:
    """Everything on one core."""
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    yield
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


def x_rays(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, S, S) uint8 synthetic X-rays and (N, S, S) bool masks, of which half have pixels; 8 different ones."""
    drawn = [_x_ray(i, side) for i in range(min(count, 8))]
    which = np.arange(count) % len(drawn)
    return np.stack([np.uint8(x.image * 255) for x in drawn])[which], np.stack([x.mask for x in drawn])[which]


@cache
def _x_ray(number: int, side: int) -> phantom.Phantom:
    return phantom.draw(np.random.default_rng(number), side, number % 2 == 0)


def pack_of(images: np.ndarray, bits: np.ndarray) -> Pack:
    """A pack of square pictures."""
    count, side = images.shape[:2]
    return Pack(tuple(map(str, range(count))), images, bits, np.full((count, 2), side), "made up", np.arange(count))


def batch_of(setup: Setup, count: int, side: int) -> tuple[Tensor, Tensor]:
    """(B, 1, S, S) uint8 images and masks on the device."""
    images, masks = x_rays(count, side)
    return (torch.from_numpy(part.astype(np.uint8))[:, None].to(setup.device) for part in (images, masks))


def our_step(setup: Setup, dtype: torch.dtype, batch: int, side: int) -> Callable[[list], Tensor]:
    """A training step as `training` takes it, on a list of micro-batches."""
    model = UNet().to(setup.device, memory_format=torch.channels_last)
    for block, shape in zip(model.blocks, model.block_shapes(batch, side), strict=True):
        block.merged = is_faster(*shape, setup.device, dtype)
    running = RunningStatistics(model)
    optimizer = engine.Adam(model.parameters(), lr=5e-4)
    scaler = engine.grad_scaler(setup.device, dtype)
    loss, recorded = LOSS, None
    if setup.device.type == "cuda":
        engine.compiled(model, batch)
        loss = replace(LOSS, compute=engine.compiled(losses.loss, batch))
        recorded = engine.RecordedGradient(model, batch, scaler, running, loss, dtype)
    how = (scaler, running, loss, dtype)

    def step(micro_batches: list) -> Tensor:
        return engine.train_step(model, micro_batches, optimizer, *how, count=1, recorded=recorded)

    return step


@cache
def kept_step(setup: Setup, dtype: torch.dtype, batch: int, side: int) -> Callable[[list], Tensor]:
    """`our_step`, compiled once for all rows that time it on a GPU."""
    return our_step(setup, dtype, batch, side)


def timed_step(setup: Setup, *of: Any) -> Callable[[list], Tensor]:
    """`our_step` for a row that times it: on a CPU a new one, since what a row leaves behind changes the next."""
    return (kept_step if setup.device.type == "cuda" else our_step)(setup, *of)


def rival_input(image: Tensor) -> Tensor:
    """Three channels, normalized, as smp wants them."""
    mean, std = MEAN.to(image.device)[:, None, None], STD.to(image.device)[:, None, None]
    return (image.float() / 255 - mean) / std


def step_row(setup: Setup, side: int, batch: int, dtype: torch.dtype, rival: str, target: str) -> Row:
    """A training step against smp's: "eager" in float32, or "channels_last" in our precision, compiled on a GPU."""
    image, mask = batch_of(setup, batch, side)
    better = rival == "channels_last"
    gpu = setup.device.type == "cuda"
    compiled = better and gpu
    steps = setup.pick(10, 10, 2) if gpu else 1  # one after the other, as in training: a GPU need not wait for the host
    theirs = setup.rival(rivals.smp_step, rival_input(image), mask.float(), dtype if better else WHOLE, better)
    step, pair = timed_step(setup, dtype, batch, side), (engine.to_input(image), mask.float())
    name = {HALF: "bf16", WHOLE: "float32"}[dtype]

    def repeated(take: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(steps):
                take()

        return run

    return Row(
        row=f"training step, {side} px, {name}",
        rival=f"smp {f'channels_last {name}' if better else 'eager float32'}{' compiled' if compiled else ''}",
        ours=repeated(lambda: step([pair])),
        theirs=repeated(theirs),
        items=steps * batch,
        target=target,
        batch=f"{steps} x {batch} images" if gpu else f"{batch} images",
        times=1 if gpu else setup.pick(2, 1, 1),
    )


def steps_cpu(setup: Setup) -> Iterator[Row]:
    """Training steps as a CPU can take them."""
    side, batch = setup.pick((256, 8), (64, 2), (64, 2))
    yield step_row(setup, side, batch, WHOLE, "eager", "ratio >= 1.7")
    yield step_row(setup, side, batch, HALF, "eager", "ratio >= 3.5")
    yield step_row(setup, side, batch, WHOLE, "channels_last", "ratio >= 1.2")
    yield step_row(setup, side, batch, HALF, "channels_last", "ratio >= 1.2")


def steps_gpu(setup: Setup) -> Iterator[Row]:
    """Training steps at the recipe's sizes."""
    for side, batch in setup.pick(((512, 16), (1024, 4)), ((512, 16), (1024, 4)), ((64, 2),)):
        yield step_row(setup, side, batch, HALF, "eager", "ratio >= 4")
        yield step_row(setup, side, batch, HALF, "channels_last", "ratio >= 1.6")


def transform_of(setup: Setup, batch: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The augmentation as `training` has it on the device."""
    return engine.compiled(augment.transform, batch) if setup.device.type == "cuda" else augment.transform


def fed(setup: Setup, side: int, batch: int, count: int, target: str) -> Row:
    """Training with feed and augmentation against the bare step on tensors that lie ready."""
    images, masks = x_rays(batch * 4, side)
    feed = Feed(pack_of(images, np.packbits(masks, axis=2)), setup.device, np.arange(len(images)))
    plan = [np.random.default_rng(i).permutation(len(images))[:batch] for i in range(count)]
    dtype = engine.autocast_dtype("auto", setup.device)
    step = timed_step(setup, dtype, batch, side)
    settings = config.load(REPO / "configs.toml", "seed").augment
    generator = torch.Generator(setup.device).manual_seed(0)
    transform = transform_of(setup, batch)
    image, mask = batch_of(setup, batch, side)
    ready = (engine.to_input(image), mask.float())

    def ours() -> None:
        for image, mask in feed.batches(plan):
            step([training.augmented(image, mask, settings, generator, transform)])

    def theirs() -> None:
        for _ in plan:
            step([ready])

    return Row(
        row=f"training with feed and augmentation, {side} px",
        rival="our bare step",
        ours=ours,
        theirs=theirs,
        unit="images/s",
        items=batch * count,
        target=target,
        batch=f"{count} x {batch} images, {str(dtype).removeprefix('torch.')}",
        times=1 if setup.device.type == "cuda" else setup.pick(3, 1, 1),
    )


def fed_cpu(setup: Setup) -> Iterator[Row]:
    """At a CPU's size."""
    side, batch, count = setup.pick((256, 4, 2), (96, 2, 2), (64, 2, 1))
    yield fed(setup, side, batch, count, "ratio >= 0.95")


def fed_gpu(setup: Setup) -> Iterator[Row]:
    """At the recipe's sizes."""
    sizes = (512, 16, 20, "ratio >= 0.95; ours >= 800"), (1024, 4, 40, "ratio >= 0.95; ours >= 200")
    for side, batch, count, target in setup.pick(sizes, sizes, ((64, 2, 1, "ratio >= 0.95; ours >= 800"),)):
        yield fed(setup, side, batch, count, target)


def augmentation_cpu(setup: Setup) -> Iterator[Row]:
    """The recipe's augmentation alone, per core against albumentations, on all cores against kornia."""
    side, count = setup.pick((512, 16), (512, 4), (64, 4))
    ours, theirs = _augmentations(setup, side, count)
    images, masks = x_rays(count, side)
    masks = masks.astype(np.uint8)
    recipe = rivals.albumentations_recipe(side)

    def ours_on_one() -> None:
        with one_thread():
            ours()

    def theirs_on_one() -> None:
        with one_thread():
            rivals.albumentations_batch(recipe, images, masks)

    common = {"row": f"augmentation, {side} px", "unit": "images/s", "items": count, "batch": f"{count} images"}
    yield Row(rival="albumentations, each on one core", ours=ours_on_one, theirs=theirs_on_one, **common)
    yield Row(rival="kornia", ours=ours, theirs=theirs, target="ratio >= 2", **common)


def augmentation_gpu(setup: Setup) -> Iterator[Row]:
    """The recipe's augmentation alone."""
    side, count = setup.pick((512, 64), (512, 64), (64, 4))
    ours, theirs = _augmentations(setup, side, count)
    yield Row(
        row=f"augmentation, {side} px",
        rival="kornia",
        ours=ours,
        theirs=theirs,
        unit="images/s",
        items=count,
        target="ratio >= 2; ours >= 20000",
        batch=f"{count} images",
    )


def _augmentations(setup: Setup, side: int, count: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    image, mask = batch_of(setup, count, side)
    settings = config.load(REPO / "configs.toml", "seed").augment
    generator = torch.Generator(setup.device).manual_seed(0)
    transform = transform_of(setup, count)
    recipe = rivals.kornia_recipe(side)
    return (
        lambda: training.augmented(image, mask, settings, generator, transform),
        lambda: rivals.kornia_batch(recipe, image, mask),
    )


def epoch_of_batches(setup: Setup) -> Iterator[Row]:
    """Every image and mask once, in batches, as tensors; shuffled."""
    side, count = setup.pick((512, 400), (256, 100), (64, 4))
    images, masks = x_rays(count, side)
    for name, arrays in (("image", images), ("mask", masks.astype(np.uint8) * 255)):
        folder = setup.folder / "png" / name
        folder.mkdir(parents=True)
        for i, array in enumerate(arrays):
            if i < 8:
                Image.fromarray(array).save(folder / f"{i}.png")
            else:
                os.link(folder / f"{i % 8}.png", folder / f"{i}.png")
    mapped = []
    for name, array in (("images", images), ("masks", np.packbits(masks, axis=2))):
        np.save(setup.folder / f"{name}.npy", array)
        mapped.append(np.load(setup.folder / f"{name}.npy", mmap_mode="r"))
    feed = Feed(pack_of(*mapped), setup.device, np.arange(count))
    loader = rivals.png_loader(setup.folder / "png", count, 8)

    def ours() -> int:
        return sum(len(image) for image, _ in feed.batches(cut(np.random.permutation(count), 8)))

    yield Row(
        row=f"epoch of batches, {side} px",
        rival="PNG + DataLoader, 2 workers",
        ours=ours,
        theirs=lambda: sum(len(image) for image, _ in loader),
        unit="images/s",
        items=count,
        target="ratio >= 10",
        batch=f"{count} images in batches of 8",
    )


def codes_of(setup: Setup, count: int) -> tuple[list[str], str]:
    """Codes of masks on the 1024 px grid, and where they are from."""
    path = SIIM / "train-rle-real.csv.gz"
    if path.exists():
        with gzip.open(path, "rt") as file:
            codes = [row[1].strip() for row in csv.reader(file)][1:]
        codes = [code for code in codes if code != rle.EMPTY]
        return codes[:: max(len(codes) // count, 1)][:count], "real annotations"
    rng = np.random.default_rng(0)
    codes = []
    y, x = np.mgrid[:1024, :1024]
    for _ in range(count):  # crescents of the annotations' areas: median 8,630 px, p5 1,364, p95 45,772
        area = np.exp(rng.normal(np.log(8630), 1.07))
        height = np.sqrt(area) * rng.uniform(1, 3)
        width = area / height
        u, v = (x - rng.uniform(200, 800)) / width, (y - rng.uniform(200, 800)) / height
        codes.append(rle.encode((u - 0.5 * v**2) ** 2 + v**2 < 0.4))
    return codes, "generated masks of the real ones' areas"


def codec(setup: Setup) -> Iterator[Row]:
    """Code to mask and mask to code, one after the other."""
    codes, source = codes_of(setup, setup.pick(400, 100, 3))
    masks = [np.ascontiguousarray(rle.decode(code, 1024, 1024)) for code in codes]
    common = {"rival": "pycocotools", "items": len(codes), "target": "ratio >= 1", "batch": f"{len(codes)} {source}"}

    def each(work: Callable[..., Any], items: list, *more: int) -> Callable[[], None]:
        def run() -> None:
            for item in items:
                work(item, *more)

        return run

    yield Row(
        row=f"RLE decode, {source}",
        ours=each(rle.decode, codes, 1024, 1024),
        theirs=each(rivals.coco_decode, codes, 1024, 1024),
        **common,
    )
    yield Row(
        row=f"RLE encode, {source}",
        ours=each(rle.encode, masks),
        theirs=each(rivals.coco_encode, masks),
        **common,
    )


def probability_maps(setup: Setup, count: int) -> list[np.ndarray]:
    """(1024, 1024) float32 maps: a mask's blurred shape, 60 specks, and a floor of noise."""
    rng = np.random.default_rng(0)
    found = []
    for code in codes_of(setup, count)[0]:
        mask = rle.decode(code, 1024, 1024).astype(np.float32)
        for y, x in rng.integers(0, 1010, (60, 2)):
            mask[y : y + rng.integers(3, 15), x : x + rng.integers(3, 15)] = 1
        smooth = ndimage.gaussian_filter(mask, 2) * 0.97
        found.append((smooth + rng.random((1024, 1024)) * 0.02).astype(np.float32))
    return found


def filter_and_code(setup: Setup) -> Iterator[Row]:
    """Probabilities to the submission's string."""
    probs = probability_maps(setup, setup.pick(24, 8, 2))

    def ours() -> list[str]:
        return [rle.encode_runs(decide(quantise(torch.from_numpy(prob)).numpy(), REPORT)) for prob in probs]

    def report() -> list[str]:
        return [rivals.run_length_encode(rivals.post_process(prob, 0.5, 3500)) for prob in probs]

    def dust() -> list[str]:
        return [rivals.run_length_encode(rivals.dust(prob > 0.5, 3500).view(np.uint8)) for prob in probs]

    assert ours() == report() == dust()
    common = {"row": "filter and RLE, 1024 px, 60 specks", "ours": ours, "items": len(probs)}
    common["batch"] = f"{len(probs)} maps, one by one"
    yield Row(rival="the original's OpenCV loop", theirs=report, target="ratio >= 8", **common)
    yield Row(rival="cc3d.dust + encode", theirs=dust, target="ratio >= 1.5", **common)


def filter_gpu(setup: Setup) -> Iterator[Row]:
    """A batch on the GPU until its runs are on the host."""
    count = setup.pick(64, 64, 2)
    probs = probability_maps(setup, min(count, 16))
    batch = torch.from_numpy(np.stack([probs[i % len(probs)] for i in range(count)])).to(setup.device)
    q = quantise(batch)

    def theirs() -> list[np.ndarray]:
        return [mask_to_runs(rivals.dust(one >= 128, 3500)) for one in q.cpu().numpy()]

    assert all(map(np.array_equal, decide_batch(q, REPORT), theirs()))
    yield Row(
        row=f"filter to runs on the host, batch of {count}, 1024 px",
        rival="cc3d.dust + runs on the host",
        ours=lambda: decide_batch(q, REPORT),
        theirs=theirs,
        target="ours <= 5",
        batch=f"{count} maps; ms for all",
    )


def folds(count: int, setup: Setup, dtype: torch.dtype, side: int) -> Ensemble:
    """Our networks as a prediction has them, of so many folds, each with its own memory."""
    model = FoldedUNet(UNet().to(setup.device).eval(), dtype)
    models = tuple((copy.deepcopy(model),) for _ in range(count))
    return Ensemble(models, side, {}, dtype, True, "", "", 16, {})


def prediction(setup: Setup, side: int, batch: int, dtype: torch.dtype, target: str) -> Row:
    """Five networks and their mirror images, all kept loaded, to quantised probabilities on the host."""
    image, _ = batch_of(setup, batch, side)
    ours = folds(5, setup, dtype, side)
    names = list(map(str, range(batch)))
    return Row(
        row=f"prediction, 5 folds x mirror, {side} px, {'bf16' if dtype == HALF else 'float32'}",
        rival="smp eager float32, kept loaded",
        ours=lambda: ensemble.predict(ours, image, side, names),
        theirs=setup.rival(rivals.smp_predict, rival_input(image), 5),
        unit="images/s",
        items=batch,
        target=target,
        batch=f"{batch} images",
    )


def prediction_cpu(setup: Setup) -> Iterator[Row]:
    """At a CPU's size."""
    side, batch = setup.pick((256, 8), (64, 1), (64, 1))
    yield prediction(setup, side, batch, WHOLE, "ratio >= 1.7")
    yield prediction(setup, side, batch, HALF, "ratio >= 3")


def prediction_gpu(setup: Setup) -> Iterator[Row]:
    """At the recipe's size."""
    side, batch = setup.pick((1024, 16), (1024, 16), (64, 1))
    yield prediction(setup, side, batch, HALF, "ours >= 60")


def memory_gpu(setup: Setup) -> Iterator[Row]:
    """The most memory that a step of stage 2 takes from a GPU, model and optimizer included."""
    side, batch = setup.pick((1024, 4), (1024, 4), (64, 2))
    image, mask = batch_of(setup, batch, side)

    def peak(make: Callable[[], Callable[[], Any]]) -> float:
        if setup.device.type != "cuda":
            make()()
            return 1.0  # nothing counts there
        engine.make_room(setup.device)
        torch.cuda.reset_peak_memory_stats(setup.device)
        before = torch.cuda.memory_reserved(setup.device)  # by other rows
        step = make()
        for _ in range(3):
            step()
        return (torch.cuda.max_memory_reserved(setup.device) - before) / 2**30

    def ours() -> Callable[[], Any]:
        step, pair = our_step(setup, HALF, batch, side), (engine.to_input(image), mask.float())
        return lambda: step([pair])

    def theirs() -> Callable[[], Any]:
        return rivals.smp_step(rival_input(image), mask.float(), WHOLE, False)

    yield Row(
        row=f"peak memory of training, {side} px, batch {batch}",
        rival="smp eager float32",
        ours=lambda: peak(ours),
        theirs=lambda: peak(theirs),
        unit="GB",
        target="ours <= 8",
        batch=f"{batch} images",
        once=True,
    )


def scaling(name: str, sizes: tuple[int, ...], repeats: int, run: Callable[[int], None], batch: str) -> Row:
    """How time grows with the number of images: the exponent of the best power law, 1 where it is linear.

    Args:
        run: handles so many images, and waits until a GPU has.
    """
    detail: dict[str, Any] = {}

    def exponent() -> float:
        seconds = {size: [] for size in sizes}
        run(sizes[0])
        for _ in range(repeats):
            for size in sizes:
                start = time.perf_counter()
                run(size)
                seconds[size].append(time.perf_counter() - start)
        for size, times in seconds.items():
            each = [1000 * value / size for value in sorted(times)]
            detail[str(size)] = {"ms an image": statistics.median(each), "spread": [each[0], each[-1]]}
        middle = [statistics.median(times) for times in seconds.values()]
        return float(np.polyfit(np.log(sizes), np.log(middle), 1)[0])

    return Row(
        row=f"{name} at {', '.join(f'{size:,}' for size in sizes)} images: exponent of the time",
        rival="linear",
        ours=exponent,
        theirs=lambda: 1.0,
        unit="exponent",
        target="ours <= 1.1",
        batch=batch,
        detail=detail,
        once=True,
    )


def growth(setup: Setup) -> Iterator[Row]:
    """Cost against the number of images, at 64 px."""
    many = setup.pick((1000, 4000, 12000), (100, 200, 400), (2, 4))
    some = setup.pick((100, 200, 400), (4, 8, 12), (2, 4))
    repeats, fewer = setup.pick(3, 3, 1), setup.pick(2, 1, 1)
    side, recipe = 64, config.load(REPO / "configs.toml", "seed")
    images, masks = x_rays(many[-1], side)
    bits = np.packbits(masks, axis=2)
    folder = setup.folder / "growth"
    folder.mkdir()
    for i, image in enumerate(images[:8]):
        Image.fromarray(image).save(folder / f"drawn{i}.png")
    for i in range(many[-1]):
        os.link(folder / f"drawn{i % 8}.png", folder / f"{i:05}.png")
    runs = [mask_to_runs(mask.repeat(16, axis=0).repeat(16, axis=1)) for mask in masks[:8]]
    cases = [Case(f"{i:05}", folder / f"{i:05}.png", runs[i % 8]) for i in range(many[-1])]
    places = iter(range(10**6))

    def pack(count: int) -> None:
        place = setup.folder / f"pack{next(places)}"
        packs.open_pack(place, "bench", cases[:count], side, annotation_size=1024)

    yield scaling("pack", many, fewer, pack, "PNG of 64 px")

    feed = Feed(pack_of(images, bits), setup.device, np.arange(len(images)))

    def show(count: int) -> None:
        for _ in feed.batches(cut(np.arange(count), 16)):
            pass
        wait(setup.device)

    yield scaling("feed", many, 5 * repeats, show, "batches of 16")

    grid = tune.make_grid(
        REPORT,
        1024,
        thresholds=setup.pick(recipe.tune.thresholds, 10, 4),
        min_areas=setup.pick(recipe.tune.min_areas, 20, 4),
        top_thresholds=setup.pick(recipe.tune.top_thresholds, 5, 3),
        top_areas=setup.pick(recipe.tune.top_areas, 10, 3),
    )
    data = maps.many(many[-1], [round(256 * threshold) for threshold in grid.thresholds])

    def choose(count: int) -> None:
        wanted = {"objective": "dice", "target": 0.95, "tolerance": 5e-4}
        tune.tune(data.take(np.arange(count)), np.arange(count) % 5, grid, REPORT, **wanted)

    yield scaling("tune", many, repeats, choose, f"{np.prod(grid.shape):,} rules")

    dtype = engine.autocast_dtype("auto", setup.device)
    step = our_step(setup, dtype, 4, side)
    settings, generator = recipe.augment, torch.Generator(setup.device).manual_seed(0)

    def train(count: int) -> None:
        for image, mask in feed.batches(cut(np.arange(count), 4)):
            stats = step([training.augmented(image, mask, settings, generator)])
        stats.tolist()

    yield scaling("training", some, fewer, train, f"64 px, batches of 4, {dtype}")

    networks = folds(1, setup, dtype, side)

    def predict(count: int) -> None:
        for image, _ in feed.batches(cut(np.arange(count), 4)):
            for q in ensemble.predict(networks, image, 4 * side, [""] * len(image)).q:
                rle.encode_runs(decide(q, Rule.of(recipe.rule)))

    yield scaling("prediction", some, 2 * fewer, predict, f"64 px, to 256, one fold x mirror, batches of 4, {dtype}")


HOST = (codec, filter_and_code, epoch_of_batches, growth)
CPU = (steps_cpu, fed_cpu, augmentation_cpu, prediction_cpu)
GPU = (steps_gpu, fed_gpu, augmentation_gpu, filter_gpu, prediction_gpu, memory_gpu)
