#!/usr/bin/env bash
# Pillow decodes sound TIFFs of scientific instruments to other numbers, by byte order and layout.
#
# Pillow 13.0.0, files written by tifffile 2026.3.3 and read back by it unchanged. TIFF allows either
# byte order, a compression, signed and float samples, and colours in planes. Pillow opens all of the
# following without a warning, in a mode that can hold the numbers, and returns others:
#
#   big-endian int16, int32 and float32, zlib      bytes in the wrong order: -5 is -1025 (int16)
#   the same uncompressed, or little-endian        as stored
#   RGB of 16 bits in planes, uncompressed         not the upper bytes of the colours: noise
#   the same compressed, or not in planes          the upper bytes of the colours
#
# So a converter that compresses, or a program on the other byte order, turns a data set into noise
# that every later check of size, mode and count passes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
"$work/venv/bin/python" - <<'P'
import io

import numpy as np
import tifffile
from PIL import Image


def through_pillow(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    assert np.array_equal(tifffile.imread(io.BytesIO(file.getvalue())), values)
    return np.asarray(Image.open(io.BytesIO(file.getvalue())))


grey = {"photometric": "minisblack"}
numbers = np.array([[-5, 178], [0, 106]])
for kind in ("int16", "int32", "float32"):
    values = numbers.astype(kind)
    for order, compression in (("<", None), ("<", "zlib"), (">", None), (">", "zlib")):
        read = through_pillow(values, byteorder=order, compression=compression, **grey)
        is_same = np.array_equal(read, values)
        print(f"{kind:7} {order} {compression!s:4}  as stored: {is_same!s:5}  {read[0].tolist()}")
        assert is_same == ((order, compression) != (">", "zlib"))
        swapped = values.view(values.dtype.newbyteorder(">")).astype(kind)
        assert is_same or np.array_equal(read, swapped, equal_nan=True)

colours = np.random.default_rng(0).integers(0, 65536, (8, 8, 3)).astype("uint16")
for layout, compression in (("contig", None), ("separate", None), ("separate", "zlib")):
    values = colours if layout == "contig" else np.ascontiguousarray(colours.transpose(2, 0, 1))
    options = {"photometric": "rgb", "planarconfig": layout, "compression": compression}
    is_same = np.array_equal(through_pillow(values, **options), colours >> 8)
    print(f"RGB 16  {layout:8} {compression!s:4}  upper bytes: {is_same}")
    assert is_same == ((layout, compression) != ("separate", None))
P
