"""Draw the paper's figures with matplotlib, from runs and published results, as PNG and SVG.

A kind of network has one colour and one marker in all scatter plots; published points are hollow
on dashed lines, measured ones filled. The colours (of Okabe and Ito) also differ in
lightness: they survive a grey printer and the common kinds of colour blindness.
"""

import itertools
import math
import re
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from cli.flag_types import Settings
from datasets.registry import DATASETS
from errors import printable
from experiment import console
from experiment.drawing import WIDTH, Figure, matplotlib, render, styled
from models.registry import ARCHITECTURES
from tools.figures import layer_usage
from tools.results.configs import configs, count
from tools.results.published import tables
from tools.results.runs import Run, SeedGroup, data_name, group_runs, number

Axes, LogLocator = matplotlib.axes.Axes, partial(matplotlib.ticker.LogLocator, subs=(1, 2, 5))
# Marker and colour of each kind of network.
KINDS = {
    "DenseNet": ("s", "#E69F00"),
    "DenseNet-C": ("D", "#CC79A7"),
    "DenseNet-B": ("^", "#009E73"),
    "DenseNet-BC": ("o", "#0072B2"),
    "DenseNet-BC, cosine rate": ("P", "#56B4E9"),
    "ResNet": ("v", "#D55E00"),
    "pre-activation ResNet": ("X", "#000000"),
}
NO_ERROR = (-0.05, 1)  # limits of an axis on which every value is 0
OTHER = ("*", "#7F7F7F")
CURVES = [
    {"linestyle": dashes, "color": colour}
    for dashes, (_, colour) in itertools.product(("-", "--", ":", "-."), KINDS.values())
]
MEASURES = {
    "parameters": ("parameters, millions", 1e6),
    "macs": ("multiply-adds per image, billions", 1e9),
}
# Configs whose training curves Figure 4 shows.
PAPER_CURVES = ("c10plus/preresnet-1001", "c10plus/densenet-bc-L100-k12")
# Folder of configs/, and the published table, column and title, if anything was published.
EFFICIENCY = {
    "figure3": ("imagenet", "imagenet", "top-1", "ImageNet, top-1 error of one crop"),
    "figure4": ("c10plus", "table2", "C10+", "CIFAR-10 with augmentation (C10+)"),
    "figure4-small": ("small", None, None, None),
    "figure4-digits": ("digits", None, None, None),
}


@styled
def draw(asked: SimpleNamespace, found: list[Run]) -> dict[str, bytes]:
    """Draw the figures that a command line asks for; return name of a file -> content."""
    grouped = group_runs(found)
    files, figures = {}, {}
    for name in asked.only:
        if name == "figure5":
            weights, blocks, files["figure5.csv"] = layer_usage.read(Path(asked.weights))
            figures[name] = figure5(weights, blocks, asked.note, asked.scale)
        elif name == "curves":
            repeated = [run for run, _ in grouped.repeated]
            figures |= curves([run for run in found if run not in repeated], asked.note)
        elif figure := efficiency(name, grouped.groups, asked.note):
            figures[name] = figure
        else:
            print(f"{name}: not run: there is no complete run of configs/{EFFICIENCY[name][0]}")
    for name, figure in figures.items():
        warn = cache(console.warn)  # each line once, also where it is true of both files
        for suffix in ("png", "svg"):
            files[f"{name}.{suffix}"] = render(figure, suffix, name, warn)
    return files


def kind(opt: Settings) -> str:
    """Name the family of a network, such as `DenseNet-BC`."""
    if opt.netType != "densenet":
        network = ARCHITECTURES[opt.netType]
        parts = {
            "stochastic depth": opt.stochasticDepth < 1,
            "drop-path": opt.dropPath > 0,
            "dropout": network.defaults.get("dropRate") == 0 < opt.dropRate,
        }
        return ", ".join([network.title, *(part for part, has_it in parts.items() if has_it)])
    form = ("B" if opt.bottleneck else "") + ("C" if opt.reduction < 1 else "")
    cosine = ", cosine rate" if opt.lrShape == "cosine" else ""
    return f"DenseNet{'-' if form else ''}{form}{cosine}"


