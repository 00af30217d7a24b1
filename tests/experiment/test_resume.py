"""Test that a run that is stopped at any moment and resumed ends as if never stopped."""

import json
import random
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import checkpoints
from faults.contract import TINY, command, outcome, records, refused, saved, status, tiny
from faults.sabotage import at_batch, fail, forget_position, forget_rng, kill_after, no_fsync, send
from fileio import tensor_files
from helpers.run_main import run
from helpers.sample_data import write_folder

STEPS, VAL_BATCHES, EPOCHS = 30, 6, 3
RUN = {"nImages": 8 * STEPS, "nEpochs": EPOCHS, "dropRate": 0.2, "LR": 0.05}
EVERY_STEP = 1e-9  # minutes between checkpoints


def stopped(k: int, phase: str = "train", number: int = signal.SIGTERM):
    """Return a sabotage that sends a signal within the k-th batch."""
    return partial(at_batch, partial(send, number), k, phase)


def finish(directory: Path, sabotage=None, **flags) -> dict:
    """Run or resume to the end; return the outcome."""
    result = run(tiny(resume="auto", save=directory, **flags), sabotage)
    assert result.code == 0, result
    return outcome(directory)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    return finish(tmp_path_factory.mktemp("uninterrupted"), **RUN)


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory) -> Path:
    """Stop the same run in its first epoch."""
    directory = tmp_path_factory.mktemp("stopped")
    assert run(tiny(**RUN, save=directory), stopped(17)).code == 75
    return directory


def test_the_same_command_gives_the_same_run(uninterrupted, tmp_path):
    assert finish(tmp_path / "same", no_fsync, **RUN, saveEvery=EVERY_STEP) == uninterrupted
    other = finish(tmp_path / "other", **RUN, manualSeed=1)
    for part in ("weights", "momentum", "rng", "log"):
        assert other[part] != uninterrupted[part]
    assert len({record["lr"] for record in uninterrupted["log"]}) == EPOCHS


@pytest.mark.parametrize(
    ("number", "k", "phase"),
    [
        (signal.SIGTERM, 1, "train"),
        (signal.SIGINT, 17, "train"),
        (signal.SIGUSR1, STEPS, "train"),  # an epoch trained and not validated
        (signal.SIGHUP, STEPS + 1, "train"),
        (signal.SIGTERM, EPOCHS * STEPS, "train"),
        (signal.SIGTERM, 3, "val"),
        (signal.SIGTERM, VAL_BATCHES, "val"),
    ],
)
def test_a_run_stopped_by_a_signal_resumes_as_if_it_had_not_been(
    uninterrupted, tmp_path, number, k, phase
):
    assert run(tiny(**RUN, save=tmp_path), stopped(k, phase, number)).code == 75
    verdict = status(tmp_path)
    done = k if phase == "train" else STEPS
    assert verdict["state"] == "preempted" and verdict["global_step"] == done  # no step is lost
    assert finish(tmp_path, **RUN) == uninterrupted


@pytest.mark.parametrize("forget", [forget_rng, forget_position])
def test_a_resume_that_forgets_something_ends_differently(
    uninterrupted, stopped_run, tmp_path, forget
):
    other = finish(shutil.copytree(stopped_run, tmp_path / "begun"), forget, **RUN)
    assert other["weights"] != uninterrupted["weights"]
    assert other["log"] != uninterrupted["log"]


def test_a_run_killed_at_twenty_random_moments_ends_as_if_it_had_not_been(uninterrupted, tmp_path):
    draws = random.Random(0)
    reached = []
    argv = tiny(**RUN, saveEvery=EVERY_STEP, resume="auto", save=tmp_path)
    for _ in range(20):
        # A few steps at a time, so that the run is still young at the twentieth kill.
        moment = partial(kill_after, draws.uniform(0, 0.004))
        killed = partial(at_batch, moment, draws.randint(2, 7), "any")
        result = run(argv, killed)
        assert result.code == -signal.SIGKILL, result
        reached.append(max((path.name for path in tmp_path.glob("checkpoint_*.pt")), default=""))
    assert reached == sorted(reached) and len(set(reached)) > 10  # each went on, mostly mid-epoch
    assert finish(tmp_path, **RUN) == uninterrupted


KINDS = [
    {"lrShape": "cosine"},
    {"precision": "double"},
    {"precision": "bf16"},
    {"precision": "half"},
    {"validSize": 8},
    {"momentum": 0},
    {"augment": False, "dropRate": 0},
    {"optMemory": 0},
    {"optMemory": 4, "bottleneck": False},
    {"netType": "resnet", "depth": 14, "growthRate": None, "dropRate": None,
     "stochasticDepth": 0.4, "preprocess": "gcn", "warmupSteps": 3},
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(map(str, kind.values())))
def test_every_kind_of_run_resumes_as_if_it_had_not_been_stopped(tmp_path, kind):
    flags = {"nEpochs": 2, "dropRate": 0.2, **kind}
    want = finish(tmp_path / "uninterrupted", **flags)
    argv = tiny(**flags, resume="auto", save=tmp_path / "stopped")
    for sabotage in (stopped(2), stopped(1, "val")):
        assert run(argv, sabotage).code == 75
    assert finish(tmp_path / "stopped", **flags) == want


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "model_last.pt", weights_only=True)


