"""UNet: a decoder written out over any timm encoder with features at 1/4 to 1/32 of the image, or 1/2 as well.

The model takes grey images in [0, 1]; the encoder's own normalization belongs to it. Imports kernels,
checkpoint, errors.
"""

import difflib
import logging
import os
import socket
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from pneumo import checkpoint
from pneumo.errors import DataError, UsageError, one_line
from pneumo.kernels import thin_conv, wide_conv
from pneumo.kernels.upconv import upsampled_conv, upsampled_conv_ref

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a timm model on the hub, in timm's order
HUB_SECONDS = 3.0  # for the hub to answer
OTHERWISE = "train from random weights with --set model.pretrained=false"
_AROUND = 8  # modules around an encoder, at most
LEVELS = [2, 4, 8, 16, 32]  # by how much the features are coarser than the image; the first may be missing


class DecoderBlock(nn.Module):
    """Double the resolution, join the encoder's features of that resolution, convolve twice.

    Attributes:
        below: channels of the features of half the resolution.
        merged: compute the first convolution by `upsampled_conv`, not by its reference.
    """

    def __init__(self, below: int, skip: int, out: int) -> None:
        super().__init__()
        self.below, self.merged = below, True
        self.conv1 = conv_bn_relu(below + skip, out)
        self.conv2 = conv_bn_relu(out, out)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Map (B, below, H, W) and (B, skip, 2H, 2W), or None, to (B, out, 2H, 2W)."""
        convolve = upsampled_conv if self.merged else upsampled_conv_ref
        conv, norm, relu = self.conv1
        x = relu(norm(convolve(x, skip, conv.weight)))
        conv, norm, relu = self.conv2
        return relu(norm(thin_conv.conv(x, conv.weight)))


class Stem(nn.Conv2d):
    """An encoder's first convolution, whose weights stay in the encoder, but which is computed before it."""

    def forward(self, x: Tensor) -> Tensor:
        """Pass on what was computed."""
        return x


class PlainConv(nn.Conv2d):
    """A convolution of stride 1 or 2 whose padding is half its window, in whichever form is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, O, H', W')."""
        return wide_conv.conv(x, self.weight, self.bias, self.stride[0])


