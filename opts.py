"""The flag table: each option with its type, range, default and meaning, and the rules between.

Nothing heavy is imported here: `--help` and every usage error answer before torch is loaded.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from cli import network_settings
from cli.flag_reader import FlagParser
from cli.flag_types import (
    AT_LEAST_1,
    NON_NEGATIVE,
    POSITIVE,
    Flag,
    Problem,
    Range,
    Settings,
    as_text,
    boolean,
    help_text,
    integer,
    integers,
    level,
    number,
    text,
)
from datasets.registry import DATASETS, SMALL_IMAGE
from errors import UsageError
from models.registry import ARCHITECTURES

MEMORY_LEVELS = (0, 1, 2, 3, 4)

# One option, one entry: the formatter would make this table five screens long.
# fmt: off
GROUPS: dict[str, list[Flag]] = {
    "General options": [
        Flag("data", text, "data", "root directory of the dataset"),
        Flag("dataset", text, "cifar10", "what to train on", choices=tuple(DATASETS),
             role="training"),
        Flag("manualSeed", integer, 0, "seed of initial weights, order, augmentation and dropout",
             range=Range(0, 2**63 - 1), role="training"),
        Flag("nGPU", integer, None, "GPUs of this machine, a process for each; 0 is the CPU; "
             "torchrun has its own count", "1 where CUDA is present, else 0", range=NON_NEGATIVE),
        Flag("backend", text, "cudnn", "accepted for Lua command lines; no effect"),
        Flag("cudnn", text, "fastest",
             "fastest tries algorithms; deterministic repeats bit for bit",
             choices=("fastest", "default", "deterministic")),
        Flag("gen", text, "gen", "accepted for Lua command lines; no effect"),
        Flag("precision", text, "single", "arithmetic; half (loss scaling) and bf16 are mixed",
             choices=("single", "double", "half", "bf16"), role="training"),
        Flag("tf32", boolean, False, "TensorFloat-32 products in precision single (CUDA)",
             role="training"),
        Flag("kernels", text, "auto", "what runs optMemory 2 to 4; auto: triton on CUDA else torch",
             choices=("auto", "triton", "torch")),
        Flag("cudaGraph", text, "auto",
             "one CUDA graph per training step; auto: on a GPU where every batch has one shape",
             choices=("auto", "true", "false")),
        Flag("timeout", number, 50.0, "seconds that one of several processes waits for the others",
             range=POSITIVE),
        Flag("config", text, "none", "YAML file of flags; the command line wins over it"),
        Flag("printConfig", boolean, False, "print all settings as YAML and exit", const="true"),
        Flag("debug", boolean, False, "show the traceback of every error"),
    ],
    "Data options": [
        Flag("nThreads", integer, 2, "loader processes per split, for images read from files",
             range=NON_NEGATIVE),
        Flag("augment", boolean, None, "random crop and flip: the + of the paper's tables",
             "true; false on svhn and digits", role="training"),
        Flag("validSize", integer, None,
             "training images held out for validation; the test set is then used once, at the end",
             "0; 6000 on svhn", range=NON_NEGATIVE, role="training"),
        Flag("imageSize", integer, None, "height and width of the network's input in pixels; up to "
             "64 it has the CIFAR shape and the data stays in memory",
             "32 CIFAR, SVHN, synthetic; 8 digits; else 224", range=Range(8, 4096),
             role="training"),
        Flag("nImages", integer, 10000, "training images of the synthetic dataset",
             range=AT_LEAST_1, role="training"),
        Flag("onBadImage", text, "error",
             "an image that cannot be read: stop, or skip it (up to 0.1 % of the images)",
             choices=("error", "skip"), role="training"),
    ],
    "Training options": [
        Flag("nEpochs", integer, None, "epochs to train",
             "300 CIFAR, 164 with resnets; 40 SVHN; 90 ImageNet, 100 for DenseNet-161",
             range=Range(1, 1_000_000), role="duration"),
        Flag("epochNumber", integer, 1, "number of the first epoch", range=AT_LEAST_1),
        Flag("batchSize", integer, None, "images per step, over all GPUs together",
             "64 CIFAR and SVHN; 256 ImageNet, 128 for DenseNet-161", range=AT_LEAST_1,
             role="training"),
        Flag("testOnly", boolean, False, "only evaluate the weights of --resume or --retrain"),
        Flag("tenCrop", boolean, False, "evaluate on ten crops of each image (above 64 pixels)"),
    ],
    "Checkpointing options": [
        Flag("save", text, None, "run directory", "checkpoints/ and the run's name"),
        Flag("resume", text, "none",
             "run directory or checkpoint to continue; auto: this run's own "
             "directory if it has a checkpoint"),
        Flag("keep", integer, 2, "newest checkpoints to keep", range=AT_LEAST_1),
        Flag("saveEvery", number, 10.0, "minutes between checkpoints within an epoch",
             range=POSITIVE),
        Flag("override", boolean, False, "resume although settings differ from the checkpoint's"),
    ],
    "Optimization options": [
        Flag("LR", number, 0.1, "initial learning rate", range=POSITIVE, role="training"),
        Flag("momentum", number, 0.9, "Nesterov momentum", range=Range(0, 1, high_open=True),
             role="training"),
        Flag("weightDecay", number, 1e-4, "weight decay, on every parameter", range=NON_NEGATIVE,
             role="training"),
        Flag("lrShape", text, "multistep", "a tenth at each milestone, or a cosine from LR to 0",
             choices=("multistep", "cosine"), role="training"),
        Flag("milestones", integers, None, "epochs from which the rate is a tenth of what it was",
             "50 % and 75 % of nEpochs, with resnets 81 and 122 of 164; ImageNet: 31, 61, 91",
             range=AT_LEAST_1, role="training"),
    ],
    "Model options": [
        Flag("netType", text, "densenet", "network", choices=tuple(ARCHITECTURES), role="model"),
        Flag("depth", integer, None, "layers L: densenet 6n+4, or 3n+4 without bottleneck, resnet "
             "6n+2, preresnet 9n+2, or 6n+2 without; on ImageNet 121, 161, 169, 201, 232 or "
             "264, resnets 18, 34, 50, 101, 152 or 200", "100, 110, 164; ImageNet 121, resnets 50",
             range=AT_LEAST_1, role="model"),
        Flag("shortcutType", text, None, "of resnets where the maps change: A zeros, B a "
             "convolution; C a convolution in every block", "A; B ImageNet",
             choices=("A", "B", "C"), role="model"),
        Flag("syncBN", boolean, False, "one set of batch statistics for all GPUs, not one for each",
             role="training"),
        Flag("retrain", text, "none", "weights to start from: a checkpoint of this program, a "
             "torchvision or timm state dict, or a .t7 file of Lua"),
        Flag("optimState", text, "none", "accepted for Lua command lines; no effect"),
        Flag("shareGradInput", boolean, False, "Lua's name of optMemory 2"),
        Flag("optnet", boolean, False, "Lua's name of optMemory 1"),
        Flag("resetClassifier", boolean, False, "with retrain: start the classifier anew"),
        Flag("nClasses", integer, None,
             "classes of the data, checked when given; of synthetic data: how many",
             "read from the data; 10 synthetic", range=AT_LEAST_1),
    ],
    "Model options for DenseNet": [
        Flag("growthRate", integer, None, "feature maps k that each layer adds",
             "12; 32 ImageNet, 48 for depth 161 and 232", range=AT_LEAST_1, role="model"),
        Flag("bottleneck", boolean, True, "1x1 convolution to 4k maps before each 3x3 "
             "(DenseNet-B); of preresnet up to 64 pixels: 1x1, 3x3, 1x1, not two 3x3",
             role="model"),
        Flag("reduction", number, 0.5, "share of the maps that a transition keeps (DenseNet-C)",
             range=Range(0, 1, low_open=True), role="model"),
        Flag("dropRate", number, None, "dropout after each convolution but the first",
             "0; 0.2 without augmentation", range=Range(0, 1, high_open=True), role="training"),
        Flag("optMemory", level, 2, "what backward finds kept: 0 everything, each level up less; "
             "2 is the fastest, 4 the smallest; auto: the fastest that fits the GPU",
             choices=(*MEMORY_LEVELS, "auto")),
        Flag("initChannels", integer, None, "feature maps of the first convolution",
             "2k; 16 at CIFAR size without bottleneck", range=AT_LEAST_1, role="model"),
        *(Flag(f"d{i}", integer, 0, f"layers of block {i}, ImageNet shape with a depth of your own",
               range=NON_NEGATIVE, role="model") for i in (1, 2, 3, 4)),
    ],
}
# fmt: on
FLAGS: dict[str, Flag] = {flag.name: flag for flags in GROUPS.values() for flag in flags}

USAGE = """usage: python main.py [--config FILE.yaml] [--flag value ...]

