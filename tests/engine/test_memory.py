"""Test that engine/memory.py predicts the memory that the allocator counts in a real run."""

from functools import cache

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import engine.memory
import models.factory
import opts
import train
from datasets import colour
from datasets.pipelines import LargeImages
from engine.memory import TOLERANCE, MemoryEstimate, MemoryTracker, memory_errors
from engine.precision import PRECISIONS
from errors import OutOfMemoryError
from experiment.log import RunLog
from helpers.sample_data import create_data
from kernels import cpu, reference
from kernels.backend import REFERENCE, Backend

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NUM_CLASSES = 10
SMALL = "--depth 10 --growthRate 8 --imageSize 8 --batchSize 4"
NETWORKS = {
    "bottleneck": "--depth 16 --imageSize 32 --batchSize 16",
    "basic": "--depth 10 --bottleneck false --reduction 1 --imageSize 16 --batchSize 16",
    "dropout": "--depth 16 --dropRate 0.2 --momentum 0 --imageSize 24 --batchSize 16",
    "ImageNet": "--d1 1 --d2 2 --d3 1 --d4 1 --imageSize 96 --batchSize 4",
    "preresnet": "--netType preresnet --depth 18 --imageSize 96 --batchSize 2",
    "fractalnet": "--netType fractalnet --depth 11 --widen 0.25 --batchSize 8",
    "resnet": "--netType resnet --depth 14 --batchSize 16",
    "dsn": "--netType dsn --widen 0.5 --batchSize 8",
    "tiles": "--depth 10 --growthRate 24 --imageSize 64 --batchSize 12",
}


def settings(flags: str, level: int | str = 2, precision: str = "single"):
    text = f"--dataset synthetic --nGPU 0 --optMemory {level} --precision {precision} {flags}"
    return opts.parse(text.split())


def estimate(
    flags: str,
    level: int | str = 2,
    precision: str = "single",
    device: torch.device = CPU,
    ops: Backend = REFERENCE,
) -> MemoryEstimate:
    return MemoryEstimate(settings(flags, level, precision), NUM_CLASSES, device, ops)


@cache
def measured(network: str, level: int, precision: str, replicas: int = 1) -> int:
    """Return the peak bytes of PyTorch's allocator while a network was made, trained and tested.

    Args:
        replicas: train on so small a part of a batch.
    """
    opt = settings(NETWORKS[network], level, precision)
    share = opt.batchSize // replicas
    part = create_data(opt.replace(batchSize=share, nImages=2 * share))
    whole = create_data(opt.replace(nImages=5 * opt.batchSize))  # a fifth of them for the test
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        trainer = train.Trainer(opt, models.factory.create(opt, NUM_CLASSES), CPU, RunLog(None))
        trainer.train(part.train, lambda: None)
        trainer.evaluate(whole.val, lambda: None)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# Prediction and measurement:
@pytest.mark.parametrize(
    ("network", "level", "precision"),
    [
        *(("bottleneck", level, "single") for level in range(5)),
        ("basic", 4, "bf16"),
        ("basic", 0, "half"),
        ("dropout", 1, "double"),
        ("ImageNet", 3, "single"),
        ("tiles", 2, "single"),
        ("preresnet", 2, "double"),
        ("fractalnet", 2, "single"),
        ("resnet", 2, "single"),
        ("dsn", 2, "single"),
    ],
)
def test_prediction_is_within_15_per_cent_of_the_peak(network, level, precision):
    predicted = estimate(NETWORKS[network], level, precision).peak_bytes()
    peak = measured(network, level, precision)
    assert predicted / TOLERANCE <= peak <= predicted * TOLERANCE


def test_another_level_or_batch_is_not_within_15_per_cent():
    peak = measured("bottleneck", 2, "single")
    estimates = estimate(NETWORKS["bottleneck"], 2)
    for other in (estimates.peak_bytes(level=0), estimates.peak_bytes(batch=32)):
        assert not peak / TOLERANCE <= other <= peak * TOLERANCE


def test_weights_momentum_and_gradients_are_counted():
    # A step on one tiny image: three times the weights, and little else.
    flags = "--depth 10 --growthRate 96 --imageSize 8 --batchSize 1"
    model = models.factory.create(settings(flags), NUM_CLASSES)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    predicted = estimate(flags).peak_bytes()
    assert 3 * weights < predicted < 3.5 * weights
    without = estimate(f"{flags} --momentum 0").peak_bytes()
    assert predicted - without == pytest.approx(weights, rel=0.05)


@pytest.mark.parametrize(
    ("network", "dropping"),
    [("fractalnet", "--dropPath 0.15"), ("resnet", "--stochasticDepth 0.5")],
)
def test_what_may_be_dropped_is_counted(network, dropping):
    flags = NETWORKS[network]
    peaks = {estimate(f"{flags} {dropping}").peak_bytes() for _ in range(3)}
    assert peaks == {estimate(flags).peak_bytes()} != {estimate(flags).peak_bytes(batch=7)}


