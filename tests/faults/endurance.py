"""What surviving costs: `python -m tools.endurance`.

How long a checkpoint keeps training waiting, what it costs to look in every step whether loss and
gradients are finite, and how long a run that is started again takes to its first new step. Prints
the figures and adds them to a CSV file (see faults_results.py). On the CPU this takes a quarter of
an hour, and other work on the machine shows in it.
"""

import datetime
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import experiment.directory
import opts
from cli.flags import Flag, text
from experiment.directory import RunDirectory
from faults.results import Figure, machine, record
from tools import cli

ROOT = Path(__file__).resolve().parents[2]
SAVES, PAIRS, STARTS = 20, 150, 5  # how often each is measured
WARM_UP = 4  # steps or saves that do not count; the first pair begins with a look
CIFAR = ["--dataset=synthetic", "--imageSize=32", "--nClasses=10", "--depth=100",
         "--growthRate=12", "--batchSize=64"]  # fmt: skip

# fmt: off
FLAGS = {flag.name: flag for flag in (
    Flag("only", text, None, "measure this alone", "all", choices=("save", "check", "start")),
    Flag("images", text, "none", "a folder of images of CIFAR's size, on which starting is "
         "measured as well; or none"),
    Flag("disk", text, "runs", "directory on the disk to which checkpoints are written"),
    Flag("csv", text, None, "file to add to, or none",
         "in results/, named after machine, torch and month"),
)}
# fmt: on
USAGE = """usage: python -m tools.endurance [--flag value ...]

What surviving costs a run: a checkpoint, the look for what is not finite, a new start."""


Rows = list[tuple[str, float, str]]  # what was measured, its value, and what is asked of it

# ------------------------------------------------------------------------------- a checkpoint


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
        found = [(name, *place) for name, places in parts.items() for place in places]
        before = [(owner, attribute, getattr(owner, attribute)) for _, owner, attribute in found]
        for name, owner, attribute in found:
            setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))
        try:
            yield
        finally:
            for owner, attribute, function in before:
                setattr(owner, attribute, function)


def prepared(flags: list[str], steps: int):
    """The settings, the data of some steps, and a trainer for the network of some flags."""
    import datasets.factory
    import engine.device
    import models.factory
    import train
    from experiment import console
    from experiment.log import RunLog

    opt = opts.parse(["--nEpochs=2", *flags])
    opt.nImages = opt.batchSize * steps
    device = engine.device.select(opt.nGPU)
    engine.device.configure(opt.cudnn, opt.tf32)
    data = datasets.factory.create(opt, device, console.warn)
    model = models.factory.create(opt, len(data.classes))
    return opt, data, train.create(opt, model, device, RunLog(None))


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


