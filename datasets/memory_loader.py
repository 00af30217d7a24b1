"""Load datasets that fit in memory: one uint8 tensor on the device, indexed by batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.batch_sampler import BatchSampler
from datasets.decode import to_grey
from datasets.rng import generator
from errors import DataError

CHANNELS = ("red", "green", "blue")


@dataclass(frozen=True)
class ImageTensors:
    """Hold images and their classes."""

    pixels: Tensor  # (N, H, W, C) uint8; float32 where datasets/whitening.py has changed them
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "ImageTensors":
        """Copy images and labels to another device."""
        return ImageTensors(self.pixels.to(device), self.labels.to(device))

    def to_grey(self) -> "ImageTensors":
        """Convert RGB on the CPU to one channel, as image files are."""
        grey = self.pixels.new_empty(*self.pixels.shape[:3], 1)
        for target, part in zip(grey.split(1024), self.pixels.split(1024), strict=True):
            target.copy_(torch.from_numpy(to_grey(part.flatten(0, 1).numpy())).view(target.shape))
        return ImageTensors(grey, self.labels)


@dataclass(frozen=True)
class Augmentation:
    """Shift images by up to `pad` pixels; mirror half of them if `flip`."""

    pad: int
    flip: bool


@dataclass(frozen=True)
class EpochPlan:
    """Say which image each position of an epoch has and how it is augmented."""

    indices: Tensor  # (n,) images
    offset: Tensor | None = None  # (n, 2) shift in rows and columns; None without augmentation
    flipped: Tensor | None = None  # (n, 1) bool; None without mirroring

    def at(self, positions: Tensor | slice) -> "EpochPlan":
        """Select some positions."""
        parts = (self.indices, self.offset, self.flipped)
        return EpochPlan(*(None if part is None else part[positions] for part in parts))

    def copy_(self, other: "EpochPlan") -> None:
        """Overwrite this plan in place with that of another epoch of the same split."""
        for name in ("indices", "offset", "flipped"):
            if getattr(self, name) is not None:
                getattr(self, name).copy_(getattr(other, name))


class MemoryLoader:
    """Batch one split; order and augmentation are functions of (seed, epoch).

    Args:
        images: the whole dataset, on the device of the batches.
        sampler: divides the split among steps and ranks.
        mean, std: per channel, of pixels from 0 to 255.
        dtype: of the images yielded.
        augmentation: None only normalises.
    """

    def __init__(
        self,
        images: ImageTensors,
        sampler: BatchSampler,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        dtype: torch.dtype,
        augmentation: Augmentation | None = None,
    ):
        device = images.pixels.device
        self.images, self.sampler, self.augmentation = images, sampler.to(device), augmentation
        self.mean, self.std = torch.tensor([mean, std], dtype=dtype, device=device)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's batches of an epoch from step `start` on.

        Yields:
            images: (n, C, H, W), normalised, channels last in memory.
            targets: (n,) int64. n is 0 if a step has no image for this rank.
        """
        plan = self.plan(epoch)
        for step in range(start, len(self.sampler)):
            yield self.make_batch(plan.at(self.sampler.local_slice(step)))

    def plan(self, epoch: int) -> EpochPlan:
        """Draw the order and augmentation of a whole epoch on the device."""
        indices = self.sampler.epoch_indices(epoch)
        if self.augmentation is None:
            return EpochPlan(indices)
        device, n, pad = indices.device, len(indices), self.augmentation.pad
        rng = generator("crop", self.sampler.seed, epoch, device=device)
        offset = torch.randint(-pad, pad + 1, (n, 2), generator=rng, device=device)
        flipped = torch.rand(n, 1, generator=rng, device=device) < 0.5
        return EpochPlan(indices, offset, flipped if self.augmentation.flip else None)

    def make_batch(self, plan: EpochPlan) -> tuple[Tensor, Tensor]:
        """Build the batch of a plan without reading anything back from the device."""
        if self.augmentation is None:
            batch = normalise_pixels(self.images.pixels[plan.indices], self.mean, self.std)
        else:
            batch = crop_and_flip(self.images.pixels, plan, self.mean, self.std)
        return batch.permute(0, 3, 1, 2), self.images.labels[plan.indices]


