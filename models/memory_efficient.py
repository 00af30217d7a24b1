"""The dense block that is linear in memory: memory levels 2, 3 and 4.

One channels-last buffer holds the maps of a whole block, so that nothing is concatenated. The
moments of a channel are computed once, when it is written, and shared by every later batch
normalisation. Backward recomputes what is cheap; docs/memory.md derives it.

| memory level | keeps for backward, besides vectors of one number per channel |
|--------------|---------------------------------------------------------------|
| 2            | the buffer, and the bottleneck maps of every layer            |
| 3            | the buffer; bottleneck maps are recomputed layer by layer     |
| 4            | the block's input; the buffer is recomputed too               |

A stage is a dense block together with the batch normalisation, ReLU and pooling (or 1x1
convolution) that read all of it: with them inside, level 4 need not keep the buffer for them.
"""

from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distributed.world import Share
from kernels.backend import Backend
from kernels.dropout import DropoutSpec
from kernels.feature_maps import FeatureMaps, NormParams
from models.dense_block import DenseBlock, DenseLayer
from models.sync_batchnorm import BatchNorm, merged_corrections, merged_moments

SHARED_LEVELS = (2, 3, 4)


@dataclass(frozen=True)
class Tail:
    """What reads the whole block, after a batch normalisation and a ReLU.

    Args:
        norm: that batch normalisation.
        window: average over windows of this many pixels, height and width; or
        conv: a 1x1 convolution.
    """

    norm: nn.BatchNorm2d
    window: tuple[int, int] | None = None
    conv: nn.Conv2d | None = None


@dataclass(frozen=True)
class _Plan:
    """What a stage does with its parameters.

    Args:
        eps: of every batch normalisation.
        window: of the tail.
        dtype: of the maps.
        share: of a replica whose batch normalisations take the moments of all replicas, else None.
            They are exchanged as soon as they are written, and what completes the gradient of maps
            when its last reader has been through: each number once, in the same order everywhere.
    """

    ops: Backend
    level: int
    block: DenseBlock
    eps: float
    window: tuple[int, int] | None
    dtype: torch.dtype
    share: Share | None

    def room(self, channels: int, x: Tensor) -> Tensor:
        """Uninitialised maps for images such as x."""
        return x.new_empty((*x.shape[:3], channels), dtype=self.dtype)

    def drops(self, seed: Tensor | None, i: int) -> tuple[DropoutSpec | None, DropoutSpec | None]:
        """The dropouts after the two convolutions of layer i."""
        return self.block.drops(seed, i) or (None, None)

    def merge_moments(self, maps: FeatureMaps) -> None:
        """Turn the moments that an operation has written into those of all replicas."""
        if self.share is None or maps.var is None:  # or it has not: they are known
            return
        mean, var = merged_moments(self.share, maps.mean, maps.var)
        maps.mean.copy_(mean)
        maps.var.copy_(var)
        maps.rstd.copy_((var + maps.eps).rsqrt_())

    def merge_corrections(self, maps: FeatureMaps) -> None:
        """Let the gradient of maps be complete over all replicas."""
        if self.share is None:
            return
        shift, slope = merged_corrections(self.share, maps.mean_correction, maps.var_correction)
        maps.mean_correction.copy_(shift)
        maps.var_correction.copy_(slope)


class _Layer(NamedTuple):
    """The parameters of one dense layer or of the tail, or their gradients; None where it has none.

    A layer and the tail have as many, so that a list of tensors is parted into them again.
    """

    weight1: Tensor
    bias1: Tensor
    conv1: Tensor | None = None
    weight2: Tensor | None = None
    bias2: Tensor | None = None
    conv2: Tensor | None = None

    @property
    def norm1(self) -> NormParams:
        return NormParams(self.weight1, self.bias1)

    @property
    def norm2(self) -> NormParams:
        return NormParams(self.weight2, self.bias2)


