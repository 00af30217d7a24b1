"""The settings of a command line: defaults, precedence, what is impossible, and back to YAML."""

import random
import subprocess
import sys

import pytest

import opts
from cli import path_checks
from cli.flag_types import as_text
from errors import CheckpointError, DataError, UsageError
from helpers.run_main import ROOT, run
from models.registry import ARCHITECTURES

LUA = "-netType densenet -dataset cifar10 -batchSize 64 -nEpochs 300 -depth 100 -growthRate 12"


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parse(line: str):
    return opts.parse(line.split())


def refused(argv: str | list[str]) -> list[tuple[str, str]]:
    """The problems of a command line that is refused, each reported as one line."""
    with pytest.raises(UsageError) as caught:
        opts.parse(argv.split() if isinstance(argv, str) else argv)
    error = caught.value
    assert error.code == 2
    lines = error.report().splitlines()
    assert len(lines) == len(error.problems)
    assert all(line.startswith("error: ") and "; fix: " in line for line in lines)
    return error.problems


def config(tmp_path, text: str, name: str = "c.yaml") -> str:
    (tmp_path / name).write_text(text)
    return f"--config {tmp_path / name}"


# ------------------------------------------------------------------------------------- defaults

DEFAULTS = {
    # Section 1 of the parity table, in its order, on CIFAR-10.
    "data": "data",
    "dataset": "cifar10",
    "manualSeed": 0,
    "nGPU": None,
    "backend": "cudnn",
    "cudnn": "fastest",
    "gen": "gen",
    "precision": "single",
    "nThreads": 2,
    "nEpochs": 300,
    "epochNumber": 1,
    "batchSize": 64,
    "testOnly": False,
    "tenCrop": False,
    "save": "checkpoints/cifar10+-densenet-BC-L100-k12-seed0",
    "resume": "none",
    "LR": 0.1,
    "momentum": 0.9,
    "weightDecay": 1e-4,
    "lrShape": "multistep",
    "netType": "densenet",
    "depth": 100,
    "shortcutType": None,
    "retrain": "none",
    "optimState": "none",
    "shareGradInput": False,
    "optnet": False,
    "resetClassifier": False,
    "nClasses": None,
    "growthRate": 12,
    "bottleneck": True,
    "reduction": 0.5,
    "dropRate": 0.0,
    "optMemory": 2,
    "d1": 0,
    "d2": 0,
    "d3": 0,
    "d4": 0,
    # The additions.
    "config": "none",
    "printConfig": False,
    "debug": False,
    "tf32": False,
    "augment": True,
    "validSize": 0,
    "imageSize": 32,
    "nImages": 10000,
    "onBadImage": "error",
    "keep": 2,
    "saveEvery": 10.0,
    "override": False,
    "milestones": [150, 225],
    "initChannels": 24,
    "kernels": "auto",
    "cudaGraph": "auto",
    "syncBN": False,
    "timeout": 50.0,
}
IMAGENET = {
    "nEpochs": 90,
    "batchSize": 256,
    "depth": 121,
    "growthRate": 32,
    "initChannels": 64,
    "imageSize": 224,
    "milestones": [31, 61],
    "dropRate": 0.0,
    "augment": True,
}
RESNET = {
    "nEpochs": 164,
    "batchSize": 64,
    "milestones": [81, 122],
    "shortcutType": "A",
    "dropRate": 0.0,
    "augment": True,
    "depth": 110,
    "stages": (18, 18, 18),
    "bottleneck": False,
}
SVHN = {
    "nEpochs": 40,
    "batchSize": 64,
    "depth": 100,
    "growthRate": 12,
    "augment": False,
    "dropRate": 0.2,
    "validSize": 6000,
    "milestones": [20, 30],
    "imageSize": 32,
}


def test_the_defaults_are_the_papers():
    opt = vars(parse(""))
    assert {name: opt[name] for name in opts.FLAGS} == DEFAULTS
    assert opt["stages"] == (16, 16, 16)
    assert opt["replicas"] == 1
    assert opt["notes"] == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--dataset cifar100", {"nEpochs": 300, "batchSize": 64, "depth": 100, "imageSize": 32}),
        ("--dataset svhn", SVHN),
        ("--dataset imagenet", IMAGENET),
        ("--dataset folder", IMAGENET),
        ("--dataset synthetic --imageSize 224", IMAGENET),
        ("--dataset synthetic", {"nEpochs": 300, "imageSize": 32, "depth": 100, "augment": True}),
        ("--dataset folder --imageSize 64", {"nEpochs": 300, "batchSize": 64, "depth": 100}),
        ("--dataset folder --imageSize 65", {"nEpochs": 90, "batchSize": 256, "depth": 121}),
        ("--dataset digits", {"imageSize": 8, "augment": False, "dropRate": 0.2, "nEpochs": 300}),
        (
            "--dataset imagenet --depth 161",
            {"growthRate": 48, "nEpochs": 100, "batchSize": 128, "initChannels": 96},
        ),
        ("--dataset imagenet --depth 232", {"growthRate": 48, "nEpochs": 90, "batchSize": 256}),
        ("--dataset imagenet --depth 264", {"growthRate": 32, "nEpochs": 90}),
        ("--dataset imagenet --depth 161", {"milestones": [31, 61, 91]}),
        ("--dataset imagenet --nEpochs 20", {"milestones": []}),
        ("--augment false", {"dropRate": 0.2}),
        ("--augment false --dropRate 0", {"dropRate": 0.0}),
        ("--dataset svhn --augment true", {"dropRate": 0.0, "validSize": 6000}),
        ("--bottleneck false --reduction 1", {"initChannels": 16}),
        ("--bottleneck false --growthRate 24", {"initChannels": 16}),
        ("--growthRate 40", {"initChannels": 80}),
        ("--dataset imagenet --bottleneck false", {"initChannels": 64}),
        ("--growthRate 40 --initChannels 7", {"initChannels": 7}),
        ("--nEpochs 7", {"milestones": [4, 6]}),
        ("--lrShape cosine", {"milestones": None}),
        ("--netType resnet", RESNET),
        ("--netType resnet --augment false", RESNET | {"augment": False}),
        ("--netType resnet --dataset folder --imageSize 32", RESNET),
        (
            "--netType preresnet --dataset cifar100",
            RESNET | {"depth": 164, "bottleneck": True},
        ),
        (
            "--netType resnet --dataset svhn",
            {"nEpochs": 40, "milestones": [20, 30], "validSize": 6000, "dropRate": 0.0},
        ),
        *(
            (
                f"--netType {name} --dataset imagenet",
                {
                    "depth": 50,
                    "nEpochs": 90,
                    "batchSize": 256,
                    "milestones": [31, 61],
                    "shortcutType": "B",
                    "bottleneck": True,
                    "imageSize": 224,
                },
            )
            for name in ("resnet", "preresnet")
        ),
        ("--netType resnet --nEpochs 328", {"milestones": [162, 244]}),
        ("--netType resnet --lrShape cosine", {"milestones": None}),
        ("--netType resnet --shortcutType C", {"shortcutType": "C"}),
        ("--shortcutType C", {"shortcutType": None}),
    ],
)
def test_a_default_that_depends_follows_what_it_depends_on(line, expected):
    opt = vars(parse(line))
    assert {name: opt[name] for name in expected} == expected


