"""Collect what the figures show: a point per network, and the runs whose curves share a picture."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from cli.flag_types import Settings
from datasets.registry import DATASETS
from models.registry import ARCHITECTURES
from tools.results.configs import configs, count
from tools.results.groups import SeedGroup
from tools.results.published import Row
from tools.results.runs import Run, number


@dataclass(frozen=True)
class Point:
    """The result of one network.

    Args:
        kind: its family, such as `DenseNet-BC`.
        network: its label within the family, such as `L=40 k=12`.
        macs: multiply-adds for one image.
        error: test error in per cent: published, or the mean over seeds.
        std: standard deviation over seeds, None for fewer than two.
    """

    kind: str
    network: str
    parameters: int
    macs: int
    error: float
    is_measured: bool = False
    std: float | None = None


def kind(opt: Settings) -> str:
    """Name the family of a network as the paper does."""
    if opt.netType != "densenet":
        return ARCHITECTURES[opt.netType].title
    form = ("B" if opt.bottleneck else "") + ("C" if opt.reduction < 1 else "")
    cosine = ", cosine rate" if opt.lrShape == "cosine" else ""
    return f"DenseNet{'-' if form else ''}{form}{cosine}"


def network(opt: Settings) -> str:
    """Name a network within its family by its depth, and the growth rate if it has one."""
    has_growth_rate = ARCHITECTURES[opt.netType].uses("growthRate")
    return f"L={opt.depth} k={opt.growthRate}" if has_growth_rate else f"{opt.depth}"


def published_points(rows: Iterable[Row], column: str) -> list[Point]:
    """Return the published errors of a column, for the networks that have a config."""
    found = [(configs()[row.configs[column]].opt, row) for row in rows if column in row.configs]
    return [
        Point(kind(opt), network(opt), *count(opt), float(row.errors[column])) for opt, row in found
    ]


def measured_points(groups: dict[str, SeedGroup], folder: str) -> list[Point]:
    """Return the errors of the complete runs of the configs in a folder of configs/."""
    found = [
        (group.runs[0].opt, group)
        for name, group in groups.items()
        if name.startswith(f"{folder}/")
    ]
    return [
        Point(kind(opt), network(opt), *count(opt), group.mean, True, group.std)
        for opt, group in found
    ]


def curve_name(run: Run) -> str:
    """Name the network of a run; a run of no config by its directory, without the seed."""
    if run.config:
        separator = "-" if run.opt.netType != "densenet" else " "
        return f"{kind(run.opt)}{separator}{network(run.opt)}"
    return re.sub(r"-seed\d+$", "", run.path.name)


def rate_drops(run: Run) -> list[int]:
    """Return the epochs after which the learning rate fell by a step."""
    rates = [number(record, "lr") or 0.0 for record in run.records]
    if run.opt.lrShape != "multistep":  # a cosine has no steps
        return []
    pairs = zip(run.records, rates, rates[1:], strict=False)
    return [record["epoch"] for record, rate, after in pairs if after < rate]


def data_name(opt: Settings) -> str:
    """Name the training data: the dataset or the folder, with + where CIFAR is augmented."""
    dataset = DATASETS[opt.dataset]
    name = opt.data.rstrip("/").rpartition("/")[2] if dataset.is_named_by_directory else opt.dataset
    name = re.sub(r"[^A-Za-z0-9.]+", "-", name)  # it becomes part of a file's name
    return name + ("+" if opt.augment and dataset.marks_augmentation else "")


def by_data(found: Iterable[Run]) -> dict[str, list[Run]]:
    """Group the runs that can share a picture, by data and number of epochs in words."""
    groups: dict[str, list[Run]] = {}
    for run in found:
        if run.records:
            groups.setdefault(f"{data_name(run.opt)}, {run.opt.nEpochs} epochs", []).append(run)
    return groups


def largest_of_each_kind(found: Iterable[Run]) -> list[Run]:
    """Return all seeds of the network with the most parameters of each kind."""
    best: dict[str, list[Run]] = {}
    for run in sorted(found, key=lambda run: -count(run.opt).parameters):
        same = best.setdefault(kind(run.opt), [run])
        if run is not same[0] and network(run.opt) == network(same[0].opt):
            same.append(run)
    return [run for same in best.values() for run in same]
