"""The operands of the kernels: channels-last feature maps with statistics and gradient."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class FeatureMaps:
    """Feature maps, the statistics of their channels, and their gradient so far.

    The backward of a batch normalisation needs sums over the whole batch. All that read these maps
    share mean and rstd, so that each adds scale * dz to `grad` at once, and its sums to
    `mean_correction` and `var_correction`. When the last one has run, the complete gradient is

        grad - mean_correction - (value - mean) * rstd * var_correction

    See docs/memory.md, "Deferred correction".

    Args:
        value: (N, H, W, C).
        mean: (C,), of the batch in training, the running one in evaluation; None if no batch
            normalisation reads these maps.
        rstd: (C,), 1 / sqrt(variance + eps).
        var: (C,), biased variance of the batch; None if forward must not compute statistics.
        grad: (N, H, W, C), in backward.
        mean_correction, var_correction: (C,), sums over all readers of scale * dbeta / M and
            scale * dgamma / M; scale = gamma * rstd, M = N * H * W.
        eps: of every batch normalisation that reads these maps.
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
        return replace(
            self,
            **{
                field.name: getattr(self, field.name)[..., start:stop]
                for field in fields(self)
                if isinstance(getattr(self, field.name), Tensor)
            },
        )

    @property
    def num_pixels(self) -> int:
        """M = N * H * W."""
        return self.value.shape[0] * self.value.shape[1] * self.value.shape[2]


@dataclass(frozen=True)
class NormParams:
    """The parameters of a batch normalisation: weight (gamma) and bias (beta), (C,) each."""

    weight: Tensor
    bias: Tensor

    def affine(self, x: FeatureMaps) -> tuple[Tensor, Tensor]:
        """Return (scale, shift), (C,) each: the normalised value is value * scale + shift."""
        scale = self.weight * x.rstd
        return scale, torch.addcmul(self.bias, x.mean, scale, value=-1)
