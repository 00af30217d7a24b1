"""The configs in configs/, the runs in a directory, and which run reproduces which config.

A run is recognised by its settings in config.yaml, never by its name, so that run directories and
the committed ones without weights (results/runs) are alike. What cannot be read is left out with a
remark; nothing here raises because of what stands in a run's files.
"""

import functools
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import opts
from errors import DataError, RunError, printable
from flags import as_text
from storage import read_json
from tools import published

CONFIGS = published.ROOT / "configs"
LAST, BEST = "last epoch", "best validation"
# Settings without a role that make a run another measurement all the same.
ALSO_COMPARED = ("retrain", "epochNumber", "tenCrop")
MISSING_SHARE = 0.001  # of ImageNet's images; the other datasets are checked by their readers


# ---------------------------------------------------------------------------------- the networks


_counted: dict[tuple, tuple[int, int]] = {}  # by network: counting one takes up to a second


def counts(opt: SimpleNamespace) -> tuple[int, int]:
    """Parameters and multiply-adds per image of the network of some settings.

    As the paper counts: for ten classes at CIFAR shape, in its CIFAR-100 columns too, and for a
    thousand at ImageNet shape.
    """
    shape = {name for name, flag in opts.FLAGS.items() if flag.role == "model"}
    shape |= {"imageSize", "shortcutType"}
    network = tuple((name, getattr(opt, name)) for name in sorted(shape))
    if network not in _counted:
        from torch.nn import BatchNorm2d

        from tools import describe

        classes = 1000 if opt.imagenetShape else 10
        model = describe.build(SimpleNamespace(**vars(opt) | {"nClasses": classes}))
        for module in model.modules():
            if isinstance(module, BatchNorm2d):  # counts nothing, and is half of the time here
                module.forward = _same
        parameters = sum(parameter.numel() for parameter in model.parameters())
        macs = sum(layer.macs for layer in describe.measure(model, opt.imageSize))
        _counted[network] = parameters, macs
    return _counted[network]


def _same(features):
    """What stands for a batch normalisation where shapes alone matter."""
    return features


@dataclass(frozen=True)
class Config:
    """A file of configs/.

    Args:
        name: its path below configs/ without the suffix, such as "c10plus/densenet-bc-L100-k12".
        claim: table, column, error and params of its line `paper:`; {} when it claims nothing.
    """

    name: str
    path: Path
    opt: SimpleNamespace
    claim: dict[str, object]

    @functools.cached_property
    def compared(self) -> dict[str, str]:
        """Its settings as `compared` gives them."""
        return compared(self.opt)

    @property
    def parameters(self) -> int:
        """Trained numbers of its network, see `counts`."""
        return counts(self.opt)[0]

    @property
    def macs(self) -> int:
        """Multiply-adds of its network for one image, see `counts`."""
        return counts(self.opt)[1]

    @property
    def split(self) -> str:
        """Which epoch's error is the result, see `Run.split`."""
        return _split(self.opt)


@functools.cache
def configs(root: Path = CONFIGS) -> dict[str, Config]:
    """All of configs/*/*.yaml by name.

    Raises:
        UsageError: one of them cannot be parsed.
    """
    paths = sorted(root.glob("*/*.yaml"))
    found = (_config(path, str(path.relative_to(root).with_suffix(""))) for path in paths)
    return {config.name: config for config in found}


def _config(path: Path, name: str) -> Config:
    opt = opts.parse(["--config", str(path)])
    claim = published.plain(path.read_text()).get("paper", {})
    if "error" in claim:
        claim |= {"error": float(claim["error"])}
    return Config(name, path, opt, claim)


# -------------------------------------------------------------------------------------- the runs


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
    opt: SimpleNamespace
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
        return _split(self.opt)

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
        import train

        opt = self.opt
        schedule = train.Schedule(opt.lrShape, opt.LR, opt.nEpochs, opt.milestones)
        found = ["settings changed on the way by --override"] * bool(self.status.get("overrides"))
        for record in self.records:
            logged, due = number(record, "lr"), schedule.rate(record["epoch"], 1, 1)
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


def _split(opt: SimpleNamespace) -> str:
    return BEST if opt.validSize else LAST


def remark(line: str) -> None:
    """Say on standard error what was left out, and why."""
    print(f"note: {printable(line)}", file=sys.stderr)


def find(paths: Iterable[Path | str], note: Callable[[str], None] = remark) -> list[Run]:
    """The runs in some directories and all below them, each once, in the order of their paths.

    A run is a directory with config.yaml and log.jsonl.

    Args:
        note: called with a line for each directory that looks like a run and cannot be read.

    Raises:
        DataError: one of `paths` is no directory.
    """
    seen: set[str] = set()
    found = []
    for path in map(Path, paths):
        if not os.path.isdir(path):
            what = "not a directory" if os.path.lexists(path) else "no such directory"
            raise DataError(f"{what}: {path}", "name a directory of runs")
        found += [read(directory, note) for directory in _directories(path, seen, note)]
    return [run for run in found if run]


