"""Predict the memory of a training step by running it on tensors without data.

`MemoryEstimate.peak_bytes` runs forward and backward on fake tensors, which have shape and dtype
only, and adds up what they would hold. Every network, memory level, precision and kernel backend is
thus counted by its own code, in seconds and on any machine.

Counted is what torch.cuda.max_memory_allocated counts: weights, momentum, gradients, the batch, all
that lives between forward and backward, and cuBLAS's workspace. Left out, on a GPU: the CUDA
context and code, gaps between the allocator's blocks, cuDNN's trials of algorithms, and the buffers
in which several processes average gradients.

A captured step has the same peak and keeps that memory. Smaller batches and evaluation use it too
(engine/cuda_graph.py); a loader of files cannot, so what it needs for a batch is added.
"""

import itertools
import math
import os
import re
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine.device
import models.factory
from cli.flag_types import Settings
from datasets.registry import DATASETS
from distributed.world import World
from engine import optimizer
from engine.losses import LOSSES, mean_loss
from engine.precision import PRECISIONS, autocast
from errors import OutOfMemoryError
from kernels import reference
from kernels.backend import Backend

LEVELS_BY_SPEED = (2, 3, 4)  # memory levels, the fastest first; 0 and 1 are no faster than 2
TOLERANCE = 1.15  # a measured peak is at most this many times the estimate
BLOCK_BYTES = 512  # the CUDA allocator rounds up to multiples of it
# The workspace of a cuBLAS handle, from PyTorch's CublasHandlePool.cpp: before Hopper, and since.
# The forward and the backward thread have a handle each.
CUBLAS_BYTES = {False: (2 * 4096 + 8 * 16) * 1024, True: 8 * 4096 * 1024}
# What datasets.pipelines needs on a GPU to finish a batch of files, in such batches: the result,
# the values before and after the colours change, half of them twice to mirror it; bytes and all.
LOADER_BATCHES = 4.5
# Parts of the messages of errors that mean: no memory left.
OUT_OF_MEMORY_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a memory object",
)


