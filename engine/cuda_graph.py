"""Run the steps of an epoch, eagerly or as a CUDA graph that is captured once and replayed.

A replay launches the kernels of the captured step on the memory of the captured step. It runs no
Python, which takes most of the time of a small network's step. So a step keeps in device memory
whatever changes: learning rate, step number, sums, and its batch. Images in device memory are
batched inside the graph, from the epoch's plan and a position; batches from files are copied into a
buffer that the graph reads. All of this is on one stream: no copy overtakes the replay before it.

The first WARMUP_STEPS full batches of each kind run eagerly, the next one is captured, all later
ones are replays. A batch that is smaller on any rank (the last of an epoch, or one with skipped
images) runs eagerly on all of them, since a captured step keeps the numbers of images of all ranks.
It runs in the graphs' memory, or the device would hold the peak of both.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from datasets.memory_loader import MemoryLoader
from distributed.peer_monitor import is_loader_error
from distributed.world import BatchShard, World
from errors import RunError, UsageError

WARMUP_STEPS = 3  # eager steps before capture: libraries choose algorithms, allocate and compile
# Steps over files that wait for the device. A replay is one launch, so that the host could queue
# dozens of them, whose batches would fill the host's pinned memory.
MAX_QUEUED_STEPS = 2

_failed_captures: list[torch.cuda.CUDAGraph] = []  # kept alive, see `capture`
Batch = tuple[Tensor, Tensor]  # images, targets
Step = Callable[[Tensor, Tensor], None]


class Capturer:
    """Capture steps that never run at the same time, so that they can share memory.

    No tensor that a step makes may be read by a later one: the next replay overwrites it.
    """

    def __init__(self):
        self._has_graph = False
        # Other allocators, which PYTORCH_ALLOC_CONF may choose, lend graphs' memory to nobody.
        is_native = torch.cuda.get_allocator_backend() == "native"
        self._pool = torch.cuda.MemPool() if is_native else None

    def capture(self, fn: Callable[[], None]) -> Callable[[], None]:
        """Return the replay of what `fn` does; see the function of this name."""
        replay = capture(fn, self._pool and self._pool.id)
        self._has_graph = True
        return replay

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Let an eager step allocate in the graphs' memory, once there is a graph."""
        # Before, steps leave nothing reserved: a capture first gives back what is cached.
        if not self._has_graph or self._pool is None:
            yield
            return
        # The pool serves this thread alone, so backward must run in it too.
        with torch.cuda.use_mem_pool(self._pool), torch.autograd.set_multithreading_enabled(False):
            yield


def make_capturer(requested: str, device: torch.device) -> Capturer | None:
    """Return what captures steps for `--cudaGraph`; None to run them eagerly.

    Raises:
        UsageError: a graph is requested where steps cannot be captured.
    """
    if device.type != "cuda":
        if requested == "true":
            raise UsageError("cudaGraph: there is no CUDA device", "use --cudaGraph auto")
        return None
    if requested == "false":
        return None
    # CUDA cannot capture the default stream, so everything runs on this one from here on.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_stream(stream)
    return Capturer()


def capture(fn: Callable[[], None], pool: tuple[int, int] | None = None) -> Callable[[], None]:
    """Capture what `fn` does on the current device, without doing it; return the replay.

    Args:
        pool: memory of graphs that never run at the same time; None for memory of its own.

    Raises:
        Exception: `fn` raises it, or something in it cannot be captured; nothing was done on the
            device, but Python objects are as `fn` left them.
    """
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    stream = torch.cuda.current_stream()
    try:
        # Only this thread's calls: the threads of NCCL and of loaders may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            fn()
    except BaseException:
        generator.graphsafe_set_state(before)  # else it refuses to draw outside of a capture
        _failed_captures.append(graph)  # the allocator may still refer to it
        raise
    return graph.replay


