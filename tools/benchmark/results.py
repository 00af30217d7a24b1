"""Compute the ratios of `python -m tools.benchmark`, and write its rows as a table and as CSV.

A row is a dict of the columns that were measured; a missing one is written as "not run".
"""

import csv
import io
import math

from cli.flag_types import Settings
from tools.benchmark.cases import PEERS

NOT_RUN = "not run"

# Column: the cases by the best of whose images/s a row's are divided.
REFERENCES = {
    "ratio_level_0": [("level-0", "eager")],
    "ratio_torchvision": [("torchvision", "eager")],
    "ratio_torchvision_memory_efficient": [("torchvision-memory-efficient", "eager")],
    "ratio_timm": [("timm", "eager")],
    "ratio_torchvision_compiled": [("torchvision", "compiled")],
    "ratio_torchvision_compiled_reduce_overhead": [("torchvision", "compiled-reduce-overhead")],
    "ratio_fastest_eager_peer": [(peer, "eager") for peer in PEERS],
}
COLUMNS = (
    "network", "depth", "who", "precision", "memory_format", "mode",
    "images_per_s", "images_per_s_q1", "images_per_s_q3", "turns", *REFERENCES,
    "held_mb_per_image", "peak_mb", "reserved_mb", "first_step_s", "first_loss",
    "copy_gb_per_s", "bound_images_per_s", "fraction_of_bound", "note",
    "batch_size", "image_size", "device", "driver", "threads", "torch", "triton", "commit", "date",
)  # fmt: skip
# The columns that are printed. The file has them all.
PRINTED = (
    "who", "precision", "memory_format", "mode",
    "images_per_s", "images_per_s_q1", "images_per_s_q3", "ratio_level_0",
    "ratio_fastest_eager_peer", "held_mb_per_image", "peak_mb", "first_step_s", "fraction_of_bound",
    "note",
)  # fmt: skip
LEGEND = """
ratio              to images/s of level 0, or of the fastest of torchvision (plain, memory
                   efficient) and timm, in the faster memory format and the same precision
held_mb_per_image  held for backward, without parameters and input, in eager modes
peak_mb            of the GPU's allocator
fraction_of_bound  of the images/s of the dense blocks alone, if each feature map moved once at copy
                   bandwidth
level-N-triton     in mode eager measures Python, which launches hundreds of kernels; only mode
                   graph measures the kernels"""


def block_traffic(opt: Settings) -> int:
    """Count the elements per image that forward and backward of the dense blocks must move.

    Layer l reads C_l channels: 4 sum C_l HW + 6 sum 4k HW + 6 sum k HW over the layers.
    """
    size = opt.imageSize // 4 if opt.imagenetShape else opt.imageSize
    channels, k, total = opt.initChannels, opt.growthRate, 0
    for num_layers in opt.stages:
        for _ in range(num_layers):
            width = 4 * k if opt.bottleneck else 0
            total += (4 * channels + 6 * width + 6 * k) * size**2
            channels += k
        channels, size = math.floor(opt.reduction * channels), size // 2
    return total


def add_ratios(rows: list[dict]) -> None:
    """Divide the images/s of each row by those of level 0 and the peers, all in one precision."""
    measured = [row for row in rows if "images_per_s" in row]
    speeds = {
        column: [row["images_per_s"] for row in measured if (row["who"], row["mode"]) in references]
        for column, references in REFERENCES.items()
    }
    for row in measured:
        row |= {name: row["images_per_s"] / max(found) for name, found in speeds.items() if found}


def as_csv(rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> bytes:
    """Write the rows as CSV, or raise ValueError for a column that `columns` does not list."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval=NOT_RUN, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _text(cell, 5) for name, cell in row.items()})
    return buffer.getvalue().encode()


def _text(cell: object, digits: int) -> str:
    """Format a float with that many significant digits, anything else as it is."""
    return f"{float(f'{cell:.{digits}g}'):.12g}" if isinstance(cell, float) else str(cell)


def as_table(
    rows: list[dict], title: str, columns: tuple[str, ...] = PRINTED, legend: str = LEGEND
) -> str:
    """Write some columns of the rows as text, numbers to the right, and explain them.

    A column that was measured in no row is left out.
    """
    lines = ["", title, *[""] * (len(rows) + 1)]
    for column in columns:
        if all(column not in row for row in rows):
            continue
        cells = [column, *(_text(row.get(column, NOT_RUN), 3) for row in rows)]
        is_number = any(isinstance(row.get(column), float) for row in rows)
        align, width = str.rjust if is_number else str.ljust, max(map(len, cells))
        for number, cell in enumerate(cells, 2):
            lines[number] += f"{align(cell, width)}  "
    return "\n".join([*map(str.rstrip, lines), legend])
