"""kernels/reference.py: each operation equals float64 autograd of its definition, tile by tile."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.dropout import DropoutSpec
from kernels.feature_maps import FeatureMaps, NormParams

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
        lambda value: [
            slice(start, min(start + size, len(value))) for start in range(0, len(value), size)
        ],
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


def draw(*shape: int, at_least: float | None = None, dtype=torch.float64) -> Tensor:
    """Normal numbers; uniform ones in the unit above a bound."""
    x = torch.randn(shape, dtype=dtype)
    return x if at_least is None else torch.rand(shape, dtype=dtype) + at_least


def guarded(values: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer with channels on either side, and the slice of it that holds the values."""
    buffer = values.new_full((*values.shape[:-1], values.shape[-1] + 2 * GUARD), GUARD_VALUE)
    part = buffer[..., GUARD:-GUARD]
    part.copy_(values)
    return buffer, part


def guards_are_whole(buffer: Tensor) -> bool:
    outside = torch.cat([buffer[..., :GUARD], buffer[..., -GUARD:]], -1)
    return bool((outside == GUARD_VALUE).all())


def new_target(
    channels: int, dtype=torch.float64, stats: bool = True
) -> tuple[Tensor, FeatureMaps]:
    """Maps to be written into a buffer: nothing of them is known yet."""
    unknown = torch.full((IMAGES, HEIGHT, WIDTH, channels), math.nan, dtype=dtype)
    buffer, value = guarded(unknown)
    wide = torch.promote_types(dtype, torch.float32)
    rows = torch.full((3, channels), math.nan, dtype=wide).unbind() if stats else (None,) * 3
    return buffer, FeatureMaps(value, *rows, eps=EPS)


def with_stats(channels: int = CHANNELS, mean: float = 0.5) -> FeatureMaps:
    """Maps with the moments of their batch, part of a buffer."""
    value = guarded(mean + draw(IMAGES, HEIGHT, WIDTH, channels))[1]
    flat = value.reshape(-1, channels)
    var = flat.var(0, unbiased=False)
    return FeatureMaps(value, flat.mean(0), (var + EPS).rsqrt(), var, eps=EPS)


def with_grad(maps: FeatureMaps) -> FeatureMaps:
    """Maps whose gradient is to be gathered: undefined, with nothing added to it."""
    maps.grad = guarded(torch.full_like(maps.value, math.nan))[1]
    maps.mean_correction, maps.var_correction = (
        torch.zeros_like(maps.mean),
        torch.zeros_like(maps.mean),
    )
    return maps


def finished_target(channels: int = FEATURES) -> tuple[FeatureMaps, Tensor]:
    """Maps that every reader has been through, and the gradient which that amounts to."""
    maps = with_grad(with_stats(channels))
    maps.grad.copy_(draw(*maps.value.shape))
    maps.mean_correction, maps.var_correction = draw(channels), draw(channels)
    normalised = (maps.value - maps.mean) * maps.rstd
    return maps, maps.grad - maps.mean_correction - normalised * maps.var_correction


def norm(channels: int = CHANNELS) -> NormParams:
    weight = draw(channels, at_least=0.5)
    weight[1::3] *= -1  # a trained gamma may be negative, or nothing
    weight[2] = 0
    return NormParams(weight, draw(channels))


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def definition(value: Tensor, bn: NormParams) -> Tensor:
    """Z, (N, C, H, W), by PyTorch's own batch normalisation."""
    return F.relu(F.batch_norm(nchw(value), None, None, bn.weight, bn.bias, True, 0.0, EPS))


