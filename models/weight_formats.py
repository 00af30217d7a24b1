"""List the libraries whose DenseNets compute as this one does, and convert between their weights.

One entry of `FORMATS` a library: the names of its modules and variables, the layouts of its arrays,
its epsilon and what its dropout does to weights. docs/exchange.md says how each rule was measured.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import NamedTuple

from torch import Tensor

from errors import CheckpointError
from models.dense_block import BOTTLENECK_WIDTH

Weights = dict[str, Tensor]
# A DenseNet's modules in running order: stem, layer l of block b, transition b, end. c is b + 1.
OURS = (
    "features.conv0", "features.norm0",
    *(f"features.denseblock{{b}}.denselayer{{l}}.{name}" for name in
      ("norm1", "conv1", "norm2", "conv2")),
    "features.transition{b}.norm", "features.transition{b}.conv", "features.norm5", "classifier",
)  # fmt: skip
MONAI = (*(name.replace("{l}.", "{l}.layers.") for name in OURS[:-1]), "class_layers.out")
PADDLE = (
    "conv1_func._conv", "conv1_func._batch_norm",
    *(f"db_conv_{{c}}.conv{{c}}_{{l}}.bn_ac_func{name}" for name in
      ("1._batch_norm", "1._conv", "2._batch_norm", "2._conv")),
    "tr_conv{c}_blk.conv_ac_func._batch_norm", "tr_conv{c}_blk.conv_ac_func._conv",
    "batch_norm", "out",
)  # fmt: skip
KERAS = (
    "conv1_conv", "conv1_bn",
    *(f"conv{{c}}_block{{l}}_{name}" for name in ("0_bn", "1_conv", "1_bn", "2_conv")),
    "pool{c}_bn", "pool{c}_conv", "bn", "predictions",
)  # fmt: skip
(STEM_CONV, STEM_NORM, NORM1, CONV1, NORM2, CONV2, TRANSITION_NORM, TRANSITION_CONV, LAST_NORM,
 CLASSIFIER) = range(len(OURS))  # fmt: skip
NORMS = (STEM_NORM, NORM1, NORM2, TRANSITION_NORM, LAST_NORM)
Place = tuple[int, int, int]  # of a module: its index in OURS, its block and layer from 1 on, or 0
VARIABLES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# In old torchvision files, `...denselayer1.norm.1.weight` for `...denselayer1.norm1.weight`.
_OLD_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
# What no flag of main.py describes: the name that shows it, what it is, who has it.
OTHER_PARTS = (
    (r"features\.(conv|norm)[12]\.", "a deep stem of three convolutions",
     ", as timm's densenetblur121d and densenet264d"),
    (r".*\.filt", "anti-aliased pooling", ", as timm's densenetblur121d"),
)  # fmt: skip
THRESHOLDS = "op_threshs"  # of torchxrayvision's calibration, one for each output
NEUTRAL = 0.5  # leaves a score as it is


@dataclass(frozen=True)
class WeightFormat:
    """Describe how a library names and computes the weights of a DenseNet."""

    name: str  # of `--from` and `--to`
    title: str
    modules: tuple[str, ...] = OURS  # names, in the order of OURS
    # Separator of module and variable, and the norm's variables in the order of VARIABLES.
    separator: str = "."
    norm: tuple[str, ...] = VARIABLES
    kernel: str = "weight"  # of a convolution or the classifier
    conv_axes: tuple[int, ...] | None = None  # of its layout in (F, C, h, w); None: the same
    transposes_classifier: bool = False  # (C, classes)
    has_classifier: bool = True
    eps: float = 1e-5  # of every batch norm
    suffixes: tuple[str, ...] = ()  # of the files that it reads; none: those of PyTorch
    scales_dropout: bool = False  # evaluation multiplies the output of a layer by 1 - drop_rate
    drop_rate: float = 0.0  # of the network at hand, where that scales weights
    remark: str = ""  # what names and values do not show
    # Flags of main.py that hold for its networks.
    settings: tuple[tuple[str, object], ...] = ()


FORMATS = {
    entry.name: entry
    for entry in (
        WeightFormat("torchvision", "torchvision"),
        WeightFormat("timm", "timm"),
        WeightFormat("monai", "MONAI", MONAI,
                     remark="its dropout_prob drops whole channels, after the 3x3 only"),
        WeightFormat("torchxrayvision", "torchxrayvision",
                     settings=(("inputRange", [-1024.0, 1024.0]),),
                     remark="its pixels are from -1024 to 1024, its outputs independent"),
        WeightFormat("segmentation-models", "segmentation-models-pytorch",
                     has_classifier=False,
                     remark="an encoder has no classifier"),
        WeightFormat("keras", "Keras", KERAS, "/",
                     ("gamma", "beta", "moving_mean", "moving_variance"), "kernel",
                     conv_axes=(3, 2, 0, 1), transposes_classifier=True, eps=1.001e-5,
                     suffixes=(".weights.h5", ".h5"),
                     remark="running variances are passed on: Keras estimates them biased, PyTorch "
                     "unbiased; its momentum 0.99 is PyTorch's 0.01"),
        WeightFormat("paddle", "Paddle", PADDLE,
                     norm=("weight", "bias", "_mean", "_variance"), transposes_classifier=True,
                     suffixes=(".pdparams",), scales_dropout=True,
                     remark="running variances are passed on: Paddle estimates them biased, "
                     "PyTorch unbiased"),
    )
}  # fmt: skip


class Imported(NamedTuple):
    """Hold weights by this program's names, and what their file says about the network."""

    weights: Weights
    settings: dict[str, object]  # flags of main.py that these weights need
    thresholds: list[float | None] | None  # of torchxrayvision; None for an output without one
    format: WeightFormat | None  # None: of this program, or by names that several share
    source: Weights  # as the library wrote them, in running order


