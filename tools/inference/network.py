"""Load a trained network from any source of weights, and run it on image files as --testOnly does.

classify, extract_features and export share it; sources.py reads weights and what describes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.flag_types import Settings
from errors import UsageError
from tools import cli
from tools.inference import sources
from tools.inference.images import Unreadable, check_new, find_images
from tools.inference.sources import TrainingFacts

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoadedModel:
    """A network in evaluation mode on its device.

    Args:
        classes: names in the order of its outputs.
        mean, std: of its training images, per channel, of pixels from 0 to 255.
    """

    model: "torch.nn.Module"
    opt: Settings
    classes: list[str]
    mean: list[float]
    std: list[float]
    device: "torch.device"

    @property
    def dtype(self) -> "torch.dtype":
        """Return the type of its weights and logits."""
        return self.model.classifier.weight.dtype

    def batches(
        self, paths: list[str], unreadable: Unreadable
    ) -> Iterator[tuple["torch.Tensor", list[int]]]:
        """Read image files through the pipeline of --testOnly, in order.

        Yields:
            images: (n * crops, 3, H, W), normalised, on the device.
            indices: into `paths`, of the n images; those that cannot be read are left out.
        """
        import datasets.factory

        opt = self.opt
        if len(paths) <= opt.batchSize:  # starting workers would take longer than reading
            opt = opt.replace(nThreads=0)
        samples = [(path, index) for index, path in enumerate(paths)]
        statistics = (self.mean, self.std)
        loader = datasets.factory.evaluation_loader(
            opt, samples, self.device, statistics, unreadable, self.dtype
        )
        for images, indices in loader.batches(epoch=0):
            if len(indices):
                yield images, indices.tolist()

    def logits(self, images: "torch.Tensor") -> "torch.Tensor":
        """Map (n * crops, 3, H, W) to (n, classes), in the precision of the settings."""
        import torch

        from engine import precision

        with torch.no_grad(), precision.autocast(self.device, self.opt.precision):
            return self.mean_over_crops(self.model(images).to(self.dtype))

    def mean_over_crops(self, rows: "torch.Tensor") -> "torch.Tensor":
        """Average (n * crops, C) over the crops of each image: (n, C)."""
        import train

        return train.mean_over_crops(rows, 10 if self.opt.tenCrop else 1)


def load(
    path: Path, main_flags: list[str] | tuple = (), classes: Path | None = None
) -> LoadedModel:
    """Load the network of a run, a checkpoint, an exported file or plain weights.

    Args:
        main_flags: win over the settings in `path`.
        classes: a file of names, or the data.json of a run, in place of the classes in `path`.

    Raises:
        CheckpointError: missing, damaged, or weights of another network.
        UsageError: settings, classes or channel statistics are wrong or not known.
    """
    import torch

    import datasets.factory
    import engine.device
    import kernels.backend
    import models.factory
    import models.state_dicts
    from engine.precision import PRECISIONS

    # Read the weights, and what describes them.
    sources.check_there(path)
    source = sources.read(path)
    if not source.settings and not main_flags:
        fix = "add main.py's flags for their network, such as --dataset imagenet --depth 121"
        raise UsageError(f"{path} holds weights but does not describe their network", fix)
    opt = sources.merge_settings(source, main_flags)
    num_classes = sources.count_classes(source.weights, opt.nClasses)
    facts = sources.read_classes(classes) if classes else source.facts
    facts = facts or TrainingFacts([str(number) for number in range(num_classes)])
    if len(facts.classes) != num_classes:
        count = len(facts.classes)
        what = f"{classes or path} has {count} classes, the weights have {num_classes}"
        raise UsageError(what, "name the classes of these weights")
    statistics = facts.mean and (facts.mean, facts.std)
    statistics = statistics or datasets.factory.published_statistics(opt)
    if statistics is None:
        what = f"mean and deviation of the images that {opt.dataset} weights expect are not known"
        raise UsageError(what, "add --classes RUN/data.json, of the run that they are from")

    # Build the network as main.py does.
    device = engine.device.select(opt.nGPU)
    engine.device.configure(opt.cudnn, opt.tf32)
    ops, _ = kernels.backend.select(opt.kernels, device, opt.precision)
    model = models.factory.create(opt, num_classes, ops)
    dtype = PRECISIONS[opt.precision].dtype
    model = model.to(device, dtype, memory_format=torch.channels_last)
    models.state_dicts.load_weights(model, source.weights)
    mean, std = map(list, statistics)
    return LoadedModel(model.eval(), opt, facts.classes, mean, std, device)


def load_model_and_images(
    command: cli.Command, output: Path | None, images: list[str]
) -> tuple[LoadedModel, list[str]]:
    """Load the network that a command line names first, and list its image files.

    Paths are checked before anything heavy is loaded.

    Args:
        output: the file to be written, if any.
    """
    checkpoint, classes = Path(command.arguments[0]), command.options.classes
    if output:
        check_new(output, command.options.overwrite)
    sources.check_there(checkpoint)
    paths = find_images(images)
    return load(checkpoint, command.main_flags, classes and Path(classes)), paths
