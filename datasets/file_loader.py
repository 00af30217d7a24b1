"""Images that stay in files: decoded, transformed and batched by worker processes."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.batch_sampler import BatchSampler
from datasets.decode import decode
from datasets.rng import generator
from distributed.signals import ignore_signals, kill_children
from errors import DataError

WORKER_TIMEOUT_S = 300
MAX_SKIPPED_FRACTION = 0.001  # of the images, more bad ones than this stop a run that skips them
Sample = tuple[Tensor, int] | str  # (image, class), or why there is none


class ImageFileDataset(Dataset):
    """Files and classes as a dataset keyed by (epoch, index): what is random depends on no order.

    Args:
        samples: (path, class number) of each image.
        transform: PIL image -> tensor; draws from torch's generator.
        seed: of the transform's randomness.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], transform: Callable, seed: int):
        self.samples, self.transform, self.seed = samples, transform, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of one (epoch, index), or the reason why it cannot be read."""
        epoch, index = key
        path, label = self.samples[index]
        try:
            image = decode(path)
        except Exception as error:  # a damaged file makes decoders raise anything
            return f"{path}: {error}"
        # Without this the draws would depend on which worker got the image, and in the main
        # process they would disturb the network's own.
        with torch.random.fork_rng(devices=[]):
            seed = generator("image", self.seed, epoch, index).initial_seed()
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
            return self.transform(image), label


@dataclass
class UnreadableImages:
    """What to do about images that cannot be read, and which those were.

    Args:
        policy: "error" stops at the first, "skip" after a thousandth of the images.
        total: images in the split.
        warn: called with a line for each image that is skipped.
        all_gather: what each replica has found, from what this one has.
    """

    policy: str
    total: int
    warn: Callable[[str], None]
    all_gather: Callable[[list[str]], list[list[str]]] = lambda found: [found]
    seen: dict[str, None] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        """Count a bad image; raise DataError when there are too many."""
        if self.policy == "error":
            fix = "replace or remove the file, or --onBadImage skip"
            raise DataError(f"cannot read image {reason}", fix)
        if reason not in self.seen:
            self.seen[reason] = None
            self.warn(f"skipped image {reason}")
        if len(self.seen) > MAX_SKIPPED_FRACTION * self.total:
            raise DataError(
                f"{len(self.seen)} of {self.total} images cannot be read, last {reason}",
                "replace or remove the file",
            )

    def sync(self) -> None:
        """At the end of a pass: count what the other replicas have found as well."""
        if self.policy == "skip":
            for found in self.all_gather(list(self.seen)):
                for reason in found:
                    self.add(reason)


class FileLoader:
    """The batches of one split read from files; the same interface as `memory_loader.MemoryLoader`.

    Args:
        sampler: the samples of the split, and which of them this replica gets when.
        num_workers: processes that decode; 0 decodes in this one.
        unreadable: what to do about images that cannot be read.
        image_size: height and width in pixels of what `dataset` yields.
        normalise: makes what the network gets of a batch on the device; None: as transformed.
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
        self._batches: list[list[tuple[int, int]]] = []  # keys of the epoch under way
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._batches,
            num_workers=num_workers,
            collate_fn=partial(_collate, image_size),
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
            timeout=WORKER_TIMEOUT_S if num_workers > 0 else 0,
            worker_init_fn=_init_worker,
            # Python 3.14 would start them anew, which takes seconds and copies of all paths.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
            generator=torch.Generator(),  # or each epoch would draw from the network's
        )

    def start(self) -> None:
        """Start the workers now, so that none has to be forked while another may be dying."""
        if self._loader.num_workers:
            iter(self._loader)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """What this replica has of steps `start`, `start` + 1, ... of an epoch.

        Yields:
            images: (n, 3, H, W), or (10 n, 3, H, W) of ten crops each; normalised.
            targets: (n,) int64. n is 0 where a step has nothing for this replica, or where every
                image was skipped.

        Raises:
            DataError: an image cannot be read.
            RuntimeError: a worker died or hung; see `translate_worker_errors`.
        """
        keys = [(epoch, index) for index in self.sampler.epoch_indices(epoch).tolist()]
        steps = range(start, len(self.sampler))
        self._batches[:] = [keys[self.sampler.local_slice(step)] for step in steps]
        for images, targets, unreadable in self._loader:
            for reason in unreadable:
                self.unreadable.add(reason)
            yield self._on_device(images), targets.to(self.device, non_blocking=True)
        self.unreadable.sync()

    def _on_device(self, images: Tensor) -> Tensor:
        # What is not augmented crosses as bytes, at a quarter of the cost of numbers.
        on_device = images.to(self.device, non_blocking=True)
        # Of no image it is not known how the transform would have laid it out.
        normalised = self.normalise(on_device) if self.normalise and len(on_device) else on_device
        return normalised.contiguous(memory_format=torch.channels_last)


@contextmanager
def translate_worker_errors() -> Iterator[None]:
    """Turn what torch raises about a dead or hanging loader process into a DataError.

    Around all that happens while there are workers: a death is raised by a signal handler, wherever
    the main thread is at that moment.
    """
    try:
        yield
    except (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        first_line = str(error).partition("\n")[0]
        is_worker_error = first_line.startswith(("DataLoader worker (pid", "DataLoader timed out"))
        if isinstance(error, RuntimeError) and not is_worker_error:
            raise
        # The other kinds come from the pipe on which a dying worker was handing over a batch.
        kill_children()  # and with them the handler that would raise once more, anywhere
        raise DataError(
            f"a loader process was killed or hung: {first_line}",
            "often memory ran out: lower --nThreads or add memory",
        ) from error


def _init_worker(_: int) -> None:
    # A signal to the whole process group would end the workers first, and the parent could not
    # finish its step. What ends a worker reaches the parent; it need not print it as well.
    ignore_signals()
    sys.excepthook = lambda *_: None


def _collate(image_size: int, samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """Images (n, 3, H, W), targets (n,), and what could not be read."""
    readable = [sample for sample in samples if not isinstance(sample, str)]
    unreadable = [sample for sample in samples if isinstance(sample, str)]
    if not readable:
        no_images = torch.empty(0, 3, image_size, image_size)
        return no_images, torch.empty(0, dtype=torch.int64), unreadable
    images = torch.stack([image for image, _ in readable])
    if images.dim() == 5:  # ten crops: (n, 10, 3, H, W)
        images = images.flatten(0, 1)
    return images, torch.tensor([label for _, label in readable]), unreadable
