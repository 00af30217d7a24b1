"""A run that is stopped at any moment and resumed ends as if nothing had happened."""

import json
import random
import re
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import checkpoints
import opts
from errors import UsageError
from experiment import resume
from faults.contract import TINY, command, outcome, records, refused, saved, status, tiny
from faults.sabotage import at_batch, forget_position, forget_rng, kill_after, send
from helpers.run_main import run

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
STEPS, VAL_BATCHES, EPOCHS = 30, 6, 3
RUN = {"nImages": 8 * STEPS, "nEpochs": EPOCHS, "dropRate": 0.2, "LR": 0.05}
EVERY_STEP = 1e-9  # minutes between checkpoints


def stopped(number: int, k: int, phase: str = "train"):
    """A sabotage that sends a signal within a batch."""
    return partial(at_batch, partial(send, number), k, phase)


def finish(directory: Path, sabotage=None, **flags) -> dict:
    """Run or resume to the end; what it came to."""
    result = run(tiny(resume="auto", save=directory, **flags), sabotage)
    assert result.code == 0, result
    return outcome(directory)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    return finish(tmp_path_factory.mktemp("uninterrupted"), **RUN)


def test_the_run_has_something_to_restore(uninterrupted):
    assert [record["epoch"] for record in uninterrupted["log"]] == [1, 2, 3]
    assert len({record["lr"] for record in uninterrupted["log"]}) == 3
    assert len({record["train_loss"] for record in uninterrupted["log"]}) == 3


def test_the_same_command_gives_the_same_run(uninterrupted, tmp_path):
    assert finish(tmp_path, **RUN, saveEvery=EVERY_STEP) == uninterrupted


def test_another_seed_gives_another_run(uninterrupted, tmp_path):
    other = finish(tmp_path, **RUN, manualSeed=1)
    for part in ("weights", "momentum", "rng", "log"):
        assert other[part] != uninterrupted[part]


@pytest.mark.parametrize(
    ("number", "k", "phase"),
    [
        *((number, 17, "train") for number in SIGNALS),
        (signal.SIGTERM, 1, "train"),
        (signal.SIGTERM, STEPS, "train"),  # an epoch trained and not validated
        (signal.SIGTERM, STEPS + 1, "train"),
        (signal.SIGTERM, EPOCHS * STEPS, "train"),
        (signal.SIGTERM, 3, "val"),
        (signal.SIGTERM, VAL_BATCHES, "val"),
    ],
)
def test_a_run_stopped_by_a_signal_resumes_as_if_it_had_not_been(
    uninterrupted, tmp_path, number, k, phase
):
    result = run(tiny(**RUN, save=tmp_path), stopped(number, k, phase))
    assert result.code == 75, result
    verdict = status(tmp_path)
    done = k if phase == "train" else STEPS
    assert verdict["state"] == "preempted" and verdict["global_step"] == done  # no step is lost
    assert finish(tmp_path, **RUN) == uninterrupted


@pytest.mark.parametrize("forget", [forget_rng, forget_position])
def test_a_resume_that_forgets_something_ends_differently(uninterrupted, tmp_path, forget):
    assert run(tiny(**RUN, save=tmp_path), stopped(signal.SIGTERM, 17)).code == 75
    other = finish(tmp_path, forget, **RUN)
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


def test_the_same_kills_with_the_generator_forgotten_end_differently(uninterrupted, tmp_path):
    for k in (5, 9):
        killed = partial(at_batch, partial(kill_after, 0.0), k)
        argv = tiny(**RUN, saveEvery=EVERY_STEP, resume="auto", save=tmp_path)
        assert run(argv, killed).code == -signal.SIGKILL
    assert finish(tmp_path, forget_rng, **RUN)["weights"] != uninterrupted["weights"]


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
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: " ".join(map(str, kind.values())))
def kind(request, tmp_path_factory) -> tuple[dict, dict]:
    """Flags, and what an uninterrupted run with them comes to."""
    flags = {"nEpochs": 2, "dropRate": 0.2, **request.param}
    return flags, finish(tmp_path_factory.mktemp("kind"), **flags)


