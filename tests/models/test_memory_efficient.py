"""Levels 2 to 4 compute what level 0 does, in every form and precision."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.tiny_networks import (
    FORMS,
    Results,
    largest_difference,
    mean_error,
    network,
    norms,
    one_step,
    pictures,
    relative_differences,
)
from kernels import reference
from kernels.backend import REFERENCE
from models import memory_efficient
from models.dense_block import DenseBlock

LEVELS = pytest.mark.parametrize("level", [1, 2, 3, 4])
SHARED = pytest.mark.parametrize("level", memory_efficient.MEMORY_EFFICIENT_LEVELS)
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(params=[1000, 2], ids=["one tile", "ragged tiles"])
def tiles(request, monkeypatch):
    """Images in a tile: all five, or two, two and one."""
    monkeypatch.setattr(
        reference,
        "_tiles",
        lambda value: [
            slice(start, min(start + request.param, len(value)))
            for start in range(0, len(value), request.param)
        ],
    )


# ------------------------------------------------------------------------------------ equal steps


@LEVELS
@EVERY_FORM
def test_every_level_computes_what_level_0_computes(level, form, tiles):
    images, targets = pictures(form)
    want = one_step(network(0, form), images, targets)
    assert largest_difference(one_step(network(level, form), images, targets), want) < 1e-10
    moved = network(level, form)
    with torch.no_grad():
        moved.features.denseblock1.denselayer1.conv1.weight[0, 0] += 1e-3
    assert largest_difference(one_step(moved, images, targets), want) > 1e-5
    if "dropout" in form:
        other = one_step(network(level, form), images, targets, seed=6)
        assert largest_difference(other, want) > 1e-3


@SHARED
def test_running_statistics_move_once_a_step_towards_the_unbiased_variance(level):
    images, targets = pictures()
    model = network(level)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    one_step(model, images, targets)
    norm = "features.denseblock1.denselayer1.norm1"
    features = model.features.conv0(images)
    for name, want in (("running_mean", features.mean((0, 2, 3))),
                       ("running_var", features.var((0, 2, 3), unbiased=True))):  # fmt: skip
        old, new = before[f"{norm}.{name}"], model.get_buffer(f"{norm}.{name}")
        torch.testing.assert_close(new, 0.9 * old + 0.1 * want)
        assert (new - (0.81 * old + 0.19 * want)).abs().max() > 1e-3  # moved twice
    assert all(norm.num_batches_tracked == 1 for norm in norms(model))
    biased = 0.9 * old + 0.1 * features.var((0, 2, 3), unbiased=False)
    assert (new - biased).abs().max() > 1e-6


@LEVELS
@pytest.mark.parametrize("form", ["BC, dropout", "basic"])
def test_three_steps_of_nesterov_end_with_the_same_weights(level, form):
    def three_steps(level: int, num_steps: int = 3) -> Results:
        model = network(level, form)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
        )
        torch.manual_seed(7)  # one stream of masks through all steps
        for step in range(num_steps):
            images, targets = pictures(form, seed=step)
            torch.manual_seed(100 + step)
            loss = F.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {"loss": loss.detach(), **model.state_dict()}

    want = three_steps(0)
    assert largest_difference(three_steps(level), want) < 1e-10
    assert largest_difference(three_steps(level, 2), want) > 1e-3


@LEVELS
@EVERY_FORM
def test_single_precision_is_equal_to_four_digits(level, form):
    images, targets = pictures(form)
    images = images.float()
    got, want = (one_step(network(i, form).float(), images, targets) for i in (level, 0))
    assert max(relative_differences(got, want).values()) < 1e-4
    exact = one_step(network(0, form), images.double(), targets)
    assert max(relative_differences(got, exact).values()) > 1e-7  # it was single precision


@LEVELS
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bf16", "half"])
@pytest.mark.parametrize("form", ["BC", "basic, dropout", "ImageNet"])
def test_autocast_is_as_near_to_single_precision_as_level_0_is(level, low, form):
    errors = {"level 0": 0.0, "this level": 0.0, "another network": 0.0}
    for seed in (4, 5, 6):  # one step alone is a matter of luck
        images, targets = pictures(form, count=16, seed=seed)
        images = images.float()
        single = one_step(network(0, form).float(), images, targets)
        low_0 = one_step(network(0, form).float(), images, targets, low=low)
        low_n = one_step(network(level, form).float(), images, targets, low=low)
        assert {n: t.dtype for n, t in low_n.items()} == {n: t.dtype for n, t in low_0.items()}
        moved = network(level, form).float()
        with torch.no_grad():
            moved.features.denseblock1.denselayer1.norm1.weight.add_(0.5)
        other = one_step(moved, images, targets, low=low)
        for name, results in zip(errors, (low_0, low_n, other), strict=True):
            errors[name] += mean_error(results, single)
    assert errors["this level"] < 1.25 * errors["level 0"] < errors["another network"]
    assert errors["this level"] > errors["level 0"] / 2  # it was the lower precision


@LEVELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_converted_as_a_whole_trains(level, dtype):
    images, targets = pictures(count=16)
    exact = one_step(network(0), images, targets)
    want, got = (one_step(network(i).to(dtype), images.to(dtype), targets) for i in (0, level))
    assert {name: t.dtype for name, t in got.items()} == {n: t.dtype for n, t in want.items()}
    error, error_of_level_0 = (mean_error(x, exact) for x in (got, want))
    assert error < max(1.25 * error_of_level_0, 1e-10)
    assert (error > 1e-3) == (dtype == torch.bfloat16)


@SHARED
@pytest.mark.parametrize("form", ["BC", "basic, dropout"])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_the_order_of_pixels_in_memory_does_not_matter(level, form, low):
    images, targets = pictures(form)
    model, twin = (network(level, form).float() for _ in range(2))
    want = one_step(model, images.float(), targets, low=low)
    twin.to(memory_format=torch.channels_last)
    last = images.float().contiguous(memory_format=torch.channels_last)
    got = one_step(twin, last, targets, low=low)
    assert max(relative_differences(got, want).values()) < (1e-1 if low else 1e-4)
    mirrored = one_step(network(level, form).float(), images.flip(2, 3).float(), targets, low=low)
    assert max(relative_differences(mirrored, want).values()) > 0.2


# ------------------------------------------------------------------------------- awkward networks


@LEVELS
@EVERY_FORM
@pytest.mark.parametrize("gamma", ["negative", "zero", "tiny", "huge"])
def test_any_gamma_is_a_gamma(level, form, gamma):
    factor = {"negative": -1.0, "zero": 0.0, "tiny": 1e-30, "huge": 1e6}[gamma]

    def step(level: int) -> Results:
        model = network(level, form)
        for norm in norms(model):
            with torch.no_grad():
                norm.weight[1::2] *= factor
        return one_step(model, images, targets)

    images, targets = pictures(form, count=3)
    got, want = step(level), step(0)
    assert all(tensor.isfinite().all() for tensor in got.values())
    differences = [(got[n] - want[n]).abs().max() / max(want[n].abs().max(), 1) for n in want]
    assert max(differences) < 1e-10
    ordinary = one_step(network(0, form), images, targets)
    assert largest_difference(got, ordinary) > 1e-3


def stated(block: DenseBlock, epilogue: memory_efficient.BlockEpilogue, x: Tensor) -> Tensor:
    """Section 3 of the paper: every layer sees the maps of all before it."""

    def bn_relu(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps))

    features = [x]
    for layer in block.values():
        new = F.conv2d(bn_relu(layer.norm1, torch.cat(features, 1)), layer.conv1.weight,
                       padding=layer.conv1.padding)  # fmt: skip
        if layer.bottleneck:
            new = F.conv2d(bn_relu(layer.norm2, new), layer.conv2.weight, padding=1)
        features.append(new)
    out = bn_relu(epilogue.norm, torch.cat(features, 1))
    if epilogue.window:
        return F.avg_pool2d(out, epilogue.window)
    return F.conv2d(out, epilogue.conv.weight)


def make_block(
    bottleneck: bool, window, drop_rate: float = 0.0, layers: int = 2, growth_rate: int = 2
):
    """A block and its epilogue: (block, epilogue, all parameters in order)."""
    options = {"bottleneck": bottleneck, "drop_rate": drop_rate, "memory_level": 2}
    block = DenseBlock(layers, 3, growth_rate, **options).double()
    conv = None if window else nn.Conv2d(block.out_channels, 3, 1, bias=False).double()
    epilogue = memory_efficient.BlockEpilogue(
        nn.BatchNorm2d(block.out_channels).double(), window, conv
    )
    parts = [*block.values(), epilogue.norm, *([conv] if conv else [])]
    parameters = [p for part in parts for p in part.parameters()]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.7)
    return block, epilogue, parameters


STAGES = pytest.mark.parametrize("bottleneck", [True, False])
WINDOWS = pytest.mark.parametrize("window", [(2, 2), (5, 4), None])


@SHARED
@STAGES
@WINDOWS
def test_a_stage_equals_the_papers_dense_block(level, bottleneck, window, tiles):
    block, epilogue, parameters = make_block(bottleneck, window, layers=3)
    x = torch.randn(5, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    got = memory_efficient.run_dense_block(block, epilogue, x, REFERENCE, level)
    want = stated(block, epilogue, x)
    upstream = torch.randn_like(want)
    gradients = [torch.autograd.grad(out, [x, *parameters], upstream) for out in (got, want)]
    for mine, theirs in zip((got, *gradients[0]), (want, *gradients[1]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        parameters[0] += 1e-3
    assert (got - stated(block, epilogue, x)).abs().max() > 1e-5


@SHARED
@STAGES
@pytest.mark.parametrize("mean", [100.0, -100.0])
def test_means_far_from_zero_leave_single_precision_its_digits(level, bottleneck, mean):
    block, epilogue, parameters = make_block(bottleneck, (2, 2))
    x = (torch.randn(8, 3, 8, 8, dtype=torch.float64) + mean).float()
    upstream = torch.randn(8, block.out_channels, 4, 4)

    def values(run, dtype: torch.dtype) -> list[Tensor]:
        for module in (block, epilogue.norm):
            module.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        out = run(leaf)
        return [out.detach(), *torch.autograd.grad(out, [leaf, *parameters], upstream.to(dtype))]

    def errors(run) -> list[float]:
        found = values(run, torch.float32)
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    exact = values(lambda leaf: stated(block, epilogue, leaf), torch.float64)
    assert (
        max(
            errors(
                lambda leaf: memory_efficient.run_dense_block(
                    block, epilogue, leaf, REFERENCE, level
                )
            )
        )
        < 5e-4
    )
    # Autograd, as a reference.
    assert max(errors(lambda leaf: stated(block, epilogue, leaf))) < 5e-4
    assert max(errors(lambda leaf: stated(block, epilogue, leaf.bfloat16().float()))) > 1e-2


@SHARED
@WINDOWS
def test_a_gradient_that_is_one_number_repeated_is_a_gradient(level, window):
    block, epilogue, parameters = make_block(True, window)
    x = torch.randn(5, 3, 5, 4, requires_grad=True, dtype=torch.float64)
    runs = [
        lambda: memory_efficient.run_dense_block(block, epilogue, x, REFERENCE, level),
        lambda: stated(block, epilogue, x),
    ]
    got, want = (torch.autograd.grad(run().mean(), [x, *parameters]) for run in runs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    other = torch.autograd.grad(runs[0]().square().mean(), [x, *parameters])
    assert max((a - b).abs().max() for a, b in zip(got, other, strict=True)) > 1e-3


# ----------------------------------------------------------------------------- finite differences


def check_gradients(ops, level: int, *form, size=(5, 4), **sizes) -> bool:
    """Compare with finite differences along a random direction of the input and the parameters."""
    torch.manual_seed(1)
    block, epilogue, parameters = make_block(*form, **sizes)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *_: Tensor) -> Tensor:  # the parameters are changed where they stand
        torch.manual_seed(2)
        return memory_efficient.run_dense_block(block, epilogue, x, ops, level)

    return torch.autograd.gradcheck(
        run, (x, *parameters), atol=1e-8, rtol=1e-4, fast_mode=True, raise_exception=False
    )


@SHARED
@STAGES
@WINDOWS
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_gradients_are_those_of_finite_differences(level, bottleneck, window, drop_rate):
    assert check_gradients(REFERENCE, level, bottleneck, window, drop_rate)


@pytest.mark.parametrize(
    ("name", "bottleneck", "window"),
    [
        ("conv1x1_backward", True, (2, 2)),
        ("conv1x1_backward", False, None),
        ("conv3x3_backward", True, (2, 2)),
        ("conv3x3_backward", False, None),
        ("norm_relu_avg_pool_backward", True, (2, 2)),
        ("complete_gradient", True, (2, 2)),
    ],
)
def test_finite_differences_find_an_operation_that_is_one_per_cent_off(name, bottleneck, window):
    def off(*args, **kwargs):
        found = getattr(reference, name)(*args, **kwargs)
        return found * 1.01 if isinstance(found, Tensor) else tuple(1.01 * part for part in found)

    wrong = replace(REFERENCE, **{name: off})
    tiny = {"layers": 1, "growth_rate": 1 if bottleneck else 2, "size": (3, 3)}
    assert check_gradients(REFERENCE, 2, bottleneck, window, **tiny)
    assert not check_gradients(wrong, 2, bottleneck, window, **tiny)


# --------------------------------------------------------------------------- copies and state dicts


def test_the_state_is_the_same_at_every_level():
    want = network(0).state_dict()
    for level in (1, *memory_efficient.MEMORY_EFFICIENT_LEVELS):
        state = network(level).state_dict()
        assert list(state) == list(want)
        assert all(torch.equal(state[name], want[name]) for name in want)
    assert list(network(2, "basic").state_dict()) != list(want)


@LEVELS
def test_a_network_is_copied_and_pickled(level):
    images, targets = pictures()
    want = one_step(network(level), images, targets)
    for twin in (copy.deepcopy(network(level)), pickle.loads(pickle.dumps(network(level)))):
        assert largest_difference(one_step(twin, images, targets), want) == 0
        assert (twin.memory_level, twin.ops) == (level, REFERENCE)
