"""The results of `python -m tools.benchmark`: columns, ratios, fits, table, CSV and its name.

A row is a dict of the columns that were measured; what is missing prints as "not run".
"""

import csv
import datetime
import io
import math
import re
import statistics

from cli.flag_types import Settings

NOT_RUN = "not run"

# column: whose images/s (the faster memory format, same precision) it is divided by
REFERENCES = {
    "ratio_level_0": ("level-0", "eager"),
    "ratio_torchvision": ("torchvision", "eager"),
    "ratio_torchvision_memory_efficient": ("torchvision-memory-efficient", "eager"),
    "ratio_timm": ("timm", "eager"),
    "ratio_torchvision_compiled": ("torchvision", "compiled"),
    "ratio_torchvision_compiled_reduce_overhead": ("torchvision", "compiled-reduce-overhead"),
}
FASTEST_EAGER_PEER = "ratio_fastest_eager_peer"
EAGER_PEERS = [
    pair for column, pair in REFERENCES.items() if column != "ratio_level_0" and pair[1] == "eager"
]
COLUMNS = (
    "network", "depth", "who", "precision", "memory_format", "mode",
    "images_per_s", "images_per_s_q1", "images_per_s_q3", "turns",
    *REFERENCES, FASTEST_EAGER_PEER,
    "held_mb_per_image", "peak_mb", "reserved_mb", "peak_rss_mb", "first_step_s", "first_loss",
    "copy_gb_per_s", "bound_images_per_s", "fraction_of_bound",
    "time_exponent", "held_exponent", "note",
    "batch_size", "image_size", "device", "driver", "threads", "torch", "triton", "commit", "date",
)  # fmt: skip


# ------------------------------------------------------------------------------------- arithmetic


def block_traffic(opt: Settings) -> int:
    """Elements per image that forward and backward of the dense blocks must move.

    4 sum C_l HW + 6 sum 4k HW + 6 sum k HW over the layers, C_l channels read by layer l.
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


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles of images/s, as columns."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"images_per_s": median, "images_per_s_q1": q1, "images_per_s_q3": q3}


def add_ratios(rows: list[dict]) -> None:
    """Divide the speed of each row by those of level 0 and the peers, in the same precision."""
    best: dict[tuple, float] = {}
    for row in rows:
        key = (row["depth"], row["precision"], row["who"], row["mode"])
        best[key] = max(row.get("images_per_s", 0), best.get(key, 0))
    for row in rows:
        if "images_per_s" not in row:
            continue
        place = (row["depth"], row["precision"])
        speeds = {column: best.get(place + pair, 0) for column, pair in REFERENCES.items()}
        speeds[FASTEST_EAGER_PEER] = max(best.get(place + pair, 0) for pair in EAGER_PEERS)
        row |= {column: row["images_per_s"] / speed for column, speed in speeds.items() if speed}


def exponent(points: list[tuple[float, float]]) -> float:
    """p of the power law y = c x^p that fits best, by least squares of the logarithms."""
    logarithms = [(math.log(x), math.log(y)) for x, y in points]
    return statistics.linear_regression(*zip(*logarithms, strict=True)).slope


def add_growth(rows: list[dict]) -> None:
    """Fit the time of an image and the bytes held for it to the depth, for each case."""
    for own in _by_contestant(rows).values():
        times = [(row["depth"], 1 / row["images_per_s"]) for row in own if "images_per_s" in row]
        held = [(row["depth"], row["held_mb_per_image"]) for row in own
                if "held_mb_per_image" in row]  # fmt: skip
        for column, points in (("time_exponent", times), ("held_exponent", held)):
            if len({depth for depth, _ in points}) > 1:
                fitted = exponent(points)
                for row in own:
                    row[column] = fitted


def _by_contestant(rows: list[dict]) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        name = tuple(row[part] for part in ("who", "precision", "memory_format", "mode"))
        groups.setdefault(name, []).append(row)
    return groups


# -------------------------------------------------------------------------------------------- CSV


def network_name(opt: Settings, depth: str | None = None) -> str:
    """The network as in `bc-L100-k12`, with the size of its images unless that is CIFAR's.

    Args:
        depth: to be written for L and the depth.
    """
    form = ("b" if opt.bottleneck else "") + ("c" if opt.reduction < 1 else "") or "basic"
    size = "" if opt.imageSize == 32 else f"-{opt.imageSize}px"
    return f"{form}-{depth or f'L{opt.depth}'}-k{opt.growthRate}{size}"


def file_name(network: str, batch_size: int, device: str, torch: str, day: datetime.date) -> str:
    """bench_WHAT_DEVICE_torchVERSION_YYYYMM.csv, safe on every file system."""
    version = ".".join(torch.split(".")[:2])
    safe = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"bench_{network}-b{batch_size}_{safe}_torch{version}_{day:%Y%m}.csv"


def as_csv(rows: list[dict]) -> bytes:
    """The rows with a header; every cell has a value, if only "not run"."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval=NOT_RUN, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {name: shown(cell, digits=5) for name, cell in row.items()}
        writer.writerow({"note": "none"} | cells)
    return buffer.getvalue().encode()


