"""Resolve and check the flags that describe a network: its depth, stages, widths and input.

The functions read the settings, `opt`, as far as they are set at the call. Only `apply_defaults`
writes into them.
"""

import math
import os
from collections.abc import Callable
from types import SimpleNamespace

from cli.flag_types import Problem, Settings, as_text, broken
from datasets.registry import DATASETS
from errors import UsageError
from models.registry import ARCHITECTURES


def apply_defaults(opt: SimpleNamespace) -> None:
    """Set depth and widths where they are not given, and `stages`, the blocks of each stage.

    A stage of a DenseNet is a dense block and counts layers. Flags that the network does not read,
    or that its depth decides, get the values that they have for it.
    """
    network, is_imagenet = ARCHITECTURES[opt.netType], opt.imagenetShape
    vars(opt).update(network.unused_flags)
    if network.shortcuts and opt.shortcutType is None:
        opt.shortcutType = network.shortcuts[is_imagenet]

    # The depth, and with it the stages and the kind of block.
    custom = _custom_stages(opt)
    if opt.depth is None and any(custom):
        opt.depth = network.layers_per_block[opt.bottleneck] * sum(custom) + 5
    elif opt.depth is None:
        opt.depth = network.depths[is_imagenet]
    if is_imagenet and network.basic_depths is not None:
        opt.bottleneck = opt.depth not in network.basic_depths
    elif not network.uses("bottleneck"):
        opt.bottleneck = False
    if network.cifar_stages and not is_imagenet:
        opt.stages = network.cifar_stages.get(opt.depth, ())
    elif is_imagenet:
        opt.stages = custom if any(custom) else network.imagenet_stages.get(opt.depth, ())
    else:
        layers_per_block = network.layers_per_block[opt.bottleneck]
        opt.stages = ((opt.depth - network.extra_layers) // (3 * layers_per_block),) * 3

    # The widths.
    if network.uses("growthRate") and opt.growthRate is None:
        is_wide = opt.depth in network.wide_depths
        opt.growthRate = (48 if is_wide else 32) if is_imagenet else 12
    if network.uses("initChannels") and opt.initChannels is None:
        opt.initChannels = 2 * opt.growthRate if is_imagenet or opt.bottleneck else 16


def network_name(opt: SimpleNamespace) -> str:
    """Name the network as runs do: `densenet-BC-L100-k12`, `resnet-L110`, `preresnet-L164-B`."""
    network = ARCHITECTURES[opt.netType]
    if network.uses("growthRate"):
        variant = "-" + ("B" if opt.bottleneck else "") + ("C" if opt.reduction < 1 else "")
        return f"{opt.netType}{variant.rstrip('-')}-L{opt.depth}-k{opt.growthRate}"
    name = f"{opt.netType}-L{opt.depth}"
    if network.shortcuts and opt.shortcutType != network.shortcuts[opt.imagenetShape]:
        name += f"-{opt.shortcutType}"
    is_basic = network.uses("bottleneck") and not opt.imagenetShape and not opt.bottleneck
    parts = {
        "basic": is_basic,
        f"x{as_text(opt.widen).removesuffix('.0')}": network.shortcuts and opt.widen is not None,
        f"w{opt.widen}": not network.shortcuts and opt.widen not in (None, 1),
        f"columns{opt.columns}": opt.columns is not None,
        "sd": opt.stochasticDepth < 1,
        "droppath": opt.dropPath > 0,
        f"drop{opt.dropRate}": network.defaults.get("dropRate", opt.dropRate) != opt.dropRate,
    }
    return "-".join([name, *(part for part, has_it in parts.items() if has_it)])


def run_name(opt: Settings) -> str:
    """Name the run's directory below `checkpoints/`: dataset, network, form of the rate, seed."""
    dataset, data = DATASETS[opt.dataset], opt.dataset
    if dataset.is_named_by_directory:
        data += f"-{os.path.basename(os.path.abspath(opt.data))}"
    plus = "+" if opt.augment and dataset.marks_augmentation else ""
    rate = "-cosine" if opt.lrShape == "cosine" else ""
    rate += "-warmup" if opt.warmupSteps > 0 else ""
    return f"{data}{plus}-{network_name(opt)}{rate}-seed{opt.manualSeed}"


# fmt: off
def problems(opt: SimpleNamespace) -> list[Problem]:
    """List what is impossible about depth or widths, once the defaults are set."""
    network = ARCHITECTURES[opt.netType]
    custom, is_cifar = _custom_stages(opt), not opt.imagenetShape
    layers_per_block = network.layers_per_block[opt.bottleneck]
    # CIFAR shape: the valid depths on both sides of the one given.
    step, extra = 3 * layers_per_block, network.extra_layers
    n, rest = divmod(opt.depth - extra, step)
    low = step * max(n, 1) + extra
    close = f"{low}" if n < 1 else f"{low} or {low + step}"
    basic = ", or --bottleneck false" if _is_basic_in_lua(opt) else ""
    variant = "with bottleneck" if opt.bottleneck else "without bottleneck"
    variant = variant if network.uses("bottleneck") else opt.netType
    # ImageNet shape: the known depth closest to the one given, and the stages of that one.
    known = network.cifar_stages if is_cifar else network.imagenet_stages
    closest = min(known, key=lambda depth: abs(depth - opt.depth), default=None)
    standard = known.get(opt.depth, opt.stages)
    custom_depth = layers_per_block * sum(custom) + 5
    num_columns = opt.stages[0].bit_length() if opt.stages else 0
    if not is_cifar and not known:
        what = f"imageSize: a {opt.netType} is for images of up to 64 pixels, not {opt.imageSize}"
        return [(what, "use another --imageSize, or --netType densenet")]
    rules = [
        (opt.imageSize < network.min_size,
         f"imageSize: {opt.netType} needs at least {network.min_size} pixels, not {opt.imageSize}",
         f"use another --{'dataset' if DATASETS[opt.dataset].fixed_size else 'imageSize'}"),
        (opt.widen is not None and round(opt.widen * network.narrowest) < 1,
         f"widen: {opt.widen} leaves no channels of {network.narrowest}",
         f"use at least {1 / network.narrowest}"),
        (opt.columns is not None and 0 < num_columns < opt.columns,
         f"columns: a {opt.netType} of depth {opt.depth} has {num_columns}, not {opt.columns}",
         f"use 1 to {num_columns}" if num_columns > 1 else "leave it out"),
        # CIFAR shape: three stages of equal length
        (is_cifar and any((opt.d1, opt.d2, opt.d3, opt.d4)),
         f"d1 to d4 have no effect at {opt.imageSize} pixels",
         "use --depth, or an imageSize above 64"),
        (is_cifar and not known and (rest != 0 or n < 1),
         f"depth: {opt.depth} is not {step}n + {extra} ({variant})", f"use {close}{basic}"),
        # ImageNet shape: a known depth, or stages by --d1 to --d4
        (any(custom) and not all(custom),
         "d1 to d4: not all four are given", "give layers for all four blocks"),
        (all(custom) and standard != opt.stages and opt.depth != custom_depth,
         f"depth {opt.depth} has blocks of {as_text(standard)}, d1 to d4 say {as_text(opt.stages)}",
         "leave out depth or d1 to d4"),
        (bool(known) and not any(custom) and opt.depth not in known,
         f"depth: {opt.depth} is not {'one of ' * (len(known) > 1)}{', '.join(map(str, known))}",
         f"use {closest}, or give d1 to d4" if network.uses("d1") else f"use {closest}"),
    ]
    return [*(broken(rules) or _width_problems(opt)), *input_problems(opt)]
# fmt: on


def has_random_depth(opt: SimpleNamespace) -> bool:
    """Tell whether training steps draw what they compute."""
    return opt.stochasticDepth < 1 or opt.dropPath > 0


# fmt: off
def input_problems(opt: SimpleNamespace) -> list[Problem]:
    """Refuse what the images of a dataset cannot be made to."""
    is_whitened = opt.preprocess != "normalise"
    return broken([
        (opt.nChannels not in (1, 3) and not DATASETS[opt.dataset].is_generated,
         f"nChannels: images of {opt.dataset} have 3 channels, or 1 in grey, not {opt.nChannels}",
         "use 1 or 3; --dataset synthetic makes any number"),
        (is_whitened and opt.imageSize > 32,
         f"preprocess {opt.preprocess} of images of {opt.imageSize} pixels",
         "use --imageSize 32 or less, or --preprocess normalise"),
        (is_whitened and opt.inputRange is not None,
         f"inputRange has no effect with preprocess {opt.preprocess}", "leave out one of them"),
    ])
# fmt: on


def notes(opt: SimpleNamespace, given: dict[str, object]) -> list[str]:
    """List what the user should know about a network that can be built."""
    found, network = [], ARCHITECTURES[opt.netType]
    is_default_depth = opt.depth == network.depths[opt.imagenetShape]
    if _is_basic_in_lua(opt) and "bottleneck" not in given and not is_default_depth:
        basic_blocks = (opt.depth - network.extra_layers) // network.layers_per_block[False]
        found.append(
            f"{opt.netType} of depth {opt.depth} has {sum(opt.stages)} bottlenecks; "
            f"fb.resnet.torch's has {basic_blocks} basic blocks: --bottleneck false"
        )
    if network.uses("reduction") and not opt.bottleneck and opt.reduction < 1:
        found.append(
            f"bottleneck false with reduction {opt.reduction:g} is a DenseNet-C; "
            "the paper's basic DenseNet has --reduction 1"
        )
    return found


def _custom_stages(opt: SimpleNamespace) -> tuple[int, ...]:
    """Return the stages that --d1 to --d4 give, or zeros where they have no effect."""
    has_effect = opt.imagenetShape and ARCHITECTURES[opt.netType].uses("d1")
    return (opt.d1, opt.d2, opt.d3, opt.d4) if has_effect else (0, 0, 0, 0)


def _is_basic_in_lua(opt: SimpleNamespace) -> bool:
    """Tell whether fb.resnet.torch builds this residual network of basic blocks."""
    network = ARCHITECTURES[opt.netType]
    if not network.shortcuts or opt.imagenetShape or not opt.bottleneck:
        return False
    inside = opt.depth - network.extra_layers
    return inside > 0 and inside % (3 * network.layers_per_block[False]) == 0


def _width_problems(opt: SimpleNamespace) -> list[Problem]:
    """Refuse a DenseNet in which a transition leaves no feature map."""
    if not ARCHITECTURES[opt.netType].uses("growthRate"):
        return []
    channels = opt.initChannels
    for i, num_layers in enumerate(opt.stages[:-1], start=1):
        channels = math.floor(opt.reduction * (channels + num_layers * opt.growthRate))
        if channels < 1:
            return [
                (f"reduction: {opt.reduction:g} leaves no feature maps after block {i}", "use 0.5")
            ]
    return []


def adopt(opt: Settings, brought: dict[str, object], warn: Callable[[str], None]) -> Settings:
    """Take over the flags that weights bring, but those that the user has chosen."""
    if opt.adaptChannels:  # the weights follow the flag, not the flag the weights
        brought = {name: value for name, value in brought.items() if name != "nChannels"}
    chosen = {name for name in brought if name in opt.given and name not in opt.defaults}
    for name in chosen:
        if getattr(opt, name) != brought[name]:
            ours, theirs = as_text(getattr(opt, name)), as_text(brought[name])
            warn(f"{name} {ours}, as given; the weights are of a network with {theirs}")
    taken = {name: brought[name] for name in brought.keys() - chosen}
    opt = opt.replace(**taken, defaults=opt.defaults - taken.keys())
    UsageError.raise_for(input_problems(opt))
    return opt
