"""Test experiment/directory.py and fileio/atomic.py: whole files, and one writer."""

import errno
import fcntl
import multiprocessing
import os
import re
import signal
import stat
from functools import partial
from pathlib import Path

import pytest

from errors import BusyError, NonFiniteError, Preempted, RunError, StorageError
from experiment.directory import RunDirectory, check_writable
from faults import sabotage
from faults.contract import status
from fileio import atomic

_context = multiprocessing.get_context("forkserver")

OLD, NEW = b"old" * 1000, b"new" * 2000
# The order is what survives a power loss: content, then name, then directory.
STEPS = ["open .file.bin.tmp", "write .file.bin.tmp", "fsync .file.bin.tmp",
         "rename file.bin", "open .", "fsync ."]  # fmt: skip


# One file:
@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "file.bin"
    path.write_bytes(OLD)
    return path


def write(path: Path, inject) -> None:
    inject()
    atomic.atomic_write(path, NEW)


def written_elsewhere(path: Path, inject) -> int:
    """Return the exit code of a process that writes the file, and may be killed."""
    process = _context.Process(target=write, args=(path, inject))
    process.start()
    process.join(60)
    return process.exitcode


def test_a_write_goes_through_a_temporary_file(path, tmp_path):
    report = tmp_path / "report"
    assert written_elsewhere(path, partial(sabotage.record_files, path.parent, report)) == 0
    assert report.read_text().splitlines() == STEPS
    assert path.read_bytes() == NEW and os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("k", range(1, len(STEPS) + 2))
def test_a_write_that_is_killed_leaves_the_old_file_or_the_new_one(path, k):
    kill = partial(sabotage.on_files, sabotage.kill, path.parent, k=k)
    code = written_elsewhere(path, kill)
    assert code == (-signal.SIGKILL if k <= len(STEPS) else 0)  # each step was reached
    assert path.read_bytes() == (OLD if k <= 4 else NEW)  # the fourth is the rename


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_refused_write_changes_nothing_and_says_why(path, monkeypatch, function, number):
    monkeypatch.setattr(os, function, lambda *args, **kwargs: sabotage.refuse(number))
    with pytest.raises(StorageError) as caught:
        atomic.atomic_write(path, NEW)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    what = f"no space in {path.parent}: file.bin needs 0.0 MB, has " if full else "cannot write"
    assert caught.value.report().startswith(f"error: {what}")
    assert os.strerror(number) in caught.value.report() and "--save" in caught.value.report()
    assert path.read_bytes() == OLD and os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_that_cannot_sync_directories_can_hold_a_run(path, monkeypatch, number):
    sync = os.fsync

    def refuse_directories(descriptor: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        sabotage.refuse(number) if is_directory else sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_directories)
    atomic.atomic_write(path, NEW)
    assert path.read_bytes() == NEW and os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("below", ["", "run"])
def test_a_directory_is_checked_without_being_made_and_no_file_is_in_its_place(path, below):
    check_writable(path.parent / "a" / below)
    check_writable(path.parent)
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(StorageError, match=f"not a directory: {path}"):
        check_writable(path / below)
    with pytest.raises(StorageError, match="cannot write"):
        RunDirectory(path / below)
    assert path.read_bytes() == OLD


# Run directory:
def hold(directory: Path, pipe) -> None:
    """Open the run directory, and start a child that outlives this process, as a loader's may."""
    with RunDirectory(directory):
        child = os.fork()
        if child == 0:
            signal.pause()
        pipe.send(child)
        pipe.poll(60)


def test_a_directory_has_one_writer_until_that_is_killed_and_is_swept_by_the_next(tmp_path):
    receiver, sender = _context.Pipe()
    owner = _context.Process(target=hold, args=(tmp_path, sender))
    owner.start()
    child = receiver.recv()
    (tmp_path / ".checkpoint_000000003.pt.tmp").write_bytes(b"being written")
    (tmp_path / "checkpoint_000000002.pt").write_bytes(b"whole")
    left = sorted(os.listdir(tmp_path))
    name = rf"in use by host {re.escape(os.uname().nodename)}, process {owner.pid}, since 20"
    try:
        for _ in range(2):  # what is known about the owner outlives a refusal
            with pytest.raises(BusyError, match=name):
                RunDirectory(tmp_path)
        assert sorted(os.listdir(tmp_path)) == left
        os.kill(owner.pid, signal.SIGKILL)
        owner.join(60)
        assert sorted(os.listdir(tmp_path)) == left  # it could not clean up
        os.kill(child, 0)  # it is alive, and does not hold the lock
        with RunDirectory(tmp_path):
            assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoint_000000002.pt"]
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_directory_that_another_machine_has_taken_over_is_not_written(tmp_path):
    with (
        pytest.raises(BusyError, match="taken over by host elsewhere"),
        RunDirectory(tmp_path) as own,
    ):
        own.write_status("running")
        own.verify_lock()
        (tmp_path / ".lock").write_text("host elsewhere, process 1\n")
        own.verify_lock()
    assert status(tmp_path)["state"] == "running"  # the other one writes the outcome


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_noted_and_the_newer_of_two_runs_goes_on(
    tmp_path, monkeypatch, capsys, number
):
    monkeypatch.setattr(fcntl, "lockf", lambda *_: sabotage.refuse(number))
    first = RunDirectory(tmp_path)
    assert f"has no locks ({os.strerror(number)})" in capsys.readouterr().err
    first.verify_lock()
    (tmp_path / ".lock").write_text("host b, process 2, since now\n")  # as the second would
    with pytest.raises(BusyError, match="taken over by host b"):
        first.verify_lock()


def test_a_lock_that_fails_for_another_reason_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", lambda *_: sabotage.refuse(errno.EIO))
    with pytest.raises(StorageError, match="Input/output"):
        RunDirectory(tmp_path)


NAN = NonFiniteError("loss is not finite at epoch 3, step 4", "lower --LR", batch=[7])


@pytest.mark.parametrize(
    ("error", "want"),
    [
        (NAN, {"state": "failed", "code": 5, "reason": str(NAN), "batch": [7]}),
        (Preempted("SIGTERM, saved", "x"),
         {"state": "preempted", "code": 75, "reason": "SIGTERM, saved"}),
        (KeyError("a"), {"state": "failed", "code": 1, "reason": "a bug: KeyError: 'a'"}),
    ],
)  # fmt: skip
def test_the_status_says_how_a_run_ended(tmp_path, error, want):
    with pytest.raises(type(error)), RunDirectory(tmp_path) as directory:
        directory.set_status_fields(overrides=[])
        directory.write_status("running", epoch=3)
        running = {"overrides": [], "state": "running", "code": None, "epoch": 3}
        assert directory.read_status() == running
        raise error
    assert status(tmp_path) == {"overrides": [], "epoch": 3, **want}


def test_a_call_that_is_refused_before_it_begins_leaves_the_status_alone(tmp_path):
    with RunDirectory(tmp_path) as directory:
        directory.write_status("done", 0)
    with pytest.raises(RunError), RunDirectory(tmp_path):
        raise StorageError("refused", "try again")
    assert status(tmp_path)["state"] == "done"


@pytest.mark.parametrize("text", [None, "", "{", "\0" * 10, "\xff"])
def test_a_missing_or_damaged_status_reads_as_empty(tmp_path, text):
    if text is not None:
        (tmp_path / "status.json").write_text(text, encoding="latin-1")
    with RunDirectory(tmp_path) as directory:
        assert directory.read_status() == {}
