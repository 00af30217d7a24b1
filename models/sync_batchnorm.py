"""Batch norm and dropout of one batch that several replicas share.

Every replica runs the same network on its images of the batch, and the mean of their gradients is
applied. An image gets the same dropout mask on any replica. With `--syncBN` batch norms use the
statistics of the whole batch: two numbers per channel are exchanged forward and two backward, which
docs/memory.md derives.

A module finds its replica's part of the batch in its attribute `shard`, which
models.factory.attach_shard sets. The sizes in a shard may change between steps, not between a
forward pass and its backward. A replica without images runs one image of zeros with weight 0, so
that it takes part in every exchange; the gradient of its output must be 0, too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distributed.world import BatchShard
from kernels.feature_maps import FeatureMaps


def sample_offset(shard: BatchShard | None) -> int:
    """Count the images of the batch that earlier replicas have; 0 for a single process."""
    return 0 if shard is None else shard.offset


def all_reduced_stats(shard: BatchShard, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over all replicas, (C,), from those of this replica."""
    means, variances = shard.all_gather(torch.stack([mean, var])).unbind(1)  # (replicas, C)
    weights = shard.weights.to(mean.dtype)[:, None]
    mean = (weights * means).sum(0)
    # The law of total variance: unlike E[x^2] - E[x]^2 it keeps its digits if a mean is far from 0.
    return mean, (weights * (variances + (means - mean).square())).sum(0)


def all_reduced_corrections(
    shard: BatchShard, mean_correction: Tensor, var_correction: Tensor
) -> Tensor:
    """Return the corrections (kernels/feature_maps.py) over all replicas, from this replica's.

    Args:
        mean_correction, var_correction: (C,), divided by the number of values on this replica.

    Returns:
        (2, C), mean_correction and var_correction, divided by the number of values of all.
    """
    weight = shard.weights[shard.rank].to(mean_correction.dtype)
    # The weight is (values here) / (values of all).
    total = torch.stack([mean_correction, var_correction]) * weight
    shard.all_reduce_(total)
    return total * weight.sign()  # the statistics do not depend on an image of zeros


def all_reduce_stats(shard: BatchShard | None, features: FeatureMaps) -> None:
    """Replace statistics that an operation has just written by those of all replicas."""
    if shard is None or features.var is None:  # recomputed maps: their statistics are known
        return
    mean, var = all_reduced_stats(shard, features.mean, features.var)
    features.mean.copy_(mean)
    features.var.copy_(var)
    features.rstd.copy_((var + features.eps).rsqrt_())


def all_reduce_corrections(shard: BatchShard | None, features: FeatureMaps) -> None:
    """Replace the corrections of maps that every reader is done with by those of all replicas."""
    if shard is None:
        return
    own = features.mean_correction, features.var_correction
    for correction, total in zip(own, all_reduced_corrections(shard, *own), strict=True):
        correction.copy_(total)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm, in training over all replicas if `shard` is set; `momentum` is a number then."""

    shard: BatchShard | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape.

        Raises:
            ValueError: training on one value per channel, which has no variance.
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
    """Normalise with the statistics of all replicas; backward exchanges the corrections."""

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
        )  # as if the statistics were constants: the corrections are what that leaves out
        scale = weight * (var + ctx.eps).rsqrt() * (x.shape[1] / x.numel())
        mean_correction, var_correction = all_reduced_corrections(
            ctx.shard, scale * dbias, scale * dweight
        )
        dx -= F.batch_norm(x, mean, var, var_correction, mean_correction, eps=ctx.eps)
        return dx, dweight, dbias, None, None, None, None


def _batch_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of (N, C, H, W) per channel, in single precision or better."""
    # The function returns statistics in the type of the running statistics that it is given.
    running = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.batch_norm_update_stats(x, *running, 1.0)
