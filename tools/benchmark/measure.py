"""The cases of `python -m tools.benchmark` and what is measured about each.

A case is a network in one precision, memory format and mode. All train on the same batch
from the same weights, with the same optimizer. Beside one of them main.py's trainer can train the
same network, to see what it costs to load, augment and keep account.
"""

import concurrent.futures
import dataclasses
import gc
import multiprocessing
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

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
from tools.benchmark import peers

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
COMPILED = {"compiled": "default", "compiled-reduce-overhead": "reduce-overhead"}
BURST = {"cpu": 1, "cuda": 5}  # steps of a case in one turn: a GPU should not run dry
COPIES, COPY_BYTES = 10, {"cpu": 2**28, "cuda": 2**30}


@dataclass(frozen=True)
class Case:
    """An implementation, and how it trains.

    Args:
        implementation: level-0, level-1, level-N-BACKEND, or a member of `peers.PEERS`.
        precision: fp32, tf32 or bf16 (autocast).
        memory_format: of images and weights, a key of `FORMATS`.
        mode: eager, graph (the whole step in one CUDA graph) or a key of `COMPILED`.
    """

    implementation: str
    precision: str
    memory_format: str
    mode: str

    @property
    def name(self) -> str:
        """What `--only` is matched with."""
        return "/".join((self.implementation, self.precision, self.memory_format, self.mode))

    @property
    def columns(self) -> dict[str, str]:
        """The columns of a row that name it; `who` is the file format's word."""
        fields = dataclasses.asdict(self)
        return {"who": fields.pop("implementation")} | fields

    @property
    def setting(self) -> str:
        """Its `--precision`; TensorFloat-32 is a setting of the whole process."""
        return "bf16" if self.precision == "bf16" else "single"

    @property
    def is_peer(self) -> bool:
        """Whether this is another implementation."""
        return self.implementation in peers.PEERS


def all_cases(precision: str, on_cuda: bool, backends: list[str]) -> list[Case]:
    """Everybody who could take part in one precision.

    Args:
        backends: what runs levels 2 to 4: torch, triton.
    """
    ours = ["level-0", "level-1"]
    ours += [f"level-{level}-{backend}" for level in (2, 3, 4) for backend in backends]
    pairs = [(who, mode) for who in ours for mode in (["eager", "graph"] if on_cuda else ["eager"])]
    pairs += [(who, "eager") for who in peers.PEERS]
    pairs += [("torchvision", mode) for mode in (COMPILED if on_cuda else ["compiled"])]
    return [
        Case(who, precision, memory_format, mode)
        for who, mode in pairs
        for memory_format in FORMATS
    ]


def build(case: Case, opt: Settings, num_classes: int, device) -> nn.Module:
    """The case's network on the device, in training, with the weights of level 0.

    Raises:
        peers.Unsupported: it cannot take part.
        UsageError: its kernels cannot be used here.
    """
    reference = models.factory.create(opt.replace(optMemory=0), num_classes)
    if case.is_peer:
        network = peers.create(case.implementation, opt, num_classes)
    else:
        _, level, *backend = case.implementation.split("-")
        kind = backend[0] if backend else "torch"
        ops = kernels.backend.select(kind, device, case.setting)[0]
        network = models.factory.create(opt.replace(optMemory=int(level)), num_classes, ops)
    network.load_state_dict(reference.state_dict())  # strict: the same parameters, name by name
    return network.to(device, memory_format=FORMATS[case.memory_format]).train()