def _directories(root: Path, seen: set[str], note: Callable[[str], None]) -> Iterator[Path]:
    """The run directories below `root` that are not yet in `seen`, by their resolved paths."""

    def unreadable(error: OSError) -> None:
        note(f"{error.filename} is left out: {error.strerror}")

    for place, below, files in os.walk(root, onerror=unreadable, followlinks=True):
        real = os.path.realpath(place)
        below[:] = [] if real in seen else sorted(name for name in below if name[0] != ".")
        if real in seen:
            continue
        seen.add(real)
        if "log.jsonl" in files and "config.yaml" in files:
            below.clear()
            yield Path(place)
        elif "log.jsonl" in files:
            note(f"{place} is left out: it has a log.jsonl but no config.yaml")


def read(directory: Path, note: Callable[[str], None] = remark) -> Run | None:
    """The run in a directory; None, and a note, when its settings or its log cannot be read."""
    import runlog

    try:
        opt = opts.parse(["--config", str(directory / "config.yaml")])
        records = runlog.read_log(directory)
    except RunError as error:
        note(f"{directory} is left out: {'; '.join(what for what, _ in error.problems)}")
        return None
    except OSError as error:
        note(f"{directory} is left out: {error.strerror}")
        return None
    status, data = (read_json(directory / name) for name in ("status.json", "data.json"))
    run = Run(directory, opt, records, status, data)
    run.config = next((name for name in configs() if not differences(run, configs()[name])), None)
    return run


# -------------------------------------------------------------------------------- runs of a config


def compared(opt: SimpleNamespace) -> dict[str, str]:
    """The settings that must agree for two runs to be repetitions but for the seed, as texts."""
    settings = opts.experiment(opt) | {name: getattr(opt, name) for name in ALSO_COMPARED}
    return {name: as_text(value) for name, value in settings.items() if name != "manualSeed"}


def differences(run: Run, config: Config) -> list[str]:
    """What keeps a run from being one of a config, in words; [] for a run of the config."""
    mine = compared(run.opt)
    theirs = config.compared
    found = []
    for name in opts.FLAGS:  # in the order of the help
        here, there = mine.get(name, "none"), theirs.get(name, "none")
        if here != there:
            found.append(f"{name} {here}, not {there}")
    num_images = number(run.data, "train")
    if run.opt.dataset == config.opt.dataset == "imagenet" and num_images is not None:
        import datasets

        full = datasets.NUM_IMAGES["imagenet"][0] - run.opt.validSize
        if abs(num_images - full) > MISSING_SHARE * full:
            found.append(f"{num_images:,} training images, not {full:,}")
    return found + run.changes


def nearest(run: Run) -> tuple[str, list[str]]:
    """The config that a run differs least from, rather one of its dataset, and the differences."""
    found = {name: differences(run, config) for name, config in configs().items()}

    def distance(name: str) -> tuple[int, bool]:
        return len(found[name]), configs()[name].opt.dataset != run.opt.dataset

    name = min(found, key=distance)
    return name, found[name]


@dataclass(frozen=True)
class Cell:
    """Complete runs that repeat each other but for the seed, one for each seed, at least one."""

    runs: list[Run]

    @property
    def errors(self) -> list[float]:
        """Test errors in per cent, by seed."""
        return [run.error for run in self.runs]

    @property
    def mean(self) -> float:
        """Mean of the errors."""
        return statistics.fmean(self.errors)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of the errors; None for a single one."""
        return statistics.stdev(self.errors) if len(self.runs) > 1 else None

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return [run.seed for run in self.runs]

    def average(self, name: str) -> float | None:
        """Mean over the runs of a property such as `hours`; None when a log does not say."""
        values = [getattr(run, name) for run in self.runs]
        return None if None in values else statistics.fmean(values)

    @property
    def device(self) -> str | None:
        """What the runs ran on; None when a log does not say."""
        found = {run.device: None for run in self.runs}
        return None if None in found else "; ".join(found)


@dataclass(frozen=True)
class Runs:
    """Runs in their places.

    Args:
        cells: config -> its complete runs.
        others: complete runs of no config, repetitions together.
        unfinished: runs in progress, stopped or failed.
        unused: complete runs that are in no cell, each with the reason in words.
    """

    cells: dict[str, Cell]
    others: list[Cell]
    unfinished: list[Run]
    unused: list[tuple[Run, str]]


def arrange(found: Iterable[Run]) -> Runs:
    """Put runs in their places; of two complete ones with one seed the first found counts.

    The runs of a config that is about a folder of images may have seen different folders: those
    with the most seeds are its cell, the others are other runs.
    """
    groups: dict[tuple, list[Run]] = {}
    unfinished = []
    for run in found:
        if run.is_done:
            key = (run.config, run.images, *sorted(compared(run.opt).items()))
            groups.setdefault(key, []).append(run)
        else:
            unfinished.append(run)
    unused: list[tuple[Run, str]] = []
    cells: dict[str, Cell] = {}
    others = []
    for runs in groups.values():
        cell, name = Cell(_one_for_each_seed(runs, unused)), runs[0].config
        if name and len(cell.runs) > len(cells[name].runs if name in cells else []):
            cell, cells[name] = cells.get(name), cell
        others += [cell] if cell else []
    return Runs(cells, others, unfinished, unused)


def _one_for_each_seed(runs: list[Run], unused: list[tuple[Run, str]]) -> list[Run]:
    kept: dict[int, Run] = {}
    for run in runs:
        if run.seed in kept:
            first = kept[run.seed]
            unused.append((run, f"the same settings and seed as {first.path}, which is used"))
        else:
            kept[run.seed] = run
    return [kept[seed] for seed in sorted(kept)]
