"""Build the Triton kernels of the recipe's network for GPUs that are not there: `python built_kernels.py 80 86`.

Takes compute capabilities, as 86 for 8.6. Writes a JSON line for each card and kernel, with the shared memory in bytes
that a program of it needs, whether it multiplies on tensor cores and whether its ReLU turns NaN into 0. For cards
before 8.0, where the compiler takes seconds a kernel, it builds one of each kind.
"""

import json
import sys
from collections.abc import Callable
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pneumo.kernels import thin_conv
from pneumo.model.folded import FoldedUNet
from pneumo.model.unet import UNet

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Launches:
    """Stands for a kernel: keeps the arguments that it is launched with, and computes nothing."""

    def __init__(self, kernel: triton.JITFunction, seen: dict[str, ASTSource]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.keep

    def keep(self, *given: Tensor | int, **constants: int | bool) -> None:
        names = self.kernel.arg_names
        signature = {name: "constexpr" for name in constants}
        aligned = {}
        for i, argument in enumerate(given):
            signature[names[i]] = POINTERS[argument.dtype] if isinstance(argument, Tensor) else "i32"
            if isinstance(argument, Tensor) or argument % 16 == 0:
                aligned[i,] = [["tt.divisibility", 16]]
        places = {(names.index(name),): value for name, value in constants.items()}
        key = f"{self.kernel.fn.__name__} {signature} {aligned} {places}"
        self.seen[key] = ASTSource(self.kernel, {name: signature[name] for name in names}, places, aligned)


def of_the_network(dtype: torch.dtype) -> list[ASTSource]:
    """The kernels that training and prediction launch, each once."""
    seen: dict[str, ASTSource] = {}
    stands = {name: Launches(getattr(thin_conv, name), seen) for name in ("_patches", "_patches_weight")}
    stands["is_thin"] = lambda _x, *channels, **most: thin_conv.few(*channels, **most)
    model = UNet()
    image = torch.rand(2, 1, 64, 64)
    with mock.patch.multiple(thin_conv, **stands), torch.autocast("cpu", dtype):
        for merged in (True, False):
            for block in model.blocks:
                block.merged = merged
            model(image).sum().backward()
        with torch.inference_mode():
            FoldedUNet(model, dtype)(image)
    return list(seen.values())


def main(capabilities: list[int]) -> None:
    """Build them for each of the cards."""
    newer = of_the_network(torch.bfloat16)
    older = list({source.fn.fn.__name__: source for source in of_the_network(torch.float16)}.values())
    for capability in capabilities:
        for source in newer if capability >= 80 else older:
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            code = built.asm["ptx"]
            known = {"shared": built.metadata.shared, "products": "mma." in code, "drops_nan": "max.f32" in code}
            print(json.dumps({"card": capability, "kernel": source.fn.fn.__name__, **known}))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
