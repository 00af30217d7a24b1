"""Run the operations of a dense block in Triton, each as kernels/reference.py specifies it.

With meta or fake tensors an operation allocates its tensors and launches nothing.
"""

import torch
from torch import Tensor

from kernels import tiling, triton_backward, triton_forward
from kernels.dropout import DropoutSpec
from kernels.feature_maps import FeatureMaps, Norm, Reader
from kernels.tiling import Tile
from kernels.triton_arguments import (
    dropout_args,
    gpu,
    has_memory,
    image_args,
    new_contiguous,
    norm_grad_args,
    row_stride,
    source_args,
    stats_args,
    weight_args,
    weight_grad_args,
)

# A 3x3 convolution reads Z nine times. It is written to memory first, unless it is larger than that
# of a bottleneck: without one it would have as many channels as the whole block.
MAX_Z_RATIO = 4  # of channels to output channels
# Each block of channels completes its output gradient anew, where there are few of both.
MAX_FUSED_BLOCKS, MAX_FUSED_CHANNELS = 8, 64


def copy_with_stats(value: Tensor, target: FeatureMaps, reader: Reader | None) -> None:
    """See kernels.reference.copy_with_stats."""
    value, tile, channels = value.contiguous(), tiling.COPY, value.shape[3]
    splits, blocks = tiling.whole_tiles(target.num_pixels, tile), tile.blocks("CHANNELS", channels)
    _launch(
        triton_forward.copy_with_stats,
        (splits.count, blocks),
        tile,
        value=value,
        target=target.value,
        target_stride=row_stride(target.value),
        **stats_args(target, reader, splits, blocks, channels),
        num_rows=target.num_pixels,
        channels=channels,
        VECTOR=tiling.vector_width(value, target.value),
    )


def conv1x1(
    source: FeatureMaps, norm: Norm, weight: Tensor, target: FeatureMaps,
    dropout: DropoutSpec | None, reader: Reader | None,
) -> None:  # fmt: skip
    """See kernels.reference.conv1x1."""
    value = source.value
    tile = tiling.conv1x1(value.dtype, source.num_pixels, len(weight), gpu(value))
    _forward(triton_forward.conv1x1, tile, value, norm, weight, target, dropout, reader)


def conv3x3(
    source: FeatureMaps, norm: Norm, weight: Tensor, target: FeatureMaps,
    dropout: DropoutSpec | None, reader: Reader | None,
) -> None:  # fmt: skip
    """See kernels.reference.conv3x3."""
    value, (out_channels, channels) = source.value, weight.shape[:2]
    if _keeps_z(weight):
        value = new_contiguous(source.value)
        _norm_relu(source, norm, value)
        norm = None
    tile = tiling.conv3x3(value.dtype, source.num_pixels, channels, out_channels, gpu(value))
    _forward(triton_forward.conv3x3, tile, value, norm, weight, target, dropout, reader)


def _keeps_z(weight: Tensor) -> bool:
    return weight.shape[1] <= MAX_Z_RATIO * len(weight)


def _norm_relu(source: FeatureMaps, norm: Norm, z: Tensor) -> None:
    """Write Z to z, (N, H, W, C)."""
    channels = z.shape[3]
    tile = tiling.elementwise(channels)
    _launch(
        triton_forward.norm_relu,
        (tile.blocks("ROWS", source.num_pixels), tile.blocks("CHANNELS", channels)),
        tile,
        **source_args(source.value, norm),
        target=z,
        num_rows=source.num_pixels,
        channels=channels,
        VECTOR=tiling.vector_width(source.value, z),
    )


