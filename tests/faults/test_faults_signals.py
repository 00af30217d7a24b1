"""Test rows 57, 59 to 61 and 63: signals to a group of processes, and non-finite numbers."""

import re
import signal
from functools import partial

import pytest

import checkpoints
import experiment.log
from faults.contract import FLAGS, check_whole, newest_step, outcome, refused, status, tiny
from faults.sabotage import at_batch, both, nan_loss, own_group, send, send_to_group, stop
from faults.test_faults_data import folder
from helpers.run_main import process_state, run, start


@pytest.mark.parametrize(
    ("number", "phase", "steps"),
    [(signal.SIGINT, "train", 2), (signal.SIGTERM, "val", 4)],
)
def test_a_signal_to_the_whole_group_stops_it_as_gracefully(root, number, phase, steps):
    """Test row 61: the group has loader processes."""
    argv = folder(root, nThreads=2)
    moment = partial(at_batch, partial(send_to_group, number), 2, phase)
    result = run(argv, partial(both, own_group, moment))
    assert result.code == 75, result
    assert "worker" not in result.err and "Traceback" not in result.err
    assert status(root.parent / "run")["global_step"] == steps
    assert run([*argv, "--resume=auto"]).code == 0


def test_a_run_under_nohup_outlives_its_terminal(tmp_path, undisturbed):
    """Test row 58: nohup starts a program with SIGHUP ignored."""
    nohup = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    hang_up = partial(at_batch, partial(send, signal.SIGHUP), 3)
    result = run(tiny(**FLAGS, save=tmp_path), partial(both, nohup, hang_up))
    assert result.code == 0 and result.err == "", result
    assert outcome(tmp_path) == undisturbed()


def test_a_run_that_is_suspended_goes_on_as_if_nothing_had_been(tmp_path, undisturbed):
    """Test row 63."""
    running = start(tiny(**FLAGS, save=tmp_path), partial(at_batch, stop, 3))
    running.wait_for(lambda: process_state(running.process.pid) == "T")
    running.signal(signal.SIGCONT)
    assert running.wait().code == 0
    assert outcome(tmp_path) == undisturbed()


def test_a_run_that_diverges_by_itself_is_ended(tmp_path):
    result = run(tiny(nEpochs=9, LR=1e30, save=tmp_path))
    refused(result, 5, "not finite|not a finite")
    check_whole(tmp_path)


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path):
    """Test row 57."""
    result = run(tiny(**FLAGS, save=tmp_path), partial(nan_loss, 0, "val"))
    assert result.code == 0 and result.err == "", result
    assert not (tmp_path / "model_best.pt").exists()
    assert newest_step(tmp_path) == 12 and checkpoints.load_weights(tmp_path / "model_last.pt")
    assert all(line["val_loss"] is None for line in experiment.log.read_log(tmp_path))
    assert re.search(r"\(best: none\)", result.out.splitlines()[-1])
