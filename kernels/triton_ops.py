"""The operations of a dense block in Triton: kernels/reference.py, function by function.

An operation is one kernel, and where it sums over rows a second one that adds what each program
of the first has summed, in a fixed order: every run gives the same bits. Nothing else is launched.
Given tensors without memory an operation allocates what it would and launches nothing.
"""

import torch
from torch import Tensor

from kernels import tiling, triton_backward, triton_forward
from kernels.dropout import Drop
from kernels.feature_maps import Maps, Norm
from kernels.tiling import Tile

# ------------------------------------------------------------------------------------- forward


def copy(value: Tensor, target: Maps) -> None:
    """See kernels.reference.copy."""
    value, tile, channels = value.contiguous(), tiling.ELEMENTWISE, value.shape[3]
    num_parts = tiling.blocks(target.rows, tile.sizes["ROWS"])
    partial = _floats(target.value, num_parts, 2, channels)
    _launch(
        triton_forward.copy,
        (num_parts, tiling.blocks(channels, tile.sizes["CHANNELS"])),
        tile,
        value=value,
        target=target.value,
        target_stride=_row_stride(target.value),
        partial=partial,
        num_rows=target.rows,
        channels=channels,
        VECTOR=tiling.vector(value, target.value),
    )
    _finish_moments(target, partial, tile)


def product(source: Maps, norm: Norm, weight: Tensor, target: Maps, drop: Drop | None) -> None:
    """See kernels.reference.product."""
    features = len(weight)
    tile = tiling.product(source.value.dtype, features)
    blocks = tiling.blocks(features, tile.sizes["FEATURES"])
    _forward(triton_forward.product, tile, blocks, source, norm, weight, target, drop)


def convolution(source: Maps, norm: Norm, weight: Tensor, target: Maps, drop: Drop | None) -> None:
    """See kernels.reference.convolution."""
    features, channels = weight.shape[:2]
    tile = tiling.convolution(source.value.dtype, channels, features)
    _forward(triton_forward.convolution, tile, 1, source, norm, weight, target, drop)


