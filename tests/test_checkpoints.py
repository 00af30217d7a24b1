"""checkpoints.py: what is read is what was written, or an error; nothing in a file is executed."""

import contextlib
import functools
import io
import operator
import os
import pickle
import random
import re
import runpy
import shutil
import struct
import subprocess
import tarfile
import tempfile
import timeit
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
from faults import sabotage
from faults.contract import refused, tiny
from faults.costs import archive
from program import run
from torch import nn

import checkpoints
from errors import CheckpointError
from runlog import RunLog
from train import Schedule, Trainer

FLIPS, CUTS, BLOCKS = 20_000, 200, 200


def trainer() -> Trainer:
    schedule = Schedule("multistep", 0.1, 2, [])
    device = torch.device("cpu")
    return Trainer(nn.Linear(3, 2), schedule, momentum=0.9, weight_decay=0, precision="single",
                   device=device, log=RunLog(None))  # fmt: skip


def real_state(step: int = 3) -> dict:
    facts = {"settings": {"depth": 4, "LR": 0.1}, "data": {"classes": ["a", "b"]}, "overrides": []}
    return {**trainer().state_dict(), "global_step": step, **facts}


def equal(one, other) -> bool:
    """The same values of the same types, all the way down."""
    if isinstance(one, dict) and isinstance(other, dict):  # plain or ordered
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.fixture
def path(tmp_path) -> Path:
    return checkpoints.save(tmp_path, real_state(), keep=2)


def names(path: Path) -> list[str]:
    return zipfile.ZipFile(path).namelist()


def load_or_none(path: Path, data: bytes, load=checkpoints.load):
    with open(path, "r+b") as file:  # to empty the file first takes longer than all the rest
        file.write(data)
        file.truncate()
    try:
        return load(path)
    except CheckpointError:
        return None


def silently_wrong(path: Path, variants, load=checkpoints.load) -> tuple[int, int]:
    """How many variants of a file's bytes are refused, and how many load as something else."""
    original = load(path)
    loaded = [load_or_none(path, data, load) for data in variants]
    refusals = sum(state is None for state in loaded)
    return refusals, sum(state is not None and not equal(state, original) for state in loaded)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# ------------------------------------------------------------------------------ what was written


def test_a_state_is_read_as_it_was_written(path):
    state = checkpoints.load(path)
    assert state.pop("format") == checkpoints.FORMAT
    torch.manual_seed(0)  # the weights are drawn anew
    assert equal(state, real_state() | {"rng": state["rng"]})
    assert not equal(state, real_state() | {"rng": state["rng"]})  # of another seed


def test_tensors_are_stored_contiguous_and_without_the_storage_they_are_a_part_of(tmp_path):
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {**real_state(), "images": channels_last, "nested": [(channels_last[0],)]}
    loaded = checkpoints.load(checkpoints.save(tmp_path, state, keep=1))
    assert loaded["images"].is_contiguous() and torch.equal(loaded["images"], channels_last)
    assert torch.equal(loaded["nested"][0][0], channels_last[0])
    assert loaded["nested"][0][0].untyped_storage().nbytes() == 3 * 4 * 5 * 4


def test_no_flipped_bit_loads_silently_wrong(path):
    data = path.read_bytes()
    bits = random.Random(0).sample(range(8 * len(data)), FLIPS)
    refusals, wrong = silently_wrong(path, (flipped(data, bit) for bit in bits))
    assert wrong == 0
    assert refusals > 0.5 * FLIPS  # the others are in padding


def test_no_flipped_bit_in_the_description_of_a_tensor_loads_silently_wrong(path):
    """The zip directory is read twice, by two programs: they must not understand it differently."""
    data = path.read_bytes()
    entry = zipfile.ZipFile(path).getinfo(next(n for n in names(path) if n.endswith("data/0")))
    local, size = entry.header_offset, len(entry.filename)
    central = data.rindex(b"PK\x01\x02", 0, data.rindex(entry.filename.encode()))
    places = [*range(local, local + 30 + size), *range(central, central + 46 + size)]
    bits = [8 * place + bit for place in places for bit in range(8)]
    refusals, wrong = silently_wrong(path, (flipped(data, bit) for bit in bits))
    assert wrong == 0 and refusals > 0.3 * len(bits)


