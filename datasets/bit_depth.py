"""Reduce images of more than 8 bits to 8: by the scale that the file declares, else by a rule.

The rule, for values of which a file says only how they are stored: they are read from 0 to the
smallest of RANGES that holds all of them. README.md in this directory explains it.
"""

import math
import re
import sys
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImagePalette

from errors import DataError

RANGES = (255, 4095, 65535)  # 8, 12 and 16 bits
DARK = 15  # colours up to here, after 16 bits were cut to 8, come from at most 12 bits
# Tags of TIFF.
BITS, PHOTOMETRIC, PLANES, MAX_SAMPLE, COLOUR_MAP = 258, 262, 284, 281, 320
SAMPLE_FORMAT, S_MIN_SAMPLE, S_MAX_SAMPLE = 339, 340, 341
KINDS = {1: "unsigned", 2: "signed", 3: "float"}  # of SampleFormat
NATIVE, OTHER = ("L", "B") if sys.byteorder == "little" else ("B", "L")


def prepare(image: Image.Image) -> str:
    """Correct how Pillow reads some files, before it does; return its name of their raw pixels."""
    tags = getattr(image, "tag_v2", None)
    if tags:
        _correct_tiff(image, tags)
    raw = _raw_modes(image)[0] if image.tile else ""
    if raw == "LA;16B":  # Pillow would drop the lower bytes: read bytes as colours
        _change_raw_modes(image, lambda raw: "RGBA")
    return raw


def _correct_tiff(image: Image.Image, tags: Mapping) -> None:
    def correct(raw: str) -> str:
        # libtiff returns the byte order of this machine, which Pillow overlooks for these.
        if is_libtiff and NATIVE == "L" and raw in ("I;16BS", "I;32BS", "F;32BF"):
            return raw.replace("B", "", 1)
        # Pillow would read planes of 16 bits as ones of 8.
        if not is_libtiff and tags.get(PLANES) == 2 and tags.get(BITS, (1,))[0] == 16:
            return f"{raw};16{'B' if tags.prefix == b'MM' else 'L'}"
        return raw

    is_libtiff = image.tile[0].codec_name == "libtiff"
    _change_raw_modes(image, correct)
    if image.mode in ("P", "PA") and max(tags[COLOUR_MAP]) < 256:
        # Some programs write colours of 8 bits where TIFF has 16.
        image.palette = ImagePalette.raw("RGB;L", bytes(tags[COLOUR_MAP]))


def _raw_modes(image: Image.Image) -> list[str]:
    """Return how Pillow is going to read each part of a file."""
    all_args = (tile.args for tile in image.tile)
    return [args if isinstance(args, str) else str(args[0]) for args in all_args]


def _change_raw_modes(image: Image.Image, change: Callable[[str], str]) -> None:
    image.tile = [
        tile._replace(
            args=change(raw) if isinstance(tile.args, str) else (change(raw), *tile.args[1:])
        )
        for tile, raw in zip(image.tile, _raw_modes(image), strict=True)
    ]


def to_8_bits(
    image: Image.Image, raw: str, reopen: Callable[[], Image.Image]
) -> tuple[Image.Image, str | None]:
    """Return an image of 8 bits, and a sentence if a rule has decided about its scale.

    Args:
        image: decoded.
        raw: what `prepare` has returned for it.
        reopen: opens the same file again.

    Raises:
        DataError: values in none of the ranges, or not finite.
    """
    tags = getattr(image, "tag_v2", {})
    if not tags and ";16" not in raw and image.mode not in ("I", "F"):
        return image, None
    bits, kind = 16, "unsigned"
    if image.mode[0] in "IFL" and tags:
        bits, kind = tags.get(BITS, (1,))[0], KINDS.get(tags.get(SAMPLE_FORMAT, (1,))[0], "other")
    if raw == "LA;16B":  # see `prepare`
        values = np.asarray(image)[..., :2].copy().view(">u2")[..., 0]
    elif image.mode in ("I", "F") or image.mode.startswith("I;16"):
        kind = "float" if image.mode == "F" else kind
        values = np.asarray(image)
        if (bits, kind) == (32, "unsigned"):  # Pillow has signed ones only
            values = values.view(np.uint32)
    elif image.mode == "L" and kind == "signed":
        values = np.asarray(image).view(np.int8)
    elif re.match("(RGB[AX]?|[RGBA]);16", raw):
        colours = np.asarray(image)[..., :3]
        if colours.max() > DARK:  # Pillow has kept the upper 8 bits of 16
            return image, None
        values = colours.astype(np.uint16) * 256 + _lower_bytes(reopen)
    else:
        return image, None
    (low, high), remark = _find_range(values, bits, kind, _declared_range(image, bits, kind))
    pixels = _scale(values, low, high)
    if tags and image.mode in ("F", "I;16") and tags.get(PHOTOMETRIC, 0) == 0:  # white is zero
        pixels = 255 - pixels
    return Image.fromarray(pixels), remark


