"""Choose what runs the dense blocks of a run, `--kernels`: Triton where it can be trusted.

Triton runs if every process has what it needs and `self_check` finds no fault; a check that passed
is remembered in a file, by all that its result depends on.
"""

import contextlib
import hashlib
import json
import os
import platform
from pathlib import Path

import torch

from cli.flag_types import Settings
from distributed.rendezvous import code_version
from distributed.world import World
from engine import self_check
from errors import RunError, UsageError
from fileio import atomic
from kernels import backend
from kernels.backend import REFERENCE, Backend
from kernels.precision import allows_tf32
from models.memory_efficient import MEMORY_EFFICIENT_LEVELS

CHECKED_FLAGS = ("precision", "growthRate", "bottleneck", "reduction", "dropRate", "bnEps")


def select_backend(
    opt: Settings, device: torch.device, world: World | None = None
) -> tuple[Backend, str | None]:
    """Return the backend for all processes, and a warning if GPUs will run without Triton.

    Args:
        opt: reads kernels, optMemory and CHECKED_FLAGS.

    Raises:
        UsageError: Triton is requested by name and cannot be used, or its fault broke the GPU.
    """
    if opt.kernels == "torch":
        return REFERENCE, None
    world = world or World()
    reasons = world.all_gather_json(_find_reason(opt, device))
    if not any(reasons):
        return backend.load_triton(), None
    told = {}  # each reason once, with the first process that has it
    for rank, reason in enumerate(reasons):
        told.setdefault(reason, f"process {rank}: {reason}" if world.size > 1 else reason)
    reason = "; ".join(line for reason, line in told.items() if reason)
    if opt.kernels == "triton":
        raise UsageError(f"kernels triton: {reason}", "use --kernels auto")
    return REFERENCE, f"kernels: plain PyTorch, since {reason}" if device.type == "cuda" else None


def _find_reason(opt: Settings, device: torch.device) -> str | None:
    """Return why Triton cannot run this run's blocks on this process's device, or None."""
    reason = backend.missing_requirement(device, opt.precision)
    if reason or opt.optMemory not in ("auto", *MEMORY_EFFICIENT_LEVELS):
        return reason  # at other levels Triton runs nothing
    try:
        facts = _facts(opt, device)
        if _is_known_good(facts):
            return None
        reason = self_check.find_fault(opt, device, backend.load_triton())
    except Exception as error:  # no compiler, no matching driver: they raise all kinds of errors
        reason = f"Triton does not work here: {_in_one_line(error)}"
    if reason is None:
        _remember_good(facts)
    elif device.type == "cuda":
        _check_usable(device, reason)
    return reason


def _in_one_line(error: Exception) -> str:
    """Return what an error says; Triton's own quote the kernel's source and have a cause."""
    while type(error).__name__ == "CompilationError" and error.__cause__:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _check_usable(device: torch.device, reason: str) -> None:
    """Raise UsageError if a kernel has left the CUDA context unusable for the whole process."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise UsageError(f"kernels: {reason}", "use --kernels torch") from error


def _facts(opt: Settings, device: torch.device) -> dict[str, object]:
    """Return all that the verdict depends on, in plain values."""
    facts = {name: getattr(opt, name) for name in CHECKED_FLAGS}
    facts |= {
        "tf32": allows_tf32(),
        "triton": backend.triton_version(),
        "device": platform.machine(),
    }
    facts |= {name: value for name, value in os.environ.items() if name.startswith("TRITON_")}
    facts.pop("TRITON_CACHE_DIR", None)
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts["device"] = [found.name, found.major, found.minor, found.multi_processor_count]
        facts["driver"] = [torch._C._cuda_getDriverVersion()]
        with contextlib.suppress(OSError):  # of Linux; CUDA's own number is that of its interface
            facts["driver"].append(Path("/proc/driver/nvidia/version").read_text())
    return facts | code_version()


def _cache_file(facts: dict[str, object]) -> Path:
    """Return where the verdict on these facts is kept; RuntimeError if there is no home."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    root = root if root.is_absolute() else Path.home() / ".cache"
    return root / "densenet" / f"self-check-{digest[:32]}.json"


def _is_known_good(facts: dict[str, object]) -> bool:
    """Return whether a check has passed before; False if that cannot be read."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _cache_file(facts)
        return path.is_file() and atomic.read_json(path) == facts
    return False


def _remember_good(facts: dict[str, object]) -> None:
    """Keep the verdict, if that can be written."""
    with contextlib.suppress(OSError, RuntimeError, RunError):
        path = _cache_file(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.atomic_write(path, json.dumps(facts, indent=1).encode())
