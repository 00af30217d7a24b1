"""Rename the weights of a Lua network: both networks list their modules in running order."""

import math
import re
from collections import Counter
from itertools import pairwise

from torch import Tensor, nn

from errors import CheckpointError
from models.registry import DENSENET_STAGES

# A name from fileio/lua_network.py: the module's path in the Lua network, then the tensor's name.
_NAME = re.compile(r"(?:[1-9]\d*\.)+(?:weight|bias|running_mean|running_var)")
KINDS = {
    nn.Conv2d: "convolution",
    nn.BatchNorm2d: "batch normalisation",
    nn.Linear: "linear layer",
}
Module = tuple[str, str, tuple[int, ...]]  # kind, name, shape of its weight


def is_lua(weights: dict[str, Tensor]) -> bool:
    """Tell whether weights are named by module paths of a Lua network."""
    return bool(weights) and all(map(_NAME.fullmatch, weights))


def to_model_names(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the weights of a Lua network to those of `model`, module by module.

    The classifiers may have different numbers of classes.

    Raises:
        CheckpointError: the networks differ; the fix names the flags of a DenseNet that fits.
    """
    found, expected = _lua_modules(weights), _model_modules(model)
    problem = _difference(found, expected)
    if problem:
        flags = densenet_flags([shape for kind, _, shape in found if kind == KINDS[nn.Conv2d]])
        fix = f"use {flags}" if flags else "give the flags of that network"
        raise CheckpointError(f"weights do not fit the network: {problem}", fix)
    names = {lua_name: name for (_, lua_name, _), (_, name, _) in zip(found, expected, strict=True)}
    return {
        f"{names[lua_name]}.{name}": tensor
        for (lua_name, _, name), tensor in zip(
            (full.rpartition(".") for full in weights), weights.values(), strict=True
        )
    }


def _lua_modules(weights: dict[str, Tensor]) -> list[Module]:
    found = []
    for name, tensor in weights.items():
        lua_name, _, of = name.rpartition(".")
        if of != "weight":
            continue
        is_norm = f"{lua_name}.running_mean" in weights
        kind = nn.BatchNorm2d if is_norm else nn.Conv2d if tensor.dim() == 4 else nn.Linear
        found.append((KINDS[kind], lua_name, tuple(tensor.shape)))
    return found


def _model_modules(model: nn.Module) -> list[Module]:
    """List modules in order of definition, which in these networks is the running order."""
    return [
        (KINDS[kind], name, tuple(module.weight.shape))
        for name, module in model.named_modules()
        for kind in KINDS
        if isinstance(module, kind)
    ]


def _difference(found: list[Module], expected: list[Module]) -> str | None:
    """Say where two networks differ; None if only in the number of classes."""
    counts = [Counter(kind for kind, *_ in modules) for modules in (found, expected)]
    if counts[0] != counts[1]:
        lists = [", ".join(f"{n[kind]} x {kind}" for kind in KINDS.values()) for n in counts]
        return f"the Lua network has {lists[0]}; this one {lists[1]}"
    problems = []
    for (kind, lua_name, shape), (expected_kind, name, expected_shape) in zip(
        found, expected, strict=True
    ):
        if kind != expected_kind:  # report only the first: all later ones differ too
            return f"Lua module {lua_name} is a {kind}, {name} a {expected_kind}"
        first = 1 if kind == KINDS[nn.Linear] else 0
        if shape[first:] != expected_shape[first:]:
            problems.append(f"Lua module {lua_name} has shape {shape}, {name} {expected_shape}")
    return "; ".join(problems[:3]) + (f"; {len(problems)} in all" if problems[3:] else "") or None


def densenet_flags(shapes: list[tuple[int, ...]]) -> str | None:
    """Return the flags of the DenseNet whose convolutions have these shapes, or None."""
    stem, *rest = shapes or [()]
    widths = {shape[0] for shape in rest if shape[2] == 3}
    if len(widths) != 1 or {shape[2] for shape in rest} != {1, 3}:
        return None  # a ResNet: its 3x3 convolutions widen from stage to stage
    if stem[2] == 7 and len(shapes) + 1 not in DENSENET_STAGES:
        return None
    count = Counter(shape[2] for shape in rest)
    bottleneck = count[1] >= count[3]
    # A transition's 1x1 convolution; with bottleneck, another 1x1 convolution follows it.
    between = [a for a, b in pairwise(rest) if a[2] == 1 and (b[2] == 1 or not bottleneck)]
    compressions = (1.0, 0.5, *(percent / 100 for percent in range(1, 100)))
    matching = [theta for theta in compressions
               if all(math.floor(theta * shape[1]) == shape[0] for shape in between)]  # fmt: skip
    if not matching:
        return None
    return (
        f"--depth {len(shapes) + 1} --growthRate {min(widths)} --initChannels {stem[0]}"
        f" --bottleneck {str(bottleneck).lower()} --reduction {matching[0]:g}"
    )
