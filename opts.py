"""Define the flags of main.py: their table, the defaults that depend on others, the rules between.

Imports nothing heavy, so that `--help` and usage errors are answered before torch is loaded.
"""

import sys
from pathlib import Path

from cli import network_settings, rules
from cli.config_files import add_file, add_resumed
from cli.flag_reader import FlagParser
from cli.flag_types import (
    AT_LEAST_1,
    NON_NEGATIVE,
    POSITIVE,
    Flag,
    Range,
    Settings,
    as_text,
    boolean,
    help_text,
    integer,
    integers,
    interval,
    level,
    number,
    pathname,
    text,
)
from cli.milestones import default_milestones, start_notes
from datasets.registry import DATASETS, MAX_ASPECT, MAX_PIXELS, SMALL_IMAGE
from errors import UsageError
from models.registry import ARCHITECTURES, LIBRARIES

MEMORY_LEVELS = (0, 1, 2, 3, 4)
OWN_DEFAULTS = "as published for wideresnet to fractalnet"

# Not formatted: one field a line would make this table five screens long.
# fmt: off
GROUPS: dict[str, list[Flag]] = {
    "General options": [
        Flag("data", pathname, "data", "root directory of the dataset"),
        Flag("dataset", text, "cifar10", "what to train on", choices=tuple(DATASETS),
             role="training"),
        Flag("manualSeed", integer, 0, "seed of initial weights, order, augmentation and dropout",
             range=Range(0, 2**63 - 1), role="training"),
        Flag("nGPU", integer, None, "GPUs to use on this machine, one process each; 0: the CPU; "
             "torchrun has its own count", "1 where CUDA is present, else 0", range=NON_NEGATIVE),
        Flag("backend", text, "cudnn", "accepted for Lua command lines; no effect"),
        Flag("cudnn", text, "fastest", "fastest tries algorithms; deterministic repeats bitwise",
             choices=("fastest", "default", "deterministic")),
        Flag("gen", text, "gen", "accepted for Lua command lines; no effect"),
        Flag("precision", text, "single", "arithmetic; half (with loss scaling) and bf16 are mixed",
             choices=("single", "double", "half", "bf16"), role="training"),
        Flag("tf32", boolean, False, "TensorFloat-32 products in precision single (CUDA)",
             role="training"),
        Flag("kernels", text, "auto", "what runs optMemory 2 to 4; auto: triton on CUDA, or torch",
             choices=("auto", "triton", "torch")),
        Flag("cudaGraph", text, "auto",
             "one CUDA graph per step of training and evaluation; auto: on a GPU",
             choices=("auto", "true", "false")),
        Flag("timeout", number, 50.0, "seconds to wait for other processes", range=POSITIVE),
        Flag("config", pathname, "none", "YAML file of flags; the command line wins over it"),
        Flag("printConfig", boolean, False, "print all settings as YAML and exit", const="true"),
        Flag("debug", boolean, False, "show the traceback of every error"),
    ],
    "Data options": [
        Flag("nThreads", integer, 2, "loader processes per split, for images read from files",
             range=NON_NEGATIVE),
        Flag("augment", boolean, None, "random crops and flips: the + of the paper's tables",
             "true; false on svhn and digits", role="training"),
        Flag("validSize", integer, None,
             "training images held out for validation; the test set is then used once, at the end",
             "0; 6000 on svhn", range=NON_NEGATIVE, role="training"),
        Flag("imageSize", integer, None, "height and width of the network's input in pixels; up to "
             "64 it has the CIFAR shape and the data stays in memory",
             "32 CIFAR, SVHN, synthetic; 8 digits; else 224", range=Range(8, 4096),
             role="training"),
        Flag("inputRange", interval, None, "what black and white pixels become, as -1024,1024, in "
             "place of a mean of 0 and a std of 1", "none", role="training"),
        Flag("nImages", integer, 10000, "training images of the synthetic dataset",
             range=AT_LEAST_1, role="training"),
        Flag("onBadImage", text, "error",
             "for an unreadable image: stop, or skip it (up to 0.1 % of the images, at least one)",
             choices=("error", "skip")),
        Flag("exifRotate", boolean, False, "turn images as their EXIF orientation says",
             role="training"),
        Flag("preprocess", text, "normalise", "what is done to images up to 32 pixels: mean 0 and "
             "std 1; global contrast normalisation; this and ZCA whitening",
             choices=("normalise", "gcn", "zca"), role="training"),
        Flag("whiteLevel", number, None, "value of white in images of more than 8 bits whose files "
             "declare no scale", "the type's largest; 1 for floats", range=POSITIVE,
             role="training"),
        Flag("resize", text, None, "how images above 64 pixels are resized: bicubic with "
             "anti-aliasing, or as Torch7 does, on which Lua's errors were measured",
             "torch7 with a .t7 file to retrain, else antialias",
             choices=("antialias", "torch7"), role="training"),
        Flag("maxPixels", integer, MAX_PIXELS, "pixels of an image file; with more it is "
             "unreadable, since a small file can fill the memory", range=AT_LEAST_1),
        Flag("maxAspect", number, float(MAX_ASPECT), "longer side of an image over the shorter; "
             "with more it is unreadable", range=Range(1)),
    ],
    "Training options": [
        Flag("nEpochs", integer, None, "epochs to train",
             "300 CIFAR, 164 with resnets; 40 SVHN; 90 ImageNet, 100 for DenseNet-161; "
             f"{OWN_DEFAULTS}",
             range=Range(1, 1_000_000), role="duration"),
        Flag("epochNumber", integer, 1, "number of the first epoch", range=AT_LEAST_1),
        Flag("batchSize", integer, None, "images per step, over all GPUs together",
             f"64 CIFAR and SVHN; 256 ImageNet, 128 for DenseNet-161; {OWN_DEFAULTS}",
             range=AT_LEAST_1, role="training"),
        Flag("testOnly", boolean, False, "only evaluate the weights of --resume or --retrain"),
        Flag("tenCrop", boolean, False, "evaluate on ten crops of each image (above 64 pixels)"),
    ],
    "Checkpointing options": [
        Flag("save", pathname, None, "run directory", "checkpoints/ and the run's name"),
        Flag("resume", pathname, "none",
             "run directory or checkpoint to continue; auto: this run's own "
             "directory if it has a checkpoint"),
        Flag("keep", integer, 2, "newest checkpoints to keep", range=AT_LEAST_1),
        Flag("saveEvery", number, 10.0, "minutes between saves within an epoch", range=POSITIVE),
        Flag("override", boolean, False, "resume although settings differ from the checkpoint's"),
    ],
    "Optimization options": [
        Flag("LR", number, 0.1, "initial learning rate", f"0.1; {OWN_DEFAULTS}", range=POSITIVE,
             role="training"),
        Flag("momentum", number, 0.9, "momentum", range=Range(0, 1, high_open=True),
             role="training"),
        Flag("nesterov", boolean, True, "Nesterov's form of it", f"true; {OWN_DEFAULTS}",
             role="training"),
        Flag("weightDecay", number, 1e-4, "weight decay, on every parameter",
             f"0.0001; {OWN_DEFAULTS}", range=NON_NEGATIVE, role="training"),
        Flag("loss", text, "crossEntropy", "of the logits; squaredHinge: one class against the "
             "rest", "crossEntropy; dsn squaredHinge", choices=("crossEntropy", "squaredHinge"),
             role="training"),
        Flag("lrShape", text, "multistep", "a drop at each milestone, or a cosine from LR to 0",
             choices=("multistep", "cosine"), role="training"),
        Flag("milestones", integers, None, "epochs at which the learning rate drops",
             "50 % and 75 % of nEpochs, resnets 81 and 122 of 164; ImageNet: 31, 61, 91; "
             f"{OWN_DEFAULTS}",
             range=AT_LEAST_1, role="training"),
        Flag("lrDecay", number, 0.1, "factor of the learning rate at each milestone",
             f"0.1; {OWN_DEFAULTS}", range=Range(0, 1, low_open=True), role="training"),
        Flag("warmupSteps", integer, 0, "first steps of the run, at a tenth of their learning rate",
             range=NON_NEGATIVE, role="training"),
    ],
    "Model options": [
        Flag("netType", text, "densenet", "network", choices=tuple(ARCHITECTURES), role="model"),
        Flag("depth", integer, None, "layers L: densenet 6n+4, 3n+4 without bottleneck; resnet "
             "6n+2; preresnet 9n+2, 6n+2 without; wideresnet 6n+4; fractalnet 6, 11, 21, 41; on "
             "ImageNet 121, 161, 169, 201, 232 or 264, resnets 18, 34, 50, 101, 152 or 200",
             "100, 110, 164, 28; ImageNet 121, resnets 50", range=AT_LEAST_1, role="model"),
        Flag("shortcutType", text, None, "residual shortcut where the shape changes: A zeros, B a "
             "convolution; C: a convolution in every block", "A; B ImageNet",
             choices=("A", "B", "C"), role="model"),
        Flag("nChannels", integer, 3, "channels of the input; with 1 images are read as grey",
             range=AT_LEAST_1, role="model"),
        Flag("bnEps", number, 1e-5, "epsilon that batch normalisation adds to variances",
             range=POSITIVE, role="model"),
        Flag("syncBN", boolean, False, "batch statistics over all GPUs, not of each GPU alone",
             role="training"),
        Flag("retrain", pathname, "none", "weights to start from: a checkpoint of this or another "
             "program, or a file of Keras, Paddle or Lua (.t7); FILE:KEY names one of several"),
        Flag("from", text, None, "library of these weights", "by their names", choices=LIBRARIES),
        Flag("paddleDropout", number, 0.0, "dropout rate of Paddle's network, by which its weights "
             "are scaled", range=Range(0, 1, high_open=True)),
        Flag("optimState", text, "none", "accepted for Lua command lines; no effect"),
        Flag("shareGradInput", boolean, False, "Lua's name of optMemory 2"),
        Flag("optnet", boolean, False, "Lua's name of optMemory 1"),
        Flag("resetClassifier", boolean, False, "with retrain: start with a random classifier"),
        Flag("adaptChannels", boolean, False, "with retrain: fit a first convolution of another "
             "number of channels: summed to one, or repeated and scaled"),
        Flag("nClasses", integer, None,
             "classes, checked against the data; for synthetic data: how many to make",
             "read from the data; 10 synthetic", range=AT_LEAST_1),
    ],
    "Model options for DenseNet": [
        Flag("growthRate", integer, None, "feature maps k that each layer adds",
             "12; 32 ImageNet, 48 for depth 161 and 232", range=AT_LEAST_1, role="model"),
        Flag("bottleneck", boolean, True, "1x1 convolution to 4k channels before each 3x3 "
             "(DenseNet-B); preresnet up to 64 pixels: 1x1, 3x3, 1x1, not two 3x3",
             role="model"),
        Flag("reduction", number, 0.5, "fraction of channels that a transition keeps (DenseNet-C)",
             range=Range(0, 1, low_open=True), role="model"),
        Flag("dropRate", number, None, "dropout rate: densenet after each convolution but the "
             "first; wideresnet to fractalnet as in their papers",
             "0; 0.2 without augmentation; nin, allcnn, dsn 0.5; highway 0.2",
             range=Range(0, 1, high_open=True), role="training"),
        Flag("optMemory", level, 2, "activations kept for backward: 0 all, each level fewer; 2 is "
             "the fastest, 4 the smallest; auto: the fastest that fits the GPU",
             choices=(*MEMORY_LEVELS, "auto")),
        Flag("initChannels", integer, None, "feature maps of the first convolution",
             "2k; 16 at CIFAR size without bottleneck", range=AT_LEAST_1, role="model"),
        *(Flag(f"d{i}", integer, 0, f"layers of block {i}, for a custom depth at ImageNet shape",
               range=NON_NEGATIVE, role="model") for i in (1, 2, 3, 4)),
    ],
    "Model options for the other networks of the paper's Table 2": [
        Flag("widen", number, None, "multiplies the channels of wideresnet to fractalnet",
             "10 wideresnet, else 1", range=POSITIVE, role="model"),
        Flag("stochasticDepth", number, 1.0, "resnet: probability with which a training step runs "
             "the last block; it falls evenly from the first", range=Range(0, 1, low_open=True),
             role="training"),
        Flag("columns", integer, None, "fractalnet: the deepest columns to keep", "all",
             range=AT_LEAST_1, role="model"),
        Flag("dropPath", number, 0.0, "fractalnet: rate of local drop-path, in half of the steps; "
             "the other half keeps one column", range=Range(0, 1, high_open=True),
             role="training"),
        Flag("auxWeight", number, 0.1, "dsn: weight of its companions' losses; it falls to 0 over "
             "the epochs", range=NON_NEGATIVE, role="training"),
    ],
}
# fmt: on
FLAGS: dict[str, Flag] = {flag.name: flag for flags in GROUPS.values() for flag in flags}