def test_the_companions_of_dsn_are_counted():
    flags = NETWORKS["dsn"].replace("dsn", "{}") + " --loss crossEntropy"
    with_companions, without = (
        estimate(flags.format(n)).peak_bytes(batch=1) for n in ("dsn", "nin")
    )
    model = models.factory.create(settings(NETWORKS["dsn"]), NUM_CLASSES)
    companions = 4 * sum(parameter.numel() for parameter in model.companions.parameters())
    assert with_companions - without == pytest.approx(3 * companions, rel=0.1)  # as above


def shared(flags: str, replicas: int, level: int = 2) -> MemoryEstimate:
    """Estimate the memory of each of several processes."""
    opt = settings(flags, level).replace(replicas=replicas)
    return MemoryEstimate(opt, NUM_CLASSES, CPU, REFERENCE)


def test_each_of_several_processes_trains_on_its_part_of_the_batch():
    whole = estimate(NETWORKS["bottleneck"], level=0)
    before = reference._tiles
    part = shared(NETWORKS["bottleneck"], 2, level=0).peak_bytes()
    assert part == whole.peak_bytes(batch=8) < whole.peak_bytes()
    assert reference._tiles is before


def test_each_of_many_processes_evaluates_whole_batches_which_may_need_more():
    peak = measured("bottleneck", 2, "single", replicas=8)
    predicted = shared(NETWORKS["bottleneck"], 8).peak_bytes()
    assert predicted / TOLERANCE <= peak <= predicted * TOLERANCE
    training = estimate(NETWORKS["bottleneck"])
    assert training.peak_bytes(batch=2) * TOLERANCE < peak < training.peak_bytes() / TOLERANCE


@pytest.mark.parametrize("precision", ["single", "double", "bf16"])
def test_a_captured_step_over_files_leaves_the_loader_memory_of_its_own(precision, monkeypatch):
    flags = "--dataset folder --imageSize 72 --d1 1 --d2 1 --d3 1 --d4 1 --growthRate 4"
    text = f"{flags} --batchSize 8 --nGPU 0 --precision {precision}"

    def peak(more: str, device: torch.device = GPU) -> int:
        opt = opts.parse(f"{text} {more}".split())
        return MemoryEstimate(opt, NUM_CLASSES, device, REFERENCE).peak_bytes()

    eager = peak("--cudaGraph false")
    reserved = peak("") - eager
    assert peak("", CPU) == peak("--cudaGraph false", CPU)
    # Finish a batch as on a GPU: in one part. Half of the images are mirrored.
    monkeypatch.setattr(colour, "PART_VALUES", 2**40)
    dtype = PRECISIONS[precision].dtype
    pipeline = LargeImages(72, "antialias", ([120.0] * 3, [60.0] * 3), CPU, dtype, seed=1)
    draws = torch.rand(8, 64, dtype=torch.float64)
    pixels = torch.zeros(8, 72, 72, 3, dtype=torch.uint8)
    with MemoryTracker(CPU) as tracker:
        pipeline.finish([(pixels.clone(), draws)], CPU)
    assert tracker.peak == pytest.approx(reserved, rel=0.15)


# On a GPU, unseen:
def test_on_a_gpu_a_batch_is_one_tile():
    flags = "--depth 10 --growthRate 24 --imageSize 64 --batchSize 24"
    on_gpu, on_cpu = (estimate(flags, 3, device=device).peak_bytes() for device in (GPU, CPU))
    # What backward of the widest layer holds besides the buffers: 96 channels of each pixel.
    one_tensor = 24 * 64 * 64 * 96 * 4
    buffers_of_block = 2 * 24 * 64 * 64 * (72 + 96) * 4
    assert on_gpu > buffers_of_block + one_tensor
    assert on_gpu != on_cpu


@pytest.mark.parametrize(
    ("config", "mib"), [(None, 32), (":4096:8", 32), (":16:8", 1 / 8), (":4096:2:16:8", 8 + 1 / 8)]
)
def test_the_workspace_that_the_environment_gives_cublas_is_counted(monkeypatch, config, mib):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if config:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)
    assert engine.memory.workspace_bytes(torch.device("cuda")) == 2 * mib * 2**20


def test_what_the_cpu_computes_in_does_not_change_what_a_gpu_needs(monkeypatch):
    flags = SMALL

    def peaks(has_bf16: bool) -> list[int]:
        monkeypatch.setattr(cpu, "computes_in", lambda dtype: has_bf16)
        return [estimate(flags, 2, "bf16", device=device).peak_bytes() for device in (GPU, CPU)]

    (on_gpu, on_cpu), (on_gpu_2, on_cpu_2) = peaks(True), peaks(False)
    assert on_gpu == on_gpu_2 and on_cpu < on_cpu_2