# From fb.resnet.torch.
RESNET_STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


@pytest.mark.parametrize(
    ("line", "stages"),
    [
        ("--depth 40", (6, 6, 6)),
        ("--depth 40 --bottleneck false", (12, 12, 12)),
        ("--depth 7 --bottleneck false", (1, 1, 1)),
        ("--depth 10", (1, 1, 1)),
        ("--dataset imagenet", (6, 12, 24, 16)),
        ("--dataset imagenet --depth 161", (6, 12, 36, 24)),
        ("--dataset imagenet --depth 169", (6, 12, 32, 32)),
        ("--dataset imagenet --depth 201", (6, 12, 48, 32)),
        ("--dataset imagenet --depth 232", (6, 12, 48, 48)),
        ("--dataset imagenet --depth 264", (6, 12, 64, 48)),
        ("--dataset imagenet --d1 1 --d2 2 --d3 3 --d4 4", (1, 2, 3, 4)),
        ("--dataset imagenet --d1 6 --d2 12 --d3 24 --d4 16 --depth 121", (6, 12, 24, 16)),
        ("--netType resnet --depth 20", (3, 3, 3)),
        ("--netType resnet --depth 8", (1, 1, 1)),
        ("--netType resnet --depth 1202", (200, 200, 200)),
        ("--netType preresnet --depth 20", (2, 2, 2)),
        ("--netType preresnet --depth 20 --bottleneck false", (3, 3, 3)),
        ("--netType preresnet --depth 164", (18, 18, 18)),
        ("--netType preresnet --depth 1001", (111, 111, 111)),
        *(
            (f"--dataset imagenet --netType {name} --depth {depth}", stages)
            for name in ("resnet", "preresnet")
            for depth, stages in RESNET_STAGES.items()
        ),
        # 2 (6 + 12 + 20 + 20) + 5 is 121 as well, but nobody asked for DenseNet-121.
        ("--dataset imagenet --d1 6 --d2 12 --d3 20 --d4 20", (6, 12, 20, 20)),
    ],
)
def test_the_depth_decides_the_layers_of_each_block(line, stages):
    assert parse(line).stages == stages


def test_the_lua_command_line_runs_as_it_stands():
    ignored = "-backend cudnn -shortcutType A -gen x -optimState none"
    lua = parse(f"{LUA} -shareGradInput true {ignored}")
    assert opts.settings(lua) == opts.settings(parse("")) == opts.settings(parse(LUA))
    assert opts.settings(lua) != opts.settings(parse(LUA.replace("100", "40")))


@pytest.mark.parametrize("name", opts.FLAGS)
def test_a_default_is_a_value_that_its_flag_takes(name):
    flag = opts.FLAGS[name]
    if flag.default is None:
        assert flag.default_note  # or --help could not say what it is
    else:
        assert flag.parse(as_text(flag.default)) == flag.default


# ----------------------------------------------------------------------------------- precedence


