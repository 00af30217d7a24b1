"""List the implementations of the dense block's operations: plain PyTorch and Triton."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Self

import torch
from torch import Tensor

from kernels import reference

MIN_CAPABILITY = (8, 0)  # of a GPU: bf16 and asynchronous copies


@dataclass(frozen=True)
class Backend:
    """Hold the operations of a dense block, which kernels/reference.py specifies."""

    # Functions of a module are pickled by name, so that a network can be copied with its backend.
    name: str
    copy_with_stats: Callable[..., None]
    conv1x1: Callable[..., None]
    conv3x3: Callable[..., None]
    norm_relu_avg_pool: Callable[..., Tensor]
    conv1x1_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    conv3x3_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    norm_relu_avg_pool_backward: Callable[..., tuple[Tensor, Tensor]]
    complete_gradient: Callable[..., Tensor]

    @classmethod
    def from_module(cls, module: ModuleType) -> Self:
        """Collect the operations of a module by their names."""
        operations = [field.name for field in fields(cls) if field.name != "name"]
        return cls(module.__name__, *(getattr(module, name) for name in operations))


REFERENCE = Backend.from_module(reference)


def load_triton() -> Backend:
    """Import Triton, and return the backend that uses it."""
    from kernels import triton_ops  # noqa: TID251

    return Backend.from_module(triton_ops)


def triton_version() -> str:
    """Import Triton, and return its version."""
    import triton  # noqa: TID251

    return triton.__version__


def missing_requirement(device: torch.device, precision: str) -> str | None:
    """Check installation, precision and device; return why Triton cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if precision == "double":
        return "Triton's products have no double precision"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        old = (major, minor) < MIN_CAPABILITY
        return f"the GPU has compute capability {major}.{minor}, below 8.0" if old else None
    return None if os.environ.get("TRITON_INTERPRET") == "1" else "there is no CUDA device"
