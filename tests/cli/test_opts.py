"""Test the settings of a command line: defaults, precedence, rules between flags, back to YAML."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

import opts
from cli import path_checks
from cli.flag_types import as_text
from errors import CheckpointError, DataError, UsageError
from helpers.run_main import ROOT
from models.registry import ARCHITECTURES

LUA = "-netType densenet -dataset cifar10 -batchSize 64 -nEpochs 300 -depth 100 -growthRate 12"


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parse(line: str, world_size: int = 0):
    return opts.parse(line.split(), world_size)


def refused(line: str, world_size: int = 0) -> list[tuple[str, str]]:
    """Return the problems of a refused command line, each reported as one line."""
    with pytest.raises(UsageError) as caught:
        parse(line, world_size)
    lines = caught.value.report().splitlines()
    assert caught.value.code == 2
    assert len(lines) == len(caught.value.problems)
    assert all(line.startswith("error: ") and "; fix: " in line for line in lines)
    return caught.value.problems


def config(tmp_path, text: str, name: str = "c.yaml") -> str:
    (tmp_path / name).write_text(text)
    return f"--config {tmp_path / name}"


# Defaults:
# Section 1 of docs/parity.md, in its order, on CIFAR-10; then the flags that the original lacks.
DEFAULTS = {
    "data": "data", "dataset": "cifar10", "manualSeed": 0, "nGPU": None, "backend": "cudnn",
    "cudnn": "fastest", "gen": "gen", "precision": "single", "nThreads": 2, "nEpochs": 300,
    "epochNumber": 1, "batchSize": 64, "testOnly": False, "tenCrop": False,
    "save": "checkpoints/cifar10+-densenet-BC-L100-k12-seed0", "resume": "none", "LR": 0.1,
    "momentum": 0.9, "weightDecay": 1e-4, "lrShape": "multistep", "netType": "densenet",
    "depth": 100, "shortcutType": None, "retrain": "none", "optimState": "none",
    "shareGradInput": False, "optnet": False, "resetClassifier": False, "nClasses": None,
    "growthRate": 12, "bottleneck": True, "reduction": 0.5, "dropRate": 0.0, "optMemory": 2,
    "d1": 0, "d2": 0, "d3": 0, "d4": 0,
    "config": "none", "printConfig": False, "debug": False, "tf32": False, "augment": True,
    "validSize": 0, "imageSize": 32, "nImages": 10000, "onBadImage": "error",
    "exifRotate": False, "whiteLevel": None, "resize": "antialias", "maxPixels": 2**26,
    "maxAspect": 100.0, "keep": 2,
    "saveEvery": 10.0, "override": False, "milestones": [150, 225], "initChannels": 24,
    "kernels": "auto", "cudaGraph": "auto", "syncBN": False, "timeout": 50.0,
    "nChannels": 3, "inputRange": None, "bnEps": 1e-5, "adaptChannels": False,
    "from": None, "paddleDropout": 0.0,
    "nesterov": True, "lrDecay": 0.1, "warmupSteps": 0, "loss": "crossEntropy", "auxWeight": 0.1,
    "preprocess": "normalise", "widen": None, "columns": None, "stochasticDepth": 1.0,
    "dropPath": 0.0,
}  # fmt: skip


def test_the_defaults_are_the_papers():
    opt = vars(parse(""))
    assert {name: opt[name] for name in opts.FLAGS} == DEFAULTS
    assert (opt["stages"], opt["replicas"], opt["notes"]) == ((16, 16, 16), 1, [])


IMAGENET = (
    "nEpochs=90 batchSize=256 depth=121 growthRate=32 initChannels=64 imageSize=224 "
    "milestones=31,61 dropRate=0.0 augment=true"
)
RESNET = (
    "nEpochs=164 batchSize=64 milestones=81,122 shortcutType=A dropRate=0.0 depth=110 "
    "stages=18,18,18 bottleneck=false"
)
LARGE_RESNET = (
    "depth=50 nEpochs=90 batchSize=256 milestones=31,61 shortcutType=B bottleneck=true "
    "imageSize=224"
)
DEPENDENT = [
    ("--dataset cifar100", "nEpochs=300 batchSize=64 depth=100 imageSize=32"),
    ("--dataset svhn", "nEpochs=40 batchSize=64 depth=100 growthRate=12 augment=false dropRate=0.2 "
     "validSize=6000 milestones=20,30 imageSize=32"),
    ("--dataset svhn --augment true", "dropRate=0.0 validSize=6000"),
    ("--dataset imagenet", IMAGENET),
    ("--dataset folder", IMAGENET),
    ("--dataset synthetic --imageSize 224", IMAGENET),
    ("--dataset synthetic", "nEpochs=300 imageSize=32 depth=100 augment=true"),
    ("--dataset folder --imageSize 64", "nEpochs=300 batchSize=64 depth=100 augment=true"),
    ("--dataset folder --imageSize 65", "nEpochs=90 batchSize=256 depth=121"),
    ("--dataset digits", "imageSize=8 augment=false dropRate=0.2 nEpochs=300"),
    ("--dataset imagenet --depth 161", "growthRate=48 nEpochs=100 batchSize=128 initChannels=96 "
     "milestones=31,61,91"),
    ("--dataset imagenet --depth 232", "growthRate=48 nEpochs=90 batchSize=256"),
    ("--dataset imagenet --depth 264", "growthRate=32 nEpochs=90"),
    ("--dataset imagenet --nEpochs 20", "milestones=[]"),
    ("--dataset imagenet --bottleneck false", "initChannels=64"),
    ("--augment false", "dropRate=0.2"),
    ("--augment false --dropRate 0", "dropRate=0.0"),
    ("--bottleneck false --growthRate 24", "initChannels=16"),
    ("--growthRate 40", "initChannels=80"),
    ("--growthRate 40 --initChannels 7", "initChannels=7"),
    ("--lrShape cosine", "milestones="),
    ("--shortcutType C", "shortcutType="),
    ("--netType resnet --augment false", RESNET),
    ("--netType preresnet --dataset cifar100", "depth=164 bottleneck=true stages=18,18,18 "
     "nEpochs=164 milestones=81,122 shortcutType=A"),
    ("--netType resnet --dataset svhn", "nEpochs=40 milestones=20,30 validSize=6000 dropRate=0.0"),
    ("--netType resnet --dataset imagenet", LARGE_RESNET),
    ("--netType preresnet --dataset imagenet", LARGE_RESNET),
    ("--netType resnet --shortcutType C", "shortcutType=C"),
    # The networks of Table 2: settings of their papers or their authors' files.
    ("--netType dsn --loss crossEntropy --LR 0.2 --lrDecay 0.5", "loss=crossEntropy LR=0.2 "
     "lrDecay=0.5 weightDecay=0.0005"),
    ("--netType fractalnet --dataset svhn", "nEpochs=40 milestones=21,31,36,38"),
    ("--netType resnet --stochasticDepth 0.5", RESNET),
    ("-optnet true", "optMemory=1 optnet=false"),
    ("-shareGradInput true", "optMemory=2 shareGradInput=false"),
]  # fmt: skip
STAGES = [
    ("--dataset imagenet", "6,12,24,16"),
    ("--dataset imagenet --depth 161", "6,12,36,24"),
    ("--dataset imagenet --depth 169", "6,12,32,32"),
    ("--dataset imagenet --depth 201", "6,12,48,32"),
    ("--dataset imagenet --depth 232", "6,12,48,48"),
    ("--dataset imagenet --depth 264", "6,12,64,48"),
    ("--dataset imagenet --d1 1 --d2 2 --d3 3 --d4 4", "1,2,3,4"),
    ("--dataset imagenet --d1 6 --d2 12 --d3 24 --d4 16 --depth 121", "6,12,24,16"),
    # 2 (6 + 12 + 20 + 20) + 5 is 121 as well, but the four flags win.
    ("--dataset imagenet --d1 6 --d2 12 --d3 20 --d4 20", "6,12,20,20"),
    # From fb.resnet.torch.
    *((f"--dataset imagenet --netType {name} --depth {depth}", stages)
      for name in ("resnet", "preresnet")
      for depth, stages in ((18, "2,2,2,2"), (34, "3,4,6,3"), (50, "3,4,6,3"), (101, "3,4,23,3"),
                            (152, "3,8,36,3"), (200, "3,24,36,3"))),
]  # fmt: skip
NAMES = [
    ("--augment false", "cifar10-densenet-BC-L100-k12-seed0"),
    ("--bottleneck false --reduction 1", "cifar10+-densenet-L100-k12-seed0"),
    ("--bottleneck false", "cifar10+-densenet-C-L100-k12-seed0"),
    ("--reduction 1", "cifar10+-densenet-B-L100-k12-seed0"),
    ("--dataset svhn --manualSeed 7", "svhn-densenet-BC-L100-k12-seed7"),
    ("--dataset imagenet --depth 161", "imagenet-densenet-BC-L161-k48-seed0"),
    ("--netType resnet --augment false --lrShape cosine", "cifar10-resnet-L110-cosine-seed0"),
    ("--netType preresnet --shortcutType B", "cifar10+-preresnet-L164-B-seed0"),
    ("--netType preresnet --bottleneck false --depth 20", "cifar10+-preresnet-L20-basic-seed0"),
    ("--dataset imagenet --netType resnet --shortcutType B", "imagenet-resnet-L50-seed0"),
    ("--netType nin-svhn --dataset svhn", "svhn-nin-svhn-L9-seed0"),
    ("--netType dsn --widen 0.25", "cifar10+-dsn-L9-w0.25-seed0"),
    ("--netType wideresnet", "cifar10+-wideresnet-L28-x10-seed0"),
    (
        "--netType wideresnet --depth 16 --widen 2.5 --shortcutType A",
        "cifar10+-wideresnet-L16-A-x2.5-seed0",
    ),
    ("--netType resnet --stochasticDepth 0.5", "cifar10+-resnet-L110-sd-seed0"),
    ("--netType fractalnet --dropPath 0.15", "cifar10+-fractalnet-L21-droppath-seed0"),
    ("--netType fractalnet --columns 1 --widen 2", "cifar10+-fractalnet-L21-w2.0-columns1-seed0"),
    ("--dataset folder --data /a/cats/", "folder-cats-densenet-BC-L121-k32-seed0"),
]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        *DEPENDENT,
        *((line, f"stages={stages}") for line, stages in STAGES),
        *((line, f"save=checkpoints/{name}") for line, name in NAMES),
    ],
)
def test_a_default_that_depends_follows_what_it_depends_on(line, expected):
    opt = parse(line)
    for name, value in (word.split("=") for word in expected.split()):
        assert as_text(getattr(opt, name)) == value, name


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


def test_replicas_are_those_of_the_launcher_or_a_gpu_each():
    for line, replicas in (("", 1), ("--nGPU 0", 1), ("--nGPU 4", 4)):
        assert parse(line).replicas == replicas
        assert parse(line, 1).replicas == 1
        assert parse(line, 8).replicas == 8  # on the CPU, or on several machines
    assert "replicas" not in opts.settings(parse(""))


# Precedence:
def test_command_line_beats_config_beats_run_beats_default(tmp_path):
    (tmp_path / "config.yaml").write_text("LR: 0.1\nmomentum: 0.2\nbatchSize: 3\nsave: elsewhere\n")
    line = config(tmp_path, "LR: 0.4\nmomentum: 0.5\n") + f" --LR 0.7 --resume {tmp_path}"
    opt = parse(line)
    assert (opt.LR, opt.momentum, opt.batchSize, opt.nThreads) == (0.7, 0.5, 3, 2)
    assert opt.save == "elsewhere"


def test_a_resumed_directory_is_continued_with_the_settings_it_has(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("depth: 40\nepochNumber: 5\nmilestones: [3]\n")
    for resume in (run, run / "checkpoint_000000007.pt"):
        opt = parse(f"--resume {resume}")
        assert (opt.depth, opt.save, opt.milestones) == (40, str(run), [3])
        assert opt.epochNumber == 1  # the checkpoint knows the epoch
    # Milestones are replaced together with the shape that they belong to.
    assert parse(f"--resume {run} --lrShape cosine").milestones is None
    assert parse(f"--resume {run} --save other").save == "other"
    assert parse(f"--resume {tmp_path}").depth == 100  # no settings there
    assert parse("--resume auto").depth == 100


def test_three_names_of_one_setting_obey_the_same_order(tmp_path):
    assert parse(config(tmp_path, "optMemory: 0\n") + " -optnet true").optMemory == 1
    assert parse(config(tmp_path, "optnet: true\n") + " -optMemory 0").optMemory == 0
    line = "-depth 40 -optnet true -dataset cifar10"
    (tmp_path / "config.yaml").write_text(opts.as_yaml(parse(line), exclude=opts.NOT_SAVED))
    assert parse(f"{line} --resume {tmp_path}").optMemory == 1


def test_a_problem_in_a_file_is_shown_with_its_line(tmp_path):
    (tmp_path / "config.yaml").write_text("LR: 1\ndeth: 40\n")
    where = tmp_path / "config.yaml"
    assert refused(f"--resume {tmp_path}") == [
        (f"unknown flag deth ({where}, line 2)", "did you mean depth?")
    ]
    ((what, _),) = refused(config(tmp_path, "depth: 40\nconfig: other.yaml\n"))
    assert what == f"config: a config file cannot name another ({tmp_path / 'c.yaml'}, line 2)"


# Refusals:
def test_every_problem_is_reported_at_once(tmp_path):
    bad = config(tmp_path, "depth: 41\nLR: -1\nLR: 2\nprecison: half\ntf32: true\nd1: 6\n")
    problems = refused(f"{bad} --growthrate 12 --precision half --testOnly true 7")
    words = ("'7'", "unknown flag growthrate", "LR: '-1'", "LR is given twice", "precison", "d1 to",
             "depth: 41", "testOnly without", "tf32 has no effect")  # fmt: skip
    assert all(word in what for word, (what, _) in zip(words, problems, strict=True))


def test_no_rule_is_checked_against_a_setting_that_could_not_be_read():
    # 121 layers are impossible on the default dataset only, so "use 118 or 124" would mislead.
    for line in ("--dataset imagnet --depth 121", "--config absent.yaml --depth 121"):
        assert len(refused(line)) == 1


RANGES = [
    ("of at least 0 and of at most 9223372036854775807", "manualSeed", f"-1 {2**63} 0.5"),
    ("of at least 0", "nGPU nThreads validSize d1 d4", "-1 0.5 x"),
    ("of at least 8 and of at most 4096", "imageSize", "0 7 4097"),
    ("of at least 1", "nEpochs epochNumber batchSize nClasses growthRate depth", "0 -1 1.5 nan"),
    ("of at least 1", "initChannels nImages nChannels keep milestones columns", "0 -1 1.5 inf"),
    ("above 0", "LR saveEvery timeout bnEps widen", "0 -1 nan inf -inf 1e400"),
    (
        "LOW,HIGH, the lower one first",
        "inputRange",
        "1 1,0 1,1 0,1,2 nan,1 0,-inf 0,inf -1e308,1e308 a,b , []",
    ),
    ("of at least 0 and below 1", "momentum dropRate dropPath", "1 -0.1 2 nan inf"),
    ("of at least 0", "weightDecay auxWeight warmupSteps", "-1 -1e-9 nan inf"),
    ("above 0 and of at most 1", "reduction stochasticDepth lrDecay", "0 1.5 -0.5 nan"),
]


@pytest.mark.parametrize(
    ("interval", "name", "values"),
    [(interval, name, values) for interval, names, values in RANGES for name in names.split()],
)
def test_a_value_out_of_range_is_answered_with_the_range(interval, name, values):
    for value in values.split():
        ((what, fix),) = refused(f"--{name} {value}")
        assert what.startswith(f"{name}: '{value}' is ")
        assert f" {interval}" in fix


def test_the_ends_of_the_ranges_are_inside():
    parse("--growthRate 1 --reduction 1 --dropRate 0 --momentum 0 --weightDecay 0 --LR 1e-9")
    parse(f"--manualSeed {2**63 - 1} --nEpochs 1 --batchSize 1 --nClasses 1 --keep 1 --nGPU 0")
    parse("--dropRate 0.999 --momentum 0.999 --initChannels 1 --saveEvery 0.01 --milestones 1")
    parse("--dataset synthetic --imageSize 8 --nImages 1")
    parse("--dataset synthetic --imageSize 4096 --nThreads 0 --validSize 0")


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("--depth 41 --bottleneck false", "use 40 or 43"),
        ("--depth 99", "use 94 or 100"),
        ("--depth 9", "use 10"),
        ("--dataset imagenet --depth 100", "use 121, or give d1 to d4"),
        ("--dataset folder --imageSize 32 --depth 121", "use 118 or 124"),
        ("--netType resnet --depth 100", "use 98 or 104"),
        ("--netType resnet --depth 2", "use 8"),
        ("--netType preresnet --depth 32", "use 29 or 38, or --bottleneck false"),
        ("--netType preresnet --depth 3", "use 11"),
        ("--dataset imagenet --netType resnet --depth 20", "use 18"),
        ("--netType wideresnet --depth 27", "use 22 or 28"),
        ("--netType nin --depth 10", "use 9"),
        ("--netType fractalnet --depth 40", "use 41"),
    ],
)
def test_an_impossible_depth_is_answered_with_the_nearest_valid_ones(line, fix):
    ((what, found),) = refused(line)
    assert what.startswith("depth: ")
    assert found == fix
    for depth in (word for word in fix.replace(",", "").split() if word.isdigit()):
        before, _, after = line.partition("--depth ")
        assert parse(f"{before} --depth {depth} {after.partition(' ')[2]}").depth == int(depth)


@pytest.mark.parametrize(
    ("line", "layers", "extra"),
    [
        ("--bottleneck true", 2, 4),
        ("--bottleneck false", 1, 4),
        ("--netType resnet", 2, 2),
        ("--netType preresnet", 3, 2),
        ("--netType preresnet --bottleneck false", 2, 2),
        ("--netType wideresnet", 2, 4),
    ],
)
def test_every_depth_is_built_or_refused_by_the_papers_formula(line, layers, extra):
    valid = {3 * layers * n + extra: (n, n, n) for n in range(1, 60)}
    for depth in range(1, 130):
        if depth in valid:
            assert parse(f"{line} --depth {depth}").stages == valid[depth]
        else:
            refused(f"{line} --depth {depth}")


DENSENET_FLAGS = "growthRate=12 reduction=0.7 dropRate=0.2 initChannels=16 d1=6 d4=6"
LEAVE_OUT = "leave it out, or use --netType densenet"


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        # Names
        ("--dataset imagnet", "dataset: 'imagnet' is not one of", "use imagenet"),
        ("--netType resnt", "'resnt' is not one of densenet, resnet, preresnet", "use resnet"),
        # Images, and what is evaluated on them
        ("--imageSize 64", "imageSize: images of cifar10 have 32 pixels, not 64", "use 32 or"),
        ("--testOnly true", "testOnly without weights", "add --resume DIR or --retrain FILE"),
        ("--tenCrop true", "tenCrop: cifar10 at 32 pixels has no crops", "leave it out"),
        ("--dataset synthetic --imageSize 224 --tenCrop true", "tenCrop: syn", "leave it out"),
        # First epoch, weights, learning rate
        ("--epochNumber 5 --resume x", "epochNumber 5 together with resume", "leave out one"),
        ("--epochNumber 301", "epochNumber 301 is after the last epoch, 300", "use 1 to 300"),
        ("--optnet true --shareGradInput true", "shareGradInput and optnet exclude", "keep one"),
        ("--optnet true --optMemory 0", "optMemory and optnet exclude each other", "keep one"),
        ("--resetClassifier true", "resetClassifier without weights", "add --retrain FILE"),
        ("--resetClassifier true --testOnly true --retrain x", "would test a random classifier",
         "leave it out"),
        ("--lrShape cosine --milestones 5", "milestones have no effect on a cosine", "leave out"),
        ("--milestones 200,100", "milestones 200,100 are not in order", "use 100,200"),
        # Images and numbers in a batch
        ("--nImages 5", "nImages has no effect on cifar10", "leave it out or use --dataset syn"),
        ("--nChannels 4", "nChannels: images of cifar10 have 3 channels, or 1 in grey, not 4",
         "use 1 or 3; --dataset synthetic makes any number"),
        ("--adaptChannels true", "adaptChannels without weights", "add --retrain FILE"),
        ("--from keras", "from without weights to retrain", "add --retrain FILE"),
        ("--retrain a.h5 --from kera", "from: 'kera' is not one of torchvision", "use keras"),
        ("--retrain a.h5 --paddleDropout 1", "paddleDropout: '1' is out", "use a number"),
        ("--tf32 true --precision half", "tf32 has no effect with precision half", "leave it out"),
        # Network
        ("--d1 6", "d1 to d4 have no effect at 32 pixels", "use --depth"),
        ("--dataset imagenet --d1 6 --d3 6", "d1 to d4: not all four", "give layers for all four"),
        ("--dataset imagenet --depth 121 --d1 1 --d2 1 --d3 1 --d4 1",
         "depth 121 has blocks of 6,12,24,16, d1 to d4 say 1,1,1,1", "leave out depth or d1 to d4"),
        ("--reduction 0.001 --depth 10 --growthRate 4",
         "reduction: 0.001 leaves no feature maps after block 1", "use 0.5"),
        ("--reduction 0.2 --depth 10 --growthRate 1 --initChannels 8",
         "reduction: 0.2 leaves no feature maps after block 2", "use 0.5"),
        ("--cudaGraph true --netType resnet --stochasticDepth 0.5", "cudaGraph true: what is drawn",
         "leave it out, or stochasticDepth and dropPath"),
        ("--cudaGraph true --netType fractalnet --dropPath 0.1", "cudaGraph true", "leave it out"),
        ("--netType fractalnet --columns 4", "columns: a fractalnet of depth 21 has 3, not 4",
         "use 1 to 3"),
        ("--netType fractalnet --dataset folder --imageSize 16",
         "imageSize: fractalnet needs at least 32 pixels, not 16", "use another --imageSize"),
        ("--netType allcnn --dataset digits", "imageSize: allcnn needs at least 9",
         "use another --dataset"),
        ("--netType nin --widen 0.001", "widen: 0.001 leaves no channels of 64",
         "use at least 0.0"),
        ("--netType nin --dataset imagenet", "imageSize: a nin is for images of up to 64 pixels",
         "use another --imageSize, or --netType densenet"),
        *((f"--netType {name} --{flag}", f"{flag.replace('=', ' ')} has no effect on a {name}",
           f"leave it out, or use --netType {reader}") for name, flag, reader in (
            ("densenet", "widen=2.0", "wideresnet"), ("densenet", "stochasticDepth=0.5", "resnet"),
            ("nin", "auxWeight=0.2", "dsn"), ("dsn", "columns=1", "fractalnet"),
            ("resnet", "widen=2.0", "wideresnet"), ("highway", "growthRate=12", "densenet"),
            ("fractalnet", "bottleneck=false", "densenet"), ("nin", "syncBN=true", "densenet"))),
        *((f"--dataset folder --imageSize 64 --preprocess {kind}",
           f"preprocess {kind} of images of 64 pixels", "use --imageSize 32 or less, or --pre")
          for kind in ("gcn", "zca")),
        ("--preprocess gcn --inputRange 0,1", "inputRange has no effect with preprocess gcn",
         "leave out one of them"),
        ("--netType resnet --bottleneck false", "bottleneck false has no effect on a resnet",
         LEAVE_OUT),
        *((f"--netType preresnet --dataset imagenet --depth {depth} --bottleneck {value}",
           f"bottleneck {value} has no effect on a preresnet of depth {depth}",
           "leave it out: above 64 pixels the depth decides")
          for depth, value in ((50, "false"), (18, "true"))),
        *((f"--netType {name} --dataset {dataset} --{flag}",
           f"{flag.replace('=', ' ')} has no effect on a {name}", LEAVE_OUT)
          for name in ("resnet", "preresnet") for dataset in ("cifar10", "imagenet")
          for flag in DENSENET_FLAGS.split()),
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other_are_refused(line, what, fix):
    ((found, found_fix),) = refused(line)
    assert what in found
    assert found_fix.startswith(fix)


def test_bottlenecks_follow_the_depth_where_the_depth_decides():
    large = parse("--netType preresnet --dataset imagenet --depth 18")
    assert not large.bottleneck and "bottleneck" not in opts.settings(large)
    small = parse("--netType preresnet --depth 20 --bottleneck false")
    assert not small.bottleneck and opts.settings(small)["bottleneck"] is False


@pytest.mark.parametrize(
    ("line", "world_size", "batch", "near"),
    [("", 3, 64, 63), ("--nGPU 3", 0, 64, 63), ("", 4, 5, 4), ("", 4, 7, 8), ("", 8, 2, 8)],
)
def test_a_batch_that_does_not_divide_is_answered_with_the_nearest(line, world_size, batch, near):
    ((what, fix),) = refused(f"{line} --batchSize {batch}", world_size)
    assert what == f"batchSize {batch} over {world_size or 3} processes is not a whole number"
    assert fix.startswith(f"use {near}, or ")
    assert parse(f"{line} --batchSize {near}", world_size).batchSize == near
    # Evaluation gives each process whole batches.
    assert parse(f"{line} --batchSize {batch} --testOnly true --retrain w.pt", world_size)


# Notes:
@pytest.mark.parametrize(
    ("line", "notes"),
    [
        ("-backend nn", "backend has no effect here"),
        ("-gen x -optimState y", "gen has no effect here; optimState has no effect here"),
        ("-shortcutType B", "shortcutType has no effect on a densenet"),
        ("-netType preresnet -depth 29", ""),
        ("-netType preresnet -depth 110 -bottleneck true", ""),
        ("-netType preresnet -depth 110", "preresnet of depth 110 has 36 bottlenecks, "
         "fb.resnet.torch's has 54 basic blocks: --bottleneck false"),
        ("-netType resnet -shareGradInput false -optnet false", ""),
        ("-netType resnet -optnet true", "optnet has no effect on a resnet"),
        ("-netType preresnet -optMemory auto", "optMemory has no effect on a preresnet"),
        # The value is the one that the network has, but the flag decides nothing.
        ("-netType resnet -dropRate 0", "dropRate has no effect on a resnet"),
        ("-netType resnet -bottleneck true -d1 0",
         "bottleneck has no effect on a resnet; d1 has no effect on a resnet"),
        ("-optnet true", "optnet is optMemory 1 here"),
        ("-shareGradInput true", "shareGradInput is optMemory 2 here"),
        ("-optnet false", ""),
        ("-milestones 5,400", "milestones 400 come after the last epoch, 300"),
        ("-bottleneck false", "bottleneck false with reduction 0.5 is a DenseNet-C, "
         "the paper's basic DenseNet has --reduction 1"),
        ("-syncBN true", "syncBN has no effect on one process"),
        ("-syncBN true -nGPU 2", ""),
    ],
)  # fmt: skip
def test_a_flag_without_effect_is_remarked_on(line, notes):
    assert "; ".join(note.replace(";", ",") for note in parse(line).notes) == notes


# Paths:
@pytest.mark.parametrize(
    ("line", "error", "what", "fix"),
    [
        ("--resume gone", CheckpointError, "resume: no such file or directory: gone", "name a run"),
        (f"--resume {'x/' * 3000}", CheckpointError, "resume: no such file", "name a run"),
        ("--retrain empty", CheckpointError, "retrain: no such file: empty", "name a file"),
        ("--dataset folder --data loop", DataError, "no directory loop", "use --data DIR"),
        ("--dataset folder --data empty", DataError, "no directory empty/train", "train/CLASS"),
        ("--dataset folder --data bare", DataError, "no class directories in bare/val", "val/"),
        ("--dataset folder --config nul.yaml", DataError, "no directory \\x00", "use --data"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_missing_path_is_named_before_anything_is_loaded(line, error, what, fix, tmp_path):
    for directory in ("empty", "bare/train/a", "bare/val"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nul.yaml").write_text('data: "\\0"\n')
    with pytest.raises(error) as caught:
        path_checks.check(parse(line))
    assert f"error: {what}" in caught.value.report() and fix in caught.value.report()


def test_each_process_needs_the_paths_that_it_reads(tmp_path):
    for directory in ("good/train/a", "good/val/a", "run"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "w.pt").touch()
    path_checks.check(parse("--dataset folder --data good --resume run --retrain w.pt"))
    path_checks.check(parse("--resume auto"))
    for line in ("--resume gone", "--retrain gone"):  # the first process reads these for all
        path_checks.check(parse(line), is_first=False)
    with pytest.raises(DataError, match="no directory gone"):
        path_checks.check(parse("--dataset folder --data gone"), is_first=False)


# Comparison:
@pytest.mark.parametrize(
    ("line", "changed", "role", "expected"),
    [
        ("", {}, "model", []),
        ("", {"depth": 40, "LR": 1.0, "nThreads": 7}, "model", [("depth", "100", "40")]),
        ("", {"depth": 40, "LR": 1.0, "nThreads": 7}, "training", [("LR", "0.1", "1.0")]),
        ("", {"shortcutType": "B"}, "model", []),  # a DenseNet does not read it
        ("--netType resnet", {}, "model", []),
        ("--netType resnet", {"shortcutType": "B"}, "model", [("shortcutType", "A", "B")]),
    ],
)
def test_settings_differ_where_the_network_reads_them(line, changed, role, expected):
    current = opts.settings(parse(line))
    assert not current.keys() & ARCHITECTURES[current["netType"]].unused_flags.keys()
    # As experiment/resume.py reads them: what a checkpoint does not have gets its default.
    saved = {name: flag.default for name, flag in opts.FLAGS.items()} | current | changed
    assert opts.differences(current, saved, role) == expected


@pytest.mark.parametrize(
    ("select", "left_out", "kept"),
    [(opts.training_settings, "keep", "manualSeed"), (opts.shared_settings, "data", "keep")],
)
def test_a_selection_of_settings_leaves_out_those_of_another_kind(select, left_out, kept):
    assert select(parse(f"--{left_out} 7")) == select(parse("")) != select(parse(f"--{kept} 7"))


# PrintConfig, --help:
@pytest.mark.parametrize(
    "line",
    [
        f"{LUA} -backend nn -gen x -optimState y -shortcutType A -optnet true",
        "--dataset svhn --manualSeed 9223372036854775807 --netType preresnet --depth 20",
        "--dataset imagenet --nEpochs 20 --tenCrop true --optMemory auto",
        "--dataset imagenet --d1 1 --d2 2 --d3 3 --d4 4 --bottleneck false",
        "--dataset folder --data /a/b --imageSize 32 --nClasses 3 --validSize 5 --onBadImage skip",
        "--dataset synthetic --imageSize 8 --nImages 7 --LR 1e-5 --weightDecay 0 --momentum 0",
        "--dataset synthetic --nChannels 7 --inputRange -1024,1.5 --bnEps 1.001e-5",
        "--dataset digits --augment true --dropRate 0.123456789012345678",
        "--lrShape cosine --milestones [] --LR 1e16 --saveEvery 0.1 --keep 3 --override true",
        "--milestones 1,2,300 --precision bf16 --cudnn deterministic --debug true",
        "--bottleneck false --reduction 1 --initChannels 3 --tf32 true --optMemory 0",
        "--dataset imagenet --netType preresnet --depth 200 --syncBN true --nGPU 2",
        "--netType dsn --auxWeight 0.3 --widen 0.1 --nesterov true --preprocess zca",
        "--netType fractalnet --columns 2 --dropPath 0.15 --lrDecay 0.3 --warmupSteps 7",
        "--netType resnet --stochasticDepth 0.5 --loss squaredHinge",
    ],
)
def test_printed_settings_read_back_as_the_same(line, tmp_path):
    opt = parse(line)
    again = parse(config(tmp_path, opts.as_yaml(opt)))
    assert opts.settings(again) | {"config": "none"} == opts.settings(opt)
    assert (again.stages, again.imagenetShape) == (opt.stages, opt.imagenetShape)


def test_printed_paths_read_back_whatever_they_hold(tmp_path):
    values = ("a b", "a,b:#c", "!!python/none", "[]", "~", "010", "true", " a ", "a\nb", "'", '"',
              "\udc80", "\u00e9", "x " * 900, "- a")  # fmt: skip
    for value in values:
        opt = opts.parse(["--save", value])
        assert parse(config(tmp_path, opts.as_yaml(opt))).save == opt.save


def test_a_runs_config_leaves_out_what_belongs_to_one_call():
    line = "--resume auto --debug true --override true --save s --depth 40"
    written = opts.as_yaml(parse(line), exclude=opts.NOT_SAVED)
    keys = {row.split(":")[0] for row in written.splitlines()}
    assert "depth" in keys and not keys & set(opts.NOT_SAVED)


def test_help_names_every_flag_in_its_group_with_its_meaning_and_default():
    text = opts.help_text(opts.USAGE, opts.GROUPS)
    assert max(map(len, text.splitlines())) <= 100
    for title, flags in opts.GROUPS.items():
        section = text.split(f"\n{title}:\n")[1].split("\n\n")[0]
        entries = ["--" + " ".join(entry.split()) for entry in section.split("  --")[1:]]
        assert [entry.split()[0] for entry in entries] == [f"--{flag.name}" for flag in flags]
        for flag, entry in zip(flags, entries, strict=True):
            assert flag.help in entry
            assert entry.endswith(f"[{flag.default_note or as_text(flag.default)}]")
            assert all(str(choice) in entry for choice in flag.choices)


@pytest.mark.parametrize("line", ["-h", "-help", "--help", "--depth 41 --nosuch 1 --help"])
def test_help_answers_whatever_else_is_asked(line, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(line)
    assert caught.value.code == 0
    assert capsys.readouterr().out == opts.help_text(opts.USAGE, opts.GROUPS) + "\n"


@pytest.mark.parametrize(
    ("line", "code", "num_errors"),
    [(f"{LUA} --printConfig --save run", 0, 0), ("--config c.yaml --growthrate 12", 2, 2)],
)
def test_the_program_answers_before_anything_heavy_is_loaded(line, code, num_errors, tmp_path):
    (tmp_path / "c.yaml").write_text("depht: 40\n")
    command = [sys.executable, "-X", "importtime", str(ROOT / "main.py"), *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = done.stderr.splitlines()
    imports = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    assert {"opts", "yaml"} <= imports  # late imports are listed too
    assert not imports & {"torch", "numpy", "torchvision", "sklearn", "PIL"}
    assert done.returncode == code
    assert sum(line.startswith("error: ") for line in lines) == num_errors
    assert done.stdout == ("" if num_errors else opts.as_yaml(parse(line)))
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


# Fuzzing:
VALUES = (
    "0 1 -1 2 0.5 1e-4 nan inf -inf 40 100 121 161 1e400 true false none auto cosine half "
    "multistep cifar10 svhn imagenet folder digits synthetic 5,6 [] , . .. / ~ \udc80 é x=y "
    f"99999999999999999999 {'9' * 40}"
).split()
WORDS = [*opts.FLAGS, "depht", "help", "h", "", "-", "paper", "é"]


def test_no_command_line_and_no_config_file_escapes_the_parser(tmp_path):
    draw, ends = random.Random(0), {"read": 0, "refused": 0, "help": 0}
    for _ in range(600):
        name, value = draw.choice(WORDS), draw.choice(VALUES)
        argv = draw.choice([[f"--{name}={value}"], [f"-{name}", value], [f"--{name}"], []])
        if draw.random() < 0.3:
            lines = f"{draw.choice(WORDS)}: {draw.choice(VALUES)}\n" * draw.choice([1, 1, 2])
            (tmp_path / "c.yaml").write_text(lines, errors="surrogateescape")
            argv += ["--config", "c.yaml"]
        try:
            opts.as_yaml(opts.parse(argv))
            ends["read"] += 1
        except SystemExit as end:
            assert end.code == 0
            ends["help"] += 1
        except UsageError as error:
            assert error.problems and all(what and fix for what, fix in error.problems)
            ends["refused"] += 1
    assert min(ends["read"], ends["refused"]) > 100 and ends["help"] > 0


def test_a_config_for_files_with_torch7s_resize_also_measures_a_gpu_on_synthetic_images():
    config = f"--config {Path(opts.__file__).parent / 'configs/imagenet/densenet-121-k32.yaml'}"
    assert parse(f"{config} --data DIR").resize == "torch7"
    opt = parse(f"{config} --dataset synthetic --imageSize 224")
    assert "resize has no effect on synthetic at 224 pixels" in opt.notes
    assert not any("resize" in note for note in parse(f"{config} --data DIR").notes)


@pytest.mark.parametrize(("flags", "resize"), [
    ("--dataset folder --retrain lua.t7", "torch7"), ("--dataset folder", "antialias"),
    ("--dataset folder --retrain lua.t7:model", "torch7"), ("--retrain lua.t7", "antialias"),
    ("--dataset folder --retrain weights.pt", "antialias"),
    ("--dataset folder --imageSize 32 --retrain lua.t7", "antialias"),
    ("--dataset folder --retrain lua.t7 --resize antialias", "antialias"),
])  # fmt: skip
def test_weights_of_lua_are_given_the_images_that_lua_gave_them(flags, resize):
    assert parse(flags).resize == resize


def test_an_evaluation_can_be_captured_whatever_training_drops():
    line = "--netType fractalnet --dropPath 0.1 --cudaGraph true"
    assert parse(f"{line} --testOnly true --retrain x.pt").cudaGraph == "true"
    assert "decided on the host" in refused(line)[0][0]
