"""Decode, transform and batch image files in worker processes, new ones in each epoch."""

import errno
import gc
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets import shared_memory
from datasets.batch_sampler import BatchSampler
from datasets.decode import DEFAULTS, REPLACE, DecodeOptions, decode
from datasets.retries import with_retries
from datasets.rng import generator
from distributed.signals import ignore_signals, kill_children
from errors import DataError

WORKER_TIMEOUT_S = 300
MAX_SKIPPED_FRACTION = 0.001  # of the images, but at least one; with more even `skip` stops
TO_RESUME = "to resume with other images, add --override true"


class Unreadable(NamedTuple):
    """Say which image cannot be read."""

    reason: str  # with its path
    fix: str


# (image, class, {remark: path}), or why the image cannot be read.
Sample = tuple[Tensor, int, dict[str, str]] | Unreadable


class ImageFileDataset(Dataset):
    """Read image files by (epoch, index), which also seeds the transform.

    Args:
        samples: (path, class number) of each image.
        transform: PIL image -> tensor; draws from torch's generator.
        seed: of the transform's random numbers, with epoch and index.
        options: how to decode.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        transform: Callable,
        seed: int,
        options: DecodeOptions = DEFAULTS,
    ):
        self.samples, self.transform, self.seed = samples, transform, seed
        self.options = options

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Read and transform one image, or return the reason why it cannot be read."""
        epoch, index = key
        path, label = self.samples[index]
        try:
            image, remarks = with_retries(decode, path, self.options)
        except DataError as error:
            return Unreadable(f"{path}: {error}", error.problems[0][1])
        except Exception as error:  # decoders raise any type on a damaged file
            is_of_disk = getattr(error, "errno", None) not in (None, errno.ENOENT)
            # MemoryError has no text.
            reason = f"{path}: {str(error) or type(error).__name__}"
            return Unreadable(reason, "check the disk" if is_of_disk else REPLACE)
        # Without a seed the draws would depend on the worker that gets the image; without the
        # fork they would change the network's random numbers in the main process.
        with torch.random.fork_rng(devices=[]):
            seed = generator("image", self.seed, epoch, index).initial_seed()
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
            return self.transform(image), label, dict.fromkeys(remarks, path)


@dataclass
class UnreadableImages:
    """Count the images that cannot be read, and stop when they are too many; note remarks."""

    policy: str  # "error" stops at the first, "skip" after one and a thousandth of the images
    total: int  # images in the split
    warn: Callable[[str], None]  # called with a line for each skipped image and each remark
    all_gather: Callable[[list], list[list]] = lambda found: [found]  # from all ranks
    seen: dict[str, str] = field(default_factory=dict)  # reasons, each once, with what helps
    noted: dict[str, str] = field(default_factory=dict)  # remarks, with the first image of each
    report: Callable[[str, str], None] | None = None  # gets what was skipped and the fix, not warn

    def add(self, reason: str, fix: str = REPLACE) -> None:
        """Count an unreadable image; raise DataError if there are too many."""
        if self.policy == "error":
            fix = f"{fix}, or --onBadImage skip; {TO_RESUME}"
            raise DataError(f"cannot read image {reason}", fix)
        if reason not in self.seen:
            self.seen[reason] = fix
            what = f"skipped image {reason}"
            self.report(what, fix) if self.report else self.warn(what)
        if len(self.seen) > max(1, MAX_SKIPPED_FRACTION * self.total):
            raise DataError(
                f"{len(self.seen)} of {self.total} images cannot be read, last {reason}",
                f"{fix}; {TO_RESUME}",
            )

    def note(self, remark: str, path: str) -> None:
        """Print a remark the first time."""
        if remark not in self.noted:
            self.noted[remark] = path
            self.warn(f"{remark}; first {path}")

    def sync(self) -> None:
        """Count and note also what the other ranks found in this epoch."""
        unreadable, remarks = zip(*self.all_gather([self.seen, self.noted]), strict=True)
        for method, found in ((self.note, remarks), (self.add, unreadable)):
            for text, about in chain.from_iterable(part.items() for part in found):
                method(text, about)


