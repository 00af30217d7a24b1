"""Define the operands of the kernels: feature maps with statistics and gradient, and norms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class FeatureMaps:
    """Hold feature maps, the statistics of their channels, and their gradient so far.

    The backward of a batch norm needs sums over the whole batch. All batch norms that read these
    maps share mean and rstd: each adds scale * dz to `grad` at once, and its sums to the
    corrections. After the last one the complete gradient (docs/memory.md, "Deferred correction") is

        grad - mean_correction - (value - mean) * rstd * var_correction

    Args:
        value: (N, H, W, C).
        mean: (C,), of the batch, or running in evaluation; None if no batch norm reads the maps.
        rstd: (C,), 1 / sqrt(variance + eps).
        var: (C,), biased variance of the batch; None if forward must not compute statistics.
        grad: (N, H, W, C), in backward.
        mean_correction, var_correction: (C,), sums over all these batch norms of scale * dbeta / M
            and scale * dgamma / M; scale = gamma * rstd, M = N * H * W.
        eps: of all these batch norms.
    """

    value: Tensor
    mean: Tensor | None = None
    rstd: Tensor | None = None
    var: Tensor | None = None
    grad: Tensor | None = None
    mean_correction: Tensor | None = None
    var_correction: Tensor | None = None
    eps: float = 1e-5

    def channels(self, start: int, stop: int) -> FeatureMaps:
        """Return channels [start, stop) as a view: writing to it writes to these maps."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **{name: x[..., start:stop] for name, x in tensors.items()})

    @property
    def num_pixels(self) -> int:
        """Return M = N * H * W."""
        return self.value.shape[0] * self.value.shape[1] * self.value.shape[2]


@dataclass(frozen=True)
class NormParams:
    """Hold the parameters of a batch norm: weight (gamma) and bias (beta), (C,) each."""

    weight: Tensor
    bias: Tensor

    def affine(self, x: FeatureMaps) -> tuple[Tensor, Tensor]:
        """Return (scale, shift), (C,) each: the normalised value is value * scale + shift."""
        scale = self.weight * x.rstd
        return scale, torch.addcmul(self.bias, x.mean, scale, value=-1)
