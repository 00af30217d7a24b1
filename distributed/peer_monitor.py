"""Whether all processes of a run are there, and what ended the one that is not.

A process that fails leaves a failure record in the store before it ends. Its connections close,
the others find that out at their next exchange, read the record and end in the same way; without a
record each checks in, which shows who is missing. A thread of each process asks all others once a
second whether they are there: a main thread may be waiting for longer than anybody may be lost.
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

from distributed.launcher import ProcessInfo
from errors import PeerError, RunError

MISSING_RANKS_TIMEOUT_S = 3.0  # to answer, once a peer is missing
ABORT_GRACE_S = 6.0  # to end by itself once one is lost or has failed; then a process is ended
HEARTBEAT_S = 1.0  # between two questions whether all are there
FAILURE_KEY = "notice"
RERUN_HINT = "run it again with --resume auto; its own messages say more"


class PeerMonitor:
    """What one process knows of the others of its run; nothing to do for a single process.

    Args:
        process: this process.
        store: that the processes share; None for one process.
        heartbeat_group: group of gloo, to ask whether all are there; None for one process.
        timeout_s: longest time without an exchange, and longest wait for an answer.
    """

    def __init__(
        self, process: ProcessInfo, store=None, heartbeat_group=None, timeout_s: float = 0.0
    ):
        self._process, self._store = process, store
        self._heartbeat_group, self._timeout_s = heartbeat_group, timeout_s
        self._lost_ranks: list[int] = []
        self._failure: RunError | None = None  # what the run ends with, once this process knows
        # When the last exchange ended that has a limit; None while there is none.
        self._last_collective_at: float | None = None
        self._has_failed = self._is_shutting_down = False
        self._wake = threading.Event()
        self._abort = lambda error: os._exit(error.code)
        self._thread = threading.Thread(target=self._heartbeat_loop, daemon=True)
        if heartbeat_group:
            self._thread.start()

    def collective_started(self) -> None:
        """Stop the clock of `collective_finished`: it waits for the others, or works alone."""
        self._last_collective_at = None

    def collective_finished(self) -> None:
        """Expect the next exchange within `timeout_s`: if none comes, all may be waiting."""
        self._last_collective_at = time.monotonic()

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Turn what torch raises about a peer into the error that all processes end with."""
        try:
            yield
        except RuntimeError as error:
            if not _is_peer_error(error):
                raise
            raise self._find_failure(error) from error

    def report_failure(self, error: Exception) -> Exception:
        """Tell the others what ends this process; what all end with, that of who was first."""
        if self._process.size == 1 or self._failure:
            return self._failure or error
        with suppress(RuntimeError):  # the store is lost, which the others find out as well
            error = self._store_failure(error)
            self._has_failed = True
            self._wake.set()
            # Until all have read it: the store may end with this process.
            self._thread.join(MISSING_RANKS_TIMEOUT_S)
        return error

    @property
    def is_reporter(self) -> bool:
        """Whether it is for this process to say how the run ended: the first that is left."""
        return self._process.rank == min(
            set(range(self._process.size)) - set(self._lost_ranks), default=0
        )

    def shutdown(self) -> None:
        """End together: nobody's peers are gone while it still needs them."""
        if self._process.size > 1:
            self._is_shutting_down = True
            self._wake.set()
            self._thread.join()
            if self._failure:
                raise self._failure

    def set_abort_handler(self, abort: Callable[[RunError], None]) -> None:
        """Call `abort` if this process has to end and its main thread does not.

        It may be waiting for a GPU whose kernel waits for a peer that is gone.
        """
        self._abort = abort

    # -------------------------------------------------------------------------------- failures

    def _store_failure(self, error: Exception) -> Exception:
        """Record what ends this process, unless another was first: the error that was recorded."""
        if isinstance(error, RunError):
            (what, fix), details = error.problems[0], error.details
        else:
            what = f"a bug in process {self._process.rank}: {type(error).__name__}: {error}"
            fix, details = "report it with its traceback", {}
        record = json.dumps([type(error).__name__, what, fix, details]).encode()
        first = self._store.compare_set(FAILURE_KEY, b"", record)
        return error if first == record else parse_failure(first)

    def _find_failure(self, error: RuntimeError) -> RunError:
        """The error of the process that failed first; else that one is lost, and which."""
        if not self._failure:
            try:
                if not self._store.check([FAILURE_KEY]):
                    self._store_failure(self._lost_error(error, self._missing_ranks()))
                self._read_failure()
            except RuntimeError:  # the store as well
                self._failure = self._store_lost_error(error)
        return self._failure

    def _read_failure(self) -> None:
        error = parse_failure(self._store.get(FAILURE_KEY))
        self._lost_ranks, self._failure = error.details.get("lost", []), error  # as all see it

    def _store_lost_error(self, error: RuntimeError | None) -> PeerError:
        self._lost_ranks = [] if self._process.is_rank0 else [0]
        what = f"the process that held the run together is lost ({first_line(error)})"
        return PeerError(what, RERUN_HINT, lost=self._lost_ranks)

    def _lost_error(self, error: RuntimeError, lost: list[int]) -> PeerError:
        names = ", ".join(map(self._describe_rank, lost))
        what = {
            0: "the exchange with the others broke",
            1: f"process {names} is lost",
        }.get(len(lost), f"processes {names} are lost")
        return PeerError(f"{what} ({first_line(error)})", RERUN_HINT, lost=lost)

    # -------------------------------------------------------------------------- missing ranks

    def _describe_rank(self, rank: int) -> str:
        return "{} (host {}, {})".format(rank, *self._host_and_pid(rank))

    def _host_and_pid(self, rank: int) -> tuple[str, int]:
        return tuple(json.loads(self._store.get(f"who/{rank}")))

    def _has_exited(self, rank: int) -> bool:
        """Whether a process of this machine has ended; False for those of others."""
        host, pid = self._host_and_pid(rank)
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return host == socket.gethostname() and Path("/proc/self").exists()
        return host == socket.gethostname() and state in "ZX"

    def _missing_ranks(self) -> list[int]:
        """The ranks that do not answer. All others soon do: their exchange broke too."""
        self._store.set(f"here/{self._process.rank}", "")
        end = time.monotonic() + MISSING_RANKS_TIMEOUT_S
        while True:
            ranks = range(self._process.size)
            absent = [rank for rank in ranks if not self._store.check([f"here/{rank}"])]
            gone = [rank for rank in absent if self._has_exited(rank)]
            if gone or not absent or time.monotonic() > end or self._store.check([FAILURE_KEY]):
                return gone or absent  # who is only slow is not lost
            time.sleep(0.05)

    # ------------------------------------------------------------------------------ heartbeat

    def _heartbeat_loop(self) -> None:
        """Once a second: are all there, has one failed, are all ready to leave?"""
        try:
            while True:
                self._check_stall()
                failed, shutting_down = self._exchange_heartbeat()
                if failed:
                    self._abort_after_grace()
                    self._read_failure()
                    self._exchange_heartbeat()  # all have read it
                    return
                if shutting_down == self._process.size:
                    return
                self._wake.wait(HEARTBEAT_S)
        except RuntimeError as error:
            self._abort_after_grace(error)
            self._find_failure(error)

    def _exchange_heartbeat(self) -> list[int]:
        """How many processes have failed, and how many are leaving."""
        states = torch.tensor([self._has_failed, self._is_shutting_down], dtype=torch.int64)
        work = dist.all_reduce(states, group=self._heartbeat_group, async_op=True)
        work.wait(timedelta(seconds=self._timeout_s))
        return states.tolist()

    def _check_stall(self) -> None:
        """Fail when the main thread comes to no exchange: all others may be waiting likewise."""
        since = self._last_collective_at
        if since is not None and time.monotonic() - since > self._timeout_s:
            what = f"process {self._process.rank} waits for its device, and has not met the others"
            self._store_failure(PeerError(f"{what} for {self._timeout_s:g} s", RERUN_HINT))
            self._has_failed = True

    def _abort_after_grace(self, error: RuntimeError | None = None) -> None:
        """Leave the main thread some seconds to end by itself, even if the store never answers."""
        timer = threading.Timer(
            ABORT_GRACE_S, lambda: self._abort(self._failure or self._store_lost_error(error))
        )
        timer.daemon = True
        timer.start()


def first_line(error: RuntimeError | None) -> str:
    """What torch says, without the place in its source that it begins with."""
    return str(error).partition("\n")[0].rpartition("] ")[2]


def _is_peer_error(error: RuntimeError) -> bool:
    """Whether an error during an exchange is the exchange's own."""
    # A loader process that dies is raised by a signal handler: anywhere.
    if isinstance(error, torch.OutOfMemoryError) or str(error).startswith("DataLoader worker"):
        return False
    # What cannot be captured runs eagerly, see engine/cuda_graph.py.
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def parse_failure(record: bytes) -> RunError:
    """Return the error that a failure record describes."""
    name, what, fix, details = json.loads(record)
    classes = {kind.__name__: kind for kind in RunError.__subclasses__()}
    return classes.get(name, RunError)(what, fix, **details)
