"""Test rows 40 to 42, 44, 47 to 50, 64: data that is missing, damaged, hostile, contradictory."""

import hashlib
import os
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path

import pytest

from datasets.download import unpack
from errors import DataError
from faults.bombs import entry, tar_gz
from faults.contract import TINY_FILES, command, newest_step, refused, saved, tiny
from faults.sabotage import at_batch, both, hang, kill_a_child, replace, shorten
from helpers.run_main import run

# How the images are read: small ones are kept in memory, large ones are read by loader processes.
SMALL, LARGE = {"imageSize": 16, "depth": 10}, TINY_FILES
SIZES = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])


def folder(root: Path, size: dict = LARGE, **flags) -> list[str]:
    """Return the command line of a run over a folder of images; it goes to `run` beside it."""
    settings = {"dataset": "folder", "data": root, "growthRate": 2, "batchSize": 2, "nEpochs": 2,
                "nThreads": 0, "save": root.parent / "run"}  # fmt: skip
    return command(**size | settings | flags)


# Rows 40, 44 and 47 to 50: a folder of images.


def remove(path: str, root: Path) -> None:
    shutil.rmtree(root / path)


def empty(path: str, root: Path) -> None:
    remove(path, root)
    (root / path).mkdir()


def rename(old: str, new: str, root: Path) -> None:
    (root / old).rename(root / new)


def damage(split: str, data: bytes, root: Path) -> None:
    (root / split / "cat" / "bad.png").write_bytes(data)


def link(name: str, target: str, root: Path) -> None:
    (root / "train" / "cat" / name).symlink_to(target)


def two_loops(root: Path) -> None:
    """Double the number of ways into each by the other: 2^40 of them up to the system's limit."""
    link("a", ".", root)
    link("b", ".", root)


def pipe(root: Path) -> None:
    os.mkfifo(root / "train" / "cat" / "pipe.png")


