"""Restate fb.resnet.torch's transforms and Torch7's resize, step by step, in float64.

A picture is (H, W, 3). Nothing is rounded or clipped.
"""

import math
from collections.abc import Callable

import numpy as np

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
GREY = np.array([0.299, 0.587, 0.114])
# The principal components of the colours of ImageNet's training images.
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


def corner_on_corner(i: int, length: int, count: int) -> float:
    """Place output pixel i of `count` among `length` pixels, as Torch7 does."""
    return i * (length - 1) / (count - 1)


def cubic(distance: float, a: float) -> float:
    """Weigh a tap by its distance (Keys' kernel)."""
    if distance < 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0


def bicubic_matrix(
    length: int,
    count: int,
    a: float = -0.5,
    place: Callable[[int, int, int], float] = corner_on_corner,
    straight: bool = True,
) -> np.ndarray:
    """Build (count, length), the weights of all pixels of a line, from four taps a pixel.

    Args:
        length: of the line.
        count: of its output pixels.
        a: -0.5 is Catmull-Rom's.
        place: gives the position of an output pixel.
        straight: continue the line straight beyond its ends; else repeat the last pixel.
    """
    matrix = np.zeros((count, length))
    for i in range(count):
        position = place(i, length, count)
        left = math.floor(position)
        for tap in range(left - 1, left + 3):
            weight = cubic(abs(position - tap), a)
            end = min(max(tap, 0), length - 1)
            beyond = abs(tap - end) if straight and length > 1 else 0
            matrix[i, end] += weight * (1 + beyond)  # p[-k] = p[0] + k (p[0] - p[1])
            if beyond:
                matrix[i, 1 if end == 0 else length - 2] -= weight * beyond
    return matrix


def resize(picture: np.ndarray, height: int, width: int, **rule) -> np.ndarray:
    """Resize as Torch7's `image.scale(picture, width, height, 'bicubic')`; rows, then columns."""
    rows = bicubic_matrix(picture.shape[1], width, **rule) @ picture
    return np.tensordot(bicubic_matrix(picture.shape[0], height, **rule), rows, 1)


def scaled_size(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Return (height, width) after `Scale(shorter)`: the longer side is truncated."""
    if width < height:
        return height * shorter // width, shorter
    return shorter, width * shorter // height


def scale(picture: np.ndarray, shorter: int, **rule) -> np.ndarray:
    """Resize the shorter side: `Scale`."""
    return resize(picture, *scaled_size(*picture.shape[:2], shorter), **rule)


def centre_crop(picture: np.ndarray, size: int, start=math.ceil) -> np.ndarray:
    """Cut the centre: `CenterCrop`."""
    top, left = (start((side - size) / 2) for side in picture.shape[:2])
    return picture[top : top + size, left : left + size]


def ten_crops(picture: np.ndarray, size: int) -> np.ndarray:
    """Cut the centre and four corners of the picture and of its mirror image: `TenCrop`."""
    crops = []
    for image in (picture, picture[:, ::-1]):
        crops += [
            centre_crop(image, size),
            image[:size, :size],
            image[:size, -size:],
            image[-size:, :size],
            image[-size:, -size:],
        ]
    return np.stack(crops)


def draw_crops(
    rng: np.random.Generator, count: int, height: int, width: int, log_aspect=False, swap=True
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` crops of a picture: `RandomSizedCrop`, and twins of it.

    Returns:
        (count, 4), left, top, width, height; and whether one of ten attempts has fitted (count,).
    """
    boxes, fitted = np.zeros((count, 4), dtype=np.int64), np.zeros(count, dtype=bool)
    for _ in range(10):
        left_over = np.flatnonzero(~fitted)
        area = height * width * rng.uniform(0.08, 1, len(left_over))
        aspect = rng.uniform(3 / 4, 4 / 3, len(left_over))
        if log_aspect:
            aspect = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), len(left_over)))
        w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        if swap:
            swapped = rng.random(len(left_over)) < 0.5
            w, h = np.where(swapped, h, w), np.where(swapped, w, h)
        fits = (w <= width) & (h <= height)
        w, h = w[fits].astype(np.int64), h[fits].astype(np.int64)
        top, left = rng.integers(height - h, endpoint=True), rng.integers(width - w, endpoint=True)
        boxes[left_over[fits]] = np.stack([left, top, w, h], axis=1)
        fitted[left_over[fits]] = True
    return boxes, fitted


def blend(image: np.ndarray, other: np.ndarray | float, alpha: float) -> np.ndarray:
    """Mix `image` (alpha) with another."""
    return alpha * image + (1 - alpha) * other


def brightness(image: np.ndarray, alpha: float) -> np.ndarray:
    """Mix with black."""
    return blend(image, 0.0, alpha)


def contrast(image: np.ndarray, alpha: float) -> np.ndarray:
    """Mix with the mean of the grey image."""
    return blend(image, (image @ GREY).mean(), alpha)


def saturation(image: np.ndarray, alpha: float) -> np.ndarray:
    """Mix with the grey image."""
    return blend(image, (image @ GREY)[..., None], alpha)


JITTER = (brightness, contrast, saturation)


def augment_colours(
    image: np.ndarray,
    alphas: tuple[float, float, float],
    order: tuple[int, int, int],
    lighting: np.ndarray,
    mirror: bool,
    after_step: Callable[[np.ndarray], np.ndarray] = lambda image: image,
) -> np.ndarray:
    """Apply `ColorJitter`, `Lighting`, `ColorNormalize` and `HorizontalFlip`, one by one.

    Args:
        image: from 0 to 1.
        alphas: of brightness, contrast and saturation.
        order: which of these three comes first, second and third.
        lighting: the three draws of `Lighting`, of standard deviation 0.1.
        mirror: flip left and right.
        after_step: applied after each step but the last two (what a twin does: clamp).
    """
    for step in order:
        image = after_step(JITTER[step](image, alphas[step]))
    image = after_step(image + (EIGENVECTORS * lighting * EIGENVALUES).sum(axis=1))
    image = (image - MEAN) / STD
    return image[:, ::-1] if mirror else image
