"""Residual networks: equal to torchvision's and to plain restatements, with the published sizes."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn

import models.factory
import models.state_dicts
import opts
import train
from distributed.world import BatchShard, World
from engine.memory import MemoryEstimate
from errors import CheckpointError
from experiment.log import RunLog
from helpers.networks import network, one_step, photographs, same_state, scramble
from helpers.sample_data import create_data
from helpers.tiny_networks import largest_difference
from kernels.backend import REFERENCE
from models.resnet import ResNet
from tools import describe
from tools.benchmark import __main__ as benchmark

NETWORKS = ("resnet", "preresnet")
IMAGENET = "--dataset imagenet --netType"


# ------------------------------------------------------------------------- torchvision and timm


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_a_step_and_an_evaluation_equal_torchvisions(depth):
    torch.manual_seed(depth)
    theirs = scramble(getattr(torchvision.models, f"resnet{depth}")(num_classes=7)).double()
    ours = network(f"{IMAGENET} resnet --depth {depth}", 7)
    models.state_dicts.load_weights(ours.double(), theirs.state_dict())
    altered = copy.deepcopy(ours)
    with torch.no_grad():
        altered.layer3[1].conv2.weight[0, 0, 1, 1] += 1e-3
    images, targets = photographs(2, 33, 7)
    want = one_step(theirs, images, targets)
    assert largest_difference(one_step(ours, images, targets), want) < 1e-9
    assert largest_difference(one_step(altered, images, targets), want) > 1e-6
    with torch.no_grad():
        evaluated = theirs.eval()(images)
        assert (ours.eval()(images) - evaluated).abs().max() < 1e-9
        assert (altered.eval()(images) - evaluated).abs().max() > 1e-8


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_names_and_shapes_are_torchvisions(depth):
    with torch.device("meta"):
        ours = network(f"{IMAGENET} resnet --depth {depth}", 1000).state_dict()
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    assert [(name, tensor.shape) for name, tensor in ours.items()] == [
        (name, tensor.shape) for name, tensor in theirs.items()
    ]


LIBRARIES = {
    "torchvision": torchvision.models.resnet18,
    "timm": lambda: timm.create_model("resnet18", pretrained=False),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_weights_are_exchanged_by_name_both_ways(library):
    torch.manual_seed(1)
    theirs, images = scramble(LIBRARIES[library]()).eval(), torch.randn(1, 3, 64, 64)
    ours = network(f"{IMAGENET} resnet --depth 18", 1000)
    assert not same_state(ours.state_dict(), theirs.state_dict())
    models.state_dicts.load_weights(ours, theirs.state_dict())
    assert same_state(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(images), theirs(images), rtol=1e-4, atol=1e-4)
    mine = scramble(ours)
    theirs.load_state_dict(mine.state_dict())  # strict: every name of theirs, and no other
    assert same_state(mine.state_dict(), theirs.state_dict())


# --------------------------------------------------------- both networks stated anew, as functions


class Statement:
    """The sources of both networks in training, function by function, with a model's weights.

    fb.resnet.torch, and for bottlenecks of pre-activation ResNets at CIFAR shape their authors'.

    Args:
        weights: by name.
        kind: shortcut A, B or C.
        large: the ImageNet shape.
        slip: a mistake to make on purpose, see SLIPS.
    """

    def __init__(self, weights: dict[str, Tensor], kind: str, large: bool, slip: str = ""):
        self.weights, self.kind, self.large, self.slip = weights, kind, large, slip

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    def bn(self, name: str, x: Tensor) -> Tensor:
        scale, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
        normal = (x - mean) / (variance + 1e-5).sqrt()
        return normal * scale[:, None, None] + shift[:, None, None]

    def bn_relu(self, name: str, x: Tensor) -> Tensor:
        return self.bn(name, x).relu()

    def shortcut(self, name: str, x: Tensor, maps: int, stride: int, norm: bool) -> Tensor:
        if self.kind == "C" or (self.kind == "B" and x.shape[1] != maps):
            if not norm:
                return self.conv(name, x, stride)
            return self.bn(f"{name}.1", self.conv(f"{name}.0", x, stride))
        if self.slip == "mean of pixels":
            x = F.avg_pool2d(x, stride, stride, ceil_mode=True)
        else:
            x = F.avg_pool2d(x, 1, stride)  # as in Lua: one pixel of each square
        zeros = x.new_zeros(x.shape[0], maps - x.shape[1], *x.shape[2:])
        return torch.cat([zeros, x] if self.slip == "zeros first" else [x, zeros], 1)

    def stem(self, x: Tensor, conv: str, bn: str | None) -> Tensor:
        x = self.conv(conv, x, 2 if self.large else 1)
        x = self.bn_relu(bn, x) if bn else x
        return F.max_pool2d(x, 3, 2, 1) if self.large else x

    def places(self, counts: tuple[int, ...], bottleneck: bool):
        """Stage and place of each block, and its output maps and stride."""
        width = (64 if self.large else 16) * (4 if bottleneck else 1)
        for i, count in enumerate(counts):
            for j in range(count):
                yield i, j, width * 2**i, 2 if i > 0 and j == 0 else 1

    def strides(self, stride: int, bottleneck: bool, late: bool) -> tuple[int, int]:
        """Of the first two convolutions of a block; a bottleneck may have it `late`, in the 3x3."""
        in_the_first = not bottleneck or late == (self.slip == "stride elsewhere")
        return (stride, 1) if in_the_first else (1, stride)

    def classified(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.weights["fc.weight"].T + self.weights["fc.bias"]

    def resnet(self, x: Tensor, counts: tuple[int, ...], bottleneck: bool) -> Tensor:
        x = self.stem(x, "conv1", "bn1")
        for i, j, maps, stride in self.places(counts, bottleneck):
            at = f"layer{i + 1}.{j}"
            first, second = self.strides(stride, bottleneck, late=True)
            y = self.bn_relu(f"{at}.bn1", self.conv(f"{at}.conv1", x, first))
            y = self.bn(f"{at}.bn2", self.conv(f"{at}.conv2", y, second))
            if bottleneck:
                y = self.bn(f"{at}.bn3", self.conv(f"{at}.conv3", y.relu()))
            x = y + self.shortcut(f"{at}.downsample", x, maps, stride, norm=True)
            x = x if self.slip == "sum not rectified" else x.relu()
        return self.classified(x)

    def preresnet(self, x: Tensor, counts: tuple[int, ...], bottleneck: bool) -> Tensor:
        x = self.stem(x, "stem.0", "stem.1") if self.large else self.stem(x, "stem", None)
        for i, j, maps, stride in self.places(counts, bottleneck):
            at = f"stages.{i}.{j}"
            first, second = self.strides(stride, bottleneck, late=self.large)
            y = x
            if not self.large or i + j > 0:
                y = self.bn_relu(f"{at}.bn1", x)
            if j == 0 and self.slip != "raw shortcut":
                x = y  # the shortcut of a first block too sees what is normalised
            y = self.conv(f"{at}.conv1", y, first)
            y = self.conv(f"{at}.conv2", self.bn_relu(f"{at}.bn2", y), second)
            if bottleneck:
                y = self.conv(f"{at}.conv3", self.bn_relu(f"{at}.bn3", y))
            x = y + self.shortcut(f"{at}.downsample", x, maps, stride, norm=False)
        return self.classified(self.bn_relu("bn", x))


COUNTS = (2, 1, 2)
CASES = [
    (name, kind, bottleneck, large)
    for name in NETWORKS
    for kind, bottleneck, large in (
        ("A", False, False), ("A", True, False), ("B", True, False), ("C", False, False),
        ("B", False, True), ("A", True, True), ("C", True, True),
    )
]  # fmt: skip


def stated(model: nn.Module, name: str, images: Tensor, targets: Tensor, case: tuple, slip: str):
    """Logits and gradients of a step as the statement has them."""
    kind, bottleneck, large = case
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    function = getattr(Statement(weights, kind, large, slip), name)
    logits = function(images, COUNTS, bottleneck)
    F.cross_entropy(logits, targets).backward()
    gradients = {f"gradient of {n}": tensor.grad for n, tensor in weights.items()}
    return {"logits": logits.detach(), **gradients}


def example(name: str, *case):
    """A small network of a case, with a batch of odd size and what a step of it computes."""
    kind, bottleneck, large = case
    torch.manual_seed(0)
    how = {"bottleneck": bottleneck, "shortcut": kind, "pre_activation": name == "preresnet"}
    model = ResNet(COUNTS, 5, imagenet_stem=large, **how)
    scramble(model).double()
    images, targets = photographs(2, 29 if large else 13, 5)
    found = one_step(copy.deepcopy(model), images, targets)
    buffers = dict(model.named_buffers())
    return model, images, targets, {n: v for n, v in found.items() if n not in buffers}


@pytest.mark.parametrize(("name", *"abc"), CASES)
def test_a_step_equals_the_plain_statement(name, a, b, c):
    model, images, targets, found = example(name, a, b, c)
    want = stated(model, name, images, targets, (a, b, c), "")
    assert largest_difference(found, want) < 1e-9


SLIPS = [
    ("resnet", "A", False, False, "mean of pixels"),
    ("preresnet", "A", True, False, "zeros first"),
    ("resnet", "B", True, False, "stride elsewhere"),
    ("preresnet", "B", True, False, "stride elsewhere"),
    ("preresnet", "B", True, True, "stride elsewhere"),
    ("resnet", "B", False, True, "sum not rectified"),
    ("preresnet", "A", True, False, "raw shortcut"),
    ("preresnet", "B", True, True, "raw shortcut"),
]


@pytest.mark.parametrize(("name", *"abc", "slip"), SLIPS)
def test_a_slip_in_the_statement_would_be_noticed(name, a, b, c, slip):
    model, images, targets, found = example(name, a, b, c)
    wrong = stated(model, name, images, targets, (a, b, c), slip)
    assert largest_difference(found, wrong) > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", "ABC")
def test_evaluation_uses_the_running_statistics_and_each_image_alone(name, kind):
    model = scramble(network(f"--netType {name} --depth 20 --shortcutType {kind}")).double().eval()
    images, _ = photographs(3, 32)
    with torch.no_grad():
        together, alone = model(images), model(images[1:2])
        assert torch.allclose(together[1:2], alone, rtol=1e-10, atol=1e-10)
        model.train()
        assert not torch.allclose(model(images)[1:2], alone, rtol=1e-2, atol=1e-2)


# ----------------------------------------------------------------------------- sizes and numbers

# With 10 classes (1000 at ImageNet shape), and of them those of batch normalisation, by hand.
COUNTED = [
    ("resnet", "--depth 110", 1_727_962, 8_096),
    ("resnet", "--depth 110 --shortcutType B", 1_730_714, 8_288),
    ("resnet", "--depth 110 --shortcutType C", 1_826_202, 12_128),
    ("preresnet", "--depth 110 --bottleneck false", 1_727_962, 8_096),
    ("preresnet", "--depth 164", 1_661_274, 24_224),
    ("preresnet", "--depth 164 --shortcutType B", 1_703_258, 24_224),
    ("preresnet", "--depth 1001", 10_285_722, 149_216),
    ("preresnet", "--depth 1001 --shortcutType B", 10_327_706, 149_216),
    ("resnet", "--dataset imagenet --depth 18", 11_689_512, 9_600),
    ("resnet", "--dataset imagenet --depth 34", 21_797_672, 17_024),
    ("resnet", "--dataset imagenet --depth 50", 25_557_032, 53_120),
    ("resnet", "--dataset imagenet --depth 101", 44_549_160, 105_344),
    ("resnet", "--dataset imagenet --depth 152", 60_192_808, 151_424),
    ("resnet", "--dataset imagenet --depth 200", 64_673_832, 176_000),
]


def on_meta(line: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return network(line, num_classes)


def count(model: nn.Module, kind: type = nn.Module) -> int:
    modules = [module for module in model.modules() if isinstance(module, kind)]
    return sum(p.numel() for module in modules for p in module.parameters(recurse=False))


@pytest.mark.parametrize(("name", "line", "parameters", "of_norms"), COUNTED)
def test_networks_have_the_published_numbers_of_parameters(name, line, parameters, of_norms):
    classes = 1000 if "imagenet" in line else 10
    model = on_meta(f"--netType {name} {line}", classes)
    assert (count(model), count(model, nn.BatchNorm2d)) == (parameters, of_norms)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    on_shortcuts = [n for n, m in model.named_modules()
                    if isinstance(m, nn.Conv2d) and "downsample" in n]  # fmt: skip
    depth = int(line.split("--depth ")[1].split()[0])
    assert len(convolutions) - len(on_shortcuts) + 1 == depth  # and the classifier


def test_the_published_count_of_1001_layers_is_without_batch_normalisation():
    # arXiv:1603.05027 says 10.2M, which only the convolutions of B with the classifier are.
    found = {}
    for _, line, parameters, of_norms in COUNTED:
        if "1001" in line:
            kind = "B" if "B" in line else "A"
            found[kind] = [f"{n / 1e6:.1f}M" for n in (parameters, parameters - of_norms)]
    assert found == {"A": ["10.3M", "10.1M"], "B": ["10.3M", "10.2M"]}


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_have_the_widths_of_the_papers(name):
    maps = {"resnet": 64, "preresnet": 256}[name]
    assert on_meta(f"--netType {name} --depth 20", 10).fc.in_features == maps
    for depth, maps in ((34, 512), (200, 2048)):
        assert on_meta(f"{IMAGENET} {name} --depth {depth}", 10).fc.in_features == maps


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [8, 9, 33, 64])
def test_any_image_size_and_number_of_classes_give_one_logit_a_class(name, size):
    model = network(f"--dataset synthetic --imageSize {size} --netType {name} --depth 20", 3)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 3)


# --------------------------------------------------------------- initial weights, and other weights


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_start_as_in_fb_resnet_torch(name):
    model = network(f"--netType {name} --depth 56 --shortcutType B", 100)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 9_000:
            fan_out = module.weight.shape[2] ** 2 * module.out_channels
            ratio = module.weight.std().item() / math.sqrt(2 / fan_out)
            assert abs(ratio - 1) < 0.05
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    bound = 1 / math.sqrt(model.fc.in_features)
    assert 0.99 * bound < model.fc.weight.abs().max() <= bound
    assert (model.fc.bias == 0).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_seed_decides_the_initial_weights(name):
    line = f"--netType {name} --depth 20 --manualSeed"
    first, again, other = (network(f"{line} {seed}").state_dict() for seed in (1, 1, 2))
    assert same_state(first, again)
    assert not same_state(first, other)


@pytest.mark.parametrize(
    ("line", "last"),
    [
        ("resnet --depth 8", [0.012112, 0.058118, 0.008491]),
        ("preresnet --depth 11", [0.027448, 0.050041, 0.025384]),
        ("resnet --dataset imagenet --depth 18", [-0.035389, 0.039056, 0.010741]),
        ("preresnet --dataset imagenet --depth 18", [0.038475, -0.042721, -0.01793]),
    ],
)
def test_a_seed_stands_for_the_same_weights_as_ever(line, last):
    # What is drawn last depends on everything that was drawn before.
    model = network(f"--netType {line}", 10)
    assert model.fc.weight[0, :3].tolist() == pytest.approx(last, abs=1e-6)
    other = network(f"--netType {line} --manualSeed 2", 10)
    assert other.fc.weight[0, :3].tolist() != pytest.approx(last, abs=1e-3)


def test_parameters_keep_their_order_which_checkpoints_rely_on():
    # torchvision's order is compared above. An optimizer knows parameters by their places.
    blocks = [f"stages.{i}.0" for i in range(3)]
    of_block = [name for i in (1, 2, 3)
                for name in (f"bn{i}.weight", f"bn{i}.bias", f"conv{i}.weight")]  # fmt: skip
    want = ["stem.weight", *(f"{block}.{name}" for block in blocks for name in of_block),
            "bn.weight", "bn.bias", "fc.weight", "fc.bias"]  # fmt: skip
    assert [n for n, _ in network("--netType preresnet --depth 11").named_parameters()] == want
    large = [n for n, _ in on_meta(f"{IMAGENET} preresnet --depth 18", 10).named_parameters()]
    first = ["conv1.weight", "bn2.weight", "bn2.bias", "conv2.weight"]
    stem = ["stem.0.weight", "stem.1.weight", "stem.1.bias"]
    assert large[:7] == [*stem, *(f"stages.0.0.{name}" for name in first)]


@pytest.mark.parametrize("name", NETWORKS)
def test_other_classes_are_answered_with_resetclassifier_which_keeps_the_fresh_one(name):
    line = f"--netType {name} --depth 20 --manualSeed"
    pretrained, model = network(f"{line} 1", 100), network(f"{line} 2", 10)
    fresh = model.fc.weight.clone()
    with pytest.raises(CheckpointError) as caught:
        models.state_dicts.load_weights(model, pretrained.state_dict())
    assert caught.value.report().endswith("; fix: add --resetClassifier true")
    assert torch.equal(model.fc.weight, fresh)
    models.state_dicts.load_weights(model, pretrained.state_dict(), reset_classifier=True)
    assert torch.equal(model.fc.weight, fresh)
    rest = {n: t for n, t in model.state_dict().items() if not n.startswith("fc.")}
    assert same_state(rest, {n: pretrained.state_dict()[n] for n in rest})


def test_weights_of_another_network_are_refused():
    for mine, theirs in (NETWORKS, NETWORKS[::-1]):
        other = network(f"--netType {theirs} --depth 20").state_dict()
        with pytest.raises(CheckpointError) as caught:
            models.state_dicts.load_weights(network(f"--netType {mine} --depth 20"), other)
        assert caught.value.report().endswith("; fix: give the flags of that network")


# ------------------------------------------------------------------------------- in the same loop

LOOP = "--dataset synthetic --imageSize 8 --nImages 24 --nEpochs 2 --LR 0.05 --nGPU 0"
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["single", "double", "half", "bf16"])
def test_every_precision_trains_in_channels_last_memory(name, precision):
    line = f"{LOOP} --batchSize 8 --netType {name} --depth 20 --precision {precision}"
    opt = opts.parse(line.split())
    data = create_data(opt)
    model = models.factory.create(opt, 10)
    trainer = train.create_trainer(opt, model, CPU, RunLog(None))
    before = model.fc.weight.clone()
    seen = []
    model.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    trained = trainer.train(data.train, lambda: None)
    assert math.isfinite(trained["train_loss"])
    assert not torch.equal(model.fc.weight, before)
    large = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert large and all(p.is_contiguous(memory_format=torch.channels_last) for p in large)
    lower = {"half": torch.float16, "bf16": torch.bfloat16, "double": torch.float64}
    assert set(seen) == {lower.get(precision, torch.float32)}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("line", ["--depth 20 --shortcutType B", "--dataset imagenet --depth 18"])
def test_replicas_share_every_batch_normalisation_when_asked_to(name, line):
    shard = BatchShard(World(), CPU)
    for sync in ("true", "false"):
        opt = opts.parse(f"--netType {name} {line} --nGPU 2 --syncBN {sync}".split())
        with torch.device("meta"):
            model = models.factory.create(opt, 10, shard=shard)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) > 15
        assert {norm.shard for norm in norms} == {shard if sync == "true" else None}


def estimate(line: str) -> MemoryEstimate:
    opt = opts.parse(f"{LOOP} {line}".split())
    return MemoryEstimate(opt, 10, CPU, REFERENCE)


@pytest.mark.parametrize("network", ["resnet --depth 8", "preresnet --depth 11"])
def test_advice_about_memory_is_about_the_batch_alone(network):
    found = estimate(f"--netType {network} --batchSize 64")
    now = found.peak_bytes()
    assert now > estimate(f"--netType {network} --batchSize 16").peak_bytes()
    suggestion = found.suggestion(now // 2)
    assert suggestion.startswith("use --batchSize ") and "optMemory" not in suggestion
    assert found.suggestion(1000).startswith("use a larger device: --batchSize 1 needs about ")


def test_advice_about_a_densenet_does_speak_of_levels():
    assert "--optMemory" in estimate("--depth 10 --optMemory 0 --batchSize 64").suggestion(None)


@pytest.mark.parametrize("line", ["--optMemory auto", "--optMemory 4 --kernels triton"])
def test_memory_levels_and_kernels_change_nothing(line):
    plainly = opts.parse(f"{LOOP} --netType resnet --depth 20".split())
    asked = opts.parse(f"{LOOP} --netType resnet --depth 20 {line}".split())
    assert len(asked.notes) == len(line.split("--")) - 1
    assert opts.settings(asked) == opts.settings(plainly)
    assert (asked.optMemory, asked.kernels) == (None, "torch")


def test_describe_speaks_of_blocks_and_shortcuts(capsys, monkeypatch):
    monkeypatch.setattr(describe, "PRECISIONS", ("single", "double"))  # half of the time
    flags = "--netType preresnet --depth 11 --batchSize 2 --imageSize 8 --dataset digits --nGPU 0"
    assert describe.main(flags.split()) == 0
    printed = capsys.readouterr().out
    assert "preresnet, L=11, shortcut A, 10 classes" in printed
    assert "1, 1, 1 blocks per stage" in printed
    lines = printed.partition("memory of a training step")[2].splitlines()
    assert lines[1].split() == ["single", "double"]
    assert lines[2].split()[0] == "step" and len(lines[2].split()) == 3
    assert "optMemory" not in printed and "k=" not in printed


def test_the_benchmark_beside_other_densenets_is_refused(capsys):
    assert benchmark.main(["--netType", "resnet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: netType: resnet is not measured") and "; fix: " in line
