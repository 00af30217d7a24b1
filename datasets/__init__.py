"""dataset name -> training, validation and test batches. The only file here that sees `opt`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import limits
from datasets.batches import Augmentation, Batches, channel_statistics
from datasets.deal import Deal
from datasets.digests import of_files, of_images
from datasets.files import BadImages, FileBatches, ImageFiles, worker_failures
from datasets.randomness import permutation
from datasets.small import SmallSet
from errors import DataError

__all__ = ["NUM_CLASSES", "SYNTHETIC_CLASSES", "Data", "create", "worker_failures"]

# Classes of the sets that have a fixed number, for describing a network without its data.
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10, "digits": 10, "imagenet": 1000}
SYNTHETIC_CLASSES = 10
FILES, FILES_OF_WORKER = 64, 48  # that are open at once, and the pipes of each worker
PAD_SHARE = 8  # random crops shift by up to an eighth of the image: 4 pixels of 32


@dataclass(frozen=True)
class Replica:
    """Which of the processes of a run data is for.

    Args:
        everyone: exchanges plain values; `distributed.World.everyone`.
    """

    rank: int = 0
    size: int = 1
    everyone: Callable[[list], list[list]] = lambda value: [value]


@dataclass
class Data:
    """The splits of a run, as batches on the training device.

    Args:
        val: measured after every epoch. Held out of training with `validSize`; else the test set.
        test: measured once, at the end, with `validSize`; else None.
        facts: what a checkpoint must find again: classes, counts, statistics, the split, digests.
    """

    train: Batches | FileBatches
    val: Batches | FileBatches
    test: Batches | FileBatches | None
    classes: list[str]
    facts: dict

    @property
    def is_resident(self) -> bool:
        """Whether all images lie on the training device."""
        return isinstance(self.train, Batches)


def create(
    opt: SimpleNamespace,
    device: torch.device,
    warn: Callable[[str], None],
    statistics: tuple[list[float], list[float]] | None = None,
    replica: Replica = Replica(),
) -> Data:
    """Read, check and split the dataset that the settings name.

    Args:
        warn: called with remarks for the user.
        statistics: means and deviations that a trained network expects, instead of the data's.

    Raises:
        DataError: it is missing, damaged or not as the settings say.
    """
    try:
        limits.allow_open_files(FILES + FILES_OF_WORKER * opt.nThreads)
    except OSError as error:
        raise DataError(error.strerror, "raise it with ulimit -n, or lower --nThreads") from error
    dtype = torch.float64 if opt.precision == "double" else torch.float32
    if opt.imagenetShape and opt.dataset in ("imagenet", "folder"):
        data = _large(opt, device, dtype, warn, replica)
    else:
        data = _small(opt, device, dtype, _load_small(opt, warn), statistics, replica)
    for split in (data.train, data.val, data.test):
        if isinstance(split, FileBatches):
            split.start()
    data.facts |= {
        "classes": data.classes,
        "train": data.train.deal.num_images,
        "val": data.val.deal.num_images,
        "test": data.test.deal.num_images if data.test else None,
    }
    return data


def _load_small(opt: SimpleNamespace, warn: Callable[[str], None]) -> SmallSet:
    # Imported here: each brings a library of its own, and a run needs one of them.
    root = Path(opt.data)
    if opt.dataset in ("cifar10", "cifar100"):
        from datasets import cifar

        return {"cifar10": cifar.cifar10, "cifar100": cifar.cifar100}[opt.dataset](root)
    if opt.dataset == "svhn":
        from datasets.svhn import svhn

        return svhn(root)
    if opt.dataset == "digits":
        from datasets.digits import digits

        return digits(root)
    if opt.dataset == "synthetic":
        from datasets.synthetic import synthetic

        classes = opt.nClasses or SYNTHETIC_CLASSES
        return synthetic(opt.nImages, classes, opt.imageSize, opt.manualSeed)
    from datasets.folder import small_folder

    return small_folder(root, opt.imageSize, opt.nThreads, opt.onBadImage, warn)


def _small(
    opt: SimpleNamespace,
    device: torch.device,
    dtype: torch.dtype,
    data: SmallSet,
    statistics: tuple[list[float], list[float]] | None,
    replica: Replica,
) -> Data:
    _check_classes(opt, data.classes)
    for split, images in (("training", data.train), ("test", data.test)):
        _check_labels(split, images.labels, len(data.classes))
    kept, held_out = split_indices(len(data.train.labels), opt.validSize, opt.manualSeed)
    digests = {"training_set": of_images(data.train), "test_set": of_images(data.test)}
    mean, std = statistics or (data.mean, data.std)
    if mean is None:
        mean, std = channel_statistics(data.train.pixels, kept)
    train, test = data.train.to(device), data.test.to(device)
    pad = opt.imageSize // PAD_SHARE
    augmentation = Augmentation(pad, data.flip) if opt.augment else None

    def batches(images, indices: Tensor, seed: int | None = None, augmentation=None) -> Batches:
        deal = _deal(indices, opt.batchSize, seed, replica)
        return Batches(images, deal, mean=mean, std=std, dtype=dtype, augmentation=augmentation)

    everything = torch.arange(len(test.labels))
    return Data(
        train=batches(train, kept, opt.manualSeed, augmentation),
        val=batches(train, held_out) if opt.validSize else batches(test, everything),
        test=batches(test, everything) if opt.validSize else None,
        classes=data.classes,
        facts={"mean": list(mean), "std": list(std), "held_out": held_out.tolist(), **digests},
    )


def _deal(indices: Tensor, batch_size: int, seed: int | None, replica: Replica) -> Deal:
    """Without a seed it is for evaluation, which computes the same batches on any number."""
    return Deal(indices, batch_size, seed, replica.rank, replica.size, whole=seed is None)


def _large(
    opt: SimpleNamespace,
    device: torch.device,
    dtype: torch.dtype,
    warn: Callable[[str], None],
    replica: Replica,
) -> Data:
    from datasets import transforms
    from datasets.folder import listing

    files = listing(Path(opt.data))
    _check_classes(opt, files.classes)
    kept, held_out = split_indices(len(files.train), opt.validSize, opt.manualSeed)
    evaluate = (transforms.ten_crops if opt.tenCrop else transforms.validation)(opt.imageSize)

    def batches(samples: Sequence, transform, indices: Tensor, seed: int | None) -> FileBatches:
        crops = 10 if opt.tenCrop and seed is None else 1
        return FileBatches(
            ImageFiles(samples, transform, opt.manualSeed),
            _deal(indices, max(1, opt.batchSize // crops), seed, replica),
            num_workers=opt.nThreads,
            bad=BadImages(opt.onBadImage, len(indices), warn, replica.everyone),
            image_size=opt.imageSize,
            normalise=transforms.Normalise(device, dtype),
            device=device,
        )

    everything = torch.arange(len(files.val))
    published = batches(files.val, evaluate, everything, None)
    return Data(
        train=batches(
            files.train, transforms.training(opt.imageSize, opt.augment), kept, opt.manualSeed
        ),
        val=batches(files.train, evaluate, held_out, None) if opt.validSize else published,
        test=published if opt.validSize else None,
        classes=files.classes,
        facts={
            "mean": [255 * value for value in transforms.MEAN],
            "std": [255 * value for value in transforms.STD],
            "held_out": held_out.tolist(),
            "training_set": of_files(files.train, Path(opt.data) / "train"),
            "test_set": of_files(files.val, Path(opt.data) / "val"),
        },
    )


def split_indices(size: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which training images train and which are held out, in ascending order.

    Raises:
        DataError: nothing would be left to train on.
    """
    if held_out >= size:
        raise DataError(
            f"validSize {held_out} of {size} training images leaves none", f"use less than {size}"
        )
    order = permutation(size, "held out", seed)
    return order[held_out:].sort().values, order[:held_out].sort().values


def _check_classes(opt: SimpleNamespace, classes: list[str]) -> None:
    if opt.nClasses not in (None, len(classes)):
        raise DataError(
            f"nClasses is {opt.nClasses} but {opt.dataset} has {len(classes)} classes",
            f"use --nClasses {len(classes)} or leave it out",
        )


def _check_labels(split: str, labels: Tensor, num_classes: int) -> None:
    if labels.numel() == 0:
        raise DataError(f"there are no {split} images", "check the dataset")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= num_classes:
        bad = low if low < 0 else high
        raise DataError(
            f"{split} label {bad} is not a class from 0 to {num_classes - 1}", "check the dataset"
        )