Train a DenseNet as in `Densely Connected Convolutional Networks` (CVPR 2017), or a ResNet.
Every flag takes one value, as -flag VALUE or --flag VALUE; booleans are true or false.
Examples and the run directory: README.md. The original's rules: docs/parity.md."""
# Read by the Lua code's parser and by nothing after it.
IGNORED_FLAGS = ("backend", "gen", "optimState")
# Lua command lines have it with any network: it is noted and no error.
TOLERATED_FLAGS = ("shortcutType",)
# Three names of one setting.
MEMORY_ALIASES = ("optMemory", "shareGradInput", "optnet")
# Facts of one call, not of the experiment: left out of a run's config.yaml.
NOT_SAVED = ("config", "printConfig", "debug", "resume", "override", "save", "testOnly")


# ------------------------------------------------------------------------------------- resolving


def apply_defaults(given: dict[str, object]) -> Settings:
    """All settings: those given, then the defaults that depend on the dataset and on each other.

    Also sets two that are derived and no flags: `imagenetShape` and `stages`, the layers per
    dense block.
    """
    defaults = {name: flag.default for name, flag in FLAGS.items()}
    opt = Settings(**(defaults | given))
    dataset, network = DATASETS[opt.dataset], ARCHITECTURES[opt.netType]

    def default(name: str, value: object) -> None:
        if getattr(opt, name) is None:
            setattr(opt, name, value)

    default("imageSize", dataset.image_size)
    opt.imagenetShape = opt.imageSize > SMALL_IMAGE
    network_settings.apply_defaults(opt)

    training_defaults = network.defaults_for(opt.imagenetShape, opt.depth)
    own_epochs = None if opt.imagenetShape else dataset.num_epochs
    default("nEpochs", own_epochs or training_defaults.num_epochs)
    default("batchSize", training_defaults.batch_size)
    default("augment", dataset.augment)
    default("validSize", dataset.valid_size)
    default("dropRate", 0.0 if opt.augment else 0.2)
    if opt.lrShape == "multistep":
        default("milestones", default_milestones(opt.nEpochs, opt.imagenetShape, opt.netType))
    if opt.optnet or opt.shareGradInput:
        opt.optMemory = 1 if opt.optnet else 2
        opt.optnet = opt.shareGradInput = False  # their meaning is in optMemory now
    default("save", str(Path("checkpoints") / run_name(opt)))
    return opt


