"""Decode the part of an image file that is needed, at the size that is needed."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.decode import DecodeOptions, decode


class Box(NamedTuple):
    """Locate a part of a picture, in pixels."""

    left: int
    top: int
    width: int
    height: int


class Region(NamedTuple):
    """Say which part of a picture is needed, and at which size."""

    box: Box
    least: tuple[float, float] | None  # height and width that it keeps at a reduced scale, or None


class Decoded(NamedTuple):
    """Hold the pixels of a region."""

    pixels: np.ndarray  # (h, w, 3) uint8, valid until the next call
    extent: tuple[float, float]  # height and width of the box in these pixels
    remarks: list[str]


def decode_region(
    path: str | Path, options: DecodeOptions, choose: Callable[[int, int], Region]
) -> Decoded:
    """Decode a region."""
    image, remarks = decode(path, options)
    left, top, width, height = choose(*image.size).box
    pixels = np.array(image)[top : top + height, left : left + width]
    return Decoded(pixels, (height, width), remarks)
