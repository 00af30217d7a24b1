"""Hold out validation images, and divide a split among the steps of an epoch and the ranks."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from datasets.rng import permutation
from distributed.launcher import SINGLE_PROCESS, ProcessInfo
from errors import DataError


@dataclass(frozen=True)
class BatchSampler:
    """Divide the images of a split among the steps of an epoch and the ranks of a run.

    The order of an epoch is a function of (seed, epoch). The world size decides which rank
    computes an image, never in which training step.
    """

    indices: Tensor  # (n,) images of the split
    batch_size: int  # images of a batch, over all ranks
    seed: int | None = None  # shuffles each epoch; None keeps the order of `indices`
    process: ProcessInfo = SINGLE_PROCESS
    # True: ranks take whole batches in turn (evaluation: the result does not depend on the world
    # size). False: every batch is split over the ranks.
    whole_batches: bool = False

    def to(self, device: torch.device) -> "BatchSampler":
        """Copy the sampler with its indices on another device."""
        return replace(self, indices=self.indices.to(device))

    @property
    def num_images(self) -> int:
        """Return the number of images in an epoch, over all ranks."""
        return len(self.indices)

    @property
    def global_batch(self) -> int:
        """Return the number of images of a full step, over all ranks."""
        return self.batch_size * (self.process.size if self.whole_batches else 1)

    @property
    def local_batch(self) -> int:
        """Return the number of images of a full step on this rank."""
        return self.global_batch // self.process.size

    @property
    def largest_batch(self) -> int:
        """Return the largest number of images that a step has on any rank."""
        return min(-(-self.global_batch // self.process.size), self.num_images)

    def __len__(self) -> int:
        """Count the steps of an epoch; the last may be smaller."""
        return -(-self.num_images // self.global_batch)

    @property
    def full_steps(self) -> int:
        """Count the leading steps of an epoch in which every rank has `local_batch` images."""
        return self.num_images // self.global_batch

    def local_slice(self, step: int) -> slice:
        """Locate this rank's images of a step (from 0) in the order of the epoch.

        A smaller batch is split as evenly as possible: the first ranks have one image more.
        """
        first, stop = self._bounds(step)
        quotient, remainder = divmod(stop - first, self.process.size)

        def start_of(rank: int) -> int:
            if self.whole_batches:
                return min(first + rank * self.batch_size, stop)
            return first + rank * quotient + min(rank, remainder)

        return slice(start_of(self.process.rank), start_of(self.process.rank + 1))

    def _bounds(self, step: int) -> tuple[int, int]:
        return step * self.global_batch, min((step + 1) * self.global_batch, self.num_images)

    def epoch_indices(self, epoch: int) -> Tensor:
        """Return the images of the split in the order of an epoch, (n,)."""
        if self.seed is None:
            return self.indices
        device = self.indices.device
        positions = permutation(self.num_images, "order", self.seed, epoch, device=device)
        return self.indices[positions]

    def step_indices(self, epoch: int, step: int) -> list[int]:
        """List the images of a step (from 0) of an epoch, over all ranks."""
        return self.epoch_indices(epoch)[slice(*self._bounds(step))].tolist()


def split_indices(size: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the training images to hold out; return (kept, held out), both ascending.

    Raises:
        DataError: no image would be left to train on.
    """
    if held_out >= size:
        what = f"validSize {held_out} of {size} training images leaves none"
        raise DataError(what, f"use less than {size}")
    order = permutation(size, "held out", seed)
    return order[held_out:].sort().values, order[:held_out].sort().values