def _layer(layer: DenseLayer) -> _Layer:
    first = layer.norm1.weight, layer.norm1.bias, layer.conv1.weight
    if not layer.bottleneck:
        return _Layer(*first)
    return _Layer(*first, layer.norm2.weight, layer.norm2.bias, layer.conv2.weight)


def _parted(tensors: tuple[Tensor | None, ...]) -> list[_Layer]:
    """Undo `chain.from_iterable` of layers."""
    size = len(_Layer._fields)
    return [_Layer(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


def can_run(block: DenseBlock, reader: nn.Module) -> bool:
    """Tell whether `stage` computes what the modules would, as they are now.

    It has one eps, momentum and mode for all batch normalisations of a stage, and neither a
    backward through running statistics nor through a mixture (frozen layers).

    Args:
        reader: what follows the block; can be a tail's if it is a batch normalisation.
    """
    norms = [*block.norms, reader]
    # The type itself: others, converted or parametrised ones too, compute something else.
    if any(type(norm) is not BatchNorm for norm in norms) or reader.momentum is None:
        return False
    # The block's mode decides about its dropout.
    wanted = (reader.eps, reader.momentum, reader.share, block.training)
    return (block.training or not torch.is_grad_enabled()) and all(
        (norm.eps, norm.momentum, norm.share, norm.training) == wanted
        and norm.affine
        and norm.track_running_stats
        and norm.running_mean is not None
        for norm in norms
    )


def stage(block: DenseBlock, tail: Tail, x: Tensor, ops: Backend, level: int) -> Tensor:
    """Run a block and its tail, with the moments of the batch or, in evaluation, the running ones.

    Args:
        x: (N, C, H, W), the block's input.

    Returns:
        (N, C', H', W') of the tail, channels last in memory.

    Raises:
        ValueError: training on one value per channel, which has no variance.
    """
    norms = [*block.norms, tail.norm]
    share = norms[0].share
    plan = _Plan(ops, level, block, tail.norm.eps, tail.window, _maps_dtype(x), share)
    last = _Layer(tail.norm.weight, tail.norm.bias, tail.conv and tail.conv.weight)
    layers = [*map(_layer, block.values()), last]
    with torch.autocast(x.device.type, enabled=False):
        if not block.training:
            return _nchw(_evaluate(plan, _nhwc(x), layers, norms))
        images = len(x) if share is None else share.total
        count = images * x.shape[2] * x.shape[3]
        if count == 1:
            raise ValueError("batch normalisation of one value per channel has no variance")
        seed = block.draw_seed(x.device)
        # Autograd sees tensors that are arguments themselves, none within others.
        out, moments, moments2 = _Stage.apply(plan, x, seed, *chain.from_iterable(layers))
        _update_running_statistics(block, norms, moments, moments2, count)
    return out


class _Stage(torch.autograd.Function):
    """(maps, parameters) -> maps, and the moments of every channel on the way."""

    @staticmethod
    def forward(ctx, plan: _Plan, x: Tensor, seed: Tensor | None, *parameters: Tensor | None):
        block = plan.block
        *layers, last = _parted(parameters)
        source = _nhwc(x)
        wide = torch.promote_types(plan.dtype, torch.float32)
        moments = x.new_empty(3, block.out_channels, dtype=wide)  # mean, rstd, var
        moments2 = x.new_empty(len(block), 3, block.width, dtype=wide)  # of the bottleneck maps
        maps = FeatureMaps(plan.room(block.out_channels, source), *moments, eps=plan.eps)
        given = maps.channels(0, block.channels)
        plan.ops.copy_with_stats(source, given)
        plan.merge_moments(given)
        bottlenecks = []
        for i, layer in enumerate(layers):
            if block.width and (plan.level == 2 or not bottlenecks):
                bottlenecks.append(plan.room(block.width, source))
            inner = (
                FeatureMaps(bottlenecks[-1], *moments2[i], eps=plan.eps) if block.width else None
            )
            _grow(plan, i, layer, maps, inner, seed)
        out = _tail(plan, last, maps)
        kept = [x] if plan.level == 4 else [maps.value]
        kept += bottlenecks if plan.level == 2 else []
        ctx.plan, ctx.num_kept = plan, len(kept)
        ctx.save_for_backward(*kept, moments, moments2, seed, *parameters)
        ctx.mark_non_differentiable(moments, moments2)
        return _nchw(out), moments, moments2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        plan: _Plan = ctx.plan
        block = plan.block
        saved = ctx.saved_tensors  # once: whoever moved them elsewhere brings them back each time
        (first, *bottlenecks), rest = saved[: ctx.num_kept], saved[ctx.num_kept :]
        moments, moments2, seed, *parameters = rest
        *layers, last = _parted(parameters)
        mean, rstd, _ = moments
        maps = FeatureMaps(first, mean, rstd, eps=plan.eps)
        if plan.level == 4:
            source = _nhwc(first)
            maps.value = plan.room(block.out_channels, source)
            maps.value[..., : block.channels] = source
            del saved, first, source
            ctx.maybe_clear_saved_tensors()  # the input: it is in the buffer now
        inner_grad = plan.room(block.width, maps.value)
        inner_value = plan.room(block.width, maps.value) if plan.level > 2 else None
        inner_sums = torch.zeros_like(moments2[:, :2])

        def inner(i: int) -> FeatureMaps | None:
            if not block.width:
                return None
            value = bottlenecks[i] if plan.level == 2 else inner_value
            return FeatureMaps(
                value, *moments2[i, :2], None, inner_grad, *inner_sums[i], eps=plan.eps
            )

        if plan.level == 4:
            for i, layer in enumerate(layers):
                _grow(plan, i, layer, maps, inner(i), seed)

        maps.grad = plan.room(block.out_channels, maps.value)
        maps.mean_correction, maps.var_correction = torch.zeros_like(moments[:2])
        grads = [_tail_backward(plan, last, maps, _nhwc(grad).to(plan.dtype))]
        for i, layer in reversed([*enumerate(layers)]):
            grads.append(_shrink(plan, i, layer, maps, inner(i), seed))
        dx = None
        if ctx.needs_input_grad[1]:
            given = maps.channels(0, block.channels)
            plan.merge_corrections(given)
            dx = _nchw(plan.ops.complete_gradient(given))
        grads = [
            None if parameter is None else found.view_as(parameter).to(parameter.dtype)
            for found, parameter in zip(
                chain.from_iterable(reversed(grads)), parameters, strict=True
            )
        ]
        return None, dx, None, *grads


def _grow(
    plan: _Plan, i: int, layer: _Layer, maps: FeatureMaps, inner: FeatureMaps | None, seed
) -> None:
    """Write the new maps of layer i."""
    start, end = plan.block.start(i), plan.block.start(i + 1)
    source, new = maps.channels(0, start), maps.channels(start, end)
    drop1, drop2 = plan.drops(seed, i)
    if inner is None:
        plan.ops.conv3x3(source, layer.norm1, layer.conv1, new, drop1)
    else:
        plan.ops.conv1x1(source, layer.norm1, layer.conv1, inner, drop1)
        plan.merge_moments(inner)
        plan.ops.conv3x3(inner, layer.norm2, layer.conv2, new, drop2)
    plan.merge_moments(new)


def _shrink(
    plan: _Plan, i: int, layer: _Layer, maps: FeatureMaps, inner: FeatureMaps | None, seed
) -> _Layer:
    """Backward of layer i: add to the gradient of what it read; its parameters' gradients."""
    ops = plan.ops
    start, end = plan.block.start(i), plan.block.start(i + 1)
    source, new = maps.channels(0, start), maps.channels(start, end)
    drop1, drop2 = plan.drops(seed, i)
    plan.merge_corrections(new)
    if inner is None:
        dconv, dweight, dbias = ops.conv3x3_backward(
            new, source, layer.norm1, layer.conv1, drop1, overwrite=False
        )
        return _Layer(dweight, dbias, dconv)
    if plan.level > 2:
        ops.conv1x1(source, layer.norm1, layer.conv1, inner, drop1)
    dconv2, dweight2, dbias2 = ops.conv3x3_backward(
        new, inner, layer.norm2, layer.conv2, drop2, overwrite=True
    )
    plan.merge_corrections(inner)
    dconv1, dweight1, dbias1 = ops.conv1x1_backward(
        inner, source, layer.norm1, layer.conv1, drop1, overwrite=False
    )
    return _Layer(dweight1, dbias1, dconv1, dweight2, dbias2, dconv2)


def _tail(plan: _Plan, layer: _Layer, maps: FeatureMaps) -> Tensor:
    """What reads the whole block: (N, H', W', C')."""
    if plan.window:
        return plan.ops.norm_relu_avg_pool(maps, layer.norm1, plan.window)
    out = maps.value.new_empty((*maps.value.shape[:3], len(layer.conv1)))
    plan.ops.conv1x1(maps, layer.norm1, layer.conv1, FeatureMaps(out), None)
    return out


def _tail_backward(plan: _Plan, layer: _Layer, maps: FeatureMaps, grad: Tensor) -> _Layer:
    """Begin the gradient of the whole block; the gradients of the tail's parameters."""
    if plan.window:
        return _Layer(*plan.ops.norm_relu_avg_pool_backward(grad, maps, layer.norm1, plan.window))
    target = FeatureMaps(grad, grad=grad)  # nothing normalises it, so its values are not needed
    dconv, dweight, dbias = plan.ops.conv1x1_backward(
        target, maps, layer.norm1, layer.conv1, None, overwrite=True
    )
    return _Layer(dweight, dbias, dconv)


def _evaluate(plan: _Plan, x: Tensor, layers: list[_Layer], norms: list[nn.BatchNorm2d]) -> Tensor:
    """The stage with each batch normalisation's own running statistics; nothing is kept."""
    block = plan.block
    *layers, last = layers
    means = [norm.running_mean for norm in norms]
    rstds = [(norm.running_var + norm.eps).rsqrt() for norm in norms]
    statistics = iter(zip(means, rstds, strict=True))
    value = plan.room(block.out_channels, x)
    value[..., : block.channels] = x
    inner = FeatureMaps(plan.room(block.width, x)) if block.width else None
    for i, layer in enumerate(layers):
        start, end = block.start(i), block.start(i + 1)
        source, new = (
            FeatureMaps(value[..., :start], *next(statistics)),
            FeatureMaps(value[..., start:end]),
        )
        if inner is None:
            plan.ops.conv3x3(source, layer.norm1, layer.conv1, new, None)
        else:
            plan.ops.conv1x1(source, layer.norm1, layer.conv1, inner, None)
            inner.mean, inner.rstd = next(statistics)
            plan.ops.conv3x3(inner, layer.norm2, layer.conv2, new, None)
            inner.mean = inner.rstd = None
    return _tail(plan, last, FeatureMaps(value, *next(statistics)))


@torch.no_grad()
def _update_running_statistics(
    block: DenseBlock,
    norms: list[nn.BatchNorm2d],
    moments: Tensor,
    moments2: Tensor,
    count: int,
) -> None:
    """Move the buffers of every batch normalisation once, towards the unbiased variance."""
    of_norms = []
    for i in range(len(block)):
        of_norms.append(moments[:, : block.start(i)])
        if block.width:
            of_norms.append(moments2[i])
    of_norms.append(moments)
    unbiased = count / (count - 1)
    momentum = norms[0].momentum
    for buffer, row, factor in (("running_mean", 0, 1.0), ("running_var", 2, unbiased)):
        targets = [getattr(norm, buffer) for norm in norms]
        wanted = torch._foreach_mul([moment[row] for moment in of_norms], factor)
        wanted = [value.to(target.dtype) for value, target in zip(wanted, targets, strict=True)]
        torch._foreach_lerp_(targets, wanted, momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


def _maps_dtype(x: Tensor) -> torch.dtype:
    """As autocast would have it: single precision becomes the lower one, double stays."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)