def test_command_line_beats_config_beats_run_beats_default(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("LR: 0.1\nmomentum: 0.2\nbatchSize: 3\nsave: elsewhere\n")
    line = config(tmp_path, "LR: 0.4\nmomentum: 0.5\n") + f" --LR 0.7 --resume {run}"
    opt = parse(line)
    assert (opt.LR, opt.momentum, opt.batchSize, opt.nThreads) == (0.7, 0.5, 3, 2)
    assert parse("").momentum == 0.9
    assert parse(f"--resume {run}").save == "elsewhere"


def test_resuming_a_directory_goes_on_there_with_the_settings_it_has(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("depth: 40\nepochNumber: 5\n")
    for resume in (run, run / "checkpoint_000000007.pt"):
        opt = parse(f"--resume {resume}")
        assert (opt.depth, opt.save) == (40, str(run))
        assert opt.epochNumber == 1  # the checkpoint knows the epoch
    assert parse(f"--resume {run} --save other").save == "other"
    assert parse(f"--resume {tmp_path}").depth == 100  # nothing to read there
    assert parse("--resume auto").depth == 100


def test_the_same_lua_line_resumes_the_run_it_started(tmp_path):
    line = "-depth 40 -optnet true -dataset cifar10"
    (tmp_path / "config.yaml").write_text(opts.as_yaml(parse(line), exclude=opts.NOT_SAVED))
    assert parse(f"{line} --resume {tmp_path}").optMemory == 1


def test_three_names_of_one_setting_obey_the_same_order(tmp_path):
    assert parse(config(tmp_path, "optMemory: 0\n") + " -optnet true").optMemory == 1
    assert parse(config(tmp_path, "optnet: true\n") + " -optMemory 0").optMemory == 0
    assert parse(config(tmp_path, "optMemory: 0\n")).optMemory == 0


def test_a_bad_setting_of_the_run_is_shown_with_its_place(tmp_path):
    (tmp_path / "config.yaml").write_text("LR: 1\ndeth: 40\n")
    ((what, fix),) = refused(f"--resume {tmp_path}")
    assert what == f"unknown flag deth ({tmp_path / 'config.yaml'}, line 2)"
    assert fix == "did you mean depth?"


def test_a_config_file_cannot_name_another(tmp_path):
    # It would have no effect, and a flag without effect is never passed over in silence.
    ((what, _),) = refused(config(tmp_path, "config: other.yaml\ndepth: 40\n"))
    assert "config" in what


# ------------------------------------------------------------------------------- what is refused


def test_every_problem_is_reported_at_once(tmp_path):
    bad = config(tmp_path, "depth: 41\nLR: -1\nLR: 2\nprecison: half\ntf32: true\n")
    problems = refused(f"{bad} --growthrate 12 --momentum 1 --precision half --testOnly true 7")
    whats = [what for what, _ in problems]
    parts = (
        "unknown flag growthrate (command line)",
        "momentum: '1' is out of range (command line)",
        "'7' is no flag (command line)",
        "LR: '-1' is out of range",
        "LR is given twice",
        "unknown flag precison",
        "depth: 41 is not 6n + 4",
        "tf32 has no effect with precision half",
        "testOnly without weights",
    )
    for part in parts:
        assert sum(what.startswith(part) for what in whats) == 1, part
    assert len(whats) == len(parts)


RANGES = [
    ("of at least 0 and of at most 9223372036854775807", "manualSeed", f"-1 {2**63} 0.5"),
    ("of at least 0", "nGPU nThreads validSize d1 d4", "-1 0.5 x"),
    ("of at least 8 and of at most 4096", "imageSize", "0 7 4097"),
    ("of at least 1", "nEpochs epochNumber batchSize nClasses growthRate depth", "0 -1 1.5 nan"),
    ("of at least 1", "initChannels nImages keep milestones", "0 -1 1.5 inf"),
    ("above 0", "LR saveEvery timeout", "0 -1 nan inf -inf 1e400"),
    ("of at least 0 and below 1", "momentum dropRate", "1 -0.1 2 nan inf"),
    ("of at least 0", "weightDecay", "-1 -1e-9 nan inf"),
    ("above 0 and of at most 1", "reduction", "0 1.5 -0.5 nan"),
]


@pytest.mark.parametrize(
    ("interval", "name", "value"),
    [(i, name, value) for i, names, values in RANGES for name in names.split() for value in
     values.split()],
)  # fmt: skip
def test_a_value_out_of_range_is_answered_with_the_range(interval, name, value):
    ((what, fix),) = refused(f"--{name} {value}")
    assert what.startswith(f"{name}: '{value}' is ")
    assert f" {interval}" in fix


@pytest.mark.parametrize(
    "line",
    [
        "--growthRate 1 --reduction 1 --dropRate 0 --momentum 0 --weightDecay 0 --LR 1e-9",
        f"--manualSeed {2**63 - 1} --nEpochs 1 --batchSize 1 --nClasses 1 --keep 1 --nGPU 0",
        "--dropRate 0.999 --momentum 0.999 --initChannels 1 --saveEvery 0.01 --milestones 1",
        "--dataset synthetic --imageSize 8 --nImages 1",
        "--dataset synthetic --imageSize 4096 --nThreads 0 --validSize 0",
    ],
)
def test_the_ends_of_the_ranges_are_inside(line):
    assert parse(line)


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ("--dataset cifar", "dataset: 'cifar' is not one of", "use cifar10"),
        ("--dataset imagnet", "dataset: 'imagnet' is not one of", "use imagenet"),
        ("--netType resnt", "'resnt' is not one of densenet, resnet, preresnet", "use resnet"),
        ("--netType resnet --shortcutType D", "shortcutType: 'D' is not one of A, B, C", "use A"),
        ("--precision singel", "precision: 'singel' is not one of", "use single"),
        ("--cudnn deterministc", "is not one of fastest, default", "use deterministic"),
        ("--lrShape cos", "lrShape: 'cos' is not one of multistep, cosine", "use cosine"),
        ("--onBadImage ignore", "is not one of error, skip", "use "),
        ("--optMemory 5", "optMemory: '5' is not one of 0, 1, 2, 3, 4, auto", "use 4"),
        ("--optMemory atuo", "optMemory: 'atuo' is not a level or auto", "use 0 or 1 or"),
        ("--optMemory 2.0", "optMemory: '2.0' is not a level or auto", "use 0 or 1 or"),
        ("--optMemory Auto", "optMemory: 'Auto' is not a level or auto", "use 0 or 1 or"),
        ("--kernels cuda", "kernels: 'cuda' is not one of auto, triton, torch", "use "),
        ("--kernels tirton", "kernels: 'tirton' is not one of", "use triton"),
        ("--cudaGraph yes", "cudaGraph: 'yes' is not one of auto, true, false", "use "),
        ("--cudaGraph fasle", "cudaGraph: 'fasle' is not one of", "use false"),
        ("--optMemory -1", "optMemory: '-1' is not one of", "use 0"),
        ("--bottleneck no", "bottleneck: 'no' is not true or false", "use true or false"),
        ("--tenCrop 1", "tenCrop: '1' is not true or false", "use true or false"),
        ("--testOnly", "testOnly: has no value", "give true or false"),
        ("--dep 100", "unknown flag dep", "did you mean depth?"),
        ("--augmnt false", "unknown flag augmnt", "did you mean augment?"),
        ("--save", "save: has no value", "give text"),
    ],
)
def test_a_wrong_choice_is_answered_with_the_nearest(line, what, fix):
    ((found, mend),) = refused(line)
    assert what in found
    assert mend.startswith(fix)


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("--depth 41 --bottleneck false", "use 40 or 43"),
        ("--depth 42 --bottleneck false", "use 40 or 43"),
        ("--depth 99", "use 94 or 100"),
        ("--depth 43", "use 40 or 46"),
        ("--depth 1", "use 10"),
        ("--depth 9", "use 10"),
        ("--depth 4 --bottleneck false", "use 7"),
        ("--dataset imagenet --depth 120", "use 121, or give d1 to d4"),
        ("--dataset imagenet --depth 100", "use 121, or give d1 to d4"),
        ("--dataset imagenet --depth 265", "use 264, or give d1 to d4"),
        ("--dataset folder --imageSize 32 --depth 121", "use 118 or 124"),
        ("--netType resnet --depth 100", "use 98 or 104"),
        ("--netType resnet --depth 2", "use 8"),
        ("--netType resnet --depth 1", "use 8"),
        ("--netType preresnet --depth 112", "use 110 or 119"),
        ("--netType preresnet --depth 163", "use 155 or 164"),
        ("--netType preresnet --depth 32", "use 29 or 38, or --bottleneck false"),
        ("--netType preresnet --bottleneck false --depth 33", "use 32 or 38"),
        ("--netType preresnet --depth 3", "use 11"),
        ("--dataset imagenet --netType resnet --depth 20", "use 18"),
        ("--dataset imagenet --netType preresnet --depth 199", "use 200"),
        ("--dataset imagenet --netType resnet --depth 121", "use 101"),
    ],
)
def test_an_impossible_depth_is_answered_with_the_nearest_valid_ones(line, fix):
    ((what, mend),) = refused(line)
    assert what.startswith("depth: ")
    assert mend == fix
    for depth in (word for word in mend.replace(",", "").split() if word.isdigit()):
        before, after = line.split("--depth ")[0], line.split("--depth ")[1].split()[1:]
        assert parse(f"{before} --depth {depth} {' '.join(after)}").depth == int(depth)