def test_a_run_goes_on_at_another_memory_level_within_round_off(tmp_path):
    flags = {"nEpochs": 2, "dropRate": 0.2, "precision": "double"}
    finish(tmp_path / "alone", **flags)
    want = weights(tmp_path / "alone")
    for level, seed in ((4, 0), (0, 0), (4, 1)):
        directory = tmp_path / f"{level} {seed}"
        argv = tiny(**flags, optMemory=2, manualSeed=seed, save=directory)
        assert run(argv, stopped(3)).code == 75
        assert run([f"--resume={directory}", f"--optMemory={level}"]).code == 0
        settings = yaml.safe_load((directory / "config.yaml").read_text())
        assert (settings["optMemory"], status(directory)["global_step"]) == (level, 8)
        got = weights(directory)
        largest = max((got[name] - want[name]).abs().max().item() for name in want)
        assert largest < 1e-10 if seed == 0 else largest > 1e-3


# Image folders:
@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    write_folder(root, {"train": {"cat": 8, "dog": 8}, "val": {"cat": 2, "dog": 2}}, size=80)
    return root


@pytest.mark.parametrize("size", [72, 16])
def test_a_folder_of_images_resumes_alike_with_any_number_of_workers(photographs, tmp_path, size):
    shape = {"d1": 1, "d2": 1, "d3": 1, "d4": 1, "depth": None} if size > 64 else {}
    data = {"dataset": "folder", "data": photographs, "nImages": None, "nClasses": 2}
    length = {"imageSize": size, "initChannels": 4, "batchSize": 4, "nEpochs": 2, "dropRate": 0.2}
    flags = data | length | shape
    want = finish(tmp_path / "uninterrupted", **flags)
    for before, after in ((0, 2), (2, 0)):
        directory = tmp_path / str(before)
        argv = command(**TINY | flags | {"nThreads": before}, save=directory)
        assert run(argv, stopped(2)).code == 75
        forgetful = shutil.copytree(directory, tmp_path / "forgetful", dirs_exist_ok=True)
        assert finish(directory, **flags | {"nThreads": after}) == want
    assert finish(forgetful, forget_position, **flags)["weights"] != want["weights"]


# Refusals:
def test_another_number_of_threads_is_noted(stopped_run, tmp_path):
    for threads, remarked in ((1, False), (2, True)):
        argv = tiny(**RUN, resume=stopped_run, save=tmp_path / str(threads))
        result = run(argv, stopped(1), threads)
        assert result.code == 75
        note = "note: 2 threads, the run had 1: rounding can differ"
        assert (note in result.err) == remarked


