"""Make the arguments of Triton kernels, which kernels/triton_common.py explains, from tensors."""

import functools

import torch
from torch import Tensor

from kernels import tiling
from kernels.dropout import DropoutSpec
from kernels.feature_maps import FeatureMaps, Norm, Reader
from kernels.precision import allows_tf32
from kernels.tiling import Splits

NUM_COUNTERS = 2**16  # of arrived programs: enough for the launch that needs the most


def source_args(value: Tensor, norm: Norm | None) -> dict:
    """Return the maps that a kernel reads, and the norm that it applies to them."""
    args = {"value": value, "value_stride": row_stride(value), "norm_scale": None}
    if norm is None:
        return args | {"norm_shift": None, "NORM_VECTOR": 1}
    vector = tiling.norm_vector_width(norm.scale, norm.shift)
    return args | {"norm_scale": norm.scale, "norm_shift": norm.shift, "NORM_VECTOR": vector}


def image_args(value: Tensor) -> dict:
    """Return the size of an image, which kernels know at compile time."""
    return {"HEIGHT": value.shape[1], "WIDTH": value.shape[2]}


def stats_args(
    target: FeatureMaps, reader: Reader | None, splits: Splits, blocks: int, channels: int
) -> dict:
    """Return where a kernel writes statistics, and the affine function of the norm after it."""
    args = {
        "num_splits": splits.count,
        "num_groups": splits.num_groups,
        "group_bits": splits.group_bits,
        "mean": target.mean,
        "var": target.var,
        "rstd": target.rstd,
        "eps": target.eps,
        **dict.fromkeys(("partial", "counters")),
        **{f"reader_{field}": None for field in ("weight", "bias", "scale", "shift")},
    }
    if target.var is None:  # nobody needs statistics
        return args
    args["partial"] = _new_partial(target.value, splits, 2, channels)
    args["counters"] = _counters(target.value, splits, blocks)
    if reader is not None:
        own = slice(len(reader.norm.weight) - channels, None)  # the others are known
        for field in ("weight", "bias", "scale", "shift"):
            args[f"reader_{field}"] = getattr(reader.norm, field)[own]
    return args


def norm_grad_args(source: FeatureMaps, norm: Norm, splits: Splits, blocks: int) -> dict:
    """Return what a kernel needs for the gradients of the source and of the norm's parameters."""
    return {
        "grad": source.grad,
        "grad_stride": row_stride(source.grad),
        "norm_mean": source.mean,
        "norm_rstd": source.rstd,
        "partial": _new_partial(source.value, splits, 2, len(norm.weight)),
        "counters": _counters(source.value, splits, blocks),
        "num_splits": splits.count,
        "num_groups": splits.num_groups,
        "group_bits": splits.group_bits,
        "mean_correction": source.mean_correction,
        "var_correction": source.var_correction,
        "dbeta": torch.empty_like(source.mean),
        "dgamma": torch.empty_like(source.mean),
        "NORM_VECTOR": tiling.norm_vector_width(norm.scale, norm.shift, source.mean),
        "VECTOR": tiling.vector_width(source.value, source.grad),
    }


def weight_grad_args(weight: Tensor, splits: Splits, blocks: int, tile_size: int) -> dict:
    """Return what a kernel needs for the gradient of the weight.

    Args:
        blocks, tile_size: each of `blocks` programs of a split has a tile of the gradient.
    """
    dweight = torch.empty_like(weight, dtype=torch.float32)
    # The kernels find the gradient's elements by the weight's strides.
    assert dweight.stride() == weight.stride(), "a weight has gaps in memory"
    return {
        "weight_partials": _new_partial(weight, splits, blocks, tile_size),
        "counters": _counters(weight, splits, 2 * blocks),  # conv1x1_backward has two sets
        "num_splits": splits.count,
        "num_groups": splits.num_groups,
        "group_bits": splits.group_bits,
        "dweight": dweight,
    }


def row_stride(x: Tensor) -> int:
    """Return the stride, in elements, from one pixel to the next, also across images."""
    # A contiguous tensor may have any stride where it is one pixel wide.
    return x.shape[3] if x.is_contiguous() else x.stride(2)


def weight_args(weight: Tensor) -> dict:
    """Return a convolution's weight, and its strides."""
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


def dropout_args(dropout: DropoutSpec | None, value: Tensor) -> dict:
    """Return the mask of a dropout layer; `value` is of a process's whole batch."""
    dropped = dropout or DropoutSpec(0.0, None, 0)
    return {
        "seed": dropped.seed,
        "layer_id": dropped.layer_id,
        "first_row": dropped.sample_offset * value.shape[1] * value.shape[2],
        "threshold": dropped.threshold,
        "keep_scale": dropped.scale,
    }


def new_contiguous(like: Tensor) -> Tensor:
    """Allocate a contiguous tensor of the shape and dtype of another."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _new_partial(like: Tensor, splits: Splits, *shape: int) -> Tensor:
    """Allocate float32 results of all splits and groups: see kernels/triton_reduce.py."""
    return like.new_empty((splits.num_partials, *shape), dtype=torch.float32)


def _counters(like: Tensor, splits: Splits, blocks: int) -> Tensor:
    """Return counters of arrived programs, all 0, for `blocks` programs of each split.

    Launches of one stream run one after the other, so that all may use the same. They are made by
    a run's first training step, which allocates outside of the graphs' memory.
    """
    assert blocks * (1 + splits.num_groups) <= NUM_COUNTERS, "a launch has too many programs"
    if not has_memory(like):
        return like.new_empty(NUM_COUNTERS, dtype=torch.int32)
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    return _counters_of(like.device, stream)


@functools.cache
def _counters_of(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)


def _precision(x: Tensor) -> str:
    """Choose how tl.dot multiplies float32: three TF32 products nearly reach its precision."""
    if x.device.type == "cpu":
        return "interpreted"
    return "tf32" if allows_tf32() else "tf32x3"


def has_memory(x: Tensor) -> bool:
    """Tell whether a tensor is neither a meta nor a fake one."""
    return not x.is_meta and type(x) in (Tensor, torch.nn.Parameter)


def gpu(x: Tensor) -> tiling.Gpu:
    """Return the properties of the device of a tensor."""
    return tiling.gpu_of(x.device)
