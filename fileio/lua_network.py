"""Extract the weights of a Lua Torch network, in the order in which its modules run.

Reads the Lua DenseNet, with the layers of every optMemory, and fb.resnet.torch's networks. Their
RGB means and standard deviations are those used here, so no weight is converted.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from errors import CheckpointError
from fileio.torch7 import Object

EPS = 1e-5  # of batch normalisation, in Lua and in PyTorch
Fields = dict[str | float, object]


def weights(root: object) -> dict[str, Tensor]:
    """Extract the weights of a network that `torch7.load` returned.

    Args:
        root: the network, or a table with it under `model`; possibly in an nn.DataParallelTable.

    Returns:
        float32 tensors in running order. A name is the module's path in the tree, counted from 1
        as by `model:get(i)`, then the tensor's: "2.1.1.2.weight". A convolution has weight (out,
        in, kh, kw); a batch normalisation weight, bias, running_mean and running_var; a linear
        layer weight (out, in) and bias.

    Raises:
        CheckpointError: the file holds no network, or one with an unsupported module.
    """
    found = {}
    for path, module in _leaves(_network(root)):
        for name, values in _values(path, module).items():
            found[f"{path}.{name}"] = torch.from_numpy(np.array(values, np.float32, order="C"))
    return found


def _network(root: object) -> Object:
    if isinstance(root, dict):
        if isinstance(root.get("modelFile"), str):  # latest.t7 of the Lua code
            raise CheckpointError(f"only points to {root['modelFile'][:80]}", "name that file")
        root = root.get("model")
    if not isinstance(root, Object) or "modules" not in root.fields:
        raise CheckpointError("no network of Lua Torch in it", "name a file of a network")
    return root


def _leaves(root: Object) -> Iterator[tuple[str, Object]]:
    """Yield every module without children, with its path."""
    stack, seen = [("", root)], set()
    while stack:  # not recursive: references allow any depth
        path, module = stack.pop()
        if not isinstance(module, Object):
            raise _unsupported(path, "is not a module")
        if "modules" not in module.fields:
            yield path[1:], module
            continue
        if id(module) in seen:
            raise _unsupported(path, f"({module.name[:40]}) stands in the network twice")
        seen.add(id(module))
        stack += reversed(list(_children(path, module)))


def _children(path: str, module: Object) -> Iterator[tuple[str, object]]:
    """Yield the modules that a container runs, in that order."""
    kind, modules = _kind(module), module.fields["modules"]
    if kind == "gModule":
        raise _unsupported(path, "is a graph (nngraph), which is not read")
    if not isinstance(modules, dict):
        raise _unsupported(path, "has no list of modules")
    # The modules of a DataParallelTable are copies of one network.
    count = 1 if kind == "DataParallelTable" else len(modules)
    for i in range(1, count + 1):
        yield f"{path}.{i}", modules.get(i)


def _kind(module: Object) -> str:
    """Return the class without the package: nn, cudnn and fbnn share classes."""
    return module.name.rpartition(".")[2]


def _unsupported(path: str, what: str) -> CheckpointError:
    where = path.strip(".")[:80] or "the first"
    return CheckpointError(f"Lua module {where} {what}", "use weights of one of these networks")


def _values(path: str, module: Object) -> dict[str, np.ndarray]:
    """Return the weights of a module without children; most have none."""
    read = READERS.get(_kind(module))
    try:
        if read:
            return read(module.fields)
        if any(_is_filled(module.fields.get(name)) for name in ("weight", "bias", "running_mean")):
            raise ValueError("has weights that this program does not know")
    except ValueError as error:
        raise _unsupported(path, f"({module.name[:40]}) {error}") from error
    return {}


def _is_filled(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.size > 0


def _numbers(fields: Fields, name: str, dimensions: int) -> np.ndarray:
    values = fields.get(name)
    if not _is_filled(values) or values.dtype.kind != "f":
        raise ValueError(f"has no {name}")
    if values.ndim != dimensions:
        raise ValueError(f"has a {name} of {values.ndim} dimensions, not {dimensions}")
    return values


def _convolution(fields: Fields) -> dict[str, np.ndarray]:
    weight = fields.get("weight")
    if _is_filled(weight) and weight.ndim == 2:  # SpatialConvolutionMM: one row per output channel
        _, height, width = shape = [fields.get(name) for name in ("nInputPlane", "kH", "kW")]
        if not all(isinstance(size, float) and size.is_integer() and size > 0 for size in shape):
            raise ValueError("has no size")
        if math.prod(shape) != weight.shape[1]:
            raise ValueError(f"has {weight.shape[1]} weights for each map, not {math.prod(shape)}")
        weight = weight.reshape(len(weight), -1, int(height), int(width))
        fields = fields | {"weight": weight}
    if _is_filled(fields.get("bias")) and fields["bias"].any():
        raise ValueError("has a bias, which these networks lack")
    return {"weight": _numbers(fields, "weight", 4)}


def _norm(fields: Fields) -> dict[str, np.ndarray]:
    eps = fields.get("eps", EPS)
    if not isinstance(eps, float) or not math.isclose(eps, EPS, rel_tol=1e-4):
        raise ValueError(f"has an eps of {eps!s:.20}, not {EPS}")
    names = ("weight", "bias", "running_mean")
    found = {name: _numbers(fields, name, 1) for name in names}
    if "running_std" in fields and "running_var" not in fields:
        # Version 1 of the class stores 1 / sqrt(var + eps) under this name.
        std = _numbers(fields, "running_std", 1).astype(np.float64)
        if not (std > 0).all():
            raise ValueError("has a running_std that is not positive")
        return found | {"running_var": np.maximum(std**-2.0 - EPS, 0)}
    return found | {"running_var": _numbers(fields, "running_var", 1)}


def _linear(fields: Fields) -> dict[str, np.ndarray]:
    return {"weight": _numbers(fields, "weight", 2), "bias": _numbers(fields, "bias", 1)}


READERS: dict[str, Callable[[Fields], dict[str, np.ndarray]]] = {
    "SpatialConvolution": _convolution,
    "SpatialConvolutionMM": _convolution,
    "SpatialBatchNormalization": _norm,
    "Linear": _linear,
}
