"""Define the kernels' arguments: feature maps with statistics and gradient, norm parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class FeatureMaps:
    """Hold feature maps, the statistics of their channels, and their gradient so far.

    The backward of a batch norm needs sums over the whole batch. All batch norms that read these
    maps share mean and rstd: each adds scale * dz to `grad` right away, and its sums to the
    corrections. After the last one the complete gradient (docs/memory.md, "Deferred correction") is

        grad - mean_correction - (value - mean) * rstd * var_correction
    """

    value: Tensor  # (N, H, W, C)
    mean: Tensor | None = None  # (C,), of the batch or running; None: no batch norm reads it
    rstd: Tensor | None = None  # (C,), 1 / sqrt(variance + eps)
    var: Tensor | None = None  # (C,), biased, of the batch; None: forward computes no statistics
    grad: Tensor | None = None  # (N, H, W, C), in backward
    # (C,), sums over all these batch norms of scale * dbeta / M and scale * dgamma / M, where
    # scale = gamma * rstd and M = N * H * W.
    mean_correction: Tensor | None = None
    var_correction: Tensor | None = None
    eps: float = 1e-5  # of all these batch norms

    def channels(self, start: int, stop: int) -> FeatureMaps:
        """Return channels [start, stop) as a view: writing to it writes to these maps."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **{name: x[..., start:stop] for name, x in tensors.items()})

    @property
    def num_pixels(self) -> int:
        """Return M = N * H * W."""
        return self.value.shape[0] * self.value.shape[1] * self.value.shape[2]


@dataclass(frozen=True)
class Norm:
    """Hold a batch norm: its parameters, and its affine function once it knows the statistics.

    The normalised value is value * scale + shift.
    """

    weight: Tensor  # (C,), gamma
    bias: Tensor  # (C,), beta
    scale: Tensor  # (C,), weight * rstd
    shift: Tensor  # (C,), bias - mean * scale

    def update(self, x: FeatureMaps) -> None:
        """Compute `scale` and `shift` for the statistics of the maps that it reads."""
        torch.mul(self.weight, x.rstd, out=self.scale)
        torch.addcmul(self.bias, x.mean, self.scale, value=-1, out=self.shift)


@dataclass(frozen=True)
class Reader:
    """Name the batch norm that reads an operation's target next, and all the maps it reads."""

    norm: Norm
    source: FeatureMaps  # its last channels are the target; the others' statistics are known


def nchw(x: Tensor) -> Tensor:
    """View (N, H, W, C) as (N, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    """View (N, C, H, W) as (N, H, W, C)."""
    return x.permute(0, 2, 3, 1)
