"""Decode one image file, within limits on time and memory."""

import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

# Formats that datasets use; Pillow would pass another, PostScript, to Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MAX_PIXELS = 2**26  # of one image; a file of a few kilobytes can decode to many gigabytes
# A progressive JPEG has about ten scans, but can have one every twenty bytes. Count the scans
# where pixels times bytes exceed this, because decoding could take seconds.
MAX_SCANS, MAX_DECODE_COST = 100, 2**36
MAX_ASPECT = 100  # a line of pixels, resized by its shorter side, would be huge


def decode(path: str | Path) -> Image.Image:
    """Decode an image file of any mode to RGB; a damaged one raises any type of exception."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):  # reading a pipe could block forever
        raise ValueError("not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are checked here, other warnings tell users nothing
        with Image.open(path, formats=FORMATS) as image:  # noqa: TID251
            width, height = image.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
                raise ValueError(f"{width} x {height} pixels are too many or too narrow")
            if width * height * info.st_size > MAX_DECODE_COST and _scans(path) > MAX_SCANS:
                raise ValueError(f"more than {MAX_SCANS} scans")
            image.load()
            if image.mode.startswith("I;16"):  # convert() would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy


def _scans(path: str | Path) -> int:
    with open(path, "rb") as file:
        data = file.read()
    return data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
