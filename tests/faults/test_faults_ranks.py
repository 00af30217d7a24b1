"""Rows 53, 54, 56, 58 to 61, 65 to 67, 70, 72 and 80 with several processes: all end alike."""

import errno
import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest

import checkpoints
import main
from datasets.rng import permutation
from faults.contract import outcome, refused, saved, status, tiny
from faults.sabotage import (
    at_batch,
    both,
    environment,
    kill,
    nan_loss,
    on_files,
    refuse,
    send,
)
from helpers.run_main import Ranks, run, run_ranks

FLAGS = {"nEpochs": 3, "dropRate": 0.2, "nGPU": 0}
BOTH = [0, 1]


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> dict:
    """What the undisturbed run of two processes comes to."""
    directory = tmp_path_factory.mktemp("complete")
    assert codes(run_ranks(tiny(**FLAGS, save=directory), 2)) == [0, 0]
    return outcome(directory)


def codes(results) -> list[int]:
    return [result.code for result in results]


def again(directory: Path, **flags) -> list:
    return run_ranks(tiny(**FLAGS | flags, resume="auto", save=directory), 2)


def goes_on(directory: Path, complete: dict) -> None:
    """Assert that running it again brings it to where the undisturbed run ends."""
    results = again(directory)
    assert codes(results) == [0, 0], results
    assert outcome(directory) == complete


def refused_by_all(results, code: int, pattern: str) -> None:
    """Assert that all processes end with `code`, and that one of them says why."""
    assert codes(results) == [code] * len(results), results
    refused(results[0], code, pattern)
    assert not any(result.err or result.out for result in results[1:]), results


# Rows 58 and 60.


@pytest.mark.parametrize("rank", BOTH)
@pytest.mark.parametrize(
    ("phase", "k", "steps"), [("train", 1, 1), ("train", 6, 6), ("train", 8, 8), ("val", 2, 8)]
)
def test_a_signal_to_one_process_stops_all_at_the_same_step(
    tmp_path, complete, rank, phase, k, steps
):
    moment = partial(at_batch, partial(send, signal.SIGTERM), k, phase)
    # Rank 1 has no batch of its own in the evaluation of these few images.
    rank = 0 if phase == "val" else rank
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, {rank: moment})
    assert codes(results) == [75, 75], results
    assert status(tmp_path)["state"] == "preempted" and status(tmp_path)["code"] == 75
    assert status(tmp_path)["global_step"] == steps
    assert results[0].err.splitlines()[-1].startswith(f"stopped: SIGTERM, {tmp_path} is saved; ")
    assert results[1].err == ""
    goes_on(tmp_path, complete)


def test_the_launcher_may_repeat_the_signal_that_its_processes_have_had_already(tmp_path, complete):
    """Row 61: a scheduler tells the whole group, and torchrun passes it on as well."""
    twice = partial(both_now, signal.SIGTERM)
    results = run_ranks(
        tiny(**FLAGS, save=tmp_path), 2, dict.fromkeys(BOTH, partial(at_batch, twice, 6))
    )
    assert codes(results) == [75, 75], results
    goes_on(tmp_path, complete)


def both_now(number: int) -> None:
    send(number)
    send(number)


def impatiently(number: int) -> None:
    """A second signal, after the time within which it would be a repetition."""
    from distributed import signals

    signals.DUPLICATE_SIGNAL_S = 0
    both_now(number)


def test_a_second_signal_later_on_ends_a_process_at_once(tmp_path, complete):
    """Row 59."""
    moment = partial(at_batch, partial(impatiently, signal.SIGTERM), 6)
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, dict.fromkeys(BOTH, moment))
    assert codes(results) == [143, 143], results
    goes_on(tmp_path, complete)


def at_start(number: int) -> None:
    """A signal while the processes have not met yet."""
    from distributed import signals

    install = signals.SignalHandler.install

    def install_and_send(self):
        installed = install(self)
        send(number)
        return installed

    signals.SignalHandler.install = install_and_send


