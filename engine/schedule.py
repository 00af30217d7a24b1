"""Learning rate schedules as pure functions of the position in a run."""

import math


def multistep_rate(base: float, milestones: list[int], epoch: int) -> float:
    """The rate of an epoch, counted from 1: a tenth for each milestone that has come."""
    # Parity: a function of the epoch (train.lua), so that epoch 150 of 300 already has the lower
    # rate; a scheduler stepped after each epoch is one late.
    return base / 10 ** sum(epoch >= milestone for milestone in milestones)


def cosine_rate(base: float, epoch: int, step: int, num_epochs: int, steps: int) -> float:
    """The rate of one step: half a cosine over the run, 0 at its last step.

    Args:
        epoch, step: both counted from 1.
        steps: steps in an epoch.
    """
    done = ((epoch - 1) * steps + step) / (num_epochs * steps)
    return 0.5 * base * (1 + math.cos(math.pi * done))


class Schedule:
    """The learning rate as a function of the position in the run."""

    def __init__(self, shape: str, base: float, num_epochs: int, milestones: list[int] | None):
        self.shape, self.base, self.num_epochs = shape, base, num_epochs
        self.milestones = milestones or []

    def rate(self, epoch: int, step: int, steps: int) -> float:
        """The rate of step `step` of `steps` in epoch `epoch`; both count from 1."""
        if self.shape == "cosine":
            return cosine_rate(self.base, epoch, step, self.num_epochs, steps)
        return multistep_rate(self.base, self.milestones, epoch)
