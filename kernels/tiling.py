"""Fix the tile sizes of each Triton kernel; autotuning would make runs differ.

Sizes are powers of two, as Triton requires, and fit the registers and shared memory of compute
capability 8.0 and later without spilling (tests/kernels/test_triton_compiles.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BACKWARD_PROGRAMS = 264  # at most: two for each of an H200's 132 multiprocessors
VECTOR_BYTES = 16  # the widest load of a thread


@dataclass(frozen=True)
class Tile:
    """Hold the constexpr sizes of a kernel and its launch options."""

    sizes: Mapping[str, int]  # parameter name, such as ROWS, -> size
    warps: int = 4  # of 32 threads, per program
    stages: int = 2  # of software pipelining: a loop loads this many steps ahead

    def blocks(self, name: str, count: int) -> int:
        """Return how many tiles of size `name` cover `count` elements."""
        return cdiv(count, self.sizes[name])


def conv1x1(dtype: torch.dtype, out_channels: int) -> Tile:
    """Return the tile of the 1x1 convolution."""
    block = min(_next_power_of_2(out_channels), 128)
    rows = 128 if block == 128 and dtype != torch.float32 else 64
    return Tile({"ROWS": rows, "CHANNELS": 32, "OUT_CHANNELS": block}, warps=8, stages=3)


def conv3x3(dtype: torch.dtype, channels: int, out_channels: int) -> Tile:
    """Return the tile of the 3x3 convolution, with all output channels."""
    block = _next_power_of_2(out_channels)
    # 64 channels a step where the last step would leave less than half of them empty.
    wide = dtype != torch.float32 and block < 64 and -channels % 64 < 32
    sizes = {"ROWS": 64, "CHANNELS": 64 if wide else 32, "OUT_CHANNELS": block}
    return Tile(sizes, warps=8, stages=1)


def conv1x1_backward(dtype: torch.dtype, out_channels: int) -> Tile:
    """Return the tile of the backward of the 1x1 convolution."""
    # In float32 a product is three of TF32, whose registers leave room for fewer channels.
    block = min(_next_power_of_2(out_channels), 64 if dtype == torch.float32 else 256)
    sizes = {"ROWS": 32, "CHANNELS": 64, "OUT_CHANNELS": block}
    return Tile(sizes, warps=8, stages=1 if block == 256 else 2)


def conv3x3_backward(dtype: torch.dtype, out_channels: int) -> Tile:
    """Return the tile of the backward of the 3x3 convolution to its input."""
    block, single = _next_power_of_2(out_channels), dtype == torch.float32
    taps = 3 if block == 16 and not single else 1  # see triton_backward.tap_columns
    rows = 32 if block == 64 and single else 64
    sizes = {"ROWS": rows, "CHANNELS": 64, "OUT_CHANNELS": block, "TAPS": taps}
    return Tile(sizes, warps=8, stages=1)


def conv3x3_weight_backward(dtype: torch.dtype, out_channels: int) -> Tile:
    """Return the tile of the backward of the 3x3 convolution to its weight."""
    block = _next_power_of_2(out_channels)
    rows, taps = 32 if dtype == torch.float32 else 64, 3 if block == 16 else 1
    return Tile({"ROWS": rows, "CHANNELS": 64, "OUT_CHANNELS": block, "TAPS": taps})


ELEMENTWISE = Tile({"ROWS": 64, "CHANNELS": 64})
REDUCE_STATS = Tile({"SPLITS": 512, "CHANNELS": 8}, warps=8)
REDUCE_PARTIALS = Tile({"NORM_SPLITS": 256, "NORM_CHANNELS": 16, "SPLITS": 64, "ELEMENTS": 64})


def norm_relu_avg_pool(window: tuple[int, int]) -> Tile:
    """Return the tile of the pooling: 64 pixels of the input, whatever the window."""
    pixels = min(_next_power_of_2(window[0] * window[1], 1), 16)
    return Tile({"ROWS": 64 // pixels, "PIXELS": pixels, "CHANNELS": 64})


def splits(num_rows: int, tile: Tile, column_blocks: int) -> tuple[int, int]:
    """Split the rows of a backward kernel; return the number of splits, and the rows of each.

    Each split writes partial sums: use no more than fill the GPU. Only the last may be shorter.
    """
    tiles_each = cdiv(tile.blocks("ROWS", num_rows), max(1, BACKWARD_PROGRAMS // column_blocks))
    rows_per_split = tiles_each * tile.sizes["ROWS"]
    return cdiv(num_rows, rows_per_split), rows_per_split


def cdiv(count: int, size: int) -> int:
    """Divide and round up."""
    return -(-count // size)


def vector_width(*tensors: Tensor) -> int:
    """Return how many channels a thread may load at once from each of these (N, H, W, C) tensors.

    PyTorch allocates at multiples of 16 bytes, but a view or a row may start anywhere.
    """
    width = 0
    for x in tensors:
        strides = [x.stride(i) for i in range(3) if x.shape[i] > 1]
        loadable = VECTOR_BYTES // x.element_size()
        width = math.gcd(width, loadable, x.storage_offset(), x.shape[3], *strides)
    return width


def weight_vector_width(weight: Tensor) -> int:
    """Return how many input channels of a weight (F, C, h, w) a thread may load at once."""
    return vector_width(weight.permute(0, 2, 3, 1)) if weight.stride(1) == 1 else 1


def _next_power_of_2(count: int, minimum: int = 16) -> int:
    """Round up to a power of 2 of at least `minimum`; tl.dot requires 16."""
    return max(minimum, 1 << (count - 1).bit_length())
