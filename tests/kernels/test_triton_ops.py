"""Each operation equals kernels/reference.py in float64, through the interpreter."""

import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.run_main import ROOT
from helpers.tiny_networks import (
    Results,
    largest_difference,
    mean_error,
    network,
    one_step,
    pictures,
)
from kernels import reference, tiling
from kernels.backend import Backend
from kernels.dropout import DropoutSpec
from kernels.feature_maps import FeatureMaps, NormParams

pytest.importorskip("triton", reason="Triton is not installed")
from kernels import triton_ops

# Triton decides when a kernel is defined whether it is compiled or interpreted, and other tests
# compile the same kernels. So a child process runs this file with the interpreter, and here each
# test that needs it reports what the child has found.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

GUARD, GUARD_VALUE = 3, 7.0  # channels of a buffer after the maps
EPS = 1e-3
SEED = torch.tensor([-3], dtype=torch.int32)
DROPOUT = DropoutSpec(0.3, SEED, 1234, sample_offset=7)
# Relative to the norm of a result. The interpreter cuts bfloat16 off instead of rounding it.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}
# images, height, width, channels, growth rate
SIZES = {
    "k = 12": (2, 5, 7, 24, 12),
    "several tiles": (3, 9, 6, 70, 17),
    "one channel of one image": (1, 4, 3, 1, 1),
    "one pixel": (3, 1, 1, 6, 4),
}
CASES = pytest.mark.parametrize(
    ("size", "dtype"),
    [(size, torch.float32) for size in SIZES]
    + [("k = 12", torch.float16), ("k = 12", torch.bfloat16), ("several tiles", torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
OVERWRITE_AND_DROPOUTS = pytest.mark.parametrize(
    ("overwrite", "dropout"), [(True, None), (False, DROPOUT)], ids=["overwrite", "add, dropout"]
)
DROPOUTS = pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["whole", "dropout"])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    """Of each test, by name, what the child says about its failure; "" where it has passed."""
    path = tmp_path_factory.mktemp("child") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    subprocess.run(
        [*command, f"--junitxml={path}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
        capture_output=True,
    )
    return {
        case.get("name"): "".join(part.get("message", "") + (part.text or "") for part in case)
        for case in ElementTree.parse(path).iter("testcase")
    }


def interpreted(test: Callable) -> Callable:
    """A test that runs in the child process."""
    if INTERPRETED:
        return test

    @functools.wraps(test)
    def report(request, outcomes, **_):
        if failure := outcomes[request.node.name]:
            pytest.fail(failure, pytrace=False)

    own = inspect.signature(test).parameters.values()
    more = inspect.signature(report, follow_wrapped=False).parameters
    report.__signature__ = inspect.Signature([*own, more["request"], more["outcomes"]])
    return report


# -------------------------------------------------------------------------------------- material


def maps(size: str, channels: int, dtype: torch.dtype, start: int = 0) -> FeatureMaps:
    """Maps that have been read: some channels of a buffer, from `start` on."""
    width = start + channels + GUARD
    shape = (*SIZES[size][:3], width)
    value, grad = (torch.randn(shape).add(0.3).to(dtype) for _ in range(2))
    mean, mean_correction, var_correction = torch.randn(3, width).mul(0.3)
    rstd = torch.rand(width) + 0.5
    whole = FeatureMaps(
        value, mean, rstd, torch.ones(width), grad, mean_correction, var_correction, eps=EPS
    )
    for field in fields(whole):
        tensor = getattr(whole, field.name)
        if isinstance(tensor, Tensor):
            tensor[..., start + channels :] = GUARD_VALUE
    return whole


def norm(channels: int) -> NormParams:
    weight = torch.randn(channels)
    weight[3::5] = 0  # a trained gamma may be nothing
    return NormParams(weight, torch.rand(channels))


def weights(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


def exact(x):
    """A copy in double precision, of whatever has tensors of real numbers."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, FeatureMaps):
        return replace(x, **{f.name: exact(getattr(x, f.name)) for f in fields(x)})
    return NormParams(exact(x.weight), exact(x.bias)) if isinstance(x, NormParams) else x


def copied(x):
    """A copy whose tensors share no memory with the original."""
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, FeatureMaps):
        return replace(x, **{f.name: copied(getattr(x, f.name)) for f in fields(x)})
    return x


def tensors_of(**objects) -> Results:
    """Every tensor of maps and results, by name; the whole buffer, with what is beside the maps."""
    found = {}
    for name, thing in objects.items():
        if isinstance(thing, Tensor):
            found[name] = thing
        elif isinstance(thing, FeatureMaps):
            found |= {
                f"{name}.{field.name}": getattr(thing, field.name)
                for field in fields(thing)
                if isinstance(getattr(thing, field.name), Tensor)
            }
        else:
            found |= tensors_of(**{f"{name}[{i}]": part for i, part in enumerate(thing or ())})
    return found


def error(got: Results, want: Results) -> float:
    """The largest over all results, relative to the norm of each without the guards."""
    assert got.keys() == want.keys()
    errors = []
    for name, x in want.items():
        assert got[name].shape == x.shape
        own = torch.where(x == GUARD_VALUE, 0, x)
        errors.append(((got[name].double() - x).norm() / own.norm().clamp_min(1e-3)).item())
    return max(errors)


def assert_equal(run: Callable, dtype: torch.dtype, *arguments, altered: int) -> None:
    """The operations agree on the arguments, and not where one of them, a tensor, is altered.

    Args:
        run: (ops, *arguments) -> what is to be compared.
        altered: which argument the twin alters.
    """
    got = run(triton_ops, *map(copied, arguments))
    want = run(reference, *map(exact, arguments))
    assert error(got, want) < TOLERANCES[dtype]
    other = list(map(exact, arguments))
    other[altered] = other[altered] * 1.5
    assert error(got, run(reference, *other)) > 3 * TOLERANCES[dtype]


# --------------------------------------------------------------------------------------- forward


@interpreted
@CASES
@pytest.mark.parametrize("order", ["channels last", "contiguous"])
def test_copy_writes_what_plain_pytorch_does(size, dtype, order):
    def run(ops, target, values):
        ops.copy_with_stats(values, target.channels(2, 2 + channels))
        return tensors_of(target=target)

    channels = SIZES[size][3]
    values = torch.randn(*SIZES[size][:3], channels).to(dtype)
    if order == "contiguous":
        values = values.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert_equal(run, dtype, maps(size, channels, dtype, start=2), values, altered=1)


@interpreted
def test_copy_rounds_single_precision_and_has_the_moments_of_what_it_wrote():
    values = torch.randn(2, 3, 4, 5)
    target = FeatureMaps(torch.empty(2, 3, 4, 5, dtype=torch.float16), *torch.empty(3, 5), eps=EPS)
    triton_ops.copy_with_stats(values, target)
    assert torch.equal(target.value, values.half())
    flat, unrounded = target.value.double().view(-1, 5), values.double().view(-1, 5)
    assert (target.mean - flat.mean(0)).abs().max() < 1e-7
    assert (target.mean - unrounded.mean(0)).abs().max() > 1e-6


@interpreted
def test_the_variance_is_right_where_the_mean_is_far_from_0():
    values = torch.randn(4, 9, 11, 3) * 0.1 + 1000
    target = FeatureMaps(torch.empty_like(values), *torch.empty(3, 3), eps=EPS)
    triton_ops.copy_with_stats(values, target)
    flat = values.view(-1, 3)
    want = flat.double().var(0, unbiased=False)
    assert (target.var / want - 1).abs().max() < 1e-3
    naive = flat.square().mean(0) - flat.mean(0).square()
    assert (naive / want - 1).abs().max() > 1


def forward(operation: str) -> Callable:
    def run(ops, source, bn, target, dropout, weight):
        features, channels = weight.shape[:2]
        source_read, target_written = source.channels(0, channels), target.channels(2, 2 + features)
        getattr(ops, operation)(source_read, bn, weight, target_written, dropout)
        return tensors_of(source=source, target=target)

    return run


@interpreted
@CASES
@DROPOUTS
def test_the_product_writes_what_plain_pytorch_does(size, dtype, dropout):
    channels, features = SIZES[size][3], 4 * SIZES[size][4]
    source, target = maps(size, channels, dtype), maps(size, features, dtype, start=2)
    weight = weights(features, channels, 1, 1)
    arguments = (source, norm(channels), target, dropout, weight)
    assert_equal(forward("conv1x1"), dtype, *arguments, altered=4)


@interpreted
@CASES
@DROPOUTS
def test_the_convolution_writes_what_plain_pytorch_does(size, dtype, dropout):
    channels, features = SIZES[size][3:]
    source, target = maps(size, channels, dtype), maps(size, features, dtype, start=2)
    weight = weights(features, channels, 3, 3)
    arguments = (source, norm(channels), target, dropout, weight)
    assert_equal(forward("conv3x3"), dtype, *arguments, altered=4)


@interpreted
@pytest.mark.parametrize("operation", ["conv1x1", "conv3x3"])
def test_moments_are_left_alone_where_they_are_known(operation):
    source, target = maps("k = 12", 24, torch.float32), maps("k = 12", 12, torch.float32, start=2)
    target.var = None
    side = 1 if operation == "conv1x1" else 3
    arguments = (source, norm(24), target, None, weights(12, 24, side, side))
    assert_equal(forward(operation), torch.float32, *arguments, altered=4)


@interpreted
@pytest.mark.parametrize(("layer_id", "sample_offset"), [(0, 0), (1, 3), (2**20 + 1, 2**25 + 1)])
@pytest.mark.parametrize("seed", [1, 2**31 - 2, -(2**31)])
def test_dropout_drops_the_very_values_that_plain_pytorch_does(layer_id, sample_offset, seed):
    source, target = maps("k = 12", 24, torch.float32), maps("k = 12", 12, torch.float32)
    dropout = DropoutSpec(0.4, torch.tensor([seed], dtype=torch.int32), layer_id, sample_offset)
    triton_ops.conv1x1(
        source.channels(0, 24), norm(24), weights(12, 24, 1, 1), target.channels(0, 12), dropout
    )
    written = target.value[..., :12]
    assert torch.equal(written != 0, dropout.mask(written) != 0)
    assert not torch.equal(written != 0, replace(dropout, layer_id=layer_id + 2).mask(written) != 0)
    assert not torch.equal(
        written != 0, replace(dropout, sample_offset=sample_offset + 1).mask(written) != 0
    )


@interpreted
@pytest.mark.parametrize("operation", ["conv1x1", "conv3x3"])
def test_a_value_that_is_not_a_number_stays_none(operation):
    source, target = maps("k = 12", 24, torch.float32), maps("k = 12", 12, torch.float32)
    source.value[1, 2, 3, 4] = torch.nan
    side = 1 if operation == "conv1x1" else 3
    arguments = (source, norm(24), target, None, weights(12, 24, side, side))
    want = forward(operation)(reference, *map(exact, arguments))["target.value"].isnan()
    got = forward(operation)(triton_ops, *arguments)["target.value"].isnan()
    assert torch.equal(got, want)
    assert got.any() and not got.all()


WINDOWS = {
    "k = 12": (2, 2),
    "several tiles": (9, 6),
    "one channel of one image": (3, 2),
    "one pixel": (1, 1),
}


@interpreted
@CASES
def test_pool_averages_what_plain_pytorch_does(size, dtype):
    def run(ops, source, bn, values):
        source = replace(source, value=values)
        return tensors_of(
            out=ops.norm_relu_avg_pool(source.channels(0, channels), bn, WINDOWS[size])
        )

    channels = SIZES[size][3]
    source = maps(size, channels, dtype)
    assert_equal(run, dtype, source, norm(channels), source.value, altered=2)


# -------------------------------------------------------------------------------------- backward


def backward(operation: str, overwrite: bool) -> Callable:
    def run(ops, target, source, bn, dropout, weight):
        features, channels = weight.shape[:2]
        read, written = source.channels(0, channels), target.channels(2, 2 + features)
        if operation == "conv1x1_backward":  # its target is no part of a buffer
            written = replace(written, grad=written.grad.contiguous())
        grads = getattr(ops, operation)(written, read, bn, weight, dropout, overwrite)
        return tensors_of(source=source, value=target.value, grads=grads)

    return run


@interpreted
@CASES
@OVERWRITE_AND_DROPOUTS
def test_the_backward_of_the_product_is_that_of_plain_pytorch(size, dtype, dropout, overwrite):
    channels, features = SIZES[size][3], 4 * SIZES[size][4]
    target, source = maps(size, features, dtype, start=2), maps(size, channels, dtype)
    arguments = (target, source, norm(channels), dropout, weights(features, channels, 1, 1))
    assert_equal(backward("conv1x1_backward", overwrite), dtype, *arguments, altered=4)


@interpreted
@CASES
@OVERWRITE_AND_DROPOUTS
def test_the_backward_of_the_convolution_is_that_of_plain_pytorch(size, dtype, dropout, overwrite):
    channels, features = SIZES[size][3:]
    target, source = maps(size, features, dtype, start=2), maps(size, channels, dtype)
    arguments = (target, source, norm(channels), dropout, weights(features, channels, 3, 3))
    assert_equal(backward("conv3x3_backward", overwrite), dtype, *arguments, altered=4)


@interpreted
@pytest.mark.parametrize(
    "operation", ["copy_with_stats", "conv1x1", "conv3x3", "norm_relu_avg_pool"]
)
def test_programs_with_several_tiles_and_sums_of_many_shares_change_nothing(monkeypatch, operation):
    def run(ops, target, source, bn, weight):
        if operation == "norm_relu_avg_pool":
            grads = ops.norm_relu_avg_pool_backward(
                target[..., :70], source.channels(0, 70), bn, (1, 1)
            )
            return tensors_of(source=source, grads=grads)
        if operation == "copy_with_stats":
            ops.copy_with_stats(source.value[..., :17] * weight[0, 0, 0, 0], target.channels(0, 17))
            return tensors_of(target=target)
        written = forward(operation)(ops, source, bn, target, None, weight)
        return written | backward(f"{operation}_backward", False)(
            ops, target, source, bn, None, weight
        )

    monkeypatch.setattr(tiling, "BACKWARD_PROGRAMS", 4)  # each has several of the 162 rows' tiles
    reduce_partials = {"NORM_SPLITS": 2, "NORM_CHANNELS": 16, "SPLITS": 1, "ELEMENTS": 64}
    monkeypatch.setattr(tiling, "REDUCE_PARTIALS", tiling.Tile(reduce_partials))
    monkeypatch.setattr(tiling, "REDUCE_STATS", tiling.Tile({"SPLITS": 2, "CHANNELS": 8}))
    dtype, side = torch.float32, 3 if operation == "conv3x3" else 1
    source, bn = maps("several tiles", 70, dtype), norm(70)
    target = maps("several tiles", 70 if operation == "norm_relu_avg_pool" else 17, dtype, start=2)
    arguments = [target, source, bn, weights(17, 70, side, side)]
    if operation == "norm_relu_avg_pool":
        arguments[0] = target.grad
    assert_equal(run, dtype, *arguments, altered=0 if operation == "norm_relu_avg_pool" else 3)


@interpreted
@DROPOUTS
@pytest.mark.parametrize("operation", ["conv1x1_backward", "conv3x3_backward"])
def test_a_gradient_that_no_norm_adds_to_is_taken_in_any_order_and_left_as_it_is(
    operation, dropout
):
    def run(ops, grad, source, bn, weight):
        before = grad.clone()
        target = FeatureMaps(grad, grad=grad)
        grads = getattr(ops, operation)(target, source.channels(0, 24), bn, weight, dropout, True)
        assert torch.equal(grad, before)
        return tensors_of(source=source, grads=grads)

    grad = torch.randn(2, 12, 5, 7).permute(0, 2, 3, 1)
    side = 1 if operation == "conv1x1_backward" else 3
    source = maps("k = 12", 24, torch.float32)
    arguments = (grad, source, norm(24), weights(12, 24, side, side))
    assert_equal(run, torch.float32, *arguments, altered=3)


@interpreted
@pytest.mark.parametrize("operation", ["conv1x1_backward", "conv3x3_backward"])
def test_the_gradient_of_a_weight_lies_in_memory_as_the_weight_does(operation):
    side = 1 if operation == "conv1x1_backward" else 3
    target, source = maps("k = 12", 12, torch.float32, start=2), maps("k = 12", 24, torch.float32)
    last = weights(12, 24, side, side)
    for weight in (last, last.contiguous()):
        arguments = (target, source, norm(24), None, weight)
        assert_equal(backward(operation, False), torch.float32, *arguments, altered=4)
        got = backward(operation, False)(triton_ops, *map(copied, arguments))["grads[0]"]
        assert got.stride() == weight.stride()


@interpreted
@CASES
@pytest.mark.parametrize("order", ["channels last", "contiguous"])
def test_the_backward_of_pool_is_that_of_plain_pytorch(size, dtype, order):
    def run(ops, source, bn, grad):
        grads = ops.norm_relu_avg_pool_backward(
            grad, source.channels(0, channels), bn, WINDOWS[size]
        )
        return tensors_of(source=source, grads=grads)

    images, height, width, channels, _ = SIZES[size]
    shape = (images, channels, height // WINDOWS[size][0], width // WINDOWS[size][1])
    grad = torch.randn(shape).to(dtype)
    if order == "channels last":
        grad = grad.to(memory_format=torch.channels_last)
    grad = grad.permute(0, 2, 3, 1)
    assert_equal(run, dtype, maps(size, channels, dtype), norm(channels), grad, altered=2)


@interpreted
@CASES
def test_gradient_completes_what_plain_pytorch_does(size, dtype):
    def run(ops, target, var_correction):
        target = replace(target, var_correction=var_correction)
        out = ops.complete_gradient(target.channels(2, 2 + channels))
        assert out.is_contiguous()
        return tensors_of(out=out, target=target)

    channels = SIZES[size][3]
    target = maps(size, channels, dtype, start=2)
    assert_equal(run, dtype, target, target.var_correction, altered=1)


# ---------------------------------------------------------------------------------- whole networks


def step(ops, level: int, form: str, low: torch.dtype | None = None, seed: int = 4) -> Results:
    images, targets = pictures(form, count=3, seed=seed)
    return one_step(
        network(level, form, ops=Backend.from_module(ops)).float(), images.float(), targets, low=low
    )


@interpreted
@pytest.mark.parametrize("level", [2, 3, 4])
@pytest.mark.parametrize("form", ["BC, dropout", "basic"])
def test_a_network_trains_as_at_level_0(level, form):
    got, want = step(triton_ops, level, form), step(reference, 0, form)
    assert error(got, {name: x.double() for name, x in want.items()}) < 1e-4
    other = step(reference, 0, form, seed=5)
    assert error(got, {name: x.double() for name, x in other.items()}) > 1e-2


@interpreted
@pytest.mark.parametrize("form", ["BC, dropout", "basic"])
def test_a_network_under_autocast_is_about_as_near_to_single_precision(form):
    single = step(reference, 0, form)
    mine, theirs, other = (
        mean_error(step(ops, level, form, torch.bfloat16, seed), single)
        for ops, level, seed in ((triton_ops, 2, 4), (reference, 0, 4), (triton_ops, 2, 5))
    )
    # What the interpreter cuts off instead of rounding it is twice as far away.
    assert theirs / 2 < mine < 2.5 * theirs < other


@interpreted
@pytest.mark.parametrize("form", ["BC", "basic, dropout"])
def test_a_network_evaluates_as_at_level_0(form):
    images = pictures(form)[0].float()
    with torch.no_grad():
        got, want = (
            {"logits": network(level, form, ops=Backend.from_module(ops)).float().eval()(images)}
            for level, ops in ((2, triton_ops), (0, reference))
        )
        other = {"logits": network(0, form, seed=4).float().eval()(images)}
    assert largest_difference(got, want) < 1e-5
    assert largest_difference(got, other) > 1e-2


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_memory_have_results_without_a_launch(kind):
    # A launch would raise: without memory and without the interpreter nothing can run.
    device = "meta" if kind == "meta" else "cpu"

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    with FakeTensorMode() if kind == "fake" else nullcontext():
        value, grad = empty(2, 2, 5, 7, 27, dtype=torch.float16)
        source = FeatureMaps(value, *empty(3, 27), grad, *empty(2, 27))
        value, grad = empty(2, 2, 5, 7, 15, dtype=torch.float16)
        target, bn = (
            FeatureMaps(value, *empty(3, 15), grad, *empty(2, 15)),
            NormParams(*empty(2, 27)),
        )
        for side, operation in ((1, "conv1x1"), (3, "conv3x3")):
            weight = empty(15, 27, side, side)
            getattr(triton_ops, operation)(source, bn, weight, target, None)
            grads = getattr(triton_ops, f"{operation}_backward")(
                target, source, bn, weight, None, True
            )
            assert [x.shape for x in grads] == [weight.shape, bn.weight.shape, bn.bias.shape]
            assert {(x.dtype, x.device.type) for x in grads} == {(torch.float32, device)}
        triton_ops.copy_with_stats(source.value, source)
        pooled = triton_ops.norm_relu_avg_pool(source, bn, (2, 3))
        assert (pooled.shape, pooled.dtype) == ((2, 2, 2, 27), torch.float16)
        assert len(triton_ops.norm_relu_avg_pool_backward(pooled, source, bn, (2, 3))) == 2
        assert triton_ops.complete_gradient(source).shape == source.value.shape