def test_every_depth_is_built_or_refused_by_the_papers_formula():
    for layers, bottleneck in ((2, "true"), (1, "false")):
        valid = {3 * layers * n + 4 for n in range(1, 60)}
        for depth in range(1, 130):
            line = f"--depth {depth} --bottleneck {bottleneck}"
            if depth in valid:
                assert sum(parse(line).stages) * layers + 4 == depth
            else:
                refused(line)


RESIDUAL = [("resnet", 2), ("preresnet", 3), ("preresnet --bottleneck false", 2)]


@pytest.mark.parametrize(("name", "layers"), RESIDUAL)
def test_every_depth_of_a_residual_network_is_built_or_refused(name, layers):
    valid = {3 * layers * n + 2 for n in range(1, 60)}
    for depth in range(1, 130):
        line = f"--netType {name} --depth {depth}"
        if depth in valid:
            assert parse(line).stages == ((depth - 2) // (3 * layers),) * 3
        else:
            refused(line)


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ("--imageSize 64", "imageSize: images of cifar10 have 32 pixels, not 64", "use 32 or"),
        ("--dataset digits --imageSize 32", "images of digits have 8 pixels, not 32", "use 8 or"),
        ("--testOnly true", "testOnly without weights", "add --resume DIR or --retrain FILE"),
        ("--tenCrop true", "tenCrop: cifar10 at 32 pixels has no crops", "leave it out"),
        ("--dataset folder --imageSize 64 --tenCrop true", "folder at 64 pixels", "leave it out"),
        ("--dataset synthetic --imageSize 224 --tenCrop true", "tenCrop: syn", "leave it out"),
        ("--epochNumber 5 --resume x", "epochNumber 5 together with resume", "leave out one"),
        ("--epochNumber 301", "epochNumber 301 is after the last epoch, 300", "use 1 to 300"),
        ("--optnet true --shareGradInput true", "shareGradInput and optnet exclude", "keep one"),
        ("--optnet true --optMemory 1", "optMemory and optnet exclude each other", "keep one"),
        ("--optnet true --optMemory 0", "optMemory and optnet exclude each other", "keep one"),
        ("--resetClassifier true", "resetClassifier without weights", "add --retrain FILE"),
        ("--lrShape cosine --milestones 5", "milestones have no effect on a cosine", "leave out"),
        ("--milestones 200,100", "milestones 200,100 are not in order", "use 100,200"),
        ("--nImages 5", "nImages has no effect on cifar10", "leave it out or use --dataset syn"),
        ("--tf32 true --precision half", "tf32 has no effect with precision half", "leave it out"),
        ("--d1 6", "d1 to d4 have no effect at 32 pixels", "use --depth"),
        ("--dataset imagenet --d1 6 --d3 6", "d1 to d4: not all four", "give layers for all four"),
        (
            "--dataset imagenet --depth 121 --d1 1 --d2 1 --d3 1 --d4 1",
            "depth 121",
            "leave out depth or d1 to d4",
        ),
        (
            "--dataset imagenet --depth 169 --d1 6 --d2 12 --d3 24 --d4 16",
            "depth 169 has blocks of 6,12,32,32, d1 to d4 say 6,12,24,16",
            "leave out depth or d1 to d4",
        ),
        ("--reduction 0.001 --depth 10 --growthRate 4", "reduction", ""),
    ],
)
def test_settings_that_exclude_each_other_are_refused(line, what, fix):
    ((found, mend),) = refused(line)
    assert what in found
    assert mend.startswith(fix)


