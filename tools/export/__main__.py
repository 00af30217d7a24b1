"""Write the weights of a trained network for other programs, and check the file beforehand.

usage: python -m tools.export CHECKPOINT --to TARGET --output FILE [options] [main.py's flags]

torchvision and timm build their network, and its logits are compared in double precision; ONNX
Runtime runs the ONNX file; safetensors are read back and compared. An ONNX or safetensors file
holds settings, classes and statistics as well, and is a CHECKPOINT to all tools.
"""

import copy
import importlib
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import opts
from cli.flag_types import Flag, Settings, boolean, broken, pathname, text
from errors import CheckpointError, RunError, UsageError
from experiment import console
from tools import cli
from tools.inference import network, onnx_io, sources

if TYPE_CHECKING:
    import torch

TARGETS = ("onnx", "safetensors", "torchvision", "timm", "weights")
FLAGS = (
    Flag("to", text, None, "what to write: an ONNX file; safetensors; a state dict that "
         "torchvision's or timm's network loads; or this program's, for --retrain", "none",
         choices=TARGETS),
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
LIMIT_DOUBLE = 1e-9  # of the largest logit, between two networks of the same weights


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


def compare(
    name: str,
    ours: Callable[["torch.Tensor"], "torch.Tensor"],
    theirs: Callable[["torch.Tensor"], "torch.Tensor"],
    batches: Iterable["torch.Tensor"],
    limit: float,
    error: type[RunError] = RunError,
) -> None:
    """Print how far the logits of two networks differ on the same images.

    Args:
        name: of their network and of the images, for messages.
        limit: largest difference allowed, as a fraction of the largest logit.
        error: class of the error that is raised beyond the limit.

    Raises:
        CheckpointError: one of our logits is not finite.
        RunError: the difference exceeds the limit.
    """
    import torch

    count = 0
    difference, largest = torch.zeros(2, dtype=torch.float64)
    for images in batches:
        with torch.no_grad():
            wanted, found = ours(images).double(), theirs(images).double()
        if not torch.isfinite(wanted).all():
            what = "the network's logits are not finite"
            raise CheckpointError(what, "use weights of a network that was trained")
        count += len(images)
        difference = torch.maximum(difference, (found - wanted).abs().max())
        largest = torch.maximum(largest, wanted.abs().max())
    if not count:  # no image was given, or none can be read
        return
    relative = difference / largest
    off = f"logits at most {difference:.2e} off, {relative:.1e} of the largest"
    console.info(f"{name}, {count} images: {off}")
    if not relative <= limit:  # also if it is NaN
        what = f"{name}: logits differ by {relative:.1e} of the largest, beyond rounding"
        raise error(what, "nothing was written; report it, or use another --to")


def random_images(opt: Settings) -> list["torch.Tensor"]:
    """Draw normalised noise (n, C, size, size), in batches of two sizes."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (opt.nChannels, opt.imageSize, opt.imageSize)
    return [torch.randn(count, *shape, generator=generator) for count in (1, 3)]


def check_onnx(net: network.LoadedModel, content: bytes, paths: list[str]) -> None:
    """Compare ONNX Runtime with PyTorch on random images and on files."""
    import onnxruntime
    import torch

    from datasets.file_loader import translate_worker_errors

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run_onnx(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"images": images.contiguous().numpy()})
        return torch.from_numpy(logits)

    model = copy.deepcopy(net.model).float().cpu()
    compare("ONNX Runtime on noise", model, run_onnx, random_images(net.opt), LIMIT)
    with translate_worker_errors():
        of_files = (images.float().cpu() for images, _ in net.batches(paths))
        compare("ONNX Runtime on files", model, run_onnx, of_files, LIMIT)


def check_peer(net: network.LoadedModel, to: str) -> None:
    """Load the weights into torchvision's or timm's network, and compare it with ours.

    Raises:
        UsageError: the library does not have this network.
        RunError: the library is not installed.
    """
    opt, weights, fix = net.opt, net.model.state_dict(), "use --to onnx or --to weights"
    if opt.netType not in ("densenet", "resnet") or not opt.imagenetShape:
        where = "" if opt.imagenetShape else f" for images of {opt.imageSize} pixels"
        raise UsageError(f"{to} has no {opt.netType}{where}", fix)
    try:
        library = importlib.import_module(f"{to}.models.{opt.netType}")
    except ImportError as error:
        fix = f"pip install {to}, or use --to onnx"
        raise RunError(f"tools.export needs {to} to compare with", fix) from error
    if opt.netType == "densenet":
        # timm's has 2k channels in its first convolution, and no argument for another number.
        channels = (opt.initChannels,) if to == "torchvision" else ()
        args = (opt.growthRate, opt.stages, *channels)
        peer = library.DenseNet(*args, num_classes=len(net.classes))
    else:
        block = library.Bottleneck if opt.bottleneck else library.BasicBlock
        peer = library.ResNet(block, list(opt.stages), num_classes=len(net.classes))
    try:
        peer.double().load_state_dict(weights, strict=True)  # double first: no weight is rounded
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:100]
        raise UsageError(f"{to} has no such {opt.netType}: {first}", fix) from error
    ours = copy.deepcopy(net.model).cpu().double()
    images = (batch.double() for batch in random_images(opt))
    compare(f"{to} in double precision", ours, peer.eval(), images, LIMIT_DOUBLE, UsageError)


def run(argv: list[str]) -> int:
    """Write what the command line asks for; return the exit code."""
    command = parse(argv)
    options, output = command.options, Path(command.options.output)
    if options.to == "onnx":
        onnx_io.require("onnx", "onnxscript", *(["onnxruntime"] * options.check))
    folders = [options.images] if options.images else []
    net, paths = network.load_model_and_images(command, output, folders)

    from fileio import atomic, safetensors, tensor_files

    metadata = {
        "settings": opts.as_yaml(net.opt, exclude=NOT_EXPORTED),
        "data": json.dumps({"classes": net.classes, "mean": net.mean, "std": net.std}),
    }
    if options.to == "onnx":
        content = onnx_io.as_onnx(net.model, net.opt.imageSize, metadata)
        if options.check:
            check_onnx(net, content, paths)
        atomic.atomic_write(output, content)
        console.info(f"{output}: {len(content) / 1e6:.1f} MB, opset {onnx_io.OPSET}")
        # An unreadable image sets the exit code, but tells nothing about the file.
        return net.exit_code
    weights = tensor_files.on_cpu(net.model.state_dict())
    if options.to == "safetensors":
        atomic.atomic_write(output, safetensors.to_bytes(weights, metadata))
    else:
        if options.to != "weights":
            check_peer(net, options.to)
        tensor_files.save_weights(output, weights)
    console.info(f"{output}: {len(weights)} tensors of {len(net.classes)} classes")
    return 0


main = partial(TOOL.run, run)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
