"""Rows 16, 63 and 75 to 79: limits, clocks, outputs and surroundings that differ from the usual."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import experiment.log
from faults.contract import outcome, refused, saved, status, tiny
from faults.sabotage import (
    at_batch,
    both,
    close_standard_files,
    environment,
    kill,
    limit_files,
    mount,
    send,
    turn_the_clock_back,
)
from faults.test_faults_data import LARGE, folder, photographs
from helpers.run_main import ROOT, run, start
from helpers.terminal import on_a_terminal

FLAGS = {"nEpochs": 2, "dropRate": 0.2}


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("complete")
    assert run(tiny(**FLAGS, save=directory)).code == 0
    return outcome(directory)


# Row 16.


def test_too_few_open_files_are_one_line_and_nothing_is_lost(tmp_path):
    root = photographs(tmp_path / "data")
    argv = folder(root, **LARGE | {"nThreads": 2, "nEpochs": 3})
    assert run(argv, partial(at_batch, kill, 6)).code < 0  # in the second epoch
    before = saved(tmp_path / "run")
    argv.append("--resume=auto")
    for more, code in ((0, 3), (1, 6), (2, 3), (4, 3), (20, 3)):
        result = run(argv, partial(limit_files, more))
        hint = "ulimit -n" if more else "Too many open files"
        refused(result, code, hint)
        assert saved(tmp_path / "run") == before
    assert run(argv).code == 0


def test_a_low_limit_that_may_be_raised_is_raised(tmp_path):
    root = photographs(tmp_path / "data")
    argv = folder(root, **LARGE | {"nThreads": 2, "nEpochs": 1})
    assert run(argv, partial(limit_files, 3, soft=True)).code == 0


def few_inodes(directory: Path) -> None:
    try:
        mount(directory, "nr_inodes=12")
    except PermissionError:
        os._exit(77)


def test_a_disk_that_takes_no_more_files_is_named_as_that(tmp_path):
    result = run(tiny(**FLAGS, save=tmp_path / "run"), partial(few_inodes, tmp_path))
    if result.code == 77:
        pytest.skip("this system does not let its users mount")
    refused(result, 6, "no space in .*: .* needs a file, the disk has none left .*; fix: free")


# Row 63.


def test_a_run_that_is_suspended_goes_on_as_if_nothing_had_been(tmp_path, complete):
    stop = partial(at_batch, partial(send, signal.SIGSTOP), 3)
    running = start(tiny(**FLAGS, save=tmp_path), stop)
    about = Path(f"/proc/{running.process.pid}/stat")
    running.wait_for(lambda: about.read_text().rpartition(")")[2].split()[0] == "T")
    time.sleep(0.1)
    running.signal(signal.SIGCONT)
    assert running.wait().code == 0
    assert outcome(tmp_path) == complete


def test_a_broken_pipe_signal_is_no_reason_to_stop(tmp_path, complete):
    result = run(tiny(**FLAGS, save=tmp_path), partial(at_batch, partial(send, signal.SIGPIPE), 3))
    assert result.code == 0
    assert outcome(tmp_path) == complete


# Row 75.


def test_a_clock_that_runs_backwards_changes_neither_result_nor_duration(tmp_path, complete):
    argv = tiny(**FLAGS, save=tmp_path)
    assert run(argv, partial(both, turn_the_clock_back, partial(at_batch, kill, 6))).code < 0
    assert run([*argv, "--resume=auto"], turn_the_clock_back).code == 0
    assert outcome(tmp_path) == complete
    for record in experiment.log.read_log(tmp_path):
        assert 0 < record["time_s"] < 60 and 0 <= record["data_wait"] <= 1


# Row 76.


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)])
def test_closed_outputs_change_nothing_and_no_message_gets_into_a_file(tmp_path, complete, closed):
    """Else the next files opened would take their numbers, and the remark on a signal."""
    argv = tiny(**FLAGS, save=tmp_path)
    close = partial(close_standard_files, *closed)
    stop = partial(at_batch, partial(send, signal.SIGTERM), 3)
    assert run(argv, partial(both, close, stop)).code == 75
    assert status(tmp_path)["state"] == "preempted"
    assert len((tmp_path / ".lock").read_text().splitlines()) == 1
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"SIGTERM: finishing" not in path.read_bytes(), path
    assert run([*argv, "--resume=auto"], close).code == 0
    assert outcome(tmp_path) == complete


# Row 77.


def test_a_terminal_that_draws_nothing_gets_lines(tmp_path):
    dumb = partial(both, partial(environment, TERM="dumb"), on_a_terminal)
    shown = run(tiny(**FLAGS, save=tmp_path / "dumb"), dumb).out
    assert "=> Training epoch # 2" in shown and "epoch 1 train:" not in shown
    assert all(c.isprintable() or c == "\n" for c in shown)
    able = partial(both, partial(environment, TERM="xterm"), on_a_terminal)
    shown = run(tiny(**FLAGS, save=tmp_path / "able"), able).out
    assert "=> Training epoch" not in shown and "epoch 1 train:" in shown


# Row 78.


def test_other_surroundings_give_the_same_run(tmp_path, complete):
    """No HOME, another hash seed, files for oneself only, another directory."""
    directory = tmp_path / "run"
    argv = tiny(**FLAGS, save=directory)
    surroundings = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    result = subprocess.run(
        [sys.executable, ROOT / "main.py", *argv],
        umask=0o077, cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert outcome(directory) == complete
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.glob("*.pt")} == {0o600}


def leave(directory: Path) -> None:
    """Have a working directory that is gone."""
    directory.mkdir()
    os.chdir(directory)
    shutil.rmtree(directory)


@pytest.mark.parametrize("save", ["run", None, "/absolute"])
def test_a_directory_that_is_gone_is_refused_at_the_start(tmp_path, save):
    """MKL could not be loaded in it."""
    result = run(tiny(**FLAGS, save=save), partial(leave, tmp_path / "gone"))
    refused(result, 6, "the current directory is gone; fix: change to one that is there")


def test_a_directory_that_goes_meanwhile_does_not_matter(tmp_path, complete):
    argv = tiny(**FLAGS, save=tmp_path / "run")
    assert run(argv, partial(at_batch, partial(leave, tmp_path / "gone"), 3)).code == 0
    assert outcome(tmp_path / "run") == complete


# Row 79.


def without_tensorboard() -> None:
    """As where it is not installed."""
    sys.modules["torch.utils.tensorboard"] = None


def with_a_broken_tensorboard() -> None:
    """As with a protobuf of another version."""
    import torch.utils.tensorboard

    def broken(*args: object, **more: object) -> None:
        raise TypeError("Descriptors cannot be created directly")

    torch.utils.tensorboard.SummaryWriter = broken


@pytest.mark.parametrize("spoil", [without_tensorboard, with_a_broken_tensorboard, None])
def test_no_tensorboard_is_a_remark(tmp_path, complete, spoil):
    if spoil is None:
        (tmp_path / "tensorboard").write_text("in the way")
    result = run(tiny(**FLAGS, save=tmp_path), spoil)
    assert result.code == 0
    (line,) = result.err.splitlines()
    assert line.startswith("note: no TensorBoard: ") and line.endswith("; training goes on")
    assert outcome(tmp_path) == complete
