"""Weights of a Lua network onto a network of this project: both list their modules as they run."""

import math
import re
from collections import Counter
from itertools import pairwise

from torch import Tensor, nn

from errors import CheckpointError

# As fileio/lua_network.py names them: where a module stands in the Lua network, and which tensor.
_NAME = re.compile(r"(?:[1-9]\d*\.)+(?:weight|bias|running_mean|running_var)")
KINDS = {
    nn.Conv2d: "convolution",
    nn.BatchNorm2d: "batch normalisation",
    nn.Linear: "linear layer",
}
Module = tuple[str, str, tuple[int, ...]]  # kind, name, shape of its weight


def is_lua(weights: dict[str, Tensor]) -> bool:
    """Whether weights are named by their places in a Lua network."""
    return bool(weights) and all(map(_NAME.fullmatch, weights))


def to_model_names(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a Lua network under the names of the modules of `model` in the same places.

    A classifier for another number of classes is renamed as well.

    Raises:
        CheckpointError: the networks are different ones.
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
    """In the order of definition, which in these networks is that of running."""
    return [
        (KINDS[kind], name, tuple(module.weight.shape))
        for name, module in model.named_modules()
        for kind in KINDS
        if isinstance(module, kind)
    ]


def _difference(found: list[Module], expected: list[Module]) -> str | None:
    """Where two networks differ, in words; None if nowhere but in the number of classes."""
    counts = [Counter(kind for kind, *_ in modules) for modules in (found, expected)]
    if counts[0] != counts[1]:
        lists = [", ".join(f"{n[kind]} x {kind}" for kind in KINDS.values()) for n in counts]
        return f"the Lua network has {lists[0]}; this one {lists[1]}"
    problems = []
    for (kind, lua_name, shape), (expected_kind, name, expected_shape) in zip(
        found, expected, strict=True
    ):
        if kind != expected_kind:  # one of another order, where each after it would be reported
            return f"Lua module {lua_name} is a {kind}, {name} a {expected_kind}"
        first = 1 if kind == KINDS[nn.Linear] else 0
        if shape[first:] != expected_shape[first:]:
            problems.append(f"Lua module {lua_name} has shape {shape}, {name} {expected_shape}")
    return "; ".join(problems[:3]) + (f"; {len(problems)} in all" if problems[3:] else "") or None


def densenet_flags(shapes: list[tuple[int, ...]]) -> str | None:
    """The flags of the DenseNet that has convolutions of these shapes, None if none has."""
    stem, *rest = shapes or [()]
    widths = {shape[0] for shape in rest if shape[2] == 3}
    if len(widths) != 1 or {shape[2] for shape in rest} != {1, 3}:
        return None  # in a ResNet the 3x3 convolutions widen from stage to stage
    count = Counter(shape[2] for shape in rest)
    bottleneck = count[1] >= count[3]
    # Between blocks two 1x1 convolutions follow each other if layers begin with one.
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
