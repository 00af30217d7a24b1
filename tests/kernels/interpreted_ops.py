"""Test each Triton operation against kernels/reference.py in float64, by Triton's interpreter.

TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_ops.py; test_triton_ops.py does that.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace

import pytest
import torch
import triton
from torch import Tensor

from helpers.tiny_networks import Results, mean_error, network, one_step, pictures
from kernels import reference, tiling, triton_ops
from kernels.backend import REFERENCE, Backend
from kernels.dropout import DropoutSpec
from kernels.feature_maps import FeatureMaps, Norm, Reader

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Relative to the norm of a result. The interpreter truncates to bfloat16 instead of rounding.
TOLERANCES = {F32: 3e-6, F16: 2e-3, BF16: 3e-2}
GUARD, GUARD_VALUE = 3, 7.0  # channels of a buffer that lie after those of the operation
EPS = 1e-3
SEED = torch.tensor([-3], dtype=torch.int32)
DROPOUT = DropoutSpec(0.3, SEED, 1234, sample_offset=7)


@dataclass(frozen=True)
class Case:
    """Describe the operands of an operation, and the branches of the kernels that they take.

    Args:
        sizes: images, height, width; channels, outputs of the 1x1 and of the 3x3 convolution.
        overwrite: backward overwrites the gradient of the source instead of adding to it.
        normed: a batch normalisation reads the target, so that it has statistics and corrections.
        channels_last: the memory layout of weights and of tensors from outside the dense block.
        small_programs: loop in each kernel: few programs with several tiles, in one group.
    """

    sizes: tuple[int, ...]
    window: tuple[int, int]
    dtype: torch.dtype = F32
    dropout: DropoutSpec | None = None
    overwrite: bool = True
    normed: bool = True
    channels_last: bool = True
    small_programs: bool = False


USUAL = Case((2, 5, 7, 24, 48, 12), window=(2, 2))
LARGE = Case((3, 9, 5, 70, 132, 17), window=(9, 5), small_programs=True)
CASES = {
    "usual": USUAL,
    "add, dropout": replace(USUAL, dropout=DROPOUT, overwrite=False, channels_last=False),
    "float16": replace(USUAL, dtype=F16, dropout=DROPOUT, overwrite=False),
    "bfloat16": replace(USUAL, dtype=BF16, channels_last=False),
    "no norm reads": replace(USUAL, normed=False, channels_last=False),
    "no norm reads, dropout": replace(USUAL, normed=False, dropout=DROPOUT),
    "several tiles": replace(LARGE, dropout=DROPOUT),
    "several tiles, bfloat16": replace(LARGE, dtype=BF16, overwrite=False),
    "several groups of splits": replace(LARGE, dropout=DROPOUT, small_programs=False),
    "several groups, k = 12, bfloat16": Case((3, 9, 11, 36, 48, 12), window=(2, 3), dtype=BF16),
    "one channel of one image": Case((1, 4, 3, 1, 4, 1), window=(3, 2), overwrite=False),
    "one pixel": Case((3, 1, 1, 6, 16, 4), window=(1, 1), dropout=DROPOUT, channels_last=False),
}
# The operand that the must-fail twin scales.
ALTERED = {
    "copy_with_stats": "outside",
    "conv1x1": "weight",
    "conv3x3": "weight",
    "norm_relu_avg_pool": "norm",
    "conv1x1_backward": "weight",
    "conv3x3_backward": "weight",
    "norm_relu_avg_pool_backward": "outside",
    "complete_gradient": "target",
}


@dataclass
class Operands:
    """Hold the operands of operations: whole buffers, of which they use some channels.

    Args:
        after: the batch norm that reads the target next, and the channels before it.
        outside: maps of another module: the block's input, or the gradient of its pooled output.
    """

    source: FeatureMaps
    target: FeatureMaps
    norm: Norm
    after: Norm
    weight: Tensor
    outside: Tensor


@pytest.fixture(autouse=True)
def poisoned(monkeypatch) -> Iterator[None]:
    """Fill new memory with NaN, so that a test shows what is read before it is written."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def features(case: Case, channels: int, start: int = 0) -> FeatureMaps:
    """Make a buffer with guards after the channels [start, start + channels)."""
    width = start + channels + GUARD
    value, grad = (torch.randn(*case.sizes[:3], width).add(0.3).to(case.dtype) for _ in range(2))
    mean, mean_correction, var_correction = torch.randn(3, width).mul(0.3)
    rstd = torch.rand(width) + 0.5
    found = FeatureMaps(
        value, mean, rstd, torch.ones(width), grad, mean_correction, var_correction, EPS
    )
    for tensor in tensors_of(found).values():
        tensor[..., start + channels :] = GUARD_VALUE
    return found


