"""Test which settings a run may be resumed with: by small checkpoints, and by tiny runs."""

import re
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

import checkpoints
import opts
from distributed.launcher import ProcessInfo
from distributed.world import World
from errors import CheckpointError, PeerError, RunError, UsageError
from experiment import resume
from experiment.directory import RunDirectory
from faults.contract import call, codes, command, records, refused, tiny
from faults.sabotage import at_batch, kill, send
from helpers.run_main import run
from helpers.sample_data import write_folder

EARLIER = "epoch 1 step 0: LR 0.1, was 0.2"
BEST = {"epoch": 1, "val_loss": 1.0, "val_top1": 50.0, "val_top5": 5.0}
DATA = {
    "classes": ["cat", "dog"], "train": 32, "val": 6, "test": None,
    "mean": [0.5] * 3, "std": [0.2] * 3, "held_out": [], "training_set": "abc", "test_set": "def",
}  # fmt: skip


def given(**flags: object) -> opts.Settings:
    """Parse a command line of four epochs with milestones 2 and 3."""
    return opts.parse(tiny(**{"nEpochs": 4, **flags}))


def state_of(step: int = 7, **flags: object) -> dict:
    """Make a valid checkpoint from the middle of the second epoch of such a run."""
    weights = nn.Linear(3, 2).state_dict()
    return {
        "model": weights, "momentum": dict(weights), "scaler": {},
        "rng": {"cpu": torch.get_rng_state()}, "epoch": 2, "step": 3, "global_step": step,
        "device": "cpu", "threads": 1, "replicas": 1,
        "sums": {"totals": [1.0, 2.0, 3.0], "count": 24}, "time_s": 1.0, "data_s": 0.5,
        "best": BEST, "last": BEST, "settings": opts.settings(given(**flags)), "data": DATA,
        "overrides": [EARLIER], "defaults": opts.default_names(given(**flags)),
    }  # fmt: skip


# Finding the checkpoint:
@pytest.fixture
def root(tmp_path) -> Path:
    """Write a run with checkpoints of steps 3 and 7, one with step 5, remains of one, and none."""
    for name, steps in (("run", (3, 7)), ("other", (5,)), ("remains", ()), ("empty", ())):
        (tmp_path / name).mkdir()
        for step in steps:
            checkpoints.save(tmp_path / name, state_of(step), keep=9)
    (tmp_path / "remains" / "checkpoint_000000003.pt.corrupt").touch()
    return tmp_path


OLD, NEW = "run/checkpoint_000000003.pt", "run/checkpoint_000000007.pt"
HOLDS = "already holds a run; fix: add --resume auto"


@pytest.mark.parametrize(
    ("name", "save", "test_only", "found"),
    [
        ("none", "empty", False, None),
        ("none", "run", False, HOLDS),
        ("none", "remains", False, HOLDS),
        ("none", "run", True, None),
        ("auto", "empty", False, None),
        ("auto", "empty", True, "no checkpoint in .*empty; fix: "),
        ("auto", "run", False, 7),
        ("run", "run", False, 7),
        (NEW, "run", False, 7),
        (OLD, "run", False, HOLDS),  # newer checkpoints of another history would stay beside it
        (OLD, "run", True, 3),
        (OLD, "empty", False, 3),
        ("other", "empty", False, 5),
        ("other", "run", False, HOLDS),
        ("missing", "new", False, "no checkpoint in .*missing; fix: name a run directory"),
    ],
)
def test_the_checkpoint_that_a_flag_names_is_found_or_refused(root, name, save, test_only, found):
    opt, notes = settings_in(root, name, save, test_only), []
    if isinstance(found, str):
        with pytest.raises(RunError) as caught:
            resume.find_checkpoint(opt, notes.append)
        assert re.search(found, caught.value.report())
        assert caught.value.code == (2 if found == HOLDS else 4)
    else:
        state = resume.find_checkpoint(opt, notes.append)
        assert (state and state["global_step"]) == found
    fresh = [f"nothing to resume in {root / save}: starting afresh"]
    assert notes == (fresh if (name, found) == ("auto", None) else [])


