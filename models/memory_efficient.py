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

from distributed.world import BatchShard
from kernels.backend import Backend
from kernels.dropout import DropoutSpec
from kernels.feature_maps import FeatureMaps, NormParams
from models.dense_block import DenseBlock, DenseLayer
from models.sync_batchnorm import BatchNorm, all_reduced_corrections, all_reduced_stats

MEMORY_EFFICIENT_LEVELS = (2, 3, 4)


@dataclass(frozen=True)
class BlockEpilogue:
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
class _BlockSpec:
    """What a stage does with its parameters.

    Args:
        eps: of every batch normalisation.
        window: of the epilogue.
        dtype: of the maps.
        shard: of a replica whose batch normalisations take the moments of all replicas, else None.
            They are exchanged as soon as they are written, and what completes the gradient of maps
            when its last reader has been through: each number once, in the same order everywhere.
    """

    ops: Backend
    level: int
    block: DenseBlock
    eps: float
    window: tuple[int, int] | None
    dtype: torch.dtype
    shard: BatchShard | None

    def new_buffer(self, channels: int, x: Tensor) -> Tensor:
        """Uninitialised maps for images such as x."""
        return x.new_empty((*x.shape[:3], channels), dtype=self.dtype)

    def dropouts(
        self, seed: Tensor | None, i: int
    ) -> tuple[DropoutSpec | None, DropoutSpec | None]:
        """The dropouts after the two convolutions of layer i."""
        return self.block.dropouts(seed, i) or (None, None)

    def all_reduce_stats(self, features: FeatureMaps) -> None:
        """Turn the moments that an operation has written into those of all replicas."""
        if self.shard is None or features.var is None:  # or it has not: they are known
            return
        mean, var = all_reduced_stats(self.shard, features.mean, features.var)
        features.mean.copy_(mean)
        features.var.copy_(var)
        features.rstd.copy_((var + features.eps).rsqrt_())

    def all_reduce_corrections(self, features: FeatureMaps) -> None:
        """Let the gradient of maps be complete over all replicas."""
        if self.shard is None:
            return
        mean_correction, var_correction = all_reduced_corrections(
            self.shard, features.mean_correction, features.var_correction
        )
        features.mean_correction.copy_(mean_correction)
        features.var_correction.copy_(var_correction)


