"""Compare the training steps of this project's network with other implementations of it.

usage: python -m tools.benchmark [--flag value ...]

Every memory level and kernel backend, torchvision's DenseNet (plain, memory efficient, compiled)
and timm's train the same network on the same batch in one process. Of main.py's flags those of the
network, the batch and the optimizer count; precision, tf32, optMemory, kernels and cudaGraph select
cases, as --only does. Images are synthetic: add --imageSize 224 --nClasses 1000 for ImageNet's
shape. On a CPU a network that does not fit the memory ends the process: leave it out with --only.
"""

import contextlib
import datetime
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import opts
from cli.flag_types import (
    NON_NEGATIVE,
    Flag,
    Range,
    Settings,
    boolean,
    broken,
    integer,
    pathname,
    text,
)
from cli.network_settings import network_name
from datasets import registry
from errors import UsageError, printable
from fileio import atomic
from tools import cli
from tools.benchmark import results
from tools.benchmark.cases import PRECISIONS, select_cases

FLAGS = (
    Flag("only", text, None, "cases to measure: patterns with commas between, each to be found in "
         "IMPLEMENTATION/PRECISION/FORMAT/MODE, e.g. level-2,torchvision/bf16*eager", "all"),
    Flag("turns", integer, None, "turns of each case that count: one step on the CPU, five "
         "on CUDA", "30 on CUDA, else 5", range=Range(low=2)),
    Flag("warmUp", integer, None, "turns before them that do not", "10 on CUDA, else 2",
         range=NON_NEGATIVE),
    Flag("compile", boolean, True, "include torch.compile, which needs minutes and a C++ compiler"),
    Flag("trainer", boolean, False, "beside each channels-last, eager case of this project: "
         "main.py's trainer with the same network, which also loads and augments", const="true"),
    Flag("csv", pathname, None, "new file to write the rows to, or none",
         "in results/, named after network, device, torch and month"),
)  # fmt: skip
TOOL = cli.Tool(__doc__, FLAGS, main_flags=True)


def parse(argv: list[str]) -> tuple[SimpleNamespace, Settings]:
    """Read the tool's flags and the settings of a network to compare, or raise UsageError."""
    command = TOOL.parse(argv)
    opt = opts.parse(["--dataset=synthetic", *command.main_flags])
    rules = [
        (opt.netType != "densenet",
         f"netType: {opt.netType} is not measured, its peers are other DenseNets", "use densenet"),
        (opt.precision not in PRECISIONS,
         f"precision: {opt.precision} is not measured", f"use {' or '.join(PRECISIONS)}"),
        (command.options.trainer and opt.cudaGraph == "true",
         "trainer is measured beside eager cases, and cudaGraph true selects others",
         "leave out one of them"),
    ]  # fmt: skip
    UsageError.raise_for(broken(rules))
    num_classes = opt.nClasses or registry.DATASETS["synthetic"].num_classes
    return command.options, opt.replace(nClasses=num_classes)


def constant_columns(opt: Settings, device) -> dict[str, object]:
    """Return the columns that describe the network, the machine and the software."""
    import torch

    import engine.device

    def first_line(*command: str) -> str:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            output = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True)
            return output.partition("\n")[0]
        return "none"

    name, triton = engine.device.describe(device), "none"
    if device.type == "cpu" and (info := Path("/proc/cpuinfo")).exists():
        models = re.findall(r"model name\s*:\s*(.+)", info.read_text())
        name = f"{models[0] if models else 'CPU'}, {os.cpu_count()} cores"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        triton = importlib.metadata.version("triton")
    return {
        "network": network_name(opt),
        "depth": opt.depth,
        "batch_size": opt.batchSize,
        "image_size": opt.imageSize,
        "device": name,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": first_line("git", "-C", str(cli.ROOT), "describe", "--always", "--dirty"),
        "date": datetime.date.today().isoformat(),
    }


def csv_path(given: str | None, opt: Settings, device: str, version: str) -> Path | None:
    """Return the file to write, if any; raise UsageError if it exists or cannot be written."""
    if given == "none":
        return None
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    version = ".".join(version.split(".")[:2])
    name = f"bench_{network_name(opt)}-b{opt.batchSize}_{slug}_torch{version}"
    path = Path(given or cli.ROOT / "results" / f"{name}_{datetime.date.today():%Y%m}.csv")
    if path.exists():
        raise UsageError(f"csv: {path} exists", "move it away, or name another with --csv FILE")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"csv: cannot write in {path.parent}", "name another with --csv FILE")
    return path


def run(argv: list[str]) -> None:
    """Measure the selected cases, write a CSV file and print a table."""
    options, opt = parse(argv)

    import engine.device
    import kernels.backend
    from engine import cuda_graph
    from tools.benchmark.measure import measure

    # Find every usage error before measuring.
    device = engine.device.select(opt.nGPU)
    cuda_graph.make_capturer(opt.cudaGraph, device, resident=True)  # sets a stream to capture on
    kernels.backend.select(opt.kernels, device, "single")
    if opt.tf32 and device.type == "cpu":
        raise UsageError("tf32 has no effect on the CPU", "leave it out")
    cases = select_cases(opt, options.only, options.compile, device.type == "cuda")
    constants = constant_columns(opt, device)
    name = f"cpu-{constants['threads']}core" if device.type == "cpu" else constants["device"]
    path = csv_path(options.csv, opt, name, constants["torch"])

    # With empty compiler caches, so that the first step takes as long as on a new machine.
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        variables = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        with mock.patch.dict(os.environ, {name: f"{caches}/{name}" for name in variables}):
            for measured in measure(cases, options, opt, device):
                rows += [{"note": "none"} | row | constants for row in measured]
                if path:
                    atomic.atomic_write(path, results.as_csv(rows))
    print(results.as_table(rows))
    if path:
        print(f"\nwritten: {printable(str(path))}")


main = partial(TOOL.run, run)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
