"""Test the note about precisions that this CPU has no instructions for."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from engine.precision import cpu_note
from faults.contract import tiny
from helpers.run_main import ROOT
from kernels import cpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """Pretend to have a CPU; what the real one can do is asked anew after the test."""

    def pretend(name: str, avx512_bf16: bool, onednn_bf16: bool, onednn_fp16: bool) -> None:
        cpu.computes_in.cache_clear()
        monkeypatch.setattr(platform, "machine", lambda: name)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        onednn = torch.ops.mkldnn
        monkeypatch.setattr(onednn, "_is_mkldnn_bf16_supported", lambda: onednn_bf16)
        monkeypatch.setattr(onednn, "_is_mkldnn_fp16_supported", lambda: onednn_fp16)

    yield pretend
    cpu.computes_in.cache_clear()


@pytest.mark.parametrize(
    ("described", "lacking"),
    [
        (("x86_64", True, True, True), set()),
        (("x86_64", True, True, False), {"half"}),  # Zen 4
        (("AMD64", False, True, False), {"half", "bf16"}),  # oneDNN emulates bf16 on AVX-512
        (("x86_64", False, False, False), {"half", "bf16"}),  # AVX2
        (("aarch64", False, True, False), {"half"}),
        (("arm64", False, False, False), {"half", "bf16"}),  # built without oneDNN
    ],
)
def test_a_precision_without_instructions_is_noted_on_the_cpu_alone(machine, described, lacking):
    machine(*described)
    precisions = ("single", "double", "half", "bf16")
    notes = {p: note for p in precisions if (note := cpu_note(CPU, p))}
    assert set(notes) == lacking
    assert all(note.startswith(f"precision {p}: this CPU") for p, note in notes.items())
    assert not any(cpu_note(GPU, p) for p in precisions)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variable is about x86")
def test_a_run_in_half_precision_says_once_that_single_is_faster(tmp_path):
    # With this variable oneDNN takes the CPU for one without float16.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    for precision, times in (("half", 1), ("single", 0)):
        flags = tiny(nEpochs=1, precision=precision, save=tmp_path / precision)
        argv = [sys.executable, "main.py", *map(str, flags)]
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr).count("--precision single is faster") == times
