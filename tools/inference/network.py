"""Load a trained network from wherever it lies, and run it on image files as in evaluation.

What classify, extract_features and export share; sources.py reads what the network is, images.py
finds the images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.flag_types import Flag, Settings
from errors import UsageError
from tools import cli
from tools.inference.images import Unreadable
from tools.inference.sources import (
    TrainingFacts,
    check_there,
    count_classes,
    read,
    read_classes,
    settings,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoadedModel:
    """A network in evaluation mode on its device.

    Args:
        classes: names in the order of its outputs.
        mean, std: per channel, of pixels from 0 to 255, with which it was trained.
    """

    model: "torch.nn.Module"
    opt: Settings
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
        self, paths: list[str], bad: Unreadable
    ) -> Iterator[tuple["torch.Tensor", list[int]]]:
        """Image files as --testOnly has them: the same pipeline, order and batches.

        Yields:
            images: (n * num_crops, 3, H, W), normalised, on the device.
            places: which of the paths they are; those that cannot be read are left out.
        """
        import datasets.factory

        opt = self.opt
        if len(paths) <= opt.batchSize:  # starting workers would take longer
            opt = opt.replace(nThreads=0)
        samples = [(path, place) for place, path in enumerate(paths)]
        known = (self.mean, self.std)
        found = datasets.factory.evaluation_loader(
            opt, samples, self.device, known, bad, self.dtype
        )
        for images, places in found.batches(epoch=0):
            if len(places):
                yield images, places.tolist()

    def logits(self, images: "torch.Tensor") -> "torch.Tensor":
        """(n * num_crops, 3, H, W) -> (n, classes), in the precision of the settings."""
        import torch

        from engine import precision

        with torch.no_grad(), precision.autocast(self.device, self.opt.precision):
            return self.of_images(self.model(images).to(self.dtype))

    def of_images(self, rows: "torch.Tensor") -> "torch.Tensor":
        """(n * num_crops, C) -> (n, C): the mean over the crops of each image."""
        import train

        return train.mean_over_crops(rows, self.num_crops)


def load(
    path: Path, main_flags: list[str] | tuple = (), classes: Path | None = None
) -> LoadedModel:
    """The network of a run, a checkpoint, an exported file or plain weights, ready to be used.

    Args:
        main_flags: flags of main.py; they win over the settings that `path` holds.
        classes: a file of names, or the data.json of a run, instead of what `path` holds.

    Raises:
        CheckpointError: missing, damaged, or no weights for this network.
        UsageError: what the network is, or what it expects, is said nowhere.
    """
    check_there(path)
    source = read(path)
    if not source.settings and not main_flags:
        fix = "add main.py's flags for their network, such as --dataset imagenet --depth 121"
        raise UsageError(f"{path} holds weights and not what network they are of", fix)
    opt = settings(source, main_flags)
    facts = read_classes(classes) if classes else source.facts
    return _build(opt, source.weights, facts, classes or path)


def _build(opt: Settings, weights: dict, facts: TrainingFacts | None, place: Path) -> LoadedModel:
    import torch

    import datasets.factory
    import engine.device
    import kernels.backend
    import models.factory
    import models.state_dicts
    from engine.precision import PRECISIONS

    num_classes = count_classes(weights, opt.nClasses)
    facts = facts or TrainingFacts([str(number) for number in range(num_classes)])
    if len(facts.classes) != num_classes:
        what = f"{place} has {len(facts.classes)} classes, the weights have {num_classes}"
        raise UsageError(what, "name the classes of these weights")
    known = (facts.mean, facts.std) if facts.mean else datasets.factory.published_statistics(opt)
    if known is None:
        what = f"mean and deviation of the images that {opt.dataset} weights expect are not known"
        raise UsageError(what, "add --classes RUN/data.json, of the run that they are from")
    device = engine.device.select(opt.nGPU)
    engine.device.configure(opt.cudnn, opt.tf32)
    ops, _ = kernels.backend.select(opt.kernels, device, opt.precision)
    model = models.factory.create(opt, num_classes, ops)
    dtype = PRECISIONS[opt.precision].dtype
    model = model.to(device, dtype, memory_format=torch.channels_last)
    models.state_dicts.load_weights(model, weights)
    mean, std = known
    return LoadedModel(model.eval(), opt, facts.classes, list(mean), list(std), device)


def parse(argv: list[str], flags: dict[str, Flag]) -> cli.Command:
    """The command line of a tool that takes a checkpoint and images.

    Raises:
        UsageError: a flag is wrong, or something is not named.
    """
    asked = cli.read(argv, flags, arguments="checkpoint", main_flags=True)
    if len(asked.arguments) < 2:
        fix = "name images, or directories of them, after the checkpoint"
        raise UsageError("no image", fix)
    return asked
