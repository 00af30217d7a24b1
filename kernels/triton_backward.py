"""Backward kernels: each program handles some rows of a block of the source's channels.

It recomputes Z, forms dz, the gradient at the norm's output where Z > 0, adds scale * dz to the
gradient of the source and keeps its share of the sums over rows: dbeta, dgamma and the gradient of
the weight. `finish` adds the shares in a fixed order, so that every run gives the same bits.
"""

import triton
import triton.language as tl

from kernels.triton_common import (
    affine,
    dropped,
    inside_of,
    kernel,
    load_weight,
    multiply,
    neighbours,
    normalise,
    place_of,
    relu,
)


@kernel
def gradient(
    grad, grad_stride, value, value_stride, mean, rstd, shift, slope,
    seed, place, first_row, threshold, keep_scale,
    target, target_stride, num_rows, channels, columns,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr,
):  # fmt: skip
    """The complete gradient (kernels/feature_maps.py) through dropout; 0 in columns >= channels.

    Without `mean` no norm has read the maps, and `grad` is complete.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = inside_of(rows < num_rows, c < channels, VECTOR)
    out = tl.load(place_of(grad, rows, grad_stride, c, VECTOR), mask, 0.0).to(tl.float32)
    if mean is not None:
        x = tl.load(place_of(value, rows, value_stride, c, VECTOR), mask, 0.0)
        factor = tl.load(rstd + c, c < channels, 0.0) * tl.load(slope + c, c < channels, 0.0)
        offset = tl.load(shift + c, c < channels, 0.0)
        out -= normalise(x, factor, offset - tl.load(mean + c, c < channels, 0.0) * factor)
    if seed is not None:
        out = dropped(out, rows, c, channels, seed, place, first_row, threshold, keep_scale)
    out = tl.where(c[None, :] < channels, out, 0.0).to(target.dtype.element_ty)
    mask = inside_of(rows < num_rows, c < columns, TARGET_VECTOR)
    tl.store(place_of(target, rows, target_stride, c, TARGET_VECTOR), out, mask)


@triton.jit
def add_gradient(
    dz, x, normed, norm_mean, scale, grad, grad_stride, rows, c, mask, inside,
    FIRST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Mask dz by the ReLU, add scale * dz to `grad`; sum dz and dz * (x - mean) over the rows."""
    dz = tl.where(normed <= 0, 0.0, dz)
    place = place_of(grad, rows, grad_stride, c, VECTOR)
    out = dz * scale[None, :]
    if not FIRST:
        out += tl.load(place, mask, 0.0).to(tl.float32)
    tl.store(place, out.to(grad.dtype.element_ty), mask)
    centred = x.to(tl.float32) - tl.load(norm_mean + c, inside, 0.0)[None, :]
    return tl.sum(dz, 0), tl.sum(dz * centred, 0)


@triton.jit
def store_sums(partial, part, dbeta, dgamma, c, channels):
    """Keep the sums of one program: (programs, 2, channels)."""
    tl.store(partial + (2 * part) * channels + c, dbeta, c < channels)
    tl.store(partial + (2 * part + 1) * channels + c, dgamma, c < channels)


