"""What the kernels work on: channels-last feature maps with their statistics and gradient."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class FeatureMaps:
    """Feature maps, the moments of their channels and what backward gathers for them.

    Each batch normalisation that reads these maps adds to `grad`, to `mean_correction` and to
    `var_correction`. The gradient is complete only when the last one has run, as

        grad - mean_correction - (value - mean) * rstd * var_correction

    so that no reader needs a reduction over the whole batch before it can write (see
    docs/memory.md). Views share memory: `channels` of a buffer writes into the buffer.

    Args:
        value: (N, H, W, C).
        mean: (C,), of the batch in training, the running one in evaluation; None when no batch
            normalisation reads these maps.
        rstd: (C,), 1 / sqrt(variance + eps).
        var: (C,), biased variance of the batch; None where the moments are known already.
        grad: (N, H, W, C) or None outside of backward.
        mean_correction, var_correction: (C,), sums over the readers of scale * dbeta / M
            and of scale * dgamma / M.
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
        """Channels `start` to `stop`, sharing memory."""
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
        """M = N * H * W, the values that one channel has."""
        return self.value.shape[0] * self.value.shape[1] * self.value.shape[2]


@dataclass(frozen=True)
class NormParams:
    """The learned part of a batch normalisation: weight (gamma) and bias (beta), (C,) each."""

    weight: Tensor
    bias: Tensor

    def affine(self, x: FeatureMaps) -> tuple[Tensor, Tensor]:
        """(scale, shift) such that the normalised value is value * scale + shift; (C,) each."""
        scale = self.weight * x.rstd
        return scale, torch.addcmul(self.bias, x.mean, scale, value=-1)
