"""Test all networks against torchvision's and timm's, published sizes and initial weights."""

import copy
import math

import pytest
import timm
import torch
import torchvision.models
from torch import Tensor, nn

import models.state_dicts
from errors import CheckpointError
from helpers.networks import network, one_step, photographs, same_state, scramble
from helpers.tiny_networks import largest_difference
from models.weight_formats import import_weights

SMALL = {
    "densenet": "--dataset cifar10 --depth 10 --growthRate 4",
    "resnet": "--dataset cifar10 --netType resnet --depth 20",
    "preresnet": "--dataset cifar10 --netType preresnet --depth 20",
    "nin": "--dataset cifar10 --netType nin --widen 0.05",
}
EVERY_NETWORK = pytest.mark.parametrize("line", SMALL.values(), ids=SMALL)


def on_meta(line: str, num_classes: int = 10) -> nn.Module:
    with torch.device("meta"):  # shapes without memory
        return network(line, num_classes)


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Torchvision and timm:
def line_of(name: str) -> str:
    """Return the command line for a network of torchvision's, such as densenet121."""
    kind = name.rstrip("0123456789")
    return f"--dataset imagenet --netType {kind} --depth {name.removeprefix(kind)}"


@pytest.mark.parametrize(
    ("name", "size", "altered_conv"),
    [
        ("densenet121", 64, "features.denseblock3.denselayer7.conv2"),
        ("resnet18", 33, "layer3.1.conv2"),
        ("resnet50", 33, "layer3.1.conv2"),
    ],
)
def test_a_step_and_an_evaluation_equal_torchvisions(name, size, altered_conv):
    torch.manual_seed(1)
    reference = scramble(torchvision.models.get_model(name, num_classes=7)).double()
    ours = network(line_of(name), 7).double()
    models.state_dicts.load_weights(ours, reference.state_dict())
    altered = copy.deepcopy(ours)
    with torch.no_grad():
        altered.get_submodule(altered_conv).weight[0, 0, 1, 1] += 1e-3
    images, targets = photographs(2, size, 7)
    want = one_step(reference, images, targets)
    assert largest_difference(one_step(ours, images, targets), want) < 1e-9
    assert largest_difference(one_step(altered, images, targets), want) > 1e-6
    with torch.no_grad():
        evaluated = reference.eval()(images)
        assert (ours.eval()(images) - evaluated).abs().max() < 1e-9
        assert (altered.eval()(images) - evaluated).abs().max() > 1e-8


@pytest.mark.parametrize(
    "name",
    [f"densenet{depth}" for depth in (121, 161, 169, 201)]
    + [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)],
)
def test_names_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        reference = torchvision.models.get_model(name).state_dict()
    ours = on_meta(line_of(name), 1000).state_dict()
    assert [(key, tensor.shape) for key, tensor in ours.items()] == [
        (key, tensor.shape) for key, tensor in reference.items()
    ]


@pytest.mark.parametrize("name", ["densenet121", "resnet18"])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_weights_are_exchanged_by_name_both_ways(name, library):
    make = torchvision.models.get_model if library == "torchvision" else timm.create_model
    torch.manual_seed(1)
    reference, images = scramble(make(name)).eval(), photographs(1, 64)[0].float()
    ours = network(line_of(name), 1000)
    assert not same_state(ours.state_dict(), reference.state_dict())
    models.state_dicts.load_weights(ours, reference.state_dict())
    assert same_state(ours.state_dict(), reference.state_dict())
    torch.testing.assert_close(ours.eval()(images), reference(images), rtol=1e-4, atol=1e-4)
    scramble(ours)
    reference.load_state_dict(ours.state_dict())  # strict: all of their names and no other
    assert same_state(ours.state_dict(), reference.state_dict())


def test_the_names_of_old_torchvision_files_load():
    torch.manual_seed(1)
    reference, ours = torchvision.models.densenet121(), network("--dataset imagenet", 1000)
    old = {}
    for name, tensor in reference.state_dict().items():
        for word in ("norm1", "norm2", "conv1", "conv2"):
            name = name.replace(f".{word}.", f".{word[:-1]}.{word[-1]}.")
        if not name.endswith("num_batches_tracked"):  # those files are older
            old[name] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert "features.denseblock4.denselayer16.conv.2.weight" in old
    imported = import_weights(old, None, [].append)
    models.state_dicts.load_weights(ours, imported.weights)
    assert same_state(ours.state_dict(), reference.state_dict())


