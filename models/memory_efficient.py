"""Run a dense block in memory that is linear in its depth: memory levels 2, 3 and 4.

With plain modules every layer copies all earlier feature maps (`torch.cat`), computes their batch
norm statistics again, and autograd keeps the copies. Here one `autograd.Function` runs a whole
block, together with its epilogue: the batch norm, ReLU and pooling (or 1x1 convolution) that read
the finished block. docs/memory.md derives the formulas.

Forward, every tensor channels last, (N, H, W, C):
- One buffer X holds the block's input and, behind it, the k channels that each layer adds. Layer i
  reads X[..., :C_i] in place and writes the next k channels, so nothing is concatenated.
- The mean and variance of a channel are the same for every layer that reads it. They are computed
  once, when the channel is written; each batch norm applies its own weight and bias.
- Normalised, rectified maps exist only inside one operation of the backend, a tile at a time.

Backward, with a buffer G for the gradient of X:
- The backward of a batch norm subtracts a term that needs two sums over the batch. Because its
  readers share statistics, the terms of one channel add up: every reader adds its gradient to G
  and its sums to `mean_correction` and `var_correction`, and the term is subtracted once, when the
  last reader is done ("deferred correction").
- Order: level 4 fills X again. The epilogue writes G. Then each layer, last to first, completes G
  of the k channels that it wrote, goes back through its convolutions, and adds to G of the channels
  that it read. Last, the gradient of the block's input is completed and returned.

| memory level | keeps for backward, besides a few numbers per channel | recomputes             |
|--------------|-------------------------------------------------------|------------------------|
| 2            | X, and the bottleneck maps of every layer             | BN, ReLU, dropout mask |
| 3            | X                                                     | bottleneck maps, too   |
| 4            | the block's input                                     | X, too                 |

Left out: a block with frozen, replaced or unlike batch norms, or whose gradient is wanted in
evaluation, runs as plain modules (`can_run`, models/dense_block.py). Modules inside a block are
not called, so their hooks do not run. Second derivatives, forward-mode derivatives and torch.func
transforms raise an error. Gradients of parameters that need none are computed, then dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distributed.world import BatchShard
from kernels.backend import Backend
from kernels.feature_maps import FeatureMaps, NormParams
from models.dense_block import DenseBlock
from models.sync_batchnorm import BatchNorm, all_reduce_corrections, all_reduce_stats

MEMORY_EFFICIENT_LEVELS = (2, 3, 4)


@dataclass(frozen=True)
class BlockEpilogue:
    """The operations that read a finished block: batch norm, ReLU, then pooling or a convolution.

    Args:
        norm: the batch norm.
        window: height and width of the average pooling; or
        conv: a 1x1 convolution.
    """

    norm: nn.BatchNorm2d
    window: tuple[int, int] | None = None
    conv: nn.Conv2d | None = None


@dataclass(frozen=True)
class _BlockSpec:
    """One run of a block: everything that is not a tensor.

    Args:
        eps: of every batch norm.
        window: of the epilogue.
        dtype: of the feature maps.
        shard: None unless batch norms use the statistics of all replicas: then these are reduced
            when they are written and corrections after the last reader, each channel once.
    """

    ops: Backend
    level: int
    block: DenseBlock
    eps: float
    window: tuple[int, int] | None
    dtype: torch.dtype
    shard: BatchShard | None

    def new_buffer(self, channels: int, x: Tensor) -> Tensor:
        """Allocate (N, H, W, channels), uninitialised; x is (N, H, W, any)."""
        return x.new_empty((*x.shape[:3], channels), dtype=self.dtype)


class _NormConv(NamedTuple):
    """The parameters of a batch norm and of the convolution after it, or their gradients.

    A dense layer has one or, with a bottleneck, two; the epilogue has one, `conv` None for pooling.
    """

    weight: Tensor
    bias: Tensor
    conv: Tensor | None

    @property
    def norm(self) -> NormParams:
        return NormParams(self.weight, self.bias)


def _split(block: DenseBlock, parameters: Sequence[Tensor | None]) -> list[list[_NormConv]]:
    """Group flat parameters by batch norm, and those by layer; last is the epilogue's."""
    pairs = [_NormConv(*parameters[i : i + 3]) for i in range(0, len(parameters), 3)]
    size = 2 if block.width else 1
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def can_run(block: DenseBlock, reader: nn.Module) -> bool:
    """Tell whether `run_dense_block` computes what the modules would, as they are now.

    It needs the same eps, momentum and mode in all batch norms. It has no backward through running
    statistics, so it cannot run with frozen batch norms.

    Args:
        reader: the module after the block; an epilogue's batch norm if it is one.
    """
    norms = [*block.norms, reader]
    # The exact type: subclasses, converted and parametrised batch norms compute something else.
    if any(type(norm) is not BatchNorm for norm in norms) or reader.momentum is None:
        return False
    # The mode of the block itself decides about its dropout.
    wanted = (reader.eps, reader.momentum, reader.shard, block.training)
    return (block.training or not torch.is_grad_enabled()) and all(
        (norm.eps, norm.momentum, norm.shard, norm.training) == wanted
        and norm.affine
        and norm.track_running_stats
        and norm.running_mean is not None
        for norm in norms
    )


