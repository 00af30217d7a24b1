"""Define the values of `--precision`; docs/parity.md says which is the original's."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Give the dtypes in which a network computes."""

    dtype: torch.dtype  # of parameters, buffers and images
    autocast: torch.dtype | None = None  # of products in a forward pass; None keeps `dtype`
    scales_loss: bool = False  # multiply the loss, so that small gradients do not become 0


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
