"""Measure the cases of `python -m tools.benchmark`: speed, memory and first step.

All cases train on one batch of random images, from the same weights, with the same optimizer.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import datasets.factory
import engine.device
import models.factory
import train
from cli.flag_types import Settings
from engine import cuda_graph, optimizer
from engine.backend_choice import select_backend
from engine.memory import MemoryTracker
from engine.precision import autocast
from experiment import console
from experiment.log import RunLog
from tools.benchmark import peers, results
from tools.benchmark.cases import COMPILED, PEERS, Case
from tools.benchmark.turns import error_as_note, quartile_columns, report, take_turns

# Turns that count, warm-up turns before them, and steps of one turn: a GPU should not run dry.
TURNS, WARM_UP, BURST = {"cpu": 5, "cuda": 30}, {"cpu": 2, "cuda": 10}, {"cpu": 1, "cuda": 5}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
COPIES, COPY_BYTES = 5, {"cpu": 2**28, "cuda": 2**30}
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}  # of an element of a feature map


def build(case: Case, opt: Settings, device: torch.device) -> nn.Module:
    """Build a case's network on the device, in training mode, with the weights of level 0.

    Raises:
        NotImplementedError: its library does not have the network.
        UsageError: its kernels cannot be used here.
    """
    reference = models.factory.create(opt.replace(optMemory=0), opt.nClasses)
    if case.implementation in PEERS:
        network = peers.create(case.implementation, opt)
    else:
        level, _, backend = case.implementation.removeprefix("level-").partition("-")
        opt = opt.replace(optMemory=int(level), precision=case.main_precision)
        ops, _ = select_backend(opt.replace(kernels=backend or "torch"), device)
        network = models.factory.create(opt, opt.nClasses, ops)
    network.load_state_dict(reference.state_dict())  # strict: the same parameters, name by name
    return network.to(device, memory_format=MEMORY_FORMATS[case.memory_format]).train()


class Runner:
    """Train the network of a case: after `build`, `run()` takes one step in the case's mode.

    A step is forward, cross-entropy, backward and the fused SGD update. `row` holds the columns of
    the case, with a note once an error has stopped it; `turns` are the seconds per step of the
    counted turns.
    """

    def __init__(self, case: Case, opt: Settings, device: torch.device):
        self.case, self.opt, self.device, self.run = case, opt, device, self.step
        self.row: dict[str, object] = case.as_row()
        self.turns: list[float] = []

    def build(self) -> "Runner":
        """Create network, optimizer and batch; raises what `build` raises."""
        case, opt, device = self.case, self.opt, self.device
        self.network = self._forward = build(case, opt, device)
        if case.mode in COMPILED:
            self._forward = torch.compile(self.network, dynamic=False, mode=COMPILED[case.mode])
        self._optimizer = optimizer.create(opt, self.network, opt.LR)
        generator = torch.Generator().manual_seed(opt.manualSeed)
        size = (opt.batchSize, opt.nChannels, opt.imageSize, opt.imageSize)
        images = torch.randn(size, generator=generator)
        self._images = images.to(device, memory_format=MEMORY_FORMATS[case.memory_format])
        self._targets = torch.randint(opt.nClasses, size[:1], generator=generator).to(device)
        return self

    def loss(self) -> Tensor:
        """Compute the loss of the batch."""
        with autocast(self.device, self.case.main_precision):
            return F.cross_entropy(self._forward(self._images), self._targets)

    def step(self) -> Tensor:
        """Take one training step, eager or compiled, and return its loss."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def capture(self, pool: tuple[int, int] | None = None) -> None:
        """Make `run` replay the whole step as one CUDA graph in the memory `pool`.

        Graphs may share a pool: only the state of a network outlives a step.
        """
        self.run = self.step  # frees an earlier graph
        for _ in range(cuda_graph.WARMUP_STEPS):
            self.step()
        self._optimizer.zero_grad(set_to_none=True)  # so that the graph owns the gradients
        self.run = cuda_graph.capture(self.step, pool)

    def take_turn(self) -> float:
        """Take the steps of one turn, and return the seconds of each."""
        return seconds(self.run, self.device, BURST[self.device.type])

    def first_steps(self, pool: tuple[int, int] | None) -> None:
        """Build the network, take its first steps and measure their memory.

        `first_step_s` includes compiling and capturing, not building; code that an earlier case
        compiled is not compiled again.
        """
        device, is_graph = self.device, self.case.mode == "graph"
        allocated, reserved = _reset_peak_bytes(device)
        self.build()
        start = _now(device)
        self.row["first_loss"] = self.step().item()
        if is_graph:
            _reset_peak_bytes(device)
            self.capture()  # in a pool of its own, whose size is measured
            self.run()
        self.row["first_step_s"] = _now(device) - start
        if not is_graph:  # capturing has already reached the peak
            _reset_peak_bytes(device)
        if device.type == "cuda":
            for _ in range(2):
                self.run()
            self.row["peak_mb"] = (torch.cuda.max_memory_allocated(device) - allocated) / 1e6
            self.row["reserved_mb"] = (torch.cuda.max_memory_reserved(device) - reserved) / 1e6
        if is_graph:
            self.capture(pool)
        if self.case.mode not in COMPILED:  # compiled code does not dispatch what is counted
            existing = [*self.network.parameters(), *self.network.buffers()]
            held = held_bytes(self.loss, [*existing, self._images, self._targets])
            self.row["held_mb_per_image"] = held / 1e6 / self.opt.batchSize


