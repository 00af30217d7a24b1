"""Write trained weights for other programs: `python -m tools.export CHECKPOINT --to onnx`.

A file is checked before it is written: torchvision and timm build their network and its logits are
compared in double precision; ONNX Runtime runs the ONNX file.
"""

import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import opts
from cli.flag_types import Flag, Settings, boolean, text
from errors import CheckpointError, RunError, UsageError
from tools import cli
from tools.inference import network, sources
from tools.inference.images import OVERWRITE, Unreadable

if TYPE_CHECKING:
    import torch

TARGETS = ("onnx", "torchvision", "timm", "weights")
FLAGS = {
    flag.name: flag
    for flag in (
        Flag("to", text, None, "what to write: an ONNX file; a state dict that torchvision's or "
             "timm's network loads; or this program's, for --retrain", "none", choices=TARGETS),
        Flag("output", text, None, "file to write", "none"),
        Flag("check", boolean, True, "compare what ONNX Runtime computes with PyTorch"),
        Flag("images", text, None, "directory of images to compare on besides random ones", "none"),
        sources.CLASSES,
        OVERWRITE,
    )
}  # fmt: skip
USAGE = f"""usage: python -m tools.export CHECKPOINT --to TARGET --output FILE [options]
                               [main.py's flags]

Writes the weights of a trained network for other programs. An ONNX file holds settings, classes
and statistics as well, and is a CHECKPOINT to the other tools and to --to weights.
{sources.SOURCES}"""
# Settings that an exported network does not carry.
NOT_EXPORTED = (*sources.RUN_ONLY, "nThreads", "optMemory", "timeout", "keep", "saveEvery")
# Exported from plain modules on the CPU, whatever the run trained with.
ON_CPU = {"nGPU": "0", "optMemory": "0", "kernels": "torch"}
LIMIT = 1e-4  # of the largest logit, between ONNX Runtime and PyTorch in single precision
LIMIT_DOUBLE = 1e-9  # of the largest logit, between two networks of the same weights
SEED, BATCHES = 0, (1, 3)  # of random images


def parse(argv: list[str]) -> cli.Command:
    """Read the command line; its argument is the checkpoint.

    Raises:
        UsageError: a flag is wrong or missing.
    """
    command = cli.read(argv, FLAGS, arguments="checkpoint", main_flags=True)
    problems = [
        (f"no --{name}", f"add --{name} {value}")
        for name, value in (("to", " or ".join(TARGETS)), ("output", "FILE"))
        if getattr(command.options, name) is None
    ]
    if len(command.arguments) > 1:
        problems.append((f"more than one checkpoint: {command.arguments[1]}", "name one"))
    if command.options.images and command.options.to not in (None, "onnx"):
        problems.append((f"images has no effect with --to {command.options.to}", "leave it out"))
    if problems:
        raise UsageError.from_problems(problems)
    flags = [flag for flag in command.main_flags if flag[2:].partition("=")[0] not in ON_CPU]
    flags += [f"--{name}={value}" for name, value in ON_CPU.items()]
    return dataclasses.replace(command, main_flags=flags)


# --------------------------------------------------------------------------- torchvision and timm


def peer_network(to: str, opt: Settings, num_classes: int) -> "torch.nn.Module":
    """Build torchvision's or timm's network of these settings.

    Raises:
        RunError: timm is not installed.
    """
    if to == "torchvision":
        from torchvision.models import densenet, resnet
    else:
        try:
            from timm.models import densenet, resnet
        except ImportError as error:
            fix = "pip install timm, or use --to torchvision"
            raise RunError("tools.export needs timm to compare with", fix) from error

    if opt.netType == "densenet":
        # timm's has 2k channels in its first convolution, and no argument for another number.
        channels = (opt.initChannels,) if to == "torchvision" else ()
        return densenet.DenseNet(opt.growthRate, opt.stages, *channels, num_classes=num_classes)
    block = resnet.Bottleneck if opt.bottleneck else resnet.BasicBlock
    return resnet.ResNet(block, list(opt.stages), num_classes=num_classes)


