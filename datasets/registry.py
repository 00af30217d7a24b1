"""The datasets by name and what is known of each before it is read. Loads no torch."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, from 0 to 255

SMALL_IMAGE = 64  # up to this size in pixels: the CIFAR network shape, and the data in memory
# Of ImageNet's training pixels from 0 to 1, as in fb.resnet.torch.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Dataset:
    """What is known of a dataset before it is read, and where the code that reads it is.

    Args:
        loader: "module:function" in this package; returns an `InMemoryDataset`.
        image_size: height and width in pixels; where the size can be chosen, the default.
        num_classes: None if only the data tells; of a generated dataset the default.
        num_images: of the training and the test set; None if only the data tells.
        statistics: published mean and std per channel; None to compute those of the
            training images.
        flip: whether a mirrored image still shows its class.
        augment, valid_size: the defaults of `--augment` and `--validSize`.
        num_epochs: default of `--nEpochs` up to 64 pixels; None: the network's.
        marks_augmentation: whether the names of augmented runs get the + of the paper's tables.
        is_image_folder: whether its images are files, `train/CLASS/IMAGE` and `val/CLASS/IMAGE`.
        is_named_by_directory: whether the directory's name says which images they are.
        is_generated: whether it is as large as `--nImages`, `--nClasses` and `--imageSize` say.
    """

    name: str
    loader: str
    image_size: int
    num_classes: int | None = None
    num_images: tuple[int, int] | None = None
    statistics: Statistics | None = None
    flip: bool = True
    augment: bool = True
    valid_size: int = 0
    num_epochs: int | None = None
    marks_augmentation: bool = False
    is_image_folder: bool = False
    is_named_by_directory: bool = False
    is_generated: bool = False

    @property
    def fixed_size(self) -> int | None:
        """The only size that its images have, in pixels; None if the size can be chosen."""
        return None if self.is_image_folder or self.is_generated else self.image_size

    def is_read_from_disk(self, image_size: int) -> bool:
        """Tell whether images of this size are decoded anew each time they are used."""
        return self.is_image_folder and image_size > SMALL_IMAGE

    def statistics_at(self, image_size: int) -> Statistics | None:
        """Return mean and std that are constants; None: those of the training images."""
        if self.is_read_from_disk(image_size):
            return tuple(tuple(255 * v for v in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return self.statistics

    def import_loader(self) -> Callable:
        """Import the function that reads it, and with it the library that this takes."""
        module, function = self.loader.split(":")
        return getattr(importlib.import_module(f"datasets.{module}"), function)


DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            "cifar10",
            "cifar:cifar10",
            image_size=32,
            num_classes=10,
            num_images=(50_000, 10_000),
            statistics=((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),  # as in fb.resnet.torch
            marks_augmentation=True,
        ),
        Dataset(
            "cifar100",
            "cifar:cifar100",
            image_size=32,
            num_classes=100,
            num_images=(50_000, 10_000),
            statistics=((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),  # as in fb.resnet.torch
            marks_augmentation=True,
        ),
        Dataset(
            "svhn",
            "svhn:svhn",
            image_size=32,
            num_classes=10,
            num_images=(604_388, 26_032),
            statistics=((0.0,) * 3, (255.0,) * 3),  # pixels are divided by 255
            flip=False,
            augment=False,
            valid_size=6000,
            num_epochs=40,
        ),
        Dataset(
            "imagenet",
            "image_folder:load_folder",
            image_size=224,
            num_classes=1000,
            num_images=(1_281_167, 50_000),
            is_image_folder=True,
        ),
        Dataset(
            "folder",
            "image_folder:load_folder",
            image_size=224,
            is_image_folder=True,
            is_named_by_directory=True,
        ),
        Dataset(
            "digits",
            "digits:digits",
            image_size=8,
            num_classes=10,
            num_images=(1_437, 360),
            flip=False,
            augment=False,
        ),
        Dataset(
            "synthetic",
            "synthetic:synthetic",
            image_size=32,
            num_classes=10,
            statistics=((127.5,) * 3, (64.0,) * 3),
            is_generated=True,
        ),
    )
}