def run_dense_block(
    block: DenseBlock, epilogue: BlockEpilogue, x: Tensor, ops: Backend, level: int
) -> Tensor:
    """Run a block and its epilogue: on batch statistics or, in evaluation, on the running ones.

    Args:
        x: (N, C, H, W), the block's input.

    Returns:
        (N, C', H', W') from the epilogue, channels last in memory.

    Raises:
        ValueError: training on one value per channel, which has no variance.
    """
    norms = [*block.norms, epilogue.norm]
    shard = norms[0].shard
    spec = _BlockSpec(
        ops, level, block, epilogue.norm.eps, epilogue.window, _features_dtype(x), shard
    )
    convs = [conv for layer in block.values() for conv in layer.convs] + [epilogue.conv]
    # Flat: autograd tracks tensors that are arguments, not those inside of others.
    parameters = [
        parameter
        for norm, conv in zip(norms, convs, strict=True)
        for parameter in (norm.weight, norm.bias, conv and conv.weight)
    ]
    with torch.autocast(x.device.type, enabled=False):  # the spec's dtype replaces it
        if not block.training:
            return _nchw(_evaluate(spec, _nhwc(x), parameters, norms))
        images = len(x) if shard is None else shard.global_size
        count = images * x.shape[2] * x.shape[3]
        if count == 1:
            raise ValueError("batch normalisation of one value per channel has no variance")
        seed = block.draw_seed(x.device)
        out, stats, bottleneck_stats = _DenseBlockFunction.apply(spec, x, seed, *parameters)
        _update_running_statistics(block, norms, stats, bottleneck_stats, count)
    return out


