"""Building blocks of the Triton kernels: pointers and masks, normalisation, products, dropout.

A kernel sees feature maps (N, H, W, C) as a matrix of M = N * H * W rows (pixels), whose C
channels are neighbours in memory. Parameters that kernels share:

    value, value_stride           the source maps; elements from one row to the next
    grad, grad_stride             their gradient, (M, C), which backward adds to
    norm_mean, _rstd, _weight, _bias  (C,): statistics and parameters of the batch normalisation
    weight, weight_f, _y, _x, WEIGHT_C  the convolution's weight (F, C, h, w) and its strides
    num_rows, channels, features  M, C, F
    rows, c, f                    indices of a tile: pixels, input channels, output features
    partial                       float32 results of single programs, for a second kernel to combine
    VECTOR                        channels that a thread may load at once: see kernels/tiling.py

Z = relu(norm(value)) is the input of every convolution and pooling, (M, C). It is computed on the
fly from the tile that is loaded and never written to memory.
"""

import inspect
from collections.abc import Callable

import triton
import triton.language as tl
from triton.runtime import interpreter


def accept_loop_bounds() -> None:
    """Let `range` take tensors of one element in interpreted kernels.

    Triton 3.6 converts them with int(array), which NumPy rejects since 2.4.
    """
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor


if triton.knobs.runtime.interpret:
    accept_loop_bounds()


def kernel(function: Callable) -> Callable:
    """`triton.jit` that compiles one variant per set of constexprs and dtypes.

    By default Triton compiles a variant for each combination of arguments that happen to be
    multiples of 16; channel counts grow by k from layer to layer, so that would be dozens.
    """
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation is not tl.constexpr
    ]
    return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


@triton.jit
def tile_pointers(pointer, rows, stride, columns, VECTOR: tl.constexpr):
    """Pointers to the tile (rows, columns) of a matrix, aligned to VECTOR elements."""
    # 64 bits: rows * stride exceeds an int32 in large batches.
    pointers = pointer + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    size: tl.constexpr = VECTOR * pointer.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(pointers, [1, size])


@triton.jit
def tile_mask(rows, columns, VECTOR: tl.constexpr):
    """Combine the masks of a tile's rows and columns; VECTOR neighbours are masked alike."""
    return tl.max_constancy(rows[:, None] & columns[None, :], [1, VECTOR])


@triton.jit
def affine(mean, rstd, weight, bias, c, inside):
    """(scale, shift) with norm(value) = value * scale + shift; both 0 outside."""
    scale = tl.load(weight + c, inside, 0.0).to(tl.float32) * tl.load(rstd + c, inside, 0.0)
    shift = tl.load(bias + c, inside, 0.0).to(tl.float32)
    return scale, shift - tl.load(mean + c, inside, 0.0) * scale


@triton.jit
def normalise(value, scale, shift):
    """value * scale + shift per channel, in float32."""
    return value.to(tl.float32) * scale[None, :] + shift[None, :]


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN, which tl.maximum would turn into 0."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def load_weight(
    weight, columns, columns_inside, c, inside, WEIGHT_C: tl.constexpr, WEIGHT_VECTOR: tl.constexpr
):
    """Load a (c, columns) tile of a weight; `columns` are offsets of (feature, tap) pairs."""
    pointers = weight + (c * WEIGHT_C)[:, None] + columns[None, :]
    size: tl.constexpr = WEIGHT_VECTOR * weight.dtype.element_ty.primitive_bitwidth // 8
    mask = tl.max_constancy(inside[:, None] & columns_inside[None, :], [WEIGHT_VECTOR, 1])
    return tl.load(tl.multiple_of(pointers, [size, 1]), mask, 0.0)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, accumulated in float32."""
    if PRECISION == "interpreted":  # the interpreter has no bfloat16 products
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def hash32(x):
    """The hash of kernels/dropout.py, in uint32."""
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def apply_dropout(x, rows, columns, width, seed, layer_id, first_row, threshold, keep_scale):
    """Multiply a tile by the mask of kernels/dropout.py; the whole matrix has `width` columns."""
    layer_id = tl.mul(layer_id.to(tl.uint32), 0x3504F333, sanitize_overflow=False)
    key = hash32(tl.add(tl.load(seed).to(tl.uint32), layer_id, sanitize_overflow=False))
    # An element's position in the global batch decides, not the tile that holds it.
    index = ((rows.to(tl.int64) + first_row) * width)[:, None] + columns[None, :]
    hashed = hash32(tl.add(hash32(index.to(tl.uint32) ^ key), key, sanitize_overflow=False))
    return tl.where((hashed & 0xFFFFFF).to(tl.int32) >= threshold, x * keep_scale, 0.0)


@triton.jit
def shifted_mask(rows, inside, dy, dx, height, width):
    """True where the pixel (dy, dx) away from that of a row is in the same image; broadcasts."""
    y = rows // width % height + dy
    x = rows % width + dx
    return inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
