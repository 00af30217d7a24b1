"""What the loader of a small-image dataset returns."""

from dataclasses import dataclass

from datasets.batches import Images


@dataclass(frozen=True)
class SmallSet:
    """A dataset in memory.

    Args:
        train, test: the two parts as they were published.
        classes: name of each class number.
        mean, std: per channel, of pixels from 0 to 255; None to take them from the training
            images.
        flip: whether a mirrored image still shows its class.
    """

    train: Images
    test: Images
    classes: list[str]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    flip: bool = True
