"""Training speed and memory beside other implementations: `python -m tools.benchmark`.

It takes main.py's flags for the network, and its own. Every memory level and kernel backend of
this project, torchvision's DenseNet (plain, memory efficient and compiled) and timm's train the
same network on the same batch in one process, in turns whose order is random. Prints a table and
writes a CSV file; what does not apply or could not be measured is "not run" there, with the reason.

On a CPU a network that does not fit the memory ends the process: leave it out with `--only`.
"""

import contextlib
import datetime
import fnmatch
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import opts
from cli.flag_reader import FlagParser
from cli.flag_types import (
    AT_LEAST_1,
    NON_NEGATIVE,
    Flag,
    Range,
    Settings,
    boolean,
    integer,
    integers,
)
from cli.flag_types import text as plain_text
from errors import UsageError
from fileio import atomic
from tools import cli
from tools.benchmark import results

PRECISIONS = {"single": "fp32", "bf16": "bf16"}
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}
# Turns that count, and turns before them that do not.
TURNS, WARM_UP = {"cpu": 5, "cuda": 30}, {"cpu": 2, "cuda": 10}
AS_TRAINED = ("eager", "channels-last")  # of `--depths` and `--trainer`: as the trainer steps

# fmt: off
FLAGS = {flag.name: flag for flag in (
    Flag("only", plain_text, None, "cases to measure: patterns with commas between, each to "
         "be found in WHO/PRECISION/FORMAT/MODE, e.g. level-2,torchvision/bf16*eager", "all"),
    Flag("turns", integer, None, "turns of each case that count: one step on the CPU, five "
         "on CUDA", "30 on CUDA, else 5", range=Range(low=2)),
    Flag("warmUp", integer, None, "turns before them that do not", "10 on CUDA, else 2",
         range=NON_NEGATIVE),
    Flag("compile", boolean, True, "take torch.compile in, which needs minutes and a C++ compiler"),
    Flag("rss", boolean, True, "on the CPU: peak memory of a process of its own per case"),
    Flag("trainer", boolean, False, "beside each channels-last, eager case of this project: "
         "main.py's trainer with the same network, which also loads and augments", const="true"),
    Flag("depths", integers, None, "instead: how time and memory grow over these depths, eager and "
         "channels-last", "one depth", range=AT_LEAST_1),
    Flag("csv", plain_text, None, "file to write, or none",
         "in results/, named after network, device, torch and month"),
)}
# fmt: on

USAGE = """usage: python -m tools.benchmark [--flag value ...]

Training steps of this project's network beside other implementations of it. Of main.py's flags
those of the network, the batch and the optimizer count; precision, tf32, optMemory, kernels and
cudaGraph measure that one alone. Images are synthetic: add --imageSize 224 --nClasses 1000 for
ImageNet's shape."""


