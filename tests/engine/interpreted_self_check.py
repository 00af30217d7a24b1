"""Test engine/self_check.py with Triton's kernels, by its interpreter, sound and spoilt.

TRITON_INTERPRET=1 python -m pytest tests/engine/interpreted_self_check.py; test_backend_choice.py
does that.
"""

from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor

import opts
from engine import self_check
from engine.backend_choice import select_backend
from errors import UsageError
from kernels import triton_ops
from kernels.backend import REFERENCE, load_triton

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"

CPU = torch.device("cpu")
FLAGS = "--dataset synthetic --growthRate 4 --kernels auto --precision "


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def settings(flags: str = "single --depth 10") -> opts.Settings:
    return opts.parse((FLAGS + flags).split())


@pytest.mark.parametrize(
    "flags",
    [
        "single --depth 10",
        "half --bottleneck false --dropRate 0.2 --depth 13",
        "bf16 --depth 10 --bnEps 1e-3",
    ],
)
def test_sound_kernels_are_chosen_and_leave_no_trace(flags):
    settings_before = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    generator, tensors = torch.get_rng_state(), torch.rand(3)
    torch.set_rng_state(generator)
    assert select_backend(settings(flags), CPU) == (load_triton(), None)
    assert torch.equal(torch.get_rng_state(), generator) and torch.equal(torch.rand(3), tensors)
    assert settings_before == (
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


def test_every_result_of_a_step_is_compared():
    names = {each.name for each in self_check.measure_differences(settings(), CPU, load_triton())}
    layer = "features.denseblock1.denselayer2."
    assert names >= {"output", "output in evaluation", "gradient of the input"}
    assert names >= {f"gradient of {layer}{name}.weight" for name in ("norm1", "conv1", "conv2")}
    assert names >= {f"{layer}norm2.running_{name}" for name in ("mean", "var")}
    assert {"gradient of features.norm5.bias", "gradient of features.transition1.norm.bias"} < names


def on_weight(change: Callable[[Tensor], Tensor]) -> Callable:
    """Spoil an operation by changing the weight that it reads."""

    def spoil(operation: Callable) -> Callable:
        def spoilt(*args, **named):
            return operation(*(change(x) if _is_weight(x) else x for x in args), **named)

        return spoilt

    return spoil


def _is_weight(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4


def on_result(change: Callable[[Tensor], Tensor], index: int | None = None) -> Callable:
    """Spoil an operation by changing what it returns, or one tensor of it."""

    def spoil(operation: Callable) -> Callable:
        def spoilt(*args, **named):
            found = operation(*args, **named)
            if index is None:
                return change(found)
            return (*found[:index], change(found[index]), *found[index + 1 :])

        return spoilt

    return spoil


def without_a_tap(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[:, :, 0, -1] = 0
    return weight


def with_a_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1)[-1] = torch.nan
    return x


def raising(operation: Callable) -> Callable:
    def spoilt(*args, **named):
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    return spoilt


FORWARD, GRADIENT = "Triton's (output|features)", "Triton's gradient of "
DIFFERS = r".* differs from plain PyTorch's by \S+ of its norm, and precision single explains \S+"


@pytest.mark.parametrize(
    ("operation", "spoil", "message"),
    [
        ("conv3x3", on_weight(without_a_tap), FORWARD + DIFFERS),
        ("conv1x1", on_weight(lambda weight: weight * 1.001), FORWARD + DIFFERS),
        ("norm_relu_avg_pool", on_result(lambda out: out.roll(1, -1)), FORWARD + DIFFERS),
        ("norm_relu_avg_pool", on_result(with_a_nan), FORWARD + ".* by nan of its norm"),
        ("conv3x3_backward", on_weight(without_a_tap), GRADIENT + DIFFERS),
        ("conv3x3_backward", on_result(without_a_tap, 0), GRADIENT + r"\S+conv2.weight" + DIFFERS),
        ("conv1x1_backward", on_result(torch.neg, 1), GRADIENT + r"\S+norm1.weight" + DIFFERS),
        ("conv1x1_backward", on_result(with_a_nan, 2), GRADIENT + ".*norm1.bias.* by nan of its"),
        ("complete_gradient", on_result(lambda dx: dx * 0.8), GRADIENT + "the input" + DIFFERS),
        ("complete_gradient", raising, "Triton does not work here: out of resource: shared memory"),
    ],
)
def test_a_spoilt_kernel_falls_back_and_says_what_differs(monkeypatch, operation, spoil, message):
    monkeypatch.setattr(self_check, "SEEDS", self_check.SEEDS[:1])  # half the time, and again:
    monkeypatch.setattr(self_check, "SIZES", {"cpu": (2, 4)})
    monkeypatch.setattr(triton_ops, operation, spoil(getattr(triton_ops, operation)))
    opt = settings()
    with pytest.raises(UsageError, match="kernels triton: " + message) as caught:
        select_backend(opt.replace(kernels="triton"), CPU)
    assert caught.value.report().endswith("; fix: use --kernels auto")
    assert "\n" not in caught.value.report()
    if spoil is raising:
        assert select_backend(opt, CPU) == (REFERENCE, None)  # on a GPU with a note
