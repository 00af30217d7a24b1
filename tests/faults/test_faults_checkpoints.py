"""Rows 9, 10, 17 to 24, 28, 73 and 74: what is read of a run, and how little of it is lost."""

import errno
import os
import random
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoints
from faults.contract import command, outcome, refused, saved, status, tiny
from faults.sabotage import at_batch, kill, on_files, refuse
from fileio import tensor_files
from helpers.run_main import run

FLAGS = {"nEpochs": 3, "dropRate": 0.2, "keep": 2}


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("complete")
    assert run(tiny(**FLAGS, save=directory)).code == 0
    return directory


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run that was killed in its third epoch, with the checkpoints of two epochs."""
    directory = tmp_path_factory.mktemp("killed")
    assert run(tiny(**FLAGS, save=directory), partial(at_batch, kill, 10)).code < 0
    assert len(list(directory.glob("checkpoint_*.pt"))) == 2
    return directory


@pytest.fixture
def begun(killed, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(killed, tmp_path / "run")


def again(directory: Path, **flags):
    return run(tiny(**FLAGS | flags, resume="auto", save=directory))


def cut(data: bytes) -> bytes:
    return data[: random.Random(0).randrange(len(data))]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def zero_tail(data: bytes) -> bytes:
    return data[:-4096] + bytes(4096)


def nothing(data: bytes) -> bytes:
    return b""


DAMAGE = [cut, flip, zero_tail, nothing]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_costs_one_epoch(complete, begun, damage):
    newest = max(begun.glob("checkpoint_*.pt"))
    newest.write_bytes(damage(newest.read_bytes()))
    result = again(begun)
    assert result.code == 0
    notes = result.err.splitlines()
    assert len(notes) == 1
    assert notes[0].startswith(f"note: {newest} is ")
    assert notes[0].endswith(f"; set aside as {newest.name}.corrupt")
    assert (begun / f"{newest.name}.corrupt").exists()
    assert outcome(begun) == outcome(complete)


def test_a_damaged_checkpoint_that_cannot_be_set_aside_is_passed_over(complete, begun, tmp_path):
    """In a directory of somebody else's, or on a read-only disk."""
    newest = max(begun.glob("checkpoint_*.pt"))
    newest.write_bytes(b"")
    denied = partial(on_files, partial(refuse, errno.EROFS), begun, operation="rename")
    result = run(tiny(**FLAGS, resume=begun, save=tmp_path / "elsewhere"), denied)
    assert result.code == 0, result
    assert result.err.startswith(f"note: {newest} is empty")
    assert outcome(tmp_path / "elsewhere")["weights"] == outcome(complete)["weights"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_when_all_checkpoints_are_damaged_the_run_does_not_silently_begin_again(begun, damage):
    for path in begun.glob("checkpoint_*.pt"):
        path.write_bytes(damage(path.read_bytes()))
    kept = {name: data for name, data in saved(begun).items() if "checkpoint" not in name}
    for _ in range(2):
        refused(again(begun), 4, r"no valid checkpoint among 2 .*; fix: .*--resume none")
    refused(run(tiny(**FLAGS, save=begun)), 2, "already holds a run; fix: .*another --save")
    assert saved(begun) == kept


def test_when_the_only_checkpoint_is_damaged_before_the_first_epoch_ends_likewise(tmp_path):
    """There is no model_last.pt yet that would tell that a run was there."""
    flags = {**FLAGS, "saveEvery": 1e-9, "save": tmp_path}
    assert run(tiny(**flags), partial(at_batch, kill, 3)).code < 0
    for path in tmp_path.glob("checkpoint_*.pt"):
        path.write_bytes(b"")
    refused(again(tmp_path), 4, "no valid checkpoint among 2")
    refused(run(tiny(**flags)), 2, "already holds a run")


def test_a_run_directory_is_not_taken_for_another_run(complete):
    before = saved(complete)
    refused(run(tiny(**FLAGS, save=complete)), 2, "already holds a run; fix: add --resume auto")
    assert saved(complete) == before


@pytest.mark.parametrize("where", ["missing", "empty"])
def test_resuming_a_directory_without_a_checkpoint_is_refused(tmp_path, where):
    (tmp_path / "empty").mkdir()
    result = run(tiny(**FLAGS, resume=tmp_path / where, save=tmp_path / "run"))
    refused(result, 4, re.escape(str(tmp_path / where)))
    assert not (tmp_path / "run").exists() or not saved(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ({"depth": 16}, r"checkpoint is a densenet with depth=10, settings say depth=16; fix: "),
        ({"growthRate": 3}, r"growthRate=2.*settings say growthRate=3"),
        ({"bottleneck": False}, r"bottleneck=true.*settings say bottleneck=false"),
        ({"reduction": 1}, r"reduction=0.5, settings say reduction=1"),
        ({"nClasses": 5}, r"the data is not the checkpoint's: classes"),
    ],
)
@pytest.mark.parametrize("how", ["directory", "file"])
def test_a_checkpoint_of_another_network_is_refused(begun, flags, pattern, how):
    before = saved(begun)
    source = begun if how == "directory" else max(begun.glob("checkpoint_*.pt"))
    result = run(tiny(**FLAGS | flags, resume=source, save=begun))
    refused(result, 4, pattern)
    assert saved(begun) == before


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ({"batchSize": 4}, r"batchSize 4, was 8; fix: .*--override true"),
        ({"LR": 0.2}, r"LR 0.2, was 0.1; fix: .*--override true"),
        ({"milestones": "1,2"}, r"milestones 1,2, was 2,3"),
        ({"nEpochs": 2}, r"nEpochs 2, was 3; fix: .*--override true"),
    ],
)
def test_another_course_of_training_needs_an_override(begun, flags, pattern):
    before = saved(begun)
    refused(again(begun, **flags), 2, pattern)
    assert saved(begun) == before
    assert again(begun, **flags, override=True).code == 0


