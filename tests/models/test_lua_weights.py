"""Test weights of Lua networks: each is read into its place; other networks are explained.

`lua_networks/` holds four networks as torch.save of Lua Torch writes them, with the classes of
models/densenet.lua (Concat layers, and those of optMemory 4), resnet.lua and preresnet.lua, in
DataParallelTable, in a table and bare. A weight's value is a function of its place: `numbered`.
"""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import checkpoints
import models.factory
import models.state_dicts
import opts
from errors import CheckpointError, DamagedError
from faults.contract import tiny
from fileio import lua_network, tensor_files, torch7
from helpers.run_main import run

FILES = Path(__file__).parent / "lua_networks"
NETWORKS = {
    "densenet-bc": "--dataset cifar10 --depth 16 --growthRate 5",
    "densenet-optMemory4": "--depth 10 --growthRate 4 --bottleneck false --reduction 1",
    "resnet": "--netType resnet --dataset cifar10 --depth 8 --shortcutType B",
    "preresnet": "--netType preresnet --dataset cifar10 --depth 11",
}
BC = NETWORKS["densenet-bc"]
NORM, CONV = "SpatialBatchNormalization", "SpatialConvolution"


def network(line: str, num_classes: int = 10) -> nn.Module:
    return models.factory.create(opts.parse(line.split()), num_classes)


def numbered(line: str) -> nn.Module:
    """Make the network of the files' weights: multiples of 1/64, which half precision holds."""
    model = network(line)
    for i, (name, value) in enumerate(model.state_dict().items()):
        if value.is_floating_point():
            number = (torch.arange(value.numel()) * 37 + 101 * i) % 251
            number = number + 1 if name.endswith("running_var") else number - 125
            value.copy_((number / 64).view_as(value))
    return model


def difference(left: nn.Module, right: nn.Module) -> float:
    """Return the largest difference of any weight or statistic."""
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def tree(name: str = "densenet-bc") -> torch7.Object:
    """Return the network in a file, to be changed."""
    root = torch7.load((FILES / f"{name}.t7").read_bytes())
    return root["model"] if isinstance(root, dict) else root


def leaves(module: torch7.Object, kind: str) -> list[torch7.Object]:
    """List the modules of a class, in running order; of copies on several GPUs, the first's."""
    found = [module] if module.name.endswith(kind) else []
    children = list(module.fields.get("modules", {}).values())
    for child in children[:1] if module.name == "nn.DataParallelTable" else children:
        found += leaves(child, kind)
    return found


def load(model: nn.Module, root: object) -> nn.Module:
    models.state_dicts.load_weights(model, lua_network.weights(root))
    return model


@pytest.mark.parametrize(("name", "line"), NETWORKS.items())
def test_every_weight_of_a_lua_network_arrives_in_its_place(name, line):
    model = network(line)
    assert difference(model, numbered(line)) > 0.1
    models.state_dicts.load_weights(model, checkpoints.load_weights(FILES / f"{name}.t7"))
    assert difference(model, numbered(line)) == 0


@pytest.mark.parametrize("line", [
    "--dataset imagenet --growthRate 4 --d1 1 --d2 2 --d3 1 --d4 1",
    "--netType resnet --dataset imagenet --depth 50",
    "--netType preresnet --dataset imagenet --depth 50",
])  # fmt: skip
def test_modules_are_defined_in_the_order_in_which_lua_runs_them(line):
    """Compare with the order of forward: a Lua ConcatTable runs the branch before the shortcut."""
    model, ran = network(line).eval(), []
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    defined = [module for module in model.modules() if isinstance(module, kinds)]
    for module in defined:
        module.register_forward_hook(lambda module, *_: ran.append(module))
    model(torch.zeros(1, 3, 64, 64))
    assert ran == defined


def test_old_batch_normalisation_arrives_as_exactly_as_it_can():
    root = tree()
    for norm in leaves(root, NORM):
        variance = norm.fields.pop("running_var").astype(np.float64)
        norm.fields["running_std"] = 1 / np.sqrt(variance + 1e-5)
    assert difference(load(network(BC), root), numbered(BC)) < 1e-6
    leaves(root, NORM)[1].fields["running_std"] = np.zeros(20)
    with pytest.raises(CheckpointError, match="has a running_std that is not positive"):
        lua_network.weights(root)


def test_the_program_evaluates_weights_of_lua_as_the_same_weights_of_its_own(tmp_path):
    flags = {"nClasses": 10, "nImages": 256, "testOnly": True, "depth": 16, "growthRate": 5}
    weights = numbered(BC).state_dict()
    tensor_files.save_weights(tmp_path / "same.pt", weights)
    weights["classifier.weight"] = weights["classifier.weight"].flip(0)
    tensor_files.save_weights(tmp_path / "other.pt", weights)
    lines = []
    for path in (FILES / "densenet-bc.t7", tmp_path / "same.pt", tmp_path / "other.pt"):
        result = run(tiny(**flags, save=tmp_path / "run", retrain=path))
        assert result.code == 0, result
        lines.append(result.out.splitlines()[-1])
    assert lines[0] == lines[1] != lines[2]