def clocked(function: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_save(name: str, flags: list[str], images: int, limit_ms: int, disk: Path) -> Rows:
    """What checkpoints of a network cost.

    Args:
        images: in an epoch of what the network is trained on.
    """
    opt, data, trainer = prepared(flags, WARM_UP)
    # A step, so that the optimizer has what it has in a run, and its time.
    epoch_s = min(timed_steps(trainer, data, lambda step: None)) * images / opt.batchSize
    saves, model_saves, watch, size_mb = timed_saves(opt, data, trainer, disk)
    save_ms, models_ms = 1e3 * statistics.median(saves), 1e3 * statistics.median(model_saves)
    stall_s = (save_ms * (1 + epoch_s // 600) + models_ms) / 1e3
    return [
        (f"{name}: a checkpoint, ms, median of {SAVES}", save_ms, f"<= {limit_ms}"),
        (f"{name}: the slowest of them, ms", 1e3 * max(saves), ""),
        *((f"{name}: of it {part}, ms", 1e3 * watch.seconds[part] / SAVES, "")
          for part in watch.seconds),
        (f"{name}: size of a checkpoint, MB", size_mb, ""),
        (f"{name}: its files of weights after an epoch, ms", models_ms, ""),
        (f"{name}: an epoch of {images} images here, s", epoch_s, ""),
        (f"{name}: saving, share of an epoch, %", 100 * stall_s / epoch_s, "<= 1"),
        (f"{name}: epoch of which saving is 1 %, s", (save_ms + models_ms) / 10, ""),
    ]  # fmt: skip


def timed_saves(opt: SimpleNamespace, data, trainer, disk: Path):
    """Seconds of each checkpoint, of each writing of the weights; the parts; a checkpoint's MB."""
    import checkpoints
    from fileio import serialization

    parts = {
        "state": [(trainer, "state_dict"), (checkpoints, "on_cpu")],
        "looking whether it is finite": [(checkpoints, "check_tensors")],
        "serialising with CRCs": [(checkpoints, "serialise")],
        "digest": [(serialization, "seal")],
        "write": [
            (checkpoints, "write_whole"),
            (serialization, "write_whole"),
            (experiment.directory, "write_whole"),
        ],
        "fsync": [(os, "fsync")],
        "rename": [(os, "replace")],
        "removing the oldest": [(checkpoints, "_remove_old")],
    }
    watch, saves, model_saves = Stopwatch(), [], []
    facts = {"settings": opts.settings(opt), "data": data.facts, "overrides": []}
    stop = SimpleNamespace(number=0)
    with (
        tempfile.TemporaryDirectory(dir=disk) as root,
        RunDirectory(Path(root)) as directory,
    ):
        saver = checkpoints.Saver(directory, trainer, stop, facts, keep=opt.keep, every_s=600)
        for turn in range(WARM_UP + SAVES):
            if turn == WARM_UP:
                watch.seconds.clear()
            trainer.global_step += 1  # which names the file
            with watch.watch(parts):
                saves.append(clocked(saver.save))
            model_saves.append(clocked(saver.save_models))
        size = checkpoints.newest_first(directory.path)[0].stat().st_size
    return saves[WARM_UP:], model_saves[WARM_UP:], watch, size / 1e6


# ------------------------------------------------------------------------------ the look at a step


def measure_check() -> Rows:
    """What a step costs more because loss and gradients are looked at."""
    import torch

    opt, data, trainer = prepared(CIFAR, WARM_UP + 2 * PAIRS)
    yes = torch.tensor(True)
    without = {
        (trainer, "check_finite"): lambda: None,
        (trainer, "_mark"): lambda bad: None,
        (trainer._gradients, "finish"): lambda loss: (yes, yes),
    }
    watch = Stopwatch()
    real = {(owner, name): watch.timed("look", getattr(owner, name)) for owner, name in without}

    spent: list[float] = []  # looking, in all steps before each

    def with_or_without(step: int) -> None:
        spent.append(watch.seconds["look"])
        # With, without, without, with, ...: what drifts over the minutes cancels out.
        for (owner, name), function in (real if step % 4 in (0, 3) else without).items():
            setattr(owner, name, function)

    times = timed_steps(trainer, data, with_or_without)[WARM_UP:]
    pairs = list(zip(times[::2], times[1::2], strict=True))
    ratios = [pair[i % 2] / pair[1 - i % 2] for i, pair in enumerate(pairs)]
    low, median, high = statistics.quantiles(ratios)
    # Of a median, whose spread is taken from the quartiles as for a normal distribution.
    error = (high - low) / 1.349 * math.sqrt(math.pi / 2 / PAIRS)
    step_s = statistics.median(times)
    looks = [after - before for before, after in pairwise(spent[WARM_UP:]) if after > before]
    name = f"DenseNet-BC-100-12, batches of {opt.batchSize}"
    return [
        (f"{name}: time looking whether it is finite, share of a step, %",
         100 * statistics.median(looks) / step_s, "<= 0.5"),
        (f"{name}: step with the look over step without, {PAIRS} pairs, % more",
         100 * (median - 1), "<= 0.5"),
        (f"{name}: standard error of that, %", 100 * error, ""),
        (f"{name}: a step, s", step_s, ""),
    ]  # fmt: skip


# -------------------------------------------------------------------------------- a new start


def measure_start(name: str, flags: list[str], disk: Path) -> Rows:
    """Seconds from exec to the first new step of a run that is resumed.

    The step is seen by its checkpoint, which is written at once.
    """
    with tempfile.TemporaryDirectory(dir=disk) as root:
        run = Path(root) / "run"
        command = [sys.executable, str(ROOT / "main.py")]
        first = [*command, *flags, "--saveEvery=1e-9", f"--save={run}"]
        again = [*command, f"--resume={run}"]  # a run keeps its settings
        until_a_checkpoint(first, run)
        times = [until_a_checkpoint(again, run) for _ in range(STARTS)]
    return [
        (f"{name}: from exec to the first new step and its checkpoint, s, median of {STARTS}",
         statistics.median(times), "<= 15"),
        (f"{name}: the slowest of them, s", max(times), "<= 15"),
    ]  # fmt: skip


def until_a_checkpoint(words: list[str], run: Path) -> float:
    """Seconds until a new checkpoint is there; the process is killed then.

    Raises:
        RuntimeError: the process ends without.
    """
    before = set(run.glob("checkpoint_*.pt"))
    start = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not set(run.glob("checkpoint_*.pt")) - before:
        if process.poll() is not None:
            raise RuntimeError(process.stderr.read().decode())
        time.sleep(0.005)
    seconds = time.monotonic() - start
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return seconds


# ---------------------------------------------------------------------------------- command line


def measure(own: SimpleNamespace) -> Iterator[tuple[str, Rows]]:
    """The goals that are asked for, each with what was measured."""
    from datasets import registry

    cifar_images, _ = registry.DATASETS["cifar10"].num_images
    imagenet_images, _ = registry.DATASETS["imagenet"].num_images
    disk = Path(own.disk)
    disk.mkdir(parents=True, exist_ok=True)
    if own.only in (None, "save"):
        yield "G5", measure_save("DenseNet-BC-100-12", CIFAR, cifar_images, 100, disk)
        large = ["--dataset=synthetic", "--imageSize=224", "--nClasses=1000", "--depth=161"]
        flags = [*large, "--batchSize=8"]
        yield "G5", measure_save("DenseNet-161", flags, imagenet_images, 1000, disk)
    if own.only in (None, "check"):
        yield "G15", measure_check()
    if own.only in (None, "start"):
        resident = [*CIFAR, f"--nImages={cifar_images}"]
        yield "G17", measure_start(f"{cifar_images} images in memory", resident, disk)
        if own.images != "none":
            folder = [*CIFAR[3:], "--dataset=folder", f"--data={own.images}", "--imageSize=32"]
            yield "G17", measure_start("as many in a folder", folder, disk)


def parse(argv: list[str]) -> SimpleNamespace:
    """Read the flags of this program.

    Raises:
        UsageError: every problem of the flags at once.
    """
    return cli.read(argv, FLAGS).own


def work(argv: list[str]) -> None:
    """Measure, print and add to a CSV file."""
    own = parse(argv)
    today = f"{datetime.date.today():%Y%m}"
    torch = ".".join(version("torch").split(".")[:2])
    default = ROOT / "results" / f"faults_{machine()}_torch{torch}_{today}.csv"
    path = Path(own.csv or default)
    for goal, rows in measure(own):
        only = {"G5": "save", "G15": "check", "G17": "start"}[goal]
        line = f"python -m tools.endurance --only {only}"
        figures = [Figure(goal, *row, line) for row in rows]
        for figure in figures:
            print(f"{goal:4} {figure.what:85} {figure.value:10.4g}  {figure.limit}", flush=True)
        if own.csv != "none":
            record(path, figures)


def main(argv: list[str]) -> int:
    """Run one command line."""
    return cli.run(argv, USAGE, FLAGS, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