# ----------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Args:
        networks: the settings of main.py, one for each depth.
        options: the flags of this program by name.
    """

    networks: list[Settings]
    options: SimpleNamespace


def parse(argv: list[str]) -> Request:
    """Read main.py's flags and those of this program.

    Raises:
        UsageError: every problem of the flags at once.
    """
    parser = FlagParser(opts.FLAGS | FLAGS)
    raw = parser.parse_argv(argv)
    parser.add([flag for flag in raw if flag[0] not in opts.FLAGS])
    options = SimpleNamespace(
        **{name: flag.default for name, flag in FLAGS.items()} | parser.values
    )
    rest = [f"--{name}={value}" for name, value, _ in raw if name in opts.FLAGS]
    problems = parser.problems
    if options.depths and any(flag.startswith("--depth=") for flag in rest):
        problems.append(("depth and depths exclude each other", "keep one"))
        options.depths = None
    networks = []
    for depth in options.depths or [None]:
        of_depth = [f"--depth={depth}"] if depth else []
        try:
            networks.append(opts.parse(["--dataset=synthetic", *rest, *of_depth]))
        except UsageError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if networks and networks[0].netType != "densenet":
        what = f"netType: {networks[0].netType} is not measured, its peers are other DenseNets"
        problems.append((what, "use densenet"))
    if networks and networks[0].precision not in PRECISIONS:
        what = f"precision: {networks[0].precision} is not measured"
        problems.append((what, f"use {' or '.join(PRECISIONS)}"))
    if problems:
        raise UsageError.from_problems(problems)
    return Request(networks, options)


def select_cases(request: Request, opt: Settings, on_cuda: bool) -> list:
    """Who takes part, precision by precision.

    Raises:
        UsageError: nobody is left.
    """
    from tools.benchmark.measure import COMPILED, all_cases

    backends = ["torch", "triton"] if on_cuda else ["torch"]
    if opt.kernels != "auto":
        backends = [opt.kernels]
    options = request.options
    patterns = [f"*{pattern.strip()}*" for pattern in (options.only or "").split(",")]
    everybody = [
        case
        for precision in _precisions(opt, on_cuda)
        for case in all_cases(precision, on_cuda, backends)
    ]
    found = [
        case
        for case in everybody
        if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)
        and (options.compile or case.mode not in COMPILED)
        and (not options.depths or (case.mode, case.memory_format) == AS_TRAINED)
        and _is_asked_for(case, opt)
    ]
    if not found:
        what = f"only: {options.only} leaves nobody to measure"
        raise UsageError(what, f"names are as {everybody[0].name}")
    return found


def _precisions(opt: Settings, on_cuda: bool) -> list[str]:
    """The precisions to measure: all of the device, or the one that is asked for."""
    if opt.tf32:
        return ["tf32"]
    if "precision" in opt.given:
        return [PRECISIONS[opt.precision]]
    return ["fp32", "tf32", "bf16"] if on_cuda else ["fp32", "bf16"]


def _is_asked_for(case, opt: Settings) -> bool:
    """Whether the flags optMemory and cudaGraph, where they are given, mean this case."""
    if case.is_peer:
        return True
    if opt.cudaGraph != "auto" and (case.mode == "graph") != (opt.cudaGraph == "true"):
        return False
    level = case.implementation.split("-")[1]
    return "optMemory" not in opt.given or str(opt.optMemory) in ("auto", level)


# -------------------------------------------------------------------------------------- measuring


def measure(request: Request, device, say: Callable[[str], None]) -> Iterator[list[dict]]:
    """Yield the rows so far, whenever a precision of a network is done.

    Args:
        say: called with a line about what is going on.
    """
    import engine.device
    from tools.benchmark.measure import copy_bandwidth

    bandwidth = copy_bandwidth(device)
    say(f"a large copy moves {bandwidth / 1e9:.1f} GB/s")
    constants = facts(device) | {"copy_gb_per_s": bandwidth / 1e9}
    rows: list[dict] = []
    for opt in request.networks:
        everybody = select_cases(request, opt, device.type == "cuda")
        for precision in dict.fromkeys(case.precision for case in everybody):
            engine.device.configure(opt.cudnn, tf32=precision == "tf32")
            group = [case for case in everybody if case.precision == precision]
            limit = bandwidth / (results.block_traffic(opt) * BYTES[precision])
            for row in measure_group(group, opt, request.options, device, say):
                row |= constants | of_network(opt) | {"bound_images_per_s": limit}
                if "images_per_s" in row:
                    row["fraction_of_bound"] = row["images_per_s"] / limit
                rows.append(row)
            results.add_ratios(rows)
            if request.options.depths:
                results.add_growth(rows)
            yield rows


def measure_group(
    group: list, opt: Settings, options: SimpleNamespace, device, say: Callable[[str], None]
) -> list[dict]:
    """Measure cases of one precision; their rows in the same order."""
    import torch

    from datasets import registry
    from tools.benchmark.measure import error_summary, peak_rss_mb, set_up, time_interleaved

    num_classes = opt.nClasses or registry.DATASETS["synthetic"].num_classes
    on_cuda = device.type == "cuda"
    turns = TURNS[device.type] if options.turns is None else options.turns
    warm_up = WARM_UP[device.type] if options.warmUp is None else options.warmUp
    torch.compiler.reset()  # what the last group compiled would count as recompilation
    pool = torch.cuda.graph_pool_handle() if on_cuda else None
    rows = {case: case.columns for case in group}
    runners = []
    for case in group:
        try:
            runner, found = set_up(case, opt, num_classes, device, pool)
            if options.rss and not on_cuda:
                found["peak_rss_mb"] = peak_rss_mb(case, opt, num_classes)
        except Exception as error:  # whoever fails must not end the measurement of the others
            rows[case]["note"] = error_summary(error)
            say(f"{case.name}: {results.NOT_RUN}, {error_summary(error)}")
            continue
        runners.append(runner)
        rows[case] |= found
        say(f"{case.name}: first step {found['first_step_s']:.1f} s")
    say(f"{len(runners)} cases take {warm_up} + {turns} turns")
    times, failures = time_interleaved(runners, warm_up, turns)
    for case, taken in times.items():
        if case in failures:
            rows[case]["note"] = failures[case]
        else:
            speeds = [opt.batchSize / time_s for time_s in taken]
            rows[case] |= results.spread(speeds) | {"turns": turns}
    if not options.trainer:
        return list(rows.values())
    trainers = [
        row_of_trainer(runner, opt, num_classes, warm_up, turns)
        for runner in runners
        if (runner.case.mode, runner.case.memory_format) == AS_TRAINED
        and not runner.case.is_peer
        and runner.case not in failures
    ]
    return [*rows.values(), *trainers]


def row_of_trainer(
    bare, opt: Settings, num_classes: int, warm_up: int, turns: int
) -> dict[str, object]:
    """Measure main.py's trainer with a case's network: its row, and the ratio in a note."""
    from tools.benchmark.measure import beside_the_trainer, error_summary

    level = bare.case.implementation
    row = bare.case.columns | {"who": f"trainer-{level.removeprefix('level-')}"}
    try:
        times = beside_the_trainer(bare, opt, num_classes, warm_up, turns)
    except Exception as error:  # the rows of the others are kept
        return row | {"note": error_summary(error)}
    ratio = statistics.median(alone / trained for alone, trained in times)
    row |= results.spread([opt.batchSize / trained for _, trained in times])
    note = f"{ratio:.3f} of the speed of {level} in turns with it, median of {turns} pairs"
    return row | {"turns": turns, "note": note}


def of_network(opt: Settings) -> dict[str, object]:
    """What a row says about the network and its input."""
    return {
        "network": results.network_name(opt),
        "depth": opt.depth,
        "batch_size": opt.batchSize,
        "image_size": opt.imageSize,
    }


def facts(device) -> dict[str, object]:
    """What a row says about the machine and the software."""
    import torch

    import engine.device

    driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "device": engine.device.describe(device) if device.type == "cuda" else _processor(),
        "driver": driver.splitlines()[0] if driver else "none",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": _output_of("git", "describe", "--always", "--dirty") or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    """The CPU's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"


