"""Test with a CUDA device: precisions, backends, graphs, memory, resuming (`make gpu`)."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import datasets.factory
import models.factory
import opts
import train
from engine import cuda_graph
from engine.backend_choice import select_backend
from engine.gradients import GradientReducer
from engine.memory import MemoryEstimate
from engine.self_check import measure_differences
from experiment.log import RunLog
from helpers.run_main import ROOT
from helpers.sample_data import write_folder
from helpers.tiny_networks import (
    FORMS,
    Results,
    mean_error,
    network,
    pictures,
    relative_differences,
    results,
)
from kernels.backend import REFERENCE, load_triton, missing_requirement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
COMMON = "--dataset synthetic --imageSize 16 --batchSize 64 --LR 0.05 --nGPU 1"
SMALL = f"{COMMON} --depth 10 --growthRate 8"


def run(flags: str) -> subprocess.CompletedProcess:
    """Run main.py in another process, successfully."""
    command = [sys.executable, "main.py", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def log(directory: Path) -> list[dict]:
    """Read log.jsonl without the columns that differ from run to run."""
    lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    volatile = ("time_s", "val_time_s", "images_per_s", "data_wait", "memory_mb")
    return [{key: line[key] for key in line if key not in volatile} for line in lines]


def have_equal_weights(*directories: Path) -> bool:
    one, two = (torch.load(run / "model_last.pt", weights_only=True) for run in directories)
    return all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())


@pytest.mark.parametrize("precision", ["single", "double", "half", "bf16"])
def test_every_precision_learns(precision, tmp_path):
    flags = f"{SMALL} --nImages 512 --augment false --dropRate 0 --milestones 4 --nEpochs 4"
    run(f"{flags} --precision {precision} --save {tmp_path / 'run'}")
    records = log(tmp_path / "run")
    assert records[-1]["val_top1"] < 20 < records[0]["train_top1"]


def test_the_data_and_its_batches_are_on_the_device():
    device = torch.device("cuda", 0)
    data = datasets.factory.create(opts.parse(SMALL.split()), device, print)
    images, targets = next(iter(data.train.batches(epoch=1)))
    assert data.train.images.pixels.is_cuda and images.is_cuda and targets.is_cuda
    assert images.is_contiguous(memory_format=torch.channels_last)


def start(flags: str, directory: Path, **streams) -> subprocess.Popen:
    """Start main.py and wait until it has written a checkpoint."""
    command = [sys.executable, "main.py", *flags.split(), "--save", str(directory)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, **streams)
    while process.poll() is None and not list(directory.glob("checkpoint_*.pt")):
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("seed, same", [(0, True), (1, False)])
def test_a_deterministic_run_resumes_mid_epoch_to_the_same_weights(seed, same, tmp_path):
    exact = f"{SMALL} --cudnn deterministic --dropRate 0.2 --nEpochs 3 --nImages 4096"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(f"{exact} --save {whole}")
    other = f"{exact} --manualSeed {seed}"
    process = start(f"{other} --saveEvery 1e-9", parts, stdout=subprocess.DEVNULL)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    run(f"{other} --save {parts} --resume auto")
    assert have_equal_weights(whole, parts) == same
    assert (log(whole) == log(parts)) == same


def test_a_checkpoint_of_the_gpu_is_evaluated_on_the_cpu(tmp_path):
    run(f"{SMALL} --nImages 512 --nEpochs 2 --save {tmp_path / 'run'}")
    on_cpu = run(f"--testOnly true --nGPU 0 --resume {tmp_path / 'run'}")
    error = float(on_cpu.stdout.split("top1:")[-1].split()[0])
    assert error == pytest.approx(log(tmp_path / "run")[-1]["val_top1"], abs=1.0)


# Levels, backends and graphs:
def backends() -> list:
    """List the backends that this machine has; a Triton that fails fails the tests."""
    device = torch.device("cuda", 0)
    return [REFERENCE] + [load_triton()] * (missing_requirement(device, "single") is None)


def step(level: int, form: str, ops=REFERENCE, low=None, seed: int = 5) -> Results:
    """Return loss, gradients and buffers of a step on the GPU, as CPU tensors."""
    # Wide enough for several tiles, the last one partial.
    model = network(level, form, growth_rate=12, init_channels=24, ops=ops).float().cuda()
    model = model.to(memory_format=torch.channels_last)
    images, targets = (tensor.cuda() for tensor in pictures(form, count=21))
    torch.manual_seed(seed)
    with torch.autocast("cuda", low or torch.bfloat16, enabled=low is not None):
        loss = F.cross_entropy(model(images.float()), targets)
    loss.backward()
    return {name: tensor.cpu() for name, tensor in results(model, loss=loss.detach()).items()}


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_every_level_and_backend_computes_what_level_0_computes(level, form):
    def errors(got: Results) -> tuple[float, float, float]:
        """Return the largest error in forward, and the largest and the mean one in backward."""
        found = relative_differences(got, want)
        gradients = torch.stack([found.pop(name) for name in [*found] if "gradient" in name])
        return max(found.values()).item(), gradients.max().item(), gradients.mean().item()

    want = step(0, form)
    for ops in backends():
        forward, largest, mean = errors(step(level, form, ops))
        # Noise of 1e-6 after each module of level 0 in float64 changes the results of forward by at
        # most 7e-7. It makes ReLU pass another gradient in every third network of some forms, which
        # changes gradients by up to 5e-2, and by 3e-3 in the mean.
        assert forward < 1e-4 and largest < 0.2 and mean < 0.01, ops.name
    if "dropout" in form:
        forward, _, mean = errors(step(level, form, seed=6))
        assert forward > 1e-3 and mean > 0.05


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [2, 3, 4])
def test_lower_precisions_err_no_more_than_level_0_does(level, low):
    exact = step(0, "BC")
    allowed = mean_error(step(0, "BC", low=low), exact)
    for ops in backends():
        assert mean_error(step(level, "BC", ops, low), exact) < 1.5 * allowed, ops.name


@pytest.mark.parametrize("ops", backends() if torch.cuda.is_available() else [REFERENCE])
def test_the_same_step_gives_the_same_bits(ops):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (step(2, "BC, dropout", ops) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("flags", ["", "--bottleneck false --dropRate 0.2", "--growthRate 32"])
@pytest.mark.parametrize("precision", ["single", "bf16", "half"])
def test_the_self_check_passes_and_leaves_no_trace(precision, flags, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    opt = opts.parse(f"{COMMON} --depth 13 {flags} --precision {precision}".split())
    device = torch.device("cuda", 0)
    assert select_backend(opt.replace(kernels="triton"), device) == (load_triton(), None)
    before = torch.cuda.memory_allocated(device), torch.cuda.get_rng_state(device)
    differences = measure_differences(opt, device, load_triton())
    assert torch.cuda.memory_allocated(device) == before[0]
    assert torch.equal(torch.cuda.get_rng_state(device), before[1])
    # The bounds are not so wide that they hold whatever is measured.
    assert all(each.size < each.bound / 2 for each in differences)
    assert max(each.bound for each in differences if not each.is_gradient) < 0.1


CAPTURED = [
    *(f"{SMALL} {more}" for more in ("", "--precision bf16", "--dropRate 0.2", "--lrShape cosine")),
    f"{COMMON} --netType resnet --depth 8",
    f"{COMMON} --netType preresnet --depth 11",
    f"{COMMON} --netType dsn --widen 0.1",
]


@pytest.mark.parametrize("flags", CAPTURED)
def test_a_run_of_captured_steps_ends_in_the_weights_of_an_eager_one(flags, tmp_path):
    # 1,000 images: 15 full batches and one of 40.
    line = f"{flags} --cudnn deterministic --nImages 1000 --nEpochs 2"
    for graph in ("true", "false"):
        done = run(f"{line} --cudaGraph {graph} --save {tmp_path / graph}")
        assert "note:" not in done.stderr
    assert have_equal_weights(tmp_path / "true", tmp_path / "false")
    assert log(tmp_path / "true") == log(tmp_path / "false")
    run(f"{line} --manualSeed 1 --cudaGraph true --save {tmp_path / 'other'}")
    assert log(tmp_path / "other") != log(tmp_path / "true")


def test_captured_steps_over_files_end_in_the_weights_of_eager_ones(tmp_path):
    # 30 training images, of which one cannot be read; loader processes, and ten crops.
    write_folder(tmp_path, {"train": {"a": 15, "b": 14}, "val": {"a": 4, "b": 3}}, size=80)
    (tmp_path / "train" / "b" / "bad.png").write_bytes(b"no picture")
    line = (
        f"--dataset folder --data {tmp_path} --imageSize 72 --d1 1 --d2 1 --d3 1 --d4 1 --nGPU 1 "
        "--growthRate 8 --batchSize 4 --nThreads 2 --tenCrop true --onBadImage skip --nEpochs 3 "
        "--dropRate 0.2 --cudnn deterministic"
    )
    for graph in ("true", "false"):
        done = run(f"{line} --cudaGraph {graph} --save {tmp_path / graph}")
        assert "it runs eagerly" not in done.stderr
    assert have_equal_weights(tmp_path / "true", tmp_path / "false")
    assert log(tmp_path / "true") == log(tmp_path / "false")


@pytest.fixture
def capturer():
    """Return what captures steps, on a stream of its own; go back to the former one."""
    before = torch.cuda.current_stream()
    yield cuda_graph.make_capturer("true", torch.device("cuda", 0))
    torch.cuda.synchronize()
    torch.cuda.set_stream(before)


def trained(line: str, capturer, epochs: int = 2) -> train.Trainer:
    """Train and evaluate some epochs in this process."""
    opt, device = opts.parse(line.split()), torch.device("cuda", 0)
    data = datasets.factory.create(opt, device, print)
    ops, _ = select_backend(opt, device)
    model = models.factory.create(opt, len(data.classes), ops)
    trainer = train.Trainer(opt, model, device, RunLog(None), capturer=capturer)
    for _ in range(epochs):
        results = [trainer.train(data.train, lambda: None)]
        results.append(trainer.evaluate(data.val, lambda: None))
        trainer.finish_epoch(*results)
    return trainer


@pytest.mark.parametrize("graph", [True, False], ids=["captured", "eager"])
def test_an_evaluation_counts_every_confusion_once(graph, capturer):
    torch.use_deterministic_algorithms(True)
    try:
        found = trained(f"{SMALL} --nImages 600", capturer if graph else None).evaluated
    finally:
        torch.use_deterministic_algorithms(False)
    counts, images = found.confusion(), found.count
    assert counts.sum() == images > 0
    assert found.compute()["top1"] == 100 * (images - counts.trace().item()) / images


@pytest.mark.parametrize("shares_memory", [True, False])
def test_the_smaller_last_batch_of_an_epoch_reserves_no_memory_of_its_own(
    shares_memory, capturer, monkeypatch
):
    if not shares_memory:  # the twin
        monkeypatch.setattr(cuda_graph.Capturer, "memory", lambda _: contextlib.nullcontext())
    line = "--dataset synthetic --imageSize 32 --batchSize 256 --depth 40 --growthRate 12 --nGPU 1"
    reserved = []
    for images in (5 * 256, 5 * 256 + 192):  # the last batch needs three quarters of the memory
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        trained(f"{line} --nImages {images}", capturer)
        reserved.append(torch.cuda.max_memory_reserved() - before)
        capturer.__init__()  # a pool of its own for each run
    assert (reserved[1] < 1.2 * reserved[0]) == shares_memory, reserved


@pytest.mark.parametrize("stage", ["step", "update"])
def test_a_run_in_half_precision_goes_on_where_a_capture_breaks_off(stage, capturer, monkeypatch):
    class TritonError(Exception):
        pass

    wrapped = torch.amp.GradScaler if stage == "update" else torch.optim.SGD
    do = getattr(wrapped, stage)

    def break_off(self, *args, **kwargs):
        if torch.cuda.is_current_stream_capturing():
            raise TritonError("out of resources")
        return do(self, *args, **kwargs)

    line = f"{SMALL} --nImages 500 --precision half --cudnn default --dropRate 0.2"
    eager = trained(line, None)
    monkeypatch.setattr(wrapped, stage, break_off)
    found = trained(line, capturer)
    assert found.scaler.get_scale() == eager.scaler.get_scale()
    for one, two in zip(found.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("size", [1, 2])
def test_one_nonfinite_number_of_a_gradient_is_found(size, value):
    parameters = [torch.nn.Parameter(torch.zeros(n, device="cuda")) for n in (5, 70_000)]
    world = SimpleNamespace(size=size, all_reduce_=lambda tensor: tensor.mul_(size))
    reducer = GradientReducer(parameters, world)

    def finite() -> list[bool]:
        return [one.item() for one in reducer.reduce(torch.ones((), device="cuda"))]

    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    assert finite() == [True, True]
    parameters[1].grad[66_666] = value
    assert finite() == [True, False]


@pytest.mark.parametrize("precision", ["single", "bf16"])
@pytest.mark.parametrize("level", [0, 2, 3, 4])
def test_memory_is_what_was_estimated(level, precision):
    line = "--depth 40 --growthRate 12 --batchSize 64 --dataset synthetic"
    opt = opts.parse([*line.split(), "--optMemory", str(level), "--precision", precision])
    device = torch.device("cuda", 0)
    ops, _ = select_backend(opt, device)
    measured = peak_of_a_run(opt, ops, device)
    estimate = MemoryEstimate(opt, 10, device, ops)
    assert measured == pytest.approx(estimate.peak_bytes(), rel=0.15)
    assert measured != pytest.approx(estimate.peak_bytes(batch=128), rel=0.15)


def peak_of_a_run(opt, ops, device: torch.device) -> int:
    """Measure the allocator's peak over three eager steps, in bytes."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # of the tests before: the run allocates them anew
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    trainer = train.Trainer(opt, models.factory.create(opt, 10, ops), device, RunLog(None))
    images = torch.randn(opt.batchSize, 3, 32, 32, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(opt.batchSize, dtype=torch.int64, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):
        trainer._train_step(images, targets)
    return torch.cuda.max_memory_allocated(device) - before


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


@TWO_GPUS
@pytest.mark.parametrize("graph", ["true", "false"])
def test_two_gpus_with_synchronised_statistics_train_as_one(graph, tmp_path):
    flags = f"{SMALL} --nImages 512 --nEpochs 1 --precision double --cudaGraph {graph}"
    one, two = tmp_path / "one", tmp_path / "two"
    run(f"{flags} --save {one}")
    done = run(f"{flags.replace('--nGPU 1', '--nGPU 2')} --syncBN true --save {two}")
    for name in ("train_loss", "val_loss"):
        assert log(two)[0][name] == pytest.approx(log(one)[0][name], rel=1e-5)
    assert "it runs eagerly" not in done.stderr  # NCCL's sum is captured as well


@TWO_GPUS
def test_when_one_gpu_s_process_is_killed_the_run_ends(tmp_path):
    flags = f"{SMALL.replace('--nGPU 1', '--nGPU 2')} --nImages 4096 --nEpochs 200"
    process = start(flags, tmp_path / "run", stderr=subprocess.PIPE)
    assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(ranks[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 8, errors
    assert "process 1 " in errors and "is lost" in errors