def draw(case: Case, operation: str) -> Operands:
    """Draw the operands of an operation: the same ones at each call."""
    torch.manual_seed(0)
    images, height, width, channels, *outputs = case.sizes
    side = 3 if "3x3" in operation else 1
    written = outputs[side == 3] if "conv" in operation else channels
    pooled = height // case.window[0], width // case.window[1]
    shape = pooled if "pool" in operation else (height, width)
    outside = torch.randn(images, channels, *shape).to(case.dtype)
    weight = torch.randn(written, channels, side, side)
    if case.channels_last:
        outside, weight = (x.to(memory_format=torch.channels_last) for x in (outside, weight))
    gamma = torch.randn(channels)
    gamma[3::5] = 0  # as training may leave it
    source, target = features(case, channels), features(case, written, start=2)
    bn = norm(gamma, torch.rand(channels), source.channels(0, channels))
    read = 2 + written  # the norm after the target reads all channels up to the guards
    after = Norm(torch.randn(read), torch.rand(read), *torch.full((2, read), GUARD_VALUE))
    return Operands(source, target, bn, after, weight, outside.permute(0, 2, 3, 1))


def norm(gamma: Tensor, beta: Tensor, source: FeatureMaps) -> Norm:
    """Make a batch norm that knows the statistics of what it reads."""
    made = Norm(gamma, beta, torch.empty_like(gamma), torch.empty_like(gamma))
    made.update(source)
    return made


def run(ops, operation: str, case: Case, x: Operands) -> Results:
    """Run one operation; return all tensors that it may write, guards included, and its result."""
    function = getattr(ops, operation)
    source = x.source.channels(0, case.sizes[3])
    target = x.target.channels(2, x.target.value.shape[3] - GUARD)
    reader = Reader(x.after, x.target.channels(0, 2 + target.value.shape[3]))
    out = None
    if operation == "copy_with_stats":
        # As the block's input, it is all that its reader reads.
        own = Norm(*(tensor[2:] for tensor in vars(x.after).values()))
        function(x.outside, target, Reader(own, target))
    elif operation == "norm_relu_avg_pool":
        out = function(source, x.norm, case.window)
    elif operation == "norm_relu_avg_pool_backward":
        out = function(x.outside, source, x.norm, case.window)
    elif operation == "complete_gradient":
        out = function(target)
        assert out.is_contiguous()
    elif operation in ("conv1x1", "conv3x3"):
        target.var = target.var if case.normed else None
        function(source, x.norm, x.weight, target, case.dropout, reader if case.normed else None)
    else:
        if not case.normed:  # the caller's gradient, in any layout, must stay as it is
            layout = torch.channels_last if case.channels_last else torch.contiguous_format
            given = target.grad.permute(0, 3, 1, 2).contiguous(memory_format=layout)
            target = FeatureMaps(given.permute(0, 2, 3, 1), grad=given.permute(0, 2, 3, 1))
        elif operation == "conv1x1_backward":  # as memory_efficient.py passes it
            target.grad = target.grad.contiguous()
        before = target.grad.clone()
        out = function(target, source, x.norm, x.weight, case.dropout, case.overwrite)
        assert case.normed or torch.equal(target.grad, before)
        assert out[0].stride() == x.weight.stride()
    return tensors_of(x) | tensors_of(out, "out")


def tensors_of(x, name: str = "") -> Results:
    """Find every tensor in dataclasses and tuples, by name."""
    if isinstance(x, Tensor):
        return {name: x}
    parts: Iterator = iter(())
    if is_dataclass(x):
        parts = ((field.name, getattr(x, field.name)) for field in fields(x))
    elif isinstance(x, tuple):
        parts = enumerate(x)
    return {k: v for key, part in parts for k, v in tensors_of(part, f"{name}.{key}").items()}


def mapped(x, change):
    """Apply a function to every tensor of floating point numbers in dataclasses."""
    if isinstance(x, Tensor):
        return change(x) if x.is_floating_point() else x
    if not is_dataclass(x):
        return x
    return replace(x, **{f.name: mapped(getattr(x, f.name), change) for f in fields(x)})


def error(got: Results, want: Results) -> float:
    """Return the largest error of a result, relative to its norm without the guards."""
    assert got.keys() == want.keys()
    errors = []
    for name, x in want.items():
        assert got[name].shape == x.shape
        own = torch.where(x == GUARD_VALUE, 0, x)
        errors.append(((got[name].double() - x).norm() / own.norm().clamp_min(1e-3)).item())
    return max(errors)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operation", ALTERED)
def test_an_operation_equals_the_reference(monkeypatch, operation, case):
    case = CASES[case]
    if case.small_programs:
        monkeypatch.setattr(tiling, "gpu_of", lambda device: tiling.Gpu((8, 0), 2))
    got = run(triton_ops, operation, case, draw(case, operation))
    exact = mapped(draw(case, operation), Tensor.double)
    assert error(got, run(reference, operation, case, exact)) < TOLERANCES[case.dtype]
    # The twin: one operand is different.
    exact, name = mapped(draw(case, operation), Tensor.double), ALTERED[operation]
    setattr(exact, name, mapped(getattr(exact, name), lambda x: x * 1.5))
    assert error(got, run(reference, operation, case, exact)) > 3 * TOLERANCES[case.dtype]


