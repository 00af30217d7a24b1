"""Where a run computes: the device, its arithmetic and how repeatable it is."""

import ctypes
import os
import resource
import sys

import torch

from distributed.launcher import SINGLE_PROCESS, ProcessInfo
from errors import UsageError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def select(num_gpus: int | None, process: ProcessInfo = SINGLE_PROCESS) -> torch.device:
    """The device of this process for `--nGPU`: None takes a GPU where there is one, 0 the CPU.

    Raises:
        UsageError: GPUs are asked for that are not there.
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
    if process.has_launcher:
        torch.cuda.set_device(process.local_rank)
    return torch.device("cuda", process.local_rank)


def configure(cudnn: str, tf32: bool) -> None:
    """Apply `--cudnn` and `--tf32` to the whole process, and let it keep freed memory."""
    _keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = cudnn == "fastest"
    if cudnn == "deterministic":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)


def _keep_freed_memory() -> None:
    """Tell the C library to use freed memory again, as PyTorch itself does on CUDA.

    glibc gives it back to the system and takes it anew, page by page, in every step: up to a tenth
    of the time of a step on the CPU. Other libraries have no mallopt and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that it takes
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory in use so far: of the GPU's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def log_fields(device: torch.device, replicas: int) -> dict[str, object]:
    """What an epoch's record says of where it ran; a run may go on elsewhere."""
    return {
        "memory_mb": peak_memory_mb(device),
        "device": describe(device),
        "replicas": replicas,
        "torch": torch.__version__,
    }


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that is free for this process; None for the CPU, where nobody can say."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def describe(device: torch.device) -> str:
    """The device in words, for the log."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"