def refusal(model: nn.Module, root: object) -> str:
    """Return the error of a network that does not fit; the model stays as it was."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load(model, root)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = caught.value.report()
    assert "\n" not in report and len(report) < 500
    return report


def test_a_lua_network_of_other_classes_keeps_all_but_its_classifier():
    target = network(BC, 100)
    fresh = target.classifier.weight.clone()
    assert refusal(target, tree()).endswith("fix: add --resetClassifier true")
    weights = lua_network.weights(tree())
    models.state_dicts.load_weights(target, weights, reset_classifier=True)
    assert torch.equal(target.classifier.weight, fresh)
    target.classifier = numbered(BC).classifier
    assert difference(target, numbered(BC)) == 0


@pytest.mark.parametrize(("name", "line"), list(NETWORKS.items())[:2])
def test_the_flags_of_a_densenet_that_does_not_fit_are_told(name, line):
    report = refusal(network("--dataset cifar10 --depth 22 --growthRate 12"), tree(name))
    counted = sum(isinstance(module, nn.Conv2d) for module in network(line).modules())
    assert f"the Lua network has {counted} x convolution, " in report
    again = network(f"--dataset cifar10 {report.partition('; fix: use ')[2]}")
    assert difference(load(again, tree(name)), numbered(line)) == 0


def test_a_difference_is_named_in_both_networks():
    root = tree()
    leaves(root, CONV)[2].fields["weight"] = np.ones((5, 20, 1, 1), np.float32)
    report = refusal(network(BC), root)
    assert re.search(r"Lua module [\d.]+ has shape \(5, 20, 1, 1\), ", report)
    assert "features.denseblock1.denselayer1.conv2 (5, 20, 3, 3)" in report
    root = tree("densenet-optMemory4")
    modules = root.fields["modules"]
    modules[1], modules[2] = modules[2], modules[1]
    report = refusal(network(NETWORKS["densenet-optMemory4"]), root)
    assert re.search(r"Lua module [\d.]+ is a batch normalisation, features.conv0 a conv", report)
    assert refusal(network(BC), tree("resnet")).endswith("fix: give the flags of that network")


def changed(kind: str, **fields: object) -> torch7.Object:
    """Return the network with some fields of the second module of a class replaced."""
    root = tree()
    leaves(root, kind)[1 if kind != "Linear" else 0].fields.update(fields)
    return root


def renamed(old: str, new: str) -> torch7.Object:
    root = tree()
    leaves(root, old)[0].name = new
    return root


def with_twins() -> torch7.Object:
    root = tree("densenet-optMemory4")
    root.fields["modules"][4] = root.fields["modules"][3] = torch7.Object(
        "nn.Sequential", {"modules": {}}
    )
    return root


def sequential(modules: object) -> torch7.Object:
    return torch7.Object("nn.Sequential", {"modules": modules})


ONE = np.ones((1, 1), np.float32)
REFUSED = {
    "latest.t7": (lambda: {"epoch": 3, "modelFile": "model_3.t7"}, "points to model_3.t7; fix: na"),
    "optimState.t7": (lambda: {"learningRate": 0.1, "dfdx": ONE}, "no network of Lua Torch in it"),
    "a tensor": (lambda: ONE, "no network of Lua Torch in it"),
    "a bias": (lambda: changed(CONV, bias=np.full(20, 0.5)), r"\(cudnn.SpatialConv.* has a bias"),
    "another eps": (lambda: changed(NORM, eps=1e-3), "has an eps of 0.001, not 1e-05"),
    "no statistics": (lambda: changed(NORM, running_mean=None), "has no running_mean"),
    "integers": (lambda: changed("Linear", weight=np.ones((1, 1), int)), "has no weight"),
    "5-D": (lambda: changed(CONV, weight=np.ones((1, 1, 1, 1, 1))), "of 5 dimensions, not 4"),
    "no size": (lambda: changed(CONV, weight=ONE, kH=-1.0), "has no size"),
    "two sizes": (lambda: changed(CONV, weight=ONE), "1 weights for each map, not 10"),
    "a module twice": (with_twins, r"\(nn.Sequential\) stands in the network twice"),
    "no modules": (lambda: sequential(3.0), "has no list of modules"),
    "no module": (lambda: sequential({1: 3.0}), "1 is not a module"),
    "a graph": (lambda: renamed("nn.Concat", "nn.gModule"), "is a graph"),
    "another layer": (lambda: renamed("Linear", "nn.Bilinear"), r"\(nn.Bilinear\) has weights"),
}


@pytest.mark.parametrize(("make", "pattern"), REFUSED.values(), ids=REFUSED)
def test_other_files_of_lua_are_refused_in_words(make, pattern):
    report = refusal(network(BC), make())
    assert re.search(pattern, report)


def test_a_lua_network_cannot_be_resumed(tmp_path):
    path = tmp_path / "checkpoint_000000001.pt"
    path.write_bytes((FILES / "densenet-bc.t7").read_bytes())
    with pytest.raises(DamagedError, match="a file of Lua Torch, for --retrain only"):
        checkpoints.load(path)
