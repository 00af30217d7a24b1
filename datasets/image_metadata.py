"""Read the orientation of an image file; leave out what a file holds beside its pixels."""

import struct

from PIL import Image

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
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
    yield data[:2]
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # to the first scan
        marker, length = struct.unpack_from(">xBH", data, at)
        segment = data[at : at + 2 + length]
        is_for_applications = 0xE0 <= marker <= 0xEF or marker == 0xFE
        # Adobe's tells how the colours are stored.
        is_adobe = marker == 0xEE and length >= 14
        if not is_for_applications or is_adobe or bytes(segment[4:10]) == b"Exif\0\0":
            yield segment
        at += 2 + length
    yield data[at:]
