"""Draw the figures with matplotlib: from points, runs and cells to PNG and SVG files.

A kind of network has one colour and one marker in all figures; published points are hollow on
dashed lines, measured ones filled. The colours (of Okabe and Ito) also differ in lightness: they
survive a grey printer and the common kinds of colour blindness.
"""

import io
import itertools
import math
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from fileio.atomic import atomic_write
from tools.figures.layer_usage import SCALES, Block, scaled
from tools.figures.series import Point, curve_name, kind, rate_drops
from tools.results.runs import Run, number

WIDTH = 8.0  # inches; shown 800 pixels wide a point of the fonts is 1.4 pixels
DPI = 140
STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "figure.titlesize": 9.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.2,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a name may hold a $
    "svg.hashsalt": "densenet",  # the same input gives the same file
}
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
OTHER_KIND = ("*", "#7F7F7F")
CYCLE = ("#0072B2", "#E69F00", "#000000", "#D55E00", "#56B4E9", "#CC79A7", "#009E73")
DASHES = ("-", "--", ":", "-.")
DROP = {"color": "0.5", "linestyle": (0, (1, 2)), "linewidth": 1}
AXES = {
    "parameters": ("parameters, millions", 1e6),
    "macs": ("multiply-adds per image, billions", 1e9),
}
NOT_RUN = "not run"

# A decorator: matplotlib's own defaults and STYLE, whatever the user's settings are.
styled = matplotlib.style.context(["default", STYLE])


@styled
def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write `name`.png and `name`.svg, the same bytes for the same figure on any day.

    Raises:
        StorageError: they cannot be written.
    """
    vectors, pixels, small = io.BytesIO(), io.BytesIO(), io.BytesIO()
    figure.savefig(vectors, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(pixels, format="png", dpi=DPI)
    # 256 colours are a third of the bytes, and Pillow adds no version of the software.
    image = Image.open(pixels, formats=["PNG"]).convert("RGB").quantize(256)  # noqa: TID251
    image.save(small, "PNG", optimize=True, dpi=(DPI, DPI))
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    for path, data in zip(paths, (small, vectors), strict=True):
        atomic_write(path, data.getvalue())
    return paths


# ------------------------------------------------------------------------------------------ points


@styled
def efficiency(
    panels: list, title: str, runs: list[Run] | None = None, absent: tuple = ()
) -> Figure:
    """Draw Figures 3 and 4: errors against sizes, and perhaps how some of the networks trained.

    Args:
        panels: (title, measure, points) each.
        runs: of a last panel with training curves; None leaves it out.
        absent: names of networks that have no run to show there.
    """
    figure = Figure(figsize=(WIDTH, 4.2))
    places = figure.subplots(1, len(panels) + (runs is not None))
    for axes, (panel_title, measure, points) in zip(places, panels, strict=False):
        _points(axes, points, measure, margin=0.08 * len(places))
        axes.set_title(panel_title)
        _legend_below(axes, _point_legend(points))
    if runs is not None:
        _loss_and_error(places[-1], runs, absent)
    figure.suptitle(title)
    figure.draw_without_rendering()  # names are placed by their sizes in the final layout
    for axes, (_, measure, points) in zip(places, panels, strict=False):
        _name_points(axes, points, measure)
    return figure


def _series(points: list[Point]) -> list[tuple[str, bool, list[Point]]]:
    """Return (kind, is_measured, points) of each line of points."""
    found: dict[tuple[str, bool], list[Point]] = {}
    for point in sorted(points, key=lambda point: (point.is_measured, point.kind)):
        found.setdefault((point.kind, point.is_measured), []).append(point)
    return [(*key, series) for key, series in found.items()]


def _points(axes: Axes, points: list[Point], measure: str, margin: float) -> None:
    """Draw errors against a measure of size, with a margin for names on both sides, as a part."""
    label, unit = AXES[measure]
    for name, is_measured, series in _series(points):
        marker, colour = KINDS.get(name, OTHER_KIND)
        series = sorted(series, key=lambda point: getattr(point, measure))
        axes.errorbar(
            [getattr(point, measure) / unit for point in series],
            [point.error for point in series],
            yerr=[point.std or 0 for point in series] if is_measured else None,
            label=f"{name}, {'measured' if is_measured else 'published'}",
            marker=marker,
            color=colour,
            markerfacecolor=colour if is_measured else "white",
            linestyle="-" if is_measured else "--",
            capsize=3,
        )
    axes.set_xscale("log")
    axes.margins(x=margin, y=0.12)
    _plain_ticks(axes.xaxis)
    axes.set(xlabel=label, ylabel="test error, %")
    if not points:
        _show_not_run(axes)


# Where the name of a point may stand: offset in points, and its horizontal and vertical alignment.
SIDES = list(itertools.product([("left", 5), ("right", -5)], [("bottom", 3), ("top", -3)]))
SIDES += list(itertools.product([("center", 0)], [("bottom", 8), ("top", -8)]))


def _name_points(axes: Axes, points: list[Point], measure: str) -> None:
    """Write each network's name once, on the side where it covers least."""
    names, obstacles, written = {}, [], []
    for _, _, series in _series(points):
        ends = [(getattr(point, measure) / AXES[measure][1], point.error) for point in series]
        for point, end in zip(series, ends, strict=True):
            names.setdefault((point.kind, point.network), end)
        pixels = axes.transData.transform(sorted(ends))
        obstacles += [(x, y, 20) for x, y in pixels]
        for (x0, y0), (x1, y1) in itertools.pairwise(pixels):  # the lines between them
            parts = [part / 30 for part in range(1, 30)]
            obstacles += [(x0 + part * (x1 - x0), y0 + part * (y1 - y0), 1) for part in parts]
    for (_, name), end in names.items():
        label = axes.annotate(name, end, (0, 0), textcoords="offset points", fontsize=7)
        label.set_in_layout(False)

        def place(side: tuple, label=label) -> float:
            """Move the label to a side and return how much it covers there."""
            (ha, x), (va, y) = side
            label.set(ha=ha, va=va)
            label.xyann = (x, y)
            box = label.get_window_extent()
            is_outside = not (axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1))
            covered = sum(weight for x, y, weight in obstacles if box.contains(x, y))
            return 100 * is_outside + 50 * box.count_overlaps(written) + covered

        place(min(SIDES, key=place))
        written.append(label.get_window_extent())


