"""Write the weights of a trained network for other programs, and check the file beforehand.

usage: python -m tools.export CHECKPOINT --to TARGET --output FILE [options] [main.py's flags]

A library of TARGET builds its network where it is installed, else its rules are restated, and the
logits are compared in double precision; so they are where CHECKPOINT is a library's file. ONNX
Runtime runs the ONNX file; safetensors are read back and compared. An ONNX or safetensors file
holds settings, classes and statistics as well, and is a CHECKPOINT to all tools.
"""

import copy
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
from tools.inference import network, onnx_io, sources

TARGETS = ("onnx", "safetensors", "weights", *LIBRARIES)
FLAGS = (
    Flag("to", text, None, "what to write: an ONNX file; safetensors; a state dict for --retrain; "
         "or what the network of a library loads", "none", choices=TARGETS),
    Flag("output", pathname, None, "file to write", "none"),
    Flag("check", boolean, True, "compare what ONNX Runtime computes with PyTorch"),
    Flag("images", pathname, None, "directory of images to compare on besides random ones", "none"),
    sources.CLASSES,
    network.OVERWRITE,
)  # fmt: skip
TOOL = cli.Tool((__doc__ or "") + sources.SOURCES, FLAGS, "checkpoint", main_flags=True)
# Settings that an exported network does not carry.
NOT_EXPORTED = (*sources.RUN_ONLY, "nThreads", "optMemory", "timeout", "keep", "saveEvery")
# Exported from plain modules on the CPU, whatever the run trained with.
ON_CPU = {"nGPU": "0", "optMemory": "0", "kernels": "torch"}
LIMIT = 1e-4  # of the largest logit, between ONNX Runtime and PyTorch in single precision


def parse(argv: list[str]) -> cli.Command:
    """Parse a command line, which names a checkpoint, or raise UsageError."""
    command = TOOL.parse(argv)
    options = command.options
    rules = [
        (not options.to, "no --to", f"add --to {' or '.join(TARGETS)}"),
        (not options.output, "no --output", "add --output FILE"),
        (len(command.arguments) > 1,
         f"more than one checkpoint: {' '.join(command.arguments)}", "name one"),
        (options.images and options.to not in (None, "onnx"),
         f"images has no effect with --to {options.to}", "leave it out"),
    ]  # fmt: skip
    UsageError.raise_for(broken(rules))
    flags = [flag for flag in command.main_flags if flag[2:].partition("=")[0] not in ON_CPU]
    flags += [f"--{name}={value}" for name, value in ON_CPU.items()]
    return command._replace(main_flags=flags)


def check_suffix(to: str, output: Path) -> None:
    """Raise UsageError if a file of that name would not be what `--to` writes."""
    from models.weight_formats import FORMATS

    suffixes = FORMATS[to].suffixes if to in FORMATS else ()
    others = {suffix for format in FORMATS.values() for suffix in format.suffixes} | {".keras"}
    if not suffixes and output.name.endswith(tuple(others)):
        what = f"{output.name} is no name for --to {to}"
        raise UsageError(what, f"--output {quoted(output.with_suffix('.pt'))}")
    if suffixes and not output.name.endswith(suffixes):
        what = f"{FORMATS[to].title} reads {' or '.join(suffixes)}, not {output.name}"
        raise UsageError(what, f"--output {quoted(output.with_suffix(suffixes[0]))}")


def check_onnx(net: network.LoadedModel, content: bytes, paths: list[str]) -> None:
    """Compare ONNX Runtime with PyTorch on random images and on files."""
    import onnxruntime
    import torch

    from datasets.file_loader import translate_worker_errors
    from tools.export.proof import compare, random_images

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run_onnx(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"images": images.contiguous().numpy()})
        return torch.from_numpy(logits)

    model = copy.deepcopy(net.model).float().cpu()
    compare("ONNX Runtime on noise", model, run_onnx, random_images(net.opt), LIMIT)
    with translate_worker_errors():
        of_files = (images.float().cpu() for images, _ in net.batches(paths))
        compare("ONNX Runtime on files", model, run_onnx, of_files, LIMIT)


def run(argv: list[str]) -> int:
    """Write what the command line asks for; return the exit code."""
    command = parse(argv)
    options, output = command.options, Path(command.options.output)
    if options.to == "onnx":
        onnx_io.require("onnx", "onnxscript", *(["onnxruntime"] * options.check))
    check_suffix(options.to, output)
    folders = [options.images] if options.images else []
    net, paths = network.load_model_and_images(command, output, folders)
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
    if options.to == "onnx":
        content = onnx_io.as_onnx(net.model, net.opt.imageSize, metadata)
        if options.check:
            check_onnx(net, content, paths)
        atomic.atomic_write(output, content)
        console.info(f"{output}: {len(content) / 1e6:.1f} MB, opset {onnx_io.OPSET}")
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
