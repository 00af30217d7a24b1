"""Find this process's rank and size, and start the processes of `--nGPU N` on this machine.

Only this file reads RANK, WORLD_SIZE and the other variables of torchrun. `spawn` sets the same
ones, so no other code depends on which launcher started a process.
"""

import math
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from distributed.signals import SIGNALS

START_METHOD = "spawn"  # a process that has used CUDA cannot be forked
GRACE_S = 45  # for the other processes to exit by themselves once one has exited


@dataclass(frozen=True)
class ProcessInfo:
    """Describe one process of a run."""

    rank: int = 0  # over all machines; rank 0 prints and writes
    size: int = 1  # number of processes on all machines
    local_rank: int = 0  # on this machine; also the index of its GPU
    local_size: int = 1  # number of processes on this machine
    has_launcher: bool = False  # a launcher started it, alone or with others
    restarted: bool = False  # a launcher restarted it automatically after a failure

    @property
    def is_rank0(self) -> bool:
        """Return whether this process prints and writes."""
        return self.rank == 0


SINGLE_PROCESS = ProcessInfo()
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
RANK_VARIABLES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}  # defaults


def from_env() -> ProcessInfo:
    """Read the environment that torchrun, `spawn` or Slurm has set for this process."""
    restarted = any(_env_int(name, 0) > 0 for name in RESTART_COUNTS)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ProcessInfo(restarted=restarted)
    numbers = [_env_int(name, default) for name, default in RANK_VARIABLES.items()]
    return ProcessInfo(*numbers, has_launcher=True, restarted=restarted)


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def spawn(num_procs: int, fn: Callable[[], int]) -> int:
    """Run `fn` in `num_procs` processes of this machine and return the run's exit code.

    Signals are forwarded to them. Once one has exited, the others notice (peer_monitor.py) and
    exit; those that do not within `GRACE_S` are killed.

    Args:
        fn: picklable; returns the exit code of its process.
    """
    import torch.distributed  # noqa: TID251
    import torch.multiprocessing

    # This process owns the store, so that the store outlives every worker; port 0: any free port.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # noqa: TID251
    # Signals stay blocked until a worker's SignalHandler can handle them and unblocks them.
    multiprocessing.resource_tracker.ensure_running()  # starting it later would unblock some
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    workers = torch.multiprocessing.start_processes(
        _worker_main, (num_procs, store.port, fn), num_procs, join=False, start_method=START_METHOD
    ).processes
    for signum in SIGNALS:
        signal.signal(signum, lambda signum, _: _forward_signal(signum, workers))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    # Wait for all of them, and no longer than GRACE_S after the first has exited.
    deadline = math.inf
    while alive := [process.sentinel for process in workers if process.is_alive()]:
        multiprocessing.connection.wait(alive, timeout=1)
        if len(alive) < num_procs:
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            _forward_signal(signal.SIGKILL, workers)
    return combined_exit_code([process.exitcode for process in workers])


def _worker_main(local_rank: int, num_procs: int, port: int, fn: Callable[[], int]) -> None:
    numbers = (local_rank, num_procs, local_rank, num_procs)
    os.environ |= dict(zip(RANK_VARIABLES, map(str, numbers), strict=True))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # rank 0 must not start a second store
    sys.exit(fn())


def _forward_signal(signum: int, workers: list) -> None:
    for process in workers:
        if process.exitcode is None:
            os.kill(process.pid, signum)


def combined_exit_code(codes: list[int]) -> int:
    """Combine the exit codes of all processes; a negative one means that a signal ended it.

    Processes that could still exit by themselves agree on the cause, so any of their codes holds.
    """
    by_signal = 128 - min(codes) if min(codes) < 0 else 0
    return next((code for code in codes if code > 0), by_signal)
