"""Test rows 53, 54, 62, 64, 65, 69, 70 and 72: faults of several processes beside the catalogue."""

import os
import signal
import socket
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from faults.contract import (
    FLAGS,
    call,
    codes,
    newest_step,
    outcome,
    refused,
    refused_by_all,
    status,
    tiny,
)
from faults.sabotage import (
    at_batch,
    at_call,
    both,
    environment,
    fail,
    impatient,
    kill,
    kill_a_child,
    replace,
    send,
    shorten,
    wait_for,
)
from faults.test_faults_data import folder
from helpers.run_main import Ranks

BOTH = [0, 1]


# Rows 53, 54, 69 and 70: processes that do not get as far as training together.


def add_flag(flag: str) -> None:
    """Give this process a flag that the others do not have."""
    replace("run the program", lambda main: lambda argv: main([*argv, flag]))


def one_gpu() -> None:
    replace("count the GPUs", lambda count: lambda: 1)


def other_torch() -> None:
    replace("hash the code", lambda function: lambda: {"torch": "1.0", "code": "old"})


def other_data() -> None:
    def changed(make):
        def other(*args):
            images = make(*args)
            images.pixels[0] += 1
            return images

        return other

    replace("generate images", changed)


DIFFERS = r"{} differs between processes 0 and 1: "
APART = {
    "a mistyped flag": ({}, {"growthrate": 3}, r"did you mean growthRate\?"),
    "no even share": ({}, {"batchSize": 9}, r"batchSize 9 over 2 processes .*; fix: use 8"),
    "other torch": ({1: other_torch}, {}, DIFFERS.format("torch") + ".* and 1.0; fix: start every"),
    "other data": ({1: other_data}, {}, DIFFERS.format("training_set")),
    "one flag of testing": ({1: partial(add_flag, "--testOnly=true")}, {"retrain": "none"}, "test"),
    **{f"other {name}": ({1: partial(add_flag, f"--{name}={value}")}, {}, name)
       for name, value in [("LR", 0.2), ("saveEvery", 1), ("kernels", "torch")]},
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_processes_that_do_not_have_the_same_are_refused(tmp_path, name):
    sabotages, flags, pattern = APART[name]
    argv = tiny(**FLAGS | {"syncBN": True} | flags, save=tmp_path / "run", resume="auto")
    refused_by_all(call(argv, 2, sabotages), 2, pattern)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.pt"))


def test_the_process_that_finds_a_mistake_first_says_it(tmp_path):
    held = partial(wait_for, tmp_path / "go on")
    ranks = Ranks(tiny(depht=10, save=tmp_path / "run"), 2, {0: held})
    refused(ranks[1].wait(), 2, "unknown flag depht")
    (tmp_path / "go on").touch()
    result = ranks[0].wait()
    assert (result.code, result.err) == (2, "")


def test_more_processes_than_gpus_are_refused_with_both_numbers(tmp_path):
    # The first one has its GPU, which it does not have here.
    result = call(tiny(save=tmp_path / "run"), 2, {0: partial(os._exit, 0), 1: one_gpu})[1]
    refused(result, 2, "2 processes on this machine but 1 CUDA device; fix: .*nproc-per-node 1")


def test_processes_that_do_not_come_are_missed(tmp_path):
    results = call(tiny(**FLAGS, save=tmp_path / "run"), 2, {0: impatient, 1: partial(os._exit, 0)})
    refused(results[0], 8, "cannot connect: no word of process 1; fix: run it again")


def test_a_signal_while_others_have_not_come_ends_a_process(tmp_path):
    """Test row 62."""
    longer = partial(shorten, {"rendezvous": 600})  # than after a signal
    told = partial(at_call, partial(both, longer, partial(send, signal.SIGTERM)),
                   "agree on the attempt id")  # fmt: skip
    sabotages = {0: partial(both, impatient, told), 1: partial(os._exit, 0)}
    assert call(tiny(**FLAGS, save=tmp_path / "run"), 2, sabotages)[0].code == 75
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_in_use_is_named(tmp_path):
    """Test row 69."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        here = partial(environment, TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
        sabotages = {0: here, 1: partial(os._exit, 0)}
        results = call(tiny(**FLAGS, save=tmp_path / "run"), 2, sabotages)
    refused(results[0], 2, f"port {port} is in use; fix: .*MASTER_PORT")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("told", [[1], [0, 1]])
def test_a_long_start_ends_soon_after_a_signal(tmp_path, told):
    """Test row 62: a process that cannot react is ended, whatever it is doing."""
    ready = tmp_path / "ready"  # the first process reads the data first
    held = partial(both, ready.touch, partial(wait_for, tmp_path / "never"))
    slow = partial(both, impatient, partial(at_call, held, "create the data"))
    ranks = Ranks(tiny(**FLAGS, save=tmp_path / "run"), 2, dict.fromkeys(BOTH, slow))
    ranks[0].wait_for(ready.exists)
    for rank in told:
        ranks[rank].signal(signal.SIGTERM)
    results = ranks.wait()
    assert all(results[rank].code == 75 for rank in told), results
    if told == BOTH:
        assert results[0].err.startswith("stopped: SIGTERM, there was nothing to save")
    assert not list((tmp_path / "run").glob("*.pt"))


# Rows 64 and 65: one process of several fails in a way of its own.


@pytest.mark.parametrize("rank", BOTH)
def test_a_bug_in_one_process_ends_all_and_its_traceback_is_shown(tmp_path, rank):
    bug = partial(at_batch, partial(fail, "ZeroDivisionError"), 6)
    results = call(tiny(**FLAGS, save=tmp_path), 2, {rank: bug})
    assert codes(results) == [1, 1], results
    assert f"ZeroDivisionError: out of luck in process {rank}" in results[rank].err
    assert "Traceback" not in results[1 - rank].err
    if rank == 1:
        assert "a bug in process 1: ZeroDivisionError" in results[0].err
        assert "a bug in process 1" in status(tmp_path)["reason"]


@pytest.mark.parametrize("rank", BOTH)
def test_a_loader_process_that_is_killed_is_named_and_no_peer_is(root, rank):
    argv = folder(root, nThreads=1, batchSize=4, nEpochs=9, nGPU=0)
    results = call(argv, 2, {rank: partial(at_batch, kill_a_child, 2)})
    refused_by_all(results, 3, "a loader process was killed or hung: .*; fix: .*--nThreads")


def record_steps_but(rank: int) -> None:
    """Pretend to capture CUDA graphs; in one process the capture fails."""
    sizes = [None]

    class Capturer:
        memory = nullcontext

        def capture(self, run_step):
            if os.environ["RANK"] == str(rank):
                raise RuntimeError("operation not permitted when stream is capturing")
            captured = sizes[0]

            def replay() -> None:
                assert sizes[0] == captured  # which a graph has as numbers
                run_step()

            return replay

    def remembering(set_sizes):
        def set_and_remember(self, found):
            sizes[0] = found
            set_sizes(self, found)

        return set_and_remember

    replace("choose eager or captured steps", lambda _: lambda *_: Capturer())
    replace("divide a batch among processes", remembering)


@pytest.mark.parametrize("rank", BOTH)
def test_a_process_that_cannot_record_its_steps_trains_with_the_others(undisturbed, tmp_path, rank):
    sabotage = partial(record_steps_but, rank)
    results = call(tiny(**FLAGS, save=tmp_path), 2, dict.fromkeys(BOTH, sabotage))
    assert codes(results) == [0, 0], results
    assert ("it runs eagerly" in results[0].err) == (rank == 0)
    assert outcome(tmp_path) == undisturbed(2)


def test_processes_that_record_steps_over_files_train_as_those_that_do_not(root, tmp_path):
    (root / "train" / "dog" / "bad.png").write_bytes(b"no picture")
    flags = {"batchSize": 4, "nEpochs": 6, "nGPU": 0, "onBadImage": "skip", "dropRate": 0.2}
    found = []
    for name, sabotage in (("eager", int), ("recorded", partial(record_steps_but, 2))):
        argv = folder(root, **flags, save=tmp_path / name)
        results = call(argv, 2, dict.fromkeys(BOTH, sabotage))
        assert codes(results) == [0, 0], results
        assert "it runs eagerly" not in results[0].err
        found.append(outcome(tmp_path / name))
    assert found[0] == found[1]


def test_restarted_processes_connect_through_the_launchers_store(undisturbed, tmp_path):
    """Keep the addresses of the former ones in it (PyTorch's issue 135712)."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for start, (sabotage, code) in enumerate([(partial(at_batch, kill, 6), 8), (int, 0)]):
        again = partial(
            environment, MASTER_PORT=str(store.port), TORCHELASTIC_RESTART_COUNT=str(start)
        )
        argv = tiny(**FLAGS, save=tmp_path, resume="auto")
        results = call(argv, 2, {0: again, 1: partial(both, again, sabotage)})
        assert results[0].code == code, results
    assert outcome(tmp_path) == undisturbed(2)


def note_return(report: Path) -> None:
    """Make `report` when the program returns, after which the interpreter would end."""

    def noting(main):
        def noted(argv: list[str]) -> int:
            code = main(argv)
            report.touch()
            return code

        return noted

    replace("run the program", noting)


@pytest.mark.parametrize("size", [1, 2])
def test_a_finished_run_of_several_processes_leaves_out_the_interpreters_end(tmp_path, size):
    # With gloo groups torch may abort in it. One process alone has it, or the test could not fail.
    reports = [tmp_path / f"returned-{rank}" for rank in range(size)]
    notes = {rank: partial(note_return, report) for rank, report in enumerate(reports)}
    results = call(tiny(**FLAGS | {"nEpochs": 1}, save=tmp_path / "run"), size, notes)
    assert codes(results) == [0] * size
    assert " * Finished top1" in results[0].out and status(tmp_path / "run")["state"] == "done"
    assert [report.exists() for report in reports] == [size == 1] * size


# Row 72.


def take_over(directory: Path) -> None:
    (directory / ".lock").write_text("host elsewhere, process 1, since 2030-01-01 00:00:00\n")


def test_a_run_that_another_node_has_taken_over_stops_writing(tmp_path):
    """Test it where the file system's locks do not reach from node to node."""
    moment = partial(at_batch, partial(take_over, tmp_path), 6)
    results = call(tiny(**FLAGS, save=tmp_path), 2, {0: moment})
    refused_by_all(results, 7, "taken over by host elsewhere, process 1, since .*; fix: ")
    assert newest_step(tmp_path) == 4
    assert status(tmp_path)["state"] == "running"  # the verdict is the other one's to give
