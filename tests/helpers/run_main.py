"""Run the program in processes of its own, each forked from one that has imported torch already.

`python main.py` takes three seconds to import what it needs; a fork takes milliseconds, and can be
killed, stopped and sabotaged like the real thing. Exit codes and output are the real ones.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]
LONG_S = 300  # no test waits for so long unless something hangs, however busy the machine is
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
)
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as main.py asks for before torch is loaded
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["helpers.preload"])


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until something is true."""
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end, f"not within {LONG_S} s"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Return whether a process runs, other than as a zombie."""
    return process_state(pid) not in ("", "Z", "X")


def process_state(pid: int) -> str:
    """Read a process's state as ps shows it, such as T for a stopped one; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return ""


@dataclass(frozen=True)
class Result:
    """Describe how a call ended; `code` is negative when a signal ended it."""

    code: int
    out: str
    err: str


class Running:
    """Control a call in progress."""

    def __init__(self, argv: list[str], sabotage: Callable[[], None] | None, threads: int):
        self._out, self._err = tempfile.mkstemp()[1], tempfile.mkstemp()[1]
        self.process = _context.Process(
            target=_child, args=(argv, sabotage, threads, self._out, self._err)
        )
        self.process.start()

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.process.pid, number)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something is true while the process runs."""
        wait_until(lambda: condition() or not self.process.is_alive())
        assert condition(), self.wait().err

    def wait(self, timeout_s: float = LONG_S) -> Result:
        """Wait for the end."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.signal(signal.SIGKILL)
            raise TimeoutError(f"still running after {timeout_s} s: {Path(self._err).read_text()}")
        texts = [Path(path).read_text() for path in (self._out, self._err)]
        for path in (self._out, self._err):
            os.unlink(path)
        return Result(self.process.exitcode, *texts)


def start(argv: str | list[str], sabotage=None, threads: int = 1) -> Running:
    """Start `main.py` with a command line; `sabotage`, a picklable function, runs before it."""
    return Running(argv.split() if isinstance(argv, str) else argv, sabotage, threads)


def run(
    argv: str | list[str], sabotage=None, threads: int = 1, timeout_s: float = LONG_S
) -> Result:
    """Run `main.py` with a command line to its end."""
    return start(argv, sabotage, threads).wait(timeout_s)


class Ranks:
    """Control a call in several processes, as a launcher on one machine would start them.

    Args:
        sabotages: for some of them, by rank.
        first_has_store: the store by which they meet is the first process's and ends with it; else
            it is the tests' own, as that of a launcher.
    """

    def __init__(
        self,
        argv: str | list[str],
        size: int,
        sabotages: dict[int, Callable] | None = None,
        first_has_store: bool = False,
    ):
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self._store.port
        if first_has_store:
            self._store = None  # and its port is free
        as_rank = partial(_as_rank, size=size, port=port, store=not first_has_store)
        self.ranks = [
            start(argv, partial(as_rank, rank=rank, sabotage=(sabotages or {}).get(rank)))
            for rank in range(size)
        ]

    def __getitem__(self, rank: int) -> Running:
        return self.ranks[rank]

    def wait(self) -> list[Result]:
        """Wait for the end of all of them."""
        return [rank.wait() for rank in self.ranks]


def run_ranks(argv: str | list[str], size: int, sabotages: dict[int, Callable] | None = None):
    """Run `main.py` in `size` processes; `sabotages` are for some of them, by rank."""
    return Ranks(argv, size, sabotages).wait()


def _as_rank(*, rank: int, size: int, port: int, store: bool, sabotage: Callable | None) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(store),
    }
    from distributed import peer_monitor

    peer_monitor.MISSING_RANKS_TIMEOUT_S, peer_monitor.HEARTBEAT_S = 0.5, 0.1
    peer_monitor.RECORD_TIMEOUT_S = peer_monitor.ABORT_GRACE_S = LONG_S
    if sabotage:
        sabotage()


def _child(argv, sabotage, threads: int, out: str, err: str) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (the process's own)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    import torch

    torch.set_num_threads(threads)
    if sabotage:
        sabotage()
    import main

    code = main.main(argv)
    for stream in (sys.stdout, sys.stderr):
        if stream:  # which a run stops using once it has no reader
            stream.flush()
    sys.exit(code)
