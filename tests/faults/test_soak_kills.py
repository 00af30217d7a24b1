"""Test rows 1 to 13 at length: random kills, every system call of a save, 300 epochs."""

import random
import re
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest

import checkpoints
from faults.contract import TINY, check_whole, codes, command, outcome, refused, saved, tiny
from faults.sabotage import (
    at_batch,
    both,
    forget_position,
    forget_rng,
    kill,
    kill_after,
    no_fsync,
    on_files,
    pause_at_end_of,
    record_disk_use,
)
from faults.soak import EVERY_STEP
from helpers.run_main import Result, run, start

pytestmark = pytest.mark.soak


def some_moment(draws: random.Random, directory: Path, size: int) -> dict:
    """Kill at a random change of a file, in a random batch, or at a random time."""
    moments = [
        partial(on_files, kill, directory, k=draws.randint(1, 120)),
        partial(at_batch, kill, draws.randint(1, 12 * size), "any"),
        partial(kill_after, draws.uniform(0, 0.8)),
    ]
    number = draws.randrange(3)
    return {draws.randrange(size) if number == 1 else 0: moments[number]}


@pytest.mark.parametrize(
    ("who", "which", "kinds", "at_least"),
    [
        ("one process", "runs killed at random", ["memory", "files"], 200),
        ("one of two processes", "runs of two processes", ["pair"], 60),
    ],
)
def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(
    runs, tmp_path, measured, who, which, kinds, at_least
):
    draws, kills, number, resumes, fresh, wrong = random.Random(0), 0, 0, 0, 0, []
    while kills < at_least:
        number += 1
        soak, directory = runs[draws.choice(kinds)], tmp_path / str(number)
        for _ in range(draws.randint(1, 4)):
            more = {"nThreads": draws.choice([0, 2]), "saveEvery": draws.choice([EVERY_STEP, 10])}
            has_checkpoint = any(directory.glob("checkpoint_*.pt"))
            results = soak.attempt(directory, some_moment(draws, directory, soak.size), **more)
            resumes += has_checkpoint
            fresh += has_checkpoint and "starting afresh" in results[0].err
            if set(codes(results)) == {0}:  # it was at its end before its moment came
                break
            assert -signal.SIGKILL in codes(results), results
            kills += 1
            check_whole(directory)
        if soak.finish(directory) != soak.undisturbed:
            wrong.append(directory)
    measured("G1", f"random SIGKILLs of {who}", kills, f">= {at_least}")
    measured("G1", f"{which} that end otherwise than undisturbed", len(wrong), "= 0")
    measured("G13", f"resumes after a random SIGKILL of {who}", resumes, "")
    measured("G13", f"silent fresh starts among them, {who}", fresh, "= 0")
    assert not wrong and not fresh


def test_another_seed_and_a_resume_that_forgets_are_noticed(runs, tmp_path, measured):
    """Check that the test above can fail."""
    draws, ends = random.Random(0), []
    for kind, steps in (("memory", 4), ("files", 6)):
        soak = runs[kind]
        ends.append((soak.undisturbed, soak.finish(tmp_path / f"{kind}-seed", manualSeed=1)))
        for forget in (forget_position, forget_rng):
            for k in draws.sample(range(2, steps + 1), 3):  # within the first epoch
                directory = tmp_path / f"{kind}-{forget.__name__}-{k}"
                killed = {0: partial(at_batch, kill, k)}
                (result,) = soak.attempt(directory, killed, saveEvery=EVERY_STEP)
                assert result.code == -signal.SIGKILL, result
                ends.append((soak.undisturbed, soak.finish(directory, {0: forget})))
    parts = ("weights", "momentum", "losses")
    unnoticed = sum(any(end[part] == want[part] for part in parts) for want, end in ends)
    measured("G2", "runs with another seed, position or generator", len(ends), "")
    measured("G2", "unnoticed among them", unnoticed, "= 0")
    assert not unnoticed


CALLS = ("open", "openat", "write", "fsync", "rename", "renameat", "close", "unlink", "unlinkat")
CALLS_OF_A_FILE = ("^open.*FILE.*tmp", "^write.*FILE", "^fsync.*FILE", "^close.*FILE",
                   "^rename.*FILE", "^open.*/run", "^fsync.*/run>", "^close.*/run>")  # fmt: skip
SAVING = {"nEpochs": 3, "dropRate": 0.2, "keep": 1}  # so that one is also removed
EPOCH = 2  # whose end is saved: something is there before and something comes after


def traced(directory: Path, fault: str | None = None) -> tuple[Result, list[str]]:
    """Run with one fault from strace while the end of an epoch is saved.

    Args:
        fault: such as `write:signal=KILL:when=2`, counted from the beginning of the save; None
            only lists the calls and ends the process after the save.

    Returns:
        How it ended, and the traced calls.
    """
    ready, log = directory.with_suffix(".ready"), directory.with_suffix(".calls")
    pause = partial(pause_at_end_of, EPOCH, ready, leave=fault is None)
    running = start(tiny(**SAVING, save=directory), pause)
    running.wait_for(ready.exists)
    calls = ",".join(f"?{name}" for name in CALLS)
    injected = ["-e", f"inject={fault}"] if fault else []
    words = ["strace", "-y", "-o", log, "-e", f"trace={calls}", *injected, "-p"]
    with subprocess.Popen(
        [*words, str(running.process.pid)], stderr=subprocess.PIPE, text=True
    ) as strace:
        said = strace.stderr.readline()
        if "attached" in said:
            running.signal(signal.SIGUSR2)
        else:
            running.signal(signal.SIGKILL)
        result = running.wait()
    if "attached" not in said:
        pytest.skip(f"strace cannot attach: {said.strip()}")
    return result, [line for line in log.read_text().splitlines() if re.match(r"\w+\(", line)]


