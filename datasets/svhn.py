"""Read SVHN with torchvision; as in the paper, `train` and `extra` are the training set."""

from pathlib import Path

import torch
from torchvision.datasets import SVHN

from datasets.download import fetch
from datasets.memory_loader import ImageTensors, InMemoryDataset
from errors import DataError, quoted


def svhn(root: Path) -> InMemoryDataset:
    """Read 604,388 training and 26,032 test images of the ten digits."""
    train, extra, test = (_read(root, split) for split in ("train", "extra", "test"))
    pixels = torch.cat([train.pixels, extra.pixels])
    labels = torch.cat([train.labels, extra.labels])
    return InMemoryDataset(ImageTensors(pixels, labels), test, [str(i) for i in range(10)])


def _read(root: Path, split: str) -> ImageTensors:
    url, filename, md5 = SVHN.split_list[split]
    path = fetch(url, root / filename, md5)
    try:
        part = SVHN(str(root), split=split)
    except Exception as error:  # scipy raises many types on a file that it cannot parse
        raise DataError(
            f"cannot read {path}: {error}", f"delete {quoted(path)} and run again"
        ) from error
    pixels = torch.from_numpy(part.data).permute(0, 2, 3, 1).contiguous()  # (N, 32, 32, 3)
    return ImageTensors(pixels, torch.from_numpy(part.labels))
