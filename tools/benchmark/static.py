"""Model a training step from machine code: `python -m tools.benchmark --static`, without a GPU."""

import datetime
import importlib.metadata
import itertools
import os
from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import opts
from cli.flag_types import Settings, broken
from cli.network_settings import network_name
from datasets import registry
from errors import UsageError
from tools import cli
from tools.benchmark import machine, results
from tools.benchmark.turns import report

# What is modelled where no network is given.
NETWORKS = (
    "--depth=100 --growthRate=12 --batchSize=64 --precision=bf16",
    "--depth=100 --growthRate=12 --batchSize=512 --precision=bf16",
    "--depth=100 --growthRate=12 --batchSize=64 --tf32=true",
    "--depth=100 --growthRate=12 --batchSize=64 --precision=single",
    "--depth=121 --imageSize=224 --nClasses=1000 --batchSize=256 --precision=bf16",
)
ARCHITECTURES_MODELLED = (80, 90, 100, 120)  # compute capability 8.0 and so on
# Of main.py's flags, those that decide what a step launches.
SETTINGS = ("batchSize", "bottleneck", "d1", "d2", "d3", "d4", "dataset", "depth", "dropRate",
            "growthRate", "imageSize", "initChannels", "nClasses", "netType", "precision",
            "reduction", "tf32")  # fmt: skip
COLUMNS = (
    "network", "depth", "precision", "batch_size", "image_size", "architecture", "gpu", "kernel",
    "launches", "mbytes", "gflop", "instructions_m", "registers", "shared_bytes", "spilled_bytes",
    "resident_programs", "matrix", "bytes_us", "issue_us", "latency_us", "modelled_us",
    "modelled_us_without_pdl", "images_per_s", "torch", "triton", "commit", "date",
)  # fmt: skip
PRINTED = COLUMNS[7:-4]
SUMMED = (*COLUMNS[:7], "launches", "mbytes", "gflop", "instructions_m", "spilled_bytes", "matrix",
          "modelled_us", "modelled_us_without_pdl", "images_per_s")  # fmt: skip


def rules(options: SimpleNamespace, opt: Settings) -> list[tuple[bool, str, str]]:
    """List the rules of `broken` for flags together with `--static`."""
    others = sorted(opt.given - set(SETTINGS))
    mine = ("only", "turns", "warmUp", "loader", "against", "images", "imagesPerSecond")
    useless = [name for name in mine if getattr(options, name) is not None]
    useless += ["trainer"] * options.trainer + ["compile"] * (not options.compile)
    return [
        (bool(useless), f"{', '.join(useless)}: no effect with static, which runs nothing",
         "leave it out, or leave out static"),
        (bool(others), f"{', '.join(others)}: no effect on what a step of level 2 launches",
         f"leave it out; of main.py's flags {', '.join(SETTINGS)} count"),
        (opt.netType != "densenet", f"netType: {opt.netType} has no kernels of its own",
         "use densenet"),
        (opt.precision == "double", "precision: the kernels have no double", "use single"),
    ]  # fmt: skip


def parse(options: SimpleNamespace, main_flags: list[str]) -> list[Settings]:
    """Return the networks to model: the one that flags of main.py describe, or NETWORKS.

    Raises:
        UsageError: a flag has no effect, or Triton cannot compile here.
    """
    lines = [main_flags] if main_flags else [line.split() for line in NETWORKS]
    found = [opts.parse(["--dataset=synthetic", *flags]) for flags in lines]
    UsageError.raise_for(broken(rules(options, found[0])))
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("static: TRITON_INTERPRET=1 compiles nothing", "unset it")
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError("static: Triton is not installed", "run it on Linux, where it comes "
                         "with torch") from None  # fmt: skip
    synthetic = registry.DATASETS["synthetic"].num_classes
    return [opt.replace(nClasses=opt.nClasses or synthetic) for opt in found]


def model(networks: Sequence[Settings], architectures: Iterable[int]) -> list[dict]:
    """Compile the training steps of some networks, and return the rows of each architecture.

    A row is a kernel of a step, its other launches, or the whole step: see COLUMNS.
    """
    from tools.benchmark import static_code, static_model, static_step

    steps = {}
    for opt, architecture in itertools.product(networks, architectures):
        name = f"{network_name(opt)}, {precision(opt)}, batch {opt.batchSize}"
        report(f"recording {name} for {architecture / 10}")
        gpu = static_model.DEVICES[architecture].as_gpu(architecture)
        steps[name, architecture] = (opt, static_step.record_step(opt, gpu))
    wanted = dict.fromkeys(
        (launch.variant, architecture)
        for (_, architecture), (_, step) in steps.items()
        for launch in step.launches
    )
    binaries = static_code.compile_all([*wanted], report)
    rows = []
    for (name, architecture), (opt, step) in steps.items():
        report(f"counting {name} for {architecture / 10}")
        columns = network_columns(opt) | {"architecture": f"{architecture / 10:.1f}"}
        modelled = static_model.step_rows(step, binaries, architecture, opt.batchSize)
        rows += [dict.fromkeys(COLUMNS, "none") | columns | row for row in modelled]
    return rows


def as_tables(rows: list[dict]) -> str:
    """Write a table for each network and architecture, one of the steps alone, and the legend."""
    from tools.benchmark import static_model

    texts, groups = [], {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in COLUMNS[:7]), []).append(row)
    for (network, _, precision, batch, size, architecture, gpu), group in groups.items():
        title = f"{network}, {size} pixels, {precision}, batch {batch}"
        texts.append(results.as_table(group, f"{title}, {architecture} {gpu} (model)", PRINTED, ""))
    steps = [row for row in rows if row["kernel"] == static_model.STEP]
    legend = static_model.legend()
    texts.append(results.as_table(steps, "Steps (model)", SUMMED, legend))
    return "\n".join(texts)


def kernel_us(opt: Settings, architecture: int) -> dict[str, float]:
    """Return the modelled microseconds of each kernel in a training step, by the kernel's name.

    static_model.OTHERS and STEP are beside them. The times of a kernel's launches, with the gaps
    before them, are added up.

    Args:
        opt: network, batchSize, precision, tf32.
        architecture: 90 for compute capability 9.0; the nearest lower one that is modelled counts.
    """
    nearest = max(each for each in ARCHITECTURES_MODELLED if each <= architecture)
    return {row["kernel"]: row["modelled_us"] for row in model([opt], [nearest])}


def network_columns(opt: Settings) -> dict[str, object]:
    """Return the columns that describe a network and its batch."""
    sizes = {"batch_size": opt.batchSize, "image_size": opt.imageSize}
    return {"network": network_name(opt), "depth": opt.depth, "precision": precision(opt)} | sizes


def precision(opt: Settings) -> str:
    """Name the precision as gpu.md does: tf32 is a way of single."""
    return "tf32" if opt.tf32 else opt.precision


def software_columns() -> dict[str, object]:
    """Return the columns that say which build was compiled, by what, and when."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    return versions | {
        "commit": machine.commit(cli.ROOT),
        "date": datetime.date.today().isoformat(),
    }