class ResidentBatches:
    """Make batches of images in device memory, one after the other, from a position kept there."""

    def __init__(self, loader: MemoryLoader):
        self._loader = loader
        device = loader.sampler.indices.device
        self._offsets = torch.arange(loader.sampler.local_batch, device=device)
        self._batch_start = torch.zeros((), dtype=torch.int64, device=device)
        self._plan = None

    def seek(self, epoch: int, step: int) -> None:
        """Make `step` (from 0) of an epoch the next one."""
        plan = self._loader.plan(epoch)
        if self._plan is None:
            self._plan = plan.at(slice(None))
        self._plan.copy_(plan)
        self._batch_start.fill_(self._loader.sampler.local_slice(step).start)

    def next(self) -> Batch:
        """Make the next batch."""
        batch = self._loader.make_batch(self._plan.at(self._batch_start + self._offsets))
        self._batch_start += self._loader.sampler.global_batch
        return batch


class BatchBuffer:
    """Hold one batch after another, all of one shape, where a captured step reads them."""

    def __init__(self):
        self._batch: Batch | None = None
        self._ends: deque[torch.cuda.Event] = deque()  # of steps that the device may not have done

    def fill(self, *batch: Tensor) -> None:
        """Copy a batch into the buffer, after the steps that still read it."""
        if self._batch is None:
            self._batch = tuple(torch.empty_like(tensor) for tensor in batch)
        for held, tensor in zip(self._batch, batch, strict=True):
            held.copy_(tensor)

    def next(self) -> Batch:
        """Return the batch."""
        return self._batch

    def run(self, step: Callable[[], None]) -> None:
        """Run a step on the batch; then wait until the device has few steps left to do."""
        step()
        if self._batch[1].is_cuda:
            self._ends.append(torch.cuda.current_stream().record_event())
            if len(self._ends) > MAX_QUEUED_STEPS:
                self._ends.popleft().synchronize()


class GraphedStep:
    """Run a step over the full batches of one split, captured after its warm-up.

    Args:
        batches: gives the next batch, inside the graph.
        step: takes a batch, and keeps on the device all that changes from step to step.
        capture: returns the replay, or None if the step must go on eagerly.
        run_eagerly: runs a function.
    """

    def __init__(
        self,
        batches: ResidentBatches | BatchBuffer,
        step: Step,
        capture: Callable[[Callable[[], None]], Callable[[], None] | None],
        run_eagerly: Callable[[Callable[[], None]], None],
    ):
        self.batches, self._step = batches, step
        self._capture, self._run_eagerly = capture, run_eagerly
        self._num_calls, self._replay = 0, None

    def __call__(self) -> None:
        """Run the next step."""
        self._num_calls += 1
        if self._num_calls == WARMUP_STEPS + 1:
            self._replay = self._capture(self._run)
        if self._replay:
            self._replay()
        else:
            self._run_eagerly(self._run)

    def _run(self) -> None:
        self._step(*self.batches.next())


class StepStats(NamedTuple):
    """Size and time of one step."""

    num_images: int  # of the batch, over all processes
    data_s: float  # of waiting for the batch
    time_s: float  # in all


