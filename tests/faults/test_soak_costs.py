"""Measure the costs of surviving: a checkpoint, the check for non-finite values, a new start.

No time is asserted, since other work on the machine shows in it: `--record FILE` keeps the figures.
Checkpoints are written below pytest's `--basetemp`; name one on the disk that is asked about.
"""

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoints
import datasets.factory
import engine.device
import models.factory
import opts
import train
from datasets import registry
from experiment import console
from experiment.directory import RunDirectory
from experiment.log import RunLog
from faults.contract import TINY, command
from helpers.run_main import ROOT
from helpers.sample_data import write_folder

SAVES, PAIRS, STARTS = 20, 24, 5  # how often each is measured
WARM_UP = 4  # steps or saves that do not count; the first pair begins with a look
CIFAR = {"dataset": "synthetic", "imageSize": 32, "nClasses": 10, "depth": 100, "growthRate": 12,
         "batchSize": 64}  # fmt: skip
IMAGENET = {"dataset": "synthetic", "imageSize": 224, "nClasses": 1000, "depth": 161,
            "batchSize": 8}  # fmt: skip
# Each is also tried on a network that takes no time, so that `make test` knows whether it works.
NETWORKS = [
    ("tiny", TINY, 100),
    pytest.param("DenseNet-BC-100-12", CIFAR, 100, marks=pytest.mark.soak),
]


def prepared(flags: dict[str, object], steps: int):
    """Make the settings, the data of some steps, and a trainer for the network of some flags."""
    opt = opts.parse(command(**flags | {"nEpochs": 2, "nImages": steps * flags["batchSize"]}))
    device = engine.device.select(opt.nGPU)
    engine.device.configure(opt.cudnn, opt.tf32)
    data = datasets.factory.create(opt, device, console.warn)
    model = models.factory.create(opt, len(data.classes))
    return opt, data, train.Trainer(opt, model, device, RunLog(None))


def clocked(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("name", "flags", "limit_ms"),
    [*NETWORKS, pytest.param("DenseNet-161", IMAGENET, 1000, marks=pytest.mark.soak)],
)
def test_checkpoint_costs_are_recorded(name, flags, limit_ms, tmp_path, measured):
    opt, data, trainer = prepared(flags, 1)
    trainer.train(data.train, lambda: None)  # so that the optimizer has what it has in a run
    trainer.metadata = train.Metadata(opts.settings(opt), data.metadata, [])
    saves, model_saves = [], []
    with RunDirectory(tmp_path) as directory:
        stop = SimpleNamespace(signum=0)
        saver = checkpoints.CheckpointSaver(directory, trainer, stop, keep=opt.keep, every_s=600)
        for _ in range(WARM_UP + SAVES):
            trainer.global_step += 1  # which names the file
            saves.append(1e3 * clocked(saver.save))
            model_saves.append(1e3 * clocked(saver.save_models))
    kept = checkpoints.list_checkpoints(tmp_path)
    assert len(kept) == opt.keep and all(map(checkpoints.load, kept))
    saves = saves[WARM_UP:]
    what = f"a checkpoint, ms, median of {SAVES}"
    measured("G5", f"{name}: {what}", statistics.median(saves), f"<= {limit_ms}")
    measured("G5", f"{name}: the slowest of them, ms", max(saves), "")
    measured("G5", f"{name}: size of a checkpoint, MB", kept[0].stat().st_size / 1e6, "")
    models_ms = statistics.median(model_saves[WARM_UP:])
    measured("G5", f"{name}: its files of weights after an epoch, ms", models_ms, "")


@pytest.mark.parametrize(("name", "flags", "limit_ms"), NETWORKS)
def test_the_time_of_looking_for_not_finite_gradients_is_recorded(name, flags, limit_ms, measured):
    opt, data, trainer = prepared(flags, WARM_UP + 2 * PAIRS)
    yes = torch.tensor(True)
    without = {
        (trainer, "check_finite"): lambda: None,
        (trainer._guard, "record_nonfinite"): lambda nonfinite: None,
        (trainer._reducer, "reduce"): lambda loss: (yes, yes),
    }
    looks = {(owner, function): getattr(owner, function) for owner, function in without}
    times: list[float] = []

    def after_step() -> None:
        times.append(time.perf_counter())
        # With, without, without, with, ...: what drifts over the minutes cancels out.
        for (owner, function), call in (looks if len(times) % 4 in (0, 3) else without).items():
            setattr(owner, function, call)

    trainer.train(data.train, after_step)
    steps = [after - before for before, after in pairwise(times)]
    pairs = list(zip(steps[WARM_UP - 1 :: 2], steps[WARM_UP::2], strict=True))
    assert len(pairs) == PAIRS
    ratios = [pair[i % 2] / pair[1 - i % 2] for i, pair in enumerate(pairs)]
    name = f"{name}, batches of {opt.batchSize}"
    what = f"step with the look over step without, {PAIRS} pairs, % more"
    measured("G15", f"{name}: {what}", 100 * (statistics.median(ratios) - 1), "<= 0.5")
    measured("G15", f"{name}: a step, s", statistics.median(steps), "")


@pytest.mark.soak
@pytest.mark.parametrize("name", ["50000 images in memory", "as many in a folder"])
def test_how_long_a_new_start_takes(name, tmp_path, measured):
    run, root = tmp_path / "run", tmp_path / "images"
    flags = CIFAR | {"nImages": registry.DATASETS["cifar10"].num_images[0]}
    if "folder" in name:
        sizes = zip(("train", "val"), registry.DATASETS["cifar10"].num_images, strict=True)
        write_folder(root, {s: {f"{i}": n // 10 for i in range(10)} for s, n in sizes}, 32)
        flags = CIFAR | {"dataset": "folder", "data": root, "nClasses": None}
    first = command(**flags, saveEvery=1e-9, save=run)  # every step is saved
    starts = [until_a_checkpoint(argv, run) for argv in [first, *STARTS * [[f"--resume={run}"]]]]
    steps, times = zip(*starts, strict=True)
    assert list(steps) == sorted(set(steps))  # each start went on where the last had come to
    shutil.rmtree(tmp_path)  # pytest would keep its 60,000 files
    what = f"from exec to the first new step and its checkpoint, s, median of {STARTS}"
    measured("G17", f"{name}: {what}", statistics.median(times[1:]), "<= 15")
    measured("G17", f"{name}: the slowest of them, s", max(times[1:]), "<= 15")


def until_a_checkpoint(argv: list[str], run: Path) -> tuple[int, float]:
    """Return the step of the first new checkpoint, and the seconds to it; kill the process then."""
    before, start = set(checkpoints.list_checkpoints(run)), time.monotonic()
    words = [sys.executable, str(ROOT / "main.py"), *argv]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (new := set(checkpoints.list_checkpoints(run)) - before):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.005)
    seconds = time.monotonic() - start
    process.kill()
    process.communicate()
    return min(map(checkpoints.checkpoint_step, new)), seconds
