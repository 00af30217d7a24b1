"""Run the forward operations: copy, convolutions, pooling; all but pooling compute statistics.

Each program stores the mean and M2 (sum of squared deviations) of the tile that it wrote.
`reduce_stats` combines all tiles in a fixed order, so that every run gives the same bits; atomic
additions would sum in another order each time. kernels/triton_common.py explains the parameters.
"""

import triton
import triton.language as tl

from kernels.triton_common import (
    affine,
    apply_dropout,
    dot,
    kernel,
    load_weight,
    normalise,
    relu,
    shifted_mask,
    tile_mask,
    tile_pointers,
)


@triton.jit
def store_stats(value, partial, split, inside, c, channels):
    """Store mean and M2 of rows `inside` of value (ROWS, CHANNELS) in partial (splits, 2, C)."""
    count = tl.sum(inside.to(tl.float32), 0)
    mean = tl.sum(tl.where(inside[:, None], value, 0.0), 0) / count
    deviation = tl.where(inside[:, None], value - mean[None, :], 0.0)
    m2 = tl.sum(deviation * deviation, 0)
    tl.store(partial + (2 * split) * channels + c, mean, c < channels)
    tl.store(partial + (2 * split + 1) * channels + c, m2, c < channels)


@kernel
def copy_with_stats(
    value, target, target_stride, partial, num_rows, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Copy contiguous value, (M, C), to target: program (i, j) copies row block i, channels j."""
    split = tl.program_id(0)
    rows = split * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = tile_mask(rows < num_rows, c < channels, VECTOR)
    x = tl.load(tile_pointers(value, rows, channels, c, VECTOR), mask, 0.0)
    x = x.to(target.dtype.element_ty)
    tl.store(tile_pointers(target, rows, target_stride, c, VECTOR), x, mask)
    # Take the statistics after rounding to the target's dtype: later layers read rounded values.
    store_stats(x.to(tl.float32), partial, split, rows < num_rows, c, channels)


@triton.jit
def store_tile(
    total, target, target_stride, partial, split, rows, inside, f, out_channels,
    seed, layer_id, first_row, threshold, keep_scale, VECTOR: tl.constexpr,
):  # fmt: skip
    """Apply dropout to total, (ROWS, OUT_CHANNELS) in float32; store it and its statistics."""
    if seed is not None:
        total = apply_dropout(
            total, rows, f, out_channels, seed, layer_id, first_row, threshold, keep_scale
        )
    out = total.to(target.dtype.element_ty)
    mask = tile_mask(inside, f < out_channels, VECTOR)
    tl.store(tile_pointers(target, rows, target_stride, f, VECTOR), out, mask)
    if partial is not None:
        store_stats(out.to(tl.float32), partial, split, inside, f, out_channels)


@kernel
def conv1x1(
    value, value_stride, norm_mean, norm_rstd, norm_weight, norm_bias,
    weight, weight_f, weight_y, weight_x,
    target, target_stride, seed, layer_id, first_row, threshold, keep_scale, partial,
    height, width, num_rows, channels, out_channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute target (M, F) = dropout(Z W^T), with Z (M, C) and W (F, C).

    A program computes a (ROWS, OUT_CHANNELS) tile. Consecutive programs read the same rows, which
    stay in the cache. It ignores height, width, weight_y and weight_x, which only conv3x3 needs.
    """
    blocks = tl.cdiv(out_channels, OUT_CHANNELS)
    split = tl.program_id(0) // blocks
    f = tl.program_id(0) % blocks * OUT_CHANNELS + tl.arange(0, OUT_CHANNELS)
    rows = split * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, OUT_CHANNELS], tl.float32)
    # Loop over the input channels, CHANNELS at a time.
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        scale, shift = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
        mask = tile_mask(rows < num_rows, c < channels, VECTOR)
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        # For c >= C scale and shift are 0, hence z = 0. Rows >= M are not stored.
        z = relu(normalise(x, scale, shift)).to(x.dtype)
        w = load_weight(
            weight, f * weight_f, f < out_channels, c, c < channels, WEIGHT_C, WEIGHT_VECTOR
        )
        total = dot(z, w.to(x.dtype), total, PRECISION)
    store_tile(
        total, target, target_stride, partial, split, rows, rows < num_rows, f, out_channels,
        seed, layer_id, first_row, threshold, keep_scale, TARGET_VECTOR,
    )  # fmt: skip


