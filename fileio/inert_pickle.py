"""Read what torch.save or Paddle pickled as data: no class is looked up, no function is called.

torch.load(weights_only=True) refuses a file for one object of a class it does not know, such as the
argparse.Namespace that training scripts save. This interpreter of pickle's opcodes makes a Record
of such an object, and tensors of torch's plain ones and of NumPy's arrays. Quantised and sparse
tensors are Records. A `.pdparams` of Paddle is a pickled dict of arrays, without a checksum.
"""

import io
import math
import pickletools
import re
from collections.abc import Callable, Iterable
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from errors import CheckpointError
from fileio.archive import entries, is_zip

DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # what torch.save wrote first before version 1.6
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
OF_MARKED = {"TUPLE": tuple, "LIST": list, "FROZENSET": tuple}  # a frozenset hashes, see _dict
ARRAY = re.compile(r"numpy\._?core\.multiarray\._reconstruct")
NUMBERS = re.compile("[<>|=]?(f[248]|[iu][1248]|b1)")  # NumPy's codes of dtypes
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class Global(NamedTuple):
    """Name a class or function, which is never looked up."""

    name: str  # with its module


class Record(dict):
    """Stand for an object of an unknown class, with the entries of one that is like a dict."""

    __hash__ = object.__hash__

    def __init__(self, name: str):
        self.name = name
        self.code = ""  # of a NumPy dtype
        self.tensor: Tensor | None = None  # of a NumPy array

    def build(self, state: object) -> None:
        """Set the attributes that pickle describes apart from an object's construction."""
        if self.name == "numpy.dtype":
            self.code = state[1] + self.code  # the byte order
        elif ARRAY.fullmatch(self.name):
            _, shape, dtype, is_fortran, numbers = state
            self.tensor = _from_array(numbers, dtype, shape, is_fortran)


def load(data: bytes) -> object:
    """Read a pickled dict, or a file of torch.save in its present format or that before 1.6.

    Raises:
        CheckpointError: Paddle has split large parameters.
        Exception: of some kind, if the file is damaged or of another program.
    """
    return _load_zip(data) if is_zip(data) else _load_old(data)


def _load_zip(data: bytes) -> object:
    files = entries(data)
    (pickled,) = (name for name in files if name.endswith("/data.pkl"))
    root = pickled.removesuffix("data.pkl")
    if bytes(files.get(f"{root}byteorder", b"little")) != b"little":
        raise ValueError("big-endian numbers")
    storages: dict[str, Tensor] = {}

    def find_storage(_: str, kind: Global, key: str, *rest: object) -> Tensor | Record:
        dtype = DTYPES.get(kind.name.rpartition(".")[2])
        if dtype is None:
            return Record(kind.name)
        if _text(key) not in storages:
            storages[key] = _tensor(files[f"{root}data/{key}"], dtype)
        return storages[key]

    return _Machine(find_storage).run(io.BytesIO(files[pickled]))


def _load_old(data: bytes) -> object:
    file, storages = io.BytesIO(data), {}
    magic = _Machine().run(file)
    if isinstance(magic, dict) and file.tell() == len(data):
        if "UnpackBigParamInfor@@" in magic:  # Paddle's spelling
            fix = "in Paddle: paddle.save(paddle.load(FILE), FILE, protocol=4)"
            raise CheckpointError("holds parameters in parts", fix)
        return magic
    _, system = (_Machine().run(file) for _ in range(2))
    if magic != MAGIC_NUMBER or not system["little_endian"]:
        raise ValueError("not of torch.save")

    def find_storage(of: str, kind: Global, key: str, place: str, size: int = 0, view=None):
        if of == "module":  # a class, with the text of its source
            return kind
        if _text(key) not in storages:
            if size * DTYPES[kind.name.rpartition(".")[2]].itemsize > len(data):
                raise ValueError("a tensor larger than its data")
            storages[key] = torch.zeros(size, dtype=DTYPES[kind.name.rpartition(".")[2]])
        return storages[key][slice(view[1], view[1] + view[2]) if view else slice(None)]

    state = _Machine(find_storage).run(file)
    for key in _Machine().run(file):  # the numbers follow in this order, with their count
        size = int.from_bytes(file.read(8), "little")
        found = _tensor(file.read(size * storages[_text(key)].itemsize), storages[key].dtype)
        storages[key].copy_(found.view(size))
    return state


def _tensor(content: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    if not content:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype)


