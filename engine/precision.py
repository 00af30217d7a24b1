"""The precisions of `--precision`: parameter types, autocast types, loss scaling."""

from contextlib import AbstractContextManager, nullcontext

import torch

AUTOCAST_DTYPES = {"half": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context of a forward pass in a precision of `--precision`."""
    dtype = AUTOCAST_DTYPES.get(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()
