"""Combine the partial results of a launch inside it: the last programs to arrive do the work.

A program stores its results for one split (block of rows) in a row of `partial`, then counts itself
at a counter. Splits form groups of 2^group_bits. The last program of a group combines the group's
rows into another row; the last of these combines the groups. Whichever program is last, it reads
the same rows in the same order, so that every run gives the same bits; atomic additions of the
results would sum in another order each time.

    partial     (rows, ...), float32: rows of splits, then of groups; of a weight's gradient, four
                are loaded at once, so that rows of zeros fill up the groups to a multiple of four
    counters    (1 + number of groups,), int32, for each column of programs: of the groups that are
                complete, and of the complete splits of each group. All are 0 between launches.
"""

import triton
import triton.language as tl


@triton.jit
def is_last_to_arrive(counter, count):
    """Count this program at a counter; return whether it is the last of `count`.

    The last one sees all that the others stored, and sets the counter to 0 for the next launch.
    """
    tl.debug_barrier()  # all threads of this program have stored their results
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def count_in_group(group, num_splits, group_bits):
    """Return the number of splits in a group."""
    return tl.minimum(1 << group_bits, num_splits - (group << group_bits))


@triton.jit
def sum_rows(pointers, first, count, stride, inside, ROWS: tl.constexpr):
    """Sum `count` rows of a matrix from row `first` on; `pointers` are to row 0, (columns,)."""
    total = tl.zeros(pointers.shape, tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        block = pointers[None, :] + ((first + row).to(tl.int64) * stride)[:, None]
        mask = (row < count)[:, None] & inside[None, :]
        total += tl.sum(tl.load(block, mask, 0.0, cache_modifier=".cg"), 0)
    return total


@triton.jit
def store_stats(value, partial, split, inside, c, channels):
    """Store mean and M2 of rows `inside` of value (ROWS, CHANNELS) in partial (splits, 2, C).

    M2 is the sum of squared deviations from the mean.
    """
    count = tl.sum(inside.to(tl.float32), 0)
    mean = tl.sum(tl.where(inside[:, None], value, 0.0), 0) / count
    deviation = tl.where(inside[:, None], value - mean[None, :], 0.0)
    store_row(partial, split, mean, tl.sum(deviation * deviation, 0), c, channels)


@triton.jit
def store_row(partial, row, first, second, c, channels):
    """Store two results of one program, (CHANNELS,) each, in partial, (rows, 2, C)."""
    # 32 bits suffice: up to 2^31 / (2 C) splits, 67 million pixels with 1,024 channels.
    tl.store(partial + (2 * row) * channels + c, first, c < channels)
    tl.store(partial + (2 * row + 1) * channels + c, second, c < channels)


@triton.jit
def merge_stats(
    partial, first, count, first_pixel, pixels_each, num_pixels, c, channels, ROWS: tl.constexpr
):
    """Combine `count` rows of `partial` from row `first` on; return mean and M2, (CHANNELS,) each.

    Row i is of pixels_each pixels from first_pixel + i * pixels_each on, the last of fewer.
    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979. E[x^2] - E[x]^2 would lose digits if |mean| is far above the deviation.
    """
    total, mean, m2 = 0.0, tl.zeros(c.shape, tl.float32), tl.zeros(c.shape, tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (c < channels)[None, :]
        pointers = partial + (2 * (first + row) * channels)[:, None] + c[None, :]
        means = tl.load(pointers, mask, 0.0, cache_modifier=".cg")
        m2s = tl.load(pointers + channels, mask, 0.0, cache_modifier=".cg")
        counts = tl.minimum(num_pixels - first_pixel - row * pixels_each, pixels_each)
        counts = tl.where(row < count, counts, 0).to(tl.float32)
        # Combine these rows, then merge them with all earlier ones.
        new_total = tl.sum(counts, 0)
        new_mean = tl.sum(means * counts[:, None], 0) / new_total
        deviation = means - new_mean[None, :]
        new_m2 = tl.sum(m2s + deviation * deviation * counts[:, None], 0)
        fraction = new_total / (total + new_total)
        delta = new_mean - mean
        m2 += new_m2 + delta * delta * (total * fraction)
        mean += delta * fraction
        total += new_total
    return mean, m2


@triton.jit
def reduce_stats(
    partial, counters, split, num_splits, num_groups, group_bits, pixels_per_split, num_pixels,
    c, channels, mean, var, rstd, eps, reader_weight, reader_bias, reader_scale, reader_shift,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Combine all splits' means and M2 into mean, biased variance and 1 / sqrt(var + eps).

    Also writes scale and shift of the norm that reads these channels next, if there is one.
    """
    group = split >> group_bits
    members = count_in_group(group, num_splits, group_bits)
    if is_last_to_arrive(counters + 1 + group, members):
        finish_group_stats(
            partial, group, members, num_splits, group_bits, pixels_per_split, num_pixels,
            c, channels, ROWS,
        )  # fmt: skip
        if is_last_to_arrive(counters, num_groups):
            finish_stats(
                partial, num_splits, num_groups, pixels_per_split << group_bits, num_pixels,
                c, channels, mean, var, rstd, eps,
                reader_weight, reader_bias, reader_scale, reader_shift, ROWS,
            )  # fmt: skip


@triton.jit
def finish_group_stats(
    partial, group, members, num_splits, group_bits, pixels_per_split, num_pixels, c, channels,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Combine the rows of a group into its own row."""
    first = group << group_bits
    mean, m2 = merge_stats(
        partial, first, members, first * pixels_per_split, pixels_per_split, num_pixels,
        c, channels, ROWS,
    )  # fmt: skip
    store_row(partial, num_splits + group, mean, m2, c, channels)


@triton.jit
def finish_stats(
    partial, num_splits, num_groups, pixels_per_group, num_pixels, c, channels,
    mean, var, rstd, eps, reader_weight, reader_bias, reader_scale, reader_shift,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Combine the rows of all groups, and write what they result in."""
    all_mean, m2 = merge_stats(
        partial, num_splits, num_groups, 0, pixels_per_group, num_pixels, c, channels, ROWS
    )
    all_var = m2 / num_pixels
    # tl.sqrt_rn rounds correctly; tl.sqrt is an approximation.
    all_rstd = 1.0 / tl.sqrt_rn(all_var + eps)
    inside = c < channels
    tl.store(mean + c, all_mean, inside)
    tl.store(var + c, all_var, inside)
    tl.store(rstd + c, all_rstd, inside)
    if reader_weight is not None:
        write_affine(
            all_mean, all_rstd, reader_weight, reader_bias, reader_scale, reader_shift, c, inside
        )


@triton.jit
def write_affine(mean, rstd, weight, bias, scale, shift, c, inside):
    """Write scale and shift of a norm: (value - mean) * rstd * weight + bias of channels c."""
    factor = tl.load(weight + c, inside, 0.0).to(tl.float32) * rstd
    tl.store(scale + c, factor, inside)
    tl.store(shift + c, tl.load(bias + c, inside, 0.0).to(tl.float32) - mean * factor, inside)


@triton.jit
def reduce_norm_grads(
    partial, counters, split, num_splits, num_groups, group_bits, c, channels, num_rows,
    norm_rstd, norm_scale, mean_correction, var_correction, dbeta, dgamma,
    ADD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum all splits' dbeta and dgamma / rstd; add to the input's corrections.

    kernels/feature_maps.py explains the corrections. With ADD also dbeta and dgamma are added to.
    """
    group = split >> group_bits
    members = count_in_group(group, num_splits, group_bits)
    if is_last_to_arrive(counters + 1 + group, members):
        finish_group_norm_grads(partial, group, members, num_splits, group_bits, c, channels, ROWS)
        if is_last_to_arrive(counters, num_groups):
            finish_norm_grads(
                partial, num_splits, num_groups, c, channels, num_rows, norm_rstd, norm_scale,
                mean_correction, var_correction, dbeta, dgamma, ADD, ROWS,
            )  # fmt: skip


@triton.jit
def finish_group_norm_grads(
    partial, group, members, num_splits, group_bits, c, channels, ROWS: tl.constexpr
):
    """Sum the rows of a group into its own row."""
    sums, first, stride = partial + c, group << group_bits, 2 * channels
    beta = sum_rows(sums, first, members, stride, c < channels, ROWS)
    gamma = sum_rows(sums + channels, first, members, stride, c < channels, ROWS)
    store_row(partial, num_splits + group, beta, gamma, c, channels)


@triton.jit
def finish_norm_grads(
    partial, num_splits, num_groups, c, channels, num_rows, norm_rstd, norm_scale,
    mean_correction, var_correction, dbeta, dgamma, ADD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum the rows of all groups, and write what they result in."""
    sums, stride, inside = partial + c, 2 * channels, c < channels
    beta = sum_rows(sums, num_splits, num_groups, stride, inside, ROWS)
    gamma = sum_rows(sums + channels, num_splits, num_groups, stride, inside, ROWS)
    gamma *= tl.load(norm_rstd + c, inside, 0.0)
    factor = tl.load(norm_scale + c, inside, 0.0) / num_rows
    add_to(mean_correction + c, factor * beta, inside, True)
    add_to(var_correction + c, factor * gamma, inside, True)
    add_to(dbeta + c, beta, inside, ADD)
    add_to(dgamma + c, gamma, inside, ADD)


@triton.jit
def reduce_weight_grad(
    dw, weight_partials, counters, split, num_splits, num_groups, group_bits,
    dweight, c, channels, columns, columns_inside, WEIGHT_C: tl.constexpr,
):  # fmt: skip
    """Store dw, a (c, columns) tile of a weight's gradient, and sum the tiles of all splits.

    Args:
        weight_partials: rows of splits and groups; a row has a whole tile for each program_id(0).
        columns, columns_inside: offsets in `dweight`, and which exist; see `load_weight`.
    """
    size: tl.constexpr = dw.shape[0] * dw.shape[1]
    tile = tl.arange(0, dw.shape[0])[:, None] * dw.shape[1] + tl.arange(0, dw.shape[1])[None, :]
    # Whole tiles, one after the other, so that a thread loads four values at once without a mask.
    tiles = tl.multiple_of(weight_partials + tl.program_id(0) * size + tile, [16, 16])
    stride = tl.num_programs(0).to(tl.int64) * size
    tl.store(tiles + split * stride, dw)
    group = split >> group_bits
    members = count_in_group(group, num_splits, group_bits)
    if is_last_to_arrive(counters + 1 + group, members):
        finish_group_weight_grad(tiles, stride, group, members, num_splits, num_groups, group_bits)
        if is_last_to_arrive(counters, num_groups):
            finish_weight_grad(
                tiles, stride, num_splits, num_groups,
                dweight, c, channels, columns, columns_inside, WEIGHT_C,
            )  # fmt: skip


@triton.jit
def finish_group_weight_grad(tiles, stride, group, members, num_splits, num_groups, group_bits):
    """Sum the tiles of a group into the tile of its own row."""
    total = sum_tiles(tiles, group << group_bits, members, stride)
    tl.store(tiles + (num_splits + group) * stride, total)
    if group + 1 == num_groups:  # the sum of groups takes four at a time
        for row in range(num_splits + num_groups, num_splits + tl.cdiv(num_groups, 4) * 4):
            tl.store(tiles + row * stride, tl.zeros(tiles.shape, tl.float32))


@triton.jit
def finish_weight_grad(
    tiles, stride, num_splits, num_groups, dweight, c, channels, columns, columns_inside,
    WEIGHT_C: tl.constexpr,
):  # fmt: skip
    """Sum the tiles of all groups into the gradient."""
    total = sum_tiles(tiles, num_splits, tl.cdiv(num_groups, 4) * 4, stride)
    # Find the elements only now: earlier they would occupy registers during the sums.
    elements = (c * WEIGHT_C)[:, None] + columns[None, :]
    tl.store(dweight + elements, total, (c < channels)[:, None] & columns_inside[None, :])


@triton.jit
def sum_tiles(tiles, first, count, stride):
    """Sum `count` tiles, a multiple of 4, `stride` apart, from row `first` on."""
    total = tl.zeros(tiles.shape, tl.float32)
    for row in range(first, first + count, 4):
        one = tl.load(tiles + row * stride, cache_modifier=".cg")
        two = tl.load(tiles + (row + 1) * stride, cache_modifier=".cg")
        three = tl.load(tiles + (row + 2) * stride, cache_modifier=".cg")
        four = tl.load(tiles + (row + 3) * stride, cache_modifier=".cg")
        total += (one + two) + (three + four)
    return total


@triton.jit
def add_to(pointers, x, inside, ADD: tl.constexpr):
    """Write x, or with ADD add it to values in memory that no other program writes."""
    if ADD:
        x += tl.load(pointers, inside, 0.0)
    tl.store(pointers, x, inside)
