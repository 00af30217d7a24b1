"""List or load folders of images: `train/CLASS/IMAGE` and `val/CLASS/IMAGE`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from datasets.batch_sampler import BatchSampler
from datasets.decode import DEFAULTS, DecodeOptions
from datasets.file_loader import FileLoader, ImageFileDataset, UnreadableImages
from datasets.folder_checks import spelling_fix
from datasets.memory_loader import ImageTensors, InMemoryDataset
from errors import DataError

Samples = list[tuple[str, int]]


@dataclass(frozen=True)
class FolderIndex:
    """List (path, class number) of each image of both splits, and the class names."""

    train: Samples
    val: Samples
    classes: list[str]


def index_folder(root: Path) -> FolderIndex:
    """List the images below `root`.

    Raises:
        DataError: a class is empty, train and val have different classes, or a link leads to a
            directory listed before.
    """
    (train, classes), (val, others) = (_index_split(root / split) for split in ("train", "val"))
    if classes != others:
        only = {"train": {*classes} - {*others}, "val": {*others} - {*classes}}
        shown = ", ".join(
            f"only in {split}: {' '.join(sorted(only[split])[:5])}" for split in only if only[split]
        )
        what = f"train and val in {root} have different classes: {shown}"
        fix = spelling_fix(only["train"], only["val"])
        raise DataError(what, fix or "give both the same class directories")
    return FolderIndex(train, val, classes)


def _index_split(directory: Path) -> tuple[Samples, list[str]]:
    try:
        classes = sorted(entry.name for entry in directory.iterdir() if entry.is_dir())
    except OSError as error:
        raise DataError(f"{directory}: {error.strerror}", "check the directory") from error
    images = [find_image_files(directory / name) for name in classes]
    empty = [name for name, found in zip(classes, images, strict=True) if not found]
    if empty or not classes:
        what = f"no images in class {' '.join(empty[:5])}" if empty else "no class directories"
        raise DataError(f"{directory}: {what}", "put at least one image in each class directory")
    return [(path, number) for number, found in enumerate(images) for path in found], classes


def find_image_files(directory: Path) -> list[str]:
    """List the image files in a directory and its subdirectories, following links.

    Raises:
        DataError: a directory cannot be read, or a link leads to a directory listed before.
    """

    def raise_error(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}", "check the directory") from error

    folders, seen = [], set()
    for folder, _, names in os.walk(directory, onerror=raise_error, followlinks=True):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in seen:  # a loop of links would never end
            raise DataError(f"{folder} is a link to a directory listed before", "remove the link")
        seen.add((info.st_dev, info.st_ino))
        folders.append((folder, names))
    return [
        os.path.join(folder, name)
        for folder, names in sorted(folders)
        for name in sorted(names)
        if name.lower().endswith(IMG_EXTENSIONS)
    ]


def load_folder(
    root: Path,
    size: int,
    num_workers: int,
    on_bad_image: str,
    warn: Callable[[str], None],
    options: DecodeOptions = DEFAULTS,
) -> InMemoryDataset:
    """Decode a folder of images once into memory, at `size` x `size` pixels, or raise DataError."""
    index, noted = index_folder(root), {}

    def decode_all(samples: Samples) -> ImageTensors:
        batches = FileLoader(
            ImageFileDataset(samples, ResizeAndCrop(size), 0, options),
            BatchSampler(torch.arange(len(samples)), batch_size=256),
            num_workers=num_workers,
            unreadable=UnreadableImages(on_bad_image, len(samples), warn, noted=noted),
            image_size=size,
            device=torch.device("cpu"),
        )
        pixels = torch.empty(len(samples), size, size, 3, dtype=torch.uint8)
        labels = torch.empty(len(samples), dtype=torch.int64)
        count = 0
        for images, targets in batches.batches(epoch=0):
            if not len(targets):  # all were skipped
                continue
            pixels[count : count + len(targets)] = images
            labels[count : count + len(targets)] = targets
            count += len(targets)
        return ImageTensors(pixels[:count], labels[:count])

    return InMemoryDataset(decode_all(index.train), decode_all(index.val), index.classes)


class ResizeAndCrop:
    """Resize the shorter side, then crop the centre: PIL image -> (size, size, 3) uint8."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Resize and crop one image."""
        if image.size != (self.size, self.size):
            scale = self.size / min(image.size)
            width, height = (max(self.size, round(side * scale)) for side in image.size)
            left, top = (width - self.size) // 2, (height - self.size) // 2
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image))
