"""Figure 5 of the paper as numbers: how much each layer of a DenseNet uses each earlier one.

Cell (s, l) of a dense block is the mean absolute weight by which the first convolution of layer l
reads the feature maps that layer s has made. Source 0 is the input of the block. The last column
is what reads the whole block: the 1x1 convolution of its transition, or the classifier.
"""

import csv
import io
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

from errors import CheckpointError, DataError

COLUMNS = ("network", "block", "target", "source", "mean_abs_weight")
EXITS = ("transition", "classifier")
# `conv.1` is the spelling of old torchvision files.
_LAYER = re.compile(r"features\.denseblock(\d+)\.denselayer(\d+)\.conv\.?1\.weight")


@dataclass(frozen=True)
class Block:
    """The cells of one dense block of n layers.

    Args:
        exit: what its last column is, one of EXITS.
        columns: for layer 1 to n, and then for the exit, the mean absolute weight of each source
            that it reads: l for layer l, n + 1 for the exit.
    """

    exit: str
    columns: tuple[tuple[float, ...], ...]


# ------------------------------------------------------------------------------------ from weights


def blocks(weights: dict, source: object) -> list[Block]:
    """The cells of every dense block of a state dict: CIFAR or ImageNet shape, basic or bottleneck.

    The channels that a layer made are found from what its successors read: layer l reads those of
    the block's input and of the layers before it, in this order.

    Args:
        weights: tensors with the names of this project, torchvision or timm.
        source: where they are from, for the message.

    Raises:
        CheckpointError: these are not the weights of a DenseNet.
    """
    layers: dict[int, dict[int, object]] = {}
    for name, tensor in weights.items():
        match = _LAYER.fullmatch(name)
        if match:
            layers.setdefault(int(match[1]), {})[int(match[2])] = tensor
    if not layers:
        raise _no_densenet(source, "it has no dense block")
    found = []
    for number in sorted(layers):
        last = number == max(layers)
        name = "classifier.weight" if last else f"features.transition{number}.conv.weight"
        if name not in weights:
            raise _no_densenet(source, f"{name} is missing")
        readers = [layers[number][layer] for layer in sorted(layers[number])] + [weights[name]]
        problem = _problem(readers)
        if problem:
            raise _no_densenet(source, f"dense block {number} {problem}")
        found.append(Block(EXITS[last], _columns(readers)))
    return found


def _problem(readers: list) -> str | None:
    """Why these weights, (C_out, C_in, ...) each, do not read a dense block; None when they do."""
    if any(weight.dim() < 2 or not weight.numel() for weight in readers):
        return "has a weight of too few dimensions"
    ends = [weight.shape[1] for weight in readers]
    growth = {later - earlier for earlier, later in itertools.pairwise(ends)}
    if len(growth) != 1 or min(growth) < 1:  # also where a layer is missing
        return f"has layers that read {', '.join(map(str, ends))} channels"
    return None


def _columns(readers: list) -> tuple[tuple[float, ...], ...]:
    """Mean absolute weights of what reads the outputs of the layers, (C_out, C_in, ...) each."""
    ends = [weight.shape[1] for weight in readers]  # where the channels of source 0, 1, ... end
    columns = []
    for layer, weight in enumerate(readers, start=1):
        per_channel = weight.double().abs().transpose(0, 1).flatten(1).mean(dim=1)  # (C_in,)
        slices = zip([0, *ends[: layer - 1]], ends[:layer], strict=True)
        columns.append(tuple(per_channel[start:end].mean().item() for start, end in slices))
    return tuple(columns)


def _no_densenet(source: object, why: str) -> CheckpointError:
    return CheckpointError(
        f"{source} is not of a DenseNet: {why}", "name weights of --netType densenet"
    )


# -------------------------------------------------------------------------------------- file of it


def as_csv(network: str, cells: list[Block]) -> bytes:
    """The cells with five digits, one line each; `network` says whose they are."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for number, block in enumerate(cells, start=1):
        targets = [*range(1, len(block.columns)), block.exit]
        for target, column in zip(targets, block.columns, strict=True):
            for source, value in enumerate(column):
                writer.writerow([network, number, target, source, f"{value:.5g}"])
    return text.getvalue().encode()


def from_csv(path: Path, content: bytes) -> tuple[str, list[Block]]:
    """The network's name and the cells that `as_csv` has written.

    Args:
        path: named in the message when something is wrong.

    Raises:
        DataError: it is no such file, or not whole.
    """
    fix = "write it anew with --weights CHECKPOINT"
    try:
        rows = list(csv.DictReader(content.decode().splitlines(), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV file: {error}", fix) from error
    if not rows or tuple(rows[0]) != COLUMNS:
        raise DataError(f"{path} does not have the columns {', '.join(COLUMNS)}", fix)
    found: dict[str, dict[str, list[float]]] = {}  # block -> target -> values
    try:
        for row in rows:
            column = found.setdefault(row["block"], {}).setdefault(row["target"], [])
            value = float(row["mean_abs_weight"])
            if int(row["source"]) != len(column) or not 0 <= value < math.inf:
                raise ValueError
            column.append(value)
        cells = [_whole_block(targets) for targets in found.values()]
        exits = [block.exit for block in cells]
        if exits != ["transition"] * (len(cells) - 1) + ["classifier"]:
            raise ValueError
        if list(found) != [str(number) for number in range(1, len(found) + 1)]:
            raise ValueError
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is not a whole table of Figure 5", fix) from error
    return rows[0]["network"], cells


def _whole_block(targets: dict[str, list[float]]) -> Block:
    """A block from its columns by name; ValueError when one is missing or too short."""
    *layers, exit_name = targets
    sizes = [len(column) for column in targets.values()]
    in_order = layers == [str(number) for number in range(1, len(layers) + 1)]
    if not layers or not in_order or exit_name not in EXITS:
        raise ValueError
    if sizes != list(range(1, len(targets) + 1)):
        raise ValueError
    return Block(exit_name, tuple(tuple(column) for column in targets.values()))


# ----------------------------------------------------------------------------------- for the figure

SCALES = {
    "column": "divided by the largest of its target",
    "block": "divided by the largest of its block",
    "none": "not normalised",
}


def scaled(block: Block, scale: str) -> Block:
    """The cells on the figure's scale.

    The paper shows 0 to 1 and does not say of what. Only the sources of one target are compared
    in its text, and batch normalisation takes the size of a layer's weights out of the network, so
    that the default is to divide each column by its largest cell.

    Args:
        scale: one of SCALES.
    """
    if scale == "none":
        return block
    whole = max(map(max, block.columns))
    columns = []
    for column in block.columns:
        largest = max(column) if scale == "column" else whole
        columns.append(tuple(value / largest if largest else 0.0 for value in column))
    return Block(block.exit, tuple(columns))
