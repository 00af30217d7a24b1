"""Define the values of `--precision`; docs/parity.md says which is the original's."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from kernels import cpu


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


def cpu_note(device: torch.device, precision: str) -> str | None:
    """Return a note if a run on this CPU would be faster in single precision, else None."""
    dtype = PRECISIONS[precision].autocast
    if device.type != "cpu" or dtype is None or cpu.computes_in(dtype):
        return None
    return (
        f"precision {precision}: this CPU has no instructions for {str(dtype).partition('.')[2]}, "
        "so it saves memory but no time; --precision single is faster"
    )
