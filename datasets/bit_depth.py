"""Reduce images of more than 8 bits to 8: by the scale that the file declares, else by a rule.

The rule, for values of which a file says only how they are stored: white is what `--whiteLevel`
says, or else the largest value of an integer type, and 1 for floats. It looks at no picture,
because pictures of one dataset must be scaled alike. README.md in this directory explains it.
"""

import math
import re
import sys
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImagePalette

from errors import DataError

RANGES = (1, 255, 4095, 65535)  # white levels that are advised
DARK = 15  # colours up to here, after 16 bits were cut to 8, come from at most 12 bits
DIM = (
    "images of 16 bits that use at most 12 are read as 0 to 65535, so nearly black, because "
    "nothing in their files declares the scale; --whiteLevel 4095 reads 12 bits, 255 reads 8"
)
ASSUMED = (
    "{} images are read as {} to {}, because nothing in their files declares the scale; "
    "--whiteLevel sets another white (datasets/README.md)"
)
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
    image: Image.Image, raw: str, reopen: Callable[[], Image.Image], white: float | None
) -> tuple[Image.Image, str | None]:
    """Return an image of 8 bits, and a sentence if the rule has decided about its scale.

    Args:
        image: decoded.
        raw: what `prepare` has returned for it.
        reopen: opens the same file again.
        white: value of white where the file declares none; None takes that of the type.

    Raises:
        DataError: values that the rule does not fit, or not finite.
    """
    tags = getattr(image, "tag_v2", {})
    if not tags and ";16" not in raw and image.mode not in ("I", "F"):
        return image, None
    bits, kind = 16, "unsigned"
    if image.mode[0] in "IFL" and tags:
        bits, kind = tags.get(BITS, (1,))[0], KINDS.get(tags.get(SAMPLE_FORMAT, (1,))[0], "other")
    if image.mode == "F":
        kind = "float"
    declared = _declared_range(image, bits, kind)
    if raw == "LA;16B":  # see `prepare`
        values = np.asarray(image)[..., :2].copy().view(">u2")[..., 0]
    elif image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if (bits, kind) == (32, "unsigned"):  # Pillow has signed ones only
            values = values.view(np.uint32)
    elif image.mode == "L" and kind == "signed":
        values = np.asarray(image).view(np.int8)
    elif re.match("(RGB[AX]?|[RGBA]);16", raw):
        colours = np.asarray(image)[..., :3]  # Pillow has kept the upper 8 bits of 16
        if not (declared or white):
            return image, DIM if 0 < colours.max() <= DARK else None
        values = colours.astype(np.uint16) * 256 + _lower_bytes(reopen)
    else:
        return image, None
    (low, high), remark = _find_range(values, bits, kind, declared, white)
    pixels = _scale(values, low, high)
    if tags and image.mode in ("F", "I;16") and tags.get(PHOTOMETRIC, 0) == 0:  # white is zero
        pixels = 255 - pixels
    return Image.fromarray(pixels), remark


def _lower_bytes(reopen: Callable[[], Image.Image]) -> np.ndarray:
    """Decode colours of 16 bits in the other byte order: the lower bytes, (H, W, 3)."""
    swapped = {"L": "B", "B": "L", "N": OTHER}
    with reopen() as image:
        if image.tile[0].codec_name == "libtiff" and image.tag_v2.get(PLANES) == 2:
            what = "compressed planes of 16 bits cannot be read to the last bit"
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
    values: np.ndarray,
    bits: int,
    kind: str,
    declared: tuple[float, float] | None,
    white: float | None,
) -> tuple[tuple[float, float], str | None]:
    """Return the values of black and white, and a sentence if nothing declares them."""
    least, most = values.min().item(), values.max().item()
    if not (math.isfinite(least) and math.isfinite(most)):
        raise DataError("not all values are finite", "save it with 8 or 16 bits")
    if declared and declared[0] <= least and most <= declared[1]:
        return declared, None
    if white or least == most == 0:
        return (0, white or 1), None
    limit = 1 if kind == "float" else 2 ** (bits - (kind == "signed")) - 1
    low = -limit - 1 if least < 0 and kind == "signed" else 0
    if kind == "float":  # resizing overshoots by a little: allow a 255th
        fits = least >= low - 1 / 255 and most <= limit + 1 / 255
    else:  # nobody fills 32 bits by chance: a 255th of them would be one colour
        fits = bits < 32 or 255 * (most - min(least, 0)) >= limit - low
    if not fits:
        advised = next((high for high in RANGES if most <= high), math.ceil(most))
        raise DataError(
            f"{kind} values from {least:g} to {most:g}, and no range declared",
            f"--whiteLevel {advised} if that is white, or save it with 16 bits",
        )
    if kind == "unsigned":
        return (low, limit), DIM if bits == 16 and most <= 4095 else None
    is_plain = low < 0 and 16 * (most - least) >= limit - low  # a picture of signed values
    return (low, limit), None if is_plain else ASSUMED.format(kind, low, limit)


def _scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map `low` to 0 and `high` to 255, rounded, in little memory."""
    scaled = values.astype(np.float32)
    scaled -= low
    scaled *= 255 / (high - low)
    np.rint(scaled, out=scaled)
    np.clip(scaled, 0, 255, out=scaled)
    return scaled.astype(np.uint8)