def get_format(name: str, drop_rate: float = 0.0) -> WeightFormat:
    """Return the rules of a library, for a network with a rate of dropout."""
    entry = FORMATS[name]
    return replace(entry, drop_rate=drop_rate) if entry.scales_dropout else entry


def variable_name(format: WeightFormat, place: Place, variable: str) -> str:
    """Return the name of a module's variable in a library."""
    index, block, layer = place
    module = format.modules[index].format(b=block, c=block + 1, l=layer)
    return module + format.separator + variable


def walk(format: WeightFormat, weights: Weights) -> Iterator[Place]:
    """Yield the modules of a library's network in running order, as far as its weights go."""

    def has(*place: int) -> bool:
        return variable_name(format, place, format.kernel) in weights

    yield from ((STEM_CONV, 0, 0), (STEM_NORM, 0, 0))
    for block in count(1):
        layers = takewhile(lambda layer, block=block: has(CONV1, block, layer), count(1))
        yield from ((index, block, layer) for layer in layers for index in range(NORM1, CONV2 + 1))
        if not has(TRANSITION_CONV, block, 0):
            break
        yield from ((TRANSITION_NORM, block, 0), (TRANSITION_CONV, block, 0))
    yield from ((LAST_NORM, 0, 0), (CLASSIFIER, 0, 0))


def _renamed(
    weights: Weights, source: WeightFormat, target: WeightFormat
) -> Iterator[tuple[int, str, str]]:
    """Yield each variable's module, an index in OURS, its name and that in another library."""
    for place in walk(source, weights):
        variables = [
            each.norm if place[0] in NORMS else (each.kernel, "bias") for each in (source, target)
        ]
        for pair in zip(*variables, strict=False):  # some libraries have no counters
            name, renamed = map(variable_name, (source, target), (place, place), pair)
            if name in weights:
                yield place[0], name, renamed


def recognise(weights: Weights) -> str | None:
    """Guess the library by its names; None for those that several share, or of a Lua network."""
    for name in ("keras", "paddle", "monai"):
        if variable_name(FORMATS[name], (CONV1, 1, 1), FORMATS[name].kernel) in weights:
            return name
    if THRESHOLDS in weights:
        return "torchxrayvision"
    # With a matrix it may be a network whose classifier has another name.
    is_encoder = {"features.norm0.weight", "features.norm5.weight"} <= weights.keys()
    is_encoder = is_encoder and all(tensor.dim() != 2 for tensor in weights.values())
    return "segmentation-models" if is_encoder else None


def import_weights(
    weights: Weights,
    chosen: str | None,
    warn: Callable[[str], None],
    drop_rate: float = 0.0,
) -> Imported:
    """Convert a library's weights to this program's names and layouts.

    Args:
        weights: as `fileio.foreign_weights.find` returns them.
        chosen: the value of `--from`; None guesses the library.
        warn: called with a line that says which library it is.
        drop_rate: of Paddle's network.

    Raises:
        CheckpointError: these are not weights of the library that was chosen.
    """
    weights = {_OLD_KEY.sub(r"\1\2", name): tensor for name, tensor in weights.items()}
    _refuse_other_networks(weights)
    name = chosen or recognise(weights)
    if name in (None, "torchvision", "timm"):  # their names are ours, those of ResNets as well
        return Imported(weights, {}, None, None, weights)
    format = get_format(name, drop_rate)
    rows = [*_renamed(weights, format, FORMATS["torchvision"])]
    source = {name: weights[name] for _, name, _ in rows}
    _check_is_of(format, weights, source)
    ours = {to: _layout(source[name], index, format, True) for index, name, to in rows}
    thresholds = _read_thresholds(weights)
    # What has no place is named by whoever loads the others.
    ours |= {name: weights[name] for name in weights.keys() - source.keys() - {THRESHOLDS}}
    if thresholds:
        source[THRESHOLDS] = weights[THRESHOLDS]
    elif name == "torchxrayvision" and "classifier.bias" in weights:
        thresholds = [NEUTRAL] * weights["classifier.bias"].numel()
    settings = dict(format.settings)
    if format.eps != FORMATS["torchvision"].eps:
        settings["bnEps"] = format.eps
    if name == "torchxrayvision":
        settings["nChannels"] = ours["features.conv0.weight"].shape[1]
    told = [
        f"reads {format.title}'s weights{'' if chosen else ', by their names'}",
        *(f"{name} {str(value).strip('[]')}" for name, value in settings.items()),
        *([format.remark] if format.remark else []),
    ]
    if format.scales_dropout and not format.drop_rate:
        told.append("if its network has dropout=P, add --paddleDropout P")
    warn("; ".join(told))
    return Imported(ours, settings, thresholds, format, source)


