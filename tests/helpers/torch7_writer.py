"""A writer of `.t7` files, and the networks of the Lua code with given weights to be written.

It shares nothing with the reader: it follows torch7's File.lua, Tensor.c and Storage.c, and the
networks follow models/densenet.lua, DenseConnectLayer.lua, resnet.lua and preresnet.lua.
"""

import copy
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

KINDS = {
    "Byte": np.uint8, "Char": np.int8, "Short": np.int16, "Int": np.int32, "Long": np.int64,
    "Half": np.float16, "Float": np.float32, "Double": np.float64, "Cuda": np.float32,
    "CudaHalf": np.float16, "CudaDouble": np.float64, "CudaByte": np.uint8, "CudaLong": np.int64,
}  # fmt: skip


@dataclass(eq=False)
class Storage:
    """A one-dimensional run of numbers."""

    values: np.ndarray
    kind: str = "Float"


@dataclass(eq=False)
class View:
    """A tensor, laid out as its strides and its offset (from 1) say."""

    storage: Storage | None
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 1
    kind: str = "Float"


@dataclass(eq=False)
class Module:
    """An object of a torch class; `first` is an object that its class writes before the fields."""

    name: str
    fields: object = field(default_factory=dict)
    first: object = None


@dataclass(eq=False)
class Function:
    """A Lua function of one of the types 6, 7, 8."""

    kind: int
    code: bytes
    upvalues: object


@dataclass(eq=False)
class Raw:
    """Bytes that stand in the file as they are."""

    data: bytes


class Writer:
    """Collects the bytes of objects; what occurs again is written as its index.

    Args:
        order: "<" for little-endian machines, ">" for the others.
        long: "q" where a long has eight bytes, "i" where it has four.
        versions: whether classes are written with one, as since 2012.
    """

    def __init__(self, order: str = "<", long: str = "q", versions: bool = True):
        self.data = bytearray()
        self._order, self._long, self._versions = order, long, versions
        self._indices: dict[int, int] = {}
        self._kept = []  # an id is that of one object as long as that lives

    def _put(self, form: str, *numbers: float) -> None:
        self.data += struct.pack(self._order + form, *numbers)

    def _text(self, text: bytes) -> None:
        self._put("i", len(text))
        self.data += text

    def _begins(self, kind: int, value: object) -> bool:
        """Write type and index; whether the object itself is to follow."""
        self._put("i", kind)
        known = id(value) in self._indices
        index = self._indices.setdefault(id(value), len(self._indices) + 1)
        self._kept.append(value)
        self._put("i", index)
        return not known

    def _begins_class(self, name: str, value: object) -> bool:
        if not self._begins(4, value):
            return False
        if self._versions:
            self._text(b"V 1")
        self._text(name.encode())
        return True

    def write(self, value: object) -> "Writer":
        """Write an object."""
        if value is None:
            self._put("i", 0)
        elif isinstance(value, bool):
            self._put("ii", 5, value)
        elif isinstance(value, int | float):
            self._put("id", 1, value)
        elif isinstance(value, str):
            self._put("i", 2)
            self._text(value.encode())
        elif isinstance(value, Raw):
            self.data += value.data
        elif isinstance(value, list | dict):
            if self._begins(3, value):
                pairs = list(enumerate(value, 1) if isinstance(value, list) else value.items())
                self._put("i", len(pairs))
                for key, item in pairs:
                    self.write(key).write(item)
        elif isinstance(value, Function):
            self._function(value)
        elif isinstance(value, Module):
            if self._begins_class(value.name, value):
                if value.first is not None:
                    self.write(value.first)
                self.write(value.fields)
        elif isinstance(value, View):
            self._view(value)
        elif isinstance(value, Storage):
            if self._begins_class(f"torch.{value.kind}Storage", value):
                self._put(self._long, len(value.values))
                kind = np.dtype(KINDS[value.kind]).newbyteorder(self._order)
                self.data += value.values.astype(kind).tobytes()
        else:
            raise TypeError(type(value))
        return self

    def _function(self, value: Function) -> None:
        if value.kind == 6:
            self._put("i", 6)
        elif not self._begins(value.kind, value):
            return
        self._text(value.code)
        self.write(value.upvalues)

    def _view(self, value: View) -> None:
        if self._begins_class(f"torch.{value.kind}Tensor", value):
            self._put("i", len(value.sizes))
            self._put(f"{len(value.sizes)}{self._long}", *value.sizes)
            self._put(f"{len(value.strides)}{self._long}", *value.strides)
            self._put(self._long, value.offset)
            self.write(value.storage)


def dumps(value: object, **machine: object) -> bytes:
    """A file that holds one object."""
    return bytes(Writer(**machine).write(value).data)


