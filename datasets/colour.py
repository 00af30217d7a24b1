"""Jitter, light, mirror and normalise a batch of training images on its device.

fb.resnet.torch's steps, in its order and with its distributions, all of them affine in the colours
and none clamped: so one 3x4 matrix per image does them all (docs/parity.md, ImageNet augmentation).
On grey images saturation changes nothing, and lighting, which is of colours, is left out.
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
CONTIGUOUS = torch.contiguous_format
PART_VALUES = 2**18  # values of a part of a batch on the CPU: a megabyte


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
    """Map (n, C, H, W) pixels from 0 to 255 to mean 0 and std 1, in the given type.

    Args:
        statistics: mean and std per channel, of pixels from 0 to 255.
    """

    def __init__(self, statistics: Statistics, device: torch.device | str, dtype: torch.dtype):
        mean, std = torch.tensor(statistics, dtype=torch.float64, device=device)
        self.scale, self.shift = 1 / std, -mean / std  # (C,)
        self.dtype = dtype

    def __call__(self, images: Tensor, *draws: Tensor) -> Tensor:
        """Compute a batch, in channels-last memory.

        Args:
            images: (n, C, H, W) uint8, or floats from 0 to 255 and beyond, in any memory format.
            draws: of `Augment`: (n, 10) float64 on the CPU, see `colour_draws`.
        """
        result = torch.empty_like(images, dtype=self.dtype, memory_format=torch.channels_last)
        size = len(images)
        if images.device.type == "cpu":  # parts that fit the cache of a core
            size = max(1, PART_VALUES // images[0].numel())
        # Memory that is had anew for each part would cost more time than computing.
        pixels, colours = (
            torch.empty_like(images[:size], dtype=self.dtype, memory_format=CONTIGUOUS)
            for _ in range(2)
        )
        for part in zip(*(each.split(size) for each in (result, images, *draws)), strict=True):
            target, source, *drawn = part
            used = slice(len(source))
            self._compute(pixels[used].copy_(source), colours[used], *drawn)
            target.copy_(colours[used])
        return result

    def _compute(self, pixels: Tensor, out: Tensor) -> None:
        scale, shift = (each.to(self.dtype)[:, None, None] for each in (self.scale, self.shift))
        torch.addcmul(shift, pixels, scale, out=out)


class Augment(Normalise):
    """Jitter brightness, contrast and saturation, add lighting noise, mirror, and normalise.

    Images have three channels, or one, which stands for three that are equal.
    Every image is computed alone, bit for bit: a batch may be divided in any way.
    """

    def __init__(self, statistics: Statistics, device: torch.device | str, dtype: torch.dtype):
        super().__init__(statistics, device, dtype)
        as_tensor = partial(torch.tensor, dtype=torch.float64, device=device)
        is_grey = len(self.scale) == 1
        self.grey = as_tensor((1.0,) if is_grey else GREY)  # (C,)
        self.identity = torch.eye(len(self.grey), out=as_tensor(()))
        self.components = as_tensor(EIGENVECTORS) * as_tensor(EIGENVALUES)  # (C, 3)
        if is_grey:
            self.components = torch.zeros_like(self.components[:1])

    def _compute(self, pixels: Tensor, out: Tensor, draws: Tensor) -> None:
        # Known on the CPU, so that nothing waits for a GPU.
        mirrored = draws[:, -1].nonzero()[:, 0].to(pixels.device, non_blocking=True)
        pixels[mirrored] = pixels[mirrored].flip(3)
        draws = draws.to(pixels.device, non_blocking=True)
        # Rows of bytes sum exactly in float32, and every row in one order.
        mean_colour = pixels.sum(3).double().sum(2) / pixels[0, 0].numel()  # (n, C)
        matrix, shift = (each.to(self.dtype) for each in self._matrices(mean_colour, draws))
        # Not matmul: its rounding depends on the number of images, and on a GPU on TF32.
        # Channel by channel, (n, 1, H W), and what each adds to all, (n, C, 1).
        first, *others = zip(pixels.flatten(2).split(1, 1), matrix.split(1, 2), strict=True)
        out = torch.addcmul(shift[..., None], *first, out=out.flatten(2))
        for channel, factors in others:
            out.addcmul_(channel, factors)

    def _matrices(self, mean_colour: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Compose all steps: (n, C, C) and (n, C) that map pixels to normalised values."""
        (brightness, contrast, saturation), lighting = draws[:, :3].T, draws[:, 6:9]
        # Parity: they come in the random order of `draws`. It has no effect, since nothing is
        # clamped: brightness scales any constant, and saturation keeps what is grey.
        own, mean_grey = brightness * contrast * saturation, (mean_colour * self.grey).sum(1)
        grey, constant = brightness * contrast - own, brightness * (1 - contrast) * mean_grey
        matrix = own[:, None, None] * self.identity + grey[:, None, None] * self.grey
        # The components are of colours from 0 to 1.
        shift = constant[:, None] + 255 * (self.components * lighting[:, None]).sum(2)
        return matrix * self.scale[:, None], shift * self.scale + self.shift
