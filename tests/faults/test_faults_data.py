"""Rows 40 to 42, 44, 47 to 49 and 64: data that is missing, damaged, hostile or contradictory."""

import hashlib
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path

import pytest

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


# Rows 40, 47, 48 and 49.


def remove(path: str, root: Path) -> None:
    shutil.rmtree(root / path)


def empty(path: str, root: Path) -> None:
    remove(path, root)
    (root / path).mkdir()


def rename(old: str, new: str, root: Path) -> None:
    (root / old).rename(root / new)


LAYOUTS = {
    "nothing": (
        partial(remove, "."),
        "no directory {root}; fix: use --data DIR with DIR/train/CLA",
    ),
    "empty": (partial(empty, "."), "no directory {root}/train; fix: .*DIR/val/CLASS/IMAGE"),
    "no val": (partial(remove, "val"), "no directory {root}/val; fix: "),
    "empty val": (partial(empty, "val"), "no class directories in {root}/val; fix: "),
    "empty class": (partial(empty, "train/dog"), r"{root}/train: .*\bdog\b"),
    "empty class in val": (partial(empty, "val/cat"), r"{root}/val: .*\bcat\b"),
    "other class": (partial(rename, "val/dog", "val/fox"), "only in train: dog, only in val: fox"),
    "missing class": (partial(remove, "val/cat"), "only in train: cat"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@SIZES
def test_a_folder_that_is_not_laid_out_right_is_refused(root, name, size):
    spoil, pattern = LAYOUTS[name]
    spoil(root=root)
    refused(run(folder(root, size)), 3, pattern.format(root=re.escape(str(root))))
    assert not saved(root.parent / "run")


@SIZES
def test_another_number_of_classes_is_refused(root, size):
    result = run(folder(root, size, nClasses=3))
    refused(result, 3, "nClasses is 3 but folder has 2 classes; fix: use --nClasses 2")


def bad_labels(label: int) -> None:
    def spoiling(make):
        def spoilt(*args):
            images = make(*args)
            images.labels[-1] = label
            return images

        return spoilt

    replace("make images up", spoiling)


@pytest.mark.parametrize("label", [-100, 3])
def test_a_label_that_is_no_class_is_refused_before_the_first_step(tmp_path, label):
    result = run(tiny(nEpochs=1, save=tmp_path), partial(bad_labels, label))
    refused(result, 3, f"label {label} is not a class from 0 to 2")
    assert not saved(tmp_path)


# Row 44.

DAMAGE = {
    "cut": lambda data: data[:1000],
    "empty": lambda data: b"",
    "garbled": lambda data: b"\x89PNG\r\n\x1a\n" + bytes(1000),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("split", "size", "workers"),
    [("train", SMALL, 0), ("val", SMALL, 0), ("train", LARGE, 1), ("val", LARGE, 0)],
)
def test_an_image_that_cannot_be_read_is_named(root, damage, split, size, workers):
    path = sorted((root / split / "cat").iterdir())[1]
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    result = run(folder(root, size, nThreads=workers))
    refused(result, 3, rf"cannot read image {path}.*; fix: .*--onBadImage skip")


@SIZES
def test_more_than_one_bad_image_in_a_thousand_stops_a_run_that_skips_them(root, size):
    path = min((root / "train" / "dog").iterdir())
    path.write_bytes(b"")
    result = run(folder(root, size, onBadImage="skip"))
    refused(result, 3, rf"1 of 8 images cannot be read, last {path}")
    assert f"note: skipped image {path}" in result.err


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


@pytest.mark.parametrize(
    "data",
    [WHOLE[:-20], WHOLE + b"more", b"<!DOCTYPE html><html>not found</html>", b""],
    ids=["truncated", "changed", "web page", "empty"],
)
def test_an_archive_that_is_not_the_published_one_is_refused(tmp_path, data):
    root = tmp_path / "data"
    path = root / "cifar-10-python.tar.gz"
    pattern = (
        rf"{path} has md5 {md5(data)}, expected {md5(WHOLE)}; fix: delete {path} and run again"
    )
    refused(unpacked(root, data, WHOLE), 3, pattern)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    made = entry(name, kind=kind)
    made.linkname = target
    return made


def hostile_archives(outside: Path) -> dict[str, list[tarfile.TarInfo]]:
    """Entries that write `outside` of an archive where it is unpacked without a filter."""
    script = entry(f"{FOLDER}/../../outside", 1)
    script.mode = 0o6755
    return {
        "upwards": [entry(f"{FOLDER}/../../outside", 1)],
        "far up": [entry(f"{FOLDER}/{'../' * 9}{str(outside)[1:]}", 1)],
        "absolute": [entry(str(outside), 1)],
        "two slashes": [entry(f"/{outside}", 1)],
        "through a link": [link(f"{FOLDER}/a", ".."), entry(f"{FOLDER}/a/outside", 1)],
        "link": [link(f"{FOLDER}/a", "../../outside")],
        "absolute link": [link(f"{FOLDER}/a", str(outside))],
        "hard link": [link(f"{FOLDER}/a", "../outside", tarfile.LNKTYPE)],
        "long name": [entry(f"{FOLDER}/" + "a/" * 60 + "../" * 62 + "outside", 1)],
        "folder": [entry(f"{FOLDER}/../outside", kind=tarfile.DIRTYPE)],
        "set-user-id": [script],
        "device": [entry(f"{FOLDER}/a", kind=tarfile.BLKTYPE)],
        "pipe": [entry(f"{FOLDER}/a", kind=tarfile.FIFOTYPE)],
    }


@pytest.mark.parametrize("name", hostile_archives(Path("/outside")))
def test_an_archive_that_reaches_outside_itself_is_refused(tmp_path, name):
    entries = hostile_archives(tmp_path / "outside")[name]
    data = tar_gz(*[(part, b"x" * part.size) for part in entries])
    refused(unpacked(tmp_path / "data", data, data), 3, "cannot unpack")


# Row 64.


def hanging_loaders() -> None:
    """Have loader processes never finish one of the images, and wait a second for them."""

    def hanging(decode):
        return lambda path: hang() if str(path).endswith("1.png") else decode(path)

    replace("decode an image", hanging)
    shorten({"wait for a loader process": 1})


@pytest.mark.parametrize("k", [1, 3, 8])  # the eighth: while the others are started
def test_a_loader_process_that_is_killed_ends_the_run(root, k):
    argv = folder(root, nThreads=1, batchSize=1)
    result = run(argv, partial(at_batch, kill_a_child, k))
    refused(result, 3, r"loader process was killed or hung: .*; fix: .*--nThreads")


def test_a_loader_process_that_hangs_ends_the_run(root):
    result = run(folder(root, nThreads=1), hanging_loaders)
    refused(result, 3, r"loader process was killed or hung: .*timed out.*; fix: .*--nThreads")


def test_what_was_saved_before_a_loader_process_died_is_intact(root):
    argv = folder(root, nThreads=1, batchSize=1)
    directory, copy = root.parent / "run", root.parent / "copy"
    moments = [partial(at_batch, partial(shutil.copytree, directory, copy), 9),
               partial(at_batch, kill_a_child, 10)]  # fmt: skip
    assert run(argv, partial(both, *moments)).code == 3
    assert newest_step(directory) == 8 and {"model_last.pt", "log.jsonl"} <= saved(copy).keys()
    assert saved(directory) == saved(copy)
    assert run([*argv, "--resume=auto"]).code == 0
