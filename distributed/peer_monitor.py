"""Whether all processes of a run are there, and what ended the one that is not.

Who fails leaves a notice in the store before it ends. Its connections close, the others find that
out at their next exchange, read the notice and end in the same way; where there is no notice, a
roll call finds who is missing. A thread of each process asks all others once a second whether they
are there: a main thread may be waiting for longer than anybody may be lost.
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

from distributed.launcher import Place
from errors import PeerError, RunError

ROLL_CALL_S = 3.0  # to answer, once a peer is missing
FAREWELL_S = 6.0  # to end by itself once one is lost or has failed; then a process is ended
BEAT_S = 1.0  # between two questions whether all are there
NOTICE = "notice"
AGAIN = "run it again with --resume auto; its own messages say more"


class PeerMonitor:
    """What one process knows of the others of its run; nothing to do for a single process.

    Args:
        place: of this process.
        store: that the processes share; None for one process.
        pulse: group of gloo, to ask whether all are there; None for one process.
        timeout_s: longest time without an exchange, and longest wait for an answer.
    """

    def __init__(self, place: Place, store=None, pulse=None, timeout_s: float = 0.0):
        self._place, self._store, self._pulse, self._timeout_s = place, store, pulse, timeout_s
        self._lost: list[int] = []
        self._heard: RunError | None = None  # what the run ends with, once this process knows
        # When the last exchange ended that has a limit; None while there is none.
        self._exchanged_at: float | None = None
        self._has_failed = self._is_leaving = False
        self._wake = threading.Event()
        self._end = lambda error: os._exit(error.code)
        self._thread = threading.Thread(target=self._ask, daemon=True)
        if pulse:
            self._thread.start()

    def exchange_began(self) -> None:
        """Stop the clock of `exchange_ended`: this process waits for the others, or works alone."""
        self._exchanged_at = None

    def exchange_ended(self) -> None:
        """Expect the next exchange within `timeout_s`: if none comes, all may be waiting."""
        self._exchanged_at = time.monotonic()

    @contextmanager
    def lost_peers(self) -> Iterator[None]:
        """Turn what torch raises about a peer into the error that all processes end with."""
        try:
            yield
        except RuntimeError as error:
            if not _is_of_a_peer(error):
                raise
            raise self._reason(error) from error

    def fail(self, error: Exception) -> Exception:
        """Tell the others what ends this process; what all end with, that of who was first."""
        if self._place.size == 1 or self._heard:
            return self._heard or error
        with suppress(RuntimeError):  # the store is lost, which the others find out as well
            error = self._post(error)
            self._has_failed = True
            self._wake.set()
            self._thread.join(ROLL_CALL_S)  # all have read it: the store may end with this one
        return error

    @property
    def speaks(self) -> bool:
        """Whether it is for this process to say how the run ended: the first that is left."""
        return self._place.rank == min(set(range(self._place.size)) - set(self._lost), default=0)

    def leave(self) -> None:
        """End together: nobody's peers are gone while it still needs them."""
        if self._place.size > 1:
            self._is_leaving = True
            self._wake.set()
            self._thread.join()
            if self._heard:
                raise self._heard

    def watch(self, end: Callable[[RunError], None]) -> None:
        """Call `end` if this process has to end and its main thread does not.

        It may be waiting for a GPU whose kernel waits for a peer that is gone.
        """
        self._end = end

    # -------------------------------------------------------------------------------- notices

    def _post(self, error: Exception) -> Exception:
        """Leave a notice of what ends this process; the error of who was first to leave one."""
        if isinstance(error, RunError):
            (what, fix), details = error.problems[0], error.details
        else:
            what = f"a bug in process {self._place.rank}: {type(error).__name__}: {error}"
            fix, details = "report it with its traceback", {}
        notice = json.dumps([type(error).__name__, what, fix, details]).encode()
        first = self._store.compare_set(NOTICE, b"", notice)
        return error if first == notice else notice_error(first)

    def _reason(self, error: RuntimeError) -> RunError:
        """The error of the process that failed first; else that one is lost, and which."""
        if not self._heard:
            try:
                if not self._store.check([NOTICE]):
                    self._post(self._lost_error(error, self._missing()))
                self._read_notice()
            except RuntimeError:  # the store as well
                self._heard = self._store_lost(error)
        return self._heard

    def _read_notice(self) -> None:
        error = notice_error(self._store.get(NOTICE))
        self._lost, self._heard = error.details.get("lost", []), error  # as all see it

    def _store_lost(self, error: RuntimeError | None) -> PeerError:
        self._lost = [] if self._place.is_first else [0]
        what = f"the process that held the run together is lost ({symptom(error)})"
        return PeerError(what, AGAIN, lost=self._lost)

    def _lost_error(self, error: RuntimeError, lost: list[int]) -> PeerError:
        names = ", ".join(map(self._who, lost))
        what = {
            0: "the exchange with the others broke",
            1: f"process {names} is lost",
        }.get(len(lost), f"processes {names} are lost")
        return PeerError(f"{what} ({symptom(error)})", AGAIN, lost=lost)

    # ------------------------------------------------------------------------------ roll call

    def _who(self, rank: int) -> str:
        return "{} (host {}, {})".format(rank, *self._address(rank))

    def _address(self, rank: int) -> tuple[str, int]:
        return tuple(json.loads(self._store.get(f"who/{rank}")))

    def _is_gone(self, rank: int) -> bool:
        """Whether a process of this machine has ended; False for those of others."""
        host, pid = self._address(rank)
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return host == socket.gethostname() and Path("/proc/self").exists()
        return host == socket.gethostname() and state in "ZX"

    def _missing(self) -> list[int]:
        """Roll call: those who do not answer. All others soon do: their exchange broke too."""
        self._store.set(f"here/{self._place.rank}", "")
        end = time.monotonic() + ROLL_CALL_S
        while True:
            ranks = range(self._place.size)
            absent = [rank for rank in ranks if not self._store.check([f"here/{rank}"])]
            gone = [rank for rank in absent if self._is_gone(rank)]
            if gone or not absent or time.monotonic() > end or self._store.check([NOTICE]):
                return gone or absent  # who is only slow is not lost
            time.sleep(0.05)

    # ------------------------------------------------------------------------------ heartbeat

    def _ask(self) -> None:
        """Once a second: are all there, has one failed, are all ready to leave?"""
        try:
            while True:
                self._end_a_long_silence()
                failed, leaving = self._states()
                if failed:
                    self._end_soon()
                    self._read_notice()
                    self._states()  # all have read it
                    return
                if leaving == self._place.size:
                    return
                self._wake.wait(BEAT_S)
        except RuntimeError as error:
            self._end_soon(error)
            self._reason(error)

    def _states(self) -> list[int]:
        """How many processes have failed, and how many are leaving."""
        states = torch.tensor([self._has_failed, self._is_leaving], dtype=torch.int64)
        asked = dist.all_reduce(states, group=self._pulse, async_op=True)
        asked.wait(timedelta(seconds=self._timeout_s))
        return states.tolist()

    def _end_a_long_silence(self) -> None:
        """Fail when the main thread comes to no exchange: all others may be waiting likewise."""
        since = self._exchanged_at
        if since is not None and time.monotonic() - since > self._timeout_s:
            what = f"process {self._place.rank} waits for its device, and has not met the others"
            self._post(PeerError(f"{what} for {self._timeout_s:g} s", AGAIN))
            self._has_failed = True

    def _end_soon(self, error: RuntimeError | None = None) -> None:
        """Leave the main thread some seconds to end by itself, even if the store never answers."""
        timer = threading.Timer(
            FAREWELL_S, lambda: self._end(self._heard or self._store_lost(error))
        )
        timer.daemon = True
        timer.start()


def symptom(error: RuntimeError | None) -> str:
    """What torch says, without the place in its source that it begins with."""
    return str(error).partition("\n")[0].rpartition("] ")[2]


def _is_of_a_peer(error: RuntimeError) -> bool:
    """Whether an error during an exchange is the exchange's own."""
    # A loader process that dies is raised by a signal handler: anywhere.
    if isinstance(error, torch.OutOfMemoryError) or str(error).startswith("DataLoader worker"):
        return False
    # What cannot be captured runs eagerly, see engine/cuda_graph.py.
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def notice_error(notice: bytes) -> RunError:
    """The error that a notice tells of."""
    name, what, fix, details = json.loads(notice)
    kinds = {kind.__name__: kind for kind in RunError.__subclasses__()}
    return kinds.get(name, RunError)(what, fix, **details)