def test_copy_rounds_first_and_takes_the_statistics_of_the_rounded_values():
    values = torch.randn(2, 3, 4, 5)
    target = FeatureMaps(torch.empty(2, 3, 4, 5, dtype=F16), *torch.empty(3, 5), eps=EPS)
    triton_ops.copy_with_stats(values, target, None)
    assert torch.equal(target.value, values.half())
    flat, unrounded = target.value.double().view(-1, 5), values.double().view(-1, 5)
    assert (target.mean - flat.mean(0)).abs().max() < 1e-7
    assert (target.mean - unrounded.mean(0)).abs().max() > 1e-6


def test_the_variance_is_right_where_the_mean_is_far_from_0():
    values = torch.randn(4, 9, 11, 3) * 0.1 + 1000
    target = FeatureMaps(torch.empty_like(values), *torch.empty(3, 3), eps=EPS)
    triton_ops.copy_with_stats(values, target, None)
    flat = values.view(-1, 3)
    want = flat.double().var(0, unbiased=False)
    assert (target.var / want - 1).abs().max() < 1e-3
    naive = flat.square().mean(0) - flat.mean(0).square()
    assert (naive / want - 1).abs().max() > 1


@pytest.mark.parametrize(
    ("seed", "layer_id", "offset"),
    [(1, 0, 0), (2**31 - 2, 1, 3), (-(2**31), 2**20 + 1, 2**25 + 1)],
)
def test_dropout_drops_the_same_values_as_the_reference(seed, layer_id, offset):
    x = draw(USUAL, "conv1x1")
    dropout = DropoutSpec(0.4, torch.tensor([seed], dtype=torch.int32), layer_id, offset)
    target = x.target.channels(2, 50)
    triton_ops.conv1x1(x.source.channels(0, 24), x.norm, x.weight, target, dropout, None)
    kept = target.value != 0
    assert torch.equal(kept, dropout.mask(target.value) != 0)
    for change in ({"layer_id": layer_id + 2}, {"sample_offset": offset + 1}):
        assert not torch.equal(kept, replace(dropout, **change).mask(target.value) != 0)


@pytest.mark.parametrize("operation", ["conv1x1", "conv3x3"])
def test_nan_is_not_rectified_to_0(operation):
    got, want = (draw(USUAL, operation) for _ in range(2))
    for x, ops in ((got, triton_ops), (want, reference)):
        x.source.value[1, 2, 3, 4] = torch.nan
        run(ops, operation, USUAL, x)
    nan = got.target.value.isnan()
    assert torch.equal(nan, want.target.value.isnan())
    assert nan.any() and not nan.all()


# Whole networks:
TRITON = Backend.from_module(triton_ops)


def small_pictures(form: str, seed: int = 4) -> tuple[Tensor, Tensor]:
    """Use three images of 42 pixels: two tiles of rows, the second a part."""
    images, targets = pictures(form, count=3, seed=seed)
    return images[..., :7, :6].float(), targets


def step(ops: Backend, level: int, form: str, low=None, seed: int = 4) -> Results:
    model = network(level, form, stages=(2, 1), ops=ops).float()
    return one_step(model, *small_pictures(form, seed), low=low)


@pytest.mark.parametrize(("level", "form"), [(2, "BC, dropout"), (4, "basic")])
def test_a_network_trains_as_at_level_0(level, form):
    got, want = step(TRITON, level, form), step(REFERENCE, 0, form)
    assert error(got, {name: x.double() for name, x in want.items()}) < 1e-4
    other = step(REFERENCE, 0, form, seed=5)
    assert error(got, {name: x.double() for name, x in other.items()}) > 1e-2


def test_a_network_under_autocast_is_about_as_near_to_single_precision():
    single = step(REFERENCE, 0, "BC, dropout")
    got, usual, other = (
        mean_error(step(ops, level, "BC, dropout", BF16, seed), single)
        for ops, level, seed in ((TRITON, 3, 4), (REFERENCE, 0, 4), (REFERENCE, 0, 5))
    )
    # Truncation, where a GPU rounds, doubles the error.
    assert usual / 2 < got < 2.5 * usual < other


@torch.no_grad()
def test_a_network_evaluates_as_at_level_0():
    images, _ = small_pictures("BC")
    got, want, other = (
        network(level, "BC", seed, ops=ops).float().eval()(images)
        for level, seed, ops in ((2, 3, TRITON), (0, 3, REFERENCE), (0, 4, REFERENCE))
    )
    assert (got - want).abs().max() < 1e-5
    assert (got - other).abs().max() > 1e-2
