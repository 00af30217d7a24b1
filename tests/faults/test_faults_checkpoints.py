"""Test rows 9 to 24, 28, 73 and 74: the files that are read of a run, and how little is lost."""

import errno
import os
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoints
from faults.contract import FLAGS, command, newest_step, outcome, refused, saved, status, tiny
from faults.sabotage import fail, kill, on_files, refuse, replace
from fileio import tensor_files
from helpers.run_main import run


@pytest.fixture
def directory(begun, tmp_path) -> Path:
    """Kill a run in its third epoch, with the checkpoints of two epochs."""
    return begun(tmp_path / "run", epochs=2)


@pytest.fixture
def newest(directory) -> Path:
    """Return the newest checkpoint of the killed run."""
    return max(directory.glob("checkpoint_*.pt"))


@pytest.fixture
def complete(directory) -> Path:
    """Resume the killed run to its end."""
    assert resume(directory).code == 0
    return directory


def resume(directory: Path, sabotage=None, **flags):
    return run(tiny(**FLAGS | {"resume": "auto", "save": directory} | flags), sabotage)


# Rows 9, 10 and 17 to 19.


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE = {
    "row 10, zero tail": lambda data: data[:-4096] + bytes(4096),
    "row 10, empty": lambda data: b"",
    "row 17, cut": lambda data: data[: len(data) // 3],
    "row 18, flip": flip,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_costs_one_epoch(undisturbed, directory, newest, damage):
    newest.write_bytes(DAMAGE[damage](newest.read_bytes()))
    result = resume(directory)
    assert result.code == 0
    (note,) = result.err.splitlines()
    assert note.startswith(f"note: {newest} is ")
    assert note.endswith(f"; set aside as {newest.name}.corrupt")
    assert (directory / f"{newest.name}.corrupt").exists()
    assert outcome(directory) == undisturbed()


def test_a_damaged_checkpoint_that_cannot_be_set_aside_is_passed_over(
    undisturbed, directory, newest, tmp_path
):
    """Test it in another user's directory, or on a read-only disk."""
    newest.write_bytes(b"")
    denied = partial(on_files, partial(refuse, errno.EROFS), directory, operation="rename")
    result = run(tiny(**FLAGS, resume=directory, save=tmp_path / "elsewhere"), denied)
    assert result.code == 0, result
    assert result.err.startswith(f"note: {newest} is empty")
    assert outcome(tmp_path / "elsewhere")["weights"] == undisturbed()["weights"]


def test_when_all_checkpoints_are_damaged_the_run_does_not_silently_begin_again(directory):
    for path in directory.glob("checkpoint_*.pt"):
        path.write_bytes(flip(path.read_bytes()))
    kept = {name: data for name, data in saved(directory).items() if "checkpoint" not in name}
    for _ in range(2):
        refused(resume(directory), 4, r"no valid checkpoint among 2 .*; fix: .*--resume none")
    pattern = "already holds a run; fix: .*another --save"
    refused(resume(directory, resume=None), 2, pattern)
    assert saved(directory) == kept


def test_a_kill_while_the_checkpoint_before_a_damaged_one_is_read_costs_nothing(
    undisturbed, directory, newest
):
    newest.write_bytes(flip(newest.read_bytes()))
    before = {path.read_bytes() for path in directory.glob("checkpoint_*.pt*")}
    killed = partial(on_files, kill, directory, operation="open", name="checkpoint", k=2)
    assert resume(directory, killed).code < 0
    assert {path.read_bytes() for path in directory.glob("checkpoint_*.pt*")} == before
    assert resume(directory).code == 0
    assert outcome(directory) == undisturbed()


# Rows 21 and 28: what stands in the place of the newest checkpoint.


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
}


def signatures(directory: Path) -> dict:
    """Read what changes with a file, for those that cannot be read."""
    found = {path: path.lstat() for path in directory.iterdir() if path.name != ".lock"}
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in found.items()}


@pytest.mark.parametrize("name", ODD)
def test_an_invalid_checkpoint_is_named_and_the_run_is_untouched(directory, newest, name):
    make, pattern = ODD[name]
    newest.unlink()
    make(newest)
    before = signatures(directory)
    # A file is named by itself; in its directory it would be passed over.
    refused(run(command(resume=newest if newest.is_file() else directory)), 4, pattern)
    refused(run(tiny(retrain=newest, save=directory.parent / "other")), 4, f"{newest}")
    assert signatures(directory) == before


# Rows 22 to 24 and 73: sound files that are not this run's.


@pytest.mark.parametrize(
    ("flags", "code", "pattern"),
    [
        ({"growthRate": 3}, 4, r"growthRate=2.*settings say growthRate=3"),
        ({"nClasses": 5}, 4, r"the classes are not the run.s: class 3 is pattern 3"),
        ({"batchSize": 4}, 2, r"batchSize 4, was 8; fix: .*--override true"),
        ({"nEpochs": 2}, 2, r"nEpochs 2, was 3; fix: .*--override true"),
    ],
)
def test_another_run_is_refused_and_the_run_is_untouched(directory, flags, code, pattern):
    before = saved(directory)
    refused(resume(directory, **flags), code, pattern)
    assert saved(directory) == before
    assert code == 4 or resume(directory, **flags, override=True).code == 0


