"""Dropout whose mask is a function of (seed, layer, position): recomputed and never stored."""

from dataclasses import dataclass

import torch
from torch import Tensor

# 0x846CA68B as a signed number: "lowbias32" of C. Wellons
HASH_FACTOR_1, HASH_FACTOR_2 = 0x7FEB352D, -0x7B935975
HASH_BITS = 24  # of the hash that are compared


@dataclass(frozen=True)
class DropoutSpec:
    """One place of dropout in one step.

    Args:
        rate: probability that a value becomes 0; the others are divided by 1 - rate.
        seed: (1,) int32 on the device of the data, another in every step.
        layer_id: tells the dropouts of one step apart.
        sample_offset: images that stand before these in the batch of all replicas, so that
            an image has the same mask however many replicas share the batch.
    """

    rate: float
    seed: Tensor
    layer_id: int
    sample_offset: int = 0

    @property
    def threshold(self) -> int:
        """A value is dropped where the lowest 24 bits of its hash are below this."""
        return round(self.rate * 2**HASH_BITS)

    @property
    def scale(self) -> float:
        """What the values that stay are multiplied by."""
        return 1 / (1 - self.rate)

    def mask(self, x: Tensor, start: int = 0) -> Tensor:
        """`scale` where a value stays and 0 where it is dropped, of the shape and type of `x`.

        Args:
            x: (n, H, W, C), images `start` to `start` + n of this replica.
        """
        offset = (self.sample_offset + start) * x[0].numel()
        index = torch.arange(offset, offset + x.numel(), device=x.device).to(torch.int32)
        key = _hash32(self.seed + _to_int32(self.layer_id * 0x3504F333))
        kept = (_hash32(_hash32(index ^ key) + key) & (2**HASH_BITS - 1)) >= self.threshold
        return kept.to(x.dtype).mul_(self.scale).view(x.shape)


def _hash32(x: Tensor) -> Tensor:
    """A hash of 32 bits: int32 products wrap, and a shift is logical once masked."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * HASH_FACTOR_1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * HASH_FACTOR_2
    return x ^ ((x >> 16) & 0xFFFF)


def draw_seed(device: torch.device) -> Tensor:
    """(1,) int32 from the global generator of the device: resumed with it, captured with it."""
    return torch.randint(0, 2**31 - 1, (1,), dtype=torch.int32, device=device)


def _to_int32(x: int) -> int:
    """The int32 with the same lowest 32 bits."""
    return (x + 2**31) % 2**32 - 2**31
