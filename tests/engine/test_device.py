"""Where a run computes: what --nGPU gets, and what --cudnn and --tf32 set."""

import os
import re
from pathlib import Path

import pytest
import torch

import engine.device
from distributed.launcher import ProcessInfo
from errors import UsageError


@pytest.fixture
def present(monkeypatch):
    """Sets how many CUDA devices there seem to be; the list of those that were made current."""
    current = []

    def present(count: int) -> list[int]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    return present


@pytest.fixture
def _restored(monkeypatch):
    """Puts the switches of the whole process back."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[:2]
    torch.backends.cudnn.benchmark = before[2]


@pytest.mark.parametrize(
    ("num_gpus", "count", "device"),
    [
        (None, 0, "cpu"),
        (None, 1, "cuda:0"),
        (None, 8, "cuda:0"),
        (0, 0, "cpu"),
        (0, 2, "cpu"),
        (1, 1, "cuda:0"),
        (1, 4, "cuda:0"),
    ],
)
def test_the_device_is_the_one_asked_for_or_a_gpu_where_there_is_one(
    present, num_gpus, count, device
):
    current = present(count)
    assert str(engine.device.select(num_gpus)) == device
    assert current == []  # it is so without a word, and the CUDA context is made when it is needed


@pytest.mark.parametrize(
    ("num_gpus", "count", "local_rank", "device"),
    [
        (None, 4, 0, "cuda:0"),
        (None, 4, 3, "cuda:3"),
        (None, 0, 3, "cpu"),
        (0, 4, 3, "cpu"),
        (1, 4, 3, "cuda:3"),  # the launcher counts its own processes
        (8, 4, 3, "cuda:3"),
    ],
)
def test_each_process_that_a_launcher_starts_has_a_gpu_of_its_own(
    present, num_gpus, count, local_rank, device
):
    current = present(count)
    # The second of two machines: the place in the run is not the place on the machine.
    process = ProcessInfo(4 + local_rank, 8, local_rank, 4, has_launcher=True)
    assert str(engine.device.select(num_gpus, process)) == device
    assert current == [local_rank] * (device != "cpu")


@pytest.mark.parametrize(
    ("num_gpus", "count", "found", "fix"),
    [
        (None, 1, "1 CUDA device", "torchrun --nproc-per-node 1, or --nGPU 0"),
        (4, 3, "3 CUDA devices", "torchrun --nproc-per-node 3, or --nGPU 0"),
    ],
)
def test_more_processes_than_gpus_are_refused_by_those_without_one(
    present, num_gpus, count, found, fix
):
    present(count)
    processes = [ProcessInfo(rank, 4, rank, 4, has_launcher=True) for rank in range(4)]
    for process in processes[:count]:
        assert engine.device.select(num_gpus, process).index == process.rank
    for process in processes[count:]:
        with pytest.raises(UsageError) as caught:
            engine.device.select(num_gpus, process)
        report = caught.value.report()
        assert report.startswith(f"error: 4 processes on this machine but {found}; fix: {fix}")


@pytest.mark.parametrize(
    ("num_gpus", "count", "what", "fix"),
    [
        (1, 0, "nGPU=1 but no CUDA device", "--nGPU 0"),
        (3, 0, "nGPU=3 but no CUDA device", "--nGPU 0"),
        (2, 1, "nGPU=2 but 1 CUDA device", "--nGPU 1"),
        (4, 2, "nGPU=4 but 2 CUDA devices", "--nGPU "),
        (9, 8, "nGPU=9 but 8 CUDA devices", "--nGPU "),
    ],
)
def test_gpus_that_cannot_be_had_are_one_line_with_a_remedy_that_works(
    present, num_gpus, count, what, fix
):
    present(count)
    with pytest.raises(UsageError) as caught:
        engine.device.select(num_gpus)
    report = caught.value.report()
    assert caught.value.code == 2
    assert report.startswith(f"error: {what}")
    assert f"; fix: {fix}" in report
    assert "\n" not in report
    advised = int(re.search(r"fix: --nGPU (\d+)$", report)[1])
    assert engine.device.select(advised).type == ("cuda" if advised else "cpu")


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(
    ("cudnn", "benchmark", "deterministic"),
    [("fastest", True, False), ("default", False, False), ("deterministic", False, True)],
)
def test_cudnn_chooses_between_speed_and_repeatability(cudnn, benchmark, deterministic):
    torch.backends.cudnn.benchmark = not benchmark
    engine.device.configure(cudnn, tf32=False)
    assert torch.backends.cudnn.benchmark is benchmark
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    # cuBLAS repeats its results only with a workspace of fixed size.
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic


@pytest.mark.usefixtures("_restored")
def test_a_workspace_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    engine.device.configure("deterministic", tf32=False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_what_was_asked_for_in_products_and_in_convolutions(tf32):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not tf32
    engine.device.configure("fastest", tf32)
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.backends.cudnn.allow_tf32 is tf32


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_of_a_process_is_what_the_kernel_says():
    status = Path("/proc/self/status").read_text()
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    assert engine.device.peak_memory_mb(torch.device("cpu")) == pytest.approx(
        kib * 1024 / 1e6, rel=0.01
    )


def test_the_cpu_is_described_with_its_threads():
    assert engine.device.describe(torch.device("cpu")) == "CPU, 1 thread"
    torch.set_num_threads(2)
    try:
        assert engine.device.describe(torch.device("cpu")) == "CPU, 2 threads"
    finally:
        torch.set_num_threads(1)