def test_without_the_checksums_flipped_bits_do_load_silently_wrong(path):
    def torch_alone(path):
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:
            raise CheckpointError(str(error), "") from error

    data = path.read_bytes()
    bits = random.Random(0).sample(range(8 * len(data)), 300)
    _, wrong = silently_wrong(path, (flipped(data, bit) for bit in bits), torch_alone)
    assert wrong > 100


def test_no_truncated_file_loads(path):
    data = path.read_bytes()
    sizes = [0, len(data) - 1, *random.Random(0).sample(range(len(data)), CUTS - 2)]
    refusals, _ = silently_wrong(path, (data[:size] for size in sizes))
    assert refusals == CUTS


def test_no_zeroed_block_loads_silently_wrong(path):
    data = path.read_bytes()
    starts = random.Random(0).sample(range(len(data) - 512), BLOCKS)
    blank = (data[:start] + bytes(512) + data[start + 512 :] for start in starts)
    refusals, wrong = silently_wrong(path, blank)
    assert wrong == 0 and refusals > 0.5 * BLOCKS


def test_an_entry_without_a_checksum_is_refused(path):
    data = path.read_bytes()
    name = next(n for n in names(path) if n.endswith("data.pkl"))
    crc = struct.pack("<I", zipfile.ZipFile(path).getinfo(name).CRC)
    assert load_or_none(path, data.replace(crc, bytes(4))) is None


# -------------------------------------------------------------------- what must never be executed


class Call:
    """Pickles as a call: whoever unpickles it makes the call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def tar_archive(pickled: bytes) -> bytes:
    """A file as torch.save wrote it before version 0.1.10."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as entries:
        parts = {"storages": pickle.dumps(0) + pickle.dumps([]), "tensors": pickle.dumps(0)}
        for name, data in {**parts, "pickle": pickled}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entries.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def old_format(value: object) -> bytes:
    """A file as torch.save wrote it before version 1.6."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def pickles(marker: Path) -> dict[str, bytes]:
    """Pickles that make `marker` when somebody unpickles them."""
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    script = marker.with_suffix(".py")
    script.write_text(code)
    system = Call(os.system, shell)
    calls = {
        "os.system": system,
        "os.spawnlp": Call(os.spawnlp, os.P_WAIT, "touch", "touch", str(marker)),
        "os.mkdir": Call(os.mkdir, str(marker)),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(marker), "w"),
        "eval among weights": {"format": 1, "model": {"weight": Call(eval, code)}},
        "eval in a key": {(Call(eval, code), 1): 1},
        "subprocess.call": Call(subprocess.call, ["touch", str(marker)]),
        "subprocess.Popen": Call(subprocess.check_output, ["touch", str(marker)]),
        "runpy": Call(runpy.run_path, str(script)),
        "timeit": Call(timeit.timeit, code, "pass", timeit.default_timer, 1),
        "shutil.copy": Call(shutil.copy, str(script), str(marker)),
        "Path.touch": Call(Path.touch, marker),
        "methodcaller": Call(operator.methodcaller("touch"), marker),
        "partial": Call(functools.partial(os.system, shell)),
        "pickle.loads": Call(pickle.loads, pickle.dumps(system)),
        "torch.storage._load_from_bytes": Call(torch.storage._load_from_bytes, old_format(system)),
        "torch.load": Call(
            functools.partial(torch.load, weights_only=False),
            Call(io.BytesIO, old_format(system)),
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
    """Files that make `marker` when torch.load reads them without weights_only."""
    plain = pickles(marker)
    system = Call(os.system, f"touch {marker}")
    return (
        {f"zip with {name}": archive(data) for name, data in plain.items()}
        | {f"pickle of protocol {i}": pickle.dumps(system, i) for i in range(6)}
        | {
            "old format": old_format(system),
            "old format with it in the system's description": pickle.dumps(
                torch.serialization.MAGIC_NUMBER
            )
            + pickle.dumps(torch.serialization.PROTOCOL_VERSION)
            + plain["os.system"],
            "tar": tar_archive(plain["os.system"]),
        }
    )


HOSTILE = list(hostile_files(Path(tempfile.gettempdir()) / "marker of the names alone"))


@pytest.fixture
def hostile(tmp_path, request) -> tuple[Path, Path]:
    """A hostile file and the marker that it makes when it is executed."""
    marker = tmp_path / "executed"
    path = tmp_path / "checkpoint_000000003.pt"
    path.write_bytes(hostile_files(marker)[request.param])
    return path, marker


def test_there_are_enough_hostile_files():
    assert len(HOSTILE) >= 25


@pytest.mark.parametrize("hostile", HOSTILE, indirect=True)
def test_a_hostile_file_is_hostile_to_others(hostile):
    path, marker = hostile
    with contextlib.suppress(Exception):  # after the harm is done
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("hostile", HOSTILE, indirect=True)
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("load", [checkpoints.load, checkpoints.load_weights])
def test_no_file_is_executed(hostile, forced, load, monkeypatch):
    path, marker = hostile
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load(path)
    assert not marker.exists()


@pytest.mark.parametrize("hostile", HOSTILE, indirect=True)
@pytest.mark.parametrize("flag", ["resume", "retrain"])
def test_no_file_is_executed_from_the_command_line(hostile, flag):
    path, marker = hostile
    forced = partial(sabotage.environment, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
    result = run(tiny(**{flag: path}, save=path.parent / "run"), forced)
    refused(result, 4, re.escape(str(path)))
    assert not marker.exists()


def test_a_hostile_checkpoint_in_a_run_directory_is_set_aside(tmp_path):
    marker = tmp_path / "executed"
    good = checkpoints.save(tmp_path, real_state(3), keep=2)
    bad = tmp_path / "checkpoint_000000004.pt"
    bad.write_bytes(hostile_files(marker)["zip with os.system"])
    assert checkpoints.latest(tmp_path, lambda line: None)["global_step"] == 3
    assert good.exists() and not bad.exists() and not marker.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_file_is_refused(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)), path)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load_weights(path)


# -------------------------------------------------------------------- what would take all memory


def with_pickle(path: Path, pickled: bytes) -> None:
    """Replace the pickle in a real checkpoint, with right checksums."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            new.writestr(name, pickled if name.endswith("data.pkl") else data)


