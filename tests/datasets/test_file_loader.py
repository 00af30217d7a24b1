"""Test images read from files: all formats, damaged ones, batches that depend on no process."""

import errno
import multiprocessing
import os
import random
import re
import resource
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils import signal_handling

from datasets import file_loader, pipelines, retries, shared_memory
from datasets.batch_sampler import BatchSampler
from datasets.decode import DecodeOptions, decode
from datasets.file_loader import FileLoader, UnreadableImages
from datasets.pipelines import LargeImages, SmallImages
from datasets.shared_memory import fit_in_flight
from distributed.launcher import SINGLE_PROCESS, ProcessInfo
from errors import DataError
from faults import bombs
from helpers.sample_data import error_line, noise, same_batches


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Transform without randomness: PIL image -> (3, H, W) from 0 to 255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@dataclass
class Pipeline:
    """Hand over what `transform` makes of an image."""

    transform: Callable[[Image.Image], torch.Tensor] = to_pixels
    image_bytes = typical_bytes = 3 * 12 * 12 * 4
    size, channels, dtype = 12, 3, torch.float64

    def read(self, path, options, epoch, index):
        return pipelines.decode(path, options)

    def prepare(self, picture):
        return (self.transform(picture)[None],)

    def finish(self, chunks, device):
        return torch.cat([images for (images,) in chunks]).double()


def augmented(seed: int = 3, resize: str = "antialias", size: int = 8) -> LargeImages:
    statistics = (120.0,) * 3, (60.0,) * 3
    return LargeImages(size, resize, statistics, torch.device("cpu"), seed=seed)


@pytest.fixture
def samples(tmp_path) -> list[tuple[str, int]]:
    """Write 23 small PNG files, each with its number as its class."""
    paths = [tmp_path / f"{number}.png" for number in range(23)]
    for path, pixels in zip(paths, noise(23, 12), strict=True):
        Image.fromarray(pixels).save(path)
    return [(str(path), number) for number, path in enumerate(paths)]


@pytest.fixture
def loader(monkeypatch):
    """Return a function that makes FileLoaders; end their processes however the test ends."""
    # torch sets its handler anew for each test, since a failing worker takes it off.
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    made, handler = [], signal.getsignal(signal.SIGCHLD)

    def make(samples, pipeline=None, *, indices=range(23), batch_size=4, seed=None,
             process=SINGLE_PROCESS, num_workers=0, on_bad_image="error",
             warn=pytest.fail):  # fmt: skip
        batches = FileLoader(
            samples,
            pipeline or Pipeline(),
            BatchSampler(torch.tensor([*indices][: len(samples)]), batch_size, seed, process),
            num_workers=num_workers,
            unreadable=UnreadableImages(on_bad_image, len(samples), warn),
            device=torch.device("cpu"),
        )
        made.append(batches)
        return batches

    yield make
    for batches in made:
        if batches._loader._iterator is not None:
            batches._loader._iterator._shutdown_workers()
    signal.signal(signal.SIGCHLD, handler)


def epoch(batches: FileLoader, number: int = 1, start: int = 0) -> list:
    return list(batches.batches(number, start))


def targets_of(batches: list) -> list[int]:
    return [target for _, targets in batches for target in targets.tolist()]


# The last, a line, would be 64 x 2,560,000,000 if its width were resized to 64.
@pytest.mark.parametrize("size", [(50_000, 50_000), (12_000, 10_000), (1, 40_000_000)])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, loader, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(bombs.png(*size, depth=1, colour=0, rows=1000))
    batches = loader([(str(path), 0)], SmallImages(56))
    line = error_line(epoch, batches)
    assert line.startswith(f"error: cannot read image {path}: {size[0]} x {size[1]} pixels")
    advice = "remove the file, or --max(Pixels|Aspect) [0-9]+, or --onBadImage skip; "
    assert re.search(advice, line)
    path.write_bytes(bombs.png(1000, 1000, depth=1, colour=0))  # the same, of an allowed size
    assert len(epoch(batches)) == 1


