"""The memory that engine/memory.py predicts is what the allocator counts in a real run."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import engine.memory
import models.factory
import opts
import train
from engine.memory import LEVELS_BY_SPEED, TOLERANCE, MemoryEstimate
from experiment.log import RunLog
from helpers.sample_data import create_data
from kernels import reference
from kernels.backend import REFERENCE, Backend

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NUM_CLASSES = 10
SMALL = "--depth 10 --growthRate 8 --imageSize 8 --batchSize 4"
NETWORKS = {
    "bottleneck": "--depth 22 --imageSize 32 --batchSize 24",
    "basic": "--depth 13 --bottleneck false --reduction 1 --imageSize 24 --batchSize 32",
    "dropout": "--depth 16 --dropRate 0.2 --momentum 0 --imageSize 24 --batchSize 24",
    "ImageNet": "--d1 1 --d2 2 --d3 2 --d4 1 --imageSize 96 --batchSize 8",
    "resnet": "--netType resnet --depth 14 --imageSize 32 --batchSize 32",
    "preresnet": "--netType preresnet --depth 18 --imageSize 96 --batchSize 4",
    "tiles": "--depth 10 --growthRate 24 --imageSize 64 --batchSize 16",
}


def settings(flags: str, level: int | str = 2, precision: str = "single"):
    text = f"--dataset synthetic --nGPU 0 --optMemory {level} --precision {precision} {flags}"
    return opts.parse(text.split())


def estimate(flags: str, level: int | str = 2, precision: str = "single") -> MemoryEstimate:
    return MemoryEstimate(settings(flags, level, precision), NUM_CLASSES, CPU, REFERENCE)


def measured(opt) -> int:
    """The most bytes that PyTorch's allocator gave out while a network was made and trained."""
    opt.nImages = 2 * opt.batchSize
    data = create_data(opt)
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        trainer = train.create_trainer(
            opt, models.factory.create(opt, NUM_CLASSES), CPU, RunLog(None)
        )
        trainer.train(data.train, lambda: None)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# ---------------------------------------------------------------------- prediction and measurement


@pytest.mark.parametrize(
    ("network", "level", "precision"),
    [
        *(("bottleneck", level, "single") for level in range(5)),
        *(("bottleneck", level, "bf16") for level in (0, 4)),
        ("bottleneck", 3, "double"),
        ("basic", 0, "half"),
        ("basic", 4, "double"),
        ("dropout", 1, "double"),
        ("dropout", 2, "bf16"),
        ("ImageNet", 0, "single"),
        ("ImageNet", 3, "half"),
        ("tiles", 2, "single"),
        ("resnet", 2, "single"),
        ("preresnet", 2, "double"),
    ],
)
def test_prediction_is_within_15_per_cent_of_the_peak(network, level, precision):
    predicted = estimate(NETWORKS[network], level, precision).peak_bytes()
    peak = measured(settings(NETWORKS[network], level, precision))
    assert predicted / TOLERANCE <= peak <= predicted * TOLERANCE


def test_another_level_or_batch_is_not_within_15_per_cent():
    peak = measured(settings(NETWORKS["bottleneck"], 2))
    estimates = estimate(NETWORKS["bottleneck"], 2)
    others = [estimates.peak_bytes(level=0), estimates.peak_bytes(level=4)]
    others += [estimates.peak_bytes(batch=48), estimates.peak_bytes(batch=12)]
    assert all(not peak / TOLERANCE <= other <= peak * TOLERANCE for other in others)


def test_weights_momentum_and_gradients_are_counted():
    # A step on one tiny image: three times the weights, and little else.
    opt = settings("--depth 40 --growthRate 24 --imageSize 8 --batchSize 1")
    weights = 4 * sum(
        parameter.numel() for parameter in models.factory.create(opt, 10).parameters()
    )
    predicted = MemoryEstimate(opt, NUM_CLASSES, CPU, REFERENCE).peak_bytes()
    without = MemoryEstimate(opt.replace(momentum=0.0), NUM_CLASSES, CPU, REFERENCE).peak_bytes()
    assert 3 * weights < predicted < 3.5 * weights
    assert predicted - without == pytest.approx(weights, rel=0.05)


