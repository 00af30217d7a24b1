"""Compare training speed and memory with other implementations: `python -m tools.benchmark`.

Every memory level and kernel backend of this project, torchvision's DenseNet (plain, memory
efficient, compiled) and timm's train the same network on the same batch in one process. The command
prints a table and writes a CSV file. Data loading is left out, but for the rows of `--trainer`.

On a CPU a network that does not fit the memory ends the process: leave it out with `--only`.
"""

import contextlib
import datetime
import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import opts
from cli.flag_types import NON_NEGATIVE, Flag, Range, Settings, boolean, integer, text
from datasets import registry
from errors import UsageError
from fileio import atomic
from tools import cli
from tools.benchmark import results
from tools.benchmark.cases import PRECISIONS, Case, select_cases

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}  # of an element of a feature map
# fmt: off
FLAGS = {flag.name: flag for flag in (
    Flag("only", text, None, "cases to measure: patterns with commas between, each to be found in "
         "WHO/PRECISION/FORMAT/MODE, e.g. level-2,torchvision/bf16*eager", "all"),
    Flag("turns", integer, None, "turns of each case that count: one step on the CPU, five "
         "on CUDA", "30 on CUDA, else 5", range=Range(low=2)),
    Flag("warmUp", integer, None, "turns before them that do not", "10 on CUDA, else 2",
         range=NON_NEGATIVE),
    Flag("compile", boolean, True, "include torch.compile, which needs minutes and a C++ compiler"),
    Flag("rss", boolean, True, "on the CPU: measure the peak memory of each case in a new process"),
    Flag("trainer", boolean, False, "beside each channels-last, eager case of this project: "
         "main.py's trainer with the same network, which also loads and augments", const="true"),
    Flag("csv", text, None, "file to write, or none",
         "in results/, named after network, device, torch and month"),
)}
# fmt: on
USAGE = """usage: python -m tools.benchmark [--flag value ...]

Compares the training steps of this project's network with other implementations of it. Of main.py's
flags those of the network, the batch and the optimizer count; precision, tf32, optMemory, kernels
and cudaGraph select the cases that have that value. Images are synthetic: add --imageSize 224
--nClasses 1000 for ImageNet's shape."""


def parse(argv: list[str]) -> tuple[SimpleNamespace, Settings]:
    """Read the tool's flags and the network's settings.

    Raises:
        UsageError: a flag is wrong, or the network is not one to compare.
    """
    command = cli.read(argv, FLAGS, main_flags=True)
    opt = opts.parse(["--dataset=synthetic", *command.main_flags])
    if opt.netType != "densenet":
        what = f"netType: {opt.netType} is not measured, its peers are other DenseNets"
        raise UsageError(what, "use densenet")
    if opt.precision not in PRECISIONS:
        what = f"precision: {opt.precision} is not measured"
        raise UsageError(what, f"use {' or '.join(PRECISIONS)}")
    num_classes = opt.nClasses or registry.DATASETS["synthetic"].num_classes
    return command.options, opt.replace(nClasses=num_classes)


def measure(
    cases: list[Case], options: SimpleNamespace, opt: Settings, device
) -> Iterator[list[dict]]:
    """Measure the cases; yield the rows so far after each precision."""
    import engine.device
    from tools.benchmark.measure import copy_bandwidth, measure_group

    bandwidth = copy_bandwidth(device)
    report(f"a large copy moves {bandwidth / 1e9:.1f} GB/s")
    constants = environment(device) | {
        "network": results.network_name(opt),
        "depth": opt.depth,
        "batch_size": opt.batchSize,
        "image_size": opt.imageSize,
        "copy_gb_per_s": bandwidth / 1e9,
    }
    rows: list[dict] = []
    for precision, group in itertools.groupby(cases, key=lambda case: case.precision):
        engine.device.configure(opt.cudnn, tf32=precision == "tf32")
        bound = bandwidth / (results.block_traffic(opt) * BYTES[precision])
        for row in measure_group(list(group), opt, options, device, report):
            row |= constants | {"bound_images_per_s": bound}
            if "images_per_s" in row:
                row["fraction_of_bound"] = row["images_per_s"] / bound
            rows.append(row)
        results.add_ratios(rows)
        yield rows


def report(line: str) -> None:
    """Print a line about the progress to standard error."""
    print(line, file=sys.stderr, flush=True)


def environment(device) -> dict[str, object]:
    """Return the columns that describe the machine and the software."""
    import torch

    import engine.device

    name, driver, triton = engine.device.describe(device), "none", "none"
    if device.type == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = _output_of(*query).partition("\n")[0] or "none"
    else:
        info = Path("/proc/cpuinfo")
        models = re.findall(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
        name = f"{models[0] if models else 'CPU'}, {os.cpu_count()} cores"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        triton = importlib.metadata.version("triton")
    return {
        "device": name,
        "driver": driver,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": _output_of("git", "describe", "--always", "--dirty") or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def _output_of(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cli.ROOT)
        return done.stdout.strip()
    return ""


def output_path(csv: str | None, name: str) -> Path | None:
    """Return the CSV file to write, None for none.

    Raises:
        UsageError: it exists, since a measurement is not overwritten, or cannot be written.
    """
    if csv == "none":
        return None
    path = Path(csv) if csv else cli.ROOT / "results" / name
    if path.exists():
        raise UsageError(f"csv: {path} exists", "move it away, or name another with --csv FILE")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"csv: cannot write in {path.parent}", "name another with --csv FILE")
    return path


def run(argv: list[str]) -> None:
    """Measure the selected cases, write a CSV file and print a table."""
    options, opt = parse(argv)

    import torch

    import engine.device
    import kernels.backend
    from engine import cuda_graph

    # Find every usage error before measuring.
    device = engine.device.select(opt.nGPU)
    on_cuda = device.type == "cuda"
    cuda_graph.make_capturer(opt.cudaGraph, device, resident=True)  # a stream to capture on
    if opt.tf32 and not on_cuda:
        raise UsageError("tf32 has no effect on the CPU", "leave it out")
    kernels.backend.select(opt.kernels, device, "single")
    cases = select_cases(opt, options.only, options.compile, on_cuda)
    name = engine.device.describe(device) if on_cuda else f"cpu-{torch.get_num_threads()}core"
    network, today = results.network_name(opt), datetime.date.today()
    name = results.file_name(network, opt.batchSize, name, torch.__version__, today)
    path = output_path(options.csv, name)

    # With empty compiler caches, so that the first step takes as long as on a new machine.
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        variables = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        with mock.patch.dict(os.environ, {name: f"{caches}/{name}" for name in variables}):
            for rows in measure(cases, options, opt, device):
                if path:
                    atomic.atomic_write(path, results.as_csv(rows))
    print(results.as_table(rows))
    if path:
        print(f"\nwritten: {path}")


def main(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    return cli.run(argv, USAGE, FLAGS, run, main_flags=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
