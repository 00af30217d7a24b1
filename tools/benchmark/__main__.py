"""Compare the training steps of this project's network with other implementations of it.

usage: python -m tools.benchmark [--flag value ...]
       python -m tools.benchmark --loader DIR [--flag value ...]
       python -m tools.benchmark --static [--flag value ...]

Every memory level and kernel backend, torchvision's DenseNet (plain, memory efficient, compiled)
and timm's train the same network on the same batch in one process. Of main.py's flags those of the
network, the batch and the optimizer count; precision, tf32, optMemory, kernels and cudaGraph select
cases, as --only does. Images are synthetic: add --imageSize 224 --nClasses 1000 for ImageNet's
shape. On a CPU a network that does not fit the memory ends the process: leave it out with --only.

With --loader, this project's loader, torchvision's, timm's and NVIDIA DALI's (where it is
installed) prepare the same image files in turns on one thread of the CPU, for training and for
evaluation. The images per second of processor time tell how many cores a GPU needs. Of main.py's
flags those of images count. `python -m tools.benchmark.photographs DIR` makes photographs.

With --static nothing is run and no GPU is needed: what the Triton kernels of a training step at
memory level 2 are compiled to is counted, for four kinds of GPU, and its time modelled. Of
main.py's flags those of the network and the batch count; without any, five steps are modelled.
"""

import datetime
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import opts
from cli.flag_types import (
    AT_LEAST_1,
    NON_NEGATIVE,
    Flag,
    Range,
    Settings,
    boolean,
    broken,
    integer,
    integers,
    pathname,
    text,
)
from cli.network_settings import network_name
from datasets import registry
from errors import UsageError, printable
from fileio import atomic
from tools import cli
from tools.benchmark import machine, results, static
from tools.benchmark.cases import PRECISIONS, select_cases

FLAGS = (
    Flag("only", text, None, "cases to measure: patterns with commas between, each to be found in "
         "/IMPLEMENTATION/PRECISION/FORMAT/MODE/, e.g. level-2,torchvision/bf16*eager; with "
         "--loader in /WHO/SPLIT/RESIZE/, e.g. this,against/training", "all"),
    Flag("turns", integer, None, "turns of each case that count: one step on the CPU, five "
         "on CUDA; with --loader all images once", "30 on CUDA, else 5", range=Range(low=2)),
    Flag("warmUp", integer, None, "turns before them that do not",
         "10 on CUDA, else 2; with --loader 1", range=NON_NEGATIVE),
    Flag("compile", boolean, True, "include torch.compile, which needs minutes and a C++ compiler"),
    Flag("trainer", boolean, False, "beside each channels-last, eager case of this project: "
         "main.py's trainer with the same network, which also loads and augments", const="true"),
    Flag("loader", pathname, None, "measure in place of training steps how image files below this "
         "directory, at any depth, are prepared", "none"),
    Flag("against", pathname, None, "with --loader: another checkout of this project, whose loader "
         "takes turns too", "none"),
    Flag("images", integer, None, "with --loader: image files to prepare in each turn, spread over "
         "the directory", "256", range=Range(low=2)),
    Flag("imagesPerSecond", integers, None, "with --loader: rates to print the cores for",
         "1000,5000", range=AT_LEAST_1),
    Flag("static", boolean, False, "model training steps from their machine code, without a GPU, "
         "in place of measuring them", const="true"),
    Flag("csv", pathname, None, "new file to write the rows to, or none",
         "in results/, named after network or loader, device, torch and month"),
)  # fmt: skip
LOADER_ONLY = ("against", "images", "imagesPerSecond")
# Of main.py's flags, those that decide how files are prepared.
LOADER_SETTINGS = ("batchSize", "exifRotate", "imageSize", "manualSeed", "maxAspect", "maxPixels",
                   "resize", "whiteLevel")  # fmt: skip
RATES = [1000, 5000]  # training images per second, of one GPU or of several
TOOL = cli.Tool(__doc__, FLAGS, main_flags=True)


def parse(argv: list[str]) -> tuple[SimpleNamespace, Settings | list[Settings], list[str]]:
    """Read the tool's flags, and the settings of what to compare, or raise UsageError.

    Returns:
        The tool's flags, all settings of main.py (with `--static` those of each network), and
        those of its flags that were given.
    """
    command = TOOL.parse(argv)
    options, main_flags = command.options, command.main_flags
    if options.static:
        return options, static.parse(options, main_flags), main_flags
    if options.loader:
        opt = opts.parse(["--dataset=folder", *main_flags])
        UsageError.raise_for(broken(loader_rules(options, opt)))
        return options, opt, main_flags
    opt = opts.parse(["--dataset=synthetic", *main_flags])
    rules = [
        (opt.netType != "densenet",
         f"netType: {opt.netType} is not measured, its peers are other DenseNets", "use densenet"),
        (opt.precision not in PRECISIONS,
         f"precision: {opt.precision} is not measured", f"use {' or '.join(PRECISIONS)}"),
        (options.trainer and opt.cudaGraph == "true",
         "trainer is measured beside eager cases, and cudaGraph true selects others",
         "leave out one of them"),
        *((getattr(options, name) is not None,
           f"{name} is about image files, and training steps read none", "add --loader DIR")
          for name in LOADER_ONLY),
    ]  # fmt: skip
    UsageError.raise_for(broken(rules))
    num_classes = opt.nClasses or registry.DATASETS["synthetic"].num_classes
    return options, opt.replace(nClasses=num_classes), main_flags