def test_each_of_several_replicas_needs_what_its_share_of_the_batch_does():
    together = settings(SMALL.replace("--batchSize 4", "--batchSize 16"))
    four, one = (
        MemoryEstimate(
            together.replace(replicas=replicas), NUM_CLASSES, CPU, REFERENCE
        ).peak_bytes()
        for replicas in (4, 1)
    )
    assert four == estimate(SMALL).peak_bytes() < one


def test_the_estimate_leaves_the_kernels_as_they_were():
    before = reference._tiles
    estimate(SMALL).peak_bytes()
    assert reference._tiles is before


# ------------------------------------------------------------------------------ on a GPU, unseen


def test_on_a_gpu_a_batch_is_one_tile():
    opt = settings("--depth 10 --growthRate 24 --imageSize 64 --batchSize 24", level=3)
    on_gpu, on_cpu = (
        MemoryEstimate(opt, NUM_CLASSES, device, REFERENCE).peak_bytes() for device in (GPU, CPU)
    )
    # What backward of the widest layer has in flight besides the buffers: 96 maps of each pixel.
    one_tensor = 24 * 64 * 64 * 96 * 4
    buffers_of_block = 2 * 24 * 64 * 64 * (72 + 96) * 4
    assert on_gpu > buffers_of_block + one_tensor
    assert on_gpu != on_cpu


@pytest.mark.parametrize("precision", ["single", "bf16"])
def test_triton_needs_little_besides_the_buffers(precision):
    module = pytest.importorskip("kernels.triton_ops", reason="Triton is not installed")
    fused = Backend.from_module(module)
    opt = settings("--depth 22 --batchSize 64", precision=precision)
    peaks = [MemoryEstimate(opt, NUM_CLASSES, GPU, fused).peak_bytes(level) for level in (0, 2, 3)]
    plainly = MemoryEstimate(opt, NUM_CLASSES, GPU, REFERENCE).peak_bytes(3)
    # The buffer of the first block and its gradient, twice the bottleneck maps of a layer, the
    # gradient of the images' maps, for each of 64 * 32 * 32 pixels.
    size = {"single": 4, "bf16": 2}[precision]
    least = 64 * 32 * 32 * size * (2 * 60 + 2 * 48)
    assert least < peaks[2] < 1.6 * least < plainly
    assert peaks[2] < peaks[1] < peaks[0]


# -------------------------------------------------------------------------------- what to change


class Straight(MemoryEstimate):
    """10 MB, and so many MB per image: numbers to reckon with."""

    def peak_bytes(self, level=None, batch=None) -> int:
        level = self.opt.optMemory if level is None else level
        per_image = {0: 40, 1: 40, 2: 10, 3: 3, 4: 2}[level]
        return 1_000_000 * (10 + per_image * (batch or self.opt.batchSize))


def straight(level: int | str = 2, batch: int = 100) -> Straight:
    opt = settings(SMALL, level).replace(batchSize=batch)
    return Straight(opt, NUM_CLASSES, CPU, REFERENCE)


def room_for(megabytes: float) -> int:
    """What must be free for an estimate of so many MB."""
    return round(1e6 * TOLERANCE * megabytes) + 1


def test_auto_takes_the_fastest_level_that_fits():
    auto = straight("auto")
    assert auto.choose_level(room_for(1010)) == (2, None)
    level, note = auto.choose_level(room_for(1009))
    assert level == 3
    assert note == "optMemory auto: 3, since level 2 needs about 1,010 MB of 1,161 MB free"
    assert auto.choose_level(room_for(310))[0] == 3
    assert auto.choose_level(room_for(309))[0] == 4


def test_auto_takes_the_smallest_level_and_says_so_where_none_fits():
    level, note = straight("auto").choose_level(room_for(90))
    assert level == 4
    assert note == (
        "optMemory auto: 4, the smallest, though it needs about 210 MB and 104 MB are free; "
        "--batchSize 40 would fit"
    )
    assert straight("auto").choose_level(room_for(11))[1].endswith("no batch would fit")


