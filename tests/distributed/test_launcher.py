"""`--nGPU N` starts N processes: their ranks, signals to their parent, one exit code."""

import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from distributed import launcher
from distributed.launcher import ProcessInfo, combined_exit_code, from_env
from faults.contract import outcome, refused, status, tiny
from faults.sabotage import at_batch, both, kill, own_group, send
from helpers.run_main import run, run_ranks, start

FLAGS = {"nEpochs": 3, "dropRate": 0.2}


def cpus_for_gpus() -> None:
    """Let processors stand in for two GPUs, and fork, which is faster, since there is no CUDA."""
    import torch

    import engine.device

    torch.cuda.device_count = lambda: 2
    select = engine.device.select
    engine.device.select = lambda *args: select(*args) and torch.device("cpu")
    torch.cuda.set_device = lambda number: None
    launcher.START_METHOD = "fork"


def on_rank(rank: int, action) -> None:
    if launcher.from_env().rank == rank and launcher.from_env().has_launcher:
        action()


def replicas(directory: Path, *sabotages, **flags):
    argv = tiny(**FLAGS | flags, nGPU=2, save=directory)
    return argv, partial(both, cpus_for_gpus, *sabotages)


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> dict:
    """What two processes come to that a launcher started."""
    directory = tmp_path_factory.mktemp("complete")
    results = run_ranks(tiny(**FLAGS, nGPU=0, save=directory), 2)
    assert [result.code for result in results] == [0, 0], results
    return outcome(directory)


def test_processes_train_as_those_of_any_launcher_do(tmp_path, complete):
    result = run(*replicas(tmp_path))
    assert result.code == 0 and result.err == "", result
    assert result.out.count("=> Training epoch # 1") == 1
    assert outcome(tmp_path) == complete


def goes_on(directory: Path, complete: dict) -> None:
    assert run(*replicas(directory, resume="auto")).code == 0
    assert outcome(directory) == complete


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_their_parent_is_forwarded(tmp_path, complete, number):
    tell = partial(on_rank, 1, partial(tell_parent, number, number))
    result = run(*replicas(tmp_path, partial(at_batch, tell, 6)))
    assert result.code == 75, result
    assert status(tmp_path)["state"] == "preempted"
    assert result.err.splitlines()[-1].startswith(f"stopped: {signal.Signals(number).name}, ")
    goes_on(tmp_path, complete)


def tell_parent(number: int, answer: int) -> None:
    """Send the parent a signal, and wait for the one that this process gets then."""
    handle, answers = signal.getsignal(answer), []
    signal.signal(answer, lambda *args: (answers.append(args), handle(*args)))
    os.kill(os.getppid(), number)
    while not answers:
        time.sleep(0.01)


def test_a_signal_to_all_of_them_at_once_is_one_signal(tmp_path, complete):
    """Ctrl-C in a terminal reaches every process, and the first passes it on as well."""
    tell = partial(on_rank, 1, partial(os.killpg, 0, signal.SIGINT))
    result = run(*replicas(tmp_path, own_group, partial(at_batch, tell, 6)))
    assert result.code == 75, result
    goes_on(tmp_path, complete)


def test_a_process_that_is_killed_ends_the_others_with_its_name(tmp_path, complete):
    die = partial(on_rank, 1, kill)
    result = run(*replicas(tmp_path, partial(at_batch, die, 6)))
    refused(result, 8, r"process 1 \(host .*\) is lost")
    goes_on(tmp_path, complete)


def test_when_the_one_that_started_them_is_killed_they_save_and_end(tmp_path, complete):
    """Row 68: two runs must not write in one directory."""
    report = tmp_path / "pids"
    tell = partial(on_rank, 0, partial(kill_parent, report))
    running = start(*replicas(tmp_path / "run", partial(at_batch, tell, 6)))
    assert running.wait(30).code == -signal.SIGKILL
    end = time.monotonic() + 20
    while Path(f"/proc/{report.read_text()}").exists():
        assert time.monotonic() < end, "it is still running"
        time.sleep(0.05)
    assert status(tmp_path / "run")["state"] == "preempted"
    goes_on(tmp_path / "run", complete)


def kill_parent(report: Path) -> None:
    report.write_text(str(os.getpid()))
    tell_parent(signal.SIGKILL, signal.SIGTERM)


def test_a_process_that_ends_neither_by_itself_nor_on_a_signal_is_killed(tmp_path):
    stop = partial(on_rank, 1, partial(send, signal.SIGSTOP))
    argv, sabotage = replicas(tmp_path, impatient, partial(at_batch, stop, 6), timeout=4)
    refused(run(argv, sabotage, timeout_s=60), 8, r"process 1 .* is lost")


def impatient() -> None:
    launcher.GRACE_S = 1


def test_gpus_that_are_not_there_are_refused_before_anything_is_started(tmp_path):
    refused(run(tiny(nGPU=2, save=tmp_path / "run")), 2, "nGPU=2 but no CUDA device; fix: --nGPU 0")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path):
    argv = tiny(nGPU=3, save=tmp_path / "run")
    pattern = re.escape("batchSize 8 over 3 processes is not a whole number; fix: use 9, or ")
    refused(run(argv), 2, pattern)


CODES = [
    ([0, 0, 0], 0),
    ([75, 75], 75),
    ([8, -9, 8], 8),
    ([-9, 8], 8),
    ([-9, -9], 137),
    ([-15, 0], 143),
    ([0, 3], 3),
]


@pytest.mark.parametrize(("codes", "code"), CODES)
def test_one_exit_code_stands_for_all(codes, code):
    assert combined_exit_code(codes) == code


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