def _lower_bytes(reopen: Callable[[], Image.Image]) -> np.ndarray:
    """Decode colours of 16 bits in the other byte order: the lower bytes, (H, W, 3)."""
    swapped = {"L": "B", "B": "L", "N": OTHER}
    with reopen() as image:
        if image.tile[0].codec_name == "libtiff" and image.tag_v2.get(PLANES) == 2:
            what = "compressed planes of 16 bits, of which at most 12 are used"
            raise DataError(what, "save it as PNG, or with 8 bits")
        prepare(image)
        _change_raw_modes(image, lambda raw: raw[:-1] + swapped[raw[-1]])
        image.load()
        return np.asarray(image)[..., :3]


def _declared_range(image: Image.Image, bits: int, kind: str) -> tuple[float, float] | None:
    """Return the values of black and white that a file declares."""
    if image.format == "PPM":  # Pillow has scaled by the file's maxval
        return (0, 65535) if image.mode == "I" else None
    tags = getattr(image, "tag_v2", {})
    low, high, statistic = (_number(tags.get(t)) for t in (S_MIN_SAMPLE, S_MAX_SAMPLE, MAX_SAMPLE))
    if kind == "float":
        return (low, high) if None not in (low, high) and low < high else None
    # MaxSampleValue may be that of the picture, and TIFF forbids to show that brighter. Only a
    # number of bits is a scale.
    for value in (high, statistic):
        if value in [2**n - 1 for n in range(8, bits)] and not low:
            return (0, value)
    return (0, 2**bits - 1) if kind == "unsigned" and bits not in (16, 32) else None


def _number(value: object) -> float | None:
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int | float) else None


def _find_range(
    values: np.ndarray, bits: int, kind: str, declared: tuple[float, float] | None
) -> tuple[tuple[float, float], str | None]:
    """Return the values of black and white, and a sentence if nothing declares them."""
    least, most = values.min().item(), values.max().item()
    if not (math.isfinite(least) and math.isfinite(most)):
        raise DataError("not all values are finite", "save it with 8 or 16 bits")
    if declared and declared[0] <= least and most <= declared[1]:
        return declared, None
    if kind == "float":
        # Resizing overshoots by a little: allow a 255th.
        high = next((high for high in (1, *RANGES) if 255 * most <= 256 * high), None)
        if high is None or 255 * least < -high:
            raise DataError(
                f"float values from {least:g} to {most:g}, and no range declared: not from 0 to "
                "1, 255, 4095 or 65535",
                "scale them, or declare SMinSampleValue and SMaxSampleValue in a TIFF",
            )
        is_known = most == 0
    else:
        limit = 2 ** (bits - (kind == "signed")) - 1
        if least < 0:
            return (-limit - 1, limit), None
        high = next((high for high in RANGES if most <= high < limit), limit)
        is_known = kind == "unsigned" and (most == 0 or high == limit)
    if is_known:
        return (0, high), None
    return (0, high), (
        f"{kind} images with values from 0 to {high} are read as 0 to {high}, because nothing in "
        "their files declares the scale (datasets/README.md)"
    )


def _scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map `low` to 0 and `high` to 255, rounded, in little memory."""
    scaled = values.astype(np.float32)
    scaled -= low
    scaled *= 255 / (high - low)
    np.rint(scaled, out=scaled)
    if values.dtype.kind == "f":
        np.clip(scaled, 0, 255, out=scaled)
    return scaled.astype(np.uint8)
