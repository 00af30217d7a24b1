"""Time a captured training step: `python -m tools.gpu_report.replays FILE [main.py's flags]`.

Level 2 with Triton takes its steps as one CUDA graph, first timed, then under `torch.profiler`,
which sees each kernel of a replay.
"""

import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.autograd import DeviceType

import engine.device
from fileio import atomic
from tools import cli
from tools.benchmark import measure, results
from tools.benchmark.cases import Case
from tools.gpu_report import steps

CASE = Case("level-2-triton", "bf16", "channels-last", "graph")
REPLAYS = 10  # under the profiler
TURNS, BURST = 9, 20  # without it: turns, and replays of each
STEP, OTHERS = "step", "other launches"  # as the model names them
COLUMNS = ("what", "launches", "us", "images_per_s", "bound_images_per_s")


def write(path: Path, flags: list[str]) -> None:
    """Write a row for the step, and one for each of this project's kernels, and for all others."""
    opt = steps.settings(" ".join(flags))
    device = engine.device.select(1)
    engine.device.configure(opt.cudnn, opt.tf32)
    bandwidth = measure.copy_bandwidth(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))  # CUDA cannot capture the default stream
    runner = measure.Runner(CASE, opt, device).build()
    runner.capture()
    measure.seconds(runner.run, device, BURST)  # warms up
    step_s = statistics.median(measure.seconds(runner.run, device, BURST) for _ in range(TURNS))
    bound = bandwidth / (results.block_traffic(opt) * measure.BYTES[CASE.precision])
    speeds = {"images_per_s": opt.batchSize / step_s, "bound_images_per_s": bound}
    rows = [{"what": STEP, "us": step_s * 1e6} | speeds]
    atomic.atomic_write(path, results.as_csv(rows, COLUMNS))  # in case that the profiler fails

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        measure.seconds(runner.run, device, REPLAYS)
    rows += kernel_rows(profile.key_averages(), kernel_names())
    atomic.atomic_write(path, results.as_csv(rows, COLUMNS))
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=40))


def kernel_names() -> set[str]:
    """Return the names of this project's Triton functions, the kernels among them."""
    files = (cli.ROOT / "kernels").glob("triton_*.py")
    return {name for file in files for name in re.findall(r"(?m)^def (\w+)", file.read_text())}


def kernel_rows(events: Iterable, names: set[str]) -> list[dict[str, object]]:
    """Sum up a profile of `REPLAYS` replays: launches and microseconds of a step, longest first.

    Args:
        events: as `key_averages` returns; those of the CPU do not count.
        names: kernels that have a row of their own.
    """
    sums: dict[str, list[float]] = {}
    for event in events:
        if event.device_type == DeviceType.CUDA:
            total = sums.setdefault(event.key if event.key in names else OTHERS, [0, 0])
            total[0] += event.count / REPLAYS
            total[1] += event.self_device_time_total / REPLAYS
    rows = [{"what": name, "launches": count, "us": us} for name, (count, us) in sums.items()]
    return sorted(rows, key=lambda row: (row["what"] == OTHERS, -row["us"]))


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2:])
