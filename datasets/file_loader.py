"""Read and prepare image files in worker processes, and batch them on the training device."""

import errno
import gc
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from datasets import shared_memory
from datasets.batch_sampler import BatchSampler
from datasets.decode import DEFAULTS, REPLACE, DecodeOptions
from datasets.pipelines import Fields, Pipeline
from datasets.retries import with_retries
from distributed.signals import ignore_signals, kill_children
from errors import DataError

WORKER_TIMEOUT_S = 300
CHUNK_BYTES = 8 * 2**20  # that a worker hands over at once, or one image
MAX_SKIPPED_FRACTION = 0.001  # of the images, but at least one; with more even `skip` stops
TO_RESUME = "to resume with other images, add --override true"


class Unreadable(NamedTuple):
    """Say which image cannot be read."""

    reason: str  # with its path
    fix: str


# (fields of the pipeline, class, {remark: path}), or why the image cannot be read.
Sample = tuple[Fields, int, dict[str, str]] | Unreadable


def read_or_explain(read: Callable, path: str, *args: object) -> object | Unreadable:
    """Call `read(path, ...)`, again where a disk fails for a moment; return why it fails."""
    try:
        return with_retries(read, path, *args)
    except DataError as error:
        return Unreadable(f"{path}: {error}", error.problems[0][1])
    except Exception as error:  # decoders raise any type on a damaged file
        is_of_disk = getattr(error, "errno", None) not in (None, errno.ENOENT)
        # MemoryError has no text.
        reason = f"{path}: {str(error) or type(error).__name__}"
        return Unreadable(reason, "check the disk" if is_of_disk else REPLACE)


class ImageFileDataset(Dataset):
    """Prepare image files by (epoch, index).

    Args:
        samples: (path, class number) of each image.
        pipeline: reads and prepares them; see `datasets.pipelines`.
        options: how to decode.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        pipeline: Pipeline,
        options: DecodeOptions = DEFAULTS,
    ):
        self.samples, self.pipeline, self.options = samples, pipeline, options

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Prepare one image, or return the reason why it cannot be read."""
        path, label = self.samples[key[1]]
        found = read_or_explain(self.pipeline.read, path, self.options, *key)
        if isinstance(found, Unreadable):
            return found
        picture, remarks = found
        return self.pipeline.prepare(picture), label, dict.fromkeys(remarks, path)


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
    """Yield the keys of each chunk of the epoch under way; a list of all would take 200 MB."""

    chunks: Iterable[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.chunks)


class FileLoader:
    """Batch one split from files; the same interface as `memory_loader.MemoryLoader`.

    Workers prepare chunks: parts of a batch of a few megabytes. So all of them work on the first
    batch, and what they prepare in advance is bounded in bytes.

    Args:
        samples: (path, class number) of each image.
        pipeline: reads and prepares images in the workers, and finishes batches on the device.
        sampler: divides the split among steps and ranks.
        num_workers: processes that prepare images; 0 prepares in this process.
        unreadable: counts the images that cannot be read.
        options: how to decode.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        pipeline: Pipeline,
        sampler: BatchSampler,
        *,
        num_workers: int,
        unreadable: UnreadableImages,
        device: torch.device,
        options: DecodeOptions = DEFAULTS,
    ):
        self.images, self.sampler, self.unreadable = samples, sampler, unreadable
        self.pipeline, self.device = pipeline, device
        self._keys = _EpochKeys()
        warnings.filterwarnings("ignore", "This DataLoader will create")  # we say so ourselves
        batch_bytes = pipeline.typical_bytes * sampler.largest_batch
        self._num_chunks, prefetch = 1, None  # of a full batch
        if num_workers:
            num_chunks = min(-(-batch_bytes // CHUNK_BYTES), sampler.largest_batch)
            self._num_chunks = max(1, num_chunks)
            chunk_bytes = -(-sampler.largest_batch // self._num_chunks) * pipeline.image_bytes
            num_workers, prefetch = shared_memory.fit_in_flight(
                num_workers,
                chunk_bytes,
                self._num_chunks,
                len(sampler),
                sampler.process.local_size,
                unreadable.warn,
            )
        self._loader = DataLoader(
            ImageFileDataset(samples, pipeline, options),
            batch_sampler=self._keys,
            num_workers=num_workers,
            prefetch_factor=prefetch,
            collate_fn=_collate,
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
            images: (n, C, H, W), or (10 n, C, H, W) of ten crops each; normalised.
            targets: (n,) int64. n is 0 if a step has no image for this rank, or all were skipped.

        Raises:
            DataError: an image cannot be read.
            RuntimeError: a worker died or hung; see `translate_worker_errors`.
        """
        indices, steps = self.sampler.epoch_indices(epoch), range(start, len(self.sampler))
        parts = [self.sampler.local_slice(step) for step in steps]
        self._keys.chunks = (
            [(epoch, index) for index in indices[chunk].tolist()]
            for part in parts
            for chunk in self._chunks(part)
        )
        prepared = iter(self._loader)
        for part in parts:
            yield self._finish([next(prepared) for _ in self._chunks(part)])
        self.unreadable.sync()

    def _chunks(self, batch: slice) -> list[slice]:
        """Divide a batch into chunks of nearly one size; an empty batch is one empty chunk."""
        size = batch.stop - batch.start
        count = max(1, min(self._num_chunks, size))
        ends = [batch.start + size * number // count for number in range(count + 1)]
        return [slice(*pair) for pair in pairwise(ends)]

    def _finish(self, chunks: list[tuple]) -> tuple[Tensor, Tensor]:
        prepared, targets = [], []
        for fields, labels, unreadable, remarks in chunks:
            for each in unreadable:
                self.unreadable.add(*each)
            for remark, path in remarks.items():
                self.unreadable.note(remark, path)
            if fields:  # else no image of the chunk can be read
                prepared.append(fields)
            targets.append(labels.to(self.device, non_blocking=True))
        targets = torch.cat(targets)
        if not prepared:
            shape = (0, self.pipeline.channels, self.pipeline.size, self.pipeline.size)
            return torch.empty(shape, dtype=self.pipeline.dtype, device=self.device), targets
        images = self.pipeline.finish(prepared, self.device)  # and out of shared memory
        return images.contiguous(memory_format=torch.channels_last), targets


@contextmanager
def translate_worker_errors() -> Iterator[None]:
    """Turn torch's errors about a dead or hanging worker into a DataError.

    Enclose the whole lifetime of the workers: a signal handler of torch raises the error wherever
    the main thread is when a worker dies.
    """
    try:
        yield
    except (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        is_reset = False
        while not is_reset:  # torch's handler would raise once more, and may at this very moment
            with suppress(RuntimeError):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                is_reset = True
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


def _collate(
    samples: list[Sample],
) -> tuple[Fields, Tensor, list[Unreadable], dict[str, str]]:
    """Concatenate the fields of samples; also targets (n,), what is missing, and remarks."""
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    if not readable:
        return (), torch.empty(0, dtype=torch.int64), unreadable, {}
    prepared, labels, remarks = zip(*readable, strict=True)
    fields = tuple(map(_concatenate, zip(*prepared, strict=True)))
    first = {text: path for each in reversed(remarks) for text, path in each.items()}
    return fields, torch.tensor(labels), unreadable, first


def _concatenate(parts: tuple[Tensor, ...]) -> Tensor:
    """Concatenate along the first dimension; in a worker, into shared memory."""
    if len({part.shape for part in parts}) == 1:
        return default_collate(list(parts)).flatten(0, 1)
    joined = torch.cat(parts)
    return joined.share_memory_() if get_worker_info() else joined
