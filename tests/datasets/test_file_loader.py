"""Images read from files: every format, damaged ones, and batches that depend on no process."""

import functools
import multiprocessing
import os
import random
import re
import signal
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import file_loader, transforms
from datasets.batch_sampler import BatchSampler
from datasets.decode import decode
from datasets.file_loader import FileLoader, ImageFileDataset, UnreadableImages
from errors import DataError
from helpers import run_main
from helpers.sample_data import noise, write_folder

CPU = torch.device("cpu")


class Pixels:
    """A transform without randomness: PIL image -> (3, H, W) from 0 to 255."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


class Number:
    """One random number for each image, to see where it comes from."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.rand(3, 1, 1)


@pytest.fixture
def samples(tmp_path) -> list[tuple[str, int]]:
    """23 small PNG files, each with its number as its class."""
    written = []
    for number, pixels in enumerate(noise(23, 12)):
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path)
        written.append((str(path), number))
    return written


@pytest.fixture
def loader():
    """Makes FileLoader, and ends their processes after the test however that ends."""
    made = []

    def make(
        samples,
        transform=None,
        *,
        indices=None,
        batch_size=4,
        seed=None,
        image_seed=0,
        num_workers=0,
        on_bad_image="error",
        warn=pytest.fail,
        dtype=torch.float32,
    ):
        indices = torch.tensor([*(range(len(samples)) if indices is None else indices)])
        batches = FileLoader(
            ImageFileDataset(samples, transform or Pixels(), image_seed),
            BatchSampler(indices, batch_size, seed),
            num_workers=num_workers,
            unreadable=UnreadableImages(on_bad_image, len(indices), warn),
            image_size=12,
            normalise=lambda images: images.to(dtype),
            device=CPU,
        )
        made.append(batches)
        return batches

    yield make
    for batches in made:
        if batches._loader._iterator is not None:
            batches._loader._iterator._shutdown_workers()


def epoch(batches: FileLoader, number: int = 1, start: int = 0) -> list:
    read = batches.batches(number, start)
    return [(images.clone(), targets.tolist()) for images, targets in read]


def same(some: list, others: list) -> bool:
    return len(some) == len(others) and all(
        torch.equal(images, pixels) and targets == labels
        for (images, targets), (pixels, labels) in zip(some, others, strict=True)
    )


def targets_of(batches: list) -> list[int]:
    return [target for _, targets in batches for target in targets]


# ----------------------------------------------------------------------------------------- decoding


def pixels_of(path: Path) -> np.ndarray:
    image = decode(path)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(decode(path)), np.asarray(image))  # the same each time
    return np.asarray(image)


