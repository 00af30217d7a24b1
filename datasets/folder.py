"""Folders of images, one directory a class: `train/CLASS/IMAGE` and `val/CLASS/IMAGE`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from datasets.batches import Images
from datasets.files import FileBatches, ImageFiles
from datasets.small import SmallSet
from errors import DataError

Samples = list[tuple[str, int]]


@dataclass(frozen=True)
class Listing:
    """The files of a dataset: (path, class number) of each image, and the classes' names."""

    train: Samples
    val: Samples
    classes: list[str]


def listing(root: Path) -> Listing:
    """List the images below `root`.

    Raises:
        DataError: a class is empty, or train and val do not have the same classes.
    """
    train, val = (_list(root / split) for split in ("train", "val"))
    if train.classes != val.classes:
        only = {
            split: sorted(set(mine.classes) - set(other.classes))[:5]
            for split, mine, other in (("train", train, val), ("val", val, train))
        }
        shown = ", ".join(
            f"only in {split}: {' '.join(only[split])}" for split in only if only[split]
        )
        raise DataError(
            f"train and val in {root} have different classes: {shown}",
            "give both the same class directories",
        )
    return Listing(train.samples, val.samples, train.classes)


def _list(directory: Path) -> ImageFolder:
    try:
        return ImageFolder(str(directory))
    except (OSError, ValueError) as error:  # torchvision: no class, or classes without an image
        what = str(error).split(" Supported extensions")[0]
        raise DataError(
            f"{directory}: {what}", "put at least one image in each class directory"
        ) from error


def small_folder(
    root: Path, size: int, num_workers: int, on_bad_image: str, warn: Callable[[str], None]
) -> SmallSet:
    """A folder whose images are decoded once into memory, at `size` pixels.

    Its statistics are those of its training images.

    Raises:
        DataError: as `listing`, or an image cannot be read.
    """
    files = listing(root)
    train, test = (
        _decode_all(samples, size, num_workers, on_bad_image, warn)
        for samples in (files.train, files.val)
    )
    return SmallSet(train, test, files.classes, None, None)


def _decode_all(
    samples: Samples, size: int, num_workers: int, on_bad_image: str, warn: Callable[[str], None]
) -> Images:
    batches = FileBatches(
        ImageFiles(samples, _ToSize(size), seed=0),
        torch.arange(len(samples)),
        batch_size=256,
        seed=None,
        num_workers=num_workers,
        on_bad_image=on_bad_image,
        warn=warn,
        device=torch.device("cpu"),
    )
    pixels = torch.empty(len(samples), size, size, 3, dtype=torch.uint8)
    labels = torch.empty(len(samples), dtype=torch.int64)
    count = 0
    for images, targets in batches.batches(epoch=0):
        pixels[count : count + len(targets)] = images
        labels[count : count + len(targets)] = targets
        count += len(targets)
    return Images(pixels[:count], labels[:count])


class _ToSize:
    """PIL image -> (size, size, 3) uint8: the shorter side resized to it, the centre cut out."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if image.size != (self.size, self.size):
            scale = self.size / min(image.size)
            width, height = (max(self.size, round(side * scale)) for side in image.size)
            left, top = (width - self.size) // 2, (height - self.size) // 2
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image))
