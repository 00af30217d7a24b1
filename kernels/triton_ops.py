"""Run the operations of a dense block in Triton, each as kernels/reference.py specifies it.

An operation that needs sums over rows launches a second kernel, which combines the partial sums of
the first. With meta or fake tensors an operation allocates its tensors and launches nothing.
"""

import torch
from torch import Tensor

from kernels import tiling, triton_backward, triton_forward
from kernels.dropout import DropoutSpec
from kernels.feature_maps import FeatureMaps, NormParams
from kernels.tiling import Tile


def copy_with_stats(value: Tensor, target: FeatureMaps) -> None:
    """See kernels.reference.copy_with_stats."""
    value, tile, channels = value.contiguous(), tiling.ELEMENTWISE, value.shape[3]
    num_splits = tile.blocks("ROWS", target.num_pixels)
    partial = _new_float32(target.value, num_splits, 2, channels)
    _launch(
        triton_forward.copy_with_stats,
        (num_splits, tile.blocks("CHANNELS", channels)),
        tile,
        value=value,
        target=target.value,
        target_stride=_row_stride(target.value),
        partial=partial,
        num_rows=target.num_pixels,
        channels=channels,
        VECTOR=tiling.vector_width(value, target.value),
    )
    _reduce_stats(target, partial, tile)


def conv1x1(
    source: FeatureMaps, norm: NormParams, weight: Tensor, target: FeatureMaps,
    dropout: DropoutSpec | None,
) -> None:  # fmt: skip
    """See kernels.reference.conv1x1."""
    tile = tiling.conv1x1(source.value.dtype, len(weight))
    _forward(triton_forward.conv1x1, tile, source, norm, weight, target, dropout)


def conv3x3(
    source: FeatureMaps, norm: NormParams, weight: Tensor, target: FeatureMaps,
    dropout: DropoutSpec | None,
) -> None:  # fmt: skip
    """See kernels.reference.conv3x3."""
    out_channels, channels = weight.shape[:2]
    tile = tiling.conv3x3(source.value.dtype, channels, out_channels)
    _forward(triton_forward.conv3x3, tile, source, norm, weight, target, dropout)


