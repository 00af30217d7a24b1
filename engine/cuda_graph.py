"""The steps of an epoch, batch by batch: eager, or captured once as a CUDA graph and replayed.

A replay repeats the very same kernels on the very same memory without Python in between, which for
a small network is most of the time of a step. So whatever differs from step to step has to lie in
device memory: the place in the epoch is counted there, and the epoch's plan is copied there.
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

_failed_captures: list[torch.cuda.CUDAGraph] = []  # captures that broke off, kept: see `capture`
Step = Callable[[Tensor, Tensor], None]
Capturer = Callable[[Callable[[], None]], Callable[[], None]]


def make_capturer(requested: str, device: torch.device, resident: bool) -> Capturer | None:
    """What captures steps for `--cudaGraph`; None to run them eagerly.

    Args:
        resident: whether the data is in device memory.

    Raises:
        UsageError: a graph is asked for where there can be none.
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
    # The default stream cannot be captured; all that runs from here on runs on this one.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_stream(stream)
    # Training and evaluation take turns, and so share memory.
    return partial(capture, pool=torch.cuda.graph_pool_handle())


def capture(fn: Callable[[], None], pool: tuple[int, int] | None = None) -> Callable[[], None]:
    """Capture what `fn` does on the current device, without doing it; returns the replay.

    Args:
        pool: of memory, for graphs that never run at the same time; None for one of its own.

    Raises:
        RuntimeError: something in `fn` cannot be captured. It has not been done.
    """
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    try:
        # Of this thread only: NCCL's watchdog may call CUDA meanwhile.
        with torch.cuda.graph(
            graph,
            pool=pool,
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            fn()
    except RuntimeError:
        generator.graphsafe_set_state(before)  # it would refuse to draw outside of a capture
        _failed_captures.append(graph)  # the allocator may still refer to it
        raise
    return graph.replay


class GraphedStep:
    """A step over full batches of one split.

    Args:
        loader: with `plan`, `make_batch` and `sampler`, as datasets.memory_loader.MemoryLoader.
        step: takes a batch; must keep all that changes from step to step on the device.
        capturer: `capture`, or a stand-in for it.
        on_failure: called with the reason when capture fails; the steps then run eagerly.
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
        """Do the next step."""
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
    """What a step was.

    Args:
        num_images: of its batch, over all replicas.
        data_s: seconds until the batch was there.
        time_s: seconds in all.
    """

    num_images: int
    data_s: float
    time_s: float


class StepRunner:
    """Runs a step over the batches of an epoch, and knows which steps are captured.

    Args:
        world: the replicas of the network, this one alone or one of several.
        shard: this replica's part of each batch; None for one replica.
        capturer: captures steps over resident data; None runs every step eagerly.
        warn: called with a remark if a step cannot be captured.
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
        self._warmup_steps: Counter[str] = Counter()  # how often each kind of step was done

    def run(
        self,
        step: Step,
        loader,
        epoch: int,
        start: int = 0,
        before_step: Callable[[], None] = lambda: None,
    ) -> Iterator[StepStats]:
        """Run `step` on each batch of an epoch, one after another.

        Args:
            loader: `batches(epoch, start)` yields (images, targets) on the device.
            start: the first step, from 0.
            before_step: called once a batch is there, ahead of its step and outside of a capture.

        Yields:
            What was done, after each step.
        """
        self._count_warmup(step, 0)
        if self._capturer and loader.sampler.full_steps:
            # The last batch may be smaller, so another shape: it runs eagerly like all the others.
            yield from self._replay(step, loader, epoch, start, before_step)
            start = max(start, loader.sampler.full_steps)
        if start == len(loader.sampler):
            return
        since = time.perf_counter()
        for images, targets in loader.batches(epoch, start):
            counts = self._world.all_gather_int(len(targets))
            self._set_shard(counts)
            ready = time.perf_counter()
            before_step()
            step(images, targets)
            yield StepStats(sum(counts), ready - since, time.perf_counter() - since)
            self._count_warmup(step, 1)
            since = time.perf_counter()

    def _replay(
        self, step: Step, loader, epoch: int, start: int, before_step: Callable[[], None]
    ) -> Iterator[StepStats]:
        """The full batches of an epoch, which need not be told how many images they have."""
        sampler, since = loader.sampler, time.perf_counter()
        graphed = self._graphed_step(step, loader)
        graphed.seek(epoch, start)  # its time is the first step's
        for _ in range(start, sampler.full_steps):
            self._set_shard([sampler.local_batch] * self._world.size)
            ready = time.perf_counter()
            before_step()
            graphed()
            yield StepStats(sampler.global_batch, ready - since, time.perf_counter() - since)
            self._count_warmup(step, 1)
            since = time.perf_counter()

    def _graphed_step(self, step: Step, loader) -> GraphedStep:
        key = (id(loader), step.__name__)
        if key not in self._graphed_steps:
            self._graphed_steps[key] = GraphedStep(
                loader, step, self._capturer, self._disable_capture
            )
        return self._graphed_steps[key]

    def _disable_capture(self, reason: str) -> None:
        # What failed once would leave more behind each time. Still by way of GraphedStep: other
        # eager steps have one exchange more, which the other processes would not have.
        self._capturer = lambda fn: fn
        self._warn(f"a step cannot be recorded as a CUDA graph: {reason}; it runs eagerly")

    def _count_warmup(self, step: Step, times: int) -> None:
        """Count steps: after the first few they take as long in every process."""
        self._warmup_steps[step.__name__] += times
        self._world.in_warmup = self._warmup_steps[step.__name__] <= WARMUP_STEPS + 1

    def _set_shard(self, counts: list[int]) -> None:
        if self._shard:
            self._shard.set_sizes(counts)
