"""What goes wrong in one of several processes at a place of its own: all end alike, none waits."""

import errno
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

import main
from faults.contract import command, refused, status, tiny
from faults.sabotage import at_batch, kill_a_child, on_files, refuse, send
from faults.test_faults_data import LARGE, folder, photographs
from helpers.run_main import Ranks, run_ranks

FLAGS = {"nEpochs": 3, "nGPU": 0, "timeout": 4}
BOTH = [0, 1]


def refused_by_all(results, code: int, pattern: str) -> None:
    """Assert that all processes end with `code`, and that one of them says why."""
    assert [result.code for result in results] == [code] * len(results), results
    said = [result for result in results if result.err]
    assert len(said) == 1, results
    refused(said[0], code, pattern)


# Flags.


def add_flags(*flags: str) -> None:
    """Give this process more flags than the others."""
    run_main = main.main
    main.main = lambda argv: run_main([*argv, *flags])


@pytest.mark.parametrize(
    "flag",
    ["LR=0.2", "epochNumber=2", "optMemory=4", "saveEvery=1", "kernels=torch", "testOnly=true"],
)
def test_processes_with_different_flags_are_refused(tmp_path, flag):
    argv = tiny(**FLAGS, syncBN=True, save=tmp_path / "run", resume="auto")
    extra = ["--retrain=none"] if flag.startswith("testOnly") else []
    results = run_ranks(argv, 2, {1: partial(add_flags, f"--{flag}", *extra)})
    assert {result.code for result in results} == {2}, results
    said = [result.err for result in results if result.err]
    name = flag.partition("=")[0]
    assert len(said) == 1 and name in said[0], results
    assert not (tmp_path / "run").exists()


def late(seconds: float) -> None:
    time.sleep(seconds)


def test_a_mistyped_flag_is_said_once_whichever_process_finds_it_first(tmp_path):
    results = run_ranks(tiny(depht=10, save=tmp_path), 2, {0: partial(late, 1)})
    refused_by_all(results, 2, "unknown flag depht")
    assert results[1].err


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("complete") / "run"
    results = run_ranks(tiny(**FLAGS, save=directory), 2)
    assert [result.code for result in results] == [0, 0], results
    return directory


def test_a_start_that_is_refused_leaves_the_verdict_of_a_complete_run(complete, tmp_path):
    directory = shutil.copytree(complete, tmp_path / "run")
    argv = command(resume=directory, dataset="folder", data=tmp_path / "nowhere", nGPU=0)
    results = run_ranks(argv, 2, {0: partial(late, 1)})
    assert all(result.code not in (0, 1) for result in results), results
    assert status(directory) == status(complete)


# Exchanges.


def stop_before_the_sum() -> None:
    """Hang with the gradients computed, while the others wait for them."""
    from engine import gradients

    reduce, steps = gradients.GradientReducer.reduce, iter(range(1, 10**6))

    def stop_and_reduce(self, loss):
        if next(steps) == 7:
            send(signal.SIGSTOP)
        return reduce(self, loss)

    gradients.GradientReducer.reduce = stop_and_reduce


def test_a_process_that_hangs_within_a_step_is_not_waited_for_longer_than_asked(tmp_path):
    ranks = Ranks(tiny(**FLAGS, save=tmp_path), 2, {1: stop_before_the_sum})
    refused(ranks[0].wait(60), 8, r"process 1 \(host .*\) is lost \(.*timed out.*\)")
    ranks[1].signal(signal.SIGKILL)
    ranks[1].wait()


def record_steps_but(rank: int) -> None:
    """A capturer of CUDA graphs, of which that of one process breaks off."""
    from distributed import launcher
    from engine import cuda_graph

    def capturer(*_):
        def capture(fn):
            if launcher.from_env().rank == rank:
                raise RuntimeError("operation not permitted when stream is capturing")
            return fn

        return capture

    cuda_graph.make_capturer = capturer


@pytest.mark.parametrize("rank", BOTH)
def test_a_process_that_cannot_record_its_steps_trains_with_the_others(complete, tmp_path, rank):
    sabotage = partial(record_steps_but, rank)
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, dict.fromkeys(BOTH, sabotage))
    assert [result.code for result in results] == [0, 0], results
    assert ("it runs eagerly" in results[0].err) == (rank == 0)
    assert status(tmp_path)["last_loss"] == status(complete)["last_loss"]


@pytest.mark.parametrize("rank", BOTH)
def test_a_loader_process_that_is_killed_is_named_and_no_peer_is(tmp_path, rank):
    argv = folder(
        photographs(tmp_path / "data"),
        **LARGE | {"batchSize": 4, "nThreads": 1, "nEpochs": 9, "nGPU": 0},
    )
    results = run_ranks(argv, 2, {rank: partial(at_batch, kill_a_child, 2)})
    refused_by_all(results, 3, "a loader process was killed or hung: .*; fix: .*--nThreads")


# The store by which they meet ends with the first process, as torchrun can be told to have it.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_the_first_process_is_heard_before_its_store_is_gone(tmp_path, number):
    directory = tmp_path / "run"
    full = partial(on_files, partial(refuse, number), directory, operation="write",
                   name=r"\.checkpoint")  # fmt: skip
    ranks = Ranks(tiny(**FLAGS, save=directory), 2, {0: full}, first_has_store=True)
    refused_by_all(ranks.wait(), 6, "; fix: ")
    assert status(directory)["code"] == 6


# A start that takes long.


def slow_data(seconds: float) -> None:
    import datasets.factory
    from distributed import signals

    signals.STARTUP_TIMEOUT_S = 1
    create = datasets.factory.create

    def create_slowly(*args, **more):
        time.sleep(seconds)
        return create(*args, **more)

    datasets.factory.create = create_slowly


@pytest.mark.parametrize("told", [[0], [1], [0, 1]])
def test_a_long_start_ends_soon_after_a_signal(tmp_path, told):
    slow = partial(slow_data, 8)
    ranks = Ranks(tiny(**FLAGS, save=tmp_path), 2, dict.fromkeys(BOTH, slow))
    ranks[0].wait_for(lambda: (tmp_path / ".lock").exists())
    time.sleep(0.5)
    for rank in told:
        ranks[rank].signal(signal.SIGTERM)
    results = ranks.wait(60)
    assert results[told[0]].code == 75, results
    if len(told) == 2:
        assert results[1].code == 75, results
        assert results[0].err.startswith("stopped: SIGTERM, there was nothing to save")
    assert not list(tmp_path.glob("*.pt"))
