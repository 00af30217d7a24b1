"""Dropout whose mask is a function of (seed, place), so that it is recomputed and never stored."""

from dataclasses import dataclass

import torch
from torch import Tensor

MIX_1, MIX_2 = 0x7FEB352D, -0x7B935975  # 0x846CA68B as a signed number: "lowbias32" of C. Wellons
BITS = 24  # of the hash that are compared


@dataclass(frozen=True)
class Drop:
    """One place of dropout in one step.

    Args:
        rate: probability that a value becomes 0; the others are divided by 1 - rate.
        seed: (1,) int32 on the device of the data, another in every step.
        place: tells the dropouts of one step apart.
        first: images that stand before these in the batch of all replicas, so that an image has
            the same mask however many replicas share the batch.
    """

    rate: float
    seed: Tensor
    place: int
    first: int = 0

    @property
    def threshold(self) -> int:
        """A value is dropped where the lowest 24 bits of its hash are below this."""
        return round(self.rate * 2**BITS)

    @property
    def scale(self) -> float:
        """What the values that stay are multiplied by."""
        return 1 / (1 - self.rate)

    def mask(self, x: Tensor, start: int = 0) -> Tensor:
        """`scale` where a value stays and 0 where it is dropped, of the shape and type of `x`.

        Args:
            x: (n, H, W, C), images `start` to `start` + n of this replica.
        """
        first = (self.first + start) * x[0].numel()
        index = torch.arange(first, first + x.numel(), device=x.device).to(torch.int32)
        key = _mix(self.seed + _wrap(self.place * 0x3504F333))
        kept = (_mix(_mix(index ^ key) + key) & (2**BITS - 1)) >= self.threshold
        return kept.to(x.dtype).mul_(self.scale).view(x.shape)


def _mix(x: Tensor) -> Tensor:
    """A hash of 32 bits: int32 products wrap, and a shift is logical once masked."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * MIX_1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * MIX_2
    return x ^ ((x >> 16) & 0xFFFF)


def draw_seed(device: torch.device) -> Tensor:
    """(1,) int32 from the global generator of the device: resumed with it, captured with it."""
    return torch.randint(0, 2**31 - 1, (1,), dtype=torch.int32, device=device)


def _wrap(x: int) -> int:
    """The int32 with the same lowest 32 bits."""
    return (x + 2**31) % 2**32 - 2**31