class StepRunner:
    """Run a step over the batches of an epoch, replaying a CUDA graph where it can.

    Args:
        world: the processes of the run.
        shard: this process's part of each batch; None for one process.
        capturer: captures steps; None runs every step eagerly.
        warn: gets a message if a step cannot be captured.
        reset: drops what a step leaves in Python, before a capture and after one that has failed.
    """

    def __init__(
        self,
        world: World,
        shard: BatchShard | None,
        capturer: Capturer | None,
        warn: Callable[[str], None],
        reset: Callable[[], None] = lambda: None,
    ):
        self._world, self._shard, self._capturer, self._warn = world, shard, capturer, warn
        self._reset, self._can_capture = reset, capturer is not None
        self._has_captured_training = False
        self._graphed_steps: dict[tuple, GraphedStep] = {}
        self._warmup_steps: Counter[str] = Counter()  # by the name of the step's function

    def run(
        self,
        step: Step,
        loader,
        epoch: int,
        start: int = 0,
        before_step: Callable[[], None] = lambda: None,
    ) -> Iterator[StepStats]:
        """Run `step` on each batch of an epoch; yield after each.

        Args:
            loader: `batches(epoch, start)` yields (images, targets) on the device.
            start: the first step, from 0.
            before_step: called before each step, outside of any capture.
        """
        self._count_warmup(step, 0)
        since = time.perf_counter()  # so the first step's time includes the epoch's plan
        for sizes, run_step in self._prepared_steps(step, loader, epoch, start):
            if self._shard:
                self._shard.set_sizes(sizes)
            ready = time.perf_counter()
            before_step()
            run_step()
            yield StepStats(sum(sizes), ready - since, time.perf_counter() - since)
            self._count_warmup(step, 1)
            since = time.perf_counter()

    def _prepared_steps(
        self, step: Step, loader, epoch: int, start: int
    ) -> Iterator[tuple[list[int], Callable[[], None]]]:
        """Wait for each batch; yield its size in each process, and the call that runs its step."""
        sampler = loader.sampler
        full = [sampler.local_batch] * self._world.size if self._capturer else None
        if self._capturer and isinstance(loader, MemoryLoader) and sampler.full_steps:
            graphed = self._graphed_step(step, loader, partial(ResidentBatches, loader))
            graphed.batches.seek(epoch, start)
            for _ in range(start, sampler.full_steps):
                yield full, graphed
            start = max(start, sampler.full_steps)
        if start == len(sampler):
            return
        # Any batch may be smaller (unreadable images are skipped): processes exchange sizes.
        for batch in loader.batches(epoch, start):
            sizes = self._world.all_gather_int(len(batch[1]))
            if sizes == full:
                graphed = self._graphed_step(step, loader, BatchBuffer)
                graphed.batches.fill(*batch)
                del batch  # the loader makes the next one in its memory
                yield sizes, partial(graphed.batches.run, graphed)
            else:
                yield sizes, partial(self._run_eagerly, partial(step, *batch))

    def _graphed_step(self, step: Step, loader, make_batches: Callable) -> GraphedStep:
        key = (id(loader), step.__name__)
        if key not in self._graphed_steps:
            graphed = GraphedStep(make_batches(), step, self._capture, self._run_eagerly)
            self._graphed_steps[key] = graphed
        return self._graphed_steps[key]

    def _run_eagerly(self, fn: Callable[[], None]) -> None:
        # A pool in which a capture has failed takes no more. Nor does it take training's warm-up
        # where evaluation was captured first, as after a resume: what later steps keep is made
        # then, and libraries get ready on the thread that will run backward in the capture.
        memory: AbstractContextManager = nullcontext()
        if self._can_capture and (self._has_captured_training or not torch.is_grad_enabled()):
            memory = self._capturer.memory()
        with memory:
            fn()

    def _capture(self, fn: Callable[[], None]) -> Callable[[], None] | None:
        """Return the replay of a step; None, with one note, if it cannot be captured."""
        # Each failed capture keeps memory, so there is no second try. The steps stay GraphedSteps:
        # this process must not exchange more sizes than the others, who may have succeeded.
        if not self._can_capture:
            return None
        self._reset()  # so that the graph owns the gradients
        try:
            replay = self._capturer.capture(fn)
            self._has_captured_training |= torch.is_grad_enabled()
            return replay
        except Exception as error:  # Triton's are of any type
            if isinstance(error, RunError | torch.OutOfMemoryError) or is_loader_error(error):
                raise
            self._can_capture = False
            reason = str(error).partition("\n")[0] or type(error).__name__
            self._warn(f"a step cannot be captured as a CUDA graph: {reason}; it runs eagerly")
        self._reset()
        return None

    def _count_warmup(self, step: Step, times: int) -> None:
        """Count steps. While kernels compile, processes may keep each other waiting for longer."""
        self._warmup_steps[step.__name__] += times
        self._world.in_warmup = self._warmup_steps[step.__name__] <= WARMUP_STEPS + 1
