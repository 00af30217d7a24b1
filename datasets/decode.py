"""Decode one image file, with limits on what it may cost."""

import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

# Of Pillow's formats those that datasets have; among the others is one that runs Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MAX_PIXELS = 2**26  # of one image; a few kilobytes can claim more than memory holds
# A progressive JPEG goes over its pixels ten times. It could do so in every twenty bytes; where
# pixels times bytes are more than this, which would take seconds, they are counted.
MAX_SCANS, MAX_DECODE_COST = 100, 2**36
MAX_ASPECT = 100  # of the sides; resized to a given width, a line would be as large


def decode(path: str | Path) -> Image.Image:
    """An image file as RGB, whatever its own format and colours.

    Raises:
        Exception: any kind, when the file is damaged: it is the decoder's.
    """
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):  # a pipe would never end
        raise ValueError("not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # size is checked here, other remarks are of no use
        with Image.open(path, formats=FORMATS) as image:  # noqa: TID251
            width, height = image.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
                raise ValueError(f"{width} x {height} pixels are too many or too narrow")
            if width * height * info.st_size > MAX_DECODE_COST and _scans(path) > MAX_SCANS:
                raise ValueError(f"more than {MAX_SCANS} scans")
            image.load()
            if image.mode.startswith("I;16"):  # convert() would cut off at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _scans(path: str | Path) -> int:
    with open(path, "rb") as file:
        data = file.read()
    return data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
