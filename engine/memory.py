"""How much memory a training step needs, found by running it on tensors that have none.

`MemoryEstimate.peak_bytes` runs a step on fake tensors, which have shape and type but no data, and
adds up what they would hold. So every network, level, precision and backend is counted by its own
code, in seconds and on any machine.

What is counted is what PyTorch's allocator counts (torch.cuda.max_memory_allocated): weights,
momentum, gradients, the batch, all that lives between forward and backward, and the workspace of
cuBLAS. Not counted, on a GPU: the CUDA context and the kernels' code, gaps between the allocator's
blocks, what cuDNN asks for while it tries algorithms, and the buffers of NCCL and of gradients
that several replicas average. A step captured in one CUDA graph has
the same peak and keeps it reserved.
"""

import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine.device
import models.factory
from cli.flag_types import Settings
from distributed.world import World
from engine import optimizer
from engine.precision import PRECISIONS, autocast
from errors import OutOfMemoryError
from kernels import reference
from kernels.backend import Backend

LEVELS_BY_SPEED = (2, 3, 4)  # memory levels, the fastest first; 0 and 1 are no faster than 2
TOLERANCE = 1.15  # what is measured is at most this many times what is estimated
MAX_TRIES = 8  # of batches, to find the largest that fits
BLOCK_BYTES = 512  # the CUDA allocator rounds up to multiples of it
# The workspace of a cuBLAS handle, from PyTorch's CublasHandlePool.cpp: before Hopper, and since.
# The forward and the backward thread have a handle each.
CUBLAS_BYTES = {False: (2 * 4096 + 8 * 16) * 1024, True: 8 * 4096 * 1024}
# How the errors begin or what they contain that mean: no memory left.
OUT_OF_MEMORY_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a memory object",
)