# Unreadable images:
BAD = {
    "absent": None,
    "no bytes": lambda good: b"",
    "truncated": lambda good: good[: len(good) // 2],
    "header only": lambda good: good[:20],
    "a web page": lambda good: b"<html>moved</html>",
    "zeroed": lambda good: bytes(len(good)),
}


@pytest.mark.parametrize(("damage", "workers"), [*dict.fromkeys(BAD, 0).items(), ("truncated", 1)])
def test_an_unreadable_image_stops_the_run_and_is_named(loader, samples, damage, workers):
    path = Path(samples[5][0])
    Image.fromarray(noise(1, 64)[0]).save(path, format="JPEG")
    good = path.read_bytes()
    path.write_bytes(BAD[damage](good)) if BAD[damage] else path.unlink()
    line = error_line(epoch, loader(samples, num_workers=workers))
    assert line.startswith(f"error: cannot read image {path}: ") and "--onBadImage skip" in line
    path.write_bytes(good)
    assert len(epoch(loader([samples[5]]))) == 1


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
@pytest.mark.parametrize("failures", [1, 3, 4])
def test_a_network_disk_that_fails_for_a_moment_costs_no_image(
    samples, loader, monkeypatch, number, failures
):
    monkeypatch.setattr(retries, "DELAYS_S", (0, 0, 0))
    monkeypatch.setattr(retries, "_failures", 0)
    errors = [OSError(number, os.strerror(number))] * failures

    def read(path: str, options: DecodeOptions) -> tuple[Image.Image, list[str]]:
        if path == samples[5][0] and errors:
            raise errors.pop()
        return decode(path, options)

    monkeypatch.setattr(pipelines, "decode", read)
    batches = loader(samples)
    if failures <= 3:
        assert targets_of(epoch(batches)) == list(range(23)) and not errors
    else:
        assert f"{samples[5][0]}: " in (line := error_line(epoch, batches))
        assert os.strerror(number) in line


def test_a_disk_that_stays_away_is_waited_for_once(samples, loader, monkeypatch):
    waited = []
    monkeypatch.setattr(retries.time, "sleep", waited.append)
    monkeypatch.setattr(retries, "_failures", 0)

    def read(path: str, options: DecodeOptions) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(pipelines, "decode", read)
    line = error_line(epoch, loader(samples, batch_size=23))
    assert "check the disk" in line and waited == [*retries.DELAYS_S]


@pytest.mark.parametrize("kind", [MemoryError, EOFError])
def test_an_error_without_a_text_is_named(samples, loader, monkeypatch, kind):
    def read(path: str, options: DecodeOptions) -> None:
        raise kind

    monkeypatch.setattr(pipelines, "decode", read)
    line = f"cannot read image {samples[0][0]}: {kind.__name__}; fix: "
    assert line in error_line(epoch, loader(samples))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_image_is_counted_and_nothing_takes_its_place(
    samples, loader, workers, monkeypatch
):
    monkeypatch.setattr(file_loader, "MAX_SKIPPED_FRACTION", 0.1)
    for number in (7, 22):
        Path(samples[number][0]).write_bytes(b"not an image")
    warned = []
    batches = loader(
        samples, on_bad_image="skip", warn=warned.append, num_workers=workers, batch_size=11
    )
    for number in (1, 2):
        read = epoch(batches, number)
        assert [targets.tolist() for _, targets in read] == [
            [i for i in range(11) if i != 7], list(range(11, 22)), []
        ]  # fmt: skip
        assert all(len(images) == len(targets) for images, targets in read)
        assert read[2][0].shape == (0, *read[0][0].shape[1:])  # so that steps keep their numbers
    assert len(warned) == 2 and "7.png" in warned[0] and "22.png" in warned[1]  # once each


# total images, reasons of this rank, reasons of another, the last one of too many.
@pytest.mark.parametrize(("total", "local", "other", "last"), [
    (1000, ["a: torn"], [], None), (1000, ["a: torn", "b: torn"], [], "b"),
    (1000, ["a: torn"], ["b: torn"], "b"), (2000, ["a: torn"], ["b: torn"], None),
    (1000, ["a: torn", "a: torn"], ["a: torn"], None),
    (12, ["a: torn"], [], None), (12, ["a: torn", "b: torn"], [], "b"),
])  # fmt: skip
def test_more_than_one_and_one_in_a_thousand_over_all_ranks_stops(total, local, other, last):
    warned = []
    others = [dict.fromkeys(other, "replace it"), {}]
    bad = UnreadableImages("skip", total, warned.append, all_gather=lambda own: [own, others])

    def count() -> None:
        for reason in local:
            bad.add(reason)
        bad.sync()

    if last:
        line = error_line(count)
        assert f"2 of {total} images cannot be read, last {last}: torn" in line
        assert "skip" not in line  # it is what was tried
    else:
        count()
    assert warned == [f"skipped image {reason}" for reason in dict.fromkeys([*local, *other])]


def test_what_helps_is_said_also_when_another_rank_has_found_the_last_image():
    others = [{"a: too wide": "--maxAspect 200", "b: too wide": "--maxAspect 300"}, {}]
    bad = UnreadableImages("skip", 1, lambda _: None, all_gather=lambda own: [own, others])
    assert "last b: too wide; fix: --maxAspect 300; to resume" in error_line(bad.sync)


# Remarks:
@pytest.fixture
def dark_samples(samples) -> list[tuple[str, int]]:
    """Replace images 5 and 9 by ones whose files declare no scale."""
    for number in (5, 9):
        Image.fromarray(np.full((12, 12), 4000, np.uint16)).save(samples[number][0])
    return samples


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remark_is_noted_once_a_run_with_its_first_image(dark_samples, loader, workers):
    warned = []
    train, val = (loader(dark_samples, num_workers=workers, warn=warned.append) for _ in range(2))
    val.unreadable.noted = train.unreadable.noted
    for batches, number in ((train, 1), (val, 1), (train, 2)):
        assert len(targets_of(epoch(batches, number))) == 23
    assert len(warned) == 1 and warned[0].endswith(f"; first {dark_samples[5][0]}")
    assert "--whiteLevel 4095" in warned[0]


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_remark_that_only_another_rank_meets_is_noted_after_the_epoch(policy):
    calls, warned = [], []

    def all_gather(own: list) -> list[list]:
        calls.append(own)
        return [own, [{}, {"shared": "B", "other": "C"}]]

    images = UnreadableImages(policy, 1000, warned.append, all_gather)
    images.note("shared", "A")
    for _ in range(2):  # every rank takes part in every epoch, whatever it has met
        images.sync()
    assert len(calls) == 2 and warned == ["shared; first A", "other; first C"]


# Order and randomness:
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_counts_every_image_once_and_in_order(samples, loader, workers):
    indices = [4, 2, 20, 9, 17, 11]
    read = epoch(loader(samples, indices=indices, num_workers=workers))
    assert [targets.tolist() for _, targets in read] == [[4, 2, 20, 9], [17, 11]]
    wanted = torch.from_numpy(noise(23, 12)[indices]).permute(0, 3, 1, 2).double()
    assert torch.equal(torch.cat([images for images, _ in read]), wanted)
    for images, targets in read:
        assert images.dtype == torch.float64 and targets.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert type(images) is torch.Tensor  # no subclass, which would follow into the network


@pytest.mark.parametrize("resize", ["antialias", "torch7"])
def test_batches_are_the_same_for_any_number_of_workers_and_any_start(
    samples, loader, resize, monkeypatch
):
    def make(image_seed=3, **more):
        return loader(samples, augmented(image_seed, resize), **{"seed": 3} | more)

    wanted = {number: epoch(make(), number) for number in (1, 2)}
    monkeypatch.setattr(file_loader, "CHUNK_BYTES", 1500)  # a batch is many chunks
    workers = {count: make(num_workers=count) for count in (1, 4)}
    for number in (1, 2, 1):  # the processes stay for the next epoch
        for batches in workers.values():
            assert same_batches(epoch(batches, number), wanted[number])
    for start in (0, 2, 5, 6):
        assert same_batches(epoch(workers[4], 2, start), wanted[2][start:])
        assert same_batches(epoch(make(), 2, start), wanted[2][start:])
    next(iter(workers[4].batches(1)))  # an epoch that is left early does not disturb the next
    assert same_batches(epoch(workers[4], 2), wanted[2])
    assert not same_batches(wanted[1], wanted[2])
    assert not same_batches(epoch(make(seed=4)), wanted[1])
    assert not same_batches(epoch(make(image_seed=4)), wanted[1])


@pytest.mark.parametrize("resize", ["antialias", "torch7"])
def test_an_image_is_augmented_alike_in_any_batch_and_on_any_replica(samples, loader, resize):
    def drawn(number=1, image_seed=0, **more):
        read = epoch(loader(samples, augmented(image_seed, resize, 9), **more), number)
        images = [image.numpy().tobytes() for images, _ in read for image in images]
        return dict(zip(targets_of(read), images, strict=True))

    wanted = drawn(seed=0)
    assert drawn(seed=9, batch_size=7) == wanted  # in another order and other batches
    assert drawn(indices=[3, 1]) == {3: wanted[3], 1: wanted[1]}
    replicas = [drawn(seed=0, process=ProcessInfo(rank, 2, rank, 2)) for rank in (0, 1)]
    assert replicas[0] | replicas[1] == wanted and not replicas[0].keys() & replicas[1].keys()
    assert len(set(wanted.values())) == 23
    for other in (drawn(number=2), drawn(image_seed=1)):
        assert not set(other.values()) & set(wanted.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_and_the_generators_of_the_process_leave_each_other_alone(
    samples, loader, workers, monkeypatch
):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    def load():
        return epoch(loader(samples, augmented(), seed=0, num_workers=workers))

    torch.manual_seed(1)
    before = states()
    seeded = []  # dropout on a GPU draws from its generator
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    first = load()
    assert seeded == []
    assert states() == before
    torch.manual_seed(2)
    assert states() != before
    assert same_batches(load(), first)


# Loader processes:
@pytest.mark.parametrize("error", [
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.\nmore"),
    RuntimeError("DataLoader timed out after 1 seconds"),
    ConnectionResetError(104, "Connection reset by peer"),
    EOFError("at the end of a pipe"),
], ids=str)  # fmt: skip
def test_a_dead_or_hanging_worker_is_an_error_of_the_data(monkeypatch, error):
    killed = []
    monkeypatch.setattr(file_loader, "kill_children", lambda: killed.append(True))

    @file_loader.translate_worker_errors()
    def fail() -> None:
        raise error

    assert re.match("error: a loader process was killed or hung: .*; fix: .*nThr", error_line(fail))
    assert killed == [True]


def test_a_second_notice_of_a_dead_worker_changes_nothing(monkeypatch):
    dead = "DataLoader worker (pid 7) is killed by signal: Killed."
    handlers = iter([RuntimeError(dead), RuntimeError(dead), None])
    monkeypatch.setattr(signal, "signal", Mock(side_effect=handlers))
    monkeypatch.setattr(file_loader, "kill_children", lambda: None)
    with pytest.raises(DataError), file_loader.translate_worker_errors():
        raise ConnectionResetError(104, "Connection reset by peer")
    assert next(handlers, "all were called") == "all were called"


def test_a_bug_in_a_worker_stays_a_bug(samples, loader):
    def transform(image):
        raise RuntimeError("a bug in a transform")

    read = file_loader.translate_worker_errors()(epoch)
    with pytest.raises(RuntimeError, match="a bug in a transform"):
        read(loader(samples, Pipeline(transform), num_workers=1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_loader_processes_leave_signals_to_their_parent(samples, loader, number):
    batches = loader(samples, num_workers=2, batch_size=2)
    wanted = epoch(loader(samples, batch_size=2))
    read = iter(batches.batches(1))
    got = [next(read), next(read)]  # one of each: both have begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, number)
    got += read
    assert same_batches(got, wanted)
    assert same_batches(epoch(batches, 2), wanted)
    assert [worker.is_alive() for worker in workers] == [True, True]


# Handing over:
def no_large_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def no_more_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) - 1,) * 2)


def no_directory_for_sockets() -> None:
    tempfile.tempdir = "/nowhere"
    multiprocessing.current_process()._config.pop("tempdir", None)  # of an earlier test


@pytest.mark.parametrize(("prevent", "line"), [
    (no_large_files, "no room for a batch in shared memory; fix: .*--shm-size"),
    (no_more_files, "too many open files.*; fix: .*ulimit -n"),
    (no_directory_for_sockets, "cannot hand over a batch: .*; fix: .*TMPDIR"),
])  # fmt: skip
def test_a_batch_that_a_worker_cannot_hand_over_ends_the_run_at_once(
    samples, loader, monkeypatch, prevent, line
):
    monkeypatch.setattr(file_loader, "kill_children", lambda: None)  # the fixture ends them

    def transform(image):
        if multiprocessing.parent_process():
            prevent()
        return to_pixels(image)

    read = file_loader.translate_worker_errors()(epoch)
    assert re.search(line, error_line(read, loader(samples, Pipeline(transform), num_workers=1)))


# MB free, chunks of a batch and their MB, batches, processes, workers asked for; workers and chunks
# that each prepares in advance, whether that is noted.
@pytest.mark.parametrize(("free", "chunks", "size", "batches", "ranks", "asked", "want", "noted"), [
    (900, 1, 100, 50, 1, 4, (4, 2), False), (899, 1, 100, 50, 1, 4, (4, 1), True),
    (499, 1, 100, 50, 1, 4, (3, 1), True), (200, 1, 100, 50, 1, 4, (1, 1), True),
    (199, 1, 100, 50, 1, 4, None, False), (400, 1, 100, 50, 4, 4, None, False),
    (100, 1, 100, 1, 1, 4, (4, 2), False),
    # Two batches in advance, each of ten chunks; fewer where there is no room for them.
    (900, 10, 10, 50, 1, 4, (4, 5), False), (300, 10, 10, 50, 1, 4, (4, 5), False),
    (299, 10, 10, 50, 1, 4, (4, 4), False), (180, 10, 10, 50, 1, 4, (4, 2), False),
    (179, 10, 10, 50, 1, 4, (4, 1), True),
    # At most a gigabyte, however large the images are.
    (90_000, 10, 100, 50, 1, 4, (4, 2), False), (90_000, 2, 500, 50, 1, 4, (4, 1), False),
])  # fmt: skip
def test_what_is_prepared_in_advance_is_bounded_in_bytes_and_fits_into_shared_memory(
    monkeypatch, free, chunks, size, batches, ranks, asked, want, noted
):
    room = SimpleNamespace(f_bavail=free * 10**6, f_frsize=1)
    monkeypatch.setattr(shared_memory.os, "statvfs", lambda path: room)
    warned = []
    call = partial(fit_in_flight, asked, size * 10**6, chunks, batches, ranks, warned.append)
    if want is None:
        assert re.search("has .* MB free.*fix: enlarge it .*--shm-size=.*--nThr", error_line(call))
    else:
        assert call() == want
    assert bool(warned) == noted


def test_all_workers_share_a_batch_whose_images_are_large(samples, loader, monkeypatch):
    asked = []
    monkeypatch.setattr(shared_memory, "fit_in_flight", lambda *args: asked.append(args) or (2, 2))
    monkeypatch.setattr(file_loader, "CHUNK_BYTES", 2 * Pipeline.image_bytes)
    batches = loader(samples, num_workers=2, batch_size=7)
    assert asked[0][1:4] == (2 * Pipeline.image_bytes, 4, 4)
    batches._keys.chunks = [[(1, 0)]]
    assert targets_of(epoch(batches)) == list(range(23))


@pytest.mark.parametrize("resize", ["antialias", "torch7"])
@pytest.mark.parametrize("ten_crops", [False, True])
def test_the_bytes_of_an_image_are_counted_as_the_workers_hand_them_over(
    samples, resize, ten_crops
):
    pipeline = LargeImages(8, resize, ((1.0,) * 3,) * 2, torch.device("cpu"), ten_crops=ten_crops)
    picture, _ = pipeline.read(samples[0][0], DecodeOptions(), 1, 0)
    (fields,) = pipeline.prepare(picture)
    assert fields.nbytes == pipeline.image_bytes
