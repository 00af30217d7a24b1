"""Give figures one look, write them as files, and draw which class is taken for which."""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

# A notebook names its own backend, without whose package matplotlib cannot be imported. Other
# modules have matplotlib from here, after this.
os.environ["MPLBACKEND"] = "agg"
import matplotlib.style
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from errors import printable
from experiment.confusion import most_frequent, pairs_of

# Pillow's own font has no letters beyond ASCII; one that no font has shows as a box.
FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
WIDTH = 8.0  # inches; in a picture 800 pixels wide, a font size of 1 is 1.4 pixels
STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "figure.titlesize": 9.5,
    "figure.dpi": 140,
    "figure.constrained_layout.use": True,
    "legend.fontsize": 7.5,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.2,
    "text.parse_math": False,  # a name may hold a $
    "svg.hashsalt": "densenet",  # the same input gives the same file
}
# Omit the date and matplotlib's version, so that equal input gives equal files.
METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
RIGHT, WRONG = "#0072B2", "#D55E00"  # of Okabe and Ito
COLOURS = LinearSegmentedColormap.from_list("right or wrong", [WRONG, "white", RIGHT])
NAMED_CLASSES, LISTED = 25, 20  # with more, names and numbers would not be legible
MAX_CELLS = 250  # in a row of a matrix; a cell is then the darkest of a block
styled = matplotlib.style.context(["default", STYLE])  # whatever the user's settings are


@styled
def render(
    figure: Figure, suffix: str, name: str = "", warn: Callable[[str], None] = lambda _: None
) -> bytes:
    """Return the file of a figure; note what matplotlib warns of: letters that no font has."""
    with warnings.catch_warnings(record=True) as caught:
        figure.savefig(file := io.BytesIO(), format=suffix, metadata=METADATA.get(suffix))
    first, *more = dict.fromkeys(str(warning.message) for warning in caught) or [""]
    if first:
        warn(f"{name}: {first}" + f" and {len(more)} more such notes" * bool(more))
    return file.getvalue()


def pixels(figure: Figure) -> np.ndarray:
    """Return the picture of a figure, (h, w, 4) uint8."""
    width, height = figure.canvas.get_width_height()
    return np.frombuffer(render(figure, "rgba"), np.uint8).reshape(height, width, 4)


def shorten(name: str, length: int = 22) -> str:
    """Return a name in one line of at most so many letters."""
    name = printable(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


@styled
def confusion(counts: np.ndarray, classes: list[str]) -> Figure:
    """Draw counts as experiment/confusion.py has them: few classes with names and numbers.

    Of many classes the whole matrix is drawn, beside a list of the most frequent confusions.
    """
    error = 100 * (counts.sum() - counts.trace()) / max(counts.sum(), 1)
    share = np.sqrt(counts / counts.sum(axis=1, keepdims=True).clip(1))
    signed, is_named = share * (2 * np.eye(len(classes)) - 1), len(classes) <= NAMED_CLASSES
    starts = np.arange(0, len(classes), -(-len(classes) // MAX_CELLS))
    high, low = (
        extreme.reduceat(extreme.reduceat(signed, starts, 0), starts, 1)
        for extreme in (np.maximum, np.minimum)
    )
    figure = Figure(figsize=(WIDTH, (0.85 if is_named else 0.6) * WIDTH))
    matrix, *lists = np.ravel(figure.subplots(1, 1 if is_named else 2))
    limit = len(classes) - 0.5
    look = {"extent": (-0.5, limit, limit, -0.5), "interpolation": "nearest", "cmap": COLOURS}
    matrix.imshow(np.where(high > 0, high, low), vmin=-1, vmax=1, **look)
    matrix.set(xlabel="taken for class", ylabel="images of class")
    matrix.grid(False)
    figure.suptitle(
        f"{counts.sum()} images of {len(classes)} classes, error {error:.2f} %: right in blue, "
        "wrong in orange\nthe darker, the larger the share of the class (square root)"
    )
    if is_named:
        names = [shorten(name) for name in classes]
        matrix.set_xticks(range(len(names)), names, rotation=90)
        matrix.set_yticks(range(len(names)), names)
        size = min(8.5, 500 / len(names) / len(str(counts.max())))
        for place in zip(*counts.nonzero(), strict=True):
            colour = "white" if share[place] > 0.7 else "black"
            centred = {"ha": "center", "va": "center", "size": size, "color": colour}
            matrix.text(*place[::-1], counts[place], **centred)
    for axes in lists:  # a bar for each confusion, with its classes on it
        listed = most_frequent(pairs_of(counts), classes, LISTED)
        axes.barh(range(len(listed)), [count for count, *_ in listed], color=WRONG, alpha=0.4)
        for place, (_, *names) in enumerate(listed):
            line = " taken for ".join(map(shorten, names))
            axes.text(0, place, f" {line}", va="center", size=7.5)
        axes.set(title="the most frequent confusions", xlabel="images", yticks=())
        axes.invert_yaxis()
    return figure
