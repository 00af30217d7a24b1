"""How much of a table is done, and how long the rest takes, from the logs of its runs.

The work of a run is multiply-adds of its network x training images x epochs. How fast that goes is
what the finished epochs say, so that the estimate mends itself.
"""

import functools
import heapq
from dataclasses import dataclass
from pathlib import Path

from cli.flag_types import Settings
from tools.results import configs
from tools.sweep.tasks import DONE, FAILED, Task


@dataclass(frozen=True)
class Load:
    """The work of one run, and what its log says of it.

    Args:
        kind: runs of one kind take equally long for an epoch.
        work: of an epoch, in multiply-adds.
        epochs: in all, of which `finished` are done.
        timed: epochs whose time is known, and took `seconds` together.
    """

    kind: str
    work: float
    epochs: int
    finished: int = 0
    timed: int = 0
    seconds: float = 0.0


def load_of(task: Task, counts_log: bool = True) -> Load:
    """The work of a run, and what its log says now unless that is the log of another."""
    import experiment.log

    records = experiment.log.read_log(task.save) if counts_log else []
    finished = min(records[-1]["epoch"], task.opt.nEpochs) if records else 0
    timed = [record for record in records if _seconds(record, "time_s")]
    seconds = sum(_seconds(record, "time_s") + _seconds(record, "val_time_s") for record in timed)
    work = epoch_work(task.opt)
    return Load(task.config, work, task.opt.nEpochs, finished, len(timed), seconds)


def _seconds(record: dict, name: str) -> float:
    """Of an epoch's record; 0 where it does not say: older ones lack the time of the test."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def epoch_work(opt: Settings) -> float:
    """Multiply-adds of an epoch's images, forwards."""
    return float(configs.counts(opt)[1] * num_images(opt))


def num_images(opt: Settings) -> int:
    """Training images of an epoch.

    Raises:
        DataError: a folder that cannot be listed.
    """
    from datasets import registry

    dataset = registry.DATASETS[opt.dataset]
    if dataset.is_generated:
        return opt.nImages
    known, _ = dataset.num_images or (0, 0)
    found = known or _images_in(Path(opt.data))
    return max(found - opt.validSize, 1)


@functools.cache
def _images_in(root: Path) -> int:
    from datasets.image_folder import index_folder

    return len(index_folder(root).train)


def share_done(loads: list[Load]) -> float:
    """Part of the whole work that is done, 0 to 1."""
    whole = sum(load.work * load.epochs for load in loads)
    return sum(load.work * load.finished for load in loads) / whole


def epoch_seconds(load: Load, loads: list[Load]) -> float | None:
    """Of a run's epochs: those of its kind so far, else by its work; None before the first."""
    timed = [other for other in loads if other.timed]
    basis = [other for other in timed if other.kind == load.kind] or timed
    if not basis:
        return None
    seconds = sum(other.seconds for other in basis)
    return load.work * seconds / sum(other.work * other.timed for other in basis)


def seconds_left(to_do: list[Load], loads: list[Load], workers: int) -> float | None:
    """Until the last of `to_do` has ended: each in turn goes to the worker that is free first.

    None when no epoch of `loads` has been timed.
    """
    free = [0.0] * workers
    for load in to_do:
        each = epoch_seconds(load, loads)
        if each is None:
            return None
        heapq.heapreplace(free, free[0] + each * (load.epochs - load.finished))
    return max(free)


def as_time(seconds: float) -> str:
    """A span of time as one says it: 40 min, 3 h 20 min, 2 d 5 h."""
    minutes = max(round(seconds / 60), 1)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def progress_line(words: list[str], share: float, seconds: float | None) -> str:
    """How far a table is, in a line.

    Args:
        words: the state of each run.
        share: of the work that is done.
        seconds: that are left; None: nobody can say yet.
    """
    done, failed = (words.count(word) for word in (DONE, FAILED))
    parts = [f"{done} of {len(words)} runs done"] + [f"{failed} failed"] * bool(failed)
    parts.append(f"{int(100 * share)} % of the work")
    if seconds is None:
        parts.append("time left: not known yet")
    elif seconds:
        parts.append(f"about {as_time(seconds)} left")
    return ", ".join(parts)