def conv_bn_relu(inside: int, out: int) -> nn.Sequential:
    """3x3 convolution without bias, batch norm, ReLU."""
    conv = nn.Conv2d(inside, out, 3, padding=1, bias=False)
    nn.init.kaiming_uniform_(conv.weight, mode="fan_in", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """UNet over a timm encoder.

    Args:
        encoder: a timm model name with features at 1/2, 1/4, ..., 1/32 of the input; the first may be missing, and
            then the block of that resolution has no skip.
        pretrained: True for timm's weights, a path to a local file of the encoder's weights or of a whole smp.Unet,
            False for random ones.
        decoder_channels: of the five decoder blocks, coarsest first; the last has no skip.
        checkpointing: keep less for the backward pass, and compute a block's inner values once more in it. Running
            statistics stay right, as `engine.RunningStatistics` lets a pass write its own ones, twice the same.

    Raises:
        UsageError: no such encoder, one without such levels, or weights that cannot be had.
        DataError: the file of weights does not hold exactly this encoder.
    """

    def __init__(
        self,
        encoder: str = "resnet34",
        pretrained: bool | str = False,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.encoder = _create_encoder(encoder, pretrained)
        channels = self.encoder.feature_info.channels()
        channels = [0] * (len(LEVELS) - len(channels)) + channels
        _check_levels(self.encoder, encoder)
        if checkpointing:
            try:
                self.encoder.set_grad_checkpointing()
            except AssertionError:  # timm's way to say so
                raise UsageError(
                    f"model.checkpointing: timm does not offer it for {encoder}. Set it to false"
                ) from None
        config = self.encoder.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        self.stem = _take_stem(self.encoder)
        for module in self.encoder.modules():
            if type(module) is nn.Conv2d and _is_plain(module):
                module.__class__ = PlainConv  # the same parameters, computed otherwise
        below = [channels[-1], *decoder_channels[:-1]]
        skips = [*reversed(channels[:-1]), 0]
        self.blocks = nn.ModuleList(map(DecoderBlock, below, skips, decoder_channels))
        self.head = nn.Conv2d(decoder_channels[-1], 1, 3, padding=1)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Predict.

        Args:
            image: (B, 1, H, W) float in [0, 1]; H and W multiples of 32.

        Returns:
            (B, 1, H, W) logits.

        Raises:
            ValueError: of another shape or type; uint8 would be 255 times too bright.
        """
        *skips, x = features(self, image)
        for block, skip in zip(self.blocks, [*reversed(skips), None], strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                x = recompute(block, x, skip, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, skip)
        return thin_conv.conv(x, self.head.weight, self.head.bias)

    def block_shapes(self, batch: int, side: int) -> list[tuple[tuple[int, int, int, int], int, int]]:
        """What `upsampled_conv` is given in each block: shape of x, channels of the skip and of the result.

        Args:
            batch, side: of the images.
        """
        shapes = []
        for i, block in enumerate(self.blocks):
            out, inside = block.conv1[0].weight.shape[:2]
            shapes.append(((batch, block.below, side >> (5 - i), side >> (5 - i)), inside - block.below, out))
        return shapes


def features(net: nn.Module, image: Tensor, *, relu: bool = False) -> list[Tensor | None]:
    """What the encoder of a UNet, or of its folded form, makes of a grey image; finest first, None if it has none.

    Args:
        relu: let its first convolution end with one.

    Raises:
        ValueError: as of `UNet.forward`.
    """
    batch, *shape = image.shape
    if not image.is_floating_point() or len(shape) != 3 or shape[0] != 1 or shape[1] % 32 or shape[2] % 32:
        raise ValueError(
            f"images must be (B, 1, H, W) float in [0, 1], H and W multiples of 32, got {(batch, *shape)} {image.dtype}"
        )
    if net.stem is None:
        found = net.encoder((image - net.mean) / net.std)  # grey to the encoder's three channels
    else:
        stem = net.encoder.get_submodule(net.stem)
        found = net.encoder(thin_conv.grey_conv(image, stem, net.mean, net.std, relu=relu))
    return [None] * (len(LEVELS) - len(found)) + found


def _check_levels(encoder: nn.Module, name: str) -> None:
    """Refuse an encoder whose features have other sides than it says, or that takes no small image.

    Raises:
        UsageError: it is one.
    """
    training = encoder.training
    try:
        with torch.no_grad():
            sides = [feature.shape[-1] for feature in encoder.eval()(torch.zeros(1, 3, 64, 64))]
    except Exception as error:  # encoders have many ways to insist on a size
        raise UsageError(
            f"model.encoder: {name} takes no images of 64 px ({type(error).__name__}: {one_line(error)[:150]}); choose "
            f"one for images of any size, as resnet34"
        ) from None
    encoder.train(training)
    wanted = [64 // level for level in LEVELS]
    if sides not in (wanted, wanted[1:]):
        raise UsageError(
            f"model.encoder: {name} makes features of {sides} px of an image of 64; the decoder needs {wanted}, as of "
            f"resnet34, or all but the first"
        )


def _take_stem(encoder: nn.Module) -> str | None:
    """Put a `Stem` in the place of the encoder's first convolution; return its name.

    None, and the encoder as it was, unless that is a plain one of three channels, and what it makes of an image is all
    that the rest of the encoder needs.
    """
    name, conv = next((name, module) for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d))
    if type(conv) is not nn.Conv2d or conv.in_channels != 3 or conv.padding_mode != "zeros":
        return None
    with torch.device("meta"):  # draws no random weights
        stem = Stem(3, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None)
    stem.dilation, stem.groups, stem.weight, stem.bias = conv.dilation, conv.groups, conv.weight, conv.bias
    image = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    training = encoder.training
    same = False
    with torch.no_grad(), suppress(Exception):  # it takes no such image, or another part is given the image as well
        wanted = encoder.eval()(image)
        encoder.set_submodule(name, stem)
        found = encoder(conv(image))
        same = len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    encoder.train(training)
    if same:
        return name
    encoder.set_submodule(name, conv)
    return None


def _is_plain(conv: nn.Conv2d) -> bool:
    window = conv.kernel_size, conv.padding
    sizes = window in (((1, 1), (0, 0)), ((3, 3), (1, 1))) and conv.stride in ((1, 1), (2, 2))
    return sizes and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"


def load_smp(model: UNet, state: Mapping[str, Tensor]) -> None:
    """Load a checkpoint of segmentation_models.pytorch's `Unet` with the same encoder.

    On a grey image repeated over three channels and normalized by the encoder's mean and std, that model's logits
    and this one's agree. Grey images stay three channels inside, so nothing is lost.

    Args:
        state: a `state_dict` of smp.Unet(encoder, decoder_attention_type=None, classes=1), as `read_weights` gives it
            of a file; "module." prefixes, a Lightning module around it as its `model`, and a classifier's leftovers
            ("encoder.fc.", "classification_head.") are allowed.

    Raises:
        DataError: names the first keys that are missing, left over or of another shape.
    """
    parts = {
        "encoder.model.": "encoder.",  # smp's own wrapper of timm's encoders
        "encoder.": "encoder.",
        "decoder.blocks.": "blocks.",
        "segmentation_head.0.": "head.",
    }
    leftovers = ("encoder.fc.", "encoder.last_linear.", "encoder.classifier.", "classification_head.")
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    inner = {key.removeprefix("model."): tensor for key, tensor in state.items() if key.startswith("model.")}
    renamed = {}
    for key, tensor in (inner or state).items():
        if key.startswith(leftovers):
            continue
        old = next((part for part in parts if key.startswith(part)), None)
        renamed[key if old is None else parts[old] + key.removeprefix(old)] = tensor
    own = {"mean": model.mean, "std": model.std}  # smp normalizes outside
    _load_exactly(model, {**renamed, **own}, "checkpoint of segmentation_models.pytorch")


def _load_exactly(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    if complaint := _mismatch({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}, state):
        raise DataError(f"{what} does not fit the model: {complaint}")
    model.load_state_dict(dict(state), strict=False)  # num_batches_tracked may be missing, nothing else


def _mismatch(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> str:
    """Say how a state differs from what is wanted; "" if it does not."""
    missing = [key for key in shapes if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in shapes]
    other = [key for key, shape in shapes.items() if key in state and tuple(state[key].shape) != shape]
    shown = [f"{key} of {list(state[key].shape)}, not {list(shapes[key])}" for key in other]
    found = {"missing": missing, "unknown": unknown, "of another shape": shown}
    text = "; ".join(f"{len(keys)} {kind}, as {', '.join(keys[:3])}" for kind, keys in found.items() if keys)
    if any(shapes[key][1:2] == (3,) and tuple(state[key].shape[1:2]) == (1,) for key in other):
        text += (
            ". Its first convolution takes one channel; here a grey image is repeated over the encoder's three and "
            "normalized, so it cannot be used. Take weights that were trained on three channels"
        )
    return text


def check_encoder(encoder: str) -> None:
    """Refuse the name of an encoder that timm does not know, or whose features are of other levels.

    Takes a moment, so that it can be asked before anything is done for nothing; `UNet` looks closer.

    Raises:
        UsageError: names encoders whose names are near, or what does not fit.
    """
    if not timm.is_model(encoder):
        near = difflib.get_close_matches(encoder.lower(), timm.list_models())
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"model.encoder: timm knows no {encoder!r}.{meant}")
    try:
        features = _outline(encoder, features_only=True)
    except Exception as error:  # timm raises many types
        raise UsageError(f"model.encoder: timm cannot make features of {encoder}: {one_line(error)[:160]}") from None
    reduction = features.feature_info.reduction()
    if reduction not in (LEVELS, LEVELS[1:]):
        raise UsageError(
            f"model.encoder: {encoder} has features at {reduction}; the decoder needs {LEVELS}, as of resnet34, or all "
            f"but the first"
        )


def _outline(name: str, *, features_only: bool = False) -> nn.Module:
    """A model of timm's for its shapes, in no time, as it has no weights; random ones where timm insists."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, features_only=features_only)
    except (NotImplementedError, RuntimeError):  # in timm 1.0.15 some look into their weights
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(name, features_only=features_only)


def _create_encoder(name: str, pretrained: bool | str) -> nn.Module:
    """timm's feature extractor of that name, with weights."""
    check_encoder(name)
    overlay: dict[str, Any] | None = None
    if isinstance(pretrained, str):
        state = _encoder_weights(name, Path(pretrained))
        logging.getLogger("timm.models").setLevel(logging.ERROR)  # it warns of the head that was just checked
        overlay = {"state_dict": state}
    elif pretrained:
        overlay = _from_hub(name)
    try:
        encoder = timm.create_model(
            name, features_only=True, pretrained=bool(pretrained), pretrained_cfg_overlay=overlay
        )
    except Exception as error:  # offline, hub and timm raise many types, some without a message
        if not pretrained:
            raise
        raise UsageError(_no_weights(name, one_line(error)[:160] or type(error).__name__)) from None
    encoder.pretrained_cfg.pop("state_dict", None)  # timm keeps a copy
    return encoder


def _from_hub(name: str) -> dict[str, Any] | None:
    """A weights file of the hub's cache, as timm takes it; None where timm is to download.

    Raises:
        UsageError: neither is possible. Left to itself, the hub's client would try for most of a minute.
    """
    hub = timm.get_pretrained_cfg(name).hf_hub_id
    if hub is None or huggingface_hub.constants.HF_HUB_OFFLINE:
        return None  # weights from elsewhere; or timm finds out at once
    for file in WEIGHTS:
        if isinstance(cached := huggingface_hub.try_to_load_from_cache(hub, file), str):
            return {"file": cached}
    endpoint = urlsplit(huggingface_hub.constants.ENDPOINT)
    proxy = urllib.request.getproxies().get(endpoint.scheme)
    asked = endpoint if proxy is None else urlsplit(proxy if "//" in proxy else f"//{proxy}")
    try:
        port = asked.port or {"http": 80}.get(asked.scheme, 443)
        socket.create_connection((asked.hostname, port), timeout=HUB_SECONDS).close()
    except OSError as error:
        reason = f"{asked.hostname}:{port} does not answer: {error.strerror or error}"
        raise UsageError(_no_weights(name, reason)) from None
    return None


def _no_weights(name: str, reason: str) -> str:
    hub = timm.get_pretrained_cfg(name).hf_hub_id or name
    return (
        f"weights of {name} could not be loaded through timm ({reason}). Wanted: {WEIGHTS[0]} of {hub}, in "
        f"{huggingface_hub.constants.HF_HUB_CACHE} or from {huggingface_hub.constants.ENDPOINT}/{hub}. Download it on "
        f"a machine with a network and pass --set model.pretrained=FILE, or {OTHERWISE}"
    )


def _encoder_weights(name: str, path: Path) -> dict[str, Tensor]:
    """The weights in a file that holds exactly this encoder, but for a classifier's head and what is around it."""
    features = timm.create_model(name, features_only=True, pretrained=False)
    whole = _outline(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in whole.state_dict().items()}
    state = _without_prefix(_encoder_of_smp(read_weights(path)), shapes)
    names = {_flat(key): key for key in shapes}  # a feature list's weights are called otherwise
    state = {names.get(_flat(key), key): tensor for key, tensor in state.items()}
    head = _head_keys(whole, features)
    body = {key: shape for key, shape in shapes.items() if key not in head}
    if {"mean", "std", "head.weight", "blocks.0.conv1.0.weight"} <= state.keys():
        raise DataError(
            f"{path} holds a whole network of this program, without saying what it was trained on. Give its checkpoint "
            f"as it is, as best.pt"
        )
    if complaint := _mismatch(body, {key: tensor for key, tensor in state.items() if key not in head}):
        raise DataError(f"{path} does not hold the weights of {name}: {complaint}")
    if bad := checkpoint.not_finite(state):
        raise DataError(f"{path}: {one_line(bad)} is not finite. Download or make the weights again")
    return state


def _encoder_of_smp(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict of segmentation_models.pytorch, whatever module is around it; others as is."""
    head = next((key for key in state if "segmentation_head." in key), None)
    if head is None:
        return state
    prefix = head.partition("segmentation_head.")[0] + "encoder."
    if any(key.startswith(f"{prefix}model.") for key in state):  # smp's own wrapper of timm's encoders
        prefix += "model."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _without_prefix(state: dict[str, Tensor], known: Iterable[str]) -> dict[str, Tensor]:
    """Weights by the names they had before a module was put around all of them, as "module." or "encoder."."""
    names = list(known)
    for _ in range(_AROUND):
        if not state:
            break
        first, dot, _ = next(iter(state)).partition(".")
        prefix = first + dot
        if not dot or any(name.startswith(prefix) for name in names):
            break
        if not all(key.startswith(prefix) for key in state):
            break
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _head_keys(whole: nn.Module, features: nn.Module) -> set[str]:
    """Keys of a timm model that its feature extractor has no use for."""
    used = set(map(_flat, features.state_dict()))
    return {key for key in whole.state_dict() if _flat(key) not in used}


def _flat(key: str) -> str:
    """What names of weights have in common in timm's models and their feature lists, where stages.0 is stages_0."""
    return key.replace("_", ".")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights, safetensors or PyTorch, without running anything in it.

    Returns:
        A state dict; one wrapped under "state_dict" or "model" is unwrapped.

    Raises:
        UsageError: no such file.
        DataError: not a file of weights.
    """
    if os.path.isdir(path):
        raise UsageError(f"model.pretrained: {path} is a folder; name the file in it")
    if not os.path.isfile(path):
        raise UsageError(f"model.pretrained: no file {path}. Put the weights there, or {OTHERWISE}.")
    if path.suffix == ".safetensors":
        try:
            state: Any = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            reason = one_line(error)[:200]
            raise DataError(
                f"{path} cannot be read as weights: {reason}. Download them again, or {OTHERWISE}."
            ) from None
    else:
        try:
            state = checkpoint.read(path)
        except DataError as error:
            way = "Download the encoder's weights again"
            if "it asks for code" in str(error):
                way = "If it is a whole model, save its weights alone: torch.save(model.state_dict(), FILE)"
            raise DataError(f"{error} {way}, or {OTHERWISE}.") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise DataError(f"{path} holds no state dict of tensors")
    return state