@pytest.fixture(scope="module")
def calls_of_a_save(tmp_path_factory) -> list[tuple[str, int, str]]:
    """List the calls of a save: name, number among those of this name, and the whole line."""
    if not shutil.which("strace"):
        pytest.skip("there is no strace")
    result, lines = traced(tmp_path_factory.mktemp("calls") / "run")
    assert result.code == 0, result
    numbers, found = dict.fromkeys(CALLS, 0), []
    for line in lines:
        name = line.partition("(")[0]
        numbers[name] += 1
        found.append((name, numbers[name], line))
    return found


def test_the_calls_of_a_save_are_those_that_matter(calls_of_a_save):
    text = "\n".join(line for _, _, line in calls_of_a_save)
    for name in ("checkpoint_000000008", "status", "model_last"):
        start = 0
        for call in CALLS_OF_A_FILE:
            found = re.compile(call.replace("FILE", rf"\.{name}"), re.MULTILINE).search(text, start)
            assert found, (name, call)
            start = found.end()
    assert re.search("^unlink.*checkpoint_0000000", text, re.MULTILINE)


@pytest.mark.parametrize("fault", ["signal=KILL", "error=ENOSPC", "error=EIO"])
def test_a_fault_at_any_system_call_of_a_save_loses_nothing(
    calls_of_a_save, tmp_path, measured, fault
):
    reference = tmp_path / "reference"
    assert run(tiny(**SAVING, save=reference), no_fsync).code == 0
    want, stopped, wrong = outcome(reference), 0, []
    for name, k, line in calls_of_a_save:
        directory = tmp_path / f"{name}-{k}"
        result, _ = traced(directory, f"{name}:{fault}:when={k}")
        stopped += result.code != 0
        try:
            check_end(result, directory, fault)
            again = run(tiny(**SAVING, resume="auto", save=directory), no_fsync)
            assert again.code == 0 and outcome(directory) == want, again
        except (AssertionError, checkpoints.CheckpointError) as error:
            wrong.append((line, error))
    what = f"system calls of a save met with {fault.partition('=')[2]}"
    measured("G1", what, len(calls_of_a_save), f">= {3 * len(CALLS_OF_A_FILE)}")
    measured("G1", f"{what}, that stopped the run", stopped, "")
    measured("G1", f"{what}, after which a resumed run ends otherwise", len(wrong), "= 0")
    assert not wrong
    assert stopped > 0.8 * len(calls_of_a_save)  # an error on closing what was read is none


def check_end(result: Result, directory: Path, fault: str) -> None:
    """Assert that a fault ended the run as it should, with everything whole."""
    if fault == "signal=KILL":
        assert result.code == -signal.SIGKILL, result
    elif result.code:  # an error that changes nothing, as on closing a directory, is no failure
        refused(result, 6, "no space|cannot write")
        assert not list(directory.glob(".*.tmp"))
    assert check_whole(directory) >= 1
    assert {"model_last.pt", "model_best.pt"} <= saved(directory).keys()


KEEP = 2
# Wide, so that a checkpoint is mostly weights, as it is of the networks that people train.
LONG = TINY | {"nEpochs": 300, "nImages": 16, "growthRate": 48, "keep": KEEP}


def test_in_300_epochs_there_are_never_fewer_checkpoints_than_kept_nor_more_than_fit(
    tmp_path, measured
):
    draws, kills, least, most = random.Random(0), 0, KEEP, 0
    directory, report = tmp_path / "run", tmp_path / "report"
    argv = command(**LONG, saveEvery=EVERY_STEP, resume="auto", save=directory)
    while True:
        # The first comes when there are several checkpoints; later ones also while resuming.
        k = draws.randint(1 if kills else 200, 600)
        disk = partial(record_disk_use, directory, report)
        result = run(argv, partial(both, disk, partial(on_files, kill, directory, k=k)))
        most = max(most, int(report.read_text()))
        least = min(least, check_whole(directory))
        assert (directory / "model_best.pt").exists()
        if result.code == 0:
            break
        assert result.code == -signal.SIGKILL, result
        kills += 1
    size = max(path.stat().st_size for path in directory.glob("checkpoint_*.pt"))
    measured("G12", "random SIGKILLs within 300 epochs", kills, ">= 20")
    measured("G12", "fewest valid checkpoints at any of them", least, f">= {KEEP}")
    what = "most space of checkpoints and models at any moment, in sizes of a checkpoint"
    measured("G12", what, most / size, f"<= {KEEP + 2}")
    # Two models are one checkpoint, but for the buffers of normalisations that both hold.
    assert kills >= 20 and least >= KEEP and most <= 1.01 * (KEEP + 2) * size