@pytest.mark.parametrize(("phase", "k"), [("train", 2), ("val", 1)])
def test_every_kind_of_run_resumes_as_if_it_had_not_been_stopped(tmp_path, kind, phase, k):
    flags, want = kind
    assert run(tiny(**flags, save=tmp_path), stopped(signal.SIGTERM, k, phase)).code == 75
    assert finish(tmp_path, **flags) == want


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "model_last.pt", weights_only=True)


def test_a_run_goes_on_at_another_memory_level_within_round_off(tmp_path):
    flags = {"nEpochs": 2, "dropRate": 0.2, "precision": "double"}
    finish(tmp_path / "alone", **flags)
    want = weights(tmp_path / "alone")
    for level, seed in ((4, 0), (0, 0), (4, 1)):
        directory = tmp_path / f"{level} {seed}"
        argv = tiny(**flags, optMemory=2, manualSeed=seed, save=directory)
        assert run(argv, stopped(signal.SIGTERM, 3)).code == 75
        assert run([f"--resume={directory}", f"--optMemory={level}"]).code == 0
        settings = yaml.safe_load((directory / "config.yaml").read_text())
        assert (settings["optMemory"], status(directory)["global_step"]) == (level, 8)
        got = weights(directory)
        largest = max((got[name] - want[name]).abs().max().item() for name in want)
        assert largest < 1e-10 if seed == 0 else largest > 1e-3


