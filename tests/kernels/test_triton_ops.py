"""Test the Triton operations on a CPU: by the interpreter, and with tensors without memory."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.run_main import ROOT
from kernels.feature_maps import FeatureMaps, Norm, Reader

pytest.importorskip("triton", reason="Triton is not installed")
from kernels import triton_ops


def test_every_operation_equals_the_reference_in_the_interpreter():
    # Triton decides at a kernel's definition whether it is compiled or interpreted, and other
    # tests of this process compile the same kernels.
    tests = Path(__file__).with_name("interpreted_ops.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_memory_have_results_without_a_launch(kind):
    # A launch would raise: without memory and without the interpreter nothing can run.
    device = "meta" if kind == "meta" else "cpu"

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def features(channels: int) -> FeatureMaps:
        value, grad = empty(2, 2, 5, 7, channels, dtype=torch.float16)
        return FeatureMaps(value, *empty(3, channels), grad, *empty(2, channels))

    with FakeTensorMode() if kind == "fake" else nullcontext():
        source, target, bn = features(27), features(15), Norm(*empty(4, 27))
        for side, operation in ((1, "conv1x1"), (3, "conv3x3")):
            weight = empty(15, 27, side, side)
            getattr(triton_ops, operation)(source, bn, weight, target, None, None)
            backward = getattr(triton_ops, f"{operation}_backward")
            grads = backward(target, source, bn, weight, None, True)
            assert [x.shape for x in grads] == [weight.shape, bn.weight.shape, bn.bias.shape]
            assert {(x.dtype, x.device.type) for x in grads} == {(torch.float32, device)}
        triton_ops.copy_with_stats(source.value, source, Reader(bn, source))
        pooled = triton_ops.norm_relu_avg_pool(source, bn, (2, 3))
        assert (pooled.shape, pooled.dtype) == ((2, 2, 2, 27), torch.float16)
        assert len(triton_ops.norm_relu_avg_pool_backward(pooled, source, bn, (2, 3))) == 2
        assert triton_ops.complete_gradient(source).shape == source.value.shape
