"""Test rows 4 to 7: SIGKILL at each change of a file, and what is kept."""

import re
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoints
from faults.contract import call, check_whole, outcome, tiny
from faults.sabotage import kill, no_fsync, on_files, record_files
from helpers.run_main import run

# Two steps an epoch, one checkpoint within each, two kept: everything happens, and soon.
FLAGS = {"nImages": 16, "nEpochs": 2, "dropRate": 0.2, "saveEvery": 1e-9, "keep": 2}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[dict, list[str]]:
    """Return the outcome of the run, and the operations on files that it makes."""
    directory = tmp_path_factory.mktemp("reference")
    report = directory.with_suffix(".txt")
    result = run(tiny(**FLAGS, save=directory), partial(record_files, directory, report))
    assert result.code == 0, result
    return outcome(directory), report.read_text().splitlines()


def last_of_each_kind(operations: list[str]) -> list[int]:
    """Number the last of each kind of operation on each kind of file."""
    kinds = {re.sub(r"\d", "", line): k for k, line in enumerate(operations, start=1)}
    # Before a temporary file is opened is the moment after what went before.
    return sorted(k for kind, k in kinds.items() if not kind.endswith("tmp") or "open" not in kind)


def test_a_kill_at_any_change_of_a_file_loses_nothing(reference, tmp_path):
    want, operations = reference
    kinds = Counter(line.split()[0] for line in operations)
    assert kinds.keys() == {"mkdir", "open", "write", "fsync", "rename", "remove"}
    moments = last_of_each_kind(operations)
    assert len(moments) > 25
    for k in moments:
        directory, what = tmp_path / str(k), operations[k - 1]
        argv = tiny(**FLAGS, save=directory)
        result = run(argv, partial(on_files, kill, directory, k=k))
        assert result.code == -signal.SIGKILL, (what, result)
        # Once two checkpoints have been kept there are never fewer, nor is model_last.pt gone.
        made = sum("rename checkpoint" in line for line in operations[: k - 1])
        assert check_whole(directory) >= min(made, 2), what
        was_saved = "rename model_last.pt" in operations[: k - 1]
        assert (directory / "model_last.pt").exists() == was_saved, what
        assert call([*argv, "--resume=auto"], 1, {0: no_fsync})[0].code == 0
        assert outcome(directory) == want, what
        assert not list(directory.glob("*.tmp")), what
        assert len(list(directory.glob("checkpoint_*.pt"))) == 2


# A run resumes from the files that stay.


def write_some(directory: Path, *steps: int, keep: int = 9, **more) -> None:
    """Save something as checkpoints of some steps."""
    for step in steps:
        checkpoints.save(directory, {"global_step": step, "w": torch.ones(step)}, keep, **more)


def steps(directory: Path) -> list[int]:
    """List the steps of the checkpoints, newest first."""
    return [int(path.stem.split("_")[1]) for path in checkpoints.list_checkpoints(directory)]


@pytest.mark.parametrize("keep", [1, 3])
def test_a_damaged_checkpoint_does_not_push_out_one_that_can_be_resumed(tmp_path, keep):
    write_some(tmp_path, 2, 4, 6, 8)
    whole = checkpoints.list_checkpoints(tmp_path)[0].read_bytes()
    damaged = {1: whole[:-9], 7: whole[:99] + b"?" + whole[100:], 90: b"", 91: b"<!DOCTYPE html>"}
    for step, data in damaged.items():
        (tmp_path / f"checkpoint_{step:09d}.pt").write_bytes(data)
    write_some(tmp_path, 10, keep=keep)
    assert steps(tmp_path) == sorted([*damaged, *[10, 8, 6][:keep]], reverse=True)
    write_some(tmp_path, 12, keep=keep)
    assert steps(tmp_path) == sorted([*damaged, *[12, 10, 8][:keep]], reverse=True)


def test_files_of_another_process_are_read_once_and_own_ones_never(tmp_path, monkeypatch):
    write_some(tmp_path, 2, 4)
    read, validated = [], {}
    is_valid = checkpoints.is_valid
    monkeypatch.setattr(
        checkpoints, "is_valid", lambda path: read.append(path.name) or is_valid(path)
    )
    write_some(tmp_path, 6, 8, 10, keep=3, validated=validated)
    assert sorted(read) == ["checkpoint_000000002.pt", "checkpoint_000000004.pt"]
    assert steps(tmp_path) == [10, 8, 6]