def held_bytes(forward: Callable[[], Tensor], existing: Iterable[Tensor]) -> int:
    """Count the bytes that a forward pass leaves allocated: autograd keeps them for backward.

    Each storage counts once and as a whole; those of `existing` tensors do not count.
    """
    with MemoryTracker(torch.device("cuda")) as tracker:  # on either device: without im2col
        loss = forward()
    excluded = {tensor.untyped_storage()._cdata for tensor in (*existing, loss)}
    gc.collect()
    return sum(ref().nbytes() for key, ref in tracker.alive.items() if key not in excluded)


def _reset_peak_bytes(device: torch.device) -> tuple[int, int]:
    """Forget the peak of a GPU's memory; return what is allocated and reserved now."""
    gc.collect()
    if device.type != "cuda":
        return 0, 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


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


def time_beside_trainer(bare: Runner, warm_up: int, turns: int) -> dict[str, object]:
    """Time main.py's trainer in alternating turns with a runner of the same network.

    The trainer also loads and augments images, sets learning rates, sums metrics and checks that
    they are finite. Return its speeds by column, and in the note the ratio to the runner's.
    """
    device, burst = bare.device, BURST[bare.device.type]
    num_images = bare.opt.batchSize * burst * (warm_up + turns)
    opt = bare.opt.replace(precision=bare.case.main_precision, nImages=num_images)
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
    ratio = statistics.median(bare_s / trainer_s for bare_s, trainer_s in times[warm_up:])
    name = bare.case.implementation
    note = f"{ratio:.3f} of the speed of {name} in turns with it, median of {turns} pairs"
    trainer_times = [trainer_s for _, trainer_s in times[warm_up:]]
    return speed_columns(opt.batchSize, trainer_times) | {"note": note}


def speed_columns(batch_size: int, step_times: list[float]) -> dict[str, object]:
    """Return median and quartiles of the images/s of some turns by column."""
    speeds = [batch_size / step_s for step_s in step_times]
    return quartile_columns("images_per_s", speeds) | {"turns": len(speeds)}


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second that a large copy reads and writes together."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)  # allocates its pages
    times = [seconds(lambda: target.copy_(source), device, COPIES) for _ in range(COPIES)]
    return 2 * source.nbytes / statistics.median(times)


def measure(
    cases: list[Case], options: SimpleNamespace, opt: Settings, device: torch.device
) -> Iterator[list[dict]]:
    """Measure the cases, as the tool's flags say; yield the rows of each precision."""
    turns = options.turns or TURNS[device.type]
    warm_up = WARM_UP[device.type] if options.warmUp is None else options.warmUp
    bandwidth = copy_bandwidth(device)
    report(f"a large copy moves {bandwidth / 1e9:.1f} GB/s")
    for precision, group in itertools.groupby(cases, key=lambda case: case.precision):
        engine.device.configure(opt.cudnn, tf32=precision == "tf32")
        torch.compiler.reset()  # so that code of another precision counts as no recompilation
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        rows, runners = [], []
        for case in group:
            runner = Runner(case, opt, device)  # frees one before that has failed
            rows.append(runner.row)
            with error_as_note(runner.row):
                runner.first_steps(pool)
                runners.append(runner)
                report(f"{runner.case.name}: first step {runner.row['first_step_s']:.1f} s")
        report(f"{len(runners)} cases take {warm_up} + {turns} turns")
        take_turns(runners, warm_up, turns)

        for runner in [runner for runner in runners if "note" not in runner.row]:
            runner.row |= speed_columns(opt.batchSize, runner.turns)
            if options.trainer and runner.case.trains_as_main:
                name = runner.case.implementation.replace("level", "trainer")
                rows.append(runner.case._replace(implementation=name).as_row())
                with error_as_note(rows[-1]):
                    rows[-1] |= time_beside_trainer(runner, warm_up, turns)
        bound = bandwidth / (results.block_traffic(opt) * BYTES[precision])
        for row in rows:
            row |= {"copy_gb_per_s": bandwidth / 1e9, "bound_images_per_s": bound}
            if "images_per_s" in row:
                row["fraction_of_bound"] = row["images_per_s"] / bound
        results.add_ratios(rows)
        yield rows
