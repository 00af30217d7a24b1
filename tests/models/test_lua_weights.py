"""Weights of Lua networks: every one arrives in its place, and what does not fit is told."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import models.factory
import models.state_dicts
import opts
from errors import CheckpointError, DamagedError
from faults.contract import tiny
from fileio import tensor_files
from helpers.networks import scramble
from helpers.run_main import run
from helpers.torch7_writer import Lua, Module, Storage, View, data_parallel, dumps, tensor
from models.resnet import ResNet

NETWORKS = {
    "densenet": "--dataset cifar10 --growthRate 4 --depth 10 --bottleneck false --reduction 1",
    "densenet-BC": "--dataset cifar10 --growthRate 5 --depth 16",
    "densenet-BC-imagenet": "--dataset imagenet --growthRate 4 --d1 1 --d2 2 --d3 1 --d4 1",
    "resnet": "--netType resnet --dataset cifar10 --depth 14",
    "resnet-B-imagenet": "--netType resnet --dataset imagenet --depth 50",
    "resnet-C": "--netType resnet --dataset cifar10 --depth 14 --shortcutType C",
    "preresnet": "--netType preresnet --dataset cifar10 --depth 20 --bottleneck false",
    "preresnet-B-imagenet": "--netType preresnet --dataset imagenet --depth 18",
}
BC = NETWORKS["densenet-BC"]


def network(line: str, num_classes: int = 10) -> nn.Module:
    return scramble(models.factory.create(opts.parse(line.split()), num_classes)).eval()


def blank(line: str) -> nn.Module:
    """The same network with each weight and statistic 9, to be loaded."""
    model = network(line)
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            value.fill_(9)
    return model


def lua(model: nn.Module, **how: object) -> Module:
    """The Lua network with the weights of one of ours."""
    residual = Lua.preresnet if hasattr(model, "stem") else Lua.resnet
    build = residual if isinstance(model, ResNet) else Lua.densenet
    return build(Lua(model.state_dict(), **how))


def load(path: Path, model: nn.Module, content: object, **machine: object) -> nn.Module:
    """`model` with the weights that a file with this content has."""
    path.write_bytes(content if isinstance(content, bytes) else dumps(content, **machine))
    models.state_dicts.load_weights(model, checkpoints.load_weights(path))
    return model.eval()


def difference(left: nn.Module, right: nn.Module) -> float:
    """Of any weight or statistic, the largest."""
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def leaves(module: Module, kind: str) -> list[Module]:
    """The modules of a class, in running order."""
    found = [module] if module.name.endswith(kind) else []
    for child in module.fields.get("modules", []):
        found += leaves(child, kind)
    return found


# ------------------------------------------------------------------------------- from Lua to here


@pytest.mark.parametrize("line", NETWORKS.values(), ids=NETWORKS)
def test_every_weight_of_a_lua_network_arrives_in_its_place(line, tmp_path):
    source, target = network(line), blank(line)
    assert difference(source, target) > 0.1
    assert difference(source, load(tmp_path / "m.t7", target, lua(source))) == 0


HOW = {
    "layers of optMemory 3 and 4": {"custom": True},
    "nn": {"package": "nn", "kind": "Double"},
    "nn with biases of zero": {"package": "nn", "biases": True},
    "CudaTensor": {"kind": "Cuda"},
    "CudaDoubleTensor": {"kind": "CudaDouble"},
    "SpatialConvolutionMM": {"matrices": True},
    "one storage for all": {"flat": True},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_the_way_a_lua_network_was_built_and_saved_makes_no_difference(how, tmp_path):
    source, target = network(BC), blank(BC)
    how = {**how, "flat": Storage(np.zeros(0, np.float32))} if "flat" in how else how
    assert difference(source, load(tmp_path / "m.t7", target, lua(source, **how))) == 0


@pytest.mark.parametrize(
    "wrap",
    [data_parallel, lambda m: {"model": m}, lambda m: {"model": data_parallel(m), "epoch": 3}],
    ids=["DataParallelTable", "a table", "both"],
)
def test_a_network_is_found_in_what_it_was_saved_in(wrap, tmp_path):
    source, target = network(BC), blank(BC)
    assert difference(source, load(tmp_path / "m.t7", target, wrap(lua(source)))) == 0


def test_half_precision_and_old_batch_normalisation_arrive_as_exactly_as_they_can(tmp_path):
    source = network(BC)
    half = load(tmp_path / "h.t7", blank(BC), lua(source, kind="CudaHalf"))
    assert 0 < difference(source, half) < 2**-10  # numbers up to about 2
    old = load(tmp_path / "o.t7", blank(BC), lua(source, old=True, kind="Double"))
    assert difference(source, old) < 1e-6


def test_a_file_of_before_class_versions_is_read(tmp_path):
    source, target = network(BC), blank(BC)
    assert difference(source, load(tmp_path / "m.t7", target, lua(source), versions=False)) == 0


def test_weights_that_do_not_lie_in_order_are_read_by_their_strides(tmp_path):
    source, target = network(BC), blank(BC)
    model = lua(source)
    conv = leaves(model, "SpatialConvolution")[0]
    values = conv.fields["weight"].storage.values.reshape(conv.fields["weight"].sizes)
    backwards = tensor(np.ascontiguousarray(values.transpose(3, 2, 1, 0)))
    sizes, strides = backwards.sizes[::-1], backwards.strides[::-1]
    conv.fields["weight"] = View(backwards.storage, sizes, strides)
    assert difference(source, load(tmp_path / "m.t7", target, model)) == 0
    conv.fields["weight"] = View(backwards.storage, sizes, tensor(values).strides)
    assert difference(source, load(tmp_path / "m.t7", target, model)) > 0.1


def swapped(model: Module) -> Module:
    """With the weights of two convolutions of one shape exchanged."""
    convs = leaves(model, "SpatialConvolution")
    one, other = [c for c in convs if c.fields["weight"].sizes == convs[2].fields["weight"].sizes][
        :2
    ]
    first, second = one.fields["weight"], other.fields["weight"]
    one.fields["weight"], other.fields["weight"] = second, first
    return model


@pytest.mark.parametrize("line", [BC, NETWORKS["resnet"], NETWORKS["preresnet"]])
def test_a_network_from_lua_evaluates_as_the_original(line, tmp_path):
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)
    source = network(line)

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return F.cross_entropy(model(images), targets).item()

    assert abs(loss(load(tmp_path / "m.t7", blank(line), lua(source))) - loss(source)) <= 1e-6
    other = load(tmp_path / "s.t7", blank(line), swapped(lua(source)))
    assert abs(loss(other) - loss(source)) > 1e-4


def test_the_program_evaluates_weights_of_lua_as_the_same_weights_of_its_own(tmp_path):
    settings = {"nClasses": 10, "nImages": 256, "testOnly": True, "save": tmp_path / "run"}
    source = scramble(models.factory.create(opts.parse(tiny(nClasses=10)), 10))
    nn.init.normal_(source.classifier.weight, std=10)  # so that each map matters to the errors
    tensor_files.save_weights(tmp_path / "w.pt", source.state_dict())
    (tmp_path / "w.t7").write_bytes(dumps(lua(source)))
    (tmp_path / "s.t7").write_bytes(dumps(swapped(lua(source))))
    lines = {}
    for name in ("w.pt", "w.t7", "s.t7"):
        result = run(tiny(**settings, retrain=tmp_path / name))
        assert result.code == 0, result
        lines[name] = result.out.splitlines()[-1]
    assert lines["w.t7"] == lines["w.pt"] != lines["s.t7"]


def test_a_lua_network_of_other_classes_keeps_all_but_its_classifier(tmp_path):
    source, target = network(BC, 100), network(BC)
    fresh = target.classifier.weight.clone()
    report = refusal(tmp_path / "m.t7", target, lua(source))
    assert report.endswith("fix: add --resetClassifier true")
    models.state_dicts.load_weights(
        target, checkpoints.load_weights(tmp_path / "m.t7"), reset_classifier=True
    )
    assert torch.equal(target.classifier.weight, fresh)
    source.classifier = target.classifier
    assert difference(source, target) == 0


# ------------------------------------------------------------------------------- what does not fit


def refusal(path: Path, model: nn.Module, content: object, **machine: object) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load(path, model, content, **machine)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = caught.value.report()
    assert "\n" not in report and len(report) < 500
    return report


@pytest.mark.parametrize(
    "line",
    [
        "--dataset cifar10 --depth 13 --growthRate 6 --bottleneck false --reduction 1"
        " --initChannels 12",
        "--dataset cifar10 --depth 10 --growthRate 8 --bottleneck false --reduction 0.5",
        "--dataset cifar10 --depth 28 --growthRate 4 --reduction 0.7",
        "--dataset imagenet --depth 121 --growthRate 2",
    ],
)
def test_the_flags_of_a_densenet_that_does_not_fit_are_told(line, tmp_path):
    source = network(line)
    report = refusal(tmp_path / "m.t7", network(BC), lua(source))
    counted = sum(isinstance(module, nn.Conv2d) for module in source.modules())
    assert f"the Lua network has {counted} x convolution, " in report
    flags = report.partition("; fix: use ")[2]
    again = blank(f"--dataset {line.split()[1]} {flags}")
    assert difference(source, load(tmp_path / "m.t7", again, lua(source))) == 0


def test_a_shape_that_differs_is_named_in_both_networks(tmp_path):
    model = lua(network(BC))
    leaves(model, "SpatialConvolution")[2].fields["weight"] = tensor(np.ones((5, 20, 1, 1)))
    report = refusal(tmp_path / "m.t7", network(BC), model)
    assert "Lua module 2.1.2.6 has shape (5, 20, 1, 1), " in report
    assert "features.denseblock1.denselayer1.conv2 (5, 20, 3, 3)" in report


def test_modules_in_another_order_are_named(tmp_path):
    model = lua(network(BC))
    model.fields["modules"][:2] = model.fields["modules"][1::-1]
    report = refusal(tmp_path / "m.t7", network(BC), model)
    assert "Lua module 1.1.2.1 is a batch normalisation, features.conv0 a convolution;" in report


def test_another_network_has_no_flags_of_a_densenet(tmp_path):
    report = refusal(tmp_path / "m.t7", network(BC), lua(network(NETWORKS["resnet"])))
    assert report.endswith("fix: give the flags of that network")


def changed(kind: str, **fields: object) -> Module:
    """The Lua network with some fields of the second module of a class replaced, or removed."""
    model = lua(network(BC))
    module = leaves(model, kind)[1 if kind != "Linear" else 0]
    for name, value in fields.items():
        module.fields[name] = value
    return model


def with_twins() -> Module:
    model = lua(network(BC))
    model.fields["modules"][3] = model.fields["modules"][2]
    return model


def renamed(old: str, new: str) -> Module:
    model = lua(network(BC))
    leaves(model, old)[0].name = new
    return model


NORM, CONV = "SpatialBatchNormalization", "SpatialConvolution"
REFUSED = {
    "latest.t7": (lambda: {"epoch": 3, "modelFile": "model_3.t7"}, "points to model_3.t7; fix: na"),
    "optimState.t7": (lambda: {"learningRate": 0.1, "dfdx": tensor([0.5])}, "no network of Lua To"),
    "a tensor": (lambda: tensor([1.0]), "no network of Lua Torch in it"),
    "a bias": (lambda: changed(CONV, bias=tensor([0.5] * 20)), r"\(cudnn.SpatialConv.* has a bias"),
    "another eps": (lambda: changed(NORM, eps=1e-3), "2.1.2.4 .* has an eps of 0.001, not 1e-05"),
    "no statistics": (lambda: changed(NORM, running_mean=None), "2.1.2.4 .* has no running_mean"),
    "whole numbers": (lambda: changed("Linear", weight=tensor([[1]], "Int")), "has no weight"),
    "5-D": (lambda: changed(CONV, weight=tensor(np.ones((1, 1, 1, 1, 1)))), "of 5 dimensions, not"),
    "no size": (lambda: changed(CONV, weight=tensor([[1.0]]), kH=-1.0), "has no size"),
    "two sizes": (lambda: changed(CONV, weight=tensor([[1.0]])), "1 weights for each map, not 10"),
    "a module twice": (with_twins, r"3 \(nn.Sequential\) stands in the network twice|4 \(nn.Seq"),
    "no modules": (lambda: Module("nn.Sequential", {"modules": 3.0}), "has no list of modules"),
    "no module": (lambda: Module("nn.Sequential", {"modules": [3.0]}), "1 is no module"),
    "a graph": (lambda: renamed("nn.Concat", "nn.gModule"), "is a graph"),
    "another layer": (lambda: renamed("Linear", "nn.Bilinear"), r"\(nn.Bilinear\) has weights"),
    "old and not positive": (
        lambda: changed(NORM, running_var=None, running_std=tensor([0.0] * 20)),
        "has no running_var",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_network_of_these_is_refused_in_words(name, tmp_path):
    make, pattern = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "m.t7", network(BC), make())
    assert re.search(f"m.t7: .*{pattern}", caught.value.report())
    assert not isinstance(caught.value, DamagedError)


def test_a_deviation_of_zero_in_an_old_file_is_refused(tmp_path):
    model = lua(network(BC), old=True)
    leaves(model, NORM)[0].fields["running_std"].storage.values[0] = 0
    assert "has a running_std that is not positive" in refusal(tmp_path / "m", network(BC), model)


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    model = changed("Linear", bias=tensor([math.nan] * 10))
    assert "a weight that is not finite" in refusal(tmp_path / "m.t7", network(BC), model)


@pytest.mark.parametrize(
    ("machine", "reason"),
    [({"order": ">"}, "big-endian machine"), ({"long": "i"}, "on a 32-bit machine")],
)
def test_a_file_of_another_kind_of_machine_is_called_so(machine, reason, tmp_path):
    assert reason in refusal(tmp_path / "m.t7", network(BC), lua(network(BC)), **machine)


def test_a_file_that_is_text_or_to_be_resumed_is_called_what_it_is(tmp_path):
    assert "ASCII" in refusal(tmp_path / "m.t7", network(BC), b"4\n1\n3\nV 1\n13\nnn.Sequential\n")
    assert "a web page" in refusal(tmp_path / "m.t7", network(BC), b"<!DOCTYPE html><html></html>")
    path = tmp_path / "checkpoint_000000001.pt"
    path.write_bytes(dumps(lua(network(BC))))
    with pytest.raises(DamagedError, match="a file of Lua Torch, for --retrain only"):
        checkpoints.load(path)
