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
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.dropout import Drop
from kernels.feature_maps import Maps, Norm
from models.dense_block import DenseBlock
from models.sync_batchnorm import Share, merged_corrections, merged_moments

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
    """A stage as its numbers.

    Args:
        channels: maps of the input.
        dtype: of the maps.
        share: of a replica whose batch normalisations take the moments of all replicas, else None.
            They are exchanged as soon as they are written, and what completes the gradient of maps
            when its last reader has been through: each number once, in the same order everywhere.
    """

    ops: ModuleType
    level: int
    block: DenseBlock
    num_layers: int
    channels: int
    bottleneck: bool
    eps: float
    window: tuple[int, int] | None
    dtype: torch.dtype
    share: Share | None

    @property
    def out_channels(self) -> int:
        return self.block.out_channels

    def start(self, i: int) -> int:
        """The first channel that layer i writes: it reads those before."""
        return self.channels + i * self.block.growth_rate

    def room(self, channels: int, x: Tensor) -> Tensor:
        """Uninitialised maps for images such as x."""
        return x.new_empty((*x.shape[:3], channels), dtype=self.dtype)

    def drops(self, seed: Tensor | None, i: int) -> tuple[Drop | None, Drop | None]:
        """The dropouts after the two convolutions of layer i."""
        return self.block.drops(seed, i) or (None, None)

    def merge_moments(self, maps: Maps) -> None:
        """Turn the moments that an operation has written into those of all replicas."""
        if self.share is None or maps.var is None:  # or it has not: they are known
            return
        mean, var = merged_moments(self.share, maps.mean, maps.var)
        maps.mean.copy_(mean)
        maps.var.copy_(var)
        maps.rstd.copy_((var + maps.eps).rsqrt_())

    def merge_corrections(self, maps: Maps) -> None:
        """Let the gradient of maps be complete over all replicas."""
        if self.share is None:
            return
        shift, slope = merged_corrections(self.share, maps.shift, maps.slope)
        maps.shift.copy_(shift)
        maps.slope.copy_(slope)


@dataclass(frozen=True)
class _Layer:
    """The parameters of one dense layer, or of the tail."""

    norm1: Norm
    conv1: Tensor | None
    norm2: Norm | None = None
    conv2: Tensor | None = None


def stage(block: DenseBlock, tail: Tail, x: Tensor, ops: ModuleType, level: int) -> Tensor:
    """Run a block and its tail, with the moments of the batch or, in evaluation, the running ones.

    Args:
        x: (N, C, H, W), the block's input.
        ops: kernels.plain or another module with the same functions.

    Returns:
        (N, C', H', W') of the tail, channels last in memory.

    Raises:
        ValueError: training on one value per channel, which has no variance.
    """
    layers = list(block.values())
    norms = [*block.norms, tail.norm]
    plan = _Plan(
        ops,
        level,
        block,
        len(layers),
        x.shape[1],
        layers[0].bottleneck,
        tail.norm.eps,
        tail.window,
        _maps_dtype(x),
        norms[0].share,
    )
    parameters = [parameter for layer in layers for parameter in layer.parameters()] + [
        *tail.norm.parameters(),
        *(tail.conv.parameters() if tail.conv else ()),
    ]
    with torch.autocast(x.device.type, enabled=False):
        if not block.training:
            return _nchw(_evaluate(plan, _nhwc(x), parameters, norms))
        images = len(x) if plan.share is None else plan.share.total
        count = images * x.shape[2] * x.shape[3]
        if count == 1:
            raise ValueError("batch normalisation of one value per channel has no variance")
        out, moments, moments2 = _Stage.apply(plan, x, block.draw_seed(x.device), *parameters)
        _update_running_statistics(plan, norms, moments, moments2, count)
    return out