def test_another_number_of_loader_processes_needs_none(complete, begun):
    assert again(begun, nThreads=2).code == 0
    assert outcome(begun) == outcome(complete)


def test_a_complete_run_is_complete_and_nothing_is_rewritten(complete):
    times = {path: path.stat().st_mtime_ns for path in complete.rglob("*") if path.name[0] != "."}
    before = saved(complete)
    result = again(complete)
    assert result.code == 0 and result.err == ""
    already, finished = result.out.splitlines()
    assert already == f"=> {complete} is already complete"
    assert finished.startswith(" * Finished top1: ")
    assert saved(complete) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_complete_run_goes_on_when_asked_for_more_epochs(complete, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(complete, directory)
    refused(again(directory, nEpochs=2), 2, "nEpochs 2, was 3")
    assert again(directory, nEpochs=4).code == 0
    first, longer = outcome(complete), outcome(directory)
    assert [line["epoch"] for line in longer["log"]] == [1, 2, 3, 4]
    assert longer["log"][:3] == first["log"]
    assert status(directory)["state"] == "done" and status(directory)["last_epoch"] == 4


def test_the_dates_of_the_files_do_not_matter(complete, begun):
    for age, path in enumerate(sorted(begun.glob("checkpoint_*.pt"))):
        os.utime(path, (4e9 - age, 4e9 - age))
    assert checkpoints.load_latest(begun, pytest.fail)["global_step"] == 8
    assert again(begun).code == 0
    assert outcome(begun) == outcome(complete)


def test_an_earlier_checkpoint_than_the_newest_is_not_gone_on_with_in_the_same_place(
    complete, begun, tmp_path
):
    """Or the next start would find, as the newest, one of the history that was given up."""
    earlier, newest = sorted(begun.glob("checkpoint_*.pt"))
    before = saved(begun)
    refused(run(tiny(**FLAGS, resume=earlier, save=begun)), 2, "already holds a run")
    assert saved(begun) == before
    for source, directory in ((earlier, tmp_path / "elsewhere"), (newest, begun)):
        assert run(tiny(**FLAGS, resume=source, save=directory)).code == 0
        assert outcome(directory)["weights"] == outcome(complete)["weights"]


# Row 9.


@pytest.mark.parametrize("k", [1, 2])
def test_a_kill_while_a_checkpoint_is_read_costs_nothing(complete, begun, k):
    """The second reading is that of the one before, after the newest was found damaged."""
    newest = max(begun.glob("checkpoint_*.pt"))
    if k == 2:
        newest.write_bytes(flip(newest.read_bytes()))
    before = {path.read_bytes() for path in begun.glob("checkpoint_*.pt*")}
    spoil = partial(on_files, kill, begun, operation="open", name="checkpoint", k=k)
    assert run(tiny(**FLAGS, resume="auto", save=begun), spoil).code < 0
    assert {path.read_bytes() for path in begun.glob("checkpoint_*.pt*")} == before
    assert again(begun).code == 0
    assert outcome(begun) == outcome(complete)


# Rows 21 and 28: what stands in the place of the newest checkpoint.


def replace(path: Path, make) -> None:
    path.unlink()
    make(path)


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
    """What changes with a file, for those that cannot be read."""
    found = {path: path.lstat() for path in directory.iterdir() if path.name != ".lock"}
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in found.items()}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_checkpoint_is_named_and_the_run_is_untouched(begun, name):
    make, pattern = ODD[name]
    newest = max(begun.glob("checkpoint_*.pt"))
    replace(newest, make)
    before = signatures(begun)
    if newest.is_file():  # named by itself; in its directory it would be passed over
        refused(run(command(resume=newest)), 4, pattern)
    else:
        refused(run(command(resume=begun)), 4, pattern)
    refused(run(tiny(retrain=newest, save=begun.parent / "other")), 4, f"{newest}")
    assert signatures(begun) == before


