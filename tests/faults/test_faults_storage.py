"""Rows 11, 14 and 71: a full disk, a run directory that cannot be written, and two writers."""

import errno
import os
import re
import shutil
import time
from functools import partial
from pathlib import Path

import pytest

from faults.contract import TINY, command, outcome, refused, saved, status, tiny
from faults.sabotage import at_batch, both, kill, limit_file_size, mount, on_files, refuse
from helpers.run_main import run, start

FLAGS = {"nEpochs": 3, "dropRate": 0.2}


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("complete")
    assert run(tiny(**FLAGS, save=directory)).code == 0
    return outcome(directory)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run that was killed in its second epoch."""
    directory = tmp_path_factory.mktemp("killed")
    assert run(tiny(**FLAGS, save=directory), partial(at_batch, kill, 6)).code < 0
    return directory


@pytest.fixture
def begun(killed, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(killed, tmp_path / "run")


def again(directory: Path, sabotage=None):
    return run(tiny(**FLAGS, resume="auto", save=directory), sabotage)


# Row 11.


FULL = (errno.ENOSPC, r"no space in {}: .* needs 0\.\d MB, has \d+\.\d MB .*; fix: free space")
BROKEN = (errno.EIO, r"cannot write {}/.*Input/output error; fix: check the disk")


@pytest.mark.parametrize(
    ("name", "operation", "number", "pattern"),
    [
        ("checkpoint", "write", *FULL),
        ("checkpoint", "write", *BROKEN),
        ("checkpoint", "fsync", *FULL),
        ("checkpoint", "fsync", *BROKEN),
        ("checkpoint", "rename", *FULL),
        ("model_last", "write", *FULL),
        ("model_best", "fsync", *BROKEN),
        ("status", "rename", *FULL),
    ],
)
def test_a_disk_that_refuses_a_save_ends_the_run_and_loses_nothing(
    begun, complete, name, operation, number, pattern
):
    before = saved(begun)
    action = partial(refuse, number)
    result = again(begun, partial(on_files, action, begun, operation=operation, name=rf"\.?{name}"))
    refused(result, 6, pattern.format(re.escape(str(begun))))
    assert not list(begun.glob(".*.tmp"))
    after = saved(begun)
    for path in ("checkpoint_000000004.pt", "config.yaml", "data.json"):
        assert after[path] == before[path]
    assert status(begun)["state"] == "failed" and status(begun)["code"] == 6
    assert again(begun).code == 0
    assert outcome(begun) == complete


def test_a_disk_that_fills_up_in_the_middle_of_a_file(begun, complete):
    before = saved(begun)
    size = len(before["checkpoint_000000004.pt"]) // 2
    result = again(begun, partial(limit_file_size, size))
    refused(result, 6, "no space in .* needs .* MB, has .* MB .*File too large.*; fix: free space")
    assert not list(begun.glob(".*.tmp"))
    assert saved(begun) == before
    assert again(begun).code == 0
    assert outcome(begun) == complete


def cut_off_by_a_mount(directory: Path, read_only: bool = False) -> None:
    try:
        mount(directory, "size=64k", read_only)
    except PermissionError:
        os._exit(77)


def may_mount(result) -> None:
    if result.code == 77:
        pytest.skip("this system does not let its users mount")


def test_a_disk_too_small_for_a_checkpoint(tmp_path):
    result = run(tiny(**FLAGS, save=tmp_path / "run"), partial(cut_off_by_a_mount, tmp_path))
    may_mount(result)
    refused(result, 6, f"no space in {tmp_path}")


# Row 14.


def no_data() -> None:
    """Fail when data is read: the disk must have been found out before."""
    import datasets.factory

    datasets.factory.create = None


def test_a_read_only_disk_is_refused_before_the_data_is_read(tmp_path):
    read_only = partial(cut_off_by_a_mount, tmp_path, read_only=True)
    result = run(tiny(**FLAGS, save=tmp_path / "a" / "run"), partial(both, read_only, no_data))
    may_mount(result)
    refused(result, 6, f"cannot write in {tmp_path}; fix: name another run directory with --save")


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_file_in_the_way_is_refused_before_the_data_is_read(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    result = run(tiny(**FLAGS, save=tmp_path / "file" / below), no_data)
    refused(result, 6, f"not a directory: {tmp_path / 'file'}; fix: ")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_run_directory_that_is_removed_meanwhile_is_named(tmp_path):
    directory = tmp_path / "run"
    remove = partial(os.rename, directory, tmp_path / "elsewhere")
    result = run(tiny(**FLAGS, save=directory), partial(at_batch, remove, 2))
    refused(result, 6, re.escape(str(directory)))


# Row 71.


def wait_for_the_other(directory: Path) -> None:
    while not (directory.parent / "go on").exists():
        time.sleep(0.005)


def test_a_second_process_is_refused_and_harms_nothing(tmp_path, complete):
    directory = tmp_path / "run"
    hold = partial(at_batch, partial(wait_for_the_other, directory), 6)
    first = start(tiny(**FLAGS, save=directory), hold)
    first.wait_for(lambda: (directory / "model_best.pt").exists())
    before = saved(directory)
    pattern = rf"run directory {directory} is in use by host {re.escape(os.uname().nodename)}, "
    pattern += rf"process {first.process.pid}, since \d{{4}}-.*; fix: .*--save"
    for argv in (
        tiny(**FLAGS, save=directory),
        tiny(**FLAGS, save=directory, resume="auto"),
        command(resume=directory),
    ):
        refused(run(argv), 7, pattern)
    assert saved(directory) == before
    assert status(directory)["state"] == "running"
    (tmp_path / "go on").touch()
    assert first.wait().code == 0
    assert outcome(directory) == complete


def test_a_killed_process_does_not_block_the_next(begun, complete):
    assert "process" in (begun / ".lock").read_text()
    assert again(begun).code == 0
    assert outcome(begun) == complete


def test_the_same_network_elsewhere_is_no_second_writer(tmp_path):
    directory = tmp_path / "one"
    hold = partial(at_batch, partial(wait_for_the_other, directory), 2)
    first = start(command(**TINY | FLAGS, save=directory), hold)
    first.wait_for(lambda: (directory / "config.yaml").exists())
    assert run(tiny(**FLAGS, save=tmp_path / "other")).code == 0
    (tmp_path / "go on").touch()
    assert first.wait().code == 0