@pytest.mark.parametrize(("precision", "size"), [("single", 4), ("bf16", 2)])
def test_triton_needs_little_besides_the_buffers(precision, size):
    module = pytest.importorskip("kernels.triton_ops", reason="Triton is not installed")
    flags = "--depth 16 --batchSize 64"
    fused = estimate(flags, 2, precision, GPU, Backend.from_module(module))
    peaks = {level: fused.peak_bytes(level) for level in (2, 3)}
    # The buffer of the first block and its gradient; the bottleneck maps of a layer, their gradient
    # and what the ReLU makes of them; for each of 64 * 32 * 32 pixels.
    least = 64 * 32 * 32 * size * (2 * 48 + 3 * 48)
    assert least < peaks[3] < 1.4 * least < estimate(flags, 3, precision, GPU).peak_bytes()
    assert peaks[3] < peaks[2]


# What to change:
class LinearEstimate(MemoryEstimate):
    """Estimate 10 MB, and so many MB per image: numbers that are easy to calculate with."""

    def peak_bytes(self, level=None, batch=None) -> int:
        level = self.opt.optMemory if level is None else level
        per_image = {0: 40, 1: 40, 2: 10, 3: 3, 4: 2}[level]
        return 1_000_000 * (10 + per_image * (batch or self.opt.batchSize))


def linear(level: int | str = 2, batch: int = 100, replicas: int = 1) -> LinearEstimate:
    opt = settings(SMALL, level).replace(batchSize=batch, replicas=replicas)
    return LinearEstimate(opt, NUM_CLASSES, CPU, REFERENCE)


def free_for(megabytes: float) -> int:
    """Return the free memory that an estimate of so many MB needs."""
    return round(1e6 * TOLERANCE * megabytes) + 1


SMALLEST = "optMemory auto: 4, the smallest, though it needs about 210 MB and "


@pytest.mark.parametrize(
    ("free", "level", "note"),
    [
        (None, 2, None),  # on the CPU
        (free_for(1010), 2, None),
        (
            free_for(1009),
            3,
            "optMemory auto: 3, since level 2 needs about 1,010 MB of 1,161 MB free",
        ),
        (
            free_for(309),
            4,
            "optMemory auto: 4, since level 2 needs about 1,010 MB of 356 MB free",
        ),
        (free_for(90), 4, f"{SMALLEST}104 MB are free; --batchSize 40 would fit"),
        (free_for(11), 4, f"{SMALLEST}13 MB are free; no batch would fit"),
    ],
)
def test_auto_takes_the_fastest_level_that_fits_or_else_the_smallest(free, level, note):
    assert linear("auto").choose_level(free) == (level, note)


@pytest.mark.parametrize(
    ("batch", "replicas", "free", "want"),
    [
        *((100, 1, *case) for case in [(1010, 100), (1009, 96), (500, 48), (171, 16), (45, 3)]),
        *((100, 1, *case) for case in [(20, 1), (9, 0)]),
        *((99, 3, *case) for case in [(1010, 99), (510, 48), (171, 15), (30, 0)]),
        (1, 1, 19, 0),
    ],
)
def test_the_largest_batch_fits_and_is_a_round_number_for_each_process(batch, replicas, free, want):
    assert linear(2, batch, replicas).largest_batch(free_for(free), level=2) == want


@pytest.mark.parametrize(
    ("level", "free", "want"),
    [
        (0, None, "use --optMemory 2, about 1,010 MB instead of 4,010 MB"),
        (0, free_for(310), "use --optMemory 3, about 310 MB instead of 4,010 MB"),
        (2, free_for(110), "use --batchSize 48 --optMemory 4, about 106 MB instead of 1,010 MB"),
        (4, free_for(110), "use --batchSize 48, about 106 MB instead of 210 MB"),
        (4, free_for(9), "use a larger device: --batchSize 1 needs about 12 MB"),
        # Never what has just failed, however much is free: in pieces too small, or taken since.
        (4, 10**12, "use --batchSize 80, about 170 MB instead of 210 MB"),
        (4, None, "use --batchSize 40, about 90 MB instead of 210 MB"),
    ],
)
def test_out_of_memory_names_the_level_or_the_batch_that_fits(level, free, want):
    assert linear(level).suggestion(free) == want


def test_out_of_memory_is_reported_even_where_nothing_is_left_to_simulate(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(engine.memory, "_simulate", fail)
    assert estimate(SMALL).suggestion(None) == "use a smaller --batchSize, or --optMemory 4"


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("fn", "raised"),
    [
        (lambda: torch.empty(2**60, dtype=torch.uint8), OutOfMemoryError),
        (lambda: raise_(torch.OutOfMemoryError("CUDA out of memory.")), OutOfMemoryError),
        (lambda: raise_(MemoryError()), OutOfMemoryError),
        (lambda: torch.zeros(2) @ torch.zeros(3), RuntimeError),
        (lambda: raise_(ValueError("DefaultCPUAllocator: can't allocate memory")), ValueError),
    ],
)
def test_out_of_memory_is_told_from_other_errors(fn, raised):
    with pytest.raises(raised) as caught, memory_errors(settings(SMALL), lambda: "a fix"):
        fn()
    report = "error: out of memory with --batchSize 4 --optMemory 2; fix: a fix"
    assert raised is not OutOfMemoryError or caught.value.report() == report