# Initial weights:
@pytest.mark.parametrize(
    ("line", "num_classes"),
    [
        ("--dataset imagenet", 1000),
        ("--dataset cifar10 --depth 40 --growthRate 12", 100),
        ("--netType resnet --depth 56 --shortcutType B", 100),
        ("--netType preresnet --depth 56 --shortcutType B", 100),
    ],
)
def test_initial_weights_are_those_of_fb_resnet_torch(line, num_classes):
    model, normal = network(line, num_classes), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # N(0, sqrt(2 / (kh kw C_out))); the standard deviation of n values errs by 1/sqrt(2n).
            fan_out = math.prod(module.kernel_size) * module.out_channels
            normal.append((module.weight / math.sqrt(2 / fan_out)).flatten())
            assert abs(normal[-1].std() - 1) < 5 / math.sqrt(2 * normal[-1].numel())
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
            assert (module.running_mean == 0).all() and (module.running_var == 1).all()
            assert (module.eps, module.momentum) == (1e-5, 0.1)
    normal = torch.cat(normal)
    assert abs(normal.mean()) < 5 / math.sqrt(normal.numel())
    within_one = (normal.abs() < 1).double().mean().item()
    assert within_one == pytest.approx(0.6827, abs=0.01)  # of a uniform distribution: 0.577
    weight, bound = model.classifier.weight, 1 / math.sqrt(model.classifier.in_features)
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert (model.classifier.bias == 0).all()


@EVERY_NETWORK
def test_the_seed_decides_the_initial_weights(line):
    first, again, other = (
        network(f"{line} --manualSeed {seed}").state_dict() for seed in (1, 1, 2)
    )
    assert same_state(first, again)
    drawn = [name for name in first if first[name].dim() > 1]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize(
    ("line", "last"),
    [
        ("resnet --depth 8", [0.012112, 0.058118, 0.008491]),
        ("preresnet --depth 11", [0.027448, 0.050041, 0.025384]),
        ("resnet --dataset imagenet --depth 18", [-0.035389, 0.039056, 0.010741]),
        ("preresnet --dataset imagenet --depth 18", [0.038475, -0.042721, -0.01793]),
    ],
)
def test_a_seed_gives_the_same_weights_in_every_version(line, last):
    # The last draw depends on all earlier ones.
    model = network(f"--netType {line}", 10)
    assert model.fc.weight[0, :3].tolist() == pytest.approx(last, abs=1e-6)


def test_parameters_keep_their_order_on_which_checkpoints_rely():
    # An optimizer knows parameters by position. Above, torchvision's order is compared.
    blocks = [f"stages.{i}.0" for i in range(3)]
    of_block = [name for i in (1, 2, 3)
                for name in (f"bn{i}.weight", f"bn{i}.bias", f"conv{i}.weight")]  # fmt: skip
    want = ["stem.weight", *(f"{block}.{name}" for block in blocks for name in of_block),
            "bn.weight", "bn.bias", "fc.weight", "fc.bias"]  # fmt: skip
    assert [n for n, _ in on_meta("--netType preresnet --depth 11").named_parameters()] == want
    large = on_meta("--dataset imagenet --netType preresnet --depth 18")
    first = ["conv1.weight", "bn2.weight", "bn2.bias", "conv2.weight"]
    stem = ["stem.0.weight", "stem.1.weight", "stem.1.bias"]
    want = [*stem, *(f"stages.0.0.{name}" for name in first)]
    assert [name for name, _ in large.named_parameters()][:7] == want


