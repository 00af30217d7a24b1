"""Test --bnEps, --nChannels and --adaptChannels of networks: levels, kernels, sizes, weights."""

import pytest
import timm.models
import torch
from torch import nn

import models.state_dicts
import opts
from engine.memory import MemoryEstimate
from errors import CheckpointError
from helpers.networks import network, one_step, scramble
from helpers.tiny_networks import largest_difference
from kernels.backend import REFERENCE
from models import memory_efficient

KERAS = 1.001e-5
NETWORKS = {
    "BC": "--dataset cifar10 --depth 16 --growthRate 5",
    "basic, dropout": "--dataset cifar10 --depth 10 --bottleneck false --dropRate 0.2",
    "ImageNet": "--dataset imagenet --growthRate 4 --d1 2 --d2 1 --d3 1 --d4 2",
    "resnet": "--dataset cifar10 --netType resnet --depth 20",
    "resnet, ImageNet": "--dataset imagenet --netType resnet --depth 18",
    "preresnet": "--dataset cifar10 --netType preresnet --depth 29",
    "preresnet, ImageNet": "--dataset imagenet --netType preresnet --depth 50",
}
DENSE = [line for name, line in NETWORKS.items() if "resnet" not in name]


def results(line: str, channels: int) -> dict[str, torch.Tensor]:
    """Return all results of a training step, then of evaluation, in double precision.

    Variances are near to epsilon, so that its last digits show.
    """
    model = scramble(network(f"{line} --nChannels {channels}", num_classes=4)).double()
    size = 48 if "imagenet" in line else 8
    images = 0.01 * torch.randn(3, channels, size, size, dtype=torch.float64)
    torch.manual_seed(5)
    found = one_step(model, images, torch.arange(3))
    with torch.no_grad():
        found["evaluated"] = model.eval()(images)
    return found


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("line", DENSE)
def test_every_memory_level_computes_with_the_epsilon_of_the_network(line, level):
    exact = results(f"{line} --optMemory 0 --bnEps {KERAS}", 1)
    found = results(f"{line} --optMemory {level} --bnEps {KERAS}", 1)
    assert largest_difference(found, exact) < 1e-9
    for eps in (1e-5, 1e-3):  # a twin with another epsilon is told from it
        assert largest_difference(
            results(f"{line} --optMemory {level} --bnEps {eps}", 1), exact
        ) > (1e-6)


@pytest.mark.parametrize("line", NETWORKS.values(), ids=NETWORKS)
def test_every_norm_of_a_network_has_the_epsilon(line):
    norms = [
        m for m in network(f"{line} --bnEps {KERAS}").modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert {norm.eps for norm in norms} == {KERAS}
    default = [m for m in network(line).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.eps for norm in default} == {1e-5} and len(default) == len(norms)


def test_norms_of_mixed_epsilons_run_as_plain_modules_and_right():
    line = f"{NETWORKS['BC']} --bnEps {KERAS}"
    model, plain = (network(f"{line} --optMemory {level}").double() for level in (2, 0))
    for each in (model, plain):
        each.features.denseblock1.denselayer1.norm1.eps = 1e-3
    block, reader = model.features.denseblock1, model.features.transition1.norm
    assert not memory_efficient.can_run(block, reader)
    assert memory_efficient.can_run(model.features.denseblock2, model.features.transition2.norm)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found, wanted = (one_step(each, images, torch.arange(2)) for each in (model, plain))
    assert largest_difference(found, wanted) < 1e-9


@pytest.mark.parametrize(
    ("line", "width", "kernel"),
    [("BC", 10, 9), ("ImageNet", 8, 49), ("resnet", 16, 9), ("resnet, ImageNet", 64, 49),
     ("preresnet", 16, 9), ("preresnet, ImageNet", 64, 49)],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_another_number_of_channels_changes_the_first_convolution_alone(
    line, width, kernel, channels
):
    line = NETWORKS[line]
    found, usual = (
        network(
            f"{line} --dataset synthetic --nChannels {channels}".replace(
                "--dataset cifar10", ""
            ).replace("--dataset imagenet", "--imageSize 224")
        ),
        network(line),
    )
    sizes, usual_sizes = ({n: p.shape for n, p in m.named_parameters()} for m in (found, usual))
    (first,) = {name for name in sizes if sizes[name] != usual_sizes[name]}
    assert first == next(iter(sizes)) and sizes[first][:2] == (width, channels)
    counts = [sum(p.numel() for p in model.parameters()) for model in (found, usual)]
    assert counts[1] - counts[0] == (3 - channels) * width * kernel


def test_the_memory_estimate_counts_the_images_channels():
    def peak(channels: int) -> int:
        line = "--dataset synthetic --imageSize 64 --depth 10 --growthRate 2 --initChannels 2 "
        opt = opts.parse(f"{line} --batchSize 64 --nChannels {channels}".split())
        return MemoryEstimate(opt, 10, torch.device("cpu"), REFERENCE).peak_bytes()

    images = 4 * 64 * 64 * 64  # bytes of a channel
    assert peak(9) - peak(1) == pytest.approx(8 * images, rel=0.01)


# Weights of another number of channels:
LINE = "--dataset synthetic --imageSize 224 --growthRate 4 --d1 1 --d2 1 --d3 1 --d4 1"
FIRST = "features.conv0.weight"


def loaded(source: int, target: int, **options) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    weights = scramble(network(f"{LINE} --nChannels {source} --manualSeed 1")).state_dict()
    model, notes = network(f"{LINE} --nChannels {target}"), []
    models.state_dicts.load_weights(model, weights, warn=notes.append, **options)
    return weights[FIRST], model.state_dict()[FIRST], notes


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_three_channels_are_adapted_as_timm_does(channels):
    before, after, notes = loaded(3, channels, adapt_channels=True)
    wanted = timm.models.adapt_input_conv(channels, before.clone())
    assert torch.allclose(after, wanted, rtol=1e-6, atol=0)
    how = "summed into one" if channels == 1 else f"repeated over {channels}, and scaled"
    assert notes == [f"{FIRST} takes 3 channels: {how}"]


@pytest.mark.parametrize(("source", "target"), [(1, 3), (2, 3), (4, 2), (4, 1), (13, 3)])
def test_an_adapted_convolution_computes_the_same_where_all_channels_are_equal(source, target):
    before, after, _ = loaded(source, target, adapt_channels=True)
    images = torch.randn(2, 1, 9, 9)
    wanted = nn.functional.conv2d(images.expand(-1, source, -1, -1), before)
    found = nn.functional.conv2d(images.expand(-1, target, -1, -1), after)
    # Channels that are cut off leave the scale alone.
    exact = source == 1 or target == 1 or target % source == 0
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4) == exact
    if (source, target) == (1, 3):
        assert torch.equal(after, before.repeat(1, 3, 1, 1) / 3)


@pytest.mark.parametrize(
    ("source", "target", "fix"),
    [
        (1, 3, "use --nChannels 1, or add --adaptChannels true"),
        (3, 1, "use --nChannels 3, or add --adaptChannels true"),
        (5, 3, "add --adaptChannels true"),  # no image file has five
    ],
)
def test_another_number_of_channels_is_refused_with_the_fixes_that_work(source, target, fix):
    with pytest.raises(CheckpointError) as caught:
        loaded(source, target)
    what = f"the first convolution of these weights takes {source} channels, not {target}"
    assert [*caught.value.problems] == [(what, fix)]


def test_weights_of_as_many_channels_are_taken_as_they_are():
    before, after, notes = loaded(2, 2, adapt_channels=True)
    assert torch.equal(before, after) and not notes
