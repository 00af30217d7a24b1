"""Read files of Lua Torch (`.t7`, binary) strictly, executing nothing.

The format, as torch.save of Lua writes it on a 64-bit machine, all numbers little-endian:

    object          int32 type, then by type
      nil 0         nothing
      number 1      float64
      string 2      int32 length, bytes
      table 3       int32 index, int32 count, then that many times a key and a value, both objects
      torch 4       int32 index, the string "V 1" (absent in the oldest), class name, payload
      boolean 5     int32
      function 6    int32 length, bytecode, an object with its upvalues; 7 and 8 have an index first
    tensor          int32 dimensions, int64 sizes, int64 strides, int64 offset from 1, its storage
    storage         int64 count, values
    other classes   a table of their fields

An index that has occurred before refers to that object, and nothing follows it. The PyPI package
`torchfile` 0.1.0 trusts sizes, strides and offsets: with a file of 125 bytes it returned memory
outside of the file, or crashed. This reader checks each against the data.
"""

import math
import re
import struct
from dataclasses import dataclass

import numpy as np

from errors import CheckpointError

NIL, NUMBER, STRING, TABLE, TORCH, BOOLEAN, FUNCTION, OLD_CLOSURE, CLOSURE = range(9)
# The numpy dtype of each tensor type, also of its Cuda variant.
DTYPES = {
    "Byte": "<u1",
    "Char": "<i1",
    "Short": "<i2",
    "Int": "<i4",
    "Long": "<i8",
    "Half": "<f2",
    "Float": "<f4",
    "Double": "<f8",
}
_ARRAY = re.compile(r"torch\.(Cuda)?(\w*?)(Tensor|Storage)")
RESAVE_HINT = "save it as binary with Lua Torch on a 64-bit little-endian machine"
MAX_DEPTH = 150  # nested objects; a network has about 25
MAX_DIMENSIONS = 32  # numpy's limit
_INT, _DOUBLE = struct.Struct("<i"), struct.Struct("<d")


@dataclass(eq=False)
class Object:
    """Hold an object of a torch class other than a tensor or storage."""

    name: str  # the class, such as "nn.Sequential"
    fields: dict[str | float, object]


@dataclass(eq=False)
class Storage:
    """Hold the data that tensors are views of."""

    values: np.ndarray


def is_torch7(data: bytes) -> bool:
    """Tell whether bytes begin like a file of Lua Torch, of a supported kind or not."""
    return data[:4] in (b"\3\0\0\0", b"\4\0\0\0") or _unsupported(data) is not None


def _unsupported(data: bytes) -> CheckpointError | None:
    """Return the error for a file of Lua Torch that this reader does not support, or None."""
    if data[:4] in (b"\0\0\0\3", b"\0\0\0\4"):
        return CheckpointError("written on a big-endian machine", RESAVE_HINT)
    if re.match(rb"[34]\n\d+\n", data):
        return CheckpointError("in the ASCII format of Lua Torch", RESAVE_HINT)
    return None


def load(data: bytes) -> object:
    """Read the object in a file: None, float, bool, str, dict (a table), array, Storage or Object.

    Tensors become read-only views of `data`, functions None. A table keeps the entries whose keys
    are numbers or strings. References, also circular ones, are kept.

    Raises:
        CheckpointError: another kind of machine wrote it, or it is in ASCII.
        ValueError: it is not such a file, or damaged.
    """
    unsupported = _unsupported(data)
    if unsupported:
        raise unsupported
    try:
        return _parse(data, "q")
    except ValueError as error:
        try:
            _parse(data, "i")
        except ValueError:
            raise error from None
        raise CheckpointError("written on a 32-bit machine", RESAVE_HINT) from error


def _parse(data: bytes, long: str) -> object:
    reader = _Reader(data, long)
    root = reader.read()
    if reader.left:
        raise ValueError("data after its end")
    return root


