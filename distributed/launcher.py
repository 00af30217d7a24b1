"""Which of a run's processes this is, and `--nGPU N`: starting N of them on this machine.

The only file that reads RANK, WORLD_SIZE and their kin. They are torchrun's, and `spawn` sets
the same, so that nothing else can tell who started a process.
"""

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
GRACE_S = 45  # for the others to end by themselves once one process has ended


@dataclass(frozen=True)
class ProcessInfo:
    """One process among those of a run.

    Args:
        rank: of `size`, over all machines; 0 prints and writes.
        local_rank: of `local_size`, on this machine; the number of its GPU.
        has_launcher: whether a launcher started it, alone or as one of several.
        restarted: whether a launcher restarted it automatically after a failure.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    has_launcher: bool = False
    restarted: bool = False

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0


SINGLE_PROCESS = ProcessInfo()
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def from_env() -> ProcessInfo:
    """This process, as described by the environment of torchrun, `spawn` or Slurm."""
    restarted = any(_env_int(name, 0) > 0 for name in RESTART_COUNTS)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ProcessInfo(restarted=restarted)
    return ProcessInfo(
        rank=_env_int("RANK", 0),
        size=_env_int("WORLD_SIZE", 1),
        local_rank=_env_int("LOCAL_RANK", 0),
        local_size=_env_int("LOCAL_WORLD_SIZE", 1),
        has_launcher=True,
        restarted=restarted,
    )


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def spawn(num_procs: int, fn: Callable[[], int]) -> int:
    """Run `fn` in `num_procs` processes of this machine; the exit code of the run.

    Signals are passed on. When one process has ended the others end by themselves, since they
    notice (distributed/world.py); who does not is killed.

    Args:
        fn: picklable; returns the exit code of its process.
    """
    import torch.distributed  # noqa: TID251
    import torch.multiprocessing

    # The store is here and not in a replica, so that it outlives each of them; its port is free.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # noqa: TID251
    # None is to meet a process that cannot handle it yet; `SignalHandler` lets them through.
    multiprocessing.resource_tracker.ensure_running()  # which would unblock some
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    workers = torch.multiprocessing.start_processes(
        _worker_main, (num_procs, store.port, fn), num_procs, join=False, start_method=START_METHOD
    ).processes
    for signum in SIGNALS:
        signal.signal(signum, lambda signum, _: _forward_signal(signum, workers))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    deadline = None
    while any(process.is_alive() for process in workers):
        alive = [process.sentinel for process in workers if process.is_alive()]
        multiprocessing.connection.wait(alive, timeout=1)
        if deadline is None and len(alive) < num_procs:
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            _forward_signal(signal.SIGKILL, workers)
    return combined_exit_code([process.exitcode for process in workers])


def _worker_main(local_rank: int, num_procs: int, port: int, fn: Callable[[], int]) -> None:
    os.environ |= {
        "RANK": str(local_rank),
        "WORLD_SIZE": str(num_procs),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(num_procs),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    sys.exit(fn())


def _forward_signal(signum: int, processes: list) -> None:
    for process in processes:
        if process.exitcode is None:
            process.kill() if signum == signal.SIGKILL else os.kill(process.pid, signum)


def combined_exit_code(codes: list[int]) -> int:
    """One exit code for those of all processes; negative ones were ended by a signal.

    Those that could still speak have agreed, so that what any of them says is what has happened.
    """
    positive = [code for code in codes if code > 0]
    if positive:
        return positive[0]
    return 128 - min(codes) if min(codes) < 0 else 0
