"""A network as one of several replicas: dropout and batch normalisation as of the whole batch.

Each replica runs the same network on its images of one batch, and the mean of their gradients is
applied. An image has the same dropout mask on whichever replica it is. Batch normalisations can
take the moments of the whole batch; docs/memory.md derives what is exchanged then.

A layer knows its replica's part of the batch from its attribute `shard`, which
models.factory.attach_shard sets: `first`, the images that stand before it, `total`,
those of all, and `weights`, (replicas,),
the part that each replica has. They may change between steps, not between a forward pass and its
backward. A replica without an image computes an image of zeros, so that every replica takes part in
every exchange: its weight is 0, and so must be the gradient of its output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distributed.world import BatchShard


def sample_offset(shard: BatchShard | None) -> int:
    """The number of images of the batch that stand before a replica's; 0 for a single process."""
    return 0 if shard is None else shard.offset


def all_reduced_stats(shard: BatchShard, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all replicas' values, from those of each, (C,)."""
    means, variances = shard.all_gather(torch.stack([mean, var])).unbind(1)  # (replicas, C)
    weights = shard.weights.to(mean.dtype)[:, None]
    mean = (weights * means).sum(0)
    # By the law of total variance: nothing is lost where a mean is far from 0.
    return mean, (weights * (variances + (means - mean).square())).sum(0)


def all_reduced_corrections(
    shard: BatchShard, mean_correction: Tensor, var_correction: Tensor
) -> Tensor:
    """What completes the gradient of this replica's maps (see kernels/feature_maps.py), from all.

    Args:
        mean_correction, var_correction: (C,), from the readers on this replica, with M the
            values that it has.

    Returns:
        (2, C), mean_correction and var_correction.
    """
    weight = shard.weights[shard.rank].to(mean_correction.dtype)
    # From 1 / M here to 1 / M of all.
    total = torch.stack([mean_correction, var_correction]) * weight
    shard.all_reduce_(total)
    return total * weight.sign()  # an image of zeros is in no mean


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation, in training over all replicas if it has their `shard`.

    The momentum must be a number then.
    """

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
    """Normalise with moments to which the values of every replica have contributed."""

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
        )  # as if the moments were constants
        scale = weight * (var + ctx.eps).rsqrt() * (x.shape[1] / x.numel())
        mean_correction, var_correction = all_reduced_corrections(
            ctx.shard, scale * dbias, scale * dweight
        )
        dx -= F.batch_norm(x, mean, var, var_correction, mean_correction, eps=ctx.eps)
        return dx, dweight, dbias, None, None, None, None


def _batch_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of (N, C, H, W) per channel, in single precision or better."""
    # Given running statistics of that precision, it returns the moments in it.
    running = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.batch_norm_update_stats(x, *running, 1.0)
