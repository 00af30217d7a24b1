"""Write image files by hand, in forms that Pillow reads but does not write."""

import struct
import zlib

import numpy as np

TIFF_TYPES = {3: "H", 4: "I", 11: "f"}  # of a tag's values, as struct names them


def png(pixels: np.ndarray, extra: bytes = b"") -> bytes:
    """Encode (H, W, C) uint8 or uint16 as PNG, with `extra` chunks before the pixels."""
    height, width, channels = pixels.shape
    depth, colour = 8 * pixels.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = pixels.astype(f">u{pixels.itemsize}").tobytes()
    size = len(rows) // height
    packed = zlib.compress(b"".join(b"\0" + rows[i * size :][:size] for i in range(height)))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    end = png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + end


def png_chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """Encode a chunk of a PNG, with its right checksum unless another is given."""
    right = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum or right)


def jpeg_segment(marker: int, data: bytes) -> bytes:
    """Encode a segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def pnm(magic: str, pixels: np.ndarray, maxval: int) -> bytes:
    """Encode (H, W, C) values up to `maxval` as PGM or PPM, plain (P2, P3) or not (P5, P6)."""
    height, width, _ = pixels.shape
    if magic in ("P2", "P3"):
        data = " ".join(str(value) for value in pixels.ravel()).encode()
    else:
        data = pixels.astype(">u2" if maxval > 255 else "u1").tobytes()
    return f"{magic}\n{width} {height}\n{maxval}\n".encode() + data


def tiff(
    pixels: np.ndarray,
    order: str = "<",
    bits: int | None = None,
    photometric: int | None = None,
    planes: bool = False,
    packed: bool = False,
    tags: tuple = (),
) -> bytes:
    """Encode (H, W, C) integers or floats as TIFF, in one strip or one per channel.

    Args:
        order: of bytes, "<" or ">".
        bits: of each value; 12 packs two values in three bytes.
        photometric: 0 white is zero, 1 black is zero, 2 RGB; from the channels if not given.
        planes: each channel on its own.
        packed: compress it.
        tags: more of them, (number, type, values); channels above the colours are alpha.
    """
    height, width, channels = pixels.shape
    strips = np.split(pixels, channels, axis=2) if planes else [pixels]
    data = [strip.astype(pixels.dtype.newbyteorder(order)).tobytes() for strip in strips]
    if bits == 12:
        pairs = pixels.reshape(-1, 2).tolist()
        data = [b"".join((a << 12 | b).to_bytes(3) for a, b in pairs)]
    data = [zlib.compress(strip) for strip in data] if packed else data
    if photometric is None:
        photometric = 2 if channels > 2 else 1
    bits = bits or 8 * pixels.itemsize
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    alpha = [(338, 3, [2])] if channels in (2, 4) else []
    entries = [
        (256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * channels),
        (259, 3, [8 if packed else 1]), (262, 3, [photometric]), (273, 4, [0] * len(data)),
        (277, 3, [channels]), (278, 4, [height]), (279, 4, [len(strip) for strip in data]),
        (284, 3, [2 if planes else 1]), *alpha, (339, 3, [kind] * channels), *tags,
    ]  # fmt: skip
    entries.sort()

    def encode(values: list, code: int) -> bytes:
        return struct.pack(f"{order}{len(values)}{TIFF_TYPES[code]}", *values)

    start = 8 + 2 + 12 * len(entries) + 4  # values that do not fit an entry
    offset = start + sum(max(len(encode(v, code)), 4) for _, code, v in entries)
    offsets = [offset + sum(map(len, data[:i])) for i in range(len(data))]
    directory, beside = struct.pack(f"{order}H", len(entries)), b""
    for number, code, values in entries:
        value = encode(offsets if number == 273 else values, code)
        directory += struct.pack(f"{order}HHI", number, code, len(values))
        if len(value) <= 4:
            directory += value.ljust(4, b"\0")
        else:
            directory += struct.pack(f"{order}I", start + len(beside))
            beside += value
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    content = header + directory + bytes(4) + beside
    return content.ljust(offset, b"\0") + b"".join(data)
