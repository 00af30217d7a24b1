"""Specify the operations of a dense block in plain PyTorch, and run them on CPUs.

Every operation but the copy reads feature maps (N, H, W, C) through a batch norm and a ReLU:
Z = relu((value - mean) * rstd * gamma + beta). It writes to the memory of its target, since a dense
block keeps the maps of all layers in one buffer. Forward also computes the target's statistics,
once for all later batch norms; backward defers their terms (see kernels/feature_maps.py).

On the CPU an operation works on tiles of whole images, small enough that what one PyTorch call
writes is still in the cache when the next one reads it. On CUDA one tile is the whole batch.
Maps of 16 bits are computed in float32, tile by tile, where the CPU lacks instructions for them.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from kernels.dropout import DropoutSpec
from kernels.feature_maps import FeatureMaps, Norm, Reader, nchw, nhwc

TILE_BYTES = 8_000_000  # that an operation reads at a time on the CPU: half of a usual cache
VECTOR_CHANNELS = 64  # PyTorch's batch norm is slow with fewer channels


def copy_with_stats(value: Tensor, target: FeatureMaps, reader: Reader | None) -> None:
    """Copy value, (N, H, W, C), to target.value; compute the target's statistics.

    Also computes scale and shift of the norm that reads the target next, unless `reader` is None.
    """
    tile_stats = []
    for tile in _tiles(value):
        target.value[tile] = value[tile]
        tile_stats.append(_grouped_stats(target.value[tile]))
    _reduce_stats(tile_stats, target, reader)


def conv(
    source: FeatureMaps, norm: Norm, weight: Tensor, target: FeatureMaps,
    dropout: DropoutSpec | None, reader: Reader | None,
) -> None:  # fmt: skip
    """Write dropout(conv2d(Z, weight)), padded to keep H and W, to target.value, (N, H, W, F).

    `weight` is (F, C, 1, 1) or (F, C, 3, 3). Computes statistics unless `target.var` is None, and
    then also scale and shift of the norm that reads the target next, unless `reader` is None.
    """
    dtype = _compute_dtype(source.value)
    weight = weight.to(dtype, memory_format=torch.channels_last)
    tile_stats = []
    for tile in _tiles(source.value):
        z = _affine(source.value[tile].to(dtype), norm.scale, norm.shift).relu_()
        if _is_matrix(weight):
            out = F.linear(z, weight.flatten(1))
        else:
            out = nhwc(F.conv2d(nchw(z), weight, padding=weight.shape[-1] // 2))
        if dropout:
            out.mul_(dropout.mask(out, tile.start))
        target.value[tile] = out = out.to(target.value.dtype)
        if target.var is not None:
            tile_stats.append(_grouped_stats(out))
    if tile_stats:
        _reduce_stats(tile_stats, target, reader)


conv1x1 = conv3x3 = conv  # two names: other backends have a kernel for each


def norm_relu_avg_pool(source: FeatureMaps, norm: Norm, window: tuple[int, int]) -> Tensor:
    """Return avg_pool2d(Z, window): (N, H // h, W // w, C)."""
    height, width = source.value.shape[1:3]
    pooled = source.value.new_empty(
        len(source.value), height // window[0], width // window[1], source.value.shape[3]
    )
    for tile in _tiles(source.value):
        z = _affine(source.value[tile], norm.scale, norm.shift).relu_()
        pooled[tile] = nhwc(F.avg_pool2d(nchw(z), window))
    return pooled


def conv_backward(
    target: FeatureMaps, source: FeatureMaps, norm: Norm, weight: Tensor,
    dropout: DropoutSpec | None, overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dweight, dgamma, dbeta) of `conv`, from the target's complete gradient.

    Adds to the source's corrections and to `source.grad`, which it overwrites if `overwrite`. The
    backward of every operation that reads the target must have run.
    """
    scale, shift = norm.scale, norm.shift
    dweight = torch.zeros_like(weight, dtype=scale.dtype)
    dtype = _compute_dtype(source.value)
    weight = weight.to(dtype, memory_format=torch.channels_last)
    sums, is_direct = _NormGradSums(source), _sums_directly(source, scale, shift)
    for tile in _tiles(source.value):
        # The gradient of the convolution's output, before dropout.
        upstream = _complete_tile(target, tile)
        if dropout:
            upstream.mul_(dropout.mask(upstream, tile.start))
        # Recompute Z, then the gradients of weight and Z.
        value = _compact(source.value[tile].to(dtype), scale)
        z = _affine(value, scale, shift).relu_()
        tile_dweight, dz = _conv_grads(upstream, z, weight)
        dweight += tile_dweight
        # Through ReLU and norm to the source; z's memory is free for the product.
        dz = _relu_backward(dz, z)
        sums.add(dz, torch.mul(dz, value, out=z) if is_direct else None)
        _scale_into(source.grad[tile], dz, scale, overwrite)
    if not is_direct:
        # The convolution is linear in Z, so the sum of dz * Z over the pixels is one over filters.
        dz_z = (weight * dweight).sum((0, 2, 3))
        sums.dz_value = (dz_z - shift * sums.dz) / scale  # where Z > 0, it is value * scale + shift
    return dweight, *sums.finish(scale)


conv1x1_backward = conv3x3_backward = conv_backward


def norm_relu_avg_pool_backward(
    grad: Tensor, source: FeatureMaps, norm: Norm, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return (dgamma, dbeta) from `grad`, (N, H // h, W // w, C), of the pooled maps.

    Overwrites `source.grad` and adds to the source's corrections.
    """
    scale, shift = norm.scale, norm.shift
    sums = _NormGradSums(source)
    for tile in _tiles(source.value):
        value = _compact(source.value[tile], scale)
        z = _affine(value, scale, shift).relu_()
        dz = torch.ops.aten.avg_pool2d_backward(
            nchw(grad[tile]), nchw(z), window, window, (0, 0), False, True, None
        )
        dz = _relu_backward(nhwc(dz), z)
        sums.add(dz, torch.mul(dz, value, out=z))
        _scale_into(source.grad[tile], dz, scale, overwrite=True)
    return sums.finish(scale)


def _conv_grads(upstream: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and z, (n, H, W, C), from that of the convolution's output."""
    if _is_matrix(weight):
        dweight = upstream.flatten(0, 2).t() @ z.flatten(0, 2)
        return dweight.view(weight.shape), upstream @ weight.flatten(1)
    padding = (weight.shape[-1] // 2,) * 2
    args = nchw(upstream), nchw(z), weight, None, (1, 1), padding, (1, 1), False, (0, 0), 1
    # Two calls are faster than one.
    dweight = torch.ops.aten.convolution_backward(*args, (False, True, False))[1]
    dz = torch.ops.aten.convolution_backward(*args, (True, False, False))[0]
    return dweight, nhwc(dz)


def _is_matrix(weight: Tensor) -> bool:
    """Tell whether to multiply matrices: a 1x1 convolution reorders float32 weights first."""
    return weight.shape[-1] == 1 and weight.dtype.itemsize > 2


def complete_gradient(x: FeatureMaps) -> Tensor:
    """Return the gradient, (N, H, W, C), of maps after the backward of all their readers."""
    out = torch.empty_like(x.value, memory_format=torch.contiguous_format)
    for tile in _tiles(x.value):
        out[tile] = _complete_tile(x, tile)
    return out


class _NormGradSums:
    """Sum dbeta = sum(dz) and dgamma = sum(dz * (value - mean) * rstd) tile by tile."""

    def __init__(self, source: FeatureMaps):
        self.source = source
        self.dz = torch.zeros_like(source.mean)
        self.dz_value = torch.zeros_like(source.mean)

    def add(self, dz: Tensor, dz_value: Tensor | None) -> None:
        self.dz += _channel_sum(dz)
        if dz_value is not None:
            self.dz_value += _channel_sum(dz_value)

    def finish(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return (dgamma, dbeta); add scale / M times each to the source's corrections."""
        source = self.source
        dweight = source.rstd * (self.dz_value - source.mean * self.dz)
        source.mean_correction.addcmul_(scale, self.dz, value=1 / source.num_pixels)
        source.var_correction.addcmul_(scale, dweight, value=1 / source.num_pixels)
        return dweight, self.dz


def _sums_directly(source: FeatureMaps, scale: Tensor, shift: Tensor) -> bool:
    """Return whether to sum dz * value over the pixels, which costs a tenth of a step on the CPU.

    Otherwise it follows from the weight's gradient, divided by scale: that loses two digits where
    gamma is a hundredth of shift, and all where gamma is 0.
    """
    if source.value.is_cuda or _compute_dtype(source.value) != scale.dtype:
        return True  # reading scale would wait for the GPU; 16-bit gradients have no digits to lose
    return not bool((scale.abs() > 0.01 * shift.abs() * source.rstd).all())


def _complete_tile(x: FeatureMaps, tile: slice) -> Tensor:
    """Return the complete gradient of a tile, in new memory."""
    if x.mean is None:  # no norm reads these maps
        return x.grad[tile].to(_compute_dtype(x.grad), copy=True)
    # Compute both corrections as one affine function of the value.
    scale = -x.rstd * x.var_correction
    shift = -x.mean_correction - x.mean * scale
    dtype = _compute_dtype(x.value)
    completed = _affine(x.value[tile].to(dtype), scale, shift)
    return completed.add_(_compact(x.grad[tile].to(dtype), scale))


def _compute_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype to compute in: that of the maps, or float32."""
    return value.dtype if value.is_cuda or cpu.computes_in(value.dtype) else torch.float32


def _tiles(value: Tensor) -> Iterator[slice]:
    """Cut a batch into slices of as equal a size as possible."""
    images = len(value)
    size = value.numel() * _compute_dtype(value).itemsize
    count = 1 if value.is_cuda else -(-size // TILE_BYTES)
    size = max(1, -(-images // max(1, count)))
    for start in range(0, images, size):
        yield slice(start, min(start + size, images))


def _affine(value: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return value * scale + shift per channel, in new memory, rounded once."""
    if value.dtype == scale.dtype:
        return value * scale if shift is None else torch.addcmul(shift, value, scale)
    # 16-bit maps with float32 factors: of PyTorch's kernels that take both, only batch norm's is
    # fast, and only on contiguous memory.
    mean, var = torch.zeros_like(scale), torch.ones_like(scale)
    x = nchw(value.contiguous())
    return nhwc(torch.batch_norm(x, scale, shift, mean, var, False, 0.0, 0.0, False))


def _scale_into(grad: Tensor, dz: Tensor, scale: Tensor, overwrite: bool) -> None:
    """Add dz * scale to grad, or replace grad by it if `overwrite`; may overwrite dz."""
    if overwrite:
        grad.copy_(_affine(dz, scale))
    elif dz.dtype == scale.dtype:
        grad.addcmul_(dz, scale)
    else:
        width = grad.shape[2]
        sums = grad.contiguous()
        # A whole row of pixels at a time: a pixel has too few channels to fill vector units.
        sums.flatten(2).addcmul_(dz.flatten(2), scale.to(dz.dtype).repeat(width))
        grad.copy_(sums)


def _compact(value: Tensor, scale: Tensor) -> Tensor:
    """Make 16-bit maps contiguous, since their kernels are slow otherwise."""
    return value if value.dtype == scale.dtype else value.contiguous()


def _relu_backward(dz: Tensor, z: Tensor) -> Tensor:
    """Set dz to 0 where z <= 0, in place."""
    return torch.ops.aten.threshold_backward.grad_input(dz, z, 0, grad_input=dz)


def _channel_sum(x: Tensor) -> Tensor:
    """Sum contiguous (n, H, W, C) to (C,), in float32 or float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    columns = x.flatten(2).flatten(0, 1).sum(0)  # (W * C,): long rows are summed much faster
    return columns.unflatten(0, x.shape[2:]).sum(0, dtype=wide)


def _grouped_stats(value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return mean and biased variance, (groups, C) each, and the number of values in a group.

    Treats `groups` neighbouring pixels as further channels, to have enough for vector units.
    """
    width, channels = value.shape[2:]
    max_groups = max(1, VECTOR_CHANNELS // channels)
    groups = max(d for d in range(1, min(max_groups, width) + 1) if width % d == 0)
    wide = torch.promote_types(value.dtype, torch.float32)
    rows = value.reshape(-1, groups * channels)
    running = rows.new_zeros(2, groups * channels, dtype=wide)  # of no use but for their dtype
    mean, var = torch.batch_norm_update_stats(rows, *running, 0.0)
    return mean.view(groups, channels), var.view(groups, channels), len(rows)


def _reduce_stats(
    tile_stats: list[tuple[Tensor, Tensor, int]], target: FeatureMaps, reader: Reader | None
) -> None:
    """Combine the statistics of all groups of all tiles by the law of total variance."""
    # E[x^2] - E[x]^2 would lose all digits where a mean is far from 0.
    fractions = [count / target.num_pixels for *_, count in tile_stats]
    mean = sum(
        means.sum(0) * fraction for (means, *_), fraction in zip(tile_stats, fractions, strict=True)
    )
    var = sum(
        (variances + (means - mean).square()).sum(0) * fraction
        for (means, variances, _), fraction in zip(tile_stats, fractions, strict=True)
    )
    target.mean.copy_(mean)
    target.var.copy_(var)
    target.rstd.copy_((var + target.eps).rsqrt_())
    if reader is not None:
        reader.norm.update(reader.source)
