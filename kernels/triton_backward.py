"""Run the backward operations: a program handles one split (block of rows) of a channel block.

It recomputes Z, computes dz, the gradient of the norm's output, adds scale * dz to `grad`, and
stores its sums over rows: dbeta, dgamma and dweight. `reduce_partials` adds these partial sums in
a fixed order, as reduce_stats does. kernels/triton_common.py explains the parameters.
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
    """Compute mask * (grad - mean_correction - (value - mean) * rstd * var_correction), (M, C).

    See kernels/feature_maps.py. Without `mean` no norm reads the maps, and `grad` is complete.
    Program (i, j) computes row block i, channel block j. The target has `columns` >= C columns and
    becomes 0 from C on: conv3x3_backward reads whole tiles without a mask.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = tile_mask(rows < num_rows, c < channels, VECTOR)
    out = tl.load(tile_pointers(grad, rows, grad_stride, c, VECTOR), mask, 0.0).to(tl.float32)
    if mean is not None:
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        # Compute both corrections as one affine function of x.
        inside = c < channels
        factor = tl.load(rstd + c, inside, 0.0) * tl.load(var_correction + c, inside, 0.0)
        offset = tl.load(mean_correction + c, inside, 0.0)
        out -= normalise(x, factor, offset - tl.load(mean + c, inside, 0.0) * factor)
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
    """Mask dz by the ReLU, and add scale * dz to `grad`, or overwrite it if OVERWRITE.

    Returns sums over the tile's rows, (CHANNELS,) each: dbeta, of dz, and dgamma / rstd, of
    dz * (x - mean).
    """
    dz = tl.where(normed <= 0, 0.0, dz)
    pointers = tile_pointers(grad, rows, grad_stride, c, VECTOR)
    out = dz * scale[None, :]
    if not OVERWRITE:
        out += tl.load(pointers, mask, 0.0).to(tl.float32)
    tl.store(pointers, out.to(grad.dtype.element_ty), mask)
    # Subtract the mean before the sum: sum(dz * x) - mean * sum(dz) would lose digits.
    centred = x.to(tl.float32) - tl.load(norm_mean + c, inside, 0.0)[None, :]
    return tl.sum(dz, 0), tl.sum(dz * centred, 0)


@triton.jit
def store_sums(partial, split, dbeta, dgamma, c, channels):
    """Store the sums of one program, (CHANNELS,) each, in partial, (splits, 2, C)."""
    tl.store(partial + (2 * split) * channels + c, dbeta, c < channels)
    tl.store(partial + (2 * split + 1) * channels + c, dgamma, c < channels)


