"""Several processes that train one network: what they compute together and tell each other.

Tensors of the training device are reduced by NCCL on GPUs and by gloo on CPUs; the few numbers that
processes agree on always go through gloo, on the host, where a lost peer is noticed at once and a
GPU need not be waited for.

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
import torch.distributed as dist
from torch import Tensor

from distributed.launcher import ALONE, Place
from errors import PeerError, RunError, UsageError

PATIENCE_S = 3600  # for what one process does while the others wait: a download, a save
ROLL_CALL_S = 3.0  # to answer, once a peer is missing
FAREWELL_S = 6.0  # to end by itself once one is lost or has failed; then a process is ended
BEAT_S = 1.0  # between two questions whether all are there
NOTICE = "notice"


class World:
    """The processes of a run, this one alone or as one of several.

    Args:
        place: of this process.
        store: that the processes share; None for one process.
        host: group of gloo, for numbers on the host.
        pulse: another one, to ask whether all are there.
        timeout_s: longest wait for the others where all do the same, unless `is_patient`.
    """

    def __init__(
        self, place: Place = ALONE, store=None, host=None, pulse=None, timeout_s: float = 0.0
    ):
        self.rank, self.size, self.is_first = place.rank, place.size, place.is_first
        self.place = place
        self._store, self._host, self._pulse, self._timeout_s = store, host, pulse, timeout_s
        # Kernels are compiled and algorithms tried in the first steps, in each process for itself.
        self.is_patient = True
        self._lost: list[int] = []
        self._heard: RunError | None = None  # what the run ends with, once this process knows
        # When the last exchange ended that has a limit; None while there is none.
        self._exchanged_at: float | None = None
        self._has_failed = self._is_leaving = False
        self._wake = threading.Event()
        self._end = lambda error: os._exit(error.code)
        self._watch = threading.Thread(target=self._ask, daemon=True)
        if pulse:
            self._watch.start()

    # ----------------------------------------------------------------------------- on the host

    def maximum(self, *values: int) -> list[int]:
        """The largest of each value over all processes."""
        if self.size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.int64)
        self._wait(lambda: dist.all_reduce(agreed, dist.ReduceOp.MAX, self._host, async_op=True))
        return agreed.tolist()

    def numbers(self, value: int) -> list[int]:
        """The value of each process, by rank."""
        if self.size == 1:
            return [value]
        found = torch.zeros(self.size, dtype=torch.int64)
        found[self.rank] = value
        self._wait(lambda: dist.all_reduce(found, group=self._host, async_op=True))
        return found.tolist()

    def from_first(
        self,
        work: Callable[[], object],
        pack: Callable[[object], bytes] = bytes,
        unpack: Callable[[bytes], object] = bytes,
    ) -> object:
        """What `work` returns in the first process; the others wait for it.

        Args:
            pack, unpack: make bytes of what it returns, and that again of bytes.

        Raises:
            RunError: of `work`, in every process.
        """
        if self.is_first:
            self._exchanged_at = None  # it may take its time
            value = work()
            if self.size > 1:
                self._from(0, pack(value))
            return value
        return unpack(self._from(0, b""))

    def everyone(self, value: object) -> list:
        """A plain value (JSON) of each process, by rank."""
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        return [json.loads(self._from(rank, data)) for rank in range(self.size)]

    def _from(self, rank: int, data: bytes) -> bytes:
        """The bytes that `rank` has, in every process."""
        length = torch.tensor([len(data) if rank == self.rank else 0])
        self._patiently(lambda: dist.broadcast(length, rank, self._host, async_op=True))
        content = torch.zeros(int(length), dtype=torch.uint8)
        if rank == self.rank and data:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if len(content):
            self._patiently(lambda: dist.broadcast(content, rank, self._host, async_op=True))
        return content.numpy().tobytes()

    def agree(self, facts: dict[str, object]) -> None:
        """Compare what every process must have alike.

        Raises:
            UsageError: it differs; names the process and what.
        """
        found = self.everyone(facts)
        for rank, theirs in enumerate(found):
            differing = [name for name in facts if theirs.get(name) != found[0].get(name)]
            if differing:
                name = differing[0]
                pair = " and ".join(_short(each.get(name)) for each in (found[0], theirs))
                raise UsageError(
                    f"{name} differs between processes 0 and {rank}: {pair}",
                    "start every process with the same flags, data and versions",
                )

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Let one process of each machine do something before the others do it too."""
        is_first = self.place.local_rank == 0
        if not is_first:
            self._everybody_here()
        yield
        if is_first:
            self._everybody_here()

    def _everybody_here(self) -> None:
        if self.size > 1:
            self._patiently(
                lambda: dist.all_reduce(torch.zeros(1), group=self._host, async_op=True)
            )

    # --------------------------------------------------------------------------- on the device

    def sum_(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over all processes; ordered after its making."""
        if self.size > 1:
            self._in_order(tensor, lambda **how: dist.all_reduce(tensor, **how))

    def gather(self, tensor: Tensor) -> Tensor:
        """(size, *tensor.shape): a tensor of each process."""
        gathered = tensor.new_empty(self.size, *tensor.shape)
        flat = gathered.view(-1), tensor.reshape(-1)
        self._in_order(tensor, lambda **how: dist.all_gather_into_tensor(*flat, **how))
        return gathered

    def take_from_first(self, tensors: list[Tensor]) -> None:
        """Replace tensors by those of the first process, a broadcast per type."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            self._in_order(flat, lambda flat=flat, **how: dist.broadcast(flat, 0, **how))
            sizes = [tensor.numel() for tensor in alike]
            for tensor, part in zip(alike, flat.split(sizes), strict=True):
                tensor.copy_(part.view(tensor.shape))

    # ------------------------------------------------------------------------------- failures

    def fail(self, error: Exception) -> Exception:
        """Tell the others what ends this process; what all end with, that of who was first."""
        if self.size == 1 or self._heard:
            return self._heard or error
        with suppress(RuntimeError):  # the store is lost, which the others find out as well
            error = self._post(error)
            self._has_failed = True
            self._wake.set()
            self._watch.join(ROLL_CALL_S)  # all have read it: the store may end with this one
        return error

    def _post(self, error: Exception) -> Exception:
        """Leave a notice of what ends this process; the error of who was first to leave one."""
        if isinstance(error, RunError):
            (what, fix), details = error.problems[0], error.details
        else:
            what = f"a bug in process {self.rank}: {type(error).__name__}: {error}"
            fix, details = "report it with its traceback", {}
        notice = json.dumps([type(error).__name__, what, fix, details]).encode()
        first = self._store.compare_set(NOTICE, b"", notice)
        return error if first == notice else notice_error(first)

    @property
    def speaks(self) -> bool:
        """Whether it is for this process to say how the run ended: the first that is left."""
        return self.rank == min(set(range(self.size)) - set(self._lost), default=0)

    def leave(self) -> None:
        """End together: nobody's peers are gone while it still needs them."""
        if self.size > 1:
            self._is_leaving = True
            self._wake.set()
            self._watch.join()
            if self._heard:
                raise self._heard

    def _wait(self, begin: Callable, timeout_s: float | None = None) -> None:
        with self._lost_peers():
            limit_s = timeout_s or (PATIENCE_S if self.is_patient else self._timeout_s)
            self._exchanged_at = None
            begin().wait(timedelta(seconds=limit_s))
            self._exchanged_at = None if limit_s == PATIENCE_S else time.monotonic()

    def _in_order(self, tensor: Tensor, begin: Callable) -> None:
        """Exchange tensors of the device; a GPU is not waited for, and so no limit is kept here."""
        if tensor.device.type == "cpu":
            self._wait(lambda: begin(async_op=True))
        else:
            with self._lost_peers():
                begin()

    def _patiently(self, begin: Callable) -> None:
        self._wait(begin, PATIENCE_S)

    @contextmanager
    def _lost_peers(self) -> Iterator[None]:
        """Turn what torch raises about a peer into the error that all processes end with."""
        try:
            yield
        except RuntimeError as error:
            if not _is_of_a_peer(error):
                raise
            raise self._reason(error) from error

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
        self._lost = [] if self.is_first else [0]
        what = f"the process that held the run together is lost ({symptom(error)})"
        return PeerError(what, AGAIN, lost=self._lost)

    def _lost_error(self, error: RuntimeError, lost: list[int]) -> PeerError:
        names = ", ".join(map(self._who, lost))
        what = {
            0: "the exchange with the others broke",
            1: f"process {names} is lost",
        }.get(len(lost), f"processes {names} are lost")
        return PeerError(f"{what} ({symptom(error)})", AGAIN, lost=lost)

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
        self._store.set(f"here/{self.rank}", "")
        end = time.monotonic() + ROLL_CALL_S
        while True:
            absent = [r for r in range(self.size) if not self._store.check([f"here/{r}"])]
            gone = [rank for rank in absent if self._is_gone(rank)]
            if gone or not absent or time.monotonic() > end or self._store.check([NOTICE]):
                return gone or absent  # who is only slow is not lost
            time.sleep(0.05)

    def watch(self, end: Callable[[RunError], None]) -> None:
        """Call `end` if this process has to end and its main thread does not.

        It may be waiting for a GPU whose kernel waits for a peer that is gone.
        """
        self._end = end

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
                if leaving == self.size:
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
            what = f"process {self.rank} waits for its device, and has not met the others"
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


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 50 else f"{text[:47]}..."


AGAIN = "run it again with --resume auto; its own messages say more"


def _is_of_a_peer(error: RuntimeError) -> bool:
    """Whether an error during an exchange is the exchange's own."""
    # A loader process that dies is raised by a signal handler: anywhere.
    if isinstance(error, torch.OutOfMemoryError) or str(error).startswith("DataLoader worker"):
        return False
    # What cannot be recorded runs eagerly, see engine/cuda_graph.py.
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def notice_error(notice: bytes) -> RunError:
    """The error that a notice tells of."""
    name, what, fix, details = json.loads(notice)
    kinds = {kind.__name__: kind for kind in RunError.__subclasses__()}
    return kinds.get(name, RunError)(what, fix, **details)


class Share:
    """What one replica has of a global batch, for the parts of a network that need to know.

    Args:
        world: of the replicas.
        device: of the tensors that are exchanged.
    """

    def __init__(self, world: World, device: torch.device):
        self._world = world
        self.rank, self.size = world.rank, world.size
        self.weights = torch.full((world.size,), 1 / world.size, dtype=torch.float64, device=device)
        self._counts: list[int] = []
        self.first, self.total = 0, 0

    def set(self, counts: list[int]) -> None:
        """Begin a step of which replica r has `counts[r]` images."""
        if counts != self._counts:
            self._counts = list(counts)
            self.first, self.total = sum(counts[: self.rank]), sum(counts)
            self.weights.copy_(torch.tensor(counts, dtype=torch.float64) / max(self.total, 1))

    @property
    def weight(self) -> float:
        """What this replica's mean loss counts for in the mean of all replicas' losses."""
        return self._counts[self.rank] * self.size / self.total

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the replicas."""
        self._world.sum_(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """(size, *tensor.shape): the tensor of each replica."""
        return self._world.gather(tensor)
