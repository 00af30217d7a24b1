"""Compute the ratios of `python -m tools.benchmark`, and write its rows as a table and as CSV.

A row is a dict of the columns that were measured; a missing one is written as "not run".
"""

import csv
import datetime
import io
import itertools
import math
import re
from collections.abc import Sequence

from cli.flag_types import Settings
from tools.benchmark.cases import PEERS

NOT_RUN = "not run"

# Column: the case by whose images/s a row's are divided.
REFERENCES = {
    "ratio_level_0": ("level-0", "eager"),
    "ratio_torchvision": ("torchvision", "eager"),
    "ratio_torchvision_memory_efficient": ("torchvision-memory-efficient", "eager"),
    "ratio_timm": ("timm", "eager"),
    "ratio_torchvision_compiled": ("torchvision", "compiled"),
    "ratio_torchvision_compiled_reduce_overhead": ("torchvision", "compiled-reduce-overhead"),
}
FASTEST_EAGER_PEER = "ratio_fastest_eager_peer"

COLUMNS = (
    "network", "depth", "who", "precision", "memory_format", "mode",
    "images_per_s", "images_per_s_q1", "images_per_s_q3", "turns",
    *REFERENCES, FASTEST_EAGER_PEER,
    "held_mb_per_image", "peak_mb", "reserved_mb", "peak_rss_mb", "first_step_s", "first_loss",
    "copy_gb_per_s", "bound_images_per_s", "fraction_of_bound", "note",
    "batch_size", "image_size", "device", "driver", "threads", "torch", "triton", "commit", "date",
)  # fmt: skip
# The columns that are printed; the first three are text. The file has them all.
PRINTED = (
    "who", "memory_format", "mode", "images_per_s", "images_per_s_q1", "images_per_s_q3",
    "ratio_level_0", FASTEST_EAGER_PEER, "held_mb_per_image", "peak_mb", "peak_rss_mb",
    "first_step_s", "fraction_of_bound",
)  # fmt: skip
LEGEND = """
ratio              to images/s of level 0, or of the fastest of torchvision (plain, memory
                   efficient) and timm, in the faster memory format and the same precision
held_mb_per_image  held for backward, without parameters and input, in eager modes
peak_mb            of the GPU's allocator; peak_rss_mb: of a process that trains this case alone
fraction_of_bound  of the images/s of the dense blocks alone, if each feature map moved once at copy
                   bandwidth"""


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
    """Divide each row's images/s by those of level 0 and the peers in the same precision."""
    best: dict[tuple, float] = {}
    for row in rows:
        key = (row["precision"], row["who"], row["mode"])
        best[key] = max(row.get("images_per_s", 0), best.get(key, 0))
    for row in rows:
        if "images_per_s" not in row:
            continue
        precision = row["precision"]
        speeds = {column: best.get((precision, *case), 0) for column, case in REFERENCES.items()}
        speeds[FASTEST_EAGER_PEER] = max(best.get((precision, peer, "eager"), 0) for peer in PEERS)
        row |= {column: row["images_per_s"] / speed for column, speed in speeds.items() if speed}


def network_name(opt: Settings) -> str:
    """Name the network as in `bc-L100-k12`, with the image size unless it is CIFAR's."""
    form = ("b" if opt.bottleneck else "") + ("c" if opt.reduction < 1 else "") or "basic"
    size = "" if opt.imageSize == 32 else f"-{opt.imageSize}px"
    return f"{form}-L{opt.depth}-k{opt.growthRate}{size}"


def file_name(network: str, batch_size: int, device: str, torch: str, day: datetime.date) -> str:
    """Return bench_NETWORK-bBATCH_DEVICE_torchVERSION_YYYYMM.csv, safe on every file system."""
    version = ".".join(torch.split(".")[:2])
    safe = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"bench_{network}-b{batch_size}_{safe}_torch{version}_{day:%Y%m}.csv"


def as_csv(rows: list[dict]) -> bytes:
    """Write the rows as CSV; every cell has a value.

    Raises:
        ValueError: a row has a column that `COLUMNS` does not list.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval=NOT_RUN, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({"note": "none"} | {name: _text(cell, 5) for name, cell in row.items()})
    return buffer.getvalue().encode()


def _text(cell: object, digits: int) -> str:
    """Format a float with that many significant digits, anything else as it is."""
    return f"{float(f'{cell:.{digits}g}'):.12g}" if isinstance(cell, float) else str(cell)


def as_table(rows: list[dict]) -> str:
    """Write the rows as text, one part for each precision, and explain the columns."""

    def cells(row: dict) -> list[str]:
        return [_text(row.get(column, NOT_RUN), 3) for column in PRINTED]

    def line(texts: Sequence[str]) -> str:
        padded = [text.ljust(width) for text, width in zip(texts[:3], widths, strict=False)]
        padded += [text.rjust(width) for text, width in zip(texts[3:], widths[3:], strict=True)]
        return "  ".join(padded)

    columns = zip(PRINTED, *map(cells, rows), strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for precision, part in itertools.groupby(rows, key=lambda row: row["precision"]):
        part = list(part)
        lines += ["", f"{part[0]['network']}, batch {part[0]['batch_size']}, {precision}"]
        lines.append(line(PRINTED))
        lines += [line(cells(row)) + (f"  {row['note']}" if "note" in row else "") for row in part]
    return "\n".join([*lines, LEGEND])
