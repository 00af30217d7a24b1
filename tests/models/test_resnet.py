"""Test that residual networks equal plain restatements of their sources, and can be trained."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models.factory
import opts
import train
from engine.memory import MemoryEstimate
from experiment.log import RunLog
from helpers.networks import one_step, photographs, scramble
from helpers.sample_data import create_data
from helpers.tiny_networks import largest_difference
from kernels.backend import REFERENCE
from models.resnet import ResNet
from tools import describe
from tools.benchmark import __main__ as benchmark

NETWORKS = ("resnet", "preresnet")


# Both networks restated as functions:
class Restatement:
    """Restate the sources of both networks in training by function, with a model's weights.

    They are fb.resnet.torch and, for bottlenecks of pre-activation ResNets at CIFAR shape, the
    authors' KaimingHe/resnet-1k-layers.

    Args:
        weights: by name.
        kind: shortcut A, B or C.
        large: the ImageNet shape.
        slip: a mistake made on purpose, see SLIPS.
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

    def shortcut(self, name: str, x: Tensor, channels: int, stride: int, norm: bool) -> Tensor:
        if self.kind == "C" or (self.kind == "B" and x.shape[1] != channels):
            if not norm:
                return self.conv(name, x, stride)
            return self.bn(f"{name}.1", self.conv(f"{name}.0", x, stride))
        if self.slip == "mean of pixels":
            x = F.avg_pool2d(x, stride, stride, ceil_mode=True)
        else:
            x = F.avg_pool2d(x, 1, stride)  # as in Lua: one pixel of each square
        zeros = x.new_zeros(x.shape[0], channels - x.shape[1], *x.shape[2:])
        return torch.cat([zeros, x] if self.slip == "zeros first" else [x, zeros], 1)

    def stem(self, x: Tensor, conv: str, bn: str | None) -> Tensor:
        x = self.conv(conv, x, 2 if self.large else 1)
        x = self.bn_relu(bn, x) if bn else x
        return F.max_pool2d(x, 3, 2, 1) if self.large else x

    def blocks(self, counts: tuple[int, ...], bottleneck: bool):
        """Return stage, position in it, output channels and stride of each block."""
        width = (64 if self.large else 16) * (4 if bottleneck else 1)
        for i, count in enumerate(counts):
            for j in range(count):
                yield i, j, width * 2**i, 2 if i > 0 and j == 0 else 1

    def strides(self, stride: int, bottleneck: bool, late: bool) -> tuple[int, int]:
        """Return strides of a block's first two convolutions; `late`: a bottleneck's 3x3 has it."""
        in_the_first = not bottleneck or late == (self.slip == "stride elsewhere")
        return (stride, 1) if in_the_first else (1, stride)

    def classified(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.weights["fc.weight"].T + self.weights["fc.bias"]

    def resnet(self, x: Tensor, counts: tuple[int, ...], bottleneck: bool) -> Tensor:
        x = self.stem(x, "conv1", "bn1")
        for i, j, channels, stride in self.blocks(counts, bottleneck):
            at = f"layer{i + 1}.{j}"
            first, second = self.strides(stride, bottleneck, late=True)
            y = self.bn_relu(f"{at}.bn1", self.conv(f"{at}.conv1", x, first))
            y = self.bn(f"{at}.bn2", self.conv(f"{at}.conv2", y, second))
            if bottleneck:
                y = self.bn(f"{at}.bn3", self.conv(f"{at}.conv3", y.relu()))
            x = y + self.shortcut(f"{at}.downsample", x, channels, stride, norm=True)
            x = x if self.slip == "sum not rectified" else x.relu()
        return self.classified(x)

    def preresnet(self, x: Tensor, counts: tuple[int, ...], bottleneck: bool) -> Tensor:
        x = self.stem(x, "stem.0", "stem.1") if self.large else self.stem(x, "stem", None)
        for i, j, channels, stride in self.blocks(counts, bottleneck):
            at = f"stages.{i}.{j}"
            first, second = self.strides(stride, bottleneck, late=self.large)
            y = x
            if not self.large or i + j > 0:
                y = self.bn_relu(f"{at}.bn1", x)
            if j == 0 and self.slip != "raw shortcut":
                x = y  # the shortcut of a first block reads the normalised input, too
            y = self.conv(f"{at}.conv1", y, first)
            y = self.conv(f"{at}.conv2", self.bn_relu(f"{at}.bn2", y), second)
            if bottleneck:
                y = self.conv(f"{at}.conv3", self.bn_relu(f"{at}.bn3", y))
            x = y + self.shortcut(f"{at}.downsample", x, channels, stride, norm=False)
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


def restated(model: nn.Module, name: str, images: Tensor, targets: Tensor, case: tuple, slip: str):
    """Return logits and gradients of a step as the restatement computes them."""
    kind, bottleneck, large = case
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    function = getattr(Restatement(weights, kind, large, slip), name)
    logits = function(images, COUNTS, bottleneck)
    F.cross_entropy(logits, targets).backward()
    gradients = {f"gradient of {n}": tensor.grad for n, tensor in weights.items()}
    return {"logits": logits.detach(), **gradients}


def example(name: str, *case):
    """Make a small network of a case, a batch of odd size, and the results of a step on it."""
    kind, bottleneck, large = case
    torch.manual_seed(0)
    options = {"bottleneck": bottleneck, "shortcut": kind, "pre_activation": name == "preresnet"}
    model = ResNet(COUNTS, 5, imagenet_stem=large, **options)
    scramble(model).double()
    images, targets = photographs(2, 29 if large else 13, 5)
    found = one_step(copy.deepcopy(model), images, targets)
    buffers = dict(model.named_buffers())
    return model, images, targets, {n: v for n, v in found.items() if n not in buffers}


@pytest.mark.parametrize(("name", *"abc"), CASES)
def test_a_step_equals_the_restatement(name, a, b, c):
    model, images, targets, found = example(name, a, b, c)
    want = restated(model, name, images, targets, (a, b, c), "")
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
def test_a_slip_in_the_restatement_would_be_noticed(name, a, b, c, slip):
    model, images, targets, found = example(name, a, b, c)
    wrong = restated(model, name, images, targets, (a, b, c), slip)
    assert largest_difference(found, wrong) > 1e-3


# In the same loop:
CPU = torch.device("cpu")
LOOP = "--dataset synthetic --imageSize 8 --nImages 16 --nEpochs 1 --nGPU 0"


@pytest.mark.parametrize(
    ("name", "precision", "dtype"),
    [("resnet", "bf16", torch.bfloat16), ("preresnet", "double", torch.float64)],
)
def test_lower_and_double_precision_train_in_channels_last_memory(name, precision, dtype):
    opt = opts.parse(
        f"{LOOP} --batchSize 8 --netType {name} --depth 20 --precision {precision}".split()
    )
    model, seen = models.factory.create(opt, 10), []
    trainer = train.Trainer(opt, model, CPU, RunLog(None))
    before = model.fc.weight.clone()
    model.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    trainer.train(create_data(opt).train, lambda: None)
    assert not torch.equal(model.fc.weight, before)
    assert model.fc.weight.isfinite().all()
    large = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert large and all(p.is_contiguous(memory_format=torch.channels_last) for p in large)
    assert set(seen) == {dtype}


def test_advice_about_memory_concerns_the_batch_size_alone():
    opt = opts.parse(f"{LOOP} --netType preresnet --depth 11 --batchSize 64".split())
    estimate = MemoryEstimate(opt, 10, CPU, REFERENCE)
    suggestion = estimate.suggestion(estimate.peak_bytes() // 2)
    assert suggestion.startswith("use --batchSize ") and "optMemory" not in suggestion
    assert estimate.suggestion(1000).startswith("use a larger device: --batchSize 1 needs about ")


def test_describe_lists_blocks_and_shortcuts(capsys, monkeypatch):
    monkeypatch.setattr(describe, "PRECISIONS", ("single",))
    flags = "--netType preresnet --depth 11 --batchSize 2 --imageSize 8 --dataset digits --nGPU 0"
    assert describe.main(flags.split()) == 0
    printed = capsys.readouterr().out
    assert "preresnet, L=11, shortcut A, 10 classes" in printed
    assert "1, 1, 1 blocks per stage" in printed
    title, values = printed.partition("memory of a training step")[2].splitlines()[1:3]
    assert title.split() == ["single"]
    assert values.split()[0] == "step" and len(values.split()) == 2
    assert "optMemory" not in printed and "k=" not in printed


def test_the_benchmark_beside_other_densenets_is_refused(capsys):
    assert benchmark.main(["--netType", "resnet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: netType: resnet is not measured") and "; fix: " in line
