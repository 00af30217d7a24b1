"""Write small files of weights as other programs do, from what their formats say."""

import argparse
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import onnx
import safetensors.torch
import torch

from helpers.torch7_writer import Module, Storage, View, Writer

Arrays = dict[str, np.ndarray]
NORM = ("gamma", "beta", "moving_mean", "moving_variance")
# A network of Keras: its layers, the group that Keras 3 gives each, and their variables.
_random = np.random.default_rng(0)
KERAS = {
    f"{layer}/{variable}": _random.standard_normal(shape).astype(np.float32)
    for layer, shapes in {
        "conv1_conv": {"kernel": (3, 3, 3, 4)}, "conv1_bn": dict.fromkeys(NORM, (4,)),
        "conv2_block1_1_conv": {"kernel": (1, 1, 4, 6)}, "bn": dict.fromkeys(NORM, (6,)),
        "predictions": {"kernel": (6, 5), "bias": (5,)},
    }.items()
    for variable, shape in shapes.items()
}  # fmt: skip
GROUPS = {
    "conv1_conv": "conv2d", "conv1_bn": "batch_normalization", "conv2_block1_1_conv": "conv2d_1",
    "bn": "batch_normalization_1", "predictions": "dense",
}  # fmt: skip


def hdf5(write: Callable[..., None], *arguments: object) -> bytes:
    """Make a file by writing to it."""
    with h5py.File.in_memory() as file:
        write(file, *arguments)
        file.flush()
        return file.id.get_file_image()


def keras3(file: h5py.Group, weights: Arrays = KERAS, named: bool = True) -> None:
    """Write the layout of Keras 3, in which a group is the class of a layer with a counter."""
    for layer, group in GROUPS.items():
        variables = [name for name in weights if name.startswith(f"{layer}/")]
        place = file.create_group(f"layers/{group}/vars")
        if named:
            place.attrs["name"] = layer
        for number, name in enumerate(variables):
            place[str(number)] = weights[name]
    file.create_group("layers/activation/vars").attrs["name"] = "relu"
    file.create_group("vars").attrs["name"] = "densenet"


def nested3(file: h5py.File) -> None:
    """Write a compiled Sequential around a network, and layers in a list of the user's class."""
    keras3(file.create_group("layers/functional"))
    head = file.create_group("layers/my_layer/parts/dense/vars")
    head.attrs["name"] = "head"
    head["0"], head["1"] = np.ones((5, 2), np.float32), np.zeros(2, np.float32)
    file.create_group("optimizer/vars")["0"] = np.int64(7)


def legacy(file: h5py.Group, weights: Arrays = KERAS, slashes: bool = False) -> None:
    """Write the layout of Keras 2; some of its layers have slashes in their names."""
    layers = dict.fromkeys(name.rpartition("/")[0] for name in weights)
    names = {layer: layer.replace("conv1_", "conv1/") if slashes else layer for layer in layers}
    file.attrs["layer_names"] = [name.encode() for name in ("input_1", *names.values())]
    file.create_group("input_1").attrs["weight_names"] = np.zeros(0)
    for layer, name in names.items():
        variables = [key for key in weights if key.startswith(f"{layer}/")]
        paths = [key.replace(layer, name) + ":0" for key in variables]
        group = file.create_group(name)
        group.attrs["weight_names"] = [path.encode() for path in paths]
        for path, key in zip(paths, variables, strict=True):
            group[path] = weights[key]


def legacy_model(file: h5py.File, weights: Arrays = KERAS) -> None:
    """Write a whole model, whose names of layers are in two attributes as if they were many."""
    root = file.create_group("model_weights")
    legacy(root, weights)
    layers = list(root.attrs["layer_names"])
    del root.attrs["layer_names"]
    root.attrs["layer_names0"], root.attrs["layer_names1"] = layers[:2], layers[2:]
    file.attrs["model_config"] = json.dumps({"class_name": "Functional"})


def legacy_nested(file: h5py.File, prefix: str = "") -> None:
    """Write a model in a model, whose layers are in one group."""
    inner = file.create_group("densenet")
    for name, values in KERAS.items():
        inner[f"{prefix}{name}:0"] = values
    inner.attrs["weight_names"] = [f"{prefix}{name}:0".encode() for name in KERAS]
    head = file.create_group("head")
    head["sequential/head/kernel:0"] = np.ones((5, 2), np.float32)
    head.attrs["weight_names"] = [b"sequential/head/kernel:0"]
    file.attrs["layer_names"] = [b"densenet", b"head"]


def keras_archive(content: bytes) -> bytes:
    """Pack a file of weights as `.keras`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as entries:
        for name in ("metadata.json", "config.json"):
            entries.writestr(name, json.dumps({"keras_version": "3.15.1"}))
        entries.writestr("model.weights.h5", content)
    return file.getvalue()


def pdparams(weights: Arrays, protocol: int = 4, **more: object) -> bytes:
    """Pickle weights as Paddle does, with the names of its variables."""
    names = {"StructuredToParameterName@@": {name: f"{name}_0" for name in weights}}
    return pickle.dumps(weights | names | more, protocol)


def onnx_file(weights: Arrays) -> bytes:
    """Write initialisers of a graph without nodes."""
    tensors = [onnx.numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = onnx.helper.make_graph([], "graph", [], [], tensors)
    return onnx.helper.make_model(graph).SerializeToString()


def torch_file(weights: Arrays, *, zipped: bool = True, **more: object) -> bytes:
    """Write a state dict beside an object that torch.load refuses."""
    tensors = {name: torch.from_numpy(values) for name, values in weights.items()}
    state, file = {"args": argparse.Namespace(lr=0.1), "state_dict": tensors, **more}, io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def safetensors_file(weights: Arrays) -> bytes:
    tensors = {name: torch.from_numpy(values) for name, values in weights.items()}
    return safetensors.torch.save(tensors)


def lua_file(weights: Arrays) -> bytes:
    """Write a network of Lua with one layer."""
    fields = {}
    for key, name in (("weight", "predictions/kernel"), ("bias", "predictions/bias")):
        values = np.ascontiguousarray(weights[name].T)
        strides = tuple(step // 4 for step in values.strides)
        fields[key] = View(Storage(values.ravel()), values.shape, strides)
    layers = [Module("nn.Linear", fields)]
    return bytes(Writer().write(Module("nn.Sequential", {"modules": layers})).data)


# What is written of the same arrays, by suffix.
FORMATS: dict[str, Callable[[Arrays], bytes]] = {
    ".pt": torch_file,
    ".old.pt": partial(torch_file, zipped=False),
    ".t7": lua_file,
    ".safetensors": safetensors_file,
    ".pdparams": pdparams,
    ".onnx": onnx_file,
    ".h5": lambda weights: hdf5(legacy_model, weights),
    ".weights.h5": lambda weights: hdf5(keras3, weights),
    ".keras": lambda weights: keras_archive(hdf5(keras3, weights)),
}


def path_of(directory: Path, suffix: str, content: bytes) -> Path:
    """Write a file, and return its path."""
    path = directory / f"network{suffix}"
    path.write_bytes(content)
    return path
