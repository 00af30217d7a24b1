"""Exchange data between the processes of a run: numbers on the host, tensors on the device.

Tensors go through NCCL between GPUs and through gloo between CPUs. Numbers always go through gloo
on the host, which notices a lost peer at once and need not wait for a GPU. peer_monitor.py
translates the errors.
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

LONG_TIMEOUT_S = 3600  # for work of one process while the others wait: a download, a save
MIN_INT = torch.iinfo(torch.int64).min


class World:
    """Communicate between the processes (ranks) of a run, which may be this one alone.

    Args:
        host_group: gloo group for numbers on the host; None for one process, like `monitor`.
        timeout_s: longest wait in a collective that all enter at the same step.

    Attributes:
        in_warmup: `timeout_s` is not in force yet: the ranks still compile their kernels.
    """

    def __init__(
        self,
        process: ProcessInfo = SINGLE_PROCESS,
        host_group=None,
        monitor: PeerMonitor | None = None,
        timeout_s: float = 0.0,
    ):
        self.process, self.monitor = process, monitor or PeerMonitor(process)
        self.rank, self.size, self.is_rank0 = process.rank, process.size, process.is_rank0
        self._host_group, self._timeout_s = host_group, timeout_s
        self.in_warmup = True

    def all_reduce_max(self, *values: int) -> list[int]:
        """Return the maximum of each value over all ranks."""
        maxima = torch.tensor(values, dtype=torch.int64)
        self._run(dist.all_reduce, maxima, dist.ReduceOp.MAX, group=self._host_group)
        return maxima.tolist()

    def all_gather_int(self, value: int) -> list[int]:
        """Return the value of each rank."""
        own = [value if rank == self.rank else MIN_INT for rank in range(self.size)]
        return self.all_reduce_max(*own)

    def broadcast_result(
        self,
        fn: Callable[[], object],
        pack: Callable[[object], bytes] = bytes,
        unpack: Callable[[bytes], object] = bytes,
    ) -> object:
        """Call `fn` on rank 0; return its result on all, sent as bytes by `pack` and `unpack`."""
        if not self.is_rank0:
            return unpack(self._broadcast_bytes(0, b""))
        self.monitor.expect_collective(False)  # fn may take long
        value = fn()
        if self.size > 1:
            self._broadcast_bytes(0, pack(value))
        return value

    def all_gather_json(self, value: object) -> list:
        """Return the plain value (JSON) of each rank."""
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        return [json.loads(self._broadcast_bytes(rank, data)) for rank in range(self.size)]

    def _broadcast_bytes(self, rank: int, data: bytes) -> bytes:
        """Return the `data` of one rank on every rank."""
        length = torch.tensor([len(data)])
        self._run(dist.broadcast, length, rank, group=self._host_group, long=True)
        buffer = bytearray(data if rank == self.rank else int(length))
        if buffer:
            content = torch.frombuffer(buffer, dtype=torch.uint8)
            self._run(dist.broadcast, content, rank, group=self._host_group, long=True)
        return bytes(buffer)

    def check_equal(self, values: dict[str, object]) -> None:
        """Raise UsageError, naming the first value in which a rank differs from rank 0."""
        first, *others = self.all_gather_json(values)
        for rank, other in enumerate(others, start=1):
            for name in values:
                if first.get(name) != other.get(name):
                    pair = " and ".join(_shorten(each.get(name)) for each in (first, other))
                    raise UsageError(
                        f"{name} differs between processes 0 and {rank}: {pair}",
                        "start every process with the same flags, data and versions",
                    )

    @contextmanager
    def local_rank0_first(self) -> Iterator[None]:
        """Run the body on one rank of each machine before the others run it."""
        is_local_rank0 = self.process.local_rank == 0
        if not is_local_rank0:
            self.all_gather_json(None)  # a barrier: it returns once all ranks have called it
        yield
        if is_local_rank0:
            self.all_gather_json(None)

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over all ranks."""
        self._run(dist.all_reduce, tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Gather the tensor of each rank: (size, *tensor.shape)."""
        gathered = tensor.new_empty(self.size, *tensor.shape)
        self._run(dist.all_gather_into_tensor, gathered.view(-1), tensor.reshape(-1))
        return gathered

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Replace tensors by those of rank 0, with one broadcast per dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            same_dtype = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in same_dtype])
            self._run(dist.broadcast, flat, 0)
            sizes = [tensor.numel() for tensor in same_dtype]
            for tensor, part in zip(same_dtype, flat.split(sizes), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _run(
        self, collective: Callable, tensor: Tensor, *args: object, group=None, long: bool = False
    ) -> None:
        """Run a collective of torch; `long`: one rank may work alone before it."""
        if self.size == 1:
            return
        with self.monitor.translate_errors():
            if tensor.is_cuda:  # only the stream waits, so the host has no timeout to keep here
                collective(tensor, *args, group=group)
                return
            timeout_s = LONG_TIMEOUT_S if long or self.in_warmup else self._timeout_s
            self.monitor.expect_collective(False)
            collective(tensor, *args, group=group, async_op=True).wait(timedelta(seconds=timeout_s))
            self.monitor.expect_collective(not long and not self.in_warmup)


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) < 50 else f"{text[:47]}..."


class BatchShard:
    """Describe this rank's part of a global batch to layers that need the whole batch.

    Attributes:
        weights: (size,) float64: the part of the batch that each rank has.
        offset: index in the global batch of this rank's first image.
        global_size: images in the global batch.
    """

    def __init__(self, world: World, device: torch.device):
        self.rank, self._num_ranks = world.rank, world.size
        self.all_reduce_, self.all_gather = world.all_reduce_, world.all_gather
        self.weights = torch.full((world.size,), 1 / world.size, dtype=torch.float64, device=device)
        self._sizes: list[int] = []
        self.offset, self.global_size = 0, 0

    def set_sizes(self, sizes: list[int]) -> None:
        """Begin a step in which rank r has `sizes[r]` images."""
        if sizes != self._sizes:
            self._sizes = list(sizes)
            self.offset, self.global_size = sum(sizes[: self.rank]), sum(sizes)
            self.weights.copy_(torch.tensor(sizes, dtype=torch.float64) / max(self.global_size, 1))

    @property
    def loss_weight(self) -> float:
        """Return the weight of this rank's mean loss in the mean over all ranks' losses."""
        return self._sizes[self.rank] * self._num_ranks / self.global_size
