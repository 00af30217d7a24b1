"""Rows 1 to 8: SIGKILL at each change of a file, in training and in validation."""

import re
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoints
from faults.contract import check_whole, outcome, saved, status, tiny
from faults.sabotage import at_batch, kill, no_fsync, on_files, record_files, replace_everywhere
from helpers.run_main import run

# Two steps an epoch, one checkpoint within each, one kept: everything happens, and soon.
FLAGS = {"nImages": 16, "nEpochs": 2, "dropRate": 0.2, "saveEvery": 1e-9, "keep": 2}


def again(directory: Path) -> dict:
    """What the same command comes to when it is run again."""
    result = run(tiny(**FLAGS, resume="auto", save=directory), no_fsync)
    assert result.code == 0, result
    return outcome(directory)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[dict, list[str]]:
    """What the run comes to, and the operations on files that it makes."""
    directory = tmp_path_factory.mktemp("reference")
    report = directory.with_suffix(".txt")
    result = run(tiny(**FLAGS, save=directory), partial(record_files, directory, report))
    assert result.code == 0, result
    return outcome(directory), report.read_text().splitlines()


def test_a_run_makes_every_kind_of_change(reference):
    _, operations = reference
    kinds = Counter(line.split()[0] for line in operations)
    assert kinds.keys() == {"mkdir", "open", "write", "fsync", "rename", "remove"}
    assert len(operations) > 100


def last_of_each_kind(operations: list[str]) -> list[int]:
    """The numbers of the last of each kind of operation on each kind of file."""
    kinds = {re.sub(r"\d", "", line): k for k, line in enumerate(operations, start=1)}
    # Before a temporary file is opened is the moment after what went before.
    return sorted(k for kind, k in kinds.items() if not kind.endswith("tmp") or "open" not in kind)


def test_a_kill_at_any_change_of_a_file_loses_nothing(reference, tmp_path):
    want, operations = reference
    moments = last_of_each_kind(operations)
    assert len(moments) > 25
    for k in moments:
        directory = tmp_path / str(k)
        argv = tiny(**FLAGS, save=directory)
        result = run(argv, partial(on_files, kill, directory, k=k))
        assert result.code == -signal.SIGKILL, (k, operations[k - 1], result)
        count = check_whole(directory)
        # Once two checkpoints have been kept there are never fewer, nor is model_last.pt gone.
        made = sum("rename checkpoint" in line for line in operations[: k - 1])
        assert count >= min(made, 2), operations[k - 1]
        assert (directory / "model_last.pt").exists() == (
            "rename model_last.pt" in operations[: k - 1]
        )
        assert again(directory) == want, operations[k - 1]
        left = [path.name for path in directory.iterdir() if path.suffix == ".tmp"]
        assert not left, operations[k - 1]
        assert len(list(directory.glob("checkpoint_*.pt"))) == 2


def plain_writes() -> None:
    """Write files as if nothing could happen meanwhile."""
    from fileio import atomic

    def write(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data)

    replace_everywhere(atomic.atomic_write, write)


def test_plain_writes_do_lose_something(tmp_path):
    """The twin of the test above: it can fail."""
    spoil = partial(on_files, kill, tmp_path, operation="write", name="checkpoint", k=2)
    result = run(tiny(**FLAGS, save=tmp_path), partial(_both, plain_writes, spoil))
    assert result.code == -signal.SIGKILL
    with pytest.raises(checkpoints.CheckpointError):
        check_whole(tmp_path)


def _both(first, second) -> None:
    first()
    second()


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("phase", ["train", "val"])
def test_a_kill_within_an_epoch_or_its_validation_loses_nothing(reference, tmp_path, phase, k):
    k = {"train": k, "val": 2 if k > 1 else 1}[phase]
    result = run(tiny(**FLAGS, save=tmp_path), partial(at_batch, kill, k, phase))
    assert result.code == -signal.SIGKILL
    check_whole(tmp_path)
    assert again(tmp_path) == reference[0]