class _Stage(torch.autograd.Function):
    """(maps, parameters) -> maps, and the moments of every channel on the way."""

    @staticmethod
    def forward(ctx, plan: _Plan, x: Tensor, seed: Tensor | None, *parameters: Tensor):
        layers = _layers(plan, parameters)
        source = _nhwc(x)
        wide = torch.promote_types(plan.dtype, torch.float32)
        moments = x.new_empty(3, plan.out_channels, dtype=wide)  # mean, rstd, var
        width = len(layers[0].norm2.weight) if plan.bottleneck else 0
        moments2 = x.new_empty(plan.num_layers, 3, width, dtype=wide)  # of the bottleneck maps
        maps = Maps(plan.room(plan.out_channels, source), *moments, eps=plan.eps)
        given = maps.part(0, plan.channels)
        plan.ops.copy(source, given)
        plan.merge_moments(given)
        bottlenecks = []
        for i, layer in enumerate(layers[:-1]):
            if plan.bottleneck and (plan.level == 2 or not bottlenecks):
                bottlenecks.append(plan.room(width, source))
            inner = Maps(bottlenecks[-1], *moments2[i], eps=plan.eps) if plan.bottleneck else None
            _grow(plan, i, layer, maps, inner, seed)
        out = _tail(plan, layers[-1], maps)
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
        saved = ctx.saved_tensors  # once: whoever moved them elsewhere brings them back each time
        (first, *bottlenecks), rest = saved[: ctx.num_kept], saved[ctx.num_kept :]
        moments, moments2, seed, *parameters = rest
        layers = _layers(plan, parameters)
        mean, rstd, _ = moments
        maps = Maps(first, mean, rstd, eps=plan.eps)
        if plan.level == 4:
            source = _nhwc(first)
            maps.value = plan.room(plan.out_channels, source)
            maps.value[..., : plan.channels] = source
            del saved, first, source
            ctx.maybe_clear_saved_tensors()  # the input: it is in the buffer now
        width = moments2.shape[-1]
        inner_grad = plan.room(width, maps.value)
        inner_value = plan.room(width, maps.value) if plan.level > 2 else None
        inner_sums = torch.zeros_like(moments2[:, :2])

        def inner(i: int) -> Maps | None:
            if not plan.bottleneck:
                return None
            value = bottlenecks[i] if plan.level == 2 else inner_value
            return Maps(value, *moments2[i, :2], None, inner_grad, *inner_sums[i], eps=plan.eps)

        if plan.level == 4:
            for i, layer in enumerate(layers[:-1]):
                _grow(plan, i, layer, maps, inner(i), seed)

        maps.grad = plan.room(plan.out_channels, maps.value)
        maps.shift, maps.slope = torch.zeros_like(moments[:2])
        grads = _tail_backward(plan, layers[-1], maps, _nhwc(grad).to(plan.dtype))
        for i in reversed(range(plan.num_layers)):
            grads = _shrink(plan, i, layers[i], maps, inner(i), seed) + grads
        dx = None
        if ctx.needs_input_grad[1]:
            given = maps.part(0, plan.channels)
            plan.merge_corrections(given)
            dx = _nchw(plan.ops.gradient(given))
        grads = [
            grad.view_as(parameter).to(parameter.dtype)
            for grad, parameter in zip(grads, parameters, strict=True)
        ]
        return None, dx, None, *grads


def _grow(plan: _Plan, i: int, layer: _Layer, maps: Maps, inner: Maps | None, seed) -> None:
    """Write the new maps of layer i."""
    source = maps.part(0, plan.start(i))
    new = maps.part(plan.start(i), plan.start(i + 1))
    drop1, drop2 = plan.drops(seed, i)
    if inner is None:
        plan.ops.convolution(source, layer.norm1, layer.conv1, new, drop1)
    else:
        plan.ops.product(source, layer.norm1, layer.conv1, inner, drop1)
        plan.merge_moments(inner)
        plan.ops.convolution(inner, layer.norm2, layer.conv2, new, drop2)
    plan.merge_moments(new)