def settings_in(root: Path, name: str, save: str, test_only: bool = False) -> opts.Settings:
    source = name if name in ("none", "auto") else str(root / name)
    return given(save=root / save).replace(resume=source, testOnly=test_only)


@pytest.mark.parametrize(
    ("name", "save", "test_only", "is_moved"),
    [("auto", "run", False, True), ("auto", "run", True, False), ("run", "new", False, False)],
)
def test_only_its_own_run_sets_a_damaged_checkpoint_aside(root, name, save, test_only, is_moved):
    (root / NEW).write_bytes(b"")
    notes = []
    state = resume.find_checkpoint(settings_in(root, name, save, test_only), notes.append)
    assert state["global_step"] == 3 and len(notes) == 1 and "is empty" in notes[0]
    assert (root / NEW).exists() == (not is_moved)


def test_a_flag_that_a_checkpoint_does_not_know_yet_has_its_default(tmp_path):
    state = state_of()
    del state["settings"]["syncBN"]
    checkpoints.save(tmp_path, state, keep=1)
    same, other = (given(save=tmp_path, syncBN=sync, resume="auto") for sync in (None, True))
    state = resume.find_checkpoint(same, pytest.fail)
    assert resume.merge_settings(same, state, pytest.fail)[2] == [EARLIER]
    del state["settings"]["dropRate"]  # not read by `find_checkpoint`
    with pytest.raises(UsageError, match=r"syncBN true, was false; dropRate 0\.0, was not set"):
        resume.merge_settings(other, state, pytest.fail)


@pytest.mark.parametrize(
    ("settings", "data", "named"),
    [
        ({"nEpochs": "many"}, {}, "'many' is not a whole number"),
        ({}, {"mean": [0.0]}, "mean and std"),
        ({}, {"std": [1.0, 1.0, float("nan")]}, "mean and std"),
        ({}, {"mean": None}, "NoneType"),
    ],
)
def test_a_checkpoint_with_invalid_settings_is_refused(tmp_path, settings, data, named):
    state = state_of(nEpochs=5)
    state |= {"settings": state["settings"] | settings, "data": DATA | data}
    checkpoints.save(tmp_path, state, keep=1)
    with pytest.raises(CheckpointError, match=f"invalid settings or statistics: .*{named}"):
        resume.find_checkpoint(given(save=tmp_path, resume="auto"), pytest.fail)


@pytest.mark.parametrize(
    ("num_epochs", "status", "is_complete"),
    [(1, "done", True), (2, "done", False), (4, "done", False), (1, "running", False)],
)
def test_a_run_is_complete_once_its_end_is_written(root, num_epochs, status, is_complete):
    opt = given(save=root / "run", resume="auto", nEpochs=num_epochs)  # a checkpoint of epoch 2
    with RunDirectory(root / "run") as directory:
        directory.write_status(status)
        state, complete = resume.load_checkpoint(opt, directory, World(), pytest.fail)
    assert (state["global_step"], complete) == (7, is_complete)


@pytest.mark.parametrize(
    ("save", "others", "pattern"),
    [
        ("run", [7, 3], None),
        ("run", [9, 12], "process 2 sees a checkpoint of step 12 in .*run, 0 sees step 7"),
        ("empty", [-1], None),
        ("empty", [3], "process 1 sees a checkpoint of step 3 in .*empty, 0 sees none"),
    ],
)
def test_a_process_that_sees_a_newer_checkpoint_is_named(root, save, others, pattern):
    world = SimpleNamespace(all_gather_int=lambda step: [step, *others])
    with pytest.raises(CheckpointError, match=pattern) if pattern else nullcontext():
        resume.check_shared_filesystem(root / save, world)


