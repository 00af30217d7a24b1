"""Each config is one claim of the paper or of the authors' README; it parses, builds and counts."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from torch.distributed import run as torchrun

import opts
from tools import describe

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*/*.yaml"))
COLUMNS = ("c10", "c10plus", "c100", "c100plus", "svhn")

# Paper, Table 2, as printed: parameters and errors in the order of COLUMNS.
TABLE_2 = {
    "densenet-L40-k12": ("1.0M", 7.00, 5.24, 27.55, 24.42, 1.79),
    "densenet-L100-k12": ("7.0M", 5.77, 4.10, 23.79, 20.20, 1.67),
    "densenet-L100-k24": ("27.2M", 5.83, 3.74, 23.42, 19.25, 1.59),
    "densenet-bc-L100-k12": ("0.8M", 5.92, 4.51, 24.15, 22.27, 1.76),
    "densenet-bc-L250-k24": ("15.3M", 5.19, 3.62, 19.64, 17.60, 1.74),
    "densenet-bc-L190-k40": ("25.6M", None, 3.46, None, 17.18, None),
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
    assert len(TABLE_2) * len(COLUMNS) - 3 == 27
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
    parameters = sum(p.numel() for p in describe.build(opt).parameters())
    assert millions(parameters) == claims()[named(path)][1]
    if path.parent.name == "imagenet":
        assert parameters == IMAGENET[path.stem][1]


@pytest.mark.parametrize("path", CONFIGS, ids=named)
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


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_a_config_names_its_command_and_little_more_than_what_differs(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# python main.py --config {path.relative_to(ROOT)}")
    written = set(yaml.safe_load(path.read_text())) - {"paper"}
    identity = {"dataset", "depth", "growthRate"}  # which row it is, default or not
    assert identity <= written
    for name in written - identity:
        rest = [f"--{key}={opts.as_text(getattr(parsed(path), key))}" for key in identity]
        assert getattr(opts.parse(rest), name) != getattr(parsed(path), name), name


def documents() -> str:
    """The documents and configs."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.yaml")]
    return "\n".join(path.read_text() for path in sorted(files))


def documented_commands() -> list[str]:
    """Every `python main.py` and `python -m tools.describe` line of them."""
    found = re.findall(
        r"python (?:main\.py|-m tools\.describe)(?: (?![ #])[^`#|,\s]+)+", documents()
    )
    runnable = (word for word in found if "--help" not in word and "RUN/" not in word)
    return sorted(set(runnable))


@pytest.mark.parametrize("command", documented_commands())
def test_every_documented_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = shlex.split(command)[3 if "tools" in command else 2 :]
    if "cifar --depth 41" in command:  # the README's example of mistakes
        with pytest.raises(opts.UsageError):
            opts.parse(argv)
    else:
        opts.parse(argv)


def launches() -> list[str]:
    """Every `torchrun ... main.py ...` line of the documents."""
    found = re.findall(
        r"torchrun (?:(?![ #])[^`#|,\s]+ )*main\.py(?: (?![ #.])[^`#|,\s]+)+", documents()
    )
    return sorted(set(found))


def sizes(command: str) -> list[int]:
    """How many processes a `torchrun` line may start; it and its program must understand it."""
    args = torchrun.get_args_parser().parse_args(shlex.split(command)[1:])
    fewest, most = torchrun.parse_min_max_nnodes(args.nnodes)
    found = [nodes * int(args.nproc_per_node) for nodes in range(fewest, most + 1)]
    assert args.training_script == "main.py"
    for size in found:
        opts.parse(args.training_script_args, size)
    return found


@pytest.mark.parametrize("command", launches())
def test_every_documented_launch_is_understood_at_every_size_that_it_allows(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert sizes(command)


def test_launches_are_found_and_their_mistakes_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    (elastic,) = (command for command in launches() if "--nnodes" in command)
    assert sizes(elastic) == [8, 16, 24, 32]
    with pytest.raises(opts.UsageError, match="256 over 24 processes"):
        sizes(elastic.replace("--batchSize 192", "--batchSize 256"))
    with pytest.raises(SystemExit):
        sizes(elastic.replace("--nnodes", "--nodes"))


def test_the_mistakes_in_the_readme_are_answered_as_it_says():
    text = (ROOT / "README.md").read_text()
    command, *answer = re.search(r"```\n\$ (.*?)\n```", text, re.DOTALL)[1].splitlines()
    with pytest.raises(opts.UsageError) as error:
        opts.parse(shlex.split(command)[2:])
    assert error.value.report().splitlines() == answer


def test_each_config_has_a_run_directory_of_its_own():
    assert len({parsed(path).save for path in CONFIGS}) == len(CONFIGS)


def test_a_command_with_a_mistake_would_be_noticed():
    with pytest.raises(opts.UsageError, match="growthrate"):
        opts.parse(["--growthrate", "12"])
