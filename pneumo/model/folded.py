"""A UNet for evaluation and prediction: batch norm folded into the convolutions, decoder weights summed up once.

Convolution, sum and ReLU are one where the device has that. Imports unet, kernels.
"""

import copy
from collections.abc import Callable

import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pneumo.kernels import thin_conv
from pneumo.kernels.conv_relu import conv_relu
from pneumo.kernels.upconv import stride_2_weight
from pneumo.model.unet import DecoderBlock, PlainConv, UNet, features


class FoldedUNet(nn.Module):
    """What a UNet in evaluation computes, with fewer passes over memory; no gradients.

    Validation and prediction use it alike, uncompiled. It is made once and filled again from epoch to epoch. Decoder
    blocks have the merged form throughout: its weights are summed up here.

    Args:
        model: of the same shapes as all that will be filled in; stays as it is.
        dtype: of the convolutions' weights; the autocast type, so that no pass converts them.
    """

    def __init__(self, model: UNet, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder, self.head = copy.deepcopy(model.encoder), copy.deepcopy(model.head)
        self.requires_grad_(False).eval()
        self.register_buffer("mean", model.mean.clone())
        self.register_buffer("std", model.std.clone())
        self.stem = model.stem
        modules = dict(self.encoder.named_modules())
        channels = 3 if self.stem is None else modules[self.stem].out_channels
        tried = copy.deepcopy(self.encoder).cpu()  # what fails there is the encoder, not a GPU short of memory
        self._norms = dict(_conv_norm_pairs(tried, model.mean.new_zeros(1, channels, 64, 64, device="cpu")))
        for conv, norm in self._norms.items():
            if modules[conv].bias is None:
                modules[conv].bias = nn.Parameter(modules[conv].weight.new_zeros(len(modules[conv].weight)), False)
            parent, _, name = norm.rpartition(".")
            setattr(self.encoder.get_submodule(parent), name, _after(modules[norm]))
        for name, module in modules.items():
            if _is_basic(module):
                parent, _, last = name.rpartition(".")
                setattr(self.encoder.get_submodule(parent), last, _FoldedBasicBlock(module))
        # a ResNet's first ReLU follows right after its first convolution, and can be one with it
        self.clipped = self.stem == "conv1" in self._norms and type(modules.get("act1")) is nn.ReLU
        if self.clipped:
            self.encoder.act1 = nn.Identity()
        self.blocks = nn.ModuleList(map(_FoldedBlock, model.blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.to(dtype, memory_format=torch.channels_last)
        self.fill(model)

    @torch.no_grad()
    def fill(self, model: UNet) -> None:
        """Take over the weights and statistics that `model` now has."""
        self.mean.copy_(model.mean)
        self.std.copy_(model.std)
        self.head.weight.copy_(model.head.weight)
        self.head.bias.copy_(model.head.bias)
        for name, module in self.encoder.named_modules():
            if name in self._norms:
                conv, norm = (model.encoder.get_submodule(part) for part in (name, self._norms[name]))
                for own, folded in zip((module.weight, module.bias), _fold(conv, norm), strict=True):
                    own.copy_(folded)
            elif name not in self._norms.values():  # there only an activation is left
                source = model.encoder.get_submodule(name)
                for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                    tensor.copy_(getattr(source, key))
        for block, source in zip(self.blocks, model.blocks, strict=True):
            block.fill(_fold(*source.conv1[:2]), _fold(*source.conv2[:2]))

    def forward(self, image: Tensor) -> Tensor:
        """As `UNet.forward`."""
        *skips, x = features(self, image, relu=self.clipped)
        for block, skip in zip(self.blocks, [*reversed(skips), None], strict=True):
            x = block(x, skip)
        return thin_conv.conv(x, self.head.weight, self.head.bias)


class _FoldedBasicBlock(nn.Module):
    """A residual block of two convolutions, its batch norms folded; its convolutions keep their names."""

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.conv1, self.conv2, self.downsample = block.conv1, block.conv2, block.downsample

    def forward(self, x: Tensor) -> Tensor:
        """As timm's `BasicBlock.forward`."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return conv_relu(conv_relu(x, self.conv1), self.conv2, shortcut)


class _FoldedBlock(nn.Module):
    """A decoder block without batch norms, its first convolution in two parts."""

    def __init__(self, block: DecoderBlock) -> None:
        super().__init__()
        self.below = block.below
        first, second = block.conv1[0].weight, block.conv2[0].weight
        out, inside = first.shape[:2]
        skip, options = inside - self.below, {"device": first.device}
        self.up = nn.ConvTranspose2d(self.below, out, 4, stride=2, padding=1, bias=not skip, **options)
        self.skip = PlainConv(skip, out, 3, padding=1, **options) if skip else None
        self.second = PlainConv(out, len(second), 3, padding=1, **options)
        self.requires_grad_(False)

    def fill(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
        """Take over weights and biases of the block's two convolutions."""
        weight, bias = first
        self.up.weight.copy_(stride_2_weight(weight[:, : self.below]))
        if self.skip is None:
            self.up.bias.copy_(bias)
        else:
            self.skip.weight.copy_(weight[:, self.below :])
            self.skip.bias.copy_(bias)
        self.second.weight.copy_(second[0])
        self.second.bias.copy_(second[1])

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """As `DecoderBlock.forward`."""
        if skip is None:
            x = thin_conv.doubling_conv(x, self.up.weight, self.up.bias, relu=True)
        else:
            x = conv_relu(skip, self.skip, self.up(x))
        if thin_conv.is_thin(x, *self.second.weight.shape[:2]):
            return thin_conv.conv(x, self.second.weight, self.second.bias, relu=True)
        return conv_relu(x, self.second)


def _is_basic(module: nn.Module) -> bool:
    """Whether it is timm's plain residual block of two convolutions, which `_FoldedBasicBlock` replaces."""
    return (
        type(module) is BasicBlock
        and module.se is None
        and isinstance(module.aa, nn.Identity)
        and isinstance(module.act1, nn.ReLU)
        and isinstance(module.act2, nn.ReLU)
    )


def _fold(conv: nn.Conv2d, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that does what `conv` and then `norm`, in evaluation, do."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = 0 if conv.bias is None else conv.bias
    return conv.weight * scale[:, None, None, None], norm.bias + (bias - norm.running_mean) * scale


def _conv_norm_pairs(encoder: nn.Module, image: Tensor) -> list[tuple[str, str]]:
    """Names of the convolutions whose result goes to a batch norm alone, and of those batch norms."""
    made: dict[int, tuple[str, Tensor]] = {}  # holds the results, so that no two have one id
    pairs: list[tuple[str, str]] = []

    def note_result(name: str) -> Callable[..., None]:
        return lambda _module, _given, result: made.update({id(result): (name, result)})

    def note_given(name: str) -> Callable[..., None]:
        return lambda _module, given: pairs.append((made[id(given[0])][0], name)) if id(given[0]) in made else None

    hooks = []
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(note_result(name)))
        elif isinstance(module, _BatchNorm) and module.affine and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(note_given(name)))
    try:
        with torch.no_grad():
            features = encoder(image)
    finally:
        for hook in hooks:
            hook.remove()
    raw = {made[id(feature)][0] for feature in features if id(feature) in made}  # others need it as it is
    return [(conv, norm) for conv, norm in pairs if conv not in raw]


def _after(norm: _BatchNorm) -> nn.Module:
    """What is left of a folded batch norm: timm's kind has an activation in it."""
    return getattr(norm, "act", nn.Identity())
