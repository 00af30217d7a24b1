"""Decode the upper rows of a JPEG, at full or reduced scale, to the pixels of Pillow.

libjpeg-turbo does it, through simplejpeg. It takes the common kinds of JPEG that are complete; for
the others `read_header` returns None, and Pillow decides what to do with them.
"""

import math
import re
import struct
from dataclasses import dataclass

import numpy as np
import simplejpeg

from datasets.image_metadata import EXIF, SCAN, is_for_applications, jpeg_segments

PROGRESSIVE = 0xC2
FRAMES = (0xC0, 0xC1, PROGRESSIVE)  # baseline, extended: those of Huffman's code
RESTARTS = 0xDD
TABLES = (0xC4, 0xDB, RESTARTS)
# What libjpeg says if it had no reason to warn or to give up before it skipped to the end.
SKIPPED = re.compile(r"\d extraneous bytes before marker 0xd9$")
SCALES = (8, 4, 2)  # that libjpeg-turbo has fast code for
MAX_SCRATCH = 2**26  # bytes that are kept for the next image
_scratch = np.empty(0, np.uint8)  # to get so much memory anew takes as long as to decode into it


@dataclass(frozen=True)
class Header:
    """Describe a JPEG as it is stored."""

    width: int  # pixels
    height: int
    height_at: int  # where the height stands in the file
    exif: bytes  # empty if there is none
    is_one_scan: bool  # a decoder refuses more
    has_restarts: bool  # marks in the scan


def read_header(data: bytes) -> Header | None:
    """Read the segments before the first scan; None if there is anything unusual or amiss."""
    frame, exif, has_restarts = None, b"", False
    for marker, start, end in jpeg_segments(data):
        if marker in FRAMES and not frame and start + 10 <= end <= len(data):
            frame = start
        elif marker == SCAN:
            if not frame or end > len(data):
                break
            length, bits, height, width, channels = struct.unpack_from(">HBHHB", data, frame + 2)
            is_usual = bits == 8 and channels in (1, 3) and length == 8 + 3 * channels
            if not is_usual or not height or not width:
                break
            is_one_scan = data[frame + 1] != PROGRESSIVE and data[start + 4] == channels
            return Header(width, height, frame + 5, exif, is_one_scan, has_restarts)
        elif marker == 0xE1 and data[start + 4 : start + 10] == EXIF:
            exif += data[start + 10 if exif else start + 4 : end]
        elif marker in TABLES:
            has_restarts |= marker == RESTARTS
        elif not is_for_applications(marker):
            break
    return None


def decode_rows(data: bytes, header: Header, bottom: int, scale: int = 1) -> np.ndarray:
    """Decode the rows above `bottom`, to 1 / scale of their size.

    Returns:
        RGB, uint8, at least ceil(bottom / scale) rows of ceil(width / scale) pixels; a view of
        memory that the next call overwrites.

    Raises:
        ValueError, RuntimeError: it is damaged, though Pillow may decode it.
    """
    height = header.height
    last = bottom + scale  # the colours of a row may be interpolated with the next
    if last < height and header.is_one_scan and not header.has_restarts:
        height, data = last, bytearray(data)  # a decoder that is told another height stops there
        struct.pack_into(">H", data, header.height_at, height)
    pixels = _get_scratch(math.ceil(height / scale), math.ceil(header.width / scale))
    rows, columns, _ = pixels.shape
    try:
        simplejpeg.decode_jpeg(
            data, min_height=rows, min_width=columns, min_factor=scale, buffer=pixels
        )
    except ValueError as error:
        # With strict=False an error after a warning would be none, and some of these pixels
        # another image's. The pixels are decoded whatever is skipped behind them.
        if not SKIPPED.search(str(error)):
            raise
    return pixels


def _get_scratch(height: int, width: int) -> np.ndarray:
    global _scratch
    size = height * width * 3
    if size > len(_scratch):
        buffer = np.empty(size, np.uint8)
        if size > MAX_SCRATCH:
            return buffer.reshape(height, width, 3)
        _scratch = buffer
    return _scratch[:size].reshape(height, width, 3)
