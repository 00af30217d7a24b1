"""Test checkpoints.py: a file is read as it was written, or refused; none is executed."""

import contextlib
import os
import pickle
import random
import re
import signal
import struct
import tempfile
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

import checkpoints
from errors import CheckpointError, DamagedError, NonFiniteError, Preempted
from faults import sabotage
from faults.contract import refused, tiny
from fileio import tensor_files
from helpers.hostile_files import (
    BOMBS,
    equal,
    hostile_files,
    real_state,
    tar_archive,
)
from helpers.hostile_files import trainer as tiny_trainer
from helpers.run_main import ROOT, run

FLIPS, CUTS, BLOCKS = 20_000, 200, 200


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
    """Count variants of a file's bytes: refused ones, and ones that load as something else."""
    original = load(path)
    loaded = [load_or_none(path, data, load) for data in variants]
    refusals = sum(state is None for state in loaded)
    return refusals, sum(state is not None and not equal(state, original) for state in loaded)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# What was written:
def test_a_state_is_read_as_it_was_written(path):
    state = checkpoints.load(path)
    assert state.pop("format") == checkpoints.FORMAT
    torch.manual_seed(0)  # the weights are drawn again
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
    """Check the zip directory, which two programs read: they must not read it differently."""
    data = path.read_bytes()
    entry = zipfile.ZipFile(path).getinfo(next(n for n in names(path) if n.endswith("data/0")))
    local, size = entry.header_offset, len(entry.filename)
    central = data.rindex(b"PK\x01\x02", 0, data.rindex(entry.filename.encode()))
    offsets = [*range(local, local + 30 + size), *range(central, central + 46 + size)]
    bits = [8 * offset + bit for offset in offsets for bit in range(8)]
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


# What must never be executed:
HOSTILE = list(hostile_files(Path(tempfile.gettempdir()) / "marker of the names alone"))


@pytest.fixture
def hostile(tmp_path, request) -> tuple[Path, Path]:
    """Return a hostile file and the marker that it makes when it is executed."""
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


@pytest.mark.parametrize("hostile", HOSTILE[:4], indirect=True)
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
    assert checkpoints.load_latest(tmp_path, lambda line: None)["global_step"] == 3
    assert good.exists() and not bad.exists() and not marker.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_file_is_refused(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)), path)
    with pytest.raises(CheckpointError, match="is a TorchScript archive") as caught:
        checkpoints.load_weights(path)
    assert "torch.save(model.state_dict(), FILE)" in caught.value.report()


# Files that would take all memory:
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_in_little_time_and_memory(bomb, path):
    bomb(path)
    allowed = 2**28 + 3 * path.stat().st_size
    limit = partial(sabotage.limit_memory, allowed)
    result = run(tiny(resume=path, save=path.parent / "run"), limit, timeout_s=20)
    refused(result, 4, re.escape(str(path)))


# Invalid checkpoints:
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
def test_another_file_is_named_by_its_type(tmp_path, data, looks_like):
    path = tmp_path / "weights.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{path} is {looks_like}"):
        checkpoints.load_weights(path)


def test_a_directory_or_a_missing_file_is_refused(tmp_path):
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "x.pt", "No such file")):
        with pytest.raises(CheckpointError, match=f"cannot read {path}: {reason}") as caught:
            checkpoints.load(path)
        assert "; fix: " in caught.value.report()


def test_weights_alone_are_refused_as_a_checkpoint(tmp_path):
    tensor_files.save_weights(tmp_path / "model_last.pt", {"w": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="is not a checkpoint of this program") as caught:
        checkpoints.load(tmp_path / "model_last.pt")
    assert "--retrain" in caught.value.report()


ENTRIES = [name for name in real_state() if name != "format"]


LATER = {"replicas": 1, "defaults": None}  # what earlier versions did not write, and what it is


@pytest.mark.parametrize("name", LATER)
def test_a_checkpoint_from_before_there_was_an_entry_gets_it(tmp_path, name):
    state = {**real_state(), "format": checkpoints.FORMAT}
    del state[name]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert checkpoints.load(tmp_path / "checkpoint.pt")[name] == LATER[name]


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in LATER])
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
    with pytest.raises(CheckpointError, match=message):  # another version can read it: no damage
        checkpoints.load_latest(tmp_path, lambda line: None)
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