@pytest.mark.parametrize("rank", BOTH)
def test_a_signal_while_they_start_stops_them_once_they_have_met(tmp_path, complete, rank):
    """Row 62."""
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, {rank: partial(at_start, signal.SIGTERM)})
    assert codes(results) == [75, 75], results
    assert status(tmp_path)["global_step"] == 1
    goes_on(tmp_path, complete)


# Row 56.


@pytest.mark.parametrize("rank", BOTH)
@pytest.mark.parametrize("k", [1, 6])
def test_a_loss_that_is_not_finite_in_one_process_ends_all_before_the_update(
    tmp_path, complete, rank, k
):
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, {rank: partial(nan_loss, k)})
    epoch, step = (k - 1) // 4 + 1, (k - 1) % 4 + 1
    refused_by_all(results, 5, rf"loss is not finite at epoch {epoch}, step {step}; fix: lower")
    order = permutation(32, "order", 0, epoch).tolist()
    assert status(tmp_path)["batch"] == order[8 * (step - 1) : 8 * step]
    state = checkpoints.load_latest(tmp_path, pytest.fail)
    assert (state["global_step"] if state else 0) == (k - 1) // 4 * 4
    goes_on(tmp_path, complete)


# Row 65.


def fail() -> None:
    raise ZeroDivisionError("out of luck")


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize("action", [kill, crash])
@pytest.mark.parametrize("rank", BOTH)
def test_when_a_process_is_killed_the_others_name_it_and_end(tmp_path, complete, action, rank):
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, {rank: partial(at_batch, action, 6)})
    assert results[rank].code < 0
    refused(results[1 - rank], 8, rf"process {rank} \(host .*, \d+\) is lost .*; fix: ")
    assert results[rank].err == ""
    assert status(tmp_path)["state"] == "failed" and status(tmp_path)["code"] == 8
    assert status(tmp_path)["lost"] == [rank]
    assert status(tmp_path)["checkpoint"] == "checkpoint_000000004.pt"
    goes_on(tmp_path, complete)


@pytest.mark.parametrize("rank", BOTH)
def test_a_bug_in_one_process_ends_all_and_its_traceback_is_shown(tmp_path, rank):
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, {rank: partial(at_batch, fail, 6)})
    assert codes(results) == [1, 1], results
    assert "ZeroDivisionError: out of luck" in results[rank].err
    assert "Traceback" not in results[1 - rank].err
    if rank == 1:
        assert "a bug in process 1: ZeroDivisionError" in results[0].err
        assert "a bug in process 1" in status(tmp_path)["reason"]


# Row 66.


def impatient() -> None:
    """Do not leave this process long to meet others, or to end by itself."""
    from distributed import peer_monitor, rendezvous, signals

    peer_monitor.ABORT_GRACE_S = rendezvous.RENDEZVOUS_TIMEOUT_S = signals.STARTUP_TIMEOUT_S = 1


def stop_oneself() -> None:
    send(signal.SIGSTOP)


@pytest.mark.parametrize(("rank", "batch"), [(0, 6), (1, 1)])
def test_a_process_that_hangs_is_not_waited_for_longer_than_asked(tmp_path, complete, rank, batch):
    """Nor is one that has not yet got used to its steps, which may take longer then."""
    argv = tiny(**FLAGS, timeout=2, save=tmp_path)
    sabotages = {rank: partial(at_batch, stop_oneself, batch), 1 - rank: impatient}
    ranks = Ranks(argv, 2, sabotages)
    result = ranks[1 - rank].wait(30)
    refused(result, 8, rf"process {rank} \(host .*, \d+\) is lost \(.*timed out.*\); fix: ")
    ranks[rank].signal(signal.SIGKILL)
    ranks[rank].wait()
    goes_on(tmp_path, complete)


# Row 67, goal G11: whatever fails in whichever process, all end with it.


