"""Record what kernels/triton_ops.py would launch, and compile it for any GPU: none is needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from torch import Tensor

from kernels import tiling, triton_arguments, triton_ops
from kernels.tiling import Gpu, Tile

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Variant:
    """Describe what Triton compiles for a launch: types, constants, threads, pipeline stages."""

    kernel: object
    signature: tuple[tuple[str, str], ...]  # of parameters; "constexpr" for constants
    constants: tuple[tuple[str, object], ...]
    warps: int
    stages: int

    def compiled(self, architecture: int, registers: int | None = None, **changed: object):
        """Compile for a GPU of compute capability architecture / 10.

        Args:
            registers: at most, of a thread.
            changed: other values of constants.
        """
        options = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": registers}
        source = triton.compiler.ASTSource(
            fn=self.kernel,
            signature=dict(self.signature),
            constexprs=dict(self.constants) | changed,
        )
        target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
        return triton.compile(source, target=target, options=options)


@dataclass(frozen=True)
class Launch:
    """Hold a launch: its code, its grid and its arguments (tensors without memory, numbers)."""

    variant: Variant
    grid: tuple[int, ...]
    arguments: dict[str, object]  # with tile sizes; None: the kernel is compiled without it

    @property
    def name(self) -> str:
        """Return the kernel's name."""
        return self.variant.kernel.__name__


def as_launch(
    kernel, grid: tuple[int, ...], tile: Tile, early: bool = False, **arguments
) -> Launch:
    """Describe a launch as `triton_ops._launch` would make it; none is specialised on values.

    Args:
        early: the kernel may be started before the one before it ends.
    """
    arguments |= tile.sizes
    if "PDL" in kernel.arg_names:
        arguments["PDL"] = early
    assert arguments.keys() == set(kernel.arg_names), kernel.__name__
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        assert parameter.do_not_specialize and parameter.do_not_specialize_on_alignment
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
    items = tuple(signature.items()), tuple(constants.items())
    return Launch(Variant(kernel, *items, tile.warps, tile.stages), grid, arguments)


@contextmanager
def recorded(gpu: Gpu) -> Iterator[list[Launch]]:
    """Collect all launches on a GPU inside the `with` block, in order; run none.

    Tensors have no memory (meta or fake), and stand for those of the GPU.
    """
    found: list[Launch] = []

    def precision(x: Tensor) -> str:
        return triton_precision(x.to("meta"))

    def launch(*given: object, **named: object) -> None:
        found.append(as_launch(*given, early=gpu.launches_early, **named))

    triton_precision = triton_arguments._precision  # a fake tensor of a GPU is one of the CPU
    with (
        mock.patch.object(triton_ops, "_launch", launch),
        mock.patch.object(triton_arguments, "_precision", precision),
        mock.patch.object(tiling, "gpu_of", lambda device: gpu),
    ):
        yield found
