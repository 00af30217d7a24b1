"""Networks: equal to torchvision's, timm's and the paper's, with the published sizes and starts."""

import copy
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn

import models.state_dicts
from errors import CheckpointError, UsageError
from helpers.networks import network, one_step, photographs, same_state, scramble
from helpers.tiny_networks import largest_difference
from kernels.dropout import DropoutSpec, draw_seed

IMAGENET = "--dataset imagenet"
TINY = "--dataset cifar10 --depth 10 --growthRate 4"

# Layers per block that the two depths below give, and each form of the CIFAR network.
LAYERS = 2
FORMS = {
    "basic": "--depth 10 --bottleneck false --reduction 1",
    "B": "--depth 16 --reduction 1",
    "C": "--depth 10 --bottleneck false",
    "BC": "--depth 16",
}


def form(name: str, more: str = "") -> nn.Module:
    # k = 5 makes the number of maps before a transition odd, so that halving it must round.
    line = f"--dataset cifar10 --growthRate 5 --initChannels 7 {FORMS[name]} {more}"
    return scramble(network(line).double())


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------------- torchvision and timm


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    torch.manual_seed(1)
    return scramble(torchvision.models.densenet121())


@pytest.fixture
def ours() -> nn.Module:
    return network(IMAGENET, 1000)


def test_outputs_gradients_and_statistics_equal_torchvisions_densenet_121(ours, theirs):
    models.state_dicts.load_weights(ours, theirs.state_dict())
    ours.double()
    reference, altered = copy.deepcopy(theirs).double(), copy.deepcopy(ours)
    with torch.no_grad():
        altered.features.denseblock3.denselayer7.conv2.weight[0, 0, 1, 1] += 1e-3
    images, targets = photographs(size=64, classes=1000)
    want = one_step(reference, images, targets)
    assert largest_difference(one_step(ours, images, targets), want) < 1e-10
    assert largest_difference(one_step(altered, images, targets), want) > 1e-6
    with torch.no_grad():
        evaluated = reference.eval()(images)
        assert (ours.eval()(images) - evaluated).abs().max() < 1e-10
        assert (altered.eval()(images) - evaluated).abs().max() > 1e-10


@pytest.mark.parametrize("depth", [121, 161, 169, 201])
def test_names_and_shapes_are_torchvisions(depth):
    with torch.device("meta"):
        ours = network(f"{IMAGENET} --depth {depth}", 1000).state_dict()
        theirs = getattr(torchvision.models, f"densenet{depth}")().state_dict()
    assert [(name, tensor.shape) for name, tensor in ours.items()] == [
        (name, tensor.shape) for name, tensor in theirs.items()
    ]


