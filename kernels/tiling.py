"""Fix the tile sizes of each Triton kernel; autotuning would make runs differ.

Sizes are powers of two, as Triton requires, and fit the registers and shared memory of compute
capability 8.0 and later without spilling (tests/kernels/test_triton_compiles.py). They were chosen
by the instructions and the times that `python -m tools.benchmark --static` counts and models; none
has been tried on a GPU.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

VECTOR_BYTES = 16  # the widest load of a thread
TILES_AT_ONCE = 4  # partial results that triton_reduce.sum_tiles loads


@dataclass(frozen=True)
class Gpu:
    """Describe a device by what the choice of launches depends on."""

    capability: tuple[int, int]
    multiprocessors: int

    @property
    def launches_early(self) -> bool:
        """Tell whether a kernel may be started before the previous one ends: from 9.0 on."""
        return self.capability >= (9, 0)


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Return the properties of a CUDA device; of an A100 in their place for another device."""
    if device.type != "cuda":
        return Gpu((8, 0), 108)
    found = torch.cuda.get_device_properties(device)
    return Gpu((found.major, found.minor), found.multi_processor_count)


@dataclass(frozen=True)
class Tile:
    """Hold the constexpr sizes of a kernel and its launch options."""

    sizes: Mapping[str, int]  # parameter name, such as ROWS, -> size
    warps: int = 4  # of 32 threads, per program
    stages: int = 2  # of software pipelining: a loop loads this many steps ahead

    def blocks(self, name: str, count: int) -> int:
        """Return how many tiles of size `name` cover `count` elements."""
        return cdiv(count, self.sizes[name])


def _rows(dtype: torch.dtype, num_rows: int, gpu: Gpu) -> int:
    """Return the rows of a program of 4 warps: 128 where registers and the GPU's size allow."""
    many = num_rows >= 128 * gpu.multiprocessors
    return 128 if many and _fits_large_tiles(dtype, gpu) else 64


def _fills(num_rows: int, rows: int, gpu: Gpu) -> bool:
    """Tell whether there is a program for each multiprocessor; else each needs more warps."""
    return cdiv(num_rows, rows) >= gpu.multiprocessors


def _fits_large_tiles(dtype: torch.dtype, gpu: Gpu) -> bool:
    """Tell whether products leave registers for large tiles: their operands are not in registers.

    So it is on 9.0 (wgmma) and 10.0 (tcgen05), but not with three products of TF32 for each.
    """
    return dtype != torch.float32 and gpu.capability[0] in (9, 10)