def peer_weights(net: network.LoadedModel, to: str) -> dict[str, "torch.Tensor"]:
    """Return the state dict for torchvision or timm, once both compute the same logits.

    Raises:
        UsageError: the library does not have this network.
    """
    weights, fix = net.model.state_dict(), "use --to onnx or --to weights"
    if net.opt.netType not in ("densenet", "resnet") or not net.opt.imagenetShape:
        where = "" if net.opt.imagenetShape else f" for images of {net.opt.imageSize} pixels"
        raise UsageError(f"{to} has no {net.opt.netType}{where}", fix)
    peer = peer_network(to, net.opt, len(net.classes))
    try:
        peer.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:100]
        raise UsageError(f"{to} has no such {net.opt.netType}: {first}", fix) from error

    ours, peer = (copy.deepcopy(model).cpu().double().eval() for model in (net.model, peer))
    images = (batch.double() for batch in random_images(net.opt.imageSize))
    *_, difference = compare(ours, peer, images)
    if not difference <= LIMIT_DOUBLE:  # also if it is NaN
        what = f"{to}'s {net.opt.netType} computes other logits, by {difference:.1e} of the largest"
        raise UsageError(what, fix)
    print(f"{to} computes the same logits in double precision: {difference:.1e} of the largest off")
    return weights


def compare(
    ours: Callable[["torch.Tensor"], "torch.Tensor"],
    theirs: Callable[["torch.Tensor"], "torch.Tensor"],
    batches: Iterable["torch.Tensor"],
) -> tuple[int, float, float]:
    """Compare the logits of two networks on the same images.

    Returns:
        Number of images, largest difference, and largest difference as a share of the largest
        logit: NaN if one of theirs is NaN.

    Raises:
        CheckpointError: one of ours is not finite.
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
    return count, difference.item(), (difference / largest).item()


def random_images(size: int) -> list["torch.Tensor"]:
    """Draw normalised noise (n, 3, size, size), in batches of two sizes."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(count, 3, size, size, generator=generator) for count in BATCHES]


# ------------------------------------------------------------------------------------------ ONNX


def metadata(net: network.LoadedModel) -> dict[str, str]:
    """Return the metadata of an ONNX file: main.py's flags, classes and channel statistics."""
    facts = {"classes": net.classes, "mean": net.mean, "std": net.std}
    settings = opts.as_yaml(net.opt, exclude=NOT_EXPORTED)
    return {"settings": settings, "data": json.dumps(facts)}


def check_onnx(net: network.LoadedModel, content: bytes, paths: list[str]) -> int:
    """Compare ONNX Runtime with PyTorch on random images and on files, and print the differences.

    Returns:
        The exit code: not 0 if an image cannot be read.

    Raises:
        RunError: a difference exceeds rounding.
    """
    import torch

    from datasets.file_loader import translate_worker_errors
    from tools.inference import onnx_io

    run_onnx, model = onnx_io.runner(content), copy.deepcopy(net.model).float().cpu()
    unreadable = Unreadable()
    inputs = {"random images": random_images(net.opt.imageSize)}
    if paths:
        batches = net.batches(paths, unreadable)
        inputs["images"] = (images.float().cpu() for images, _ in batches)
    for name, batches in inputs.items():
        with translate_worker_errors():
            count, difference, share = compare(
                model,
                lambda images: torch.from_numpy(run_onnx(images.contiguous().numpy())),
                batches,
            )
        print(
            f"ONNX Runtime on {count} {name}: logits at most {difference:.2e} off, "
            f"{share:.1e} of the largest"
        )
        if not share <= LIMIT:  # also if it is NaN
            what = f"ONNX Runtime's logits differ by {share:.1e} of the largest, beyond rounding"
            raise RunError(what, "nothing was written; report it")
    return unreadable.code


# ----------------------------------------------------------------------------------- command line


def run(argv: list[str]) -> int:
    """Write what the command line asks for; return the exit code."""
    command = parse(argv)
    options, output = command.options, Path(command.options.output)

    from tools.inference import onnx_io

    if options.to == "onnx":
        onnx_io.require("onnx", "onnxscript", *(["onnxruntime"] * options.check))
    folders = [options.images] if options.images else []
    net, paths = network.load_model_and_images(command, output, folders)

    from fileio import atomic, tensor_files

    if options.to == "onnx":
        content = onnx_io.as_onnx(net.model, net.opt.imageSize, metadata(net))
        # An unreadable image sets the exit code, but tells nothing about the file: write it.
        code = check_onnx(net, content, paths) if options.check else 0
        atomic.atomic_write(output, content)
        print(f"{output}: {len(content) / 1e6:.1f} MB, opset {onnx_io.OPSET}")
        return code
    own_names = options.to == "weights"
    weights = net.model.state_dict() if own_names else peer_weights(net, options.to)
    tensor_files.save_weights(output, weights)
    print(f"{output}: {len(weights)} tensors of {len(net.classes)} classes")
    return 0


def main(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    return cli.run(argv, USAGE, FLAGS, run, main_flags=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
