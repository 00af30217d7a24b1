"""Rows 9, 10, 17 to 24, 28, 73 and 74: what is read of a run, and how little of it is lost."""

import errno
import os
import random
import re
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoints
from faults.contract import FLAGS, command, newest_step, outcome, refused, saved, status, tiny
from faults.sabotage import at_batch, fail, kill, on_files, refuse, replace
from fileio import tensor_files
from helpers.run_main import run


@pytest.fixture
def directory(begun, tmp_path) -> Path:
    """A run that was killed in its third epoch, with the checkpoints of two epochs."""
    return begun(tmp_path / "run", epochs=2)


@pytest.fixture
def newest(directory) -> Path:
    """Its newest checkpoint."""
    return max(directory.glob("checkpoint_*.pt"))


@pytest.fixture
def complete(directory) -> Path:
    """That run, when it has gone on to its end."""
    assert again(directory).code == 0
    return directory


def again(directory: Path, sabotage=None, **flags):
    return run(tiny(**FLAGS | {"resume": "auto", "save": directory} | flags), sabotage)


# Rows 9, 10 and 17 to 19.


def cut(data: bytes) -> bytes:
    return data[: random.Random(0).randrange(len(data))]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def zero_tail(data: bytes) -> bytes:
    return data[:-4096] + bytes(4096)


def nothing(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, flip, zero_tail, nothing])
def test_a_damaged_newest_checkpoint_costs_one_epoch(undisturbed, directory, newest, damage):
    newest.write_bytes(damage(newest.read_bytes()))
    result = again(directory)
    assert result.code == 0
    (note,) = result.err.splitlines()
    assert note.startswith(f"note: {newest} is ")
    assert note.endswith(f"; set aside as {newest.name}.corrupt")
    assert (directory / f"{newest.name}.corrupt").exists()
    assert outcome(directory) == undisturbed()


def test_a_damaged_checkpoint_that_cannot_be_set_aside_is_passed_over(
    undisturbed, directory, newest, tmp_path
):
    """In a directory of somebody else's, or on a read-only disk."""
    newest.write_bytes(b"")
    denied = partial(on_files, partial(refuse, errno.EROFS), directory, operation="rename")
    result = run(tiny(**FLAGS, resume=directory, save=tmp_path / "elsewhere"), denied)
    assert result.code == 0, result
    assert result.err.startswith(f"note: {newest} is empty")
    assert outcome(tmp_path / "elsewhere")["weights"] == undisturbed()["weights"]


@pytest.mark.parametrize("damage", [flip, nothing])
def test_when_all_checkpoints_are_damaged_the_run_does_not_silently_begin_again(directory, damage):
    for path in directory.glob("checkpoint_*.pt"):
        path.write_bytes(damage(path.read_bytes()))
    kept = {name: data for name, data in saved(directory).items() if "checkpoint" not in name}
    for _ in range(2):
        refused(again(directory), 4, r"no valid checkpoint among 2 .*; fix: .*--resume none")
    pattern = "already holds a run; fix: .*another --save"
    refused(again(directory, resume=None), 2, pattern)
    assert saved(directory) == kept


def test_when_the_only_checkpoint_is_damaged_before_the_first_epoch_ends_likewise(tmp_path):
    """There is no model_last.pt yet that would tell that a run was there."""
    killed = partial(at_batch, kill, 3)
    assert again(tmp_path, killed, resume=None, saveEvery=1e-9).code < 0
    for path in tmp_path.glob("checkpoint_*.pt"):
        path.write_bytes(b"")
    refused(again(tmp_path), 4, "no valid checkpoint among 2")
    refused(again(tmp_path, resume=None), 2, "already holds a run")


def test_a_kill_while_the_checkpoint_before_a_damaged_one_is_read_costs_nothing(
    undisturbed, directory, newest
):
    newest.write_bytes(flip(newest.read_bytes()))
    before = {path.read_bytes() for path in directory.glob("checkpoint_*.pt*")}
    killed = partial(on_files, kill, directory, operation="open", name="checkpoint", k=2)
    assert again(directory, killed).code < 0
    assert {path.read_bytes() for path in directory.glob("checkpoint_*.pt*")} == before
    assert again(directory).code == 0
    assert outcome(directory) == undisturbed()


# Rows 20, 21 and 28: what is named, or stands in the place of the newest checkpoint.


