"""Count the parameters, multiply-adds and activations of a network, and list its layers.

usage: python -m tools.describe [main.py's flags]

With --table2 true it has a line for each row of the paper's Table 2 instead.
With --batchSize it also predicts the memory of a training step in each precision and, of a
DenseNet, at each memory level. With --imagesPerSecond it says how many cores prepare the images.
"""

import math
import sys
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import opts
from cli.flag_types import AT_LEAST_1, Flag, Settings, boolean, integer
from datasets.registry import DATASETS
from errors import UsageError, printable
from models.registry import ARCHITECTURES
from tools import cli
from tools.benchmark import loader_results
from tools.layers import build, list_layers

if TYPE_CHECKING:
    import torch

PRECISIONS = ("single", "half", "bf16", "double")
FLAGS = (
    Flag("imagesPerSecond", integer, None, "training images a second to count the cores for, by "
         "the newest measurement of python -m tools.benchmark --loader", "none", range=AT_LEAST_1),
    Flag("table2", boolean, False, "list all networks of Table 2, with the memory of a training "
         "step at the batch size of their papers, nothing dropped", const="true"),
)  # fmt: skip
TOOL = cli.Tool(__doc__, FLAGS, main_flags=True)


def counts(opt: Settings) -> Iterator[str]:
    """Yield lines about a network: the totals, and one for each layer."""
    model = build(opt)
    layers = list_layers(model, opt.imageSize)

    network = ARCHITECTURES[opt.netType]
    forms = {
        f"k={opt.growthRate}": network.uses("growthRate"),
        f"shortcut {opt.shortcutType}": network.shortcuts,
        f"channels x {opt.widen}": network.uses("widen"),
    }
    form = ", ".join(text for text, has_it in forms.items() if has_it)
    parts = "blocks per stage" if network.shortcuts else "layers per block"
    size = f"{opt.nChannels} x {opt.imageSize} x {opt.imageSize}"
    yield f"{opt.netType}, L={opt.depth}, {form}, {opt.nClasses} classes, input {size}"
    yield f"stages         {', '.join(map(str, opt.stages))} {parts}"
    yield f"parameters     {sum(parameter.numel() for parameter in model.parameters()):,}"
    macs = sum(layer.macs for layer in layers)
    yield f"multiply-adds  {macs:,} per image (convolutions and classifier)"
    activations = sum(math.prod(layer.shape) for layer in layers)
    yield f"activations    {activations:,} per image (their outputs)"

    yield ""
    yield f"{'layer':<44} {'kind':<10} {'channels':>14} {'size':>9} {'multiply-adds':>15}"
    for layer in layers:
        channels = f"{layer.in_channels} -> {layer.shape[0]}"
        size = " x ".join(map(str, layer.shape[1:]))
        yield f"{layer.name:<44} {layer.kind:<10} {channels:>14} {size:>9} {layer.macs:>15,}"


def memory(opt: Settings) -> Iterator[str]:
    """Yield lines about the memory of a training step, one per level of optMemory if there are any.

    Raises:
        UsageError: the GPU or the kernels that the settings ask for are missing.
    """
    import engine.device
    from engine.backend_choice import select_backend
    from engine.memory import MemoryEstimate

    device = engine.device.select(opt.nGPU)
    # Not triton by name: that is an error in a precision which it does not support.
    backend = "torch" if opt.kernels == "torch" else "auto"
    estimates = {}
    for precision in PRECISIONS:
        changed = opt.replace(precision=precision, kernels=backend)
        ops, _ = select_backend(changed, device)
        estimates[precision] = MemoryEstimate(changed, opt.nClasses, device, ops)

    where = engine.device.describe(device)
    yield f"memory of a training step at batch {opt.batchSize} on {where}, in MB"
    has_levels = bool(estimates[opt.precision].levels)
    title = "optMemory" if has_levels else ""
    yield f"{title:<12}" + "".join(f"{precision:>12}" for precision in PRECISIONS)
    for level in opts.MEMORY_LEVELS if has_levels else (None,):
        peaks = [estimate.peak_bytes(level) for estimate in estimates.values()]
        name = "step" if level is None else level
        yield f"{name:<12}" + "".join(f"{peak / 1e6:>12,.1f}" for peak in peaks)

    # Add the data on the device, and the level that is left to choose.
    data = resident_bytes(opt)
    yield f"{'data':<12}" + ("not known here" if data is None else f"{data / 1e6:>12,.1f} more")
    if has_levels:
        free = engine.device.free_bytes(device)
        level, note = estimates[opt.precision].choose_level(free and free - (data or 0))
        why = ", the fastest: free memory is known of a GPU only" if free is None else ""
        yield note or f"optMemory auto: {level}{why}"


