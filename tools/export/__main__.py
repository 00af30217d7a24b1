"""Trained weights for other programs, and back: `python -m tools.export CHECKPOINT --to onnx`.

Nothing is written before it has been read back and compared: torchvision and timm by building their
network and comparing logits in double precision, ONNX by running it in ONNX Runtime.
"""

import copy
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
from tools.inference.images import OVERWRITE, Unreadable, check_new, find_images

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
# What of a run's settings is of no use to whoever gets its network.
PRIVATE = (*sources.OF_THE_RUN, "nThreads", "optMemory", "timeout", "keep", "saveEvery")
LIMIT = 1e-4  # of the largest logit, between ONNX Runtime and PyTorch in single precision
LIMIT_DOUBLE = 1e-9  # of the largest logit, between two networks of the same weights
SEED, BATCHES = 0, (1, 3)  # of random images


def parse(argv: list[str]) -> cli.Command:
    """The command line; its operand is the checkpoint.

    Raises:
        UsageError: a flag is wrong or missing.
    """
    asked = cli.read(argv, FLAGS, arguments="checkpoint", main_flags=True)
    problems = [
        (f"no --{name}", f"add --{name} {value}")
        for name, value in (("to", " or ".join(TARGETS)), ("output", "FILE"))
        if getattr(asked.options, name) is None
    ]
    if len(asked.arguments) > 1:
        problems.append((f"more than one checkpoint: {asked.arguments[1]}", "name one"))
    if asked.options.images and asked.options.to not in (None, "onnx"):
        problems.append((f"images has no effect with --to {asked.options.to}", "leave it out"))
    if problems:
        raise UsageError.from_problems(problems)
    return asked


# ------------------------------------------------------------------------- torchvision and timm


def torchvision_network(opt: Settings, num_classes: int) -> "torch.nn.Module":
    """torchvision's network of the shape that the settings describe."""
    from torchvision.models import densenet, resnet

    if opt.netType == "densenet":
        return densenet.DenseNet(
            opt.growthRate, opt.stages, opt.initChannels, num_classes=num_classes
        )
    block = resnet.Bottleneck if opt.bottleneck else resnet.BasicBlock
    return resnet.ResNet(block, list(opt.stages), num_classes)


def timm_network(opt: Settings, num_classes: int) -> "torch.nn.Module":
    """timm's network of the shape that the settings describe.

    Raises:
        RunError: timm is not installed.
    """
    try:
        from timm.models import densenet, resnet
    except ImportError as error:
        fix = "pip install timm, or use --to torchvision"
        raise RunError("tools.export needs timm to compare with", fix) from error
    if opt.netType == "densenet":
        return densenet.DenseNet(opt.growthRate, opt.stages, num_classes=num_classes)
    block = resnet.Bottleneck if opt.bottleneck else resnet.BasicBlock
    return resnet.ResNet(block, list(opt.stages), num_classes=num_classes)


def foreign_weights(
    net: network.LoadedModel, to: str, build: Callable[[Settings, int], "torch.nn.Module"]
) -> dict[str, "torch.Tensor"]:
    """The state dict for the network that `build` makes, after comparing what both compute.

    Raises:
        UsageError: there is no such network there.
    """
    weights = net.model.state_dict()
    possible = "use --to onnx or --to weights"
    if net.opt.netType not in ("densenet", "resnet") or not net.opt.imagenetShape:
        where = "" if net.opt.imagenetShape else f" for images of {net.opt.imageSize} pixels"
        raise UsageError(f"{to} has no {net.opt.netType}{where}", possible)
    theirs = build(net.opt, len(net.classes))
    try:
        theirs.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:100]
        raise UsageError(f"{to} has no such {net.opt.netType}: {first}", possible) from error
    ours, theirs = in_double(net.model), in_double(theirs)
    batches = random_images(net.opt.imageSize)
    *_, difference = compared(ours, theirs, (images.double() for images in batches))
    if not difference <= LIMIT_DOUBLE:  # also when it is not a number
        what = f"{to}'s {net.opt.netType} computes logits that are {difference:.1e} of them off"
        raise UsageError(what, possible)
    print(
        f"{to} computes the same logits in double precision: at most {difference:.1e} of them off"
    )
    return weights


def in_double(model: "torch.nn.Module") -> "torch.nn.Module":
    """A copy on the CPU, in evaluation mode and double precision."""
    return copy.deepcopy(model).cpu().double().eval()