COLOURS = noise(1, 16)[0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_kept_whatever_the_format(tmp_path, mode):
    image = Image.fromarray(COLOURS // 64 * 64)  # 64 colours fit a palette
    image = image.quantize(64) if mode == "P" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(COLOURS[..., 0]))  # transparency is no colour
    image.save(tmp_path / "image.png")
    assert np.array_equal(pixels_of(tmp_path / "image.png"), COLOURS // 64 * 64)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_images_have_three_equal_channels(tmp_path, mode):
    grey = COLOURS[..., 0] // 128 * 255 if mode == "1" else COLOURS[..., 0]
    Image.fromarray(grey).convert(mode).save(tmp_path / "image.png")
    assert np.array_equal(pixels_of(tmp_path / "image.png"), np.stack([grey] * 3, axis=-1))


def test_images_of_16_bits_are_scaled_to_8_and_not_cut_off(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "image.png")
    found = pixels_of(tmp_path / "image.png").astype(int)
    assert np.abs(found - (ramp / 257)[..., None]).max() <= 1


def test_cmyk_is_converted_to_its_colours(tmp_path):
    image = Image.new("CMYK", (32, 16), (0, 0, 0, 0))
    image.paste((255, 0, 0, 0), (16, 0, 32, 16))
    image.save(tmp_path / "image.jpg", quality=100)
    found = pixels_of(tmp_path / "image.jpg").astype(int)
    assert np.abs(found[:, :16] - 255).max() < 4  # white
    assert np.abs(found[:, 16:] - (0, 255, 255)).max() < 4  # cyan


def test_the_content_counts_and_not_the_name(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "image.jpg", format="PNG")
    assert np.array_equal(pixels_of(tmp_path / "image.jpg"), COLOURS)


def png_of(width: int, height: int) -> bytes:
    """A small file that claims to be a large image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * min(height, 1000)))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(50_000, 50_000), (12_000, 10_000), (1, 100_000_001)])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, loader, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(*size))
    with pytest.raises(DataError) as error:
        epoch(loader([(str(path), 0)]))
    assert f"cannot read image {path}" in str(error.value)
    path.write_bytes(png_of(1000, 1000))  # made in the same way, but of a size that is allowed
    assert len(epoch(loader([(str(path), 0)]))) == 1


def test_an_image_too_narrow_to_be_resized_is_a_bad_image(tmp_path, loader):
    # At 64 pixels across it would be 64 x 2,560,000,000.
    path = tmp_path / "line.png"
    path.write_bytes(png_of(1, 40_000_000))
    with pytest.raises(DataError) as error:
        epoch(loader([(str(path), 0)], transforms.validation(56)))
    assert f"cannot read image {path}" in str(error.value)


# --------------------------------------------------------------------------------------- bad images


def jpeg(tmp_path: Path) -> bytes:
    path = tmp_path / "good.jpg"
    Image.fromarray(noise(1, 64)[0]).save(path)
    return path.read_bytes()


BAD = {
    "no bytes": lambda good: b"",
    "truncated": lambda good: good[: len(good) // 2],
    "header only": lambda good: good[:20],
    "a web page": lambda good: b"<html>moved</html>",
    "zeroed": lambda good: bytes(len(good)),
}


@pytest.mark.parametrize("damage", BAD)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_the_run_and_is_named(tmp_path, loader, samples, damage, workers):
    path = tmp_path / "bad.jpg"
    path.write_bytes(BAD[damage](jpeg(tmp_path)))
    batches = loader([*samples, (str(path), 0)], num_workers=workers)
    with pytest.raises(DataError) as error:
        epoch(batches)
    assert str(path) in str(error.value)
    line = error.value.report()
    assert re.fullmatch("error: cannot read image [^\n]+; fix: [^\n]+--onBadImage skip", line)
    path.write_bytes(jpeg(tmp_path))
    assert len(epoch(loader([(str(path), 0)], num_workers=workers))) == 1


def test_an_absent_image_is_a_bad_image(tmp_path, loader, samples):
    Path(samples[5][0]).unlink()
    with pytest.raises(DataError, match=re.escape(samples[5][0])):
        epoch(loader(samples))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_image_is_counted_and_nothing_takes_its_place(samples, loader, workers):
    path = samples[7][0]
    Path(path).write_bytes(b"not an image")
    many = [(samples[0][0], number) for number in range(1500)]
    many[107] = (path, 107)
    warned = []
    batches = loader(
        many, on_bad_image="skip", warn=warned.append, num_workers=workers, batch_size=50
    )
    for number in (1, 2):
        read = epoch(batches, number)
        assert [len(targets) for _, targets in read] == [50, 50, 49, *[50] * 27]
        assert targets_of(read) == [i for i in range(1500) if i != 107]
        assert all(len(images) == len(targets) for images, targets in read)
    assert len(warned) == 1 and path in warned[0]  # once, not in each epoch


@pytest.mark.parametrize(("bad", "stops"), [(1, False), (2, True)])
def test_more_bad_images_than_one_in_a_thousand_stop_the_run(samples, loader, bad, stops):
    for path, _ in samples[:bad]:
        Path(path).write_bytes(b"not an image")
    many = [samples[min(i, 22)] for i in range(1000)]
    batches = loader(many, on_bad_image="skip", warn=lambda line: None, batch_size=100)
    if not stops:
        assert len(targets_of(epoch(batches))) == 1000 - bad
        return
    with pytest.raises(DataError) as error:
        epoch(batches)
    assert f"2 of 1000 images cannot be read, last {samples[1][0]}" in str(error.value)
    assert "skip" not in error.value.report()  # it is what was tried


def test_a_batch_of_bad_images_only_is_empty_so_that_steps_keep_their_numbers(samples, loader):
    Path(samples[1][0]).write_bytes(b"not an image")
    many = [samples[min(i, 22)] for i in range(1000)]
    batches = loader(many, on_bad_image="skip", warn=lambda line: None, batch_size=1)
    read = epoch(batches)
    assert [len(targets) for _, targets in read] == [1, 0, *[1] * 998]
    assert read[1][0].shape == (0, *read[0][0].shape[1:])


@pytest.mark.parametrize(("total", "other", "stops"), [
    (1000, "b.png: torn", True), (2000, "b.png: torn", False), (1000, "a.png: torn", False)
])  # fmt: skip
def test_bad_images_are_counted_over_all_replicas_once(total, other, stops):
    warned = []
    bad = UnreadableImages("skip", total, warned.append, all_gather=lambda found: [found, [other]])
    bad.add("a.png: torn")
    if stops:
        with pytest.raises(DataError, match=r"2 of 1000 images cannot be read, last b\.png"):
            bad.sync()
    else:
        bad.sync()
    assert warned == [f"skipped image {name}" for name in dict.fromkeys(["a.png: torn", other])]


def test_replicas_that_stop_at_the_first_bad_image_have_nothing_to_compare():
    UnreadableImages("error", 1000, pytest.fail, all_gather=pytest.fail).sync()


# ----------------------------------------------------------------------------- order and randomness


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_counts_every_image_once_and_in_order(samples, loader, workers):
    indices = [4, 2, 20, 9, 17, 11]
    read = epoch(loader(samples, indices=indices, num_workers=workers))
    assert [targets for _, targets in read] == [[4, 2, 20, 9], [17, 11]]
    wanted = torch.from_numpy(noise(23, 12)[indices]).permute(0, 3, 1, 2).float()
    assert torch.equal(torch.cat([images for images, _ in read]), wanted)


def test_every_epoch_is_another_permutation_of_the_split(samples, loader):
    indices = list(range(2, 20, 2))
    batches = loader(samples, indices=indices, seed=0)
    first, second = (targets_of(epoch(batches, number)) for number in (1, 2))
    assert sorted(first) == sorted(second) == indices
    assert len({tuple(first), tuple(second), tuple(indices)}) == 3
    assert len(batches.sampler) == 3 and batches.sampler.num_images == len(indices)


def test_batches_are_the_same_for_any_number_of_workers_and_any_start(samples, loader):
    def make(**more):
        return loader(samples, transforms.training(8, True), **{"seed": 3, "image_seed": 3} | more)

    wanted = {number: epoch(make(), number) for number in (1, 2)}
    two = make(num_workers=2)
    for number in (1, 2, 1):  # the processes stay for the next epoch
        assert same(epoch(two, number), wanted[number])
    for start in (0, 2, 5, 6):
        assert same(epoch(two, 2, start), wanted[2][start:])
        assert same(epoch(make(), 2, start), wanted[2][start:])
    # The twins.
    assert not same(wanted[1], wanted[2])
    assert not same(epoch(make(seed=4)), wanted[1])
    other = epoch(make(image_seed=4))
    assert targets_of(other) == targets_of(wanted[1]) and not same(other, wanted[1])


def test_an_epoch_that_is_left_early_does_not_disturb_the_next(samples, loader):
    batches = loader(samples, Number(), seed=0, num_workers=2)
    wanted = epoch(loader(samples, Number(), seed=0), 2)
    next(iter(batches.batches(1)))  # as for the picture in the log
    assert same(epoch(batches, 2), wanted)


def test_what_is_random_belongs_to_seed_epoch_and_image_and_not_to_the_batch(samples, loader):
    def drawn(number=1, indices=None, **more):
        read = epoch(loader(samples, Number(), indices=indices, **more), number)
        images = torch.cat([images for images, _ in read])
        return dict(zip(targets_of(read), images[:, 0, 0, 0].tolist(), strict=True))

    wanted = drawn(seed=0)
    assert drawn(seed=9, batch_size=7) == wanted  # in another order and other batches
    assert drawn(indices=[3, 1]) == {3: wanted[3], 1: wanted[1]}
    assert len(set(wanted.values())) == 23
    for other in (drawn(number=2), drawn(image_seed=1)):
        assert not set(other.values()) & set(wanted.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_and_the_generators_of_the_process_leave_each_other_alone(samples, loader, workers):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    def load():
        return epoch(loader(samples, transforms.training(8, True), seed=0, num_workers=workers))

    torch.manual_seed(1)
    before = states()
    first = load()
    assert states() == before
    torch.manual_seed(2)
    assert states() != before
    assert same(load(), first)


def test_loading_in_the_main_process_does_not_seed_the_gpu(samples, loader, monkeypatch):
    # Dropout on a GPU draws from its generator, which torch.manual_seed sets as well.
    def refuse(seed):
        raise AssertionError("the GPU's generator was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    epoch(loader(samples, Number()))


# ---------------------------------------------------------------------------------- what is yielded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_have_the_type_and_are_channels_last_in_memory(samples, loader, dtype):
    for images, targets in loader(samples, dtype=dtype, num_workers=1).batches(1):
        assert images.dtype == dtype and targets.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert type(images) is torch.Tensor  # no subclass, which would follow into the network


def test_ten_crops_follow_each_other_image_by_image(samples, loader):
    crops = transforms.ten_crops(8)
    for images, targets in loader(samples, crops, batch_size=2).batches(1):
        assert images.shape == (10 * len(targets), 3, 8, 8)
        for image, number in zip(images.unflatten(0, (-1, 10)), targets.tolist(), strict=True):
            assert torch.equal(image, crops(decode(samples[number][0])))
    assert not torch.equal(crops(decode(samples[0][0])), crops(decode(samples[1][0])))


# -------------------------------------------------------------------------------- loader processes


def as_a_program(sabotage=None) -> None:
    """Loader processes are forked, as by the real program, and not started by the tests' server."""
    multiprocessing.set_start_method("fork", force=True)
    if sabotage:
        sabotage()


def in_a_worker(action) -> None:
    """Call `action` in the loader process that is to read the image 5 of training."""
    read = ImageFileDataset.__getitem__

    def sabotaged(self, key):
        if key[1] == 5 and "/train/" in self.samples[5][0]:
            action()
        return read(self, key)

    ImageFileDataset.__getitem__ = sabotaged


def killed_while_loading() -> None:
    in_a_worker(lambda: os.kill(os.getpid(), signal.SIGKILL))


def hanging() -> None:
    file_loader.WORKER_TIMEOUT_S = 1
    in_a_worker(lambda: time.sleep(1000))


def a_bug() -> None:
    in_a_worker(functools.partial(fail, RuntimeError("a bug in a transform")))


def fail(error: Exception) -> None:
    raise error


def killed_while_training() -> None:
    """What the out-of-memory killer does; the training step is under way, nobody waits for data."""
    from train import Trainer

    step = Trainer._train_step

    def sabotaged(self, *args):
        if self.global_step == 3:
            pid = multiprocessing.active_children()[0].pid
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent may know
        step(self, *args)

    Trainer._train_step = sabotaged


def own_group() -> None:
    os.setpgid(0, 0)


@pytest.fixture
def run(tmp_path):
    """Starts the program on a folder of large images, with two loader processes."""
    counts = dict.fromkeys("ab", 12)
    write_folder(tmp_path / "data", {"train": counts, "val": counts}, size=70)
    command = (
        f"--dataset folder --data {tmp_path / 'data'} --imageSize 65 --d1 1 --d2 1 --d3 1 --d4 1 "
        f"--growthRate 2 --batchSize 3 --nThreads 2 --nGPU 0 --save {tmp_path / 'run'}"
    )
    started = []

    def start(sabotage=None, more: str = "--nEpochs 500") -> run_main.Running:
        sabotaged = functools.partial(as_a_program, sabotage)
        started.append(run_main.start(f"{command} {more}", sabotaged))
        return started[-1]

    yield start
    for running in started:
        if running.process.is_alive():
            running.signal(signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="forks loader processes")
@pytest.mark.parametrize("sabotage", [killed_while_loading, killed_while_training, hanging])
def test_a_dead_or_hanging_loader_process_ends_the_run_with_3(run, sabotage):
    result = run(sabotage).wait()
    assert result.code == 3, result.err
    pattern = "error: a loader process was killed or hung: .*; fix: .*nThreads.*\n"
    assert re.fullmatch(pattern, result.err), result.err


@pytest.mark.skipif(sys.platform != "linux", reason="forks loader processes")
def test_a_bug_in_a_loader_process_stays_a_bug(run):
    result = run(a_bug).wait()
    assert result.code == 1
    assert "a bug in a transform" in result.err and "killed or hung" not in result.err


@pytest.mark.skipif(sys.platform != "linux", reason="forks loader processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_lets_the_step_finish(run, tmp_path, number):
    running = run(own_group)
    log = tmp_path / "run" / "log.jsonl"
    running.wait_for(lambda: log.exists() and log.read_text().count("\n") >= 1)
    os.killpg(running.process.pid, number)
    result = running.wait()
    assert result.code == 75, result.err
    assert "loader process" not in result.err and "is saved" in result.err


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
    assert same([(images, targets.tolist()) for images, targets in got], wanted)
    assert same(epoch(batches, 2), wanted)
    assert [worker.is_alive() for worker in workers] == [True, True]
