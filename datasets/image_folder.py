"""List or load folders of images: `train/CLASS/IMAGE` and `val/CLASS/IMAGE`."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from datasets.batch_sampler import BatchSampler
from datasets.decode import DEFAULTS, DecodeOptions, decode
from datasets.file_list import (
    FileList,
    count_beside,
    describe_unread,
    find_image_files,
    shorten,
    unread_note,
)
from datasets.file_loader import FileLoader, Unreadable, UnreadableImages, read_or_explain
from datasets.folder_checks import find_class_directories, spelling_fix
from datasets.memory_loader import ImageTensors, InMemoryDataset, check_channels_vary
from datasets.pipelines import SmallImages
from datasets.registry import Statistics
from errors import CheckpointError, DataError

Warn = Callable[[str], None]
# Images, spread over a training set: to note a channel that is constant in them, and to measure.
ENOUGH, MEASURED = 64, 256
LEVELS = np.arange(256)


@dataclass(frozen=True)
class FolderIndex:
    """List (path, class number) of each image of both splits, and the class names."""

    train: FileList
    val: FileList
    classes: list[str]


def index_folder(root: Path, warn: Warn) -> FolderIndex:
    """List the images below `root`; note the files that are not read.

    Raises:
        DataError: a class is empty, train and val have different classes, or a link leads to a
            directory listed before.
    """
    classes, others = (find_class_directories(root / split) for split in ("train", "val"))
    if classes != others:
        only = {"train": {*classes} - {*others}, "val": {*others} - {*classes}}
        shown = ", ".join(
            f"only in {split}: {' '.join(sorted(only[split])[:5])}" for split in only if only[split]
        )
        what = f"train and val in {root} have different classes: {shown}"
        fix = spelling_fix(only["train"], only["val"])
        raise DataError(what, fix or "give both the same class directories")
    unread: Counter[str] = Counter()
    train, val = (_index_split(root / split, classes, unread) for split in ("train", "val"))
    _note_unread(unread, warn)
    return FolderIndex(train, val, classes)


def index_test_set(root: Path, known: list[str] | None, warn: Warn) -> tuple[FileList, list[str]]:
    """List the images in `val` alone, and return them with the class names.

    Args:
        known: the classes of the network, which the images may lack some of; None: those in `val`.

    Raises:
        CheckpointError: there is a class that the network does not know.
        DataError: a class has no images that can be read, or a link leads to a directory listed
            before.
    """
    directory, unread = root / "val", Counter()
    found = find_class_directories(directory)
    unknown = [name for name in found if known and name not in known]
    if unknown:
        what = f"the classes are not the run's: {directory} has {shorten(unknown)}"
        fix = spelling_fix({*unknown}, {*known} - {*found})
        fix = fix or f"name each directory as one of the run's classes: {shorten(known)}"
        raise CheckpointError(what, fix)
    classes, lacking = known or found, [] if known else None
    files = _index_split(directory, classes, unread, lacking)
    if lacking:
        what = f"{len(lacking)} of the run's {len(classes)} classes: {shorten(lacking)}"
        warn(f"{directory} has no images of {what}")
    _note_unread(unread, warn)
    return files, classes


def _index_split(
    directory: Path, classes: list[str], unread: Counter[str], lacking: list[str] | None = None
) -> FileList:
    """List the images of each class.

    Args:
        unread: counts the files that are not read, by suffix.
        lacking: gets the classes without a file; None: these are refused.

    Raises:
        DataError: a class has no images, or none that can be read.
    """
    empty = []
    count_beside(directory, unread)

    def files() -> Iterator[tuple[str, int]]:
        for number, name in enumerate(classes):
            others: Counter[str] = Counter()
            is_there = lacking is None or (directory / name).is_dir()
            paths = find_image_files(directory / name, others) if is_there else []
            yield from ((path, number) for path in paths)
            unread.update(others)
            if not paths and not others and lacking is not None:
                lacking.append(name)
            elif not paths:
                empty.append(f"{name} ({describe_unread(others)})" if others else name)

    listed = FileList(files())
    if empty or not listed:
        fix = "put at least one image in each class directory, with a suffix such as .jpg"
        raise DataError(f"{directory}: no images in class {shorten(empty or classes)}", fix)
    return listed


def measure_files(
    samples: FileList,
    kept: torch.Tensor,
    options: DecodeOptions,
    known: Statistics | None,
    warn: Warn,
) -> Statistics:
    """Look at training files until each channel varies, which is mostly at the first; measure.

    Where some channels vary, `ENOUGH` images tell. Mean and std that are not known are those of
    `MEASURED` images as they are stored, in which each image counts alike. Images that cannot be
    read are left to the loader.

    Args:
        kept: which of the images train.
        known: mean and std per channel, of pixels from 0 to 255; None measures them.

    Returns:
        The mean and std.

    Raises:
        DataError: all images have one colour, or none of those to measure can be read.
    """
    enough = ENOUGH if known else MEASURED
    step, looked_at = -(-len(kept) // enough), 0
    moments = np.zeros((2, options.channels))  # sums over images of the means of x and x^2
    low, high = np.full(options.channels, 255), np.zeros(options.channels)
    spread = (number for start in range(step) for number in kept[start::step].tolist())
    for tried, number in enumerate(spread, 1):
        found = read_or_explain(decode, samples[number][0], options)
        if not isinstance(found, Unreadable):
            counts = np.reshape(found[0].histogram(), (options.channels, 256))
            lowest, highest = np.transpose([np.flatnonzero(each)[[0, -1]] for each in counts])
            low, high = np.minimum(low, lowest), np.maximum(high, highest)
            # Sums of integers are exact, and so the same everywhere.
            moments += [(counts * LEVELS**power).sum(1) / counts[0].sum() for power in (1, 2)]
            looked_at += 1
        varies = low < high
        is_enough = tried >= enough and (varies.any() or not looked_at)
        if is_enough or (known and varies.all()):
            break
    if looked_at:
        shown = "all" if looked_at == len(kept) else f"{looked_at} of"
        check_channels_vary(varies.tolist(), low.tolist(), f"{shown} {len(kept)}", warn)
    elif not known:
        what = f"none of {tried} training images can be read to measure them, last {found.reason}"
        raise DataError(what, found.fix)
    if known:
        return known
    mean, of_squares = moments / looked_at
    std = np.sqrt(np.maximum(of_squares - mean**2, 0))
    return mean.tolist(), np.where(std > 0, std, 1).tolist()


def _note_unread(unread: Counter[str], warn: Warn) -> None:
    if unread:
        warn(unread_note(unread))


def load_folder(
    root: Path,
    size: int,
    num_workers: int,
    on_bad_image: str,
    warn: Warn,
    options: DecodeOptions = DEFAULTS,
) -> InMemoryDataset:
    """Decode a folder of images once into memory, at `size` x `size` pixels, or raise DataError."""
    index, noted = index_folder(root, warn), {}

    def decode_all(samples: FileList) -> ImageTensors:
        batches = FileLoader(
            samples,
            SmallImages(size, channels=options.channels),
            BatchSampler(torch.arange(len(samples)), batch_size=256),
            num_workers=num_workers,
            unreadable=UnreadableImages(on_bad_image, len(samples), warn, noted=noted),
            device=torch.device("cpu"),
            options=options,
        )
        pixels = torch.empty(len(samples), size, size, options.channels, dtype=torch.uint8)
        labels = torch.empty(len(samples), dtype=torch.int64)
        count = 0
        for images, targets in batches.batches(epoch=0):
            if not len(targets):  # all were skipped
                continue
            pixels[count : count + len(targets)] = images
            labels[count : count + len(targets)] = targets
            count += len(targets)
        return ImageTensors(pixels[:count], labels[:count])

    return InMemoryDataset(decode_all(index.train), decode_all(index.val), index.classes)
