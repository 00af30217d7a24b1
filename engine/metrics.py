"""Add up loss and top-k errors, exactly however the images are batched; keep a run's results."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TOP_K = 5
MAX_CLASSES = 2000  # whose confusions are counted: 32 MB


class Metrics:
    """Sum loss and errors over images on `device`, which is read only when a result is shown.

    Args:
        num_classes: count which class is taken for which, up to MAX_CLASSES of them; 0: do not.
    """

    def __init__(self, device: torch.device, num_classes: int = 0):
        self._side = num_classes if num_classes <= MAX_CLASSES else 0
        # Loss, images not in the top 1, not in the top 5, images; then the images of each class by
        # the class taken for. float64 counts exactly.
        self._sums = torch.zeros(4 + self._side**2, dtype=torch.float64, device=device)
        self._totals, self._pairs = self._sums[:4], self._sums[4:]

    def reset(self) -> None:
        """Set the sums to 0, in the same memory: a captured step adds to it."""
        self._sums.zero_()

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add one batch without waiting for the device.

        Args:
            loss: mean over the batch, a scalar.
            logits: (N, C).
            targets: (N,) class numbers.
        """
        count = len(targets)
        k = min(TOP_K, logits.shape[1])
        best = logits.topk(k, dim=1).indices  # (N, k)
        hits = best == targets[:, None]
        correct = torch.stack([hits[:, 0].sum(), hits.sum()])
        self._totals[0] += loss.detach().double() * count
        self._totals[1:3] += count - correct
        self._totals[3] += count
        if self._side:
            pairs = targets * self._side + best[:, 0]
            self._pairs.index_add_(0, pairs, self._sums.new_ones(count))

    def confusion(self) -> Tensor | None:
        """Return the images of each class (row) by the class taken for, (C, C) int64; None: not.

        Waits for the device; the result is on the CPU.
        """
        return self._pairs.view(self._side, -1).long().cpu() if self._side else None

    def compute(self) -> dict[str, float]:
        """Return mean loss, and top-1 and top-5 errors in per cent (waits for the device)."""
        loss, wrong1, wrong5, count = self._totals.tolist()
        count = max(count, 1)
        return {"loss": loss / count, "top1": 100 * wrong1 / count, "top5": 100 * wrong5 / count}

    def all_reduced(self, all_reduce_: Callable[[Tensor], None]) -> "Metrics":
        """Return the sums over all processes; `all_reduce_` replaces a tensor by its sum."""
        reduced = Metrics(self._totals.device, self._side)
        reduced._sums.copy_(self._sums)
        all_reduce_(reduced._sums)
        return reduced

    @property
    def count(self) -> int:
        """Return the number of images added so far (waits for the device)."""
        return int(self._totals[3].item())

    def state_dict(self) -> dict:
        """Return the sums as plain values, for a checkpoint in the middle of an epoch."""
        *totals, count = self._totals.tolist()
        return {"totals": totals, "count": int(count)}

    def load_state_dict(self, state: dict) -> None:
        """Continue from saved sums."""
        self._totals.copy_(torch.tensor([*state["totals"], state["count"]], dtype=torch.float64))


@dataclass
class Results:
    """Keep the validation results of a run's last epoch and of its best; None before the first."""

    last: dict | None = None
    best: dict | None = None

    def add(self, record: dict) -> None:
        """Add the result of an epoch, given its log record."""
        self.last = {name: record[name] for name in ("epoch", "val_loss", "val_top1", "val_top5")}
        finite = math.isfinite(record["val_loss"])  # else the error comes from NaN logits
        if finite and (self.best is None or self.last["val_top1"] < self.best["val_top1"]):
            self.best = self.last

    @property
    def is_best(self) -> bool:
        """Return whether the last epoch is the best so far."""
        return self.best is not None and self.best == self.last

    def flat(self) -> dict[str, float]:
        """Return both results by flat names such as `best_top1`."""
        return {
            f"{which}_{name.removeprefix('val_')}": value
            for which, result in (("last", self.last), ("best", self.best))
            for name, value in (result or {}).items()
        }