class _LayerParams(NamedTuple):
    """Parameters of a dense layer or the epilogue, or their gradients; None where it has none.

    A layer and the epilogue have as many, so that a list of tensors is split into them again.
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


def _layer_params(layer: DenseLayer) -> _LayerParams:
    first = layer.norm1.weight, layer.norm1.bias, layer.conv1.weight
    if not layer.bottleneck:
        return _LayerParams(*first)
    return _LayerParams(*first, layer.norm2.weight, layer.norm2.bias, layer.conv2.weight)


def _split_by_layer(tensors: tuple[Tensor | None, ...]) -> list[_LayerParams]:
    """Undo `chain.from_iterable` of layers."""
    size = len(_LayerParams._fields)
    return [_LayerParams(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


def can_run(block: DenseBlock, reader: nn.Module) -> bool:
    """Tell whether `run_dense_block` computes what the modules would, as they are now.

    It has one eps, momentum and mode for all batch normalisations of a stage, and neither a
    backward through running statistics nor through a mixture (frozen layers).

    Args:
        reader: what follows the block; can be a epilogue's if it is a batch normalisation.
    """
    norms = [*block.norms, reader]
    # The type itself: others, converted or parametrised ones too, compute something else.
    if any(type(norm) is not BatchNorm for norm in norms) or reader.momentum is None:
        return False
    # The block's mode decides about its dropout.
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
    """Run a block and its epilogue, with batch statistics or, in evaluation, the running ones.

    Args:
        x: (N, C, H, W), the block's input.

    Returns:
        (N, C', H', W') of the epilogue, channels last in memory.

    Raises:
        ValueError: training on one value per channel, which has no variance.
    """
    norms = [*block.norms, epilogue.norm]
    shard = norms[0].shard
    spec = _BlockSpec(
        ops, level, block, epilogue.norm.eps, epilogue.window, _features_dtype(x), shard
    )
    last = _LayerParams(
        epilogue.norm.weight, epilogue.norm.bias, epilogue.conv and epilogue.conv.weight
    )
    layers = [*map(_layer_params, block.values()), last]
    with torch.autocast(x.device.type, enabled=False):
        if not block.training:
            return _nchw(_evaluate(spec, _nhwc(x), layers, norms))
        images = len(x) if shard is None else shard.global_size
        count = images * x.shape[2] * x.shape[3]
        if count == 1:
            raise ValueError("batch normalisation of one value per channel has no variance")
        seed = block.draw_seed(x.device)
        # Autograd sees tensors that are arguments themselves, none within others.
        out, stats, bottleneck_stats = _DenseBlockFunction.apply(
            spec, x, seed, *chain.from_iterable(layers)
        )
        _update_running_statistics(block, norms, stats, bottleneck_stats, count)
    return out


class _DenseBlockFunction(torch.autograd.Function):
    """(maps, parameters) -> maps, and the moments of every channel on the way."""

    @staticmethod
    def forward(ctx, spec: _BlockSpec, x: Tensor, seed: Tensor | None, *parameters: Tensor | None):
        block = spec.block
        *layers, last = _split_by_layer(parameters)
        source = _nhwc(x)
        wide = torch.promote_types(spec.dtype, torch.float32)
        stats = x.new_empty(3, block.out_channels, dtype=wide)  # mean, rstd, var
        bottleneck_stats = x.new_empty(len(block), 3, block.width, dtype=wide)
        features = FeatureMaps(spec.new_buffer(block.out_channels, source), *stats, eps=spec.eps)
        block_input = features.channels(0, block.channels)
        spec.ops.copy_with_stats(source, block_input)
        spec.all_reduce_stats(block_input)
        bottleneck_buffers = []
        for i, layer in enumerate(layers):
            if block.width and (spec.level == 2 or not bottleneck_buffers):
                bottleneck_buffers.append(spec.new_buffer(block.width, source))
            bottleneck = (
                FeatureMaps(bottleneck_buffers[-1], *bottleneck_stats[i], eps=spec.eps)
                if block.width
                else None
            )
            _layer_forward(spec, i, layer, features, bottleneck, seed)
        out = _epilogue_forward(spec, last, features)
        saved = [x] if spec.level == 4 else [features.value]
        saved += bottleneck_buffers if spec.level == 2 else []
        ctx.spec, ctx.num_saved = spec, len(saved)
        ctx.save_for_backward(*saved, stats, bottleneck_stats, seed, *parameters)
        ctx.mark_non_differentiable(stats, bottleneck_stats)
        return _nchw(out), stats, bottleneck_stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        spec: _BlockSpec = ctx.spec
        block = spec.block
        saved = ctx.saved_tensors  # once: whoever moved them elsewhere brings them back each time
        (first, *bottleneck_buffers), rest = saved[: ctx.num_saved], saved[ctx.num_saved :]
        stats, bottleneck_stats, seed, *parameters = rest
        *layers, last = _split_by_layer(parameters)
        mean, rstd, _ = stats
        features = FeatureMaps(first, mean, rstd, eps=spec.eps)
        if spec.level == 4:
            source = _nhwc(first)
            features.value = spec.new_buffer(block.out_channels, source)
            features.value[..., : block.channels] = source
            del saved, first, source
            ctx.maybe_clear_saved_tensors()  # the input: it is in the buffer now
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

        if spec.level == 4:
            for i, layer in enumerate(layers):
                _layer_forward(spec, i, layer, features, bottleneck(i), seed)

        features.grad = spec.new_buffer(block.out_channels, features.value)
        features.mean_correction, features.var_correction = torch.zeros_like(stats[:2])
        grads = [_epilogue_backward(spec, last, features, _nhwc(grad).to(spec.dtype))]
        for i, layer in reversed([*enumerate(layers)]):
            grads.append(_layer_backward(spec, i, layer, features, bottleneck(i), seed))
        dx = None
        if ctx.needs_input_grad[1]:
            block_input = features.channels(0, block.channels)
            spec.all_reduce_corrections(block_input)
            dx = _nchw(spec.ops.complete_gradient(block_input))
        grads = [
            None if parameter is None else found.view_as(parameter).to(parameter.dtype)
            for found, parameter in zip(
                chain.from_iterable(reversed(grads)), parameters, strict=True
            )
        ]
        return None, dx, None, *grads


def _layer_forward(
    spec: _BlockSpec,
    i: int,
    layer: _LayerParams,
    features: FeatureMaps,
    bottleneck: FeatureMaps | None,
    seed,
) -> None:
    """Write the new maps of layer i."""
    start, end = spec.block.layer_offset(i), spec.block.layer_offset(i + 1)
    source, new = features.channels(0, start), features.channels(start, end)
    dropout1, dropout2 = spec.dropouts(seed, i)
    if bottleneck is None:
        spec.ops.conv3x3(source, layer.norm1, layer.conv1, new, dropout1)
    else:
        spec.ops.conv1x1(source, layer.norm1, layer.conv1, bottleneck, dropout1)
        spec.all_reduce_stats(bottleneck)
        spec.ops.conv3x3(bottleneck, layer.norm2, layer.conv2, new, dropout2)
    spec.all_reduce_stats(new)


def _layer_backward(
    spec: _BlockSpec,
    i: int,
    layer: _LayerParams,
    features: FeatureMaps,
    bottleneck: FeatureMaps | None,
    seed,
) -> _LayerParams:
    """Backward of layer i: add to the gradient of what it read; its parameters' gradients."""
    ops = spec.ops
    start, end = spec.block.layer_offset(i), spec.block.layer_offset(i + 1)
    source, new = features.channels(0, start), features.channels(start, end)
    dropout1, dropout2 = spec.dropouts(seed, i)
    spec.all_reduce_corrections(new)
    if bottleneck is None:
        dconv, dweight, dbias = ops.conv3x3_backward(
            new, source, layer.norm1, layer.conv1, dropout1, overwrite=False
        )
        return _LayerParams(dweight, dbias, dconv)
    if spec.level > 2:
        ops.conv1x1(source, layer.norm1, layer.conv1, bottleneck, dropout1)
    dconv2, dweight2, dbias2 = ops.conv3x3_backward(
        new, bottleneck, layer.norm2, layer.conv2, dropout2, overwrite=True
    )
    spec.all_reduce_corrections(bottleneck)
    dconv1, dweight1, dbias1 = ops.conv1x1_backward(
        bottleneck, source, layer.norm1, layer.conv1, dropout1, overwrite=False
    )
    return _LayerParams(dweight1, dbias1, dconv1, dweight2, dbias2, dconv2)


def _epilogue_forward(spec: _BlockSpec, layer: _LayerParams, features: FeatureMaps) -> Tensor:
    """What reads the whole block: (N, H', W', C')."""
    if spec.window:
        return spec.ops.norm_relu_avg_pool(features, layer.norm1, spec.window)
    out = features.value.new_empty((*features.value.shape[:3], len(layer.conv1)))
    spec.ops.conv1x1(features, layer.norm1, layer.conv1, FeatureMaps(out), None)
    return out


def _epilogue_backward(
    spec: _BlockSpec, layer: _LayerParams, features: FeatureMaps, grad: Tensor
) -> _LayerParams:
    """Begin the gradient of the whole block; the gradients of the epilogue's parameters."""
    if spec.window:
        return _LayerParams(
            *spec.ops.norm_relu_avg_pool_backward(grad, features, layer.norm1, spec.window)
        )
    target = FeatureMaps(grad, grad=grad)  # nothing normalises it, so its values are not needed
    dconv, dweight, dbias = spec.ops.conv1x1_backward(
        target, features, layer.norm1, layer.conv1, None, overwrite=True
    )
    return _LayerParams(dweight, dbias, dconv)


def _evaluate(
    spec: _BlockSpec, x: Tensor, layers: list[_LayerParams], norms: list[nn.BatchNorm2d]
) -> Tensor:
    """The stage with each batch normalisation's own running statistics; nothing is kept."""
    block = spec.block
    *layers, last = layers
    means = [norm.running_mean for norm in norms]
    rstds = [(norm.running_var + norm.eps).rsqrt() for norm in norms]
    statistics = iter(zip(means, rstds, strict=True))
    value = spec.new_buffer(block.out_channels, x)
    value[..., : block.channels] = x
    bottleneck = FeatureMaps(spec.new_buffer(block.width, x)) if block.width else None
    for i, layer in enumerate(layers):
        start, end = block.layer_offset(i), block.layer_offset(i + 1)
        source, new = (
            FeatureMaps(value[..., :start], *next(statistics)),
            FeatureMaps(value[..., start:end]),
        )
        if bottleneck is None:
            spec.ops.conv3x3(source, layer.norm1, layer.conv1, new, None)
        else:
            spec.ops.conv1x1(source, layer.norm1, layer.conv1, bottleneck, None)
            bottleneck.mean, bottleneck.rstd = next(statistics)
            spec.ops.conv3x3(bottleneck, layer.norm2, layer.conv2, new, None)
            bottleneck.mean = bottleneck.rstd = None
    return _epilogue_forward(spec, last, FeatureMaps(value, *next(statistics)))


@torch.no_grad()
def _update_running_statistics(
    block: DenseBlock,
    norms: list[nn.BatchNorm2d],
    stats: Tensor,
    bottleneck_stats: Tensor,
    count: int,
) -> None:
    """Move the buffers of every batch normalisation once, towards the unbiased variance."""
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
        wanted = torch._foreach_mul([stat[row] for stat in stats_of_norms], factor)
        wanted = [value.to(target.dtype) for value, target in zip(wanted, targets, strict=True)]
        torch._foreach_lerp_(targets, wanted, momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


def _features_dtype(x: Tensor) -> torch.dtype:
    """As autocast would have it: single precision becomes the lower one, double stays."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)
