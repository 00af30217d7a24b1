"""Rows 58, 65, 66 and 68 on two machines: torchrun goes on with the rest, and takes back."""

import signal
import time
from collections.abc import Iterator

import pytest
import torch

from datasets.batch_sampler import BatchSampler
from faults.agents import (
    LOCAL,
    Elastic,
    Node,
    cable,
    elastic,
    free_port,
    is_there,
    kill,
    plug,
    seconds_until,
)
from faults.contract import status
from helpers.recording import order

FLAGS = {"nImages": 200, "nEpochs": 4, "saveEvery": 0.002}
STEPS = 100  # too few to last until the end of a test, unless they are slowed down
PORT = 29400  # in a network of one's own
PULLED_S, KILLED_S, ORPHANS_S = 60, 10, 10

soak = pytest.mark.soak


def want(seed: int = 0) -> list[list[int]]:
    """The images of each step of the run."""
    sampler = BatchSampler(torch.arange(FLAGS["nImages"]), batch_size=8, seed=seed)
    epochs = range(1, FLAGS["nEpochs"] + 1)
    return [sampler.step_indices(epoch, step) for epoch in epochs for step in range(len(sampler))]


def complete(run: Elastic) -> None:
    """Assert that a run came to its end and did every step, in the order of an undisturbed run."""
    assert order(run.directory) == want() != want(seed=1)
    verdict = status(run.directory / "run")
    assert (verdict["state"], verdict["code"]) == ("done", 0)
    assert verdict["global_step"] == STEPS == len(want())
    assert run.workers() == []


def test_a_lost_node_is_done_without_and_taken_back(tmp_path):
    """The one of rank 0, with the store of the processes and the run directory."""
    lost, stays = LOCAL
    with elastic(tmp_path, stays, free_port(), FLAGS) as run:
        run.slow_down()
        agents = [run.agent(node) for node in (lost, stays)]
        run.wait_for_steps(2, 2, agents[1])
        kill(agents[0].process.pid, *run.workers(agents[0]))
        run.wait_for_steps(2, 1, agents[1])
        back = run.agent(lost)
        run.wait_for_steps(2, 2, agents[1])
        run.speed_up()
        ends = [agents[0].wait(), agents[1].wait(), back.wait()]
        assert [end.code for end in ends] == [-signal.SIGKILL, 0, 0], ends
        complete(run)


# ------------------------------------------------------------- the long form: networks of their own


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    try:
        with cable() as nodes:
            yield nodes
    except PermissionError as error:
        pytest.skip(f"no network namespaces: {error}")


@pytest.fixture(params=[0, 1], ids=["the first node", "the second node"])
def begun(request, nodes, tmp_path) -> Iterator[tuple]:
    """A run on two nodes; the node that is to be lost and the one that is not; their agents."""
    lost, stays = nodes if request.param == 0 else nodes[::-1]
    with elastic(tmp_path, stays, PORT, FLAGS) as run:
        run.slow_down()
        agents = {node: run.agent(node) for node in nodes}
        run.wait_for_steps(2, 2, agents[stays])
        yield run, lost, stays, agents


@soak
def test_an_agent_that_is_killed_takes_its_workers_along(begun, measured):
    run, lost, stays, agents = begun
    old = run.workers()
    kill(agents[lost].process.pid)
    took_s = seconds_until(lambda: not any(map(is_there, old)), KILLED_S)
    measured("G10", "an agent of two is killed: s until the processes have ended", took_s,
             f"<= {KILLED_S}")  # fmt: skip
    run.wait_for_steps(2, 1, agents[stays])
    back = run.agent(lost)
    run.wait_for_steps(2, 2, agents[stays])
    run.speed_up()
    ends = [agents[stays].wait(), back.wait()]
    assert [end.code for end in ends] == [0, 0], ends
    complete(run)


@soak
def test_a_worker_that_is_killed_is_started_anew_with_the_others(begun, measured):
    run, lost, stays, agents = begun
    old = run.workers()
    kill(*run.workers(agents[lost]))
    took_s = seconds_until(lambda: not any(map(is_there, old)), KILLED_S)
    measured("G10", "a worker on another machine is killed: s until the other has ended", took_s,
             f"<= {KILLED_S}")  # fmt: skip
    run.wait_for_steps(2, 2, agents[stays])
    run.speed_up()
    ends = [agent.wait() for agent in agents.values()]
    assert [end.code for end in ends] == [0, 0], ends
    complete(run)


