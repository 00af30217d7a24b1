"""Generate random images of any size, number and number of classes, for benchmarks and tests."""

import torch

from datasets.memory_loader import ImageTensors, InMemoryDataset
from datasets.rng import generator

NOISE = 32  # std of the noise on a class's pattern, of 255


def synthetic(
    num_images: int, num_classes: int, size: int, seed: int, channels: int = 3
) -> InMemoryDataset:
    """Generate `num_images` training and a fifth as many test images of `size` x `size` pixels.

    An image is four coloured squares and noise. Each class has its own colours, so that a network
    learns them in a few steps.
    """
    rng = generator("synthetic", seed, num_classes, size)
    colours = torch.randint(32, 224, (num_classes, 2, 2, channels), generator=rng)
    square = torch.arange(size) * 2 // size  # (size,) 0 in the first half, 1 in the second
    patterns = colours[:, square][:, :, square]  # (num_classes, size, size, channels)
    train, test = (
        _noisy(patterns.to(torch.int16), count, rng)
        for count in (num_images, max(1, num_images // 5))
    )
    return InMemoryDataset(train, test, [f"pattern {i}" for i in range(num_classes)])


def _noisy(patterns: torch.Tensor, count: int, rng: torch.Generator) -> ImageTensors:
    labels = torch.randint(len(patterns), (count,), generator=rng)
    pixels = torch.empty(count, *patterns.shape[1:], dtype=torch.uint8)
    for part in torch.arange(count).split(1024):  # float noise takes four times the memory
        noise = torch.randn(len(part), *patterns.shape[1:], generator=rng) * NOISE
        pixels[part] = (patterns[labels[part]] + noise).clamp(0, 255).to(torch.uint8)
    return ImageTensors(pixels, labels)
