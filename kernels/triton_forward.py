"""Forward kernels: each program writes one tile, and the statistics of what it wrote.

Statistics of a whole channel need every row, so that they take a second kernel, `reduce_stats`,
which combines the tiles in a fixed order: every run gives the same bits. Atomic additions would
not. kernels/triton_common.py explains the parameters.
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
    """Store mean and sum of squared deviations of a tile's rows: partial[split] is (2, C)."""
    count = tl.sum(inside.to(tl.float32), 0)
    mean = tl.sum(tl.where(inside[:, None], value, 0.0), 0) / count
    deviation = tl.where(inside[:, None], value - mean[None, :], 0.0)
    square = tl.sum(deviation * deviation, 0)
    tl.store(partial + (2 * split) * channels + c, mean, c < channels)
    tl.store(partial + (2 * split + 1) * channels + c, square, c < channels)


@kernel
def copy_with_stats(
    value, target, target_stride, partial, num_rows, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """target = value, (M, C), which is contiguous.

    Program (i, j) copies rows block i of channel block j.
    """
    split = tl.program_id(0)
    rows = split * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = tile_mask(rows < num_rows, c < channels, VECTOR)
    x = tl.load(tile_pointers(value, rows, channels, c, VECTOR), mask, 0.0)
    x = x.to(target.dtype.element_ty)
    tl.store(tile_pointers(target, rows, target_stride, c, VECTOR), x, mask)
    # Of the rounded values: later layers read those.
    store_stats(x.to(tl.float32), partial, split, rows < num_rows, c, channels)


@triton.jit
def store_tile(
    total, target, target_stride, partial, split, rows, inside, f, features,
    seed, layer_id, first_row, threshold, keep_scale, VECTOR: tl.constexpr,
):  # fmt: skip
    """Apply dropout to a tile of a convolution's output, store it and its statistics."""
    if seed is not None:
        total = apply_dropout(
            total, rows, f, features, seed, layer_id, first_row, threshold, keep_scale
        )
    out = total.to(target.dtype.element_ty)
    mask = tile_mask(inside, f < features, VECTOR)
    tl.store(tile_pointers(target, rows, target_stride, f, VECTOR), out, mask)
    if partial is not None:
        store_stats(out.to(tl.float32), partial, split, inside, f, features)


@kernel
def conv1x1(
    value, value_stride, norm_mean, norm_rstd, norm_weight, norm_bias,
    weight, weight_f, weight_y, weight_x,
    target, target_stride, seed, layer_id, first_row, threshold, keep_scale, partial,
    height, width, num_rows, channels, features,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
    VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """target = dropout(Z W^T): (M, C) times the transpose of (F, C) gives (M, F).

    One program computes one (ROWS, FEATURES) tile of the target. Programs are numbered along the
    features first: those that read the same rows run together and share the cache.
    """
    blocks = tl.cdiv(features, FEATURES)
    split = tl.program_id(0) // blocks
    f = tl.program_id(0) % blocks * FEATURES + tl.arange(0, FEATURES)
    rows = split * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, FEATURES], tl.float32)
    # The product of the tile, CHANNELS of its inner dimension at a time.
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        scale, shift = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
        mask = tile_mask(rows < num_rows, c < channels, VECTOR)
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        # Beyond `channels` scale and shift are 0, so z is; rows beyond M are not stored.
        z = relu(normalise(x, scale, shift)).to(x.dtype)
        w = load_weight(
            weight, f * weight_f, f < features, c, c < channels, WEIGHT_C, WEIGHT_VECTOR
        )
        total = dot(z, w.to(x.dtype), total, PRECISION)
    store_tile(
        total, target, target_stride, partial, split, rows, rows < num_rows, f, features,
        seed, layer_id, first_row, threshold, keep_scale, TARGET_VECTOR,
    )  # fmt: skip


