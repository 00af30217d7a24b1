"""Depth arithmetic: the depths that each network can have, the blocks that they give, its widths.

The functions read the resolved settings, `opt`, as far as they stand when they are called. Only
`apply_defaults`, which is called while they are made, writes into them.
"""

import math
from types import SimpleNamespace

from cli.flag_types import Problem, as_text
from models.registry import ARCHITECTURES, Architecture


def architecture(opt: SimpleNamespace) -> Architecture:
    """Return what is known of the network that the settings name."""
    return ARCHITECTURES[opt.netType]


def apply_defaults(opt: SimpleNamespace) -> None:
    """Give `opt` the depth and widths that are not given, and `stages`, the blocks of each stage.

    A stage of a DenseNet is a dense block, and what is counted are its layers. Flags that the
    network does not read, or that its depth decides about, get the values that they have for it.
    """
    network, is_imagenet = architecture(opt), opt.imagenetShape
    vars(opt).update(network.unused_flags)
    if network.shortcuts and opt.shortcutType is None:
        opt.shortcutType = network.shortcuts[is_imagenet]
    custom = _custom_stages(opt)
    if opt.depth is None:
        opt.depth = _depth_of(opt, custom) if any(custom) else network.depths[is_imagenet]
    if is_imagenet and network.basic_depths is not None:
        opt.bottleneck = opt.depth not in network.basic_depths
    elif not network.uses("bottleneck"):
        opt.bottleneck = False
    if is_imagenet:
        opt.stages = custom if any(custom) else network.imagenet_stages.get(opt.depth, ())
    else:
        opt.stages = ((opt.depth - network.extra_layers) // _depth_step(opt),) * 3
    if network.uses("growthRate"):
        _apply_width_defaults(opt, network)


def _apply_width_defaults(opt: SimpleNamespace, network: Architecture) -> None:
    if opt.growthRate is None:
        is_wide = opt.depth in network.wide_depths
        opt.growthRate = (48 if is_wide else 32) if opt.imagenetShape else 12
    if opt.initChannels is None:
        wide = opt.imagenetShape or opt.bottleneck
        opt.initChannels = 2 * opt.growthRate if wide else 16


def network_name(opt: SimpleNamespace) -> str:
    """The network in a run's name: `densenet-BC-L100-k12`, `resnet-L110`, `preresnet-L164-B`."""
    network = architecture(opt)
    if network.shortcuts:
        default_shortcut = network.shortcuts[opt.imagenetShape]
        shortcut = "" if opt.shortcutType == default_shortcut else f"-{opt.shortcutType}"
        is_basic = network.uses("bottleneck") and not opt.imagenetShape and not opt.bottleneck
        return f"{opt.netType}-L{opt.depth}{shortcut}{'-basic' if is_basic else ''}"
    variant = "-" + ("B" if opt.bottleneck else "") + ("C" if opt.reduction < 1 else "")
    return f"{opt.netType}{variant.rstrip('-')}-L{opt.depth}-k{opt.growthRate}"


def problems(opt: SimpleNamespace) -> list[Problem]:
    """What is impossible about the depth or the widths of settings with their defaults."""
    found = _check_imagenet(opt) if opt.imagenetShape else _check_cifar(opt)
    return found or _check_widths(opt)


def notes(opt: SimpleNamespace, given: dict[str, object]) -> list[str]:
    """What the user should know about the network, though it stops nothing."""
    found, network = [], architecture(opt)
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
    """The stages that --d1 to --d4 give; all 0 without them, or where they do not count."""
    custom = opt.imagenetShape and architecture(opt).uses("d1")
    return (opt.d1, opt.d2, opt.d3, opt.d4) if custom else (0, 0, 0, 0)


def _depth_of(opt: SimpleNamespace, stages: tuple[int, ...]) -> int:
    """The layers of a DenseNet with these stages at the ImageNet shape."""
    return architecture(opt).layers_per_block[opt.bottleneck] * sum(stages) + 5


def _depth_step(opt: SimpleNamespace) -> int:
    """The layers that one more block in each of three stages adds."""
    return 3 * architecture(opt).layers_per_block[opt.bottleneck]


def _check_cifar(opt: SimpleNamespace) -> list[Problem]:
    """The CIFAR shape: three stages of equal length."""
    network, found = architecture(opt), []
    step, extra_layers = _depth_step(opt), network.extra_layers
    n, rest = divmod(opt.depth - extra_layers, step)
    if any((opt.d1, opt.d2, opt.d3, opt.d4)):
        what = f"d1 to d4 have no effect at {opt.imageSize} pixels"
        found = [(what, "use --depth, or an imageSize above 64")]
    if rest or n < 1:
        low = step * max(n, 1) + extra_layers
        close = f"{low}" if n < 1 else f"{low} or {low + step}"
        variant = "with bottleneck" if opt.bottleneck else "without bottleneck"
        variant = variant if network.uses("bottleneck") else opt.netType
        what = f"depth: {opt.depth} is not {step}n + {extra_layers} ({variant})"
        basic = ", or --bottleneck false" if _is_basic_in_lua(opt) else ""
        found.append((what, f"use {close}{basic}"))
    return found


def _is_basic_in_lua(opt: SimpleNamespace) -> bool:
    """Whether fb.resnet.torch would build a residual network of basic blocks at this depth."""
    network = architecture(opt)
    if not network.shortcuts or opt.imagenetShape or not opt.bottleneck:
        return False
    inside = opt.depth - network.extra_layers
    return inside > 0 and inside % (3 * network.layers_per_block[False]) == 0


def _check_imagenet(opt: SimpleNamespace) -> list[Problem]:
    """The ImageNet shape: one of the known depths, or stages of one's own."""
    custom, network = _custom_stages(opt), architecture(opt)
    known = network.imagenet_stages
    if any(custom):
        if not all(custom):
            return [("d1 to d4: not all four are given", "give layers for all four blocks")]
        standard = known.get(opt.depth, opt.stages)
        if standard != opt.stages and opt.depth != _depth_of(opt, opt.stages):
            stages = f"{as_text(standard)}, d1 to d4 say {as_text(opt.stages)}"
            return [(f"depth {opt.depth} has blocks of {stages}", "leave out depth or d1 to d4")]
    elif opt.depth not in known:
        close = min(known, key=lambda depth: abs(depth - opt.depth))
        what = f"depth: {opt.depth} is not one of {', '.join(map(str, known))}"
        fix = f"use {close}, or give d1 to d4" if network.uses("d1") else f"use {close}"
        return [(what, fix)]
    return []


def _check_widths(opt: SimpleNamespace) -> list[Problem]:
    """Each transition of a DenseNet must leave a map."""
    if not architecture(opt).uses("growthRate"):
        return []
    channels = opt.initChannels
    for i, num_layers in enumerate(opt.stages[:-1], start=1):
        channels = math.floor(opt.reduction * (channels + num_layers * opt.growthRate))
        if channels < 1:
            what = f"reduction: {opt.reduction:g} leaves no maps after block {i}"
            return [(what, "use 0.5")]
    return []