def tensor(values: object, kind: str = "Float") -> View:
    """A contiguous tensor with a storage of its own."""
    array = np.asarray(values, dtype=KINDS[kind])
    strides = [stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides]
    return View(Storage(array.reshape(-1), kind), array.shape, tuple(strides), kind=kind)


def empty(kind: str = "Float") -> View:
    """What clearState leaves of a buffer."""
    return View(None, (), (), kind=kind)


# ------------------------------------------------------------------------------------- the networks


@dataclass
class Lua:
    """Builds Lua networks from state dicts of this project.

    Args:
        state: names and tensors.
        package: of convolutions and batch normalisations; "nn" and "cudnn" have the same classes.
        kind: of the tensors.
        custom: build dense layers as optMemory 3 and 4 do.
        matrices: convolutions as nn.SpatialConvolutionMM, whose weights are 2-D.
        old: batch normalisations of version 1, which keep running_std.
        biases: convolutions have biases of 0, as without cuDNN 4.
        flat: what all weights become views of, as getParameters() of Lua makes them.
    """

    state: dict[str, Tensor]
    package: str = "cudnn"
    kind: str = "Float"
    custom: bool = False
    matrices: bool = False
    old: bool = False
    biases: bool = False
    flat: Storage | None = None

    def _tensor(self, name: str) -> View:
        view = tensor(self.state[name].double().numpy(), self.kind)
        if self.flat:
            view.offset = len(self.flat.values) + 1
            self.flat.values = np.concatenate([self.flat.values, view.storage.values])
            view.storage = self.flat
        return view

    def _module(self, name: str, **fields: object) -> Module:
        common = {"_type": f"torch.{self.kind}Tensor", "train": True, "output": empty(self.kind)}
        return Module(name, {**common, "gradInput": empty(self.kind), **fields})

    def sequential(self, *modules: Module, name: str = "nn.Sequential", **more: object) -> Module:
        return self._module(name, modules=list(modules), **more)

    def relu(self) -> Module:
        return self._module(f"{self.package}.ReLU", inplace=True)

    def conv(self, name: str) -> Module:
        shape = self.state[f"{name}.weight"].shape
        weight = self._tensor(f"{name}.weight")
        sizes = {"nOutputPlane": shape[0], "nInputPlane": shape[1], "kH": shape[2], "kW": shape[3]}
        fields = {"weight": weight, "gradWeight": weight, **sizes}  # one storage for two tensors
        kind = f"{self.package}.SpatialConvolution"
        if self.matrices:
            row = shape[1] * shape[2] * shape[3]
            fields["weight"] = View(weight.storage, (shape[0], row), (row, 1), kind=self.kind)
            kind = "nn.SpatialConvolutionMM"
        if self.biases:
            fields["bias"] = tensor(np.zeros(shape[0]), self.kind)
        return self._module(kind, **fields)

    def norm(self, name: str) -> Module:
        fields = {part: self._tensor(f"{name}.{part}") for part in ("weight", "bias")}
        fields["running_mean"] = self._tensor(f"{name}.running_mean")
        if self.old:
            variance = self.state[f"{name}.running_var"].double().numpy()
            fields["running_std"] = tensor(1 / np.sqrt(variance + 1e-5), self.kind)
        else:
            fields["running_var"] = self._tensor(f"{name}.running_var")
        more = {"eps": 1e-5, "momentum": 0.1, "affine": True, "nDim": 4}
        return self._module(f"{self.package}.SpatialBatchNormalization", **fields, **more)

    def linear(self, name: str) -> Module:
        weight, bias = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")
        return self._module("nn.Linear", weight=weight, bias=bias, gradBias=bias)

    def dense_layer(self, name: str) -> list[Module]:
        """What one layer adds to the network's list of modules."""
        first = [self.norm(f"{name}.norm1"), self.relu()]
        rest = [self.conv(f"{name}.conv1")]
        if f"{name}.conv2.weight" in self.state:
            rest += [self.norm(f"{name}.norm2"), self.relu(), self.conv(f"{name}.conv2")]
        if not self.custom:
            branch = self.sequential(*first, *rest)
            identity = self._module("nn.Identity")
            joined = self.sequential(identity, branch, name="nn.Concat", dimension=2)
            return [self.sequential(joined)]
        nets = {"net1": self.sequential(*first), "net2": self.sequential(*rest)}
        opt = {"opt": {"optMemory": 4, "growthRate": 4}, "input_c": empty(self.kind)}
        layer = self.sequential(*nets.values(), name="nn.DenseConnectLayerCustom", **nets, **opt)
        layer.fields["itself"] = layer
        return [layer]

    def densenet(self) -> Module:
        """As models/densenet.lua, with the names of models/densenet.py."""
        modules = [self.conv("features.conv0")]
        if "features.norm0.weight" in self.state:
            pool = self._module("nn.SpatialMaxPooling", kW=3, kH=3, dW=2, dH=2)
            modules += [self.norm("features.norm0"), self.relu(), pool]
        block = 1
        while self._has(f"features.denseblock{block}.denselayer1."):
            layer = 1
            while self._has(f"features.denseblock{block}.denselayer{layer}."):
                modules += self.dense_layer(f"features.denseblock{block}.denselayer{layer}")
                layer += 1
            if self.custom:
                modules.append(self._module("nn.JoinTable", dimension=2))
            transition = f"features.transition{block}"
            if self._has(f"{transition}."):
                modules += [self.norm(f"{transition}.norm"), self.relu()]
                modules += [self.conv(f"{transition}.conv")]
                modules += [self._module("cudnn.SpatialAveragePooling", kW=2, kH=2)]
            block += 1
        modules += [self.norm("features.norm5"), self.relu()]
        modules += [self._module("cudnn.SpatialAveragePooling"), self._module("nn.Reshape")]
        return self.sequential(*modules, self.linear("classifier"))

    def resnet(self) -> Module:
        """As fb.resnet.torch's models/resnet.lua, with the names of models/resnet.py."""
        modules = [self.conv("conv1"), self.norm("bn1"), self.relu()]
        if self.state["conv1.weight"].shape[2] == 7:
            modules.append(self._module("nn.SpatialMaxPooling"))
        modules += self._stages("layer{}", 1, self._block)
        return self._with_classifier(modules)

    def _block(self, name: str, _: int) -> Module:
        branch, i = [], 1
        while self._has(f"{name}.conv{i}."):
            branch += [self.relu()] * (i > 1) + [self.conv(f"{name}.conv{i}")]
            branch.append(self.norm(f"{name}.bn{i}"))
            i += 1
        shortcut = self._shortcut(name, [f"{name}.downsample.0", f"{name}.downsample.1"])
        return self.sequential(*self._sum(branch, shortcut), self.relu())

    def preresnet(self) -> Module:
        """As fb.resnet.torch's models/preresnet.lua, with the names of models/resnet.py."""
        modules = [self.conv("stem")] if "stem.weight" in self.state else []
        if not modules:
            modules = [self.conv("stem.0"), self.norm("stem.1"), self.relu()]
            modules.append(self._module("nn.SpatialMaxPooling"))
        modules += self._stages("stages.{}", 0, self._preactivated)
        return self._with_classifier([*modules, self.norm("bn"), self.relu()])

    def _preactivated(self, name: str, place: int) -> Module:
        before, branch, i = [], [], 1
        while self._has(f"{name}.conv{i}."):
            if self._has(f"{name}.bn{i}."):  # in the first of a stage the shortcut sees it too
                both = before if i == 1 and place == 0 else branch
                both += [self.norm(f"{name}.bn{i}"), self.relu()]
            branch.append(self.conv(f"{name}.conv{i}"))
            i += 1
        shortcut = self._shortcut(name, [f"{name}.downsample"])
        return self.sequential(*before, *self._sum(branch, shortcut))

    def _stages(self, form: str, start: int, block: Callable[[str, int], Module]) -> list[Module]:
        stages = []
        while self._has(f"{form.format(start + len(stages))}."):
            name, blocks = form.format(start + len(stages)), []
            while self._has(f"{name}.{len(blocks)}."):
                blocks.append(block(f"{name}.{len(blocks)}", len(blocks)))
            stages.append(self.sequential(*blocks))
        return stages

    def _shortcut(self, name: str, parts: list[str]) -> Module:
        if self._has(f"{name}.downsample."):
            conv, *norms = parts
            return self.sequential(self.conv(conv), *map(self.norm, norms))
        return self._module("nn.Identity")

    def _sum(self, branch: list[Module], shortcut: Module) -> list[Module]:
        both = self.sequential(self.sequential(*branch), shortcut, name="nn.ConcatTable")
        return [both, self._module("nn.CAddTable", inplace=True)]

    def _with_classifier(self, modules: list[Module]) -> Module:
        pool = [self._module("cudnn.SpatialAveragePooling"), self._module("nn.View")]
        return self.sequential(*modules, *pool, self.linear("fc"))

    def _has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.state)


def data_parallel(model: Module) -> Module:
    """The model as several GPUs hold it: the class writes its list of GPUs before its fields."""
    modules = [model, copy.deepcopy(model)]
    return Module("nn.DataParallelTable", {"modules": modules, "usenccl": True}, [1, 2])
