"""Backward kernels: each program handles some rows of a block of the source's channels.

It recomputes Z, forms dz, the gradient at the norm's output where Z > 0, adds scale * dz to the
gradient of the source and keeps its share of the sums over rows: dbeta, dgamma and the gradient of
the weight. `reduce_partials` adds the shares in a fixed order: every run gives the same bits.
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


@kernel
def complete_gradient(
    grad, grad_stride, value, value_stride, mean, rstd, mean_correction, var_correction,
    seed, layer_id, first_row, threshold, keep_scale,
    target, target_stride, num_rows, channels, columns,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr,
):  # fmt: skip
    """The complete gradient (kernels/feature_maps.py) through dropout; 0 in columns >= channels.

    Without `mean` no norm has read the maps, and `grad` is complete.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = tile_mask(rows < num_rows, c < channels, VECTOR)
    out = tl.load(tile_pointers(grad, rows, grad_stride, c, VECTOR), mask, 0.0).to(tl.float32)
    if mean is not None:
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        factor = tl.load(rstd + c, c < channels, 0.0) * tl.load(
            var_correction + c, c < channels, 0.0
        )
        offset = tl.load(mean_correction + c, c < channels, 0.0)
        out -= normalise(x, factor, offset - tl.load(mean + c, c < channels, 0.0) * factor)
    if seed is not None:
        out = apply_dropout(
            out, rows, c, channels, seed, layer_id, first_row, threshold, keep_scale
        )
    out = tl.where(c[None, :] < channels, out, 0.0).to(target.dtype.element_ty)
    mask = tile_mask(rows < num_rows, c < columns, TARGET_VECTOR)
    tl.store(tile_pointers(target, rows, target_stride, c, TARGET_VECTOR), out, mask)


