"""What a run may be continued as, elsewhere, longer, otherwise, and what is refused."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import checkpoints
from faults.contract import command, digests, records, refused, saved, tiny
from faults.sabotage import at_batch, send
from helpers.run_main import run
from helpers.sample_data import write_folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of three epochs with milestones 2 and 3."""
    directory = tmp_path_factory.mktemp("finished")
    assert run(tiny(nEpochs=3, keep=9, save=directory)).code == 0
    return directory


@pytest.fixture
def again(finished, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def rewrite(path: Path, **changes: object) -> None:
    """Change entries of a checkpoint."""
    state = torch.load(path, weights_only=True)
    torch.save(state | changes, path)


def rates(directory: Path) -> list[float]:
    """The learning rate of each epoch."""
    return [record["lr"] for record in records(directory)]


@pytest.mark.parametrize("how", ["auto", "directory"])
def test_a_longer_run_keeps_the_milestones_it_had(again, how):
    argv = tiny(nEpochs=5, save=again) if how == "auto" else command(nEpochs=5)
    result = run([*argv, f"--resume={'auto' if how == 'auto' else again}"])
    assert result.code == 0
    assert ("milestones stay 2,3" in result.err) == (how == "auto")  # else they come with the run
    assert rates(again) == [0.1, 0.01, 0.001, 0.001, 0.001]
    assert yaml.safe_load((again / "config.yaml").read_text())["milestones"] == [2, 3]


def test_other_milestones_of_a_longer_run_have_to_be_overridden(again):
    argv = command(nEpochs=5, milestones="2,5", resume=again)
    refused(run(argv), 2, "milestones 2,5, was 2,3")
    assert run([*argv, "--override=true"]).code == 0
    assert rates(again) == [0.1, 0.01, 0.001, 0.01, 0.001]


def test_a_sound_checkpoint_of_another_version_is_named_and_stays(again):
    for path in again.glob("checkpoint_*.pt"):
        rewrite(path, format=2)
    before = saved(again)
    refused(run(command(resume=again)), 4, "has format 2, this program reads 1")
    assert saved(again) == before and not list(again.glob("*.corrupt"))


def test_testing_does_not_touch_a_damaged_checkpoint(again):
    newest, older = checkpoints.list_checkpoints(again)[:2]
    newest.write_bytes(newest.read_bytes()[:-100])
    before = saved(again)
    result = run(command(testOnly=True, resume=again))
    assert result.code == 0 and "trying the one before" in result.err
    assert saved(again) == before
    alone = run(command(testOnly=True, resume=older))
    assert result.out.splitlines()[-1] == alone.out.splitlines()[-1]


def test_the_best_model_comes_along_to_another_directory(finished, tmp_path):
    there = tmp_path / "there"
    source = finished / "checkpoint_000000008.pt"
    assert run(command(resume=source, save=there, nEpochs=3)).code == 0
    assert digests(checkpoints.load_weights(there / "model_best.pt")) == digests(
        checkpoints.load_weights(finished / "model_best.pt")
    )


def test_a_best_model_that_is_gone_is_forgotten_and_not_missed_at_the_end(tmp_path):
    assert run(tiny(nEpochs=2, validSize=8, save=tmp_path)).code == 0
    (tmp_path / "model_best.pt").unlink()
    worse = command(resume=tmp_path, nEpochs=3, LR=1e4, milestones=3, override=True)
    result = run(worse)
    assert result.code == 0 and " * Test " in result.out
    assert "the best result is forgotten" in result.err or "(best: epoch 2)" in result.out


def test_weights_to_begin_with_are_no_part_of_a_resumed_run(again):
    config = (again / "config.yaml").read_text()
    result = run(command(resume=again, nEpochs=4, retrain="/nowhere.pt"))
    assert result.code == 0 and "retrain has no effect" in result.err
    assert (again / "config.yaml").read_text() == config.replace("nEpochs: 3", "nEpochs: 4")


def test_a_fine_tuned_run_is_tested_and_resumed_by_its_directory(finished, tmp_path):
    weights = finished / "model_last.pt"
    fine = {"retrain": weights, "resetClassifier": True, "nClasses": 5, "save": tmp_path}
    assert run(tiny(nEpochs=1, **fine)).code == 0
    assert run(command(testOnly=True, resume=tmp_path)).code == 0
    assert run(command(resume=tmp_path, nEpochs=2)).code == 0


def test_an_epoch_stopped_on_another_device_starts_anew(tmp_path):
    stopped = run(tiny(nEpochs=1, save=tmp_path), partial(at_batch, partial(send, 15), 2))
    assert stopped.code == 75
    (path,) = tmp_path.glob("checkpoint_*.pt")
    rewrite(path, device="cuda")
    result = run(command(resume=tmp_path))
    assert result.code == 0
    assert "the run was on cuda, now on cpu" in result.err and "epoch 1 starts anew" in result.err
    assert checkpoints.load_latest(tmp_path, print)["global_step"] == 2 + 4


def test_another_batch_size_starts_the_epoch_anew(tmp_path):
    stopped = run(tiny(nEpochs=1, save=tmp_path), partial(at_batch, partial(send, 15), 3))
    assert stopped.code == 75
    result = run(command(resume=tmp_path, batchSize=16, override=True))
    assert result.code == 0 and "epoch 1 starts anew" in result.err
    state = checkpoints.load_latest(tmp_path, print)
    assert state["global_step"] == 3 + 2
    assert state["overrides"] == ["epoch 1 step 3: batchSize 16, was 8"]


def test_a_log_with_rubbish_in_it_is_cut_there(again):
    whole = records(again)
    with open(again / "log.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n[1]\n")
    assert run(command(resume=again, nEpochs=4)).code == 0
    assert records(again)[:3] == whole and len(records(again)) == 4


@pytest.fixture
def folders(tmp_path) -> Path:
    """A run on a folder of two classes, and the same images under other names of classes."""
    counts = {split: {"a": 6, "b": 6} for split in ("train", "val")}
    write_folder(tmp_path / "data", counts, size=8)
    shutil.copytree(tmp_path / "data", tmp_path / "renamed")
    for split in ("train", "val"):
        (tmp_path / "renamed" / split / "a").rename(tmp_path / "renamed" / split / "z")
    flags = tiny(dataset="folder", nImages=None, nClasses=None, nEpochs=1)
    assert run([*flags, f"--data={tmp_path / 'data'}", f"--save={tmp_path / 'run'}"]).code == 0
    return tmp_path


def test_testing_on_other_classes_is_refused(folders):
    test = command(testOnly=True, resume=folders / "run")
    assert run(test).code == 0
    refused(run([*test, f"--data={folders / 'renamed'}"]), 4, "classes")


def test_testing_normalises_as_the_network_was_trained(folders):
    test = command(testOnly=True, resume=folders / "run")
    before = run(test).out.splitlines()[-1]
    for path in sorted((folders / "data" / "train" / "a").iterdir())[1:]:
        path.unlink()
    assert run(test).out.splitlines()[-1] == before
    refused(run(command(resume=folders / "run", nEpochs=2)), 4, "mean .*, was")
