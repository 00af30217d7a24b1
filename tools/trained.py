"""A trained network from wherever it lies, and image files as it is evaluated on them.

What classify, extract_features and export share: reading a network with its settings, classes and
statistics; the images that a command line names; the output file.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import opts
from errors import CheckpointError, DataError, StorageError, UsageError
from flags import Flag, Reader, as_text, boolean, text
from tools import command

if TYPE_CHECKING:
    import torch

SOURCES = """CHECKPOINT is a run directory (its newest checkpoint is taken), a checkpoint_*.pt, a
model_*.pt in its run directory, an ONNX file of tools.export, or plain weights (of torchvision or
timm, a .t7, a model_*.pt on its own) together with main.py's flags for their network, such as
--dataset imagenet --depth 121."""
CLASSES = Flag(
    "classes",
    text,
    None,
    "file with the name of a class on each line, or the data.json of a run, for plain weights",
    "those in CHECKPOINT, else numbers",
)
OVERWRITE = Flag("overwrite", boolean, False, "replace an output file that is there", bare="true")
MODEL_FILES = ("model_last.pt", "model_best.pt")
# Settings of a run that say nothing about what its network computes, or only on that machine.
OF_THE_RUN = (*opts.OF_ONE_CALL, "data", "nGPU", "epochNumber", "retrain", "resetClassifier")


@dataclass(frozen=True)
class Facts:
    """What a network was trained on.

    Args:
        classes: names in the order of its outputs.
        mean, std: per channel, of pixels from 0 to 255; None where they are not known.
    """

    classes: list[str]
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass(frozen=True)
class Source:
    """What a file or a run directory holds of a network.

    Args:
        weights: its state dict, or one of another program's.
        settings: main.py's flags as text by name; {} where they are not known.
        facts: None where they are not known.
    """

    weights: dict
    settings: dict[str, str]
    facts: Facts | None


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode on its device.

    Args:
        classes: names in the order of its outputs.
        mean, std: per channel, of pixels from 0 to 255, with which it was trained.
    """

    model: "torch.nn.Module"
    opt: SimpleNamespace
    classes: list[str]
    mean: list[float]
    std: list[float]
    device: "torch.device"

    @property
    def dtype(self) -> "torch.dtype":
        """Of its weights and logits."""
        return self.model.classifier.weight.dtype

    @property
    def num_crops(self) -> int:
        """Rows of a batch for each image."""
        return 10 if self.opt.tenCrop else 1

    def batches(
        self, paths: list[str], bad: "Unreadable"
    ) -> Iterator[tuple["torch.Tensor", list[int]]]:
        """Image files as --testOnly has them: the same pipeline, order and batches.

        Yields:
            images: (n * num_crops, 3, H, W), normalised, on the device.
            places: which of the paths they are; those that cannot be read are left out.
        """
        import datasets

        few = len(paths) <= self.opt.batchSize  # starting workers would take longer
        opt = SimpleNamespace(**vars(self.opt) | ({"nThreads": 0} if few else {}))
        samples = [(path, place) for place, path in enumerate(paths)]
        found = datasets.evaluation(opt, samples, self.device, (self.mean, self.std), bad)
        for images, places in found.batches(epoch=0):
            if len(places):
                yield images, places.tolist()

    def logits(self, images: "torch.Tensor") -> "torch.Tensor":
        """(n * num_crops, 3, H, W) -> (n, classes), in the precision of the settings."""
        import torch

        import train

        with torch.no_grad(), train.autocast(self.device, self.opt.precision):
            return self.of_images(self.model(images).to(self.dtype))

    def of_images(self, rows: "torch.Tensor") -> "torch.Tensor":
        """(n * num_crops, C) -> (n, C): the mean over the crops of each image."""
        import train

        return train.mean_over_crops(rows, self.num_crops)


