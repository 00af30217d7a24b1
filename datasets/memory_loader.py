"""Sets that fit in memory: one uint8 tensor on the training device, whole batches cut from it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.batch_sampler import BatchSampler
from datasets.rng import generator
from errors import DataError


@dataclass(frozen=True)
class ImageTensors:
    """Pictures and their classes.

    Args:
        pixels: (N, H, W, 3) uint8.
        labels: (N,) int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "ImageTensors":
        """The same on another device."""
        return ImageTensors(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Augmentation:
    """Shift by up to `pad` pixels, and mirror half of the images if `flip`."""

    pad: int
    flip: bool


@dataclass(frozen=True)
class EpochPlan:
    """What stands at each place of an epoch: a function of (seed, epoch).

    Args:
        indices: (n,) which image.
        offset: (n, 2) rows and columns that it is shifted by; None without augmentation.
        flipped: (n, 1) bool; None without mirroring.
    """

    indices: Tensor
    offset: Tensor | None = None
    flipped: Tensor | None = None

    def at(self, positions: Tensor | slice) -> "EpochPlan":
        """The plan of some places."""
        offset = None if self.offset is None else self.offset[positions]
        flipped = None if self.flipped is None else self.flipped[positions]
        return EpochPlan(self.indices[positions], offset, flipped)

    def copy_(self, other: "EpochPlan") -> None:
        """Become another epoch's plan of the same split, in the same memory."""
        for name in ("indices", "offset", "flipped"):
            if getattr(self, name) is not None:
                getattr(self, name).copy_(getattr(other, name))


class MemoryLoader:
    """The batches of one split: which images, and how they are changed, belongs to (seed, epoch).

    Args:
        images: all pictures, on the device where batches are wanted.
        sampler: the images of the split, and which of them this replica gets when.
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
        self.mean = torch.tensor(mean, dtype=dtype, device=device)
        self.std = torch.tensor(std, dtype=dtype, device=device)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """What this replica has of steps `start`, `start` + 1, ... of an epoch.

        Yields:
            images: (n, 3, H, W), normalised, channels last in memory.
            targets: (n,) int64. n is 0 where a step has nothing for this replica.
        """
        plan = self.plan(epoch)
        for step in range(start, len(self.sampler)):
            yield self.make_batch(plan.at(self.sampler.local_slice(step)))

    def plan(self, epoch: int) -> EpochPlan:
        """Order and augmentation of an epoch, drawn at once on the device."""
        indices = self.sampler.epoch_indices(epoch)
        if self.augmentation is None:
            return EpochPlan(indices)
        device, n, pad = indices.device, len(indices), self.augmentation.pad
        rng = generator("crop", self.sampler.seed, epoch, device=device)
        offset = torch.randint(-pad, pad + 1, (n, 2), generator=rng, device=device)
        flipped = torch.rand(n, 1, generator=rng, device=device) < 0.5
        return EpochPlan(indices, offset, flipped if self.augmentation.flip else None)

    def make_batch(self, plan: EpochPlan) -> tuple[Tensor, Tensor]:
        """The batch of a plan, as `batches` yields it; reads nothing back from the device."""
        if self.augmentation is None:
            batch = normalise_pixels(self.images.pixels[plan.indices], self.mean, self.std)
        else:
            batch = crop_and_flip(self.images.pixels, plan, self.mean, self.std)
        return batch.permute(0, 3, 1, 2), self.images.labels[plan.indices]


def crop_and_flip(pixels: Tensor, plan: EpochPlan, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise, mirror, pad with zeros and crop (paper, section 4.1), in one gather.

    Args:
        pixels: (N, H, W, 3) uint8.
        plan: of n images.

    Returns:
        (n, H, W, 3) of the type of `mean`.
    """
    # Parity: the zeros come after normalising, so the border has the mean colour, not black.
    height, width = pixels.shape[1:3]
    device = pixels.device
    rows = plan.offset[:, :1] + torch.arange(height, device=device)  # (n, H) in the source
    columns = plan.offset[:, 1:] + torch.arange(width, device=device)  # (n, W)
    if plan.flipped is not None:
        columns = torch.where(plan.flipped, width - 1 - columns, columns)
    inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]  # (n, H, W)
    source = pixels[
        plan.indices[:, None, None],
        rows.clamp(0, height - 1)[:, :, None],
        columns.clamp(0, width - 1)[:, None, :],
    ]  # (n, H, W, 3)
    return normalise_pixels(source, mean, std) * inside[..., None]


def normalise_pixels(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Map (..., 3) uint8 pixels to mean 0 and std 1, in the type of `mean`."""
    return (pixels.to(mean.dtype) - mean) / std


def _within(position: Tensor, size: int) -> Tensor:
    return (position >= 0) & (position < size)


def channel_statistics(pixels: Tensor, indices: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel over all pixels of some images, on a scale of 255.

    Args:
        pixels: (N, H, W, 3) uint8.
        indices: (n,) the images that count.
    """
    # In whole numbers: exact, so that no order of summation or thread count shows in a run.
    total = torch.zeros(3, dtype=torch.int64)
    sum_of_squares = torch.zeros(3, dtype=torch.int64)
    for part in indices.split(1024):  # in parts, since int64 is eight times uint8
        values = pixels[part].long().flatten(0, 2)  # (n H W, 3)
        total += values.sum(dim=0)
        sum_of_squares += values.square().sum(dim=0)
    count = len(indices) * pixels.shape[1] * pixels.shape[2]
    mean = total.double() / count
    std = (sum_of_squares.double() / count - mean.square()).clamp(min=0).sqrt()
    # A channel without contrast carries nothing; dividing by 1 keeps it finite.
    return mean.tolist(), torch.where(std > 0, std, torch.ones(())).tolist()


@dataclass(frozen=True)
class InMemoryDataset:
    """A dataset in memory.

    Args:
        train, test: the two parts as they were published.
        classes: name of each class number.
    """

    train: ImageTensors
    test: ImageTensors
    classes: list[str]

    def check(self) -> None:
        """Raise DataError when a part has no images or a label that is no class."""
        for split, labels in (("training", self.train.labels), ("test", self.test.labels)):
            if labels.numel() == 0:
                raise DataError(f"there are no {split} images", "check the dataset")
            low, high = labels.min().item(), labels.max().item()
            if low < 0 or high >= len(self.classes):
                bad = low if low < 0 else high
                expected = f"a class from 0 to {len(self.classes) - 1}"
                raise DataError(f"{split} label {bad} is not {expected}", "check the dataset")
