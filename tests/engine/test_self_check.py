"""Test engine/self_check.py without Triton: what a difference is measured against."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine import self_check
from engine.self_check import Difference, find_fault, measure_differences
from kernels.backend import REFERENCE
from kernels.precision import set_tf32

CPU = torch.device("cpu")
OPT = {"growthRate": 5, "bottleneck": True, "reduction": 0.5, "dropRate": 0.2, "bnEps": 1e-5}


def settings(precision: str) -> SimpleNamespace:
    return SimpleNamespace(precision=precision, **OPT)


@pytest.mark.parametrize("precision", ["single", "bf16"])
def test_an_implementation_does_not_differ_from_itself_and_has_an_error(precision):
    found = measure_differences(settings(precision), CPU, REFERENCE)
    assert {each.size for each in found} == {0}
    explained = max(each.explained for each in found if not each.is_gradient)
    assert 0.1 < explained / torch.finfo(getattr(torch, DTYPES[precision])).eps < 20


DTYPES = {"single": "float32", "bf16": "bfloat16"}


def test_what_bf16_explains_single_does_not():
    class InBF16(SimpleNamespace):
        """Run the operations of plain PyTorch on weights rounded to bf16."""

        def __getattr__(self, name: str):
            return lambda *args, **named: getattr(REFERENCE, name)(*map(rounded, args), **named)

    def rounded(x: object) -> object:
        is_weight = isinstance(x, torch.Tensor) and x.dim() == 4
        return x.to(torch.bfloat16).to(x.dtype) if is_weight else x

    assert find_fault(settings("bf16"), CPU, InBF16()) is None
    fault = find_fault(settings("single"), CPU, InBF16())
    assert fault.startswith("Triton's ") and "and precision single explains" in fault


@pytest.mark.parametrize("name", ["output", "gradient of the input"])
def test_a_nan_is_never_explained_and_a_wrong_result_in_forward_is_named_first(name, monkeypatch):
    one = Difference(name, float("nan"), explained=1.0, unit=1.0)
    assert not one.is_allowed and replace(one, size=0.5).is_allowed
    assert not replace(one, size=0.5, explained=float("nan")).is_allowed
    others = [replace(one, name="gradient of x", size=1e9), replace(one, name="y", size=19.0)]
    monkeypatch.setattr(self_check, "measure_differences", lambda *_: [*others, one])
    first = name if name == "output" else "y"
    assert find_fault(settings("half"), CPU, REFERENCE).startswith(f"Triton's {first} differs")


def test_a_difference_that_one_draw_alone_shows_is_no_fault(monkeypatch):
    found = []

    def measure(opt, device, triton, seed) -> list[Difference]:
        found.append(seed)
        return [Difference("output", size=1.0 * (seed == found[0]), explained=0, unit=0)]

    monkeypatch.setattr(self_check, "measure_differences", measure)
    assert find_fault(settings("single"), CPU, REFERENCE) is None
    assert found == [*self_check.SEEDS[:2]]


def test_tf32_is_allowed_its_digits():
    try:
        units = []
        for allowed in (True, False):
            set_tf32(allowed)
            (one, *_) = measure_differences(settings("single"), CPU, REFERENCE)
            units.append(one.unit)
    finally:
        set_tf32(False)
    assert units == [2**-10, 2**-21]
