"""Measure the cases of `python -m tools.benchmark`: speed, memory and first step.

All cases train on one batch of random images, from the same weights, with the same optimizer. They
take turns in random order, so that a change of clock rate or load meets all of them alike.
"""

import concurrent.futures
import gc
import multiprocessing
import random
import re
import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import datasets.factory
import engine.device
import kernels.backend
import models.factory
import train
from cli.flag_types import Settings
from engine import cuda_graph, optimizer
from engine.precision import autocast
from experiment import console
from experiment.log import RunLog
from tools.benchmark import peers, results
from tools.benchmark.cases import COMPILED, Case

# Turns that count, warm-up turns before them, and steps of one turn: a GPU should not run dry.
TURNS, WARM_UP, BURST = {"cpu": 5, "cuda": 30}, {"cpu": 2, "cuda": 10}, {"cpu": 1, "cuda": 5}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
COPIES, COPY_BYTES = 5, {"cpu": 2**28, "cuda": 2**30}


def build(case: Case, opt: Settings, device: torch.device) -> nn.Module:
    """Build a case's network on the device, in training mode, with the weights of level 0.

    Raises:
        peers.Unsupported: its library does not have the network.
        UsageError: its kernels cannot be used here.
    """
    reference = models.factory.create(opt.replace(optMemory=0), opt.nClasses)
    if case.is_peer:
        network = peers.create(case.implementation, opt)
    else:
        _, level, *backend = case.implementation.split("-")
        kind = backend[0] if backend else "torch"
        ops, _ = kernels.backend.select(kind, device, case.main_precision)
        network = models.factory.create(opt.replace(optMemory=int(level)), opt.nClasses, ops)
    network.load_state_dict(reference.state_dict())  # strict: the same parameters, name by name
    return network.to(device, memory_format=MEMORY_FORMATS[case.memory_format]).train()


