"""Jitter, light, mirror and normalise a batch of training images on its device.

fb.resnet.torch's steps, in its order and with its distributions, all of them affine in the colours
and none clamped: so one 3x4 matrix per image does them all (docs/parity.md, ImageNet augmentation).
"""

import itertools
import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from datasets.registry import Statistics

JITTER = 0.4
LIGHTING_STD = 0.1
# Principal components of the colours of ImageNet's training pixels.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
GREY = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION = range(3)
ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION)))
FIRST_DRAW = 50  # the ones before are for the crop
NUM_COLOUR_DRAWS = 10


def colour_draws(draws: np.ndarray) -> Tensor:
    """Select what `Augment` needs: (n, 64) uniforms -> (n, 10) float64.

    Three blending factors, three steps in their order, three multiples of principal components, and
    whether to mirror.
    """
    draws = draws[:, FIRST_DRAW:]
    factors = 1 - JITTER + 2 * JITTER * draws[:, :3]
    steps = np.array(ORDERS)[(draws[:, 3] * len(ORDERS)).astype(int)]
    radius = np.sqrt(-2 * np.log1p(-draws[:, [4, 4, 5]]))  # Box-Muller
    angle = 2 * math.pi * draws[:, [6, 6, 7]]
    normals = radius * np.where([True, False, True], np.cos(angle), np.sin(angle))
    is_mirrored = draws[:, 8:9] < 0.5
    return torch.from_numpy(
        np.concatenate([factors, steps, LIGHTING_STD * normals, is_mirrored], 1)
    )


class Normalise:
    """Map (n, 3, H, W) pixels from 0 to 255 to mean 0 and std 1, in the given type.

    Args:
        statistics: mean and std per channel, of pixels from 0 to 255.
    """

    def __init__(self, statistics: Statistics, device: torch.device | str, dtype: torch.dtype):
        mean, std = torch.tensor(statistics, dtype=torch.float64, device=device)
        self.scale, self.shift = 1 / std, -mean / std  # (3,)
        self.dtype = dtype

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise a batch."""
        scale, shift = (each.to(self.dtype)[:, None, None] for each in (self.scale, self.shift))
        return torch.addcmul(shift, images.to(self.dtype), scale)


class Augment(Normalise):
    """Jitter brightness, contrast and saturation, add lighting noise, mirror, and normalise.

    Every image is computed alone, bit for bit: a batch may be divided in any way.
    """

    def __init__(self, statistics: Statistics, device: torch.device | str, dtype: torch.dtype):
        super().__init__(statistics, device, dtype)
        as_tensor = partial(torch.tensor, dtype=torch.float64, device=device)
        self.grey, self.identity = as_tensor(GREY), torch.eye(3, out=as_tensor(()))
        self.components = as_tensor(EIGENVECTORS) * as_tensor(EIGENVALUES)  # (3, 3)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            images: (n, 3, H, W) uint8, or floats from 0 to 255 and beyond.
            draws: (n, 10) float64, see `colour_draws`.
        """
        is_mirrored = draws[:, -1].bool()[:, None, None, None]
        pixels = torch.where(is_mirrored, images.flip(-1), images).to(self.dtype)
        matrix, shift = self._matrices(_mean_colour(pixels), draws)
        matrix, shift = (
            matrix.to(self.dtype),
            shift.to(self.dtype)[..., None],
        )  # (n, 3, 3), (n, 3, 1)
        # Not matmul: its rounding depends on the number of images, and on a GPU on TF32.
        pixels = pixels.flatten(2)  # (n, 3, H W)
        result = torch.addcmul(shift, pixels[:, 0:1], matrix[:, :, 0:1])
        for channel in (1, 2):
            source = slice(channel, channel + 1)
            result.addcmul_(pixels[:, source], matrix[:, :, source])
        return result.view_as(images)

    def _matrices(self, mean_colour: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Compose all steps: (n, 3, 3) and (n, 3) that map pixels to normalised values."""
        factors, steps, lighting = draws[:, :3], draws[:, 3:6], draws[:, 6:9]
        matrix, shift = self.identity.expand(len(draws), 3, 3), torch.zeros_like(factors)
        for step in steps.unbind(1):
            factor = factors.gather(1, step.long()[:, None])  # (n, 1)
            # Blend with black, with the mean grey of the image, or with the grey of each pixel.
            other = (1 - factor) * (step == CONTRAST)[:, None]
            mix = (1 - factor) * (step == SATURATION)[:, None]
            mean_grey = ((_apply(matrix, mean_colour) + shift) * self.grey).sum(1, keepdim=True)
            step_matrix = factor[..., None] * self.identity + mix[..., None] * self.grey
            matrix = _product(step_matrix, matrix)
            shift = _apply(step_matrix, shift) + other * mean_grey
        # The components are of colours from 0 to 1.
        shift = shift + 255 * _apply(self.components, lighting)
        return matrix * self.scale[:, None], shift * self.scale + self.shift


def _mean_colour(pixels: Tensor) -> Tensor:
    """Average (n, 3, H, W) over the pixels: (n, 3) float64, however many images there are."""
    # Rows of bytes sum exactly in float32.
    return pixels.sum(3).double().mean(2) / pixels.shape[3]


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix * vector[:, None]).sum(2)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return (left[..., None] * right[:, None]).sum(2)