def _shrink(
    plan: _Plan, i: int, layer: _Layer, maps: Maps, inner: Maps | None, seed
) -> list[Tensor]:
    """Backward of layer i: add to the gradient of what it read; its parameters' gradients."""
    ops = plan.ops
    source = maps.part(0, plan.start(i))
    new = maps.part(plan.start(i), plan.start(i + 1))
    drop1, drop2 = plan.drops(seed, i)
    plan.merge_corrections(new)
    if inner is None:
        dconv, dweight, dbias = ops.convolution_backward(
            new, source, layer.norm1, layer.conv1, drop1, first=False
        )
        return [dweight, dbias, dconv]
    if plan.level > 2:
        ops.product(source, layer.norm1, layer.conv1, inner, drop1)
    dconv2, dweight2, dbias2 = ops.convolution_backward(
        new, inner, layer.norm2, layer.conv2, drop2, first=True
    )
    plan.merge_corrections(inner)
    dconv1, dweight1, dbias1 = ops.product_backward(
        inner, source, layer.norm1, layer.conv1, drop1, first=False
    )
    return [dweight1, dbias1, dconv1, dweight2, dbias2, dconv2]


def _tail(plan: _Plan, layer: _Layer, maps: Maps) -> Tensor:
    """What reads the whole block: (N, H', W', C')."""
    if plan.window:
        return plan.ops.pool(maps, layer.norm1, plan.window)
    out = maps.value.new_empty((*maps.value.shape[:3], len(layer.conv1)))
    plan.ops.product(maps, layer.norm1, layer.conv1, Maps(out), None)
    return out


def _tail_backward(plan: _Plan, layer: _Layer, maps: Maps, grad: Tensor) -> list[Tensor]:
    """Begin the gradient of the whole block; the gradients of the tail's parameters."""
    if plan.window:
        return list(plan.ops.pool_backward(grad, maps, layer.norm1, plan.window))
    target = Maps(grad, grad=grad)  # nothing normalises it, so its values are not needed
    dconv, dweight, dbias = plan.ops.product_backward(
        target, maps, layer.norm1, layer.conv1, None, first=True
    )
    return [dweight, dbias, dconv]


def _evaluate(
    plan: _Plan, x: Tensor, parameters: list[Tensor], norms: list[nn.BatchNorm2d]
) -> Tensor:
    """The stage with each batch normalisation's own running statistics; nothing is kept."""
    layers = _layers(plan, parameters)
    means = [norm.running_mean for norm in norms]
    rstds = [(norm.running_var + norm.eps).rsqrt() for norm in norms]
    statistics = iter(zip(means, rstds, strict=True))
    value = plan.room(plan.out_channels, x)
    value[..., : plan.channels] = x
    inner = None
    if plan.bottleneck:
        width = len(layers[0].norm2.weight)
        inner = Maps(plan.room(width, x))
    for i, layer in enumerate(layers[:-1]):
        source = Maps(value[..., : plan.start(i)], *next(statistics))
        new = Maps(value[..., plan.start(i) : plan.start(i + 1)])
        if inner is None:
            plan.ops.convolution(source, layer.norm1, layer.conv1, new, None)
        else:
            plan.ops.product(source, layer.norm1, layer.conv1, inner, None)
            inner.mean, inner.rstd = next(statistics)
            plan.ops.convolution(inner, layer.norm2, layer.conv2, new, None)
            inner.mean = inner.rstd = None
    return _tail(plan, layers[-1], Maps(value, *next(statistics)))


@torch.no_grad()
def _update_running_statistics(
    plan: _Plan, norms: list[nn.BatchNorm2d], moments: Tensor, moments2: Tensor, count: int
) -> None:
    """Move the buffers of every batch normalisation once, towards the unbiased variance."""
    of_norms = []
    for i in range(plan.num_layers):
        of_norms.append(moments[:, : plan.start(i)])
        if plan.bottleneck:
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


def _layers(plan: _Plan, parameters: tuple[Tensor, ...] | list[Tensor]) -> list[_Layer]:
    """The parameters by layer; the last is the tail."""
    size = 6 if plan.bottleneck else 3
    layers = []
    for i in range(plan.num_layers):
        weight1, bias1, conv1, *rest = parameters[i * size : (i + 1) * size]
        second = (Norm(rest[0], rest[1]), rest[2]) if rest else (None, None)
        layers.append(_Layer(Norm(weight1, bias1), conv1, *second))
    weight, bias, *conv = parameters[plan.num_layers * size :]
    return [*layers, _Layer(Norm(weight, bias), conv[0] if conv else None)]


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
