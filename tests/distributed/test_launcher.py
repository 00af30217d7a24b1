"""Test that `--nGPU N` starts N processes: their ranks, forwarded signals, one exit code."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from distributed import launcher
from distributed.launcher import ProcessInfo, combined_exit_code, from_env
from faults.contract import outcome, refused, status, tiny
from faults.sabotage import at_batch, both, kill, own_group, send
from helpers.run_main import LONG_S, run, run_ranks, start, wait_until

FLAGS = {"nEpochs": 3, "dropRate": 0.2}


def cpus_for_gpus() -> None:
    """Let processors stand in for two GPUs, and fork, which is faster, since there is no CUDA."""
    import torch

    import engine.device
    from distributed import peer_monitor

    peer_monitor.MISSING_RANKS_TIMEOUT_S, peer_monitor.HEARTBEAT_S = 0.5, 0.1
    peer_monitor.RECORD_TIMEOUT_S = peer_monitor.ABORT_GRACE_S = LONG_S
    torch.cuda.device_count, torch.cuda.init = lambda: 2, lambda: None
    select = engine.device.select
    engine.device.select = lambda *args: select(*args) and torch.device("cpu")
    torch.cuda.set_device = lambda number: None
    launcher.START_METHOD = "fork"


def on_rank(rank: int, action) -> None:
    if launcher.from_env().rank == rank and launcher.from_env().has_launcher:
        action()


def two_processes(directory: Path, *sabotages, **flags):
    argv = tiny(**FLAGS | flags, nGPU=2, save=directory)
    return argv, partial(both, cpus_for_gpus, *sabotages)


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> dict:
    """Return the outcome of two processes that a launcher started."""
    directory = tmp_path_factory.mktemp("complete")
    results = run_ranks(tiny(**FLAGS, nGPU=0, save=directory), 2)
    assert [result.code for result in results] == [0, 0], results
    return outcome(directory)


def test_processes_train_as_those_of_any_launcher_do(tmp_path, complete):
    result = run(*two_processes(tmp_path))
    assert result.code == 0 and result.err == "", result
    assert result.out.count("=> Training epoch # 1") == 1
    assert outcome(tmp_path) == complete


def goes_on(directory: Path, complete: dict) -> None:
    assert run(*two_processes(directory, resume="auto")).code == 0
    assert outcome(directory) == complete


def tell_parent(number: int, answer: int) -> None:
    """Send the parent a signal, and wait for the one that this process receives then."""
    handle, answers = signal.getsignal(answer), []
    signal.signal(answer, lambda *args: (answers.append(args), handle(*args)))
    os.kill(os.getppid(), number)
    while not answers:
        time.sleep(0.01)


SENDERS = {
    "SIGTERM": partial(tell_parent, signal.SIGTERM, signal.SIGTERM),
    "SIGUSR1": partial(tell_parent, signal.SIGUSR1, signal.SIGUSR1),
    "SIGINT": partial(os.killpg, 0, signal.SIGINT),  # Ctrl-C, which the parent passes on as well
}


@pytest.mark.parametrize("name", SENDERS)
def test_a_signal_to_their_parent_or_to_all_of_them_stops_the_run_once(tmp_path, complete, name):
    tell = partial(on_rank, 1, SENDERS[name])
    result = run(*two_processes(tmp_path, own_group, partial(at_batch, tell, 6)))
    assert result.code == 75, result
    assert status(tmp_path)["state"] == "preempted"
    assert result.err.splitlines()[-1].startswith(f"stopped: {name}, ")
    goes_on(tmp_path, complete)


def test_a_process_that_is_killed_ends_the_others_with_its_name(tmp_path, complete):
    die = partial(on_rank, 1, kill)
    result = run(*two_processes(tmp_path, partial(at_batch, die, 6)))
    refused(result, 8, r"process 1 \(host .*\) is lost")
    goes_on(tmp_path, complete)


def test_when_the_one_that_started_them_is_killed_they_save_and_end(tmp_path, complete):
    """Test row 68: two runs must not write in one directory."""
    report = tmp_path / "pids"
    tell = partial(on_rank, 0, partial(kill_parent, report))
    running = start(*two_processes(tmp_path / "run", partial(at_batch, tell, 6)))
    assert running.wait(LONG_S).code == -signal.SIGKILL
    wait_until(lambda: not Path(f"/proc/{report.read_text()}").exists())
    assert status(tmp_path / "run")["state"] == "preempted"
    goes_on(tmp_path / "run", complete)


def kill_parent(report: Path) -> None:
    report.write_text(str(os.getpid()))
    tell_parent(signal.SIGKILL, signal.SIGTERM)


def test_a_process_that_ends_neither_by_itself_nor_on_a_signal_is_killed(tmp_path):
    stop = partial(on_rank, 1, partial(send, signal.SIGSTOP))
    argv, sabotage = two_processes(tmp_path, impatient, partial(at_batch, stop, 6), timeout=10)
    refused(run(argv, sabotage), 8, r"process 1 .* is lost")


def impatient() -> None:
    launcher.GRACE_S = 1


def test_one_exit_code_stands_for_all():
    cases = [([0, 0, 0], 0), ([75, 75], 75), ([8, -9, 8], 8), ([-9, 8], 8), ([-9, -9], 137),
             ([-15, 0], 143), ([0, 3], 3)]  # fmt: skip
    assert [combined_exit_code(codes) for codes, _ in cases] == [code for _, code in cases]


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("", ProcessInfo()),
        ("RANK=3", ProcessInfo()),
        ("RANK=0 WORLD_SIZE=1", ProcessInfo(has_launcher=True)),
        ("RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4",
         ProcessInfo(5, 8, 1, 4, has_launcher=True)),
        ("RANK=0 WORLD_SIZE=2 TORCHELASTIC_RESTART_COUNT=1",
         ProcessInfo(0, 2, has_launcher=True, restarted=True)),
        ("SLURM_RESTART_COUNT=2", ProcessInfo(restarted=True)),
        ("SLURM_RESTART_COUNT=0", ProcessInfo()),
    ],
)  # fmt: skip
def test_a_process_knows_its_rank_from_its_environment(monkeypatch, given, want):
    for name in (*launcher.RANK_VARIABLES, *launcher.RESTART_COUNTS):
        monkeypatch.delenv(name, raising=False)
    for pair in given.split():
        monkeypatch.setenv(*pair.split("="))
    assert from_env() == want
