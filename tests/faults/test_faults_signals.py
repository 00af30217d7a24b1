"""Rows 56, 58, 59 and 61: signals at every phase, and a loss that is not finite."""

import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoints
import experiment.log
from datasets.rng import permutation
from faults.contract import (
    TINY_FILES,
    command,
    outcome,
    refused,
    saved,
    status,
    tiny,
    write_files,
)
from faults.sabotage import (
    at_batch,
    both,
    close_pipes,
    nan_loss,
    on_files,
    own_group,
    send,
    send_to_group,
)
from helpers.run_main import run

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
FLAGS = {"nEpochs": 3, "dropRate": 0.2}


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("complete")
    assert run(tiny(**FLAGS, save=directory)).code == 0
    return outcome(directory)


def again(directory: Path):
    return run(tiny(**FLAGS, resume="auto", save=directory))


# Row 58.


@pytest.mark.parametrize("number", SIGNALS)
def test_one_signal_finishes_the_step_saves_and_asks_to_be_run_again(tmp_path, complete, number):
    name = signal.Signals(number).name
    result = run(tiny(**FLAGS, save=tmp_path), partial(at_batch, partial(send, number), 6))
    assert result.code == 75
    first, last = result.err.splitlines()
    assert first.startswith(f"{name}: finishing the step, then saving; a second signal exits")
    assert last.startswith(f"stopped: {name}, {tmp_path} is saved; to go on: ")
    verdict = status(tmp_path)
    assert (verdict["state"], verdict["code"], verdict["epoch"], verdict["step"]) == (
        "preempted", 75, 2, 2,
    )  # fmt: skip
    assert verdict["checkpoint"] == "checkpoint_000000006.pt"
    assert again(tmp_path).code == 0
    assert outcome(tmp_path) == complete


PHASES = {
    "reading a file": {"operation": "open"},
    "saving the config": {"operation": "fsync", "name": r"\.config"},
    "saving a checkpoint": {"operation": "write", "name": r"\.checkpoint"},
    "renaming a checkpoint": {"operation": "rename", "name": "checkpoint"},
    "saving the status": {"operation": "fsync", "name": r"\.status", "k": 3},
    "removing a checkpoint": {"operation": "remove", "name": "checkpoint"},
    "saving the model": {"operation": "write", "name": r"\.model_last"},
    "saving the best model": {"operation": "fsync", "name": r"\.model_best"},
    "logging": {"operation": "write", "name": "log"},
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_while_files_are_written_loses_nothing(tmp_path, complete, phase):
    action = partial(send, signal.SIGTERM)
    sabotage = partial(on_files, action, tmp_path, **PHASES[phase])
    result = run(tiny(**FLAGS, keep=1, save=tmp_path), sabotage)
    assert result.code in (75, 143), result
    if result.code == 143:  # there was nothing to save yet
        assert re.fullmatch(r"stopped: SIGTERM.*; to go on: run it again\n", result.err)
        assert not list(tmp_path.glob("*.pt"))
    assert "Traceback" not in result.err
    assert again(tmp_path).code == 0
    assert outcome(tmp_path) == complete


# Row 59.


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("one")
    assert run(tiny(**FLAGS | {"nEpochs": 1}, save=directory)).code == 0
    return directory


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["step", "write", "rename"])
def test_a_second_signal_ends_the_run_at_once_and_harms_nothing(
    one_epoch, tmp_path, number, moment
):
    directory = shutil.copytree(one_epoch, tmp_path / "run")
    before = saved(directory)
    asked = partial(at_batch, partial(send, signal.SIGTERM), 2)
    at_once = partial(both, partial(send, number), never)
    if moment == "step":
        forced = partial(at_batch, at_once, 2)
    else:
        name = r"\.?checkpoint_000000006"
        forced = partial(on_files, at_once, directory, operation=moment, name=name)
    # Wrapped in this order, the request comes before the second signal within the step.
    argv = tiny(**FLAGS, resume="auto", save=directory)
    result = run(argv, partial(both, forced, asked))
    assert result.code == 128 + number, result
    assert "Traceback" not in result.err
    after = saved(directory)
    for name in ("checkpoint_000000004.pt", "model_last.pt", "model_best.pt", "log.jsonl"):
        assert after[name] == before[name]
    assert again(directory).code == 0


def never() -> None:
    raise AssertionError("the second signal did not end the process")


# Row 61.


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("photographs"))


