"""dataset name -> training, validation and test batches. The only file here that sees `opt`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from datasets.batch_sampler import Deal, split_indices
from datasets.file_loader import BadImages, FileBatches, ImageFiles
from datasets.fingerprints import of_files, of_images
from datasets.memory_loader import (
    Augmentation,
    Batches,
    Images,
    SmallSet,
    channel_statistics,
    normalised,
)
from datasets.registry import DATASETS, Statistics
from distributed.launcher import ALONE, Place
from errors import DataError
from fileio import limits

FILES, FILES_OF_WORKER = 64, 48  # that are open at once, and the pipes of each worker
PAD_SHARE = 8  # random crops shift by up to an eighth of the image: 4 pixels of 32
Samples = Sequence[tuple[str, int]]  # (path, class number) of each image
Everyone = Callable[[list[str]], list[list[str]]]


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
    *,
    dtype: torch.dtype = torch.float32,
    statistics: Statistics | None = None,
    place: Place = ALONE,
    everyone: Everyone = lambda found: [found],
) -> Data:
    """Read, check and split the dataset that the settings name.

    Args:
        warn: called with remarks for the user.
        dtype: of normalised images.
        statistics: means and deviations that a trained network expects, instead of the data's.
        place: the process that the batches are for.
        everyone: exchanges plain values between all processes; `World.everyone`.

    Raises:
        DataError: it is missing, damaged or not as the settings say.
    """
    try:
        limits.allow_open_files(FILES + FILES_OF_WORKER * opt.nThreads)
    except OSError as error:
        raise DataError(error.strerror, "raise it with ulimit -n, or lower --nThreads") from error
    dataset = DATASETS[opt.dataset]
    in_files = dataset.stays_in_files(opt.imageSize)
    # A network that knows its statistics is tested without its training images being decoded.
    only_tests = dataset.in_folders and opt.testOnly and statistics and not in_files
    if in_files or not statistics:
        statistics = dataset.statistics_at(opt.imageSize)
    splits = _Splits(opt, device, dtype, place, statistics)
    if in_files or only_tests:
        data = _from_files(splits, only_tests, warn, everyone)
    else:
        data = _from_memory(splits, _load(opt, warn))
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
    samples: Samples,
    device: torch.device,
    statistics: Statistics,
    bad: BadImages,
    dtype: torch.dtype = torch.float32,
) -> FileBatches:
    """Batch image files, in their order, as a network of these settings is evaluated on them.

    Args:
        samples: (path, number) of each image; batches have the numbers as targets.
        statistics: means and deviations that the network was trained with.
        bad: told of the images that cannot be read.
    """
    splits = _Splits(opt, device, dtype, ALONE, statistics)
    return splits.in_files(samples, torch.arange(len(samples)), bad)


def published_statistics(opt: SimpleNamespace) -> Statistics | None:
    """Return means and deviations that are the same for all weights, None where they are not."""
    dataset = DATASETS[opt.dataset]
    return None if dataset.is_generated else dataset.statistics_at(opt.imageSize)


@dataclass(frozen=True)
class _Splits:
    """Makes the batches of splits, all normalised and dealt out in the same way.

    A split for training is shuffled and augmented; any other is for evaluation.
    """

    opt: SimpleNamespace
    device: torch.device
    dtype: torch.dtype
    place: Place
    statistics: Statistics | None

    def in_memory(self, images: Images, indices: Tensor, training: bool = False) -> Batches:
        """Batch some of the images that lie on the device."""
        mean, std = self.statistics
        flip, pad = DATASETS[self.opt.dataset].flip, self.opt.imageSize // PAD_SHARE
        return Batches(
            images,
            self._deal(indices, training),
            mean=mean,
            std=std,
            dtype=self.dtype,
            augmentation=Augmentation(pad, flip) if training and self.opt.augment else None,
        )

    def in_files(
        self, samples: Samples, indices: Tensor, bad: BadImages, training: bool = False
    ) -> FileBatches:
        """Batch some image files, which worker processes decode anew each time."""
        transform, normalise = self._pipeline(training)
        return FileBatches(
            ImageFiles(samples, transform, self.opt.manualSeed),
            self._deal(indices, training),
            num_workers=self.opt.nThreads,
            bad=bad,
            image_size=self.opt.imageSize,
            normalise=normalise,
            device=self.device,
        )

    @property
    def facts(self) -> dict:
        """The statistics, as a checkpoint has them."""
        mean, std = self.statistics
        return {"mean": list(mean), "std": list(std)}

    def _deal(self, indices: Tensor, training: bool) -> Deal:
        if training:
            return Deal(indices, self.opt.batchSize, self.opt.manualSeed, self.place)
        # Evaluation computes the same batches on any number of processes.
        crops = 10 if self.opt.tenCrop else 1
        return Deal(indices, max(1, self.opt.batchSize // crops), None, self.place, whole=True)

    def _pipeline(self, training: bool) -> tuple[Callable, Callable]:
        """PIL image -> one tensor, and a batch of those -> what the network gets."""
        opt = self.opt
        if DATASETS[opt.dataset].stays_in_files(opt.imageSize):
            from datasets import transforms

            normalise = transforms.Normalise(self.device, self.dtype)
            if training:
                return transforms.training(opt.imageSize, opt.augment), normalise
            crop = transforms.ten_crops if opt.tenCrop else transforms.validation
            return crop(opt.imageSize), normalise
        from datasets.image_folder import ToSize

        mean, std = (
            torch.tensor(value, dtype=self.dtype, device=self.device) for value in self.statistics
        )
        return (
            ToSize(opt.imageSize),
            lambda pixels: normalised(pixels, mean, std).permute(0, 3, 1, 2),
        )


def _load(opt: SimpleNamespace, warn: Callable[[str], None]) -> SmallSet:
    """Read a dataset into memory."""
    dataset = DATASETS[opt.dataset]
    load = dataset.import_loader()
    if dataset.is_generated:
        classes = opt.nClasses or dataset.num_classes
        return load(opt.nImages, classes, opt.imageSize, opt.manualSeed)
    if dataset.in_folders:
        return load(Path(opt.data), opt.imageSize, opt.nThreads, opt.onBadImage, warn)
    return load(Path(opt.data))


def _from_memory(splits: _Splits, data: SmallSet) -> Data:
    """Put all images on the device, where their batches are cut out."""
    opt = splits.opt
    _check_classes(opt, data.classes)
    data.check()
    kept, held_out = split_indices(len(data.train), opt.validSize, opt.manualSeed)
    digests = {"training_set": of_images(data.train), "test_set": of_images(data.test)}
    if splits.statistics is None:
        splits = replace(splits, statistics=channel_statistics(data.train.pixels, kept))
    train, test = data.train.to(splits.device), data.test.to(splits.device)
    facts = splits.facts | {"held_out": held_out.tolist()} | digests
    return Data(*_divided(splits.in_memory, train, test, kept, held_out), data.classes, facts)


def _from_files(
    splits: _Splits, only_tests: bool, warn: Callable[[str], None], everyone: Everyone
) -> Data:
    """Leave the images in their files."""
    from datasets.image_folder import listing

    opt, root = splits.opt, Path(splits.opt.data)
    files = listing(root)
    _check_classes(opt, files.classes)

    def batches(samples: Samples, indices: Tensor, training: bool = False) -> FileBatches:
        bad = BadImages(opt.onBadImage, len(indices), warn, everyone)
        return splits.in_files(samples, indices, bad, training)

    test_set = {"test_set": of_files(files.val, root / "val")}
    if only_tests:
        tested = batches(files.val, torch.arange(len(files.val)))
        return Data(None, tested, None, files.classes, splits.facts | test_set)
    kept, held_out = split_indices(len(files.train), opt.validSize, opt.manualSeed)
    training_set = {"training_set": of_files(files.train, root / "train")}
    facts = splits.facts | {"held_out": held_out.tolist()} | training_set | test_set
    parts = _divided(batches, files.train, files.val, kept, held_out)
    return Data(*parts, files.classes, facts)


def _divided(
    batches: Callable,
    train: Images | Samples,
    test: Images | Samples,
    kept: Tensor,
    held_out: Tensor,
) -> tuple:
    """Batch what trains, what is measured after every epoch, and what once at the end."""
    tested = batches(test, torch.arange(len(test)))
    trained = batches(train, kept, training=True)
    return (trained, batches(train, held_out), tested) if len(held_out) else (trained, tested, None)


def _check_classes(opt: SimpleNamespace, classes: list[str]) -> None:
    if opt.nClasses not in (None, len(classes)):
        raise DataError(
            f"nClasses is {opt.nClasses} but {opt.dataset} has {len(classes)} classes",
            f"use --nClasses {len(classes)} or leave it out",
        )
