"""Group runs that differ only in their seeds, and assign each group to its config."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from tools.results.configs import comparable_settings
from tools.results.runs import Run


@dataclass(frozen=True)
class SeedGroup:
    """Complete runs that differ only in their seeds: one for each seed, ascending, at least one."""

    runs: list[Run]

    @property
    def mean(self) -> float:
        """Mean test error, in per cent."""
        return statistics.fmean(run.error for run in self.runs)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of the test errors; None for a single run."""
        return statistics.stdev(run.error for run in self.runs) if len(self.runs) > 1 else None

    def average(self, name: str) -> float | None:
        """Average a property such as `hours` over the runs; None if a log lacks it."""
        values = [getattr(run, name) for run in self.runs]
        return None if None in values else statistics.fmean(values)

    @property
    def device(self) -> str | None:
        """The hardware of the runs; None if a log lacks it."""
        found = dict.fromkeys(run.device for run in self.runs)
        return None if None in found else "; ".join(found)


@dataclass(frozen=True)
class Runs:
    """Runs by what they are used for.

    Args:
        groups: config -> its complete runs.
        others: complete runs that belong to no config.
        unfinished: runs in progress, stopped or failed.
        unused: (run, reason) of complete runs that are in no group.
    """

    groups: dict[str, SeedGroup]
    others: list[SeedGroup]
    unfinished: list[Run]
    unused: list[tuple[Run, str]]


def group_runs(found: Iterable[Run]) -> Runs:
    """Group runs; of two complete runs with the same seed the first one counts.

    The runs of a config that names a folder of images may have seen different folders: the group
    with the most seeds belongs to the config, the others to none.
    """
    found = list(found)
    repetitions: dict[tuple, dict[int, Run]] = {}
    unused = []
    for run in (run for run in found if run.is_done):
        key = (run.config, run.images, comparable_settings(run.opt))
        first = repetitions.setdefault(key, {}).setdefault(run.seed, run)
        if first is not run:
            unused.append((run, f"the same settings and seed as {first.path}, which is used"))

    groups, others = {}, []
    for (name, *_), by_seed in sorted(repetitions.items(), key=lambda item: -len(item[1])):
        group = SeedGroup([by_seed[seed] for seed in sorted(by_seed)])
        if name and name not in groups:
            groups[name] = group
        else:
            others.append(group)
    others.sort(key=lambda group: group.runs[0].path)
    return Runs(groups, others, [run for run in found if not run.is_done], unused)