class MemoryEstimate:
    """What the training steps of a run need.

    Args:
        opt: network, batchSize, precision and optMemory of the run.
        device: where the steps would run; it need not be there.
        ops: what would run the dense blocks.
    """

    def __init__(self, opt: Settings, num_classes: int, device: torch.device, ops: Backend):
        self.opt, self.num_classes, self.device, self.ops = opt, num_classes, device, ops
        # A network without dense blocks has no levels, and optMemory None.
        self.levels = LEVELS_BY_SPEED if opt.optMemory is not None else ()
        self._peak_cache: dict[tuple[int, int], int] = {}

    def peak_bytes(self, level: int | None = None, batch: int | None = None) -> int:
        """The most memory that is in use at one moment of a step.

        Seeds torch's generators as models.factory.create does.

        Args:
            level, batch: instead of the run's own optMemory (which may be auto) and batchSize.
        """
        key = (self.opt.optMemory if level is None else level, batch or self.opt.batchSize)
        if key not in self._peak_cache:
            level, batch = key
            local_batch = -(-batch // self.opt.replicas)  # of one of several processes
            opt = self.opt.replace(optMemory=level, batchSize=local_batch)
            simulated = _simulate(opt, self.num_classes, self.device, self.ops)
            self._peak_cache[key] = simulated + workspace_bytes(self.device)
        return self._peak_cache[key]

    def choose_level(self, free_bytes: int | None) -> tuple[int, str | None]:
        """The level for `--optMemory auto`, and a remark where it is not the fastest.

        The smallest where none fits: the estimate is on the safe side, and the run may yet do.

        Args:
            free_bytes: None if it is not known, as on the CPU.
        """
        if free_bytes is None:
            return LEVELS_BY_SPEED[0], None
        for level in LEVELS_BY_SPEED:
            if self._fits(free_bytes, level):
                if level == LEVELS_BY_SPEED[0]:
                    return level, None
                why = f"level {LEVELS_BY_SPEED[0]} needs {self._format_need(LEVELS_BY_SPEED[0])}"
                return level, f"optMemory auto: {level}, since {why} of {_mb(free_bytes)} free"
        level = self._smallest_level()
        batch = self.largest_batch(free_bytes, level)
        fix = f"--batchSize {batch} would fit" if batch else "no batch would fit"
        need = f"it needs {self._format_need(level)} and {_mb(free_bytes)} are free"
        return level, f"optMemory auto: {level}, the smallest, though {need}; {fix}"

    def largest_batch(self, limit_bytes: float, level: int | None) -> int:
        """The largest batch up to the run's own that fits at a level; 0 if not even one image."""
        if self._fits(limit_bytes, level):
            return self.opt.batchSize
        fits, fails = 0, self.opt.batchSize
        for _ in range(MAX_TRIES):
            if fails - fits <= max(1, fits // 16):
                break
            batch = self._interpolate(fits, fails, limit_bytes, level)
            if self._fits(limit_bytes, level, batch):
                fits = batch
            else:
                fails = batch
        step = self.opt.replicas * (8 if fits > 16 * self.opt.replicas else 1)
        return fits // step * step

    def _interpolate(self, fits: int, fails: int, limit_bytes: float, level: int | None) -> int:
        """Where the limit is, were memory a straight line in the batch, which it nearly is."""
        if not fits:
            return max(1, fails // 4)
        low, high = self.peak_bytes(level, fits), self.peak_bytes(level, fails)
        fraction = (limit_bytes / TOLERANCE - low) / (high - low)
        return min(max(fits + 1, int(fits + fraction * (fails - fits))), fails - 1)

    def suggestion(self, free_bytes: int | None) -> str:
        """What to change after a step that ran out of memory.

        Args:
            free_bytes: that the run had to begin with; None if it is not known, as on the CPU.
        """
        try:
            return self._suggestion(free_bytes)
        except MemoryError:  # the simulation needs a little as well
            return "use a smaller --batchSize" + (", or --optMemory 4" if self.levels else "")

    def _suggestion(self, free_bytes: int | None) -> str:
        current = self.peak_bytes()
        # Whatever is free: what failed does not fit.
        limit = current if free_bytes is None else min(current, free_bytes)
        for level in self.levels:
            if self._fits(limit, level):
                return (
                    f"use --optMemory {level}, {self._format_need(level)} instead of {_mb(current)}"
                )
        level = self._smallest_level()
        batch = self.largest_batch(current / 2 if free_bytes is None else limit, level)
        if not batch:
            min_batch = self.opt.replicas
            need = self._format_need(level, min_batch)
            flags = (f"--optMemory {level} " if self.levels else "") + f"--batchSize {min_batch}"
            return f"use a larger device: {flags} needs {need}"
        also = "" if level == self.opt.optMemory else f" --optMemory {level}"
        need = self._format_need(level, batch)
        return f"use --batchSize {batch}{also}, {need} instead of {_mb(current)}"

    def _fits(self, limit_bytes: float, level: int | None, batch: int | None = None) -> bool:
        return TOLERANCE * self.peak_bytes(level, batch) <= limit_bytes

    def _smallest_level(self) -> int | None:
        return min(self.levels, key=self.peak_bytes, default=None)

    def _format_need(self, level: int | None, batch: int | None = None) -> str:
        return f"about {_mb(self.peak_bytes(level, batch))}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that no memory was left, on the GPU or in this process."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in OUT_OF_MEMORY_MESSAGES
    )


@contextmanager
def memory_errors(opt: SimpleNamespace, suggestion: Callable[[], str]) -> Iterator[None]:
    """Say what would fit when there is no memory left.

    Raises:
        OutOfMemoryError: in place of whatever the device or the system raises then.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        level = "" if opt.optMemory is None else f" --optMemory {opt.optMemory}"
        what = f"out of memory with --batchSize {opt.batchSize}{level}"
        raise OutOfMemoryError(what, suggestion()) from error


def decide_level(
    opt: Settings,
    num_classes: int,
    device: torch.device,
    ops: Backend,
    world: World,
    warn: Callable[[str], None],
) -> tuple[Settings, Callable[[], str]]:
    """Decide `--optMemory auto` for all processes of a run.

    Returns:
        The settings with the level, and what to advise when a step runs out of memory.
    """
    estimate = MemoryEstimate(opt, num_classes, device, ops)
    free_bytes = engine.device.free_bytes(device)
    if free_bytes is not None:
        free_bytes = min(world.all_gather_int(free_bytes))
    if opt.optMemory == "auto":
        level, remark = estimate.choose_level(free_bytes)
        level = max(world.all_gather_int(level))  # the GPUs may be of different kinds
        if remark:
            warn(remark)
        opt = opt.replace(optMemory=level)
        estimate = MemoryEstimate(opt, num_classes, device, ops)
    return opt, partial(estimate.suggestion, free_bytes)


def workspace_bytes(device: torch.device) -> int:
    """What cuBLAS gets to work in on a GPU that is there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return 2 * CUBLAS_BYTES[torch.cuda.get_device_capability(device) >= (9, 0)]


def _mb(size: float) -> str:
    return f"{math.ceil(size / 1e6):,} MB"


# ---------------------------------------------------------------------------------- simulation


def _simulate(opt: SimpleNamespace, num_classes: int, device: torch.device, ops: Backend) -> int:
    """Run a step on fake tensors: the most bytes that they would have held."""
    dtype = PRECISIONS[opt.precision].dtype
    with torch.device("meta"):
        model = models.factory.create(opt, num_classes, ops).to(dtype)
    tracker = _MemoryTracker(uses_im2col=device.type == "cpu")
    with _tiling_for(device), FakeTensorMode(), tracker:
        _training_step(model, opt, dtype)
    return tracker.peak


def _training_step(model: nn.Module, opt: SimpleNamespace, dtype: torch.dtype) -> None:
    """Forward and backward as in train.py; the optimizer works in place and adds nothing."""
    # On fake CPU tensors for a GPU as well: autograd switches to the device, which must be there.
    state = {
        name: _empty(tensor.shape, tensor.dtype).requires_grad_(tensor.requires_grad)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    parameters = [tensor for tensor in state.values() if tensor.requires_grad]
    optimizer_state = [optimizer.initial_state(opt, tensor) for tensor in parameters]
    images = _empty((opt.batchSize, 3, opt.imageSize, opt.imageSize), dtype)
    targets = torch.empty(opt.batchSize, dtype=torch.int64)
    with autocast(torch.device("cpu"), opt.precision):
        loss = F.cross_entropy(functional_call(model, state, (images,)), targets)
    loss.backward()
    del optimizer_state  # alive all the time


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In the memory format that training uses."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=layout)


@contextmanager
def _tiling_for(device: torch.device) -> Iterator[None]:
    """Let kernels.reference cut a batch as on that device, though every fake tensor is on the CPU.

    On the CPU two tiles stand for all: the next one takes the place of the one before.
    """
    tiles = reference._tiles
    if device.type == "cuda":
        reference._tiles = lambda value: [slice(0, len(value))]
    else:
        reference._tiles = lambda value: itertools.islice(tiles(value), 2)
    try:
        yield
    finally:
        reference._tiles = tiles


class _MemoryTracker(TorchDispatchMode):
    """Adds up the memory that tensors hold, as they come and go.

    Args:
        uses_im2col: convolutions run on the CPU, see `_im2col_bytes`.
    """

    def __init__(self, uses_im2col: bool):
        super().__init__()
        self.uses_im2col = uses_im2col
        self.current = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}  # by the address of a storage

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        """Run an operation and note what it has allocated."""
        out = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage())
        if self.uses_im2col:  # freed before the operation returns, so that no tensor shows it
            self.peak = max(self.peak, self.current + _im2col_bytes(op.overloadpacket, args, out))
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES

        def release(_: weakref.ref) -> None:
            self.current -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, release)
        self.current += size
        self.peak = max(self.peak, self.current)


def _im2col_bytes(op: torch._ops.OpOverloadPacket, args: tuple, out: Tensor | tuple) -> int:
    """What a convolution unfolds its input to: (N, C * kh * kw, H, W), with H and W of its output.

    PyTorch's own convolution on the CPU does, and it runs for the types that oneDNN does not have.
    """
    if op is torch.ops.aten.convolution:
        source, weight, output = args[0], args[1], out
    elif op is torch.ops.aten.convolution_backward and args[-1][1]:  # for the weight's gradient
        output, source, weight = args[:3]
    else:
        return 0
    if weight.shape[2:] == (1, 1) or _has_onednn_conv(source.dtype):
        return 0
    rows = output.shape[0] * output.shape[2] * output.shape[3]
    return rows * weight[0].numel() * source.element_size()


def _has_onednn_conv(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a convolution of this type on this machine."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32