def crop_and_flip(pixels: Tensor, plan: EpochPlan, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise, mirror, pad with zeros and crop (paper, section 4.1), in one gather.

    Args:
        pixels: (N, H, W, C) uint8.
        plan: which n images, and how each is augmented.

    Returns:
        (n, H, W, C) of the type of `mean`.
    """
    # Parity: the zeros come after normalising, so the border has the mean colour, not black.
    height, width = pixels.shape[1:3]
    device = pixels.device
    rows = plan.offset[:, :1] + torch.arange(height, device=device)  # (n, H) in the source
    columns = plan.offset[:, 1:] + torch.arange(width, device=device)  # (n, W)
    if plan.flipped is not None:
        columns = torch.where(plan.flipped, width - 1 - columns, columns)
    is_row, is_column = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    inside = is_row[:, :, None] & is_column[:, None, :]  # (n, H, W)
    source = pixels[
        plan.indices[:, None, None],
        rows.clamp(0, height - 1)[:, :, None],
        columns.clamp(0, width - 1)[:, None, :],
    ]  # (n, H, W, C)
    return normalise_pixels(source, mean, std) * inside[..., None]


def normalise_pixels(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Map (..., C) uint8 pixels to mean 0 and std 1, in the type of `mean`."""
    return (pixels.to(mean.dtype) - mean) / std


def channel_statistics(
    pixels: Tensor, indices: Tensor, warn: Callable[[str], None]
) -> tuple[list[float], list[float]]:
    """Compute mean and std per channel, from 0 to 255, of some of (N, H, W, C) uint8 pixels.

    Raises:
        DataError: all pixels have one colour.
    """
    # Integers sum exactly, so that the result does not depend on the number of threads.
    total, sum_of_squares = torch.zeros(2, pixels.shape[3], dtype=torch.int64)
    for part in indices.split(1024):  # in parts, because int64 takes eight times the memory
        values = pixels[part].long().flatten(0, 2)  # (n H W, C)
        total += values.sum(dim=0)
        sum_of_squares += values.square().sum(dim=0)
    count = len(indices) * pixels.shape[1] * pixels.shape[2]
    mean = total.double() / count
    std = (sum_of_squares.double() / count - mean.square()).clamp(min=0).sqrt()
    check_channels_vary((std > 0).tolist(), mean.tolist(), f"all {len(indices)}", warn)
    # Divide a constant channel by 1, which keeps it finite.
    return mean.tolist(), torch.where(std > 0, std, torch.ones(())).tolist()


def check_channels_vary(
    varies: list[bool], colour: list[float], looked_at: str, warn: Callable[[str], None]
) -> None:
    """Note a channel that is the same in all pixels; raise DataError if all channels are.

    Args:
        looked_at: how many training images.
    """
    numbered = [f"channel {number}" for number in range(len(varies))]
    names = CHANNELS if len(varies) == len(CHANNELS) else numbered
    constant = [name for name, does in zip(names, varies, strict=True) if not does]
    if len(constant) == len(varies):
        shown = ", ".join(f"{value:g}" for value in colour)
        what = f"no channel varies: all pixels of {looked_at} training images are ({shown})"
        raise DataError(what, "look at the files, and at the range of their values")
    if constant:
        warn(f"all pixels of {looked_at} training images have the same {' and '.join(constant)}")


@dataclass(frozen=True)
class InMemoryDataset:
    """Hold a dataset in memory: its published training and test sets, and its class names."""

    train: ImageTensors
    test: ImageTensors
    classes: list[str]

    def check(self) -> None:
        """Raise DataError if a part has no images or a label outside the classes."""
        for split, labels in (("training", self.train.labels), ("test", self.test.labels)):
            if labels.numel() == 0:
                raise DataError(f"there are no {split} images", "check the dataset")
            for label in (labels.min().item(), labels.max().item()):
                if not 0 <= label < len(self.classes):
                    what = f"{split} label {label} is not a class from 0 to {len(self.classes) - 1}"
                    raise DataError(what, "check the dataset")
