"""Test engine/backend_choice.py: what runs the dense blocks, what is said, what is remembered."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import opts
from engine import backend_choice, self_check
from engine.backend_choice import select_backend
from errors import UsageError
from helpers.run_main import ROOT
from kernels import backend, precision
from kernels.backend import REFERENCE, Backend

OPERATIONS = [name for name in vars(REFERENCE) if name != "name"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
STAND_IN = ModuleType("kernels.triton_ops")
vars(STAND_IN).update({name: lambda *_: None for name in OPERATIONS})
TRITON = Backend.from_module(STAND_IN)
PROPERTIES = {"name": "GPU", "major": 9, "minor": 0, "multi_processor_count": 132}


def settings(**changes) -> opts.Settings:
    return opts.parse(["--dataset", "synthetic", "--depth", "10"]).replace(**changes)


class Checks:
    """Stand in for the self-check: return `fault`, and record what was checked."""

    def __init__(self):
        self.fault: str | Exception | None = None
        self.found: list[tuple] = []

    def __call__(self, opt, device, triton) -> str | None:
        self.found.append((opt.precision, opt.growthRate))
        if isinstance(self.fault, Exception):
            raise self.fault
        return self.fault


@pytest.fixture
def checks(monkeypatch) -> Checks:
    checks = Checks()
    monkeypatch.setattr(self_check, "find_fault", checks)
    return checks


@pytest.fixture
def machine(monkeypatch, tmp_path, checks):
    """Return a function that simulates a machine: GPU or CPU, with Triton or without."""

    def simulate(capability=(9, 0), installed: bool = True, interpreter: str | None = None):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(backend, "load_triton", lambda: TRITON)
        monkeypatch.setattr(backend, "triton_version", lambda: "3.6.0")
        found = SimpleNamespace(**PROPERTIES)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if interpreter is not None:
            monkeypatch.setenv("TRITON_INTERPRET", interpreter)

    return simulate


OLD, MISSING, INTERPRETER = {"capability": (7, 5)}, {"installed": False}, {"interpreter": "1"}
NO_TRITON = "Triton is not installed"
DOUBLE = "Triton's products have no double precision"
TOO_OLD = "the GPU has compute capability 7.5, below 8.0"
NO_GPU = "there is no CUDA device"
FAILS = "Triton does not work here"


@pytest.mark.parametrize(
    ("simulated", "device", "precision", "reason"),
    [
        ({}, CUDA, "single", None),
        ({}, CUDA, "half", None),
        *(({"capability": found}, CUDA, "bf16", None) for found in [(8, 0), (8, 9), (12, 0)]),
        (INTERPRETER, CPU, "single", None),
        ({"interpreter": "0"}, CPU, "single", NO_GPU),
        ({}, CPU, "single", NO_GPU),
        ({}, CUDA, "double", DOUBLE),
        (OLD, CUDA, "bf16", TOO_OLD),
        (MISSING, CUDA, "single", NO_TRITON),
    ],
)
def test_triton_runs_where_it_can_and_else_there_is_a_reason(
    machine, checks, simulated, device, precision, reason
):
    machine(**simulated)
    opt = settings(precision=precision)
    assert select_backend(opt.replace(kernels="torch"), device) == (REFERENCE, None)
    assert not checks.found
    if reason is None:
        assert select_backend(opt, device) == (TRITON, None)
        assert select_backend(opt.replace(kernels="triton"), device) == (TRITON, None)
        assert checks.found == [(precision, opt.growthRate)]
        return
    assert_refused(opt, device, reason)
    assert not checks.found


def assert_refused(opt: opts.Settings, device: torch.device, reason: str, world=None) -> None:
    # On a CPU plain PyTorch is what everybody expects.
    warning = f"kernels: plain PyTorch, since {reason}" if device == CUDA else None
    assert select_backend(opt, device, world) == (REFERENCE, warning)
    with pytest.raises(UsageError) as caught:
        select_backend(opt.replace(kernels="triton"), device, world)
    assert caught.value.code == 2
    assert caught.value.report() == f"error: kernels triton: {reason}; fix: use --kernels auto"


class CompilationError(Exception):
    """Stand in for Triton's, which quotes the kernel and has a cause."""


def compilation_error() -> CompilationError:
    outer, inner = CompilationError("at 5:11:\nx = y\n^"), CompilationError("at 1:1:\n^")
    outer.__cause__, inner.__cause__ = inner, AssertionError("no such precision\nand more")
    return outer


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("Triton's output differs", "Triton's output differs"),
        (RuntimeError("no C compiler\nand a long trace"), f"{FAILS}: no C compiler"),
        (compilation_error(), f"{FAILS}: no such precision"),
        (NotImplementedError(), f"{FAILS}: NotImplementedError"),
    ],
)
def test_a_fault_of_triton_is_noticed_before_training_and_looked_for_again(
    machine, checks, fault, reason
):
    machine()
    checks.fault = fault
    assert_refused(settings(), CUDA, reason)
    checks.fault = None
    assert select_backend(settings(), CUDA) == (TRITON, None)
    assert len(checks.found) == 3