LIBRARIES: dict[str, Callable[[], nn.Module]] = {
    "torchvision": torchvision.models.densenet121,
    "timm": lambda: timm.create_model("densenet121", pretrained=False),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_weights_are_exchanged_by_name_both_ways(ours, library):
    theirs, images = scramble(LIBRARIES[library]()).eval(), photographs(1, 64)[0].float()
    assert not same_state(ours.state_dict(), theirs.state_dict())
    models.state_dicts.load_weights(ours, theirs.state_dict())
    assert same_state(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(images), theirs(images), rtol=1e-4, atol=1e-4)

    mine = scramble(ours)
    assert not same_state(mine.state_dict(), theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())  # strict: every name of theirs, and no other
    assert same_state(mine.state_dict(), theirs.state_dict())


def test_the_keys_of_old_torchvision_files_load(theirs, ours):
    old = {}
    for name, tensor in theirs.state_dict().items():
        for word in ("norm1", "norm2", "conv1", "conv2"):
            name = name.replace(f".{word}.", f".{word[:-1]}.{word[-1]}.")
        if not name.endswith("num_batches_tracked"):  # younger than those files
            old[name] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert "features.denseblock4.denselayer16.conv.2.weight" in old
    models.state_dicts.load_weights(ours, old)
    assert same_state(ours.state_dict(), theirs.state_dict())


# --------------------------------------------------------- the paper's CIFAR network, stated anew

PLACES = ("after 1x1", "after 3x3", "in transition")


def statement(
    weights: dict[str, Tensor],
    images: Tensor,
    *,
    bottleneck: bool,
    training: bool = True,
    drop: float = 0.0,
    places: tuple[str, ...] = PLACES,
    pool: Callable[[Tensor, int], Tensor] = F.avg_pool2d,
) -> Tensor:
    """Sections 3 and 4 of the paper, layer by layer. Moves the statistics in `weights`."""

    def bn_relu(name: str, x: Tensor) -> Tensor:
        mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if training:
            weights[f"{name}.num_batches_tracked"] += 1
        return F.relu(F.batch_norm(x, mean, variance, scale, shift, training, 0.1, 1e-5))

    def conv(name: str, x: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], padding=padding)

    def dropped(place: str, x: Tensor, seed: Tensor, number: int = 0) -> Tensor:
        if not (training and drop and place in places):
            return x
        mask = DropoutSpec(drop, seed, number).mask(x.permute(0, 2, 3, 1))
        return x * mask.permute(0, 3, 1, 2)

    no_seed = torch.zeros(1, dtype=torch.int32)
    x = dropped("after the stem", conv("features.conv0", images, padding=1), no_seed)
    for block in (1, 2, 3):
        maps, seed = [x], draw_seed(x.device)  # one of each block and of each transition
        for layer in range(LAYERS):
            at = f"features.denseblock{block}.denselayer{layer + 1}"
            new = bn_relu(f"{at}.norm1", torch.cat(maps, 1))
            if bottleneck:
                new = dropped("after 1x1", conv(f"{at}.conv1", new, padding=0), seed, 2 * layer)
                new = bn_relu(f"{at}.norm2", new)
            new = conv(f"{at}.conv{2 if bottleneck else 1}", new, padding=1)
            maps.append(dropped("after 3x3", new, seed, 2 * layer + bottleneck))
        x = torch.cat(maps, 1)
        if block < 3:
            at, seed = f"features.transition{block}", draw_seed(x.device)
            x = conv(f"{at}.conv", bn_relu(f"{at}.norm", x), padding=0)
            x = pool(dropped("in transition", x, seed), 2)
            x = dropped("after pooling", x, seed)
    x = bn_relu("features.norm5", x).mean(dim=(2, 3))
    return F.linear(x, weights["classifier.weight"], weights["classifier.bias"])


def one_stated_step(state: dict[str, Tensor], images, targets, **variant) -> dict[str, Tensor]:
    """What `one_step` computes, of the statement; `state` stays as it is."""
    weights = {name: tensor.clone() for name, tensor in state.items()}
    learnt = [name for name in weights if name.endswith(("weight", "bias"))]
    for name in learnt:
        weights[name].requires_grad_()
    logits = statement(weights, images, **variant)
    F.cross_entropy(logits, targets).backward()
    gradients = {f"gradient of {name}": weights[name].grad for name in learnt}
    buffers = {name: tensor for name, tensor in weights.items() if name not in learnt}
    return {"logits": logits.detach(), **gradients, **buffers}


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_the_cifar_network_equals_the_paper(name, level):
    model, (images, targets) = form(name, f"--optMemory {level}"), photographs()
    state, bottleneck = copied_state(model), "B" in name
    got = one_step(model, images, targets)
    want = one_stated_step(state, images, targets, bottleneck=bottleneck)
    assert largest_difference(got, want) < 1e-10
    wrong = one_stated_step(state, images, targets, bottleneck=bottleneck, pool=F.max_pool2d)
    assert largest_difference(got, wrong) > 1e-3


@pytest.mark.parametrize("name", FORMS)
def test_evaluation_equals_the_paper_with_running_statistics_and_without_dropout(name):
    model, (images, _) = form(name, "--dropRate 0.3").eval(), photographs()
    state, bottleneck = copied_state(model), "B" in name
    with torch.no_grad():
        got = model(images)
        want = statement(state, images, bottleneck=bottleneck, training=False)
        batch_statistics = statement(copied_state(model), images, bottleneck=bottleneck)
    assert (got - want).abs().max() < 1e-10
    assert (got - batch_statistics).abs().max() > 1e-3
    assert same_state(model.state_dict(), state)  # evaluating moves nothing


# The same masks in the same places give the same outputs; one place more, less or moved gives
# others.
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("level", [0, 2])
def test_dropout_comes_after_each_convolution_but_the_stem_and_before_pooling(name, level):
    model = form(name, f"--dropRate 0.3 --optMemory {level}")
    images, targets = photographs()
    state, bottleneck = copied_state(model), "B" in name

    def stated(*places: str) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return one_stated_step(
            state, images, targets, bottleneck=bottleneck, drop=0.3, places=places
        )

    torch.manual_seed(5)
    got = one_step(model, images, targets)
    assert largest_difference(got, stated(*PLACES)) < 1e-10
    wrong = [
        ("after 1x1", "after 3x3"),
        ("after 1x1", "in transition"),
        (*PLACES, "after the stem"),
    ]
    wrong.append(("after 1x1", "after 3x3", "after pooling"))
    if bottleneck:
        wrong.append(("after 3x3", "in transition"))  # what most ports do
    for places in wrong:
        assert largest_difference(got, stated(*places)) > 1e-3, places