@pytest.mark.parametrize("where", ["missing", "empty"])
def test_resuming_a_directory_without_a_checkpoint_is_refused(tmp_path, where):
    (tmp_path / "empty").mkdir()
    result = again(tmp_path / "run", resume=tmp_path / where)
    refused(result, 4, re.escape(str(tmp_path / where)))
    assert not (tmp_path / "run").exists() or not saved(tmp_path / "run")


def text(content: str, path: Path) -> None:
    path.write_text(content)


def link(target: str, path: Path) -> None:
    path.symlink_to(target)


ODD = {
    "directory": (Path.mkdir, "cannot read .*: Is a directory"),
    "pipe": (os.mkfifo, "cannot read .*: not a regular file"),
    "device": (partial(link, "/dev/zero"), "cannot read .*: not a regular file"),
    "dangling link": (partial(link, "gone"), "cannot read .*: No such file"),
    "loop": (partial(link, "checkpoint_000000008.pt"), "cannot read .*: Too many levels"),
    "web page": (partial(text, "<!DOCTYPE html>"), "is a web page"),
    "LFS pointer": (partial(text, "version https://git-lfs"), "is a Git LFS pointer"),
    "text": (partial(text, "weights"), "is text"),
    "nothing": (Path.touch, "is empty"),
}


def signatures(directory: Path) -> dict:
    """Read what changes with a file, for those that cannot be read."""
    found = {path: path.lstat() for path in directory.iterdir() if path.name != ".lock"}
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in found.items()}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_checkpoint_is_named_and_the_run_is_untouched(directory, newest, name):
    make, pattern = ODD[name]
    newest.unlink()
    make(newest)
    before = signatures(directory)
    # A file is named by itself; in its directory it would be passed over.
    refused(run(command(resume=newest if newest.is_file() else directory)), 4, pattern)
    refused(run(tiny(retrain=newest, save=directory.parent / "other")), 4, f"{newest}")
    assert signatures(directory) == before


def test_a_link_to_a_checkpoint_is_followed_and_its_target_never_written(
    undisturbed, directory, newest, tmp_path
):
    target = newest.rename(tmp_path / "elsewhere.pt")
    content = target.read_bytes()
    newest.symlink_to(target)
    assert again(directory, keep=1).code == 0
    assert outcome(directory) == undisturbed()
    assert target.read_bytes() == content and not newest.exists()


# Rows 22 to 24: sound files that are not the run's.


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ({"depth": 16}, r"checkpoint is a densenet with depth=10, settings say depth=16; fix: "),
        ({"growthRate": 3}, r"growthRate=2.*settings say growthRate=3"),
        ({"bottleneck": False}, r"bottleneck=true.*settings say bottleneck=false"),
        ({"nClasses": 5}, r"the data is not the checkpoint's: classes"),
    ],
)
@pytest.mark.parametrize("how", ["directory", "file"])
def test_a_checkpoint_of_another_network_is_refused(directory, newest, flags, pattern, how):
    before = saved(directory)
    source = directory if how == "directory" else newest
    refused(again(directory, **flags, resume=source), 4, pattern)
    assert saved(directory) == before


def rewrite(path: Path, **changes: object) -> None:
    """Change entries of a checkpoint, given whole or as a function of what stands there."""
    state = checkpoints.load(path)
    changed = {name: new(state[name]) if callable(new) else new for name, new in changes.items()}
    path.write_bytes(tensor_files.to_bytes(state | {"format": checkpoints.FORMAT} | changed))


def without(name: str, entry: dict) -> dict:
    return {key: value for key, value in entry.items() if key != name}


def having(name: str, value: object, entry: dict) -> dict:
    return entry | {name: value}


def not_finite(entry: dict) -> dict:
    """Replace one number of the first tensor by NaN."""
    name, tensor = next(iter(entry.items()))
    tensor = tensor.clone()
    tensor.view(-1)[0] = float("nan")
    return entry | {name: tensor}


# Entries of other types are tests/fileio/test_checkpoint_schema.py's.
CONTENTS = [
    ({"format": 9}, "has format 9, this program reads 1; fix: use the version"),
    ({"format": 10**400}, "has format unknown, this program reads 1"),
    ({"momentum": {}}, r"does not fit the network: .* is missing \(\d+ in all\)"),
    ({"momentum": lambda entry: {name: t[..., :1] for name, t in entry.items()}}, "has shape"),
    ({"model": partial(without, "classifier.bias")}, "classifier.bias is missing"),
    ({"model": partial(having, "classifier.bias", torch.zeros(3, dtype=torch.complex64))},
     r"damaged \(a tensor that is no weight\)"),
    ({"settings": {}}, "invalid settings or statistics"),
    ({"settings": partial(having, "nEpochs", "many")}, "'many' is not a whole number"),
    ({"data": partial(having, "mean", [0.0])}, "invalid settings or statistics: mean and std"),
    ({"rng": {"cpu": torch.zeros(5056, dtype=torch.uint8)}}, "has an invalid rng"),
    ({"epoch": 2**70, "step": None}, "has an invalid epoch, step"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "pattern"), CONTENTS, ids=[p for _, p in CONTENTS])
