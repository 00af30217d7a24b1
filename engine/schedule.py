"""Compute the learning rate of each step as a function of its position in the run."""

import math
from dataclasses import dataclass


def multistep_lr(base_lr: float, milestones: list[int], epoch: int) -> float:
    """Return the rate of an epoch, from 1: divided by ten at each milestone so far."""
    # Parity: a function of the epoch (train.lua), so that epoch 150 of 300 already has the lower
    # rate; a scheduler stepped after each epoch is one late.
    return base_lr / 10 ** sum(epoch >= milestone for milestone in milestones)


def cosine_lr(
    base_lr: float, epoch: int, step: int, num_epochs: int, steps_per_epoch: int
) -> float:
    """Return the rate of step `step` of `epoch`, both from 1: half a cosine, 0 at the last step."""
    done = ((epoch - 1) * steps_per_epoch + step) / (num_epochs * steps_per_epoch)
    return 0.5 * base_lr * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class LRSchedule:
    """Compute the learning rate of `--lrShape`, multistep or cosine."""

    shape: str
    base_lr: float
    num_epochs: int
    milestones: list[int] | None

    def lr(self, epoch: int, step: int, steps_per_epoch: int) -> float:
        """Return the rate of step `step` of `epoch`; both count from 1."""
        if self.shape == "cosine":
            return cosine_lr(self.base_lr, epoch, step, self.num_epochs, steps_per_epoch)
        return multistep_lr(self.base_lr, self.milestones or [], epoch)