# Sizes and numbers:
BASIC = "--bottleneck false --reduction 1"
FREE = "--dataset imagenet --d1 6 --d2 12"
# Parameters with 10 classes (1000 at ImageNet shape), and those of batch norms, None where
# torchvision's names and shapes, compared above, say it.
COUNTED = [
    (f"--depth 40 --growthRate 12 {BASIC}", 1_019_722, 18_096),
    (f"--depth 40 --growthRate 12 {BASIC} --initChannels 24", 1_059_298, None),
    (f"--depth 100 --growthRate 12 {BASIC}", 6_979_642, 117_216),
    (f"--depth 100 --growthRate 24 {BASIC}", 27_249_082, 231_264),
    ("--depth 100 --growthRate 12", 769_162, 23_988),
    ("--depth 100 --growthRate 12 --initChannels 16", 754_810, None),
    ("--depth 250 --growthRate 24", 15_324_406, 257_976),
    ("--depth 190 --growthRate 40", 25_624_430, 256_960),
    ("--depth 40 --growthRate 36", 1_542_682, 15_264),
    ("--depth 40 --growthRate 48", 2_733_130, 20_352),
    ("--depth 40 --growthRate 60", 4_261_690, 25_440),
    ("--dataset imagenet --depth 121", 7_978_856, None),
    ("--dataset imagenet --depth 161", 28_681_000, None),
    ("--dataset imagenet --depth 264", 33_337_704, None),
    ("--dataset imagenet --depth 232", 55_570_984, None),
    ("--dataset imagenet --depth 264 --lrShape cosine --growthRate 48", 72_686_632, None),
    (f"{FREE} --d3 64 --d4 48", 33_337_704, None),
    (f"{FREE} --d3 48 --d4 48 --growthRate 48", 55_570_984, None),
    ("--netType resnet --depth 110", 1_727_962, 8_096),
    ("--netType resnet --depth 110 --shortcutType B", 1_730_714, 8_288),
    ("--netType resnet --depth 110 --shortcutType C", 1_826_202, 12_128),
    ("--netType preresnet --depth 110 --bottleneck false", 1_727_962, 8_096),
    ("--netType preresnet --depth 164", 1_661_274, 24_224),
    ("--netType preresnet --depth 164 --shortcutType B", 1_703_258, 24_224),
    # arXiv:1603.05027 says 10.2M: with shortcut B, and without batch norms.
    ("--netType preresnet --depth 1001 --shortcutType B", 10_327_706, 149_216),
    ("--netType wideresnet", 36_479_194, 17_952),
    ("--netType resnet --dataset imagenet --depth 18", 11_689_512, 9_600),
    ("--netType resnet --dataset imagenet --depth 200", 64_673_832, 176_000),
]
UNUSUAL = {264: 265, 232: 233}  # the authors' names of these two are one short


def count(model: nn.Module, kind: type = nn.Module) -> int:
    modules = [module for module in model.modules() if isinstance(module, kind)]
    return sum(p.numel() for module in modules for p in module.parameters(recurse=False))


@pytest.mark.parametrize(("line", "parameters", "of_norms"), COUNTED)
def test_networks_have_the_published_numbers_of_parameters_and_layers(line, parameters, of_norms):
    model = on_meta(line, 1000 if "imagenet" in line else 10)
    assert count(model) == parameters
    assert of_norms is None or count(model, nn.BatchNorm2d) == of_norms
    if "--depth" in line:
        convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        layers = 1 + sum("downsample" not in name for name in convs)  # with the classifier
        depth = int(line.split("--depth ")[1].split()[0])
        assert layers == UNUSUAL.get(depth, depth)


@pytest.mark.parametrize(
    ("shape", "size"),
    [(line, size) for line in SMALL.values() for size in (8, 13, 33, 64)]
    + [("--growthRate 4 --d1 1 --d2 1 --d3 1 --d4 1", size) for size in (65, 97)],
)
def test_any_image_size_and_number_of_classes_give_one_logit_a_class(shape, size):
    shape = shape.removeprefix("--dataset cifar10")
    model = network(f"--dataset synthetic --imageSize {size} {shape}", 7)
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert (stem.stride == (2, 2)) is (size > 64)


@EVERY_NETWORK
def test_evaluation_uses_the_running_statistics_and_each_image_alone(line):
    model, (images, _) = scramble(network(line)).double().eval(), photographs(3, 32)
    before = copied_state(model)
    with torch.no_grad():
        together, alone = model(images), model(images[1:2])
        assert torch.allclose(together[1:2], alone, rtol=1e-10, atol=1e-10)
        assert same_state(model.state_dict(), before)
        model.train()
        assert not torch.allclose(model(images)[1:2], alone, rtol=1e-2, atol=1e-2)


# Loaded weights:
LAYER = "features.denseblock2.denselayer1.conv2.weight"
HEAD = "classifier.weight"
OTHER_NETWORK = "; fix: give the flags of that network"
MISFITS = {
    "missing": ({LAYER: None}, f"{LAYER} is missing", OTHER_NETWORK),
    "unknown": ({"features.x": torch.zeros(1)}, "features.x is unknown", OTHER_NETWORK),
    "other shape": (
        {LAYER: torch.zeros(5, 16, 3, 3)},
        f"{LAYER} has shape (5, 16, 3, 3), not (4, 16, 3, 3)",
        OTHER_NETWORK,
    ),
    "other classes": (
        {HEAD: torch.zeros(7, 11), "classifier.bias": torch.zeros(7)},
        f"{HEAD} has shape (7, 11), not (10, 9)",
        "; fix: add --resetClassifier true",
    ),
}


@pytest.mark.parametrize(("changes", "what", "fix"), MISFITS.values(), ids=MISFITS)
def test_weights_that_do_not_fit_are_named_and_leave_the_network_unchanged(changes, what, fix):
    model, other = network(SMALL["densenet"]), network(f"{SMALL['densenet']} --manualSeed 1")
    before, weights = copied_state(model), other.state_dict() | changes
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(CheckpointError) as caught:
        models.state_dicts.load_weights(model, weights)
    report = caught.value.report()
    assert report.startswith("error: weights do not fit the network: ")
    assert what in report and report.endswith(fix)
    assert same_state(model.state_dict(), before)


