"""Choose the implementation of the dense block's operations: plain PyTorch or Triton."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Self

import torch
from torch import Tensor

from errors import UsageError
from kernels import reference
from kernels.feature_maps import FeatureMaps

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


def select(requested: str, device: torch.device, precision: str) -> tuple[Backend, str | None]:
    """Return the backend for `--kernels`, and a warning if a GPU will run without Triton.

    Raises:
        UsageError: Triton is requested by name and cannot be used.
    """
    if requested == "torch":
        return REFERENCE, None
    reason = _missing_requirement(device, precision) or _compile_error(device)
    if reason is None:
        from kernels import triton_ops  # noqa: TID251

        return Backend.from_module(triton_ops), None
    if requested == "triton":
        raise UsageError(f"kernels triton: {reason}", "use --kernels auto")
    return REFERENCE, f"kernels: plain PyTorch, since {reason}" if device.type == "cuda" else None


def _compile_error(device: torch.device) -> str | None:
    """Compile and run one kernel; return why that fails, or None."""
    try:  # no compiler, no matching driver, a broken installation raise all kinds of errors
        from kernels import triton_ops  # noqa: TID251

        value = torch.zeros(1, 1, 1, 1, device=device)
        triton_ops.copy_with_stats(
            value, FeatureMaps(torch.empty_like(value), *torch.zeros(3, 1, device=device))
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        return f"Triton does not work here: {str(error).partition(chr(10))[0]}"
    return None


def _missing_requirement(device: torch.device, precision: str) -> str | None:
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
