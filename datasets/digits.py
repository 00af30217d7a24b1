"""Load scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels; no download."""

from pathlib import Path

import torch
from sklearn.datasets import load_digits

from datasets.memory_loader import ImageTensors, InMemoryDataset

TEST_EVERY = 5  # images 0, 5, 10, ... are the test set; scikit-learn has no split of its own


def digits(root: Path) -> InMemoryDataset:
    """Return 1,437 training and 360 test images of the ten digits; `root` is unused."""
    data = load_digits()
    grey = torch.from_numpy(data.images / 16 * 255).round().to(torch.uint8)  # (N, 8, 8)
    pixels, labels = grey[..., None].expand(-1, -1, -1, 3), torch.from_numpy(data.target).long()
    is_test = torch.arange(len(grey)) % TEST_EVERY == 0
    train, test = (ImageTensors(pixels[part], labels[part]) for part in (~is_test, is_test))
    return InMemoryDataset(train, test, [str(digit) for digit in range(10)])