def convolved(value: Tensor, bn: NormParams, weight: Tensor, dropout: DropoutSpec | None) -> Tensor:
    """(N, H, W, F) of either convolution."""
    out = F.conv2d(definition(value, bn), weight, padding=weight.shape[-1] // 2)
    out = out.permute(0, 2, 3, 1)
    return out * dropout.mask(out) if dropout else out


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def weight_of(size: int) -> Tensor:
    return draw(FEATURES, CHANNELS, size, size)


def assert_stats(maps: FeatureMaps, values: Tensor, tolerance: float = 1e-12) -> None:
    flat = values.double().reshape(-1, values.shape[-1])
    mean, var = flat.mean(0), flat.var(0, unbiased=False)
    found = (maps.mean, maps.var, maps.rstd)
    for got, want in zip(found, (mean, var, (var + EPS).rsqrt()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


CONVOLUTIONS = pytest.mark.parametrize(
    ("forward", "backward", "size"),
    [
        (reference.conv1x1, reference.conv1x1_backward, 1),
        (reference.conv3x3, reference.conv3x3_backward, 3),
    ],
    ids=["conv1x1", "conv3x3"],
)
DROPOUTS = pytest.mark.parametrize(
    "dropout", [None, DropoutSpec(0.4, SEED, 5)], ids=["whole", "dropout"]
)


# --------------------------------------------------------------------------------------- forward


def test_copy_writes_the_values_and_their_moments_and_nothing_else():
    buffer, target = new_target(CHANNELS)
    values = draw(IMAGES, HEIGHT, WIDTH, CHANNELS)
    reference.copy_with_stats(values, target)
    assert torch.equal(target.value, values)
    assert_stats(target, values)
    assert guards_are_whole(buffer)
    with pytest.raises(AssertionError):  # of a biased and an unbiased variance, the first
        assert_stats(target, values[:-1])


@CONVOLUTIONS
@DROPOUTS
def test_convolutions_write_what_they_are_defined_to_and_nothing_else(
    forward, backward, size, dropout
):
    source, bn, weight = with_stats(), norm(), weight_of(size)
    before = source.value.clone()
    buffer, target = new_target(FEATURES)
    forward(source, bn, weight, target, dropout)
    want = convolved(source.value, bn, weight, dropout)
    torch.testing.assert_close(target.value, want, rtol=1e-12, atol=1e-12)
    assert_stats(target, want)
    assert guards_are_whole(buffer) and torch.equal(source.value, before)
    other = convolved(source.value, bn, weight, DropoutSpec(0.4, SEED, 6))
    assert (target.value - other).abs().max() > 0.1


@CONVOLUTIONS
def test_moments_are_left_out_where_there_is_no_room_for_them(forward, backward, size):
    source, bn, weight = with_stats(), norm(), weight_of(size)
    buffer, target = new_target(FEATURES, stats=False)
    forward(source, bn, weight, target, None)
    assert (target.mean, target.rstd, target.var) == (None, None, None)
    torch.testing.assert_close(target.value, convolved(source.value, bn, weight, None))
    assert guards_are_whole(buffer)
    # Known moments, those of evaluation, are read and not replaced.
    target.mean, target.rstd = draw(FEATURES), draw(FEATURES, at_least=0.5)
    mean, rstd = target.mean.clone(), target.rstd.clone()
    forward(source, bn, weight, target, None)
    assert torch.equal(target.mean, mean) and torch.equal(target.rstd, rstd)


WINDOWS = pytest.mark.parametrize("window", [(2, 2), (HEIGHT, WIDTH), (3, 2), (1, 1)])


@WINDOWS
def test_pool_averages_whole_windows(window):
    source, bn = with_stats(), norm()
    got = reference.norm_relu_avg_pool(source, bn, window)
    want = F.avg_pool2d(definition(source.value, bn), window).permute(0, 2, 3, 1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got.shape == (IMAGES, HEIGHT // window[0], WIDTH // window[1], CHANNELS)
    if window != (1, 1):
        largest = F.max_pool2d(definition(source.value, bn), window).permute(0, 2, 3, 1)
        assert (got - largest).abs().max() > 0.1


# -------------------------------------------------------------------------------------- backward


@CONVOLUTIONS
@DROPOUTS
@pytest.mark.parametrize("overwrite", [True, False])
def test_the_backward_of_convolutions_equals_autograd(forward, backward, size, dropout, overwrite):
    source, bn, weight = with_grad(with_stats()), norm(), weight_of(size)
    target, upstream = finished_target()
    if not overwrite:
        source.grad.fill_(1.0)
    got = backward(target, source, bn, weight, dropout, overwrite)

    value, w, gamma, beta = leaves(source.value, weight, bn.weight, bn.bias)
    out = convolved(value, NormParams(gamma, beta), w, dropout)
    wants = torch.autograd.grad(out, (w, gamma, beta, value), upstream, retain_graph=True)
    for name, found, want in zip(("weight", "gamma", "beta"), got, wants, strict=False):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10, msg=name)
    total = reference.complete_gradient(source) - (0 if overwrite else 1)
    torch.testing.assert_close(total, wants[-1], rtol=1e-10, atol=1e-10)

    # The twin: without completing the target's gradient, or with the mask of another place.
    others = [torch.autograd.grad(out, w, target.grad)[0]]
    if dropout:
        wrong = convolved(
            value, NormParams(gamma, beta), w, DropoutSpec(dropout.rate, SEED, dropout.layer_id + 1)
        )
        others.append(torch.autograd.grad(wrong, w, upstream)[0])
    assert all((got[0] - other).abs().max() > 0.1 for other in others)


@WINDOWS
def test_the_backward_of_pool_equals_autograd(window):
    source, bn = with_grad(with_stats()), norm()
    upstream = draw(IMAGES, HEIGHT // window[0], WIDTH // window[1], CHANNELS)
    got = reference.norm_relu_avg_pool_backward(upstream, source, bn, window)

    value, gamma, beta = leaves(source.value, bn.weight, bn.bias)
    out = F.avg_pool2d(definition(value, NormParams(gamma, beta)), window).permute(0, 2, 3, 1)
    *wants, dvalue = torch.autograd.grad(out, (gamma, beta, value), upstream)
    for found, want in zip(got, wants, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(reference.complete_gradient(source), dvalue, rtol=1e-10, atol=1e-10)
    assert (source.grad - dvalue).abs().max() > 0.01  # not complete without shift and slope


def test_two_convolutions_and_a_pool_that_read_the_same_maps_add_up():
    # The pool reads them all; the convolutions, in the order of backward, only the first channels.
    source, norms = with_grad(with_stats()), (norm(), norm(), norm(CHANNELS - 2))
    weights = weight_of(1), draw(FEATURES, CHANNELS - 2, 3, 3)
    targets = finished_target(), finished_target()
    upstream = draw(IMAGES, HEIGHT // 2, WIDTH // 2, CHANNELS)
    reference.norm_relu_avg_pool_backward(upstream, source, norms[0], (2, 2))
    reference.conv1x1_backward(targets[0][0], source, norms[1], weights[0], None, False)
    part = source.channels(0, CHANNELS - 2)
    reference.conv3x3_backward(targets[1][0], part, norms[2], weights[1], None, False)

    (value,) = leaves(source.value)
    pooled = F.avg_pool2d(definition(value, norms[0]), 2).permute(0, 2, 3, 1)
    one = convolved(value, norms[1], weights[0], None)
    two = convolved(value[..., : CHANNELS - 2], norms[2], weights[1], None)
    losses = [(pooled * upstream).sum(), (one * targets[0][1]).sum(), (two * targets[1][1]).sum()]
    want = torch.autograd.grad(sum(losses), value, retain_graph=True)[0]
    torch.testing.assert_close(reference.complete_gradient(source), want, rtol=1e-10, atol=1e-10)
    without = torch.autograd.grad(sum(losses[:2]), value)[0]
    assert (reference.complete_gradient(source) - without).abs().max() > 0.1
    # A part is completed alone as it is within the whole.
    torch.testing.assert_close(reference.complete_gradient(part), want[..., : CHANNELS - 2])


@CONVOLUTIONS
def test_backward_writes_nothing_outside_its_maps(forward, backward, size):
    bn, weight = norm(), weight_of(size)
    buffer, value = guarded(with_stats().value)
    gradients, grad = guarded(torch.zeros_like(value))
    source = with_grad(with_stats())
    source.value, source.grad = value, grad
    target, _ = finished_target()
    before = copy.deepcopy((target, bn, weight))
    backward(target, source, bn, weight, DropoutSpec(0.4, SEED, 5), True)
    assert guards_are_whole(buffer) and guards_are_whole(gradients)
    assert not (grad == 0).all()
    for old, new in ((before[0].value, target.value), (before[0].grad, target.grad),
                     (before[0].var_correction, target.var_correction),
                     (before[1].weight, bn.weight),
                     (before[2], weight)):  # fmt: skip
        assert torch.equal(old, new)


@CONVOLUTIONS
def test_maps_that_no_normalisation_reads_have_their_gradient_as_given(forward, backward, size):
    upstream = draw(IMAGES, HEIGHT, WIDTH, FEATURES)
    source, bn, weight = with_grad(with_stats()), norm(), weight_of(size)
    before = upstream.clone()
    got = backward(
        FeatureMaps(upstream, grad=upstream), source, bn, weight, DropoutSpec(0.4, SEED, 5), True
    )[0]
    (w,) = leaves(weight)
    out = convolved(source.value, bn, w, DropoutSpec(0.4, SEED, 5))
    torch.testing.assert_close(got, torch.autograd.grad(out, w, upstream)[0])
    assert torch.equal(upstream, before)  # the mask has not been applied to it


# ------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("mean", [0.0, 100.0, -1000.0])
def test_moments_of_far_means_keep_their_digits_in_single_precision(mean):
    values = (mean + draw(IMAGES, HEIGHT, WIDTH, CHANNELS)).float()
    _, target = new_target(CHANNELS, torch.float32)
    reference.copy_with_stats(values, target)
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
    reference.copy_with_stats(values, target)
    assert_stats(target, values, 1e-5)
    assert target.mean.dtype == torch.float32

    # Beyond the kink: z is the normalised value.

    bn = NormParams(torch.ones(3), torch.full((3,), 100.0))
    source = with_grad(target)
    upstream = torch.ones(64, 8, 4, 3, dtype=dtype)
    _, dbeta = reference.norm_relu_avg_pool_backward(upstream, source, bn, (2, 2))
    torch.testing.assert_close(dbeta, torch.full((3,), 64 * 8 * 4.0), rtol=1e-5, atol=0)


@CONVOLUTIONS
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2.5e-3)],
)
def test_lower_precisions_are_as_near_as_their_digits_allow(
    forward, backward, size, dtype, tolerance
):
    exact, bn, weight = with_grad(with_stats()), norm(), weight_of(size)
    exact.value.copy_(exact.value.to(dtype))  # so that only the arithmetic rounds
    flat = exact.value.reshape(-1, CHANNELS)
    exact.mean, exact.rstd = flat.mean(0), (flat.var(0, unbiased=False) + EPS).rsqrt()
    target, _ = finished_target()
    low_norm = NormParams(bn.weight.float(), bn.bias.float())

    def lowered(maps: FeatureMaps) -> FeatureMaps:
        """The same in `dtype`, its vectors in single precision."""
        vectors = [getattr(maps, name).float() for name in ("mean", "rstd", "var")]
        sums = [maps.mean_correction.float(), maps.var_correction.float()]
        return FeatureMaps(maps.value.to(dtype), *vectors, maps.grad.to(dtype), *sums, eps=EPS)

    low_source, low_target = lowered(exact), lowered(target)
    want = [new_target(FEATURES)[1], *backward(target, exact, bn, weight, None, True)]
    forward(exact, bn, weight, want[0], None)
    got = [new_target(FEATURES, dtype)[1],
           *backward(low_target, low_source, low_norm, weight.float(), None, True)]  # fmt: skip
    forward(low_source, low_norm, weight.float(), got[0], None)
    pairs = list(zip(got[1:], want[1:], strict=True))
    pairs += [(got[0].value, want[0].value), (got[0].mean, want[0].mean),
              tuple(map(reference.complete_gradient, (low_source, exact)))]  # fmt: skip
    for found, wanted in pairs:
        error = ((found.double() - wanted).norm() / wanted.norm()).item()
        assert error < tolerance
    assert pairs[3][0].dtype == pairs[-1][0].dtype == dtype
    assert max((a.double() - b).norm() / b.norm() for a, b in pairs) > tolerance / 1000
