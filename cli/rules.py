"""Check rules between the flags of main.py: what is impossible, and what the user should know."""

from cli import network_settings
from cli.config_files import MEMORY_ALIASES
from cli.flag_types import Flag, Problem, Settings, as_text, broken
from datasets.registry import DATASETS
from models.registry import ARCHITECTURES

# Lua's parser accepts these, and nothing in the Lua code reads them.
IGNORED_FLAGS = ("backend", "gen", "optimState")
# Lua command lines give this one with any network: a note, not an error.
TOLERATED_FLAGS = ("shortcutType",)


# fmt: off
def problems(
    opt: Settings, given: dict[str, object], flags: dict[str, Flag]
) -> list[Problem]:
    """List what is impossible about settings that are valid one by one."""
    milestones = opt.milestones or []
    bottleneck = given.get("bottleneck", opt.bottleneck)
    aliases = [name for name in MEMORY_ALIASES if given.get(name, False) is not False]
    near_batch = max(round(opt.batchSize / opt.replicas), 1) * opt.replicas
    rules = [
        # network, and its weights in a test
        (bottleneck != opt.bottleneck and ARCHITECTURES[opt.netType].uses("bottleneck"),
         f"bottleneck {as_text(bottleneck)} has no effect on a {opt.netType} of depth {opt.depth}",
         "leave it out: above 64 pixels the depth decides"),
        (opt.testOnly and opt.resume == "none" and opt.retrain == "none",
         "testOnly without weights would test random ones", "add --resume DIR or --retrain FILE"),
        # first epoch
        (opt.epochNumber != 1 and opt.resume not in ("none", "auto"),
         f"epochNumber {opt.epochNumber} together with resume, which knows the epoch",
         "leave out one of them"),
        (opt.epochNumber > opt.nEpochs,
         f"epochNumber {opt.epochNumber} is after the last epoch, {opt.nEpochs}",
         f"use 1 to {opt.nEpochs}"),
        # memory level and initial weights
        (len(aliases) > 1,
         f"{' and '.join(aliases)} exclude each other", "keep one, or use --optMemory"),
        *((getattr(opt, name) and opt.retrain == "none",
           f"{name} without weights to retrain", "add --retrain FILE")
          for name in ("resetClassifier", "adaptChannels", "from", "paddleDropout")),
        (opt.resetClassifier and opt.testOnly and opt.resume == "none",
         "resetClassifier with testOnly would test a random classifier",
         "leave it out, or add --resetClassifier false where a run's config.yaml has it"),
        # learning rate
        (opt.lrShape == "cosine" and bool(milestones),
         "milestones have no effect on a cosine",
         "leave out milestones or use --lrShape multistep"),
        (milestones != sorted(milestones),
         f"milestones {as_text(milestones)} are not in order",
         f"use {as_text(sorted(milestones))}"),
        # steps
        (opt.batchSize % opt.replicas != 0 and not opt.testOnly,
         f"batchSize {opt.batchSize} over {opt.replicas} processes is not a whole number",
         f"use {near_batch}, or another number"),
        (opt.cudaGraph == "true" and network_settings.has_random_depth(opt) and not opt.testOnly,
         "cudaGraph true: what is drawn to be dropped is decided on the host in every step",
         "leave it out, or stochasticDepth and dropPath"),
        (opt.tf32 and opt.precision != "single",
         f"tf32 has no effect with precision {opt.precision}",
         "leave it out or use --precision single"),
    ]
    of_network = [*_unused_flag_problems(opt, given, flags), *network_settings.problems(opt)]
    return [*of_network, *_image_problems(opt, flags), *broken(rules)]


def _image_problems(opt: Settings, flags: dict[str, Flag]) -> list[Problem]:
    """List what is impossible about the images, and what becomes of them."""
    dataset = DATASETS[opt.dataset]
    size = dataset.fixed_size
    rules = [
        (size not in (None, opt.imageSize),
         f"imageSize: images of {opt.dataset} have {size} pixels, not {opt.imageSize}",
         f"use {size} or leave it out"),
        (opt.tenCrop and (not opt.imagenetShape or dataset.is_generated),
         f"tenCrop: {opt.dataset} at {opt.imageSize} pixels has no crops", "leave it out"),
        (opt.nImages != flags["nImages"].default and not dataset.is_generated,
         f"nImages has no effect on {opt.dataset}", "leave it out or use --dataset synthetic"),
    ]
    return broken(rules)
# fmt: on


def _unused_flag_problems(
    opt: Settings, given: dict[str, object], flags: dict[str, Flag]
) -> list[Problem]:
    """Refuse flags that describe another kind of network than the one that is built."""
    refused = [
        name
        for name, value in ARCHITECTURES[opt.netType].unused_flags.items()
        if flags[name].role and name not in TOLERATED_FLAGS
        if given.get(name) not in (None, value, flags[name].default)
    ]
    what = "{} {} has no effect on a {}".format
    fix = "leave it out, or use --netType {}".format
    readers = {
        flag: next(name for name, network in ARCHITECTURES.items() if network.uses(flag))
        for flag in refused
    }
    return [(what(name, as_text(given[name]), opt.netType), fix(readers[name])) for name in refused]


def notes(opt: Settings, given: dict[str, object]) -> list[str]:
    """List what the user should know about settings that can be run."""
    network = ARCHITECTURES[opt.netType]
    late = [epoch for epoch in opt.milestones or [] if epoch > opt.nEpochs]
    noted = [name for name in network.unused_flags if given.get(name, False) is not False]
    renamed = [name for name in ("shareGradInput", "optnet") if given.get(name)]
    decays = "lrDecay" in given and opt.lrDecay != network.defaults.get("lrDecay", 0.1)
    unresized = "resize" in given and not DATASETS[opt.dataset].is_read_from_disk(opt.imageSize)
    where = f"{opt.dataset} at {opt.imageSize} pixels"
    return [
        *([f"resize has no effect on {where}"] if unresized and opt.resize == "torch7" else []),
        *(f"{name} has no effect here" for name in IGNORED_FLAGS if name in given),
        *(f"{name} has no effect on a {opt.netType}" for name in noted),
        *(f"{name} is optMemory {opt.optMemory} here" for name in renamed if network.uses(name)),
        *([f"milestones {as_text(late)} come after the last epoch, {opt.nEpochs}"] if late else []),
        *(["lrDecay has no effect on a cosine"] if opt.lrShape == "cosine" and decays else []),
        *(["syncBN has no effect on one process"] if opt.syncBN and opt.replicas == 1 else []),
        *network_settings.notes(opt, given),
    ]