def _point_legend(points: list[Point]) -> list[Line2D]:
    handles = []
    for name in sorted({point.kind for point in points}):
        marker, colour = KINDS.get(name, OTHER_KIND)
        handles.append(Line2D([], [], marker=marker, color=colour, linestyle="", label=name))
    grey = {"color": "0.4", "marker": "o"}
    if not all(point.is_measured for point in points):
        look = grey | {"markerfacecolor": "white", "linestyle": "--"}
        handles.append(Line2D([], [], **look, label="published"))
    if any(point.is_measured for point in points):
        has_bars = any(point.std is not None for point in points)
        label = "measured (bar: ± std of seeds)" if has_bars else "measured (one seed)"
        handles.append(Line2D([], [], **grey, label=label))
    else:
        handles.append(Line2D([], [], linestyle="", label=f"measured: {NOT_RUN}"))
    return handles


# ------------------------------------------------------------------------------------------ curves


def _loss_and_error(axes: Axes, runs: list[Run], absent: tuple) -> None:
    """Draw test error (left, solid) and training loss (right, dashed) in one panel."""
    handles = []
    if runs:
        right = axes.twinx()
        right.grid(False)
        right.set(yscale="log", ylabel="training loss (dashed)")
        colours = {}
        for run in runs:
            _, colour = KINDS.get(kind(run.opt), OTHER_KIND)
            colours[curve_name(run)] = colour
            _curve(axes, run, "val_top1", color=colour)
            _curve(right, run, "train_loss", color=colour, linestyle="--", marker="")
        _plain_ticks(right.yaxis)
        _epochs(axes, runs)
        handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
        axes.set_ylabel("test error, % (solid)")
    else:
        _show_not_run(axes)
    axes.set_title("training curves")
    handles += [Line2D([], [], linestyle="", label=f"{name}: {NOT_RUN}") for name in absent]
    _legend_below(axes, handles)


