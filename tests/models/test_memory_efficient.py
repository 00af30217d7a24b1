"""Test that memory levels 1 to 4 compute what level 0 does, in all forms and precisions."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.tiny_networks import (
    FORMS,
    largest_difference,
    level_0_step,
    mean_error,
    network,
    norms,
    one_step,
    pictures,
    relative_differences,
    step,
)
from kernels import reference
from kernels.backend import REFERENCE
from models import memory_efficient
from models.dense_block import DenseBlock

LEVELS = pytest.mark.parametrize("level", [1, 2, 3, 4])
EFFICIENT_LEVELS = pytest.mark.parametrize("level", memory_efficient.MEMORY_EFFICIENT_LEVELS)


@pytest.fixture
def ragged_tiles(monkeypatch):
    """Let operations work on two, two and one of five images, as they do in large batches."""
    monkeypatch.setattr(
        reference,
        "_tiles",
        lambda x: [slice(i, min(i + 2, len(x))) for i in range(0, len(x), 2)],
    )


# Equal steps:
def move_a_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.features.denseblock1.denselayer1.conv1.weight[0, 0] += 1e-3


def move_a_gamma(model: nn.Module) -> None:
    with torch.no_grad():
        model.features.denseblock1.denselayer1.norm1.weight.add_(0.5)


@LEVELS
@pytest.mark.parametrize("form", FORMS)
def test_every_level_computes_what_level_0_computes(level, form, ragged_tiles):
    assert largest_difference(step(level, form), level_0_step(form)) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_the_comparison_notices_a_moved_weight_and_another_mask(form):
    assert largest_difference(step(2, form, move_a_weight), level_0_step(form)) > 1e-5
    masked = largest_difference(step(2, form, dropout_seed=6), level_0_step(form)) > 1e-3
    assert masked == ("dropout" in form)


@EFFICIENT_LEVELS
def test_running_statistics_move_once_a_step_towards_the_unbiased_variance(level):
    model, (images, targets) = network(level), pictures()
    norm = model.features.denseblock1.denselayer1.norm1
    before = copy.deepcopy(norm.state_dict())
    one_step(model, images, targets)
    x = model.features.conv0(images)
    for name, batch in (("running_mean", x.mean((0, 2, 3))), ("running_var", x.var((0, 2, 3)))):
        old, new = before[name], getattr(norm, name)
        torch.testing.assert_close(new, 0.9 * old + 0.1 * batch)
        assert (new - (0.81 * old + 0.19 * batch)).abs().max() > 1e-3  # moved twice
    assert (new - (0.9 * old + 0.1 * x.var((0, 2, 3), unbiased=False))).abs().max() > 1e-6
    assert all(norm.num_batches_tracked == 1 for norm in norms(model))


@LEVELS
@pytest.mark.parametrize("form", ["BC", "basic, dropout"])
@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e6])
def test_gammas_of_any_size_are_supported(level, form, factor):
    def change(model: nn.Module) -> None:
        for norm in norms(model):
            with torch.no_grad():
                norm.weight[1::2] *= factor

    got, want = (step(i, form, change, count=3) for i in (level, 0))
    assert all(tensor.isfinite().all() for tensor in got.values())
    differences = [(got[n] - want[n]).abs().max() / max(want[n].abs().max(), 1) for n in want]
    assert max(differences) < 1e-10
    assert largest_difference(got, level_0_step(form, count=3)) > 1e-3


# Lower precision:
@LEVELS
@pytest.mark.parametrize("form", ["BC", "basic, dropout", "ImageNet"])
def test_single_precision_is_equal_to_four_digits(level, form):
    got = step(level, form, dtype=torch.float32)
    want = level_0_step(form, dtype=torch.float32)
    assert max(relative_differences(got, want).values()) < 1e-4
    # It was single precision.
    assert max(relative_differences(got, level_0_step(form)).values()) > 1e-7


@LEVELS
@pytest.mark.parametrize(
    ("form", "low"),
    [
        ("BC", torch.bfloat16),
        ("basic, dropout", torch.bfloat16),
        ("ImageNet", torch.bfloat16),
        ("BC", torch.float16),
    ],
)
def test_autocast_is_as_near_to_single_precision_as_level_0_is(level, form, low):
    errors = {"this level": 0.0, "level 0": 0.0, "another network": 0.0}
    for seed in (4, 5, 6):  # the error of one step alone varies much
        options = {"count": 16, "seed": seed, "dtype": torch.float32}
        single = level_0_step(form, **options)
        got, want = step(level, form, low=low, **options), level_0_step(form, low=low, **options)
        assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}
        moved = level_0_step(form, move_a_gamma, low=low, **options)
        for name, found in zip(errors, (got, want, moved), strict=True):
            errors[name] += mean_error(found, single)
    assert errors["this level"] < 1.25 * errors["level 0"] < errors["another network"]
    assert errors["this level"] > errors["level 0"] / 2  # it was the lower precision


@EFFICIENT_LEVELS
def test_autocast_leaves_double_precision_alone(level):
    assert largest_difference(step(level, low=torch.bfloat16), level_0_step()) < 1e-10


@LEVELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_converted_as_a_whole_trains(level, dtype):
    exact = level_0_step(count=16)
    got, want = (step(i, count=16, dtype=dtype) for i in (level, 0))
    assert {name: t.dtype for name, t in got.items()} == {n: t.dtype for n, t in want.items()}
    error, error_of_level_0 = (mean_error(x, exact) for x in (got, want))
    assert error < max(1.25 * error_of_level_0, 1e-10)
    assert (error > 1e-3) == (dtype == torch.bfloat16)


@EFFICIENT_LEVELS
@pytest.mark.parametrize("form", ["BC", "basic, dropout"])
def test_the_memory_format_of_images_and_weights_does_not_matter(level, form):
    images, targets = pictures(form)
    model = network(level, form).to(memory_format=torch.channels_last)
    got = one_step(model, images.contiguous(memory_format=torch.channels_last), targets)
    assert largest_difference(got, level_0_step(form)) < 1e-10
    mirrored = one_step(network(level, form), images.flip(2, 3), targets)
    assert largest_difference(mirrored, level_0_step(form)) > 1e-3


# One block, compared with a plain restatement:
def plain_block(block: DenseBlock, epilogue: memory_efficient.BlockEpilogue, x: Tensor) -> Tensor:
    """Compute section 3 of the paper: every layer reads the concatenated outputs before it."""

    def bn_relu(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps))

    features = [x]
    for layer in block.values():
        new = torch.cat(features, 1)
        for norm, conv in zip(layer.norms, layer.convs, strict=True):
            new = F.conv2d(bn_relu(norm, new), conv.weight, padding=conv.weight.shape[2] // 2)
        features.append(new)
    out = bn_relu(epilogue.norm, torch.cat(features, 1))
    if epilogue.window:
        return F.avg_pool2d(out, epilogue.window)
    return F.conv2d(out, epilogue.conv.weight)


class Example:
    """Hold a block with an epilogue, an input (count, 3, *size), and all parameters in order."""

    def __init__(self, bottleneck: bool, window, *, drop_rate=0.0, layers=2, growth_rate=2,
                 count=5, size=(5, 4)):  # fmt: skip
        torch.manual_seed(1)
        self.block = DenseBlock(layers, 3, growth_rate, bottleneck=bottleneck,
                                drop_rate=drop_rate, memory_level=2).double()  # fmt: skip
        channels = self.block.out_channels
        conv = None if window else nn.Conv2d(channels, 3, 1, bias=False).double()
        norm = nn.BatchNorm2d(channels).double()
        self.epilogue = memory_efficient.BlockEpilogue(norm, window, conv)
        parts = [*self.block.values(), norm, *([conv] if conv else [])]
        self.parameters = [p for part in parts for p in part.parameters()]
        for parameter in self.parameters:
            nn.init.normal_(parameter, std=0.7)
        self.x = torch.randn(count, 3, *size, dtype=torch.float64, requires_grad=True)

    def run(self, level: int, x: Tensor | None = None, ops=REFERENCE) -> Tensor:
        """Return the output at a memory level; of the plain restatement at level 0."""
        x = self.x if x is None else x
        if level == 0:
            return plain_block(self.block, self.epilogue, x)
        self.block.memory_level, self.block.ops = level, ops
        return memory_efficient.run_dense_block(self.block, self.epilogue, x)

    def results(self, level: int, loss, x: Tensor | None = None) -> list[Tensor]:
        """Return the output and the gradients of loss(output): of the input and all parameters."""
        x = self.x if x is None else x
        out = self.run(level, x)
        return [out, *torch.autograd.grad(loss(out), [x, *self.parameters])]


BLOCKS = pytest.mark.parametrize("bottleneck", [True, False])
WINDOWS = pytest.mark.parametrize("window", [(2, 2), (5, 4), None])


@EFFICIENT_LEVELS
@BLOCKS
@WINDOWS
def test_a_block_with_its_epilogue_equals_the_paper(level, bottleneck, window, ragged_tiles):
    example = Example(bottleneck, window, layers=3)
    weights = torch.randn_like(example.run(0))

    def weighted(out: Tensor) -> Tensor:
        return (weights * out).sum()

    # The gradient of a mean is one number in memory, expanded to the shape of the output.
    for loss in (weighted, torch.mean):
        got, want = (example.results(i, loss) for i in (level, 0))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        example.parameters[0] += 1e-3
    assert (got[0] - example.run(0)).abs().max() > 1e-5


@EFFICIENT_LEVELS
@BLOCKS
def test_means_far_from_zero_leave_single_precision_its_digits(level, bottleneck):
    example = Example(bottleneck, (2, 2), count=8, size=(8, 8))
    x = (example.x + 100).detach().float()
    weights = torch.randn(8, example.block.out_channels, 4, 4)

    def results(level: int, dtype: torch.dtype, x: Tensor = x) -> list[Tensor]:
        for module in (example.block, example.epilogue.norm):
            module.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        return example.results(level, lambda out: (out * weights.to(dtype)).sum(), leaf)

    def error(found: list[Tensor]) -> float:
        pairs = zip(found, exact, strict=True)
        return max(((a - b).norm() / b.norm()).item() for a, b in pairs)

    exact = results(0, torch.float64)
    assert error(results(level, torch.float32)) < 5e-4
    assert error(results(0, torch.float32)) < 5e-4  # PyTorch's batch norm
    assert error(results(0, torch.float32, x.bfloat16())) > 1e-2


def gradcheck(level: int, example: Example, ops=REFERENCE) -> bool:
    """Compare with finite differences along a random direction of the input and the parameters."""

    def run(x: Tensor, *_: Tensor) -> Tensor:  # gradcheck moves the parameters in place
        torch.manual_seed(2)
        return example.run(level, x, ops)

    inputs = (example.x, *example.parameters)
    return torch.autograd.gradcheck(
        run, inputs, atol=1e-8, rtol=1e-4, fast_mode=True, raise_exception=False
    )


@EFFICIENT_LEVELS
@pytest.mark.parametrize(("bottleneck", "window"), [(True, (2, 2)), (False, None)])
def test_gradients_with_dropout_are_those_of_finite_differences(level, bottleneck, window):
    assert gradcheck(level, Example(bottleneck, window, drop_rate=0.3, count=2))


BACKWARD = [f"{name}_backward" for name in ("conv1x1", "conv3x3", "norm_relu_avg_pool")]


@pytest.mark.parametrize("name", ["", *BACKWARD, "complete_gradient"])
def test_finite_differences_find_an_operation_that_is_one_per_cent_off(name):
    def off(*args, **kwargs):
        found = getattr(reference, name)(*args, **kwargs)
        return found * 1.01 if isinstance(found, Tensor) else tuple(1.01 * part for part in found)

    example = Example(True, (2, 2), layers=1, growth_rate=1, count=2, size=(3, 3))
    ops = replace(REFERENCE, **{name: off}) if name else REFERENCE
    assert gradcheck(2, example, ops) == (not name)


# Copies and state dicts:
@LEVELS
def test_the_state_dict_is_the_same_at_every_level(level):
    state, want = network(level).state_dict(), network(0).state_dict()
    assert list(state) == list(want)
    assert all(torch.equal(state[name], want[name]) for name in want)


@LEVELS
def test_a_network_is_copied_and_pickled(level):
    images, targets = pictures()
    want = one_step(network(level), images, targets)
    for twin in (copy.deepcopy(network(level)), pickle.loads(pickle.dumps(network(level)))):
        assert largest_difference(one_step(twin, images, targets), want) == 0
        block = twin.features.denseblock1
        assert (block.memory_level, block.ops) == (level, REFERENCE)