def is_compared(opt: Settings) -> bool:
    """Tell whether the paper's figures have such a network."""
    return opt.netType == "densenet" or kind(opt) in KINDS


def network(opt: Settings) -> str:
    """Name a network within its family by its depth, and the growth rate if it has one."""
    if ARCHITECTURES[opt.netType].uses("growthRate"):
        return f"L={opt.depth} k={opt.growthRate}"
    return f"{opt.depth}" if opt.widen in (None, 1) else f"{opt.depth}-{opt.widen:g}"


def curve_name(run: Run) -> str:
    """Name the network of a run; without a config, its directory without the seed."""
    if run.config:
        return f"{kind(run.opt)} {network(run.opt)}"
    return re.sub(r"-seed\d+$", "", printable(run.path.name))


def data_and_length(opt: Settings) -> str:
    """Name the data and epochs that all runs of a figure share; + marks augmented CIFAR."""
    plus = "+" if opt.augment and DATASETS[opt.dataset].marks_augmentation else ""
    return f"{data_name(opt)}{plus}, {opt.nEpochs} epochs"


def with_note(title: str, note: str, runs: list[Run]) -> str:
    """Add the note to figures of a user's own images, whose name says little."""
    own_images = all(DATASETS[run.opt.dataset].is_named_by_directory for run in runs)
    return f"{title}\n{note}".rstrip() if own_images else title


class Point(NamedTuple):
    """Hold the test error of a network in per cent: published, or the mean over seeds."""

    opt: Settings
    error: float
    std: float = 0.0
    seeds: int = 0  # 0 for a published error


def efficiency(name: str, groups: dict[str, SeedGroup], note: str) -> Figure | None:
    """Draw Figure 3 or a Figure 4 of published and measured errors; return None without any.

    They are those of DenseNets and ResNets, as in the paper.
    """
    folder, table, column, title = EFFICIENCY[name]
    own = [group for config, group in groups.items() if config.startswith(f"{folder}/")]
    own = [group for group in own if is_compared(group.runs[0].opt)]
    points = [Point(each.runs[0].opt, each.mean, each.std or 0.0, len(each.runs)) for each in own]
    for row in tables()[table].rows if table else ():
        opt = configs()[row.configs[column]].opt if column in row.configs else None
        if opt and is_compared(opt):
            points.append(Point(opt, float(row.errors[column])))
    if not points:
        return None
    runs = [run for group in own for run in group.runs]
    if not table:
        data = sorted({data_and_length(run.opt) for run in runs})
        if len({run.images for run in runs}) > 1:
            data.append("not all on the same images")
        title = f"Runs of configs/{folder}, not of the paper: {'; '.join(data)}"
        title = with_note(title, note, runs)
    if not own:
        title += "\nmeasured: not run"
    has_curves = bool(own) and name != "figure3"
    figure = Figure(figsize=(WIDTH, 7.2 if has_curves else 4.2))
    panels = figure.subplots(1 + has_curves, 2, squeeze=False)
    panels[0, 1].sharey(panels[0, 0])
    for axes, measure in zip(panels[0], MEASURES, strict=True):
        scatter(axes, points, measure)
    if has_curves:
        plot_training(panels[1], own)
    panels[0, 0].set_ylabel("test error, %" + " (bar: ± std of seeds)" * any(p.std for p in points))
    legend_below(figure, panels[0, 0])
    figure.suptitle(title)
    return figure


def scatter(axes: Axes, points: list[Point], measure: str) -> None:
    """Draw a line of points for each kind; write the name of each network once."""
    label, unit = MEASURES[measure]

    def size(point: Point) -> float:
        return getattr(count(point.opt), measure) / unit

    lines: dict[tuple[bool, str], list[Point]] = {}
    for point in sorted(points, key=size):
        lines.setdefault((point.seeds > 0, kind(point.opt)), []).append(point)
    named = set()
    for (is_measured, name), line in sorted(lines.items()):
        marker, colour = KINDS.get(name, OTHER)
        single = " (one seed)" * all(point.seeds == 1 for point in line)
        look = {"marker": marker, "color": colour, "capsize": 3, "linestyle": "-"}
        if not is_measured:
            look |= {"markerfacecolor": "white", "linestyle": "--"}
        look["label"] = f"{name}, {'measured' if is_measured else 'published'}{single}"
        stds = [point.std for point in line] if is_measured else None
        axes.errorbar([*map(size, line)], [point.error for point in line], stds, **look)
        for point in line:
            if (name, network(point.opt)) not in named:
                named.add((name, network(point.opt)))
                axes.annotate(network(point.opt), (size(point), point.error), **side(name))
    axes.set(xscale="log", xlabel=label)
    axes.margins(x=0.3, y=0.25)
    if not any(point.error for point in points):
        axes.set_ylim(*NO_ERROR)
    plain_ticks(axes.xaxis)