FULL = partial(refuse, errno.ENOSPC)
PHASES = {
    "run directory": {"operation": "mkdir", "name": r"\."},
    "config": {"operation": "write", "name": r"\.config"},
    "log": {"operation": "fsync", "name": r"\.log"},
    "checkpoint, open": {"operation": "open", "name": r"\.checkpoint"},
    "checkpoint, write": {"operation": "write", "name": r"\.checkpoint", "k": 2},
    "checkpoint, fsync": {"operation": "fsync", "name": r"\.checkpoint"},
    "checkpoint, rename": {"operation": "rename", "name": "checkpoint"},
    "checkpoint, remove": {"operation": "remove", "name": "checkpoint"},
    "status": {"operation": "fsync", "name": r"\.status", "k": 3},
    "model": {"operation": "write", "name": r"\.model_last"},
    "best model": {"operation": "rename", "name": "model_best"},
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_save_that_fails_in_the_first_process_ends_all_in_the_same_way(tmp_path, complete, phase):
    directory = tmp_path / "run"
    argv = tiny(**FLAGS, save=directory)
    results = run_ranks(argv, 2, {0: partial(on_files, FULL, directory, **PHASES[phase])})
    refused_by_all(results, 6, "no space in .*; fix: free space")
    goes_on(directory, complete)


@pytest.fixture
def begun(tmp_path) -> Path:
    """A run of two processes that was killed in its second epoch."""
    directory = tmp_path / "run"
    run_ranks(tiny(**FLAGS, save=directory), 2, dict.fromkeys(BOTH, partial(at_batch, kill, 6)))
    return directory


def broken_read(rank_fails: str) -> None:
    """What a process cannot do while it resumes."""
    import models.factory
    from errors import CheckpointError
    from experiment import resume

    def broken(*_, **__):
        raise CheckpointError("it cannot be read", "restore it")

    module = {"find_checkpoint": resume, "restore": resume, "create": models.factory}[rank_fails]
    setattr(module, rank_fails, broken)


@pytest.mark.parametrize(("rank", "step"), [(0, "find_checkpoint"), (0, "restore"), (1, "restore"),
                                            (1, "create")])  # fmt: skip
def test_a_load_that_fails_in_one_process_ends_all_in_the_same_way(begun, complete, rank, step):
    before = saved(begun)
    results = run_ranks(
        tiny(**FLAGS, resume="auto", save=begun), 2, {rank: partial(broken_read, step)}
    )
    refused_by_all(results, 4, "it cannot be read; fix: restore it")
    assert saved(begun) == before
    goes_on(begun, complete)


def test_data_that_only_one_process_cannot_read_ends_all(tmp_path):
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, {1: no_data})
    refused_by_all(results, 3, "there is nothing here; fix: bring it")


def no_data() -> None:
    import datasets.factory
    from errors import DataError

    def missing(*_, **__):
        raise DataError("there is nothing here", "bring it")

    datasets.factory.create = missing


# Rows 53, 54, 69 and 70, and what every process would say.


def test_a_mistyped_flag_is_said_once(tmp_path):
    results = run_ranks(tiny(growthrate=3, save=tmp_path / "run"), 2)
    assert codes(results) == [2, 2]
    lines = [line for result in results for line in result.err.splitlines()]
    assert len(lines) == 1 and "did you mean growthRate?" in lines[0]
    assert not (tmp_path / "run").exists()


def one_gpu() -> None:
    import torch

    torch.cuda.device_count = lambda: 1


def test_more_processes_than_gpus_are_refused_with_both_numbers(tmp_path):
    argv = tiny(save=tmp_path / "run")  # the first one has its GPU, which it does not here
    result = run_ranks(argv, 2, {0: partial(os._exit, 0), 1: one_gpu})[1]
    refused(result, 2, "2 processes on this machine but 1 CUDA device; fix: .*nproc-per-node 1")


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path):
    argv = tiny(**FLAGS | {"batchSize": 8}, save=tmp_path / "run")
    results = run_ranks(argv, 3)
    assert codes(results) == [2, 2, 2]
    (line,) = [line for result in results for line in result.err.splitlines()]
    assert re.fullmatch(r"error: batchSize 8 over 3 processes .*; fix: use 9, or another .*", line)


def other_data() -> None:
    from datasets import synthetic

    noisy = synthetic._noisy

    def other(*args):
        images = noisy(*args)
        images.pixels[0] += 1
        return images

    synthetic._noisy = other


