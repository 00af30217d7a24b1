"""Test kernels/reference.py: each operation equals float64 autograd of its definition, by tiles."""

import copy
import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cpu, reference
from kernels.dropout import DropoutSpec
from kernels.feature_maps import FeatureMaps, Norm, Reader

IMAGES, HEIGHT, WIDTH, CHANNELS, FEATURES, EPS = 5, 7, 5, 6, 4, 1e-3
TILES = {"one tile": 5, "ragged tiles": 2, "tiles of one image": 1}  # images in a tile
GUARD = 3  # channels of a buffer on either side of the maps
GUARD_VALUE = 7.0
SHIPPED_TILES = reference._tiles
SEED = torch.tensor([3], dtype=torch.int32)


@pytest.fixture(params=TILES, autouse=True)
def _tiles(request, monkeypatch):
    size = TILES[request.param]
    monkeypatch.setattr(
        reference,
        "_tiles",
        lambda value: [slice(i, i + size) for i in range(0, len(value), size)],
    )


@pytest.mark.parametrize(
    "shape", [(64, 32, 32, 24), (1, 224, 224, 64), (7, 1, 1, 3), (33, 9, 5, 400)]
)
def test_tiles_are_the_whole_batch_in_order(shape):
    for dtype in (torch.float32, torch.bfloat16):
        tiles = list(SHIPPED_TILES(torch.empty(shape, dtype=dtype)))
        images = [i for tile in tiles for i in range(shape[0])[tile]]
        assert images == list(range(shape[0]))
        assert all(tile.start < tile.stop <= shape[0] for tile in tiles)
    assert len(list(SHIPPED_TILES(torch.empty(512, 32, 32, 240, device="meta")))) > 1


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def guarded(values: Tensor) -> tuple[Tensor, Tensor]:
    """Make a buffer with channels on either side; return it and its slice with the values."""
    buffer = values.new_full((*values.shape[:-1], values.shape[-1] + 2 * GUARD), GUARD_VALUE)
    part = buffer[..., GUARD:-GUARD]
    part.copy_(values)
    return buffer, part


def guards_are_whole(buffer: Tensor) -> bool:
    outside = torch.cat([buffer[..., :GUARD], buffer[..., -GUARD:]], -1)
    return bool((outside == GUARD_VALUE).all())


def new_target(channels: int, dtype=torch.float64) -> tuple[Tensor, FeatureMaps]:
    """Return a buffer, NaN so far, and feature maps whose values are a slice of it."""
    unknown = torch.full((IMAGES, HEIGHT, WIDTH, channels), math.nan, dtype=dtype)
    buffer, value = guarded(unknown)
    wide = torch.promote_types(dtype, torch.float32)
    stats = torch.full((3, channels), math.nan, dtype=wide)
    return buffer, FeatureMaps(value, *stats, eps=EPS)


def source_maps(channels: int = CHANNELS) -> FeatureMaps:
    """Make feature maps with the statistics of their batch, whose gradient is undefined so far."""
    value = guarded(0.5 + draw(IMAGES, HEIGHT, WIDTH, channels))[1]
    flat = value.reshape(-1, channels)
    var = flat.var(0, unbiased=False)
    grad = guarded(torch.full_like(value, math.nan))[1]
    corrections = torch.zeros(2, channels, dtype=value.dtype)
    return FeatureMaps(value, flat.mean(0), (var + EPS).rsqrt(), var, grad, *corrections, eps=EPS)


def finished_target(normed: bool = True) -> tuple[FeatureMaps, Tensor]:
    """Make feature maps after the backward of all readers, and their complete gradient."""
    features = source_maps(FEATURES)
    features.grad.copy_(draw(*features.value.shape))
    if not normed:  # read by no batch normalisation
        return FeatureMaps(features.grad, grad=features.grad), features.grad.clone()
    features.mean_correction, features.var_correction = draw(2, FEATURES)
    normalised = (features.value - features.mean) * features.rstd
    return features, features.grad - features.mean_correction - normalised * features.var_correction


