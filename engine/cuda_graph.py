"""A step over resident data, recorded once as a CUDA graph and replayed from then on.

A replay repeats the very same kernels on the very same memory without Python in between, which for
a small network is most of the time of a step. So whatever differs from step to step has to lie in
device memory: the place in the epoch is counted there, and the epoch's plan is copied there.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

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
        batches: with `plan`, `cut` and `deal`, as datasets.memory_loader.Batches.
        step: takes a batch; must keep all that changes from step to step on the device.
        recorder: `record`, or a stand-in for it.
        failed: called with the reason when recording fails; the steps then run eagerly.
    """

    def __init__(self, batches, step: Step, recorder: Recorder, failed: Callable[[str], None]):
        self._batches, self._step, self._recorder, self._failed = batches, step, recorder, failed
        device = batches.deal.indices.device
        self._places = torch.arange(batches.deal.width, device=device)
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
        self._first.fill_(self._batches.deal.places(step).start)

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
        images, targets = self._batches.cut(self._plan.at(self._first + self._places))
        self._step(images, targets)
        self._first += self._batches.deal.stride