def test_a_sound_checkpoint_with_other_contents_is_refused(directory, newest, changes, pattern):
    rewrite(newest, **changes)
    before = saved(directory)
    refused(again(directory, resume=newest), 4, pattern)
    assert saved(directory) == before


@pytest.mark.parametrize("where", ["model", "momentum"])
def test_a_number_that_is_not_finite_is_never_trained_on(undisturbed, directory, where):
    older, newest = sorted(directory.glob("checkpoint_*.pt"))
    rewrite(older)  # which changes nothing
    rewrite(newest, **{where: not_finite})
    result = again(directory)
    assert result.code == 0 and "a weight that is not finite" in result.err
    assert outcome(directory) == undisturbed()
    for path in directory.glob("checkpoint_*.pt"):
        rewrite(path, **{where: not_finite})
    refused(again(directory), 4, "no valid checkpoint among 3")


def test_a_machine_without_memory_does_not_make_checkpoints_damaged(directory):
    before = saved(directory)
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 B"
    broken = partial(
        replace, "read the tensors", partial(failing, partial(fail, "RuntimeError", words))
    )
    refused(again(directory, broken), 4, "takes more memory than there is; fix: .*more memory")
    assert saved(directory) == before


def failing(action, function):
    """Return what calls `action` in place of a function."""
    return lambda *args, **more: action()


# Rows 73 and 74: the run goes on in another way.


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ({"batchSize": 4}, r"batchSize 4, was 8; fix: .*--override true"),
        ({"LR": 0.2}, r"LR 0.2, was 0.1; fix: .*--override true"),
        ({"milestones": "1,2"}, r"milestones 1,2, was 2,3"),
        ({"nEpochs": 2}, r"nEpochs 2, was 3; fix: .*--override true"),
    ],
)
def test_another_course_of_training_needs_an_override(directory, flags, pattern):
    before = saved(directory)
    refused(again(directory, **flags), 2, pattern)
    assert saved(directory) == before
    assert again(directory, **flags, override=True).code == 0


def test_neither_loader_processes_nor_dates_of_files_matter(undisturbed, directory):
    for age, path in enumerate(sorted(directory.glob("checkpoint_*.pt"))):
        os.utime(path, (4e9 - age, 4e9 - age))  # row 75: in the future, the newest the oldest
    assert newest_step(directory) == 8
    assert again(directory, nThreads=2).code == 0
    assert outcome(directory) == undisturbed()


def test_a_complete_run_is_complete_and_nothing_is_rewritten(complete):
    times = {path: path.stat().st_mtime_ns for path in complete.rglob("*") if path.name[0] != "."}
    before = saved(complete)
    result = again(complete)
    assert result.code == 0 and result.err == ""
    already, finished = result.out.splitlines()
    assert already == f"=> {complete} is already complete"
    assert finished.startswith(" * Finished top1: ")
    refused(again(complete, resume=None), 2, "already holds a run; fix: add --resume auto")
    assert saved(complete) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_complete_run_goes_on_when_asked_for_more_epochs(undisturbed, complete):
    refused(again(complete, nEpochs=2), 2, "nEpochs 2, was 3")
    assert again(complete, nEpochs=4).code == 0
    longer = outcome(complete)
    assert [line["epoch"] for line in longer["log"]] == [1, 2, 3, 4]
    assert longer["log"][:3] == undisturbed()["log"]
    assert status(complete)["state"] == "done" and status(complete)["last_epoch"] == 4


def test_an_earlier_checkpoint_than_the_newest_is_not_gone_on_with_in_the_same_place(
    undisturbed, directory, tmp_path
):
    """Or the next start would find, as the newest, one of the history that was given up."""
    earlier, newest = sorted(directory.glob("checkpoint_*.pt"))
    before = saved(directory)
    refused(again(directory, resume=earlier), 2, "already holds a run")
    assert saved(directory) == before
    for source, save in ((earlier, tmp_path / "elsewhere"), (newest, directory)):
        assert again(save, resume=source).code == 0
        assert outcome(save)["weights"] == undisturbed()["weights"]
