"""Decode one image file to the picture that a viewer shows, within limits on time and memory."""

import contextlib
import io
import math
import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from datasets import bit_depth, image_metadata
from datasets.registry import MAX_ASPECT, MAX_PIXELS
from errors import DataError

# Formats that datasets use; Pillow would pass another, PostScript, to Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
# A progressive JPEG has about ten scans, but can have one every twenty bytes. Count the scans
# where pixels times bytes exceed this, because decoding could take seconds.
MAX_SCANS, MAX_DECODE_COST = 100, 2**36
Image.MAX_IMAGE_PIXELS = None  # a limit of Pillow; ours is in `DecodeOptions`

REPLACE = "replace or remove the file"  # what helps against most damage
ROTATED = (
    "images that their EXIF orientation turns are read as stored, as torchvision does; "
    "--exifRotate true turns them"
)
TRANSPARENT = "images with transparent pixels are read without transparency, as torchvision does"


@dataclass(frozen=True)
class DecodeOptions:
    """Say how to decode, and what to refuse: flags of main.py."""

    exif_rotate: bool = False  # turn an image as its EXIF orientation says
    max_pixels: int = MAX_PIXELS  # of one image
    max_aspect: float = MAX_ASPECT  # the longer side over the shorter
    white_level: float | None = None  # of more than 8 bits where a file declares none
    channels: int = 3  # of the result: 3 are RGB, 1 is its grey


DEFAULTS = DecodeOptions()


def decode(path: str | Path, options: DecodeOptions = DEFAULTS) -> tuple[Image.Image, list[str]]:
    """Decode an image file of any mode to RGB, or to its grey.

    Returns:
        The image, and what a user should know about it, in sentences that name no file.

    Raises:
        DataError: the image exceeds a limit, or its values have no known scale.
        Exception: of any type, on a damaged file.
    """
    num_bytes = file_size(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are checked here, other warnings tell users nothing
        try:
            return _decode(path, num_bytes, options)
        except DataError:
            raise
        except Exception:
            # Pillow also fails on a text or profile that is damaged or long.
            pixels_only = image_metadata.without_metadata(path)
            if pixels_only:
                return _decode(io.BytesIO(pixels_only), num_bytes, options)
            raise


def file_size(path: str | Path) -> int:
    """Return the number of bytes of a regular file; raise ValueError if it is something else."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):  # reading a pipe could block forever
        raise ValueError("not a regular file")
    return info.st_size


def _decode(
    source: str | Path | io.BytesIO, num_bytes: int, options: DecodeOptions
) -> tuple[Image.Image, list[str]]:
    def open_image() -> Image.Image:
        try:
            return Image.open(source, formats=FORMATS)  # noqa: TID251
        except UnidentifiedImageError as error:
            raise ValueError(f"not a form of {', '.join(FORMATS)} that Pillow reads") from error

    with open_image() as image:
        check_limits(image.size, num_bytes, lambda: _read(source), options)
        raw = bit_depth.prepare(image)
        image.info.pop("xmp", None)  # not about pixels, but Pillow reads it in a TIFF
        image.load()
        turn = image_metadata.find_turn(image)
        remarks = [TRANSPARENT] if _is_transparent(image) else []
        image, remark = bit_depth.to_8_bits(image, raw, open_image, options.white_level)
        if remark:
            remarks.append(remark)
        if turn is not None and options.exif_rotate:
            image = image.transpose(turn)
        elif turn is not None:
            remarks.append(ROTATED)
        if image.mode == "La":  # Pillow has no conversion to RGB
            image = image.convert("LA")
        wanted = "L" if options.channels == 1 else "RGB"
        if image.mode not in ("RGB", wanted):
            image = image.convert("RGB")
        return image if image.mode == wanted else image.convert(wanted), remarks  # it would copy


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """Map (h, w, 3) to (h, w, 1) uint8 as `decode` does; what is grey stays as it is."""
    # (19595 red + 38470 green + 7471 blue + 32768) >> 16
    return np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[..., None]


def check_limits(
    size: tuple[int, int], num_bytes: int, read: Callable[[], bytes], options: DecodeOptions
) -> None:
    """Raise DataError if to decode an image of (width, height) would take too much.

    Args:
        num_bytes: of the file.
        read: returns its contents; called if they matter.
    """
    _check_size(size, options)
    if math.prod(size) * num_bytes > MAX_DECODE_COST:
        data = read()
        if data.startswith(image_metadata.JPEG) and data.count(b"\xff\xda") > MAX_SCANS:
            raise DataError(f"more than {MAX_SCANS} scans", REPLACE)


def _check_size(size: tuple[int, int], options: DecodeOptions) -> None:
    pixels, aspect = math.prod(size), max(size) / min(size)
    if pixels > options.max_pixels:
        limit, fix = f"more than --maxPixels {options.max_pixels}", f"--maxPixels {pixels}"
    elif aspect > options.max_aspect:
        limit = f"more than --maxAspect {options.max_aspect:.12g} to 1"
        fix = f"--maxAspect {math.ceil(aspect)}"
    else:
        return
    raise DataError(f"{size[0]} x {size[1]} pixels are {limit}", f"remove the file, or {fix}")


def _read(source: str | Path | io.BytesIO) -> bytes:
    return source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()


def _is_transparent(image: Image.Image) -> bool:
    if image.mode in ("LA", "La", "PA", "RGBA"):
        return image.getchannel(len(image.getbands()) - 1).getextrema()[0] < 255
    if "transparency" in image.info:  # the colours of it
        if image.mode == "I;16":
            return bool((np.asarray(image) == image.info["transparency"]).any())
        with contextlib.suppress(Exception):  # a damaged entry does not matter
            return image.convert("RGBA").getchannel("A").getextrema()[0] < 255
    return False
