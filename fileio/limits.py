"""Limit the time and memory that reading an untrusted file takes; read and raise other limits."""

import errno
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds and period, or "max"
STATM = Path("/proc/self/statm")  # first number: pages of address space in use


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError once the calling thread, the main one, has used so much CPU time.

    CPU time, because a slow disk, a suspended process and other threads are not the file's cost.
    """
    end = time.thread_time() + seconds

    def on_timer(signum: int, frame: object) -> None:
        left = end - time.thread_time()
        if left <= 0:
            raise TimeoutError(f"takes more than {seconds:.0f} s to read")
        signal.setitimer(signal.ITIMER_PROF, left)

    before = signal.signal(signal.SIGPROF, on_timer)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Raise MemoryError if the process allocates `size` bytes more than it uses now.

    Covers all threads; has no effect where /proc does not tell what is in use.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = soft
    if STATM.exists():
        limit = int(STATM.read_text().split()[0]) * resource.getpagesize() + size
        limit = limit if soft == resource.RLIM_INFINITY else min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def allow_open_files(count: int) -> None:
    """Let `count` more files be opened; raise OSError if the hard limit does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + count
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise OSError(errno.EMFILE, f"{needed} files may be open at once, the limit is {hard}")
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def usable_cores() -> int:
    """Count the cores that this process may use: its affinity, or its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with suppress(OSError, ValueError):  # no container, or no quota
        quota, period = map(int, CPU_QUOTA.read_text().split())
        cores = min(cores or 1, max(1, quota // period))
    return cores or 1
