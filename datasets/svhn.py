"""Street View House Numbers, read by torchvision: train and extra together, as in the paper."""

from pathlib import Path

import torch
from torchvision.datasets import SVHN

from datasets.download import fetch
from datasets.memory_loader import ImageTensors, InMemoryDataset
from errors import DataError


def svhn(root: Path) -> InMemoryDataset:
    """604,388 training and 26,032 test images of the ten digits."""
    parts = {split: _read(root, split) for split in ("train", "extra", "test")}
    train = ImageTensors(
        torch.cat([parts["train"].pixels, parts["extra"].pixels]),
        torch.cat([parts["train"].labels, parts["extra"].labels]),
    )
    classes = [str(digit) for digit in range(10)]
    return InMemoryDataset(train, parts["test"], classes)


def _read(root: Path, split: str) -> ImageTensors:
    url, filename, md5 = SVHN.split_list[split]
    path = fetch(url, root / filename, md5)
    try:
        part = SVHN(str(root), split=split)
    except Exception as error:  # scipy's reader raises many kinds on a file it cannot parse
        raise DataError(f"cannot read {path}: {error}", f"delete {path} and run again") from error
    pixels = torch.from_numpy(part.data).permute(0, 2, 3, 1).contiguous()  # (N, 32, 32, 3)
    return ImageTensors(pixels, torch.from_numpy(part.labels))
