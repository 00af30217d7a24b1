"""dataset name -> training, validation and test batches. The only file here that sees `opt`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from datasets.batch_sampler import BatchSampler, split_indices
from datasets.file_loader import FileLoader, ImageFileDataset, UnreadableImages
from datasets.fingerprints import hash_files, hash_images
from datasets.memory_loader import (
    Augmentation,
    ImageTensors,
    InMemoryDataset,
    MemoryLoader,
    channel_statistics,
    normalise_pixels,
)
from datasets.registry import DATASETS, Statistics
from distributed.launcher import SINGLE_PROCESS, ProcessInfo
from errors import DataError
from fileio import limits

OPEN_FILES, OPEN_FILES_PER_WORKER = 64, 48  # that are open at once, and the pipes of each worker
PAD_DIVISOR = 8  # random crops shift by up to an eighth of the image: 4 pixels of 32
Samples = Sequence[tuple[str, int]]  # (path, class number) of each image
AllGather = Callable[[list[str]], list[list[str]]]


@dataclass
class DataSplits:
    """The splits of a run, as batches on the training device.

    Args:
        train: None where nothing is to be trained and its images were not needed.
        val: measured after every epoch. Held out of training with `validSize`; else the test set.
        test: measured once, at the end, with `validSize`; else None.
        metadata: what a resumed run must find again: classes, counts, statistics, split, digests.
    """

    train: MemoryLoader | FileLoader | None
    val: MemoryLoader | FileLoader
    test: MemoryLoader | FileLoader | None
    classes: list[str]
    metadata: dict

    @property
    def is_resident(self) -> bool:
        """Whether all images lie on the training device."""
        return isinstance(self.train, MemoryLoader)


def create(
    opt: SimpleNamespace,
    device: torch.device,
    warn: Callable[[str], None],
    *,
    dtype: torch.dtype = torch.float32,
    statistics: Statistics | None = None,
    process: ProcessInfo = SINGLE_PROCESS,
    all_gather: AllGather = lambda found: [found],
) -> DataSplits:
    """Read, check and split the dataset that the settings name.

    Args:
        warn: called with remarks for the user.
        dtype: of normalised images.
        statistics: mean and std that a trained network expects, instead of the data's.
        process: the process that the batches are for.
        all_gather: exchanges plain values between all processes; `World.all_gather_json`.

    Raises:
        DataError: it is missing, damaged or not as the settings say.
    """
    try:
        limits.allow_open_files(OPEN_FILES + OPEN_FILES_PER_WORKER * opt.nThreads)
    except OSError as error:
        raise DataError(error.strerror, "raise it with ulimit -n, or lower --nThreads") from error
    dataset = DATASETS[opt.dataset]
    is_on_disk = dataset.is_read_from_disk(opt.imageSize)
    # A network that knows its statistics is tested without its training images being decoded.
    test_only = dataset.is_image_folder and opt.testOnly and statistics and not is_on_disk
    if is_on_disk or not statistics:
        statistics = dataset.statistics_at(opt.imageSize)
    loaders = _LoaderFactory(opt, device, dtype, process, statistics)
    if is_on_disk or test_only:
        data = _from_files(loaders, test_only, warn, all_gather)
    else:
        data = _from_memory(loaders, _load(opt, warn))
    for split in (data.train, data.val, data.test):
        if isinstance(split, FileLoader):
            split.start()
    data.metadata |= {
        "classes": data.classes,
        "train": data.train.sampler.num_images if data.train else None,
        "val": data.val.sampler.num_images,
        "test": data.test.sampler.num_images if data.test else None,
    }
    return data


def evaluation_loader(
    opt: SimpleNamespace,
    samples: Samples,
    device: torch.device,
    statistics: Statistics,
    unreadable: UnreadableImages,
    dtype: torch.dtype = torch.float32,
) -> FileLoader:
    """Batch image files, in their order, as a network of these settings is evaluated on them.

    Args:
        samples: (path, number) of each image; batches have the numbers as targets.
        statistics: mean and std that the network was trained with.
        unreadable: told of the images that cannot be read.
    """
    loaders = _LoaderFactory(opt, device, dtype, SINGLE_PROCESS, statistics)
    return loaders.file_loader(samples, torch.arange(len(samples)), unreadable)


def published_statistics(opt: SimpleNamespace) -> Statistics | None:
    """Return mean and std that are the same for all weights, None where they are not."""
    dataset = DATASETS[opt.dataset]
    return None if dataset.is_generated else dataset.statistics_at(opt.imageSize)


@dataclass(frozen=True)
class _LoaderFactory:
    """Makes the batches of splits, all normalised and sampled in the same way.

    A split for training is shuffled and augmented; any other is for evaluation.
    """

    opt: SimpleNamespace
    device: torch.device
    dtype: torch.dtype
    process: ProcessInfo
    statistics: Statistics | None

    def memory_loader(
        self, images: ImageTensors, indices: Tensor, training: bool = False
    ) -> MemoryLoader:
        """Batch some of the images that lie on the device."""
        mean, std = self.statistics
        flip, pad = DATASETS[self.opt.dataset].flip, self.opt.imageSize // PAD_DIVISOR
        return MemoryLoader(
            images,
            self._make_sampler(indices, training),
            mean=mean,
            std=std,
            dtype=self.dtype,
            augmentation=Augmentation(pad, flip) if training and self.opt.augment else None,
        )

    def file_loader(
        self,
        samples: Samples,
        indices: Tensor,
        unreadable: UnreadableImages,
        training: bool = False,
    ) -> FileLoader:
        """Batch some image files, which worker processes decode anew each time."""
        transform, normalise = self._pipeline(training)
        return FileLoader(
            ImageFileDataset(samples, transform, self.opt.manualSeed),
            self._make_sampler(indices, training),
            num_workers=self.opt.nThreads,
            unreadable=unreadable,
            image_size=self.opt.imageSize,
            normalise=normalise,
            device=self.device,
        )

    @property
    def metadata(self) -> dict:
        """The statistics, as a checkpoint has them."""
        mean, std = self.statistics
        return {"mean": list(mean), "std": list(std)}

    def _make_sampler(self, indices: Tensor, training: bool) -> BatchSampler:
        if training:
            return BatchSampler(indices, self.opt.batchSize, self.opt.manualSeed, self.process)
        # Evaluation computes the same batches on any number of processes.
        crops = 10 if self.opt.tenCrop else 1
        return BatchSampler(
            indices, max(1, self.opt.batchSize // crops), None, self.process, whole_batches=True
        )

    def _pipeline(self, training: bool) -> tuple[Callable, Callable]:
        """PIL image -> one tensor, and a batch of those -> what the network gets."""
        opt = self.opt
        if DATASETS[opt.dataset].is_read_from_disk(opt.imageSize):
            from datasets import transforms

            normalise = transforms.Normalise(self.device, self.dtype)
            if training:
                return transforms.training(opt.imageSize, opt.augment), normalise
            crop = transforms.ten_crops if opt.tenCrop else transforms.validation
            return crop(opt.imageSize), normalise
        from datasets.image_folder import ResizeAndCrop

        mean, std = (
            torch.tensor(value, dtype=self.dtype, device=self.device) for value in self.statistics
        )
        return (
            ResizeAndCrop(opt.imageSize),
            lambda pixels: normalise_pixels(pixels, mean, std).permute(0, 3, 1, 2),
        )


def _load(opt: SimpleNamespace, warn: Callable[[str], None]) -> InMemoryDataset:
    """Read a dataset into memory."""
    dataset = DATASETS[opt.dataset]
    load = dataset.import_loader()
    if dataset.is_generated:
        classes = opt.nClasses or dataset.num_classes
        return load(opt.nImages, classes, opt.imageSize, opt.manualSeed)
    if dataset.is_image_folder:
        return load(Path(opt.data), opt.imageSize, opt.nThreads, opt.onBadImage, warn)
    return load(Path(opt.data))


def _from_memory(loaders: _LoaderFactory, data: InMemoryDataset) -> DataSplits:
    """Put all images on the device, where their batches are cut out."""
    opt = loaders.opt
    _check_classes(opt, data.classes)
    data.check()
    kept, held_out = split_indices(len(data.train), opt.validSize, opt.manualSeed)
    digests = {"training_set": hash_images(data.train), "test_set": hash_images(data.test)}
    if loaders.statistics is None:
        loaders = replace(loaders, statistics=channel_statistics(data.train.pixels, kept))
    train, test = data.train.to(loaders.device), data.test.to(loaders.device)
    metadata = loaders.metadata | {"held_out": held_out.tolist()} | digests
    return DataSplits(
        *_make_loaders(loaders.memory_loader, train, test, kept, held_out), data.classes, metadata
    )


def _from_files(
    loaders: _LoaderFactory, test_only: bool, warn: Callable[[str], None], all_gather: AllGather
) -> DataSplits:
    """Leave the images in their files."""
    from datasets.image_folder import index_folder

    opt, root = loaders.opt, Path(loaders.opt.data)
    files = index_folder(root)
    _check_classes(opt, files.classes)

    def make_loader(samples: Samples, indices: Tensor, training: bool = False) -> FileLoader:
        unreadable = UnreadableImages(opt.onBadImage, len(indices), warn, all_gather)
        return loaders.file_loader(samples, indices, unreadable, training)

    test_set = {"test_set": hash_files(files.val, root / "val")}
    if test_only:
        test_loader = make_loader(files.val, torch.arange(len(files.val)))
        return DataSplits(None, test_loader, None, files.classes, loaders.metadata | test_set)
    kept, held_out = split_indices(len(files.train), opt.validSize, opt.manualSeed)
    training_set = {"training_set": hash_files(files.train, root / "train")}
    metadata = loaders.metadata | {"held_out": held_out.tolist()} | training_set | test_set
    parts = _make_loaders(make_loader, files.train, files.val, kept, held_out)
    return DataSplits(*parts, files.classes, metadata)


def _make_loaders(
    make_loader: Callable,
    train: ImageTensors | Samples,
    test: ImageTensors | Samples,
    kept: Tensor,
    held_out: Tensor,
) -> tuple:
    """Batch what trains, what is measured after every epoch, and what once at the end."""
    test_loader = make_loader(test, torch.arange(len(test)))
    train_loader = make_loader(train, kept, training=True)
    if len(held_out):
        return train_loader, make_loader(train, held_out), test_loader
    return train_loader, test_loader, None


def _check_classes(opt: SimpleNamespace, classes: list[str]) -> None:
    if opt.nClasses not in (None, len(classes)):
        raise DataError(
            f"nClasses is {opt.nClasses} but {opt.dataset} has {len(classes)} classes",
            f"use --nClasses {len(classes)} or leave it out",
        )
