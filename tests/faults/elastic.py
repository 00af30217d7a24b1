"""Run several torchrun agents on this machine, each with an address of its own.

The agents and their processes are forked, so that nothing is imported again. A node is an address
of the loopback device, or a network namespace at the end of a cable that can be pulled.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from faults.contract import tiny
from faults.sabotage import replace
from helpers.recording import HOLD, record_steps
from helpers.run_main import Running, is_alive, start

CLONE_NEWNET = 0x40000000  # of Linux's sched.h


@dataclass(frozen=True)
class Node:
    """Simulate one machine of a run.

    Args:
        address: of its agent; nodes are ranked by it.
        interface: that its processes talk over.
        namespace: its network, None for that of the tests.
    """

    address: str
    interface: str = "lo"
    namespace: str | None = None


# The first node by address has rank 0, which hosts the store of the processes.
LOCAL = (Node("127.0.0.1"), Node("127.0.0.2"))


class Elastic:
    """Run torchrun on one or two nodes; the steps are recorded in `directory` and held back there.

    Args:
        host: the node of the rendezvous.
        flags: of the run.
        processes: of each agent.
        keeps_store: the agent opens the store of the processes, and keeps it when it starts them
            again; no process can rejoin then.
        port: of the rendezvous.
    """

    def __init__(
        self,
        directory: Path,
        host: Node,
        flags: dict[str, object],
        processes: int = 1,
        keeps_store: bool = False,
        port: int = 29400,
    ):
        self.directory, self._limit, self._agents = directory, 0, []
        self._argv = tiny(**{"nGPU": 0, "resume": "auto", "save": directory / "run"} | flags)
        self._host, self._keeps_store = host, keeps_store
        self._options = [
            "--nnodes=1:2",
            f"--nproc-per-node={processes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={host.address}:{port}",
            f"--rdzv-id={directory.name}",
            "--max-restarts=20",
        ]

    def agent(self, node: Node) -> Running:
        """Start torchrun on a node."""
        settings = {
            "keep_alive_interval": 1,
            "keep_alive_max_attempt": 3,
            "last_call_timeout": 1,
            "is_host": int(node == self._host),
        }
        options = [
            *self._options,
            f"--rdzv-conf={','.join(f'{name}={value}' for name, value in settings.items())}",
            f"--local-addr={node.address}",
            "program",
            str(self.directory),
            *self._argv,
        ]
        self._agents.append(start(options, partial(_as_agent, node, self._keeps_store)))
        return self._agents[-1]

    def workers(self, agent: Running | None = None) -> list[int]:
        """List the processes of the run, or those that one agent has started."""
        parents = {int(path.suffix[1:]): path.read_text() for path in self.directory.glob("pid.*")}
        return [
            pid for pid, parent in parents.items()
            if is_alive(pid) and (agent is None or parent == str(agent.process.pid))
        ]  # fmt: skip

    def advance(self, size: int, agent: Running, steps: int = 2) -> None:
        """Let more steps begin once `agent` has processes; wait until `size` have done them."""
        agent.wait_for(lambda: self.workers(agent))
        self._limit += steps
        new = self.directory / "new"
        new.write_text(str(self._limit))
        new.rename(self.directory / HOLD)
        done = f'"step": {self._limit}, "rank": 0, "size": {size},'
        agent.wait_for(lambda: any(
            done in path.read_text() for path in self.directory.glob("steps_*_0.jsonl")
        ))  # fmt: skip

    def finish(self, *agents: Running) -> list[int]:
        """Let all steps begin, and return the exit codes of agents."""
        (self.directory / HOLD).unlink()
        return [agent.wait().code for agent in agents]

    def end(self) -> None:
        """Kill all agents and processes of the run."""
        kill(*(agent.process.pid for agent in self._agents if agent.process.is_alive()))
        kill(*self.workers())


@contextmanager
def elastic(*args, **kwargs) -> Iterator[Elastic]:
    """Yield an `Elastic`; end all of its processes afterwards."""
    run = Elastic(*args, **kwargs)
    try:
        yield run
    finally:
        run.end()


def kill(*pids: int) -> None:
    """Send SIGKILL to processes, some of which may have ended."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    """Find a port of the loopback device that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _as_agent(node: Node, keeps_store: bool) -> None:
    """Turn this process, which is about to run main.py, into a torchrun on `node`."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    import main

    if node.namespace:
        namespace = os.open(f"/var/run/netns/{node.namespace}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    os.environ |= {
        "GLOO_SOCKET_IFNAME": node.interface,
        "OMP_NUM_THREADS": "1",
        # Else a fresh agent hangs that joins a run which is under way, see docs/operations.md.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "01"[not keeps_store],
    }
    program = main.main

    def torchrun(argv: list[str]) -> int:
        args = run.parse_args(argv)
        config, _, _ = run.config_from_args(args)
        config.start_method = "fork"
        directory, *flags = args.training_script_args

        def run_worker() -> None:
            _worker_main(program, Path(directory), flags)

        elastic_launch(config, run_worker)()
        return 0

    main.main = torchrun


def _worker_main(program: Callable[[list[str]], int], directory: Path, argv: list[str]) -> None:
    """Run a process of the run, which gets from its agent only the environment."""
    for path in Path("/proc/self/fd").iterdir():
        if path.is_socket():  # such as that of the agent's store
            os.close(int(path.name))
    (directory / f"pid.{os.getpid()}").write_text(str(os.getppid()))
    record_steps(directory)
    # The agent waits for what this function returns.
    replace("end the process", lambda end: lambda code, world: end(code, world) if code else code)
    code = program(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code:
        os._exit(code)


@contextmanager
def cable() -> Iterator[tuple[Node, Node]]:
    """Simulate two machines with a cable between, or raise PermissionError if refused."""
    name = f"test{os.getpid()}"
    nodes = [Node(f"10.77.0.{i}", f"{name}v{i}", f"{name}n{i}") for i in (1, 2)]
    try:
        for node in nodes:
            _ip("netns", "add", node.namespace)
            _ip("-n", node.namespace, "link", "set", "lo", "up")
        ends = [["name", node.interface, "netns", node.namespace] for node in nodes]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for node in nodes:
            _ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", node.interface)
            plug(node, "up")
        yield tuple(nodes)
    finally:
        for node in nodes:
            subprocess.run(["ip", "netns", "del", node.namespace], stderr=subprocess.DEVNULL)


def plug(node: Node, state: str) -> None:
    """Pull the cable out of a node with `down`, and put it in again with `up`."""
    _ip("-n", node.namespace, "link", "set", node.interface, state)


def _ip(*words: str) -> None:
    try:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PermissionError(f"ip {' '.join(words)}: {error}") from error