def compressed(path: Path) -> None:
    """200 MB of zeros in 200 kB."""
    torch.save({**real_state(), "format": 1, "model": {"w": torch.zeros(50_000_000)}}, path)
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in entries.items():
            new.writestr(name, data)


def without_strides(path: Path) -> None:
    """10^12 elements that are all the same four bytes."""
    huge = torch.zeros(1).as_strided((10**6, 10**6), (0, 0))
    torch.save({**real_state(), "format": 1, "model": {"w": huge}}, path)


def sparse(path: Path) -> None:
    """10^12 elements of which one is there."""
    huge = torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6))
    torch.save({**real_state(), "format": 1, "model": {"w": huge}}, path)


def same_names(path: Path) -> None:
    """Two entries of one name: the reader that checks and the one that loads may take either."""
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        name = archive.namelist()[0]
        archive.writestr(name, archive.read(name))


def overlapping(path: Path) -> None:
    """Eight thousand entries that are the same megabyte of the file."""
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
    """Lists within lists, 200,000 deep."""
    with_pickle(path, b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")


def shared(path: Path) -> None:
    """A list of twice a list of twice a list ...: 60 of them, and 2^60 ways through them."""
    with_pickle(path, b"\x80\x02]q\x00" + b"".join(
        b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)
    ) + b".")  # fmt: skip


def huge_number(path: Path, digits: int) -> None:
    """A whole number with more digits than Python prints."""
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


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_in_little_time_and_memory(bomb, path):
    bomb(path)
    allowed = 2**28 + 3 * path.stat().st_size
    limit = partial(sabotage.limit_memory, allowed)
    result = run(tiny(resume=path, save=path.parent / "run"), limit, timeout_s=20)
    refused(result, 4, re.escape(str(path)))


# ------------------------------------------------------------------- what is no valid checkpoint


