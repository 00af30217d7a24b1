"""Test the reader of `.t7` files: every type of value, and files that are hostile or damaged."""

import random
import struct
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

import checkpoints
from errors import CheckpointError
from fileio import lua_network, torch7
from helpers.torch7_writer import Function, Module, Raw, Storage, View, dumps, empty, tensor


def refusal(path: Path, content: bytes) -> str:
    """Return the line that the program ends with when it is given such a file."""
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load_weights(path)
    report = caught.value.report()
    assert "\n" not in report and len(report) < 500
    return report


# Values read:
def test_every_type_of_value_is_read():
    shared = {"inner": True}
    table = {"a": 1.5, "b": [None, False, "text"], 2: "two", "one": shared, "other": shared}
    table["itself"] = table
    table["dropped"] = Function(8, b"\x1bLJ", [{"name": "x", "value": 3.0}])
    table["object"] = Module("some.Class", {"field": 1})
    found = torch7.load(dumps(table))
    assert found["a"] == 1.5 and found["b"] == {1: None, 2: False, 3: "text"} and found[2] == "two"
    assert found["one"] is found["other"] and found["one"] == {"inner": True}
    assert found["itself"] is found and found["dropped"] is None
    assert (found["object"].name, found["object"].fields) == ("some.Class", {"field": 1.0})


@pytest.mark.parametrize("kind", [6, 7, 8])
def test_a_function_is_skipped_with_what_it_holds(kind):
    function = Function(kind, b"os.exit(1)", [{"name": "f", "value": Function(kind, b"", None)}])
    assert torch7.load(dumps([function, function, "after"])) == {1: None, 2: None, 3: "after"}


@pytest.mark.parametrize(
    "kind",
    [
        *("Byte", "Char", "Short", "Int", "Long", "Half", "Float", "Double"),
        *("Cuda", "CudaHalf", "CudaByte", "CudaLong"),
    ],
)
def test_tensors_of_every_type_are_read_with_their_numbers(kind):
    values = np.arange(24).reshape(2, 3, 4)
    found = torch7.load(dumps(["odd", tensor(values, kind)]))[2]  # not aligned in the file
    assert np.array_equal(found, values) and not found.flags.writeable
    assert found.dtype == tensor(values, kind).storage.values.dtype
    assert torch7.load(dumps(tensor(np.zeros((2, 0)), kind))).size == 0
    assert torch7.load(dumps(empty(kind))).size == 0


def test_a_view_is_what_strides_and_offset_say():
    storage = Storage(np.arange(12, dtype=np.float32))
    views = [View(storage, (2, 3), (1, 4), 2), View(storage, (3,), (0,), 12), storage]
    found = torch7.load(dumps(views))
    assert found[1].tolist() == [[1, 5, 9], [2, 6, 10]] and found[2].tolist() == [11, 11, 11]
    assert found[1].base is not None and found[3].values.tolist() == list(range(12))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (dumps([1.0], order=">"), "written on a big-endian machine"),
        (dumps(tensor([1.0, 2.0]), long="i"), "written on a 32-bit machine"),
        (b"4\n1\n3\nV 1\n13\nnn.Sequential\n", "in the ASCII format of Lua Torch"),
    ],
)
def test_a_file_of_another_kind_of_machine_is_called_so(content, reason, tmp_path):
    assert reason in refusal(tmp_path / "m.t7", content)


# Hostile files:
SOME = Storage(np.arange(4, dtype=np.float32))
INT = struct.Struct("<i").pack


def view(sizes=(4,), strides=(1,), offset=1, storage: object = SOME, kind="Float") -> bytes:
    return dumps(View(storage, sizes, strides, offset, kind))


def nested(depth: int) -> bytes:
    return b"".join(INT(3) + INT(i) + INT(1) + dumps("k") for i in range(depth)) + INT(0)


def class_of(name: str, payload: bytes) -> bytes:
    name = b"".join(INT(len(text)) + text for text in (b"V 1", name.encode()))
    return INT(4) + INT(1) + name + payload