USAGE = """usage: python main.py [--config FILE.yaml] [--flag value ...]

Train a DenseNet as in `Densely Connected Convolutional Networks` (CVPR 2017), or a network that
its Table 2 compares it with.
Every flag takes one value, as -flag VALUE or --flag VALUE; booleans are true or false.
Examples and the run directory: README.md. The original's rules: docs/parity.md."""
# These belong to one call, not to the experiment: a run's config.yaml leaves them out.
NOT_SAVED = ("config", "printConfig", "debug", "resume", "override", "save", "testOnly")


def apply_defaults(given: dict[str, object]) -> Settings:
    """Return all settings: those given, then the defaults, which depend on the dataset and others.

    Also sets two that are derived and not flags: `imagenetShape`, and `stages`, the layers per
    dense block.
    """
    defaults = {name: flag.default for name, flag in FLAGS.items()}
    network = ARCHITECTURES[given.get("netType", defaults["netType"])]
    opt = Settings(**defaults | network.defaults | given)
    dataset = DATASETS[opt.dataset]

    def default(name: str, value: object) -> None:
        if getattr(opt, name) is None:
            setattr(opt, name, value)

    default("imageSize", dataset.image_size)
    opt.imagenetShape = opt.imageSize > SMALL_IMAGE
    network_settings.apply_defaults(opt)

    num_epochs, batch_size = network.training_defaults_for(opt.imagenetShape, opt.depth)
    own_epochs = None if opt.imagenetShape else dataset.num_epochs
    default("nEpochs", own_epochs or num_epochs)
    default("batchSize", batch_size)
    default("augment", dataset.augment)
    default("validSize", dataset.valid_size)
    default("dropRate", 0.0 if opt.augment else 0.2)
    is_of_lua = ".t7:" in f"{opt.retrain}:" and dataset.is_read_from_disk(opt.imageSize)
    default("resize", "torch7" if is_of_lua else "antialias")
    if opt.lrShape == "multistep":
        default("milestones", default_milestones(opt.nEpochs, opt.imagenetShape, opt.netType))
    if opt.optnet or opt.shareGradInput:  # from here on optMemory says it
        opt.optMemory = 1 if opt.optnet else 2
        opt.optnet = opt.shareGradInput = False
    default("save", str(Path("checkpoints") / network_settings.run_name(opt)))
    return opt