@pytest.mark.parametrize(
    ("conv", "then"),
    [
        ("denseblock2.denselayer1.conv1", "denseblock2.denselayer1.norm2"),
        ("denseblock2.denselayer1.conv2", "denseblock2.denselayer2.norm1"),
        ("transition1.conv", "transition1.pool"),
    ],
)
def test_dropout_sets_its_share_to_zero_and_scales_the_rest(conv, then):
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
    ratio = seen["after"][:, -before.shape[1] :] / before  # the newest maps are the last
    zero = ratio == 0
    assert torch.allclose(ratio[~zero], torch.tensor(1 / (1 - rate)))
    share = zero.double().mean().item()
    assert abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / ratio.numel())


@pytest.mark.parametrize("drop_rate", [0, 0.2])
@pytest.mark.parametrize("name", FORMS)
def test_optmemory_0_and_1_compute_the_same_bits(name, drop_rate):
    images, targets = photographs()

    def step(level: int, seed: int = 5) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = form(name, f"--dropRate {drop_rate} --optMemory {level}")
        torch.manual_seed(seed)
        return one_step(model, images, targets)

    assert largest_difference(step(0), step(1)) == 0
    if drop_rate:
        assert largest_difference(step(0), step(1, seed=6)) > 1e-3


# ------------------------------------------------------------------------------- initial weights


def fan_out_ratios(model: nn.Module) -> dict[str, float]:
    """Each large convolution's deviation over sqrt(2 / (kh kw C_out))."""
    ratios = {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.weight.numel() > 30_000:
            (height, width), maps = conv.kernel_size, conv.out_channels
            ratios[name] = (conv.weight.std() / math.sqrt(2 / (height * width * maps))).item()
    return ratios


def test_convolutions_start_normal_with_fan_out_deviation(ours, theirs):
    ratios = fan_out_ratios(ours)
    assert len(ratios) > 100
    assert all(abs(ratio - 1) < 0.02 for ratio in ratios.values()), ratios
    # torchvision starts with the fan-in: half as wide after a bottleneck.
    fan_in = fan_out_ratios(theirs)
    assert all(abs(r - 0.5) < 0.02 for name, r in fan_in.items() if name.endswith("conv2"))

    weight = ours.features.denseblock4.denselayer16.conv1.weight / math.sqrt(2 / 128)
    assert abs(weight.mean()) < 5 / math.sqrt(weight.numel())
    within_one = (weight.abs() < 1).double().mean().item()
    assert abs(within_one - 0.6827) < 0.01  # of a uniform one it would be 0.577


def test_stem_starts_with_fan_out_deviation():
    for line, kernel in ((IMAGENET, 7), ("--dataset cifar10", 3)):
        weight = network(f"{line} --initChannels 2000 --reduction 0.01").features.conv0.weight
        assert weight.shape == (2000, 3, kernel, kernel)
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (kernel**2 * 2000)), rel=0.02)


def test_batch_norm_starts_as_the_identity(ours):
    norms = [module for module in ours.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 121  # one before each convolution but the first, one before the classifier
    for norm in norms:
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
        assert (norm.running_mean == 0).all()
        assert (norm.running_var == 1).all()
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)


def test_classifier_starts_uniform_with_zero_bias(ours):
    weight, bound = ours.classifier.weight, 1 / math.sqrt(1024)
    assert 0.999 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert (ours.classifier.bias == 0).all()


def test_the_seed_decides_the_initial_weights():
    first, again, other = (
        network(f"{TINY} --manualSeed {seed}").state_dict() for seed in (1, 1, 2)
    )
    assert same_state(first, again)
    for name in first:
        if name.endswith(("conv0.weight", "conv1.weight", "conv.weight", "classifier.weight")):
            assert not torch.equal(first[name], other[name]), name


# ----------------------------------------------------------------------------- sizes and numbers

