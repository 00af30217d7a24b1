"""The drawing of tools.figures: from points, curves and cells to matplotlib's figures and files.

A kind of network has one colour and one marker in all figures; published points are hollow on
dashed lines, measured ones filled. The colours (of Okabe and Ito) differ in lightness, too, so that
they survive a grey printer and the common kinds of colour blindness.
"""

import io
import itertools
import math
from pathlib import Path

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from fileio.atomic import atomic_write
from tools.figures.layer_usage import SCALES, Block, scaled

WIDTH = 8.0  # inches; shown 800 pixels wide a point of the fonts is 1.4 pixels
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
DPI = 140
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
NOT_RUN = "not run"
AXES = {
    "parameters": ("parameters, millions", 1e6),
    "macs": ("multiply-adds per image, billions", 1e9),
}
ERROR = "test error, %"


# Decorates what draws: matplotlib's own defaults and STYLE, whatever the person's settings are.
styled = matplotlib.style.context(["default", STYLE])


# ------------------------------------------------------------------------------------------- files


@styled
def files(figure: Figure) -> dict[str, bytes]:
    """The figure as PNG and SVG by suffix: the same bytes for the same figure on any day."""
    vectors, pixels, small = io.BytesIO(), io.BytesIO(), io.BytesIO()
    figure.savefig(vectors, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(pixels, format="png", dpi=DPI)
    # 256 colours are a third of the bytes, and enough for what is drawn here.
    image = Image.open(pixels, formats=["PNG"]).convert("RGB").quantize(256)  # noqa: TID251
    image.save(small, "PNG", optimize=True, dpi=(DPI, DPI))  # and no facts about the software
    return {"png": small.getvalue(), "svg": vectors.getvalue()}


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write `name`.png and `name`.svg.

    Raises:
        StorageError: they cannot be written.
    """
    paths = []
    for suffix, data in files(figure).items():
        paths.append(directory / f"{name}.{suffix}")
        atomic_write(paths[-1], data)
    return paths


# ------------------------------------------------------------------------------------------ points


@styled
def results(series: list, error: str) -> Figure:
    """Figure 3: errors against parameters and against multiply-adds, a panel each.

    Args:
        error: what they are called, with their unit.
    """
    figure = Figure(figsize=(WIDTH, 4.2))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, measure in zip(panels, AXES, strict=True):
        _points(axes, series, measure, room=0.16)
    panels[0].set_ylabel(error)
    panels[1].set_ylabel("")
    figure.legend(handles=_point_legend(series), loc="outside lower center", ncols=3)
    figure.draw_without_rendering()
    for axes, measure in zip(panels, AXES, strict=True):
        _name_points(axes, series, measure)
    return figure


@styled
def efficiency(panels: list, curves: list, absent: list[str], title: str = "") -> Figure:
    """Figure 4: panels of points, and one of training curves.

    Args:
        panels: (title, measure, series) each.
        curves: of the right panel.
        absent: names of networks whose curves are to be there and are not.
    """
    figure = Figure(figsize=(WIDTH, 4.0))
    places = figure.subplots(1, len(panels) + 1)
    for axes, (panel_title, measure, series) in zip(places, panels, strict=False):
        _points(axes, series, measure, room=0.26)
        axes.set_title(panel_title)
        _legend_below(axes, _point_legend(series))
    _loss_and_error(places[-1], curves, absent)
    figure.suptitle(title)
    figure.draw_without_rendering()
    for axes, (_, measure, series) in zip(places, panels, strict=False):
        _name_points(axes, series, measure)
    return figure


def _points(axes: Axes, series: list, measure: str, room: float) -> None:
    """Errors against a measure of size, with `room` for names on both sides, as a share."""
    label, unit = AXES[measure]
    for one in series:
        marker, colour = KINDS.get(one.kind, OTHER_KIND)
        points = sorted(one.points, key=lambda point: getattr(point, measure))
        axes.errorbar(
            [getattr(point, measure) / unit for point in points],
            [point.error for point in points],
            yerr=[point.spread or 0 for point in points] if one.is_measured else None,
            label=f"{one.kind}, {'measured' if one.is_measured else 'published'}",
            marker=marker,
            color=colour,
            markerfacecolor=colour if one.is_measured else "white",
            linestyle="-" if one.is_measured else "--",
            capsize=3,
        )
    axes.set_xscale("log")
    axes.margins(x=room, y=0.12)
    _plain_ticks(axes.xaxis)
    axes.set_xlabel(label)
    axes.set_ylabel(ERROR)
    if not series:
        _say_not_run(axes)


# Where the name of a point may stand: offset in points of the font, and the side it is held by.
SIDES = (
    ((5, 3), "left", "bottom"),
    ((5, -3), "left", "top"),
    ((-5, 3), "right", "bottom"),
    ((-5, -3), "right", "top"),
    ((0, 8), "center", "bottom"),
    ((0, -8), "center", "top"),
)


def _name_points(axes: Axes, series: list, measure: str) -> None:
    """Write each network's name once, on the side where it covers least; the layout is known."""
    unit, names, obstacles = AXES[measure][1], {}, []
    for one in series:
        ends = [(getattr(point, measure) / unit, point.error) for point in one.points]
        for point, end in zip(one.points, ends, strict=True):
            names.setdefault((one.kind, point.network), end)
        places = axes.transData.transform(sorted(ends))
        obstacles += [(*place, 20) for place in places]
        for (x0, y0), (x1, y1) in itertools.pairwise(places):  # the lines between them
            parts = [part / 30 for part in range(1, 30)]
            obstacles += [(x0 + part * (x1 - x0), y0 + part * (y1 - y0), 1) for part in parts]
    written = []
    for (_, name), end in names.items():
        label = axes.annotate(name, end, (0, 0), textcoords="offset points", fontsize=7)
        label.set_in_layout(False)

        def cost(side: tuple, label=label) -> float:
            label.xyann = side[0]
            label.set(ha=side[1], va=side[2])
            box = label.get_window_extent()
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            covered = sum(weight for x, y, weight in obstacles if box.contains(x, y))
            return 100 * (not inside) + 50 * box.count_overlaps(written) + covered

        label.xyann, ha, va = min(SIDES, key=cost)
        label.set(ha=ha, va=va)
        written.append(label.get_window_extent())


def _point_legend(series: list) -> list[Line2D]:
    """What the kinds look like, and what published and measured do."""
    handles = []
    for kind in sorted({one.kind for one in series}):
        marker, colour = KINDS.get(kind, OTHER_KIND)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=kind))
    grey = {"color": "0.4", "marker": "o"}
    if any(not one.is_measured for one in series):
        handles.append(
            Line2D([], [], **grey, markerfacecolor="white", linestyle="--", label="published")
        )
    if any(one.is_measured for one in series):
        means = any(point.spread is not None for one in series for point in one.points)
        words = "measured (bar: ± std of seeds)" if means else "measured (one seed)"
        handles.append(Line2D([], [], **grey, linestyle="-", label=words))
    else:
        handles.append(Line2D([], [], linestyle="", label=f"measured: {NOT_RUN}"))
    return handles


