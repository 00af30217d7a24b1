"""Choose what part of a picture is resized, and which windows of the result a network sees.

The rules are those of fb.resnet.torch; `resize` says which program's rounding decides about the
centre: "torch7" begins it at ceil((side - size) / 2), "antialias" rounds half to even as
torchvision does. Sizes are in pixels.
"""

import math
from typing import NamedTuple

import numpy as np

from datasets.regions import Box

RESIZE = 256 / 224  # the shorter side of a validation image over that of its crop
ATTEMPTS, DRAWS_PER_ATTEMPT = 10, 5
MIN_AREA, MAX_AREA, MIN_ASPECT, MAX_ASPECT = 0.08, 1, 3 / 4, 4 / 3


class Window(NamedTuple):
    """Locate what a network sees in a resized box."""

    top: int
    left: int
    is_mirrored: bool = False


class Cut(NamedTuple):
    """Say which box of a picture is resized to which size, and which windows of that are cut."""

    box: Box
    scaled: tuple[int, int]  # height, width
    windows: tuple[Window, ...]


def random_sized_crop(width: int, height: int, size: int, draws: np.ndarray, resize: str) -> Cut:
    """Draw a crop of 8 to 100 % of the area, to be resized to size x size.

    The aspect is uniform from 3/4 to 4/3, then its sides are swapped with probability 1/2. After
    ten crops that do not fit, the shorter side is resized and the centre taken.

    Args:
        draws: the uniforms of the image; see `datasets.draws`.
    """
    draws = draws.tolist()
    for attempt in range(0, ATTEMPTS * DRAWS_PER_ATTEMPT, DRAWS_PER_ATTEMPT):
        area, aspect, swap, down, right = draws[attempt : attempt + DRAWS_PER_ATTEMPT]
        area = (MIN_AREA + (MAX_AREA - MIN_AREA) * area) * width * height
        aspect = MIN_ASPECT + (MAX_ASPECT - MIN_ASPECT) * aspect
        sides = int(math.sqrt(area * aspect) + 0.5), int(math.sqrt(area / aspect) + 0.5)
        w, h = sides if swap >= 0.5 else sides[::-1]
        if 0 < w <= width and 0 < h <= height:
            box = Box(int(right * (width - w + 1)), int(down * (height - h + 1)), w, h)
            return Cut(box, (size, size), (Window(0, 0),))
    return _scale_and_centre(width, height, size, size, resize)


def centre_crop(width: int, height: int, size: int, resize: str) -> Cut:
    """Resize the shorter side to 256/224 of `size`, and take the centre."""
    return _scale_and_centre(width, height, round(size * RESIZE), size, resize)


def small_centre_crop(width: int, height: int, size: int, _: str) -> Cut:
    """Resize the shorter side to `size`, and take the centre: of images up to 64 pixels."""
    scale = size / min(width, height)
    scaled = tuple(max(size, round(side * scale)) for side in (height, width))
    centre = Window(*((side - size) // 2 for side in scaled))
    return Cut(Box(0, 0, width, height), scaled, (centre,))


def ten_crops(width: int, height: int, size: int, resize: str) -> Cut:
    """Resize as `centre_crop`; take the corners and the centre, and those of the mirrored image."""
    box, scaled, (centre,) = centre_crop(width, height, size, resize)
    bottom, right = scaled[0] - size, scaled[1] - size
    corners = [(top, left) for top in (0, bottom) for left in (0, right)]
    five = [*corners, (centre.top, centre.left)]
    mirrored = [Window(top, right - left, True) for top, left in five]
    return Cut(box, scaled, (*(Window(*window) for window in five), *mirrored))


def _scale_and_centre(width: int, height: int, shorter: int, size: int, resize: str) -> Cut:
    short = min(width, height)
    scaled = shorter * height // short, shorter * width // short
    if resize == "torch7":
        # Parity: torchvision's centre lies one pixel further up or left for a quarter of sizes.
        centre = Window(*(-(-(side - size) // 2) for side in scaled))
    else:
        centre = Window(*(round((side - size) / 2) for side in scaled))
    return Cut(Box(0, 0, width, height), scaled, (centre,))
