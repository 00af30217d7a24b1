"""Read CIFAR-10 and CIFAR-100 from the official archives, with torchvision."""

from functools import partial
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from datasets.download import fetch, unpack
from datasets.memory_loader import ImageTensors, InMemoryDataset
from errors import DataError, quoted


def _load(dataset_class: type[CIFAR10], root: Path) -> InMemoryDataset:
    """Read 50,000 training and 10,000 test images of 10 or 100 classes."""
    if not (root / dataset_class.base_folder).is_dir():
        path = root / dataset_class.filename
        archive = fetch(dataset_class.url, path, dataset_class.tgz_md5)
        unpack(archive, dataset_class.base_folder)
    try:
        parts = {train: dataset_class(str(root), train=train) for train in (True, False)}
    except RuntimeError as error:  # a file is missing or has another MD5
        folder = root / dataset_class.base_folder
        raise DataError(
            f"damaged files in {folder}", f"delete {quoted(folder)} and run again"
        ) from error
    return InMemoryDataset(_images(parts[True]), _images(parts[False]), parts[True].classes)


def _images(part: CIFAR10) -> ImageTensors:
    pixels = torch.from_numpy(part.data).contiguous()  # (N, 32, 32, 3), stored channel by channel
    return ImageTensors(pixels, torch.tensor(part.targets))


cifar10, cifar100 = partial(_load, CIFAR10), partial(_load, CIFAR100)