class Parameters(NamedTuple):
    weight: Tensor
    bias: Tensor


def norm(source: FeatureMaps, given: Parameters | None = None, gamma: float = 0.0) -> Norm:
    """Make a batch norm that knows the statistics of the maps that it reads."""
    channels = len(source.mean)
    weight, bias = given or (torch.rand(channels, dtype=torch.float64) + 0.5, draw(channels))
    if given is None:
        weight[1::3] *= -1  # training may make gamma negative, or 0
        weight[2] = gamma
    made = Norm(weight, bias, *source.mean.new_empty(2, channels))
    made.update(source)
    return made


def definition(value: Tensor, bn: Norm | Parameters) -> Tensor:
    """Compute Z, (N, C, H, W), by PyTorch's own batch normalisation."""
    nchw = value.permute(0, 3, 1, 2)
    return F.relu(F.batch_norm(nchw, None, None, bn.weight, bn.bias, True, 0.0, EPS))


def convolved(
    value: Tensor, bn: Norm | Parameters, weight: Tensor, dropout: DropoutSpec | None
) -> Tensor:
    """Compute (N, H, W, F) by either convolution."""
    out = F.conv2d(definition(value, bn), weight, padding=weight.shape[-1] // 2)
    out = out.permute(0, 2, 3, 1)
    return out * dropout.mask(out) if dropout else out


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def assert_stats(features: FeatureMaps, values: Tensor, tolerance: float = 1e-12) -> None:
    flat = values.double().reshape(-1, values.shape[-1])
    mean, var = flat.mean(0), flat.var(0, unbiased=False)
    found = (features.mean, features.var, features.rstd)
    for got, want in zip(found, (mean, var, (var + EPS).rsqrt()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def assert_near(got: Tensor, want: Tensor, name: str | None = None) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=name)


SIDES = pytest.mark.parametrize("side", [1, 3])
DROPOUT, OTHER_DROPOUT = DropoutSpec(0.4, SEED, 5), DropoutSpec(0.4, SEED, 6)
DROPOUTS = pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["whole", "dropout"])


# Forward:
def test_copy_writes_the_values_and_their_statistics_and_nothing_else():
    buffer, target = new_target(CHANNELS)
    values = draw(IMAGES, HEIGHT, WIDTH, CHANNELS)
    reference.copy_with_stats(values, target, None)
    assert torch.equal(target.value, values)
    assert_stats(target, values)
    assert guards_are_whole(buffer)
    with pytest.raises(AssertionError):
        assert_stats(target, values[:-1])


@SIDES
@DROPOUTS
def test_conv_writes_its_definition_and_nothing_else(side, dropout):
    source, weight = source_maps(), draw(FEATURES, CHANNELS, side, side)
    bn = norm(source)
    before = source.value.clone()
    buffer, target = new_target(FEATURES)
    reference.conv(source, bn, weight, target, dropout, None)
    want = convolved(source.value, bn, weight, dropout)
    torch.testing.assert_close(target.value, want, rtol=1e-12, atol=1e-12)
    assert_stats(target, want)
    assert guards_are_whole(buffer) and torch.equal(source.value, before)
    other = convolved(source.value, bn, weight, OTHER_DROPOUT)
    assert (target.value - other).abs().max() > 0.1


@pytest.mark.parametrize("known", [True, False])
def test_conv_computes_statistics_only_where_the_target_asks_for_them(known):
    source, weight = source_maps(), draw(FEATURES, CHANNELS, 1, 1)
    bn = norm(source)
    _, target = new_target(FEATURES)
    target.var = None
    target.mean, target.rstd = draw(2, FEATURES) if known else (None, None)  # as in evaluation
    before = copy.deepcopy((target.mean, target.rstd))
    reference.conv(source, bn, weight, target, None, None)
    torch.testing.assert_close(target.value, convolved(source.value, bn, weight, None))
    torch.testing.assert_close((target.mean, target.rstd), before, rtol=0, atol=0)
    assert target.var is None


@pytest.mark.parametrize("side", [1, 3])
def test_conv_writes_the_affine_function_of_the_norm_that_reads_its_output_next(side):
    source, weight = source_maps(), draw(FEATURES, CHANNELS, side, side)
    buffer = replace(source_maps(), value=draw(IMAGES, HEIGHT, WIDTH, CHANNELS))
    new = buffer.channels(CHANNELS - FEATURES, CHANNELS)
    after = norm(buffer)
    stale = after.scale.clone()
    reference.conv(source, norm(source), weight, new, None, Reader(after, buffer))
    want = F.batch_norm(buffer.value.permute(0, 3, 1, 2), buffer.mean, buffer.rstd**-2 - EPS,
                        after.weight, after.bias, eps=EPS)  # fmt: skip
    assert_near((buffer.value * after.scale + after.shift).permute(0, 3, 1, 2), want)
    assert_stats(new, new.value)
    assert not torch.equal(after.scale, stale)


WINDOWS = pytest.mark.parametrize("window", [(2, 2), (HEIGHT, WIDTH), (3, 2), (1, 1)])


@WINDOWS
def test_pool_averages_whole_windows(window):
    source = source_maps()
    bn = norm(source)
    got = reference.norm_relu_avg_pool(source, bn, window)
    want = F.avg_pool2d(definition(source.value, bn), window).permute(0, 2, 3, 1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got.shape == (IMAGES, HEIGHT // window[0], WIDTH // window[1], CHANNELS)
    if window != (1, 1):
        largest = F.max_pool2d(definition(source.value, bn), window).permute(0, 2, 3, 1)
        assert (got - largest).abs().max() > 0.1


# Backward:
@SIDES
@DROPOUTS
@pytest.mark.parametrize("gamma", [0.0, 1.0])  # gamma is divided by where it is not small
@pytest.mark.parametrize(("overwrite", "normed"), [(True, True), (False, True), (True, False)])
def test_the_backward_of_conv_equals_autograd(side, dropout, gamma, overwrite, normed):
    source, weight = source_maps(), draw(FEATURES, CHANNELS, side, side)
    bn = norm(source, gamma=gamma)
    buffer, source.grad = guarded(torch.full_like(source.grad, math.nan if overwrite else 1.0))
    target, upstream = finished_target(normed)
    operands = target, bn.weight, bn.bias, weight, source.value
    before = copy.deepcopy(operands)
    got = reference.conv_backward(target, source, bn, weight, dropout, overwrite)
    assert guards_are_whole(buffer)

    value, w, gamma, beta = leaves(source.value, weight, bn.weight, bn.bias)
    out = convolved(value, Parameters(gamma, beta), w, dropout)
    wants = torch.autograd.grad(out, (w, gamma, beta, value), upstream, retain_graph=True)
    for name, found, want in zip(("weight", "gamma", "beta"), got, wants, strict=False):
        assert_near(found, want, name)
    assert_near(reference.complete_gradient(source) - (0 if overwrite else 1), wants[-1])
    for old, new in zip(before[1:], operands[1:], strict=True):
        assert torch.equal(old, new)
    assert torch.equal(before[0].grad, target.grad)  # neither completed nor masked in place

    # The twin: without completing the target's gradient, or with the mask of another layer.
    others = [torch.autograd.grad(out, w, target.grad)[0]] if normed else []
    if dropout:
        wrong = convolved(value, Parameters(gamma, beta), w, OTHER_DROPOUT)
        others.append(torch.autograd.grad(wrong, w, upstream)[0])
    assert all((got[0] - other).abs().max() > 0.1 for other in others)


@pytest.mark.parametrize("gamma", [1.0, 0.03, 1e-6, 0.0])
def test_a_small_gamma_costs_its_gradient_at_most_two_digits(monkeypatch, gamma):
    def dgamma(lower) -> Tensor:
        x = replace(source, **{n: lower(v) for n, v in vars(source).items() if n != "eps"})
        out = FeatureMaps(lower(upstream), grad=lower(upstream))
        bn = norm(x, Parameters(lower(drawn.weight), lower(drawn.bias)))
        return reference.conv_backward(out, x, bn, lower(weight), None, True)[1].double()

    source, weight = source_maps(), draw(FEATURES, CHANNELS, 3, 3)
    drawn = norm(source, gamma=gamma)
    drawn.bias[2] = 1.0  # relu passes the channel, whatever gamma is
    upstream = draw(IMAGES, HEIGHT, WIDTH, FEATURES)
    want = dgamma(Tensor.double)

    def error() -> float:
        return ((dgamma(Tensor.float) - want).norm() / want.norm()).item()

    assert error() < 3e-5
    monkeypatch.setattr(reference, "_sums_directly", lambda *_: False)  # the twin
    assert (error() < 3e-5) == (gamma > 1e-2)


@WINDOWS
def test_the_backward_of_pool_equals_autograd(window):
    source = source_maps()
    bn = norm(source)
    upstream = draw(IMAGES, HEIGHT // window[0], WIDTH // window[1], CHANNELS)
    got = reference.norm_relu_avg_pool_backward(upstream, source, bn, window)

    value, gamma, beta = leaves(source.value, bn.weight, bn.bias)
    out = F.avg_pool2d(definition(value, Parameters(gamma, beta)), window).permute(0, 2, 3, 1)
    *wants, dvalue = torch.autograd.grad(out, (gamma, beta, value), upstream)
    for found, want in zip(got, wants, strict=True):
        assert_near(found, want)
    assert_near(reference.complete_gradient(source), dvalue)
    assert (source.grad - dvalue).abs().max() > 0.01  # not complete without the corrections


def test_two_convolutions_and_a_pool_that_read_the_same_maps_add_up():
    # The pool reads them all; the convolutions, in the order of backward, only the first channels.
    source = source_maps()
    part = source.channels(0, CHANNELS - 2)
    norms = norm(source), norm(source), norm(part)
    weights = draw(FEATURES, CHANNELS, 1, 1), draw(FEATURES, CHANNELS - 2, 3, 3)
    targets = finished_target(), finished_target()
    upstream = draw(IMAGES, HEIGHT // 2, WIDTH // 2, CHANNELS)
    reference.norm_relu_avg_pool_backward(upstream, source, norms[0], (2, 2))
    reference.conv_backward(targets[0][0], source, norms[1], weights[0], None, False)
    reference.conv_backward(targets[1][0], part, norms[2], weights[1], None, False)

    (value,) = leaves(source.value)
    pooled = F.avg_pool2d(definition(value, norms[0]), 2).permute(0, 2, 3, 1)
    one = convolved(value, norms[1], weights[0], None)
    two = convolved(value[..., : CHANNELS - 2], norms[2], weights[1], None)
    losses = [(pooled * upstream).sum(), (one * targets[0][1]).sum(), (two * targets[1][1]).sum()]
    want = torch.autograd.grad(sum(losses), value, retain_graph=True)[0]
    assert_near(reference.complete_gradient(source), want)
    without = torch.autograd.grad(sum(losses[:2]), value)[0]
    assert (reference.complete_gradient(source) - without).abs().max() > 0.1
    # A part is completed alone as it is within the whole.
    torch.testing.assert_close(reference.complete_gradient(part), want[..., : CHANNELS - 2])


# Precision:
@pytest.mark.parametrize("mean", [0.0, 100.0, -1000.0])
def test_moments_of_far_means_keep_their_digits_in_single_precision(mean):
    values = (mean + draw(IMAGES, HEIGHT, WIDTH, CHANNELS)).float()
    _, target = new_target(CHANNELS, torch.float32)
    reference.copy_with_stats(values, target, None)
    assert_stats(target, values, 1e-4)
    # The textbook's difference of squares has no digit left there.
    flat = values.reshape(-1, CHANNELS)
    textbook = flat.square().mean(0) - flat.mean(0).square()
    wrong = (textbook / flat.double().var(0, unbiased=False) - 1).abs().max()
    assert (wrong > 3e-4) == (mean != 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_half_precision_maps_are_made_in_single_precision(dtype):
    # 4,096 ones and more: adding one to 256 changes nothing in bf16.
    values = (1 + draw(64, 16, 8, 3) / 4).to(dtype)
    target = FeatureMaps(torch.empty_like(values), *torch.empty(3, 3).unbind(), eps=EPS)
    reference.copy_with_stats(values, target, None)
    assert_stats(target, values, 1e-5)
    assert target.mean.dtype == torch.float32

    # A large beta: relu passes every value, so that dbeta counts them.
    source = replace(target, grad=torch.empty_like(values), mean_correction=torch.zeros(3))
    source.var_correction = torch.zeros(3)
    bn = norm(source, Parameters(torch.ones(3), torch.full((3,), 100.0)))
    upstream = torch.ones(64, 8, 4, 3, dtype=dtype)
    _, dbeta = reference.norm_relu_avg_pool_backward(upstream, source, bn, (2, 2))
    torch.testing.assert_close(dbeta, torch.full((3,), 64 * 8 * 4.0), rtol=1e-5, atol=0)


class Products(TorchDispatchMode):
    """Collect the dtypes of matrix products and convolutions."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._schema.name in {f"aten::{n}" for n in ("mm", "convolution", "convolution_backward")}:
            self.dtypes.add(args[0].dtype)
        return op(*args, **(kwargs or {}))


@SIDES
@pytest.mark.parametrize("instructions", [True, False])  # whether the CPU has them for the dtype
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2.5e-3)],
)
def test_lower_precisions_are_as_near_as_their_digits_allow(
    monkeypatch, side, instructions, dtype, tolerance
):
    monkeypatch.setattr(cpu, "computes_in", lambda dtype: instructions or dtype.itemsize > 2)

    def run(source: FeatureMaps, target: FeatureMaps, w: Tensor) -> list[Tensor]:
        bn = norm(source, Parameters(*(x.to(w.dtype) for x in drawn)))
        written = new_target(FEATURES, source.value.dtype)[1]
        grads = reference.conv_backward(target, source, bn, w, None, True)
        reference.conv(source, bn, w, written, None, None)
        return [written.value, reference.complete_gradient(source), written.mean, *grads]

    def lowered(x: FeatureMaps) -> FeatureMaps:
        """Convert to `dtype`, the vectors to float32."""
        wide = ("mean", "rstd", "var", "mean_correction", "var_correction")
        changed = {name: getattr(x, name).float() for name in wide}
        return replace(x, value=x.value.to(dtype), grad=x.grad.to(dtype), **changed)

    source, weight = source_maps(), draw(FEATURES, CHANNELS, side, side)
    bn = norm(source)
    source.value.copy_(source.value.to(dtype))  # so that only the arithmetic rounds
    flat = source.value.reshape(-1, CHANNELS)
    source.mean, source.rstd = flat.mean(0), (flat.var(0, unbiased=False) + EPS).rsqrt()
    target, _ = finished_target()
    drawn = Parameters(bn.weight, bn.bias)
    with Products() as products:
        got = run(lowered(source), lowered(target), weight.float())
    assert products.dtypes == {dtype if instructions else torch.float32}
    want = run(source, target, weight)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    assert tolerance / 1000 < max(errors) < tolerance
    assert [x.dtype for x in got] == [dtype] * 2 + [torch.float32] * 4
