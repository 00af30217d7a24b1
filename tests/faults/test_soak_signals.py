"""The long form of rows 2 and 58 to 62: every signal in every phase, and what a SIGKILL costs."""

import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoints
import datasets.factory
from datasets.file_loader import FileLoader
from datasets.memory_loader import MemoryLoader
from experiment import resume
from faults.contract import (
    TINY,
    TINY_FILES,
    check_whole,
    command,
    losses,
    outcome,
    tiny,
    write_files,
)
from faults.sabotage import (
    at_batch,
    before_call,
    both,
    kill,
    kill_after,
    note_time,
    on_files,
    own_group,
    record_losses,
    send,
    send_to_group,
)
from helpers.run_main import ROOT, run, start

pytestmark = pytest.mark.soak
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
ALONE, GROUP = "one process", "a group with loader processes"
MAX_S, P95_S = 25, 5

Moment = Callable[[Callable[[], None], Path], Callable[[], None]]


def file(operation: str, name: str, k: int = 1) -> Moment:
    """At an operation on a file."""
    return lambda action, directory: partial(
        on_files, action, directory, operation=operation, name=name, k=k
    )


def call(function: Callable, k: int = 1) -> Moment:
    """Before a call of a function."""
    return lambda action, directory: partial(before_call, action, function, k)


def batch(k: int, phase: str) -> Moment:
    """At the end of a batch."""
    return lambda action, directory: partial(at_batch, action, k, phase)


PHASES: dict[str, Moment] = {
    "starting": file("", ""),
    "reading the data": call(datasets.factory.create),
    "resuming": call(resume.restore),
    "within a training step": call(torch.Tensor.backward, 2),
    "after a training step": batch(2, "train"),
    "validating": batch(1, "val"),
    "writing the log": file("write", "log"),
    "writing a checkpoint": file("write", r"\.checkpoint"),
    "removing a checkpoint": file("remove", "checkpoint"),
    "writing a model": file("fsync", r"\.model_last"),
}
# Cutting a batch out of memory, and taking one from the loader processes; both in training.
LOADING = {
    ALONE: call(MemoryLoader.make_batch, 4),
    GROUP: call(FileLoader._on_device, 4),
}


@dataclass(frozen=True)
class Trial:
    """How a run ended that was told to stop."""

    code: int
    seconds: float  # from the signal to the end
    steps_lost: int  # that were done by then and are not in the newest checkpoint
    err: str


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict[str, dict]:
    root = write_files(tmp_path_factory.mktemp("photographs"))
    more = {"nEpochs": 3, "dropRate": 0.2, "keep": 1}  # after the last it ends in 0, told or not
    return {ALONE: TINY | more, GROUP: TINY_FILES | {"data": root, "nThreads": 2} | more}


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("undisturbed")
    return {kind: finish(flags[kind], root / kind) for kind in flags}


@pytest.fixture(scope="module")
def begun(flags, tmp_path_factory) -> dict[str, Path]:
    """Runs that were killed in their first epoch and can be resumed within it."""
    root = tmp_path_factory.mktemp("begun")
    for kind in flags:
        argv = command(**flags[kind], saveEvery=1e-9, save=root / kind)
        report = (root / kind).with_suffix(".losses")
        killed = partial(both, partial(record_losses, report), partial(at_batch, kill, 3))
        assert run(argv, killed).code == -signal.SIGKILL
        assert list((root / kind).glob("checkpoint_*.pt"))
    return {kind: root / kind for kind in flags}


def finish(flags: dict, directory: Path) -> dict:
    """Bring a run to its end; what it came to, and every loss that it saw on its way."""
    report = directory.with_suffix(".losses")
    result = run(command(**flags, save=directory, resume="auto"), partial(record_losses, report))
    assert result.code == 0, result
    return outcome(directory) | {"losses": losses(report)}


def told_to_stop(flags: dict, directory: Path, moment: Moment, action) -> Trial:
    """Run until `action`, a signal, at a moment."""
    report, clock = directory.with_suffix(".losses"), directory.with_suffix(".time")
    stop = moment(partial(both, partial(note_time, clock), action), directory)
    sabotage = partial(both, own_group, partial(record_losses, report), stop)
    running = start(command(**flags, save=directory, resume="auto"), sabotage)
    result = running.wait()
    seconds = time.monotonic() - float(clock.read_text())
    done = max((int(step) for step in losses(report)), default=0)
    newest = checkpoints.list_checkpoints(directory)
    saved = checkpoints.load(newest[0])["global_step"] if newest else 0
    return Trial(result.code, seconds, done - saved, result.err)


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def record(measured, which: str, trials: list[Trial]) -> None:
    """Record how signals ended runs."""
    seconds = [trial.seconds for trial in trials]
    measured("G4", f"{which}: trials", len(trials), "")
    wrong = sum(trial.code != 75 for trial in trials)
    measured("G4", f"{which}: trials that did not end in 75", wrong, "= 0")
    measured("G4", f"{which}: seconds to the end, p95", p95(seconds), f"<= {P95_S}")
    measured("G4", f"{which}: seconds to the end, longest", max(seconds), f"<= {MAX_S}")
    lost = sum(trial.steps_lost for trial in trials)
    measured("G3", f"{which}: optimizer steps lost to signals", lost, "= 0")


