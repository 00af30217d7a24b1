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

from distributed.launcher import SINGLE_PROCESS, ProcessInfo
from distributed.peer_monitor import PeerMonitor
from errors import UsageError

LONG_TIMEOUT_S = 3600  # for what one process does while the others wait: a download, a save


class World:
    """The processes of a run, this one alone or as one of several.

    Args:
        process: which of the processes this is; rank and size are kept there alone.
        host_group: group of gloo, for numbers on the host; None for one process.
        monitor: of the other processes; None for one process.
        timeout_s: longest wait for the others where all do the same, unless `in_warmup`.
    """

    def __init__(
        self,
        process: ProcessInfo = SINGLE_PROCESS,
        host_group=None,
        monitor: PeerMonitor | None = None,
        timeout_s: float = 0.0,
    ):
        self.process, self.monitor = process, monitor or PeerMonitor(process)
        self._host_group, self._timeout_s = host_group, timeout_s
        # Kernels are compiled and algorithms tried in the first steps, in each process for itself.
        self.in_warmup = True

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return self.process.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.process.size

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.process.is_rank0

    # ----------------------------------------------------------------------------- on the host

    def all_reduce_max(self, *values: int) -> list[int]:
        """The largest of each value over all processes."""
        if self.size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.int64)
        self._wait(
            lambda: dist.all_reduce(agreed, dist.ReduceOp.MAX, self._host_group, async_op=True)
        )
        return agreed.tolist()

    def all_gather_int(self, value: int) -> list[int]:
        """The value of each process, by rank."""
        if self.size == 1:
            return [value]
        gathered = torch.zeros(self.size, dtype=torch.int64)
        gathered[self.rank] = value
        self._wait(lambda: dist.all_reduce(gathered, group=self._host_group, async_op=True))
        return gathered.tolist()

    def broadcast_result(
        self,
        fn: Callable[[], object],
        pack: Callable[[object], bytes] = bytes,
        unpack: Callable[[bytes], object] = bytes,
    ) -> object:
        """What `fn` returns in the first process; the others wait for it.

        Args:
            pack, unpack: make bytes of what it returns, and that again of bytes.

        Raises:
            RunError: raised by `fn`; in every process.
        """
        if self.is_rank0:
            self.monitor.collective_started()  # it may take its time
            value = fn()
            if self.size > 1:
                self._broadcast_bytes(0, pack(value))
            return value
        return unpack(self._broadcast_bytes(0, b""))

    def all_gather_json(self, value: object) -> list:
        """A plain value (JSON) of each process, by rank."""
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        return [json.loads(self._broadcast_bytes(rank, data)) for rank in range(self.size)]

    def _broadcast_bytes(self, rank: int, data: bytes) -> bytes:
        """The bytes that `rank` has, in every process."""
        length = torch.tensor([len(data) if rank == self.rank else 0])
        self._wait_long(lambda: dist.broadcast(length, rank, self._host_group, async_op=True))
        content = torch.zeros(int(length), dtype=torch.uint8)
        if rank == self.rank and data:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if len(content):
            self._wait_long(lambda: dist.broadcast(content, rank, self._host_group, async_op=True))
        return content.numpy().tobytes()

    def check_equal(self, values: dict[str, object]) -> None:
        """Compare what every process must have alike.

        Raises:
            UsageError: it differs; names the process and what.
        """
        gathered = self.all_gather_json(values)
        for rank, other in enumerate(gathered):
            differing = [name for name in values if other.get(name) != gathered[0].get(name)]
            if differing:
                name = differing[0]
                pair = " and ".join(_shorten(each.get(name)) for each in (gathered[0], other))
                raise UsageError(
                    f"{name} differs between processes 0 and {rank}: {pair}",
                    "start every process with the same flags, data and versions",
                )

    @contextmanager
    def local_rank0_first(self) -> Iterator[None]:
        """Let one process of each machine do something before the others do it too."""
        is_local_rank0 = self.process.local_rank == 0
        if not is_local_rank0:
            self._barrier()
        yield
        if is_local_rank0:
            self._barrier()

    def _barrier(self) -> None:
        if self.size > 1:
            self._wait_long(
                lambda: dist.all_reduce(torch.zeros(1), group=self._host_group, async_op=True)
            )

    # --------------------------------------------------------------------------- on the device

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over all processes; ordered after its making."""
        if self.size > 1:
            self._on_device(tensor, lambda **options: dist.all_reduce(tensor, **options))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(size, *tensor.shape): a tensor of each process."""
        gathered = tensor.new_empty(self.size, *tensor.shape)
        flat = gathered.view(-1), tensor.reshape(-1)
        self._on_device(tensor, lambda **options: dist.all_gather_into_tensor(*flat, **options))
        return gathered

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Replace tensors by those of the first process, a broadcast per type."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            same_dtype = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in same_dtype])
            self._on_device(flat, lambda flat=flat, **options: dist.broadcast(flat, 0, **options))
            sizes = [tensor.numel() for tensor in same_dtype]
            for tensor, part in zip(same_dtype, flat.split(sizes), strict=True):
                tensor.copy_(part.view(tensor.shape))

    # --------------------------------------------------------------------------------- waiting

    def _wait(self, start: Callable, timeout_s: float | None = None) -> None:
        with self.monitor.translate_errors():
            wait_s = timeout_s or (LONG_TIMEOUT_S if self.in_warmup else self._timeout_s)
            self.monitor.collective_started()
            start().wait(timedelta(seconds=wait_s))
            if wait_s != LONG_TIMEOUT_S:
                self.monitor.collective_finished()

    def _on_device(self, tensor: Tensor, start: Callable) -> None:
        """Exchange tensors of the device; a GPU is not waited for, and so no limit is kept here."""
        if tensor.device.type == "cpu":
            self._wait(lambda: start(async_op=True))
        else:
            with self.monitor.translate_errors():
                start()

    def _wait_long(self, start: Callable) -> None:
        self._wait(start, LONG_TIMEOUT_S)


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) < 50 else f"{text[:47]}..."


class BatchShard:
    """What one replica has of a global batch, for the parts of a network that need to know.

    Args:
        world: of the replicas.
        device: of the tensors that are exchanged.
    """

    def __init__(self, world: World, device: torch.device):
        self._world = world
        self.weights = torch.full((world.size,), 1 / world.size, dtype=torch.float64, device=device)
        self._sizes: list[int] = []
        self.offset, self.global_size = 0, 0

    @property
    def rank(self) -> int:
        """This replica's index in `weights`."""
        return self._world.rank

    def set_sizes(self, sizes: list[int]) -> None:
        """Begin a step of which replica r has `sizes[r]` images."""
        if sizes != self._sizes:
            self._sizes = list(sizes)
            self.offset, self.global_size = sum(sizes[: self.rank]), sum(sizes)
            self.weights.copy_(torch.tensor(sizes, dtype=torch.float64) / max(self.global_size, 1))

    @property
    def loss_weight(self) -> float:
        """What this replica's mean loss counts for in the mean of all replicas' losses."""
        return self._sizes[self.rank] * self._world.size / self.global_size

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the replicas."""
        self._world.all_reduce_(tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(size, *tensor.shape): the tensor of each replica."""
        return self._world.all_gather(tensor)
