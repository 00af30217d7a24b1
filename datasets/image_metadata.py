"""Read the orientation of an image file; leave out what a file holds beside its pixels."""

import struct
import warnings
from collections.abc import Iterator

from PIL import Image

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
SCAN, COMMENT = 0xDA, 0xFE  # markers of JPEG's segments
EXIF = b"Exif\0\0"
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def find_turn(image: Image.Image) -> Image.Transpose | None:
    """Return how the EXIF of a decoded image turns it; None if it does not or is damaged.

    Pillow turns a TIFF when it decodes it, because the orientation is a part of that format.
    """
    if "exif" not in image.info and "Raw profile type exif" not in image.info:
        return None
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # Pillow raises any type on damaged EXIF
        return None


def parse_turn(exif: bytes) -> Image.Transpose | None:
    """Return how the EXIF of a JPEG turns it, as `find_turn` does, before it is decoded."""
    image = Image.new("L", (1, 1))
    image.info["exif"] = exif
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged EXIF
        return find_turn(image)


def jpeg_segments(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of each segment of a JPEG up to its first scan, or damage.

    The bytes from `start` to `end` are FF, marker, length in two bytes, contents. The last `end`
    may lie beyond the data.
    """
    at, marker = len(JPEG), 0
    while at + 4 <= len(data) and data[at] == 0xFF and marker != SCAN:
        marker, length = struct.unpack_from(">xBH", data, at)
        start, at = at, at + 2 + length
        yield marker, start, at


def is_for_applications(marker: int) -> bool:
    """Return whether a segment of a JPEG is a comment, or made for some application."""
    return 0xE0 <= marker <= 0xEF or marker == COMMENT


def without_metadata(path: str) -> bytes | None:
    """Copy a PNG or JPEG without texts and profiles; None for other files and if there are none.

    Keeps EXIF, which has the orientation.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        parse = _png_parts if start == PNG else _jpeg_parts if start.startswith(JPEG) else None
        if parse is None:
            return None
        data = start + file.read()
    kept = b"".join(parse(memoryview(data)))
    return kept if len(kept) < len(data) else None


def _png_parts(data: memoryview):
    """Yield the parts of a PNG but for its ancillary chunks, which begin with a small letter."""
    yield data[: len(PNG)]
    at = len(PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length  # length, kind, contents, checksum
        if not kind[0] & 0x20 or kind in (b"tRNS", b"eXIf"):
            yield data[at:end]
        at = end


def _jpeg_parts(data: memoryview):
    """Yield the parts of a JPEG but for comments and those of applications."""
    rest = len(JPEG)
    yield data[:rest]
    for marker, start, end in jpeg_segments(data):
        if marker == SCAN:
            break
        segment, rest = data[start:end], end
        is_adobe = marker == 0xEE and end - start >= 16  # tells how the colours are stored
        if not is_for_applications(marker) or is_adobe or segment[4:10] == EXIF:
            yield segment
    yield data[rest:]