class Unreadable:
    """Says which images cannot be read, a line each, and lets the others go on."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, reason: str) -> None:
        """Report one."""
        self.count += 1
        error = DataError(f"cannot read image {reason}", "replace or remove the file")
        print(error.report(), file=sys.stderr)

    def compare(self) -> None:
        """At the end of a pass: there is no other process to compare with."""

    @property
    def code(self) -> int:
        """The exit code of a tool that has gone on without them."""
        return DataError.code if self.count else 0


# ------------------------------------------------------------------------------------- the network


def load(path: Path, network: list[str] | tuple = (), classes: Path | None = None) -> Trained:
    """The network of a run, a checkpoint, an exported file or plain weights, ready to be used.

    Args:
        network: flags of main.py; they win over the settings that `path` holds.
        classes: a file of names, or the data.json of a run, instead of what `path` holds.

    Raises:
        CheckpointError: missing, damaged, or no weights for this network.
        UsageError: what the network is, or what it expects, is said nowhere.
    """
    check_there(path)
    source = read(path)
    if not source.settings and not network:
        fix = "add main.py's flags for their network, such as --dataset imagenet --depth 121"
        raise UsageError(f"{path} holds weights and not what network they are of", fix)
    opt = settings(source, network)
    facts = read_classes(classes) if classes else source.facts
    return _build(opt, source.weights, facts, classes or path)


def _build(opt: SimpleNamespace, weights: dict, facts: Facts | None, place: Path) -> Trained:
    import torch

    import datasets
    import devices
    import kernels
    import models

    num_classes = count_classes(weights, opt.nClasses)
    facts = facts or Facts([str(number) for number in range(num_classes)])
    if len(facts.classes) != num_classes:
        what = f"{place} has {len(facts.classes)} classes, the weights have {num_classes}"
        raise UsageError(what, "name the classes of these weights")
    known = (facts.mean, facts.std) if facts.mean else datasets.published_statistics(opt)
    if known is None:
        what = f"mean and deviation of the images that {opt.dataset} weights expect are not known"
        raise UsageError(what, "add --classes RUN/data.json, of the run that they are from")
    device = devices.select(opt.nGPU)
    devices.configure(opt.cudnn, opt.tf32)
    ops, _ = kernels.select(opt.kernels, device, opt.precision)
    dtype = torch.float64 if opt.precision == "double" else torch.float32
    model = models.create(opt, num_classes, ops)
    model = model.to(device, dtype, memory_format=torch.channels_last)
    models.load_weights(model, weights)
    mean, std = known
    return Trained(model.eval(), opt, facts.classes, list(mean), list(std), device)


def read_command(argv: list[str], flags: dict[str, Flag]) -> command.Command:
    """The command line of a tool that takes a checkpoint and images.

    Raises:
        UsageError: a flag is wrong, or something is not named.
    """
    asked = command.read(argv, flags, operands="checkpoint", network=True)
    if len(asked.operands) < 2:
        fix = "name images, or directories of them, after the checkpoint"
        raise UsageError("no image", fix)
    return asked


def check_there(path: Path) -> None:
    """Raise CheckpointError when there is no `path`, before anything is loaded."""
    if not path.exists():
        raise CheckpointError(
            f"no such file or directory: {path}", "name a run directory or a file of weights"
        )


def read(path: Path) -> Source:
    """What a run directory or a file holds.

    Raises:
        CheckpointError: missing, damaged or no weights.
        UsageError: the settings that lie with them are none.
    """
    if path.suffix == ".onnx":
        return _from_onnx(path)
    state = _checkpoint(path)
    if state:
        given = {name: as_text(value) for name, value in state["settings"].items()}
        return Source(state["model"], given, as_facts(state["data"], path))

    import checkpoints

    weights = checkpoints.load_weights(path)
    config, data = (path.parent / name for name in ("config.yaml", "data.json"))
    if path.name not in MODEL_FILES or not config.is_file():
        return Source(weights, {}, None)
    return Source(weights, read_settings(config), read_classes(data) if data.is_file() else None)


def _checkpoint(path: Path) -> dict | None:
    """The state in a checkpoint, or in the newest valid one of a directory; None: it is none."""
    import resume
    import runlog

    wanted = SimpleNamespace(save=path.parent, resume=path, testOnly=True)
    try:
        return resume.find(wanted, runlog.warn)
    except CheckpointError as error:
        models = [name for name in MODEL_FILES if (path / name).is_file()]
        if models:
            (what, _) = error.problems[0]
            raise CheckpointError(what, f"name {path / models[0]}") from error
        if path.is_dir() or path.name.startswith("checkpoint_"):
            raise
    return None


def _from_onnx(path: Path) -> Source:
    """Of an ONNX file that tools.export did not write, the weights alone."""
    from tools import onnx_files

    weights, metadata = onnx_files.read(path)
    if not metadata:
        return Source(weights, {}, None)
    try:
        facts = as_facts(json.loads(metadata["data"]), path)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".yaml") as config:
            config.write(metadata["settings"])
            config.flush()
            return Source(weights, read_settings(Path(config.name)), facts)
    except (KeyError, ValueError, RecursionError, UsageError) as error:
        what = f"{path} has strange metadata: {str(error)[:100]}"
        raise CheckpointError(what, "use another file") from error


def settings(source: Source, network: list[str] | tuple) -> SimpleNamespace:
    """The settings of a network: those given over those of its run."""
    given = {flag.partition("=")[0].removeprefix("--") for flag in network}
    kept = {} if "config" in given else source.settings
    known = [
        f"--{name}={value}"
        for name, value in kept.items()
        if value and name not in given and name not in OF_THE_RUN
    ]
    opt = opts.parse([*known, *network])
    if opt.optMemory == "auto":  # levels are about training
        opt.optMemory = opts.FLAGS["optMemory"].default
    return opt


def read_settings(path: Path) -> dict[str, str]:
    """The flags in a config file, as text by name.

    Raises:
        UsageError: it cannot be read, or has other flags than main.py.
    """
    reader = Reader(opts.FLAGS)
    written = reader.yaml_file(path)
    reader.add(written)  # so that what is wrong is said with its line
    if reader.problems:
        raise UsageError.of(reader.problems)
    return {name: value for name, value, _ in written}


def count_classes(weights: dict, wanted: int | None) -> int:
    """Outputs of the classifier, the last matrix among some weights.

    Raises:
        CheckpointError: there is none, or it has not as many as wanted.
    """
    matrices = [tensor for tensor in weights.values() if tensor.dim() == 2]
    if not matrices:
        raise CheckpointError("these weights have no classifier", "use those of a whole network")
    found = len(matrices[-1])
    if wanted not in (None, found):
        raise CheckpointError(
            f"the weights have {found} classes, nClasses is {wanted}", "leave out --nClasses"
        )
    return found


# ------------------------------------------------------------------------ classes and statistics


def read_classes(path: Path) -> Facts:
    """Class names from a text file of one a line, or all facts from a run's data.json.

    Raises:
        UsageError: it cannot be read or holds none.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return as_facts(json.loads(content), path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "name a file") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not text, or not JSON", "name another file") from error
    classes = content.splitlines()
    if not classes or not all(name.strip() for name in classes):
        raise UsageError(f"{path} has a line without a name", "write the name of a class on each")
    return Facts(classes)


