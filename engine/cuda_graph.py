"""Run the steps of an epoch, eagerly or as a CUDA graph that is captured once and replayed.

A replay launches the kernels of the captured step on the memory of the captured step. It runs no
Python, which takes most of the time of a small network's step. So a step keeps in device memory
whatever changes: learning rate, step number, sums, the position in the epoch and the epoch's plan.

The first WARMUP_STEPS steps of each kind run eagerly, the next one is captured, all later ones are
replays. Left out are images read from files, which the host has to copy step by step, and the last
batch of an epoch if it is smaller: these run eagerly.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from distributed.world import BatchShard, World
from errors import UsageError

WARMUP_STEPS = 3  # eager steps before capture: libraries choose algorithms, allocate and compile

_failed_captures: list[torch.cuda.CUDAGraph] = []  # kept alive, see `capture`
Step = Callable[[Tensor, Tensor], None]
Capturer = Callable[[Callable[[], None]], Callable[[], None]]


def make_capturer(requested: str, device: torch.device, resident: bool) -> Capturer | None:
    """Return what captures steps for `--cudaGraph`; None to run them eagerly.

    Args:
        resident: whether the images are in device memory.

    Raises:
        UsageError: a graph is requested where steps cannot be captured.
    """
    reason = None
    if device.type != "cuda":
        reason = "there is no CUDA device"
    elif not resident:
        reason = "images above 64 pixels come from files, step by step"
    if requested == "true" and reason:
        raise UsageError(f"cudaGraph: {reason}", "use --cudaGraph auto")
    if reason or requested == "false":
        return None
    # CUDA cannot capture the default stream, so everything runs on this one from here on.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_stream(stream)
    # Training and evaluation never run at the same time, so their graphs share memory.
    return partial(capture, pool=torch.cuda.graph_pool_handle())


def capture(fn: Callable[[], None], pool: tuple[int, int] | None = None) -> Callable[[], None]:
    """Capture what `fn` does on the current device, without doing it; return the replay.

    Args:
        pool: memory of graphs that never run at the same time; None for memory of its own.

    Raises:
        RuntimeError: something in `fn` cannot be captured; nothing was done.
    """
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    stream = torch.cuda.current_stream()
    try:
        # Only this thread's calls: NCCL's watchdog thread may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            fn()
    except RuntimeError:
        generator.graphsafe_set_state(before)  # else it refuses to draw outside of a capture
        _failed_captures.append(graph)  # the allocator may still refer to it
        raise
    return graph.replay


class GraphedStep:
    """Run a step over the full batches of one split, captured after its warm-up.

    Args:
        loader: has `plan`, `make_batch` and `sampler`, as datasets.memory_loader.MemoryLoader.
        step: takes a batch, and keeps on the device all that changes from step to step.
        capturer: `capture`, or a stand-in for it.
        on_failure: gets the reason if capture fails; the steps then run eagerly.
    """

    def __init__(self, loader, step: Step, capturer: Capturer, on_failure: Callable[[str], None]):
        self._loader, self._step = loader, step
        self._capturer, self._on_failure = capturer, on_failure
        device = loader.sampler.indices.device
        self._offsets = torch.arange(loader.sampler.local_batch, device=device)
        self._batch_start = torch.zeros((), dtype=torch.int64, device=device)
        self._plan = None
        self._num_calls = 0
        self._run_step: Callable[[], None] = self._run_eager

    def seek(self, epoch: int, step: int) -> None:
        """Make `step` (from 0) of an epoch the next one."""
        plan = self._loader.plan(epoch)
        if self._plan is None:
            self._plan = plan.at(slice(None))
        self._plan.copy_(plan)
        self._batch_start.fill_(self._loader.sampler.local_slice(step).start)

    def __call__(self) -> None:
        """Run the next step."""
        self._num_calls += 1
        if self._num_calls == WARMUP_STEPS + 1:
            try:
                self._run_step = self._capturer(self._run_eager)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._on_failure(str(error).partition("\n")[0])
        self._run_step()

    def _run_eager(self) -> None:
        images, targets = self._loader.make_batch(self._plan.at(self._batch_start + self._offsets))
        self._step(images, targets)
        self._batch_start += self._loader.sampler.global_batch


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
        capturer: captures steps over images in device memory; None runs every step eagerly.
        warn: gets a message if a step cannot be captured.
    """

    def __init__(
        self,
        world: World,
        shard: BatchShard | None,
        capturer: Capturer | None,
        warn: Callable[[str], None],
    ):
        self._world, self._shard, self._capturer, self._warn = world, shard, capturer, warn
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
        # Full batches have a known size and one shape: a graph fits them all.
        if self._capturer and sampler.full_steps:
            graphed = self._graphed_step(step, loader)
            graphed.seek(epoch, start)
            for _ in range(start, sampler.full_steps):
                yield [sampler.local_batch] * self._world.size, graphed
            start = max(start, sampler.full_steps)
        # Any other batch may be smaller (unreadable images are skipped): processes exchange sizes.
        if start < len(sampler):
            for images, targets in loader.batches(epoch, start):
                yield self._world.all_gather_int(len(targets)), partial(step, images, targets)

    def _graphed_step(self, step: Step, loader) -> GraphedStep:
        key = (id(loader), step.__name__)
        if key not in self._graphed_steps:
            graphed = GraphedStep(loader, step, self._capturer, self._disable_capture)
            self._graphed_steps[key] = graphed
        return self._graphed_steps[key]

    def _disable_capture(self, reason: str) -> None:
        # Each failed capture keeps memory, so there is no second try. The steps stay GraphedSteps:
        # other eager steps exchange their sizes, and the other processes would not take part.
        self._capturer = lambda fn: fn
        self._warn(f"a step cannot be captured as a CUDA graph: {reason}; it runs eagerly")

    def _count_warmup(self, step: Step, times: int) -> None:
        """Count steps. While kernels compile, processes may keep each other waiting for longer."""
        self._warmup_steps[step.__name__] += times
        self._world.in_warmup = self._warmup_steps[step.__name__] <= WARMUP_STEPS + 1
