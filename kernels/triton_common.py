"""Provide the parts of Triton kernels: pointers, masks, normalisation, products, dropout.

A kernel sees feature maps (N, H, W, C) as a matrix of M = N * H * W rows (pixels), each with C
contiguous channels. Z = relu(norm(value)), (M, C), is the input of every convolution and pooling:
kernels compute Z tile by tile, and write only that of a bottleneck to memory, for one layer at a
time. Parameters that kernels share, with strides in elements:

    value, value_stride        input maps (M, C), and their row stride
    grad, grad_stride          gradient of value, accumulated in backward, and its row stride
    target, target_stride      output, such as (M, F) of a convolution, and its row stride
    norm_scale, norm_shift     (C,), float32: norm(value) = value * scale + shift; None: value is Z
    norm_mean, norm_rstd       (C,), float32: the statistics mean and rstd = 1 / sqrt(var + eps)
    NORM_VECTOR                channels of these vectors that a thread may load at once
    weight, weight_f, _y, _x   convolution weight (F, C, h, w), and its strides along F, h and w
    WEIGHT_C, WEIGHT_VECTOR    its stride along C; input channels that a thread may load at once
    seed, layer_id             of the dropout mask: see DropoutSpec; seed is None without dropout
    threshold, keep_scale      p * 2^24 and 1 / (1 - p) for a dropout rate of p
    first_row                  index of row 0 in the global batch
    num_rows, channels, out_channels  M, C and F: pixels, input and output channels
    rows, c, f                 indices of a tile along M, C and F
    inside                     mask of the indices that exist: rows < M, or c < C
    split, partial             index of a block of rows; (splits, ...) float32 results to combine:
                               see kernels/triton_reduce.py
    HEIGHT, WIDTH              size of an image: constants, since a division by one is cheap
    PDL                        programmatic dependent launch: see `wait_for_previous_kernel`
    ROWS, CHANNELS, OUT_CHANNELS  tile sizes along M, C and F: see kernels/tiling.py
    VECTOR, TARGET_VECTOR      channels that a thread loads or stores at once: of value,
                               grad; of target and, in backward, d
    PRECISION                  tl.dot on float32: "tf32" or "tf32x3"; in Triton's interpreter
                               "interpreted", which converts every dtype to float32
"""

import inspect
from collections.abc import Callable

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import interpreter


def accept_loop_bounds() -> None:
    """Let `range` take tensors: Triton 3.6 calls int() on 1-element arrays; NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor


if triton.knobs.runtime.interpret:  # TRITON_INTERPRET=1: kernels run in Triton's interpreter
    accept_loop_bounds()


def kernel(function: Callable) -> Callable:
    """Compile with `triton.jit`, one variant per set of constexprs and dtypes.

    By default Triton also specialises on arguments that are 1 or multiples of 16. Channel counts
    grow by k per layer, so a network would spend minutes compiling dozens of variants.
    """
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation is not tl.constexpr
    ]
    return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Begin a kernel: wait until all that earlier kernels wrote is visible.

    With PDL (compute capability 9.0 and later) this kernel was started while the previous one still
    ran, and the next one may start now: it waits here in turn, which hides the gap between them.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def tile_pointers(pointer, rows, stride, columns, VECTOR: tl.constexpr):
    """Return pointers to a (rows, columns) tile whose groups of VECTOR columns must be aligned."""
    # 64 bits: rows * stride exceeds an int32 in large batches.
    pointers = pointer + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    size: tl.constexpr = VECTOR * pointer.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(pointers, [1, size])


@triton.jit
def tile_mask(rows, columns, VECTOR: tl.constexpr):
    """Combine row and column masks, which must be equal within each group of VECTOR columns."""
    return tl.max_constancy(rows[:, None] & columns[None, :], [1, VECTOR])


@triton.jit
def load_channels(pointer, c, channels, NORM_VECTOR: tl.constexpr):
    """Load float32 values of channels c, and 0 from `channels` on."""
    pointers = tl.multiple_of(pointer + c, [4 * NORM_VECTOR])
    return tl.load(pointers, tl.max_constancy(c < channels, [NORM_VECTOR]), 0.0)


@triton.jit
def normalise(value, scale, shift):
    """Return value * scale + shift in float32; value (ROWS, CHANNELS), the others (CHANNELS,)."""
    return value.to(tl.float32) * scale[None, :] + shift[None, :]


@triton.jit
def relu(x):
    """Return max(x, 0), and NaN for NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_weight(
    weight, columns, columns_inside, c, inside, WEIGHT_C: tl.constexpr, WEIGHT_VECTOR: tl.constexpr
):
    """Load a (c, columns) tile of a convolution weight; `columns` are offsets in elements."""
    pointers = weight + (c * WEIGHT_C)[:, None] + columns[None, :]
    size: tl.constexpr = WEIGHT_VECTOR * weight.dtype.element_ty.primitive_bitwidth // 8
    mask = tl.max_constancy(inside[:, None] & columns_inside[None, :], [WEIGHT_VECTOR, 1])
    return tl.load(tl.multiple_of(pointers, [size, 1]), mask, 0.0)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Return total + a @ b, (m, n) + (m, k) @ (k, n), accumulated in float32."""
    if PRECISION == "interpreted":  # the interpreter has no bfloat16 products
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def hash32(x):
    """Hash uint32 x as kernels/dropout.py does; products wrap modulo 2^32, on purpose."""
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def apply_dropout(x, rows, columns, num_columns, seed, layer_id, first_row, threshold, keep_scale):
    """Apply the mask of kernels/dropout.py to a tile of a matrix with `num_columns` columns."""
    layer_id = tl.mul(layer_id.to(tl.uint32), 0x3504F333, sanitize_overflow=False)
    key = hash32(tl.add(tl.load(seed).to(tl.uint32), layer_id, sanitize_overflow=False))
    # The mask depends on an element's index in the global batch, not on tiling or processes.
    index = ((rows.to(tl.int64) + first_row) * num_columns)[:, None] + columns[None, :]
    hashed = hash32(tl.add(hash32(index.to(tl.uint32) ^ key), key, sanitize_overflow=False))
    # The lowest HASH_BITS = 24 bits are compared with threshold = rate * 2^24.
    return tl.where((hashed & 0xFFFFFF).to(tl.int32) >= threshold, x * keep_scale, 0.0)


@triton.jit
def taps_in_image(rows, inside, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return nine bits for each row `inside`, one for each tap of a 3x3 filter, and 0 for others.

    Bit 3 * (dy + 1) + dx + 1 tells whether the pixel at offset (dy, dx) is in the row's image.
    """
    y, x = rows // WIDTH % HEIGHT, rows % WIDTH
    columns = tl.where(x > 0, 0o111, 0) | 0o222 | tl.where(x < WIDTH - 1, 0o444, 0)
    lines = tl.where(y > 0, 0o007, 0) | 0o070 | tl.where(y < HEIGHT - 1, 0o700, 0)
    return tl.where(inside, columns & lines, 0)