LARGE = 2**31 - 1
HOSTILE = {
    "empty table of many entries": INT(3) + INT(1) + INT(LARGE),
    "table of fewer than none": INT(3) + INT(1) + INT(-1),
    "string longer than the file": dumps([Raw(INT(2) + INT(LARGE) + b"x")]),
    "string of negative length": dumps([Raw(INT(2) + INT(-4) + b"xxxx")]),
    "unknown type": dumps([Raw(INT(9))]),
    "negative type": dumps([Raw(INT(-1))]),
    "storage larger than the file": class_of("torch.FloatStorage", struct.pack("<q", 2**61)),
    "storage whose bytes overflow": class_of("torch.DoubleStorage", struct.pack("<q", 2**63 - 1)),
    "storage of negative size": class_of("torch.FloatStorage", struct.pack("<q", -1)),
    "one number too many": view(sizes=(5,)),
    "an offset beyond": view(offset=2),
    "an offset before": view(offset=0),
    "far away": view(offset=2**62),
    "negative size": view(sizes=(-4,)),
    "negative stride": view(strides=(-1,), offset=4),
    "large stride": view(strides=(2**62,)),
    "sizes whose product overflows": view(sizes=(2**33, 2**33), strides=(0, 0)),
    "many dimensions": view(sizes=(1,) * 33, strides=(1,) * 33),
    "numbers of another type": view(kind="Int"),
    "a tensor for a storage": view(storage=tensor([1.0] * 9)),
    "no storage": view(storage=None),
    "a table for a storage": view(storage={"a": 1.0}),
    "a storage that is the tensor": view(storage=Raw(INT(4) + INT(1))),
    "dimensions beyond the file": class_of("torch.FloatTensor", INT(LARGE)),
    "negative dimensions": class_of("torch.FloatTensor", INT(-3)),
    "deep": nested(100_000),
    "deep functions": (INT(6) + INT(0)) * 100_000 + INT(0),
    "an object that is its own fields": class_of("nn.Sequential", INT(4) + INT(1)),
    "fields that are a number": class_of("nn.Sequential", dumps(3.0)),
    "more after the end": dumps([1.0]) + b"\0",
    "a type alone": INT(4),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line(name, tmp_path):
    content = HOSTILE[name]
    if not torch7.is_torch7(content):
        content = dumps([Raw(content)])
    with pytest.raises(ValueError):
        torch7.load(content)
    assert "m.t7 is damaged (" in refusal(tmp_path / "m.t7", content)


def test_depth_has_a_bound_that_no_network_reaches():
    assert torch7.load(nested(torch7.MAX_DEPTH))
    with pytest.raises(ValueError, match="nested more than"):
        torch7.load(nested(torch7.MAX_DEPTH + 1))


def bombs() -> dict[str, object]:
    """Return small files of large claims, each sound as a file."""
    wide = View(SOME, (2**20, 2**10), (0, 0))  # 4 GB of one number
    chain = Module("nn.Sequential", {"modules": []})
    parts = [chain]
    for _ in range(1000):  # each refers to the one before: deeper than the objects are nested
        parts.append(Module("nn.Sequential", {"modules": [parts[-1]]}))
    double = Module("nn.Sequential", {"modules": []})
    doubles = [double]
    for _ in range(40):
        doubles.append(Module("nn.Sequential", {"modules": [doubles[-1], doubles[-1]]}))
    cycle = Module("nn.Sequential", {})
    cycle.fields["modules"] = [cycle]
    shared = View(SOME, (2,), (1,))
    many = [Module("nn.Linear", {"weight": wide, "bias": shared}) for _ in range(20)]
    return {
        "strides of zero": Module("nn.Sequential", {"modules": many}),
        "a chain": {"parts": parts, "model": parts[-1]},
        "twice, forty times": {"parts": doubles, "model": doubles[-1]},
        "a cycle": cycle,
    }


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused_in_little_time_and_memory(name, tmp_path):
    since = time.thread_time()
    refusal(tmp_path / "m.t7", dumps(bombs()[name]))
    assert time.thread_time() - since < 10  # of the processor; unbounded, they never end


def small_file() -> bytes:
    """Make a network of one module of each kind, small enough to be damaged in every place."""
    conv = {"weight": tensor(np.ones((2, 1, 1, 1)))}
    norm = {"weight": tensor([0.5] * 2), "bias": tensor([0.5] * 2), "eps": 1e-5}
    norm |= {"running_mean": tensor([0.5] * 2), "running_var": tensor([1.0] * 2), "train": True}
    linear = {"weight": tensor(np.ones((1, 2))), "bias": tensor([0.0]), "output": empty()}
    parts = {"SpatialConvolution": conv, "SpatialBatchNormalization": norm, "Linear": linear}
    modules = [Module(f"nn.{name}", fields) for name, fields in parts.items()]
    return dumps(Module("nn.Sequential", {"modules": modules}))


def weights_of(data: bytes) -> dict[str, Tensor] | None:
    """Return the weights in a file, None where it is refused; nothing else may happen."""
    try:
        return lua_network.weights(torch7.load(data))
    except (ValueError, CheckpointError):
        return None


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    whole = small_file()
    assert len(weights_of(whole)) == 7
    assert all(weights_of(whole[:size]) is None for size in range(4, len(whole)))
    for size in range(0, len(whole), 100):
        refusal(tmp_path / "m.t7", whole[:size])


def mutated(draw: random.Random, whole: bytes) -> bytes:
    """Replace a few bytes, or numbers of four or eight bytes, of a file."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 5))):
        offset, size = draw.randrange(len(data)), draw.choice((1, 4, 8))
        number = draw.choice((0, 1, -1, 3, 4, 2**31 - 1, 2**62, draw.getrandbits(62)))
        data[offset : offset + size] = (number % 256**size).to_bytes(size, "little")
    return bytes(data)


def test_damage_of_any_kind_is_refused_or_gives_weights(tmp_path):
    whole, draw = small_file(), random.Random(0)
    found = [weights_of(mutated(draw, whole)) for _ in range(3000)]
    # Not all can be told: there is no checksum, and much of a file is no weight.
    assert 300 < sum(weights is None for weights in found) < 2900
    for _ in range(50):
        path = tmp_path / "m.t7"
        path.write_bytes(mutated(draw, whole))
        with suppress(CheckpointError):
            weights = checkpoints.load_weights(path)
            assert all(tensor.isfinite().all() for tensor in weights.values())
