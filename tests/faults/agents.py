"""Several torchrun agents on this machine, each with an address of its own, for elastic runs.

The agents are forked from a process that has torch (run_main.py); their workers are programs as
anybody starts them. A node is an address of the loopback device, or a network namespace at the end
of a cable that can be pulled.
"""

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from faults.contract import tiny
from helpers.recording import SLOW
from helpers.run_main import ROOT, Running, start

CLONE_NEWNET = 0x40000000  # of Linux's sched.h


@dataclass(frozen=True)
class Node:
    """One machine of a run, in name.

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
    """An elastic run of one to two nodes whose steps are recorded in `directory`.

    Args:
        host: the node at which the agents meet.
        port: at which they do; free at `host`.
        flags: of the run.
        processes: of each agent.
        keeps_store: the agent opens the store of the processes, and keeps it when it starts them
            anew; nobody can be taken back then.
    """

    def __init__(
        self,
        directory: Path,
        host: Node,
        port: int,
        flags: dict[str, object],
        processes: int = 1,
        keeps_store: bool = False,
    ):
        self.directory, self.host, self.port, self.processes = directory, host, port, processes
        self._flags = {"nGPU": 0, "resume": "auto", "save": directory / "run"} | flags
        self._keeps_store = keeps_store
        self._agents: list[Running] = []

    def agent(self, node: Node) -> Running:
        """Start torchrun on a node."""
        settings = {
            "keep_alive_interval": 1,
            "keep_alive_max_attempt": 3,
            "last_call_timeout": 1,
            "is_host": int(node == self.host),
        }
        argv = [
            "--nnodes=1:2",
            f"--nproc-per-node={self.processes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.host.address}:{self.port}",
            f"--rdzv-id={self.directory.name}",
            f"--rdzv-conf={','.join(f'{name}={value}' for name, value in settings.items())}",
            f"--local-addr={node.address}",
            "--max-restarts=20",
            str(ROOT / "tests" / "helpers/recording.py"),
            str(self.directory),
            *tiny(**self._flags),
        ]
        agent = start(argv, partial(_as_agent, node, self._keeps_store))
        self._agents.append(agent)
        return agent

    def workers(self, agent: Running | None = None) -> list[int]:
        """The processes of the run, or those that one agent has started."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                parent = int((path / "stat").read_text().rpartition(") ")[2].split()[1])
            except OSError:  # it has ended
                continue
            if os.fsencode(self.directory) in words and (
                agent is None or parent == agent.process.pid
            ):
                found.append(int(path.name))
        return found

    def steps(self, size: int) -> int:
        """How many steps were done in `size` processes so far, repeated ones included."""
        return sum(
            f'"size": {size},' in line
            for path in self.directory.glob("steps_*_0.jsonl")
            for line in path.read_text().splitlines()
        )

    def wait_for_steps(self, more: int, size: int, agent: Running, timeout_s: float = 60) -> None:
        """Wait for that many more steps in `size` processes while an agent runs."""
        before = self.steps(size)
        agent.wait_for(lambda: self.steps(size) >= before + more, timeout_s)

    def slow_down(self) -> None:
        """Let each step take some tenths of a second more from now on."""
        (self.directory / SLOW).touch()

    def speed_up(self) -> None:
        """Let steps take as long as they take."""
        (self.directory / SLOW).unlink()

    def end(self) -> None:
        """Leave nothing behind."""
        for agent in self._agents:
            if agent.process.is_alive():
                agent.signal(signal.SIGKILL)
        kill(*self.workers())


@contextmanager
def elastic(*args, **kwargs) -> Iterator[Elastic]:
    """An `Elastic` of which nothing is left."""
    run = Elastic(*args, **kwargs)
    try:
        yield run
    finally:
        run.end()


def kill(*pids: int) -> None:
    """SIGKILL to processes, some of which may have ended."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_there(pid: int) -> bool:
    """Whether a process runs, other than as a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
    except OSError:
        return False
    return state[0] not in "ZX"


def seconds_until(condition: Callable[[], bool], timeout_s: float) -> float:
    """How long it takes until something is true."""
    since = time.monotonic()
    while not condition():
        assert time.monotonic() - since < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - since


@contextmanager
def cable() -> Iterator[tuple[Node, Node]]:
    """Two machines in name, with a cable between them.

    Raises:
        PermissionError: this system does not let the tests make them.
    """
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


def free_port() -> int:
    """A port of the loopback device that nobody has just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _as_agent(node: Node, keeps_store: bool) -> None:
    """Make of this process, which is about to run main.py, a torchrun on `node`."""
    from torch.distributed import run

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
    main.main = lambda argv: run.main(argv) or 0
