"""Compute dropout masks as a hash of (seed, layer, position), which backward recomputes.

A mask takes no memory, and does not depend on the backend or the number of processes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# "lowbias32" of C. Wellons; the second factor is 0x846CA68B as an int32
HASH_FACTOR_1, HASH_FACTOR_2 = 0x7FEB352D, -0x7B935975
HASH_BITS = 24  # the lowest bits of the hash, compared with the threshold


@dataclass(frozen=True)
class DropoutSpec:
    """Describe one dropout layer in one step."""

    rate: float  # probability that a value becomes 0; the others are divided by 1 - rate
    seed: Tensor  # (1,) int32 on the device of the data, a new one in every step
    layer_id: int  # distinguishes the dropout layers of one step
    sample_offset: int = 0  # index of this process's first image in the global batch

    @property
    def threshold(self) -> int:
        """Return the integer below which a hash drops its value: rate * 2^HASH_BITS."""
        return round(self.rate * 2**HASH_BITS)

    @property
    def scale(self) -> float:
        """Return the factor of the values that are kept: 1 / (1 - rate)."""
        return 1 / (1 - self.rate)

    def mask(self, x: Tensor, start: int = 0) -> Tensor:
        """Return `scale` where a value is kept and 0 elsewhere, in the shape and dtype of `x`.

        x, (n, H, W, C), holds images `start` to `start` + n of this process's batch.
        """
        # The position in the global batch, modulo 2^32.
        offset = (self.sample_offset + start) * x[0].numel()
        index = torch.arange(offset, offset + x.numel(), device=x.device).to(torch.int32)
        key = _hash32(self.seed + _to_int32(self.layer_id * 0x3504F333))
        kept = (_hash32(_hash32(index ^ key) + key) & (2**HASH_BITS - 1)) >= self.threshold
        return kept.to(x.dtype).mul_(self.scale).view(x.shape)


def _hash32(x: Tensor) -> Tensor:
    """Hash int32 bits: products wrap modulo 2^32, and the masks make the shifts logical."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * HASH_FACTOR_1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * HASH_FACTOR_2
    return x ^ ((x >> 16) & 0xFFFF)


def draw_seed(device: torch.device) -> Tensor:
    """Draw (1,) int32 from the device's global generator, which checkpoints and graphs restore."""
    return torch.randint(0, 2**31 - 1, (1,), dtype=torch.int32, device=device)


def _to_int32(x: int) -> int:
    """Keep the lowest 32 bits, as a signed number."""
    return (x + 2**31) % 2**32 - 2**31