def _output_of(*command: str) -> str:
    """What a command prints in this repository, nothing if it cannot be run."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cli.ROOT)
        return done.stdout.strip()
    return ""


# ------------------------------------------------------------------------------------ public face


@contextlib.contextmanager
def empty_caches() -> Iterator[None]:
    """Let compilers start from nothing, so that the first step takes what it takes a newcomer."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        os.environ.update({name: str(Path(directory) / name.lower()) for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value


def measure_all(request: Request, say: Callable[[str], None]) -> tuple[list[dict], Path | None]:
    """Measure what is asked for and write the CSV file; the rows and the file."""
    import torch

    import engine.device
    import kernels.backend
    from engine import cuda_graph

    opt = request.networks[0]
    device = engine.device.select(opt.nGPU)
    on_cuda = device.type == "cuda"
    cuda_graph.make_capturer(opt.cudaGraph, device, resident=True)  # a stream to capture on
    if opt.tf32 and not on_cuda:
        raise UsageError("tf32 has no effect on the CPU", "leave it out")
    kernels.backend.select(opt.kernels, device, "single")  # its errors come before the work
    select_cases(request, opt, on_cuda)  # and so do its
    name = engine.device.describe(device) if on_cuda else f"cpu-{torch.get_num_threads()}core"
    network = results.network_name(opt, "depths" if request.options.depths else None)
    today = datetime.date.today()
    path = _target(
        request.options.csv,
        results.file_name(network, opt.batchSize, name, torch.__version__, today),
    )
    rows: list[dict] = []
    for rows in measure(request, device, say):
        if path:
            atomic.atomic_write(path, results.as_csv(rows))  # whatever happens to the rest
    return rows, path


def _target(csv: str | None, name: str) -> Path | None:
    """The file to write, which must not be there: a measurement is not overwritten."""
    if csv == "none":
        return None
    path = Path(csv) if csv else cli.ROOT / "results" / name
    if path.exists():
        raise UsageError(f"csv: {path} exists", "move it away, or name another with --csv FILE")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"csv: cannot write in {path.parent}", "name another with --csv FILE")
    return path


def run(argv: list[str]) -> None:
    """Measure, print a table and write a CSV file."""
    request = parse(argv)
    with empty_caches():
        rows, path = measure_all(request, lambda line: print(line, file=sys.stderr, flush=True))
    print(results.as_table(rows))
    if request.options.depths:
        print(results.growth_table(rows))
    if path:
        print(f"\nwritten: {path}")


def main(argv: list[str]) -> int:
    """Run one command line."""
    return cli.run(argv, USAGE, FLAGS, run, main_flags=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