class Runner:
    """Train the network of a case: `run()` takes one step in the case's mode.

    A step is forward, cross-entropy, backward and the fused SGD update. `step_times` are seconds
    per step of the counted turns, `error` is what stopped it.
    """

    def __init__(self, case: Case, opt: Settings, device: torch.device):
        self.case, self.device, self.run = case, device, self.step
        self.step_times: list[float] = []
        self.error: str | None = None
        self.network = self._forward = build(case, opt, device)
        if case.mode in COMPILED:
            self._forward = torch.compile(self.network, dynamic=False, mode=COMPILED[case.mode])
        self._optimizer = optimizer.create(opt, self.network, opt.LR)
        generator = torch.Generator().manual_seed(opt.manualSeed)
        size = (opt.batchSize, 3, opt.imageSize, opt.imageSize)
        images = torch.randn(size, generator=generator)
        self.images = images.to(device, memory_format=MEMORY_FORMATS[case.memory_format])
        self.targets = torch.randint(opt.nClasses, size[:1], generator=generator).to(device)

    def loss(self) -> Tensor:
        """Compute the loss of the batch."""
        with autocast(self.device, self.case.main_precision):
            return F.cross_entropy(self._forward(self.images), self.targets)

    def step(self) -> Tensor:
        """Take one training step, eager or compiled, and return its loss."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def capture(self, pool: tuple[int, int] | None = None) -> None:
        """Make `run` replay the whole step as one CUDA graph.

        Args:
            pool: memory that graphs share: only the state of a network outlives a step, so they
                may be replayed in any order.
        """
        self.run = self.step  # frees an earlier graph
        for _ in range(cuda_graph.WARMUP_STEPS):
            self.step()
        self._optimizer.zero_grad(set_to_none=True)  # so that the graph owns the gradients
        self.run = cuda_graph.capture(self.step, pool)

    def held_bytes(self) -> int:
        """Count what a forward pass holds for backward, without parameters, buffers and batch."""
        existing = [*self.network.parameters(), *self.network.buffers(), self.images, self.targets]
        return held_bytes(self.loss, existing)


def set_up(
    case: Case, opt: Settings, device: torch.device, pool: tuple[int, int] | None
) -> tuple[Runner, dict[str, float]]:
    """Build a case, take its first step and measure its memory; return its runner and columns.

    `first_step_s` includes compiling and capturing, not building; code that an earlier case
    compiled is not compiled again.
    """
    _reset_peak(device)
    before = _cuda_mb(device, "current")
    runner = Runner(case, opt, device)
    start = _now(device)
    columns = {"first_loss": runner.step().item()}
    if case.mode == "graph":
        _reset_peak(device)
        runner.capture()  # in a pool of its own, whose size is measured
        runner.run()
    columns["first_step_s"] = _now(device) - start
    if case.mode != "graph":  # capturing has already reached the peak
        _reset_peak(device)
    if device.type == "cuda":
        for _ in range(2):
            runner.run()
        peak = _cuda_mb(device, "peak")
        columns |= {column: peak[column] - before[column] for column in peak}
    if case.mode == "graph":
        runner.capture(pool)
    if case.mode not in COMPILED:  # compiled code does not dispatch the operations to count
        columns["held_mb_per_image"] = runner.held_bytes() / 1e6 / opt.batchSize
    return runner, columns


def _cuda_mb(device: torch.device, which: str) -> dict[str, float]:
    """Return allocated and reserved MB, current or peak; nothing on the CPU."""
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    kinds = {"peak_mb": "allocated", "reserved_mb": "reserved"}
    return {name: stats.get(f"{kind}_bytes.all.{which}", 0) / 1e6 for name, kind in kinds.items()}


def _reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def held_bytes(forward: Callable[[], Tensor], existing: Iterable[Tensor]) -> int:
    """Count the bytes that a forward pass leaves allocated: autograd keeps them for backward.

    Each storage counts once and as a whole, however a network keeps it.

    Args:
        existing: tensors that do not count, such as parameters and the input.
    """
    excluded = {tensor.untyped_storage()._cdata for tensor in existing}
    with _StorageRecorder() as recorder:
        loss = forward()
    excluded.add(loss.untyped_storage()._cdata)
    gc.collect()
    alive = {storage._cdata: storage for ref in recorder.storages if (storage := ref())}
    return sum(storage.nbytes() for key, storage in alive.items() if key not in excluded)


class _StorageRecorder(TorchDispatchMode):
    """Record the storage of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[weakref.ref] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
        self.storages += [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
        return outputs


def peak_rss_mb(case: Case, opt: Settings) -> float:
    """Measure the peak resident memory of a new process that trains one case on the CPU."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as process:
        return process.submit(_peak_of_steps, case, opt, torch.get_num_threads()).result()


def _peak_of_steps(case: Case, opt: Settings, threads: int) -> float:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    engine.device.configure(opt.cudnn, opt.tf32)
    runner = Runner(case, opt, device)
    for _ in range(3):  # the allocator keeps freed memory, which the second step finds fragmented
        runner.run()
    # Not ru_maxrss: there a new process inherits the peak of the process that started it.
    status = Path("/proc/self/status")
    peak_kb = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else "")
    return int(peak_kb[1]) * 1024 / 1e6 if peak_kb else engine.device.peak_memory_mb(device)


def _now(device: torch.device) -> float:
    """Read the clock once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Time one call, averaged over some in a row."""
    start = _now(device)
    for _ in range(repeats):
        run()
    return (_now(device) - start) / repeats


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second that a large copy reads and writes together."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)  # allocates its pages
    times = [seconds(lambda: target.copy_(source), device, COPIES) for _ in range(COPIES)]
    return 2 * source.nbytes / statistics.median(times)


def time_interleaved(runners: list[Runner], warm_up: int, turns: int) -> None:
    """Time runners in turns of random order; one that fails takes no more turns."""
    order, rng = list(runners), random.Random(0)
    for turn in range(warm_up + turns):
        rng.shuffle(order)
        for runner in [runner for runner in order if not runner.error]:
            try:
                step_s = seconds(runner.run, runner.device, BURST[runner.device.type])
            except Exception as error:  # most likely out of memory: measure the others
                runner.error = error_summary(error)
                continue
            if turn >= warm_up:
                runner.step_times.append(step_s)


def time_beside_trainer(
    bare: Runner, opt: Settings, warm_up: int, turns: int
) -> list[tuple[float, float]]:
    """Time a runner and main.py's trainer with the same network in alternating turns.

    The trainer also loads and augments images, sets learning rates, sums metrics and checks that
    they are finite.

    Returns:
        Seconds per step of (runner, trainer) in each counted turn.
    """
    device, burst = bare.device, BURST[bare.device.type]
    num_images = opt.batchSize * burst * (warm_up + turns)
    opt = opt.replace(precision=bare.case.main_precision, nImages=num_images)
    data = datasets.factory.create(opt, device, console.warn)
    trainer = train.Trainer(opt, build(bare.case, opt, device), device, RunLog(None))
    times: list[tuple[float, float]] = []
    steps, start = 0, _now(device)

    def after_step() -> None:
        nonlocal steps, start
        steps += 1
        if steps % burst == 0:
            trainer_s = (_now(device) - start) / burst
            times.append((seconds(bare.run, device, burst), trainer_s))
            start = _now(device)

    trainer.train(data.train, after_step)
    return times[warm_up:]


def trainer_row(bare: Runner, opt: Settings, warm_up: int, turns: int) -> dict[str, object]:
    """Measure main.py's trainer beside a runner: its row, with the ratio of speeds in the note."""
    level = bare.case.implementation
    row = bare.case.columns | {"who": f"trainer-{level.removeprefix('level-')}"}
    try:
        times = time_beside_trainer(bare, opt, warm_up, turns)
    except Exception as error:  # keep the other rows
        return row | {"note": error_summary(error)}
    ratio = statistics.median(bare_s / trainer_s for bare_s, trainer_s in times)
    note = f"{ratio:.3f} of the speed of {level} in turns with it, median of {turns} pairs"
    return row | speed_columns(opt, [trainer_s for _, trainer_s in times]) | {"note": note}


def speed_columns(opt: Settings, step_times: list[float]) -> dict[str, float]:
    """Return median and quartiles of the images/s of some turns by column."""
    speeds = [opt.batchSize / step_s for step_s in step_times]
    q1, median, q3 = statistics.quantiles(speeds, n=4, method="inclusive")
    return {"images_per_s": median, "images_per_s_q1": q1, "images_per_s_q3": q3,
            "turns": len(speeds)}  # fmt: skip


def error_summary(error: Exception) -> str:
    """Return the first line of an error, shortened for a table."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 160 else line[:157] + "..."


def measure_group(
    cases: list[Case],
    opt: Settings,
    options: SimpleNamespace,
    device: torch.device,
    report: Callable[[str], None],
) -> list[dict]:
    """Measure cases of one precision and return their rows, trainers last.

    Args:
        options: the tool's flags turns, warmUp, rss and trainer.
        report: called with lines about the progress.
    """
    turns = options.turns or TURNS[device.type]
    warm_up = WARM_UP[device.type] if options.warmUp is None else options.warmUp
    torch.compiler.reset()  # so that code of another precision does not count as recompilation
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    rows, runners = {case: case.columns for case in cases}, []

    # Set up every case: first step and memory.
    for case in cases:
        try:
            runner, columns = set_up(case, opt, device, pool)
            if options.rss and device.type == "cpu":
                columns["peak_rss_mb"] = peak_rss_mb(case, opt)
        except Exception as error:  # measure the others
            rows[case]["note"] = error_summary(error)
            report(f"{case.name}: {results.NOT_RUN}, {error_summary(error)}")
            continue
        runners.append(runner)
        rows[case] |= columns
        report(f"{case.name}: first step {columns['first_step_s']:.1f} s")

    # Time those that can run, in turns.
    report(f"{len(runners)} cases take {warm_up} + {turns} turns")
    time_interleaved(runners, warm_up, turns)
    for runner in runners:
        rows[runner.case] |= (
            {"note": runner.error} if runner.error else speed_columns(opt, runner.step_times)
        )
    trainers = [
        trainer_row(runner, opt, warm_up, turns)
        for runner in runners
        if options.trainer and runner.case.trains_as_main and not runner.error
    ]
    return [*rows.values(), *trainers]