def test_a_kernel_that_breaks_the_gpu_for_the_process_ends_the_run(machine, checks, monkeypatch):
    def broken(device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    machine()
    checks.fault = RuntimeError("an illegal memory access")
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(UsageError, match="an illegal memory access") as caught:
        select_backend(settings(), CUDA)
    assert caught.value.report().endswith("; fix: use --kernels torch")


@pytest.mark.parametrize("reasons", [(None, "one"), ("one", None), ("one", "one"), ("one", "two")])
def test_all_processes_take_one_backend_and_name_each_reason_once(
    machine, checks, monkeypatch, tmp_path, reasons
):
    machine()
    told = {reason: f"process {reasons.index(reason)}: {reason}" for reason in reasons if reason}
    for rank in (0, 1):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine{rank}"))
        checks.fault = reasons[rank]

        def gather(own: str | None, rank: int = rank) -> list[str | None]:
            assert own == reasons[rank]
            return list(reasons)

        world = SimpleNamespace(size=2, all_gather_json=gather)
        assert_refused(settings(), CUDA, "; ".join(told.values()), world)


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16"}, {"growthRate": 7}, {"bottleneck": False}, {"dropRate": 0.3},
     {"bnEps": 1e-3}, "tf32", "TRITON_F32_DEFAULT", "driver", "device", "code"],
)  # fmt: skip
def test_a_verdict_is_remembered_until_what_it_depends_on_changes(
    machine, checks, monkeypatch, changes
):
    machine()
    opt = settings()
    for _ in range(2):
        assert select_backend(opt, CUDA) == (TRITON, None)
    assert len(checks.found) == 1
    if changes == "tf32":
        monkeypatch.setattr(backend_choice, "allows_tf32", lambda: not precision.allows_tf32())
    elif changes == "driver":
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010)
    elif changes == "device":
        other = SimpleNamespace(**PROPERTIES | {"multi_processor_count": 60})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: other)
    elif changes == "code":
        monkeypatch.setattr(backend_choice, "code_version", lambda: {"code": "other"})
    elif isinstance(changes, str):
        monkeypatch.setenv(changes, "ieee")
    else:
        opt = opt.replace(**changes)
    assert select_backend(opt, CUDA) == (TRITON, None)
    assert len(checks.found) == 2


@pytest.mark.parametrize("spoilt", ["text", "bytes", "directory", "read-only", "file", "no home"])
def test_a_cache_that_cannot_be_used_costs_a_check_and_no_word(
    machine, checks, monkeypatch, tmp_path, spoilt
):
    machine()
    opt, cache = settings(), tmp_path / "cache" / "densenet"
    if spoilt == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification forbids

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    elif spoilt == "file":
        cache.parent.write_text("")
    elif spoilt == "read-only":
        monkeypatch.setattr(backend_choice.atomic, "atomic_write", refuse)
    else:
        select_backend(opt, CUDA)
        (path,) = cache.iterdir()
        path.unlink()
        if spoilt == "directory":
            path.mkdir()
        else:
            path.write_bytes(b"\xff\xfe" if spoilt == "bytes" else b'{"precision": "sin')
        checks.found.clear()
    for _ in range(2):
        assert select_backend(opt, CUDA) == (TRITON, None)
    assert len(checks.found) == (1 if spoilt in ("text", "bytes") else 2)  # written again, or not


def refuse(path: Path, data: bytes) -> None:
    raise backend_choice.atomic.storage_error(PermissionError(13, "Permission denied"), path)


@pytest.mark.parametrize("level", [0, 1])
def test_levels_that_run_without_triton_are_not_checked(machine, checks, level):
    machine()
    assert select_backend(settings(optMemory=level), CUDA) == (TRITON, None)
    assert not checks.found


def test_a_network_without_dense_blocks_is_not_checked(machine, checks):
    machine()
    opt = opts.parse(["--dataset", "synthetic", "--netType", "resnet", "--depth", "20"])
    assert select_backend(opt, CUDA) == (REFERENCE, None)
    assert not checks.found


def test_the_self_check_finds_what_is_spoilt_on_purpose_in_the_interpreter():
    # Triton decides at a kernel's definition whether it is compiled or interpreted, and other
    # tests of this process compile the same kernels.
    pytest.importorskip("triton", reason="Triton is not installed")
    tests = Path(__file__).with_name("interpreted_self_check.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
