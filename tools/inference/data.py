"""Open the dataset that a trained network's settings name, and read it in evaluation form."""

from collections.abc import Iterator
from dataclasses import replace

import torch

import datasets.factory
from cli import path_checks
from datasets.factory import DataSplits, Loader
from datasets.memory_loader import ImageTensors
from errors import CheckpointError
from experiment import console, run_data
from tools.inference.network import LoadedModel


def open_data(net: LoadedModel, training: bool = False) -> DataSplits:
    """Make the loaders of the dataset that `net.opt` names, as --testOnly makes them.

    The test set is `test`, or else `val`. `read` starts workers, these loaders have none.

    Args:
        training: also list the training images, which a test of known statistics does without.

    Raises:
        DataError: the dataset is missing, damaged or not as the settings say.
        CheckpointError: its classes are not those of the network, in order.
    """
    opt = net.opt.replace(nThreads=0, testOnly=not training, resume="none", retrain="none")
    path_checks.check(opt)
    known = net.classes if net.has_names else None
    dtype, statistics = net.model.classifier.weight.dtype, (net.mean, net.std)
    about = {"dtype": dtype, "statistics": statistics, "classes": known}
    data = datasets.factory.create(opt, net.device, console.warn, **about)
    if known:
        run_data.check_classes(data.classes, known)
    elif len(data.classes) != len(net.classes):
        what = f"the weights have {len(net.classes)} classes, the data has {len(data.classes)}"
        raise CheckpointError(what, "name the --data that they were trained on")
    return data


def read(
    net: LoadedModel, split: Loader, indices: torch.Tensor | None = None
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Read images of a split of `open_data` in evaluation form: normalised, not augmented.

    Args:
        indices: (n,) into `split.images`, in ascending order; None: those of the split.

    Yields:
        images: (n * crops, C, H, W) on the device, in the batches of --testOnly.
        numbers: of the n images, into `split.images`; files that cannot be read are left out.
    """
    images = names(split)
    if isinstance(split.images, ImageTensors):
        images = replace(split.images, labels=torch.arange(len(images), device=net.device))
    net = replace(net, unreadable=getattr(split, "unreadable", None))
    return net.batches(images, split.sampler.indices if indices is None else indices)


def labels(split: Loader) -> torch.Tensor:
    """Return the class number of each of `split.images`, (N,) int64 on the CPU."""
    if isinstance(split.images, ImageTensors):
        return split.images.labels.cpu()
    return torch.tensor([label for _, label in split.images])


def names(split: Loader, of: str = "val") -> list[str]:
    """Name each of `split.images` by its path, or of images kept in memory by the place in `of`."""
    if isinstance(split.images, ImageTensors):
        return [f"{of}[{number}]" for number in range(len(split.images))]
    return [path for path, _ in split.images]


def sample(net: LoadedModel, split: Loader, count: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Read up to `count` images of a split, spread evenly over it, of one crop each; as `read`."""
    kept = split.sampler.indices  # without those held out
    count = min(count, len(kept))
    chosen = kept[torch.arange(count, device=kept.device) * len(kept) // count]
    return read(replace(net, opt=net.opt.replace(tenCrop=False)), split, chosen)


def calibration_batches(net: LoadedModel, count: int) -> Iterator[torch.Tensor]:
    """Yield batches (n, C, H, W) of `count` training images, of one crop each; may raise as above.

    They are spread evenly over the training set, of a folder thus over its classes. Images that
    cannot be read are left out, as far as --onBadImage allows it.
    """
    split = open_data(net, training=True).train
    yield from (images for images, _ in sample(net, split, count))
