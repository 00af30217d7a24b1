"""Run a dense block in memory that is linear in its depth: memory levels 2, 3 and 4.

With plain modules every layer copies all earlier feature maps (`torch.cat`), computes their batch
norm statistics again, and autograd keeps the copies. Here one `autograd.Function` runs a whole
block and its *epilogue*: the batch norm, ReLU and pooling (or 1x1 convolution) that follow the
block in a transition or before the classifier. docs/memory.md derives the formulas.

Forward, on tensors (N, H, W, C):
- One buffer X holds the block's C_0 input channels, then the k new channels of each layer. Layer i
  takes the first C_i = C_0 + i k channels, in place, and writes the next k: no concatenation.
- The *readers* of a channel are the later layers and the epilogue: each begins with a batch norm.
  A channel's mean and variance serve all its readers; they are computed once, when it is written.
- The *backend* (kernels/backend.py: plain PyTorch or Triton) computes batch norm, ReLU and
  convolution in one operation, tile by tile: it keeps no output of batch norm or ReLU.
- *Bottleneck maps*, the outputs of 1x1 convolutions, have buffers of their own.

Backward, with a buffer G for the gradient of X:
- A batch norm turns its output's gradient dz into gamma rstd (dz - mean(dz) - mean(dz xhat) xhat),
  with xhat the normalised input. Each reader adds gamma rstd dz to G, and gamma rstd times the two
  means to the channel's *corrections*. After its last reader, a channel's gradient is
  G - mean_correction - var_correction xhat: computing it *completes* G of the channel.
- Order: (1) Level 4 recomputes X. (2) The epilogue writes G. (3) Each layer, last to first,
  completes G of the k channels that it wrote and adds to G of the C_i channels that it read.
  (4) G of the block's input is completed and returned.

| memory level | keeps for backward, besides the statistics | recomputes                |
|--------------|--------------------------------------------|---------------------------|
| 2            | X and the bottleneck maps of every layer   | BN, ReLU, dropout masks   |
| 3            | X                                          | as 2, and bottleneck maps |
| 4            | the block's input                          | as 3, and X               |

A block runs as plain modules (see `can_run`) if its batch norms are frozen, replaced or differ in
settings, if evaluation needs gradients, or if a module that the function replaces has a hook.
Second derivatives, forward-mode derivatives and torch.func transforms raise an error. Gradients are
computed for all parameters, also for those with requires_grad=False.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distributed.world import BatchShard
from kernels.feature_maps import FeatureMaps, Norm, Reader, nchw, nhwc
from models.dense_block import DenseBlock
from models.layers import has_hooks
from models.norm_conv import (
    NormConv,
    NormConvGrads,
    affine_views,
    new_affines,
    running_affines,
    split_parameters,
)
from models.sync_batchnorm import BatchNorm, all_reduce_corrections, all_reduce_stats

MEMORY_EFFICIENT_LEVELS = (2, 3, 4)


@dataclass(frozen=True)
class BlockEpilogue:
    """Hold the modules after a block: batch norm, ReLU, then average pooling or 1x1 convolution."""

    norm: nn.BatchNorm2d
    window: tuple[int, int] | None = None  # (height, width) of the pooling; None with a convolution
    conv: nn.Conv2d | None = None


@dataclass(frozen=True)
class _BlockSpec:
    """Hold the arguments of `_DenseBlockFunction` that are not tensors, as in `run_dense_block`."""

    block: DenseBlock
    eps: float  # the value that all batch norms share
    window: tuple[int, int] | None  # of the epilogue's pooling
    dtype: torch.dtype  # of the feature maps
    # This process's part of the batch with `--syncBN`, else None. If set, processes all-reduce the
    # statistics of new channels right away, and a channel's corrections after its last reader.
    shard: BatchShard | None

    def new_buffer(self, channels: int, x: Tensor) -> Tensor:
        """Allocate (N, H, W, channels) uninitialised; N, H, W and the device are those of x."""
        return x.new_empty((*x.shape[:3], channels), dtype=self.dtype)


def can_run(block: nn.Module, reader: nn.Module, *others: nn.Module) -> bool:
    """Return whether `run_dense_block` computes what the modules, as they are now, would compute.

    It must be a `DenseBlock` of level 2, 3 or 4. All batch norms must share eps and momentum and be
    in the block's mode; evaluation must run without gradients; and no module may have a hook.

    Args:
        reader: the module after the block; the result is False unless it is a `BatchNorm`.
        others: further modules that the function replaces.
    """
    is_block = isinstance(block, DenseBlock) and block.memory_level in MEMORY_EFFICIENT_LEVELS
    if not is_block or has_hooks(block, reader, *others):
        return False
    norms = [*block.norms, reader]
    # The exact type: other classes compute something else (SyncBatchNorm, quantised, parametrised).
    if any(type(norm) is not BatchNorm for norm in norms) or reader.momentum is None:
        return False
    # block.training turns the block's dropout on, so the batch norms must have the same mode.
    settings = (reader.eps, reader.momentum, reader.shard, block.training)
    return (block.training or not torch.is_grad_enabled()) and all(
        (norm.eps, norm.momentum, norm.shard, norm.training) == settings
        and norm.affine
        and norm.track_running_stats
        and norm.running_mean is not None
        for norm in norms
    )


def run_dense_block(block: DenseBlock, epilogue: BlockEpilogue, x: Tensor) -> Tensor:
    """Run a block and its epilogue, with batch statistics or, in evaluation, running statistics.

    Args:
        x: (N, C, H, W), the block's input.

    Returns:
        (N, C', H', W'), the pooled or convolved maps, channels last in memory.

    Raises:
        ValueError: in training, each channel has one value in the whole batch, so no variance.
    """
    norms = [*block.norms, epilogue.norm]
    shard = norms[0].shard
    spec = _BlockSpec(block, epilogue.norm.eps, epilogue.window, _features_dtype(x), shard)
    convs = [conv for layer in block.values() for conv in layer.convs] + [epilogue.conv]
    # One flat list: autograd tracks only tensors passed as direct arguments, not those in lists.
    parameters = [
        parameter
        for norm, conv in zip(norms, convs, strict=True)
        for parameter in (norm.weight, norm.bias, conv and conv.weight)
    ]
    with torch.autocast(x.device.type, enabled=False):  # autocast's dtype is in spec already
        if not block.training:
            return nchw(_evaluate(spec, nhwc(x), parameters, norms))
        images = len(x) if shard is None else shard.global_size
        count = images * x.shape[2] * x.shape[3]
        if count == 1:
            raise ValueError("batch normalisation of one value per channel has no variance")
        seed = block.draw_seed(x.device)
        out, stats, bottleneck_stats = _DenseBlockFunction.apply(spec, x, seed, *parameters)
        _update_running_statistics(block, norms, stats, bottleneck_stats, count)
    return out


class _DenseBlockFunction(torch.autograd.Function):
    """Compute the epilogue's output, (N, C', H', W'), and all statistics from x, (N, C_0, H, W)."""

    @staticmethod
    def forward(ctx, spec: _BlockSpec, x: Tensor, seed: Tensor | None, *parameters: Tensor | None):
        block = spec.block
        source = nhwc(x)

        # Statistics mean, rstd = 1 / sqrt(var + eps) and var: (3, C) of X, C = out_channels, and
        # (layers, 3, width) of the bottleneck maps; in float32, or in float64 for float64 maps.
        stats_dtype = torch.promote_types(spec.dtype, torch.float32)
        stats = x.new_empty(3, block.out_channels, dtype=stats_dtype)
        bottleneck_stats = x.new_empty(len(block), 3, block.width, dtype=stats_dtype)
        affines = new_affines(parameters, stats)
        units = split_parameters(block, parameters, affine_views(affines, parameters))

        # The buffer X, (N, H, W, C); the block's input is its first channels.
        features = FeatureMaps(spec.new_buffer(block.out_channels, source), *stats, eps=spec.eps)
        block_input = features.channels(0, block.channels)
        reader = Reader(units[0][0].norm, block_input)
        spec.block.ops.copy_with_stats(source, block_input, reader)
        _sync_stats(spec, block_input, reader)

        # Each layer adds k channels. Buffers for bottleneck maps, (N, H, W, width): at level 2 one
        # for each layer, at levels 3 and 4 one that all layers share.
        bottleneck_buffers, bottleneck = [], None
        for i, (layer, (reader_unit, *_)) in enumerate(pairwise(units)):
            if block.width:
                if spec.block.memory_level == 2 or i == 0:
                    bottleneck_buffers.append(spec.new_buffer(block.width, source))
                bottleneck = FeatureMaps(bottleneck_buffers[-1], *bottleneck_stats[i], eps=spec.eps)
            _layer_forward(spec, i, layer, features, bottleneck, seed, reader_unit.norm)

        # The epilogue reads all C channels; out is (N, H', W', C').
        out = _epilogue_forward(spec, units[-1][0], features)

        # Save the maps that the memory level keeps, the statistics and the parameters.
        saved = [x] if spec.block.memory_level == 4 else [features.value]
        saved += bottleneck_buffers if spec.block.memory_level == 2 else []
        ctx.spec, ctx.num_saved = spec, len(saved)
        ctx.save_for_backward(*saved, stats, bottleneck_stats, affines, seed, *parameters)
        ctx.mark_non_differentiable(stats, bottleneck_stats)
        return nchw(out), stats, bottleneck_stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        """Return gradients of spec (None), x, seed (None), parameters; `grad`: (N, C', H', W')."""
        # Read saved_tensors only once: each access runs saved-tensor hooks (CPU offload) again.
        spec: _BlockSpec = ctx.spec
        block, saved = spec.block, ctx.saved_tensors
        (kept, *bottleneck_buffers), rest = saved[: ctx.num_saved], saved[ctx.num_saved :]
        stats, bottleneck_stats, affines, seed, *parameters = rest
        views = affine_views(affines, parameters)
        *layers, (epilogue,) = split_parameters(block, parameters, views)

        # The buffer X, (N, H, W, C). Without var, the backend does not compute statistics again.
        features = FeatureMaps(kept, *stats[:2], eps=spec.eps)
        if spec.block.memory_level == 4:  # `kept` is the block's input, (N, C_0, H, W)
            source = nhwc(kept)
            features.value = spec.new_buffer(block.out_channels, source)
            features.value[..., : block.channels] = source
            del saved, kept, source
            ctx.maybe_clear_saved_tensors()  # free the input: the buffer holds a copy

        # Bottleneck maps: all layers share one gradient buffer (N, H, W, width), at levels 3 and 4
        # also one for recomputed maps. Corrections of mean and variance: (layers, 2, width).
        grad_buffer = spec.new_buffer(block.width, features.value)
        value_buffer = (
            spec.new_buffer(block.width, features.value) if spec.block.memory_level > 2 else None
        )
        corrections = torch.zeros_like(bottleneck_stats[:, :2])

        def bottleneck_maps(i: int) -> FeatureMaps | None:
            if not block.width:
                return None
            value = bottleneck_buffers[i] if spec.block.memory_level == 2 else value_buffer
            return FeatureMaps(
                value, *bottleneck_stats[i, :2], None, grad_buffer, *corrections[i], eps=spec.eps
            )

        if spec.block.memory_level == 4:  # fill the buffer again
            for i, layer in enumerate(layers):
                _layer_forward(spec, i, layer, features, bottleneck_maps(i), seed)

        # G, (N, H, W, C), which the epilogue overwrites; corrections, (C,), begin with zeros.
        features.grad = spec.new_buffer(block.out_channels, features.value)
        features.mean_correction, features.var_correction = torch.zeros_like(stats[:2])
        grads = [_epilogue_backward(spec, epilogue, features, nhwc(grad).to(spec.dtype))]
        for i, layer in reversed([*enumerate(layers)]):
            grads[:0] = _layer_backward(spec, i, layer, features, bottleneck_maps(i), seed)

        # All readers of the block's input are done: complete its G, and return (N, C_0, H, W).
        dx = None
        if ctx.needs_input_grad[1]:
            block_input = features.channels(0, block.channels)
            all_reduce_corrections(spec.shard, block_input)
            dx = nchw(spec.block.ops.complete_gradient(block_input))

        # Gradients in the order of the parameters, with their shapes and dtypes.
        grads = [
            None if parameter is None else grad.view_as(parameter).to(parameter.dtype)
            for grad, parameter in zip(chain.from_iterable(grads), parameters, strict=True)
        ]
        return None, dx, None, *grads


def _layer_forward(
    spec: _BlockSpec, i: int, layer: list[NormConv], features: FeatureMaps,
    bottleneck: FeatureMaps | None, seed: Tensor | None, next_norm: Norm | None = None,
) -> None:  # fmt: skip
    """Run layer i: read channels [0, C_i) of the buffer and write channels [C_i, C_i + k).

    Args:
        next_norm: the norm after the layer; None if statistics and affine functions are known.
    """
    ops, first, last = spec.block.ops, layer[0], layer[-1]
    start, end = spec.block.layer_offset(i), spec.block.layer_offset(i + 1)
    source, new = features.channels(0, start), features.channels(start, end)
    dropout1, dropout2 = spec.block.dropouts(seed, i) or (None, None)
    reader = next_norm and Reader(next_norm, features.channels(0, end))
    if bottleneck is None:
        ops.conv3x3(source, last.norm, last.conv_weight, new, dropout1, reader)
    else:
        inner_reader = next_norm and Reader(last.norm, bottleneck)
        ops.conv1x1(source, first.norm, first.conv_weight, bottleneck, dropout1, inner_reader)
        _sync_stats(spec, bottleneck, inner_reader)
        ops.conv3x3(bottleneck, last.norm, last.conv_weight, new, dropout2, reader)
    _sync_stats(spec, new, reader)


def _sync_stats(spec: _BlockSpec, target: FeatureMaps, reader: Reader | None) -> None:
    """Use the statistics of all processes in place of those that an operation has written."""
    if spec.shard is not None and reader is not None:
        all_reduce_stats(spec.shard, target)
        reader.norm.update(reader.source)


def _layer_backward(
    spec: _BlockSpec, i: int, layer: list[NormConv], features: FeatureMaps,
    bottleneck: FeatureMaps | None, seed: Tensor | None,
) -> list[NormConvGrads]:  # fmt: skip
    """Add layer i's input gradient to channels [0, C_i) of G; return its parameters' gradients."""
    ops, first, last = spec.block.ops, layer[0], layer[-1]
    start, end = spec.block.layer_offset(i), spec.block.layer_offset(i + 1)
    source, new = features.channels(0, start), features.channels(start, end)
    dropout1, dropout2 = spec.block.dropouts(seed, i) or (None, None)

    # All readers of `new` are done: conv3x3_backward completes G of `new` as it loads it.
    all_reduce_corrections(spec.shard, new)
    if bottleneck is None:
        dconv, dweight, dbias = ops.conv3x3_backward(
            new, source, last.norm, last.conv_weight, dropout1, overwrite=False
        )
        return [NormConvGrads(dweight, dbias, dconv)]

    # Levels 3 and 4: recompute the bottleneck maps, (N, H, W, width).
    if spec.block.memory_level > 2:
        ops.conv1x1(source, first.norm, first.conv_weight, bottleneck, dropout1, None)

    # Only this convolution reads the maps, so it overwrites the layers' shared gradient buffer.
    dconv2, dweight2, dbias2 = ops.conv3x3_backward(
        new, bottleneck, last.norm, last.conv_weight, dropout2, overwrite=True
    )
    all_reduce_corrections(spec.shard, bottleneck)
    dconv1, dweight1, dbias1 = ops.conv1x1_backward(
        bottleneck, source, first.norm, first.conv_weight, dropout1, overwrite=False
    )
    grads1 = NormConvGrads(dweight1, dbias1, dconv1)
    return [grads1, NormConvGrads(dweight2, dbias2, dconv2)]


def _epilogue_forward(spec: _BlockSpec, epilogue: NormConv, features: FeatureMaps) -> Tensor:
    """Run the epilogue on all C channels; return its output, (N, H', W', C')."""
    if spec.window:
        return spec.block.ops.norm_relu_avg_pool(features, epilogue.norm, spec.window)
    out = features.value.new_empty((*features.value.shape[:3], epilogue.conv_weight.shape[0]))
    spec.block.ops.conv1x1(
        features, epilogue.norm, epilogue.conv_weight, FeatureMaps(out), None, None
    )
    return out


def _epilogue_backward(
    spec: _BlockSpec, epilogue: NormConv, features: FeatureMaps, grad: Tensor
) -> NormConvGrads:
    """Write G, (N, H, W, C), from `grad`, (N, H', W', C'); return the parameters' gradients."""
    if spec.window:
        dnorm = spec.block.ops.norm_relu_avg_pool_backward(
            grad, features, epilogue.norm, spec.window
        )
        return NormConvGrads(*dnorm, None)
    target = FeatureMaps(grad, grad=grad)  # value is not read: no batch norm follows
    dconv, dweight, dbias = spec.block.ops.conv1x1_backward(
        target, features, epilogue.norm, epilogue.conv_weight, None, overwrite=True
    )
    return NormConvGrads(dweight, dbias, dconv)


def _evaluate(
    spec: _BlockSpec, x: Tensor, parameters: Sequence[Tensor | None], norms: list[BatchNorm]
) -> Tensor:
    """Run x, (N, H, W, C_0), with running statistics; return the output, (N, H', W', C')."""
    block = spec.block
    *layers, (epilogue,) = split_parameters(block, parameters, running_affines(norms))
    features = FeatureMaps(spec.new_buffer(block.out_channels, x))
    features.value[..., : block.channels] = x
    bottleneck = FeatureMaps(spec.new_buffer(block.width, x)) if block.width else None
    for i, layer in enumerate(layers):
        _layer_forward(spec, i, layer, features, bottleneck, None)
    return _epilogue_forward(spec, epilogue, features)


@torch.no_grad()
def _update_running_statistics(
    block: DenseBlock, norms: list[BatchNorm], stats: Tensor, bottleneck_stats: Tensor, count: int
) -> None:
    """Update running means and unbiased variances from a batch of `count` values per channel."""
    # For each batch norm mean, rstd and biased variance: (3, C_i), (3, width) or (3, C).
    stats_of_norms = []
    for i in range(len(block)):
        stats_of_norms.append(stats[:, : block.layer_offset(i)])
        if block.width:
            stats_of_norms.append(bottleneck_stats[i])
    stats_of_norms.append(stats)

    unbiased = count / (count - 1)
    momentum = norms[0].momentum
    for buffer, row, factor in (("running_mean", 0, 1.0), ("running_var", 2, unbiased)):
        targets = [getattr(norm, buffer) for norm in norms]
        new_values = torch._foreach_mul([stat[row] for stat in stats_of_norms], factor)
        new_values = [value.to(t.dtype) for value, t in zip(new_values, targets, strict=True)]
        torch._foreach_lerp_(targets, new_values, momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


def _features_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype if autocast is on and x is not float64, else the dtype of x."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype
