"""The precisions of `--precision`, in one table; docs/parity.md says which is the original's."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """How a network computes.

    Args:
        dtype: of parameters, buffers and images.
        autocast: of the products within a forward pass; None keeps `dtype`.
        scales_loss: multiply the loss, so that small gradients do not become 0.
    """

    dtype: torch.dtype
    autocast: torch.dtype | None = None
    scales_loss: bool = False


PRECISIONS = {
    "single": Precision(torch.float32),
    "double": Precision(torch.float64),
    "half": Precision(torch.float32, torch.float16, scales_loss=True),
    "bf16": Precision(torch.float32, torch.bfloat16),
}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context of a forward pass in a precision of `--precision`."""
    dtype = PRECISIONS[precision].autocast
    return torch.autocast(device.type, dtype) if dtype else nullcontext()
