"""Run the forward operations: copy, norm and ReLU, convolutions, pooling.

The copy and the convolutions also compute the statistics of what they write, and from these the
affine function of the norm that reads it next. kernels/triton_common.py explains the parameters,
kernels/triton_reduce.py how the programs of a launch combine their results.
"""

import triton
import triton.language as tl

from kernels.triton_common import (
    apply_dropout,
    dot,
    kernel,
    load_channels,
    load_weight,
    normalise,
    relu,
    taps_in_image,
    tile_mask,
    tile_pointers,
    wait_for_previous_kernel,
)
from kernels.triton_reduce import reduce_stats, store_stats, write_affine


@kernel
def copy_with_stats(
    value, target, target_stride, partial, counters, num_splits, num_groups, group_bits,
    mean, var, rstd, eps, reader_weight, reader_bias, reader_scale, reader_shift,
    num_rows, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STATS_ROWS: tl.constexpr, VECTOR: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Copy contiguous value, (M, C), to target: program (i, j) copies row block i, channels j."""
    wait_for_previous_kernel(PDL)
    split = tl.program_id(0)
    rows = split * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = tile_mask(rows < num_rows, c < channels, VECTOR)
    x = tl.load(tile_pointers(value, rows, channels, c, VECTOR), mask, 0.0)
    x = x.to(target.dtype.element_ty)
    tl.store(tile_pointers(target, rows, target_stride, c, VECTOR), x, mask)
    # Take the statistics after rounding to the target's dtype: later layers read rounded values.
    store_stats(x.to(tl.float32), partial, split, rows < num_rows, c, channels)
    reduce_stats(
        partial, counters + tl.program_id(1) * (1 + num_groups),
        split, num_splits, num_groups, group_bits, ROWS, num_rows, c, channels,
        mean, var, rstd, eps, reader_weight, reader_bias, reader_scale, reader_shift, STATS_ROWS,
    )  # fmt: skip


@kernel
def norm_relu(
    value, value_stride, norm_scale, norm_shift, target, num_rows, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, NORM_VECTOR: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Write Z to target, a contiguous (M, C): program (i, j) writes row block i, channels j."""
    wait_for_previous_kernel(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    scale = load_channels(norm_scale, c, channels, NORM_VECTOR)
    shift = load_channels(norm_shift, c, channels, NORM_VECTOR)
    mask = tile_mask(rows < num_rows, c < channels, VECTOR)
    x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
    z = relu(normalise(x, scale, shift)).to(x.dtype)
    tl.store(tile_pointers(target, rows, channels, c, VECTOR), z, mask)


@triton.jit
def store_tile(
    total, target, target_stride, rows, inside, f, out_channels,
    seed, layer_id, first_row, threshold, keep_scale, VECTOR: tl.constexpr,
):  # fmt: skip
    """Apply dropout to total, (ROWS, OUT_CHANNELS) in float32; store and return it, rounded."""
    if seed is not None:
        total = apply_dropout(
            total, rows, f, out_channels, seed, layer_id, first_row, threshold, keep_scale
        )
    out = total.to(target.dtype.element_ty)
    mask = tile_mask(inside, f < out_channels, VECTOR)
    tl.store(tile_pointers(target, rows, target_stride, f, VECTOR), out, mask)
    return out.to(tl.float32)


@triton.jit
def write_known_affine(mean, rstd, weight, bias, scale, shift, count, CHANNELS: tl.constexpr):
    """Write scale and shift of the `count` channels before those that the arguments point to.

    The norm that reads the target next reads these first, and their statistics are known.
    """
    for first in range(0, count, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        known, inside = c - count, c < count
        known_mean = tl.load(mean + known, inside, 0.0)
        known_rstd = tl.load(rstd + known, inside, 0.0)
        write_affine(known_mean, known_rstd, weight, bias, scale, shift, known, inside)


@triton.jit
def reduce_tile(
    out, partial, counters, split, num_splits, num_groups, group_bits,
    rows, num_rows, f, out_channels,
    mean, var, rstd, eps, reader_weight, reader_bias, reader_scale, reader_shift, num_known,
    ROWS: tl.constexpr, OUT_BLOCKS: tl.constexpr, STATS_ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of a convolution's output, and the affine function of its reader."""
    if reader_weight is not None:  # noqa: SIM102 - at compile time
        if tl.program_id(0) == 0:
            write_known_affine(
                mean, rstd, reader_weight, reader_bias, reader_scale, reader_shift, num_known, 128
            )
    store_stats(out, partial, split, rows < num_rows, f, out_channels)
    block = tl.program_id(0) % OUT_BLOCKS
    reduce_stats(
        partial, counters + block * (1 + num_groups),
        split, num_splits, num_groups, group_bits, ROWS, num_rows, f, out_channels,
        mean, var, rstd, eps, reader_weight, reader_bias, reader_scale, reader_shift, STATS_ROWS,
    )  # fmt: skip


@kernel
def conv1x1(
    value, value_stride, norm_scale, norm_shift, weight, weight_f, weight_y, weight_x,
    target, target_stride, seed, layer_id, first_row, threshold, keep_scale,
    partial, counters, num_splits, num_groups, group_bits, mean, var, rstd, eps,
    reader_weight, reader_bias, reader_scale, reader_shift, num_known,
    num_rows, channels, out_channels, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    STATS_ROWS: tl.constexpr, VECTOR: tl.constexpr, NORM_VECTOR: tl.constexpr,
    TARGET_VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr, WEIGHT_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr, OUT_BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute target (M, F) = dropout(Z W^T), with Z (M, C) and W (F, C).

    A program computes a (ROWS, OUT_CHANNELS) tile. Consecutive programs read the same rows, which
    stay in the cache. It ignores HEIGHT, WIDTH, weight_y and weight_x, which only conv3x3 needs.
    """
    wait_for_previous_kernel(PDL)
    split = tl.program_id(0) // OUT_BLOCKS
    f = tl.program_id(0) % OUT_BLOCKS * OUT_CHANNELS + tl.arange(0, OUT_CHANNELS)
    rows = split * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, OUT_CHANNELS], tl.float32)
    # Loop over the input channels, CHANNELS at a time.
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        scale = load_channels(norm_scale, c, channels, NORM_VECTOR)
        shift = load_channels(norm_shift, c, channels, NORM_VECTOR)
        mask = tile_mask(rows < num_rows, c < channels, VECTOR)
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        # For c >= C scale and shift are 0, hence z = 0. Rows >= M are not stored.
        z = relu(normalise(x, scale, shift)).to(x.dtype)
        w = load_weight(
            weight, f * weight_f, f < out_channels, c, c < channels, WEIGHT_C, WEIGHT_VECTOR
        )
        total = dot(z, w.to(x.dtype), total, PRECISION)
    out = store_tile(
        total, target, target_stride, rows, rows < num_rows, f, out_channels,
        seed, layer_id, first_row, threshold, keep_scale, TARGET_VECTOR,
    )  # fmt: skip
    if partial is not None:
        reduce_tile(
            out, partial, counters, split, num_splits, num_groups, group_bits,
    rows, num_rows, f, out_channels,
            mean, var, rstd, eps, reader_weight, reader_bias, reader_scale, reader_shift, num_known,
            ROWS, OUT_BLOCKS, STATS_ROWS,
        )  # fmt: skip


@kernel
def conv3x3(
    value, value_stride, norm_scale, norm_shift, weight, weight_f, weight_y, weight_x,
    target, target_stride, seed, layer_id, first_row, threshold, keep_scale,
    partial, counters, num_splits, num_groups, group_bits, mean, var, rstd, eps,
    reader_weight, reader_bias, reader_scale, reader_shift, num_known,
    num_rows, channels, out_channels, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    STATS_ROWS: tl.constexpr, VECTOR: tl.constexpr, NORM_VECTOR: tl.constexpr,
    TARGET_VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr, WEIGHT_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr, OUT_BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute target (M, F) = dropout(conv2d(Z, W, padding=1)), with Z (M, C), W (F, C, 3, 3).

    A program computes ROWS rows of all F channels (OUT_CHANNELS >= F), as nine matrix products, one
    per filter tap (dy, dx) in -1..1: shifted rows of Z times W[:, :, dy + 1, dx + 1]^T.
    """
    wait_for_previous_kernel(PDL)
    split = tl.program_id(0)
    f = tl.arange(0, OUT_CHANNELS)
    rows = split * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, OUT_CHANNELS], tl.float32)
    taps = taps_in_image(rows, rows < num_rows, HEIGHT, WIDTH)
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        if norm_scale is not None:
            scale = load_channels(norm_scale, c, channels, NORM_VECTOR)
            shift = load_channels(norm_shift, c, channels, NORM_VECTOR)
        # Taps are the inner loop: after the first tap the channels are in the cache.
        for tap in range(9):
            dy, dx = tap // 3 - 1, tap % 3 - 1
            mask = tile_mask((taps >> tap & 1) != 0, c < channels, VECTOR)
            pixel = rows + dy * WIDTH + dx
            z = tl.load(tile_pointers(value, pixel, value_stride, c, VECTOR), mask, 0.0)
            if norm_scale is not None:
                # Pad Z, not value, with 0: a 0 in value would become relu(shift).
                z = tl.where(mask, relu(normalise(z, scale, shift)), 0.0).to(z.dtype)
            w = load_weight(
                weight + (dy + 1) * weight_y + (dx + 1) * weight_x,
                f * weight_f, f < out_channels, c, c < channels, WEIGHT_C, WEIGHT_VECTOR,
            )  # fmt: skip
            total = dot(z, w.to(z.dtype), total, PRECISION)
    out = store_tile(
        total, target, target_stride, rows, rows < num_rows, f, out_channels,
        seed, layer_id, first_row, threshold, keep_scale, TARGET_VECTOR,
    )  # fmt: skip
    if partial is not None:
        reduce_tile(
            out, partial, counters, split, num_splits, num_groups, group_bits,
    rows, num_rows, f, out_channels,
            mean, var, rstd, eps, reader_weight, reader_bias, reader_scale, reader_shift, num_known,
            ROWS, OUT_BLOCKS, STATS_ROWS,
        )  # fmt: skip


@kernel
def norm_relu_avg_pool(
    value, value_stride, norm_scale, norm_shift, target, num_rows, channels,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr,
    NORM_VECTOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute avg_pool2d(Z, window) into target, a contiguous (num_rows, C).

    Image rows and columns that do not fill a window are dropped. Program (i, j) computes block i of
    ROWS output pixels in channel block j, and reads PIXELS input pixels of each window at a time.
    """
    wait_for_previous_kernel(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    scale = load_channels(norm_scale, c, channels, NORM_VECTOR)
    shift = load_channels(norm_shift, c, channels, NORM_VECTOR)
    # The row of `value` that holds each window's top left pixel.
    out_h: tl.constexpr = HEIGHT // WINDOW_H
    out_w: tl.constexpr = WIDTH // WINDOW_W
    area: tl.constexpr = WINDOW_H * WINDOW_W
    top = rows // (out_h * out_w) * HEIGHT + rows // out_w % out_h * WINDOW_H
    corner = top * WIDTH + rows % out_w * WINDOW_W
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, area, PIXELS):
        # Tiles (ROWS, PIXELS, CHANNELS), summed over the pixels.
        pixel = first + tl.arange(0, PIXELS)
        source = corner[:, None] + (pixel // WINDOW_W * WIDTH + pixel % WINDOW_W)[None, :]
        inside = (rows < num_rows)[:, None] & (pixel < area)[None, :]
        mask = inside[:, :, None] & (c < channels)[None, None, :]
        # As in tile_mask and tile_pointers: a thread loads VECTOR channels at once.
        mask = tl.max_constancy(mask, [1, 1, VECTOR])
        pointers = value + (source.to(tl.int64) * value_stride)[:, :, None] + c[None, None, :]
        size: tl.constexpr = VECTOR * value.dtype.element_ty.primitive_bitwidth // 8
        x = tl.load(tl.multiple_of(pointers, [1, 1, size]), mask, 0.0).to(tl.float32)
        z = relu(x * scale[None, None, :] + shift[None, None, :])
        total += tl.sum(tl.where(mask, z, 0.0), 1)
    mask = (rows < num_rows)[:, None] & (c < channels)[None, :]
    out = (total / area).to(target.dtype.element_ty)
    tl.store(tile_pointers(target, rows, channels, c, 1), out, mask)