def shown(cell: object, digits: int) -> str:
    """A float as text with that many significant digits, anything else as it is."""
    return f"{float(f'{cell:.{digits}g}'):.12g}" if isinstance(cell, float) else str(cell)


# ------------------------------------------------------------------------------------------ table

TABLE = {
    "case": "who",
    "format": "memory_format",
    "mode": "mode",
    "images/s": "images_per_s",
    "q1": "images_per_s_q1",
    "q3": "images_per_s_q3",
    "/level 0": "ratio_level_0",
    "/tv": "ratio_torchvision",
    "/tv-me": "ratio_torchvision_memory_efficient",
    "/timm": "ratio_timm",
    "/eager": FASTEST_EAGER_PEER,
    "/comp": "ratio_torchvision_compiled",
    "held MB/img": "held_mb_per_image",
    "peak MB": "peak_mb",
    "RSS MB": "peak_rss_mb",
    "first s": "first_step_s",
    "of bound": "fraction_of_bound",
}
WORDS = 3  # columns of words, before those of figures
LEGEND = """
/x      images/s divided by those of x in its faster memory format, same precision: level 0;
        torchvision eager, memory efficient; timm; the fastest of these three; torchvision compiled
held    for backward, without parameters and input; peak, RSS: of the GPU, of a process of its own
bound   what the device's copy bandwidth would allow the dense blocks alone, each map moved once"""


def as_table(rows: list[dict]) -> str:
    """The rows for people, a part for each network and precision, and what the columns mean."""
    lines, above = [], None
    cells = [[shown(row.get(column, NOT_RUN), 3) for column in TABLE.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(list(TABLE), *cells, strict=True)]
    for row, texts in zip(rows, cells, strict=True):
        part = f"{row['network']}, batch {row['batch_size']}, {row['precision']}"
        if part != above:
            lines += ["", part, _line(list(TABLE), widths)]
            above = part
        lines.append(_line(texts, widths) + (f"  {row['note']}" if "note" in row else ""))
    return "\n".join([*lines, LEGEND])


def _line(cells: list[str], widths: list[int]) -> str:
    padded = [cell.ljust(width) if i < WORDS else cell.rjust(width)
              for i, (cell, width) in enumerate(zip(cells, widths, strict=True))]  # fmt: skip
    return "  ".join(padded)


def growth_table(rows: list[dict]) -> str:
    """What doubling the depth multiplies, a line for each case of `--depths`."""
    lines = ["", "doubling the depth multiplies:"]
    for name, own in _by_contestant(rows).items():
        parts = [
            f"{what} by {2 ** own[0][column]:.2f} (depth^{own[0][column]:.2f})"
            for what, column in (("bytes held", "held_exponent"), ("time", "time_exponent"))
            if column in own[0]
        ]
        lines.append(f"{'/'.join(name):<55} {', '.join(parts) or NOT_RUN}")
    return "\n".join(lines)
