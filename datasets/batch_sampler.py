"""Which images train and which are held out, and which of a split each step of an epoch has."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from datasets.rng import permutation
from distributed.launcher import SINGLE_PROCESS, ProcessInfo
from errors import DataError


@dataclass(frozen=True)
class BatchSampler:
    """The images of a split, divided among the steps of an epoch and the replicas of a run.

    The order of an epoch is a function of (seed, epoch); how many replicas there are changes who
    computes an image, and never in which step of training it is.

    Args:
        indices: (n,) which images belong to the split.
        batch_size: images of a batch, over all replicas.
        seed: shuffle with it; None keeps the order of `indices`.
        process: this replica among those of the run.
        whole_batches: True: replicas take whole batches in turn (evaluation: the result does not
            depend on their number). False: every batch is split over the replicas.
    """

    indices: Tensor
    batch_size: int
    seed: int | None = None
    process: ProcessInfo = SINGLE_PROCESS
    whole_batches: bool = False

    def to(self, device: torch.device) -> "BatchSampler":
        """The same with its indices on another device."""
        return replace(self, indices=self.indices.to(device))

    @property
    def num_images(self) -> int:
        """Images in an epoch, over all replicas."""
        return len(self.indices)

    @property
    def global_batch(self) -> int:
        """Images of a full step, over all replicas."""
        return self.batch_size * (self.process.size if self.whole_batches else 1)

    @property
    def local_batch(self) -> int:
        """Images that this replica has of a full step."""
        return self.global_batch // self.process.size

    def __len__(self) -> int:
        """Steps in an epoch; the last may be smaller."""
        return -(-self.num_images // self.global_batch)

    @property
    def full_steps(self) -> int:
        """Leading steps of an epoch in which every replica has `local_batch` images."""
        return self.num_images // self.global_batch

    def local_slice(self, step: int) -> slice:
        """Where this replica's images of a step (from 0) stand in the order of the epoch.

        A smaller batch is parted as evenly as can be, the first replicas having one more.
        """
        first, stop = self._bounds(step)
        if self.whole_batches:
            ends = (self.process.rank * self.batch_size, (self.process.rank + 1) * self.batch_size)
        else:
            share, remainder = divmod(stop - first, self.process.size)
            ends = (
                share * r + min(r, remainder) for r in (self.process.rank, self.process.rank + 1)
            )
        return slice(*(min(first + end, stop) for end in ends))

    def _bounds(self, step: int) -> tuple[int, int]:
        return step * self.global_batch, min((step + 1) * self.global_batch, self.num_images)

    def epoch_indices(self, epoch: int) -> Tensor:
        """(n,) the images of the split in the order of an epoch."""
        if self.seed is None:
            return self.indices
        device = self.indices.device
        positions = permutation(self.num_images, "order", self.seed, epoch, device=device)
        return self.indices[positions]

    def step_indices(self, epoch: int, step: int) -> list[int]:
        """Which images all replicas have in a step (from 0) of an epoch."""
        return self.epoch_indices(epoch)[slice(*self._bounds(step))].tolist()


def split_indices(size: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which training images train and which are held out, in ascending order.

    Raises:
        DataError: nothing would be left to train on.
    """
    if held_out >= size:
        raise DataError(
            f"validSize {held_out} of {size} training images leaves none", f"use less than {size}"
        )
    order = permutation(size, "held out", seed)
    return order[held_out:].sort().values, order[:held_out].sort().values
