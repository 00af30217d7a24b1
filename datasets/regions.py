"""Decode the region of an image file that is used, at the scale that it needs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL.Image import Transpose

from datasets import jpeg
from datasets.decode import ROTATED, DecodeOptions, check_limits, decode, file_size, to_grey
from datasets.image_metadata import JPEG, parse_turn

MAX_JPEG = 2**26  # bytes of a file that is read as a whole
LEAST = 4  # decoded pixels: below, two scales could give the same size
# By how many to step through rows and columns, and whether to swap both then.
STEPS = {
    None: (1, 1, False),
    Transpose.FLIP_LEFT_RIGHT: (1, -1, False),
    Transpose.ROTATE_180: (-1, -1, False),
    Transpose.FLIP_TOP_BOTTOM: (-1, 1, False),
    Transpose.TRANSPOSE: (1, 1, True),
    Transpose.ROTATE_270: (-1, 1, True),
    Transpose.TRANSVERSE: (-1, -1, True),
    Transpose.ROTATE_90: (1, -1, True),
}


class Box(NamedTuple):
    """Name a rectangle of a picture, in its pixels."""

    left: int
    top: int
    width: int
    height: int


class Region(NamedTuple):
    """Say what to decode."""

    box: Box
    least: tuple[float, float] | None = None  # (height, width) to keep at a reduced scale, if any


class Decoded(NamedTuple):
    """Hold the pixels of a region."""

    # (h, w, 3) uint8, RGB, or (h, w, 1), grey; valid until the next call in this process, which may
    # overwrite them
    pixels: np.ndarray
    extent: tuple[float, float]  # (height, width) of the box in these; at full scale h and w
    remarks: list[str]  # what a user should know about the image, as `decode` returns


def decode_region(
    path: str | Path, options: DecodeOptions, choose: Callable[[int, int], Region]
) -> Decoded:
    """Decode a region of an image file to the same pixels as `decode`.

    Args:
        choose: gets the width and height of the picture, turned if the options say so, and
            returns the region; may be called twice with the same.

    Raises:
        DataError: the image exceeds a limit, or its values have no known scale.
        Exception: of any type, on a damaged file.
    """
    data = _read_jpeg(path)
    header = jpeg.read_header(data)
    if header:
        scans = b"" if header.is_one_scan else data  # to count takes time
        check_limits((header.width, header.height), len(data), lambda: scans, options)
        try:
            return _decode_jpeg(data, header, options, choose)
        except (ValueError, RuntimeError):  # Pillow decides
            pass
    image, remarks = decode(path, options)
    left, top, width, height = choose(*image.size).box
    pixels = np.array(image.crop((left, top, left + width, top + height)))
    pixels = pixels.reshape(height, width, options.channels)
    return Decoded(pixels, (float(height), float(width)), remarks)


def _read_jpeg(path: str | Path) -> bytes:
    """Return the contents of a JPEG file; nothing for another, or a very large one."""
    if file_size(path) > MAX_JPEG:
        return b""
    with open(path, "rb") as file:
        return file.read() if file.peek(len(JPEG)).startswith(JPEG) else b""


def _decode_jpeg(
    data: bytes, header: jpeg.Header, options: DecodeOptions, choose: Callable
) -> Decoded:
    turn = parse_turn(header.exif) if header.exif else None
    remarks = []
    if turn is not None and not options.exif_rotate:
        turn, remarks = None, [ROTATED]
    down, right, swaps = STEPS[turn]
    size = (header.width, header.height)
    box, least = choose(*(size[::-1] if swaps else size))
    scale = _find_scale(box, least)

    # The box in the file's own rows and columns.
    left, top, width, height = (box.top, box.left, box.height, box.width) if swaps else box
    left = left if right > 0 else header.width - left - width
    top = top if down > 0 else header.height - top - height

    rows = slice(top // scale, math.ceil((top + height) / scale))
    columns = slice(left // scale, math.ceil((left + width) / scale))
    pixels = jpeg.decode_rows(data, header, top + height, scale)[rows, columns][::down, ::right]
    if swaps:
        pixels = pixels.swapaxes(0, 1)
    if options.channels == 1:
        pixels = to_grey(pixels)
    elif turn is not None:
        pixels = pixels.copy()  # torch takes no negative strides
    return Decoded(pixels, (box.height / scale, box.width / scale), remarks)


def _find_scale(box: Box, least: tuple[float, float] | None) -> int:
    """Return 8, 4 or 2 for the smallest scale that keeps the least size; 1 if none does."""
    if least is None:
        return 1
    height, width = (max(each, LEAST) for each in least)
    fits = (k for k in jpeg.SCALES if box.height / k >= height and box.width / k >= width)
    return next(fits, 1)