LOOP = "cat/[ab] is a link to a directory listed before; fix: remove"
BAD = "cannot read image {root}/%s/cat/bad.png.*; fix: .*--onBadImage skip"
PNG = b"\x89PNG\r\n\x1a\n"
UNUSABLE = {
    "row 40, nothing": (partial(remove, "."), "no directory {root}; fix: use --data DIR with DIR/"),
    "row 40, empty": (partial(empty, "."), "no directory {root}/train; fix: .*DIR/val/CLASS/IMAGE"),
    "row 40, no val": (partial(remove, "val"), "no directory {root}/val; fix: "),
    "row 44, cut": (partial(damage, "val", PNG), BAD % "val"),
    "row 44, empty": (partial(damage, "train", b""), BAD % "train"),
    "row 44, garbled": (partial(damage, "train", PNG + bytes(1000)), BAD % "train"),
    "row 47": (partial(empty, "train/dog"), r"{root}/train: .*\bdog\b"),
    "row 48": (partial(rename, "val/dog", "val/fox"), "only in train: dog, only in val: fox"),
    "row 49": (int, "nClasses is 3 but folder has 2 classes; fix: use --nClasses 2"),
    "row 50, loop": (partial(link, "a", "."), LOOP),
    "row 50, loops": (two_loops, LOOP),
    "row 50, loop above": (partial(link, "up", "../.."), "is a link to a directory listed before"),
    "row 50, dangling": (partial(link, "a.png", "gone"), "cannot read image .*a.png: .*No such"),
    "row 50, itself": (partial(link, "a.png", "a.png"), "cannot read .*a.png: .*Too many levels"),
    "row 50, pipe": (pipe, "cannot read image .*pipe.png: not a regular file"),
    "row 50, device": (partial(link, "a.png", "/dev/zero"), "a.png: not a regular file"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_data_that_cannot_be_used_is_refused(root, name):
    inject, pattern = UNUSABLE[name]
    if inject is not int:
        inject(root=root)
    flags = {"nClasses": 3} if inject is int else {"nThreads": int("garbled" in name)}
    # As the images are read at the start, or by loader processes.
    for size in [LARGE] if "44" not in name else [SMALL, LARGE]:
        refused(run(folder(root, size, **flags)), 3, pattern.format(root=re.escape(str(root))))
        assert not list((root.parent / "run").glob("*.pt"))


# Rows 41 and 42.

CIFAR = {"dataset": "cifar10", "imageSize": None, "nImages": None, "nClasses": None}
FOLDER = "cifar-10-batches-py"
WHOLE = tar_gz((entry(f"{FOLDER}/data_batch_1", 10_000), bytes(10_000)))


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def published_as(data: bytes) -> None:
    """Take an archive that the test wrote for the official one."""
    from torchvision.datasets import CIFAR10

    CIFAR10.tgz_md5 = md5(data)


def unpacked(root: Path, data: bytes, published: bytes):
    """Run with an archive in place of CIFAR-10's, and assert that nothing else is left behind."""
    root.mkdir()
    path = root / "cifar-10-python.tar.gz"
    path.write_bytes(data)
    around = {item.name for item in root.parent.iterdir()} | {"run"}
    argv = tiny(**CIFAR, data=root, save=root.parent / "run")
    result = run(argv, partial(published_as, published))
    assert [item.name for item in root.iterdir()] == [path.name]
    assert {item.name for item in root.parent.iterdir()} == around
    return result


def test_an_archive_that_is_not_the_published_one_is_refused(tmp_path):
    root, data = tmp_path / "data", b"<!DOCTYPE html><html>not found</html>"
    path = root / "cifar-10-python.tar.gz"
    pattern = rf"{path} has md5 {md5(data)}, expected {md5(WHOLE)}; fix: delete {path} and run"
    refused(unpacked(root, data, WHOLE), 3, pattern)


def hostile_archives(outside: Path) -> dict[str, list[tarfile.TarInfo]]:
    """Return entries that write `outside` of an archive where it is unpacked without a filter."""
    script = entry(f"{FOLDER}/../../outside", 1)
    script.mode = 0o6755
    up = entry(f"{FOLDER}/a", kind=tarfile.SYMTYPE)
    up.linkname = ".."
    return {
        "far up": [entry(f"{FOLDER}/{'../' * 9}{str(outside)[1:]}", 1)],
        "two slashes": [entry(f"/{outside}", 1)],
        "through a link": [up, entry(f"{FOLDER}/a/outside", 1)],
        "long name": [entry(f"{FOLDER}/" + "a/" * 60 + "../" * 62 + "outside", 1)],
        "folder": [entry(f"{FOLDER}/../outside", kind=tarfile.DIRTYPE)],
        "set-user-id": [script],
        "block device": [entry(f"{FOLDER}/a", kind=tarfile.BLKTYPE)],
    }


# Other ones: tests/datasets/test_download.py.
@pytest.mark.parametrize("name", hostile_archives(Path("/outside")))
def test_an_archive_that_reaches_outside_itself_is_refused(tmp_path, name):
    entries = hostile_archives(tmp_path / "outside")[name]
    path = tmp_path / "data" / "archive.tar.gz"
    path.parent.mkdir()
    path.write_bytes(tar_gz(*[(part, b"x" * part.size) for part in entries]))
    with pytest.raises(DataError, match="cannot unpack"):
        unpack(path, FOLDER)
    assert [*tmp_path.rglob("*")] == [path.parent, path]


# Row 64.


def hanging_loaders() -> None:
    """Make loader processes hang at one of the images, and wait a second for them."""

    def hanging(decode):
        return lambda path, *more: hang() if str(path).endswith("1.png") else decode(path, *more)

    replace("decode an image", hanging)
    shorten({"wait for a loader process": 1})


@pytest.mark.parametrize("k", [1, 8])  # the eighth: while the others are started
def test_a_loader_process_that_is_killed_ends_the_run(root, k):
    argv = folder(root, nThreads=1, batchSize=1)
    result = run(argv, partial(at_batch, kill_a_child, k))
    refused(result, 3, r"loader process was killed or hung: .*; fix: .*--nThreads")


def test_a_loader_process_that_hangs_ends_the_run(root):
    result = run(folder(root, nThreads=1), hanging_loaders)
    refused(result, 3, r"loader process was killed or hung: .*timed out.*; fix: .*--nThreads")


def test_a_checkpoint_from_before_a_loader_process_died_is_intact(root):
    argv = folder(root, nThreads=1, batchSize=1)
    directory, copy = root.parent / "run", root.parent / "copy"
    moments = [partial(at_batch, partial(shutil.copytree, directory, copy), 9),
               partial(at_batch, kill_a_child, 10)]  # fmt: skip
    assert run(argv, partial(both, *moments)).code == 3
    assert newest_step(directory) == 8 and {"model_last.pt", "log.jsonl"} <= saved(copy).keys()
    assert saved(directory) == saved(copy)
    assert run([*argv, "--resume=auto"]).code == 0