def test_an_override_is_printed_and_saved_and_new_batches_restart_the_epoch(stopped_run, tmp_path):
    before = saved(stopped_run)
    changes = {"LR": 0.01, "batchSize": 16}
    argv = tiny(**RUN | changes, resume=stopped_run, save=tmp_path)
    refused(run(argv), 2, "batchSize 16, was 8; LR 0.01, was 0.05; fix: .*--override true")
    result = run([*argv, "--override=true"], stopped(1))
    assert result.code == 75 and saved(stopped_run) == before
    assert "note: override: LR 0.01, was 0.05" in result.err
    assert "epoch 1 starts again" in result.err
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()).items() >= changes.items()
    overrides = ["epoch 1 step 17: batchSize 16, was 8", "epoch 1 step 17: LR 0.01, was 0.05"]
    again = tiny(**RUN | changes, resume="auto", save=tmp_path)  # now they are the run's own
    assert run(again, stopped(STEPS // 2 - 1)).code == 75
    state = checkpoints.load_latest(tmp_path, pytest.fail)
    assert (state["epoch"], state["step"], state["global_step"]) == (1, STEPS // 2, 17 + STEPS // 2)
    assert state["overrides"] == overrides


def test_a_start_that_fails_before_it_saves_leaves_the_settings_of_the_run(stopped_run, tmp_path):
    directory = shutil.copytree(stopped_run, tmp_path / "run")
    before = saved(directory)
    argv = command(resume=directory, LR=0.01, batchSize=16, override=True)
    failing = partial(at_batch, partial(fail, "DataError"), 2)
    refused(run(argv, failing), 3, "out of luck")
    assert saved(directory) == before
    result = run(command(resume=directory), stopped(1))  # as the product itself advises
    assert result.code == 75 and "note:" not in result.err
    state = checkpoints.load_latest(directory, pytest.fail)
    assert (state["global_step"], state["settings"]["LR"]) == (18, RUN["LR"])
    assert state["overrides"] == [] and status(directory)["overrides"] == []


def test_an_edited_config_counts_only_with_an_override(stopped_run, tmp_path):
    directory = Path(shutil.copytree(stopped_run, tmp_path / "run"))
    config = directory / "config.yaml"
    lines = config.read_text()
    edited = lines.replace("LR: 0.05", "LR: 0.01").replace("nEpochs: 3", "nEpochs: 9")
    config.write_text(edited.replace("keep: 2", "keep: 5"))
    result = run(command(resume=directory), stopped(1))
    assert result.code == 75
    assert result.err.count("as in the checkpoint; the config has ") == 2
    assert (
        "note: LR 0.05, as in the checkpoint; the config has 0.01: --LR 0.01 --override"
        in result.err
    )
    assert config.read_text() == lines.replace("keep: 2", "keep: 5")  # shapes no training

    other = tmp_path / "other.yaml"
    other.write_text(lines.replace("milestones: [2, 3]", "milestones: [1]"))
    result = run(command(config=other, save=directory, resume="auto"), stopped(1))
    assert (
        "note: milestones 2,3, as in the checkpoint; the config has 1: --milestones 1 --override"
        in result.err
    )

    config.write_text(edited)
    result = run(command(resume=directory, override=True), stopped(1))
    assert result.code == 75 and "note: override: LR 0.01, was 0.05" in result.err
    assert "note: 9 epochs, was 3: new milestones, LR 0.001 from epoch 5," in result.err
    state = checkpoints.load_latest(directory, pytest.fail)
    assert state["overrides"] == ["epoch 1 step 19: LR 0.01, was 0.05"]


def test_a_run_whose_data_has_changed_is_refused(tmp_path):
    classes = {"cat": 8, "dog": 8}
    write_folder(tmp_path / "data", {"train": classes, "val": classes})
    flags = {"dataset": "folder", "data": tmp_path / "data", "imageSize": 16, "depth": 10}
    argv = command(**flags, growthRate=2, batchSize=4, nThreads=0, save=tmp_path / "run")
    assert run(argv, stopped(2)).code == 75
    cats = tmp_path / "data" / "train" / "cat"
    shutil.copy(cats / "0000.png", cats / "new.png")
    pattern = "the data is not the checkpoint's: 17 training images, was 16; fix: .*--override true"
    refused(run([*argv, "--resume=auto"]), 4, pattern)


def test_a_log_that_ran_ahead_of_the_checkpoint_is_cut_back(tmp_path):
    argv = tiny(nEpochs=3, save=tmp_path)
    assert run(argv, stopped(6)).code == 75  # in the second epoch
    log = tmp_path / "log.jsonl"
    ahead = json.dumps({**json.loads(log.read_text()), "epoch": 2})
    log.write_text(f'{log.read_text()}{ahead}\n{{"epoch": 3, "train_l')
    assert run([*argv, "--resume=auto"]).code == 0
    assert [record["epoch"] for record in records(tmp_path)] == [1, 2, 3]


def test_resume_auto_may_start_afresh_and_says_so(tmp_path):
    result = run(tiny(nEpochs=1, resume="auto", save=tmp_path / "run"))
    assert result.code == 0
    assert f"note: nothing to resume in {tmp_path / 'run'}: starting afresh" in result.err


def test_a_run_of_an_earlier_loader_goes_on_with_its_resize_and_a_note(photographs, tmp_path):
    shape = {"d1": 1, "d2": 1, "d3": 1, "d4": 1, "growthRate": 2, "initChannels": 4}
    data = {"dataset": "folder", "data": photographs, "imageSize": 72, "batchSize": 4}
    argv = command(**shape | data, nThreads=0, nEpochs=1, save=tmp_path)
    assert run(argv, stopped(2)).code == 75
    note = "the run began with an earlier loader: from here on crops and colours are drawn anew"
    assert note not in run(command(resume=tmp_path), stopped(1)).err
    (path, *_) = checkpoints.list_checkpoints(tmp_path)
    state = checkpoints.load(path)
    del state["settings"]["resize"], state["data"]["draws"]
    # Lua's weights have another default now, and did not then.
    state["settings"]["retrain"] = "lua.t7"
    path.write_bytes(tensor_files.to_bytes(state | {"format": checkpoints.FORMAT}))
    config = tmp_path / "config.yaml"
    lines = config.read_text().replace("resize: antialias\n", "")
    config.write_text(lines.replace("retrain: none", "retrain: lua.t7"))
    result = run(command(resume=tmp_path))
    assert result.code == 0 and note in result.err and "override" not in result.err
    assert "resize: antialias" in config.read_text()
