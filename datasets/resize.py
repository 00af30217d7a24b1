"""Resize a box of a picture: with anti-aliasing, as torchvision, or as Torch7 does.

Torch7's is the resize of the published ImageNet errors: bicubic (Catmull-Rom, a = -0.5) at the four
nearest pixels, corner on corner, without anti-aliasing, neither rounded nor clipped. No option of
torchvision or Pillow reproduces it (docs/parity.md, ImageNet augmentation).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.cuts import Cut

NUM_TAPS = 4
CACHED_TAPS = 512  # of an axis, 7 KB each at 224 pixels


def antialias(pixels: np.ndarray, extent: tuple[float, float], cut: Cut, size: int) -> Tensor:
    """Resize with anti-aliasing, and cut the windows.

    Args:
        pixels: (h, w, C) uint8, the box of the cut.
        extent: height and width of the box in these pixels; see `datasets.regions.Decoded`.

    Returns:
        (windows, size, size, C) uint8.
    """
    # Only with its stride in this order does torch see that a single image is channels-last.
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    if extent != pixels.shape[:2]:
        # From factors F.interpolate computes the size, and must not round it down by a pixel.
        scales = [(side + 1e-6) / of for side, of in zip(cut.scaled, extent, strict=True)]
        image = F.interpolate(image, scale_factor=scales, mode="bicubic", antialias=True)
    elif extent != cut.scaled:
        image = F.interpolate(image, cut.scaled, mode="bicubic", antialias=True)
    else:
        image = image.clone()  # the caller's pixels are valid for this call only
    image = image[0].permute(1, 2, 0)
    crops = [image[top : top + size, left : left + size] for top, left, _ in cut.windows]
    are_mirrored = (window.is_mirrored for window in cut.windows)
    flipped = zip(crops, are_mirrored, strict=True)
    crops = [crop.flip(1) if is_mirrored else crop for crop, is_mirrored in flipped]
    return torch.stack(crops) if len(crops) > 1 else crops[0][None]


class Taps(NamedTuple):
    """Hold, for each pixel along an axis, the source pixels that it sums and their weights."""

    index: np.ndarray  # (n, 4) int32
    weights: np.ndarray  # (n, 4) float32


@lru_cache(CACHED_TAPS)
def torch7_taps(length: int, scaled: int, first: int, count: int) -> Taps:
    """Compute `count` pixels from `first` on, of an axis resized from `length` to `scaled`.

    Pixel i lies at i (length - 1) / (scaled - 1). Beyond the ends the line is continued straight.
    Positions are exact, weights are computed in float64.
    """
    whole, rest = np.divmod(np.arange(first, first + count) * (length - 1), scaled - 1)
    t = rest[:, None] / (scaled - 1)
    # Catmull-Rom at the pixels -1, 0, 1 and 2 from the whole position.
    polynomials = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3,
                   t**3 - t**2)  # fmt: skip
    weights = np.concatenate(polynomials, 1) / 2
    index = whole[:, None] + np.arange(-1, NUM_TAPS - 1)
    # A pixel beyond an end is 2 * end - neighbour.
    for beyond, end, neighbour in ((0, 1, 2), (3, 2, 1)):
        is_beyond = (index[:, beyond] < 0) | (index[:, beyond] >= length)
        outside = weights[:, beyond] * is_beyond
        weights[:, end] += 2 * outside
        weights[:, neighbour] -= outside
        weights[:, beyond] -= outside
    return Taps(index.clip(0, length - 1).astype(np.int32), weights.astype(np.float32))


class Packed(NamedTuple):
    """Hold what Torch7's resize reads of n pictures; every field is concatenated over them.

    Only the source pixels that some window needs are here: at most four rows and columns for each
    row and column of the result.
    """

    pixels: Tensor  # (bytes,) uint8: (h, w, C) of each picture
    row_index: Tensor  # (rows, 4) int32: the taps of each picture's resized rows
    row_weights: Tensor  # (rows, 4) float32
    column_index: Tensor
    column_weights: Tensor
    shapes: Tensor  # (n, 4) int64: h, w, and how many rows and columns they are resized to
    windows: Tensor  # (n, k, 3) int64: top, left, whether mirrored


def pack(pixels: np.ndarray, cut: Cut, size: int) -> Packed:
    """Pack one picture for `torch7`; `pixels` (h, w, C) uint8 is the box of the cut."""
    windows = np.array(cut.windows)
    sides, fields = [], []
    for axis in (0, 1):
        first = windows[:, axis].min()
        count = int(windows[:, axis].max() - first) + size
        index, weights = torch7_taps(pixels.shape[axis], cut.scaled[axis], int(first), count)
        windows[:, axis] -= first
        low, high = index.min(), index.max() + 1
        if high - low <= NUM_TAPS * count:
            used, index = slice(low, high), index - low
        else:
            used, place = np.unique(index, return_inverse=True)
            index = place.reshape(index.shape).astype(np.int32)
        pixels = pixels[used] if axis == 0 else pixels[:, used]
        fields += [torch.from_numpy(index), torch.from_numpy(weights)]
        sides.append(count)
    flat = torch.from_numpy(pixels.reshape(-1).copy())  # the caller's are valid for this call only
    shapes = torch.tensor([[*pixels.shape[:2], *sides]])
    return Packed(flat, *fields, shapes, torch.from_numpy(windows)[None])


def torch7(packed: Packed, size: int) -> Tensor:
    """Resize as Torch7's `image.scale(..., "bicubic")`: rows, then columns, in floats.

    Args:
        packed: on any device, but `shapes` and `windows` on the CPU.

    Returns:
        (n k, C, size, size) float32, 0 to 255 and beyond.
    """
    heights, widths, rows, columns = packed.shapes.T.tolist()
    areas = [height * width for height, width in zip(heights, widths, strict=True)]
    channels = len(packed.pixels) // sum(areas)
    pictures = packed.pixels.float().split([channels * area for area in areas])
    row_taps = packed.row_index.split(rows), packed.row_weights.split(rows)
    column_taps = packed.column_index.split(columns), packed.column_weights.split(columns)
    parts = zip(pictures, heights, *row_taps, *column_taps, packed.windows.tolist(), strict=True)
    resized = []
    for picture, height, row_index, row_weights, column_index, column_weights, windows in parts:
        image = _weighted_sums(picture.view(height, -1), row_index, row_weights)
        image = image.view(len(row_index), -1, channels).transpose(0, 1).flatten(1)  # (w, rows * C)
        image = _weighted_sums(image, column_index, column_weights)
        image = image.view(len(column_index), -1, channels).permute(2, 1, 0)  # (C, rows, columns)
        for top, left, is_mirrored in windows:
            window = image[:, top : top + size, left : left + size]
            resized.append(window.flip(2) if is_mirrored else window)
    return torch.stack(resized)


def _weighted_sums(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)