def parse(argv: list[str], world_size: int = 0) -> Settings:
    """Return the settings of one call: the command line over `--config` over the defaults.

    `--resume DIR` continues the run in DIR: the settings it was started with come below those of
    the config file. Also sets `replicas`, the number of processes; `notes`, the remarks for the
    user, and `start_notes`, those for a run that begins; and, as names of flags, `given`,
    `given_by_run`, those of them that only the config.yaml of DIR gives, and `defaults`, those that
    nobody has chosen, neither now nor when a file given now was written.

    Args:
        world_size: processes of the run on all machines, if a launcher started them, else 0.

    Raises:
        UsageError: every problem of the flags at once.
    """
    if {"-h", "-help", "--help"} & set(argv):
        print(help_text(USAGE, GROUPS))
        sys.exit(0)

    # Each source sets what the ones before it have not.
    parser = FlagParser(FLAGS)
    parser.add(parser.parse_argv(argv))
    milestones = ""
    if parser.values.get("config", "none") != "none":
        milestones = add_file(parser, Path(parser.values["config"]))
    before = set(parser.values)
    add_resumed(parser)
    opt = apply_defaults(parser.values)
    opt.replicas = world_size or max(opt.nGPU or 1, 1)

    problems = parser.problems
    # While one of these is unknown, the rules about depth and size would apply to its default.
    if not parser.unparsed & {"dataset", "imageSize", "netType", "bottleneck"}:
        problems = problems + rules.problems(opt, parser.values, FLAGS)
    UsageError.raise_for(problems)
    opt.notes = rules.notes(opt, parser.values)
    opt.given, opt.given_by_run = frozenset(parser.values), frozenset(parser.values.keys() - before)
    opt.defaults = frozenset(FLAGS.keys() - parser.values.keys() | parser.defaults)
    opt.start_notes = start_notes(opt, milestones)
    return opt