@pytest.mark.parametrize("count", [-1, 0, 1, 2])
def test_a_restart_without_progress_is_counted_and_the_third_refused(root, count):
    """Reset the count by a manual start; test_faults_restarts.py has the rest."""
    opt, world = settings_in(root, "auto", "run"), World(ProcessInfo(restarted=count >= 0))
    with RunDirectory(root / "run") as directory:
        start = {"global_step": 7, "in_vain": count, "reason": "a"}
        directory.write_status("failed", reason="b", start=start)
        refusal = pytest.raises(PeerError, match=r"^3 .* at step 7; .* ended with: b$")
        with refusal if count == 2 else nullcontext():
            resume.load_checkpoint(opt, directory, world, pytest.fail)
        directory.write_status("running")
        assert directory.read_status()["start"] == start | {"in_vain": count + 1, "reason": "b"}


# Comparing settings:
@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ({"depth": 16}, "checkpoint is a densenet with depth=10, settings say depth=16"),
        ({"growthRate": 3}, "with growthRate=2 initChannels=4, settings say growthRate=3 initCh"),
        ({"bottleneck": False}, "bottleneck=true.*settings say bottleneck=false"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(flags, pattern):
    with pytest.raises(CheckpointError, match=pattern):
        resume.merge_settings(given(**flags, override=True), state_of(), pytest.fail)


@pytest.mark.parametrize(
    ("flags", "changes", "has_other_batches"),
    [
        ({"batchSize": 4}, ["batchSize 4, was 8"], True),
        ({"manualSeed": 1}, ["manualSeed 1, was 0"], True),
        ({"LR": 0.2}, ["LR 0.2, was 0.1"], False),
        ({"nImages": 40}, ["nImages 40, was 32"], False),
        ({"lrShape": "cosine"}, ["lrShape cosine, was multistep", "milestones , was 2,3"], False),
        ({"milestones": "2,4"}, ["milestones 2,4, was 2,3"], False),
        ({"batchSize": 16, "LR": 0.5}, ["batchSize 16, was 8", "LR 0.5, was 0.1"], True),
    ],
)
def test_other_training_needs_an_override(flags, changes, has_other_batches):
    with pytest.raises(UsageError) as caught:
        resume.merge_settings(given(**flags), state_of(), pytest.fail)
    ((what, fix),) = caught.value.problems
    assert what == f"settings differ from the checkpoint's: {'; '.join(changes)}"
    assert fix == "give the same flags, or --override true to go on with these"

    opt, state, notes = given(**flags, override=True), state_of(), []
    merged, moved, overrides = resume.merge_settings(opt, state, notes.append)
    assert notes[: len(changes)] == [f"override: {change}" for change in changes]
    assert overrides == [EARLIER, *(f"epoch 2 step 3: {change}" for change in changes)]
    assert {name: getattr(merged, name) for name in flags} == {n: getattr(opt, n) for n in flags}
    if has_other_batches:
        assert notes[len(changes) :] == ["epoch 2 starts again: its batches have changed"]
        assert moved == state | {"step": 0, "sums": None, "time_s": 0.0, "data_s": 0.0}
    else:
        assert moved is state and len(notes) == len(changes)
    begun, notes = state_of() | {"step": 0}, []  # nothing of the epoch is done yet
    assert resume.merge_settings(opt, begun, notes.append)[1] is begun
    assert len(notes) == len(changes)


@pytest.mark.parametrize(
    ("flags", "saved", "kept", "note"),
    [
        ({}, {}, {"milestones": [2, 3]}, None),
        ({}, {"milestones": 2}, {"milestones": [2]}, None),
        ({"epochNumber": 2}, {}, {"epochNumber": 1}, "epochNumber has no effect on a run that is"),
        ({"retrain": "a"}, {"retrain": "b"}, {"retrain": "b"}, "retrain has no effect on a run"),
        ({"retrain": "b"}, {"retrain": "b"}, {"retrain": "b"}, None),
        ({}, {"retrain": "b", "resetClassifier": True}, {"resetClassifier": True}, None),
        ({"optMemory": 4, "keep": 5}, {}, {"optMemory": 4, "keep": 5}, None),
    ],
)  # fmt: skip
def test_a_resumed_run_keeps_settings_of_its_start(flags, saved, kept, note):
    notes, state = [], state_of(**saved)
    opt, same, overrides = resume.merge_settings(given(**flags), state, notes.append)
    assert {name: getattr(opt, name) for name in kept} == kept
    assert len(notes) == (note is not None) and all(line.startswith(note) for line in notes)
    assert same is state and overrides == [EARLIER]


TO_8, TO_3, COSINE = {"nEpochs": 8}, {"nEpochs": 3}, {"lrShape": "cosine"}


# The flags of this call and of the first, the epoch and step reached, the milestones, the note.
@pytest.mark.parametrize(
    ("flags", "first", "reached", "milestones", "note"),
    [
        (TO_8, {}, (2, 0), [4, 6], "8 epochs, was 4: new milestones, LR 0.01 from epoch 4, 0.001"),
        (TO_8, {}, (2, 3), [2, 6], "new milestones, LR 0.01 from epoch 2, 0.001 from epoch 6; --m"),
        (TO_8, {}, (3, 0), [2, 6], "new milestones, LR 0.01 from epoch 2, 0.001 from epoch 6; --m"),
        (TO_8, {}, (5, 0), [2, 3], "the same milestones, LR 0.01 from epoch 2, 0.001 from epoch 3"),
        (TO_8, None, (2, 0), [2, 3], "the same milestones"),  # a run of an earlier version
        (TO_8, {"milestones": "2,3"}, (2, 0), [2, 3], "the same milestones"),
        (TO_8 | {"milestones": "2,3"}, {}, (2, 0), [2, 3], "the same milestones"),
        (TO_8 | COSINE, COSINE, (3, 0), None, "LR 0.0854 at epoch 3, was 0.05"),
        (TO_3, {}, (2, 0), [2, 3], "3 epochs, was 4: the same milestones"),
        (TO_3, {"nEpochs": 8}, (3, 2), [], "was 8: new milestones, LR 0.1 in every epoch"),
        (TO_3, {"nEpochs": 20}, (2, 0), [2, 3], "3 epochs, was 20: new milestones, LR 0.01 from"),
        (TO_3 | COSINE, COSINE, (3, 0), None, "LR 0.025 at epoch 3, was 0.05"),
        ({"nEpochs": 12}, {"nEpochs": 40}, (11, 0), [11, 11], "LR 0.001 from epoch 11; --m"),
    ],
)  # fmt: skip
def test_a_longer_or_shorter_run_says_what_happens_to_its_rate(
    flags, first, reached, milestones, note
):
    state = state_of(**first or {}) | dict(zip(("epoch", "step"), reached, strict=True))
    if first is None:
        state["defaults"] = None
    is_shorter, notes = flags["nEpochs"] < state["settings"]["nEpochs"], []
    if is_shorter:
        with pytest.raises(UsageError, match=r"checkpoint's: nEpochs \d+, was \d+$"):
            resume.merge_settings(given(**flags), state, pytest.fail)
    opt, _, _ = resume.merge_settings(given(**flags, override=is_shorter), state, notes.append)
    assert opt.milestones == milestones
    assert len(notes) == 1 + is_shorter and note in notes[-1]
    # From here on it is of this length.
    state |= {"settings": opts.settings(opt), "defaults": opts.default_names(opt)}
    again, _, _ = resume.merge_settings(given(**flags), state, pytest.fail)
    assert (again.milestones, opts.default_names(again)) == (milestones, state["defaults"])


# Restoring the state:
class FakeTrainer:
    """Provide the part of a trainer that `restore` needs; keep what is loaded."""

    def __init__(self, size: int = 1):
        self.model, self.device = nn.Linear(3, 2), torch.device("cpu")
        self.world, self.loaded = World(ProcessInfo(size=size)), []
        self.load_state_dict = self.loaded.append


@pytest.mark.parametrize(
    ("changes", "size", "expected"),
    [
        ({}, 1, []),
        ({"device": "cuda", "threads": 2}, 1,
         ["the run was on cuda, now on cpu: it goes on, not bit for bit", "epoch 2 starts again"]),
        ({"threads": 2}, 1, ["1 threads, the run had 2: rounding can differ"]),
        ({"replicas": 2}, 2, []),
        ({}, 2, ["2 processes, the run had 1: the images keep their order"]),
    ],
)  # fmt: skip
def test_a_checkpoint_of_other_surroundings_is_loaded_with_a_note(changes, size, expected):
    notes, trainer, state = [], FakeTrainer(size), state_of() | changes
    assert resume.restore(trainer, state, DATA, notes.append) == []
    assert len(notes) == len(expected) and all(map(str.startswith, notes, expected))
    assert trainer.loaded == [state | {"step": 0, "sums": None, "time_s": 0.0, "data_s": 0.0}
                              if "device" in changes else state]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"model": {}}, r"does not fit the network: .*missing \(2 in all\)"),
        ({"momentum": {"weight": torch.zeros(2, 3)}}, r"network: .*bias is missing \(1 in all\)"),
        ({"momentum": {"weight": torch.zeros(2, 3), "bias": torch.zeros(5)}}, "bias has shape"),
    ],
)
def test_a_checkpoint_whose_tensors_do_not_fit_is_not_loaded(changes, pattern):
    trainer = FakeTrainer()
    with pytest.raises(CheckpointError, match=pattern):
        resume.restore(trainer, state_of() | changes, DATA, pytest.fail)
    assert trainer.loaded == []
    resume.restore(trainer, state_of(momentum=0) | {"momentum": {}}, DATA, pytest.fail)
    assert len(trainer.loaded) == 1


