"""Detect a lost or failed process of a run, and let all others exit with the same error.

A failing process writes a failure record to the store before it exits. The others lose their
connection to it, read the record at their next collective, and exit with its error. Without a
record each process checks in at the store, which shows the missing ranks. A thread of each process
runs a heartbeat, because the main thread may be blocked on a GPU for longer than `timeout_s`.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist  # noqa: TID251

import errors
from distributed.launcher import ProcessInfo
from errors import PeerError, RunError

MISSING_RANKS_TIMEOUT_S = 3.0  # for all ranks to check in, once a peer is missing
RECORD_TIMEOUT_S = 5.0  # for all ranks to read the record of a failure
ABORT_GRACE_S = 6.0  # longer: for the main thread to exit by itself; then it is aborted
HEARTBEAT_S = 1.0  # between two heartbeats
FAILURE_KEY = "failure"
RERUN_HINT = "run it again with --resume auto; its own messages say more"


class PeerMonitor:
    """Watch the other processes of the run; for a single process it does nothing.

    Args:
        store: of the rendezvous; None for one process.
        heartbeat_group: gloo group of the heartbeat alone; None for one process.
        timeout_s: longest time between two collectives, and longest wait for a heartbeat.
    """

    def __init__(
        self, process: ProcessInfo, store=None, heartbeat_group=None, timeout_s: float = 0.0
    ):
        self._process, self._store = process, store
        self._heartbeat_group, self._timeout_s = heartbeat_group, timeout_s
        self._failure: RunError | None = None  # the error that ends the run, once it is known
        self._last_collective_at: float | None = None  # None: the next one is not due
        self._has_failed = self._is_shutting_down = False
        self._wake = threading.Event()
        self._abort = lambda error: os._exit(error.code)
        self._thread = threading.Thread(target=self._heartbeat_loop, daemon=True)
        if heartbeat_group:
            self._thread.start()

    def expect_collective(self, is_due: bool) -> None:
        """Expect the next collective within `timeout_s`, or, unless `is_due`, at any time."""
        self._last_collective_at = time.monotonic() if is_due else None

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Turn torch's error in a collective into the error with which all processes exit."""
        try:
            yield
        except RuntimeError as error:
            # A step that cannot be captured runs eagerly, see engine/cuda_graph.py.
            is_capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            if is_loader_error(error) or is_capturing or isinstance(error, torch.OutOfMemoryError):
                raise
            raise self._find_failure(error) from error

    def report_failure(self, error: Exception) -> Exception:
        """Record this process's error; return the first error recorded, with which all exit."""
        if self._process.size == 1 or self._failure:
            return self._failure or error
        with suppress(RuntimeError):  # the store is lost, which the others notice as well
            error = self._store_failure(error)
            self._has_failed = True
            self._wake.set()
            # Until all have read the record: the store may end with this process.
            self._thread.join(RECORD_TIMEOUT_S)
        return error

    @property
    def is_reporter(self) -> bool:
        """Return whether this process prints how the run ended: the lowest rank not lost."""
        lost = self._failure.details.get("lost", []) if self._failure else []
        return self._process.rank == min(set(range(self._process.size)) - set(lost), default=0)

    def shutdown(self) -> None:
        """Wait until all processes shut down, so that none loses a peer that it still needs."""
        if self._process.size > 1:
            self._is_shutting_down = True
            self._wake.set()
            self._thread.join()
            if self._failure:
                raise self._failure

    def set_abort_handler(self, abort: Callable[[RunError], None]) -> None:
        """Call `abort` if the main thread is blocked on a GPU and does not exit after a failure."""
        self._abort = abort

    def _store_failure(self, error: Exception) -> Exception:
        """Write the failure record unless there is one; return the error that is recorded."""
        if isinstance(error, RunError):
            (what, fix), details = error.problems[0], error.details
        else:
            what = f"a bug in process {self._process.rank}: {type(error).__name__}: {error}"
            fix, details = "report it with its traceback", {}
        record = json.dumps([type(error).__name__, what, fix, details]).encode()
        first = self._store.compare_set(FAILURE_KEY, b"", record)
        return error if first == record else _parse_failure(first)

    def _find_failure(self, error: RuntimeError) -> RunError:
        """Read the failure record; if there is none, write one that names the lost ranks."""
        if not self._failure:
            try:
                if not self._store.check([FAILURE_KEY]):
                    self._store_failure(self._lost_error(error, self._missing_ranks()))
                self._failure = _parse_failure(self._store.get(FAILURE_KEY))
            except RuntimeError:
                self._failure = self._store_lost_error(error)
        return self._failure

    def _store_lost_error(self, error: RuntimeError | None) -> PeerError:
        what = f"the process that held the run together is lost ({first_line(error)})"
        return PeerError(what, RERUN_HINT, lost=[] if self._process.is_rank0 else [0])

    def _lost_error(self, error: RuntimeError, lost: list[int]) -> PeerError:
        names = ", ".join("{} (host {}, {})".format(rank, *self._address(rank)) for rank in lost)
        counted = {0: "the connection to the others broke", 1: f"process {names} is lost"}
        what = counted.get(len(lost), f"processes {names} are lost")
        return PeerError(f"{what} ({first_line(error)})", RERUN_HINT, lost=lost)

    def _address(self, rank: int) -> tuple[str, int]:
        return tuple(json.loads(self._store.get(f"address/{rank}")))

    def _has_exited(self, rank: int) -> bool:
        """Return whether a process of this machine has exited; False for other machines."""
        host, pid = self._address(rank)
        if host != socket.gethostname() or not Path("/proc/self").exists():
            return False
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state in "ZX"
        return True

    def _missing_ranks(self) -> list[int]:
        """Return the ranks that do not check in; the others do, as their collective broke too."""
        self._store.set(f"here/{self._process.rank}", "")
        deadline = time.monotonic() + MISSING_RANKS_TIMEOUT_S
        while True:
            ranks = range(self._process.size)
            absent = [rank for rank in ranks if not self._store.check([f"here/{rank}"])]
            exited = [rank for rank in absent if self._has_exited(rank)]
            has_record = self._store.check([FAILURE_KEY])  # of a process that was faster
            if exited or not absent or time.monotonic() > deadline or has_record:
                return exited or absent  # beside one that has exited, the others are only slow
            time.sleep(0.05)

    def _heartbeat_loop(self) -> None:
        try:
            while True:
                self._check_stall()
                failed, shutting_down = self._exchange_heartbeat()
                if failed:
                    self._abort_after_grace()
                    self._failure = _parse_failure(self._store.get(FAILURE_KEY))
                    self._exchange_heartbeat()  # returns once all have read it
                    return
                if shutting_down == self._process.size:
                    return
                self._wake.wait(HEARTBEAT_S)
        except RuntimeError as error:
            self._abort_after_grace(error)
            self._find_failure(error)

    def _exchange_heartbeat(self) -> list[int]:
        """Return how many processes have failed, and how many are shutting down."""
        states = torch.tensor([self._has_failed, self._is_shutting_down], dtype=torch.int64)
        work = dist.all_reduce(states, group=self._heartbeat_group, async_op=True)
        work.wait(timedelta(seconds=self._timeout_s))
        return states.tolist()

    def _check_stall(self) -> None:
        """Record a failure if the main thread reaches no collective in time."""
        since = self._last_collective_at
        if since is not None and time.monotonic() - since > self._timeout_s:
            what = f"process {self._process.rank} waits for its device, and has exchanged nothing"
            self._store_failure(PeerError(f"{what} for {self._timeout_s:g} s", RERUN_HINT))
            self._has_failed = True

    def _abort_after_grace(self, error: RuntimeError | None = None) -> None:
        """Start a timer that aborts the process, even if the store never answers."""

        def abort() -> None:
            self._failure = self._failure or self._store_lost_error(error)
            self._abort(self._failure)

        timer = threading.Timer(ABORT_GRACE_S, abort)
        timer.daemon = True
        timer.start()


def is_loader_error(error: Exception) -> bool:
    """Return whether a loader process has died: a signal handler raises that at any line."""
    return str(error).startswith("DataLoader worker")


def first_line(error: RuntimeError | None) -> str:
    """Return torch's message without the place in its source at which it begins."""
    return str(error).partition("\n")[0].rpartition("] ")[2]


def _parse_failure(record: bytes) -> RunError:
    name, what, fix, details = json.loads(record)
    return getattr(errors, name, RunError)(what, fix, **details)