def loader_rules(options: SimpleNamespace, opt: Settings) -> list[tuple[bool, str, str]]:
    """List the rules of `broken` for flags together with `--loader`."""
    others = sorted(opt.given - {"dataset", *LOADER_SETTINGS})
    return [
        (bool(others), f"{', '.join(others)}: no effect on how image files are prepared",
         f"leave it out; of main.py's flags {', '.join(LOADER_SETTINGS)} count"),
        (not opt.imagenetShape,
         f"imageSize {opt.imageSize}: up to 64 pixels images are prepared once and stay in memory",
         "use 224, or another above 64"),
        (options.trainer or not options.compile,
         "trainer and compile are about training steps", "leave them out, or leave out loader"),
    ]  # fmt: skip


def constant_columns(opt: Settings, device) -> dict[str, object]:
    """Return the columns that describe the network, the machine and the software."""
    network = {"network": network_name(opt), "depth": opt.depth}
    sizes = {"batch_size": opt.batchSize, "image_size": opt.imageSize}
    return network | sizes | machine.columns(device)


def csv_path(given: str | None, prefix: str, device: str, version: str) -> Path | None:
    """Return the file to write, if any; raise UsageError if it exists or cannot be written.

    Args:
        given: its name, or `none`; None: named after the other three and the month, in results/.
        version: of torch.
    """
    if given == "none":
        return None
    device = re.sub(r"\((r|tm)\)", "", device.lower())  # trademarks
    slug = re.sub(r"[^a-z0-9]+", "-", device).strip("-")
    version = ".".join(version.split(".")[:2])
    name = f"{prefix}_{slug}_torch{version}_{datetime.date.today():%Y%m}.csv"
    path = Path(given or cli.ROOT / "results" / name)
    if path.exists():
        raise UsageError(f"csv: {path} exists", "move it away, or name another with --csv FILE")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"csv: cannot write in {path.parent}", "name another with --csv FILE")
    return path


def run(argv: list[str]) -> None:
    """Measure the selected cases, write a CSV file and print a table."""
    options, opt, main_flags = parse(argv)
    if options.loader:
        run_loader(options, opt, main_flags)
        return
    if options.static:
        run_static(options, opt)
        return

    import engine.device
    from engine import cuda_graph
    from engine.backend_choice import select_backend
    from tools.benchmark.measure import measure

    # Find every usage error before measuring.
    device = engine.device.select(opt.nGPU)
    cuda_graph.make_capturer(opt.cudaGraph, device)  # sets a stream to capture on
    select_backend(opt.replace(precision="single"), device)
    if opt.tf32 and device.type == "cpu":
        raise UsageError("tf32 has no effect on the CPU", "leave it out")
    cases = select_cases(opt, options.only, options.compile, device.type == "cuda")
    constants = constant_columns(opt, device)
    name = f"cpu-{constants['threads']}core" if device.type == "cpu" else constants["device"]
    prefix = f"bench_{network_name(opt)}-b{opt.batchSize}"
    path = csv_path(options.csv, prefix, name, constants["torch"])

    # With empty compiler caches, so that the first step takes as long as on a new machine.
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        variables = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        with mock.patch.dict(os.environ, {name: f"{caches}/{name}" for name in variables}):
            for measured in measure(cases, options, opt, device):
                rows += [{"note": "none"} | row | constants for row in measured]
                if path:
                    atomic.atomic_write(path, results.as_csv(rows))
    print(results.as_table(rows, f"{network_name(opt)}, batch {opt.batchSize}"))
    _say_written(path)


def run_loader(options: SimpleNamespace, opt: Settings, main_flags: list[str]) -> None:
    """Measure loaders of image files, write a CSV file, and print a table and the cores needed."""
    import torch

    from tools.benchmark import loader_results, loaders

    with loaders.one_thread():
        constants = constant_columns(opt, torch.device("cpu"))
        folder = re.sub(r"[^\w.]+", "-", Path(options.loader).resolve().name)
        prefix = f"loader_{folder}-{opt.imageSize}px"
        path = csv_path(options.csv, prefix, constants["device"], constants["torch"])
        constants = {name: constants[name] for name in loader_results.COLUMNS if name in constants}
        measured = loaders.measure(options, opt, main_flags)
    rows = [{"note": "none"} | row | constants for row in measured]
    if path:
        atomic.atomic_write(path, results.as_csv(rows, loader_results.COLUMNS))
    title = f"{rows[0]['images']} images of {printable(options.loader)} to {opt.imageSize} pixels"
    title += f", batch {opt.batchSize}, one thread"
    print(results.as_table(rows, title, loader_results.PRINTED, loader_results.LEGEND))
    print("\n".join(["", *loader_results.core_lines(rows, options.imagesPerSecond or RATES)]))
    _say_written(path)


def run_static(options: SimpleNamespace, networks: list[Settings]) -> None:
    """Model steps on each kind of GPU; write a CSV file, and print their kernels and a summary."""
    columns = static.software_columns()
    names = {network_name(opt) for opt in networks}
    name = names.pop() if len(networks) == 1 else "networks"
    if len(networks) == 1:
        name += f"-b{networks[0].batchSize}-{static.precision(networks[0])}"
    device = f"triton{columns['triton']}"
    path = csv_path(options.csv, f"static_{name}", device, columns["torch"])
    rows = [row | columns for row in static.model(networks, static.ARCHITECTURES_MODELLED)]
    if path:
        atomic.atomic_write(path, results.as_csv(rows, static.COLUMNS))
    print(static.as_tables(rows))
    _say_written(path)


def _say_written(path: Path | None) -> None:
    if path:
        print(f"\nwritten: {printable(str(path))}")


main = partial(TOOL.run, run)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
