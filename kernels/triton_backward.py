"""Run the backward operations: a program handles one split (block of rows) of a channel block.

It recomputes Z, computes dz, the gradient of the norm's output, adds scale * dz to `grad`, and
sums over rows: dbeta, dgamma and dweight. kernels/triton_common.py explains the parameters,
kernels/triton_reduce.py how the programs of a launch combine their sums.
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
from kernels.triton_reduce import reduce_norm_grads, reduce_weight_grad, store_row


@triton.jit
def corrections(mean, rstd, mean_correction, var_correction, c, inside):
    """Return (factor, offset), (CHANNELS,): the corrections of a gradient are x * factor + offset.

    They are mean_correction + (x - mean) * rstd * var_correction: see kernels/feature_maps.py.
    """
    factor = tl.load(rstd + c, inside, 0.0) * tl.load(var_correction + c, inside, 0.0)
    offset = tl.load(mean_correction + c, inside, 0.0) - tl.load(mean + c, inside, 0.0) * factor
    return factor, offset


@kernel
def complete_gradient(
    grad, grad_stride, value, value_stride, mean, rstd, mean_correction, var_correction,
    seed, layer_id, first_row, threshold, keep_scale,
    target, target_stride, num_rows, channels, columns,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Compute mask * (grad - mean_correction - (value - mean) * rstd * var_correction), (M, C).

    See kernels/feature_maps.py. Without `mean` no norm reads the maps, and `grad` is complete.
    Program (i, j) computes row block i, channel block j. The target has `columns` >= C columns and
    becomes 0 from C on: conv3x3_backward reads whole tiles without a mask.
    """
    wait_for_previous_kernel(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = tile_mask(rows < num_rows, c < channels, VECTOR)
    out = tl.load(tile_pointers(grad, rows, grad_stride, c, VECTOR), mask, 0.0).to(tl.float32)
    if mean is not None:
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        factor, offset = corrections(mean, rstd, mean_correction, var_correction, c, c < channels)
        out -= normalise(x, factor, offset)
    if seed is not None:
        out = apply_dropout(
            out, rows, c, channels, seed, layer_id, first_row, threshold, keep_scale
        )
    out = tl.where(c[None, :] < channels, out, 0.0).to(target.dtype.element_ty)
    mask = tile_mask(rows < num_rows, c < columns, TARGET_VECTOR)
    tl.store(tile_pointers(target, rows, target_stride, c, TARGET_VECTOR), out, mask)


@triton.jit
def add_gradient(
    dz, x, normed, centre, scale, grad, grad_stride, rows, c, mask,
    OVERWRITE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Mask dz by the ReLU, and add scale * dz to `grad`, or overwrite it if OVERWRITE.

    Returns (ROWS, CHANNELS) each: dz, and dz * (x - mean), whose sums over rows are dbeta and
    dgamma / rstd; `centre` is the mean, (CHANNELS,).
    """
    dz = tl.where(normed <= 0, 0.0, dz)
    pointers = tile_pointers(grad, rows, grad_stride, c, VECTOR)
    out = dz * scale[None, :]
    if not OVERWRITE:
        out += tl.load(pointers, mask, 0.0).to(tl.float32)
    tl.store(pointers, out.to(grad.dtype.element_ty), mask)
    # Subtract the mean before the sum: sum(dz * x) - mean * sum(dz) would lose digits.
    return dz, dz * (x.to(tl.float32) - centre[None, :])


@triton.jit
def complete(grad, x, factor, offset, mask):
    """Return a gradient (ROWS, CHANNELS) of x less its corrections, and 0 outside of the mask."""
    return tl.where(mask, grad.to(tl.float32) - normalise(x, factor, offset), 0.0).to(grad.dtype)


@triton.jit
def fold_rows(x):
    """Add up rows 8 apart of (ROWS, CHANNELS): (ROWS // 16, 8, CHANNELS).

    In the layout of a product's result a thread has both rows, so that it needs no other thread.
    """
    return tl.sum(tl.reshape(x, [x.shape[0] // 16, 2, 8, x.shape[1]]), 1)


@triton.jit
def conv1x1_grads(
    d, d_stride, output, output_stride, output_mean, output_rstd, output_mean_correction,
    output_var_correction, value, value_stride, grad, grad_stride,
    norm_mean, norm_scale, norm_shift, weight, weight_f, c, channels, f, out_channels, first, last,
    OVERWRITE: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr, NORM_VECTOR: tl.constexpr,
    TARGET_VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr, WEIGHT_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Handle rows [first, last); return dbeta and dgamma / rstd, (C,), and dW^T, (C, F)."""
    scale = load_channels(norm_scale, c, channels, NORM_VECTOR)
    shift = load_channels(norm_shift, c, channels, NORM_VECTOR)
    centre = load_channels(norm_mean, c, channels, NORM_VECTOR)
    w = load_weight(
        weight, f * weight_f, f < out_channels, c, c < channels, WEIGHT_C, WEIGHT_VECTOR
    ).to(value.dtype.element_ty)
    if output is not None:
        factor, offset = corrections(
            output_mean, output_rstd, output_mean_correction, output_var_correction,
            f, f < out_channels,
        )  # fmt: skip
    # Keep the sums over the rows in registers until the last tile.
    dbeta = tl.zeros([ROWS // 16, 8, c.shape[0]], tl.float32)
    dgamma = tl.zeros([ROWS // 16, 8, c.shape[0]], tl.float32)
    dw = tl.zeros([c.shape[0], f.shape[0]], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        # For rows beyond the split d is 0: they add nothing to any sum.
        d_mask = tile_mask(rows < last, f < out_channels, TARGET_VECTOR)
        upstream = tl.load(tile_pointers(d, rows, d_stride, f, TARGET_VECTOR), d_mask, 0.0)
        if output is not None:
            y = tl.load(tile_pointers(output, rows, output_stride, f, TARGET_VECTOR), d_mask, 0.0)
            upstream = complete(upstream, y, factor, offset, d_mask)
        mask = tile_mask(rows < last, c < channels, VECTOR)
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        normed = normalise(x, scale, shift)
        # Load d and x once for both products.
        dw = dot(tl.trans(relu(normed).to(x.dtype)), upstream, dw, PRECISION)
        dz = dot(upstream, tl.trans(w), tl.zeros([ROWS, c.shape[0]], tl.float32), PRECISION)
        terms = add_gradient(
            dz, x, normed, centre, scale, grad, grad_stride, rows, c, mask, OVERWRITE, VECTOR
        )
        dbeta += fold_rows(terms[0])
        dgamma += fold_rows(terms[1])
    return tl.sum(tl.sum(dbeta, 0), 0), tl.sum(tl.sum(dgamma, 0), 0), dw


@kernel
def conv1x1_backward(
    d, d_stride, output, output_stride, output_mean, output_rstd, output_mean_correction,
    output_var_correction, value, value_stride, grad, grad_stride,
    norm_mean, norm_rstd, norm_scale, norm_shift, weight, weight_f, weight_y, weight_x,
    partial, counters, num_splits, num_groups, group_bits,
    mean_correction, var_correction, dbeta, dgamma, weight_partials, dweight,
    num_rows, channels, out_channels, first_out_channel, rows_per_split,
    OVERWRITE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr, SUM_ROWS: tl.constexpr, VECTOR: tl.constexpr,
    NORM_VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute dz = d W and dW = d^T Z of conv1x1 from its output gradient `d`, (M, F).

    With `output`, the maps that conv1x1 wrote, `d` lacks the corrections of the norm that reads
    them. Program (i, j) handles channel block i of split j, `rows_per_split` rows. To keep d and W
    in registers, a launch takes OUT_CHANNELS of the F output channels, from `first_out_channel` on.
    Further launches add to `grad`, dbeta and dgamma.
    """
    wait_for_previous_kernel(PDL)
    block, split = tl.program_id(0), tl.program_id(1)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    f = first_out_channel + tl.arange(0, OUT_CHANNELS)
    last = tl.minimum((split + 1) * rows_per_split, num_rows)
    dbeta_sum, dgamma_sum, dw = conv1x1_grads(
        d, d_stride, output, output_stride, output_mean, output_rstd, output_mean_correction,
        output_var_correction, value, value_stride, grad, grad_stride,
        norm_mean, norm_scale, norm_shift, weight, weight_f, c, channels, f, out_channels,
        split * rows_per_split, last, OVERWRITE, ROWS, VECTOR, NORM_VECTOR, TARGET_VECTOR,
        WEIGHT_C, WEIGHT_VECTOR, PRECISION,
    )  # fmt: skip
    store_row(partial, split, dbeta_sum, dgamma_sum, c, channels)
    reduce_norm_grads(
        partial, counters + block * (1 + num_groups), split, num_splits, num_groups, group_bits,
        c, channels, num_rows, norm_rstd, norm_scale,
        mean_correction, var_correction, dbeta, dgamma, ADD, SUM_ROWS,
    )  # fmt: skip
    # The counters of the weight's gradient follow those of the norm's.
    reduce_weight_grad(
        dw, weight_partials, counters + (tl.num_programs(0) + block) * (1 + num_groups),
        split, num_splits, num_groups, group_bits, dweight,
        c, channels, f * weight_f, f < out_channels, WEIGHT_C,
    )  # fmt: skip


@triton.jit
def tap_columns(group, OUT_CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """Split a tile's columns into TAPS taps (dy, dx) of a 3x3 filter, OUT_CHANNELS columns each.

    With few output channels a product is too narrow; three taps side by side widen it. They take
    the space of four, as the width of a tile is a power of two. Returns each column's output
    channel, its tap 3 * (dy + 1) + dx + 1, and whether it belongs to a tap.
    """
    column = tl.arange(0, OUT_CHANNELS if TAPS == 1 else 4 * OUT_CHANNELS)
    tap = group * TAPS + column // OUT_CHANNELS
    return column % OUT_CHANNELS, tap, column // OUT_CHANNELS < TAPS


@triton.jit
def load_shifted(d, f, tap, real, rows, taps, WIDTH: tl.constexpr, OUT_CHANNELS: tl.constexpr):
    """Load d of the output pixel that read each row through each column's tap: (rows, columns).

    Output pixel p reads input pixel p + (dy, dx): input pixel r was read by r - (dy, dx), whose
    place in `taps`, of `taps_in_image`, is 8 - tap. `d` has exactly OUT_CHANNELS columns, which are
    0 from F on: see `complete_gradient`.
    """
    bit = tl.where(real, 1 << (8 - tap), 0)
    mask = tl.max_constancy((taps[:, None] & bit[None, :]) != 0, [1, OUT_CHANNELS])
    offset = f - ((tap // 3 - 1) * WIDTH + tap % 3 - 1) * OUT_CHANNELS
    pointers = d + (rows.to(tl.int64) * OUT_CHANNELS)[:, None] + offset[None, :]
    return tl.load(tl.multiple_of(pointers, [1, 16]), mask, 0.0)


@kernel
def conv3x3_backward(
    d, z, value, value_stride, grad, grad_stride, norm_mean, norm_rstd, norm_scale, norm_shift,
    weight, weight_f, weight_y, weight_x,
    partial, counters, num_splits, num_groups, group_bits,
    mean_correction, var_correction, dbeta, dgamma,
    num_rows, channels, out_channels, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    OVERWRITE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, SUM_ROWS: tl.constexpr, VECTOR: tl.constexpr, NORM_VECTOR: tl.constexpr,
    WEIGHT_C: tl.constexpr, WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute dz of conv3x3: the sum over taps of shifted(d) W[:, :, dy + 1, dx + 1].

    `d` is the complete gradient of the output, (M, OUT_CHANNELS), 0 from column F on. Program
    (i, j) computes a (ROWS, CHANNELS) tile of dz, of row block i and channel block j. It also
    writes Z to `z`, a contiguous (M, C), unless that is None.
    """
    wait_for_previous_kernel(PDL)
    split, block = tl.program_id(0), tl.program_id(1)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    rows = split * ROWS + tl.arange(0, ROWS)
    dz = tl.zeros([ROWS, CHANNELS], tl.float32)
    taps = taps_in_image(rows, rows < num_rows, HEIGHT, WIDTH)
    # Multiply TAPS taps at a time.
    for group in range(9 // TAPS):
        f, tap, real = tap_columns(group, OUT_CHANNELS, TAPS)
        shifted = load_shifted(d, f, tap, real, rows, taps, WIDTH, OUT_CHANNELS)
        columns = f * weight_f + tap // 3 * weight_y + tap % 3 * weight_x
        used = real & (f < out_channels)
        w = load_weight(weight, columns, used, c, c < channels, WEIGHT_C, WEIGHT_VECTOR)
        dz = dot(shifted, tl.trans(w.to(shifted.dtype)), dz, PRECISION)
    # Load x only now: earlier it would occupy registers during the products.
    mask = tile_mask(rows < num_rows, c < channels, VECTOR)
    x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
    scale = load_channels(norm_scale, c, channels, NORM_VECTOR)
    normed = normalise(x, scale, load_channels(norm_shift, c, channels, NORM_VECTOR))
    if z is not None:
        tl.store(tile_pointers(z, rows, channels, c, VECTOR), relu(normed).to(x.dtype), mask)
    dz, dz_centred = add_gradient(
        dz, x, normed, load_channels(norm_mean, c, channels, NORM_VECTOR), scale,
        grad, grad_stride, rows, c, mask, OVERWRITE, VECTOR,
    )  # fmt: skip
    store_row(partial, split, tl.sum(dz, 0), tl.sum(dz_centred, 0), c, channels)
    reduce_norm_grads(
        partial, counters + block * (1 + num_groups),
        split, num_splits, num_groups, group_bits, c, channels, num_rows,
        norm_rstd, norm_scale, mean_correction, var_correction, dbeta, dgamma, False, SUM_ROWS,
    )  # fmt: skip


@kernel
def conv3x3_weight_backward(
    d, value, value_stride, norm_scale, norm_shift, weight, weight_f, weight_y, weight_x,
    weight_partials, counters, num_splits, num_groups, group_bits, dweight,
    num_rows, channels, out_channels, rows_per_split, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, TAPS: tl.constexpr,
    VECTOR: tl.constexpr, NORM_VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute dW[:, :, dy + 1, dx + 1] = shifted(d)^T Z of conv3x3; `d` as in conv3x3_backward.

    Program (i, j) sums TAPS taps of one channel block over split j, `rows_per_split` rows.
    """
    wait_for_previous_kernel(PDL)
    groups: tl.constexpr = 9 // TAPS
    c = tl.program_id(0) // groups * CHANNELS + tl.arange(0, CHANNELS)
    f, tap, real = tap_columns(tl.program_id(0) % groups, OUT_CHANNELS, TAPS)
    split = tl.program_id(1)
    last = tl.minimum((split + 1) * rows_per_split, num_rows)
    if norm_scale is not None:
        scale = load_channels(norm_scale, c, channels, NORM_VECTOR)
        shift = load_channels(norm_shift, c, channels, NORM_VECTOR)
    dw = tl.zeros([CHANNELS, OUT_CHANNELS if TAPS == 1 else 4 * OUT_CHANNELS], tl.float32)
    for start in range(split * rows_per_split, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = tile_mask(rows < last, c < channels, VECTOR)
        z = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        if norm_scale is not None:
            z = relu(normalise(z, scale, shift)).to(z.dtype)
        # d is 0 for rows beyond the split and for pixels outside the image.
        taps = taps_in_image(rows, rows < last, HEIGHT, WIDTH)
        shifted = load_shifted(d, f, tap, real, rows, taps, WIDTH, OUT_CHANNELS)
        dw = dot(tl.trans(z), shifted, dw, PRECISION)
    columns = f * weight_f + tap // 3 * weight_y + tap % 3 * weight_x
    reduce_weight_grad(
        dw, weight_partials, counters + tl.program_id(0) * (1 + num_groups),
        split, num_splits, num_groups, group_bits, dweight,
        c, channels, columns, real & (f < out_channels), WEIGHT_C,
    )  # fmt: skip


@kernel
def norm_relu_avg_pool_backward(
    out_grad, value, value_stride, grad, grad_stride, norm_mean, norm_rstd, norm_scale, norm_shift,
    partial, counters, num_splits, num_groups, group_bits,
    mean_correction, var_correction, dbeta, dgamma,
    num_rows, channels, rows_per_split, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    SUM_ROWS: tl.constexpr, VECTOR: tl.constexpr, NORM_VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute dz of norm_relu_avg_pool: out_grad of the pixel's window / area, 0 without a window.

    Program (i, j) handles channel block i of split j, `rows_per_split` rows of the input.
    """
    wait_for_previous_kernel(PDL)
    block, split = tl.program_id(0), tl.program_id(1)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    last = tl.minimum((split + 1) * rows_per_split, num_rows)
    scale = load_channels(norm_scale, c, channels, NORM_VECTOR)
    shift = load_channels(norm_shift, c, channels, NORM_VECTOR)
    centre = load_channels(norm_mean, c, channels, NORM_VECTOR)
    out_h: tl.constexpr = HEIGHT // WINDOW_H
    out_w: tl.constexpr = WIDTH // WINDOW_W
    dbeta_rows = tl.zeros([ROWS, CHANNELS], tl.float32)
    dgamma_rows = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(split * rows_per_split, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = tile_mask(rows < last, c < channels, VECTOR)
        x = tl.load(tile_pointers(value, rows, value_stride, c, VECTOR), mask, 0.0)
        # Find the row of out_grad that belongs to each pixel's window.
        y, left = rows // WIDTH % HEIGHT // WINDOW_H, rows % WIDTH // WINDOW_W
        window = (rows // (HEIGHT * WIDTH) * out_h + y) * out_w + left
        d_mask = tile_mask((rows < last) & (y < out_h) & (left < out_w), c < channels, GRAD_VECTOR)
        d = tl.load(tile_pointers(out_grad, window, channels, c, GRAD_VECTOR), d_mask, 0.0)
        dz = d.to(tl.float32) * (1.0 / (WINDOW_H * WINDOW_W))
        terms = add_gradient(
            dz, x, normalise(x, scale, shift), centre, scale,
            grad, grad_stride, rows, c, mask, True, VECTOR,
        )  # fmt: skip
        dbeta_rows += terms[0]
        dgamma_rows += terms[1]
    store_row(partial, split, tl.sum(dbeta_rows, 0), tl.sum(dgamma_rows, 0), c, channels)
    reduce_norm_grads(
        partial, counters + block * (1 + num_groups),
        split, num_splits, num_groups, group_bits, c, channels, num_rows,
        norm_rstd, norm_scale, mean_correction, var_correction, dbeta, dgamma, False, SUM_ROWS,
    )  # fmt: skip