@pytest.mark.parametrize(
    ("changes", "shown", "starts_again"),
    [
        ({"training_set": "xyz"}, ["other training images"], True),
        ({"test_set": "x" * 99, "mean": [0.1, 0.5, 0.5]},
         ["other test images", "other channel means"], False),
        ({"train": 33, "training_set": "xyz", "std": [0.1] * 3, "test_set": "x"},
         ["33 training images, was 32", "other test images"], True),
        ({"val": 7, "test_set": "x"}, ["7 validation images, was 6"], False),
        ({"held_out": [1, 2]}, ["other images held out, some of them trained on before"], True),
    ],
)  # fmt: skip
def test_other_data_is_refused_and_other_images_may_be_overridden(changes, shown, starts_again):
    trainer, data, notes = FakeTrainer(), DATA | changes | {"new entry": 1}, []
    may_override = starts_again is not None
    for override in [{}] if may_override else [{}, {"override": True}]:
        with pytest.raises(CheckpointError) as caught:
            resume.restore(trainer, state_of(), data, notes.append, **override)
        ((what, fix),) = caught.value.problems
        assert what == f"the data is not the checkpoint's: {', '.join(shown)}"
        assert ("--override true" in fix) == may_override == ("--retrain" not in fix)
    assert trainer.loaded == [] and notes == []
    if may_override:
        changed = resume.restore(trainer, state_of(), data, notes.append, override=True)
        assert changed == [f"epoch 2 step 3: data {line}" for line in shown]
        again = ["epoch 2 starts again: its batches have changed"] * starts_again
        assert notes == [f"override: {line}" for line in changed] + again
        (state,) = trainer.loaded
        assert (state["step"], state["global_step"]) == (0 if starts_again else 3, 7)


