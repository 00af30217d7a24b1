"""Test that the other networks of the paper's Table 2 are those of their papers."""

import math

import pytest
import torch
from torch import nn

import models.state_dicts
from helpers.networks import network, photographs
from helpers.table2 import difference, randomised
from models.plain import Companion

# Command line and side of the images of a small network of each type.
CASES = {
    "nin": ("--netType nin --widen 0.05", 14),
    "nin-svhn": ("--netType nin-svhn --widen 0.05", 14),
    "allcnn": ("--netType allcnn --widen 0.1", 14),
    "dsn": ("--netType dsn --widen 0.05", 14),
    "highway": ("--netType highway --widen 0.1", 13),
    "wideresnet": ("--netType wideresnet --depth 16 --widen 0.25", 9),
    "wideresnet-dropout": ("--netType wideresnet --depth 16 --widen 0.25 --dropRate 0.3", 9),
    "fractalnet": ("--netType fractalnet --widen 0.06 --dropRate 0.4", 32),
    "fractalnet-2": ("--netType fractalnet --widen 0.06 --columns 2", 32),
    "fractalnet-1": ("--netType fractalnet --widen 0.06 --columns 1", 32),
}


def difference_in(case: str, slip: str = "", progress: float = 0.5) -> float:
    line, size = CASES[case]
    model = randomised(network(f"--dataset synthetic --imageSize {size} {line}", 5))
    if "dsn" in case:
        model.progress.fill_(progress)
    name = case.removesuffix("-svhn").partition("-")[0]
    rate = float(line.partition("--dropRate ")[2] or 0)
    images, targets = photographs(3, size, 5)
    return difference(model, name, images, targets, rate=rate, slip=slip)


@pytest.mark.parametrize(
    ("case", "progress"), [*((case, 0.5) for case in CASES), ("dsn", 0.0), ("dsn", 1.0)]
)
def test_a_step_and_an_evaluation_equal_the_restatement(case, progress):
    assert difference_in(case, progress=progress) < 1e-9


SLIPS = {
    "nin": ["scores rectified or not", "mean score rectified", "average pooling"],
    "allcnn": ["scores rectified or not", "last 3x3 padded"],
    "dsn": [
        "scores rectified or not", "companion after the ReLU", "companion not scaled",
        "companions' weight does not fall", "hinge not squared", "mean over classes",
    ],
    "highway": [
        "average pooling", "gates swapped", "gate reads the transform", "1x1 not rectified",
    ],
    "wideresnet": ["raw shortcut"],
    "wideresnet-dropout": ["dropout after the second convolution"],
    "fractalnet": ["average pooling", "join sums", "dropout after batch norm"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "slip"), [(case, slip) for case, slips in SLIPS.items() for slip in slips]
)
def test_a_slip_in_the_restatement_would_be_noticed(case, slip):
    assert difference_in(case, slip) > 1e-3


# Worked out from the lists of layers; tests/cli/test_configs.py has those of configs.
@pytest.mark.parametrize(
    ("line", "num_classes", "parameters"),
    [
        ("--netType nin", 100, 984_356),
        ("--netType highway", 100, 2_265_928),
        ("--netType fractalnet --columns 1", 10, 20_399_296 + 5_130),
    ],
)
def test_numbers_of_parameters_are_those_of_the_papers(line, num_classes, parameters):
    with torch.device("meta"):  # shapes without memory
        model = network(f"--dataset cifar10 {line}", num_classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


# Weights:
def test_the_deepest_column_takes_its_weights_out_of_the_whole_network(monkeypatch):
    line = "--dataset cifar10 --netType fractalnet --widen 0.06"
    whole, notes = randomised(network(line, 5)).eval(), []
    column = network(f"{line} --columns 1", 5).double().eval()
    models.state_dicts.load_weights(column, whole.state_dict(), warn=notes.append)
    note = "reads the weights of the network, without column1.0.0.conv.weight and 89 more"
    assert notes == [note]  # 6 tensors of 3 units in 5 blocks
    images = photographs(3, 32)[0]
    with torch.no_grad():
        found, of_all = column(images), whole(images)
        monkeypatch.setattr(whole, "all_paths", lambda: [{end: [3] for end in (1, 2, 3, 4)}] * 5)
        assert torch.equal(found, whole(images))
        monkeypatch.setattr(whole, "all_paths", lambda: [{2: [2], 4: [2]}] * 5)
        assert not torch.allclose(found, whole(images), rtol=1e-3)
    assert not torch.allclose(found, of_all, rtol=1e-3)


WHOLE = [
    "nin", "nin-svhn", "allcnn", "dsn", "highway", "fractalnet", "wideresnet --depth 16 --widen 2",
]  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_initial_weights_are_of_the_sources_scale_and_biases_0_but_those_of_gates(name):
    model = network(f"--dataset cifar10 --netType {name}", 10)
    is_nin = name in ("nin", "nin-svhn", "dsn")
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            # NIN 0.05; else N(0, 2 / fan), the fan-out with batch norms, without them the fan-in.
            # The standard deviation of n values errs by 1/sqrt(2n).
            has_norms = any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
            channels = module.out_channels if has_norms else module.in_channels
            variance = 0.05**2 if is_nin else 2 / (math.prod(module.kernel_size) * channels)
            normal = module.weight / math.sqrt(variance)
            assert abs(normal.std() - 1) < 5 / math.sqrt(2 * normal.numel())
        elif isinstance(module, nn.Linear) and (path.startswith("companions") or not is_nin):
            scale = 1e-3**0.5 if path.startswith("companions") else 1
            bound = 1 / math.sqrt(module.in_features)
            assert 0.99 * bound < scale * module.weight.abs().max() <= 1.001 * bound
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            assert (module.bias == (-2 if path.endswith("gate") else 0)).all()
    gates = [path for path, _ in model.named_modules() if path.endswith("gate")]
    assert len(gates) == (14 if name == "highway" else 0)
    assert len(getattr(model, "companions", ())) == (3 if name == "dsn" else 0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_gradients_move_companions_a_thousandth_as_fast_and_decay_as_the_body(decay):
    companion, maps = Companion(12, 3).double(), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    companion.bias.data.normal_()
    weight = (1e-3**0.5 * companion.weight).detach().requires_grad_()
    bias = (1e-3**0.5 * companion.bias).detach().requires_grad_()
    (maps.flatten(1) @ weight.T + bias).square().sum().backward()
    companion(maps).square().sum().backward()
    torch.optim.SGD(companion.parameters(), lr=0.5, weight_decay=decay).step()
    for whole, moved in ((weight, companion.weight), (bias, companion.bias)):
        want = whole - 0.5 * (1e-3 * whole.grad + decay * whole)
        assert torch.allclose(1e-3**0.5 * moved, want, rtol=1e-12, atol=0)
        assert not torch.allclose(want, whole - 0.5 * (whole.grad + decay * whole), rtol=1e-3)
