"""What reading a file of unknown origin may cost, and how many files may be open."""

import errno
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATM = Path("/proc/self/statm")  # its first number: pages of address space


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError once the main thread, which calls this, has computed for so long.

    Waiting does not count, nor do other threads: neither a slow disk, nor a suspended process, nor
    threads that wait in a loop are what a file costs.
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
    """Let no more than `size` bytes be allocated beyond what is in use: else MemoryError.

    Of all threads of the process, and only where Linux tells what is in use.
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
    """Make sure that `count` files can be opened than are now.

    Raises:
        OSError: the system does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + count
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise OSError(errno.EMFILE, f"{needed} files may be open at once, the limit is {hard}")
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
