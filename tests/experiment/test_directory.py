"""experiment/directory.py: files are whole or not there, and a run directory has one writer."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path

import pytest

import experiment.directory
from errors import BusyError, NonFiniteError, Preempted, RunError, StorageError
from experiment.directory import RunDirectory
from faults import sabotage
from fileio import atomic

_context = multiprocessing.get_context("forkserver")

OLD, NEW = b"old" * 1000, b"new" * 2000


def in_a_process(function, *args) -> int:
    """The exit code of a function run elsewhere, where it may be killed."""
    process = _context.Process(target=function, args=args)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(OLD)
    (tmp_path / "earlier.bin").write_bytes(b"earlier")
    return path


# -------------------------------------------------------------------------------------- one file


def write(path: Path, spoil) -> None:
    spoil()
    atomic.atomic_write(path, NEW)


def test_a_file_is_replaced_and_nothing_else_is_left(path):
    atomic.atomic_write(path, NEW)
    assert path.read_bytes() == NEW
    assert sorted(os.listdir(path.parent)) == ["earlier.bin", "file.bin"]


def test_every_step_of_a_write_is_there_to_be_killed_at(path, tmp_path):
    report = tmp_path / "report"
    record = partial(sabotage.record_files, path.parent, report)
    assert in_a_process(write, path, record) == 0
    # The order is what survives a power loss: content, then name, then directory.
    assert report.read_text().splitlines() == [
        "open .file.bin.tmp",
        "write .file.bin.tmp",
        "fsync .file.bin.tmp",
        "rename file.bin",
        "open .",
        "fsync .",
    ]


STEPS = 6


@pytest.mark.parametrize("k", range(1, STEPS + 2))
def test_a_write_that_is_killed_leaves_the_old_file_or_the_new_one(path, k):
    code = in_a_process(write, path, partial(sabotage.on_files, sabotage.kill, path.parent, k=k))
    assert code == (-signal.SIGKILL if k <= STEPS else 0)  # each step was reached
    assert path.read_bytes() == (OLD if k <= 4 else NEW)  # the fourth is the rename
    assert (path.parent / "earlier.bin").read_bytes() == b"earlier"


def test_a_plain_write_that_is_killed_leaves_a_torso(path):
    """What atomic_write is for, and that the tests above can fail."""
    spoil = partial(sabotage.on_files, sabotage.kill, path.parent, operation="write")
    assert in_a_process(write_plainly, path, spoil) == -signal.SIGKILL
    assert path.read_bytes() == NEW[: len(NEW) // 2]


def write_plainly(path: Path, spoil) -> None:
    spoil()
    with open(path, "wb") as file:
        file.write(NEW)


@pytest.fixture
def broken_disk(monkeypatch):
    """Makes a function of os fail with an error number."""

    def breaks(name: str, number: int) -> None:
        monkeypatch.setattr(os, name, lambda *args, **kwargs: sabotage.refuse(number))

    return breaks


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_refused_write_changes_nothing_and_says_why(path, broken_disk, function, number):
    broken_disk(function, number)
    with pytest.raises(StorageError) as caught:
        atomic.atomic_write(path, NEW)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    what = f"no space in {path.parent}: file.bin needs 0.0 MB, has " if full else "cannot write"
    assert caught.value.report().startswith(f"error: {what}")
    assert os.strerror(number) in caught.value.report() and "--save" in caught.value.report()
    assert caught.value.code == 6
    assert path.read_bytes() == OLD
    assert sorted(os.listdir(path.parent)) == ["earlier.bin", "file.bin"]


def test_a_disk_that_fills_up_while_writing_changes_nothing(path):
    limited = partial(sabotage.limit_file_size, len(NEW) // 2)
    assert in_a_process(expect_no_space, path, limited) == 0
    assert path.read_bytes() == OLD
    assert sorted(os.listdir(path.parent)) == ["earlier.bin", "file.bin"]


def expect_no_space(path: Path, spoil) -> None:
    spoil()
    with pytest.raises(StorageError, match=r"no space in .*needs .* MB, has .* MB"):
        atomic.atomic_write(path, NEW)


MAY_NOT_MOUNT = 77


def on_a_mount(directory: Path, options: str, read_only: bool, expect) -> None:
    """Run `expect(directory)` where a file system of our own lies over `directory`."""
    code = in_a_process(_on_a_mount, directory, options, read_only, expect)
    if code == MAY_NOT_MOUNT:
        pytest.skip("this system does not let its users mount")
    assert code == 0


def _on_a_mount(directory: Path, options: str, read_only: bool, expect) -> None:
    try:
        sabotage.mount(directory, options, read_only)
    except OSError:
        os._exit(MAY_NOT_MOUNT)
    expect(directory)


def test_a_full_disk_keeps_what_was_on_it(tmp_path):
    on_a_mount(tmp_path, "size=1m", False, expect_full_disk)


def expect_full_disk(directory: Path) -> None:
    half_a_megabyte = bytes(range(256)) * 2048
    atomic.atomic_write(directory / "a", half_a_megabyte)
    with pytest.raises(StorageError, match=r"no space in .*: a needs 0.8 MB, has 0.5 MB"):
        atomic.atomic_write(directory / "a", bytes(800_000))
    assert (directory / "a").read_bytes() == half_a_megabyte
    assert os.listdir(directory) == ["a"]


def test_a_read_only_disk_is_found_before_anything_is_made(tmp_path):
    on_a_mount(tmp_path, "size=1m", True, expect_read_only)


def expect_read_only(directory: Path) -> None:
    with pytest.raises(StorageError, match=f"cannot write in {directory}"):
        experiment.directory.check_writable(directory / "runs" / "one")
    with pytest.raises(StorageError, match="Read-only file system"):
        RunDirectory(directory / "runs" / "one")


def test_a_directory_that_can_be_made_is_not_made_by_the_check(tmp_path):
    experiment.directory.check_writable(tmp_path / "a" / "b")
    experiment.directory.check_writable(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("below", [False, True])
def test_a_file_where_a_directory_should_be_is_an_error(path, below):
    with pytest.raises(StorageError, match=f"not a directory: {path}") as caught:
        experiment.directory.check_writable(path / "run" if below else path)
    assert "; fix: " in caught.value.report()
    with pytest.raises(StorageError, match="cannot write"):
        RunDirectory(path / "run" if below else path)
    assert path.read_bytes() == OLD


# --------------------------------------------------------------------------------- run directory


def hold(directory: Path, pipe) -> None:
    with RunDirectory(directory):
        pipe.send("held")
        pipe.poll(60)  # until the other end says something or is gone


class Holder:
    """Another process with the run directory open."""

    def __init__(self, directory: Path):
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=hold, args=(directory, theirs))
        self.process.start()
        assert self.pipe.recv() == "held"

    def __enter__(self):
        return self.process

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # it may be dead
            self.pipe.send("release")
        self.process.join(60)


def test_a_second_process_is_told_who_has_the_directory(tmp_path):
    with Holder(tmp_path) as owner:
        for _ in range(2):  # being refused does not spoil what is known about the owner
            with pytest.raises(BusyError) as caught:
                RunDirectory(tmp_path)
            assert caught.value.code == 7
            report = caught.value.report()
            assert f"host {os.uname().nodename}, process {owner.pid}, since 20" in report
            assert "; fix: wait for it to end, or choose another --save" in report
    with RunDirectory(tmp_path):  # free again
        pass


def test_a_killed_owner_never_blocks(tmp_path):
    with Holder(tmp_path) as owner:
        os.kill(owner.pid, signal.SIGKILL)
        owner.join(60)
        assert str(owner.pid) in (tmp_path / ".lock").read_text()  # it could not clean up
        RunDirectory(tmp_path).close()


def open_and_fork(directory: Path, pipe) -> None:
    with RunDirectory(directory):
        pid = os.fork()
        if pid == 0:
            signal.pause()
        pipe.send(pid)
        sabotage.kill()


def test_a_child_that_outlives_the_owner_does_not_hold_the_directory(tmp_path):
    ours, theirs = _context.Pipe()
    assert in_a_process(open_and_fork, tmp_path, theirs) == -signal.SIGKILL
    child = ours.recv()
    try:
        os.kill(child, 0)  # it is alive
        RunDirectory(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_what_a_killed_process_was_writing_is_swept_at_the_next_start(tmp_path):
    (tmp_path / ".checkpoint_000000003.pt.tmp").write_bytes(b"half")
    (tmp_path / "checkpoint_000000002.pt").write_bytes(b"whole")
    with RunDirectory(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoint_000000002.pt"]


def test_a_process_that_is_refused_sweeps_nothing(tmp_path):
    with Holder(tmp_path):
        (tmp_path / ".checkpoint_000000003.pt.tmp").write_bytes(b"being written")
        with pytest.raises(BusyError):
            RunDirectory(tmp_path)
        assert (tmp_path / ".checkpoint_000000003.pt.tmp").exists()


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (NonFiniteError("loss is not finite at epoch 3, step 4", "lower --LR"), "failed", 5),
        (Preempted("SIGTERM, saved", "run it again"), "preempted", 75),
    ],
)
def test_the_status_says_how_a_run_ended(tmp_path, error, state, code):
    with pytest.raises(RunError), RunDirectory(tmp_path) as directory:
        directory.write_status("running", epoch=3, step=4)
        assert directory.read_status() == {"state": "running", "code": None, "epoch": 3, "step": 4}
        raise error
    status = json.loads((tmp_path / "status.json").read_text())
    assert status == {"state": state, "code": code, "epoch": 3, "step": 4, "reason": str(error)}


def test_a_call_that_is_refused_before_it_begins_leaves_the_status_alone(tmp_path):
    with RunDirectory(tmp_path) as directory:
        directory.write_status("done", 0)
    with pytest.raises(RunError), RunDirectory(tmp_path):
        raise StorageError("refused", "try again")
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize("text", [None, "", "{", "\0" * 10, "\xff"])
def test_a_missing_or_damaged_status_is_no_status(tmp_path, text):
    if text is not None:
        (tmp_path / "status.json").write_text(text, encoding="latin-1")
    with RunDirectory(tmp_path) as directory:
        assert directory.read_status() == {}
