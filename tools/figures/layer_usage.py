"""Compute Figure 5 of the paper: how much each layer of a DenseNet uses each earlier one.

Cell (s, l) of a dense block is the mean absolute weight by which the first convolution of layer l
reads the features of layer s. Source 0 is the input of the block. The last column is the layer
that reads the whole block: the 1x1 convolution of its transition, or the classifier.
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
# `conv.1` is the spelling of old torchvision files.
LAYER_WEIGHT = re.compile(r"features\.denseblock(\d+)\.denselayer(\d+)\.conv\.?1\.weight")


@dataclass(frozen=True)
class Block:
    """The cells of one dense block of n layers.

    Args:
        exit: the target of the last column, "transition" or "classifier".
        columns: n + 1 targets; column l has the l sources 0 to l - 1.
    """

    exit: str
    columns: tuple[tuple[float, ...], ...]


def blocks(weights: dict, source: object) -> list[Block]:
    """Compute the cells of every dense block: CIFAR or ImageNet shape, basic or bottleneck.

    Layer l reads the channels of the block's input and of the layers before it, in this order, so
    the input channels of successive layers tell which channels each one made.

    Args:
        weights: a state dict with the names of this project, torchvision or timm.
        source: the file, for error messages.

    Raises:
        CheckpointError: the weights are not those of a DenseNet.
    """

    def refuse(why: str) -> CheckpointError:
        what = f"{source} is not of a DenseNet: {why}"
        return CheckpointError(what, "name weights of --netType densenet")

    layers: dict[int, dict[int, object]] = {}
    for name, tensor in weights.items():
        match = LAYER_WEIGHT.fullmatch(name)
        if match:
            layers.setdefault(int(match[1]), {})[int(match[2])] = tensor
    if not layers:
        raise refuse("it has no dense block")
    found = []
    for number in sorted(layers):
        last = number == max(layers)
        name = "classifier.weight" if last else f"features.transition{number}.conv.weight"
        if name not in weights:
            raise refuse(f"{name} is missing")
        readers = [layers[number][layer] for layer in sorted(layers[number])] + [weights[name]]
        if any(weight.dim() < 2 or not weight.numel() for weight in readers):
            raise refuse(f"dense block {number} has a weight of too few dimensions")
        widths = [weight.shape[1] for weight in readers]
        growth = {later - earlier for earlier, later in itertools.pairwise(widths)}
        if len(growth) != 1 or min(growth) < 1:  # also where a layer is missing
            read = ", ".join(map(str, widths))
            raise refuse(f"dense block {number} has layers that read {read} channels")
        found.append(Block("classifier" if last else "transition", _columns(readers, widths)))
    return found


def _columns(readers: list, widths: list[int]) -> tuple[tuple[float, ...], ...]:
    """Average |weight| over each source's channels; readers are (C_out, C_in, ...) each."""
    columns = []
    for layer, weight in enumerate(readers, start=1):
        per_channel = weight.double().abs().transpose(0, 1).flatten(1).mean(dim=1)  # (C_in,)
        ranges = itertools.pairwise([0, *widths[:layer]])
        columns.append(tuple(per_channel[start:end].mean().item() for start, end in ranges))
    return tuple(columns)


# ------------------------------------------------------------------------------------ its CSV file


def to_csv(network: str, cells: list[Block]) -> bytes:
    """Write the cells with five digits, a line each; `network` names their weights."""
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
    """Read the network's name and the cells that `to_csv` has written.

    Args:
        path: the file, for the error message.

    Raises:
        DataError: the content is not that of `to_csv`, or not complete.
    """
    found: dict[str, dict[str, list[float]]] = {}  # block -> target -> values
    try:
        rows = list(csv.DictReader(content.decode().splitlines()))
        for row in rows:
            column = found.setdefault(row["block"], {}).setdefault(row["target"], [])
            column.append(float(row["mean_abs_weight"]))
        network = rows[0]["network"]
    except (ValueError, csv.Error, KeyError, TypeError, IndexError):
        network = ""
    cells = [Block(list(columns)[-1], tuple(map(tuple, columns.values()))) for columns in
             found.values()]  # fmt: skip
    exits = ["transition"] * (len(cells) - 1) + ["classifier"]
    is_whole = [block.exit for block in cells] == exits and all(
        len(column) == layer and all(0 <= value < math.inf for value in column)
        for block in cells
        for layer, column in enumerate(block.columns, start=1)
    )
    # Names and numbers of blocks, targets and sources are right if writing them gives the file.
    if not is_whole or to_csv(network, cells) != content:
        fix = "write it again with --weights CHECKPOINT"
        raise DataError(f"{path} is not a complete table of Figure 5", fix)
    return network, cells


# ----------------------------------------------------------------------------------- for the figure

SCALES = {
    "column": "divided by the largest of its target",
    "block": "divided by the largest of its block",
    "none": "not normalised",
}


def scaled(block: Block, scale: str) -> Block:
    """Divide the cells as one of SCALES says.

    The paper shows 0 to 1 and does not say of what. Its text compares only the sources of one
    target, and batch normalisation removes the scale of a layer's weights from the network, so the
    default divides each column by its largest cell.
    """
    if scale == "none":
        return block
    largest = [max(column) for column in block.columns]
    if scale == "block":
        largest = [max(largest)] * len(largest)
    columns = zip(block.columns, largest, strict=True)
    divided = tuple(tuple(value / (most or 1.0) for value in column) for column, most in columns)
    return Block(block.exit, divided)
