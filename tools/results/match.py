"""Find the runs in directories, and which of them reproduce which config.

A run is recognised by its settings in config.yaml, never by its name, so that run directories and
the committed ones without weights (results/runs) are alike. What cannot be read is left out with a
remark.
"""

import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import opts
from errors import DataError, RunError, printable
from fileio.atomic import read_json
from tools.results.configs import Config, comparable_settings, configs
from tools.results.runs import Run, number

MISSING_SHARE = 0.001  # of ImageNet's images; the other datasets are checked by their readers


def warn(line: str) -> None:
    """Say on standard error what was left out, and why."""
    print(f"note: {printable(line)}", file=sys.stderr)


def find(paths: Iterable[Path | str], note: Callable[[str], None] = warn) -> list[Run]:
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


def read(directory: Path, note: Callable[[str], None] = warn) -> Run | None:
    """The run in a directory; None, and a note, when its settings or its log cannot be read."""
    import experiment.log

    try:
        opt = opts.parse(["--config", str(directory / "config.yaml")])
        records = experiment.log.read_log(directory)
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


def differences(run: Run, config: Config) -> list[str]:
    """What keeps a run from being one of a config, in words; [] for a run of the config."""
    mine = comparable_settings(run.opt)
    theirs = config.comparable_settings
    found = []
    for name in opts.FLAGS:  # in the order of the help
        here, there = mine.get(name, "none"), theirs.get(name, "none")
        if here != there:
            found.append(f"{name} {here}, not {there}")
    num_images = number(run.data, "train")
    if run.opt.dataset == config.opt.dataset == "imagenet" and num_images is not None:
        from datasets import registry

        full = registry.DATASETS["imagenet"].num_images[0] - run.opt.validSize
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
class SeedGroup:
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
        groups: config -> its complete runs.
        others: complete runs of no config, repetitions together.
        unfinished: runs in progress, stopped or failed.
        unused: complete runs that are in no cell, each with the reason in words.
    """

    groups: dict[str, SeedGroup]
    others: list[SeedGroup]
    unfinished: list[Run]
    unused: list[tuple[Run, str]]


def group_runs(found: Iterable[Run]) -> Runs:
    """Put runs in their places; of two complete ones with one seed the first found counts.

    The runs of a config that is about a folder of images may have seen different folders: those
    with the most seeds are its cell, the others are other runs.
    """
    repeated: dict[tuple, list[Run]] = {}
    unfinished = []
    for run in found:
        if run.is_done:
            key = (run.config, run.images, *sorted(comparable_settings(run.opt).items()))
            repeated.setdefault(key, []).append(run)
        else:
            unfinished.append(run)
    unused: list[tuple[Run, str]] = []
    groups: dict[str, SeedGroup] = {}
    others = []
    for runs in repeated.values():
        cell, name = SeedGroup(_one_per_seed(runs, unused)), runs[0].config
        if name and len(cell.runs) > len(groups[name].runs if name in groups else []):
            cell, groups[name] = groups.get(name), cell
        others += [cell] if cell else []
    return Runs(groups, others, unfinished, unused)


def _one_per_seed(runs: list[Run], unused: list[tuple[Run, str]]) -> list[Run]:
    kept: dict[int, Run] = {}
    for run in runs:
        if run.seed in kept:
            first = kept[run.seed]
            unused.append((run, f"the same settings and seed as {first.path}, which is used"))
        else:
            kept[run.seed] = run
    return [kept[seed] for seed in sorted(kept)]
