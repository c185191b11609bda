"""Build the Triton kernels of the recipe's network for a GPU that is not there: `python built_kernels.py 86`.

Writes a JSON line for each kernel, with the shared memory in bytes that a program of it needs and whether it multiplies
on tensor cores.
"""

import json
import sys
from collections.abc import Callable

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
    thin_conv._patches = Launches(thin_conv._patches, seen)
    thin_conv._patches_weight = Launches(thin_conv._patches_weight, seen)
    thin_conv.is_thin = lambda _x, *channels, **most: thin_conv.few(*channels, **most)
    model = UNet()
    image = torch.rand(2, 1, 64, 64)
    with torch.autocast("cpu", dtype):
        for merged in (True, False):
            for block in model.blocks:
                block.merged = merged
            model(image).sum().backward()
        with torch.inference_mode():
            FoldedUNet(model, dtype)(image)
    return list(seen.values())


def main(capability: int) -> None:
    """Build all of them for one compute capability, as 86 for 8.6."""
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    for source in of_the_network(dtype):
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        products = "mma." in built.asm["ptx"]
        print(json.dumps({"kernel": source.fn.fn.__name__, "shared": built.metadata.shared, "products": products}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