@pytest.mark.parametrize(
    ("data", "looks_like"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
        (b"  <html><body>404</body></html>", "a web page"),
        (b"these are not weights\n", "text"),
        (tar_archive(pickle.dumps(0)), "a tar archive"),
        (b"\x7fELF\x02\x01\x01" + bytes(100), "not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_looks_like(tmp_path, data, looks_like):
    path = tmp_path / "weights.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{path} is {looks_like}"):
        checkpoints.load_weights(path)


def test_a_directory_or_a_missing_file_is_refused(tmp_path):
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "x.pt", "No such file")):
        with pytest.raises(CheckpointError, match=f"cannot read {path}: {reason}") as caught:
            checkpoints.load(path)
        assert "; fix: " in caught.value.report()


def test_weights_alone_are_no_checkpoint(tmp_path):
    checkpoints.save_weights(tmp_path / "model_last.pt", {"w": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="is not a checkpoint of this program") as caught:
        checkpoints.load(tmp_path / "model_last.pt")
    assert "--retrain" in caught.value.report()


ENTRIES = [name for name in real_state() if name != "format"]


def test_a_checkpoint_from_before_there_were_replicas_is_of_one(tmp_path):
    state = {**real_state(), "format": checkpoints.FORMAT}
    del state["replicas"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert checkpoints.load(tmp_path / "checkpoint.pt")["replicas"] == 1


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != "replicas"])
def test_a_checkpoint_that_lacks_an_entry_is_refused(tmp_path, name):
    state = {**real_state(), "format": checkpoints.FORMAT}
    del state[name]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        checkpoints.load(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("wrong", [None, "text", torch.zeros(2)], ids=repr)
@pytest.mark.parametrize("name", ["format", "model", "momentum", "rng", "global_step"])
def test_a_checkpoint_with_an_entry_of_another_type_is_refused(tmp_path, name, wrong):
    path = tmp_path / "checkpoint_000000003.pt"
    torch.save({**real_state(), "format": checkpoints.FORMAT, name: wrong}, path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        checkpoints.load(path)


def test_a_checkpoint_of_a_newer_format_is_refused_and_left_alone(tmp_path):
    path = checkpoints.save(tmp_path, real_state(), keep=1)
    torch.save({**real_state(), "format": checkpoints.FORMAT + 1}, path)
    message = f"format {checkpoints.FORMAT + 1}, this program reads {checkpoints.FORMAT}"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(path)
    with pytest.raises(CheckpointError, match=message):  # whoever wrote it can read it: no damage
        checkpoints.latest(tmp_path, lambda line: None)
    assert path.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["model", "momentum"])
def test_a_checkpoint_with_a_number_that_is_not_finite_is_refused(tmp_path, value, where):
    state = real_state()
    name, tensor = next(iter(state[where].items()))
    state[where][name] = torch.cat([tensor.flatten()[1:], torch.tensor([value])])
    path = checkpoints.save(tmp_path, state, keep=1)
    with pytest.raises(CheckpointError, match="not finite"):
        checkpoints.load(path)


def test_a_renamed_checkpoint_is_refused(path):
    renamed = path.rename(path.with_name("checkpoint_000000009.pt"))
    with pytest.raises(CheckpointError, match="is of step 3"):
        checkpoints.load(renamed)


# -------------------------------------------------------------------------------- run directories


def write_steps(directory: Path, *steps: int, keep: int = 9) -> list[Path]:
    return [checkpoints.save(directory, real_state(step), keep) for step in steps]


def test_the_newest_is_the_one_of_the_last_step_whatever_the_dates(tmp_path):
    for age, path in enumerate(write_steps(tmp_path, 3, 20, 100)):
        os.utime(path, (2e9 - age * 1e6, 2e9 - age * 1e6))  # the last step has the oldest date
    assert checkpoints.latest(tmp_path, pytest.fail)["global_step"] == 100


def test_an_empty_directory_has_no_latest(tmp_path):
    assert checkpoints.latest(tmp_path, pytest.fail) is None


@pytest.mark.parametrize("damage", [b"", b"\0" * 5000, "cut", "zero tail"])
def test_a_damaged_newest_is_set_aside_and_the_one_before_is_used(tmp_path, damage):
    *_, before, newest = write_steps(tmp_path, 1, 2, 3)
    data = newest.read_bytes()
    ways = {"cut": data[: len(data) // 2], "zero tail": data[:-4096] + bytes(4096)}
    newest.write_bytes(ways.get(damage, damage))
    warnings = []
    assert checkpoints.latest(tmp_path, warnings.append)["global_step"] == 2
    assert len(warnings) == 1 and str(newest) in warnings[0]
    assert "set aside as checkpoint_000000003.pt.corrupt" in warnings[0]
    assert not newest.exists() and newest.with_suffix(".pt.corrupt").exists() and before.exists()


def test_when_all_are_damaged_it_is_an_error_now_and_later(tmp_path):
    for path in write_steps(tmp_path, 1, 2):
        path.write_bytes(b"")
    for _ in range(3):
        with pytest.raises(CheckpointError, match="no valid checkpoint among 2") as caught:
            checkpoints.latest(tmp_path, lambda line: None)
        assert caught.value.code == 4 and "; fix: restore" in caught.value.report()


@pytest.mark.parametrize("keep", [1, 2])
def test_as_many_as_asked_are_kept(tmp_path, keep):
    paths = write_steps(tmp_path, 1, 2, 10, 11, keep=keep)
    assert sorted(tmp_path.glob("checkpoint*")) == paths[-keep:]


def test_a_directory_holds_a_run_from_its_first_weights_on(tmp_path):
    (tmp_path / "config.yaml").write_text("depth: 10\n")
    (tmp_path / ".checkpoint_000000001.pt.tmp").write_text("half")
    assert not checkpoints.holds_run(tmp_path)
    write_steps(tmp_path, 1)
    assert checkpoints.holds_run(tmp_path)


def test_a_directory_with_weights_alone_holds_a_run(tmp_path):
    checkpoints.save_weights(tmp_path / "model_last.pt", {"w": torch.zeros(1)})
    assert checkpoints.holds_run(tmp_path)


def test_a_directory_of_damaged_checkpoints_still_holds_a_run(tmp_path):
    (path,) = write_steps(tmp_path, 1)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError):
        checkpoints.latest(tmp_path, lambda line: None)
    assert checkpoints.holds_run(tmp_path)  # or the next start would silently be a fresh one


def test_writing_replaces_a_link_and_never_its_target(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    link = tmp_path / "checkpoint_000000003.pt"
    link.symlink_to(elsewhere)
    assert checkpoints.save(tmp_path, real_state(), keep=1) == link
    assert not link.is_symlink() and elsewhere.read_text() == "precious"


def test_links_are_followed_when_reading(tmp_path):
    (tmp_path / "run").mkdir()
    (outside,) = write_steps(tmp_path, 3)
    for name, target in (("to file", outside), ("loop", "loop"), ("dangling", "nowhere")):
        (tmp_path / name).symlink_to(target)
    assert checkpoints.load(tmp_path / "to file")["global_step"] == 3
    for name in ("loop", "dangling"):
        with pytest.raises(CheckpointError, match="cannot read"):
            checkpoints.load(tmp_path / name)


# ---------------------------------------------------------------------------------------- weights

WEIGHTS = {"features.conv0.weight": torch.ones(2, 3), "classifier.bias": torch.zeros(2)}


WRAPPED = [
    WEIGHTS,
    OrderedDict(WEIGHTS),
    {"model": WEIGHTS},
    {"state_dict": WEIGHTS, "epoch": 3},
    {"model": {"state_dict": WEIGHTS}},
]


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found_in_state_dicts_of_every_wrapping(tmp_path, wrapped, zipped):
    # Old files, as torchvision's DenseNet weights are, have no zip archive around them.
    torch.save(wrapped, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert equal(checkpoints.load_weights(tmp_path / "w.pth"), WEIGHTS)


def test_the_weights_of_a_checkpoint_are_its_models(path):
    assert equal(checkpoints.load_weights(path), dict(checkpoints.load(path)["model"]))


@pytest.mark.parametrize("value", [{}, {"model": {}}, [torch.zeros(1)], {"a": 1}, torch.zeros(1)])
def test_what_is_no_state_dict_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        checkpoints.load_weights(tmp_path / "w.pth")
