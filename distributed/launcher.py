"""Which of a run's processes this is, and `--nGPU N`: starting N of them on this machine.

The only file that reads RANK, WORLD_SIZE and their kin. They are torchrun's, and `replicas` sets
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
class Place:
    """One process among those of a run.

    Args:
        rank: of `size`, over all machines; 0 prints and writes.
        local_rank: of `local_size`, on this machine; the number of its GPU.
        launched: whether somebody has started it as one of several (or as one of one).
        restarted: whether somebody starts it anew after a fault, nobody looking.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False
    restarted: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0


ALONE = Place()
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def here() -> Place:
    """The place of this process, as torchrun, `replicas` or Slurm have said."""
    again = any(_number(name, 0) > 0 for name in RESTART_COUNTS)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Place(restarted=again)
    return Place(
        rank=_number("RANK", 0),
        size=_number("WORLD_SIZE", 1),
        local_rank=_number("LOCAL_RANK", 0),
        local_size=_number("LOCAL_WORLD_SIZE", 1),
        launched=True,
        restarted=again,
    )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def replicas(count: int, work: Callable[[], int]) -> int:
    """Run `work` in `count` processes of this machine; the exit code of the run.

    Signals are passed on. When one process has ended the others end by themselves, since they
    notice (distributed/world.py); who does not is killed.

    Args:
        work: picklable; returns the exit code of its process.
    """
    import torch.distributed  # noqa: TID251
    import torch.multiprocessing

    # The store is here and not in a replica, so that it outlives each of them; its port is free.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # noqa: TID251
    # None is to meet a process that cannot handle it yet; `Stop` lets them through.
    multiprocessing.resource_tracker.ensure_running()  # which would unblock some
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    started = torch.multiprocessing.start_processes(
        _replica, (count, store.port, work), count, join=False, start_method=START_METHOD
    ).processes
    for number in SIGNALS:
        signal.signal(number, lambda number, _: _pass_on(number, started))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    deadline = None
    while any(process.is_alive() for process in started):
        alive = [process.sentinel for process in started if process.is_alive()]
        multiprocessing.connection.wait(alive, timeout=1)
        if deadline is None and len(alive) < count:
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            _pass_on(signal.SIGKILL, started)
    return verdict([process.exitcode for process in started])


def _replica(local_rank: int, count: int, port: int, work: Callable[[], int]) -> None:
    os.environ |= {
        "RANK": str(local_rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    sys.exit(work())


def _pass_on(number: int, processes: list) -> None:
    for process in processes:
        if process.exitcode is None:
            process.kill() if number == signal.SIGKILL else os.kill(process.pid, number)


def verdict(codes: list[int]) -> int:
    """One exit code for those of all processes; negative ones were ended by a signal.

    Those that could still speak have agreed, so that what any of them says is what has happened.
    """
    said = [code for code in codes if code > 0]
    if said:
        return said[0]
    return 128 - min(codes) if min(codes) < 0 else 0