def norm_relu_avg_pool(source: FeatureMaps, norm: Norm, window: tuple[int, int]) -> Tensor:
    """See kernels.reference.norm_relu_avg_pool."""
    images, height, width, channels = source.value.shape
    out = source.value.new_empty(images, height // window[0], width // window[1], channels)
    rows, tile = out.numel() // channels, tiling.norm_relu_avg_pool(window)
    _launch(
        triton_forward.norm_relu_avg_pool,
        (tile.blocks("ROWS", rows), tile.blocks("CHANNELS", channels)),
        tile,
        **source_args(source.value, norm),
        **image_args(source.value),
        target=out,
        num_rows=rows,
        channels=channels,
        WINDOW_H=window[0],
        WINDOW_W=window[1],
        VECTOR=tiling.vector_width(source.value),
    )
    return out


def _forward(
    kernel, tile: Tile, value: Tensor, norm: Norm | None, weight: Tensor, target: FeatureMaps,
    dropout: DropoutSpec | None, reader: Reader | None,
) -> None:  # fmt: skip
    """Launch a convolution; `value` is Z where `norm` is None."""
    out, (out_channels, channels) = target.value, weight.shape[:2]
    splits = tiling.whole_tiles(target.num_pixels, tile)
    blocks = tile.blocks("OUT_CHANNELS", out_channels)
    _launch(
        kernel,
        (splits.count * blocks,),
        tile,
        **source_args(value, norm),
        **image_args(value),
        **weight_args(weight),
        **dropout_args(dropout, out),
        target=out,
        target_stride=row_stride(out),
        **stats_args(target, reader, splits, blocks, out_channels),
        OUT_BLOCKS=blocks,
        num_known=0 if reader is None else len(reader.norm.weight) - out_channels,
        num_rows=target.num_pixels,
        channels=channels,
        VECTOR=tiling.vector_width(value),
        TARGET_VECTOR=tiling.vector_width(out),
    )


def conv1x1_backward(
    target: FeatureMaps, source: FeatureMaps, norm: Norm, weight: Tensor,
    dropout: DropoutSpec | None, overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See kernels.reference.conv1x1_backward; may complete `target.grad` in place."""
    value, (out_channels, channels) = source.value, weight.shape[:2]
    tile = tiling.conv1x1_backward(value.dtype, out_channels, gpu(value))
    blocks = tile.blocks("CHANNELS", channels)
    out_blocks = tile.blocks("OUT_CHANNELS", out_channels)
    d, output = target.grad.contiguous(), FeatureMaps(None)
    if dropout and target.mean is None:  # the caller's own gradient, which others may read
        d = torch.empty_like(d)
    fused = blocks <= MAX_FUSED_BLOCKS and out_channels <= MAX_FUSED_CHANNELS
    if target.mean is not None and fused and not dropout:
        output = target
    elif dropout or target.mean is not None:
        _complete_gradient(target, dropout, d)
    splits = tiling.persistent(source.num_pixels, tile, blocks, gpu(value))
    tile_size = tile.sizes["CHANNELS"] * tile.sizes["OUT_CHANNELS"]
    dweight_args = weight_grad_args(weight, splits, blocks, tile_size)
    dnorm_args = norm_grad_args(source, norm, splits, blocks)
    # dz is a sum over output channels: the launches after the first add to the source's gradient.
    for block in range(out_blocks):
        _launch(
            triton_backward.conv1x1_backward,
            (blocks, splits.count),
            tile,
            d=d,
            d_stride=row_stride(d),
            output=output.value,
            output_stride=row_stride(d if output.value is None else output.value),
            output_mean=output.mean,
            output_rstd=output.rstd,
            output_mean_correction=output.mean_correction,
            output_var_correction=output.var_correction,
            **weight_args(weight),
            **(source_args(value, norm) | dnorm_args | dweight_args),
            num_rows=source.num_pixels,
            channels=channels,
            first_out_channel=block * tile.sizes["OUT_CHANNELS"],
            rows_per_split=splits.rows_each,
            OVERWRITE=overwrite and block == 0,
            ADD=block > 0,
            TARGET_VECTOR=tiling.vector_width(d, *([] if output.value is None else [output.value])),
        )
    return dweight_args["dweight"], dnorm_args["dgamma"], dnorm_args["dbeta"]


def conv3x3_backward(
    target: FeatureMaps, source: FeatureMaps, norm: Norm, weight: Tensor,
    dropout: DropoutSpec | None, overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See kernels.reference.conv3x3_backward."""
    value, (out_channels, channels) = source.value, weight.shape[:2]
    tile = tiling.conv3x3_backward(value.dtype, source.num_pixels, out_channels, gpu(value))
    # Nine taps read each row of the complete gradient: compute it once, beforehand.
    d = value.new_empty((*value.shape[:3], tile.sizes["OUT_CHANNELS"]))
    _complete_gradient(target, dropout, d)
    z = new_contiguous(value) if _keeps_z(weight) else None
    splits, blocks = tiling.whole_tiles(source.num_pixels, tile), tile.blocks("CHANNELS", channels)
    dnorm_args = norm_grad_args(source, norm, splits, blocks)
    _launch(
        triton_backward.conv3x3_backward,
        (splits.count, blocks),
        tile,
        d=d,
        z=z,
        **image_args(value),
        **weight_args(weight),
        **(source_args(value, norm) | dnorm_args),
        num_rows=source.num_pixels,
        channels=channels,
        OVERWRITE=overwrite,
    )
    if z is not None:
        value, norm = z, None
    dweight = _conv3x3_weight_backward(d, value, norm, weight)
    return dweight, dnorm_args["dgamma"], dnorm_args["dbeta"]


def _conv3x3_weight_backward(d: Tensor, value: Tensor, norm: Norm | None, weight: Tensor) -> Tensor:
    """Return the weight's gradient; `value` is Z where `norm` is None."""
    out_channels, channels = weight.shape[:2]
    num_rows = value.numel() // channels
    tile = tiling.conv3x3_weight_backward(value.dtype, out_channels)
    blocks = tile.blocks("CHANNELS", channels) * (9 // tile.sizes["TAPS"])
    splits = tiling.persistent(num_rows, tile, blocks, gpu(value))
    columns = tile.sizes["OUT_CHANNELS"] * (1 if tile.sizes["TAPS"] == 1 else 4)
    dweight_args = weight_grad_args(weight, splits, blocks, tile.sizes["CHANNELS"] * columns)
    _launch(
        triton_backward.conv3x3_weight_backward,
        (blocks, splits.count),
        tile,
        d=d,
        **source_args(value, norm),
        **image_args(value),
        **weight_args(weight),
        **dweight_args,
        num_rows=num_rows,
        channels=channels,
        rows_per_split=splits.rows_each,
        VECTOR=tiling.vector_width(value),
    )
    return dweight_args["dweight"]


def norm_relu_avg_pool_backward(
    grad: Tensor, source: FeatureMaps, norm: Norm, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """See kernels.reference.norm_relu_avg_pool_backward."""
    grad, tile, channels = grad.contiguous(), tiling.POOL_BACKWARD, source.value.shape[3]
    blocks = tile.blocks("CHANNELS", channels)
    splits = tiling.persistent(source.num_pixels, tile, blocks, gpu(grad))
    dnorm_args = norm_grad_args(source, norm, splits, blocks)
    _launch(
        triton_backward.norm_relu_avg_pool_backward,
        (blocks, splits.count),
        tile,
        out_grad=grad,
        **image_args(source.value),
        **(source_args(source.value, norm) | dnorm_args),
        num_rows=source.num_pixels,
        channels=channels,
        rows_per_split=splits.rows_each,
        WINDOW_H=window[0],
        WINDOW_W=window[1],
        GRAD_VECTOR=tiling.vector_width(grad),
    )
    return dnorm_args["dgamma"], dnorm_args["dbeta"]


def complete_gradient(x: FeatureMaps) -> Tensor:
    """See kernels.reference.complete_gradient."""
    out = new_contiguous(x.value)
    _complete_gradient(x, None, out)
    return out


def _complete_gradient(x: FeatureMaps, dropout: DropoutSpec | None, out: Tensor) -> None:
    """Write mask * complete gradient to the first channels of `out`, and 0 to its others."""
    grad, columns = x.grad, out.shape[3]
    tile = tiling.elementwise(columns)
    if x.mean is None:  # the caller's own gradient, in any memory layout
        grad = grad.contiguous()
    _launch(
        triton_backward.complete_gradient,
        (tile.blocks("ROWS", x.num_pixels), tile.blocks("CHANNELS", columns)),
        tile,
        grad=grad,
        grad_stride=row_stride(grad),
        value=x.value,
        value_stride=row_stride(x.value),
        mean=x.mean,
        rstd=x.rstd,
        mean_correction=x.mean_correction,
        var_correction=x.var_correction,
        **dropout_args(dropout, x.value),
        target=out,
        target_stride=row_stride(out),
        num_rows=x.num_pixels,
        channels=x.value.shape[3],
        columns=columns,
        VECTOR=tiling.vector_width(grad, x.value),
        TARGET_VECTOR=tiling.vector_width(out),
    )


def _launch(kernel, grid: tuple[int, ...], tile: Tile, **arguments) -> None:
    """Launch a kernel on the device of its first argument, but not for meta or fake tensors."""
    tensor = next(iter(arguments.values()))
    if not has_memory(tensor):
        return
    early = gpu(tensor).launches_early
    arguments |= tile.sizes | {"PDL": early}
    if tensor.is_cuda:
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "launch_pdl": early}
        with torch.cuda.device(tensor.device):
            kernel[grid](**arguments, **options)
    else:
        kernel[grid](**arguments)