FOREIGN = "growthRate=12 reduction=0.7 dropRate=0.2 initChannels=16 d1=6 d4=6"


@pytest.mark.parametrize("size", ["cifar10", "imagenet"])
@pytest.mark.parametrize("name", ["resnet", "preresnet"])
def test_a_flag_that_describes_a_densenet_is_refused_with_a_residual_network(name, size):
    for flag in FOREIGN.split():
        ((what, fix),) = refused(f"--netType {name} --dataset {size} --{flag}")
        assert what == f"{flag.replace('=', ' ')} has no effect on a {name}"
        assert fix == "leave it out, or use --netType densenet"
    config = " ".join(f"--{flag}" for flag in FOREIGN.split())
    assert len(refused(f"--netType {name} --dataset {size} {config}")) == len(FOREIGN.split())


def test_a_bottleneck_is_refused_where_network_or_depth_decide_about_it():
    ((what, _),) = refused("--netType resnet --bottleneck false")
    assert what == "bottleneck false has no effect on a resnet"
    ((what, fix),) = refused("--netType preresnet --dataset imagenet --bottleneck false")
    assert what == "bottleneck false has no effect on a preresnet of depth 50"
    assert fix == "leave it out: above 64 pixels the depth decides"
    large = parse("--netType preresnet --dataset imagenet --depth 18")
    assert not large.bottleneck and "bottleneck" not in opts.settings(large)
    ((what, _),) = refused("--netType preresnet --dataset imagenet --depth 18 --bottleneck true")
    assert what == "bottleneck true has no effect on a preresnet of depth 18"
    basic = parse("--netType preresnet --depth 20 --bottleneck false")
    assert not basic.bottleneck and opts.settings(basic)["bottleneck"] is False


@pytest.mark.parametrize(
    ("line", "launched", "replicas"),
    [
        ("", 0, 1),
        ("--nGPU 0", 0, 1),
        ("--nGPU 4", 0, 4),
        ("", 1, 1),
        ("", 8, 8),
        ("--nGPU 0", 8, 8),  # on the CPU
        ("--nGPU 4", 8, 8),  # two machines: the launcher's number is of all
    ],
)
def test_replicas_are_those_of_the_launcher_or_a_gpu_each(line, launched, replicas):
    opt = opts.parse(line.split(), launched)
    assert opt.replicas == replicas
    assert "replicas" not in opts.settings(opt)  # how many there are is no setting of a run


@pytest.mark.parametrize(
    ("line", "launched", "batch", "fix"),
    [
        ("", 3, 64, 63),
        ("--nGPU 3", 0, 64, 63),
        ("", 4, 5, 4),
        ("", 4, 7, 8),
        ("", 8, 2, 8),
        ("--dataset imagenet", 6, 256, 258),
    ],
)
def test_a_batch_that_replicas_cannot_share_equally_is_answered_with_the_nearest(
    line, launched, batch, fix
):
    def parsed(size: int, more: str = ""):
        return opts.parse(f"{line} --batchSize {size} {more}".split(), launched)

    with pytest.raises(UsageError) as caught:
        parsed(batch)
    ((what, mend),) = caught.value.problems
    assert what == f"batchSize {batch} over {launched or 3} processes is not a whole number"
    assert mend.startswith(f"use {fix}, or ")
    assert parsed(fix).batchSize == fix
    assert parsed(batch, "--testOnly true --retrain w.pt")  # evaluation deals whole batches


def test_depth_and_blocks_that_are_both_wrong_are_both_reported():
    whats = " ".join(what for what, _ in refused("--depth 41 --d1 6"))
    assert "depth: 41" in whats
    assert "d1 to d4" in whats


