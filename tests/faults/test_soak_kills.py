"""The long form of rows 1 to 13: random kills, every system call of a save, 300 epochs."""

import random
import re
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest

import checkpoints
from faults.contract import (
    TINY,
    TINY_FILES,
    check_whole,
    command,
    losses,
    outcome,
    refused,
    saved,
    tiny,
    write_files,
)
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
    record_losses,
)
from helpers.run_main import Result, run, start

pytestmark = pytest.mark.soak
KILLS = 200
EVERY_STEP = 1e-9  # minutes between checkpoints
IN_MEMORY, IN_FILES = "in memory", "in files"


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict[str, dict]:
    """Two runs: over images in memory, and over files that loader processes may read."""
    root = write_files(tmp_path_factory.mktemp("photographs"))
    return {
        IN_MEMORY: TINY | {"nEpochs": 3, "dropRate": 0.2},
        IN_FILES: TINY_FILES | {"data": root, "nEpochs": 2, "dropRate": 0.2},
    }


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory) -> dict[str, dict]:
    """What each of them comes to."""
    root = tmp_path_factory.mktemp("undisturbed")
    return {kind: finish(flags[kind], root / kind) for kind in flags}


def attempt(flags: dict, directory: Path, *sabotages, **more) -> Result:
    """Start or go on with a run whose losses are recorded."""
    record = partial(record_losses, directory.with_suffix(".losses"))
    argv = command(**{"nThreads": 0, **flags, "save": directory, "resume": "auto", **more})
    return run(argv, partial(both, record, *sabotages))


def finish(flags: dict, directory: Path, *sabotages, **more) -> dict:
    """Bring a run to its end; what it came to, and every loss that it saw on its way."""
    result = attempt(flags, directory, *sabotages, **more)
    assert result.code == 0, result
    return outcome(directory) | {"losses": losses(directory.with_suffix(".losses"))}


# ------------------------------------------------------------------------------------ any moment


def some_moment(draws: random.Random, directory: Path):
    """A kill at a random change of a file, in a random batch, or at a random time."""
    return draws.choice(
        [
            partial(on_files, kill, directory, k=draws.randint(1, 120)),
            partial(at_batch, kill, draws.randint(1, 12), "any"),
            partial(kill_after, draws.uniform(0, 0.8)),
        ]
    )


def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(
    flags, undisturbed, tmp_path, measured
):
    draws, kills, runs, resumes, fresh, wrong = random.Random(0), 0, 0, 0, 0, []
    while kills < KILLS:
        runs += 1
        kind = draws.choice([IN_MEMORY, IN_FILES])
        directory = tmp_path / str(runs)
        for _ in range(draws.randint(1, 4)):
            workers = {"nThreads": draws.choice([0, 2])} if kind == IN_FILES else {}
            every = {"saveEvery": draws.choice([EVERY_STEP, 10])}
            moment = some_moment(draws, directory)
            has_checkpoint = any(directory.glob("checkpoint_*.pt"))
            result = attempt(flags[kind], directory, moment, **workers, **every)
            resumes += has_checkpoint
            fresh += has_checkpoint and "starting afresh" in result.err
            if result.code == 0:  # it was at its end before its moment came
                break
            assert result.code == -signal.SIGKILL, result
            kills += 1
            check_whole(directory)
        if finish(flags[kind], directory) != undisturbed[kind]:
            wrong.append(directory)
    measured("G1", "random SIGKILLs of one process", kills, f">= {KILLS}")
    measured("G1", "runs killed at random, once to four times each", runs, "")
    measured("G1", "runs killed at random that end otherwise than undisturbed", len(wrong), "= 0")
    measured("G13", "resumes after a random SIGKILL", resumes, "")
    measured("G13", "silent fresh starts among them", fresh, "= 0")
    assert not wrong and not fresh


FORGETS = {
    "the position in the epoch": forget_position,
    "the state of the generator": forget_rng,
}


def test_another_seed_or_what_a_resume_forgets_is_noticed(flags, undisturbed, tmp_path, measured):
    """Twins of the test above: it can fail."""
    draws, ends = random.Random(0), []
    for kind, steps in ((IN_MEMORY, 4), (IN_FILES, 6)):
        want = undisturbed[kind]
        ends.append((want, finish(flags[kind], tmp_path / f"{kind}-seed", manualSeed=1)))
        for forgotten, forget in FORGETS.items():
            for k in draws.sample(range(2, steps + 1), 3):  # within the first epoch
                directory = tmp_path / f"{kind}-{forgotten}-{k}"
                killed = partial(at_batch, kill, k)
                result = attempt(flags[kind], directory, killed, saveEvery=EVERY_STEP)
                assert result.code == -signal.SIGKILL, result
                ends.append((want, finish(flags[kind], directory, forget)))
    parts = ("weights", "momentum", "losses")
    unnoticed = sum(any(end[part] == want[part] for part in parts) for want, end in ends)
    measured("G2", "runs with another seed, position or generator", len(ends), "")
    measured("G2", "unnoticed among them", unnoticed, "= 0")
    assert not unnoticed


# ---------------------------------------------------------------- every system call of a save

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
    """Each call of a save: its name, the how manieth of this name it is, and the whole line."""
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
        place = 0
        for call in CALLS_OF_A_FILE:
            found = re.compile(call.replace("FILE", rf"\.{name}"), re.MULTILINE).search(text, place)
            assert found, (name, call)
            place = found.end()
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


# ------------------------------------------------------------------------------------ 300 epochs

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