class MemoryEstimate:
    """Predict the memory of a run's training steps, and find a level or batch size that fits.

    Args:
        opt: network, batchSize, precision and optMemory of the run.
        device: where the steps would run; it need not exist.
        ops: the implementation of the dense blocks.
    """

    def __init__(self, opt: Settings, num_classes: int, device: torch.device, ops: Backend):
        self.opt, self.num_classes, self.device, self.ops = opt, num_classes, device, ops
        # A network without dense blocks has no levels, and optMemory None.
        self.levels = LEVELS_BY_SPEED if opt.optMemory is not None else ()
        self._peak_cache: dict[tuple[int, int], int] = {}

    def peak_bytes(self, level: int | None = None, batch: int | None = None) -> int:
        """Return the most memory that a run holds at any moment of its steps.

        Seeds torch's generators as models.factory.create does.

        Args:
            level, batch: instead of the run's own optMemory (which may be auto) and batchSize.
        """
        key = (self.opt.optMemory if level is None else level, batch or self.opt.batchSize)
        if key not in self._peak_cache:
            level, batch = key
            local_batch = -(-batch // self.opt.replicas)  # of one of several processes
            opt = self.opt.replace(optMemory=level, batchSize=local_batch)
            peak = _simulate(opt, self.num_classes, self.device, self.ops)
            if opt.replicas > 1:  # evaluation does not divide its batches
                opt = opt.replace(batchSize=batch)
                evaluation = _simulate(opt, self.num_classes, self.device, self.ops, training=False)
                peak = max(peak, evaluation)
            self._peak_cache[key] = peak + self._loader_bytes(opt) + workspace_bytes(self.device)
        return self._peak_cache[key]

    def _loader_bytes(self, opt: Settings) -> int:
        """Return what finishing a batch needs beside the memory that a captured step keeps."""
        is_captured = self.device.type == "cuda" and opt.cudaGraph != "false"
        if not is_captured or not DATASETS[opt.dataset].is_read_from_disk(opt.imageSize):
            return 0
        values = opt.batchSize * opt.nChannels * opt.imageSize**2
        return round(LOADER_BATCHES * values * PRECISIONS[opt.precision].dtype.itemsize)

    def best_fit(self, limit_bytes: float) -> tuple[int | None, int]:
        """Return a level and the largest batch that fits there.

        The level is the fastest at which the run's own batch fits, or else the smallest.
        """
        for level in self.levels:
            if self._fits(limit_bytes, level):
                return level, self.opt.batchSize
        level = min(self.levels, key=self.peak_bytes, default=None)
        return level, self.largest_batch(limit_bytes, level)

    def largest_batch(self, limit_bytes: float, level: int | None) -> int:
        """Return the largest batch up to the run's own that fits at a level; 0 if none does."""
        if self._fits(limit_bytes, level):
            return self.opt.batchSize
        sizes = range(self.opt.replicas, self.opt.batchSize, self.opt.replicas)
        # Bisection: a few simulations, since memory grows with the batch.
        limit_bytes /= TOLERANCE
        local_batch = bisect_right(sizes, limit_bytes, key=partial(self.peak_bytes, level))
        if local_batch > 16:
            local_batch = local_batch // 8 * 8
        return local_batch * self.opt.replicas

    def choose_level(self, free_bytes: int | None) -> tuple[int, str | None]:
        """Return the level for `--optMemory auto`, and a note unless it is the fastest.

        If no level fits, return the smallest: the run may need less than TOLERANCE allows for.

        Args:
            free_bytes: at the start of the run; None where it is unknown, as on the CPU.
        """
        fastest = LEVELS_BY_SPEED[0]
        if free_bytes is None:
            return fastest, None
        level, batch = self.best_fit(free_bytes)
        if batch < self.opt.batchSize:
            why = f"it needs {self._need(level)} and {_mb(free_bytes)} are free"
            fix = f"--batchSize {batch} would fit" if batch else "no batch would fit"
            return level, f"optMemory auto: {level}, the smallest, though {why}; {fix}"
        if level == fastest:
            return level, None
        why = f"level {fastest} needs {self._need(fastest)} of {_mb(free_bytes)} free"
        return level, f"optMemory auto: {level}, since {why}"

    def suggestion(self, free_bytes: int | None) -> str:
        """Return what to change after a step ran out of memory; see `choose_level`."""
        try:
            # The current settings failed, so whatever is free, they do not fit.
            current = self.peak_bytes()
            limit = current if free_bytes is None else min(current, free_bytes)
            level, batch = self.best_fit(limit)
            if free_bytes is None and batch < self.opt.batchSize:
                batch = self.largest_batch(current / 2, level)  # a guess that leaves a margin
            need = self._need(level, batch or self.opt.replicas)
        except MemoryError:  # the simulation needs a little as well
            return "use a smaller --batchSize" + (", or --optMemory 4" if self.levels else "")
        flags = []
        if batch < self.opt.batchSize:
            flags.append(f"--batchSize {batch or self.opt.replicas}")
        if level != self.opt.optMemory:
            flags.append(f"--optMemory {level}")
        if not batch:
            return f"use a larger device: {' '.join(flags)} needs {need}"
        return f"use {' '.join(flags)}, {need} instead of {_mb(current)}"

    def _fits(self, limit_bytes: float, level: int | None) -> bool:
        return TOLERANCE * self.peak_bytes(level) <= limit_bytes

    def _need(self, level: int | None, batch: int | None = None) -> str:
        return f"about {_mb(self.peak_bytes(level, batch))}"


@contextmanager
def memory_errors(opt: SimpleNamespace, suggestion: Callable[[], str]) -> Iterator[None]:
    """Raise OutOfMemoryError, with a suggestion, where PyTorch or Python runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_known and not any(text in str(error) for text in OUT_OF_MEMORY_MESSAGES):
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
    """Decide `--optMemory auto` for all processes of a run; return the settings with the level.

    Also returns a function that says what to change if memory runs out.
    """
    estimate = MemoryEstimate(opt, num_classes, device, ops)
    free_bytes = engine.device.free_bytes(device)
    if free_bytes is not None:
        free_bytes = min(world.all_gather_int(free_bytes))
    if opt.optMemory == "auto":
        level, note = estimate.choose_level(free_bytes)
        level = max(world.all_gather_int(level))  # the GPUs may be of different kinds
        if note:
            warn(note)
        opt = estimate.opt = opt.replace(optMemory=level)
    return opt, partial(estimate.suggestion, free_bytes)


def workspace_bytes(device: torch.device) -> int:
    """Return what cuBLAS allocates for itself on a GPU; 0 where the GPU does not exist."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    config = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    chosen = sum(int(kib) * int(count) * 1024 for kib, count in config)  # as PyTorch reads it
    return 2 * (chosen or CUBLAS_BYTES[torch.cuda.get_device_capability(device) >= (9, 0)])


def _mb(size: float) -> str:
    return f"{math.ceil(size / 1e6):,} MB"


def _simulate(
    opt: SimpleNamespace,
    num_classes: int,
    device: torch.device,
    ops: Backend,
    training: bool = True,
) -> int:
    """Return the most bytes in use during forward and backward, or evaluation, of one step."""
    dtype = PRECISIONS[opt.precision].dtype
    # What is drawn at random may be all of the network.
    opt = opt.replace(stochasticDepth=1.0, dropPath=0.0)
    with torch.device("meta"):
        model = models.factory.create(opt, num_classes, ops).to(dtype).train(training)
    tracker = MemoryTracker(device)
    # Fake CPU tensors for a GPU as well: autograd switches to the device, which must exist.
    with _tiling_for(device), FakeTensorMode(), tracker:
        state = {
            name: _empty(tensor.shape, tensor.dtype).requires_grad_(tensor.requires_grad)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        # Held during the whole step. The update itself works in place and allocates nothing.
        parameters = [tensor for tensor in state.values() if tensor.requires_grad]
        held = [optimizer.initial_state(opt, parameter) for parameter in parameters]
        images = _empty((opt.batchSize, opt.nChannels, opt.imageSize, opt.imageSize), dtype)
        targets = torch.empty(opt.batchSize, dtype=torch.int64)
        if not training:
            held += [torch.empty_like(parameter) for parameter in parameters]  # the last gradients
        with torch.set_grad_enabled(training), autocast(torch.device("cpu"), opt.precision):
            outputs = functional_call(model, state, (images,))
            loss = mean_loss(LOSSES[opt.loss], outputs, targets)
        if training:
            loss.backward()
        del held
    return tracker.peak


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=layout)


@contextmanager
def _tiling_for(device: torch.device) -> Iterator[None]:
    """Make kernels.reference cut fake CPU tensors into the tiles it would use on `device`.

    On a GPU a batch is one tile, in the dtype of the maps. On the CPU two tiles stand for all: each
    next one takes the place of the one before.
    """
    replaced = ("_tiles", "_compute_dtype", "_sums_directly")
    functions = {name: getattr(reference, name) for name in replaced}
    tiles = reference._tiles
    reference._sums_directly = lambda *_: True  # fake tensors have no values to choose by
    if device.type == "cuda":
        reference._tiles = lambda value: [slice(0, len(value))]
        reference._compute_dtype = lambda value: value.dtype
    else:
        reference._tiles = lambda value: itertools.islice(tiles(value), 2)
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(reference, name, function)


class MemoryTracker(TorchDispatchMode):
    """Add up the bytes that live tensors hold on `device`, operation by operation.

    Attributes:
        current, peak: bytes of all storages now, and at most.
        alive: a reference to each storage, by its address.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.uses_im2col = device.type == "cpu"
        self.current = self.peak = 0
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        """Run an operation and count the storages that it allocated."""
        out = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage())
        if self.uses_im2col:  # freed before the operation returns, so no tensor shows it
            self.peak = max(self.peak, self.current + _im2col_bytes(op.overloadpacket, args, out))
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES

        def release(_: weakref.ref) -> None:
            self.current -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, release)
        self.current += size
        self.peak = max(self.peak, self.current)


def _im2col_bytes(op: torch._ops.OpOverloadPacket, args: tuple, out: Tensor | tuple) -> int:
    """Return the bytes of a convolution's unfolded input: (N, C * kh * kw, H, W) of its output.

    PyTorch's own CPU convolution uses im2col; it runs for dtypes that oneDNN does not support.
    """
    if op is torch.ops.aten.convolution:
        source, weight, output = args[0], args[1], out
    elif op is torch.ops.aten.convolution_backward and args[-1][1]:  # for the weight's gradient
        output, source, weight = args[:3]
    else:
        return 0
    has_onednn = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    if weight.shape[2:] == (1, 1) or has_onednn.get(source.dtype, False):
        return 0
    rows = output.shape[0] * output.shape[2] * output.shape[3]
    return rows * weight[0].numel() * source.element_size()
