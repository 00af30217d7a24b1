"""What surviving costs: a checkpoint, the look for what is not finite, a new start.

No time is asserted, since other work on the machine shows in it: `--record FILE` keeps the figures.
Checkpoints are written below pytest's `--basetemp`; name one on the disk that is asked about.
"""

import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoints
import datasets.factory
import engine.device
import experiment.directory
import models.factory
import opts
import train
from datasets import registry
from experiment import console
from experiment.directory import RunDirectory
from experiment.log import RunLog
from faults.contract import TINY, command
from fileio import tensor_files
from helpers.run_main import ROOT
from helpers.sample_data import write_folder

SAVES, PAIRS, STARTS = 20, 24, 5  # how often each is measured
WARM_UP = 4  # steps or saves that do not count; the first pair begins with a look
CIFAR = {"dataset": "synthetic", "imageSize": 32, "nClasses": 10, "depth": 100, "growthRate": 12,
         "batchSize": 64}  # fmt: skip
IMAGENET = {"dataset": "synthetic", "imageSize": 224, "nClasses": 1000, "depth": 161,
            "batchSize": 8}  # fmt: skip


def parts_of_a_save(trainer: train.Trainer) -> dict[str, list[tuple[object, str]]]:
    """What a checkpoint consists of, by the functions that do it: {part: [(owner, name)]}."""
    return {
        "state": [(trainer, "state_dict"), (checkpoints, "on_cpu")],
        "looking whether it is finite": [(checkpoints, "check_tensors")],
        "serialising with CRCs": [(checkpoints, "to_bytes")],
        "digest": [(tensor_files, "append_digest")],
        "write": [(owner, "atomic_write")
                  for owner in (checkpoints, tensor_files, experiment.directory)],
        "fsync": [(os, "fsync")],
        "rename": [(os, "replace")],
        "removing the oldest": [(checkpoints, "_remove_old")],
    }  # fmt: skip


def looks(trainer: train.Trainer) -> dict[tuple[object, str], Callable]:
    """The functions of a step that look whether it is finite, each with one that does not."""
    yes = torch.tensor(True)
    return {
        (trainer, "check_finite"): lambda: None,
        (trainer._guard, "record_nonfinite"): lambda nonfinite: None,
        (trainer._reducer, "reduce"): lambda loss: (yes, yes),
    }


class Stopwatch:
    """The time that functions take, each without the others that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # of what the function calls that is being timed

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, whose time is added to `name`."""

        def call(*args, **kwargs):
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[name] += spent - self._inner.pop()
                self._inner[-1] += spent

        return call

    @contextmanager
    def watch(self, parts: dict[str, list[tuple[object, str]]]) -> Iterator[None]:
        """Time the functions of `parts`: {name: [(owner, attribute)]}."""
        with pytest.MonkeyPatch.context() as patch:
            for name, places in parts.items():
                for owner, attribute in places:
                    patch.setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))
            yield


def test_the_time_of_a_function_is_without_what_it_calls(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)

    def inner():
        clock.now += 1

    def outer():
        clock.now += 10
        owner.inner()
        owner.inner()
        clock.now += 100

    owner, watch = SimpleNamespace(inner=inner, outer=outer), Stopwatch()
    with watch.watch({"in": [(owner, "inner")], "out": [(owner, "outer")]}):
        owner.outer()
        owner.inner()
    assert watch.seconds == {"in": 3, "out": 110}
    owner.outer()
    assert watch.seconds == {"in": 3, "out": 110} and owner.inner is inner


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Give a test the threads that a run has, where other tests have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


