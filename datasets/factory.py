"""dataset name -> training, validation and test batches. The only file here that sees `opt`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from datasets.batch_sampler import Deal
from datasets.file_loader import BadImages, FileBatches, ImageFiles
from datasets.fingerprints import of_files, of_images
from datasets.memory_loader import Augmentation, Batches, Images, Plan, SmallSet, channel_statistics
from datasets.registry import SYNTHETIC_CLASSES
from datasets.rng import permutation
from errors import DataError
from fileio import limits

FILES, FILES_OF_WORKER = 64, 48  # that are open at once, and the pipes of each worker
Statistics = tuple[list[float], list[float]]  # mean and deviation per channel, from 0 to 255
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
        train: None where nothing is to be trained and its images were not needed.
        val: measured after every epoch. Held out of training with `validSize`; else the test set.
        test: measured once, at the end, with `validSize`; else None.
        facts: what a checkpoint must find again: classes, counts, statistics, the split, digests.
    """

    train: Batches | FileBatches | None
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
    statistics: Statistics | None = None,
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
    if _stays_in_files(opt):
        data = _large(opt, device, warn, replica)
    elif opt.dataset == "folder" and opt.testOnly and statistics:
        data = _test_images(opt, device, statistics, warn, replica)
    else:
        data = _small(opt, device, _load_small(opt, warn), statistics, replica)
    for split in (data.train, data.val, data.test):
        if isinstance(split, FileBatches):
            split.start()
    data.facts |= {
        "classes": data.classes,
        "train": data.train.deal.num_images if data.train else None,
        "val": data.val.deal.num_images,
        "test": data.test.deal.num_images if data.test else None,
    }
    return data


def evaluation(
    opt: SimpleNamespace,
    samples: Sequence[tuple[str, int]],
    device: torch.device,
    statistics: Statistics,
    bad: BadImages,
    replica: Replica = Replica(),
    indices: Tensor | None = None,
) -> FileBatches:
    """Image files, in their order, as a network of these settings is evaluated on them.

    Args:
        samples: (path, number) of each image; batches have the numbers as targets.
        statistics: means and deviations that the network was trained with.
        bad: told of the images that cannot be read.
        indices: which of the samples; None: all.
    """
    crops = 10 if opt.tenCrop else 1
    transform, normalise = _pipeline(opt, device, statistics)
    chosen = torch.arange(len(samples)) if indices is None else indices
    return FileBatches(
        ImageFiles(samples, transform, opt.manualSeed),
        _deal(chosen, max(1, opt.batchSize // crops), None, replica),
        num_workers=opt.nThreads,
        bad=bad,
        image_size=opt.imageSize,
        normalise=normalise,
        device=device,
    )


def published_statistics(opt: SimpleNamespace) -> Statistics | None:
    """Means and deviations that are constants; None where they are those of training images."""
    if _stays_in_files(opt):
        from datasets.transforms import MEAN, STD

        return [255 * value for value in MEAN], [255 * value for value in STD]
    if opt.dataset in ("cifar10", "cifar100"):
        from datasets import cifar

        kinds = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}
        return cifar.STATISTICS[kinds[opt.dataset]]
    if opt.dataset == "svhn":
        from datasets import svhn

        return svhn.STATISTICS
    return None


def _stays_in_files(opt: SimpleNamespace) -> bool:
    """Whether images are decoded anew each time they are used."""
    return opt.imagenetShape and opt.dataset in ("imagenet", "folder")


def _dtype(opt: SimpleNamespace) -> torch.dtype:
    return torch.float64 if opt.precision == "double" else torch.float32


def _pipeline(
    opt: SimpleNamespace, device: torch.device, statistics: Statistics
) -> tuple[Callable, Callable]:
    """Evaluation: PIL image -> bytes, and a batch of those -> what the network gets."""
    if _stays_in_files(opt):
        from datasets import transforms

        crop = transforms.ten_crops if opt.tenCrop else transforms.validation
        return crop(opt.imageSize), transforms.Normalise(device, _dtype(opt))
    from datasets.image_folder import ToSize

    def normalise(pixels: Tensor) -> Tensor:
        count = torch.arange(len(pixels), device=device)
        images, deal = Images(pixels, count), Deal(count, len(pixels))
        mean, std = statistics
        return Batches(images, deal, mean=mean, std=std, dtype=_dtype(opt)).cut(Plan(count))[0]

    return ToSize(opt.imageSize), normalise


def _test_images(
    opt: SimpleNamespace,
    device: torch.device,
    statistics: Statistics,
    warn: Callable[[str], None],
    replica: Replica,
) -> Data:
    """The test images of a folder, for a network that knows its statistics."""
    from datasets.image_folder import listing

    files = listing(Path(opt.data))
    _check_classes(opt, files.classes)
    bad = BadImages(opt.onBadImage, len(files.val), warn, replica.everyone)
    mean, std = statistics
    return Data(
        train=None,
        val=evaluation(opt, files.val, device, statistics, bad, replica),
        test=None,
        classes=files.classes,
        facts={
            "mean": list(mean),
            "std": list(std),
            "test_set": of_files(files.val, Path(opt.data) / "val"),
        },
    )


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
    from datasets.image_folder import small_folder

    return small_folder(root, opt.imageSize, opt.nThreads, opt.onBadImage, warn)


def _small(
    opt: SimpleNamespace,
    device: torch.device,
    data: SmallSet,
    statistics: Statistics | None,
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
        return Batches(
            images, deal, mean=mean, std=std, dtype=_dtype(opt), augmentation=augmentation
        )

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
    warn: Callable[[str], None],
    replica: Replica,
) -> Data:
    from datasets import transforms
    from datasets.image_folder import listing

    files = listing(Path(opt.data))
    _check_classes(opt, files.classes)
    kept, held_out = split_indices(len(files.train), opt.validSize, opt.manualSeed)
    statistics = published_statistics(opt)

    def bad(count: int) -> BadImages:
        return BadImages(opt.onBadImage, count, warn, replica.everyone)

    def evaluated(samples: Sequence[tuple[str, int]], indices: Tensor) -> FileBatches:
        among = bad(len(indices))
        return evaluation(opt, samples, device, statistics, among, replica, indices)

    train = FileBatches(
        ImageFiles(files.train, transforms.training(opt.imageSize, opt.augment), opt.manualSeed),
        _deal(kept, opt.batchSize, opt.manualSeed, replica),
        num_workers=opt.nThreads,
        bad=bad(len(kept)),
        image_size=opt.imageSize,
        normalise=transforms.Normalise(device, _dtype(opt)),
        device=device,
    )
    published = evaluated(files.val, torch.arange(len(files.val)))
    mean, std = statistics
    return Data(
        train=train,
        val=evaluated(files.train, held_out) if opt.validSize else published,
        test=published if opt.validSize else None,
        classes=files.classes,
        facts={
            "mean": mean,
            "std": std,
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