# numbers.md, a and b: L, k, basic?; 10 classes with stems of 16 and of 2k; 100 classes with the
# paper's stem; of the paper's with 10 classes: convolutions, BN, classifier; layers a block; maps
# before the classifier.
# fmt: off
CIFAR_ROWS = [
    (40,  12, True,   1_019_722,  1_059_298,  1_060_132,    997_136,  18_096,  4_490, 12,  448),
    (100, 12, True,   6_979_642,  7_083_538,  7_084_852,  6_850_736, 117_216, 11_690, 32, 1168),
    (100, 24, True,  27_249_082, 28_071_706, 27_457_972, 26_994_608, 231_264, 23_210, 32, 2320),
    (100, 12, False,    754_810,    769_162,    800_032,    741_744,  23_988,  3_430, 16,  342),
    (250, 24, False, 15_041_958, 15_324_406, 15_480_556, 15_049_080, 257_976, 17_350, 41, 1734),
    (190, 40, False, 24_917_134, 25_624_430, 25_821_620, 25_345_560, 256_960, 21_910, 31, 2190),
    (40,  36, False,  1_430_738,  1_542_682,  1_578_412,  1_523_448,  15_264,  3_970,  6,  396),
    (40,  48, False,  2_521_610,  2_733_130,  2_780_740,  2_707_488,  20_352,  5_290,  6,  528),
    (40,  60, False,  3_919_634,  4_261_690,  4_321_180,  4_229_640,  25_440,  6_610,  6,  660),
]
# numbers.md, d.
IMAGENET_ROWS = [
    ("--depth 121", 7_978_856),
    ("--depth 169", 14_149_480),
    ("--depth 201", 20_013_928),
    ("--depth 161", 28_681_000),
    ("--depth 264", 33_337_704),
    ("--depth 232", 55_570_984),
    ("--depth 264 --lrShape cosine", 33_337_704),
    ("--depth 264 --lrShape cosine --growthRate 48", 72_686_632),
    # The free stages of the last two, and the growth rates that the depths above imply.
    ("--d1 6 --d2 12 --d3 64 --d4 48", 33_337_704),
    ("--d1 6 --d2 12 --d3 48 --d4 48 --growthRate 48", 55_570_984),
    ("--depth 121 --growthRate 32", 7_978_856),
    ("--depth 161 --growthRate 48", 28_681_000),
]
# fmt: on


def on_meta(line: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):  # shapes without memory
        return network(line, num_classes)


def count(model: nn.Module, kind: type = nn.Module) -> int:
    modules = [module for module in model.modules() if isinstance(module, kind)]
    return sum(p.numel() for module in modules for p in module.parameters(recurse=False))


@pytest.mark.parametrize("row", CIFAR_ROWS, ids=lambda row: f"L{row[0]}-k{row[1]}-{row[2]}")
def test_cifar_networks_have_the_published_numbers_of_parameters(row):
    depth, k, basic, of_stem_16, of_stem_2k, of_100, convs, norms, classifier, layers, maps = row
    line = f"--dataset cifar10 --depth {depth} --growthRate {k}"
    line += " --bottleneck false --reduction 1" if basic else ""
    paper = on_meta(line, 10)
    assert count(paper) == (of_stem_16 if basic else of_stem_2k)
    assert count(paper, nn.Conv2d) == convs
    assert count(paper, nn.BatchNorm2d) == norms
    assert count(paper, nn.Linear) == classifier
    assert paper.classifier.in_features == maps
    assert [len(getattr(paper.features, f"denseblock{i}")) for i in (1, 2, 3)] == [layers] * 3
    assert count(on_meta(f"{line} --initChannels 16", 10)) == of_stem_16
    assert count(on_meta(f"{line} --initChannels {2 * k}", 10)) == of_stem_2k
    assert count(on_meta(line, 100)) == of_100


@pytest.mark.parametrize(("line", "parameters"), IMAGENET_ROWS, ids=lambda value: str(value))
def test_imagenet_networks_have_the_published_numbers_of_parameters(line, parameters):
    assert count(on_meta(f"{IMAGENET} {line}", 1000)) == parameters


@pytest.mark.parametrize("num_classes", [1, 2, 7])
@pytest.mark.parametrize("size", [8, 9, 13, 28, 33, 64, 65, 97])
def test_any_image_size_and_number_of_classes_give_one_logit_a_class(size, num_classes):
    shape = "--depth 10" if size <= 64 else "--d1 1 --d2 1 --d3 1 --d4 1"
    model = network(f"--dataset synthetic --imageSize {size} --growthRate 4 {shape}", num_classes)
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, num_classes)
    assert logits.isfinite().all()
    assert (model.features.conv0.stride == (2, 2)) is (size > 64)