def rewrite(path: Path, **changes: object) -> None:
    """Change entries of a checkpoint, given whole or as a function of what stands there."""
    state = checkpoints.load(path)
    changed = {name: new(state[name]) if callable(new) else new for name, new in changes.items()}
    path.write_bytes(tensor_files.to_bytes(state | {"format": checkpoints.FORMAT} | changed))


def not_finite(entry: dict) -> dict:
    """Replace one number of the first tensor by NaN."""
    name, tensor = next(iter(entry.items()))
    tensor = tensor.clone()
    tensor.view(-1)[0] = float("nan")
    return entry | {name: tensor}


# Other ones: test_checkpoint_schema.py, test_checkpoints.py and test_continuing.py.
COMPLEX = {"classifier.bias": torch.zeros(3, dtype=torch.complex64)}
CONTENTS = [
    ({"format": 10**400}, "has format unknown, this program reads 1"),
    ({"momentum": {}}, r"does not fit the network: .* is missing \(\d+ in all\)"),
    ({"model": lambda entry: entry | COMPLEX}, "not a weight: classifier.bias is complex64"),
    ({"settings": {}}, "invalid settings or statistics"),
    ({"rng": {"cpu": torch.zeros(5056, dtype=torch.uint8)}}, "has an invalid rng"),
    ({"epoch": 2**70, "step": None}, "has an invalid epoch, step"),
]


@pytest.mark.parametrize(("changes", "pattern"), CONTENTS, ids=[p for _, p in CONTENTS])
def test_a_sound_checkpoint_with_other_contents_is_refused(directory, newest, changes, pattern):
    rewrite(newest, **changes)
    before = saved(directory)
    refused(resume(directory, resume=newest), 4, pattern)
    assert saved(directory) == before


@pytest.mark.parametrize("where", ["model", "momentum"])
def test_a_number_that_is_not_finite_is_never_trained_on(undisturbed, directory, where):
    older, newest = sorted(directory.glob("checkpoint_*.pt"))
    rewrite(older)  # which changes nothing
    rewrite(newest, **{where: not_finite})
    result = resume(directory)
    assert result.code == 0 and "a weight that is not finite" in result.err
    assert outcome(directory) == undisturbed()
    for path in directory.glob("checkpoint_*.pt"):
        rewrite(path, **{where: not_finite})
    refused(resume(directory), 4, "no valid checkpoint among 3")


def test_a_machine_without_memory_does_not_make_checkpoints_damaged(directory):
    before = saved(directory)
    refused(resume(directory, no_memory), 4, "takes more memory than there is; fix: .*more memory")
    assert saved(directory) == before


def no_memory() -> None:
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 B"
    replace("read the tensors", lambda load: lambda *args, **more: fail("RuntimeError", words))


# Rows 73 and 74: the run goes on in another way.


def test_neither_loader_processes_nor_dates_of_files_matter(undisturbed, directory):
    for age, path in enumerate(sorted(directory.glob("checkpoint_*.pt"))):
        os.utime(path, (4e9 - age, 4e9 - age))  # row 75: in the future, the newest the oldest
    assert newest_step(directory) == 8
    assert resume(directory, nThreads=2).code == 0
    assert outcome(directory) == undisturbed()


def test_a_complete_run_is_complete_and_nothing_is_rewritten(complete):
    times = {path: path.stat().st_mtime_ns for path in complete.rglob("*") if path.name[0] != "."}
    before = saved(complete)
    result = resume(complete)
    assert result.code == 0 and result.err == ""
    already, finished = result.out.splitlines()
    assert already == f"=> {complete} is already complete"
    assert finished.startswith(" * Finished top1: ")
    refused(resume(complete, resume=None), 2, "already holds a run; fix: add --resume auto")
    assert saved(complete) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_complete_run_goes_on_when_asked_for_more_epochs(undisturbed, complete):
    refused(resume(complete, nEpochs=2), 2, "nEpochs 2, was 3")
    assert resume(complete, nEpochs=4).code == 0
    longer = outcome(complete)
    assert [line["epoch"] for line in longer["log"]] == [1, 2, 3, 4]
    assert longer["log"][:3] == undisturbed()["log"]
    assert status(complete)["state"] == "done" and status(complete)["last_epoch"] == 4


def test_a_run_that_was_renamed_and_holds_copies_of_a_file_manager_goes_on(
    undisturbed, directory, newest, tmp_path, monkeypatch
):
    """Resume by the directory's new name, from inside of it, beside copies of later steps."""
    copies = ("checkpoint_000000999 (copy).pt", "checkpoint_000000999.conflict.pt")
    for name in copies:
        (directory / name).write_bytes(newest.read_bytes())
    moved = directory.rename(tmp_path / "moved [1]")
    monkeypatch.chdir(moved)
    assert run(command(resume=".", nGPU=0)).code == 0
    for name in copies:
        (moved / name).unlink()  # it is still there, and no checkpoint of the run's own
    assert outcome(moved) == undisturbed() and not directory.exists()
