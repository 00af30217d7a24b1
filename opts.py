"""The flag table: each option with its type, range, default and meaning, and the rules between.

Nothing heavy is imported here: `--help` and every usage error answer before torch is loaded.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

from cli import network_flags
from cli.flags import (
    AT_LEAST_0,
    AT_LEAST_1,
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
from cli.parser import Reader
from errors import UsageError
from models import architectures

MEMORY_LEVELS = (0, 1, 2, 3, 4)

DATASETS = ("cifar10", "cifar100", "svhn", "imagenet", "folder", "digits", "synthetic")
FIXED_SIZE = {"cifar10": 32, "cifar100": 32, "svhn": 32, "digits": 8}
SMALL_IMAGE = 64  # up to this size in pixels: the CIFAR network shape, and the data in memory


# One option, one entry: the formatter would make this table five screens long.
# fmt: off
GROUPS: dict[str, list[Flag]] = {
    "General options": [
        Flag("data", text, "data", "root directory of the dataset"),
        Flag("dataset", text, "cifar10", "what to train on", choices=DATASETS, role="course"),
        Flag("manualSeed", integer, 0, "seed of initial weights, order, augmentation and dropout",
             range=Range(0, 2**63 - 1), role="course"),
        Flag("nGPU", integer, None, "GPUs of this machine, a process for each; 0 is the CPU; "
             "torchrun has its own count", "1 where CUDA is present, else 0", range=AT_LEAST_0),
        Flag("backend", text, "cudnn", "accepted for Lua command lines; no effect"),
        Flag("cudnn", text, "fastest",
             "fastest tries algorithms; deterministic repeats bit for bit",
             choices=("fastest", "default", "deterministic")),
        Flag("gen", text, "gen", "accepted for Lua command lines; no effect"),
        Flag("precision", text, "single", "arithmetic; half (loss scaling) and bf16 are mixed",
             choices=("single", "double", "half", "bf16"), role="course"),
        Flag("tf32", boolean, False, "TensorFloat-32 products in precision single (CUDA)",
             role="course"),
        Flag("kernels", text, "auto", "what runs optMemory 2 to 4; auto: triton on CUDA else torch",
             choices=("auto", "triton", "torch")),
        Flag("cudaGraph", text, "auto",
             "one CUDA graph per training step; auto: on a GPU where every batch has one shape",
             choices=("auto", "true", "false")),
        Flag("timeout", number, 50.0, "seconds that one of several processes waits for the others",
             range=POSITIVE),
        Flag("config", text, "none", "YAML file of flags; the command line wins over it"),
        Flag("printConfig", boolean, False, "print all settings as YAML and exit", bare="true"),
        Flag("debug", boolean, False, "show the traceback of every error"),
    ],
    "Data options": [
        Flag("nThreads", integer, 2, "loader processes per split, for images read from files",
             range=AT_LEAST_0),
        Flag("augment", boolean, None, "random crop and flip: the + of the paper's tables",
             "true; false on svhn and digits", role="course"),
        Flag("validSize", integer, None,
             "training images held out for validation; the test set is then used once, at the end",
             "0; 6000 on svhn", range=AT_LEAST_0, role="course"),
        Flag("imageSize", integer, None, "height and width of the network's input in pixels; up to "
             "64 it has the CIFAR shape and the data stays in memory",
             "32 CIFAR, SVHN, synthetic; 8 digits; else 224", range=Range(8, 4096), role="course"),
        Flag("nImages", integer, 10000, "training images of the synthetic dataset",
             range=AT_LEAST_1, role="course"),
        Flag("onBadImage", text, "error",
             "an image that cannot be read: stop, or skip it (up to 0.1 % of the images)",
             choices=("error", "skip"), role="course"),
    ],
    "Training options": [
        Flag("nEpochs", integer, None, "epochs to train",
             "300 CIFAR, 164 with resnets; 40 SVHN; 90 ImageNet, 100 for DenseNet-161",
             range=Range(1, 1_000_000), role="length"),
        Flag("epochNumber", integer, 1, "number of the first epoch", range=AT_LEAST_1),
        Flag("batchSize", integer, None, "images per step, over all GPUs together",
             "64 CIFAR and SVHN; 256 ImageNet, 128 for DenseNet-161", range=AT_LEAST_1,
             role="course"),
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
        Flag("LR", number, 0.1, "initial learning rate", range=POSITIVE, role="course"),
        Flag("momentum", number, 0.9, "Nesterov momentum", range=Range(0, 1, high_open=True),
             role="course"),
        Flag("weightDecay", number, 1e-4, "weight decay, on every parameter", range=AT_LEAST_0,
             role="course"),
        Flag("lrShape", text, "multistep", "a tenth at each milestone, or a cosine from LR to 0",
             choices=("multistep", "cosine"), role="course"),
        Flag("milestones", integers, None, "epochs from which the rate is a tenth of what it was",
             "50 % and 75 % of nEpochs, with resnets 81 and 122 of 164; ImageNet: 31, 61, 91",
             range=AT_LEAST_1, role="course"),
    ],
    "Model options": [
        Flag("netType", text, "densenet", "network", choices=architectures.NET_TYPES, role="model"),
        Flag("depth", integer, None, "layers L: densenet 6n+4, or 3n+4 without bottleneck, resnet "
             "6n+2, preresnet 9n+2, or 6n+2 without; on ImageNet 121, 161, 169, 201, 232 or "
             "264, resnets 18, 34, 50, 101, 152 or 200", "100, 110, 164; ImageNet 121, resnets 50",
             range=AT_LEAST_1, role="model"),
        Flag("shortcutType", text, None, "of resnets where the maps change: A zeros, B a "
             "convolution; C a convolution in every block", "A; B ImageNet",
             choices=("A", "B", "C"), role="model"),
        Flag("syncBN", boolean, False, "one set of batch statistics for all GPUs, not one for each",
             role="course"),
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
             "0; 0.2 without augmentation", range=Range(0, 1, high_open=True), role="course"),
        Flag("optMemory", level, 2, "what backward finds kept: 0 everything, each level up less; "
             "2 is the fastest, 4 the smallest; auto: the fastest that fits the GPU",
             choices=(*MEMORY_LEVELS, "auto")),
        Flag("initChannels", integer, None, "feature maps of the first convolution",
             "2k; 16 at CIFAR size without bottleneck", range=AT_LEAST_1, role="model"),
        *(Flag(f"d{i}", integer, 0, f"layers of block {i}, ImageNet shape with a depth of your own",
               range=AT_LEAST_0, role="model") for i in (1, 2, 3, 4)),
    ],
}
# fmt: on
FLAGS: dict[str, Flag] = {flag.name: flag for flags in GROUPS.values() for flag in flags}

USAGE = """usage: python main.py [--config FILE.yaml] [--flag value ...]

