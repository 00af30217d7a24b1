"""kernels.select: what runs the dense blocks, and what is said about it."""

import importlib.util
import inspect
import sys
from types import ModuleType

import pytest
import torch

import kernels.backend
from errors import UsageError
from kernels import reference

OPERATIONS = (
    "copy",
    "product",
    "convolution",
    "pool",
    "product_backward",
    "convolution_backward",
    "pool_backward",
    "gradient",
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
STAND_IN = ModuleType("kernels.triton_ops")


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    """A new GPU and Triton, whatever this machine has; the fused module is a stand-in."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "kernels.triton_ops", STAND_IN)
    monkeypatch.setattr(kernels, "triton_ops", STAND_IN, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels.backend, "_broken_triton", lambda device: None)


def no_triton(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def capability(monkeypatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("precision", ["single", "double", "half", "bf16"])
def test_torch_is_plain_pytorch_without_a_remark(device, precision):
    assert kernels.backend.select("torch", device, precision) == (reference, None)


@pytest.mark.parametrize("wish", ["auto", "triton"])
@pytest.mark.parametrize("precision", ["single", "half", "bf16"])
def test_a_new_gpu_runs_triton(wish, precision):
    assert kernels.backend.select(wish, CUDA, precision) == (STAND_IN, None)


def test_the_cpu_runs_plain_pytorch_and_that_is_no_news():
    assert kernels.backend.select("auto", CPU, "single") == (reference, None)
    with pytest.raises(UsageError, match="kernels triton: there is no CUDA device"):
        kernels.backend.select("triton", CPU, "single")


@pytest.mark.parametrize("wish", ["auto", "triton"])
def test_the_cpu_runs_triton_through_its_interpreter_where_that_is_on(monkeypatch, wish):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.backend.select(wish, CPU, "single") == (STAND_IN, None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert kernels.backend.select("auto", CPU, "single") == (reference, None)


@pytest.mark.parametrize(
    ("machine", "precision", "reason"),
    [
        (no_triton, "single", "Triton is not installed"),
        (lambda patch: None, "double", "Triton's products have no double precision"),
        (
            lambda patch: capability(patch, 7, 5),
            "bf16",
            "the GPU has compute capability 7.5, below 8.0",
        ),
    ],
    ids=["no Triton", "double", "old GPU"],
)
def test_a_gpu_without_triton_is_remarked_on_or_refused(monkeypatch, machine, precision, reason):
    machine(monkeypatch)
    remark = f"kernels: plain PyTorch, since {reason}"
    assert kernels.backend.select("auto", CUDA, precision) == (reference, remark)
    with pytest.raises(UsageError) as caught:
        kernels.backend.select("triton", CUDA, precision)
    assert caught.value.code == 2
    assert caught.value.report() == f"error: kernels triton: {reason}; fix: use --kernels auto"


def test_a_kernel_that_does_not_run_is_noticed_before_training(monkeypatch):
    def copy(value, target) -> None:
        raise RuntimeError("no C compiler\nand a long trace")

    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "kernels.triton_ops", STAND_IN)
    monkeypatch.setattr(kernels, "triton_ops", STAND_IN, raising=False)
    monkeypatch.setattr(STAND_IN, "copy", copy, raising=False)
    with pytest.raises(
        UsageError, match="kernels triton: Triton does not work here: no C compiler"
    ):
        kernels.backend.select("triton", CPU, "single")
    assert kernels.backend.select("auto", CPU, "single") == (reference, None)
    monkeypatch.setattr(STAND_IN, "copy", lambda value, target: None)
    assert kernels.backend.select("auto", CPU, "single") == (STAND_IN, None)


@pytest.mark.parametrize(("major", "minor"), [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_every_gpu_since_8_0_runs_triton(monkeypatch, major, minor):
    capability(monkeypatch, major, minor)
    assert kernels.backend.select("auto", CUDA, "bf16") == (STAND_IN, None)
    capability(monkeypatch, 7, minor)
    assert kernels.backend.select("auto", CUDA, "bf16")[0] is reference


def test_the_operations_are_those_that_the_package_names():
    for name in OPERATIONS:
        assert name in kernels.backend.__doc__
        assert inspect.getmodule(getattr(reference, name)) is reference
    public = {name for name, value in vars(reference).items()
              if inspect.isfunction(value) and value.__module__ == reference.__name__
              and not name.startswith("_")}  # fmt: skip
    assert public == set(OPERATIONS)


def test_triton_takes_and_gives_what_plain_pytorch_does(monkeypatch):
    monkeypatch.undo()
    pytest.importorskip("triton", reason="Triton is not installed")
    fused = importlib.import_module("kernels.triton_ops")
    for name in OPERATIONS:
        mine, theirs = (inspect.signature(getattr(ops, name)) for ops in (reference, fused))
        assert list(mine.parameters) == list(theirs.parameters), name
        assert mine == theirs, name