@pytest.mark.parametrize(
    ("classes", "shown"),
    [
        (["dog", "cat"], "class 0 is dog, the run's is cat; class 1 is cat, the run's is dog"),
        (["cat", "zebra"], "class 1 is zebra, the run's is dog"),
        (["cat"], "class 1 is missing, the run's is dog"),
        (list("abcde"), "class 0 is a, the run's is cat; class 1 is b, the run's is dog; "
         "class 2 is c, the run's is missing; 5 differ"),
    ],
)  # fmt: skip
def test_a_run_with_other_classes_is_refused_with_those_that_differ(classes, shown):
    trainer, data = FakeTrainer(), DATA | {"classes": classes, "train": 33}
    for override in (False, True):
        with pytest.raises(CheckpointError) as caught:
            resume.restore(trainer, state_of(), data, pytest.fail, override)
        ((what, fix),) = caught.value.problems
        assert what == f"the classes are not the run's: {shown}" and "--retrain" in fix


@pytest.mark.parametrize(
    ("source", "best", "is_copied", "is_forgotten"),
    [
        ("other", BEST, True, False),
        ("other/checkpoint_000000005.pt", BEST, True, False),
        ("other", BEST | {"epoch": 2}, False, True),  # the best model there is of another epoch
        ("other", None, False, False),
        ("auto", BEST, False, True),
    ],
)
def test_the_best_model_comes_along_or_is_forgotten(root, source, best, is_copied, is_forgotten):
    (root / "other" / "model_best.pt").write_bytes(b"weights")
    copied, saves, notes = root / "empty" / "model_best.pt", [], []
    trainer = SimpleNamespace(
        results=SimpleNamespace(best=best), is_between_epochs=source == "auto", world=World()
    )
    saver = SimpleNamespace(save=lambda: saves.append("checkpoint"),
                            save_models=lambda: saves.append("models"))  # fmt: skip
    opt = settings_in(root, source, "empty")
    with RunDirectory(root / "empty") as directory:
        resume.sync_run_files(opt, directory, trainer, saver, notes.append)
        assert (copied.exists() and copied.read_bytes() == b"weights") == is_copied
        assert trainer.results.best == (None if is_forgotten else best)
        gone = f"{copied} is gone: the best result is forgotten, the next epoch sets one"
        assert notes == [gone] * is_forgotten
        assert saves == ["models"] * trainer.is_between_epochs + ["checkpoint"]