Train a DenseNet as in `Densely Connected Convolutional Networks` (CVPR 2017), or a ResNet.
Every flag takes one value, as -flag VALUE or --flag VALUE; booleans are true or false.
Examples and the run directory: README.md. The original's rules: docs/parity.md."""
# Read by the Lua code's parser and by nothing after it.
WITHOUT_EFFECT = ("backend", "gen", "optimState")
# Three names of one setting.
MEMORY_NAMES = ("optMemory", "shareGradInput", "optnet")
_OF_DENSENETS = {
    "optMemory": None,
    "shareGradInput": False,
    "optnet": False,
    "kernels": "torch",
    "growthRate": None,
    "reduction": None,
    "dropRate": 0.0,
    "initChannels": None,
    **dict.fromkeys(("d1", "d2", "d3", "d4"), 0),
}
# The flags that a network does not read, with the values that they have for it.
NOT_READ_BY: dict[str, dict[str, object]] = {
    "densenet": {"shortcutType": None},
    "resnet": {"bottleneck": None} | _OF_DENSENETS,
    "preresnet": _OF_DENSENETS,
}
# Facts of one call, not of the experiment: left out of a run's config.yaml.
OF_ONE_CALL = ("config", "printConfig", "debug", "resume", "override", "save", "testOnly")


# ------------------------------------------------------------------------------------- resolving


