"""Compute Figure 5 of the paper: how much each layer of a DenseNet uses each earlier one.

Cell (s, l) of a dense block is the mean absolute weight by which the first convolution of layer l
reads the features of layer s. Source 0 is the input of the block. The last column is the layer
that reads the whole block: the 1x1 convolution of its transition, or the classifier.
"""

import csv
import io
import itertools
import re
from pathlib import Path

from errors import CheckpointError, DataError

# The cells of one dense block of n layers: n + 1 columns; column l has the l sources 0 to l - 1.
Block = list[list[float]]

COLUMNS = ("network", "block", "target", "source", "mean_abs_weight")
# `conv.1` is the spelling of old torchvision files.
LAYER_WEIGHT = re.compile(r"features\.denseblock(\d+)\.denselayer(\d+)\.conv\.?1\.weight")


def read(path: Path) -> tuple[str, list[Block], bytes]:
    """Return the name of the weights, the cells of Figure 5, and both as CSV.

    Args:
        path: the CSV of an earlier call, or weights that tools.inference.sources reads.

    Raises:
        RunError: it cannot be read, or is not of a DenseNet.
    """
    if path.suffix == ".csv":
        try:
            table = path.read_bytes()
        except OSError as error:
            what = f"cannot read {path}: {error.strerror}"
            raise DataError(what, "name a figure5.csv") from error
    else:
        from models import lua_weights
        from tools.inference import sources

        sources.check_there(path)
        weights = sources.read(path).weights
        if lua_weights.is_lua(weights):
            fix = "write them with python -m tools.export --to weights first"
            raise CheckpointError(f"the weights in {path} are named as in Lua", fix)
        in_run = path.stem.startswith(("checkpoint_", "model_"))
        full = path.resolve()
        name = full.parent.name if in_run else full.name if path.is_dir() else full.stem
        table = to_csv(name, blocks(weights, path))
    # Always through the table, so that the figure is a function of it.
    return *from_csv(path, table), table


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
        if match := LAYER_WEIGHT.fullmatch(name):
            layers.setdefault(int(match[1]), {})[int(match[2])] = tensor
    if not layers:
        raise refuse("it has no dense block")
    found = []
    for number in sorted(layers):
        is_last = number == max(layers)
        name = "classifier.weight" if is_last else f"features.transition{number}.conv.weight"
        if name not in weights:
            raise refuse(f"{name} is missing")
        readers = [layers[number][layer] for layer in sorted(layers[number])] + [weights[name]]
        widths = [
            weight.shape[1] if weight.dim() > 1 and weight.numel() else 0 for weight in readers
        ]
        growth = {later - earlier for earlier, later in itertools.pairwise(widths)}
        if len(growth) != 1 or min(*growth, widths[0]) < 1:  # also where a layer is missing
            read = ", ".join(map(str, widths))
            raise refuse(f"dense block {number} has layers that read {read} channels")
        block = []
        for layer, weight in enumerate(readers, start=1):  # (C_out, C_in, ...)
            per_channel = weight.double().abs().transpose(0, 1).flatten(1).mean(dim=1)  # (C_in,)
            ranges = itertools.pairwise([0, *widths[:layer]])
            block.append([per_channel[start:end].mean().item() for start, end in ranges])
        found.append(block)
    return found


def exit_of(number: int, blocks: list[Block]) -> str:
    """Name the target of the last column of block `number`, counted from 1."""
    return "transition" if number < len(blocks) else "classifier"


def to_csv(network: str, blocks: list[Block]) -> bytes:
    """Write the cells with five digits, a line each; `network` names their weights."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for number, block in enumerate(blocks, start=1):
        targets = [*range(1, len(block)), exit_of(number, blocks)]
        for layer, (target, column) in enumerate(zip(targets, block, strict=True), start=1):
            for source, value in zip(range(layer), column, strict=True):
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
        for row in csv.DictReader(content.decode().splitlines()):
            column = found.setdefault(row["block"], {}).setdefault(row["target"], [])
            column.append(float(row["mean_abs_weight"]))
        blocks = [list(columns.values()) for columns in found.values()]
        # Names and numbers of blocks, targets and sources are right if writing them gives the file.
        if not blocks or to_csv(row["network"], blocks) != content:
            raise ValueError
    except (ValueError, csv.Error, KeyError, TypeError) as error:
        fix = "write it again with --weights CHECKPOINT"
        raise DataError(f"{path} is not a complete table of Figure 5", fix) from error
    return row["network"], blocks