# ------------------------------------------------------------------------------------------ curves


def _loss_and_error(axes: Axes, curves: list, absent: list[str]) -> None:
    """Test error (left, solid) and training loss (right, dashed) in one panel, as in Figure 4."""
    axes.set_title("training curves")
    handles = []
    if curves:
        right = axes.twinx()
        right.grid(False)
        right.set_yscale("log")
        for curve in curves:
            colour = KINDS.get(curve.kind, OTHER_KIND)[1]
            _line(axes, curve, "val_top1", color=colour)
            _line(right, curve, "train_loss", color=colour, linestyle="--", marker="")
        _plain_ticks(right.yaxis)
        right.set_ylabel("training loss (dashed)")
        _epochs(axes, curves)
        named = {curve.name: KINDS.get(curve.kind, OTHER_KIND)[1] for curve in curves}
        handles = [Line2D([], [], color=colour, label=name) for name, colour in named.items()]
        axes.set_ylabel(f"{ERROR} (solid)")
    else:
        _say_not_run(axes)
    handles += [Line2D([], [], linestyle="", label=f"{name}: {NOT_RUN}") for name in absent]
    _legend_below(axes, handles)


@styled
def training(curves: list, title: str) -> Figure:
    """Loss and error of runs, on training and test images; all seeds of a network in one colour."""
    figure = Figure(figsize=(WIDTH, 5.6))
    places = figure.subplots(2, 2, sharex=True, sharey="row")
    names = sorted({curve.name for curve in curves})
    looks = {
        name: {"color": CYCLE[i % len(CYCLE)], "linestyle": DASHES[i // len(CYCLE) % len(DASHES)]}
        for i, name in enumerate(names)
    }
    splits = {"train": "training", "val": " or ".join(sorted({curve.split for curve in curves}))}
    for axes, (split, where) in zip(places.T, splits.items(), strict=True):
        for curve in curves:
            _line(axes[0], curve, f"{split}_loss", **looks[curve.name])
            _line(axes[1], curve, f"{split}_top1", **looks[curve.name])
        axes[0].set_title(f"{where} images")
        for part in axes:
            part.set_yscale("log")  # what happens after the drops is small
            _epochs(part, curves)
        axes[0].set_xlabel("")
    for row in places:  # which share an axis: all curves are drawn now
        _plain_ticks(row[0].yaxis)
    places[0, 0].set_ylabel("loss (mean cross-entropy)")
    places[1, 0].set_ylabel("top-1 error, %")
    counts = {name: sum(curve.name == name for curve in curves) for name in names}
    handles = [
        Line2D([], [], **looks[name], label=f"{name} ({count} run{'s' * (count > 1)})")
        for name, count in counts.items()
    ]
    if any(curve.drops for curve in curves):
        handles.append(Line2D([], [], **DROP, label="learning rate drops"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure


DROP = {"color": "0.5", "linestyle": (0, (1, 2)), "linewidth": 1}


def _line(axes: Axes, curve, measure: str, **look: object) -> None:
    values = [math.nan if value is None else value for value in curve.values[measure]]
    plain = {"marker": "."} if len(values) <= 20 else {"linewidth": 0.8}
    axes.plot(curve.epochs, values, label=curve.name, **plain | look)


def _epochs(axes: Axes, curves: list) -> None:
    """The axis of epochs, with lines where the learning rate drops."""
    for epoch in sorted({epoch for curve in curves for epoch in curve.drops}):
        axes.axvline(epoch, **DROP)
    axes.set_xlim(0, 1.02 * max(curve.num_epochs for curve in curves))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("epoch")


# --------------------------------------------------------------------------------------- heat maps

MAX_VECTOR_CELLS = 500  # of about 400 bytes in an SVG each; more become one image in it


@styled
def heat_maps(network: str, blocks: list[Block], scale: str, note: str = "") -> Figure:
    """Figure 5: a triangle of cells for each dense block, with the column of what reads it all."""
    cells = [scaled(block, scale) for block in blocks]
    largest = max(max(column) for block in cells for column in block.columns) or 1.0
    per_row = len(cells) if len(cells) <= 3 else math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / per_row)
    figure = Figure(figsize=(WIDTH, 0.8 + 0.82 * rows * WIDTH / max(per_row, 2)))
    places = figure.subplots(rows, per_row, squeeze=False).flatten()
    count = sum(len(column) for block in cells for column in block.columns)
    for number, (axes, block) in enumerate(zip(places, cells, strict=False), start=1):
        mesh = _heat_map(axes, block, largest, rasterized=count > MAX_VECTOR_CELLS)
        axes.set_title(f"dense block {number}", pad=14)
        axes.set_xlabel("target layer")
    for axes in places[len(cells) :]:
        axes.remove()
    for axes in places[: len(cells) : per_row]:
        axes.set_ylabel("source layer (0: block input)")
    bar = figure.colorbar(mesh, ax=places[: len(cells)].tolist(), pad=0.02, aspect=30)
    bar.set_label(f"mean |weight|,\n{SCALES[scale]}")
    bar.outline.set_visible(False)
    layers = ", ".join(str(len(block.columns) - 1) for block in cells)
    figure.suptitle("\n".join(filter(None, (f"{network}: blocks of {layers} layers", note))))
    return figure


def _heat_map(axes: Axes, block: Block, largest: float, rasterized: bool):
    """One block; x is the target, y the source, the exit stands apart in a black frame."""
    num_layers = len(block.columns) - 1
    look = {"cmap": "viridis", "vmin": 0, "vmax": largest, "rasterized": rasterized}
    rows = range(num_layers + 1)
    layers = [
        [column[row] if row < len(column) else math.nan for column in block.columns[:-1]]
        for row in rows
    ]
    edges = [row - 0.5 for row in range(num_layers + 2)]
    mesh = axes.pcolormesh([edge + 1 for edge in edges[:-1]], edges, layers, **look)
    width = max(1.4, num_layers / 12)  # enlarged, as in the paper
    left = num_layers + 0.5 + width / 2
    axes.pcolormesh([left, left + width], edges, [[v] for v in block.columns[-1]], **look)
    axes.add_patch(
        Rectangle((left, -0.5), width, num_layers + 1, fill=False, edgecolor="black", zorder=3)
    )
    middle = left + width / 2
    axes.annotate(
        block.exit, (middle, -0.5), (0, 3), textcoords="offset points", ha="center", fontsize=7.5
    )
    axes.set_xlim(0.5, left + width + 0.1)
    axes.set_ylim(num_layers + 0.6, -0.6)  # the source 0 is the top row, as in the paper
    axes.grid(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks([tick for tick in _whole(num_layers) if tick])
    axes.set_yticks(_whole(num_layers))
    return mesh


def _whole(last: int) -> list[int]:
    """At most nine ticks from 0 to `last`."""
    step = math.ceil(last / 8)
    return list(range(0, last + 1, step))


# ------------------------------------------------------------------------------------------ shared


def _plain_ticks(axis) -> None:
    """Numbers such as 0.5, 1, 2 on a logarithmic axis whose limits are known."""
    low, high = axis.get_view_interval()
    steps = (1, 2, 3, 5) if high < 12 * low else (1, 2, 5) if high < 3000 * low else (1,)
    axis.set_major_locator(AutoLocator() if high < 4 * low else LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend_below(axes: Axes, handles: list) -> None:
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _say_not_run(axes: Axes) -> None:
    axes.text(0.5, 0.5, NOT_RUN, transform=axes.transAxes, ha="center", va="center", color="0.4")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