def default_milestones(num_epochs: int, imagenet: bool, net_type: str = "densenet") -> list[int]:
    """Epochs, counted from 1, from which the rate is a tenth of what it was (docs/parity.md).

    CIFAR and SVHN: the first epochs that are >= 50 % and >= 75 % of `num_epochs`, for residual
    networks 81 and 122 of 164 in proportion. ImageNet: every thirty epochs.
    """
    if imagenet:
        return list(range(31, num_epochs + 1, 30))
    parts = ARCHITECTURES[net_type].milestones
    return [-(-num_epochs * part // whole) for part, whole in parts]  # rounded up


def run_name(opt: Settings) -> str:
    """The run's directory below `checkpoints/`: dataset, network and seed."""
    dataset = DATASETS[opt.dataset]
    data = opt.dataset
    if dataset.is_named_by_directory:
        data += f"-{os.path.basename(os.path.abspath(opt.data))}"
    plus = "+" if opt.augment and dataset.marks_augmentation else ""
    cosine = "-cosine" if opt.lrShape == "cosine" else ""
    return f"{data}{plus}-{network_settings.network_name(opt)}{cosine}-seed{opt.manualSeed}"


# -------------------------------------------------------------------------------------- checking


def validate(opt: Settings, given: dict[str, object]) -> list[Problem]:
    """What is impossible about settings that are valid one by one."""
    return [
        *_unused_flag_problems(opt, given),
        *network_settings.problems(opt),
        *_image_problems(opt),
        *_epoch_problems(opt),
        *_weight_problems(opt, given),
        *_rate_problems(opt),
        *_batch_problems(opt),
    ]


def _unused_flag_problems(opt: Settings, given: dict[str, object]) -> Iterator[Problem]:
    """Flags that describe another kind of network than the one that is built."""
    for name, value in ARCHITECTURES[opt.netType].unused_flags.items():
        has_role = FLAGS[name].role and name not in TOLERATED_FLAGS
        if has_role and given.get(name) not in (None, value, FLAGS[name].default):
            what = f"{name} {as_text(given[name])} has no effect on a {opt.netType}"
            yield what, "leave it out, or use --netType densenet"
    requested = given.get("bottleneck", opt.bottleneck)
    if requested != opt.bottleneck and ARCHITECTURES[opt.netType].uses("bottleneck"):
        what = (
            f"bottleneck {as_text(requested)} has no effect on a {opt.netType} of depth {opt.depth}"
        )
        yield what, "leave it out: above 64 pixels the depth decides"


def _image_problems(opt: Settings) -> Iterator[Problem]:
    """The images, and what is evaluated on them."""
    dataset = DATASETS[opt.dataset]
    size = dataset.fixed_size
    if size not in (None, opt.imageSize):
        what = f"imageSize: images of {opt.dataset} have {size} pixels, not {opt.imageSize}"
        yield what, f"use {size} or leave it out"
    if opt.testOnly and opt.resume == "none" and opt.retrain == "none":
        what = "testOnly without weights would test random ones"
        yield what, "add --resume DIR or --retrain FILE"
    if opt.tenCrop and (not opt.imagenetShape or dataset.is_generated):
        yield f"tenCrop: {opt.dataset} at {opt.imageSize} pixels has no crops", "leave it out"


def _epoch_problems(opt: Settings) -> Iterator[Problem]:
    """The epoch to begin with."""
    if opt.epochNumber != 1 and opt.resume not in ("none", "auto"):
        what = f"epochNumber {opt.epochNumber} together with resume, which knows the epoch"
        yield what, "leave out one of them"
    if opt.epochNumber > opt.nEpochs:
        what = f"epochNumber {opt.epochNumber} is after the last epoch, {opt.nEpochs}"
        yield what, f"use 1 to {opt.nEpochs}"


def _weight_problems(opt: Settings, given: dict[str, object]) -> Iterator[Problem]:
    """What backward keeps, and the weights to start from."""
    names = [name for name in MEMORY_ALIASES if given.get(name, False) is not False]
    if len(names) > 1:
        yield f"{' and '.join(names)} exclude each other", "keep one, or use --optMemory"
    if opt.resetClassifier and opt.retrain == "none":
        yield "resetClassifier without weights to retrain", "add --retrain FILE"
    if opt.resetClassifier and opt.testOnly and opt.resume == "none":
        what = "resetClassifier with testOnly would test a random classifier"
        yield what, "add --resetClassifier false, also where a run's config.yaml has it"


def _rate_problems(opt: Settings) -> Iterator[Problem]:
    """The schedule of the learning rate."""
    milestones = opt.milestones or []
    if opt.lrShape == "cosine" and milestones:
        fix = "leave out milestones or use --lrShape multistep"
        yield "milestones have no effect on a cosine", fix
    if milestones != sorted(milestones):
        what = f"milestones {as_text(milestones)} are not in order"
        yield what, f"use {as_text(sorted(milestones))}"


def _batch_problems(opt: Settings) -> Iterator[Problem]:
    """Batches, and the images and numbers in them."""
    if opt.batchSize % opt.replicas != 0 and not opt.testOnly:
        near = max(round(opt.batchSize / opt.replicas), 1) * opt.replicas
        what = f"batchSize {opt.batchSize} over {opt.replicas} processes is not a whole number"
        yield what, f"use {near}, or another number"
    is_default = opt.nImages == FLAGS["nImages"].default
    if not is_default and not DATASETS[opt.dataset].is_generated:
        what = f"nImages has no effect on {opt.dataset}"
        yield what, "leave it out or use --dataset synthetic"
    if opt.tf32 and opt.precision != "single":
        what = f"tf32 has no effect with precision {opt.precision}"
        yield what, "leave it out or use --precision single"


def notes(opt: Settings, given: dict[str, object]) -> list[str]:
    """What the user should know though it stops nothing."""
    return [
        *_notes_of_flags(opt, given),
        *_notes_of_training(opt),
        *network_settings.notes(opt, given),
    ]


def _notes_of_flags(opt: Settings, given: dict[str, object]) -> Iterator[str]:
    """Flags that were given and have no effect, or another name here."""
    network = ARCHITECTURES[opt.netType]
    for name in IGNORED_FLAGS:
        if name in given:
            yield f"{name} has no effect here"
    for name in network.unused_flags:
        if given.get(name, False) is not False:
            yield f"{name} has no effect on a {opt.netType}"
    for name in ("shareGradInput", "optnet"):
        if given.get(name) and network.uses(name):
            yield f"{name} is optMemory {opt.optMemory} here"


def _notes_of_training(opt: Settings) -> Iterator[str]:
    late = [epoch for epoch in opt.milestones or [] if epoch > opt.nEpochs]
    if late:
        yield f"milestones {as_text(late)} come after the last epoch, {opt.nEpochs}"
    if opt.syncBN and opt.replicas == 1:
        yield "syncBN has no effect on one process"


# ------------------------------------------------------------------------------------ public face


def parse(argv: list[str], world_size: int = 0) -> Settings:
    """The settings of one call: command line over `--config` over defaults.

    Also sets `replicas`, which is derived and no flag.

    `--resume DIR` continues the run in DIR with the settings it was started with, so that these
    stand below the config file. `opt.notes` lists remarks for the user,
    `opt.given` the flags that were given.

    Args:
        world_size: processes that a launcher has started for the run, on all machines; 0: none has.

    Raises:
        UsageError: every problem of the flags at once.
    """
    if {"-h", "-help", "--help"} & set(argv):
        print(help_text(USAGE, GROUPS))
        sys.exit(0)
    parser = FlagParser(FLAGS)
    parser.add(parser.parse_argv(argv))
    if parser.values.get("config", "none") != "none":
        _add_file(parser, Path(parser.values["config"]))
    _add_resumed(parser)
    opt = apply_defaults(parser.values)
    opt.replicas = world_size or max(opt.nGPU or 1, 1)
    problems = parser.problems
    # With one of these misread, every rule about depth or size would be judged on a default.
    if not parser.unparsed & {"dataset", "imageSize", "netType", "bottleneck"}:
        problems = problems + validate(opt, parser.values)
    if problems:
        raise UsageError.from_problems(problems)
    opt.notes = notes(opt, parser.values)
    opt.given = frozenset(parser.values)
    return opt


def _add_file(parser: FlagParser, path: Path, exclude: tuple[str, ...] = ()) -> None:
    """Add the settings of a YAML file below those given so far."""
    raw = parser.parse_yaml(path)
    for name, _, source in raw:
        if name == "config":
            what = f"config: a config file cannot name another ({source})"
            parser.problems.append((what, "put its lines here"))
    if parser.values.keys() & set(MEMORY_ALIASES):  # whichever name was used: it wins
        exclude += MEMORY_ALIASES
    parser.add([line for line in raw if line[0] not in exclude])


def _add_resumed(parser: FlagParser) -> None:
    """Continue a run by its directory alone: its config.yaml is the base, and it goes on there."""
    resume = parser.values.get("resume", "none")
    if resume in ("none", "auto"):
        return
    directory = Path(resume) if os.path.isdir(resume) else Path(resume).parent
    if os.path.isfile(directory / "config.yaml"):
        # The checkpoint knows the epoch; milestones belong to a shape that may be another now.
        replaced = ("milestones",) if "lrShape" in parser.values else ()
        _add_file(parser, directory / "config.yaml", exclude=("epochNumber", *replaced))
        parser.values.setdefault("save", str(directory))


def settings(opt: Settings) -> dict[str, object]:
    """The settings that mean something here, as plain values in the order of the table."""
    network = ARCHITECTURES[opt.netType]
    unused = {*IGNORED_FLAGS, "optnet", "shareGradInput", *network.unused_flags}
    if opt.imagenetShape and network.basic_depths is not None:
        unused.add("bottleneck")  # the depth decides
    values = {name: getattr(opt, name) for name in FLAGS if name not in unused}
    return {name: value for name, value in values.items() if value is not None}


def training_settings(opt: Settings) -> dict[str, object]:
    """The settings that decide what is learnt, without those of mere procedure."""
    return {name: value for name, value in settings(opt).items() if FLAGS[name].role}


def shared_settings(opt: Settings) -> dict[str, object]:
    """The settings that all processes of a run must share: those that are of no one machine."""
    per_machine = ("data", "nGPU", "nThreads", "config", "debug")
    return {name: value for name, value in settings(opt).items() if name not in per_machine}


def as_yaml(opt: Settings, exclude: tuple[str, ...] = ("config", "printConfig")) -> str:
    """The settings as a config file that `--config` accepts."""
    import yaml

    if "save" not in opt.given:  # it follows from the others, also when they are changed
        exclude += ("save",)
    plain = {name: value for name, value in settings(opt).items() if name not in exclude}
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=1000)


def differences(current: dict, saved: dict, role: str) -> list[tuple[str, str, str]]:
    """Flags of `role` on which two `settings` disagree: (flag, current, saved).

    Flags that the current network does not read are left out.
    """
    network = ARCHITECTURES[current["netType"]]
    used = [flag for flag in FLAGS.values() if network.uses(flag.name)]
    names = [flag.name for flag in used if flag.role == role]
    pairs = [(name, as_text(current.get(name)), as_text(saved.get(name))) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]
