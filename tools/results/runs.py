"""Read run directories, tell what each measured, and group the runs that differ in their seeds.

Only config.yaml, log.jsonl, status.json and data.json are read, so that the committed runs without
weights (results/runs) count as well.
"""

import functools
import math
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import opts
from cli.flag_types import Settings
from datasets.registry import DATASETS
from errors import DataError, RunError, printable
from experiment.console import warn
from fileio.atomic import read_json
from tools.results.configs import comparable_settings, names_by_settings

MAX_MISSING = 0.001  # part of ImageNet's images; other datasets are complete or not read at all


@dataclass
class Run:
    """Read the small files of a run directory; no value in them raises an error."""

    path: Path
    opt: Settings
    records: list[dict]  # the epochs of log.jsonl
    status: dict  # status.json, {} when it cannot be read
    data: dict  # data.json, likewise

    @functools.cached_property
    def config(self) -> str | None:
        """Return the name of the config with the same settings.

        None after --override, when the last settings are not those of all epochs, and for a run on
        a part of ImageNet.
        """
        num_images = number(self.data, "train")
        if self.opt.dataset == "imagenet" and num_images is not None:
            full = DATASETS["imagenet"].num_images[0] - self.opt.validSize
            if abs(num_images - full) > MAX_MISSING * full:
                return None
        if self.status.get("overrides"):
            return None
        return names_by_settings().get(comparable_settings(self.opt))

    @property
    def epoch(self) -> int:
        """Return the last epoch in the log, 0 if there is none."""
        return self.records[-1]["epoch"] if self.records else 0

    @property
    def state(self) -> str:
        """Return the state in status.json: running, preempted, failed or done; else unknown."""
        state = self.status.get("state")
        return state if state in ("running", "preempted", "failed", "done") else "unknown"

    @property
    def is_done(self) -> bool:
        """Return whether the run has ended, with every epoch and the result in its log."""
        epochs = [record["epoch"] for record in self.records]
        is_whole = epochs == list(range(1, self.opt.nEpochs + 1))
        return self.state == "done" and is_whole and self.error is not None

    @property
    def error(self) -> float | None:
        """Return the test error in per cent that the paper would report, see `selection`."""
        if self.opt.validSize:
            return number(self.status, "test_top1")
        return number(self.records[-1], "val_top1") if self.records else None

    @property
    def hours(self) -> float | None:
        """Time of training and of validation in all epochs."""
        times = self._column("time_s"), self._column("val_time_s")
        return None if None in times else sum(map(sum, times)) / 3600

    @property
    def seconds_per_step(self) -> float | None:
        """Return the median time of a training step over the epochs."""
        speed = statistics.median(self._column("images_per_s") or [0.0])
        return self.opt.batchSize / speed if speed else None

    @property
    def memory_mb(self) -> float | None:
        """Return the peak memory: of the GPU's allocator, or of the process on the CPU."""
        return max(self._column("memory_mb") or [], default=None)

    def _column(self, name: str) -> list[float] | None:
        """Return a number for each epoch; None if the log is empty, or an older one without it."""
        values = [number(record, name) for record in self.records]
        return values if values and None not in values else None

    @property
    def device(self) -> str | None:
        """Return the hardware, such as "4 x NVIDIA H200"; None if an older log lacks it."""
        found = {}  # keeps the order
        for record in self.records:
            device, count = record.get("device"), number(record, "replicas")
            if not isinstance(device, str) or count is None:
                return None
            found[device if count == 1 else f"{count:g} x {device}"] = None
        return "; ".join(found) or None

    @property
    def images(self) -> tuple[object, object]:
        """Return fingerprints of its images: runs on other images are not repetitions."""
        return self.data.get("training_set"), self.data.get("test_set")


def selection(opt: Settings) -> str:
    """Name the epoch whose test error is the result.

    With a validation set it is the epoch with the lowest validation error, as in the paper on
    SVHN, otherwise the last one.
    """
    return "best validation" if opt.validSize else "last epoch"


def data_name(opt: Settings) -> str:
    """Name the images: the dataset, or the directory of a user's own."""
    by_directory = DATASETS[opt.dataset].is_named_by_directory
    return printable(Path(opt.data).name) if by_directory else opt.dataset


def number(values: dict, name: str) -> float | None:
    """Return a finite number of a JSON object, None for anything else."""
    value = values.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def find(paths: Iterable[Path | str]) -> list[Run]:
    """Read each run in or below some directories once, by path; raise DataError for others."""
    seen, found = set(), []
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(f"not a directory: {path}", "name a directory of runs")
        for directory, below, files in os.walk(path, onerror=_skip, followlinks=True):
            real = os.path.realpath(directory)
            is_new, is_run = real not in seen, "log.jsonl" in files
            seen.add(real)
            # os.walk goes on into what remains in `below`: links may form a loop.
            below[:] = sorted(name for name in below if is_new and not is_run and name[0] != ".")
            if is_new and is_run:
                found.append(read(Path(directory)))
    return [run for run in found if run]


def _skip(error: OSError) -> None:
    warn(f"{error.filename} is left out: {error.strerror}")


def read(directory: Path, warn: Callable[[str], None] = warn) -> Run | None:
    """Read a run directory; warn and return None if its settings or its log cannot be read."""
    import experiment.log

    try:
        opt = opts.parse(["--config", str(directory / "config.yaml")])
        records = experiment.log.read_log(directory)
    except (RunError, OSError) as error:
        warn(f"{directory} is left out: {getattr(error, 'strerror', error)}")
        return None
    status, data = (read_json(directory / name) for name in ("status.json", "data.json"))
    return Run(directory, opt, records, status, data)


@dataclass(frozen=True)
class SeedGroup:
    """Complete runs that differ only in their seeds: one for each seed, ascending, at least one."""

    runs: list[Run]

    @property
    def mean(self) -> float:
        """Return the mean test error, in per cent."""
        return statistics.fmean(run.error for run in self.runs)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of the test errors; None for a single run."""
        return statistics.stdev(run.error for run in self.runs) if len(self.runs) > 1 else None

    def average(self, name: str) -> float | None:
        """Average a property such as `hours` over the runs; None if a log lacks it."""
        values = [getattr(run, name) for run in self.runs]
        return None if None in values else statistics.fmean(values)


@dataclass(frozen=True)
class GroupedRuns:
    """Group runs by their use."""

    groups: dict[str, SeedGroup]  # config -> its complete runs
    others: list[SeedGroup]  # complete runs that belong to no config
    unfinished: list[Run]  # in progress, stopped or failed
    repeated: list[tuple[Run, Run]]  # with the same settings and seed: (left out, used)


def group_runs(found: list[Run]) -> GroupedRuns:
    """Group runs; of two complete runs with the same seed the first one counts.

    The runs of a config that names a folder of images may have seen different folders: the group
    with the most seeds belongs to the config, the others to none.
    """
    by_seed: dict[tuple, dict[int, Run]] = {}
    repeated = []
    for run in (run for run in found if run.is_done):
        key = (run.config, run.images, comparable_settings(run.opt))
        first = by_seed.setdefault(key, {}).setdefault(run.opt.manualSeed, run)
        if first is not run:
            repeated.append((run, first))

    groups, others = {}, []
    for (name, *_), seeds in sorted(by_seed.items(), key=lambda item: -len(item[1])):
        group = SeedGroup([seeds[seed] for seed in sorted(seeds)])
        if name and name not in groups:
            groups[name] = group
        else:
            others.append(group)
    others.sort(key=lambda group: group.runs[0].path)
    return GroupedRuns(groups, others, [run for run in found if not run.is_done], repeated)