# Whole runs:
@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Finish a run of three epochs with milestones 2 and 3."""
    directory = tmp_path_factory.mktemp("finished")
    assert run(tiny(nEpochs=3, save=directory)).code == 0
    return directory


def learning_rates(directory: Path) -> list[float]:
    """Return the learning rate of each epoch."""
    return [record["lr"] for record in records(directory)]


def test_a_longer_run_says_its_rate_and_takes_other_milestones_with_an_override(finished, tmp_path):
    """Test it also when its directory alone is given, and its first flags are gone."""
    longer = Path(shutil.copytree(finished, tmp_path / "longer"))
    result = run(command(resume=longer, nEpochs=5, retrain="/nowhere.pt"))
    assert result.code == 0 and "retrain has no effect" in result.err
    assert "note: 5 epochs, was 3: the same milestones, LR 0.01 from epoch 2, 0.001" in result.err
    assert learning_rates(longer) == [0.1, 0.01, 0.001, 0.001, 0.001]
    assert settings_of(longer)["milestones"] == [2, 3]

    other = Path(shutil.copytree(finished, tmp_path / "other"))
    argv = command(nEpochs=5, milestones="2,5", resume=other)
    refused(run(argv), 2, "milestones 2,5, was 2,3")
    assert run([*argv, "--override=true"]).code == 0
    assert learning_rates(other) == [0.1, 0.01, 0.001, 0.01, 0.001]
    assert "milestones" not in settings_of(other)["defaults"]


def settings_of(directory: Path) -> dict:
    return yaml.safe_load((directory / "config.yaml").read_text())


@pytest.mark.parametrize("path", ["directory", "auto", "config", "two processes"])
def test_milestones_that_are_not_passed_follow_a_longer_run_on_every_path(tmp_path, path):
    """Stop a run of four epochs in the second, and go on to eight; the first drop is passed."""
    first = tiny(nEpochs=4, nGPU=0, save=tmp_path)
    assert run(first, partial(at_batch, partial(send, 15), 6)).code == 75
    argv = command(resume=tmp_path, nEpochs=8)
    if path == "auto":
        argv = tiny(nEpochs=8, save=tmp_path, resume="auto")
    elif path == "config":
        config = tmp_path / "config.yaml"
        argv = command(config=config, nEpochs=8, save=tmp_path, resume="auto")
    results = call(argv, 2 if path == "two processes" else 1, {0: partial(at_batch, kill, 6)})
    assert codes(results)[0] < 0
    note = "note: 8 epochs, was 4: new milestones, LR 0.01 from epoch 2, 0.001 from epoch 6; "
    assert note in results[0].err
    # Killed in epoch 3: its checkpoint has this schedule, and resuming says no more of it.
    assert settings_of(tmp_path)["milestones"] == [2, 6]
    result = run(command(resume=tmp_path))
    assert result.code == 0 and "epochs, was" not in result.err
    assert learning_rates(tmp_path) == [0.1, *[0.01] * 4, *[0.001] * 3]


def test_the_config_of_a_run_gives_a_run_of_another_length_its_own_rates(finished, tmp_path):
    config, old = finished / "config.yaml", tmp_path / "old.yaml"
    lines = config.read_text().splitlines()
    old.write_text("\n".join(line for line in lines if not line.startswith("defaults:")))
    for source, rates, note in (
        (config, [0.1] * 4 + [0.01] * 3 + [0.001] * 3,
         "milestones follow nEpochs 10: LR 0.01 from epoch 5, 0.001 from epoch 8"),
        (old, [0.1, 0.01] + [0.001] * 8, "milestones of the config stay with nEpochs 10: LR 0.01"),
    ):  # fmt: skip
        save = tmp_path / source.stem
        result = run(command(config=source, nEpochs=10, save=save))
        assert result.code == 0 and f"note: {note}" in result.err
        assert learning_rates(save) == rates
        rerun = run(command(config=source, save=tmp_path / f"{source.stem} again"))
        assert (rerun.code, rerun.err) == (0, "")


def test_a_run_of_one_epoch_says_its_rate_and_how_to_train_at_the_initial_one(tmp_path):
    argv = tiny(nEpochs=1, save=tmp_path / "short", resume="auto")
    result = run(argv, partial(at_batch, partial(send, 15), 2))
    assert result.code == 75
    note = r'note: nEpochs 1 trains at LR 0.001: .*; (--milestones) "(\[\])" trains at 0.1\n'
    advice = re.search(note, result.err).groups()
    result = run(argv)  # it is said once
    assert (result.code, result.err) == (0, "") and learning_rates(tmp_path / "short") == [0.001]
    result = run([*tiny(nEpochs=1, save=tmp_path / "other"), *advice])
    assert (result.code, result.err) == (0, "") and learning_rates(tmp_path / "other") == [0.1]


def test_a_best_model_that_is_gone_is_not_missed_at_the_end(tmp_path):
    assert run(tiny(nEpochs=2, validSize=8, save=tmp_path)).code == 0
    (tmp_path / "model_best.pt").unlink()
    worse = command(resume=tmp_path, nEpochs=3, LR=1e4, milestones=3, override=True)
    result = run(worse)
    assert result.code == 0 and " * Test " in result.out
    assert "the best result is forgotten" in result.err or "(best: epoch 2)" in result.out


def test_testing_normalises_as_the_network_was_trained_and_refuses_other_classes(tmp_path):
    data, directory = tmp_path / "data", tmp_path / "run"
    write_folder(data, {split: {"a": 6, "b": 6} for split in ("train", "val")}, size=8)
    flags = tiny(dataset="folder", nImages=None, nClasses=None, nEpochs=1)
    assert run([*flags, f"--data={data}", f"--save={directory}"]).code == 0
    test = command(testOnly=True, resume=directory)
    before = run(test).out.splitlines()[-1]
    for path in sorted((data / "train" / "a").iterdir())[1:]:
        path.unlink()
    assert run(test).out.splitlines()[-1] == before
    refused(run(command(resume=directory, nEpochs=2)), 4, "7 training images, was 12")
    for split in ("train", "val"):
        (data / split / "a").rename(data / split / "z")
    refused(run(test), 4, "classes")
