"""Compute the learning rate of each step as a function of its position in the run."""

import math
from dataclasses import dataclass
from types import SimpleNamespace


def multistep_lr(base_lr: float, milestones: list[int], epoch: int, decay: float = 0.1) -> float:
    """Return the rate of an epoch, from 1: multiplied by `decay` at each milestone so far."""
    # Parity: a function of the epoch (train.lua), so that epoch 150 of 300 already has the lower
    # rate; a scheduler stepped after each epoch is one late.
    # Divided, as in Lua: 0.1 / 10 and 0.1 * 0.1 differ in the last bit.
    return base_lr / (1 / decay) ** sum(epoch >= milestone for milestone in milestones)


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
    decay: float = 0.1  # factor of the rate at each milestone
    warmup_steps: int = 0  # the first steps of the run, at a tenth of their rate

    def lr(self, epoch: int, step: int, steps_per_epoch: int) -> float:
        """Return the rate of step `step` of `epoch`; both count from 1."""
        if self.shape == "cosine":
            rate = cosine_lr(self.base_lr, epoch, step, self.num_epochs, steps_per_epoch)
        else:
            rate = multistep_lr(self.base_lr, self.milestones or [], epoch, self.decay)
        # ResNet-110 begins so (arXiv:1512.03385, section 4.2), with about 400 steps.
        is_warmup = (epoch - 1) * steps_per_epoch + step <= self.warmup_steps
        return rate / 10 if is_warmup else rate


def create(opt: SimpleNamespace) -> LRSchedule:
    """Return the schedule of the settings."""
    return LRSchedule(
        opt.lrShape, opt.LR, opt.nEpochs, opt.milestones, opt.lrDecay, opt.warmupSteps
    )