@soak
def test_a_node_that_vanishes_is_done_without_and_taken_back(begun, measured):
    """No connection is closed; what is cut off ends by itself, or there would be two runs."""
    run, lost, stays, agents = begun
    here, there = run.workers(agents[stays]), run.workers(agents[lost])
    plug(lost, "down")
    try:
        took_s = seconds_until(lambda: not any(map(is_there, here)), PULLED_S)
        measured("G10", "a cable is pulled: s until the process on the other side has ended",
                 took_s, f"<= {PULLED_S}")  # fmt: skip
        since = time.monotonic()
        run.wait_for_steps(2, 1, agents[stays])
        measured("G10", "a cable is pulled: s from then to two steps alone",
                 time.monotonic() - since, "")  # fmt: skip
        seconds_until(lambda: not any(map(is_there, there)), PULLED_S)
    finally:
        plug(lost, "up")
    kill(agents[lost].process.pid)  # torchrun itself waits on; it is what a reboot does
    back = run.agent(lost)
    run.wait_for_steps(2, 2, agents[stays])
    run.speed_up()
    ends = [agents[stays].wait(), back.wait()]
    assert [end.code for end in ends] == [0, 0], ends
    complete(run)


@soak
def test_agents_that_are_told_to_stop_leave_a_run_that_goes_on(nodes, tmp_path, measured):
    with elastic(tmp_path, nodes[0], PORT, FLAGS) as run:
        run.slow_down()
        agents = [run.agent(node) for node in nodes]
        run.wait_for_steps(2, 2, agents[0])
        for agent in agents:
            agent.signal(signal.SIGTERM)
        took_s = seconds_until(lambda: not run.workers(), 25)
        measured("G4", "SIGTERM to two agents: s until the processes have ended", took_s, "<= 25")
        assert [agent.wait().code for agent in agents] == [1, 1]  # torchrun's, whatever they say
        verdict = status(tmp_path / "run")
        assert (verdict["state"], verdict["code"]) == ("preempted", 75)
        run.speed_up()
        ends = [agent.wait() for agent in [run.agent(node) for node in nodes]]
        assert [end.code for end in ends] == [0, 0], ends
        complete(run)


@soak
def test_the_agent_that_all_meet_at_takes_the_run_along(nodes, tmp_path, measured):
    """Nobody goes on alone then; started again, they go on together."""
    with elastic(tmp_path, nodes[0], PORT, FLAGS) as run:
        run.slow_down()
        agents = [run.agent(node) for node in nodes]
        run.wait_for_steps(2, 2, agents[0])
        kill(agents[0].process.pid)
        took_s = seconds_until(lambda: not run.workers(), PULLED_S)
        measured("G10", "the hosting agent is killed: s until all processes have ended", took_s,
                 f"<= {PULLED_S}")  # fmt: skip
        assert agents[1].wait().code == 1
        run.speed_up()
        ends = [agent.wait() for agent in [run.agent(node) for node in nodes]]
        assert [end.code for end in ends] == [0, 0], ends
        complete(run)


@soak
@pytest.mark.parametrize("number", [0, 1])
def test_torchrun_of_one_machine_starts_its_processes_anew(tmp_path, measured, number):
    """It keeps their store, with the addresses of those that are gone."""
    with elastic(tmp_path, LOCAL[0], free_port(), FLAGS, processes=2, keeps_store=True) as run:
        run.slow_down()
        agent = run.agent(LOCAL[0])
        run.wait_for_steps(2, 2, agent)
        old = run.workers()
        kill(sorted(old)[number])
        took_s = seconds_until(lambda: not any(map(is_there, old)), KILLED_S)
        measured("G10", f"process {number} of torchrun is killed: s until the other has ended",
                 took_s, f"<= {KILLED_S}")  # fmt: skip
        run.wait_for_steps(2, 2, agent)
        run.speed_up()
        assert agent.wait().code == 0
        complete(run)


@soak
@pytest.mark.parametrize("trial", range(5))
def test_torchrun_that_is_killed_leaves_no_orphans(tmp_path, measured, trial):
    """Row 68: another run may begin in the directory by then."""
    with elastic(tmp_path, LOCAL[0], free_port(), FLAGS, processes=2) as run:
        run.slow_down()
        agent = run.agent(LOCAL[0])
        run.wait_for_steps(1 + trial, 2, agent)
        kill(agent.process.pid)
        took_s = seconds_until(lambda: not run.workers(), ORPHANS_S)
        measured("G10", f"torchrun is killed, trial {trial}: s until its two processes have ended",
                 took_s, f"<= {ORPHANS_S}")  # fmt: skip
        assert status(tmp_path / "run")["code"] == 75
        run.speed_up()
        again = run.agent(LOCAL[0])
        assert again.wait().code == 0
        complete(run)