@pytest.mark.parametrize("kind", [ALONE, GROUP])
def test_every_signal_in_every_phase_ends_in_75_and_loses_nothing(
    flags, undisturbed, begun, tmp_path, measured, kind
):
    trials, wrong = [], []
    for phase, moment in {**PHASES, "loading a batch": LOADING[kind]}.items():
        for number in SIGNALS:
            directory = tmp_path / f"{phase}-{number}"
            if phase == "resuming":
                shutil.copytree(begun[kind], directory)
                shutil.copy(begun[kind].with_suffix(".losses"), directory.with_suffix(".losses"))
            else:
                directory.with_suffix(".losses").touch()
            action = partial({ALONE: send, GROUP: send_to_group}[kind], number)
            trial = told_to_stop(flags[kind], directory, moment, action)
            trials.append(trial)
            clean = "worker" not in trial.err and "Traceback" not in trial.err
            equal = finish(flags[kind], directory) == undisturbed[kind]
            # Of the run that was killed the third step had been made and was not saved.
            lost = trial.steps_lost if phase != "resuming" else 0
            if trial.code != 75 or lost or not clean or not equal:
                wrong.append((phase, number, trial, equal))
    record(measured, f"signals to {kind}", trials)
    measured("G4", f"signals to {kind}: resumed results that differ",
             sum(not equal for *_, equal in wrong), "= 0")  # fmt: skip
    assert not wrong
    assert len(trials) >= 40 and p95([trial.seconds for trial in trials]) <= P95_S


# A network that people train, in batches as they use.
CIFAR = {
    "dataset": "synthetic", "nImages": 192, "imageSize": 32, "depth": 100, "growthRate": 12,
    "batchSize": 64, "nEpochs": 2,
}  # fmt: skip


def test_a_network_for_cifar_stops_within_a_step_and_a_save(tmp_path, measured):
    phases = {name: PHASES[name] for name in (
        "starting", "within a training step", "validating", "writing a checkpoint",
    )} | {"loading a batch": LOADING[ALONE]}  # fmt: skip
    trials = []
    for phase, moment in phases.items():
        for number in SIGNALS:
            directory = tmp_path / f"{phase}-{number}"
            directory.with_suffix(".losses").touch()
            trials.append(told_to_stop(CIFAR, directory, moment, partial(send, number)))
    record(measured, "signals to DenseNet-BC-100-12, batches of 64, one thread", trials)
    assert {trial.code for trial in trials} == {75} and not any(t.steps_lost for t in trials)
    assert max(trial.seconds for trial in trials) <= MAX_S


def test_a_signal_while_a_process_starts_ends_it_in_75(tmp_path, measured):
    """`python main.py` itself, from the moment on when it listens."""
    draws, trials = random.Random(0), []
    for number in SIGNALS:
        for i in range(5):
            directory = tmp_path / f"{number}-{i}"
            argv = tiny(nEpochs=999, save=directory)
            words = [sys.executable, str(ROOT / "main.py"), *argv]
            with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  text=True) as process:  # fmt: skip
                listening = wait_until_it_listens(process.pid)
                time.sleep(draws.uniform(0, 4))
                sent = time.monotonic()
                process.send_signal(number)
                _, err = process.communicate(timeout=60)
            assert listening
            trials.append(Trial(process.returncode, time.monotonic() - sent, 0, err))
            check_whole(directory)
    record(measured, "signals to main.py in its first seconds", trials)
    assert {trial.code for trial in trials} == {75}, trials


def wait_until_it_listens(pid: int) -> bool:
    """Wait until a process handles SIGHUP, the last one that distributed/signals.py asks for."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
        if int(caught, 16) >> (signal.SIGHUP - 1) & 1:
            return True
        time.sleep(0.001)
    return False


# ------------------------------------------------------------------------------- what a kill costs

INTERVAL_S = 1.0


def test_a_kill_costs_at_most_the_time_between_checkpoints(tmp_path, measured):
    draws, lost, steps_s = random.Random(0), [], []
    for i in range(20):
        directory = tmp_path / str(i)
        report = directory.with_suffix(".losses")
        argv = tiny(nImages=80_000, saveEvery=INTERVAL_S / 60, save=directory)
        moment = partial(at_batch, partial(kill_after, draws.uniform(1.5, 4)))
        result = run(argv, partial(both, partial(record_losses, report), moment))
        assert result.code == -signal.SIGKILL, result
        times = {int(step): float(at) for step, _, at in map(str.split, report.open())}
        saved = checkpoints.load(checkpoints.list_checkpoints(directory)[0])["global_step"]
        lost.append(times[max(times)] - times[saved])
        steps_s += [times[step] - times[step - 1] for step in list(times)[1:]]
    measured("G3", "SIGKILLs with a checkpoint each second", len(lost), "")
    measured("G3", "training lost to one of them, at most, s", max(lost), f"<= {INTERVAL_S}")
    assert max(lost) <= INTERVAL_S + 2 * max(steps_s)  # it is looked at after each step
    assert max(lost) > 0.5 * INTERVAL_S