# ---------------------------------------------------------------------------------- image folders


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Two classes of eight and two images."""
    root, draws = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 256, (80, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("size", [72, 16])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_a_folder_of_images_resumes_alike_with_any_number_of_workers(
    photographs, tmp_path, size, before, after
):
    shape = {"d1": 1, "d2": 1, "d3": 1, "d4": 1, "depth": None} if size > 64 else {}
    data = {"dataset": "folder", "data": photographs, "nImages": None, "nClasses": 2}
    length = {"imageSize": size, "initChannels": 4, "batchSize": 4, "nEpochs": 2, "dropRate": 0.2}
    flags = data | length | shape
    want = finish(tmp_path / "uninterrupted", **flags)
    argv = command(**TINY | flags | {"nThreads": before}, save=tmp_path / "resumed")
    assert run(argv, stopped(signal.SIGTERM, 2)).code == 75
    assert finish(tmp_path / "resumed", **flags | {"nThreads": after}) == want
    assert finish(tmp_path / "other", **flags | {"manualSeed": 1})["weights"] != want["weights"]


# ------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("stopped")
    assert run(tiny(**RUN, save=directory), stopped(signal.SIGTERM, 17)).code == 75
    return directory


def test_another_number_of_threads_is_remarked_upon(stopped_run, tmp_path):
    for threads, remarked in ((1, False), (2, True)):
        argv = tiny(**RUN, resume=stopped_run, save=tmp_path / str(threads))
        result = run(argv, stopped(signal.SIGTERM, 1), threads)
        assert result.code == 75
        remark = "note: 2 threads, the run had 1: rounding can differ"
        assert (remark in result.err) == remarked


@pytest.mark.parametrize(
    ("changes", "code", "pattern"),
    [
        ({"depth": 16}, 4, r"is a densenet with depth=10, settings say depth=16"),
        ({"growthRate": 3}, 4, r"with growthRate=2 initChannels=4, settings say growthRate=3 init"),
        ({"nClasses": 4}, 4, r"the data is not the checkpoint's: classes"),
        ({"nImages": 40}, 2, rf"nImages 40, was {8 * STEPS}"),
        ({"batchSize": 4}, 2, r"batchSize 4, was 8; fix: .*--override true"),
        ({"LR": 0.1}, 2, r"LR 0.1, was 0.05"),
        ({"lrShape": "cosine"}, 2, r"lrShape cosine, was multistep"),
        ({"nEpochs": 2}, 2, r"nEpochs 2, was 3"),
        ({"manualSeed": 1}, 2, r"manualSeed 1, was 0"),
        ({"LR": 0.1, "dropRate": 0}, 2, r"LR 0.1, was 0.05; dropRate 0.0, was 0.2"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(stopped_run, changes, code, pattern):
    before = saved(stopped_run)
    result = run(tiny(**RUN | changes, resume="auto", save=stopped_run))
    refused(result, code, pattern)
    assert saved(stopped_run) == before


def test_an_override_is_said_and_recorded(stopped_run, tmp_path):
    changes = {"LR": 0.01, "batchSize": 16}
    argv = tiny(**RUN | changes, resume=stopped_run, save=tmp_path, override=True)
    result = run(argv, stopped(signal.SIGTERM, 1))
    assert result.code == 75
    assert "note: override: LR 0.01, was 0.05" in result.err
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()).items() >= changes.items()
    overrides = ["epoch 1 step 17: batchSize 16, was 8", "epoch 1 step 17: LR 0.01, was 0.05"]
    assert checkpoints.load_latest(tmp_path, pytest.fail)["overrides"] == overrides
    again = tiny(**RUN | changes, resume="auto", save=tmp_path)  # now they are the run's own
    assert run(again, stopped(signal.SIGTERM, 1)).code == 75
    assert checkpoints.load_latest(tmp_path, pytest.fail)["overrides"] == overrides


def test_a_checkpoint_that_does_not_know_a_flag_yet_goes_on_with_its_default(stopped_run, tmp_path):
    state = checkpoints.load_latest(stopped_run, pytest.fail)
    del state["settings"]["syncBN"]
    checkpoints.save(tmp_path, state, keep=1)
    same, other = (
        opts.parse(tiny(**RUN, syncBN=sync, resume="auto", save=tmp_path)) for sync in (None, True)
    )
    state = resume.find_checkpoint(same, pytest.fail)
    assert resume.merge_settings(same, state, pytest.fail).overrides == []
    with pytest.raises(UsageError, match="differ from the checkpoint's: syncBN true, was false"):
        resume.merge_settings(other, resume.find_checkpoint(other, pytest.fail), pytest.fail)


def test_a_run_whose_data_has_changed_is_refused(photographs, tmp_path):
    flags = {"dataset": "folder", "data": photographs, "imageSize": 16, "depth": 10}
    argv = command(**flags, growthRate=2, batchSize=4, nEpochs=2, nThreads=0, save=tmp_path)
    assert run(argv, stopped(signal.SIGTERM, 2)).code == 75
    extra = photographs / "train" / "cat" / "new.png"
    Image.new("RGB", (20, 20)).save(extra)
    try:
        result = run([*argv, "--resume=auto"])
    finally:
        extra.unlink()
    refused(result, 4, "the data is not the checkpoint's: mean .*, std .*, train 17, was 16")


def test_a_log_that_ran_ahead_of_the_checkpoint_is_cut_back(tmp_path):
    argv = tiny(nEpochs=3, save=tmp_path)
    assert run(argv, stopped(signal.SIGTERM, 6)).code == 75  # in the second epoch
    log = tmp_path / "log.jsonl"
    ahead = json.dumps({**json.loads(log.read_text()), "epoch": 2})
    log.write_text(f'{log.read_text()}{ahead}\n{{"epoch": 3, "train_l')
    assert run([*argv, "--resume=auto"]).code == 0
    assert [record["epoch"] for record in records(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("resume", ["missing", "empty"])
def test_resuming_nothing_is_an_error(tmp_path, resume):
    (tmp_path / "empty").mkdir()
    result = run(tiny(resume=tmp_path / resume, save=tmp_path / "run"))
    refused(result, 4, re.escape(str(tmp_path / resume)))


def test_resume_auto_may_start_afresh_and_says_so(tmp_path):
    result = run(tiny(nEpochs=1, resume="auto", save=tmp_path / "run"))
    assert result.code == 0
    assert f"note: nothing to resume in {tmp_path / 'run'}: starting afresh" in result.err