@pytest.mark.parametrize(
    "line", ["--dataset imagnet --depth 121", "--config absent.yaml --depth 121"]
)
def test_what_would_be_right_once_a_slip_is_mended_is_no_second_problem(line):
    # 121 layers are impossible on the default dataset only, and "use 118 or 124" leads astray.
    assert len(refused(line)) == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["--resume", "x" * 300],
        ["--resume", "x/" * 3000],
        ["--retrain", "x" * 300],
        ["--dataset", "folder", "--data", "loop"],
        ["--dataset", "folder", "--data", "x" * 300],
        ["--dataset", "imagenet", "--nEpochs", "9" * 40],
        ["--dataset", "imagenet", "--nEpochs", "9" * 17],
    ],
    ids=lambda argv: f"{argv[-2]} {argv[-1][:6]}",
)
def test_no_value_ends_in_a_traceback(argv, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((UsageError, DataError, CheckpointError)) as caught:
        path_checks.check(opts.parse(argv))
    assert "; fix: " in caught.value.report()


def test_a_nul_byte_in_a_path_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text('dataset: folder\ndata: "\\0"\n')
    with pytest.raises((UsageError, DataError)) as caught:
        path_checks.check(parse("--config c.yaml"))
    assert "data" in caught.value.report()


# ---------------------------------------------------------------------------------------- notes


@pytest.mark.parametrize(
    ("line", "notes"),
    [
        ("", []),
        ("-backend nn", ["backend has no effect here"]),
        ("-gen x -optimState y", ["gen has no effect here", "optimState has no effect here"]),
        ("-shortcutType B", ["shortcutType has no effect on a densenet"]),
        ("-netType resnet -shortcutType B", []),
        ("-netType preresnet", []),
        ("-netType preresnet -depth 29", []),
        ("-netType preresnet -depth 110 -bottleneck true", []),
        (
            "-netType preresnet -depth 110",
            ["preresnet of depth 110 has 36 bottlenecks; fb.resnet.torch's has 54 basic blocks: "
             "--bottleneck false"],
        ),
        ("-netType resnet -shareGradInput false -optnet false", []),
        ("-netType resnet -optnet true", ["optnet has no effect on a resnet"]),
        ("-netType resnet -optMemory 4", ["optMemory has no effect on a resnet"]),
        ("-netType preresnet -optMemory auto", ["optMemory has no effect on a preresnet"]),
        ("-netType preresnet -kernels triton", ["kernels has no effect on a preresnet"]),
        # What the flag says is so: nothing is wrong, and yet it decides nothing.
        ("-netType resnet -dropRate 0", ["dropRate has no effect on a resnet"]),
        (
            "-netType resnet -bottleneck true -d1 0",
            ["bottleneck has no effect on a resnet", "d1 has no effect on a resnet"],
        ),
        ("-optnet true", ["optnet is optMemory 1 here"]),
        ("-optnet false", []),
        ("-bottleneck false -reduction 1", []),
        (
            "-bottleneck false",
            ["bottleneck false with reduction 0.5 is a DenseNet-C; "
             "the paper's basic DenseNet has --reduction 1"],
        ),
        ("-syncBN true", ["syncBN has no effect on one process"]),
        ("-syncBN true -nGPU 2", []),
    ],
)  # fmt: skip
def test_a_flag_without_effect_is_remarked_on(line, notes):
    assert parse(line).notes == notes


def test_the_original_names_of_memory_levels_are_one_and_two():
    for name, level in (("optnet", 1), ("shareGradInput", 2)):
        opt = parse(f"-{name} true")
        assert (opt.optMemory, opt.optnet, opt.shareGradInput) == (level, False, False)
        assert opt.notes == [f"{name} is optMemory {level} here"]


@pytest.mark.parametrize("value", [0, 1, 2, 3, 4, "auto"])
def test_every_memory_level_is_taken_and_read_back(value, tmp_path):
    for source in (f"-optMemory {value}", config(tmp_path, f"optMemory: {value}\n")):
        opt = parse(source)
        assert opt.optMemory == value and type(opt.optMemory) is type(value)
        assert opt.notes == []
    assert parse(config(tmp_path, opts.as_yaml(opt))).optMemory == value


# ---------------------------------------------------------------------- names, paths, comparison


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("", "cifar10+-densenet-BC-L100-k12-seed0"),
        ("--augment false", "cifar10-densenet-BC-L100-k12-seed0"),
        ("--bottleneck false --reduction 1", "cifar10+-densenet-L100-k12-seed0"),
        ("--bottleneck false", "cifar10+-densenet-C-L100-k12-seed0"),
        ("--reduction 1", "cifar10+-densenet-B-L100-k12-seed0"),
        ("--dataset svhn --manualSeed 7", "svhn-densenet-BC-L100-k12-seed7"),
        ("--dataset imagenet --depth 161", "imagenet-densenet-BC-L161-k48-seed0"),
        ("--netType resnet", "cifar10+-resnet-L110-seed0"),
        ("--netType resnet --augment false --lrShape cosine", "cifar10-resnet-L110-cosine-seed0"),
        ("--netType preresnet --dataset cifar100", "cifar100+-preresnet-L164-seed0"),
        ("--netType preresnet --shortcutType B", "cifar10+-preresnet-L164-B-seed0"),
        ("--netType preresnet --bottleneck false --depth 20", "cifar10+-preresnet-L20-basic-seed0"),
        ("--netType resnet --shortcutType C --depth 20", "cifar10+-resnet-L20-C-seed0"),
        ("--dataset imagenet --netType resnet --shortcutType B", "imagenet-resnet-L50-seed0"),
        ("--dataset imagenet --netType resnet --shortcutType A", "imagenet-resnet-L50-A-seed0"),
        ("--dataset folder --data /a/cats/", "folder-cats-densenet-BC-L121-k32-seed0"),
    ],
)
def test_a_run_is_named_after_what_it_trains(line, name):
    assert parse(line).save == f"checkpoints/{name}"


def folder(root, *directories):
    for directory in directories:
        (root / directory).mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("line", "error", "code", "what", "fix"),
    [
        ("--resume gone", CheckpointError, 4, "resume: no such file or directory: gone", "name a"),
        ("--retrain gone", CheckpointError, 4, "retrain: no such file: gone", "name a file"),
        ("--retrain empty", CheckpointError, 4, "retrain: no such file: empty", "name a file"),
        ("--dataset imagenet --data gone", DataError, 3, "no directory gone", "use --data DIR"),
        ("--dataset folder --data empty", DataError, 3, "no directory empty/train", "train/CLASS"),
        ("--dataset folder --data half", DataError, 3, "no directory half/val", "val/CLASS/IMAGE"),
        ("--dataset folder --data bare", DataError, 3, "no class directories in bare/val", "val/"),
    ],
)
def test_a_missing_path_is_named_before_anything_is_loaded(line, error, code, what, fix, tmp_path):
    folder(tmp_path, "empty", "half/train/a", "bare/train/a", "bare/val")
    with pytest.raises(error) as caught:
        path_checks.check(parse(line))
    assert caught.value.code == code
    ((found, mend),) = caught.value.problems
    assert found == what
    assert fix in mend


def test_paths_that_are_there_are_accepted(tmp_path):
    folder(tmp_path, "good/train/a", "good/val/a", "run")
    (tmp_path / "w.pt").touch()
    line = "--dataset folder --data good --resume run --retrain w.pt"
    assert path_checks.check(parse(line)) is None
    assert path_checks.check(parse("--resume auto")) is None


