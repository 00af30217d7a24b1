"""The operations of a dense block in Triton: kernels/reference.py, function by function.

An operation is one kernel, and where it sums over rows a second one that adds what each program
of the first has summed, in a fixed order: every run gives the same bits. Nothing else is launched.
Given tensors without memory an operation allocates what it would and launches nothing.
"""

import torch
from torch import Tensor

from kernels import tiling, triton_backward, triton_forward
from kernels.dropout import DropoutSpec
from kernels.feature_maps import FeatureMaps, NormParams
from kernels.tiling import Tile

# ------------------------------------------------------------------------------------- forward


def copy_with_stats(value: Tensor, target: FeatureMaps) -> None:
    """See kernels.reference.copy_with_stats."""
    value, tile, channels = value.contiguous(), tiling.ELEMENTWISE, value.shape[3]
    num_splits = tiling.cdiv(target.num_pixels, tile.sizes["ROWS"])
    partial = _new_float32(target.value, num_splits, 2, channels)
    _launch(
        triton_forward.copy_with_stats,
        (num_splits, tiling.cdiv(channels, tile.sizes["CHANNELS"])),
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
    features = len(weight)
    tile = tiling.conv1x1(source.value.dtype, features)
    blocks = tiling.cdiv(features, tile.sizes["FEATURES"])
    _forward(triton_forward.conv1x1, tile, blocks, source, norm, weight, target, dropout)


def conv3x3(
    source: FeatureMaps, norm: NormParams, weight: Tensor, target: FeatureMaps,
    dropout: DropoutSpec | None,
) -> None:  # fmt: skip
    """See kernels.reference.conv3x3."""
    features, channels = weight.shape[:2]
    tile = tiling.conv3x3(source.value.dtype, channels, features)
    _forward(triton_forward.conv3x3, tile, 1, source, norm, weight, target, dropout)


def norm_relu_avg_pool(source: FeatureMaps, norm: NormParams, window: tuple[int, int]) -> Tensor:
    """See kernels.reference.norm_relu_avg_pool."""
    images, height, width, channels = source.value.shape
    out = source.value.new_empty(images, height // window[0], width // window[1], channels)
    rows, tile = out.numel() // channels, tiling.norm_relu_avg_pool(window)
    _launch(
        triton_forward.norm_relu_avg_pool,
        (tiling.cdiv(rows, tile.sizes["ROWS"]), tiling.cdiv(channels, tile.sizes["CHANNELS"])),
        tile,
        **_input_args(source, norm),
        target=out,
        **_shape_args(source.value),
        **_window_args(window),
        num_outputs=rows,
        VECTOR=tiling.vector_width(source.value),
    )
    return out


def _forward(
    kernel, tile: Tile, blocks: int, source: FeatureMaps, norm: NormParams, weight: Tensor,
    target: FeatureMaps, dropout: DropoutSpec | None,
) -> None:  # fmt: skip
    out, features = target.value, len(weight)
    num_splits = tiling.cdiv(target.num_pixels, tile.sizes["ROWS"])
    partial = None if target.var is None else _new_float32(out, num_splits, 2, features)
    _launch(
        kernel,
        (num_splits * blocks,),
        tile,
        **_input_args(source, norm),
        **_weight_args(weight),
        target=out,
        target_stride=_row_stride(out),
        **_dropout_args(dropout, out),
        partial=partial,
        **_shape_args(source.value),
        features=features,
        VECTOR=tiling.vector_width(source.value),
        TARGET_VECTOR=tiling.vector_width(out),
        PRECISION=_precision(out),
    )
    if partial is not None:
        _reduce_stats(target, partial, tile)


def _reduce_stats(target: FeatureMaps, partial: Tensor, tile: Tile) -> None:
    num_splits, _, channels = partial.shape
    _launch(
        triton_forward.reduce_stats,
        (tiling.cdiv(channels, tiling.REDUCE_STATS.sizes["CHANNELS"]),),
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


# ------------------------------------------------------------------------------------ backward


def conv1x1_backward(
    target: FeatureMaps, source: FeatureMaps, norm: NormParams, weight: Tensor,
    dropout: DropoutSpec | None, overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See kernels.reference.conv1x1_backward; `target.grad` may become the complete gradient."""
    value, (features, channels) = source.value, weight.shape[:2]
    d = target.grad.contiguous()
    if dropout and target.mean is None:  # others may read a gradient that no norm has added to
        d = torch.empty_like(d)
    if dropout or target.mean is not None:
        _complete_gradient(target, dropout, d)
    tile = tiling.conv1x1_backward(value.dtype, features)
    column_blocks = tiling.cdiv(channels, tile.sizes["CHANNELS"])
    splits, rows_per_split = tiling.splits(source.num_pixels, tile, column_blocks)
    feature_blocks = tiling.cdiv(features, tile.sizes["FEATURES"])
    norm_partials = _new_float32(value, feature_blocks * splits, 2, channels)
    weight_partials = _new_float32(value, splits, weight.numel())
    for block in range(feature_blocks):  # the source's gradient is a sum over features
        _launch(
            triton_backward.conv1x1_backward,
            (column_blocks, splits),
            tile,
            d=d,
            d_stride=_row_stride(d),
            **_input_args(source, norm),
            **_grad_args(source),
            **_weight_args(weight),
            partial=norm_partials,
            weight_partials=weight_partials,
            dweight_size=weight.numel(),
            **_shape_args(value),
            features=features,
            first_feature=block * tile.sizes["FEATURES"],
            rows_per_split=rows_per_split,
            first_split=block * splits,
            OVERWRITE=overwrite and block == 0,
            TARGET_VECTOR=tiling.vector_width(d),
            PRECISION=_precision(value),
        )
    return _reduce_partials(source, norm, norm_partials, weight, weight_partials)


def conv3x3_backward(
    target: FeatureMaps, source: FeatureMaps, norm: NormParams, weight: Tensor,
    dropout: DropoutSpec | None, overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See kernels.reference.conv3x3_backward."""
    value, (features, channels) = source.value, weight.shape[:2]
    tile = tiling.conv3x3_backward(value.dtype, features)
    # Each row is read at nine places, so that it is formed once.
    d = value.new_empty((*value.shape[:3], tile.sizes["FEATURES"]))
    _complete_gradient(target, dropout, d)
    num_splits = tiling.cdiv(source.num_pixels, tile.sizes["ROWS"])
    norm_partials = _new_float32(value, num_splits, 2, channels)
    _launch(
        triton_backward.conv3x3_backward,
        (num_splits * tiling.cdiv(channels, tile.sizes["CHANNELS"]),),
        tile,
        d=d,
        **_input_args(source, norm),
        **_grad_args(source),
        **_weight_args(weight),
        partial=norm_partials,
        **_shape_args(value),
        features=features,
        OVERWRITE=overwrite,
        PRECISION=_precision(value),
    )
    weight_partials = _conv3x3_weight(d, source, norm, weight)
    return _reduce_partials(source, norm, norm_partials, weight, weight_partials)


def _conv3x3_weight(d: Tensor, source: FeatureMaps, norm: NormParams, weight: Tensor) -> Tensor:
    value, (features, channels) = source.value, weight.shape[:2]
    tile = tiling.conv3x3_weight_backward(value.dtype, features)
    blocks = tiling.cdiv(channels, tile.sizes["CHANNELS"]) * (9 // tile.sizes["TAPS"])
    splits, rows_per_split = tiling.splits(source.num_pixels, tile, blocks)
    partials = _new_float32(value, splits, weight.numel())
    _launch(
        triton_backward.conv3x3_weight_backward,
        (blocks, splits),
        tile,
        d=d,
        **_input_args(source, norm),
        **_weight_strides(weight),
        weight_partials=partials,
        dweight_size=weight.numel(),
        **_shape_args(value),
        features=features,
        rows_per_split=rows_per_split,
        VECTOR=tiling.vector_width(value),
        PRECISION=_precision(value),
    )
    return partials


def norm_relu_avg_pool_backward(
    grad: Tensor, source: FeatureMaps, norm: NormParams, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """See kernels.reference.norm_relu_avg_pool_backward."""
    grad, tile, channels = grad.contiguous(), tiling.ELEMENTWISE, source.value.shape[3]
    column_blocks = tiling.cdiv(channels, tile.sizes["CHANNELS"])
    splits, rows_per_split = tiling.splits(source.num_pixels, tile, column_blocks)
    partials = _new_float32(source.value, splits, 2, channels)
    _launch(
        triton_backward.norm_relu_avg_pool_backward,
        (column_blocks, splits),
        tile,
        out_grad=grad,
        **_input_args(source, norm),
        **_grad_args(source),
        partial=partials,
        **_shape_args(source.value),
        **_window_args(window),
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
    grad, tile = x.grad, tiling.ELEMENTWISE
    if x.mean is None:
        grad = grad.contiguous()
    _launch(
        triton_backward.complete_gradient,
        (
            tiling.cdiv(x.num_pixels, tile.sizes["ROWS"]),
            tiling.cdiv(out.shape[3], tile.sizes["CHANNELS"]),
        ),
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
    source: FeatureMaps,
    norm: NormParams,
    norm_partials: Tensor,
    weight: Tensor | None,
    weight_partials: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Add the shares of all programs: the gradients of weight, gamma and beta.

    Args:
        norm_partials: (programs, 2, C), dbeta and dgamma / rstd.
        weight_partials: (programs, size of the weight), None without a weight.
    """
    num_splits, _, channels = norm_partials.shape
    dgamma, dbeta = torch.empty_like(source.mean), torch.empty_like(source.mean)
    dweight = None if weight is None else _empty_gradient(weight)
    size = 0 if weight is None else weight.numel()
    sizes = tiling.REDUCE_PARTIALS.sizes
    norm_blocks = tiling.cdiv(channels, sizes["NORM_CHANNELS"])
    _launch(
        triton_backward.reduce_partials,
        (norm_blocks + tiling.cdiv(size, sizes["ELEMENTS"]),),
        tiling.REDUCE_PARTIALS,
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
        num_weight_partials=0 if weight_partials is None else len(weight_partials),
        dweight=dweight,
        dweight_size=size,
    )
    return dweight, dgamma, dbeta


# ------------------------------------------------------------------------ arguments of kernels


def _row_stride(x: Tensor) -> int:
    """From one pixel to the next, over the ends of rows and images."""
    # A contiguous tensor may have any stride where it is one pixel wide.
    return x.shape[3] if x.is_contiguous() else x.stride(2)


def _shape_args(value: Tensor) -> dict:
    images, height, width, channels = value.shape
    rows = images * height * width
    return {"height": height, "width": width, "num_rows": rows, "channels": channels}


def _window_args(window: tuple[int, int]) -> dict:
    return {"window_h": window[0], "window_w": window[1]}


def _weight_args(weight: Tensor) -> dict:
    return {
        "weight": weight,
        **_weight_strides(weight),
        "WEIGHT_VECTOR": tiling.weight_vector_width(weight),
    }


def _weight_strides(weight: Tensor) -> dict:
    """In memory, of (F, C, h, w); one kernel per stride of C, which is 1 where C is last."""
    stride_f, stride_c, stride_y, stride_x = weight.stride()
    return {
        "weight_f": stride_f,
        "weight_y": stride_y,
        "weight_x": stride_x,
        "WEIGHT_C": stride_c,
    }


def _input_args(x: FeatureMaps, norm: NormParams) -> dict:
    return {
        "value": x.value,
        "value_stride": _row_stride(x.value),
        "norm_mean": x.mean,
        "norm_rstd": x.rstd,
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
    }


def _grad_args(x: FeatureMaps) -> dict:
    return {
        "grad": x.grad,
        "grad_stride": _row_stride(x.grad),
        "VECTOR": tiling.vector_width(x.value, x.grad),
    }


def _dropout_args(dropout: DropoutSpec | None, value: Tensor) -> dict:
    return {
        "seed": dropout and dropout.seed,
        "layer_id": dropout.layer_id if dropout else 0,
        "first_row": dropout.sample_offset * value.shape[1] * value.shape[2] if dropout else 0,
        "threshold": dropout.threshold if dropout else 0,
        "keep_scale": dropout.scale if dropout else 1.0,
    }


def _empty_gradient(weight: Tensor) -> Tensor:
    """Room for the gradient of a weight, in the same order in memory."""
    dweight = torch.empty_like(weight, dtype=torch.float32)
    assert dweight.stride() == weight.stride(), "a weight has gaps in memory"
    return dweight


def _new_float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _precision(x: Tensor) -> str:
    """How products are formed; three of TF32 are nearly as good as one in single precision."""
    if x.device.type == "cpu":
        return "interpreted"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _launch(kernel, grid: tuple[int, ...], tile: Tile, **arguments) -> None:
    tensor = next(iter(arguments.values()))
    if tensor.is_meta or type(tensor) is not Tensor:  # a fake tensor: only memory is to be counted
        return
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            kernel[grid](**arguments, **tile.sizes, num_warps=tile.warps, num_stages=tile.stages)
    else:
        kernel[grid](**arguments, **tile.sizes)
