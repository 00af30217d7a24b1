"""Test that each config parses, builds, counts and trains as its source, a published result, says.

tests/tools/test_published.py compares the errors and sizes that configs claim with the sources.
"""

import functools
import re
from pathlib import Path

import pytest
import yaml
from torch import nn

import opts
from helpers.run_main import ROOT
from tools import describe

ALL = sorted((ROOT / "configs").glob("*/*.yaml"))
# The other folders claim nothing: they hold small tables of this project's own.
CLAIMING = ("c10", "c10plus", "c100", "c100plus", "svhn", "imagenet", "wide")
CONFIGS = [path for path in ALL if path.parent.name in CLAIMING]
RESIDUAL = [path for path in CONFIGS if "resnet" in path.stem]
DENSE = [path for path in CONFIGS if path not in RESIDUAL]
# Counted by hand from the architecture; of resnets torchvision's numbers.
IMAGENET_PARAMETERS = {
    "densenet-121-k32": 7_978_856, "densenet-169-k32": 14_149_480, "densenet-201-k32": 20_013_928,
    "densenet-161-k48": 28_681_000, "densenet-264-k32": 33_337_704, "densenet-232-k48": 55_570_984,
    "densenet-cosine-264-k32": 33_337_704, "densenet-cosine-264-k48": 72_686_632,
    "resnet-34": 21_797_672, "resnet-50": 25_557_032, "resnet-101": 44_549_160,
    "resnet-152": 60_192_808,
}  # fmt: skip


def config_name(path: Path) -> str:
    """Return the name of a config: configs/c10/x.yaml -> c10/x."""
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


def parsed(path: Path, *more: str):
    return opts.parse(["--config", str(path), *more])


@functools.cache
def count_parameters(line: str) -> tuple[int, int]:
    """Count all parameters of a network, and those of its batch normalisation."""
    model = describe.build(opts.parse(line.split()))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    own = [parameter for norm in norms for parameter in norm.parameters()]
    return tuple(sum(p.numel() for p in found) for found in (model.parameters(), own))


@pytest.mark.parametrize("path", CONFIGS, ids=config_name)
def test_a_config_builds_a_network_of_the_claimed_size(path):
    # The paper counts parameters for ten classes, also in its CIFAR-100 columns.
    opt = parsed(path, "--nClasses", "1000" if path.parent.name == "imagenet" else "10")
    shape = {"dataset": "imagenet" if opt.imagenetShape else "cifar10", "nClasses": opt.nClasses}
    network = {name: value for name, value in opts.settings(opt).items()
               if opts.FLAGS[name].role == "model"}  # fmt: skip
    line = " ".join(f"--{k}={opts.as_text(v)}" for k, v in (shape | network).items())
    parameters, norms = count_parameters(line)
    if path.stem == "preresnet-1001":  # its published count leaves batch normalisation out
        assert parameters == pytest.approx(10.3e6, abs=5e4)
        parameters -= norms
    assert f"{parameters / 1e6:.1f}M" == yaml.safe_load(path.read_text())["paper"]["params"]
    if opt.imagenetShape:
        assert parameters == IMAGENET_PARAMETERS[path.stem]


@pytest.mark.parametrize("path", DENSE, ids=config_name)
def test_a_config_is_the_protocol_of_the_paper(path):
    opt, folder, row = parsed(path), path.parent.name, config_name(path)
    imagenet, bottleneck = folder == "imagenet", "densenet-L" not in row
    large = imagenet and opt.depth == 161
    assert opt.bottleneck == bottleneck and opt.reduction == (0.5 if bottleneck else 1)
    assert opt.batchSize == (128 if large else 256 if imagenet else 64)
    assert opt.nEpochs == (100 if large else 90 if imagenet else 40 if folder == "svhn" else 300)
    assert opt.augment == (folder not in ("c10", "c100", "svhn"))
    assert opt.dropRate == (0 if opt.augment else 0.2)
    assert opt.validSize == (6000 if folder == "svhn" else 0)
    assert (opt.LR, opt.momentum, opt.weightDecay) == (0.1, 0.9, 1e-4)
    assert opt.lrShape == ("cosine" if "cosine" in row else "multistep")
    depth, k = map(int, re.search(r"(\d+)-k(\d+)$", row).groups())
    assert (opt.depth, opt.growthRate) == (depth, k)


def residual_protocol(folder: str, row: str) -> tuple:
    """Return batch size, epochs, milestones and held-out images of the publisher of a row."""
    if folder == "imagenet":  # fb.resnet.torch
        return (256, 90, [31, 61], 0)
    if row == "resnet-110":  # code of arXiv:1603.09382
        return (128, 50, [30, 35], 6000) if folder == "svhn" else (128, 500, [250, 375], 5000)
    if row == "preresnet-1001" and folder in ("c10", "c10plus"):  # KaimingHe/resnet-1k-layers
        return (64, 200, [81, 122], 0)
    return (128, 164, [81, 122], 0)  # arXiv:1603.05027 in epochs of fb.resnet.torch


@pytest.mark.parametrize("path", RESIDUAL, ids=config_name)
def test_a_config_of_a_residual_network_is_the_protocol_of_its_source(path):
    opt, folder = parsed(path), path.parent.name
    found = (opt.batchSize, opt.nEpochs, opt.milestones, opt.validSize)
    assert found == residual_protocol(folder, path.stem)
    assert opt.augment == (folder not in ("c10", "c100", "svhn"))
    assert (opt.LR, opt.momentum, opt.weightDecay, opt.dropRate) == (0.1, 0.9, 1e-4, 0)
    assert (opt.lrShape, f"{opt.netType}-{opt.depth}") == ("multistep", path.stem)
    # Zeros in the code of arXiv:1603.09382; convolutions in the other two.
    assert opt.shortcutType == ("A" if path.stem == "resnet-110" else "B")


@pytest.mark.parametrize("path", ALL, ids=config_name)
def test_a_config_names_its_command_and_little_more_than_what_differs(path):
    assert path.read_text().startswith(f"# python main.py --config {path.relative_to(ROOT)}")
    opt, written = parsed(path, "--nClasses", "10"), yaml.safe_load(path.read_text())
    assert ("paper" in written) == (path in CONFIGS)
    # These say which row it is and may repeat a default.
    identity = {"dataset", "depth", "netType" if path in RESIDUAL else "growthRate"}
    assert path not in CONFIGS or identity <= written.keys()
    for name in written.keys() - identity - {"paper"} if path in CONFIGS else ():
        rest = [f"--{key}={opts.as_text(getattr(opt, key))}"
                for key in written.keys() - {name, "paper"}]  # fmt: skip
        assert getattr(opts.parse(rest), name) != getattr(opt, name), name


def test_each_config_has_a_run_directory_of_its_own():
    saves = {path: parsed(path).save for path in ALL}
    assert len({saves[path] for path in CONFIGS}) == len(CONFIGS)
    assert len({(path.parent, save) for path, save in saves.items()}) == len(ALL)
