"""Make the training, validation and test loaders of a run; no other file here reads `opt`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor

from datasets import cuts
from datasets.batch_sampler import BatchSampler, split_indices
from datasets.decode import DecodeOptions, decode
from datasets.file_loader import FileLoader, Unreadable, UnreadableImages, read_or_explain
from datasets.fingerprints import hash_files, hash_images
from datasets.folder_checks import find_class_directories, folder_notes
from datasets.memory_loader import (
    Augmentation,
    ImageTensors,
    MemoryLoader,
    channel_statistics,
)
from datasets.pipelines import LargeImages, Pipeline, SmallImages
from datasets.registry import DATASETS, Statistics
from datasets.whitening import preprocess
from distributed.launcher import SINGLE_PROCESS, ProcessInfo
from errors import DataError
from fileio import limits

OPEN_FILES, OPEN_FILES_PER_WORKER = 64, 48  # open at once, and pipes of each worker
DRAWS = "Philox, by image"  # what augments images from files; runs of earlier versions have none
PAD_DIVISOR = 8  # random crops shift by up to an eighth of the image: 4 pixels of 32
Samples = Sequence[tuple[str, int]]  # (path, class number) of each image
Images = ImageTensors | Samples
Loader = MemoryLoader | FileLoader


@dataclass
class DataSplits:
    """Hold the loaders of a run, which batch each split on the training device."""

    train: Loader | None  # None for a test that needs no training images
    val: Loader  # for the test after every epoch: the test set, or with `validSize` held-out images
    test: Loader | None  # for one test at the end, with `validSize`; else None
    classes: list[str]
    metadata: dict  # classes, counts, statistics, split, fingerprints: a resumed run compares them


def create(
    opt: SimpleNamespace,
    device: torch.device,
    warn: Callable[[str], None],
    *,
    dtype: torch.dtype = torch.float32,
    statistics: Statistics | None = None,
    classes: list[str] | None = None,
    process: ProcessInfo = SINGLE_PROCESS,
    all_gather: Callable[[list], list[list]] = lambda found: [found],
) -> DataSplits:
    """Read, check and split the dataset of the settings.

    Args:
        warn: called with notes for the user.
        dtype: of normalised images.
        statistics: mean and std that a trained network, or a run that is resumed, expects.
        classes: names that it expects, in order; the test set of a folder may lack some of them.
        process: the rank that the batches are for.
        all_gather: exchanges plain values between all ranks; `World.all_gather_json`.

    Raises:
        DataError: the dataset is missing, damaged or not as the settings say.
    """
    dataset = DATASETS[opt.dataset]
    warn = cache(warn)  # each line once, also where it is true of two splits
    _check_workers(opt, process.local_size, warn)
    is_on_disk = dataset.is_read_from_disk(opt.imageSize)
    statistics = _known_statistics(opt, statistics)
    # A network whose statistics are known is tested without training images.
    is_normalised = opt.preprocess == "normalise"  # whitening is fitted to training images
    test_only = dataset.is_image_folder and opt.testOnly and statistics and is_normalised

    # List the image files, or read all images into memory.
    if is_on_disk or test_only:
        train, test, classes, fingerprints = _index_files(opt, warn, test_only, classes)
    else:
        train, test, classes, fingerprints = _read_images(opt, warn)
    if dataset.is_image_folder and train is not None:
        for note in folder_notes(Path(opt.data), classes):
            warn(note)

    # Hold out validation images; compute the statistics of the rest if nothing tells them.
    split, kept, held_out = {}, None, ()
    if train is not None:
        kept, held_out = split_indices(len(train), opt.validSize, opt.manualSeed)
        split = {"held_out": held_out.tolist()}
        statistics = _check_contrast(opt, train, kept, statistics, warn)
    if not is_normalised:
        train, test = preprocess(opt.preprocess, train, test, kept)

    # Batch each split, and record what a resumed run compares.
    options = {"warn": warn, "all_gather": all_gather, "noted": {}}
    unreadable = partial(UnreadableImages, opt.onBadImage, **options)
    loaders = _LoaderFactory(opt, device, dtype, process, statistics, unreadable)
    metadata = {"mean": list(statistics[0]), "std": list(statistics[1])} | split | fingerprints
    parts = loaders.make_all(train, test, kept, held_out)
    sizes = (part.sampler.num_images if part else None for part in parts)
    metadata |= {"classes": classes} | dict(zip(("train", "val", "test"), sizes, strict=True))
    return DataSplits(*parts, classes, metadata)


def _known_statistics(opt: SimpleNamespace, known: Statistics | None) -> Statistics | None:
    """Return the mean and std if they are known before training images are read."""
    dataset = DATASETS[opt.dataset]
    if not (opt.testOnly or dataset.is_read_from_disk(opt.imageSize)):
        known = None  # of all training images, computed again and compared
    found = expected_statistics(opt, known) or dataset.statistics_at(opt.imageSize, opt.nChannels)
    if dataset.is_image_folder and opt.testOnly:
        if not found:
            what = "mean and deviation of the images that these weights expect are not known"
            fix = "name the model file of a run, beside its data.json, --resume RUN or --inputRange"
            _check_can_be_computed(Path(opt.data), what, fix)
        elif opt.preprocess != "normalise":
            what = f"the constants of preprocess {opt.preprocess} are not kept with weights"
            _check_can_be_computed(Path(opt.data), what, "name a --data that has train/ and val/")
    return found


def _check_contrast(
    opt: SimpleNamespace,
    train: Images,
    kept: Tensor,
    statistics: Statistics | None,
    warn: Callable[[str], None],
) -> Statistics:
    """Return the mean and std, computed if not known; raise DataError if no channel varies."""
    if isinstance(train, ImageTensors):
        return statistics or channel_statistics(train.pixels, kept, warn)
    from datasets.image_folder import measure_files

    statistics = measure_files(train, kept, _decode_options(opt), statistics, warn)
    if opt.nChannels == 1 and opt.augment and not opt.testOnly:
        warn("grey images: lighting and saturation, which change colours, are left out")
    return statistics


def _check_workers(opt: SimpleNamespace, processes: int, warn: Callable[[str], None]) -> None:
    """Allow the files that loader processes open, and note more of them than cores."""
    try:
        limits.allow_open_files(OPEN_FILES + OPEN_FILES_PER_WORKER * opt.nThreads)
    except OSError as error:
        raise DataError(error.strerror, "raise it with ulimit -n, or lower --nThreads") from error
    cores = limits.usable_cores()
    if DATASETS[opt.dataset].is_image_folder and opt.nThreads * processes > cores:
        count = f"nThreads {opt.nThreads}" + f" x {processes}" * (processes > 1)
        warn(f"{count} is more than the {cores} cores of this machine or container: hardly faster")


def evaluation_loader(
    opt: SimpleNamespace,
    images: Images,
    device: torch.device,
    statistics: Statistics,
    unreadable: UnreadableImages | None,
    dtype: torch.dtype = torch.float32,
    indices: Tensor | None = None,
) -> Loader:
    """Batch images as `--testOnly` does.

    Args:
        images: (path, number) of each, or tensors; the numbers become targets.
        statistics: mean and std of the network's training.
        unreadable: counts the image files that cannot be read.
        indices: (n,) which of the images, in order; None: all.
    """
    loaders = _LoaderFactory(opt, device, dtype, SINGLE_PROCESS, statistics, lambda _: unreadable)
    return loaders.make(images, torch.arange(len(images)) if indices is None else indices)


def whole_picture(opt: SimpleNamespace, path: str) -> tuple[Image.Image, cuts.Cut]:
    """Decode all pixels of an image file, and say what of them a network sees in evaluation."""
    found = read_or_explain(decode, path, _decode_options(opt))
    if isinstance(found, Unreadable):
        raise DataError(*found)
    picture, _ = found  # the loader tells the remarks
    is_large = DATASETS[opt.dataset].is_read_from_disk(opt.imageSize)
    crop = cuts.centre_crop if is_large else cuts.small_centre_crop
    return picture, crop(*picture.size, opt.imageSize, opt.resize)


def expected_statistics(opt: SimpleNamespace, known: Statistics | None = None) -> Statistics | None:
    """Return the mean and std of `--inputRange`, or else those known of a network's training.

    Images that are preprocessed have none to be removed.
    """
    if opt.preprocess != "normalise":
        return (0.0,) * opt.nChannels, (1.0,) * opt.nChannels
    if opt.inputRange:
        low, high = opt.inputRange
        std = 255 / (high - low)
        return (0 - low * std,) * opt.nChannels, (std,) * opt.nChannels
    if known and len(known[0]) == opt.nChannels:
        return known
    return None


def published_statistics(opt: SimpleNamespace) -> Statistics | None:
    """Return the mean and std that all weights share; None if they depend on the run."""
    dataset = DATASETS[opt.dataset]
    return None if dataset.is_generated else dataset.statistics_at(opt.imageSize, opt.nChannels)


@dataclass(frozen=True)
class _LoaderFactory:
    """Make the loaders of all splits, which normalise and sample alike."""

    opt: SimpleNamespace
    device: torch.device
    dtype: torch.dtype
    process: ProcessInfo
    statistics: Statistics
    make_unreadable: Callable[[int], UnreadableImages]  # from the number of images

    def make_all(
        self, train: Images | None, test: Images, kept: Tensor | None, held_out: Tensor | tuple
    ) -> tuple[Loader | None, Loader, Loader | None]:
        """Make the training, validation and test loaders, and start their workers."""
        if isinstance(test, ImageTensors):
            train, test = train.to(self.device), test.to(self.device)
        test_loader = self.make(test, torch.arange(len(test)))
        train_loader = None if train is None else self.make(train, kept, training=True)
        parts = train_loader, test_loader, None
        if len(held_out):
            parts = train_loader, self.make(train, held_out), test_loader
        for part in parts:
            if isinstance(part, FileLoader):
                part.start()
        return parts

    def make(self, images: Images, indices: Tensor, training: bool = False) -> Loader:
        """Batch some of the images: shuffled and augmented for training, in order if not."""
        opt, sampler = self.opt, self._make_sampler(indices, training)
        if isinstance(images, ImageTensors):
            mean, std = self.statistics
            flip, pad = DATASETS[opt.dataset].flip, opt.imageSize // PAD_DIVISOR
            augmentation = Augmentation(pad, flip) if training and opt.augment else None
            return MemoryLoader(
                images, sampler, mean=mean, std=std, dtype=self.dtype, augmentation=augmentation
            )
        return FileLoader(
            images,
            self._pipeline(training),
            sampler,
            num_workers=opt.nThreads,
            unreadable=self.make_unreadable(len(indices)),
            device=self.device,
            options=_decode_options(opt),
        )

    def _make_sampler(self, indices: Tensor, training: bool) -> BatchSampler:
        if training:
            return BatchSampler(indices, self.opt.batchSize, self.opt.manualSeed, self.process)
        # Evaluation computes the same batches for any world size.
        batch_size = max(1, self.opt.batchSize // (10 if self.opt.tenCrop else 1))
        return BatchSampler(indices, batch_size, None, self.process, whole_batches=True)

    def _pipeline(self, training: bool) -> Pipeline:
        """Return what prepares and finishes the images of a split."""
        opt = self.opt
        if DATASETS[opt.dataset].is_read_from_disk(opt.imageSize):
            return LargeImages(
                opt.imageSize,
                opt.resize,
                self.statistics,
                self.device,
                self.dtype,
                seed=opt.manualSeed if training and opt.augment else None,
                ten_crops=opt.tenCrop and not training,
            )
        return SmallImages(opt.imageSize, self.statistics, self.dtype, opt.nChannels)


# Training set, test set, classes, fingerprints.
Contents = tuple[Images | None, Images, list[str], dict[str, str]]


def _read_images(opt: SimpleNamespace, warn: Callable[[str], None]) -> Contents:
    """Read a dataset into memory."""
    dataset = DATASETS[opt.dataset]
    load = dataset.import_loader()
    if dataset.is_generated:
        classes = opt.nClasses or dataset.num_classes
        data = load(opt.nImages, classes, opt.imageSize, opt.manualSeed, opt.nChannels)
    elif dataset.is_image_folder:
        data = load(
            Path(opt.data), opt.imageSize, opt.nThreads, opt.onBadImage, warn, _decode_options(opt)
        )
    else:
        try:
            data = load(Path(opt.data))
        except OSError as error:
            what = f"cannot read {error.filename or opt.data}: {error.strerror}"
            raise DataError(what, "make it readable, or name another --data") from error
    _check_classes(opt, data.classes)
    data.check()
    if opt.nChannels == 1 < data.train.pixels.shape[3]:
        data = replace(data, train=data.train.to_grey(), test=data.test.to_grey())
    fingerprints = {"training_set": hash_images(data.train), "test_set": hash_images(data.test)}
    return data.train, data.test, data.classes, fingerprints


def _check_can_be_computed(root: Path, what: str, fix: str) -> None:
    try:
        find_class_directories(root / "train")
    except DataError as error:
        raise DataError(
            f"{what}, and {root} has no training images to compute them from", fix
        ) from error


def _index_files(
    opt: SimpleNamespace,
    warn: Callable[[str], None],
    test_only: bool,
    classes: list[str] | None,
) -> Contents:
    """List the files of a dataset in place of its images; no training files if `test_only`."""
    from datasets.image_folder import index_folder, index_test_set

    root = Path(opt.data)
    if test_only:
        files, classes = index_test_set(root, classes, warn)
        _check_classes(opt, classes)
        return None, files, classes, {"test_set": hash_files(files, root / "val")}
    index = index_folder(root, warn)
    _check_classes(opt, index.classes)
    fingerprints = {"training_set": hash_files(index.train, root / "train")}
    fingerprints["test_set"] = hash_files(index.val, root / "val")
    fingerprints["draws"] = DRAWS
    return index.train, index.val, index.classes, fingerprints


def _decode_options(opt: SimpleNamespace) -> DecodeOptions:
    limits = opt.exifRotate, opt.maxPixels, opt.maxAspect, opt.whiteLevel
    return DecodeOptions(*limits, opt.nChannels)


def _check_classes(opt: SimpleNamespace, classes: list[str]) -> None:
    if opt.nClasses not in (None, len(classes)):
        what = f"nClasses is {opt.nClasses} but {opt.dataset} has {len(classes)} classes"
        raise DataError(what, f"use --nClasses {len(classes)} or leave it out")
    if DATASETS[opt.dataset].is_image_folder and len(classes) == 1 and not opt.testOnly:
        what = f"{opt.data} has one class, {classes[0]}: there is nothing to tell apart"
        raise DataError(what, "put a directory for each class right below train and below val")
