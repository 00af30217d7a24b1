"""Test kernels/backend.py: what a backend is, and when Triton is imported."""

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

from helpers.run_main import ROOT
from kernels import reference
from kernels.backend import REFERENCE, Backend

OPERATIONS = [field.name for field in fields(Backend) if field.name != "name"]
STAND_IN = ModuleType("kernels.triton_ops")
vars(STAND_IN).update({name: lambda *_: None for name in OPERATIONS})
TRITON = Backend.from_module(STAND_IN)


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


def test_triton_is_loaded_only_where_it_is_selected():
    program = "import sys, torch, opts, engine.backend_choice\n"
    program += "opt = opts.parse(['--dataset', 'digits', '--kernels', 'torch'])\n"
    program += "engine.backend_choice.select_backend(opt, torch.device('cpu'))\n"
    program += "print('kernels.triton_ops' in sys.modules, 'triton' in sys.modules)"
    command, environment = [sys.executable, "-c", program], os.environ | {"TRITON_INTERPRET": "1"}
    output = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    assert output.split() == ["False"] * 2