def pool(source: Maps, norm: Norm, window: tuple[int, int]) -> Tensor:
    """See kernels.reference.pool."""
    images, height, width, channels = source.value.shape
    out = source.value.new_empty(images, height // window[0], width // window[1], channels)
    rows, tile = out.numel() // channels, tiling.pool(window)
    _launch(
        triton_forward.pool,
        (tiling.blocks(rows, tile.sizes["ROWS"]), tiling.blocks(channels, tile.sizes["CHANNELS"])),
        tile,
        **_read(source, norm),
        target=out,
        **_shape(source.value),
        **_window(window),
        num_outputs=rows,
        VECTOR=tiling.vector(source.value),
    )
    return out


def _forward(
    kernel,
    tile: Tile,
    blocks: int,
    source: Maps,
    norm: Norm,
    weight: Tensor,
    target: Maps,
    drop: Drop | None,
) -> None:
    out, features = target.value, len(weight)
    num_parts = tiling.blocks(target.rows, tile.sizes["ROWS"])
    partial = None if target.var is None else _floats(out, num_parts, 2, features)
    _launch(
        kernel,
        (num_parts * blocks,),
        tile,
        **_read(source, norm),
        **_weight(weight),
        target=out,
        target_stride=_row_stride(out),
        **_drop(drop, out),
        partial=partial,
        **_shape(source.value),
        features=features,
        VECTOR=tiling.vector(source.value),
        TARGET_VECTOR=tiling.vector(out),
        PRECISION=_precision(out),
    )
    if partial is not None:
        _finish_moments(target, partial, tile)


def _finish_moments(target: Maps, partial: Tensor, tile: Tile) -> None:
    num_parts, _, channels = partial.shape
    _launch(
        triton_forward.finish_moments,
        (tiling.blocks(channels, tiling.FINISH_MOMENTS.sizes["CHANNELS"]),),
        tiling.FINISH_MOMENTS,
        partial=partial,
        mean=target.mean,
        var=target.var,
        rstd=target.rstd,
        eps=target.eps,
        num_parts=num_parts,
        rows_each=tile.sizes["ROWS"],
        num_rows=target.rows,
        channels=channels,
    )


# ------------------------------------------------------------------------------------ backward


def product_backward(
    target: Maps, source: Maps, norm: Norm, weight: Tensor, drop: Drop | None, first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels.reference.product_backward; `target.grad` may become the complete gradient."""
    value, (features, channels) = source.value, weight.shape[:2]
    d = target.grad.contiguous()
    if drop and target.mean is None:  # others may read a gradient that no norm has added to
        d = torch.empty_like(d)
    if drop or target.mean is not None:
        _gradient(target, drop, d)
    tile = tiling.product_backward(value.dtype, features)
    column_blocks = tiling.blocks(channels, tile.sizes["CHANNELS"])
    parts, rows_each = tiling.parts(source.rows, tile, column_blocks)
    feature_blocks = tiling.blocks(features, tile.sizes["FEATURES"])
    norm_shares = _floats(value, feature_blocks * parts, 2, channels)
    weight_shares = _floats(value, parts, weight.numel())
    for block in range(feature_blocks):  # the source's gradient is a sum over features
        _launch(
            triton_backward.product_backward,
            (column_blocks, parts),
            tile,
            d=d,
            d_stride=_row_stride(d),
            **_read(source, norm),
            **_add(source),
            **_weight(weight),
            partial=norm_shares,
            dweights=weight_shares,
            dweight_size=weight.numel(),
            **_shape(value),
            features=features,
            first_feature=block * tile.sizes["FEATURES"],
            rows_each=rows_each,
            first_part=block * parts,
            FIRST=first and block == 0,
            TARGET_VECTOR=tiling.vector(d),
            PRECISION=_precision(value),
        )
    return _finish(source, norm, norm_shares, weight, weight_shares)


def convolution_backward(
    target: Maps, source: Maps, norm: Norm, weight: Tensor, drop: Drop | None, first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels.reference.convolution_backward."""
    value, (features, channels) = source.value, weight.shape[:2]
    tile = tiling.convolution_backward(value.dtype, features)
    # Each row is read at nine places, so that it is formed once.
    d = value.new_empty((*value.shape[:3], tile.sizes["FEATURES"]))
    _gradient(target, drop, d)
    num_parts = tiling.blocks(source.rows, tile.sizes["ROWS"])
    norm_shares = _floats(value, num_parts, 2, channels)
    _launch(
        triton_backward.convolution_backward,
        (num_parts * tiling.blocks(channels, tile.sizes["CHANNELS"]),),
        tile,
        d=d,
        **_read(source, norm),
        **_add(source),
        **_weight(weight),
        partial=norm_shares,
        **_shape(value),
        features=features,
        FIRST=first,
        PRECISION=_precision(value),
    )
    weight_shares = _convolution_weight(d, source, norm, weight)
    return _finish(source, norm, norm_shares, weight, weight_shares)


def _convolution_weight(d: Tensor, source: Maps, norm: Norm, weight: Tensor) -> Tensor:
    value, (features, channels) = source.value, weight.shape[:2]
    tile = tiling.convolution_weight(value.dtype, features)
    blocks = tiling.blocks(channels, tile.sizes["CHANNELS"]) * (9 // tile.sizes["TAPS"])
    parts, rows_each = tiling.parts(source.rows, tile, blocks)
    shares = _floats(value, parts, weight.numel())
    _launch(
        triton_backward.convolution_weight,
        (blocks, parts),
        tile,
        d=d,
        **_read(source, norm),
        **_weight_strides(weight),
        dweights=shares,
        dweight_size=weight.numel(),
        **_shape(value),
        features=features,
        rows_each=rows_each,
        VECTOR=tiling.vector(value),
        PRECISION=_precision(value),
    )
    return shares


def pool_backward(
    grad: Tensor, source: Maps, norm: Norm, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """See kernels.reference.pool_backward."""
    grad, tile, channels = grad.contiguous(), tiling.ELEMENTWISE, source.value.shape[3]
    column_blocks = tiling.blocks(channels, tile.sizes["CHANNELS"])
    parts, rows_each = tiling.parts(source.rows, tile, column_blocks)
    shares = _floats(source.value, parts, 2, channels)
    _launch(
        triton_backward.pool_backward,
        (column_blocks, parts),
        tile,
        out_grad=grad,
        **_read(source, norm),
        **_add(source),
        partial=shares,
        **_shape(source.value),
        **_window(window),
        rows_each=rows_each,
        GRAD_VECTOR=tiling.vector(grad),
    )
    return _finish(source, norm, shares, None, None)[1:]


def gradient(maps: Maps) -> Tensor:
    """See kernels.reference.gradient."""
    out = torch.empty_like(maps.value, memory_format=torch.contiguous_format)
    _gradient(maps, None, out)
    return out


def _gradient(maps: Maps, drop: Drop | None, out: Tensor) -> None:
    grad, tile = maps.grad, tiling.ELEMENTWISE
    if maps.mean is None:
        grad = grad.contiguous()
    _launch(
        triton_backward.gradient,
        (
            tiling.blocks(maps.rows, tile.sizes["ROWS"]),
            tiling.blocks(out.shape[3], tile.sizes["CHANNELS"]),
        ),
        tile,
        grad=grad,
        grad_stride=_row_stride(grad),
        value=maps.value,
        value_stride=_row_stride(maps.value),
        mean=maps.mean,
        rstd=maps.rstd,
        shift=maps.shift,
        slope=maps.slope,
        **_drop(drop, maps.value),
        target=out,
        target_stride=_row_stride(out),
        num_rows=maps.rows,
        channels=maps.value.shape[3],
        columns=out.shape[3],
        VECTOR=tiling.vector(grad, maps.value),
        TARGET_VECTOR=tiling.vector(out),
    )


def _finish(
    source: Maps,
    norm: Norm,
    norm_shares: Tensor,
    weight: Tensor | None,
    weight_shares: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Add the shares of all programs: the gradients of weight, gamma and beta.

    Args:
        norm_shares: (programs, 2, C), dbeta and dgamma / rstd.
        weight_shares: (programs, size of the weight), None without a weight.
    """
    num_parts, _, channels = norm_shares.shape
    dgamma, dbeta = torch.empty_like(source.mean), torch.empty_like(source.mean)
    dweight = None if weight is None else _like(weight)
    size = 0 if weight is None else weight.numel()
    sizes = tiling.FINISH.sizes
    norm_blocks = tiling.blocks(channels, sizes["NORM_CHANNELS"])
    _launch(
        triton_backward.finish,
        (norm_blocks + tiling.blocks(size, sizes["ELEMENTS"]),),
        tiling.FINISH,
        partial=norm_shares,
        num_parts=num_parts,
        norm_rstd=source.rstd,
        norm_weight=norm.weight,
        shift=source.shift,
        slope=source.slope,
        dbeta=dbeta,
        dgamma=dgamma,
        num_rows=source.rows,
        channels=channels,
        dweights=weight_shares,
        num_dweights=0 if weight_shares is None else len(weight_shares),
        dweight=dweight,
        dweight_size=size,
    )
    return dweight, dgamma, dbeta


# ------------------------------------------------------------------------ arguments of kernels


def _row_stride(maps: Tensor) -> int:
    """From one pixel to the next, over the ends of rows and images."""
    # A contiguous tensor may have any stride where it is one pixel wide.
    return maps.shape[3] if maps.is_contiguous() else maps.stride(2)


def _shape(value: Tensor) -> dict:
    images, height, width, channels = value.shape
    rows = images * height * width
    return {"height": height, "width": width, "num_rows": rows, "channels": channels}


def _window(window: tuple[int, int]) -> dict:
    return {"window_h": window[0], "window_w": window[1]}


def _weight(weight: Tensor) -> dict:
    return {
        "weight": weight,
        **_weight_strides(weight),
        "WEIGHT_VECTOR": tiling.weight_vector(weight),
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


def _read(maps: Maps, norm: Norm) -> dict:
    return {
        "value": maps.value,
        "value_stride": _row_stride(maps.value),
        "norm_mean": maps.mean,
        "norm_rstd": maps.rstd,
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
    }


def _add(maps: Maps) -> dict:
    return {
        "grad": maps.grad,
        "grad_stride": _row_stride(maps.grad),
        "VECTOR": tiling.vector(maps.value, maps.grad),
    }


def _drop(drop: Drop | None, value: Tensor) -> dict:
    return {
        "seed": drop and drop.seed,
        "place": drop.place if drop else 0,
        "first_row": drop.first * value.shape[1] * value.shape[2] if drop else 0,
        "threshold": drop.threshold if drop else 0,
        "keep_scale": drop.scale if drop else 1.0,
    }


def _like(weight: Tensor) -> Tensor:
    """Room for the gradient of a weight, in the same order in memory."""
    dweight = torch.empty_like(weight, dtype=torch.float32)
    assert dweight.stride() == weight.stride(), "a weight has gaps in memory"
    return dweight


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _precision(maps: Tensor) -> str:
    """How products are formed; three of TF32 are nearly as good as one in single precision."""
    if maps.device.type == "cpu":
        return "interpreted"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _launch(kernel, grid: tuple[int, ...], tile: Tile, **arguments) -> None:
    maps = next(iter(arguments.values()))
    if maps.is_meta or type(maps) is not Tensor:  # a fake tensor: only memory is to be counted
        return
    if maps.is_cuda:
        with torch.cuda.device(maps.device):
            kernel[grid](**arguments, **tile.sizes, num_warps=tile.warps, num_stages=tile.stages)
    else:
        kernel[grid](**arguments, **tile.sizes)
