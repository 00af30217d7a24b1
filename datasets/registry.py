"""Describe each dataset by name before it is read: sizes, defaults, loader. Loads no torch."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, from 0 to 255

MAX_PIXELS = 2**26  # of one image file: a few kilobytes can decode to many gigabytes
MAX_ASPECT = 100  # of its sides: a line of pixels, resized by the shorter one, would be huge
SMALL_IMAGE = 64  # up to this size in pixels: the CIFAR network shape, and the data in memory
# Mean and std of training pixels as in fb.resnet.torch: ImageNet's from 0 to 1, CIFAR's to 255.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10 = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
CIFAR100 = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)
SYNTHETIC = (127.5,) * 3, (64.0,) * 3


@dataclass(frozen=True)
class Dataset:
    """Describe a dataset before it is read, and name the function that reads it."""

    name: str
    loader: str  # "module:function" in this package; returns an `InMemoryDataset`
    image_size: int  # height and width in pixels; the default if the size can be chosen
    num_classes: int | None = None  # default of a generated dataset; None if only the data tells
    num_images: tuple[int, int] | None = None  # training and test; None if only the data tells
    statistics: Statistics | None = None  # published, per channel; None: computed from the images
    flip: bool = True  # a mirrored image still shows its class
    augment: bool = True  # default of `--augment`
    valid_size: int = 0  # default of `--validSize`
    num_epochs: int | None = None  # default of `--nEpochs` up to 64 pixels; None: the network's
    marks_augmentation: bool = False  # names of augmented runs get the + of the paper's tables
    is_image_folder: bool = False  # images are files, `train/CLASS/IMAGE` and `val/CLASS/IMAGE`
    is_named_by_directory: bool = False  # the directory's name identifies the dataset
    is_generated: bool = False  # `--nImages`, `--nClasses` and `--imageSize` set its size

    @property
    def fixed_size(self) -> int | None:
        """Return height and width in pixels; None if the size can be chosen."""
        return None if self.is_image_folder or self.is_generated else self.image_size

    def is_read_from_disk(self, image_size: int) -> bool:
        """Tell whether images of this size are decoded from their files in every epoch."""
        return self.is_image_folder and image_size > SMALL_IMAGE

    def statistics_at(self, image_size: int, channels: int = 3) -> Statistics | None:
        """Return constant mean and std; None if the training images determine them.

        Constants of RGB say nothing of other channels, unless they are the same for all three.
        """
        found = self.statistics
        if self.is_read_from_disk(image_size):
            of_imagenet = IMAGENET_MEAN, IMAGENET_STD
            found = tuple(tuple(255 * value for value in values) for values in of_imagenet)
        if found is None or channels == 3:
            return found
        is_of_all = all(len({*values}) == 1 for values in found)
        return tuple(values[:1] * channels for values in found) if is_of_all else None

    def import_loader(self) -> Callable:
        """Import the function that reads the dataset, and with it the libraries it needs."""
        module, function = self.loader.split(":")
        return getattr(importlib.import_module(f"datasets.{module}"), function)


_ALL = (
    # name, loader, image size, classes, (training, test) images, statistics
    Dataset("cifar10", "cifar:cifar10", 32, 10, (50_000, 10_000), CIFAR10, marks_augmentation=True),
    Dataset(
        "cifar100", "cifar:cifar100", 32, 100, (50_000, 10_000), CIFAR100, marks_augmentation=True
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
        "imagenet", "image_folder:load_folder", 224, 1000, (1_281_167, 50_000), is_image_folder=True
    ),
    Dataset(
        "folder", "image_folder:load_folder", 224, is_image_folder=True, is_named_by_directory=True
    ),
    Dataset("digits", "digits:digits", 8, 10, (1_437, 360), flip=False, augment=False),
    Dataset("synthetic", "synthetic:synthetic", 32, 10, None, SYNTHETIC, is_generated=True),
)
DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in _ALL}