@pytest.mark.parametrize("name", ["log.jsonl", "tensorboard"])
def test_a_kill_while_a_log_is_written_loses_and_doubles_no_line(reference, tmp_path, name):
    # log.jsonl is first written, empty, when the run begins; then once an epoch.
    k = {"log.jsonl": 2, "tensorboard": 1}[name]
    operation = {"log.jsonl": "write", "tensorboard": "open"}[name]
    spoil = partial(on_files, kill, tmp_path, operation=operation, name=name, k=k)
    result = run(tiny(**FLAGS, save=tmp_path), spoil)
    assert result.code == -signal.SIGKILL
    assert again(tmp_path) == reference[0]


def test_a_kill_before_the_first_checkpoint_leaves_nothing_in_the_way(reference, tmp_path):
    """Row 1: also without --resume, the plain command starts anew."""
    argv = tiny(**FLAGS, save=tmp_path)
    assert run(argv, partial(on_files, kill, tmp_path, name="tensorboard")).code == -signal.SIGKILL
    assert (tmp_path / "config.yaml").exists() and not saved(tmp_path).keys() & {"model_last.pt"}
    assert run(argv).code == 0
    assert outcome(tmp_path) == reference[0]


def test_the_verdict_of_a_killed_run_is_that_it_was_running(tmp_path):
    run(tiny(**FLAGS, save=tmp_path), partial(at_batch, kill, 3))
    verdict = status(tmp_path)
    assert verdict["state"] == "running" and verdict["code"] is None
    assert verdict["checkpoint"] == "checkpoint_000000002.pt"


# Retention: what is kept can be resumed from.


def write_some(directory: Path, *steps: int, keep: int = 9, **more) -> None:
    """Save something as checkpoints of some steps."""
    for step in steps:
        checkpoints.save(directory, {"global_step": step, "w": torch.ones(step)}, keep, **more)


def steps(directory: Path) -> list[int]:
    """Of which steps there are checkpoints, newest first."""
    return [int(path.stem.split("_")[1]) for path in checkpoints.list_checkpoints(directory)]


def damage(directory: Path, *steps: int) -> None:
    """Leave files under the names of checkpoints: cut short, changed, empty, and no archive."""
    whole = checkpoints.list_checkpoints(directory)[0].read_bytes()
    ways = [whole[:-9], whole[:99] + b"?" + whole[100:], b"", b"<!DOCTYPE html>"]
    for step, data in zip(steps, ways, strict=True):
        (directory / f"checkpoint_{step:09d}.pt").write_bytes(data)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_damaged_checkpoint_does_not_push_out_one_that_can_be_resumed(tmp_path, keep):
    write_some(tmp_path, 2, 4, 6, 8)
    damage(tmp_path, 1, 7, 90, 91)
    write_some(tmp_path, 10, keep=keep)
    assert steps(tmp_path) == sorted([1, 7, 90, 91, *[10, 8, 6][:keep]], reverse=True)
    write_some(tmp_path, 12, keep=keep)
    assert steps(tmp_path) == sorted([1, 7, 90, 91, *[12, 10, 8][:keep]], reverse=True)


def test_without_the_check_it_would(tmp_path, monkeypatch):
    """The twin of the test above: even the checkpoint just written would be removed."""
    monkeypatch.setattr(checkpoints, "is_valid", lambda path: True)
    write_some(tmp_path, 2, 4)
    damage(tmp_path, 1, 3, 90, 91)
    write_some(tmp_path, 10, keep=2)
    assert steps(tmp_path) == [91, 90]


def test_what_another_process_wrote_is_read_once_and_what_this_one_wrote_never(
    tmp_path, monkeypatch
):
    write_some(tmp_path, 2, 4)
    read, known = [], {}
    is_valid = checkpoints.is_valid
    monkeypatch.setattr(
        checkpoints, "is_valid", lambda path: read.append(path.name) or is_valid(path)
    )
    write_some(tmp_path, 6, 8, 10, keep=3, known=known)
    assert sorted(read) == ["checkpoint_000000002.pt", "checkpoint_000000004.pt"]
    assert steps(tmp_path) == [10, 8, 6]