class _Reader:
    """Read one object after the other; `long` is struct's code for a long."""

    def __init__(self, data: bytes, long: str):
        self._data, self._position, self._depth = data, 0, 0
        self._long = struct.Struct(f"<{long}")
        self._objects: dict[int, object] = {}  # by index

    @property
    def left(self) -> int:
        """Return the number of bytes not yet read."""
        return len(self._data) - self._position

    def _skip(self, size: int) -> int:
        """Skip the next `size` bytes and return where they begin."""
        if not 0 <= size <= self.left:
            raise ValueError(f"cut short: {size} bytes wanted, {self.left} left")
        self._position += size
        return self._position - size

    def _number(self, layout: struct.Struct) -> int | float:
        (value,) = layout.unpack_from(self._data, self._skip(layout.size))
        return value

    def _longs(self, count: int) -> list[int]:
        return [self._number(self._long) for _ in range(count)]

    def _string(self) -> str:
        size = self._number(_INT)
        start = self._skip(size)
        return self._data[start : start + size].decode(errors="replace")

    def read(self) -> object:
        """Read the next object."""
        kind = self._number(_INT)
        if kind == NIL:
            return None
        if kind == NUMBER:
            return self._number(_DOUBLE)
        if kind == STRING:
            return self._string()
        if kind == BOOLEAN:
            return self._number(_INT) == 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"objects nested more than {MAX_DEPTH} deep")
        value = self._function() if kind == FUNCTION else self._indexed(kind)
        self._depth -= 1
        return value

    def _function(self) -> None:
        self._skip(self._number(_INT))
        self.read()  # the function's upvalues

    def _indexed(self, kind: int) -> object:
        if kind not in (TABLE, TORCH, OLD_CLOSURE, CLOSURE):
            raise ValueError(f"an object of unknown type {kind}")
        index = self._number(_INT)
        if index in self._objects:
            return self._objects[index]
        if kind == TORCH:
            return self._torch(index)
        if kind == TABLE:
            self._objects[index] = table = {}
            self._fill(table)
            return table
        self._objects[index] = None
        return self._function()

    def _fill(self, table: dict[str | float, object]) -> None:
        count = self._number(_INT)
        if not 0 <= count <= self.left // 8:  # a key and a value take at least four bytes each
            raise ValueError(f"a table of {count} entries in {self.left} bytes")
        for _ in range(count):
            key, value = self.read(), self.read()
            if isinstance(key, str | float):
                table[key] = value

    def _torch(self, index: int) -> object:
        name = self._string()
        if re.fullmatch(r"V [\d.]+", name):  # the class's version
            name = self._string()
        array = _ARRAY.fullmatch(name)
        values = array and DTYPES.get(array[2] or ("Float" if array[1] else ""))
        if values:  # torch.CudaTensor, without a type, holds floats
            read = self._tensor if array[3] == "Tensor" else self._storage
            self._objects[index] = value = read(np.dtype(values))
            return value
        self._objects[index] = value = Object(name, {})
        fields = self.read()
        if name == "nn.DataParallelTable" and isinstance(fields, dict) and "modules" not in fields:
            fields = self.read()  # the first table lists its GPUs
        if not isinstance(fields, dict):
            raise ValueError(f"{name[:40]} without fields")
        value.fields = fields
        return value

    def _storage(self, kind: np.dtype) -> Storage:
        count = self._number(self._long)
        start = self._skip(count * kind.itemsize)
        return Storage(np.ndarray((count,), kind, self._data, start))

    def _tensor(self, kind: np.dtype) -> np.ndarray:
        dimensions = self._number(_INT)
        if not 0 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        sizes, strides = self._longs(dimensions), self._longs(dimensions)
        offset = self._number(self._long) - 1
        storage = self.read()
        if dimensions == 0 or 0 in sizes:
            return np.empty(0, kind)
        if not isinstance(storage, Storage) or storage.values.dtype != kind:
            raise ValueError("a tensor without data of its type")
        steps = [stride if size > 1 else 0 for size, stride in zip(sizes, strides, strict=True)]
        last = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
        if min(*sizes, *steps, offset) < 0 or last >= len(storage.values):
            raise ValueError("a tensor that exceeds its data")
        if math.prod(sizes) > len(storage.values):  # strides of 0, which no saved network has
            raise ValueError("a tensor larger than its data")
        size = kind.itemsize
        return np.ndarray(
            sizes, kind, storage.values, offset * size, [step * size for step in steps]
        )