def test_auto_is_the_fastest_where_free_memory_is_not_known():
    assert straight("auto").choose_level(None) == (2, None)


def test_auto_on_a_real_network():
    auto = MemoryEstimate(settings(SMALL, "auto"), NUM_CLASSES, GPU, REFERENCE)
    need = {level: auto.peak_bytes(level) for level in LEVELS_BY_SPEED}
    assert auto.choose_level(round(TOLERANCE * need[2]) + 1)[0] == 2
    assert auto.choose_level(round(TOLERANCE * min(need.values())) - 1)[1].count("smallest") == 1


@pytest.mark.parametrize(
    ("megabytes", "batch"),
    [(1010, 100), (1009, 96), (500, 48), (171, 16), (45, 3), (20, 1), (9, 0)],
)
def test_the_largest_batch_fits_and_is_a_round_number(megabytes, batch):
    assert straight().largest_batch(room_for(megabytes), level=2) == batch


@pytest.mark.parametrize(("megabytes", "batch"), [(1010, 99), (510, 48), (171, 15), (30, 0)])
def test_the_largest_batch_of_three_replicas_can_be_shared_by_them(megabytes, batch):
    three = straight(batch=99)
    three.opt.replicas = 3
    assert three.largest_batch(room_for(megabytes), level=2) == batch


def test_the_largest_batch_of_a_real_network_fits_and_a_larger_one_does_not():
    # On the CPU memory is no straight line: small batches are one tile, larger ones are cut.
    opt = settings("--depth 10 --growthRate 8 --imageSize 32 --batchSize 200")
    estimates = MemoryEstimate(opt, NUM_CLASSES, CPU, REFERENCE)
    limit = 0.4 * estimates.peak_bytes()
    batch = estimates.largest_batch(limit, level=2)
    assert TOLERANCE * estimates.peak_bytes(batch=batch) <= limit
    assert TOLERANCE * estimates.peak_bytes(batch=batch * 5 // 4) > limit


def test_no_batch_fits_where_one_image_does_not():
    assert straight(batch=1).largest_batch(1000, level=2) == 0


def test_out_of_memory_names_the_level_that_fits():
    assert straight(0).suggestion(None) == "use --optMemory 2, about 1,010 MB instead of 4,010 MB"
    assert straight(0).suggestion(room_for(310)).startswith("use --optMemory 3, about 310 MB")
    assert straight(2).suggestion(room_for(210)).startswith("use --optMemory 4, about 210 MB")


def test_out_of_memory_names_the_batch_that_fits_where_no_level_does():
    suggestion = straight(4).suggestion(room_for(110))
    assert suggestion == "use --batchSize 48, about 106 MB instead of 210 MB"
    assert (
        straight(2).suggestion(room_for(110)).startswith("use --batchSize 48 --optMemory 4, about")
    )
    assert straight(4).suggestion(room_for(9)) == (
        "use a larger device: --optMemory 4 --batchSize 1 needs about 12 MB"
    )


def test_out_of_memory_never_advises_what_has_just_failed():
    # However much is free: in pieces too small, or taken by another process since.
    assert straight(4).suggestion(10**12) == "use --batchSize 80, about 170 MB instead of 210 MB"
    assert straight(4).suggestion(None) == "use --batchSize 40, about 90 MB instead of 210 MB"


def test_out_of_memory_is_reported_even_where_nothing_is_left_to_simulate(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(engine.memory, "_simulate", fail)
    assert estimate(SMALL).suggestion(None) == "use a smaller --batchSize, or --optMemory 4"


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert engine.memory.is_out_of_memory(refused.value)
    assert engine.memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert engine.memory.is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2) @ torch.zeros(3)
    assert not engine.memory.is_out_of_memory(other.value)
    assert not engine.memory.is_out_of_memory(
        ValueError("DefaultCPUAllocator: can't allocate memory")
    )
