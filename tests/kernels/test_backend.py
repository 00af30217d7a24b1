"""Test kernels/backend.py: which backend runs the dense blocks, and the message about it."""

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
from kernels.backend import REFERENCE, Backend, select

OPERATIONS = [field.name for field in fields(Backend) if field.name != "name"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
STAND_IN = ModuleType("kernels.triton_ops")
vars(STAND_IN).update({name: lambda *_: None for name in OPERATIONS})
TRITON = Backend.from_module(STAND_IN)


@pytest.fixture
def machine(monkeypatch):
    """Return a function that simulates a machine: GPU or CPU, with Triton or without."""

    def simulate(capability=(9, 0), installed: bool = True, interpreter: str | None = None):
        monkeypatch.setitem(sys.modules, "kernels.triton_ops", STAND_IN)
        monkeypatch.setattr(kernels, "triton_ops", STAND_IN, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
        monkeypatch.setattr(kernels.backend, "_compile_error", lambda device: None)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if interpreter is not None:
            monkeypatch.setenv("TRITON_INTERPRET", interpreter)

    return simulate


OLD, MISSING, INTERPRETER = {"capability": (7, 5)}, {"installed": False}, {"interpreter": "1"}
NO_TRITON = "Triton is not installed"
DOUBLE = "Triton's products have no double precision"
TOO_OLD = "the GPU has compute capability 7.5, below 8.0"
NO_GPU = "there is no CUDA device"


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
    machine, simulated, device, precision, reason
):
    machine(**simulated)
    assert select("torch", device, precision) == (REFERENCE, None)
    if reason is None:
        assert select("auto", device, precision) == (TRITON, None)
        assert select("triton", device, precision) == (TRITON, None)
        return
    # On a CPU plain PyTorch is what everybody expects.
    warning = f"kernels: plain PyTorch, since {reason}" if device == CUDA else None
    assert select("auto", device, precision) == (REFERENCE, warning)
    with pytest.raises(UsageError) as caught:
        select("triton", device, precision)
    assert caught.value.code == 2
    assert caught.value.report() == f"error: kernels triton: {reason}; fix: use --kernels auto"


def test_a_kernel_that_does_not_run_is_noticed_before_training(monkeypatch, machine):
    def broken(value, target) -> None:
        raise RuntimeError("no C compiler\nand a long trace")

    compile_error = kernels.backend._compile_error
    machine(**INTERPRETER)
    monkeypatch.setattr(kernels.backend, "_compile_error", compile_error)
    monkeypatch.setattr(STAND_IN, "copy_with_stats", broken)
    with pytest.raises(UsageError, match="Triton does not work here: no C compiler"):
        select("triton", CPU, "single")
    assert select("auto", CPU, "single") == (REFERENCE, None)
    monkeypatch.setattr(STAND_IN, "copy_with_stats", TRITON.copy_with_stats)
    assert select("auto", CPU, "single") == (TRITON, None)


def test_every_backend_has_the_signatures_of_the_reference():
    functions = inspect.getmembers(reference, inspect.isfunction)
    public = {n for n, f in functions if f.__module__ == reference.__name__ and n[0] != "_"}
    assert public - {"conv", "conv_backward"} == set(OPERATIONS)
    pytest.importorskip("triton", reason="Triton is not installed")
    triton_ops = importlib.import_module("kernels.triton_ops")
    for name in OPERATIONS:
        assert getattr(REFERENCE, name) is getattr(reference, name)
        want, got = (inspect.signature(getattr(ops, name)) for ops in (reference, triton_ops))
        assert got == want, name


def test_a_module_that_lacks_an_operation_is_refused_as_a_backend(monkeypatch):
    monkeypatch.delattr(STAND_IN, "complete_gradient")
    with pytest.raises(AttributeError, match="complete_gradient"):
        Backend.from_module(STAND_IN)


def test_a_backend_is_copied_and_pickled_by_the_names_of_its_functions():
    for twin in (copy.deepcopy(REFERENCE), pickle.loads(pickle.dumps(REFERENCE))):
        assert twin == REFERENCE and twin.copy_with_stats is reference.copy_with_stats
    assert TRITON != REFERENCE


@pytest.mark.parametrize("requested", ["torch", "triton"])
def test_triton_is_loaded_only_where_it_is_selected(requested):
    if requested == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    program = "import sys, models.factory, kernels.backend, torch\n"
    program += f"kernels.backend.select('{requested}', torch.device('cpu'), 'single')\n"
    program += "print('kernels.triton_ops' in sys.modules, 'triton' in sys.modules)"
    command, environment = [sys.executable, "-c", program], os.environ | {"TRITON_INTERPRET": "1"}
    output = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    assert output.split() == [str(requested == "triton")] * 2