class _Machine:
    """Interpret one pickle.

    Args:
        find_storage: maps the parts of a persistent id to the numbers of a tensor.
    """

    def __init__(self, find_storage: Callable[..., object] | None = None):
        self.find_storage = find_storage
        self.stack: list = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, object] = {}

    def run(self, file: IO[bytes]) -> object:
        """Return the value that a pickle describes, and leave the file behind it."""
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self.stack.pop()
            if not (self._refer(opcode.name, argument) or self._collect(opcode.name)):
                self._push(opcode, argument)
        raise EOFError("no end")

    def _refer(self, name: str, argument: object) -> bool:
        """Run an opcode that names, calls or remembers something; tell whether it is one."""
        stack = self.stack
        match name:
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(Global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                module, attribute = map(_text, self._pop(2))
                stack.append(Global(f"{module}.{attribute}"))
            case "REDUCE" | "NEWOBJ":
                stack.append(_call(*self._pop(2)))
            case "NEWOBJ_EX":
                stack.append(_call(*self._pop(3)[:2]))
            case "INST":
                stack.append(_call(Global(argument.replace(" ", ".")), self._pop_marked()))
            case "OBJ":
                function, *arguments = self._pop_marked()
                stack.append(_call(function, arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Record):
                    stack[-1].build(state)
            case "BINPERSID":
                stack.append(self.find_storage(*stack.pop()))
            case _:
                return False
        return True

    def _collect(self, name: str) -> bool:
        """Run an opcode that makes or fills a container; tell whether it is one."""
        stack = self.stack
        match name:
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE" | "LIST" | "FROZENSET":
                stack.append(OF_MARKED[name](self._pop_marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(name[-1]))))
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_SET":
                stack.append(EMPTY[name]())
            case "DICT":
                items = self._pop_marked()
                stack.append(_dict(zip(items[::2], items[1::2], strict=True)))
            case "SETITEM" | "SETITEMS":
                items = self._pop(2) if name == "SETITEM" else self._pop_marked()
                stack[-1].update(_dict(zip(items[::2], items[1::2], strict=True)))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = self._pop(1) if name == "APPEND" else self._pop_marked()
                if isinstance(stack[-1], list):  # or a Record; no set holds weights
                    stack[-1].extend(items)
            case "POP_MARK":
                self._pop_marked()
            case "POP":
                stack.pop()
            case _:
                return False
        return True

    def _push(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        """Run an opcode that pushes a number, a text or bytes."""
        if opcode.name in CONSTANTS:
            self.stack.append(CONSTANTS[opcode.name])
        elif opcode.stack_after and not opcode.stack_before and argument is not None:
            self.stack.append(argument)
        elif opcode.stack_after or opcode.stack_before:
            raise ValueError(f"pickle opcode {opcode.name}")

    def _pop(self, count: int) -> list:
        if len(self.stack) < count:
            raise ValueError("empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _pop_marked(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items


def _from_array(numbers, dtype: Record, shape: tuple, is_fortran: bool) -> Tensor | None:
    """Return the tensor of a NumPy array; None for numbers that are no weights."""
    if not NUMBERS.fullmatch(dtype.code):
        return None
    if isinstance(numbers, str):  # of Python 2
        numbers = numbers.encode("latin1")
    array = np.frombuffer(numbers, dtype.code)
    if math.prod(shape) != array.size:
        raise ValueError("an array larger than its data")
    array = array.reshape(shape, order="F" if is_fortran else "C")
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a name that is no text")
    return value


def _dict(items: dict | Iterable[tuple] = ()) -> dict:
    """Make a dict of the items whose key is a text or a number.

    A tuple of tuples that repeat one tuple takes exponential time to hash, and no signal ends it.
    """
    pairs = items.items() if isinstance(items, dict) else items
    return {key: _unwrapped(value) for key, value in pairs if isinstance(key, str | int | float)}


def _unwrapped(value: object) -> object:
    """Return the tensor of an array, which Paddle may keep in a tuple with its name."""
    array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
    return array.tensor if isinstance(array, Record) and array.tensor is not None else value


def _call(function: object, arguments: tuple | list) -> object:
    """Return what a call of one of torch's own functions would, or a Record."""
    name = function.name if isinstance(function, Global) else type(function).__name__
    match name:
        case "collections.OrderedDict":
            return _dict(*arguments)
        case "torch.Size" | "builtins.tuple" | "__builtin__.tuple":
            return tuple(*arguments)
        case "_codecs.encode":  # how protocol 2 holds bytes
            return arguments[0].encode("latin1")
        case "builtins.bytes" | "__builtin__.bytes" if not arguments:
            return b""
        case "numpy.dtype" | "numpy.core.numeric._frombuffer" | "numpy._core.numeric._frombuffer":
            record = Record(name)
            if name == "numpy.dtype":
                record.code = _text(arguments[0])
            else:  # of protocol 5
                numbers, dtype, shape, order = arguments
                record.tensor = _from_array(numbers, dtype, shape, order == "F")
            return record
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
            return arguments[0]
        case "torch._tensor._rebuild_from_type_v2":
            return _call(arguments[0], arguments[2])
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
            storage, offset, size, stride = arguments[:4]
            if isinstance(storage, Tensor):
                return storage.as_strided(size, stride, offset + storage.storage_offset())
    return Record(name)
