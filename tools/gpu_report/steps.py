"""List the steps of `python -m tools.gpu_report`, and run one in processes of its own."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import opts
from cli.flag_types import Settings
from datasets import registry
from tools import cli

MIN_S = 5  # a step is not begun with less time left
KILL_S = 10  # longest wait for a killed process; the kernel may keep one in a driver's call

MACHINE = "machine"  # the step that has to succeed for others that need a GPU


class Network(NamedTuple):
    """Describe a network that is measured."""

    title: str
    batch_size: int
    flags: str  # of main.py, besides the batch size
    replays_s: float  # limits of the steps
    eager_s: float

    @property
    def all_flags(self) -> str:
        """Return main.py's flags that say what a step trains on."""
        return f"{self.flags} --batchSize {self.batch_size}"


_BC100 = "--depth 100 --growthRate 12 --precision bf16"
NETWORKS = {  # by the ends of the steps' names
    "64": Network("BC-100-12, batch 64", 64, _BC100, 60, 25),
    "512": Network("BC-100-12, batch 512", 512, _BC100, 30, 25),
    "densenet-121": Network(
        "DenseNet-121, 224 pixels, batch 256",
        256,
        "--imageSize 224 --nClasses 1000 --precision bf16",
        60,
        40,
    ),
}


@dataclass(frozen=True)
class Step:
    """Describe a program that writes `{path}.csv` or `{path}.run`, and prints what it does."""

    name: str
    limit_s: float
    command: str  # arguments of Python, words with blanks between
    needs_gpu: bool = True


class Outcome(NamedTuple):
    """Say how a step ended."""

    is_done: bool
    seconds: float
    text: str  # such as "done in 12 s", "stopped at its limit of 60 s"


def steps() -> list[Step]:
    """List all steps in their order: peers that take minutes to compile come last."""
    several = "-n 4 " if importlib.util.find_spec("xdist") else ""
    epochs = f"main.py --dataset synthetic --nImages 50000 {_BC100} --batchSize 64 --augment true"
    return [
        Step(MACHINE, 30, "-m tools.gpu_report.machine {path}.csv"),
        Step("gpu-tests", 120, f"-m pytest -m gpu -v -rN -p no:cacheprovider {several}"),
        Step("self-check", 40, "-m tools.gpu_report.differences {path}.csv"),
        *map(_replays, NETWORKS),
        *(_peers(name, "eager", network.eager_s) for name, network in NETWORKS.items()),
        Step("epochs", 50, f"{epochs} --nEpochs 2 --nGPU 1 --save {{path}}.run"),
        Step("model", 60, "-m tools.gpu_report.model {path}.csv", needs_gpu=False),
        _peers("64", "compiled-reduce-overhead", 150),
        _peers("512", "compiled", 150),
        _peers("64", "compiled", 150),
        _peers("512", "compiled-reduce-overhead", 150),
    ]


def _replays(name: str) -> Step:
    command = f"-m tools.gpu_report.replays {{path}}.csv {NETWORKS[name].all_flags}"
    return Step(f"replays-{name}", NETWORKS[name].replays_s, command)


def _peers(name: str, mode: str, limit_s: float) -> Step:
    formats = "*" if mode == "eager" else "channels-last"  # each takes minutes to compile
    flags = f"{NETWORKS[name].all_flags} --only /torchvision/bf16/{formats}/{mode}/ --turns 20"
    return Step(f"{mode}-{name}", limit_s, f"-m tools.benchmark {flags} --csv {{path}}.csv")


def settings(flags: str) -> Settings:
    """Return the settings of a network on synthetic images."""
    opt = opts.parse(["--dataset=synthetic", *flags.split()])
    return opt.replace(nClasses=opt.nClasses or registry.DATASETS["synthetic"].num_classes)


def run_step(step: Step, directory: Path, left_s: float) -> Outcome:
    """Run a step until it ends, or kill it with its processes at its limit.

    Args:
        directory: gets the step's files: what it prints in NAME.log, what it measures beside it.
        left_s: seconds left for all steps.
    """
    if left_s < MIN_S:
        return Outcome(False, 0, "no time was left")
    limit_s, path = min(step.limit_s, left_s), directory / step.name
    command = [sys.executable, *(word.format(path=path) for word in step.command.split())]
    log, start = path.with_suffix(".log"), time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=cli.ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            has_ended = _wait(process, limit_s)
        finally:  # also when this program is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what an ended step has left running
            _wait(process, KILL_S)
    seconds = time.monotonic() - start
    if not has_ended:
        return Outcome(False, seconds, f"stopped at its limit of {limit_s:.0f} s")
    if process.returncode == 0:
        return Outcome(True, seconds, f"done in {seconds:.0f} s")
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return Outcome(False, seconds, f"exit code {process.returncode}: {last.strip()[:200]}")


def _wait(process: subprocess.Popen, limit_s: float) -> bool:
    """Wait for a process; return whether it has ended within the limit."""
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return False
    return True
