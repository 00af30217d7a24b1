"""What one run says of itself in its small files: settings, log, state and data.

Nothing here raises because of what stands in them.
"""

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cli.flag_types import Settings
from tools.results.configs import BEST, counts, split_name


@dataclass
class Run:
    """What the small files of a run directory say.

    Args:
        records: the epochs of log.jsonl.
        status: status.json, {} when it cannot be read.
        data: data.json, the same.
        config: the config whose settings it has; None when there is no such.
    """

    path: Path
    opt: Settings
    records: list[dict]
    status: dict
    data: dict = field(default_factory=dict)
    config: str | None = None

    @property
    def seed(self) -> int:
        """Its manualSeed."""
        return self.opt.manualSeed

    @property
    def epoch(self) -> int:
        """The last epoch in its log, 0 when there is none."""
        return self.records[-1]["epoch"] if self.records else 0

    @property
    def state(self) -> str:
        """What status.json says: running, preempted, failed or done; else unknown."""
        state = self.status.get("state")
        return state if state in ("running", "preempted", "failed", "done") else "unknown"

    @property
    def is_done(self) -> bool:
        """Whether it has come to its end and its log has every epoch and the result."""
        epochs = [record["epoch"] for record in self.records]
        whole = epochs == list(range(1, self.opt.nEpochs + 1))
        return self.state == "done" and whole and self.error is not None

    @property
    def split(self) -> str:
        """Which epoch's error is the result.

        With validSize the model with the lowest validation error is tested, as in the paper on
        SVHN; else the result is the test error of the last epoch.
        """
        return split_name(self.opt)

    @property
    def error(self) -> float | None:
        """The test error in per cent that the paper would report; None when there is none."""
        if self.split == BEST:
            return number(self.status, "test_top1")
        return number(self.records[-1], "val_top1") if self.records else None

    @property
    def parameters(self) -> int:
        """Trained numbers of its network, see `counts`."""
        return counts(self.opt)[0]

    @property
    def macs(self) -> int:
        """Multiply-adds of its network for one image, see `counts`."""
        return counts(self.opt)[1]

    @property
    def hours(self) -> float | None:
        """Training and validation of all logged epochs; None when the log does not say."""
        return self._total(lambda record: 1.0)

    @property
    def device_hours(self) -> float | None:
        """`hours` times the devices at work in each epoch; None when the log does not say."""
        return self._total(lambda record: number(record, "replicas"))

    @property
    def device(self) -> str | None:
        """What it ran on, such as "4 x NVIDIA H200"; None when the log does not say."""
        found = {self._device(record): None for record in self.records}
        return "; ".join(found) if found and None not in found else None

    @property
    def images_per_s(self) -> float | None:
        """Median of the epochs' training speeds."""
        speeds = [number(record, "images_per_s") for record in self.records]
        return statistics.median(speeds) if speeds and None not in speeds else None

    @property
    def memory_mb(self) -> float | None:
        """The most memory of any epoch: of the GPU's allocator, or of the process on the CPU."""
        peaks = [number(record, "memory_mb") for record in self.records]
        return max(peaks) if peaks and None not in peaks else None

    @functools.cached_property
    def changes(self) -> list[str]:
        """How it was not trained by its last settings from beginning to end, in words."""
        from engine.schedule import LRSchedule

        opt = self.opt
        schedule = LRSchedule(opt.lrShape, opt.LR, opt.nEpochs, opt.milestones)
        found = ["settings changed on the way by --override"] * bool(self.status.get("overrides"))
        for record in self.records:
            logged, due = number(record, "lr"), schedule.lr(record["epoch"], 1, 1)
            # A run that was made longer on the way began by the milestones of a shorter one.
            if logged is not None and not math.isclose(logged, due, rel_tol=1e-6, abs_tol=1e-12):
                found.append(f"rate {logged:g} in epoch {record['epoch']}, not {due:g}")
                break
        return found

    @property
    def images(self) -> tuple[object, object]:
        """Digests of its training and test images; runs on other images are no repetition."""
        return self.data.get("training_set"), self.data.get("test_set")

    def _total(self, weight: Callable[[dict], float | None]) -> float | None:
        total = 0.0
        for record in self.records:
            parts = (number(record, "time_s"), number(record, "val_time_s"), weight(record))
            if None in parts:
                return None
            total += (parts[0] + parts[1]) * parts[2] / 3600
        return total if self.records else None

    @staticmethod
    def _device(record: dict) -> str | None:
        device, replicas = record.get("device"), number(record, "replicas")
        if not isinstance(device, str) or replicas is None:
            return None
        return device if replicas == 1 else f"{replicas:g} x {device}"


def number(values: dict, name: str) -> float | None:
    """A finite number of a JSON object; None for anything else."""
    value = values.get(name)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and math.isfinite(value) else None