def resolve(given: dict[str, object]) -> SimpleNamespace:
    """All settings: those given, then the defaults that depend on the dataset and on each other.

    Also sets two that are derived and no flags: `imagenetShape` and `stages`, the layers per
    dense block.
    """
    defaults = {name: flag.default for name, flag in FLAGS.items()}
    opt = Settings(**(defaults | given))

    def default(name: str, value: object) -> None:
        if getattr(opt, name) is None:
            setattr(opt, name, value)

    default("imageSize", FIXED_SIZE.get(opt.dataset, 32 if opt.dataset == "synthetic" else 224))
    opt.imagenetShape = imagenet = opt.imageSize > SMALL_IMAGE
    foreign = NOT_READ_BY[opt.netType]
    vars(opt).update(foreign)
    if "shortcutType" not in foreign:
        default("shortcutType", "B" if imagenet else "A")
    network_flags.resolve(opt)

    # The paper, section 4.2; DenseNet-161 trained in smaller batches for ten epochs more.
    large = imagenet and opt.depth == 161
    small_epochs = 300 if opt.netType == "densenet" else 164
    epochs = 40 if opt.dataset == "svhn" else small_epochs
    default("nEpochs", (100 if large else 90) if imagenet else epochs)
    default("batchSize", (128 if large else 256) if imagenet else 64)
    default("augment", opt.dataset not in ("svhn", "digits"))
    default("validSize", 6000 if opt.dataset == "svhn" else 0)
    default("dropRate", 0.0 if opt.augment else 0.2)
    if opt.lrShape == "multistep":
        default("milestones", default_milestones(opt.nEpochs, imagenet, opt.netType))
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
    whole, *parts = (4, 2, 3) if net_type == "densenet" else (164, 81, 122)
    return [-(-num_epochs * part // whole) for part in parts]  # rounded up


def run_name(opt: SimpleNamespace) -> str:
    """The run's directory below `checkpoints/`: dataset, network and seed."""
    folder = os.path.basename(os.path.abspath(opt.data))
    data = f"folder-{folder}" if opt.dataset == "folder" else opt.dataset
    plus = "+" if opt.augment and opt.dataset.startswith("cifar") else ""
    cosine = "-cosine" if opt.lrShape == "cosine" else ""
    return f"{data}{plus}-{network_name(opt)}{cosine}-seed{opt.manualSeed}"


def network_name(opt: SimpleNamespace) -> str:
    """The network in a run's name: `densenet-BC-L100-k12`, `resnet-L110`, `preresnet-L164-B`."""
    if opt.netType != "densenet":
        usual = "B" if opt.imagenetShape else "A"
        shortcut = "" if opt.shortcutType == usual else f"-{opt.shortcutType}"
        is_fbs = opt.netType == "preresnet" and not opt.imagenetShape and not opt.bottleneck
        return f"{opt.netType}-L{opt.depth}{shortcut}{'-basic' if is_fbs else ''}"
    form = "-" + ("B" if opt.bottleneck else "") + ("C" if opt.reduction < 1 else "")
    return f"{opt.netType}{form.rstrip('-')}-L{opt.depth}-k{opt.growthRate}"


# -------------------------------------------------------------------------------------- checking


def check(opt: SimpleNamespace, given: dict[str, object]) -> list[Problem]:
    """What is impossible about settings that are valid one by one."""
    problems = _check_foreign(opt, given) + network_flags.problems(opt)

    def wrong(condition: bool, what: str, fix: str) -> None:
        if condition:
            problems.append((what, fix))

    size = FIXED_SIZE.get(opt.dataset)
    small = not opt.imagenetShape
    wrong(
        size is not None and opt.imageSize != size,
        f"imageSize: images of {opt.dataset} have {size} pixels, not {opt.imageSize}",
        f"use {size} or leave it out",
    )
    wrong(
        opt.testOnly and opt.resume == "none" and opt.retrain == "none",
        "testOnly without weights would test random ones",
        "add --resume DIR or --retrain FILE",
    )
    wrong(
        opt.tenCrop and (small or opt.dataset == "synthetic"),
        f"tenCrop: {opt.dataset} at {opt.imageSize} pixels has no crops",
        "leave it out",
    )
    wrong(
        opt.epochNumber != 1 and opt.resume not in ("none", "auto"),
        f"epochNumber {opt.epochNumber} together with resume, which knows the epoch",
        "leave out one of them",
    )
    wrong(
        opt.epochNumber > opt.nEpochs,
        f"epochNumber {opt.epochNumber} is after the last epoch, {opt.nEpochs}",
        f"use 1 to {opt.nEpochs}",
    )
    names = [name for name in MEMORY_NAMES if given.get(name, False) is not False]
    wrong(
        len(names) > 1,
        f"{' and '.join(names)} exclude each other",
        "keep one, or use --optMemory",
    )
    wrong(
        opt.resetClassifier and opt.retrain == "none",
        "resetClassifier without weights to retrain",
        "add --retrain FILE",
    )
    wrong(
        opt.resetClassifier and opt.testOnly and opt.resume == "none",
        "resetClassifier with testOnly would test a random classifier",
        "add --resetClassifier false, also where a run's config.yaml has it",
    )
    wrong(
        opt.lrShape == "cosine" and bool(opt.milestones),
        "milestones have no effect on a cosine",
        "leave out milestones or use --lrShape multistep",
    )
    wrong(
        bool(opt.milestones) and opt.milestones != sorted(opt.milestones),
        f"milestones {as_text(opt.milestones)} are not in order",
        f"use {as_text(sorted(opt.milestones or []))}",
    )
    wrong(
        opt.batchSize % opt.replicas != 0 and not opt.testOnly,
        f"batchSize {opt.batchSize} over {opt.replicas} processes is not a whole number",
        f"use {max(round(opt.batchSize / opt.replicas), 1) * opt.replicas}, or another number",
    )
    wrong(
        opt.nImages != FLAGS["nImages"].default and opt.dataset != "synthetic",
        f"nImages has no effect on {opt.dataset}",
        "leave it out or use --dataset synthetic",
    )
    wrong(
        opt.tf32 and opt.precision != "single",
        f"tf32 has no effect with precision {opt.precision}",
        "leave it out or use --precision single",
    )
    return problems


def _check_foreign(opt: SimpleNamespace, given: dict[str, object]) -> list[Problem]:
    """Flags that describe another kind of network than the one that is built."""
    if opt.netType == "densenet":
        return []  # Lua command lines have a shortcutType with any network: it is noted
    fix = "leave it out, or use --netType densenet"
    found = [
        (f"{name} {as_text(given[name])} has no effect on a {opt.netType}", fix)
        for name, value in NOT_READ_BY[opt.netType].items()
        if FLAGS[name].role and given.get(name) not in (None, value, FLAGS[name].default)
    ]
    is_pre, wish = opt.netType == "preresnet", given.get("bottleneck", opt.bottleneck)
    if is_pre and wish != opt.bottleneck:
        what = f"bottleneck {as_text(wish)} has no effect on a preresnet of depth {opt.depth}"
        found.append((what, "leave it out: above 64 pixels the depth decides"))
    return found


def _notes(opt: SimpleNamespace, given: dict[str, object]) -> list[str]:
    """What the user should know though it stops nothing."""
    notes = [f"{name} has no effect here" for name in WITHOUT_EFFECT if name in given]
    foreign = NOT_READ_BY[opt.netType]
    for name in foreign:
        if given.get(name, False) is not False:
            notes.append(f"{name} has no effect on a {opt.netType}")
    for name in ("shareGradInput", "optnet"):
        if given.get(name) and name not in foreign:
            notes.append(f"{name} is optMemory {opt.optMemory} here")
    late = [epoch for epoch in opt.milestones or [] if epoch > opt.nEpochs]
    if late:
        notes.append(f"milestones {as_text(late)} come after the last epoch, {opt.nEpochs}")
    if opt.syncBN and opt.replicas == 1:
        notes.append("syncBN has no effect on one process")
    known = opt.depth == architectures.DEFAULTS[opt.netType][opt.imagenetShape]
    if network_flags.is_basic_elsewhere(opt) and "bottleneck" not in given and not known:
        notes.append(
            f"preresnet of depth {opt.depth} has {sum(opt.stages)} bottlenecks; "
            f"fb.resnet.torch's has {(opt.depth - 2) // 2} basic blocks: --bottleneck false"
        )
    if opt.netType == "densenet" and not opt.bottleneck and opt.reduction < 1:
        notes.append(
            f"bottleneck false with reduction {opt.reduction:g} is a DenseNet-C; "
            "the paper's basic DenseNet has --reduction 1"
        )
    return notes


# ------------------------------------------------------------------------------------ public face


def parse(argv: list[str], launched: int = 0) -> SimpleNamespace:
    """The settings of one call: command line over `--config` over defaults.

    Also sets `replicas`, which is derived and no flag.

    `--resume DIR` continues the run in DIR with the settings it was started with, so that these
    stand below the config file. `opt.notes` lists remarks for the user,
    `opt.given` the flags that were given.

    Args:
        launched: processes that a launcher has started for the run, on all machines; 0: none has.

    Raises:
        UsageError: every problem of the flags at once.
    """
    if {"-h", "-help", "--help"} & set(argv):
        print(help_text(USAGE, GROUPS))
        sys.exit(0)
    reader = Reader(FLAGS)
    reader.add(reader.command_line(argv))
    if reader.values.get("config", "none") != "none":
        _add_file(reader, Path(reader.values["config"]))
    _add_resumed(reader)
    opt = resolve(reader.values)
    opt.replicas = launched or max(opt.nGPU or 1, 1)
    problems = reader.problems
    # With one of these misread, every rule about depth or size would be judged on a default.
    if not reader.unread & {"dataset", "imageSize", "netType", "bottleneck"}:
        problems = problems + check(opt, reader.values)
    if problems:
        raise UsageError.of(problems)
    opt.notes = _notes(opt, reader.values)
    opt.given = frozenset(reader.values)
    return opt


def _add_file(reader: Reader, path: Path, without: tuple[str, ...] = ()) -> None:
    """Add the settings of a YAML file below those given so far."""
    written = reader.yaml_file(path)
    for name, _, source in written:
        if name == "config":
            what = f"config: a config file cannot name another ({source})"
            reader.problems.append((what, "put its lines here"))
    if reader.values.keys() & set(MEMORY_NAMES):  # whichever name was used: it wins
        without += MEMORY_NAMES
    reader.add([line for line in written if line[0] not in without])


def _add_resumed(reader: Reader) -> None:
    """Continue a run by its directory alone: its config.yaml is the base, and it goes on there."""
    resume = reader.values.get("resume", "none")
    if resume in ("none", "auto"):
        return
    directory = Path(resume) if os.path.isdir(resume) else Path(resume).parent
    if os.path.isfile(directory / "config.yaml"):
        # The checkpoint knows the epoch; milestones belong to a shape that may be another now.
        replaced = ("milestones",) if "lrShape" in reader.values else ()
        _add_file(reader, directory / "config.yaml", without=("epochNumber", *replaced))
        reader.values.setdefault("save", str(directory))


def settings(opt: SimpleNamespace) -> dict[str, object]:
    """The settings that mean something here, as plain values in the order of the table."""
    silent = {*WITHOUT_EFFECT, "optnet", "shareGradInput", *NOT_READ_BY[opt.netType]}
    if opt.netType == "preresnet" and opt.imagenetShape:
        silent.add("bottleneck")  # the depth decides
    values = {name: getattr(opt, name) for name in FLAGS if name not in silent}
    return {name: value for name, value in values.items() if value is not None}


def experiment(opt: SimpleNamespace) -> dict[str, object]:
    """The settings that decide what is learnt, without those of mere procedure."""
    return {name: value for name, value in settings(opt).items() if FLAGS[name].role}


def procedure(opt: SimpleNamespace) -> dict[str, object]:
    """The settings that all processes of a run must share: those that are of no one machine."""
    of_a_machine = ("data", "nGPU", "nThreads", "config", "debug")
    return {name: value for name, value in settings(opt).items() if name not in of_a_machine}


def as_yaml(opt: SimpleNamespace, without: tuple[str, ...] = ("config", "printConfig")) -> str:
    """The settings as a config file that `--config` accepts."""
    import yaml

    if "save" not in opt.given:  # it follows from the others, also when they are changed
        without += ("save",)
    plain = {name: value for name, value in settings(opt).items() if name not in without}
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=1000)


def differences(mine: dict, theirs: dict, role: str) -> list[tuple[str, str, str]]:
    """Flags of `role` on which two `settings` disagree: (flag, mine, theirs).

    Flags that my network does not read are left out: what theirs makes of them is no difference.
    """
    foreign = NOT_READ_BY[mine["netType"]]
    names = [flag.name for flag in FLAGS.values() if flag.role == role and flag.name not in foreign]
    pairs = [(name, as_text(mine.get(name)), as_text(theirs.get(name))) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]