class Runner:
    """A case ready to step; `run()` is one training step in its mode.

    A step is forward, cross-entropy, backward and the fused SGD update. Input: random images and
    targets that every case has a copy of.
    """

    def __init__(self, case: Case, opt: Settings, num_classes: int, device: torch.device):
        self.case, self.device = case, device
        self.network = build(case, opt, num_classes, device)
        self._forward = self.network
        if case.mode in COMPILED:
            mode = COMPILED[case.mode]
            self._forward = torch.compile(self.network, dynamic=False, mode=mode)
        self._optimizer = optimizer.create(opt, self.network, opt.LR)
        generator = torch.Generator().manual_seed(opt.manualSeed)
        size = (opt.batchSize, 3, opt.imageSize, opt.imageSize)
        images = torch.randn(size, generator=generator)
        self.images = images.to(device, memory_format=FORMATS[case.memory_format])
        self.targets = torch.randint(num_classes, size[:1], generator=generator).to(device)
        self.run: Callable[[], object] = self.step

    def loss(self) -> Tensor:
        """Forward and cross-entropy."""
        with autocast(self.device, self.case.setting):
            return F.cross_entropy(self._forward(self.images), self.targets)

    def step(self) -> Tensor:
        """One training step, eager or compiled; its loss."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def held_bytes(self) -> int:
        """What one forward pass keeps for backward, without parameters, buffers and the batch."""
        there = [*self.network.parameters(), *self.network.buffers(), self.images, self.targets]
        count = packed_bytes if self.case.mode.startswith("compiled") else held_bytes
        return count(self.loss, there)

    def capture(self, pool: tuple[int, int] | None = None) -> None:
        """Make `run` replay the whole step as one CUDA graph.

        Args:
            pool: memory that graphs share; nothing but the state of a network outlives a step,
                so they may be replayed in any order.
        """
        self.run = self.step  # lets go of an earlier graph
        for _ in range(cuda_graph.WARMUP_STEPS):
            self.step()
        self._optimizer.zero_grad(set_to_none=True)  # so that the gradients are the graph's own
        self.run = cuda_graph.capture(self.step, pool)


def set_up(
    case: Case,
    opt: Settings,
    num_classes: int,
    device: torch.device,
    pool: tuple[int, int] | None,
) -> tuple[Runner, dict[str, float]]:
    """Build a case, take its first step and measure its memory: the runner and the facts.

    `first_step_s` starts with the network on the device and includes compiling and capturing;
    what an earlier case compiled is found compiled.
    """
    _clear(device)
    before = _allocated(device)
    runner = Runner(case, opt, num_classes, device)
    _wait(device)
    start = time.perf_counter()
    loss = runner.step().item()
    if case.mode == "graph":
        _clear(device)
        runner.capture()  # in memory of its own, to see how much that is
        runner.run()
        _wait(device)
    first_step_s = time.perf_counter() - start
    facts = {"first_step_s": first_step_s, "first_loss": loss} | _peaks(runner, before)
    if case.mode == "graph":
        runner.capture(pool)
    # The graphs of the latter forbid a forward without backward.
    if case.mode != "compiled-reduce-overhead":
        facts["held_mb_per_image"] = runner.held_bytes() / 1e6 / opt.batchSize
    return runner, facts


def _allocated(device: torch.device) -> tuple[int, int]:
    """Bytes allocated and reserved now, as (0, 0) on the CPU."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


def _peaks(runner: Runner, before: tuple[int, int]) -> dict[str, float]:
    """Peak of the CUDA allocator in the steps of one case, without what was there before.

    A graph that was captured just now has made its peak already, and has cleared before.
    """
    device = runner.device
    if device.type != "cuda":
        return {}
    if runner.case.mode != "graph":
        _clear(device)
    for _ in range(2):
        runner.run()
    _wait(device)
    peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    names = ("peak_mb", "reserved_mb")
    return {name: (peak - own) / 1e6 for name, peak, own in zip(names, peaks, before, strict=True)}


def _clear(device: torch.device) -> None:
    """Give back what nobody uses and begin to look for a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held_bytes(forward: Callable[[], Tensor], leave_out: Iterable[Tensor]) -> int:
    """Bytes that live on after a forward pass, each storage counted once and as a whole.

    They live because autograd keeps them for backward, in whatever way.

    Args:
        leave_out: tensors that exist anyway, such as parameters and the input.
    """
    there = {tensor.untyped_storage()._cdata for tensor in leave_out}
    seen = _Storages()
    with seen:
        loss = forward()
    there.add(loss.untyped_storage()._cdata)
    gc.collect()
    alive = filter(None, (storage() for storage in seen.storages))
    total = sum({each._cdata: each.nbytes() for each in alive if each._cdata not in there}.values())
    del loss
    return total


class _Storages(TorchDispatchMode):
    """Notes the memory that every operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[weakref.ref] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                self.storages.append(weakref.ref(leaf.untyped_storage()))
        return results