@triton.jit
def add_gradient(
    dz, x, normed, norm_mean, scale, grad, grad_stride, rows, c, mask, inside,
    OVERWRITE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Mask dz by the ReLU, add scale * dz to `grad`; sum dz and dz * (x - mean) over the rows."""
    dz = tl.where(normed <= 0, 0.0, dz)
    pointers = tile_pointers(grad, rows, grad_stride, c, VECTOR)
    out = dz * scale[None, :]
    if not OVERWRITE:
        out += tl.load(pointers, mask, 0.0).to(tl.float32)
    tl.store(pointers, out.to(grad.dtype.element_ty), mask)
    centred = x.to(tl.float32) - tl.load(norm_mean + c, inside, 0.0)[None, :]
    return tl.sum(dz, 0), tl.sum(dz * centred, 0)


@triton.jit
def store_sums(partial, split, dbeta, dgamma, c, channels):
    """Keep the sums of one program: (programs, 2, channels)."""
    tl.store(partial + (2 * split) * channels + c, dbeta, c < channels)
    tl.store(partial + (2 * split + 1) * channels + c, dgamma, c < channels)


@kernel
def conv1x1_backward(
    d, d_stride, value, value_stride, grad, grad_stride,
    norm_mean, norm_rstd, norm_weight, norm_bias,
    weight, weight_f, weight_y, weight_x, partial, weight_partials, dweight_size,
    height, width, num_rows, channels, features, first_feature, rows_per_split, first_split,
    OVERWRITE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
    VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of the 1x1 convolution, given the complete gradient `d` of its output.

    A launch takes FEATURES features, from `first_feature` on.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(1)
    f = first_feature + tl.arange(0, FEATURES)
    last = tl.minimum((split + 1) * rows_per_split, num_rows)
    scale, bias = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    w = load_weight(
        weight, f * weight_f, f < features, c, c < channels, WEIGHT_C, WEIGHT_VECTOR
    ).to(value.dtype.element_ty)
    dbeta, dgamma = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    dw = tl.zeros([CHANNELS, FEATURES], tl.float32)
    for start in range(split * rows_per_split, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        d_mask = tile_mask(rows < last, f < features, TARGET_VECTOR)
        upstream = tl.load(tile_pointers(d, rows, d_stride, f, TARGET_VECTOR), d_mask, 0.0)
        mask = tile_mask(rows < last, c < channels, VECTOR)
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        normed = normalise(x, scale, bias)
        z = relu(normed).to(x.dtype)
        dw = dot(tl.trans(z), upstream, dw, PRECISION)
        dz = dot(upstream, tl.trans(w), tl.zeros([ROWS, CHANNELS], tl.float32), PRECISION)
        sums = add_gradient(
            dz, x, normed, norm_mean, scale, grad, grad_stride, rows, c, mask, c < channels,
            OVERWRITE, VECTOR,
        )  # fmt: skip
        dbeta += sums[0]
        dgamma += sums[1]
    store_sums(partial, first_split + split, dbeta, dgamma, c, channels)
    pointers = weight_partials + split.to(tl.int64) * dweight_size
    pointers += (c * WEIGHT_C)[:, None] + (f * weight_f)[None, :]
    tl.store(pointers, dw, (c < channels)[:, None] & (f < features)[None, :])


@triton.jit
def tap_columns(group, FEATURES: tl.constexpr, TAPS: tl.constexpr):
    """What the columns of a tile stand for that has TAPS taps of a 3x3 kernel side by side.

    Returns feature, row and column of the kernel from -1 to 1, and whether there is such a tap:
    tiles are powers of two, so that beside three taps there is room for a fourth.
    """
    column = tl.arange(0, FEATURES if TAPS == 1 else 4 * FEATURES)
    tap = group * TAPS + column // FEATURES
    return column % FEATURES, tap // 3 - 1, tap % 3 - 1, column // FEATURES < TAPS


@triton.jit
def load_shifted(d, f, dy, dx, real, rows, inside, height, width, FEATURES: tl.constexpr):
    """The gradients of the output pixels that have read each row through each column's tap."""
    near = shifted_mask(rows[:, None], inside[:, None], -dy[None, :], -dx[None, :], height, width)
    mask = tl.max_constancy(near & real[None, :], [1, FEATURES])
    offset = f - (dy * width + dx) * FEATURES
    pointers = d + (rows.to(tl.int64) * FEATURES)[:, None] + offset[None, :]
    return tl.load(tl.multiple_of(pointers, [1, 16]), mask, 0.0)


@kernel
def conv3x3_backward(
    d, value, value_stride, grad, grad_stride, norm_mean, norm_rstd, norm_weight, norm_bias,
    weight, weight_f, weight_y, weight_x, partial,
    height, width, num_rows, channels, features,
    OVERWRITE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
    TAPS: tl.constexpr, VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of the 3x3 convolution to its input, given the complete gradient of its output.

    `d` has FEATURES columns, of which those beyond `features` are 0.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    split = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    rows = split * ROWS + tl.arange(0, ROWS)
    dz = tl.zeros([ROWS, CHANNELS], tl.float32)
    for group in range(9 // TAPS):
        f, dy, dx, real = tap_columns(group, FEATURES, TAPS)
        shifted = load_shifted(d, f, dy, dx, real, rows, rows < num_rows, height, width, FEATURES)
        columns = f * weight_f + (dy + 1) * weight_y + (dx + 1) * weight_x
        used = real & (f < features)
        w = load_weight(weight, columns, used, c, c < channels, WEIGHT_C, WEIGHT_VECTOR)
        dz = dot(shifted, tl.trans(w.to(shifted.dtype)), dz, PRECISION)
    mask = tile_mask(rows < num_rows, c < channels, VECTOR)
    x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
    scale, bias = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    dbeta, dgamma = add_gradient(
        dz, x, normalise(x, scale, bias), norm_mean, scale, grad, grad_stride, rows, c, mask,
        c < channels, OVERWRITE, VECTOR,
    )  # fmt: skip
    store_sums(partial, split, dbeta, dgamma, c, channels)


@kernel
def conv3x3_weight_backward(
    d, value, value_stride, norm_mean, norm_rstd, norm_weight, norm_bias,
    weight_f, weight_y, weight_x, weight_partials, dweight_size,
    height, width, num_rows, channels, features, rows_per_split,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr, TAPS: tl.constexpr,
    VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of the 3x3 convolution to its weight, some taps of a range of rows."""
    groups: tl.constexpr = 9 // TAPS
    c = tl.program_id(0) // groups * CHANNELS + tl.arange(0, CHANNELS)
    f, dy, dx, real = tap_columns(tl.program_id(0) % groups, FEATURES, TAPS)
    split = tl.program_id(1)
    last = tl.minimum((split + 1) * rows_per_split, num_rows)
    scale, bias = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    dw = tl.zeros([CHANNELS, FEATURES if TAPS == 1 else 4 * FEATURES], tl.float32)
    for start in range(split * rows_per_split, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = tile_mask(rows < last, c < channels, VECTOR)
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        z = relu(normalise(x, scale, bias)).to(x.dtype)
        shifted = load_shifted(d, f, dy, dx, real, rows, rows < last, height, width, FEATURES)
        dw = dot(tl.trans(z), shifted, dw, PRECISION)
    pointers = weight_partials + split.to(tl.int64) * dweight_size
    columns = f * weight_f + (dy + 1) * weight_y + (dx + 1) * weight_x
    pointers += (c * WEIGHT_C)[:, None] + columns[None, :]
    tl.store(pointers, dw, (c < channels)[:, None] & (real & (f < features))[None, :])


@kernel
def norm_relu_avg_pool_backward(
    out_grad, value, value_stride, grad, grad_stride,
    norm_mean, norm_rstd, norm_weight, norm_bias, partial,
    height, width, window_h, window_w, num_rows, channels, rows_per_split,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, GRAD_VECTOR: tl.constexpr,
):  # fmt: skip
    """Backward of the average over windows; pixels outside of every window have gradient 0."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(1)
    last = tl.minimum((split + 1) * rows_per_split, num_rows)
    scale, bias = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    dbeta, dgamma = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    for start in range(split * rows_per_split, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = tile_mask(rows < last, c < channels, VECTOR)
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        out_h, out_w = height // window_h, width // window_w
        y, left = rows // width % height // window_h, rows % width // window_w
        window = (rows // (height * width) * out_h + y) * out_w + left
        d_mask = tile_mask((rows < last) & (y < out_h) & (left < out_w), c < channels, GRAD_VECTOR)
        d = tl.load(tile_pointers(out_grad, window, channels, c, GRAD_VECTOR), d_mask, 0.0)
        dz = d.to(tl.float32) * (1.0 / (window_h * window_w))
        sums = add_gradient(
            dz, x, normalise(x, scale, bias), norm_mean, scale, grad, grad_stride, rows, c, mask,
            c < channels, True, VECTOR,
        )  # fmt: skip
        dbeta += sums[0]
        dgamma += sums[1]
    store_sums(partial, split, dbeta, dgamma, c, channels)


@kernel
def reduce_partials(
    partial, num_splits, norm_rstd, norm_weight, mean_correction, var_correction,
    dbeta, dgamma, num_rows, channels,
    weight_partials, num_weight_partials, dweight, dweight_size,
    NORM_SPLITS: tl.constexpr, NORM_CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Add the shares of all programs: the first programs dbeta and dgamma, the others dweight."""
    blocks = tl.cdiv(channels, NORM_CHANNELS)
    block = tl.program_id(0)
    if block < blocks:
        c = block * NORM_CHANNELS + tl.arange(0, NORM_CHANNELS)
        inside = c < channels
        total_beta = sum_partials(partial, num_splits, 2 * channels, c, inside, NORM_SPLITS)
        total_gamma = sum_partials(
            partial + channels, num_splits, 2 * channels, c, inside, NORM_SPLITS
        )
        rstd = tl.load(norm_rstd + c, inside, 0.0)
        total_gamma *= rstd
        tl.store(dbeta + c, total_beta, inside)
        tl.store(dgamma + c, total_gamma, inside)
        scale = tl.load(norm_weight + c, inside, 0.0).to(tl.float32) * rstd / num_rows
        tl.store(
            mean_correction + c,
            tl.load(mean_correction + c, inside, 0.0) + scale * total_beta,
            inside,
        )
        tl.store(
            var_correction + c,
            tl.load(var_correction + c, inside, 0.0) + scale * total_gamma,
            inside,
        )
    elif weight_partials is not None:
        i = (block - blocks) * ELEMENTS + tl.arange(0, ELEMENTS)
        total = sum_partials(
            weight_partials, num_weight_partials, dweight_size, i, i < dweight_size, SPLITS
        )
        tl.store(dweight + i, total, i < dweight_size)


@triton.jit
def sum_partials(partial, num_splits, stride, column, inside, SPLITS: tl.constexpr):
    """The sum over rows of a matrix (num_splits, stride), in a fixed order."""
    total = tl.zeros(column.shape, tl.float32)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        pointers = partial + (split.to(tl.int64) * stride)[:, None] + column[None, :]
        total += tl.sum(tl.load(pointers, (split < num_splits)[:, None] & inside[None, :], 0.0), 0)
    return total
