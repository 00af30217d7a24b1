"""Each config is one claim of the paper or of the authors' README; it parses, builds and counts."""

import re
from pathlib import Path

import pytest
import yaml
from torch import nn

import opts
from tools import describe

ROOT = Path(__file__).resolve().parents[2]
ALL = sorted((ROOT / "configs").glob("*/*.yaml"))
# Those of other folders claim nothing: small tables of this project's own.
CLAIMING = ("c10", "c10plus", "c100", "c100plus", "svhn", "imagenet", "wide")
CONFIGS = [path for path in ALL if path.parent.name in CLAIMING]
RESIDUAL = [path for path in CONFIGS if "resnet" in path.stem]
DENSE = [path for path in CONFIGS if path not in RESIDUAL]
COLUMNS = ("c10", "c10plus", "c100", "c100plus", "svhn")

# Paper, Table 2, as printed: parameters and errors in the order of COLUMNS.
TABLE_2 = {
    "densenet-L40-k12": ("1.0M", 7.00, 5.24, 27.55, 24.42, 1.79),
    "densenet-L100-k12": ("7.0M", 5.77, 4.10, 23.79, 20.20, 1.67),
    "densenet-L100-k24": ("27.2M", 5.83, 3.74, 23.42, 19.25, 1.59),
    "densenet-bc-L100-k12": ("0.8M", 5.92, 4.51, 24.15, 22.27, 1.76),
    "densenet-bc-L250-k24": ("15.3M", 5.19, 3.62, 19.64, 17.60, 1.74),
    "densenet-bc-L190-k40": ("25.6M", None, 3.46, None, 17.18, None),
    "resnet-110": ("1.7M", 13.63, 6.41, 44.74, 27.22, 2.01),  # reported by [13]
    "preresnet-164": ("1.7M", 11.26, 5.46, 35.58, 24.33, None),
    "preresnet-1001": ("10.2M", 10.56, 4.62, 33.47, 22.71, None),
}
# README of the authors: parameters, errors on C10+ and C100+.
WIDE = {36: ("1.5M", 4.58, 22.30), 48: ("2.7M", 3.99, 20.29), 60: ("4.3M", 4.01, 19.99)}
# README of the authors: error; parameters counted by hand from the architecture.
IMAGENET = {
    "densenet-121-k32": (25.0, 7_978_856),
    "densenet-169-k32": (23.6, 14_149_480),
    "densenet-201-k32": (22.5, 20_013_928),
    "densenet-161-k48": (22.2, 28_681_000),
    "densenet-264-k32": (22.1, 33_337_704),
    "densenet-232-k48": (21.2, 55_570_984),
    "densenet-cosine-264-k32": (21.6, 33_337_704),
    "densenet-cosine-264-k48": (20.4, 72_686_632),
    # README of fb.resnet.torch, one crop.
    "resnet-34": (26.73, 21_797_672),
    "resnet-50": (24.01, 25_557_032),
    "resnet-101": (22.44, 44_549_160),
    "resnet-152": (22.16, 60_192_808),
}


def claims() -> dict[str, tuple[float, str]]:
    """Config path below configs/ -> (error, parameters) of the publication."""
    cells = {
        f"{column}/{row}": (error, parameters)
        for row, (parameters, *errors) in TABLE_2.items()
        for column, error in zip(COLUMNS, errors, strict=True)
        if error is not None
    }
    for k, (parameters, c10, c100) in WIDE.items():
        cells[f"wide/c10plus-L40-k{k}"] = (c10, parameters)
        cells[f"wide/c100plus-L40-k{k}"] = (c100, parameters)
    for row, (error, parameters) in IMAGENET.items():
        cells[f"imagenet/{row}"] = (error, millions(parameters))
    return cells


def millions(parameters: int) -> str:
    """1234567 -> 1.2M."""
    return f"{parameters / 1e6:.1f}M"


def named(path: Path) -> str:
    """configs/c10/x.yaml -> c10/x."""
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


def parsed(path: Path, *more: str):
    """The settings of a config file."""
    return opts.parse(["--config", str(path), *more])