def test_only_the_first_process_needs_the_files_that_it_reads_for_all(tmp_path):
    for line in ("--resume gone", "--retrain gone"):
        assert path_checks.check(parse(line), is_first=False) is None
        with pytest.raises(CheckpointError):
            path_checks.check(parse(line), is_first=True)
    with pytest.raises(DataError, match="no directory gone"):  # images are read by each
        path_checks.check(parse("--dataset folder --data gone"), is_first=False)


def test_two_settings_are_compared_by_what_a_difference_means():
    mine, theirs = (opts.settings(parse(line)) for line in ("--LR 1", "--depth 40 --nThreads 7"))
    assert opts.differences(mine, theirs, "model") == [("depth", "100", "40")]
    assert opts.differences(mine, theirs, "training") == [("LR", "1.0", "0.1")]
    assert opts.differences(mine, mine, "training") == []


def test_settings_of_an_older_densenet_are_no_difference_and_those_of_a_resnet_are():
    mine = opts.settings(parse(""))
    assert "shortcutType" not in mine
    # As experiment/resume.py reads them: what a checkpoint does not know has its default.
    theirs = {name: flag.default for name, flag in opts.FLAGS.items()} | mine
    assert opts.differences(mine, theirs, "model") == []
    assert opts.differences(mine, theirs | {"shortcutType": "B"}, "model") == []
    assert opts.differences(mine, theirs | {"growthRate": 24}, "model") == [
        ("growthRate", "12", "24")
    ]

    mine = opts.settings(parse("--netType resnet"))
    assert not set(ARCHITECTURES["resnet"].unused_flags) & set(mine)
    theirs = {name: flag.default for name, flag in opts.FLAGS.items()} | mine
    assert opts.differences(mine, theirs, "model") == []
    assert opts.differences(mine, theirs | {"shortcutType": "B"}, "model") == [
        ("shortcutType", "A", "B")
    ]
    names = [name for name, *_ in opts.differences(mine, opts.settings(parse("")), "model")]
    assert names == ["netType", "depth", "shortcutType"]


def test_an_experiment_is_its_settings_without_the_procedure():
    one, other = (opts.training_settings(parse(f"--{name} 7")) for name in ("nThreads", "keep"))
    assert one == other
    assert one != opts.training_settings(parse("--manualSeed 7"))


# ---------------------------------------------------------------------------- printConfig, --help

LINES = (
    "",
    LUA,
    f"{LUA} -backend nn -gen x -optimState y -shortcutType A -optnet true",
    "-shareGradInput true -nGPU 0 -dataset cifar100",
    "--dataset svhn --manualSeed 9223372036854775807",
    "--dataset imagenet --depth 161 --tenCrop true --data /d",
    "--dataset imagenet --nEpochs 20",
    "--dataset imagenet --d1 1 --d2 2 --d3 3 --d4 4 --bottleneck false",
    "--dataset folder --data /a/b --imageSize 32 --nClasses 3 --validSize 5 --onBadImage skip",
    "--dataset synthetic --imageSize 8 --nImages 7 --LR 1e-5 --weightDecay 0 --momentum 0",
    "--dataset digits --augment true --dropRate 0.123456789012345678",
    "--lrShape cosine --LR 1e16 --saveEvery 0.1 --keep 3 --override true",
    "--lrShape cosine --milestones []",
    "--milestones 1,2,300 --precision bf16 --cudnn deterministic --debug true",
    "--retrain w.pt --resetClassifier true --epochNumber 3 --save 010",
    "--testOnly true --retrain true --save [] --data ~",
    "--bottleneck false --reduction 1 --initChannels 3 --tf32 true --optMemory 0",
    "--optMemory auto --kernels triton --cudaGraph false",
    "--optMemory 4 --kernels torch --cudaGraph true",
    "--save=a,b:#c --data=!!python/none --resume auto",
    "--netType resnet -optMemory 4 -kernels triton",
    "--netType preresnet --depth 20 --shortcutType C --dataset svhn",
    "--dataset imagenet --netType preresnet --depth 200 --syncBN true --nGPU 2",
)


@pytest.mark.parametrize("line", LINES)
def test_printed_settings_read_back_as_the_same(line, tmp_path):
    opt = parse(line)
    again = parse(config(tmp_path, opts.as_yaml(opt)))
    assert opts.settings(again) | {"config": "none"} == opts.settings(opt)
    assert (again.stages, again.imagenetShape) == (opt.stages, opt.imagenetShape)
    other = parse(config(tmp_path, opts.as_yaml(opt)) + " --manualSeed 5")
    assert opts.settings(other) != opts.settings(again)


@pytest.mark.parametrize(
    "value", ["a b", " a ", "a\nb", "'", '"', "\udc80", "é", "x " * 900, "- a"]
)
def test_printed_paths_read_back_whatever_they_hold(value, tmp_path):
    opt = opts.parse(["--save", value])
    assert parse(config(tmp_path, opts.as_yaml(opt))).save == value


def test_a_runs_config_leaves_out_what_belongs_to_one_call():
    line = "--resume auto --debug true --override true --save s --depth 40"
    written = opts.as_yaml(parse(line), exclude=opts.NOT_SAVED)
    keys = [row.split(":")[0] for row in written.splitlines()]
    assert "depth" in keys
    assert not set(opts.NOT_SAVED) & set(keys)


def test_help_names_every_flag_in_its_group_with_its_meaning_and_default():
    text = opts.help_text(opts.USAGE, opts.GROUPS)
    assert max(map(len, text.splitlines())) <= 100
    for title, flags in opts.GROUPS.items():
        section = text.split(f"\n{title}:\n")[1].split("\n\n")[0]
        entries = ["  --" + entry for entry in section.split("  --")[1:]]
        assert [entry.split()[0] for entry in entries] == [f"--{flag.name}" for flag in flags]
        for flag, entry in zip(flags, entries, strict=True):
            words = " ".join(entry.split())
            assert flag.help in words
            assert words.endswith(f"[{flag.default_note or as_text(flag.default)}]")
            assert all(str(choice) in words for choice in flag.choices)