def _read_thresholds(weights: Weights) -> list[float | None] | None:
    """Return torchxrayvision's thresholds, if there are any; raise CheckpointError if invalid."""
    if THRESHOLDS not in weights:
        return None
    values = weights[THRESHOLDS].flatten().tolist()
    classifier = weights.get("classifier.weight")
    is_whole = classifier is not None and classifier.shape[:1] == (len(values),)
    if not is_whole or any(not 0 < value < 1 for value in values if value == value):
        what = f"{THRESHOLDS} of these weights are not numbers from 0 to 1, one for each output"
        raise CheckpointError(what, "use another file")
    return [None if value != value else value for value in values]


def _check_is_of(format: WeightFormat, weights: Weights, source: Weights) -> None:
    """Raise CheckpointError unless `source` are the weights of a whole DenseNet of a library."""
    names = (
        variable_name(format, place, format.norm[0] if place[0] in NORMS else format.kernel)
        for place in ((CONV1, 1, 1), *walk(format, weights))
        if place[0] != CLASSIFIER
    )
    if missing := [name for name in names if name not in weights]:
        what = f"these weights have no {missing[0]}, as {format.title}'s DenseNets have"
        raise CheckpointError(what, "use others, or name another library with --from")
    others = weights.keys() - source.keys()
    if convs := sorted(name for name in others if weights[name].dim() == 4):
        what = f"these weights have a {convs[0]}, as {format.title}'s DenseNets have not"
        raise CheckpointError(what, "use weights of a DenseNet alone")
    stem = weights[variable_name(format, (STEM_CONV, 0, 0), format.kernel)]
    if stem.dim() != 4:
        what = f"the first convolution of these weights has {stem.dim()} dimensions"
        raise CheckpointError(what, "use weights of a DenseNet as in the paper")


def _refuse_other_networks(weights: Weights) -> None:
    """Raise CheckpointError for weights of a DenseNet that is not the paper's, by its difference.

    Most of its names are ours, so that a part of it could be loaded.
    """
    found = [what + of for pattern, what, of in OTHER_PARTS
             if any(re.match(pattern, name) for name in weights)]  # fmt: skip
    convs = {name: tuple(tensor.shape) for name, tensor in weights.items()
             if tensor.dim() > 2 and name.startswith("features.")}  # fmt: skip
    if sizes := {len(shape) for shape in convs.values()} - {4}:
        found.append(f"convolutions in {min(sizes) - 2} dimensions, as MONAI's spatial_dims sets")
    layer = [convs.get(f"features.denseblock1.denselayer1.conv{i}.weight") for i in (1, 2)]
    if all(layer) and layer[0][0] != BOTTLENECK_WIDTH * layer[1][0]:
        wide, narrow = layer[0][0], layer[1][0]
        found.append(f"{wide} channels in bottlenecks of k={narrow}, not {BOTTLENECK_WIDTH}k")
    if found:
        what = f"these weights are of a network with {found[0]}"
        raise CheckpointError(what, "use weights of a DenseNet as in the paper")


def export_weights(
    weights: Weights, format: WeightFormat, thresholds: list[float | None] | None
) -> Weights:
    """Convert this program's weights to a library's names and layouts, in running order.

    Args:
        thresholds: of torchxrayvision, None for an output without one. If all are NEUTRAL they are
            left out; an empty list stands for NEUTRAL ones, where a network had others before.
    """
    if format.name in ("torchvision", "timm"):
        return dict(weights)
    theirs = {
        renamed: _layout(weights[name], index, format, False)
        for index, name, renamed in _renamed(weights, FORMATS["torchvision"], format)
        if index != CLASSIFIER or format.has_classifier
    }
    is_calibrated = thresholds is not None and {*thresholds} != {NEUTRAL}
    if format.name == "torchxrayvision" and is_calibrated:
        bias = weights["classifier.bias"]
        values = thresholds or [NEUTRAL] * len(bias)
        theirs[THRESHOLDS] = bias.new_tensor([float("nan") if v is None else v for v in values])
    return theirs


def _layout(tensor: Tensor, index: int, format: WeightFormat, is_import: bool) -> Tensor:
    """Return a module's variable in the layout of this program, or of the library, contiguous."""
    keep = 1 - format.drop_rate
    if tensor.dim() == 4 and format.conv_axes:
        axes = format.conv_axes if is_import else map(format.conv_axes.index, range(4))
        tensor = tensor.permute(*axes)
    elif tensor.dim() == 2 and format.transposes_classifier:
        tensor = tensor.T
    if keep < 1 and index == CONV2:  # in double precision, rounded once
        tensor = (tensor.double() * (keep if is_import else 1 / keep)).to(tensor.dtype)
    return tensor.contiguous()
