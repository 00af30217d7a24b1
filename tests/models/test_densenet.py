"""Test that DenseNets for CIFAR equal a plain restatement of the paper, in all forms."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.networks import network, one_step, photographs, same_state, scramble
from helpers.tiny_networks import largest_difference
from kernels.dropout import DropoutSpec, draw_seed

LAYERS = 2  # per block at these depths
FORMS = {
    "basic": "--depth 10 --bottleneck false --reduction 1",
    "B": "--depth 16 --reduction 1",
    "C": "--depth 10 --bottleneck false",
    "BC": "--depth 16",
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
POSITIONS = ("after 1x1", "after 3x3", "in transition")


def densenet(form: str, flags: str = "") -> nn.Module:
    torch.manual_seed(3)
    # k = 5 makes the number of channels before a transition odd, so that halving it must round.
    line = f"--dataset cifar10 --growthRate 5 --initChannels 7 {FORMS[form]} {flags}"
    return scramble(network(line).double())


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def restatement(
    weights: dict[str, Tensor],
    images: Tensor,
    *,
    bottleneck: bool,
    training: bool = True,
    drop: float = 0.0,
    positions: tuple[str, ...] = POSITIONS,
    pool: Callable[[Tensor, int], Tensor] = F.avg_pool2d,
) -> Tensor:
    """Compute sections 3 and 4 of the paper by layer; update the statistics in `weights`."""

    def bn_relu(name: str, x: Tensor) -> Tensor:
        mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if training:
            weights[f"{name}.num_batches_tracked"] += 1
        return F.relu(F.batch_norm(x, mean, variance, scale, shift, training, 0.1, 1e-5))

    def conv(name: str, x: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], padding=padding)

    def dropped(position: str, x: Tensor, seed: Tensor, number: int = 0) -> Tensor:
        if not (training and drop and position in positions):
            return x
        mask = DropoutSpec(drop, seed, number).mask(x.permute(0, 2, 3, 1))
        return x * mask.permute(0, 3, 1, 2)

    no_seed = torch.zeros(1, dtype=torch.int32)
    x = dropped("after the stem", conv("features.conv0", images, padding=1), no_seed)
    for block in (1, 2, 3):
        features, seed = [x], draw_seed(x.device)  # each block and each transition draws one
        for layer in range(LAYERS):
            at = f"features.denseblock{block}.denselayer{layer + 1}"
            new = bn_relu(f"{at}.norm1", torch.cat(features, 1))
            if bottleneck:
                new = dropped("after 1x1", conv(f"{at}.conv1", new, padding=0), seed, 2 * layer)
                new = bn_relu(f"{at}.norm2", new)
            new = conv(f"{at}.conv{2 if bottleneck else 1}", new, padding=1)
            features.append(dropped("after 3x3", new, seed, 2 * layer + bottleneck))
        x = torch.cat(features, 1)
        if block < 3:
            at, seed = f"features.transition{block}", draw_seed(x.device)
            x = conv(f"{at}.conv", bn_relu(f"{at}.norm", x), padding=0)
            x = pool(dropped("in transition", x, seed), 2)
            x = dropped("after pooling", x, seed)
    x = bn_relu("features.norm5", x).mean(dim=(2, 3))
    return F.linear(x, weights["classifier.weight"], weights["classifier.bias"])


def restated_step(state: dict[str, Tensor], images, targets, **variant) -> dict[str, Tensor]:
    """Compute `one_step` of the restatement; `state` stays unchanged."""
    weights = {name: tensor.clone() for name, tensor in state.items()}
    learnt = [name for name in weights if name.endswith(("weight", "bias"))]
    for name in learnt:
        weights[name].requires_grad_()
    logits = restatement(weights, images, **variant)
    F.cross_entropy(logits, targets).backward()
    gradients = {f"gradient of {name}": weights[name].grad for name in learnt}
    buffers = {name: tensor for name, tensor in weights.items() if name not in learnt}
    return {"logits": logits.detach(), **gradients, **buffers}


@EVERY_FORM
@pytest.mark.parametrize("level", [0, 2])
def test_every_form_equals_the_paper(form, level):
    model, (images, targets) = densenet(form, f"--optMemory {level}"), photographs()
    state, bottleneck = copied_state(model), "B" in form
    got = one_step(model, images, targets)
    want = restated_step(state, images, targets, bottleneck=bottleneck)
    assert largest_difference(got, want) < 1e-10
    wrong = restated_step(state, images, targets, bottleneck=bottleneck, pool=F.max_pool2d)
    assert largest_difference(got, wrong) > 1e-3


@EVERY_FORM
def test_evaluation_equals_the_paper_with_running_statistics_and_without_dropout(form):
    model, (images, _) = densenet(form, "--dropRate 0.3").eval(), photographs()
    state, bottleneck = copied_state(model), "B" in form
    with torch.no_grad():
        got = model(images)
        want = restatement(state, images, bottleneck=bottleneck, training=False)
        batch_statistics = restatement(copied_state(model), images, bottleneck=bottleneck)
    assert (got - want).abs().max() < 1e-10
    assert (got - batch_statistics).abs().max() > 1e-3
    assert same_state(model.state_dict(), state)


# The same masks in the same positions give the same outputs; one position more, less or moved gives
# others.
@EVERY_FORM
@pytest.mark.parametrize("level", [0, 2])
def test_dropout_comes_after_each_convolution_but_the_stem_and_before_pooling(form, level):
    model = densenet(form, f"--dropRate 0.3 --optMemory {level}")
    images, targets = photographs()
    state, bottleneck = copied_state(model), "B" in form

    def restated(*positions: str) -> dict[str, Tensor]:
        torch.manual_seed(5)
        variant = {"bottleneck": bottleneck, "drop": 0.3, "positions": positions}
        return restated_step(state, images, targets, **variant)

    torch.manual_seed(5)
    got = one_step(model, images, targets)
    assert largest_difference(got, restated(*POSITIONS)) < 1e-10
    wrong = [
        ("after 1x1", "after 3x3"),
        ("after 1x1", "in transition"),
        (*POSITIONS, "after the stem"),
        ("after 1x1", "after 3x3", "after pooling"),
    ]
    if bottleneck:
        wrong.append(("after 3x3", "in transition"))  # what most ports do
    for positions in wrong:
        assert largest_difference(got, restated(*positions)) > 1e-3, positions


@pytest.mark.parametrize(
    ("conv", "then"),
    [
        ("denseblock2.denselayer1.conv1", "denseblock2.denselayer1.norm2"),
        ("denseblock2.denselayer1.conv2", "denseblock2.denselayer2.norm1"),
        ("transition1.conv", "transition1.pool"),
    ],
)
def test_dropout_zeroes_its_rate_and_scales_the_rest(conv, then):
    rate, seen = 0.3, {}
    line = f"--dataset cifar10 --depth 16 --growthRate 12 --dropRate {rate} --optMemory 0"
    model = network(line).features
    model.get_submodule(conv).register_forward_hook(
        lambda _, inputs, output: seen.update(before=output.clone())
    )
    model.get_submodule(then).register_forward_pre_hook(
        lambda _, inputs: seen.update(after=inputs[0].clone())
    )
    model(torch.randn(8, 3, 16, 16))
    before = seen["before"]
    ratio = seen["after"][:, -before.shape[1] :] / before  # the newest channels are the last
    zero = ratio == 0
    assert torch.allclose(ratio[~zero], torch.tensor(1 / (1 - rate)))
    fraction = zero.double().mean().item()
    assert abs(fraction - rate) < 5 * math.sqrt(rate * (1 - rate) / ratio.numel())


@EVERY_FORM
@pytest.mark.parametrize("drop_rate", [0, 0.2])
def test_optmemory_0_and_1_compute_the_same_bits(form, drop_rate):
    images, targets = photographs()

    def step(level: int, seed: int = 5) -> dict[str, Tensor]:
        model = densenet(form, f"--dropRate {drop_rate} --optMemory {level}")
        torch.manual_seed(seed)
        return one_step(model, images, targets)

    assert largest_difference(step(0), step(1)) == 0
    if drop_rate:
        assert largest_difference(step(0), step(1, seed=6)) > 1e-3


@pytest.mark.parametrize("reduction", ["0.3", "0.5", "0.7", "1"])
@pytest.mark.parametrize("k", [5, 12])
def test_transitions_keep_the_floor_of_theta_times_their_channels(reduction, k):
    with torch.device("meta"):
        line = f"--dataset cifar10 --depth 16 --growthRate {k} --reduction {reduction}"
        model = network(line)
    channels = 2 * k
    for i in (1, 2):
        channels = math.floor(Fraction(reduction) * (channels + 2 * k))
        transition = model.features.get_submodule(f"transition{i}.conv")
        assert transition.out_channels == channels
    assert model.classifier.in_features == channels + 2 * k
