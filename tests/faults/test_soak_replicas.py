"""The long trials with two processes (`make soak`): kills, signals and lost peers at random."""

import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from faults.contract import outcome, status, tiny
from faults.sabotage import at_batch, both, kill, on_files, send
from faults.test_faults_ranks import at_start, crash, fail
from helpers.recording import losses, order, record_steps
from helpers.run_main import Ranks, run_ranks

pytestmark = pytest.mark.soak
FLAGS = {"nImages": 64, "nEpochs": 4, "dropRate": 0.2, "nGPU": 0, "saveEvery": 1e-9}
NUM_STEPS = 32
KILLS, LOST_PEERS = 60, 50
PHASES = ("start-up", "training", "validation", "saving", "resuming")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    codes = {result.code for result in recorded(directory)}
    assert codes == {0}
    return directory


def recorded(directory: Path, sabotages: dict | None = None, **flags) -> list:
    """Run two processes in `directory`/run, their steps recorded beside it."""
    record, sabotages = partial(record_steps, directory), sabotages or {}
    argv = tiny(**FLAGS | flags, resume="auto", save=directory / "run")
    wanted = {rank: partial(both, record, sabotages.get(rank, int)) for rank in (0, 1)}
    return run_ranks(argv, 2, wanted)


def moment(draw: random.Random, directory: Path, action):
    """Something at random: in a batch, or at an operation on a file of the first process."""
    if draw.random() < 0.5:
        return draw.choice([0, 1]), partial(at_batch, action, draw.randrange(1, 20), "any")
    return 0, partial(on_files, action, directory / "run", k=draw.randrange(1, 60))


def test_two_processes_killed_at_random_end_as_if_they_had_not_been(
    undisturbed, tmp_path, measured
):
    draw, kills, runs, different = random.Random(0), 0, 0, 0
    while kills < KILLS:
        directory = tmp_path / str(runs)
        directory.mkdir()
        for _ in range(draw.randrange(1, 5)):
            rank, sabotage = moment(draw, directory, kill)
            more = {"nThreads": draw.choice([0, 2])}
            codes = [result.code for result in recorded(directory, {rank: sabotage}, **more)]
            kills += any(code < 0 for code in codes)
        assert {result.code for result in recorded(directory)} == {0}
        same = outcome(directory / "run") == outcome(undisturbed / "run")
        same = same and losses(directory).tolist() == losses(undisturbed).tolist()
        different += not (same and order(directory) == order(undisturbed))
        runs += 1
    measured("G1", "random SIGKILLs of one of two processes", kills, f">= {KILLS}")
    measured("G1", "runs of two processes that end otherwise than undisturbed", different, "= 0")
    assert different == 0


def in_phase(phase: str, number: int, directory: Path):
    """The sabotage that sends a signal in a phase of the run."""
    action = partial(send, number)
    if phase in ("start-up", "resuming"):
        return partial(at_start, number)
    if phase == "saving":
        return partial(on_files, action, directory / "run", operation="write", name=r"\.check")
    return partial(at_batch, action, 3, "train" if phase == "training" else "val")


def test_a_signal_in_any_phase_ends_both_processes_with_75(undisturbed, tmp_path, measured):
    seconds, wrong, different, trials = [], 0, 0, 0
    for phase in PHASES:
        for number in SIGNALS:
            for told in ([0], [1], [0, 1]):
                if phase in ("saving", "validation") and 0 not in told:
                    continue  # the second process writes nothing, and has one batch to validate
                directory = tmp_path / str(trials)
                directory.mkdir()
                if phase == "resuming":
                    stop = partial(at_batch, partial(send, signal.SIGTERM), 5)
                    recorded(directory, {1: stop})
                began = time.monotonic()
                sabotage = in_phase(phase, number, directory)
                results = recorded(directory, dict.fromkeys(told, sabotage))
                seconds.append(time.monotonic() - began)
                wrong += [result.code for result in results] != [75, 75]
                assert {result.code for result in recorded(directory)} == {0}
                different += outcome(directory / "run") != outcome(undisturbed / "run")
                trials += 1
    seconds.sort()
    what = "signals to two processes"
    measured("G4", f"{what}: trials", trials, ">= 40")
    measured("G4", f"{what}: trials that did not end in 75", wrong, "= 0")
    measured("G4", f"{what}: seconds, start included, p95", seconds[int(0.95 * trials)], "<= 5")
    measured("G4", f"{what}: seconds, start included, longest", seconds[-1], "<= 25")
    measured("G4", f"{what}: resumed results that differ", different, "= 0")
    assert (wrong, different) == (0, 0) and seconds[-1] <= 25


def test_when_a_process_is_lost_none_is_left(tmp_path, measured):
    draw, seconds, orphans = random.Random(1), [], 0
    for trial in range(LOST_PEERS):
        rank, action = draw.choice([0, 1]), draw.choice([kill, crash, fail])
        at = partial(at_batch, partial(note_and, action, tmp_path / f"{trial}.time"),
                     draw.randrange(1, NUM_STEPS))  # fmt: skip
        ranks = Ranks(tiny(**FLAGS, save=tmp_path / str(trial)), 2, {rank: at})
        pids = [one.process.pid for one in ranks.ranks]
        results = ranks.wait(60)
        seconds.append(time.time() - float((tmp_path / f"{trial}.time").read_text()))
        assert {result.code for result in results} <= {1, 8, -signal.SIGKILL, -signal.SIGSEGV}
        orphans += sum(map(is_alive, pids))
        assert status(tmp_path / str(trial))["state"] == "failed"
    measured("G10", "lost processes of two, on one machine", LOST_PEERS, ">= 50")
    measured("G10", "seconds until both are gone, longest", max(seconds), "<= 10")
    measured("G10", "processes left over", orphans, "= 0")
    assert max(seconds) <= 10 and orphans == 0


def is_alive(pid: int) -> bool:
    """Whether a process still does something; the tests' own server may yet have to bury it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def note_and(action, path: Path) -> None:
    path.write_text(str(time.time()))
    action()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("precision", ["single", "double"])
def test_any_number_of_processes_has_the_same_order_and_losses(tmp_path, measured, size, precision):
    flags = {"nImages": 320, "imageSize": 16, "batchSize": 16, "growthRate": 4, "nEpochs": 1,
             "dropRate": 0.2, "nGPU": 0, "precision": precision}  # fmt: skip
    for count in (1, size):
        directory = tmp_path / str(count)
        directory.mkdir()
        argv = tiny(**flags, syncBN=True, save=directory / "run")
        record = partial(record_steps, directory)
        results = run_ranks(argv, count, dict.fromkeys(range(count), record))
        assert {result.code for result in results} == {0}, results
    one, many = tmp_path / "1", tmp_path / str(size)
    differing = sum(a != b for a, b in zip(order(one), order(many), strict=True))
    gap = ((losses(many) - losses(one)).abs() / losses(one)).max().item()
    what = f"{size} processes and one, 20 steps, {precision} precision"
    measured("G14", f"{what}: steps of other images", differing, "= 0")
    measured("G14", f"{what}: largest relative difference of a loss", gap, "<= 1e-5")
    assert differing == 0 and gap <= 1e-5 and len(losses(many)) == 20