def clocked(function: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def prepared(flags: dict[str, object], steps: int):
    """The settings, the data of some steps, and a trainer for the network of some flags."""
    opt = opts.parse(command(**flags | {"nEpochs": 2, "nImages": steps * flags["batchSize"]}))
    device = engine.device.select(opt.nGPU)
    engine.device.configure(opt.cudnn, opt.tf32)
    data = datasets.factory.create(opt, device, console.warn)
    model = models.factory.create(opt, len(data.classes))
    return opt, data, train.Trainer(opt, model, device, RunLog(None))


def timed_steps(trainer, data, before_step: Callable[[int], None]) -> list[float]:
    """Seconds of each step of an epoch; `before_step` gets its number, from 0."""
    times: list[float] = []

    def after_step() -> None:
        nonlocal since
        times.append(time.perf_counter() - since)
        before_step(len(times))
        since = time.perf_counter()

    before_step(0)
    since = time.perf_counter()
    trainer.train(data.train, after_step)
    return times


# Each is also tried on a network that takes no time, so that `make test` knows whether it works.
@pytest.mark.parametrize(
    ("name", "flags", "dataset", "limit_ms"),
    [
        ("tiny", TINY, "cifar10", 100),
        pytest.param("DenseNet-BC-100-12", CIFAR, "cifar10", 100, marks=pytest.mark.soak),
        pytest.param("DenseNet-161", IMAGENET, "imagenet", 1000, marks=pytest.mark.soak),
    ],
)
def test_what_a_checkpoint_costs(name, flags, dataset, limit_ms, tmp_path, all_cores, measured):
    opt, data, trainer = prepared(flags, WARM_UP)
    images, _ = registry.DATASETS[dataset].num_images
    # A step, so that the optimizer has what it has in a run, and its time.
    epoch_s = min(timed_steps(trainer, data, lambda step: None)) * images / opt.batchSize
    watch, saves, model_saves = Stopwatch(), [], []
    trainer.metadata = train.Metadata(opts.settings(opt), data.metadata, [])
    stop = SimpleNamespace(signum=0)
    with RunDirectory(tmp_path) as directory:
        saver = checkpoints.CheckpointSaver(directory, trainer, stop, keep=opt.keep, every_s=600)
        for turn in range(WARM_UP + SAVES):
            if turn == WARM_UP:
                watch.seconds.clear()
            trainer.global_step += 1  # which names the file
            with watch.watch(parts_of_a_save(trainer)):
                saves.append(clocked(saver.save))
            model_saves.append(clocked(saver.save_models))
    saves, model_saves = saves[WARM_UP:], model_saves[WARM_UP:]
    kept = checkpoints.list_checkpoints(tmp_path)
    assert len(kept) == opt.keep and all(map(tensor_files.is_valid, kept))
    assert not list(tmp_path.glob(".*.tmp"))  # nothing half-written is left
    assert watch.seconds.keys() == parts_of_a_save(trainer).keys()
    assert 0 < sum(watch.seconds.values()) <= sum(saves)

    save_ms, models_ms = 1e3 * statistics.median(saves), 1e3 * statistics.median(model_saves)
    stall_s = (save_ms * (1 + epoch_s // 600) + models_ms) / 1e3
    for what, value, limit in (
        (f"a checkpoint, ms, median of {SAVES}", save_ms, f"<= {limit_ms}"),
        ("the slowest of them, ms", 1e3 * max(saves), ""),
        *((f"of it {part}, ms", 1e3 * spent / SAVES, "") for part, spent in watch.seconds.items()),
        ("size of a checkpoint, MB", kept[0].stat().st_size / 1e6, ""),
        ("its files of weights after an epoch, ms", models_ms, ""),
        (f"an epoch of {images} images here, s", epoch_s, ""),
        ("saving, share of an epoch, %", 100 * stall_s / epoch_s, "<= 1"),
        ("epoch of which saving is 1 %, s", (save_ms + models_ms) / 10, ""),
    ):
        measured("G5", f"{name}: {what}", value, limit)


@pytest.mark.parametrize(
    ("name", "flags"),
    [("tiny", TINY), pytest.param("DenseNet-BC-100-12", CIFAR, marks=pytest.mark.soak)],
)
def test_what_looking_for_what_is_not_finite_costs(name, flags, all_cores, measured):
    opt, data, trainer = prepared(flags, WARM_UP + 2 * PAIRS)
    watch, without = Stopwatch(), looks(trainer)
    real = {(owner, name): watch.timed("look", getattr(owner, name)) for owner, name in without}
    spent: list[float] = []  # looking, in all steps before each

    def with_or_without(step: int) -> None:
        # With, without, without, with, ...: what drifts over the minutes cancels out.
        for (owner, name), function in (real if step % 4 in (0, 3) else without).items():
            setattr(owner, name, function)
        spent.append(watch.seconds["look"])

    times = timed_steps(trainer, data, with_or_without)[WARM_UP:]
    taken = [after - before for before, after in pairwise(spent)]
    assert [seconds > 0 for seconds in taken] == [step % 4 in (0, 3) for step in range(len(taken))]
    pairs = list(zip(times[::2], times[1::2], strict=True))
    assert len(pairs) == PAIRS
    ratios = [pair[i % 2] / pair[1 - i % 2] for i, pair in enumerate(pairs)]
    low, median, high = statistics.quantiles(ratios)
    # Of a median, whose spread is taken from the quartiles as for a normal distribution.
    error = (high - low) / 1.349 * math.sqrt(math.pi / 2 / PAIRS)
    step_s = statistics.median(times)
    share = statistics.median(taken[WARM_UP::4]) / step_s

    name = f"{name}, batches of {opt.batchSize}"
    look, more = "time looking whether it is finite", "step with the look over step without"
    measured("G15", f"{name}: {look}, share of a step, %", 100 * share, "<= 0.5")
    measured("G15", f"{name}: {more}, {PAIRS} pairs, % more", 100 * (median - 1), "<= 0.5")
    measured("G15", f"{name}: standard error of that, %", 100 * error, "")
    measured("G15", f"{name}: a step, s", step_s, "")


def in_memory(root: Path) -> dict[str, object]:
    """As many images as CIFAR-10 has, made up."""
    return CIFAR | {"nImages": registry.DATASETS["cifar10"].num_images[0]}


def in_a_folder(root: Path) -> dict[str, object]:
    """As many in files."""
    sizes = zip(("train", "val"), registry.DATASETS["cifar10"].num_images, strict=True)
    write_folder(
        root, {split: {f"{i}": size // 10 for i in range(10)} for split, size in sizes}, 32
    )
    return CIFAR | {"dataset": "folder", "data": root, "nClasses": None}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "data"), [("50000 images in memory", in_memory), ("as many in a folder", in_a_folder)]
)
def test_how_long_a_new_start_takes(name, data, tmp_path, measured):
    run = tmp_path / "run"
    program = [sys.executable, str(ROOT / "main.py")]
    flags = data(tmp_path / "images") | {"saveEvery": 1e-9, "save": run}  # every step is saved
    steps = [until_a_checkpoint([*program, *command(**flags)], run)[0]]
    starts = [until_a_checkpoint([*program, f"--resume={run}"], run) for _ in range(STARTS)]
    steps += [step for step, _ in starts]
    assert steps == sorted(set(steps))  # each start went on where the last had come to
    shutil.rmtree(tmp_path)  # pytest would keep its 60,000 files

    times = [seconds for _, seconds in starts]
    what = f"from exec to the first new step and its checkpoint, s, median of {STARTS}"
    measured("G17", f"{name}: {what}", statistics.median(times), "<= 15")
    measured("G17", f"{name}: the slowest of them, s", max(times), "<= 15")


def until_a_checkpoint(words: list[str], run: Path) -> tuple[int, float]:
    """The step of the first new checkpoint, and the seconds to it; the process is killed then."""
    before = set(checkpoints.list_checkpoints(run))
    start = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (new := set(checkpoints.list_checkpoints(run)) - before):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.005)
    seconds = time.monotonic() - start
    process.kill()
    process.communicate()
    return min(map(checkpoints.checkpoint_step, new)), seconds
