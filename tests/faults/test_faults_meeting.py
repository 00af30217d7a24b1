"""Rows 62 and 65 to 69: before processes have met, where they meet, and who cannot be reached."""

import os
import signal
import socket
import time
from functools import partial

import pytest
from torch.distributed import TCPStore

import errors
from distributed import rendezvous
from distributed.world import World
from experiment import resume
from faults.agents import free_port
from faults.contract import outcome, refused, status, tiny
from faults.sabotage import at_batch, before_call, both, environment, kill, send
from faults.test_faults_ranks import (
    BOTH,
    FLAGS,
    codes,
    goes_on,
    impatient,
    refused_by_all,
)
from helpers.run_main import Ranks, run_ranks


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> dict:
    """What the undisturbed run of two processes comes to."""
    directory = tmp_path_factory.mktemp("complete")
    assert codes(run_ranks(tiny(**FLAGS, save=directory), 2, at_port(free_port()))) == [0, 0]
    return outcome(directory)


def at_port(port: int, sabotages: dict | None = None) -> dict:
    """Have the first process open the store for all, as torchrun's can be asked to.

    Its launcher's outlives it; this one ends with it.
    """
    here = partial(environment, TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
    more = sabotages or {}
    return {rank: partial(both, here, *filter(None, [more.get(rank)])) for rank in BOTH}


# Row 65: the store goes with the first process.


def test_when_the_process_with_the_store_is_killed_the_other_ends_and_says_so(tmp_path, complete):
    sabotages = at_port(free_port(), {0: partial(at_batch, kill, 6)})
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, sabotages)
    assert results[0].code == -signal.SIGKILL
    refused(results[1], 8, "the process that held the run together is lost .*; fix: ")
    verdict = status(tmp_path)
    assert (verdict["state"], verdict["code"], verdict["lost"]) == ("failed", 8, [0])
    goes_on(tmp_path, complete)


def fail(kind: str) -> None:
    raise getattr(errors, kind)(f"{kind} of process {os.environ['RANK']}", "mend it")


def test_when_the_process_with_the_store_fails_all_know_why(tmp_path):
    sabotages = at_port(free_port(), {0: partial(at_batch, partial(fail, "StorageError"), 6)})
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, sabotages)
    refused_by_all(results, 6, "StorageError of process 0; fix: mend it")


# Main threads that are not where they could notice.


@pytest.mark.parametrize("rank", BOTH)
def test_a_process_that_is_busy_when_another_is_killed_does_not_stay(tmp_path, complete, rank):
    """Such as waiting for a GPU whose kernel waits for the one that is gone."""
    busy = partial(both, impatient, partial(at_batch, sleep, 6))
    sabotages = at_port(free_port(), {rank: partial(at_batch, kill, 6), 1 - rank: busy})
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, sabotages, timeout_s=30)
    refused(results[1 - rank], 8, "is lost")
    goes_on(tmp_path, complete)


def sleep() -> None:
    time.sleep(60)


@pytest.mark.parametrize("rank", BOTH)
def test_a_process_that_is_busy_when_another_fails_does_not_stay(tmp_path, rank):
    busy = partial(both, impatient, partial(at_batch, sleep, 6))
    sabotages = {rank: partial(at_batch, partial(fail, "DataError"), 6), 1 - rank: busy}
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, sabotages, timeout_s=30)
    refused_by_all(results, 3, f"DataError of process {rank}; fix: mend it")


def test_who_waits_while_the_first_reads_a_checkpoint_notices_that_it_hangs(tmp_path):
    """Row 66: however long reading may take, a process that reads answers meanwhile."""
    hangs = partial(before_call, partial(send, signal.SIGSTOP), resume.find_checkpoint)
    ranks = Ranks(tiny(**FLAGS, timeout=2, save=tmp_path), 2, {0: hangs, 1: impatient})
    refused(ranks[1].wait(30), 8, r"process 0 \(host .*\) is lost \(.*timed out.*\); fix: ")
    ranks[0].signal(signal.SIGKILL)
    ranks[0].wait()


def test_the_first_does_not_work_on_for_others_that_are_lost(tmp_path):
    works = partial(both, impatient, partial(before_call, sleep, resume.find_checkpoint))
    lost = partial(before_call, kill, World.broadcast_result)
    results = run_ranks(tiny(**FLAGS, save=tmp_path), 2, {0: works, 1: lost}, timeout_s=30)
    refused(results[0], 8, r"process 1 \(host .*\) is lost")


# Before they meet.


def test_processes_that_do_not_come_are_not_waited_for_for_ever(tmp_path):
    sabotages = {0: impatient, 1: partial(os._exit, 0)}
    results = run_ranks(tiny(**FLAGS, save=tmp_path / "run"), 2, sabotages, timeout_s=30)
    refused(results[0], 8, "do not meet: no word of process 1; fix: run it again")


def test_a_signal_while_others_have_not_come_ends_a_process(tmp_path):
    """Row 62."""
    told = partial(before_call, partial(wait_and, signal.SIGTERM), rendezvous._attempt_id)
    sabotages = {0: partial(both, impatient, told), 1: partial(os._exit, 0)}
    results = run_ranks(tiny(**FLAGS, save=tmp_path / "run"), 2, sabotages, timeout_s=30)
    assert results[0].code == 75
    assert not (tmp_path / "run").exists()


def wait_and(number: int) -> None:
    from distributed import rendezvous

    rendezvous.RENDEZVOUS_TIMEOUT_S = 60  # longer than after a signal
    send(number)


def test_a_port_that_is_in_use_is_named(tmp_path):
    """Row 69."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sabotages = at_port(port, {1: partial(os._exit, 0)})
        results = run_ranks(tiny(**FLAGS, save=tmp_path / "run"), 2, sabotages, timeout_s=30)
    refused(results[0], 2, f"port {port} is in use; fix: .*MASTER_PORT")
    assert not (tmp_path / "run").exists()


def test_processes_that_are_started_anew_meet_at_the_store_that_the_launcher_has_kept(
    tmp_path, complete
):
    """It still has the addresses of the former ones (PyTorch's issue 135712)."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for start, (sabotage, code) in enumerate([(kill, 8), (None, 0)]):
        again = partial(
            environment, MASTER_PORT=str(store.port), TORCHELASTIC_RESTART_COUNT=str(start)
        )
        sabotages = dict.fromkeys(BOTH, again)
        if sabotage:
            sabotages[1] = partial(both, again, partial(at_batch, sabotage, 6))
        argv = tiny(**FLAGS, save=tmp_path, resume="auto")
        results = run_ranks(argv, 2, sabotages, timeout_s=30)
        assert results[0].code == code, results
    assert outcome(tmp_path) == complete