@kernel
def conv1x1_backward(
    d, d_stride, value, value_stride, grad, grad_stride,
    norm_mean, norm_rstd, norm_weight, norm_bias,
    weight, weight_f, weight_y, weight_x, partial, weight_partials, dweight_size,
    height, width, num_rows, channels, out_channels, first_out_channel, rows_per_split, first_split,
    OVERWRITE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dz = d W and dW = d^T Z of conv1x1 from its complete output gradient `d`, (M, F).

    Program (i, j) handles channel block i of split j, `rows_per_split` rows. To keep d and W in
    registers, a launch takes OUT_CHANNELS of the F output channels, from `first_out_channel` on.
    Further launches add to `grad`, and store their sums from `first_split` on.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(1)
    f = first_out_channel + tl.arange(0, OUT_CHANNELS)
    last = tl.minimum((split + 1) * rows_per_split, num_rows)
    scale, shift = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    w = load_weight(
        weight, f * weight_f, f < out_channels, c, c < channels, WEIGHT_C, WEIGHT_VECTOR
    ).to(value.dtype.element_ty)
    # Keep the sums over the split's rows in registers until its last tile.
    dbeta, dgamma = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    dw = tl.zeros([CHANNELS, OUT_CHANNELS], tl.float32)
    for start in range(split * rows_per_split, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        # For rows beyond the split load d = 0: they add nothing to any sum.
        d_mask = tile_mask(rows < last, f < out_channels, TARGET_VECTOR)
        upstream = tl.load(tile_pointers(d, rows, d_stride, f, TARGET_VECTOR), d_mask, 0.0)
        mask = tile_mask(rows < last, c < channels, VECTOR)
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        normed = normalise(x, scale, shift)
        z = relu(normed).to(x.dtype)
        # Load d and x once for both products; dw is dW^T, (CHANNELS, OUT_CHANNELS).
        dw = dot(tl.trans(z), upstream, dw, PRECISION)
        dz = dot(upstream, tl.trans(w), tl.zeros([ROWS, CHANNELS], tl.float32), PRECISION)
        sums = add_gradient(
            dz, x, normed, norm_mean, scale, grad, grad_stride, rows, c, mask, c < channels,
            OVERWRITE, VECTOR,
        )  # fmt: skip
        dbeta += sums[0]
        dgamma += sums[1]
    store_sums(partial, first_split + split, dbeta, dgamma, c, channels)
    # weight_partials[split] has the weight's strides; each launch writes its own output channels.
    pointers = weight_partials + split.to(tl.int64) * dweight_size
    pointers += (c * WEIGHT_C)[:, None] + (f * weight_f)[None, :]
    tl.store(pointers, dw, (c < channels)[:, None] & (f < out_channels)[None, :])


@triton.jit
def tap_columns(group, OUT_CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """Split a tile's columns into TAPS taps (dy, dx) of a 3x3 filter, OUT_CHANNELS columns each.

    With few output channels a product is too narrow; three taps side by side widen it. They take
    the space of four, as the width of a tile is a power of two. Returns each column's output
    channel, its dy and dx in -1..1, and whether it belongs to a tap.
    """
    column = tl.arange(0, OUT_CHANNELS if TAPS == 1 else 4 * OUT_CHANNELS)
    tap = group * TAPS + column // OUT_CHANNELS
    return column % OUT_CHANNELS, tap // 3 - 1, tap % 3 - 1, column // OUT_CHANNELS < TAPS


@triton.jit
def load_shifted(d, f, dy, dx, real, rows, inside, height, width, OUT_CHANNELS: tl.constexpr):
    """Load d of the output pixel that read each row through each column's tap: (rows, columns).

    Output pixel p reads input pixel p + (dy, dx): input pixel r was read by r - (dy, dx). `d` has
    exactly OUT_CHANNELS columns, which are 0 from F on: see `complete_gradient`.
    """
    in_image = shifted_mask(
        rows[:, None], inside[:, None], -dy[None, :], -dx[None, :], height, width
    )
    mask = tl.max_constancy(in_image & real[None, :], [1, OUT_CHANNELS])
    offset = f - (dy * width + dx) * OUT_CHANNELS
    pointers = d + (rows.to(tl.int64) * OUT_CHANNELS)[:, None] + offset[None, :]
    return tl.load(tl.multiple_of(pointers, [1, 16]), mask, 0.0)


@kernel
def conv3x3_backward(
    d, value, value_stride, grad, grad_stride, norm_mean, norm_rstd, norm_weight, norm_bias,
    weight, weight_f, weight_y, weight_x, partial,
    height, width, num_rows, channels, out_channels,
    OVERWRITE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dz of conv3x3: the sum over taps of shifted(d) W[:, :, dy + 1, dx + 1].

    `d` is the complete gradient of the output, (M, OUT_CHANNELS), 0 from column F on. A program
    computes a (ROWS, CHANNELS) tile of dz; consecutive programs share their rows.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    split = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    rows = split * ROWS + tl.arange(0, ROWS)
    dz = tl.zeros([ROWS, CHANNELS], tl.float32)
    # Multiply TAPS taps at a time.
    for group in range(9 // TAPS):
        f, dy, dx, real = tap_columns(group, OUT_CHANNELS, TAPS)
        shifted = load_shifted(
            d, f, dy, dx, real, rows, rows < num_rows, height, width, OUT_CHANNELS
        )
        columns = f * weight_f + (dy + 1) * weight_y + (dx + 1) * weight_x
        used = real & (f < out_channels)
        w = load_weight(weight, columns, used, c, c < channels, WEIGHT_C, WEIGHT_VECTOR)
        dz = dot(shifted, tl.trans(w.to(shifted.dtype)), dz, PRECISION)
    # Load x only now: earlier it would occupy registers during the products.
    mask = tile_mask(rows < num_rows, c < channels, VECTOR)
    x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
    scale, shift = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    dbeta, dgamma = add_gradient(
        dz, x, normalise(x, scale, shift), norm_mean, scale, grad, grad_stride, rows, c, mask,
        c < channels, OVERWRITE, VECTOR,
    )  # fmt: skip
    store_sums(partial, split, dbeta, dgamma, c, channels)


@kernel
def conv3x3_weight_backward(
    d, value, value_stride, norm_mean, norm_rstd, norm_weight, norm_bias,
    weight, weight_f, weight_y, weight_x, weight_partials, dweight_size,
    height, width, num_rows, channels, out_channels, rows_per_split,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, TAPS: tl.constexpr,
    VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dW[:, :, dy + 1, dx + 1] = shifted(d)^T Z of conv3x3; `d` as in conv3x3_backward.

    Program (i, j) sums TAPS taps of one channel block over split j, `rows_per_split` rows, into
    weight_partials[j], which has the weight's strides.
    """
    groups: tl.constexpr = 9 // TAPS
    c = tl.program_id(0) // groups * CHANNELS + tl.arange(0, CHANNELS)
    f, dy, dx, real = tap_columns(tl.program_id(0) % groups, OUT_CHANNELS, TAPS)
    split = tl.program_id(1)
    last = tl.minimum((split + 1) * rows_per_split, num_rows)
    scale, shift = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    dw = tl.zeros([CHANNELS, OUT_CHANNELS if TAPS == 1 else 4 * OUT_CHANNELS], tl.float32)
    for start in range(split * rows_per_split, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = tile_mask(rows < last, c < channels, VECTOR)
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        z = relu(normalise(x, scale, shift)).to(x.dtype)
        # d is 0 for rows beyond the split and for pixels outside the image.
        shifted = load_shifted(d, f, dy, dx, real, rows, rows < last, height, width, OUT_CHANNELS)
        dw = dot(tl.trans(z), shifted, dw, PRECISION)
    pointers = weight_partials + split.to(tl.int64) * dweight_size
    columns = f * weight_f + (dy + 1) * weight_y + (dx + 1) * weight_x
    pointers += (c * WEIGHT_C)[:, None] + columns[None, :]
    tl.store(pointers, dw, (c < channels)[:, None] & (real & (f < out_channels))[None, :])


@kernel
def norm_relu_avg_pool_backward(
    out_grad, value, value_stride, grad, grad_stride,
    norm_mean, norm_rstd, norm_weight, norm_bias, partial,
    height, width, window_h, window_w, num_rows, channels, rows_per_split,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, GRAD_VECTOR: tl.constexpr,
):  # fmt: skip
    """Compute dz of norm_relu_avg_pool: out_grad of the pixel's window / area, 0 without a window.

    Program (i, j) handles channel block i of split j, `rows_per_split` rows of the input.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(1)
    last = tl.minimum((split + 1) * rows_per_split, num_rows)
    scale, shift = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    dbeta, dgamma = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    for start in range(split * rows_per_split, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = tile_mask(rows < last, c < channels, VECTOR)
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        # Find the row of out_grad that belongs to each pixel's window.
        out_h, out_w = height // window_h, width // window_w
        y, left = rows // width % height // window_h, rows % width // window_w
        window = (rows // (height * width) * out_h + y) * out_w + left
        d_mask = tile_mask((rows < last) & (y < out_h) & (left < out_w), c < channels, GRAD_VECTOR)
        d = tl.load(tile_pointers(out_grad, window, channels, c, GRAD_VECTOR), d_mask, 0.0)
        dz = d.to(tl.float32) * (1.0 / (window_h * window_w))
        sums = add_gradient(
            dz, x, normalise(x, scale, shift), norm_mean, scale, grad, grad_stride, rows, c, mask,
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
    """Add the partial sums of all programs: dbeta and dgamma, (C,), and dweight.

    The first programs handle NORM_CHANNELS channels each, and add to the input's corrections
    (kernels/feature_maps.py); the others handle ELEMENTS elements of the weight each. One launch
    does both, since a launch costs more than these sums.
    """
    blocks = tl.cdiv(channels, NORM_CHANNELS)
    block = tl.program_id(0)
    if block < blocks:
        c = block * NORM_CHANNELS + tl.arange(0, NORM_CHANNELS)
        inside = c < channels
        sums, stride = partial + c, 2 * channels
        total_beta = sum_partials(sums, num_splits, stride, inside, NORM_SPLITS)
        rstd = tl.load(norm_rstd + c, inside, 0.0)
        total_gamma = sum_partials(sums + channels, num_splits, stride, inside, NORM_SPLITS) * rstd
        tl.store(dbeta + c, total_beta, inside)
        tl.store(dgamma + c, total_gamma, inside)
        scale = tl.load(norm_weight + c, inside, 0.0).to(tl.float32) * rstd / num_rows
        add_to(mean_correction + c, scale * total_beta, inside)
        add_to(var_correction + c, scale * total_gamma, inside)
    elif weight_partials is not None:
        i = (block - blocks) * ELEMENTS + tl.arange(0, ELEMENTS)
        elements = weight_partials + i
        total = sum_partials(elements, num_weight_partials, dweight_size, i < dweight_size, SPLITS)
        tl.store(dweight + i, total, i < dweight_size)


@triton.jit
def sum_partials(pointers, num_splits, stride, inside, SPLITS: tl.constexpr):
    """Sum each column of a matrix, whose rows are `stride` apart, in a fixed order."""
    total = tl.zeros(pointers.shape, tl.float32)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        rows = pointers[None, :] + (split.to(tl.int64) * stride)[:, None]
        total += tl.sum(tl.load(rows, (split < num_splits)[:, None] & inside[None, :], 0.0), 0)
    return total


@triton.jit
def add_to(pointers, x, inside):
    """Add x to values in memory that no other program writes."""
    tl.store(pointers, tl.load(pointers, inside, 0.0) + x, inside)