def norm_relu_avg_pool(source: FeatureMaps, norm: NormParams, window: tuple[int, int]) -> Tensor:
    """See kernels.reference.norm_relu_avg_pool."""
    images, height, width, channels = source.value.shape
    out = source.value.new_empty(images, height // window[0], width // window[1], channels)
    rows, tile = out.numel() // channels, tiling.norm_relu_avg_pool(window)
    _launch(
        triton_forward.norm_relu_avg_pool,
        (tile.blocks("ROWS", rows), tile.blocks("CHANNELS", channels)),
        tile,
        **_source_args(source, norm),
        target=out,
        window_h=window[0],
        window_w=window[1],
        num_outputs=rows,
        VECTOR=tiling.vector_width(source.value),
    )
    return out


def _forward(
    kernel, tile: Tile, source: FeatureMaps, norm: NormParams, weight: Tensor,
    target: FeatureMaps, dropout: DropoutSpec | None,
) -> None:  # fmt: skip
    out, out_channels = target.value, len(weight)
    num_splits = tile.blocks("ROWS", target.num_pixels)
    # A target without `var` needs no statistics.
    partial = None if target.var is None else _new_float32(out, num_splits, 2, out_channels)
    _launch(
        kernel,
        (num_splits * tile.blocks("OUT_CHANNELS", out_channels),),
        tile,
        **_source_args(source, norm),
        **_weight_args(weight),
        **_dropout_args(dropout, out),
        target=out,
        target_stride=_row_stride(out),
        partial=partial,
        VECTOR=tiling.vector_width(source.value),
        TARGET_VECTOR=tiling.vector_width(out),
    )
    if partial is not None:
        _reduce_stats(target, partial, tile)


def _reduce_stats(target: FeatureMaps, partial: Tensor, tile: Tile) -> None:
    num_splits, _, channels = partial.shape
    _launch(
        triton_forward.reduce_stats,
        (tiling.REDUCE_STATS.blocks("CHANNELS", channels),),
        tiling.REDUCE_STATS,
        partial=partial,
        mean=target.mean,
        var=target.var,
        rstd=target.rstd,
        eps=target.eps,
        num_splits=num_splits,
        rows_per_split=tile.sizes["ROWS"],
        num_rows=target.num_pixels,
        channels=channels,
    )


def conv1x1_backward(
    target: FeatureMaps, source: FeatureMaps, norm: NormParams, weight: Tensor,
    dropout: DropoutSpec | None, overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See kernels.reference.conv1x1_backward; may complete `target.grad` in place."""
    value, (out_channels, channels) = source.value, weight.shape[:2]
    d = target.grad.contiguous()
    if dropout and target.mean is None:  # the caller's own gradient, which others may read
        d = torch.empty_like(d)
    if dropout or target.mean is not None:
        _complete_gradient(target, dropout, d)
    tile = tiling.conv1x1_backward(value.dtype, out_channels)
    column_blocks = tile.blocks("CHANNELS", channels)
    out_blocks = tile.blocks("OUT_CHANNELS", out_channels)
    splits, rows_per_split = tiling.splits(source.num_pixels, tile, column_blocks)
    norm_partials = _new_float32(value, out_blocks * splits, 2, channels)
    weight_partials = _new_float32(value, splits, weight.numel())
    # dz is a sum over output channels: the launches after the first add to the source's gradient.
    for block in range(out_blocks):
        _launch(
            triton_backward.conv1x1_backward,
            (column_blocks, splits),
            tile,
            d=d,
            d_stride=_row_stride(d),
            **_source_args(source, norm),
            **_weight_args(weight),
            **_grad_args(source),
            partial=norm_partials,
            weight_partials=weight_partials,
            dweight_size=weight.numel(),
            first_out_channel=block * tile.sizes["OUT_CHANNELS"],
            rows_per_split=rows_per_split,
            first_split=block * splits,
            OVERWRITE=overwrite and block == 0,
            TARGET_VECTOR=tiling.vector_width(d),
        )
    return _reduce_partials(source, norm, norm_partials, weight, weight_partials)


def conv3x3_backward(
    target: FeatureMaps, source: FeatureMaps, norm: NormParams, weight: Tensor,
    dropout: DropoutSpec | None, overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See kernels.reference.conv3x3_backward."""
    value, (out_channels, channels) = source.value, weight.shape[:2]
    tile = tiling.conv3x3_backward(value.dtype, out_channels)
    # Nine taps read each row of the complete gradient: compute it once, beforehand.
    d = value.new_empty((*value.shape[:3], tile.sizes["OUT_CHANNELS"]))
    _complete_gradient(target, dropout, d)
    num_splits = tile.blocks("ROWS", source.num_pixels)
    norm_partials = _new_float32(value, num_splits, 2, channels)
    _launch(
        triton_backward.conv3x3_backward,
        (num_splits * tile.blocks("CHANNELS", channels),),
        tile,
        d=d,
        **_source_args(source, norm),
        **_weight_args(weight),
        **_grad_args(source),
        partial=norm_partials,
        OVERWRITE=overwrite,
    )
    weight_partials = _conv3x3_weight_backward(d, source, norm, weight)
    return _reduce_partials(source, norm, norm_partials, weight, weight_partials)


def _conv3x3_weight_backward(
    d: Tensor, source: FeatureMaps, norm: NormParams, weight: Tensor
) -> Tensor:
    """Return the partial sums of the weight's gradient: (splits, size of the weight)."""
    value, (out_channels, channels) = source.value, weight.shape[:2]
    tile = tiling.conv3x3_weight_backward(value.dtype, out_channels)
    blocks = tile.blocks("CHANNELS", channels) * (9 // tile.sizes["TAPS"])
    splits, rows_per_split = tiling.splits(source.num_pixels, tile, blocks)
    partials = _new_float32(value, splits, weight.numel())
    _launch(
        triton_backward.conv3x3_weight_backward,
        (blocks, splits),
        tile,
        d=d,
        **_source_args(source, norm),
        **_weight_args(weight),
        weight_partials=partials,
        dweight_size=weight.numel(),
        rows_per_split=rows_per_split,
        VECTOR=tiling.vector_width(value),
    )
    return partials


def norm_relu_avg_pool_backward(
    grad: Tensor, source: FeatureMaps, norm: NormParams, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """See kernels.reference.norm_relu_avg_pool_backward."""
    grad, tile, channels = grad.contiguous(), tiling.ELEMENTWISE, source.value.shape[3]
    column_blocks = tile.blocks("CHANNELS", channels)
    splits, rows_per_split = tiling.splits(source.num_pixels, tile, column_blocks)
    partials = _new_float32(source.value, splits, 2, channels)
    _launch(
        triton_backward.norm_relu_avg_pool_backward,
        (column_blocks, splits),
        tile,
        out_grad=grad,
        **_source_args(source, norm),
        **_grad_args(source),
        partial=partials,
        window_h=window[0],
        window_w=window[1],
        rows_per_split=rows_per_split,
        GRAD_VECTOR=tiling.vector_width(grad),
    )
    return _reduce_partials(source, norm, partials, None, None)[1:]


def complete_gradient(x: FeatureMaps) -> Tensor:
    """See kernels.reference.complete_gradient."""
    out = torch.empty_like(x.value, memory_format=torch.contiguous_format)
    _complete_gradient(x, None, out)
    return out


def _complete_gradient(x: FeatureMaps, dropout: DropoutSpec | None, out: Tensor) -> None:
    """Write mask * complete gradient to the first channels of `out`, and 0 to its others."""
    grad, tile = x.grad, tiling.ELEMENTWISE
    if x.mean is None:  # the caller's own gradient, in any memory layout
        grad = grad.contiguous()
    _launch(
        triton_backward.complete_gradient,
        (tile.blocks("ROWS", x.num_pixels), tile.blocks("CHANNELS", out.shape[3])),
        tile,
        grad=grad,
        grad_stride=_row_stride(grad),
        value=x.value,
        value_stride=_row_stride(x.value),
        mean=x.mean,
        rstd=x.rstd,
        mean_correction=x.mean_correction,
        var_correction=x.var_correction,
        **_dropout_args(dropout, x.value),
        target=out,
        target_stride=_row_stride(out),
        num_rows=x.num_pixels,
        channels=x.value.shape[3],
        columns=out.shape[3],
        VECTOR=tiling.vector_width(grad, x.value),
        TARGET_VECTOR=tiling.vector_width(out),
    )


def _reduce_partials(
    source: FeatureMaps, norm: NormParams, norm_partials: Tensor, weight: Tensor | None,
    weight_partials: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Add up partial sums, also into the source's corrections: (dweight or None, dgamma, dbeta)."""
    # norm_partials is (splits, 2, C): sums for dbeta and for dgamma / rstd.
    num_splits, _, channels = norm_partials.shape
    dgamma, dbeta = torch.empty_like(source.mean), torch.empty_like(source.mean)
    dweight, size, num_weight_partials = None, 0, 0
    if weight is not None:
        dweight = torch.empty_like(weight, dtype=torch.float32)
        # The kernels index partial sums by the weight's strides.
        assert dweight.stride() == weight.stride(), "a weight has gaps in memory"
        size, num_weight_partials = weight.numel(), len(weight_partials)
    tile = tiling.REDUCE_PARTIALS
    _launch(
        triton_backward.reduce_partials,
        (tile.blocks("NORM_CHANNELS", channels) + tile.blocks("ELEMENTS", size),),
        tile,
        partial=norm_partials,
        num_splits=num_splits,
        norm_rstd=source.rstd,
        norm_weight=norm.weight,
        mean_correction=source.mean_correction,
        var_correction=source.var_correction,
        dbeta=dbeta,
        dgamma=dgamma,
        num_rows=source.num_pixels,
        channels=channels,
        weight_partials=weight_partials,
        num_weight_partials=num_weight_partials,
        dweight=dweight,
        dweight_size=size,
    )
    return dweight, dgamma, dbeta


def _row_stride(x: Tensor) -> int:
    """Return the stride, in elements, from one pixel to the next, also across images."""
    # A contiguous tensor may have any stride where it is one pixel wide.
    return x.shape[3] if x.is_contiguous() else x.stride(2)


def _source_args(x: FeatureMaps, norm: NormParams) -> dict:
    images, height, width, channels = x.value.shape
    return {
        "value": x.value,
        "value_stride": _row_stride(x.value),
        "norm_mean": x.mean,
        "norm_rstd": x.rstd,
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "height": height,
        "width": width,
        "num_rows": images * height * width,
        "channels": channels,
    }


def _weight_args(weight: Tensor) -> dict:
    # The stride along C is a constexpr: 1 in channels-last weights.
    stride_f, stride_c, stride_y, stride_x = weight.stride()
    return {
        "weight": weight,
        "weight_f": stride_f,
        "weight_y": stride_y,
        "weight_x": stride_x,
        "out_channels": len(weight),
        "WEIGHT_C": stride_c,
        "WEIGHT_VECTOR": tiling.weight_vector_width(weight),
        "PRECISION": _precision(weight),
    }


def _grad_args(x: FeatureMaps) -> dict:
    return {
        "grad": x.grad,
        "grad_stride": _row_stride(x.grad),
        "VECTOR": tiling.vector_width(x.value, x.grad),
    }


def _dropout_args(dropout: DropoutSpec | None, value: Tensor) -> dict:
    dropped = dropout or DropoutSpec(0.0, None, 0)
    return {
        "seed": dropped.seed,
        "layer_id": dropped.layer_id,
        "first_row": dropped.sample_offset * value.shape[1] * value.shape[2],
        "threshold": dropped.threshold,
        "keep_scale": dropped.scale,
    }


def _new_float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _precision(x: Tensor) -> str:
    """Choose how tl.dot multiplies float32: three TF32 products nearly reach its precision."""
    if x.device.type == "cpu":
        return "interpreted"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _launch(kernel, grid: tuple[int, ...], tile: Tile, **arguments) -> None:
    """Launch a kernel on the device of its first argument, but not for meta or fake tensors."""
    tensor = next(iter(arguments.values()))
    if tensor.is_meta or type(tensor) is not Tensor:
        return
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            kernel[grid](**arguments, **tile.sizes, num_warps=tile.warps, num_stages=tile.stages)
    else:
        kernel[grid](**arguments, **tile.sizes)
