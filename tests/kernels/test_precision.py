"""Test kernels/precision.py beside every combination of PyTorch's own switches."""

import subprocess
import sys

import pytest

from helpers.run_main import ROOT

# As a program that holds the network may have left them, before anything reads or writes ours.
COMBINATIONS = """
import itertools, sys
import torch
from torch.backends import cuda, cudnn, mkldnn
from kernels.precision import allows_tf32, set_tf32

SWITCHES = (torch.backends, cudnn, cuda.matmul, cudnn.conv)
VALUES, EXACT = ("none", "ieee", "tf32"), {"none", "ieee"}
for values in itertools.product((*VALUES, "bf16"), VALUES, VALUES, VALUES):
    for switch, value in zip(SWITCHES, values):
        switch.fp32_precision = value
    everywhere, on_cuda, matmul, _ = values
    # The most special switch that says something counts.
    said = next((value for value in (matmul, on_cuda, everywhere) if value != "none"), "none")
    assert allows_tf32() == (said == "tf32"), values
    for allowed in (True, False):
        WRITE(allowed)
        for operation in (cuda.matmul, cudnn.conv, cudnn.rnn):
            assert (operation.fp32_precision == "tf32") == allowed, values
        assert {mkldnn.conv.fp32_precision, mkldnn.matmul.fp32_precision} <= EXACT, values
        # Others may read the old switches, as torch.compile does.
        assert (cuda.matmul.allow_tf32, cudnn.allow_tf32, allows_tf32()) == (allowed,) * 3, values
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
"""
CONFIGURE = "(lambda allowed: __import__('engine.device').device.configure('default', allowed))"


def run(program: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("write", ["set_tf32", CONFIGURE], ids=["set_tf32", "configure"])
def test_tf32_is_what_the_flag_says_whatever_a_host_program_has_switched(write):
    done = run(COMBINATIONS.replace("WRITE", write))
    assert done.returncode == 0, done.stderr


def test_the_old_switches_alone_would_leave_tf32_on_or_raise():
    old = "(lambda allowed: (setattr(cuda.matmul, 'allow_tf32', allowed), "
    old += "setattr(cudnn, 'allow_tf32', allowed)))"
    assert "AssertionError" in run(COMBINATIONS.replace("WRITE", old)).stderr
    reads = COMBINATIONS.replace("allows_tf32()", "cuda.matmul.allow_tf32", 1)
    assert "RuntimeError: PyTorch is checking" in run(reads.replace("WRITE", "set_tf32")).stderr