def conv1x1(dtype: torch.dtype, num_rows: int, out_channels: int, gpu: Gpu) -> Tile:
    """Return the tile of the 1x1 convolution."""
    # Without registers for more, from 10.0 on, three products of TF32 for each would spill.
    few_registers = dtype == torch.float32 and gpu.capability >= (10, 0)
    block = min(_next_power_of_2(out_channels), 64 if few_registers else 128)
    rows = 128 if block == 128 and dtype != torch.float32 else _rows(dtype, num_rows, gpu)
    sizes = {"ROWS": rows, "CHANNELS": 32, "OUT_CHANNELS": block, "STATS_ROWS": 1024 // block}
    few_warps = block <= 64 and _fits_large_tiles(dtype, gpu) and _fills(num_rows, rows, gpu)
    return Tile(sizes, warps=4 if few_warps else 8, stages=3)


def conv3x3(dtype: torch.dtype, num_rows: int, channels: int, out_channels: int, gpu: Gpu) -> Tile:
    """Return the tile of the 3x3 convolution, with all output channels."""
    block = _next_power_of_2(out_channels)
    # 64 channels a step where the last step would leave less than half of them empty.
    wide = dtype != torch.float32 and block < 64 and -channels % 64 < 32
    rows = _rows(dtype, num_rows, gpu)
    sizes = {"ROWS": rows, "CHANNELS": 64 if wide else 32, "OUT_CHANNELS": block}
    on_hopper = dtype != torch.float32 and gpu.capability[0] == 9
    few_warps = rows == 128 or (on_hopper and _fills(num_rows, rows, gpu))
    stats_rows = min(32, 1024 // block)
    # Fewer stages leave registers and shared memory for more programs, where there are more.
    warps, stages = (4, 2) if few_warps else (8, 3 if on_hopper else 2)
    return Tile(sizes | {"STATS_ROWS": stats_rows}, warps, stages)


def conv1x1_backward(dtype: torch.dtype, out_channels: int, gpu: Gpu) -> Tile:
    """Return the tile of the backward of the 1x1 convolution."""
    # In float32 a product is three of TF32, whose registers leave room for fewer channels.
    block = min(_next_power_of_2(out_channels), 64 if dtype == torch.float32 else 128)
    on_hopper = dtype != torch.float32 and gpu.capability[0] == 9
    sizes = {"ROWS": 64 if on_hopper else 32, "CHANNELS": 64, "OUT_CHANNELS": block}
    few_warps = on_hopper and block <= 64
    newest = gpu.capability >= (12, 0)
    stages, sum_rows = 1 if block == 128 and newest else 2, 64 if newest else 16
    return Tile(sizes | {"SUM_ROWS": sum_rows}, warps=4 if few_warps else 8, stages=stages)


def conv3x3_backward(dtype: torch.dtype, num_rows: int, out_channels: int, gpu: Gpu) -> Tile:
    """Return the tile of the backward of the 3x3 convolution to its input."""
    block, single = _next_power_of_2(out_channels), dtype == torch.float32
    taps = 3 if block == 16 and not single else 1  # see triton_backward.tap_columns
    rows = 32 if block == 64 and single else _rows(dtype, num_rows, gpu)
    sizes = {"ROWS": rows, "CHANNELS": 64, "OUT_CHANNELS": block, "TAPS": taps, "SUM_ROWS": 16}
    few_warps = not single and _fills(num_rows, rows, gpu)
    return Tile(sizes, warps=4 if few_warps else 8, stages=1)


def conv3x3_weight_backward(dtype: torch.dtype, out_channels: int) -> Tile:
    """Return the tile of the backward of the 3x3 convolution to its weight."""
    block = _next_power_of_2(out_channels)
    single, taps = dtype == torch.float32, 3 if block <= 32 else 1
    sizes = {"ROWS": 32 if single else 64, "CHANNELS": 64, "OUT_CHANNELS": block, "TAPS": taps}
    return Tile(sizes, warps=4 if block == 16 and not single else 8)


def elementwise(channels: int) -> Tile:
    """Return the tile of kernels that treat each element alike: 4,096 elements."""
    block = min(_next_power_of_2(channels), 64)
    return Tile({"ROWS": 4096 // block, "CHANNELS": block})


COPY = Tile({"ROWS": 64, "CHANNELS": 64, "STATS_ROWS": 32})
POOL_BACKWARD = Tile({"ROWS": 64, "CHANNELS": 64, "SUM_ROWS": 32})


def norm_relu_avg_pool(window: tuple[int, int]) -> Tile:
    """Return the tile of the pooling: 64 pixels of the input, whatever the window."""
    pixels = min(_next_power_of_2(window[0] * window[1], 1), 16)
    return Tile({"ROWS": 64 // pixels, "PIXELS": pixels, "CHANNELS": 64})


@dataclass(frozen=True)
class Splits:
    """Divide the rows of a launch among programs, whose results are combined group by group."""

    rows_each: int
    count: int
    group_bits: int  # a group has 2^group_bits splits: about the root of their number

    @property
    def num_groups(self) -> int:
        """Return the number of groups."""
        return cdiv(self.count, 1 << self.group_bits)

    @property
    def num_partials(self) -> int:
        """Return the rows of partial results: of splits, then of groups up to a multiple of 4."""
        return self.count + cdiv(self.num_groups, TILES_AT_ONCE) * TILES_AT_ONCE


def whole_tiles(num_rows: int, tile: Tile) -> Splits:
    """Let each program handle one tile of rows."""
    count = tile.blocks("ROWS", num_rows)
    return Splits(tile.sizes["ROWS"], count, (count - 1).bit_length() // 2)


def persistent(num_rows: int, tile: Tile, column_blocks: int, gpu: Gpu) -> Splits:
    """Let each program handle several tiles of rows, and no more programs run than fit at once.

    The number of splits is a multiple of TILES_AT_ONCE: the last may have fewer rows, or none.
    """
    programs = 2 * gpu.multiprocessors // column_blocks
    at_most = max(1, programs // TILES_AT_ONCE) * TILES_AT_ONCE
    rows_each = cdiv(tile.blocks("ROWS", num_rows), at_most) * tile.sizes["ROWS"]
    count = cdiv(cdiv(num_rows, rows_each), TILES_AT_ONCE) * TILES_AT_ONCE
    return Splits(rows_each, count, max(2, (count - 1).bit_length() // 2))


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


def norm_vector_width(*vectors: Tensor) -> int:
    """Return how many float32 values a thread may load at once from each of these (C,) vectors."""
    return math.gcd(4, *(x.storage_offset() for x in vectors), vectors[0].numel())


def weight_vector_width(weight: Tensor) -> int:
    """Return how many input channels of a weight (F, C, h, w) a thread may load at once."""
    return vector_width(weight.permute(0, 2, 3, 1)) if weight.stride(1) == 1 else 1


def _next_power_of_2(count: int, minimum: int = 16) -> int:
    """Round up to a power of 2 of at least `minimum`; tl.dot requires 16."""
    return max(minimum, 1 << (count - 1).bit_length())