def packed_bytes(forward: Callable[[], Tensor], leave_out: Iterable[Tensor]) -> int:
    """The same for a compiled network, which would not run compiled while its operations are noted.

    It counts what autograd packs up, and misses what a network packs up in a way of its own.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would refer to the graph that it is kept in

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()  # keeps what it holds alive, so that no address is used twice
    total = sum(held.values())
    del loss
    return total


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Time of one call, averaged over some in a row; by events on the device where it is CUDA."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def time_interleaved(
    runners: list[Runner], warm_up: int, turns: int
) -> tuple[dict[Case, list[float]], dict[Case, str]]:
    """Seconds per step of each case, all turns in random order; and why some dropped out."""
    order, chance = list(runners), random.Random(0)
    times: dict[Case, list[float]] = {runner.case: [] for runner in runners}
    failures: dict[Case, str] = {}
    for turn in range(warm_up + turns):
        chance.shuffle(order)
        for runner in list(order):
            try:
                taken = seconds(runner.run, runner.device, BURST[runner.device.type])
            except Exception as error:  # out of memory, most likely: the others go on
                failures[runner.case] = error_summary(error)
                order.remove(runner)
                continue
            if turn >= warm_up:
                times[runner.case].append(taken)
    return times, failures


def beside_the_trainer(
    bare: Runner, opt: Settings, num_classes: int, warm_up: int, turns: int
) -> list[tuple[float, float]]:
    """Seconds of a step of a case and of the trainer with the same network, by turns.

    Both take a turn after each other, so that what drifts meets both. The case does forward,
    loss, backward and update of one batch; the trainer also loads and augments synthetic images,
    follows the schedule, adds up its sums and looks whether they are finite.
    """
    device, burst = bare.device, BURST[bare.device.type]
    opt = opt.replace(
        precision=bare.case.setting,
        nImages=opt.batchSize * burst * (warm_up + turns),
        nClasses=num_classes,
    )
    data = datasets.factory.create(opt, device, console.warn)
    network = build(bare.case, opt, num_classes, device)
    trainer = train.create_trainer(opt, network, device, RunLog(None))

    def clock() -> float:
        _wait(device)
        return time.perf_counter()

    def after_step() -> None:
        nonlocal steps, since
        steps += 1
        if steps % burst:
            return
        begin = clock()
        for _ in range(burst):
            bare.run()
        end = clock()
        times.append(((end - begin) / burst, (begin - since) / burst))
        since = clock()

    times: list[tuple[float, float]] = []
    steps, since = 0, clock()
    trainer.train(data.train, after_step)
    return times[warm_up:]


def error_summary(error: Exception) -> str:
    """The first line of an error, for a table."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= 160 else line[:157] + "..."


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes, together."""
    size = COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)  # with its pages in place
    times = [seconds(lambda: target.copy_(source), device) for _ in range(COPIES)]
    return 2 * size / statistics.median(times)


def peak_rss_mb(case: Case, opt: Settings, num_classes: int) -> float:
    """Peak resident memory of a fresh process that builds a case and takes one step (CPU)."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as process:
        threads = torch.get_num_threads()
        return process.submit(_peak_of_steps, case, opt, num_classes, threads).result()


def _peak_of_steps(case: Case, opt: Settings, num_classes: int, threads: int) -> float:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    engine.device.configure(opt.cudnn, opt.tf32)
    runner = Runner(case, opt, num_classes, device)
    for _ in range(3):  # freed memory is kept, and the second step finds it in pieces
        runner.run()
    # Not ru_maxrss: a new process inherits the peak of the one that started it there.
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return engine.device.peak_memory_mb(device)