class _DenseBlockFunction(torch.autograd.Function):
    """Input and parameters -> the epilogue's output, and the statistics of every channel."""

    @staticmethod
    def forward(ctx, spec: _BlockSpec, x: Tensor, seed: Tensor | None, *parameters: Tensor | None):
        block = spec.block
        *layers, (last,) = _split(block, parameters)
        source = _nhwc(x)

        # Statistics, rows mean, rstd and var: (3, C) of the buffer's C channels, and
        # (layers, 3, width) of the bottlenecks; in single precision or better.
        wide = torch.promote_types(spec.dtype, torch.float32)
        stats = x.new_empty(3, block.out_channels, dtype=wide)
        bottleneck_stats = x.new_empty(len(block), 3, block.width, dtype=wide)

        # The buffer X, (N, H, W, C); the block's input is its first channels.
        features = FeatureMaps(spec.new_buffer(block.out_channels, source), *stats, eps=spec.eps)
        block_input = features.channels(0, block.channels)
        spec.ops.copy_with_stats(source, block_input)
        all_reduce_stats(spec.shard, block_input)

        # Each layer appends k channels, by way of bottleneck maps (N, H, W, width): at level 2 each
        # layer has a buffer for them, else all use the same.
        bottleneck_buffers, bottleneck = [], None
        for i, layer in enumerate(layers):
            if block.width:
                if spec.level == 2 or i == 0:
                    bottleneck_buffers.append(spec.new_buffer(block.width, source))
                bottleneck = FeatureMaps(bottleneck_buffers[-1], *bottleneck_stats[i], eps=spec.eps)
            _layer_forward(spec, i, layer, features, bottleneck, seed)

        # The epilogue reads all C channels: (N, H', W', C').
        out = _epilogue_forward(spec, last, features)

        # Keep what the memory level allows, vectors of one number per channel, and parameters.
        saved = [x] if spec.level == 4 else [features.value]
        saved += bottleneck_buffers if spec.level == 2 else []
        ctx.spec, ctx.num_saved = spec, len(saved)
        ctx.save_for_backward(*saved, stats, bottleneck_stats, seed, *parameters)
        ctx.mark_non_differentiable(stats, bottleneck_stats)
        return _nchw(out), stats, bottleneck_stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        # Read saved_tensors once: hooks that have offloaded them load them at each access.
        spec: _BlockSpec = ctx.spec
        block, saved = spec.block, ctx.saved_tensors
        (kept, *bottleneck_buffers), rest = saved[: ctx.num_saved], saved[ctx.num_saved :]
        stats, bottleneck_stats, seed, *parameters = rest
        *layers, (last,) = _split(block, parameters)

        # The buffer X, (N, H, W, C), with statistics (C,); var is None: they are not written again.
        features = FeatureMaps(kept, *stats[:2], eps=spec.eps)
        if spec.level == 4:  # what is kept is the input
            source = _nhwc(kept)
            features.value = spec.new_buffer(block.out_channels, source)
            features.value[..., : block.channels] = source
            del saved, kept, source
            ctx.maybe_clear_saved_tensors()  # frees the input, whose copy is in the buffer now

        # Bottlenecks: one gradient (N, H, W, width) that all layers overwrite; at levels 3 and 4
        # also one value to recompute into. Their corrections are (layers, 2, width).
        grad_buffer = spec.new_buffer(block.width, features.value)
        value_buffer = spec.new_buffer(block.width, features.value) if spec.level > 2 else None
        corrections = torch.zeros_like(bottleneck_stats[:, :2])

        def bottleneck(i: int) -> FeatureMaps | None:
            if not block.width:
                return None
            value = bottleneck_buffers[i] if spec.level == 2 else value_buffer
            return FeatureMaps(
                value, *bottleneck_stats[i, :2], None, grad_buffer, *corrections[i], eps=spec.eps
            )

        if spec.level == 4:  # fill the buffer again
            for i, layer in enumerate(layers):
                _layer_forward(spec, i, layer, features, bottleneck(i), seed)

        # G, (N, H, W, C), and the corrections, (C,): the epilogue begins, the layers add to them.
        features.grad = spec.new_buffer(block.out_channels, features.value)
        features.mean_correction, features.var_correction = torch.zeros_like(stats[:2])
        grads = [_epilogue_backward(spec, last, features, _nhwc(grad).to(spec.dtype))]
        for i, layer in reversed([*enumerate(layers)]):
            grads[:0] = _layer_backward(spec, i, layer, features, bottleneck(i), seed)

        # All readers of the block's input are done: complete its gradient, (N, C, H, W).
        dx = None
        if ctx.needs_input_grad[1]:
            block_input = features.channels(0, block.channels)
            all_reduce_corrections(spec.shard, block_input)
            dx = _nchw(spec.ops.complete_gradient(block_input))

        # Gradients of the parameters, first layer first, in the parameters' shapes and types.
        grads = [
            None if parameter is None else found.view_as(parameter).to(parameter.dtype)
            for found, parameter in zip(chain.from_iterable(grads), parameters, strict=True)
        ]
        return None, dx, None, *grads


def _layer_forward(
    spec: _BlockSpec, i: int, layer: list[_NormConv], features: FeatureMaps,
    bottleneck: FeatureMaps | None, seed: Tensor | None,
) -> None:  # fmt: skip
    """Run layer i: read the first C_i of the block's channels and write the k after them."""
    ops, first, last = spec.ops, layer[0], layer[-1]
    start, end = spec.block.layer_offset(i), spec.block.layer_offset(i + 1)
    source, new = features.channels(0, start), features.channels(start, end)
    dropout1, dropout2 = spec.block.dropouts(seed, i) or (None, None)
    if bottleneck is None:
        ops.conv3x3(source, last.norm, last.conv, new, dropout1)
    else:
        ops.conv1x1(source, first.norm, first.conv, bottleneck, dropout1)  # C_i -> width channels
        all_reduce_stats(spec.shard, bottleneck)
        ops.conv3x3(bottleneck, last.norm, last.conv, new, dropout2)
    all_reduce_stats(spec.shard, new)


