"""CIFAR-10 and CIFAR-100, read by torchvision from the official archives."""

from pathlib import Path

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from datasets.download import fetch, unpack
from datasets.memory_loader import ImageTensors, InMemoryDataset
from errors import DataError


def cifar10(root: Path) -> InMemoryDataset:
    """50,000 training and 10,000 test images of 10 classes."""
    return _load(CIFAR10, root)


def cifar100(root: Path) -> InMemoryDataset:
    """50,000 training and 10,000 test images of 100 classes."""
    return _load(CIFAR100, root)


def _load(dataset_class: type[CIFAR10], root: Path) -> InMemoryDataset:
    if not (root / dataset_class.base_folder).is_dir():
        unpack(
            fetch(dataset_class.url, root / dataset_class.filename, dataset_class.tgz_md5),
            dataset_class.base_folder,
        )
    try:
        parts = {train: dataset_class(str(root), train=train) for train in (True, False)}
    except RuntimeError as error:  # torchvision found a file missing or with another sum
        folder = root / dataset_class.base_folder
        raise DataError(f"damaged files in {folder}", f"delete {folder} and run again") from error
    return InMemoryDataset(_images(parts[True]), _images(parts[False]), parts[True].classes)


def _images(part: CIFAR10) -> ImageTensors:
    pixels = torch.from_numpy(part.data).contiguous()  # (N, 32, 32, 3), stored channel by channel
    return ImageTensors(pixels, torch.tensor(part.targets))