def as_facts(data: object, path: Path) -> Facts:
    """The classes and statistics among the facts that a run writes down about its data.

    Raises:
        UsageError: they are not there, or strange.
    """
    try:
        classes, mean, std = (list(data[name]) for name in ("classes", "mean", "std"))
        named = all(isinstance(name, str) for name in classes)
        statistics = [float(value) for value in (*mean, *std)]
        if not named or len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, statistics)):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"{path} holds no classes, means and deviations of a run"
        raise UsageError(what, "name the data.json of a run") from error
    return Facts(classes, statistics[:3], statistics[3:])


# ------------------------------------------------------------------------------- images and output


def check_images(operands: list[str]) -> None:
    """Raise DataError when a file or directory is not there, before anything is loaded."""
    for operand in operands:
        if not os.path.exists(operand):
            raise DataError(f"no such file or directory: {operand}", "name images or directories")


def find_images(operands: list[str]) -> list[str]:
    """The files that are named, and the image files in the directories that are, in order.

    Raises:
        DataError: one is not there, or a directory has no image.
    """
    check_images(operands)

    from datasets.folder import images_below

    paths = []
    for operand in operands:
        found = images_below(Path(operand)) if os.path.isdir(operand) else [operand]
        if not found:
            raise DataError(f"no images in {operand}", "name images or directories of them")
        paths += found
    return paths


def check_new(path: Path, overwrite: bool) -> None:
    """Raise an error when `path` cannot become an output file; write nothing.

    Raises:
        UsageError: it is there and may not be replaced.
        StorageError: it cannot be written.
    """
    if path.exists() and not (overwrite and path.is_file()):
        if path.is_file():
            raise UsageError(f"{path} is there", "name another, or add --overwrite true")
        raise UsageError(f"{path} is no file", "name another")
    if not path.parent.is_dir():
        raise StorageError(f"no directory {path.parent}", "make it, or name another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write in {path.parent}", "name another directory")
