"""Test that several processes train to the losses of one process, on images in the same order."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoints
from faults.contract import command, outcome, saved, tiny
from faults.sabotage import at_batch, both, forget_rng, send
from helpers.recording import losses, order, record_steps, steps
from helpers.run_main import run, run_ranks

# 20 steps of 16 images: every batch can be divided among four processes.
FLAGS = {
    "nImages": 320, "imageSize": 16, "depth": 10, "growthRate": 4, "batchSize": 16, "nEpochs": 1,
    "dropRate": 0.2, "nGPU": 0,
}  # fmt: skip


def trained(directory: Path, size: int, sabotage=None, code: int = 0, **flags) -> Path:
    """Train in `size` processes; record each step beside the run directory."""
    argv = tiny(**FLAGS | flags, save=directory / "run")
    directory.mkdir(exist_ok=True)
    record = partial(record_steps, directory)
    first = partial(both, record, sabotage) if sabotage else record
    if size == 1:
        results = [run(argv, first)]
    else:
        results = run_ranks(argv, size, dict.fromkeys(range(size), record) | {0: first})
    assert {result.code for result in results} == {code}, results
    return directory


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Run one process."""
    return trained(tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.parametrize(("size", "level"), [(2, 0), (2, 4), (4, 2)])
def test_with_synchronised_statistics_the_losses_are_those_of_one_process(
    alone, tmp_path, size, level
):
    found = trained(tmp_path / "run", size, syncBN=True, optMemory=level)
    assert len(losses(found)) == 20
    torch.testing.assert_close(losses(found), losses(alone), rtol=1e-5, atol=0)
    assert order(found) == order(alone)


def test_without_synchronised_statistics_the_losses_differ(alone, tmp_path):
    found = trained(tmp_path / "run", 2)
    assert order(found) == order(alone)
    assert ((losses(found) / losses(alone) - 1).abs()[:3] > 1e-3).all()


def record_result(path: Path) -> None:
    """Write the result of an evaluation to the last bit."""
    import train

    test = train.Trainer.evaluate

    def test_and_write(self, *args, **kwargs):
        result = test(self, *args, **kwargs)
        if self.world.is_rank0:
            path.write_text(json.dumps({name: value.hex() for name, value in result.items()}))
        return result

    train.Trainer.evaluate = test_and_write


@pytest.mark.parametrize("size", [2, 3])
def test_the_evaluation_is_the_same_number_for_any_number_of_processes(alone, tmp_path, size):
    """Use 64 images in batches of 5: the last is smaller, and some processes lack a last one."""
    argv = command(testOnly=True, resume=alone / "run", override=True, batchSize=5, nGPU=0)
    want, found = tmp_path / "want.json", tmp_path / "found.json"
    assert run(argv, partial(record_result, want)).code == 0
    results = run_ranks(argv, size, {0: partial(record_result, found)})
    assert all(result.code == 0 for result in results), results
    assert found.read_text() == want.read_text()
    assert "0x" in want.read_text()
    assert not any(result.out + result.err for result in results[1:])


def test_a_last_batch_with_fewer_images_than_processes_is_trained_on_once(tmp_path):
    """Use 18 images in batches of 4 among 4: the last batch has 2 images, for the first two."""
    flags = {"nImages": 18, "batchSize": 4, "syncBN": True, "dropRate": 0.2}
    want = trained(tmp_path / "one", 1, **flags | {"syncBN": False})
    found = trained(tmp_path / "four", 4, **flags)
    one, four = (outcome(path / "run")["log"][-1] for path in (want, found))
    assert four["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    assert four["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)


LONGER = {"nEpochs": 2, "nImages": 80}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """Run two processes undisturbed."""
    return trained(tmp_path_factory.mktemp("pair"), 2, **LONGER)


def test_two_processes_repeat_themselves(pair, tmp_path):
    assert outcome(trained(tmp_path / "again", 2, **LONGER) / "run") == outcome(pair / "run")


@pytest.mark.parametrize("batch", [3, 8])
def test_two_processes_that_were_stopped_end_in_the_same_bits(pair, tmp_path, batch):
    stop = partial(at_batch, partial(send, 15), batch)
    found = trained(tmp_path / "stopped", 2, stop, code=75, **LONGER)
    trained(found, 2, resume="auto", **LONGER)
    assert outcome(found / "run") == outcome(pair / "run")
    assert losses(found).tolist() == losses(pair).tolist()
    assert order(found) == order(pair)


def test_two_processes_that_forget_their_random_numbers_end_in_others(pair, tmp_path):
    stop = partial(at_batch, partial(send, 15), 3)
    found = trained(tmp_path / "stopped", 2, stop, code=75, **LONGER)
    argv = tiny(**FLAGS | LONGER, save=found / "run", resume="auto")
    results = run_ranks(argv, 2, dict.fromkeys(range(2), forget_rng))
    assert [result.code for result in results] == [0, 0]
    assert outcome(found / "run")["weights"] != outcome(pair / "run")["weights"]


def test_another_number_of_processes_goes_on_with_the_same_order_of_images(alone, tmp_path):
    """Test goal G14: one process, then two, then four, with synchronised statistics."""
    found = tmp_path / "run"
    for size, batch in ((1, 5), (2, 6), (4, None)):
        stop = partial(at_batch, partial(send, 15), batch) if batch else None
        trained(found, size, stop, 75 if batch else 0, syncBN=True, resume="auto")
    assert [step[0]["size"] for step in steps(found)] == [1] * 5 + [2] * 6 + [4] * 9
    assert order(found) == order(alone)
    torch.testing.assert_close(losses(found), losses(alone), rtol=1e-4, atol=0)


def hide_checkpoints() -> None:
    """See no checkpoint, as a machine that does not mount the run directory."""
    checkpoints.list_checkpoints = lambda directory: []
    checkpoints.has_checkpoint = lambda directory: False


def test_a_run_directory_that_the_first_process_does_not_see_is_not_started_over(pair, tmp_path):
    directory = shutil.copytree(pair / "run", tmp_path / "run")
    for path in directory.glob("model_*.pt"):
        path.unlink()
    before = saved(directory)
    argv = tiny(**FLAGS | LONGER, save=directory, resume="auto")
    results = run_ranks(argv, 2, {0: hide_checkpoints})
    assert [result.code for result in results] == [4, 4], results
    error = results[0].err.splitlines()[-1]
    assert re.fullmatch(r"error: process 1 sees a checkpoint of step 10 .*; fix: .* share", error)
    assert saved(directory) == before
