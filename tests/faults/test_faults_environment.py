"""Test rows 75 to 78: clocks, outputs and environments that differ from the usual."""

import os
import signal
import stat
import subprocess
import sys
from functools import partial

import pytest

import experiment.log
from faults.contract import FLAGS, outcome, refused, status, tiny
from faults.sabotage import (
    at_batch,
    both,
    close_standard_files,
    environment,
    kill,
    leave,
    send,
    turn_the_clock_back,
)
from helpers.run_main import ROOT, run
from helpers.terminal import on_a_terminal

# Row 75.


def test_a_clock_that_runs_backwards_changes_neither_result_nor_duration(tmp_path, undisturbed):
    argv = tiny(**FLAGS, save=tmp_path)
    assert run(argv, partial(both, turn_the_clock_back, partial(at_batch, kill, 6))).code < 0
    assert run([*argv, "--resume=auto"], turn_the_clock_back).code == 0
    assert outcome(tmp_path) == undisturbed()
    for record in experiment.log.read_log(tmp_path):
        assert 0 < record["time_s"] < 600 and 0 <= record["data_wait"] <= 1


# Row 76.


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)])
def test_closed_outputs_change_nothing_and_no_message_gets_into_a_file(
    tmp_path, undisturbed, closed
):
    """Test that the next files opened do not get their numbers, and so a signal's message."""
    argv = tiny(**FLAGS, save=tmp_path)
    close = partial(close_standard_files, *closed)
    stop = partial(at_batch, partial(send, signal.SIGTERM), 3)
    assert run(argv, partial(both, close, stop)).code == 75
    assert status(tmp_path)["state"] == "preempted"
    assert len((tmp_path / ".lock").read_text().splitlines()) == 1
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"SIGTERM: finishing" not in path.read_bytes(), path
    assert run([*argv, "--resume=auto"], close).code == 0
    assert outcome(tmp_path) == undisturbed()


# Row 77.


def test_a_terminal_that_draws_nothing_gets_lines(tmp_path):
    dumb = partial(both, partial(environment, TERM="dumb"), on_a_terminal)
    shown = run(tiny(nEpochs=2, save=tmp_path / "dumb"), dumb).out
    assert "=> Training epoch # 2" in shown and "epoch 1 train:" not in shown
    assert all(c.isprintable() or c == "\n" for c in shown)
    able = partial(both, partial(environment, TERM="xterm"), on_a_terminal)
    shown = run(tiny(nEpochs=2, save=tmp_path / "able"), able).out
    assert "=> Training epoch" not in shown and "epoch 1 train:" in shown


# Row 78.


def test_other_surroundings_give_the_same_run(tmp_path, undisturbed):
    """Run without HOME, with another hash seed, another umask, in another directory."""
    directory = tmp_path / "run"
    surroundings = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    result = subprocess.run(
        [sys.executable, ROOT / "main.py", *tiny(**FLAGS, save=directory)],
        umask=0o077, cwd=tmp_path, env=surroundings, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert outcome(directory) == undisturbed()
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.glob("*.pt")} == {0o600}


@pytest.mark.parametrize("save", ["run", None, "/absolute"])
def test_a_directory_that_is_gone_is_refused_at_the_start(save):
    """Refuse it before MKL is loaded, which fails in it."""
    result = run(tiny(**FLAGS, save=save), leave)
    refused(result, 6, "the current directory is gone; fix: change to one that is there")
