"""Write `.t7` files as torch7's File.lua, Tensor.c and Storage.c do."""

import struct
from dataclasses import dataclass, field

import numpy as np

KINDS = {
    "Byte": np.uint8, "Char": np.int8, "Short": np.int16, "Int": np.int32, "Long": np.int64,
    "Half": np.float16, "Float": np.float32, "Double": np.float64, "Cuda": np.float32,
    "CudaHalf": np.float16, "CudaDouble": np.float64, "CudaByte": np.uint8, "CudaLong": np.int64,
}  # fmt: skip


@dataclass(eq=False)
class Storage:
    """Hold a one-dimensional run of numbers."""

    values: np.ndarray
    kind: str = "Float"


@dataclass(eq=False)
class View:
    """Describe a tensor, laid out by its strides and its offset (from 1)."""

    storage: Storage | None
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 1
    kind: str = "Float"


@dataclass(eq=False)
class Module:
    """Describe an object of a torch class, which writes the object `first` before the fields."""

    name: str
    fields: object = field(default_factory=dict)
    first: object = None


@dataclass(eq=False)
class Function:
    """Describe a Lua function of one of the types 6, 7, 8."""

    kind: int
    code: bytes
    upvalues: object


@dataclass(eq=False)
class Raw:
    """Hold bytes that are written to the file unchanged."""

    data: bytes


class Writer:
    """Collect the bytes of objects; an object that occurs again is written as its index.

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
        """Write type and index; return whether the object itself is to follow."""
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
    """Return a file that holds one object."""
    return bytes(Writer(**machine).write(value).data)


def tensor(values: object, kind: str = "Float") -> View:
    """Make a contiguous tensor with a storage of its own."""
    array = np.asarray(values, dtype=KINDS[kind])
    strides = [stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides]
    return View(Storage(array.reshape(-1), kind), array.shape, tuple(strides), kind=kind)


def empty(kind: str = "Float") -> View:
    """Make the remains of a buffer after clearState."""
    return View(None, (), (), kind=kind)