def table2(device: "torch.device") -> Iterator[str]:
    """Yield a line for each row of Table 2, of its config for C10+ if any; takes a minute."""
    from engine.backend_choice import select_backend
    from engine.memory import MemoryEstimate
    from tools.results import published
    from tools.results.configs import configs, count

    titles = ("parameters", "multiply-adds", "activations", "batch", "MB")
    widths = (12, 14, 12, 6, 8)
    yield f"{'method':<48} {'L':>5} " + " ".join(map("{:>{}}".format, titles, widths))
    for row in published.tables()["table2"].rows:
        name = row.configs.get("C10+") or next(iter(row.configs.values()))
        opt, size = configs()[name].opt, count(configs()[name].opt)
        ops, _ = select_backend(opt, device)
        peak = MemoryEstimate(opt, DATASETS[opt.dataset].num_classes, device, ops).peak_bytes()
        values = (*size, opt.batchSize, round(peak / 1e6))
        numbers = [f"{value:>{width},}" for value, width in zip(values, widths, strict=True)]
        yield f"{row.method:<48} {row.depth or '-':>5} " + " ".join(numbers)


def resident_bytes(opt: Settings) -> int | None:
    """Count images and labels that stay on the device; None if only the data tells."""
    dataset = DATASETS[opt.dataset]
    if dataset.is_read_from_disk(opt.imageSize):
        return 0  # read batch by batch
    count = sum(dataset.num_images or ()) or None
    if dataset.is_generated:
        count = opt.nImages + max(1, opt.nImages // 5)
    pixel_bytes = 1 if opt.preprocess == "normalise" else 4
    return count and count * (opt.nChannels * opt.imageSize**2 * pixel_bytes + 8)


def cores(opt: Settings, rate: int) -> str:
    """Return a line about the cores whose loader processes prepare `rate` images a second.

    Raises:
        UsageError: the images are not read from files while training.
    """
    if not DATASETS[opt.dataset].is_read_from_disk(opt.imageSize):
        what = f"imagesPerSecond: {opt.dataset} at {opt.imageSize} pixels stays in memory"
        raise UsageError(what, "leave it out")
    kind = f"{opt.resize} to {opt.imageSize} pixels"
    found = loader_results.find_newest(cli.ROOT / "results", opt.resize, opt.imageSize)
    if found is None:
        size = "" if opt.imageSize == 224 else f" --imageSize {opt.imageSize}"
        command = f"python -m tools.benchmark --loader DIR{size}"
        return f"cores          {kind} is not measured yet; on your images: {command}"
    path, row = found
    speed = float(row["images_per_cpu_s"])
    return (
        f"cores          {loader_results.num_cores(rate, speed)} for {rate:,} images/s, {kind}: "
        f"{speed:,.0f} per second and core on {row['device']}, from {row['source']} "
        f"({printable(path.name)})"
    )


def parse(argv: list[str]) -> tuple[SimpleNamespace, Settings]:
    """Return the values of the tool's flags, and the settings; or raise UsageError."""
    command = TOOL.parse(argv)
    return command.options, opts.parse(command.main_flags)


def run(argv: list[str]) -> None:
    """Print the counts of the network that the flags describe."""
    options, opt = parse(argv)
    if options.table2:
        import engine.device

        if others := sorted(opt.given - {"nGPU"}):
            what = f"{others[0]} has no effect on the networks of Table 2"
            raise UsageError(what, "leave it out, or leave out --table2")
        for line in table2(engine.device.select(opt.nGPU)):
            print(line, flush=True)
        return
    num_classes = opt.nClasses or DATASETS[opt.dataset].num_classes
    if num_classes is None:
        raise UsageError(f"the classes of {opt.dataset} are in its data", "add --nClasses N")
    opt = opt.replace(nClasses=num_classes)
    about_cores = options.imagesPerSecond and cores(opt, options.imagesPerSecond)
    print("\n".join(counts(opt)))
    if "batchSize" in opt.given:
        print()
        for line in memory(opt):  # takes seconds
            print(line, flush=True)
    if about_cores:
        print(f"\n{about_cores}")


main = partial(TOOL.run, run)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