def test_a_link_to_a_checkpoint_is_followed_and_its_target_never_written(complete, begun, tmp_path):
    newest = max(begun.glob("checkpoint_*.pt"))
    target = newest.rename(tmp_path / "elsewhere.pt")
    content = target.read_bytes()
    newest.symlink_to(target)
    assert run(tiny(**FLAGS | {"keep": 1}, resume="auto", save=begun)).code == 0
    assert outcome(begun) == outcome(complete)
    assert target.read_bytes() == content and not newest.exists()


# Rows 23 and 24: sound files with other contents.


def rewrite(path: Path, **changes: object) -> None:
    """Change entries of a checkpoint, given whole or as a function of what stands there."""
    state = checkpoints.load(path)
    changed = {name: new(state[name]) if callable(new) else new for name, new in changes.items()}
    path.write_bytes(tensor_files.to_bytes(state | {"format": checkpoints.FORMAT} | changed))


def without(name: str, entry: dict) -> dict:
    return {key: value for key, value in entry.items() if key != name}


def having(name: str, value: object, entry: dict) -> dict:
    return entry | {name: value}


def spoilt_first(value: object, entry: dict) -> dict:
    """One number of the first tensor replaced."""
    name, tensor = next(iter(entry.items()))
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return entry | {name: tensor}


CONTENTS = [
    ({"format": 9}, "has format 9, this program reads 1; fix: use the version"),
    ({"format": 10**400}, "has format unknown, this program reads 1"),
    ({"momentum": {}}, r"does not fit the network: .* is missing \(\d+ in all\)"),
    ({"momentum": lambda entry: {name: t[..., :1] for name, t in entry.items()}}, "has shape"),
    ({"model": partial(without, "classifier.bias")}, "classifier.bias is missing"),
    ({"model": partial(having, "classifier.bias", "text")}, "has an invalid model"),
    ({"model": partial(having, "classifier.bias", torch.zeros(3, dtype=torch.complex64))},
     r"damaged \(a tensor that is no weight\)"),
    ({"settings": {}}, "invalid settings or statistics"),
    ({"settings": partial(having, "nEpochs", "many")}, "'many' is not a whole number"),
    ({"settings": partial(having, "depth", [10**400])}, "has an invalid settings"),
    ({"data": partial(having, "mean", [0.0])}, "invalid settings or statistics: mean and std"),
    ({"data": partial(having, "classes", {"a": ["b"]})}, "has an invalid data"),
    ({"rng": {}}, "has an invalid rng"),
    ({"rng": {"cpu": torch.zeros(5056, dtype=torch.uint8)}}, "has an invalid rng"),
    ({"epoch": -1}, "has an invalid epoch"),
    ({"epoch": 2**70, "step": None}, "has an invalid epoch, step"),
    ({"sums": {"totals": [0.0], "count": 8}}, "has an invalid sums"),
    ({"last": {"epoch": 2}}, "has an invalid last"),
    ({"overrides": [[["deep"]]]}, "has an invalid overrides"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "pattern"), CONTENTS, ids=[p for _, p in CONTENTS])
def test_a_sound_checkpoint_with_other_contents_is_refused(begun, changes, pattern):
    newest = max(begun.glob("checkpoint_*.pt"))
    rewrite(newest, **changes)
    before = saved(begun)
    refused(run(tiny(**FLAGS, resume=newest, save=begun)), 4, pattern)
    assert saved(begun) == before


def test_a_checkpoint_that_is_rewritten_as_it_was_is_the_same(complete, begun):
    """The twin: it is the changes that were refused."""
    newest = max(begun.glob("checkpoint_*.pt"))
    rewrite(newest)
    assert again(begun).code == 0
    assert outcome(begun) == outcome(complete)


def with_little_memory() -> None:
    """As PyTorch says it when there is none left."""

    def load(*args: object, **more: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 B")

    torch.load = load


def test_a_machine_without_memory_does_not_make_checkpoints_damaged(complete, begun):
    before = saved(begun)
    result = run(tiny(**FLAGS, resume="auto", save=begun), with_little_memory)
    refused(result, 4, "takes more memory than there is; fix: .*more memory")
    assert saved(begun) == before
    assert again(begun).code == 0
    assert outcome(begun) == outcome(complete)


@pytest.mark.parametrize("where", ["model", "momentum"])
def test_a_number_that_is_not_finite_is_never_trained_on(complete, begun, where):
    older, newest = sorted(begun.glob("checkpoint_*.pt"))
    spoilt = partial(spoilt_first, float("nan"))
    rewrite(newest, **{where: spoilt})
    copy = shutil.copytree(begun, begun.with_name("copy"))
    result = again(begun)
    assert result.code == 0 and "a weight that is not finite" in result.err
    assert outcome(begun) == outcome(complete)
    rewrite(copy / older.name, **{where: spoilt})
    refused(again(copy), 4, "no valid checkpoint among 2")