# Run directories:
def write_steps(directory: Path, *steps: int, keep: int = 9) -> list[Path]:
    return [checkpoints.save(directory, real_state(step), keep) for step in steps]


def test_the_newest_is_the_one_of_the_last_step_whatever_the_dates(tmp_path):
    assert checkpoints.load_latest(tmp_path, pytest.fail) is None
    for age, path in enumerate(write_steps(tmp_path, 3, 20, 100)):
        os.utime(path, (2e9 - age * 1e6, 2e9 - age * 1e6))  # the last step has the oldest date
    assert checkpoints.load_latest(tmp_path, pytest.fail)["global_step"] == 100


@pytest.mark.parametrize("damage", [b"", b"\0" * 5000, "cut", "zero tail"])
def test_a_damaged_newest_is_set_aside_and_the_one_before_is_used(tmp_path, damage):
    *_, before, newest = write_steps(tmp_path, 1, 2, 3)
    data = newest.read_bytes()
    ways = {"cut": data[: len(data) // 2], "zero tail": data[:-4096] + bytes(4096)}
    newest.write_bytes(ways.get(damage, damage))
    warnings = []
    assert checkpoints.load_latest(tmp_path, warnings.append)["global_step"] == 2
    assert len(warnings) == 1 and str(newest) in warnings[0]
    assert "set aside as checkpoint_000000003.pt.corrupt" in warnings[0]
    assert not newest.exists() and newest.with_suffix(".pt.corrupt").exists() and before.exists()


def test_when_all_are_damaged_it_is_an_error_now_and_later(tmp_path):
    for path in write_steps(tmp_path, 1, 2):
        path.write_bytes(b"")
    for _ in range(3):
        with pytest.raises(CheckpointError, match="no valid checkpoint among 2") as caught:
            checkpoints.load_latest(tmp_path, lambda line: None)
        assert caught.value.code == 4 and "; fix: restore" in caught.value.report()


@pytest.mark.parametrize("keep", [1, 2])
def test_as_many_as_asked_are_kept(tmp_path, keep):
    paths = write_steps(tmp_path, 1, 2, 10, 11, keep=keep)
    assert sorted(tmp_path.glob("checkpoint*")) == paths[-keep:]


def test_a_directory_holds_a_run_from_its_first_weights_on(tmp_path):
    (tmp_path / "config.yaml").write_text("depth: 10\n")
    (tmp_path / ".checkpoint_000000001.pt.tmp").write_text("half")
    assert not checkpoints.has_checkpoint(tmp_path)
    (path,) = write_steps(tmp_path, 1)
    assert checkpoints.has_checkpoint(tmp_path)
    path.rename(tmp_path / "model_last.pt")
    assert checkpoints.has_checkpoint(tmp_path)


def test_a_directory_of_damaged_checkpoints_still_holds_a_run(tmp_path):
    (path,) = write_steps(tmp_path, 1)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError):
        checkpoints.load_latest(tmp_path, lambda line: None)
    assert checkpoints.has_checkpoint(tmp_path)  # or the next start would silently be a fresh one


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


# Weights:
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
def test_other_values_than_a_state_dict_are_refused(tmp_path, value):
    torch.save(value, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        checkpoints.load_weights(tmp_path / "w.pth")


# The saver:
class Directory:
    """Stand for a run directory whose lock is held; record its status."""

    def __init__(self, path: Path):
        self.path, self.status = path, {}

    def verify_lock(self) -> None:
        pass

    def write_status(self, state: str, **fields: object) -> None:
        self.status = {"state": state, **fields}


def saver(path: Path, signum: int = 0, every_s: float = 1e9) -> checkpoints.CheckpointSaver:
    trainer, stop = tiny_trainer(), SimpleNamespace(signum=signum)
    trainer.metadata = trainer.metadata._replace(settings={"save": "runs/a"})
    return checkpoints.CheckpointSaver(Directory(path), trainer, stop, keep=2, every_s=every_s)


def test_a_step_saves_when_it_is_due_or_a_signal_came_and_a_signal_ends_the_run(tmp_path):
    quiet = saver(tmp_path)
    quiet.on_step_end()
    quiet.raise_if_stopping()
    assert not list(tmp_path.iterdir())
    saver(tmp_path, every_s=0).on_step_end()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_000000000.pt"]
    for name in ("on_step_end", "raise_if_stopping"):
        with pytest.raises(Preempted, match="SIGTERM, runs/a is saved") as caught:
            getattr(saver(tmp_path, signal.SIGTERM), name)()
        assert caught.value.report().endswith("to go on: python main.py --resume runs/a")


def test_the_time_to_the_next_save_counts_from_the_last(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    saving = saver(tmp_path, every_s=50)
    for now, is_due in ((149.0, False), (150.0, True), (199.0, False), (200.0, True)):  # noqa: B007
        saving.directory.status = {}
        saving.on_step_end()
        assert bool(saving.directory.status) == is_due


@pytest.mark.parametrize("is_best", [False, True])
def test_an_epoch_saves_the_checkpoint_and_the_models(tmp_path, is_best):
    ending = saver(tmp_path)
    for error in (50.0, 40.0 if is_best else 60.0):
        record = {"val_loss": 1.0, "val_top1": error, "val_top5": 1.0}
        ending.trainer.finish_epoch({}, record)
    ending.on_epoch_end()
    assert ending.directory.status["checkpoint"] == "checkpoint_000000000.pt"
    assert ending.directory.status["epoch"] == 3
    assert (tmp_path / "model_best.pt").exists() == is_best
    weights = dict(ending.trainer.model.state_dict())
    assert equal(checkpoints.load_weights(tmp_path / "model_last.pt"), weights)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    ruined = saver(tmp_path)
    with torch.no_grad():
        next(ruined.trainer.model.parameters()).fill_(torch.nan)
    what = "a weight that is not finite: weight at epoch 1, step 0"
    with pytest.raises(NonFiniteError, match=what):
        ruined.save()
    assert not list(tmp_path.iterdir())


# What reading may cost:
def test_tensors_together_hold_no_more_than_the_file():
    tensors = [torch.zeros(4), [torch.zeros(4)]]
    tensor_files.check_tensors(tensors, 32)
    with pytest.raises(ValueError, match="larger than its data"):
        tensor_files.check_tensors(tensors, 31)
    nested = []
    for _ in range(60):  # 2 ** 60 paths to one list
        nested = [nested, nested]
    tensor_files.check_tensors(nested)


def test_memory_that_is_missing_does_not_count_as_damage(path, monkeypatch):
    for error in (MemoryError(), RuntimeError("cannot allocate memory")):
        monkeypatch.setattr(tensor_files, "_parse", mock.Mock(side_effect=error))
        with pytest.raises(CheckpointError, match="takes more memory than there is") as caught:
            checkpoints.load(path)
        assert not isinstance(caught.value, DamagedError)


def test_values_cross_between_processes_as_they_are():
    value = {"a": [1, 2.5, None, "text"], "b": torch.arange(3)}
    assert equal(tensor_files.from_bytes(tensor_files.to_bytes(value)), value)


def test_a_checkpoint_of_an_earlier_version_is_read():
    state = checkpoints.load_latest(ROOT / "tests" / "old_run" / "interrupted", pytest.fail)
    assert (state["format"], state["global_step"]) == (1, 30)


def test_a_checkpoint_that_is_removed_while_it_is_looked_for_is_passed_over(tmp_path, monkeypatch):
    write_steps(tmp_path, 1, 2)
    read = tensor_files.read

    def remove_first(path: Path, **options: object) -> object:
        if path.name == "checkpoint_000000002.pt":
            path.unlink()
        return read(path, **options)

    monkeypatch.setattr(checkpoints, "read", remove_first)
    assert checkpoints.load_latest(tmp_path, pytest.fail)["global_step"] == 1


def test_weights_of_a_lua_network_are_read():
    path = ROOT / "tests" / "models" / "lua_networks" / "densenet-bc.t7"
    assert all(value.isfinite().all() for value in checkpoints.load_weights(path).values())