@pytest.mark.parametrize("reduction", ["0.3", "0.5", "0.7", "0.9", "1"])
@pytest.mark.parametrize("k", [5, 7, 12])
def test_transitions_keep_the_floor_of_theta_times_their_maps(reduction, k):
    model = on_meta(f"--dataset cifar10 --depth 16 --growthRate {k} --reduction {reduction}", 10)
    maps = 2 * k
    for i in (1, 2):
        maps = math.floor(Fraction(reduction) * (maps + 2 * k))
        assert model.features.get_submodule(f"transition{i}.conv").out_channels == maps
    assert model.classifier.in_features == maps + 2 * k


# ------------------------------------------------------------------------- weights that do not fit


def without(name: str) -> Callable[[dict], dict]:
    return lambda weights: {key: weights[key] for key in weights if key != name}


LAYER = "features.denseblock2.denselayer1.conv2.weight"
HEAD = "classifier.weight"
SPOILT: dict[str, tuple[Callable[[dict], dict], str, str]] = {
    "missing": (without(LAYER), f"{LAYER} is missing", "give the flags of that network"),
    "unknown": (lambda w: {**w, "head.bias": w[HEAD]}, "head.bias is unknown", "give the flags"),
    "other shape": (
        lambda w: {**w, LAYER: torch.zeros(5, 16, 3, 3)},
        f"{LAYER} has shape (5, 16, 3, 3), not (4, 16, 3, 3)",
        "give the flags of that network",
    ),
    "other classes": (
        lambda w: {**w, HEAD: torch.zeros(7, 11), "classifier.bias": torch.zeros(7)},
        f"{HEAD} has shape (7, 11), not (10, 9)",
        "add --resetClassifier true",
    ),
    "nothing": (lambda w: {}, "is missing; ", "give the flags of that network"),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_weights_that_do_not_fit_are_named_and_leave_the_network_as_it_was(spoil):
    alter, what, fix = SPOILT[spoil]
    model, other = network(TINY), network(f"{TINY} --manualSeed 1")
    before = copied_state(model)
    with pytest.raises(CheckpointError) as caught:
        models.state_dicts.load_weights(model, alter(other.state_dict()))
    report = caught.value.report()
    assert caught.value.code == 4
    assert what in report
    assert f"; fix: {fix}" in report
    assert report.startswith("error: weights do not fit the network: ")
    assert same_state(model.state_dict(), before)
    models.state_dicts.load_weights(model, other.state_dict())  # unspoilt, they fit
    assert not same_state(model.state_dict(), before)


def test_a_network_of_another_growth_rate_is_reported_in_one_short_line():
    with pytest.raises(CheckpointError) as caught:
        models.state_dicts.load_weights(
            network(TINY), network(TINY.replace("Rate 4", "Rate 6")).state_dict()
        )
    report = caught.value.report()
    assert "\n" not in report
    assert len(report) < 500
    assert " in all; fix: " in report


def test_resetclassifier_loads_all_but_a_fresh_classifier():
    pretrained, model = network(f"{TINY} --manualSeed 1", 100), network(TINY, 10)
    fresh = copied_state(model)
    models.state_dicts.load_weights(model, pretrained.state_dict(), reset_classifier=True)
    for name, tensor in model.state_dict().items():
        source = fresh if name.startswith("classifier.") else pretrained.state_dict()
        assert torch.equal(tensor, source[name]), name
    assert not torch.equal(model.features.conv0.weight, fresh["features.conv0.weight"])


def test_resetclassifier_ignores_a_classifier_that_would_fit():
    pretrained, model = network(f"{TINY} --manualSeed 1"), network(TINY)
    fresh = model.classifier.weight.clone()
    models.state_dicts.load_weights(model, pretrained.state_dict(), reset_classifier=True)
    assert torch.equal(model.classifier.weight, fresh)
    assert not torch.equal(model.classifier.weight, pretrained.classifier.weight)


def test_loaded_weights_are_copies():
    source, model = network(f"{TINY} --manualSeed 1"), network(TINY)
    models.state_dicts.load_weights(model, source.state_dict())
    with torch.no_grad():
        source.classifier.weight += 1
    assert not torch.equal(model.classifier.weight, source.classifier.weight)


def test_a_compression_that_would_leave_no_maps_is_a_usage_error():
    with pytest.raises(UsageError) as caught:
        network("--dataset cifar10 --depth 10 --reduction 0.01")  # floor(0.01 * 36) = 0
    assert caught.value.code == 2
    assert "reduction" in caught.value.report()
    assert "; fix: " in caught.value.report()