@kernel
def product_backward(
    d, d_stride, value, value_stride, grad, grad_stride,
    norm_mean, norm_rstd, norm_weight, norm_bias,
    weight, weight_f, weight_y, weight_x, partial, dweights, dweight_size,
    height, width, num_rows, channels, features, first_feature, rows_each, first_part,
    FIRST: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
    VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of the 1x1 convolution, given the complete gradient `d` of its output.

    A launch takes FEATURES features, from `first_feature` on.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    f = first_feature + tl.arange(0, FEATURES)
    last = tl.minimum((part + 1) * rows_each, num_rows)
    scale, bias = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    w = load_weight(
        weight, f * weight_f, f < features, c, c < channels, WEIGHT_C, WEIGHT_VECTOR
    ).to(value.dtype.element_ty)
    dbeta, dgamma = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    dw = tl.zeros([CHANNELS, FEATURES], tl.float32)
    for start in range(part * rows_each, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        d_mask = inside_of(rows < last, f < features, TARGET_VECTOR)
        upstream = tl.load(place_of(d, rows, d_stride, f, TARGET_VECTOR), d_mask, 0.0)
        mask = inside_of(rows < last, c < channels, VECTOR)
        x = tl.load(place_of(value, rows, value_stride, c, VECTOR), mask, 0.0)
        normed = normalise(x, scale, bias)
        z = relu(normed).to(x.dtype)
        dw = multiply(tl.trans(z), upstream, dw, PRECISION)
        dz = multiply(upstream, tl.trans(w), tl.zeros([ROWS, CHANNELS], tl.float32), PRECISION)
        sums = add_gradient(
            dz, x, normed, norm_mean, scale, grad, grad_stride, rows, c, mask, c < channels,
            FIRST, VECTOR,
        )  # fmt: skip
        dbeta += sums[0]
        dgamma += sums[1]
    store_sums(partial, first_part + part, dbeta, dgamma, c, channels)
    own = dweights + part.to(tl.int64) * dweight_size
    own += (c * WEIGHT_C)[:, None] + (f * weight_f)[None, :]
    tl.store(own, dw, (c < channels)[:, None] & (f < features)[None, :])


@triton.jit
def columns_of_taps(group, FEATURES: tl.constexpr, TAPS: tl.constexpr):
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
    near = neighbours(rows[:, None], inside[:, None], -dy[None, :], -dx[None, :], height, width)
    mask = tl.max_constancy(near & real[None, :], [1, FEATURES])
    shift = f - (dy * width + dx) * FEATURES
    place = d + (rows.to(tl.int64) * FEATURES)[:, None] + shift[None, :]
    return tl.load(tl.multiple_of(place, [1, 16]), mask, 0.0)


@kernel
def convolution_backward(
    d, value, value_stride, grad, grad_stride, norm_mean, norm_rstd, norm_weight, norm_bias,
    weight, weight_f, weight_y, weight_x, partial,
    height, width, num_rows, channels, features,
    FIRST: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
    TAPS: tl.constexpr, VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of the 3x3 convolution to its input, given the complete gradient of its output.

    `d` has FEATURES columns, of which those beyond `features` are 0.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    part = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    rows = part * ROWS + tl.arange(0, ROWS)
    dz = tl.zeros([ROWS, CHANNELS], tl.float32)
    for group in range(9 // TAPS):
        f, dy, dx, real = columns_of_taps(group, FEATURES, TAPS)
        shifted = load_shifted(d, f, dy, dx, real, rows, rows < num_rows, height, width, FEATURES)
        columns = f * weight_f + (dy + 1) * weight_y + (dx + 1) * weight_x
        used = real & (f < features)
        w = load_weight(weight, columns, used, c, c < channels, WEIGHT_C, WEIGHT_VECTOR)
        dz = multiply(shifted, tl.trans(w.to(shifted.dtype)), dz, PRECISION)
    mask = inside_of(rows < num_rows, c < channels, VECTOR)
    x = tl.load(place_of(value, rows, value_stride, c, VECTOR), mask, 0.0)
    scale, bias = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    dbeta, dgamma = add_gradient(
        dz, x, normalise(x, scale, bias), norm_mean, scale, grad, grad_stride, rows, c, mask,
        c < channels, FIRST, VECTOR,
    )  # fmt: skip
    store_sums(partial, part, dbeta, dgamma, c, channels)


@kernel
def convolution_weight(
    d, value, value_stride, norm_mean, norm_rstd, norm_weight, norm_bias,
    weight_f, weight_y, weight_x, dweights, dweight_size,
    height, width, num_rows, channels, features, rows_each,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr, TAPS: tl.constexpr,
    VECTOR: tl.constexpr, WEIGHT_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of the 3x3 convolution to its weight, some taps of a range of rows."""
    groups: tl.constexpr = 9 // TAPS
    c = tl.program_id(0) // groups * CHANNELS + tl.arange(0, CHANNELS)
    f, dy, dx, real = columns_of_taps(tl.program_id(0) % groups, FEATURES, TAPS)
    part = tl.program_id(1)
    last = tl.minimum((part + 1) * rows_each, num_rows)
    scale, bias = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    dw = tl.zeros([CHANNELS, FEATURES if TAPS == 1 else 4 * FEATURES], tl.float32)
    for start in range(part * rows_each, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = inside_of(rows < last, c < channels, VECTOR)
        x = tl.load(place_of(value, rows, value_stride, c, VECTOR), mask, 0.0)
        z = relu(normalise(x, scale, bias)).to(x.dtype)
        shifted = load_shifted(d, f, dy, dx, real, rows, rows < last, height, width, FEATURES)
        dw = multiply(tl.trans(z), shifted, dw, PRECISION)
    own = dweights + part.to(tl.int64) * dweight_size
    columns = f * weight_f + (dy + 1) * weight_y + (dx + 1) * weight_x
    own += (c * WEIGHT_C)[:, None] + columns[None, :]
    tl.store(own, dw, (c < channels)[:, None] & (real & (f < features))[None, :])


@kernel
def pool_backward(
    out_grad, value, value_stride, grad, grad_stride,
    norm_mean, norm_rstd, norm_weight, norm_bias, partial,
    height, width, window_h, window_w, num_rows, channels, rows_each,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, GRAD_VECTOR: tl.constexpr,
):  # fmt: skip
    """Backward of the average over windows; pixels outside of every window have gradient 0."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    last = tl.minimum((part + 1) * rows_each, num_rows)
    scale, bias = affine(norm_mean, norm_rstd, norm_weight, norm_bias, c, c < channels)
    dbeta, dgamma = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    for start in range(part * rows_each, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = inside_of(rows < last, c < channels, VECTOR)
        x = tl.load(place_of(value, rows, value_stride, c, VECTOR), mask, 0.0)
        out_h, out_w = height // window_h, width // window_w
        y, left = rows // width % height // window_h, rows % width // window_w
        window = (rows // (height * width) * out_h + y) * out_w + left
        d_mask = inside_of((rows < last) & (y < out_h) & (left < out_w), c < channels, GRAD_VECTOR)
        d = tl.load(place_of(out_grad, window, channels, c, GRAD_VECTOR), d_mask, 0.0)
        dz = d.to(tl.float32) * (1.0 / (window_h * window_w))
        sums = add_gradient(
            dz, x, normalise(x, scale, bias), norm_mean, scale, grad, grad_stride, rows, c, mask,
            c < channels, True, VECTOR,
        )  # fmt: skip
        dbeta += sums[0]
        dgamma += sums[1]
    store_sums(partial, part, dbeta, dgamma, c, channels)


@kernel
def finish(
    partial, num_parts, norm_rstd, norm_weight, shift, slope, dbeta, dgamma, num_rows, channels,
    dweights, num_dweights, dweight, dweight_size,
    NORM_PARTS: tl.constexpr, NORM_CHANNELS: tl.constexpr,
    PARTS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Add the shares of all programs: the first programs dbeta and dgamma, the others dweight."""
    blocks = tl.cdiv(channels, NORM_CHANNELS)
    block = tl.program_id(0)
    if block < blocks:
        c = block * NORM_CHANNELS + tl.arange(0, NORM_CHANNELS)
        inside = c < channels
        total_beta = add_parts(partial, num_parts, 2 * channels, c, inside, NORM_PARTS)
        total_gamma = add_parts(partial + channels, num_parts, 2 * channels, c, inside, NORM_PARTS)
        rstd = tl.load(norm_rstd + c, inside, 0.0)
        total_gamma *= rstd
        tl.store(dbeta + c, total_beta, inside)
        tl.store(dgamma + c, total_gamma, inside)
        scale = tl.load(norm_weight + c, inside, 0.0).to(tl.float32) * rstd / num_rows
        tl.store(shift + c, tl.load(shift + c, inside, 0.0) + scale * total_beta, inside)
        tl.store(slope + c, tl.load(slope + c, inside, 0.0) + scale * total_gamma, inside)
    elif dweights is not None:
        i = (block - blocks) * ELEMENTS + tl.arange(0, ELEMENTS)
        total = add_parts(dweights, num_dweights, dweight_size, i, i < dweight_size, PARTS)
        tl.store(dweight + i, total, i < dweight_size)


@triton.jit
def add_parts(partial, num_parts, stride, column, inside, PARTS: tl.constexpr):
    """The sum over rows of a matrix (num_parts, stride), in a fixed order."""
    total = tl.zeros(column.shape, tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        place = partial + (part.to(tl.int64) * stride)[:, None] + column[None, :]
        total += tl.sum(tl.load(place, (part < num_parts)[:, None] & inside[None, :], 0.0), 0)
    return total
