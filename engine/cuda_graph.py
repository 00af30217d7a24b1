"""The steps of an epoch, batch by batch: eager, or recorded once as a CUDA graph and replayed.

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

from distributed.world import Share, World
from errors import UsageError

WARM_UP = 3  # eager steps before recording: libraries choose algorithms, allocate and compile

_FAILED: list[torch.cuda.CUDAGraph] = []  # recordings that broke off, kept: see `record`
Step = Callable[[Tensor, Tensor], None]
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


def recorder(wish: str, device: torch.device, resident: bool) -> Recorder | None:
    """What records steps for `--cudaGraph`; None to run them eagerly.

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
    if wish == "true" and reason:
        raise UsageError(f"cudaGraph: {reason}", "use --cudaGraph auto")
    if reason or wish == "false":
        return None
    # The default stream cannot be recorded; all that runs from here on runs on this one.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_stream(stream)
    # Training and evaluation take turns, and so share memory.
    return partial(record, pool=torch.cuda.graph_pool_handle())


def record(work: Callable[[], None], pool: tuple[int, int] | None = None) -> Callable[[], None]:
    """Record what `work` does on the current device, without doing it; returns the replay.

    Args:
        pool: of memory, for graphs that never run at the same time; None for one of its own.

    Raises:
        RuntimeError: something in `work` cannot be recorded. It has not been done.
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
            work()
    except RuntimeError:
        generator.graphsafe_set_state(before)  # it would refuse to draw outside of a recording
        _FAILED.append(graph)  # the allocator may still refer to it
        raise
    return graph.replay


class ReplayedStep:
    """A step over full batches of one split.

    Args:
        batches: with `plan`, `make_batch` and `sampler`, as datasets.memory_loader.MemoryLoader.
        step: takes a batch; must keep all that changes from step to step on the device.
        recorder: `record`, or a stand-in for it.
        failed: called with the reason when recording fails; the steps then run eagerly.
    """

    def __init__(self, batches, step: Step, recorder: Recorder, failed: Callable[[str], None]):
        self._batches, self._step, self._recorder, self._failed = batches, step, recorder, failed
        device = batches.sampler.indices.device
        self._places = torch.arange(batches.sampler.local_batch, device=device)
        self._first = torch.zeros((), dtype=torch.int64, device=device)
        self._plan = None
        self._runs = 0
        self._run: Callable[[], None] = self._eagerly

    def seek(self, epoch: int, step: int) -> None:
        """Make `step` (from 0) of an epoch the next one."""
        plan = self._batches.plan(epoch)
        if self._plan is None:
            self._plan = plan.at(slice(None))
        self._plan.copy_(plan)
        self._first.fill_(self._batches.sampler.local_slice(step).start)

    def __call__(self) -> None:
        """Do the next step."""
        self._runs += 1
        if self._runs == WARM_UP + 1:
            try:
                self._run = self._recorder(self._eagerly)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._failed(str(error).partition("\n")[0])
        self._run()

    def _eagerly(self) -> None:
        images, targets = self._batches.make_batch(self._plan.at(self._first + self._places))
        self._step(images, targets)
        self._first += self._batches.sampler.global_batch


class DoneStep(NamedTuple):
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
    """Runs a step over the batches of an epoch, and knows which steps are recorded.

    Args:
        world: the replicas of the network, this one alone or one of several.
        share: what this replica has of each batch; None for one replica.
        recorder: records steps over resident data; None runs every step eagerly.
        warn: called with a remark if a step cannot be recorded.
    """

    def __init__(
        self,
        world: World,
        share: Share | None,
        recorder: Recorder | None,
        warn: Callable[[str], None],
    ):
        self._world, self._share, self._recorder, self._warn = world, share, recorder, warn
        self._replayed: dict[tuple, ReplayedStep] = {}
        self._practised: Counter[str] = Counter()  # how often each kind of step was done

    def run(
        self,
        step: Step,
        loader,
        epoch: int,
        start: int = 0,
        before: Callable[[], None] = lambda: None,
    ) -> Iterator[DoneStep]:
        """Run `step` on each batch of an epoch, one after another.

        Args:
            loader: `batches(epoch, start)` yields (images, targets) on the device.
            start: the first step, from 0.
            before: called once a batch is there, ahead of its step and outside of a recording.

        Yields:
            What was done, after each step.
        """
        self._practise(step, 0)
        if self._recorder and loader.sampler.full_steps:
            # The last batch may be smaller, so another shape: it runs eagerly like all the others.
            yield from self._replay(step, loader, epoch, start, before)
            start = max(start, loader.sampler.full_steps)
        if start == len(loader.sampler):
            return
        since = time.perf_counter()
        for images, targets in loader.batches(epoch, start):
            counts = self._world.numbers(len(targets))
            self._begin(counts)
            ready = time.perf_counter()
            before()
            step(images, targets)
            yield DoneStep(sum(counts), ready - since, time.perf_counter() - since)
            self._practise(step, 1)
            since = time.perf_counter()

    def _replay(
        self, step: Step, loader, epoch: int, start: int, before: Callable[[], None]
    ) -> Iterator[DoneStep]:
        """The full batches of an epoch, which need not be told how many images they have."""
        sampler, since = loader.sampler, time.perf_counter()
        replayed = self._replay_of(step, loader)
        replayed.seek(epoch, start)  # its time is the first step's
        for _ in range(start, sampler.full_steps):
            self._begin([sampler.local_batch] * self._world.size)
            ready = time.perf_counter()
            before()
            replayed()
            yield DoneStep(sampler.global_batch, ready - since, time.perf_counter() - since)
            self._practise(step, 1)
            since = time.perf_counter()

    def _replay_of(self, step: Step, loader) -> ReplayedStep:
        key = (id(loader), step.__name__)
        if key not in self._replayed:
            self._replayed[key] = ReplayedStep(loader, step, self._recorder, self._stop_recording)
        return self._replayed[key]

    def _stop_recording(self, reason: str) -> None:
        # What failed once would leave more behind each time. Still by way of ReplayedStep: other
        # eager steps have one exchange more, which the other processes would not have.
        self._recorder = lambda work: work
        self._warn(f"a step cannot be recorded as a CUDA graph: {reason}; it runs eagerly")

    def _practise(self, step: Step, times: int) -> None:
        """Count steps: after the first few they take as long in every process."""
        self._practised[step.__name__] += times
        self._world.is_patient = self._practised[step.__name__] <= WARM_UP + 1

    def _begin(self, counts: list[int]) -> None:
        if self._share:
            self._share.set(counts)
