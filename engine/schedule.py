"""Learning rate schedules as pure functions of the position in a run."""

import math


def multistep_lr(base_lr: float, milestones: list[int], epoch: int) -> float:
    """The rate of an epoch, counted from 1: a tenth for each milestone that has come."""
    # Parity: a function of the epoch (train.lua), so that epoch 150 of 300 already has the lower
    # rate; a scheduler stepped after each epoch is one late.
    return base_lr / 10 ** sum(epoch >= milestone for milestone in milestones)


def cosine_lr(
    base_lr: float, epoch: int, step: int, num_epochs: int, steps_per_epoch: int
) -> float:
    """The rate of one step: half a cosine over the run, 0 at its last step.

    Args:
        epoch, step: both counted from 1.
        steps_per_epoch: optimizer steps in one epoch.
    """
    done = ((epoch - 1) * steps_per_epoch + step) / (num_epochs * steps_per_epoch)
    return 0.5 * base_lr * (1 + math.cos(math.pi * done))


class LRSchedule:
    """The learning rate as a function of the position in the run."""

    def __init__(self, shape: str, base_lr: float, num_epochs: int, milestones: list[int] | None):
        self.shape, self.base_lr, self.num_epochs = shape, base_lr, num_epochs
        self.milestones = milestones or []

    def lr(self, epoch: int, step: int, steps_per_epoch: int) -> float:
        """The rate of step `step` of `steps_per_epoch` in epoch `epoch`; both count from 1."""
        if self.shape == "cosine":
            return cosine_lr(self.base_lr, epoch, step, self.num_epochs, steps_per_epoch)
        return multistep_lr(self.base_lr, self.milestones, epoch)