def compared(
    ours: Callable[["torch.Tensor"], "torch.Tensor"],
    theirs: Callable[["torch.Tensor"], "torch.Tensor"],
    batches: Iterable["torch.Tensor"],
) -> tuple[int, float, float]:
    """Two networks on the same images.

    Returns:
        Images, and the largest difference of two logits: as it is, and as a share of the largest
        logit. Not a number where one of theirs is none.

    Raises:
        CheckpointError: one of ours is none.
    """
    import torch

    count = 0
    furthest, largest = torch.zeros(2, dtype=torch.float64)
    for images in batches:
        with torch.no_grad():
            wanted, found = ours(images).double(), theirs(images).double()
        if not torch.isfinite(wanted).all():
            what = "the network's logits are not finite"
            raise CheckpointError(what, "use weights of a network that was trained")
        count += len(images)
        furthest = torch.maximum(furthest, (found - wanted).abs().max())
        largest = torch.maximum(largest, wanted.abs().max())
    return count, furthest.item(), (furthest / largest).item()


def random_images(size: int) -> list["torch.Tensor"]:
    """Normalised noise (n, 3, size, size), in batches of two sizes."""
    import torch

    draws = torch.Generator().manual_seed(SEED)
    return [torch.randn(count, 3, size, size, generator=draws) for count in BATCHES]


# ------------------------------------------------------------------------------------------ ONNX


def metadata(net: network.LoadedModel) -> dict[str, str]:
    """What an ONNX file says of its network: main.py's flags, and what it was trained on."""
    facts = {"classes": net.classes, "mean": net.mean, "std": net.std}
    settings = opts.as_yaml(net.opt, exclude=PRIVATE)
    return {"settings": settings, "data": json.dumps(facts)}


def check_onnx(net: network.LoadedModel, content: bytes, paths: list[str]) -> int:
    """Print how far ONNX Runtime is from PyTorch on random images and on those in files.

    Returns:
        The exit code: not 0 when an image cannot be read.

    Raises:
        RunError: it is further than rounding explains.
    """
    from datasets.file_loader import translate_worker_errors
    from tools.export import onnx_io

    theirs, ours = onnx_io.runner(content), copy.deepcopy(net.model).float().cpu()
    _report("random images", ours, theirs, random_images(net.opt.imageSize))
    bad = Unreadable()
    if paths:
        with translate_worker_errors():
            batches = (images.float().cpu() for images, _ in net.batches(paths, bad))
            _report("images", ours, theirs, batches)
    return bad.code


def _report(name: str, ours: Callable, theirs: Callable, batches: Iterable) -> None:
    import torch

    def by_onnx(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(theirs(images.contiguous().numpy()))

    count, furthest, share = compared(ours, by_onnx, batches)
    print(f"ONNX Runtime on {count} {name}: logits at most {furthest:.2e} off, {share:.1e} of them")
    if not share <= LIMIT:  # also when it is not a number
        what = f"ONNX Runtime's logits are {share:.1e} of them off, which rounding does not explain"
        raise RunError(what, "nothing was written; report it")


# ------------------------------------------------------------------------------------ command line


def run(argv: list[str]) -> int:
    """Write what the command line asks for; the exit code."""
    asked = parse(argv)
    options, checkpoint, output = (
        asked.options,
        Path(asked.arguments[0]),
        Path(asked.options.output),
    )
    check_new(output, options.overwrite)
    sources.check_there(checkpoint)
    paths = find_images([options.images] if options.images else [])

    from fileio import atomic
    from tools.export import onnx_io

    if options.to == "onnx":
        onnx_io.needed("onnx", "onnxscript", *(["onnxruntime"] * options.check))
    # In plain modules on the CPU, whatever the run trained with.
    forced = {"nGPU": "0", "optMemory": "0", "kernels": "torch"}
    others = [flag for flag in asked.main_flags if flag[2:].partition("=")[0] not in forced]
    flags = [*others, *(f"--{name}={value}" for name, value in forced.items())]
    net = network.load(checkpoint, flags, options.classes and Path(options.classes))
    if options.to == "onnx":
        content = onnx_io.as_onnx(net.model, net.opt.imageSize, metadata(net))
        code = check_onnx(net, content, paths) if options.check else 0
        atomic.atomic_write(output, content)  # an image that cannot be read says nothing of it
        print(f"{output}: {len(content) / 1e6:.1f} MB, opset {onnx_io.OPSET}")
        return code

    from fileio import tensor_files

    builds = {"torchvision": torchvision_network, "timm": timm_network}
    build = builds.get(options.to)
    weights = foreign_weights(net, options.to, build) if build else net.model.state_dict()
    tensor_files.save_weights(output, weights)
    print(f"{output}: {len(weights)} tensors of {len(net.classes)} classes")
    return 0


def main(argv: list[str]) -> int:
    """Write trained weights for another program."""
    return cli.run(argv, USAGE, FLAGS, run, main_flags=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
