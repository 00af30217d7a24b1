"""Test that a run of an earlier version continues as if that version had finished it.

`old_run/interrupted` was written at commit cd80cb8 by a run that SIGTERM ended after 30 steps:
`main.py --dataset digits --depth 10 --growthRate 4 --nEpochs 3 --dropRate 0.2 --augment true
--nGPU 0 --manualSeed 3`, with one thread. `old_run/finished` is what the same version made of it.
"""

import shutil
from pathlib import Path

import pytest
import torch

import checkpoints
from experiment.log import read_log
from faults import sabotage
from helpers.run_main import ROOT, run

OLD = ROOT / "tests" / "old_run"
BEGUN_WITH = (
    "--dataset digits --depth 10 --growthRate 4 --nEpochs 3 --dropRate 0.2 --augment true "
    "--nGPU 0 --manualSeed 3"
)
STEPS = 30


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def continued(directory: Path, source: str, forget=None) -> dict:
    """Return the last weights of a run that continues `interrupted`, or its checkpoint alone."""
    shutil.copytree(OLD / "interrupted", directory / "run")
    where = directory / "run" / source
    line = f"--resume {where} --save {directory / 'run'} {BEGUN_WITH}"
    result = run(line, forget)
    assert result.code == 0, result.err
    return checkpoints.load_weights(directory / "run" / "model_last.pt")


# This version sums in another order than that one, as other processors do: weights differ by 1e-6.
TOLERANCE = 1e-4


@pytest.mark.parametrize("source", ["", f"checkpoint_{STEPS:09d}.pt"], ids=["run", "checkpoint"])
def test_an_old_run_goes_on_as_its_own_version_went_on(tmp_path, source):
    weights = continued(tmp_path, source)
    expected = checkpoints.load_weights(OLD / "finished" / "model_last.pt")
    assert largest_difference(weights, expected) <= TOLERANCE
    found, wanted = (read_log(path) for path in (tmp_path / "run", OLD / "finished"))
    assert [record["epoch"] for record in found] == [1, 2, 3]
    same = [name for name in wanted[0] if name.startswith(("train_", "val_")) or name == "lr"]
    for current, saved in zip(found, wanted, strict=True):
        for name in set(same) - {"val_time_s"}:
            assert current[name] == pytest.approx(saved[name], rel=TOLERANCE, abs=0)


@pytest.mark.parametrize("line", ["--resume {}", "--resume auto --save {} " + BEGUN_WITH])
def test_an_old_run_that_is_longer_now_keeps_its_milestones_and_says_so(tmp_path, line):
    """Continue it twice: no version knows any more whether its milestones were defaults."""
    directory = Path(shutil.copytree(OLD / "interrupted", tmp_path / "run"))
    line = line.format(directory).replace("--nEpochs 3", "")
    for num_epochs in (4, 5):
        result = run(f"{line} --nEpochs {num_epochs}")
        assert result.code == 0
        note = f"note: {num_epochs} epochs, was {num_epochs - 1}: the same milestones, LR 0.01 from"
        assert note in result.err
        assert "defaults:" not in (directory / "config.yaml").read_text()
    assert [record["lr"] for record in read_log(directory)] == [0.1, 0.01, 0.001, 0.001, 0.001]


@pytest.mark.parametrize("forget", [sabotage.forget_rng, sabotage.forget_position])
def test_a_careless_resume_would_end_elsewhere(tmp_path, forget):
    expected = checkpoints.load_weights(OLD / "finished" / "model_last.pt")
    assert largest_difference(continued(tmp_path, "", forget), expected) > 1e-3


def test_every_tensor_of_an_old_checkpoint_is_read():
    path = OLD / "interrupted" / f"checkpoint_{STEPS:09d}.pt"
    raw, state = torch.load(path, weights_only=True), checkpoints.load(path)
    assert raw.keys() - {"format"} <= state.keys()
    for name in ("model", "momentum"):
        assert largest_difference(raw[name], state[name]) == 0