def settings(opt: Settings) -> dict[str, object]:
    """Return the settings that have an effect, as plain values in the order of the table."""
    network = ARCHITECTURES[opt.netType]
    unused = {*rules.IGNORED_FLAGS, "optnet", "shareGradInput", *network.unused_flags}
    if opt.imagenetShape and network.basic_depths is not None:
        unused.add("bottleneck")  # the depth decides
    values = {name: getattr(opt, name) for name in FLAGS if name not in unused}
    return {name: value for name, value in values.items() if value is not None}


def training_settings(opt: Settings) -> dict[str, object]:
    """Return the settings that decide what the network learns."""
    return {name: value for name, value in settings(opt).items() if FLAGS[name].role}


def shared_settings(opt: Settings) -> dict[str, object]:
    """Return the settings that all processes of a run must agree on."""
    per_machine = ("data", "nGPU", "nThreads", "config", "debug")
    return {name: value for name, value in settings(opt).items() if name not in per_machine}


def as_yaml(opt: Settings, exclude: tuple[str, ...] = ("config", "printConfig")) -> str:
    """Write the settings as a config file that `--config` accepts."""
    import yaml

    if "save" not in opt.given:  # it follows from the others, also when they are changed
        exclude += ("save",)
    plain = {name: value for name, value in settings(opt).items() if name not in exclude}
    if (defaults := default_names(opt)) is not None:
        plain["defaults"] = [name for name in defaults if name in plain]
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=1000)


def default_names(opt: Settings) -> list[str] | None:
    """List the `settings` that are defaults; None if the run is of a version that wrote none."""
    names = settings(opt)
    return None if opt.defaults is None else [name for name in names if name in opt.defaults]


def differences(current: dict, saved: dict, role: str) -> list[tuple[str, str, str]]:
    """List flags of `role` on which two `settings` disagree: (flag, current, saved).

    Flags that the current network does not read are left out.
    """
    network = ARCHITECTURES[current["netType"]]
    names = [name for name, flag in FLAGS.items() if flag.role == role and network.uses(name)]
    pairs = [(name, as_text(current.get(name)), as_text(saved.get(name))) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]
