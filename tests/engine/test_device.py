"""Test which device a process gets for --nGPU, and what --cudnn and --tf32 set."""

import os
import re
from pathlib import Path

import pytest
import torch

import engine.device
from distributed.launcher import SINGLE_PROCESS, ProcessInfo
from errors import UsageError


@pytest.fixture
def present(monkeypatch):
    """Set the number of CUDA devices; return the list of those that are made current."""
    current = []

    def present(count: int) -> list[int]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        return current

    return present


@pytest.mark.parametrize("process", [SINGLE_PROCESS, ProcessInfo(1, 2, 1, 2, True)])
def test_a_driver_that_is_too_old_for_pytorch_is_answered_with_the_cuda_it_needs(
    present, process, monkeypatch
):
    def init() -> None:
        raise RuntimeError("The NVIDIA driver is too old (found version 12080).\nAs it happens")

    present(2)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    engine.device.select(0, process)  # the CPU needs no driver
    with pytest.raises(UsageError) as error:
        engine.device.select(None, process)
    assert error.value.report() == (
        "error: the GPU cannot be used: The NVIDIA driver is too old (found version 12080); "
        "fix: install a driver for CUDA 13.0 (README.md), or use --nGPU 0"
    )


@pytest.fixture
def _restored(monkeypatch):
    """Restore the settings of the whole process."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


@pytest.mark.parametrize(
    ("num_gpus", "count", "local_rank", "device"),
    [  # local_rank None: started without a launcher
        (None, 0, None, "cpu"),
        (None, 8, None, "cuda:0"),
        (0, 2, None, "cpu"),
        (1, 4, None, "cuda:0"),
        (None, 4, 0, "cuda:0"),
        (None, 4, 3, "cuda:3"),
        (None, 0, 3, "cpu"),
        (0, 4, 3, "cpu"),
        (1, 4, 3, "cuda:3"),  # the launcher counts its own processes
    ],
)
def test_each_process_gets_its_own_gpu_or_the_cpu(present, num_gpus, count, local_rank, device):
    current = present(count)
    if local_rank is None:
        assert str(engine.device.select(num_gpus)) == device
        assert current == []  # the CUDA context is made when it is needed
    else:
        # On the second of two machines: the rank in the run is not the rank on the machine.
        process = ProcessInfo(4 + local_rank, 8, local_rank, 4, has_launcher=True)
        assert str(engine.device.select(num_gpus, process)) == device
        assert current == [local_rank] * (device != "cpu")


@pytest.mark.parametrize(
    ("num_gpus", "count", "num_processes", "report"),
    [
        (1, 0, 0, "nGPU=1 but no CUDA device; fix: --nGPU 0"),
        (2, 1, 0, "nGPU=2 but 1 CUDA device; fix: --nGPU 1"),
        (9, 8, 0, "nGPU=9 but 8 CUDA devices; fix: --nGPU 8"),
        (None, 1, 4, "4 processes on this machine but 1 CUDA device; fix: torchrun "
         "--nproc-per-node 1, or --nGPU 0 for CPUs"),
        (4, 3, 4, "4 processes on this machine but 3 CUDA devices; fix: torchrun "
         "--nproc-per-node 3, or --nGPU 0 for CPUs"),
    ],
)  # fmt: skip
def test_missing_gpus_are_one_line_with_a_fix(present, num_gpus, count, num_processes, report):
    present(count)
    process = SINGLE_PROCESS
    if num_processes:  # the first one without a GPU
        process = ProcessInfo(count, num_processes, count, num_processes, has_launcher=True)
    with pytest.raises(UsageError) as caught:
        engine.device.select(num_gpus, process)
    assert (caught.value.code, caught.value.report()) == (2, f"error: {report}")


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(
    ("cudnn", "benchmark", "deterministic"),
    [("fastest", True, False), ("default", False, False), ("deterministic", False, True)],
)
def test_cudnn_and_tf32_set_speed_repeatability_and_products(cudnn, benchmark, deterministic):
    torch.backends.cudnn.benchmark = not benchmark
    for tf32 in (True, False):
        engine.device.configure(cudnn, tf32)
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
        assert torch.backends.cudnn.allow_tf32 is tf32
    assert torch.backends.cudnn.benchmark is benchmark
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    # PyTorch would fill each of a step's hundreds of allocations by a launch of its own.
    assert torch.utils.deterministic.fill_uninitialized_memory is not deterministic
    # cuBLAS repeats its results only with a workspace of fixed size.
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic


@pytest.mark.usefixtures("_restored")
def test_a_workspace_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    engine.device.configure("deterministic", tf32=False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_of_a_process_equals_the_kernels_figure():
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    peak = engine.device.peak_memory_mb(torch.device("cpu"))
    assert peak == pytest.approx(kib * 1024 / 1e6, rel=0.01)


def test_the_cpu_is_described_with_its_threads():
    assert engine.device.describe(torch.device("cpu")) == "CPU, 1 thread"
    torch.set_num_threads(2)
    try:
        assert engine.device.describe(torch.device("cpu")) == "CPU, 2 threads"
    finally:
        torch.set_num_threads(1)
