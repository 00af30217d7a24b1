"""Test rows 11, 14, 15, 16 and 71: disks that are full, read-only or gone, and two writers."""

import os
import re
from functools import partial

import pytest

from faults.contract import (
    FLAGS,
    command,
    outcome,
    refused,
    saved,
    status,
    tiny,
)
from faults.sabotage import (
    at_batch,
    at_call,
    both,
    fail,
    kill,
    limit_files,
    mount_or_leave,
    wait_for,
)
from faults.test_faults_data import folder
from helpers.run_main import run, start

no_data = partial(at_call, partial(fail, "DataError"), "create the data")  # found out too late


@pytest.mark.parametrize(
    ("options", "read_only", "pattern"),
    [
        ("size=64k", False, "no space in {}"),
        ("size=64k", True, "cannot write in {}; fix: name another run directory with --save"),
        (
            "nr_inodes=12",
            False,
            "no space in .*: .* needs a file, the disk has none left .*; fix: ",
        ),
    ],
    ids=["row 11, too small", "row 14, read-only", "row 16, no inodes"],
)
def test_a_disk_that_takes_nothing_is_named_as_that(tmp_path, options, read_only, pattern):
    sabotages = [partial(mount_or_leave, tmp_path, options, read_only), *[no_data] * read_only]
    result = run(tiny(**FLAGS, save=tmp_path / "a" / "run"), partial(both, *sabotages))
    if result.code == 77:
        pytest.skip("this system does not let its users mount")
    refused(result, 6, pattern.format(tmp_path))


def test_a_run_directory_that_is_removed_meanwhile_is_named(tmp_path):
    """Test row 15."""
    directory = tmp_path / "run"
    remove = partial(os.rename, directory, tmp_path / "elsewhere")
    result = run(tiny(**FLAGS, save=directory), partial(at_batch, remove, 2))
    refused(result, 6, re.escape(str(directory)))


# Row 16.


def test_too_few_open_files_are_one_line_and_nothing_is_lost(root):
    argv = folder(root, nThreads=2, nEpochs=3)
    assert run(argv, partial(at_batch, kill, 6)).code < 0  # in the second epoch
    before = saved(root.parent / "run")
    argv.append("--resume=auto")
    for more, code in ((0, 3), (1, 6), (4, 3)):
        result = run(argv, partial(limit_files, more))
        refused(result, code, "ulimit -n" if more else "Too many open files")
        assert saved(root.parent / "run") == before
    assert run(argv, partial(limit_files, 3, soft=True)).code == 0  # a limit that may be raised


# Row 71.


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_second_process_is_refused_and_harms_nothing(tmp_path, undisturbed, resume):
    directory = tmp_path / "run"
    hold = partial(at_batch, partial(wait_for, tmp_path / "go on"), 6)
    first = start(tiny(**FLAGS, save=directory), hold)
    first.wait_for(lambda: (directory / "model_best.pt").exists())
    before = saved(directory)
    pattern = rf"run directory {directory} is in use by host {re.escape(os.uname().nodename)}, "
    pattern += rf"process {first.process.pid}, since \d{{4}}-.*; fix: .*--save"
    again = tiny(**FLAGS, save=directory, resume=resume)
    for argv in [again, command(resume=directory)]:
        refused(run(argv), 7, pattern)
    assert run(tiny(**FLAGS, save=tmp_path / "elsewhere")).code == 0  # is no second writer
    assert saved(directory) == before
    assert status(directory)["state"] == "running"
    (tmp_path / "go on").touch()
    assert first.wait().code == 0
    assert outcome(directory) == undisturbed() == outcome(tmp_path / "elsewhere")
