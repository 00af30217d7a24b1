"""Test rows 58, 65, 66, 68 on two machines: torchrun continues with the rest, and takes back."""

import signal
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from datasets.batch_sampler import BatchSampler
from faults.contract import status
from faults.elastic import LOCAL, Elastic, Node, cable, elastic, free_port, kill, plug
from helpers.recording import order
from helpers.run_main import is_alive, wait_until

FLAGS = {"nImages": 40, "nEpochs": 4, "saveEvery": 1e-9}  # 5 steps an epoch
soak = pytest.mark.soak


def check_complete(run: Elastic) -> None:
    """Assert that a run finished and did every step, in the order of an undisturbed run."""
    sampler = BatchSampler(torch.arange(FLAGS["nImages"]), batch_size=8, seed=0)
    epochs = range(1, FLAGS["nEpochs"] + 1)
    want = [sampler.step_indices(epoch, step) for epoch in epochs for step in range(len(sampler))]
    assert order(run.directory) == want
    verdict = status(run.directory / "run")
    assert (verdict["state"], verdict["code"], verdict["global_step"]) == ("done", 0, len(want))
    assert run.workers() == []


def test_a_lost_node_is_done_without_and_taken_back(tmp_path):
    """Lose the node of rank 0, with the store of the processes and the run directory."""
    lost, stays = LOCAL
    with elastic(tmp_path, stays, FLAGS, port=free_port()) as run:
        agents = [run.agent(node) for node in (lost, stays)]
        run.advance(2, agents[1])
        kill(agents[0].process.pid, *run.workers(agents[0]))
        run.advance(1, agents[1])
        back = run.agent(lost)
        run.advance(2, back)
        assert run.finish(*agents, back) == [-signal.SIGKILL, 0, 0]
        check_complete(run)


# The long form: networks of their own:
@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    try:
        with cable() as nodes:
            yield nodes
    except PermissionError as error:
        pytest.skip(f"no network namespaces: {error}")


@pytest.fixture
def gone(measured):
    """Wait until processes have ended, and record how long that takes: (what, processes)."""

    def gone(what: str, pids: list[int], limit_s: int, goal: str = "G10") -> None:
        since = time.monotonic()
        wait_until(lambda: not any(map(is_alive, pids)))
        measured(goal, what, time.monotonic() - since, f"<= {limit_s}")

    return gone


@soak
@pytest.mark.parametrize("what", ["an agent is killed", "a process is killed", "a cable is pulled"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_lost_part_is_done_without_and_taken_back(nodes, tmp_path, gone, number, what):
    lost, stays = nodes if number == 0 else nodes[::-1]
    with elastic(tmp_path, stays, FLAGS) as run:
        agents = {node: run.agent(node) for node in nodes}
        run.advance(2, agents[stays])
        here, there = run.workers(agents[stays]), run.workers(agents[lost])
        if what == "a process is killed":
            kill(*there)
            gone(f"{what} on node {number}: s until the other has ended", here, 10)
            run.advance(2, agents[stays])
        elif what == "an agent is killed":
            kill(agents[lost].process.pid)
            gone(f"{what} on node {number}: s until the processes have ended", here + there, 10)
            run.advance(1, agents[stays])
        else:
            # No connection is closed; what is cut off ends by itself, or there would be two runs.
            plug(lost, "down")
            try:
                gone(f"{what} at node {number}: s until the other process has ended", here, 60)
                run.advance(1, agents[stays])
                wait_until(lambda: not any(map(is_alive, there)))
            finally:
                plug(lost, "up")
            kill(agents[lost].process.pid)  # torchrun itself waits on; it is what a reboot does
        if what != "a process is killed":
            agents[lost] = run.agent(lost)
            run.advance(2, agents[lost])
        assert run.finish(*agents.values()) == [0, 0]
        check_complete(run)


@soak
@pytest.mark.parametrize("what", ["both agents are told to stop", "the hosting agent is killed"])
def test_agents_that_are_told_to_stop_or_lose_their_host_leave_a_run_that_goes_on(
    nodes, tmp_path, gone, what
):
    """Test that no process continues alone then; started again, they continue together."""
    with elastic(tmp_path, nodes[0], FLAGS) as run:
        agents = [run.agent(node) for node in nodes]
        run.advance(2, agents[0])
        workers = run.workers()
        if what == "the hosting agent is killed":
            kill(agents[0].process.pid)
            gone(f"{what}: s until all processes have ended", workers, 60)
            assert agents[1].wait().code == 1
        else:
            for agent in agents:
                agent.signal(signal.SIGTERM)
            gone(f"{what}: s until the processes have ended", workers, 25, "G4")
            codes = [agent.wait().code for agent in agents]
            assert codes == [1, 1]  # torchrun's, whatever those of its processes are
            assert status(tmp_path / "run")["code"] == 75
        assert run.finish(*[run.agent(node) for node in nodes]) == [0, 0]
        check_complete(run)


@soak
@pytest.mark.parametrize("number", [0, 1])
def test_torchrun_of_one_machine_starts_its_processes_again(tmp_path, gone, number):
    """Keep their store, with the addresses of those that are gone."""
    at = partial(elastic, tmp_path, LOCAL[0], FLAGS, processes=2, port=free_port())
    with at(keeps_store=True) as run:
        agent = run.agent(LOCAL[0])
        run.advance(2, agent)
        old = sorted(run.workers())
        kill(old[number])
        gone(f"process {number} of torchrun is killed: s until the other has ended", old, 10)
        run.advance(2, agent)
        assert run.finish(agent) == [0]
        check_complete(run)


@soak
def test_torchrun_that_is_killed_leaves_no_orphans(tmp_path, gone):
    """Test row 68: another run may begin in the directory by then."""
    with elastic(tmp_path, LOCAL[0], FLAGS, processes=2, port=free_port()) as run:
        for trial in range(4):
            agent = run.agent(LOCAL[0])
            run.advance(2, agent)
            old = run.workers()
            kill(agent.process.pid)
            gone(f"torchrun is killed, trial {trial}: s until its processes have ended", old, 10)
            assert status(tmp_path / "run")["code"] == 75
        assert run.finish(run.agent(LOCAL[0])) == [0]
        check_complete(run)