def plot_training(panels: list[Axes], groups: list[SeedGroup]) -> None:
    """Draw the training loss and the test error of the paper's two networks.

    If neither was trained, draw the largest network of each kind.
    """
    runs = [group.runs[0] for group in groups]
    runs.sort(key=lambda run: count(run.opt).parameters)
    largest = {kind(run.opt): run for run in runs}.values()
    shown = [run for run in runs if run.config in PAPER_CURVES] or largest
    labels = {"train_loss": "training loss", "val_top1": "test error, %"}
    for axes, (column, label) in zip(panels, labels.items(), strict=True):
        for run in shown:
            name, colour = f"{kind(run.opt)} {network(run.opt)}", KINDS.get(kind(run.opt), OTHER)[1]
            plot_epochs(axes, run, column, color=colour, label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        log_scale(axes)
    folder, trained = runs[0].config.partition("/")[0], {run.config for run in runs}
    not_run = [name for name in PAPER_CURVES if name.startswith(folder) and name not in trained]
    panels[0].set_title("training curves (one run each)")
    panels[1].legend(title=f"not run: {', '.join(not_run)}" if not_run else None)


def plot_epochs(axes: Axes, run: Run, column: str, **look: object) -> None:
    """Draw a column of the log over the epochs; a value that is missing is a gap."""
    epochs = [record["epoch"] for record in run.records]
    values = [number(record, column) for record in run.records]
    values = [math.nan if value is None else value for value in values]
    axes.plot(epochs, values, marker="." if len(values) <= 20 else "", **look)


def side(name: str) -> dict:
    """Place labels of DenseNet-B, -C and -BC below their points, and all other labels above."""
    is_below = name.startswith("DenseNet-")
    position = {"xytext": (-4, -4), "ha": "right"} if is_below else {"xytext": (5, 3), "ha": "left"}
    look = {"textcoords": "offset points", "rotation": 38, "rotation_mode": "anchor"}
    return look | position | {"fontsize": 7, "va": "center"}


def plain_ticks(axis) -> None:
    """Show numbers such as 0.5, 1, 2 on a logarithmic axis; call after plotting."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(matplotlib.ticker.AutoLocator() if high < 8 * low else LogLocator())
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def log_scale(*panels: Axes) -> None:
    """Give panels that share it a logarithmic y axis, since changes after the drops are small.

    It is linear from the smallest positive value down to 0, if 0 occurs. Call after plotting.
    """
    smallest = min(axes.dataLim.minposy for axes in panels)
    has_zero = any(axes.dataLim.ymin == 0 for axes in panels)
    if smallest == math.inf:  # nothing but 0, or nothing at all
        panels[0].set_ylim(*NO_ERROR)
        return
    scale = {"value": "log"}
    if has_zero:
        scale = {"value": "symlog", "linthresh": smallest, "linscale": 0.3}
    for axes in panels:
        axes.set_yscale(**scale)
    if has_zero:
        panels[0].set_ylim(bottom=-0.1 * smallest)  # room for the line at 0
        ticks = LogLocator().tick_values(smallest, panels[0].get_ylim()[1])
        panels[0].set_yticks([0, *(tick for tick in ticks if tick >= smallest)])
        panels[0].yaxis.set_major_formatter("{x:g}")
    else:
        plain_ticks(panels[0].yaxis)


def legend_below(figure: Figure, axes: Axes) -> None:
    """Show each label of a panel once."""
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=2)


def curves(runs: list[Run], note: str) -> dict[str, Figure]:
    """Draw one figure for all runs with the same data and epochs; return figures by file name."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.records:
            groups.setdefault(data_and_length(run.opt), []).append(run)
    figures = {}
    for title, group in groups.items():
        name = "curves-" + re.sub(r"[^\w.]+|_", "-", title.lower().replace("+", "-plus"))
        while name in figures:  # of data whose names differ in other characters only
            name += "-"
        figures[name] = training(group, with_note(title, note, group))
    return figures


def training(runs: list[Run], title: str) -> Figure:
    """Draw loss and error on training and test images; the seeds of a network share a colour."""
    figure = Figure(figsize=(WIDTH, 5.6))
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    names = [curve_name(run) for run in runs]
    looks = dict(zip(sorted(set(names)), itertools.cycle(CURVES)))
    tested = " or ".join(sorted({"validation" if run.opt.validSize else "test" for run in runs}))
    splits = {"train": "training images", "val": f"{tested} images"}
    drops = sorted({epoch - 1 for run in runs for epoch in run.opt.milestones or [] if epoch > 1})
    for column, (split, words) in enumerate(splits.items()):
        for row, measure in enumerate(("loss", "top1")):
            axes = panels[row, column]
            for run, name in zip(runs, names, strict=True):
                label = f"{name} ({names.count(name)} run{'s' * (names.count(name) > 1)})"
                plot_epochs(axes, run, f"{split}_{measure}", label=label, **looks[name])
            for epoch in drops:
                axes.axvline(epoch, color="0.5", linestyle=":", label="learning rate drops")
        panels[0, column].set_title(words)
        panels[1, column].set_xlabel("epoch")
        panels[1, column].xaxis.get_major_locator().set_params(integer=True)
    for row, label in zip(panels, ("mean loss", "top-1 error, %"), strict=True):
        log_scale(*row)
        row[0].set_ylabel(label)
    legend_below(figure, panels[0, 0])
    figure.suptitle(title)
    return figure


SCALES = {
    "column": "divided by the largest of its target",
    "block": "divided by the largest of its block",
    "none": "not normalised",
}


def figure5(name: str, blocks: list[layer_usage.Block], note: str, scale: str = "column") -> Figure:
    """Draw each dense block as a triangle of cells, then a gap and its transition or classifier.

    The paper's scale runs from 0 to 1 without a unit. Its text compares only the sources of one
    target, and batch normalisation removes the scale of a layer's weights from the network, so
    by default each column is divided by its largest cell. `name` names the weights.
    """
    cells = []
    for block in blocks:
        largest = max(map(max, block))
        divisors = {"column": [max(c) for c in block], "block": [largest] * len(block)}
        pairs = zip(block, divisors.get(scale, [1.0] * len(block)), strict=True)
        cells.append([[cell / (divisor or 1.0) for cell in column] for column, divisor in pairs])
    vmax = max(max(map(max, block)) for block in cells)
    figure = Figure(figsize=(WIDTH, 3))
    panels = figure.subplots(1, len(cells), squeeze=False)[0]
    for index, (axes, block) in enumerate(zip(panels, cells, strict=True), start=1):
        *layers, last = block
        size = len(last)
        padded = [column + [math.nan] * (size - len(column)) for column in [*layers, [], last]]
        # x is the target, y the source; source 0 is the top row, as in the paper.
        extent = (0.5, size + 1.5, size - 0.5, -0.5)
        picture = list(zip(*padded, strict=True))
        image = axes.imshow(picture, vmin=0, vmax=vmax, extent=extent, aspect="auto")
        ticks = range(0, size, math.ceil(size / 8))
        axes.set(xticks=ticks[1:], yticks=ticks, title=f"dense block {index}")
        axes.set_xlabel(f"target layer | {layer_usage.exit_of(index, cells)}")
        axes.grid(False)
    panels[0].set_ylabel("source layer (0: block input)")
    figure.colorbar(image, ax=panels, label=f"mean |weight|,\n{SCALES[scale]}")
    layers = ", ".join(str(len(block) - 1) for block in cells)
    figure.suptitle(f"{name}: blocks of {layers} layers\n{note}".rstrip())
    return figure
