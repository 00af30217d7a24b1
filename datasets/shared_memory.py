"""Fit the batches that loader processes hand over into shared memory, and see a failing handover.

A worker puts a batch into shared memory while it collates, so that a lack of room is an error of
the worker, which DataLoader passes on at once. The rest of the handover (a descriptor, sent through
a socket) happens in a thread of the worker, whose errors DataLoader does not see: it would wait for
the batch until its timeout.
"""

import multiprocessing.queues
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from errors import DataError

MOUNT = Path("/dev/shm")  # noqa: S108 (of Linux; other systems have none, and no such limit)
PREFETCH = 2  # batches to prepare in advance, and chunks for each worker at least
PREFETCH_BYTES = 2**30  # of them at most
FAILED = 74  # exit code of a worker that cannot hand over a batch
FEWER = "lower --nThreads, or --nThreads 0"
# What torch says about loader processes: pattern, what is wrong, what helps.
FAILURES = [
    (r"^Too many open files|received \d+ items of ancdata|worker process(?s:.)*Too many open files",
     "too many open files to hand over a batch", f"allow more of them with ulimit -n, {FEWER}"),
    (r"unable to .*</torch_\d+", "no room for a batch in shared memory",
     f"give {MOUNT} more space (docker run --shm-size=1g), {FEWER}"),
    (rf"DataLoader worker .*exit code {FAILED}\.", "a loader process cannot hand over a batch: "
     "too many open files, or no space for a socket in the directory of temporary files",
     f"raise ulimit -n, free space in TMPDIR (/tmp), {FEWER}"),
    (r"^(DataLoader worker \(pid|DataLoader timed out|Pin memory thread exited)", "a loader "
     "process was killed or hung: {}", "often memory ran out: lower --nThreads or add memory"),
]  # fmt: skip


def fit_in_flight(
    num_workers: int,
    chunk_bytes: int,
    chunks_per_batch: int,
    num_batches: int,
    num_processes: int,
    warn: Callable[[str], None],
) -> tuple[int, int]:
    """Choose how many workers to start and how many chunks each of them prepares in advance.

    All these chunks may stand in shared memory at once, and the batch that is being read.

    Args:
        num_workers: as asked for.
        chunk_bytes: of the largest part of a batch that a worker hands over at once.
        num_batches: of an epoch.
        num_processes: of the run on this machine, which share the memory.
        warn: called with a note if there are fewer of them for lack of room.

    Raises:
        DataError: there is no room for a single worker, or no shared memory.
    """
    wanted = max(PREFETCH, -(-PREFETCH * chunks_per_batch // num_workers))
    most = max(1, min(wanted, PREFETCH_BYTES // (chunk_bytes * num_workers)))
    if sys.platform != "linux":
        return num_workers, most
    if not os.access(MOUNT, os.W_OK | os.X_OK):
        what = f"loader processes need {MOUNT}, which is missing or cannot be written"
        raise DataError(what, "mount a tmpfs there, or --nThreads 0")
    mount = os.statvfs(MOUNT)
    free = mount.f_bavail * mount.f_frsize

    def needed(workers: int, prefetch: int) -> int:
        num_chunks = min(workers * prefetch + chunks_per_batch, num_batches * chunks_per_batch)
        return num_chunks * chunk_bytes * num_processes

    choices = [(num_workers, prefetch) for prefetch in range(most, 0, -1)]
    choices += [(workers, 1) for workers in range(num_workers - 1, 0, -1)]
    fitting = next((choice for choice in choices if needed(*choice) <= free), None)
    enough = num_workers, min(most, PREFETCH)
    if fitting and fitting >= enough:
        return fitting
    what = f"{MOUNT} has {free / 1e6:.0f} MB free, but images from {num_workers} loader processes "
    what += f"need {needed(*enough) / 1e6:.0f} MB"
    fix = f"docker run --shm-size={-(-needed(*enough) // 2**20)}m, or mount -o remount,size=..."
    if not fitting:
        raise DataError(what, f"enlarge it ({fix}), use a smaller --batchSize, or --nThreads 0")
    warn(f"{what}: {fitting[0]} of them run, with little prepared in advance; larger: {fix}")
    return fitting


def exit_on_failed_handover() -> None:
    """Let this worker exit, which its parent notices, where it would drop a batch and go on."""
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(FAILED))


def explain(error: Exception) -> DataError | None:
    """Translate torch's error about a loader process; None if it is another error."""
    text = f"{error}\n{error.__cause__}"  # the cause has a dead worker's exit code
    if not isinstance(error, RuntimeError):  # of the pipe through which a dying worker sent a batch
        text = f"DataLoader worker (pid unknown): {text}"
    for pattern, what, fix in FAILURES:
        if re.search(pattern, text):
            return DataError(what.format(text.partition("\n")[0]), fix)
    return None
