"""kernels/backend.py: what runs the dense blocks, and what is said about it."""

import copy
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from types import ModuleType

import pytest
import torch

import kernels.backend
from errors import UsageError
from helpers.run_main import ROOT
from kernels import reference
from kernels.backend import REFERENCE, Backend

OPERATIONS = (
    "copy_with_stats",
    "conv1x1",
    "conv3x3",
    "norm_relu_avg_pool",
    "conv1x1_backward",
    "conv3x3_backward",
    "norm_relu_avg_pool_backward",
    "complete_gradient",
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
STAND_IN = ModuleType("kernels.triton_ops")
vars(STAND_IN).update({name: lambda *_: None for name in OPERATIONS})


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    """A new GPU and Triton, whatever this machine has; the fused module is a stand-in."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "kernels.triton_ops", STAND_IN)
    monkeypatch.setattr(kernels, "triton_ops", STAND_IN, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels.backend, "_compile_error", lambda device: None)


def no_triton(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def capability(monkeypatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("precision", ["single", "double", "half", "bf16"])
def test_torch_is_plain_pytorch_without_a_remark(device, precision):
    assert kernels.backend.select("torch", device, precision) == (REFERENCE, None)


@pytest.mark.parametrize("requested", ["auto", "triton"])
@pytest.mark.parametrize("precision", ["single", "half", "bf16"])
def test_a_new_gpu_runs_triton(requested, precision):
    assert kernels.backend.select(requested, CUDA, precision) == (
        Backend.from_module(STAND_IN),
        None,
    )


def test_the_cpu_runs_plain_pytorch_and_that_is_no_news():
    assert kernels.backend.select("auto", CPU, "single") == (REFERENCE, None)
    with pytest.raises(UsageError, match="kernels triton: there is no CUDA device"):
        kernels.backend.select("triton", CPU, "single")


@pytest.mark.parametrize("requested", ["auto", "triton"])
def test_the_cpu_runs_triton_through_its_interpreter_where_that_is_on(monkeypatch, requested):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.backend.select(requested, CPU, "single") == (Backend.from_module(STAND_IN), None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert kernels.backend.select("auto", CPU, "single") == (REFERENCE, None)


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
    assert kernels.backend.select("auto", CUDA, precision) == (REFERENCE, remark)
    with pytest.raises(UsageError) as caught:
        kernels.backend.select("triton", CUDA, precision)
    assert caught.value.code == 2
    assert caught.value.report() == f"error: kernels triton: {reason}; fix: use --kernels auto"


def test_a_kernel_that_does_not_run_is_noticed_before_training(monkeypatch):
    def broken(value, target) -> None:
        raise RuntimeError("no C compiler\nand a long trace")

    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "kernels.triton_ops", STAND_IN)
    monkeypatch.setattr(kernels, "triton_ops", STAND_IN, raising=False)
    monkeypatch.setattr(STAND_IN, "copy_with_stats", broken)
    with pytest.raises(
        UsageError, match="kernels triton: Triton does not work here: no C compiler"
    ):
        kernels.backend.select("triton", CPU, "single")
    assert kernels.backend.select("auto", CPU, "single") == (REFERENCE, None)
    monkeypatch.setattr(STAND_IN, "copy_with_stats", lambda value, target: None)
    assert kernels.backend.select("auto", CPU, "single") == (Backend.from_module(STAND_IN), None)


@pytest.mark.parametrize(("major", "minor"), [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_every_gpu_since_8_0_runs_triton(monkeypatch, major, minor):
    capability(monkeypatch, major, minor)
    assert kernels.backend.select("auto", CUDA, "bf16") == (Backend.from_module(STAND_IN), None)
    capability(monkeypatch, 7, minor)
    assert kernels.backend.select("auto", CUDA, "bf16")[0] is REFERENCE


def test_a_backend_has_the_operations_that_the_specification_defines():
    public = {name for name, value in vars(reference).items()
              if inspect.isfunction(value) and value.__module__ == reference.__name__
              and not name.startswith("_")}  # fmt: skip
    assert public == set(OPERATIONS)
    assert {field.name for field in fields(Backend)} == {"name", *OPERATIONS}
    assert all(getattr(REFERENCE, name) is getattr(reference, name) for name in OPERATIONS)
    assert len({getattr(REFERENCE, name) for name in OPERATIONS}) == len(OPERATIONS)


def test_a_module_that_lacks_an_operation_is_no_backend(monkeypatch):
    monkeypatch.delattr(STAND_IN, "complete_gradient")
    with pytest.raises(AttributeError, match="complete_gradient"):
        Backend.from_module(STAND_IN)


def test_a_backend_is_copied_and_pickled_by_the_names_of_its_functions():
    twins = [copy.deepcopy(REFERENCE), pickle.loads(pickle.dumps(REFERENCE))]
    assert all(
        twin == REFERENCE and twin.copy_with_stats is reference.copy_with_stats for twin in twins
    )
    assert Backend.from_module(STAND_IN) != REFERENCE


def test_triton_is_loaded_only_where_it_is_selected(monkeypatch):
    monkeypatch.undo()
    program = "import sys, models.factory, kernels.backend, torch\n"
    program += "kernels.backend.select({!r}, torch.device('cpu'), 'single')\n"
    program += "print('kernels.triton_ops' in sys.modules, 'triton' in sys.modules)"
    loaded = {
        requested: subprocess.run(
            [sys.executable, "-c", program.format(requested)],
            env=os.environ | {"TRITON_INTERPRET": "1" if requested == "triton" else "0"},
            cwd=ROOT, capture_output=True, text=True, check=requested == "torch",
        ).stdout.split()
        for requested in (["torch", "triton"] if importlib.util.find_spec("triton") else ["torch"])
    }  # fmt: skip
    assert loaded.pop("torch") == ["False", "False"]
    assert all(found == ["True", "True"] for found in loaded.values())


def test_triton_takes_and_gives_what_plain_pytorch_does(monkeypatch):
    monkeypatch.undo()
    pytest.importorskip("triton", reason="Triton is not installed")
    fused = importlib.import_module("kernels.triton_ops")
    for name in OPERATIONS:
        mine, theirs = (inspect.signature(getattr(ops, name)) for ops in (reference, fused))
        assert list(mine.parameters) == list(theirs.parameters), name
        assert mine == theirs, name
