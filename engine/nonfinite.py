"""Stop at the first step whose loss or gradients are not finite, without waiting for the device."""

import torch
from torch import Tensor


class NonFiniteGuard:
    """Looks at each step on the device, and keeps the number of the first bad one there.

    From that step on `found_inf` is 1, which makes the fused optimizer change no weight: whoever
    reads the number later finds the weights from before.

    Args:
        device: where steps run.
    """

    def __init__(self, device: torch.device):
        self.found_inf = torch.zeros((), device=device)
        self._step_counter = torch.zeros((), dtype=torch.int64, device=device)  # global_step
        self._nonfinite_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._loss_is_nonfinite = torch.zeros((), dtype=torch.bool, device=device)

    def start(self, global_step: int) -> None:
        """Count steps from here on."""
        self._step_counter.fill_(global_step)

    def next_step(self) -> None:
        """Count a step; on the device, so that a captured step counts as well."""
        self._step_counter += 1

    def check_loss(self, finite: Tensor) -> None:
        """Note whether the loss of this step is finite, a scalar bool.

        A loss that is not is the cause wherever gradients are not finite either.
        """
        is_first = (self._nonfinite_step < 0) | (self._nonfinite_step == self._step_counter)
        self._loss_is_nonfinite |= ~finite & is_first  # what came later is its consequence

    def record_nonfinite(self, nonfinite: Tensor) -> None:
        """Keep this step's number if it is the first bad one, and stop updates, a scalar bool."""
        first = nonfinite & (self._nonfinite_step < 0)
        torch.where(first, self._step_counter, self._nonfinite_step, out=self._nonfinite_step)
        self.found_inf.masked_fill_(nonfinite, 1.0)

    def first_nonfinite_step(self) -> tuple[int, str] | None:
        """Return the first bad step and what of it was not finite (waits for the device)."""
        nonfinite_step = self._nonfinite_step.item()
        if nonfinite_step < 0:
            return None
        return nonfinite_step, "loss" if self._loss_is_nonfinite.item() else "a gradient"
