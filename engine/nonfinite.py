"""Stop at the first step whose loss or gradients are not finite, without waiting for the device."""

import torch
from torch import Tensor

from errors import NonFiniteError


class NonFiniteGuard:
    """Test each step on the device, and keep the number of the first bad step there.

    From that step on `found_inf` is 1, and the fused optimizer changes no weight. The number may
    therefore be read any time later: the weights are those from before the bad step.
    """

    def __init__(self, device: torch.device):
        self.found_inf = torch.zeros((), device=device)
        # Counted on the device, because a captured step executes no Python.
        self._step_counter = torch.zeros((), dtype=torch.int64, device=device)  # global_step
        self._nonfinite_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._loss_is_nonfinite = torch.zeros((), dtype=torch.bool, device=device)

    def start(self, global_step: int) -> None:
        """Count steps from `global_step` on."""
        self._step_counter.fill_(global_step)

    def next_step(self) -> None:
        """Count a step."""
        self._step_counter += 1

    def check_loss(self, finite: Tensor) -> None:
        """Record whether this step's loss is finite, a scalar bool."""
        # Only of the first bad step: it makes later losses bad.
        is_first = (self._nonfinite_step < 0) | (self._nonfinite_step == self._step_counter)
        self._loss_is_nonfinite |= ~finite & is_first

    def record_nonfinite(self, nonfinite: Tensor) -> None:
        """Stop updates if `nonfinite`, a scalar bool; keep the number of the first such step."""
        first = nonfinite & (self._nonfinite_step < 0)
        torch.where(first, self._step_counter, self._nonfinite_step, out=self._nonfinite_step)
        self.found_inf.masked_fill_(nonfinite, 1.0)

    def check(self, epoch: int, step: int) -> None:
        """Read the first bad step from the device, which waits for all steps so far.

        Args:
            epoch, step: the position of the last step, to tell that of the bad one.

        Raises:
            NonFiniteError: there was one.
        """
        nonfinite_step = self._nonfinite_step.item()
        if nonfinite_step < 0:
            return
        # A bad loss makes gradients bad too, so it is the one named.
        what = "loss" if self._loss_is_nonfinite.item() else "a gradient"
        step -= self._step_counter.item() - nonfinite_step
        raise NonFiniteError(
            f"{what} is not finite at epoch {epoch}, step {step}",
            "lower --LR, or --precision single; the last checkpoint is from before",
            step=step,
        )
