"""What is drawn in the figures: results of networks and training curves, as plain values."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cli.flag_types import Settings
from datasets.registry import DATASETS
from models.registry import ARCHITECTURES
from tools.results import runs


@dataclass(frozen=True)
class Point:
    """The result of one network.

    Args:
        network: its name beside the point, such as `L=40 k=12`.
        parameters, macs: counted; macs are multiply-adds for one image.
        error: test error in per cent, the mean over seeds.
        spread: the standard deviation over seeds, None of fewer than two.
    """

    network: str
    parameters: int
    macs: int
    error: float
    spread: float | None = None


@dataclass(frozen=True)
class Series:
    """Results of networks of one kind, the smallest first.

    Args:
        kind: such as `DenseNet-BC`.
        is_measured: by runs; else it was published.
    """

    kind: str
    is_measured: bool
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Curve:
    """The log of one run.

    Args:
        name: of the network, the same for all seeds.
        kind: of the network.
        epochs: those that were logged.
        values: by the name in the log, such as `val_top1`: a number for each epoch, None where
            it was not finite.
        drops: after how many epochs the learning rate fell by a step.
        num_epochs: how many the run is to have.
        split: which images the values of `val_` are of, test or validation.
    """

    name: str
    kind: str
    epochs: tuple[int, ...]
    values: dict[str, tuple[float | None, ...]]
    drops: tuple[int, ...]
    num_epochs: int
    split: str


MEASURES = ("train_loss", "val_loss", "train_top1", "val_top1")


def kind(opt: Settings) -> str:
    """The family of a network as the paper writes it."""
    if opt.netType != "densenet":
        return ARCHITECTURES[opt.netType].title
    form = ("B" if opt.bottleneck else "") + ("C" if opt.reduction < 1 else "")
    cosine = ", cosine rate" if opt.lrShape == "cosine" else ""
    return f"DenseNet{'-' if form else ''}{form}{cosine}"


def network(opt: Settings) -> str:
    """The network within its family: its depth and, of a DenseNet, the growth rate."""
    if ARCHITECTURES[opt.netType].uses("growthRate"):
        return f"L={opt.depth} k={opt.growthRate}"
    return f"{opt.depth}"


def published_series(rows: Iterable, column: str, configs: dict) -> list[Series]:
    """The published errors of the networks that there is a config of.

    Args:
        rows: of a published.Table.
        column: of that table.
        configs: those of configs.configs().
    """
    found = []
    for row in rows:
        config = configs.get(row.configs.get(column))
        if config and column in row.errors:
            opt, counts = config.opt, (config.parameters, config.macs)
            found.append((kind(opt), Point(network(opt), *counts, row.errors[column])))
    return _series(found, is_measured=False)


def measured_series(cells: dict, folder: str) -> list[Series]:
    """The errors of the complete runs of the configs in a folder of configs/.

    Args:
        cells: config -> match.SeedGroup.
    """
    found = []
    for name, cell in cells.items():
        if name.split("/")[0] == folder:
            run = cell.runs[0]
            counts = (run.parameters, run.macs)
            point = Point(network(run.opt), *counts, cell.mean, cell.std)
            found.append((kind(run.opt), point))
    return _series(found, is_measured=True)


def _series(found: list[tuple[str, Point]], is_measured: bool) -> list[Series]:
    """One series for each kind, in the order of the alphabet."""
    by_kind: dict[str, list[Point]] = {}
    for name, point in found:
        by_kind.setdefault(name, []).append(point)
    return [
        Series(name, is_measured, tuple(sorted(points, key=lambda point: point.parameters)))
        for name, points in sorted(by_kind.items())
    ]


def curve(run) -> Curve:
    """What a run has logged, which is at least one epoch."""
    records = run.records
    rates = [runs.number(record, "lr") for record in records]
    drops = [
        record["epoch"]
        for record, rate, after in zip(records, rates, rates[1:], strict=False)
        # A rate that falls all the time has no steps to be marked.
        if run.opt.lrShape == "multistep" and None not in (rate, after) and after < rate
    ]
    return Curve(
        curve_name(run),
        kind(run.opt),
        tuple(record["epoch"] for record in records),
        {name: tuple(runs.number(record, name) for record in records) for name in MEASURES},
        tuple(drops),
        run.opt.nEpochs,
        "validation" if run.opt.validSize else "test",
    )


def curve_name(run) -> str:
    """The network of a run of a config, else the name of its directory without the seed."""
    if run.config:
        separator = "-" if run.opt.netType != "densenet" else " "
        return f"{kind(run.opt)}{separator}{network(run.opt)}"
    return re.sub(r"-seed\d+$", "", Path(run.path).name)


def data_name(opt: Settings) -> str:
    """The training data: the dataset, or the folder's name; with + where CIFAR is augmented."""
    dataset = DATASETS[opt.dataset]
    name = Path(opt.data).name if dataset.is_named_by_directory else opt.dataset
    name = re.sub(r"[^A-Za-z0-9.]+", "-", name)  # it becomes part of a file's name
    return name + ("+" if opt.augment and dataset.marks_augmentation else "")


def alike(found: Iterable) -> dict[str, list]:
    """The runs by what can share a picture: the data and the number of epochs, in words."""
    groups: dict[str, list] = {}
    for run in found:
        if run.records:
            groups.setdefault(f"{data_name(run.opt)}, {run.opt.nEpochs} epochs", []).append(run)
    return groups


def largest_of_each_kind(found: Iterable) -> list:
    """All seeds of the network with the most parameters of each kind."""
    best: dict[str, list] = {}
    for run in found:
        so_far = best.get(kind(run.opt), [])
        if not so_far or run.parameters > so_far[0].parameters:
            best[kind(run.opt)] = [run]
        elif run.parameters == so_far[0].parameters:
            so_far.append(run)
    return [run for same in best.values() for run in same]