@pytest.mark.parametrize("line", [SMALL["densenet"], SMALL["resnet"]])
def test_weights_beside_the_network_are_left_out_with_a_note(line):
    model, other, notes = network(line), network(f"{line} --manualSeed 1"), []
    beside = {"criterion.weight": torch.ones(2), "head.bias": torch.ones(1)}
    models.state_dicts.load_weights(model, other.state_dict() | beside, warn=notes.append)
    assert same_state(model.state_dict(), other.state_dict())
    assert notes == ["reads the weights of the network, without criterion.weight and 1 more"]


@pytest.mark.parametrize(
    ("line", "other"),
    [
        (SMALL["densenet"], SMALL["densenet"].replace("Rate 4", "Rate 6")),
        (SMALL["resnet"], SMALL["preresnet"]),
        (SMALL["preresnet"], SMALL["resnet"]),
    ],
)
def test_another_network_is_refused_in_one_short_line(line, other):
    with pytest.raises(CheckpointError) as caught:
        models.state_dicts.load_weights(network(line), network(other).state_dict())
    report = caught.value.report()
    flags = "use --depth 10 --growthRate 6 --initChannels 12 --bottleneck true --reduction 0.5"
    is_densenet = line == SMALL["densenet"]
    assert report.endswith(f" in all; fix: {flags}" if is_densenet else f" in all{OTHER_NETWORK}")
    assert "\n" not in report and len(report) < 500


@pytest.mark.parametrize("line", [*SMALL.values(), "--netType dsn --widen 0.05"])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_resetclassifier_loads_all_but_the_classifier(line, num_classes):
    pretrained, model = network(f"{line} --manualSeed 1", num_classes), network(line)
    head = ("classifier.", "fc.", "companions.")
    fresh, given = copied_state(model), copied_state(pretrained)
    if num_classes == 100:
        with pytest.raises(CheckpointError) as caught:
            models.state_dicts.load_weights(model, given)
        assert caught.value.report().endswith("; fix: add --resetClassifier true")
    models.state_dicts.load_weights(model, given, reset_classifier=True)
    want = {name: (fresh if name.startswith(head) else given)[name] for name in fresh}
    assert same_state(model.state_dict(), want)
    assert not same_state(want, fresh)


@pytest.mark.parametrize("foreign", ["fc.", "head.", "classifier.1."])
def test_another_programs_classifier_is_named_and_the_advice_works(foreign):
    pretrained = network(f"{SMALL['densenet']} --manualSeed 1", 7).state_dict()
    weights = {name.replace("classifier.", foreign): item for name, item in pretrained.items()}
    model = network(SMALL["densenet"])
    with pytest.raises(CheckpointError) as caught:
        models.state_dicts.load_weights(model, weights)
    assert caught.value.report().endswith("; fix: add --resetClassifier true")
    models.state_dicts.load_weights(model, weights, reset_classifier=True)
    assert torch.equal(model.state_dict()[LAYER], weights[LAYER])
    with pytest.raises(CheckpointError) as caught:
        models.state_dicts.load_weights(model, weights, classifier_fix="name others")
    assert caught.value.report().endswith("; fix: name others")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted_to_the_runs(dtype):
    model, other = network(SMALL["resnet"]), network(f"{SMALL['resnet']} --manualSeed 1").to(dtype)
    models.state_dicts.load_weights(model, other.state_dict())
    assert same_state(model.state_dict(), other.float().state_dict())


def test_quantised_weights_and_counters_that_are_not_whole_are_refused_by_name():
    norm = "features.denseblock1.denselayer1.norm1.num_batches_tracked"
    for name, tensor in ((LAYER, torch.ones(4, 16, 3, 3, dtype=torch.int8)),
                         (norm, torch.tensor(1.5))):  # fmt: skip
        weights = copied_state(network(SMALL["densenet"])) | {name: tensor}
        kind = str(tensor.dtype).removeprefix("torch.")
        with pytest.raises(CheckpointError, match=f"{name} holds {kind} numbers"):
            models.state_dicts.load_weights(network(SMALL["densenet"]), weights)


def test_loaded_weights_are_copies():
    line = SMALL["densenet"]
    source, model = network(f"{line} --manualSeed 1"), network(line)
    models.state_dicts.load_weights(model, source.state_dict())
    assert same_state(model.state_dict(), source.state_dict())
    with torch.no_grad():
        source.classifier.weight += 1
    assert not torch.equal(model.classifier.weight, source.classifier.weight)
