"""Prepare images in loader processes, and finish batches of them on the training device."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets import cuts
from datasets.colour import Augment, Normalise, colour_draws
from datasets.decode import DecodeOptions, decode
from datasets.draws import uniforms
from datasets.memory_loader import normalise_pixels
from datasets.regions import Region, decode_region
from datasets.registry import Statistics
from datasets.resize import NUM_TAPS, Packed, antialias, pack, torch7

# A validation image is decoded at a reduced scale if that is at least four times as large as what
# it is resized to: then pixels differ by 0.2 of a grey level in the mean (docs/parity.md).
EVALUATION_MARGIN = 4
# What crosses to the main process of one image: tensors that are concatenated.
Fields = tuple[Tensor, ...]


class Pipeline(Protocol):
    """Read and prepare images in loader processes, and finish batches on the training device."""

    size: int  # height and width of the network's input in pixels
    channels: int  # of it
    image_bytes: int  # of an image that cross to the main process, at most
    typical_bytes: int  # and mostly
    dtype: torch.dtype  # of the batches

    def read(self, path: str, options: DecodeOptions, epoch: int, index: int) -> tuple:
        """Decode an image: (whatever `prepare` takes, remarks for the user)."""

    def prepare(self, picture: object) -> Fields:
        """Return what `finish` needs of an image."""

    def finish(self, chunks: list[Fields], device: torch.device) -> Tensor:
        """Return the batch (n, C, H, W) of some chunks, whose fields are concatenated."""


@dataclass(frozen=True)
class SmallImages:
    """Resize and crop images up to 64 pixels with Pillow."""

    size: int  # height and width in pixels
    statistics: Statistics | None = None  # of pixels from 0 to 255; None leaves them as they are
    dtype: torch.dtype = torch.float32  # of the batches
    channels: int = 3

    @property
    def image_bytes(self) -> int:
        """Return how many bytes of an image cross to the main process."""
        return self.channels * self.size**2

    @property
    def typical_bytes(self) -> int:
        """Return the same."""
        return self.image_bytes

    def read(self, path: str, options: DecodeOptions, *_: int) -> tuple[Image.Image, list[str]]:
        """Decode an image."""
        return decode(path, options)

    def prepare(self, picture: Image.Image) -> Fields:
        """Resize the shorter side, then crop the centre: (1, size, size, C) uint8."""
        if picture.size != (self.size, self.size):
            cut = cuts.small_centre_crop(*picture.size, self.size, "bicubic")
            ((top, left, _),) = cut.windows
            picture = picture.resize(cut.scaled[::-1], Image.Resampling.BICUBIC)
            picture = picture.crop((left, top, left + self.size, top + self.size))
        return (torch.from_numpy(np.array(picture)).view(1, self.size, self.size, self.channels),)

    def finish(self, chunks: list[Fields], device: torch.device) -> Tensor:
        """Join the images of a batch, (n, size, size, C), or normalise them, (n, C, size, size)."""
        images = torch.cat([images.to(device, non_blocking=True) for (images,) in chunks])
        if self.statistics is None:
            return images
        mean, std = torch.tensor(self.statistics, dtype=self.dtype, device=device)
        return normalise_pixels(images, mean, std).permute(0, 3, 1, 2)


class Picture(NamedTuple):
    """Hold a decoded image above 64 pixels."""

    pixels: np.ndarray  # (h, w, C) uint8, the box of the cut; valid until the next is decoded
    extent: tuple[float, float]  # height and width of the box in these pixels
    cut: cuts.Cut
    draws: np.ndarray | None  # (1, 64) uniforms that augment it


class LargeImages:
    """Crop and resize images above 64 pixels in loader processes, augment on the device.

    Args:
        size: height and width in pixels.
        resize: "antialias" or "torch7".
        seed: of the augmentation; None takes the centre.
        ten_crops: take ten crops of each image.
        statistics: mean and std per channel, of pixels from 0 to 255.
        device, dtype: of the batches.
    """

    def __init__(
        self,
        size: int,
        resize: str,
        statistics: Statistics,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        seed: int | None = None,
        ten_crops: bool = False,
    ):
        self.size, self.resize, self.dtype, self.seed = size, resize, dtype, seed
        self.channels = len(statistics[0])
        self._crop = cuts.ten_crops if ten_crops else cuts.centre_crop
        self._finish_args = statistics, device, dtype
        # Torch7's resize makes floats, four times as many bytes as a crop: they stay on the device.
        self.resizes_on_device = resize == "torch7" and device.type != "cpu"
        if self.resizes_on_device:
            # What it may read: four rows, four columns and their taps for each of the result, which
            # for ten crops is a whole picture of up to 2 to 1. Narrower ones take more.
            short = round(size * cuts.RESIZE) if ten_crops else size
            area, sides = (2 * short**2, 3 * short) if ten_crops else (short**2, 2 * short)
            self.image_bytes = self.channels * NUM_TAPS**2 * area + 8 * NUM_TAPS * sides
        else:
            bytes_per_pixel = self.channels * (4 if resize == "torch7" else 1)
            self.image_bytes = (10 if ten_crops else 1) * size**2 * bytes_per_pixel
        # Few crops are as large as Torch7's resize may read.
        self.typical_bytes = self.image_bytes // (8 if self.resizes_on_device else 1)

    @cached_property
    def _augment(self) -> Normalise:
        # Not in __init__: loader processes may get a copy, which needs nothing on the device.
        return (Normalise if self.seed is None else Augment)(*self._finish_args)

    def read(
        self, path: str, options: DecodeOptions, epoch: int, index: int
    ) -> tuple[Picture, list[str]]:
        """Decode the part of an image that is needed."""
        draws, cut = None, None
        if self.seed is not None:
            draws = uniforms(self.seed, epoch, index)

        def choose(width: int, height: int) -> Region:
            nonlocal cut
            cut = self._cut(width, height, draws)
            margin = EVALUATION_MARGIN if draws is None else 1
            least = tuple(margin * side for side in cut.scaled)
            return Region(cut.box, least if self.resize == "antialias" else None)

        pixels, extent, remarks = decode_region(path, options, choose)
        return Picture(pixels, extent, cut, draws), remarks

    def prepare(self, picture: Picture) -> Fields:
        """Cut and resize an image, unless the device does; pass on its draws."""
        pixels, extent, cut, draws = picture
        if self.resize == "antialias":
            fields = (antialias(pixels, extent, cut, self.size),)
        else:
            fields = pack(pixels, cut, self.size)
            if not self.resizes_on_device:
                fields = (torch7(fields, self.size),)
        return fields if draws is None else (*fields, torch.from_numpy(draws))

    def _cut(self, width: int, height: int, draws: np.ndarray | None) -> cuts.Cut:
        if draws is None:
            return self._crop(width, height, self.size, self.resize)
        return cuts.random_sized_crop(width, height, self.size, draws[0], self.resize)

    def finish(self, chunks: list[Fields], device: torch.device) -> Tensor:
        """Resize if that is left to do, augment and normalise: (n, C, size, size)."""
        move = partial(Tensor.to, device=device, non_blocking=True)
        images, draws = [], []
        for fields in chunks:
            if self.seed is not None:
                *fields, draw = fields
                draws.append(draw)
            if self.resizes_on_device:
                packed = Packed(*fields)
                moved = Packed(*map(move, packed[:-2]), packed.shapes, packed.windows)
                images.append(torch7(moved, self.size))
            else:
                images.append(move(fields[0]))
        batch = images[0] if len(images) == 1 else torch.cat(images)
        if self.resize == "antialias":
            batch = batch.permute(0, 3, 1, 2)
        return self._augment(batch, *([colour_draws(torch.cat(draws).numpy())] if draws else []))
