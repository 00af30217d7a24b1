"""Select the device of a process, configure its arithmetic, and report on it."""

import ctypes
import os
import resource
import sys

import torch

from distributed.launcher import SINGLE_PROCESS, ProcessInfo
from errors import UsageError
from kernels.precision import set_tf32

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def select(num_gpus: int | None, process: ProcessInfo = SINGLE_PROCESS) -> torch.device:
    """Return this process's device for `--nGPU`: None prefers a GPU, 0 takes the CPU.

    Raises:
        UsageError: there are fewer GPUs than requested, or they cannot be used.
    """
    present = torch.cuda.device_count()
    if num_gpus is None:
        num_gpus = min(present, 1)
    found = f"{present or 'no'} CUDA device{'s' * (present > 1)}"
    if not process.has_launcher and num_gpus > present:
        raise UsageError(f"nGPU={num_gpus} but {found}", f"--nGPU {present}")
    if not num_gpus:
        return torch.device("cpu")
    if process.local_rank >= present:
        what = f"{process.local_size} processes on this machine but {found}"
        fix = f"torchrun --nproc-per-node {present}, or " if present else ""
        raise UsageError(what, f"{fix}--nGPU 0 for CPUs")
    _start_cuda()
    if process.has_launcher:
        torch.cuda.set_device(process.local_rank)
    return torch.device("cuda", process.local_rank)


def _start_cuda() -> None:
    """Initialise CUDA; raise UsageError if that fails."""
    # The driver may be older than the CUDA that PyTorch is built for.
    try:
        torch.cuda.init()
    except RuntimeError as error:
        what = f"the GPU cannot be used: {str(error).partition(chr(10))[0].rstrip('.')}"
        fix = f"install a driver for CUDA {torch.version.cuda} (README.md), or use --nGPU 0"
        raise UsageError(what, fix) from error


def configure(cudnn: str, tf32: bool) -> None:
    """Apply `--cudnn` and `--tf32` to the whole process, and let it keep freed memory."""
    _keep_freed_memory()
    set_tf32(tf32)
    torch.backends.cudnn.benchmark = cudnn == "fastest"
    if cudnn == "deterministic":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
        torch.use_deterministic_algorithms(True)
        # Else PyTorch fills whatever it allocates with NaN: as many launches again in a step.
        torch.utils.deterministic.fill_uninitialized_memory = False


def _keep_freed_memory() -> None:
    """Let glibc reuse freed memory, as PyTorch does on CUDA; other C libraries lack mallopt."""
    # By default glibc returns large blocks to the system and gets them back page by page in every
    # step, which takes up to a tenth of a step's time on the CPU.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest value it accepts
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak so far: of the GPU's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def free_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU that this process can still use; None for the CPU."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def log_fields(device: torch.device, replicas: int) -> dict[str, object]:
    """Return the fields of an epoch's record that a resume elsewhere may change."""
    return {
        "memory_mb": peak_memory_mb(device),
        "device": describe(device),
        "replicas": replicas,
        "torch": torch.__version__,
    }


def describe(device: torch.device) -> str:
    """Return the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"