@dataclass
class _EpochKeys:
    """Yield the keys of each batch of the epoch under way; a list of all would take 200 MB."""

    batches: Iterable[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


class FileLoader:
    """Batch one split from files; the same interface as `memory_loader.MemoryLoader`.

    Args:
        sampler: divides the split among steps and ranks.
        num_workers: processes that decode; 0 decodes in this process.
        unreadable: counts the images that cannot be read.
        image_size: height and width in pixels of the images of `dataset`.
        normalise: applied to each batch on the device; None leaves it as transformed.
    """

    def __init__(
        self,
        dataset: ImageFileDataset,
        sampler: BatchSampler,
        *,
        num_workers: int,
        unreadable: UnreadableImages,
        image_size: int,
        device: torch.device,
        normalise: Callable[[Tensor], Tensor] | None = None,
    ):
        self.sampler, self.unreadable = sampler, unreadable
        self.normalise, self.device = normalise, device
        self._keys = _EpochKeys()
        warnings.filterwarnings("ignore", "This DataLoader will create")  # we say so ourselves
        prefetch = None
        if num_workers:
            batch_bytes = _image_bytes(dataset, image_size) * sampler.largest_batch
            processes = sampler.process.local_size
            num_workers, prefetch = shared_memory.fit_in_flight(
                num_workers, batch_bytes, len(sampler), processes, unreadable.warn
            )
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._keys,
            num_workers=num_workers,
            prefetch_factor=prefetch,
            collate_fn=partial(_collate, image_size),
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
            timeout=WORKER_TIMEOUT_S if num_workers > 0 else 0,
            worker_init_fn=_init_worker,
            # Python 3.14 forks no longer by default; to spawn takes seconds and copies all paths.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
            generator=torch.Generator(),  # the default would draw from the network's
        )

    def start(self) -> None:
        """Start the workers now: a fork is unsafe once a worker may be dying."""
        if self._loader.num_workers:
            iter(self._loader)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's batches of an epoch from step `start` on.

        Yields:
            images: (n, 3, H, W), or (10 n, 3, H, W) of ten crops each; normalised.
            targets: (n,) int64. n is 0 if a step has no image for this rank, or all were skipped.

        Raises:
            DataError: an image cannot be read.
            RuntimeError: a worker died or hung; see `translate_worker_errors`.
        """
        indices = self.sampler.epoch_indices(epoch)
        slices = map(self.sampler.local_slice, range(start, len(self.sampler)))
        self._keys.batches = ([(epoch, i) for i in indices[part].tolist()] for part in slices)
        for images, targets, unreadable, remarks in self._loader:
            for each in unreadable:
                self.unreadable.add(*each)
            for remark, path in remarks.items():
                self.unreadable.note(remark, path)
            images = self._on_device(images)  # and out of shared memory
            yield images, targets.to(self.device, non_blocking=True)
        self.unreadable.sync()

    def _on_device(self, images: Tensor) -> Tensor:
        # Normalise after the copy: without augmentation images are uint8, a quarter of float32.
        images = images.to(self.device, non_blocking=True)
        if self.normalise and len(images):  # an empty batch is (0, 3, H, W) already
            images = self.normalise(images)
        return images.contiguous(memory_format=torch.channels_last)


@contextmanager
def translate_worker_errors() -> Iterator[None]:
    """Turn torch's errors about a dead or hanging worker into a DataError.

    Enclose the whole lifetime of the workers: a signal handler of torch raises the error wherever
    the main thread is when a worker dies.
    """
    try:
        yield
    except (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise once more
        explained = shared_memory.explain(error)
        if not explained:
            raise
        kill_children()
        raise explained from error


def _init_worker(_: int) -> None:
    # A signal to the whole process group would end the workers, and the parent could not finish
    # its step. The parent reports a worker's error, so the worker need not print it.
    ignore_signals()
    gc.freeze()  # or a garbage collection would write to all objects, which copies 40 MB
    shared_memory.exit_on_failed_handover()
    sys.excepthook = lambda *_: None


def _image_bytes(dataset: ImageFileDataset, size: int) -> int:
    """Measure how many bytes an image of the split has in a batch."""
    with torch.random.fork_rng(devices=[]):  # the transform draws from torch's generator
        return dataset.transform(Image.new("RGB", (size, size))).nbytes


def _collate(
    image_size: int, samples: list[Sample]
) -> tuple[Tensor, Tensor, list[Unreadable], dict[str, str]]:
    """Collate samples to images (n, 3, H, W), targets (n,), what is missing, and remarks."""
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    if not readable:
        no_images = torch.empty(0, 3, image_size, image_size)
        return no_images, torch.empty(0, dtype=torch.int64), unreadable, {}
    images, labels, remarks = zip(*readable, strict=True)
    # In a worker this stacks into shared memory.
    images, targets = default_collate(list(zip(images, map(torch.tensor, labels), strict=True)))
    if images.dim() == 5:  # ten crops: (n, 10, 3, H, W)
        images = images.flatten(0, 1)
    first = {text: path for each in reversed(remarks) for text, path in each.items()}
    return images, targets, unreadable, first