@kernel
def conv3x3(
    value, value_stride, norm_mean, norm_rstd, norm_weight, norm_bias,
    weight, weight_f, weight_y, weight_x,
    target, target_stride, seed, layer_id, first_row, threshold, keep_scale, partial,
    height, width, num_rows, channels, features,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
    VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """target = dropout(conv2d(Z, W, padding=1)): Z (M, C), W (F, C, 3, 3), target (M, F).

    One program computes ROWS rows with all features (FEATURES >= F), as a sum of nine products,
    one per tap (dy, dx) of the kernel: rows of Z shifted by the tap, times W[:, :, dy, dx]^T.
    """
    split = tl.program_id(0)
    f = tl.arange(0, FEATURES)
    rows = split * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, FEATURES], tl.float32)
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        scale, shift = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
        # Taps are the inner loop: all but the first find these channels in the cache.
        for tap in range(9):
            dy, dx = tap // 3 - 1, tap % 3 - 1
            near = shifted_mask(rows, rows < num_rows, dy, dx, height, width)
            mask = tile_mask(near, c < channels, VECTOR)
            pixel = rows + dy * width + dx
            x = tl.load(tile_pointers(value, pixel, value_stride, c, VECTOR), mask, 0.0)
            # Padding is 0 in Z, not in value: relu(shift) would be wrong there.
            z = tl.where(mask, relu(normalise(x, scale, shift)), 0.0).to(x.dtype)
            w = load_weight(
                weight + (dy + 1) * weight_y + (dx + 1) * weight_x,
                f * weight_f, f < features, c, c < channels, WEIGHT_C, WEIGHT_VECTOR,
            )  # fmt: skip
            total = dot(z, w.to(x.dtype), total, PRECISION)
    store_tile(
        total, target, target_stride, partial, split, rows, rows < num_rows, f, features,
        seed, layer_id, first_row, threshold, keep_scale, TARGET_VECTOR,
    )  # fmt: skip


@triton.jit
def merge_stats(count, mean, square, new_count, new_mean, new_square):
    """Combine the statistics of two sets of rows; `square` sums squared deviations.

    T. F. Chan, G. H. Golub, R. J. LeVeque, 1979. E[x^2] - E[x]^2 would cancel where the mean is
    far from 0.
    """
    total = count + new_count
    fraction = new_count / tl.maximum(total, 1.0)
    distance = new_mean - mean
    square += new_square + distance * distance * (count * fraction)
    return total, mean + distance * fraction, square


@kernel
def reduce_stats(
    partial, mean, var, rstd, eps, num_splits, rows_per_split, num_rows, channels,
    SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Combine `partial`, (num_splits, 2, C), into mean, biased variance and 1 / sqrt(var + eps).

    One program handles CHANNELS channels, and reads SPLITS tiles of statistics at a time.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    count, average = 0.0, tl.zeros([CHANNELS], tl.float32)
    square = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        mask = (split < num_splits)[:, None] & (c < channels)[None, :]
        pointers = partial + (2 * split * channels)[:, None] + c[None, :]
        means = tl.load(pointers, mask, 0.0)
        squares = tl.load(pointers + channels, mask, 0.0)
        # The last tile may have fewer rows than the others.
        counts = tl.minimum(num_rows - split * rows_per_split, rows_per_split)
        counts = tl.where(split < num_splits, counts, 0).to(tl.float32)
        # The statistics of these tiles together, then of all tiles so far.
        new_count = tl.sum(counts, 0)
        new_mean = tl.sum(means * counts[:, None], 0) / new_count
        distance = means - new_mean[None, :]
        new_square = tl.sum(squares + distance * distance * counts[:, None], 0)
        count, average, square = merge_stats(
            count, average, square, new_count, new_mean, new_square
        )
    variance = square / num_rows
    tl.store(mean + c, average, c < channels)
    tl.store(var + c, variance, c < channels)
    tl.store(rstd + c, 1.0 / tl.sqrt_rn(variance + eps), c < channels)


@kernel
def norm_relu_avg_pool(
    value, value_stride, norm_mean, norm_rstd, norm_weight, norm_bias, target,
    height, width, num_rows, channels, window_h, window_w, num_outputs,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """target = avg_pool2d(Z, window), (num_outputs, C), contiguous; leftover pixels are ignored.

    Program (i, j) computes ROWS pixels of the output in channel block j, reading PIXELS pixels of
    each window at a time.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    scale, shift = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    # The row of the source that holds the upper left corner of each window.
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
        mask = tl.max_constancy(mask, [1, 1, VECTOR])
        pointers = value + (source.to(tl.int64) * value_stride)[:, :, None] + c[None, None, :]
        size: tl.constexpr = VECTOR * value.dtype.element_ty.primitive_bitwidth // 8
        x = tl.load(tl.multiple_of(pointers, [1, 1, size]), mask, 0.0).to(tl.float32)
        z = relu(x * scale[None, None, :] + shift[None, None, :])
        total += tl.sum(tl.where(mask, z, 0.0), 1)
    mask = (rows < num_outputs)[:, None] & (c < channels)[None, :]
    out = (total / area).to(target.dtype.element_ty)
    tl.store(tile_pointers(target, rows, channels, c, 1), out, mask)
