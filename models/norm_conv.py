"""Group the parameters of a dense block into pairs of a batch norm and its convolution.

Each batch norm has an affine function of the maps that it reads: scale and shift per channel.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.feature_maps import Norm
from models.dense_block import DenseBlock
from models.sync_batchnorm import BatchNorm


class NormConv(NamedTuple):
    """Hold a batch norm and the weight of the convolution after it.

    A layer has one of these or, with a bottleneck, two; the epilogue has one.
    """

    norm: Norm
    conv_weight: Tensor | None  # (F, C, h, w); None for pooling


class NormConvGrads(NamedTuple):
    """Hold the gradients of a `NormConv`, in the order of `run_dense_block`'s parameters."""

    norm_weight: Tensor  # (C,)
    norm_bias: Tensor  # (C,)
    conv_weight: Tensor | None


def split_parameters(
    block: DenseBlock, parameters: Sequence[Tensor | None], affines: Iterable[tuple[Tensor, Tensor]]
) -> list[list[NormConv]]:
    """Group parameters into a `NormConv` list for each layer, and a last one for the epilogue.

    Args:
        affines: scale and shift of each batch norm.
    """
    triples = zip(parameters[::3], parameters[1::3], parameters[2::3], affines, strict=True)
    units = [NormConv(Norm(weight, bias, *affine), conv) for weight, bias, conv, affine in triples]
    size = 2 if block.width else 1
    return [units[i : i + size] for i in range(0, len(units), size)]


def new_affines(parameters: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Allocate scale and shift of all batch norms, (2, sum of C); `like` has dtype and device."""
    return like.new_empty(2, sum(map(_padded_length, parameters[::3])))


def affine_views(affines: Tensor, parameters: Sequence[Tensor | None]) -> Iterator[list[Tensor]]:
    """Return scale and shift, (C,) each, of each batch norm."""
    start = 0
    for weight in parameters[::3]:
        yield affines[:, start : start + len(weight)].unbind()
        start += _padded_length(weight)


def _padded_length(weight: Tensor) -> int:
    """Round C up to a multiple of 4: a GPU's thread loads four values at once."""
    return -(-len(weight) // 4) * 4


def running_affines(norms: list[BatchNorm]) -> Iterable[tuple[Tensor, Tensor]]:
    """Compute scale and shift of each batch norm from its running statistics."""
    # torch._foreach_* launch few kernels for the hundreds of short vectors of a deep network.
    rstds = torch._foreach_add([norm.running_var for norm in norms], norms[0].eps)
    torch._foreach_rsqrt_(rstds)
    scales = torch._foreach_mul(rstds, [norm.weight for norm in norms])
    means = torch._foreach_mul([norm.running_mean for norm in norms], scales)
    return zip(scales, torch._foreach_sub([norm.bias for norm in norms], means), strict=True)