@kernel
def conv3x3(
    value, value_stride, norm_mean, norm_rstd, norm_weight, norm_bias,
    weight, weight_f, weight_y, weight_x,
    target, target_stride, seed, layer_id, first_row, threshold, keep_scale, partial,
    height, width, num_rows, channels, out_channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute target (M, F) = dropout(conv2d(Z, W, padding=1)), with Z (M, C), W (F, C, 3, 3).

    A program computes ROWS rows of all F channels (OUT_CHANNELS >= F), as nine matrix products, one
    per filter tap (dy, dx) in -1..1: shifted rows of Z times W[:, :, dy + 1, dx + 1]^T.
    """
    split = tl.program_id(0)
    f = tl.arange(0, OUT_CHANNELS)
    rows = split * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, OUT_CHANNELS], tl.float32)
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        scale, shift = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
        # Taps are the inner loop: after the first tap the channels are in the cache.
        for tap in range(9):
            dy, dx = tap // 3 - 1, tap % 3 - 1
            in_image = shifted_mask(rows, rows < num_rows, dy, dx, height, width)
            mask = tile_mask(in_image, c < channels, VECTOR)
            pixel = rows + dy * width + dx
            x = tl.load(tile_pointers(value, pixel, value_stride, c, VECTOR), mask, 0.0)
            # Pad Z, not value, with 0: a 0 in value would become relu(shift).
            z = tl.where(mask, relu(normalise(x, scale, shift)), 0.0).to(x.dtype)
            w = load_weight(
                weight + (dy + 1) * weight_y + (dx + 1) * weight_x,
                f * weight_f, f < out_channels, c, c < channels, WEIGHT_C, WEIGHT_VECTOR,
            )  # fmt: skip
            total = dot(z, w.to(x.dtype), total, PRECISION)
    store_tile(
        total, target, target_stride, partial, split, rows, rows < num_rows, f, out_channels,
        seed, layer_id, first_row, threshold, keep_scale, TARGET_VECTOR,
    )  # fmt: skip


@triton.jit
def merge_stats(count, mean, m2, new_count, new_mean, new_m2):
    """Combine (count, mean, M2) of two sets of rows into those of their union.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979. E[x^2] - E[x]^2 would lose digits if |mean| is far above the deviation.
    """
    total = count + new_count
    fraction = new_count / tl.maximum(total, 1.0)
    delta = new_mean - mean
    m2 += new_m2 + delta * delta * (count * fraction)
    return total, mean + delta * fraction, m2


@kernel
def reduce_stats(
    partial, mean, var, rstd, eps, num_splits, rows_per_split, num_rows, channels,
    SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Combine `partial`, (num_splits, 2, C), into mean, biased variance and 1 / sqrt(var + eps).

    A program handles CHANNELS channels, and reads the statistics of SPLITS tiles at a time.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    count, merged_mean = 0.0, tl.zeros([CHANNELS], tl.float32)
    merged_m2 = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        mask = (split < num_splits)[:, None] & (c < channels)[None, :]
        pointers = partial + (2 * split * channels)[:, None] + c[None, :]
        means = tl.load(pointers, mask, 0.0)
        m2s = tl.load(pointers + channels, mask, 0.0)
        # The last tile may have fewer rows than the others.
        counts = tl.minimum(num_rows - split * rows_per_split, rows_per_split)
        counts = tl.where(split < num_splits, counts, 0).to(tl.float32)
        # Combine these tiles, then merge them with all earlier tiles.
        new_count = tl.sum(counts, 0)
        new_mean = tl.sum(means * counts[:, None], 0) / new_count
        delta = means - new_mean[None, :]
        new_m2 = tl.sum(m2s + delta * delta * counts[:, None], 0)
        count, merged_mean, merged_m2 = merge_stats(
            count, merged_mean, merged_m2, new_count, new_mean, new_m2
        )
    variance = merged_m2 / num_rows
    tl.store(mean + c, merged_mean, c < channels)
    tl.store(var + c, variance, c < channels)
    # tl.sqrt_rn rounds correctly; tl.sqrt is an approximation.
    tl.store(rstd + c, 1.0 / tl.sqrt_rn(variance + eps), c < channels)


@kernel
def norm_relu_avg_pool(
    value, value_stride, norm_mean, norm_rstd, norm_weight, norm_bias, target,
    height, width, num_rows, channels, window_h, window_w, num_outputs,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Compute avg_pool2d(Z, window) into target, a contiguous (num_outputs, C).

    Image rows and columns that do not fill a window are dropped. Program (i, j) computes block i of
    ROWS output pixels in channel block j, and reads PIXELS input pixels of each window at a time.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    scale, shift = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    # The row of `value` that holds each window's top left pixel.
    out_h, out_w, area = height // window_h, width // window_w, window_h * window_w
    top = rows // (out_h * out_w) * height + rows // out_w % out_h * window_h
    corner = top * width + rows % out_w * window_w
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, area, PIXELS):
        # Tiles (ROWS, PIXELS, CHANNELS), summed over the pixels.
        pixel = first + tl.arange(0, PIXELS)
        source = corner[:, None] + (pixel // window_w * width + pixel % window_w)[None, :]
        inside = (rows < num_outputs)[:, None] & (pixel < area)[None, :]
        mask = inside[:, :, None] & (c < channels)[None, None, :]
        # As in tile_mask and tile_pointers: a thread loads VECTOR channels at once.
        mask = tl.max_constancy(mask, [1, 1, VECTOR])
        pointers = value + (source.to(tl.int64) * value_stride)[:, :, None] + c[None, None, :]
        size: tl.constexpr = VECTOR * value.dtype.element_ty.primitive_bitwidth // 8
        x = tl.load(tl.multiple_of(pointers, [1, 1, size]), mask, 0.0).to(tl.float32)
        z = relu(x * scale[None, None, :] + shift[None, None, :])
        total += tl.sum(tl.where(mask, z, 0.0), 1)
    mask = (rows < num_outputs)[:, None] & (c < channels)[None, :]
    out = (total / area).to(target.dtype.element_ty)
    tl.store(tile_pointers(target, rows, channels, c, 1), out, mask)
