"""Write a trained network for other programs, and check the file beforehand.

usage: python -m tools.export CHECKPOINT --to TARGET --output FILE [options] [main.py's flags]

A program that runs networks (onnx, openvino, litert, ncnn, executorch, coreml) runs its file, and
the logits are compared with PyTorch's before the file is kept; with --int8 up to 2,000 test images
are classified by both. A library of TARGET builds its network where it is installed, else its rules
are restated, and the logits are compared in double precision; so they are where CHECKPOINT is a
library's file. safetensors are read back and compared. An ONNX or safetensors file holds settings,
classes and statistics as well, and is a CHECKPOINT to all tools, except in 8 bits. docs/deploy.md
and docs/exchange.md say more.
"""

import json
import sys
from functools import partial
from pathlib import Path

import opts
from cli.flag_types import Flag, boolean, broken, pathname, text
from errors import UsageError, quoted
from experiment import console
from models.registry import LIBRARIES
from tools import cli
from tools.export.runtimes import RUNNERS, RUNTIMES
from tools.inference import network, onnx_io, sources

TARGETS = (*RUNTIMES, "safetensors", "weights", *LIBRARIES)
FLAGS = (
    Flag("to", text, None, "what to write: a file for a program that runs networks; safetensors; a "
         "state dict for --retrain; or what the network of a library loads", "none",
         choices=TARGETS),
    Flag("output", pathname, None, "file to write", "none"),
    Flag("half", boolean, False, "half precision, for a program that runs networks", const="true"),
    Flag("int8", text, None, "8 bits for onnx and openvino, calibrated on training images of --data"
         "; scales of weights for each output channel, or for each tensor", "none",
         choices=("channel", "tensor")),
    Flag("withPreprocessing", boolean, False, "let it take pixels from 0 to 255, in RGB",
         const="true"),
    Flag("check", boolean, True, "run the file in that program, and compare with PyTorch"),
    Flag("images", pathname, None, "directory of images to compare on besides random ones", "none"),
    sources.CLASSES,
    network.OVERWRITE,
)  # fmt: skip
TOOL = cli.Tool((__doc__ or "") + sources.SOURCES, FLAGS, "checkpoint", main_flags=True)
# Settings that an exported network does not carry.
NOT_EXPORTED = (*sources.RUN_ONLY, "nThreads", "optMemory", "timeout", "keep", "saveEvery")
# Exported from plain modules on the CPU, whatever the run trained with.
# Without workers: a converter may have started threads, which a fork does not survive.
ON_CPU = {"nGPU": "0", "optMemory": "0", "kernels": "torch", "nThreads": "0"}


def parse(argv: list[str]) -> cli.Command:
    """Parse a command line, which names a checkpoint, or raise UsageError."""
    command = TOOL.parse(argv)
    options = command.options
    rules = [
        (not options.to, "no --to", f"add --to {' or '.join(TARGETS)}"),
        (not options.output, "no --output", "add --output FILE"),
        (len(command.arguments) > 1,
         f"more than one checkpoint: {' '.join(command.arguments)}", "name one"),
        (options.int8 and options.to not in (None, "onnx", "openvino"),
         f"no 8 bits with --to {options.to}", "use --to onnx or openvino"),
        (options.int8 and (options.half or options.images or not options.check),
         "int8 goes with none of half, images and check false", "leave them out"),
    ]  # fmt: skip
    for name in ("half", "withPreprocessing", "check", "images"):
        is_given = getattr(options, name) not in (None, name == "check")
        has_effect = not is_given or options.to in (None, *RUNTIMES)
        what = f"{name} has no effect with --to {options.to}"
        rules.append((not has_effect, what, "leave it out"))
    UsageError.raise_for(broken(rules))
    flags = [flag for flag in command.main_flags if flag[2:].partition("=")[0] not in ON_CPU]
    flags += [f"--{name}={value}" for name, value in ON_CPU.items()]
    return command._replace(main_flags=flags)


def check_suffix(to: str, output: Path) -> None:
    """Raise UsageError if a file of that name would not be what `--to` writes."""
    from models.weight_formats import FORMATS

    formats = {**FORMATS, **RUNTIMES}
    suffixes = formats[to].suffixes[: 1 if to in RUNTIMES else None] if to in formats else ()
    others = {suffix for format in formats.values() for suffix in format.suffixes} | {".keras"}
    if not suffixes and output.name.endswith(tuple(others)):
        what = f"{output.name} is no name for --to {to}"
        raise UsageError(what, f"--output {quoted(output.with_suffix('.pt'))}")
    if suffixes and not output.name.endswith(suffixes):
        what = f"{formats[to].title} reads {' or '.join(suffixes)}, not {output.name}"
        raise UsageError(what, f"--output {quoted(output.with_suffix(suffixes[0]))}")


def run(argv: list[str]) -> int:
    """Write what the command line asks for; return the exit code."""
    command = parse(argv)
    options, output = command.options, Path(command.options.output)
    runtime = RUNTIMES.get(options.to)
    if runtime:
        needed = [each for each in runtime.packages if options.check or each not in RUNNERS]
        onnx_io.require(*needed, of=runtime.title)
        if options.int8 and options.to == "openvino":
            onnx_io.require("nncf==3.4.0", of="8-bit OpenVINO")
    check_suffix(options.to, output)
    for path in runtime.files(output) if runtime else ():
        network.check_new(path, options.overwrite)
    folders = [options.images] if options.images else []
    net, paths = network.load_model_and_images(command, None if runtime else output, folders)
    if options.to not in ("weights", "segmentation-models"):
        net.require_classifier()

    from fileio import atomic, safetensors, tensor_files
    from models.weight_formats import export_weights, get_format
    from tools.export.proof import prove

    data = {"classes": net.classes, "mean": net.mean, "std": net.std}
    if net.thresholds is not None:
        data["thresholds"] = net.thresholds
    settings = opts.as_yaml(net.opt, exclude=NOT_EXPORTED)
    metadata = {"settings": settings, "data": json.dumps(data)}
    if net.imported.format:
        prove(net, net.imported.format, net.imported.source)
    if runtime:
        from tools.export import deploy

        deploy.write(net, runtime, output, options, paths, metadata)
        # An unreadable image sets the exit code, but tells nothing about the file.
        return net.exit_code
    weights = tensor_files.on_cpu(net.model.state_dict())
    if not net.classes:
        weights = {name: each for name, each in weights.items() if name in net.imported.weights}
    if options.to in LIBRARIES:
        format = get_format(options.to, net.opt.paddleDropout)
        weights = export_weights(weights, format, net.thresholds)
        prove(net, format, weights)
        if format.remark:
            console.info(f"{format.title}: {format.remark}")
    if options.to == "safetensors" or output.suffix == safetensors.SUFFIX:
        atomic.atomic_write(output, safetensors.to_bytes(weights, metadata))
    else:
        tensor_files.save_weights(output, weights)
    classes = f" of {len(net.classes)} classes" if net.classes else ", an encoder"
    console.info(f"{output}: {len(weights)} tensors{classes}")
    return 0


main = partial(TOOL.run, run)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