@pytest.mark.parametrize(
    ("number", "phase", "steps"),
    [*((number, "train", 2) for number in SIGNALS), (signal.SIGTERM, "val", 6)],
)
def test_a_signal_to_the_whole_group_stops_it_as_gracefully(
    photographs, tmp_path, number, phase, steps
):
    argv = command(**TINY_FILES, data=photographs, nThreads=2, nEpochs=2, save=tmp_path)
    moment = partial(at_batch, partial(send_to_group, number), 2, phase)
    result = run(argv, partial(both, own_group, moment))
    assert result.code == 75, result
    assert "worker" not in result.err and "Traceback" not in result.err
    assert status(tmp_path)["global_step"] == steps
    assert run([*argv, "--resume=auto"]).code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_takes_the_reader_of_the_output_with_it_loses_nothing(
    tmp_path, complete, number
):
    """`python main.py 2>&1 | tee log`, and Ctrl-C: tee is gone first."""
    moment = partial(at_batch, partial(send, number), 6)
    result = run(tiny(**FLAGS, save=tmp_path), partial(both, close_pipes, moment))
    assert result.code == 75
    assert status(tmp_path)["state"] == "preempted" and status(tmp_path)["global_step"] == 6
    assert again(tmp_path).code == 0
    assert outcome(tmp_path) == complete


# Rows 56 and 57.


@pytest.mark.parametrize("k", [1, 6, 8])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(tmp_path, complete, k):
    flags = {**FLAGS, "saveEvery": 1e-9}
    result = run(tiny(**flags, save=tmp_path), partial(nan_loss, k))
    epoch, step = (k - 1) // 4 + 1, (k - 1) % 4 + 1
    refused(result, 5, rf"loss is not finite at epoch {epoch}, step {step}; fix: lower --LR")
    verdict = status(tmp_path)
    assert verdict["state"] == "failed" and verdict["code"] == 5
    assert f"epoch {epoch}, step {step}" in verdict["reason"]
    order = permutation(32, "order", 0, epoch).tolist()
    assert verdict["batch"] == order[8 * (step - 1) : 8 * step]
    state = checkpoints.load_latest(tmp_path, pytest.fail)
    assert (state["global_step"] if state else 0) == k - 1  # the last one is from before
    assert again(tmp_path).code == 0  # the loss was spoilt once only
    assert outcome(tmp_path) == complete


def test_a_run_that_diverges_by_itself_is_ended(tmp_path):
    result = run(tiny(nEpochs=9, LR=1e30, save=tmp_path))
    refused(result, 5, "not finite|not a finite")
    assert again_is_possible(tmp_path)


def again_is_possible(directory: Path) -> bool:
    return all(checkpoints.load(path) for path in directory.glob("checkpoint_*.pt"))


def nan_gradients(k: int) -> None:
    """Spoil the gradients of the k-th step, whose loss is finite."""
    import train

    step, count = torch.optim.SGD.step, iter(range(1, 10**6))
    assert train

    def spoilt(self, *args, **kwargs):
        if next(count) == k:
            for group in self.param_groups:
                group["params"][0].grad.fill_(float("nan"))
        return step(self, *args, **kwargs)

    torch.optim.SGD.step = spoilt


@pytest.mark.parametrize("k", [5, 8])
def test_a_gradient_that_is_not_finite_ends_the_run_and_is_never_saved(tmp_path, k):
    flags = {**FLAGS, "keep": 1}
    result = run(tiny(**flags, save=tmp_path), partial(nan_gradients, k))
    refused(result, 5, "; fix: lower --LR")
    assert checkpoints.load_latest(tmp_path, pytest.fail)["global_step"] == 4
    weights = checkpoints.load_weights(tmp_path / "model_best.pt")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def nan_validation() -> None:
    """Spoil the loss in validation only."""
    import torch.nn.functional as F

    cross_entropy = F.cross_entropy

    def spoilt(*args, **kwargs):
        loss = cross_entropy(*args, **kwargs)
        return loss if torch.is_grad_enabled() else loss * float("nan")

    F.cross_entropy = spoilt


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path):
    """Row 57: the run ends with 5, or goes on and can be resumed."""
    result = run(tiny(**FLAGS, save=tmp_path), nan_validation)
    assert result.code in (0, 5)
    assert "Traceback" not in result.err
    assert not (tmp_path / "model_best.pt").exists()
    assert checkpoints.load_latest(tmp_path, pytest.fail) or result.code == 5
    assert all(line["val_loss"] is None for line in experiment.log.read_log(tmp_path))
    if result.code == 0:
        assert re.search(r"\(best: none\)", result.out.splitlines()[-1])