@styled
def training(runs: list[Run], title: str) -> Figure:
    """Draw loss and error on training and test images; the seeds of a network share a colour."""
    figure = Figure(figsize=(WIDTH, 5.6))
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    names = [curve_name(run) for run in runs]
    looks = {
        name: {"color": CYCLE[i % len(CYCLE)], "linestyle": DASHES[i // len(CYCLE) % len(DASHES)]}
        for i, name in enumerate(sorted(set(names)))
    }
    tested = sorted({"validation" if run.opt.validSize else "test" for run in runs})
    splits = {"train": "training", "val": " or ".join(tested)}
    for column, (split, words) in enumerate(splits.items()):
        panels[0, column].set_title(f"{words} images")
        for row, measure in enumerate(("loss", "top1")):
            axes = panels[row, column]
            for run, name in zip(runs, names, strict=True):
                _curve(axes, run, f"{split}_{measure}", **looks[name])
            axes.set_yscale("log")  # the changes after the drops are small
            _epochs(axes, runs)
    for row, label in zip(panels, ("loss (mean cross-entropy)", "top-1 error, %"), strict=True):
        _plain_ticks(row[0].yaxis)  # now that both panels of the shared axis have their curves
        row[0].set_ylabel(label)
    counts = {name: f"{names.count(name)} run{'s' * (names.count(name) > 1)}" for name in looks}
    handles = [Line2D([], [], **looks[name], label=f"{name} ({counts[name]})") for name in looks]
    if any(map(rate_drops, runs)):
        handles.append(Line2D([], [], **DROP, label="learning rate drops"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure


def _curve(axes: Axes, run: Run, measure: str, **look: object) -> None:
    values = [number(record, measure) for record in run.records]
    values = [math.nan if value is None else value for value in values]
    epochs = [record["epoch"] for record in run.records]
    plain = {"marker": "."} if len(values) <= 20 else {"linewidth": 0.8}
    axes.plot(epochs, values, **plain | look)


def _epochs(axes: Axes, runs: list[Run]) -> None:
    """Set the axis of epochs, with lines where the learning rate drops."""
    for epoch in sorted({epoch for run in runs for epoch in rate_drops(run)}):
        axes.axvline(epoch, **DROP)
    axes.set_xlim(0, 1.02 * max(run.opt.nEpochs for run in runs))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if axes.get_subplotspec().is_last_row():
        axes.set_xlabel("epoch")


# --------------------------------------------------------------------------------------- heat maps

MAX_VECTOR_CELLS = 500  # of about 400 bytes in an SVG each; more become one image in it


@styled
def heat_maps(network: str, blocks: list[Block], scale: str, note: str = "") -> Figure:
    """Draw Figure 5: a triangle of cells for each dense block, with the column of its reader."""
    cells = [scaled(block, scale) for block in blocks]
    columns = [column for block in cells for column in block.columns]
    largest = max(map(max, columns)) or 1.0
    per_row = len(cells) if len(cells) <= 3 else math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / per_row)
    figure = Figure(figsize=(WIDTH, 0.8 + 0.82 * rows * WIDTH / max(per_row, 2)))
    panels = figure.subplots(rows, per_row, squeeze=False).flatten()
    look = {"cmap": "viridis", "vmin": 0, "vmax": largest}
    look["rasterized"] = sum(map(len, columns)) > MAX_VECTOR_CELLS
    for index, (axes, block) in enumerate(zip(panels, cells, strict=False), start=1):
        mesh = _heat_map(axes, block, look)
        axes.set_title(f"dense block {index}", pad=14)
        axes.set_xlabel("target layer")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("source layer (0: block input)")
    for axes in panels[len(cells) :]:
        axes.remove()
    bar = figure.colorbar(mesh, ax=panels[: len(cells)].tolist(), pad=0.02, aspect=30)
    bar.set_label(f"mean |weight|,\n{SCALES[scale]}")
    bar.outline.set_visible(False)
    layers = ", ".join(str(len(block.columns) - 1) for block in cells)
    figure.suptitle(f"{network}: blocks of {layers} layers\n{note}".rstrip())
    return figure


def _heat_map(axes: Axes, block: Block, look: dict):
    """Draw one block: x is the target, y the source; the exit stands apart in a black frame."""
    *layers, last = block.columns
    sources = range(len(last))
    cells = [
        [column[row] if row < len(column) else math.nan for column in layers] for row in sources
    ]
    edges = [row - 0.5 for row in range(len(last) + 1)]
    mesh = axes.pcolormesh([edge + 1 for edge in edges[:-1]], edges, cells, **look)
    width = max(1.4, len(layers) / 12)  # enlarged, as in the paper
    left = len(layers) + 0.5 + width / 2
    axes.pcolormesh([left, left + width], edges, [[value] for value in last], **look)
    frame = Rectangle((left, -0.5), width, len(last), fill=False, edgecolor="black", zorder=3)
    axes.add_patch(frame)
    above = (left + width / 2, -0.5)
    axes.annotate(block.exit, above, (0, 3), textcoords="offset points", ha="center", fontsize=7.5)
    axes.set_xlim(0.5, left + width + 0.1)
    axes.set_ylim(len(last) - 0.4, -0.6)  # source 0 is the top row, as in the paper
    axes.grid(False)
    axes.spines[["top", "right"]].set_visible(False)
    ticks = range(0, len(last), math.ceil(len(layers) / 8))  # at most nine
    axes.set_xticks(ticks[1:])
    axes.set_yticks(ticks)
    return mesh


# ------------------------------------------------------------------------------------------ shared


def _plain_ticks(axis) -> None:
    """Show numbers such as 0.5, 1, 2 on a logarithmic axis whose limits are known."""
    low, high = axis.get_view_interval()
    steps = (1, 2, 3, 5) if high < 12 * low else (1, 2, 5) if high < 3000 * low else (1,)
    axis.set_major_locator(AutoLocator() if high < 4 * low else LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend_below(axes: Axes, handles: list) -> None:
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _show_not_run(axes: Axes) -> None:
    axes.text(0.5, 0.5, NOT_RUN, transform=axes.transAxes, ha="center", va="center", color="0.4")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