def test_there_is_one_config_per_published_result():
    assert len(claims()) == 27 + 5 + 4 + 4 + 6 + 8 + 4
    assert {named(path) for path in CONFIGS} == set(claims())


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_a_config_claims_what_was_published(path):
    claim = yaml.safe_load(path.read_text())["paper"]
    assert (claim["error"], claim["params"]) == claims()[named(path)]


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_a_config_builds_a_network_of_the_claimed_size(path):
    # The paper counts parameters for ten classes, also in its CIFAR-100 columns.
    classes = "1000" if "imagenet" in named(path) else "10"
    opt = parsed(path, "--nClasses", classes)
    model = describe.build(opt)
    parameters = sum(p.numel() for p in model.parameters())
    if path.stem == "preresnet-1001":  # its published count leaves batch normalisation out
        assert millions(parameters) == "10.3M"
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        parameters -= sum(p.numel() for norm in norms for p in norm.parameters())
    assert millions(parameters) == claims()[named(path)][1]
    if path.parent.name == "imagenet":
        assert parameters == IMAGENET[path.stem][1]


@pytest.mark.parametrize("path", DENSE, ids=named)
def test_a_config_is_the_protocol_of_the_paper(path):
    opt, folder, row = parsed(path), path.parent.name, named(path)
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


# Of residual networks: batch, epochs, first epochs at a tenth and at a hundredth, held-out images.
STOCHASTIC_DEPTH = (128, 500, [250, 375], 5000)  # code of arXiv:1603.09382
STOCHASTIC_DEPTH_SVHN = (128, 50, [30, 35], 6000)
PRE_ACTIVATION = (128, 164, [81, 122], 0)  # arXiv:1603.05027 in epochs of fb.resnet.torch
PRE_ACTIVATION_RELEASED = (64, 200, [81, 122], 0)  # KaimingHe/resnet-1k-layers, CIFAR-10
FB_IMAGENET = (256, 90, [31, 61], 0)


def residual_protocol(folder: str, row: str) -> tuple:
    """The protocol of a row by who ran it."""
    if folder == "imagenet":
        return FB_IMAGENET
    if row == "resnet-110":
        return STOCHASTIC_DEPTH_SVHN if folder == "svhn" else STOCHASTIC_DEPTH
    released = row == "preresnet-1001" and folder in ("c10", "c10plus")
    return PRE_ACTIVATION_RELEASED if released else PRE_ACTIVATION


@pytest.mark.parametrize("path", RESIDUAL, ids=named)
def test_a_config_of_a_residual_network_is_the_protocol_of_its_source(path):
    opt, folder = parsed(path), path.parent.name
    found = (opt.batchSize, opt.nEpochs, opt.milestones, opt.validSize)
    assert found == residual_protocol(folder, path.stem)
    assert opt.augment == (folder not in ("c10", "c100", "svhn"))
    assert (opt.LR, opt.momentum, opt.weightDecay, opt.dropRate) == (0.1, 0.9, 1e-4, 0)
    assert opt.lrShape == "multistep"
    assert f"{opt.netType}-{opt.depth}" == path.stem
    # Zeros in the code of arXiv:1603.09382; convolutions in the other two.
    assert opt.shortcutType == ("A" if path.stem == "resnet-110" else "B")


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_a_config_names_its_command_and_little_more_than_what_differs(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# python main.py --config {path.relative_to(ROOT)}")
    written = set(yaml.safe_load(path.read_text())) - {"paper"}
    # Which row it is, default or not.
    identity = {"dataset", "depth", "netType" if path in RESIDUAL else "growthRate"}
    assert identity <= written
    for name in written - identity:
        others = written - {name}
        rest = [f"--{key}={opts.as_text(getattr(parsed(path), key))}" for key in others]
        assert getattr(opts.parse(rest), name) != getattr(parsed(path), name), name


def test_each_config_has_a_run_directory_of_its_own():
    by_folder = {path.parent.name: [] for path in ALL}
    for path in ALL:
        by_folder[path.parent.name].append(parsed(path).save)
    assert all(len(set(saves)) == len(saves) for saves in by_folder.values())
    saves = [save for folder in CLAIMING for save in by_folder[folder]]
    assert len(set(saves)) == len(saves) == len(CONFIGS)


@pytest.mark.parametrize("path", [path for path in ALL if path not in CONFIGS], ids=named)
def test_a_config_outside_the_papers_tables_claims_nothing_and_names_its_command(path):
    assert "paper" not in yaml.safe_load(path.read_text())
    assert path.read_text().startswith(f"# python main.py --config {path.relative_to(ROOT)}")
    assert parsed(path, "--nClasses", "10").save
