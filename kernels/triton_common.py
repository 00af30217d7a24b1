"""What the Triton kernels have in common: tiles of maps, the norm they are read through, dropout.

Maps (N, H, W, C) are matrices of M = N * H * W rows whose channels lie side by side; `stride` is
the distance of two rows. Only files of this folder import Triton.
"""

import inspect
from collections.abc import Callable

import triton
import triton.language as tl
from triton.runtime import interpreter


def accept_loop_bounds() -> None:
    """Let `range` take tensors of one element in interpreted kernels.

    Triton 3.6 turns them into numbers with int(array), which NumPy from 2.4 on refuses.
    """
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor


if triton.knobs.runtime.interpret:
    accept_loop_bounds()


def kernel(function: Callable) -> Callable:
    """`triton.jit` whose compiled form depends on its constexprs and on types alone.

    Triton would compile a variant for each combination of pointers and numbers that happen to be
    multiples of 16, and channel counts grow by k from layer to layer.
    """
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation is not tl.constexpr
    ]
    return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


@triton.jit
def tile_pointers(pointer, rows, stride, columns, VECTOR: tl.constexpr):
    """Pointers to a tile, in which vectors of VECTOR channels are aligned to their own size."""
    pointers = pointer + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    size: tl.constexpr = VECTOR * pointer.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(pointers, [1, size])


@triton.jit
def tile_mask(rows, columns, VECTOR: tl.constexpr):
    """The mask of a tile from the masks of its rows and columns."""
    return tl.max_constancy(rows[:, None] & columns[None, :], [1, VECTOR])


@triton.jit
def affine(mean, rstd, weight, bias, c, inside):
    """(scale, shift) such that the norm gives value * scale + shift; both 0 where not inside."""
    scale = tl.load(weight + c, inside, 0.0).to(tl.float32) * tl.load(rstd + c, inside, 0.0)
    shift = tl.load(bias + c, inside, 0.0).to(tl.float32)
    return scale, shift - tl.load(mean + c, inside, 0.0) * scale


@triton.jit
def normalise(value, scale, shift):
    """Normalised values in single precision."""
    return value.to(tl.float32) * scale[None, :] + shift[None, :]


@triton.jit
def relu(x):
    """Not tl.maximum, which would turn a value that is not a number into 0."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def load_weight(
    weight, columns, columns_inside, c, inside, WEIGHT_C: tl.constexpr, WEIGHT_VECTOR: tl.constexpr
):
    """The tile (c, columns) of a weight, whose columns begin at the given offsets."""
    pointers = weight + (c * WEIGHT_C)[:, None] + columns[None, :]
    size: tl.constexpr = WEIGHT_VECTOR * weight.dtype.element_ty.primitive_bitwidth // 8
    mask = tl.max_constancy(inside[:, None] & columns_inside[None, :], [WEIGHT_VECTOR, 1])
    return tl.load(tl.multiple_of(pointers, [size, 1]), mask, 0.0)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b, in single precision."""
    if PRECISION == "interpreted":  # the interpreter has no bfloat16 products
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def hash32(x):
    """The hash of kernels/dropout.py, of 32 bits without sign."""
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def apply_dropout(x, rows, columns, width, seed, layer_id, first_row, threshold, keep_scale):
    """kernels/dropout.py, for a tile of maps with `width` channels."""
    layer_id = tl.mul(layer_id.to(tl.uint32), 0x3504F333, sanitize_overflow=False)
    key = hash32(tl.add(tl.load(seed).to(tl.uint32), layer_id, sanitize_overflow=False))
    index = ((rows.to(tl.int64) + first_row) * width)[:, None] + columns[None, :]
    hashed = hash32(tl.add(hash32(index.to(tl.uint32) ^ key), key, sanitize_overflow=False))
    return tl.where((hashed & 0xFFFFFF).to(tl.int32) >= threshold, x * keep_scale, 0.0)


@triton.jit
def shifted_mask(rows, inside, dy, dx, height, width):
    """Where the pixel (dy, dx) away from that of a row lies in the same image; broadcasts."""
    y = rows // width % height + dy
    x = rows % width + dx
    return inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