@pytest.mark.parametrize("line", ["-h", "-help", "--help", "--depth 41 --nosuch 1 --help"])
def test_help_answers_whatever_else_is_asked(line, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(line)
    assert caught.value.code == 0
    assert capsys.readouterr().out == opts.help_text(opts.USAGE, opts.GROUPS) + "\n"


# ------------------------------------------------------------------------------------ the program


def started(*argv: str) -> tuple[int, str, str, set[str]]:
    """Exit code, output, errors and imported modules of a real `python main.py`."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "main.py"), *argv],
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stderr.splitlines()
    timed = [line for line in lines if line.startswith("import time:")]
    errors = "".join(line + "\n" for line in lines if line not in timed)
    return done.returncode, done.stdout, errors, {line.split("|")[-1].strip() for line in timed}


HEAVY = {"torch", "numpy", "torchvision", "sklearn", "PIL"}


def test_help_starts_nothing_heavy():
    code, out, errors, modules = started("--help")
    assert (code, errors) == (0, "")
    assert out == opts.help_text(opts.USAGE, opts.GROUPS) + "\n"
    assert "opts" in modules  # the list is real
    assert not modules & {*HEAVY, "yaml"}


def test_a_mistyped_flag_and_config_are_answered_before_anything_heavy_is_loaded(tmp_path):
    line = config(tmp_path, "depht: 40\n") + " --growthrate 12"
    code, out, errors, modules = started(*line.split())
    assert (code, out) == (2, "")
    assert errors.splitlines() == [
        "error: unknown flag growthrate (command line); fix: did you mean growthRate?",
        f"error: unknown flag depht ({tmp_path / 'c.yaml'}, line 1); fix: did you mean depth?",
    ]
    assert "yaml" in modules  # what is imported late is seen too
    assert not modules & HEAVY
    assert not (tmp_path / "checkpoints").exists()


def test_the_program_prints_its_settings_and_does_nothing_else(tmp_path):
    done = run(f"{LUA} --printConfig --save {tmp_path / 'run'}")
    assert (done.code, done.err) == (0, "")
    (tmp_path / "c.yaml").write_text(done.out)
    again = run(f"--config {tmp_path / 'c.yaml'} --printConfig")
    assert again.out == done.out
    assert run("--depth 40 --printConfig").out != done.out
    assert not (tmp_path / "run").exists()


def test_the_program_says_a_missing_path_in_one_line(tmp_path):
    for line, code in (("--resume gone", 4), ("--dataset imagenet --data gone", 3)):
        done = run(f"{line} --save {tmp_path / 'run'}")
        assert (done.code, done.out) == (code, "")
        assert len(done.err.splitlines()) == 1
        assert done.err.startswith("error: ") and "; fix: " in done.err
        assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------- fuzzing

VALUES = (
    "0 1 -1 2 0.5 1e-4 nan inf -inf 40 100 121 161 1e400 true false none auto cosine half "
    "multistep cifar10 svhn imagenet folder digits synthetic 5,6 [] , . .. / ~ \udc80 é x=y "
    "99999999999999999999"
)
WORDS = [*opts.FLAGS, "depht", "help", "h", "", "-", "paper", "é"]
YAML_MARKS = "\n\n  :-,[]{}&*!'\"#?\t|>%@`<\\\x07"


def outcome(argv: list[str]) -> str:
    """How a command line ends; anything but these is an exception that escapes."""
    try:
        opt = opts.parse(argv)
    except SystemExit as end:
        assert end.code == 0
        return "help"
    except UsageError as error:
        assert error.problems
        assert all(what and fix for what, fix in error.problems)
        return "refused"
    opts.as_yaml(opt)
    return "read"


def test_no_command_line_escapes_the_parser():
    draw = random.Random(0)
    values, names = VALUES.split(), list(opts.FLAGS)
    seen = []
    for _ in range(2000):
        argv = []
        for _ in range(draw.randrange(4)):
            name = draw.choice(names if draw.random() < 0.9 else WORDS)
            joined = draw.random() < 0.2
            value = draw.choice(values)
            argv += [f"--{name}={value}"] if joined else [f"-{name}", value][: draw.choice([1, 2])]
        seen.append(outcome(argv))
    assert set(seen) == {"read", "refused", "help"}
    assert min(seen.count("read"), seen.count("refused")) > 200


def test_no_config_file_escapes_the_parser(tmp_path):
    draw = random.Random(1)
    path, values = tmp_path / "c.yaml", VALUES.split()
    seen = []
    for _ in range(500):
        if draw.random() < 0.5:
            content = f"{draw.choice(WORDS)}: {draw.choice(values)}\n" * draw.choice([1, 1, 2])
        else:
            content = "".join(draw.choice([*YAML_MARKS, *WORDS, *values]) for _ in range(20))
        path.write_text(content, errors="surrogateescape")
        seen.append(outcome(["--config", str(path)]))
    assert set(seen) == {"read", "refused"}
    assert min(seen.count("read"), seen.count("refused")) > 20


def test_every_settings_that_is_read_prints_and_reads_back(tmp_path):
    draw = random.Random(2)
    values, checked = VALUES.split(), 0
    for _ in range(500):
        argv = [word for name in draw.sample(list(opts.FLAGS), 2)
                for word in (f"--{name}", draw.choice(values))]  # fmt: skip
        if "--config" not in argv and outcome(argv) == "read":
            opt = opts.parse(argv)
            again = parse(config(tmp_path, opts.as_yaml(opt)))
            silent = {"config": "none", "printConfig": opt.printConfig}
            assert opts.settings(again) | silent == opts.settings(opt), argv
            checked += 1
    assert checked > 20
