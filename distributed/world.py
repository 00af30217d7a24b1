"""What the processes of a run compute together and agree on.

Tensors of the training device are reduced by NCCL on GPUs and by gloo on CPUs; the few numbers that
processes agree on always go through gloo, on the host, where a lost peer is noticed at once and a
GPU need not be waited for. What happens then is the matter of peer_monitor.py.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist  # noqa: TID251
from torch import Tensor

from distributed.launcher import ALONE, Place
from distributed.peer_monitor import PeerMonitor
from errors import UsageError

PATIENCE_S = 3600  # for what one process does while the others wait: a download, a save


class World:
    """The processes of a run, this one alone or as one of several.

    Args:
        place: which of the processes this is; rank and size are kept there alone.
        host: group of gloo, for numbers on the host; None for one process.
        monitor: of the other processes; None for one process.
        timeout_s: longest wait for the others where all do the same, unless `is_patient`.
    """

    def __init__(
        self,
        place: Place = ALONE,
        host=None,
        monitor: PeerMonitor | None = None,
        timeout_s: float = 0.0,
    ):
        self.place, self.monitor = place, monitor or PeerMonitor(place)
        self._host, self._timeout_s = host, timeout_s
        # Kernels are compiled and algorithms tried in the first steps, in each process for itself.
        self.is_patient = True

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return self.place.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.place.size

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.place.is_first

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
            self.monitor.exchange_began()  # it may take its time
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

    # --------------------------------------------------------------------------------- waiting

    def _wait(self, begin: Callable, timeout_s: float | None = None) -> None:
        with self.monitor.lost_peers():
            limit_s = timeout_s or (PATIENCE_S if self.is_patient else self._timeout_s)
            self.monitor.exchange_began()
            begin().wait(timedelta(seconds=limit_s))
            if limit_s != PATIENCE_S:
                self.monitor.exchange_ended()

    def _in_order(self, tensor: Tensor, begin: Callable) -> None:
        """Exchange tensors of the device; a GPU is not waited for, and so no limit is kept here."""
        if tensor.device.type == "cpu":
            self._wait(lambda: begin(async_op=True))
        else:
            with self.monitor.lost_peers():
                begin()

    def _patiently(self, begin: Callable) -> None:
        self._wait(begin, PATIENCE_S)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 50 else f"{text[:47]}..."


class Share:
    """What one replica has of a global batch, for the parts of a network that need to know.

    Args:
        world: of the replicas.
        device: of the tensors that are exchanged.
    """

    def __init__(self, world: World, device: torch.device):
        self._world = world
        self.weights = torch.full((world.size,), 1 / world.size, dtype=torch.float64, device=device)
        self._counts: list[int] = []
        self.first, self.total = 0, 0

    @property
    def rank(self) -> int:
        """This replica's index in `weights`."""
        return self._world.rank

    def set(self, counts: list[int]) -> None:
        """Begin a step of which replica r has `counts[r]` images."""
        if counts != self._counts:
            self._counts = list(counts)
            self.first, self.total = sum(counts[: self.rank]), sum(counts)
            self.weights.copy_(torch.tensor(counts, dtype=torch.float64) / max(self.total, 1))

    @property
    def weight(self) -> float:
        """What this replica's mean loss counts for in the mean of all replicas' losses."""
        return self._counts[self.rank] * self._world.size / self.total

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the replicas."""
        self._world.sum_(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """(size, *tensor.shape): the tensor of each replica."""
        return self._world.gather(tensor)