def other_torch() -> None:
    from distributed import rendezvous

    rendezvous.code_version = lambda: {"torch": "1.0", "code": "old"}


@pytest.mark.parametrize(
    ("sabotage", "pattern"),
    [
        (other_torch, "torch differs between processes 0 and 1: .* and 1.0; fix: start every"),
        (other_data, "training_set differs between processes 0 and 1: "),
    ],
)
def test_processes_that_do_not_have_the_same_are_refused(tmp_path, sabotage, pattern):
    refused_by_all(run_ranks(tiny(**FLAGS, save=tmp_path), 2, {1: sabotage}), 2, pattern)


def test_processes_with_other_flags_are_refused(tmp_path):
    ranks = Ranks(tiny(**FLAGS, save=tmp_path), 2, {1: partial(change_flags, "--LR=0.2")})
    refused_by_all(ranks.wait(), 2, "LR differs between processes 0 and 1: 0.1 and 0.2")


def change_flags(flag: str) -> None:
    parse_and_run = main.main
    main.main = lambda argv: parse_and_run([*argv, flag])


# Row 72.


def take_over(directory: Path) -> None:
    (directory / ".lock").write_text("host elsewhere, process 1, since 2030-01-01 00:00:00\n")


def test_a_run_that_another_node_has_taken_over_stops_writing(tmp_path):
    """Where the file system's locks do not reach from node to node."""
    moment = partial(at_batch, partial(take_over, tmp_path), 6)
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, {0: moment})
    refused_by_all(results, 7, "taken over by host elsewhere, process 1, since .*; fix: ")
    assert max(tmp_path.glob("checkpoint_*.pt")).name == "checkpoint_000000004.pt"
    assert status(tmp_path)["state"] == "running"  # the verdict is the other one's to give


# Rows 68 and 80.


def orphan(directory: Path) -> None:
    """Leave a process of the run without its launcher."""
    environment(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    pid = os.fork()
    if pid:
        (directory / "pid").write_text(str(pid))
        while not (directory / "checkpoint_000000004.pt").exists():
            time.sleep(0.01)
        kill()


def slowly() -> None:
    time.sleep(0.02)


def test_a_process_whose_launcher_was_killed_saves_and_ends(tmp_path, complete):
    argv = tiny(**FLAGS | {"nEpochs": 100}, save=tmp_path)
    sabotage = partial(both, partial(on_every_batch, slowly), partial(orphan, tmp_path))
    assert run(argv, sabotage).code == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}/status").exists() and status(tmp_path)["state"] == "running":
        assert time.monotonic() < end, "it is still running"
        time.sleep(0.05)
    verdict = json.loads((tmp_path / "status.json").read_text())
    assert (verdict["state"], verdict["code"]) == ("preempted", 75)


def on_every_batch(action) -> None:
    from engine import metrics

    add = metrics.Metrics.add

    def add_and_act(self, *args) -> None:
        action()
        add(self, *args)

    metrics.Metrics.add = add_and_act


def note_return(report: Path) -> None:
    """Make `report` when the program returns, after which the interpreter would end."""
    ended = main.main

    def noted(argv: list[str]) -> int:
        code = ended(argv)
        report.touch()
        return code

    main.main = noted


@pytest.mark.parametrize("size", [1, 2])
def test_a_finished_run_of_several_processes_leaves_out_the_interpreters_end(tmp_path, size):
    # With gloo groups torch may abort in it. One process alone has it, or the test could not fail.
    reports = [tmp_path / f"returned-{rank}" for rank in range(size)]
    save = tmp_path / "run"
    if size == 1:
        results = [run(tiny(save=save), partial(note_return, reports[0]))]
    else:
        notes = {rank: partial(note_return, report) for rank, report in enumerate(reports)}
        results = run_ranks(tiny(**FLAGS, save=save), size, notes)
    assert codes(results) == [0] * size
    assert " * Finished top1" in results[0].out and status(save)["state"] == "done"
    assert [report.exists() for report in reports] == [size == 1] * size
