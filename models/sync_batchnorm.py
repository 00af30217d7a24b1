"""Compute batch norm and dropout of a global batch that several processes share.

Every process runs the same network on its images of the batch, and the mean of their gradients is
applied. An image gets the same dropout mask on any process. With `--syncBN` batch norms use the
statistics of the whole batch: two numbers per channel are exchanged forward and two backward, which
docs/memory.md derives.

A module finds its process's part of the batch in its attribute `shard`, which
models.factory.attach_shard sets. The sizes in a shard may change between steps, not between a
forward pass and its backward. A process without images runs one image of zeros with weight 0, so
that it takes part in every exchange; the gradient of its output must be 0, too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distributed.world import BatchShard
from kernels.feature_maps import FeatureMaps


def sample_offset(shard: BatchShard | None) -> int:
    """Return the index in the global batch of this process's first image."""
    return 0 if shard is None else shard.offset


def all_reduced_stats(shard: BatchShard, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over all processes, (C,), from those of this one."""
    means, variances = shard.all_gather(torch.stack([mean, var])).unbind(1)  # (processes, C)
    weights = shard.weights.to(mean.dtype)[:, None]
    mean = (weights * means).sum(0)
    # The law of total variance: unlike E[x^2] - E[x]^2 it keeps its digits if a mean is far from 0.
    return mean, (weights * (variances + (means - mean).square())).sum(0)


def all_reduced_corrections(
    shard: BatchShard, mean_correction: Tensor, var_correction: Tensor
) -> Tensor:
    """Return the corrections (kernels/feature_maps.py) over all processes, from this one's.

    Args:
        mean_correction, var_correction: (C,), divided by the number of values of this process.

    Returns:
        (2, C), mean_correction and var_correction, divided by the number of all values.
    """
    weight = shard.weights[shard.rank].to(mean_correction.dtype)
    # weight = (values of this process) / (values of all processes)
    total = torch.stack([mean_correction, var_correction]) * weight
    shard.all_reduce_(total)
    return total * weight.sign()  # 0 for an image of zeros: statistics do not depend on it


def all_reduce_stats(shard: BatchShard | None, features: FeatureMaps) -> None:
    """Replace statistics that an operation has just written by those of all processes."""
    if shard is None or features.var is None:  # recomputed maps: their statistics are known
        return
    mean, var = all_reduced_stats(shard, features.mean, features.var)
    features.mean.copy_(mean)
    features.var.copy_(var)
    features.rstd.copy_((var + features.eps).rsqrt_())


def all_reduce_corrections(shard: BatchShard | None, features: FeatureMaps) -> None:
    """Replace the corrections of maps, after their last reader, by those of all processes."""
    if shard is None:
        return
    own = features.mean_correction, features.var_correction
    for correction, total in zip(own, all_reduced_corrections(shard, *own), strict=True):
        correction.copy_(total)


class BatchNorm(nn.BatchNorm2d):
    """Normalise over all processes in training if `shard` is set; `momentum` is a number then."""

    shard: BatchShard | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x, (N, C, H, W).

        Raises:
            ValueError: in training, each channel has one value in the whole batch, so no variance.
        """
        if self.shard is None or not self.training:
            return super().forward(x)
        count = self.shard.global_size * x.shape[2] * x.shape[3]
        if count == 1:
            raise ValueError("batch normalisation of one value per channel has no variance")
        with torch.no_grad():
            mean, var = all_reduced_stats(self.shard, *_batch_stats(x))
            unbiased = var * (count / (count - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        return _SyncBatchNorm.apply(x, self.weight, self.bias, mean, var, self.eps, self.shard)


class _SyncBatchNorm(torch.autograd.Function):
    """Normalise with the statistics of all processes; backward exchanges the corrections."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps: float, shard: BatchShard) -> Tensor:
        ctx.eps, ctx.shard = eps, shard
        ctx.save_for_backward(x, weight, mean, var)
        return F.batch_norm(x, mean, var, weight.to(mean.dtype), bias.to(mean.dtype), eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, mean, var = ctx.saved_tensors
        weight = weight.to(mean.dtype)
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, (True, True, True)
        )  # as if the statistics were constants; the corrections below make up for that
        scale = weight * (var + ctx.eps).rsqrt() * (x.shape[1] / x.numel())
        mean_correction, var_correction = all_reduced_corrections(
            ctx.shard, scale * dbias, scale * dweight
        )
        dx -= F.batch_norm(x, mean, var, var_correction, mean_correction, eps=ctx.eps)
        return dx, dweight, dbias, None, None, None, None


def _batch_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of (N, C, H, W) per channel, in float32 or float64."""
    # batch_norm_update_stats returns statistics in the dtype of its running statistics.
    running = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.batch_norm_update_stats(x, *running, 1.0)
