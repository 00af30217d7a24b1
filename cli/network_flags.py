"""Depth arithmetic: the depths that each network can have, the blocks that they give, its widths.

The functions read the resolved settings, `opt`, as far as they stand when they are called.
"""

import math
from types import SimpleNamespace

from cli.flags import Problem, as_text
from models.architectures import _BASIC, _OUTSIDE, DEFAULTS, IMAGENET_STAGES, WIDE


def resolve(opt: SimpleNamespace) -> None:
    """Give `opt` the depth and widths that are not given, and `stages`, the blocks of each stage.

    A stage of a DenseNet is a dense block, and what is counted are its layers. Also sets
    `bottleneck` where the depth or the network decides about it.
    """
    free = _free(opt)
    if opt.depth is None:
        opt.depth = _counted(opt, free) if any(free) else DEFAULTS[opt.netType][opt.imagenetShape]
    if opt.netType != "densenet" and opt.imagenetShape:
        opt.bottleneck = opt.depth not in _BASIC
    elif opt.netType == "resnet":
        opt.bottleneck = False
    if opt.imagenetShape:
        opt.stages = free if any(free) else IMAGENET_STAGES[opt.netType].get(opt.depth, ())
    else:
        opt.stages = ((opt.depth - _OUTSIDE[opt.netType]) // _step(opt),) * 3
    if opt.netType == "densenet":
        _resolve_widths(opt)


def _resolve_widths(opt: SimpleNamespace) -> None:
    if opt.growthRate is None:
        opt.growthRate = (48 if opt.depth in WIDE else 32) if opt.imagenetShape else 12
    if opt.initChannels is None:
        wide = opt.imagenetShape or opt.bottleneck
        opt.initChannels = 2 * opt.growthRate if wide else 16


def problems(opt: SimpleNamespace) -> list[Problem]:
    """What is impossible about the depth or the widths of resolved settings."""
    found = _check_large(opt) if opt.imagenetShape else _check_small(opt)
    return found or _check_widths(opt)


def _free(opt: SimpleNamespace) -> tuple[int, ...]:
    """The stages of one's own; all 0 where there are none, or none that would count."""
    own = opt.imagenetShape and opt.netType == "densenet"
    return (opt.d1, opt.d2, opt.d3, opt.d4) if own else (0, 0, 0, 0)


def _counted(opt: SimpleNamespace, stages: tuple[int, ...]) -> int:
    """The layers of a DenseNet with these stages at the ImageNet shape."""
    return (2 if opt.bottleneck else 1) * sum(stages) + 5


def _step(opt: SimpleNamespace) -> int:
    """The layers that one more block in each of three stages adds."""
    if opt.netType == "densenet":
        return 6 if opt.bottleneck else 3
    return 9 if opt.bottleneck else 6


def _check_small(opt: SimpleNamespace) -> list[Problem]:
    """The CIFAR shape: three stages of equal length."""
    step, outside, found = _step(opt), _OUTSIDE[opt.netType], []
    n, rest = divmod(opt.depth - outside, step)
    dense = opt.netType == "densenet"
    if dense and any((opt.d1, opt.d2, opt.d3, opt.d4)):
        what = f"d1 to d4 have no effect at {opt.imageSize} pixels"
        found = [(what, "use --depth, or an imageSize above 64")]
    if rest or n < 1:
        low = step * max(n, 1) + outside
        near = f"{low}" if n < 1 else f"{low} or {low + step}"
        form = "with bottleneck" if opt.bottleneck else "without bottleneck"
        form = opt.netType if opt.netType == "resnet" else form
        what = f"depth: {opt.depth} is not {step}n + {outside} ({form})"
        basic = ", or --bottleneck false" if is_basic_elsewhere(opt) else ""
        found.append((what, f"use {near}{basic}"))
    return found


def is_basic_elsewhere(opt: SimpleNamespace) -> bool:
    """Whether fb.resnet.torch would build a pre-activation ResNet of basic blocks at this depth."""
    if opt.netType != "preresnet" or opt.imagenetShape or not opt.bottleneck:
        return False
    return opt.depth > 2 and (opt.depth - 2) % 6 == 0


def _check_large(opt: SimpleNamespace) -> list[Problem]:
    """The ImageNet shape: one of the known depths, or stages of one's own."""
    free, known = _free(opt), IMAGENET_STAGES[opt.netType]
    if any(free):
        if not all(free):
            return [("d1 to d4: not all four are given", "give layers for all four blocks")]
        named = known.get(opt.depth, opt.stages)
        if named != opt.stages and opt.depth != _counted(opt, opt.stages):
            stages = f"{as_text(named)}, d1 to d4 say {as_text(opt.stages)}"
            return [(f"depth {opt.depth} has blocks of {stages}", "leave out depth or d1 to d4")]
    elif opt.depth not in known:
        near = min(known, key=lambda depth: abs(depth - opt.depth))
        what = f"depth: {opt.depth} is not one of {', '.join(map(str, known))}"
        own = ", or give d1 to d4" if opt.netType == "densenet" else ""
        return [(what, f"use {near}{own}")]
    return []


def _check_widths(opt: SimpleNamespace) -> list[Problem]:
    """Each transition of a DenseNet must leave a map."""
    if opt.netType != "densenet":
        return []
    channels = opt.initChannels
    for i, num_layers in enumerate(opt.stages[:-1], start=1):
        channels = math.floor(opt.reduction * (channels + num_layers * opt.growthRate))
        if channels < 1:
            what = f"reduction: {opt.reduction:g} leaves no maps after block {i}"
            return [(what, "use 0.5")]
    return []
