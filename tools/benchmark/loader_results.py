"""Sum up what `python -m tools.benchmark --loader` measures, and read it back: rows, ratios, cores.

A row is a way of preparing images on one thread, for training or evaluation, in one of two parts:
`workers`, from file to the bytes that a loader process hands over for a GPU, and `whole`, to the
normalised float batch, on the CPU. Loads no torch.
"""

import contextlib
import csv
import math
import statistics
from pathlib import Path

from tools.benchmark.turns import quartile_columns

OURS, AGAINST = "this", "against"
PARTS = ("workers", "whole")
# Column: whose images per processor second a row's are divided by.
REFERENCES = {
    "ratio_against": AGAINST,
    "ratio_torchvision_pil": "torchvision-pil",
    "ratio_torchvision_tensor": "torchvision-tensor",
    "ratio_timm": "timm",
    "ratio_dali": "dali",
}
SPEEDS = ("images_per_cpu_s", "images_per_s")  # per second of the processor, and of the clock
# Column: the part of a turn whose share it is, without the part before it.
SHARES = {
    "decode_share": ("decode", None),
    "resize_share": ("prepare", "decode"),
    "device_share": ("whole", "prepare"),
}
COLUMNS = (
    "who", "version", "split", "resize", "part",
    *(f"{speed}{end}" for speed in SPEEDS for end in ("", "_q1", "_q3")), "turns",
    *REFERENCES, *SHARES, "note", "images", "source",
    "batch_size", "image_size", "device", "driver", "threads", "torch", "triton", "commit", "date",
)  # fmt: skip
PRINTED = (
    "who", "split", "resize", "part", "images_per_cpu_s", "images_per_cpu_s_q1",
    "images_per_cpu_s_q3", "images_per_s", *REFERENCES, *SHARES, "note",
)  # fmt: skip
LEGEND = """
part               workers: file to what a loader process hands over for a GPU, without the handing
                   over (with torch7 crops, which the GPU resizes; colours included where a library
                   changes them there); whole: to the normalised float batch, on the CPU
images_per_cpu_s   images per second of processor time, which other load disturbs by a tenth or so
ratio              to images_per_cpu_s of another, of the same split and part
share              of the processor time of the whole: decoding; crop, resize and what else
                   workers do; the rest, which a GPU does where there is one"""


def as_rows(fixed: dict, turns: list[dict[str, tuple[float, float]]], num_images: int) -> list:
    """Return the rows of a way of preparing images, one for each part.

    Args:
        fixed: columns that say which.
        turns: (processor, wall) seconds of each turn, by part.
    """
    if "note" in fixed:
        return [fixed]
    rows = []
    for part in PARTS:
        row = fixed | {"part": part, "turns": len(turns)}
        for clock, column in enumerate(SPEEDS):
            row |= quartile_columns(column, [num_images / turn[part][clock] for turn in turns])
        rows.append(row)
    if all("decode" in turn for turn in turns):
        bounds = [
            [0, *(turn[part][0] for part in ("decode", "prepare", "whole"))] for turn in turns
        ]
        for number, column in enumerate(SHARES):
            found = [(sums[number + 1] - sums[number]) / sums[-1] for sums in bounds]
            rows[-1][column] = statistics.median(found)
    return rows


def add_ratios(rows: list[dict]) -> None:
    """Divide the images per processor second of each row by those of the others.

    Of another with several kinds of resize it is the same kind, or else the fastest. What leaves
    the resize to a GPU is divided by its like only.
    """
    measured = [row for row in rows if SPEEDS[0] in row]
    for row in measured:
        alike = [each for each in measured if all(each[c] == row[c] for c in ("split", "part"))]
        for column, who in REFERENCES.items():
            found = [each for each in alike if each["who"] == who]
            same = [each for each in found if each["resize"] == row["resize"]]
            # Workers leave Torch7's resize to the GPU: others do more.
            alike_in_work = same or (found if not _leaves_resize(row) else [])
            if alike_in_work:
                row[column] = row[SPEEDS[0]] / max(each[SPEEDS[0]] for each in alike_in_work)


def _leaves_resize(row: dict) -> bool:
    return row["resize"] == "torch7" and row["part"] == "workers"


def num_cores(rate: float, images_per_cpu_s: float) -> int:
    """Count the cores whose loader processes together prepare `rate` images a second."""
    return math.ceil(rate / images_per_cpu_s)


def core_lines(rows: list[dict], rates: list[int]) -> list[str]:
    """Say how many cores this project's workers need for each rate of training images."""
    found = [row for row in rows if _is_workers_for_training(row) and SPEEDS[0] in row]
    lines = []
    for rate in rates if found else ():
        each = [f"{num_cores(rate, row[SPEEDS[0]])} with {row['resize']}" for row in found]
        lines.append(f"cores whose workers prepare {rate} training images/s: {', '.join(each)}")
    return lines


def _is_workers_for_training(row: dict) -> bool:
    return (row.get("who"), row.get("split"), row.get("part")) == (OURS, "training", "workers")


def find_newest(directory: Path, resize: str, image_size: int) -> tuple[Path, dict] | None:
    """Find the newest file of `--loader` with a resize and size; return it and that row, as text.

    Newest by the date in the row: Git does not keep the times of files.
    """
    wanted = {"resize": resize, "image_size": str(image_size)}
    found = []
    for path in sorted(directory.glob("loader_*.csv")):
        with contextlib.suppress(OSError, ValueError, KeyError):  # not a file of the benchmark
            for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
                if _is_workers_for_training(row) and wanted.items() <= row.items():
                    float(row[SPEEDS[0]])  # else it was not measured
                    found.append((row["date"], path, row))
    return max(found, key=lambda each: each[:2])[1:] if found else None
