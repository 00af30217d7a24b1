"""Make checkpoints, real ones and ones that are to harm their reader."""

import io
import operator
import os
import pickle
import struct
import subprocess
import tarfile
import timeit
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import opts
from experiment.log import RunLog
from faults.bombs import archive
from train import Trainer


def trainer() -> Trainer:
    opt = opts.parse(["--nEpochs=2", "--milestones=[]"])
    return Trainer(opt, nn.Linear(3, 2), torch.device("cpu"), RunLog(None))


def real_state(step: int = 3) -> dict:
    extra = {"settings": {"depth": 4, "LR": 0.1}, "data": {"classes": ["a", "b"]}, "overrides": []}
    return {**trainer().state_dict(), "global_step": step, **extra}


def equal(one, other) -> bool:
    """Return whether values and their types are the same, all the way down."""
    if isinstance(one, dict) and isinstance(other, dict):  # plain or ordered
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


class Call:
    """Pickle as a call, which unpickling makes."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def tar_archive(pickled: bytes) -> bytes:
    """Make a file as torch.save wrote it before version 0.1.10."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as entries:
        parts = {"storages": pickle.dumps(0) + pickle.dumps([]), "tensors": pickle.dumps(0)}
        for name, data in {**parts, "pickle": pickled}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entries.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def old_format(value: object) -> bytes:
    """Make a file as torch.save wrote it before version 1.6."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def pickles(marker: Path) -> dict[str, bytes]:
    """Make pickles that write `marker` when they are unpickled."""
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    system = Call(os.system, shell)
    calls = {
        "os.system": system,
        "os.mkdir": Call(os.mkdir, str(marker)),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "eval among weights": {"format": 1, "model": {"weight": Call(eval, code)}},
        "eval in a key": {(Call(eval, code), 1): 1},
        "subprocess.Popen": Call(subprocess.check_output, ["touch", str(marker)]),
        "timeit": Call(timeit.timeit, code, "pass", timeit.default_timer, 1),
        "Path.touch": Call(Path.touch, marker),
        "methodcaller": Call(operator.methodcaller("touch"), marker),
        "partial": Call(partial(os.system, shell)),
        "pickle.loads": Call(pickle.loads, pickle.dumps(system)),
        "torch.storage._load_from_bytes": Call(torch.storage._load_from_bytes, old_format(system)),
        "torch.load": Call(
            partial(torch.load, weights_only=False), Call(io.BytesIO, old_format(system))
        ),
    }
    text = f"V{shell}\n".encode()
    return {name: pickle.dumps(value) for name, value in calls.items()} | {
        "os.system by that name": b"cos\nsystem\n(" + text + b"tR.",
        "__builtin__.eval": b"c__builtin__\neval\n(V" + code.encode() + b"\ntR.",
        "__import__ and getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntR"
        + b"Vsystem\ntR(" + text + b"tR.",
        "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x17serialization.os.system\x93("
        + text + b"tR.",
        "the INST opcode": b"(" + text + b"ios\nsystem\n.",
        "the OBJ opcode": b"(cos\nsystem\n" + text + b"o.",
        "a call whose result is dropped": b"cos\nsystem\n(" + text + b"tR0}.",
    }  # fmt: skip


def hostile_files(marker: Path) -> dict[str, bytes]:
    """Make files that write `marker` when torch.load reads them without weights_only."""
    plain = pickles(marker)
    system = Call(os.system, f"touch {marker}")
    start = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION)
    described = b"".join(map(pickle.dumps, start)) + plain["os.system"]
    return {
        **{f"zip with {name}": archive(data) for name, data in plain.items()},
        **{f"pickle of protocol {i}": pickle.dumps(system, i) for i in range(6)},
        "old format": old_format(system),
        "old format with it in the system's description": described,
        "tar": tar_archive(plain["os.system"]),
    }


def repack(path: Path, replaced: bytes | None = None, method: int = zipfile.ZIP_STORED) -> None:
    """Write the entries of a checkpoint again; its pickle may be `replaced`."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, data in entries.items():
            new.writestr(name, replaced if replaced and name.endswith("data.pkl") else data)


def compressed(path: Path) -> None:
    """Write 200 MB of zeros in 200 kB."""
    torch.save({**real_state(), "format": 1, "model": {"w": torch.zeros(50_000_000)}}, path)
    repack(path, method=zipfile.ZIP_DEFLATED)


def without_strides(path: Path) -> None:
    """Write 10^12 elements that are all the same four bytes."""
    huge = torch.zeros(1).as_strided((10**6, 10**6), (0, 0))
    torch.save({**real_state(), "format": 1, "model": {"w": huge}}, path)


def sparse(path: Path) -> None:
    """Write 10^12 elements of which one is there."""
    huge = torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6))
    torch.save({**real_state(), "format": 1, "model": {"w": huge}}, path)


def same_names(path: Path) -> None:
    """Add an entry of the same name: the reader that checks and the one that loads may differ."""
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        name = archive.namelist()[0]
        archive.writestr(name, archive.read(name))


def overlapping(path: Path) -> None:
    """Write eight thousand entries that are the same megabyte of the file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data/0", bytes(2**20))
    data = file.getvalue()
    start = data.rindex(b"PK\x01\x02")
    end = data.rindex(b"PK\x05\x06")
    entry = data[start:end]
    directory = entry * 8000
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 8000, 8000, len(directory), start, 0)
    path.write_bytes(data[:start] + directory + tail)


def deep(path: Path) -> None:
    """Nest lists 200,000 deep."""
    repack(path, b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")


def shared(path: Path) -> None:
    """Put each list twice into the next, 60 times: there are 2^60 ways through them."""
    repack(path, b"\x80\x02]q\x00" + b"".join(
        b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)
    ) + b".")  # fmt: skip


def huge_number(path: Path, digits: int) -> None:
    """Write a whole number with more digits than Python prints."""
    state = torch.load(path, weights_only=True)
    torch.save({**state, "global_step": 10**digits}, path)


BOMBS = {
    "compressed": compressed,
    "without strides": without_strides,
    "sparse": sparse,
    "entries of one name": same_names,
    "overlapping entries": overlapping,
    "deep": deep,
    "shared": shared,
    "10^400": partial(huge_number, digits=400),
    "10^5000": partial(huge_number, digits=5000),
}