def _layer_backward(
    spec: _BlockSpec, i: int, layer: list[_NormConv], features: FeatureMaps,
    bottleneck: FeatureMaps | None, seed: Tensor | None,
) -> list[_NormConv]:  # fmt: skip
    """Add to G of the C_i channels that layer i read; return the gradients of its parameters."""
    ops, first, last = spec.ops, layer[0], layer[-1]
    start, end = spec.block.layer_offset(i), spec.block.layer_offset(i + 1)
    source, new = features.channels(0, start), features.channels(start, end)
    dropout1, dropout2 = spec.block.dropouts(seed, i) or (None, None)

    # All layers that read `new` are done. The convolution's backward completes its gradient.
    all_reduce_corrections(spec.shard, new)
    if bottleneck is None:
        dconv, dweight, dbias = ops.conv3x3_backward(
            new, source, last.norm, last.conv, dropout1, overwrite=False
        )
        return [_NormConv(dweight, dbias, dconv)]

    # Levels 3 and 4: compute the bottleneck maps, (N, H, W, width), again.
    if spec.level > 2:
        ops.conv1x1(source, first.norm, first.conv, bottleneck, dropout1)

    # The 3x3 convolution is their only reader, so it overwrites the gradient of another layer's.
    dconv2, dweight2, dbias2 = ops.conv3x3_backward(
        new, bottleneck, last.norm, last.conv, dropout2, overwrite=True
    )
    all_reduce_corrections(spec.shard, bottleneck)
    dconv1, dweight1, dbias1 = ops.conv1x1_backward(
        bottleneck, source, first.norm, first.conv, dropout1, overwrite=False
    )
    return [_NormConv(dweight1, dbias1, dconv1), _NormConv(dweight2, dbias2, dconv2)]


def _epilogue_forward(spec: _BlockSpec, last: _NormConv, features: FeatureMaps) -> Tensor:
    """(N, H, W, C) -> (N, H', W', C')."""
    if spec.window:
        return spec.ops.norm_relu_avg_pool(features, last.norm, spec.window)
    out = features.value.new_empty((*features.value.shape[:3], len(last.conv)))
    spec.ops.conv1x1(features, last.norm, last.conv, FeatureMaps(out), None)
    return out


def _epilogue_backward(
    spec: _BlockSpec, last: _NormConv, features: FeatureMaps, grad: Tensor
) -> _NormConv:
    """Write G from `grad`, (N, H', W', C'); return the gradients of the epilogue's parameters."""
    if spec.window:
        dnorm = spec.ops.norm_relu_avg_pool_backward(grad, features, last.norm, spec.window)
        return _NormConv(*dnorm, None)
    target = FeatureMaps(grad, grad=grad)  # no batch norm reads it: any tensor serves as its value
    dconv, dweight, dbias = spec.ops.conv1x1_backward(
        target, features, last.norm, last.conv, None, overwrite=True
    )
    return _NormConv(dweight, dbias, dconv)


def _evaluate(
    spec: _BlockSpec, x: Tensor, parameters: Sequence[Tensor | None], norms: list[BatchNorm]
) -> Tensor:
    """Run a block, (N, H, W, C) -> (N, H', W', C'), each batch norm on its running statistics."""
    block = spec.block
    *layers, (last,) = _split(block, parameters)
    stats = iter([(norm.running_mean, (norm.running_var + norm.eps).rsqrt()) for norm in norms])
    value = spec.new_buffer(block.out_channels, x)
    value[..., : block.channels] = x
    bottleneck_buffer, bottleneck = spec.new_buffer(block.width, x), None
    for i, layer in enumerate(layers):
        features = FeatureMaps(value, *next(stats))  # statistics of the channels that it reads
        if block.width:
            bottleneck = FeatureMaps(bottleneck_buffer, *next(stats))
        _layer_forward(spec, i, layer, features, bottleneck, None)
    return _epilogue_forward(spec, last, FeatureMaps(value, *next(stats)))


@torch.no_grad()
def _update_running_statistics(
    block: DenseBlock, norms: list[BatchNorm], stats: Tensor, bottleneck_stats: Tensor, count: int
) -> None:
    """Move running statistics once, towards mean and unbiased variance of `count` values."""
    # (3, C_i) or (3, width) of each batch norm, rows mean, rstd and biased variance.
    stats_of_norms = []
    for i in range(len(block)):
        stats_of_norms.append(stats[:, : block.layer_offset(i)])
        if block.width:
            stats_of_norms.append(bottleneck_stats[i])
    stats_of_norms.append(stats)

    # One call for all vectors: a deep network has hundreds of short ones.
    unbiased = count / (count - 1)
    momentum = norms[0].momentum
    for buffer, row, factor in (("running_mean", 0, 1.0), ("running_var", 2, unbiased)):
        targets = [getattr(norm, buffer) for norm in norms]
        wanted = torch._foreach_mul([stat[row] for stat in stats_of_norms], factor)
        wanted = [value.to(target.dtype) for value, target in zip(wanted, targets, strict=True)]
        torch._foreach_lerp_(targets, wanted, momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


def _features_dtype(x: Tensor) -> torch.dtype:
    """Return the type that autocast gives feature maps; double precision stays."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)
