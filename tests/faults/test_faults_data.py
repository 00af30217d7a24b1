"""Rows 40 to 42, 44, 47 to 49 and 64: data that is missing, damaged, hostile or contradictory."""

import hashlib
import io
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faults.contract import command, refused, saved, tiny
from faults.sabotage import at_batch, both, kill_a_child
from helpers.run_main import run


def photographs(root: Path, classes: str = "cat dog") -> Path:
    """Four training and two validation images of each class."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in classes.split():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 256, (80, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return photographs(tmp_path / "data")


SMALL = {"imageSize": 16, "depth": 10}
LARGE = {"imageSize": 72, "d1": 1, "d2": 1, "d3": 1, "d4": 1, "initChannels": 4}


def folder(root: Path, **flags) -> list[str]:
    settings = {"dataset": "folder", "data": root, "growthRate": 2, "batchSize": 2, "nEpochs": 2,
                "nThreads": 0, "save": root.parent / "run"}  # fmt: skip
    return command(**settings | (flags or SMALL))


def test_the_data_is_good_before_it_is_spoilt(root):
    for size in (SMALL, LARGE):
        result = run(folder(root, **size, save=root.parent / f"run{len(size)}"))
        assert result.code == 0, result


# Rows 40, 47, 48 and 49.


def remove(path: str, root: Path) -> None:
    shutil.rmtree(root / path)


def empty(path: str, root: Path) -> None:
    remove(path, root)
    (root / path).mkdir()


def rename(old: str, new: str, root: Path) -> None:
    (root / old).rename(root / new)


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (partial(remove, "."), r"no directory {root}; fix: use --data DIR with DIR/train/CLASS"),
        (partial(empty, "."), r"no directory {root}/train; fix: .*DIR/val/CLASS/IMAGE"),
        (partial(remove, "train"), r"no directory {root}/train; fix: "),
        (partial(remove, "val"), r"no directory {root}/val; fix: "),
        (partial(empty, "val"), r"no class directories in {root}/val; fix: "),
        (partial(empty, "train/dog"), r"{root}/train: .*\bdog\b"),
        (partial(empty, "val/cat"), r"{root}/val: .*\bcat\b"),
        (partial(rename, "val/dog", "val/fox"), r"only in train: dog, only in val: fox"),
        (partial(remove, "val/cat"), r"only in train: cat"),
    ],
)
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
def test_a_folder_that_is_not_laid_out_right_is_refused(root, spoil, pattern, size):
    spoil(root=root)
    refused(run(folder(root, **size)), 3, pattern.format(root=re.escape(str(root))))
    assert not saved(root.parent / "run")


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
def test_another_number_of_classes_is_refused(root, number, size):
    argv = folder(root, **size, nClasses=number)
    refused(run(argv), 3, f"nClasses is {number} but folder has 2 classes; fix: use --nClasses 2")


def bad_labels(label: int) -> None:
    from datasets import synthetic

    noisy = synthetic._noisy

    def spoilt(*args):
        images = noisy(*args)
        images.labels[-1] = label
        return images

    synthetic._noisy = spoilt


@pytest.mark.parametrize("label", [-100, 3])
def test_a_label_that_is_no_class_is_refused_before_the_first_step(tmp_path, label):
    result = run(tiny(nEpochs=1, save=tmp_path), partial(bad_labels, label))
    refused(result, 3, f"label {label} is not a class from 0 to 2")
    assert not saved(tmp_path)


# Row 44.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def blank(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))


@pytest.mark.parametrize("spoil", [cut, blank, garble])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("size", "workers"), [(SMALL, 0), (LARGE, 0), (LARGE, 1)])
def test_an_image_that_cannot_be_read_is_named(root, spoil, split, size, workers):
    path = root / split / "cat" / "1.png"
    spoil(path)
    result = run(folder(root, **size | {"nThreads": workers}))
    refused(result, 3, rf"cannot read image {path}.*; fix: .*--onBadImage skip")


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
def test_more_than_one_bad_image_in_a_thousand_stops_a_run_that_skips_them(root, size):
    path = root / "train" / "dog" / "0.png"
    cut(path)
    result = run(folder(root, **size, onBadImage="skip"))
    refused(result, 3, rf"1 of 8 images cannot be read, last {path}")
    assert f"note: skipped image {path}" in result.err


# Rows 41 and 42.


def archive(*entries: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for entry in entries:
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    return file.getvalue()


def entry(name: str, **attributes) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made


def published_as(md5: str) -> None:
    """Take an archive that the test wrote for the official one."""
    from torchvision.datasets import CIFAR10

    CIFAR10.tgz_md5 = md5


CIFAR = {"dataset": "cifar10", "imageSize": None, "nImages": None, "nClasses": None}
WHOLE = archive(entry("cifar-10-batches-py/data_batch_1", size=10_000))


@pytest.mark.parametrize(
    "data",
    [WHOLE[:-20], WHOLE + b"more", b"<!DOCTYPE html><html>not found</html>", b""],
    ids=["truncated", "changed", "web page", "empty"],
)
def test_an_archive_that_is_not_the_published_one_is_refused(tmp_path, data):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(data)
    found, expected = (hashlib.md5(content).hexdigest() for content in (data, WHOLE))
    argv = tiny(**CIFAR, data=tmp_path, save=tmp_path / "run")
    result = run(argv, partial(published_as, expected))
    pattern = rf"{path} has md5 {found}, expected {expected}; fix: delete {path} and run again"
    refused(result, 3, pattern)
    assert {item.name for item in tmp_path.iterdir()} == {path.name, "run"}


FOLDER = "cifar-10-batches-py"


def hostile(name: str, outside: Path) -> tarfile.TarInfo:
    return {
        "upwards": entry(f"{FOLDER}/../../outside", size=1),
        "absolute": entry(str(outside), size=1),
        "link": entry(f"{FOLDER}/link", type=tarfile.SYMTYPE, linkname="../../outside"),
        "hard link": entry(f"{FOLDER}/link", type=tarfile.LNKTYPE, linkname="../../outside"),
        "device": entry(f"{FOLDER}/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        "pipe": entry(f"{FOLDER}/pipe", type=tarfile.FIFOTYPE),
    }[name]


@pytest.mark.parametrize("name", ["upwards", "absolute", "link", "hard link", "device", "pipe"])
def test_an_archive_that_reaches_outside_itself_is_refused(tmp_path, name):
    root = tmp_path / "data"
    root.mkdir()
    folder = entry(FOLDER, type=tarfile.DIRTYPE, mode=0o755)
    data = archive(folder, hostile(name, tmp_path / "outside"))
    (root / "cifar-10-python.tar.gz").write_bytes(data)
    argv = tiny(**CIFAR, data=root, save=tmp_path / "run")
    result = run(argv, partial(published_as, hashlib.md5(data).hexdigest()))
    refused(result, 3, "cannot unpack")
    assert {item.name for item in tmp_path.iterdir()} == {"data", "run"}
    assert {item.name for item in root.iterdir()} == {"cifar-10-python.tar.gz"}


# Row 64.


def hang() -> None:
    """Loader processes that never finish one of the images, and little patience with them."""
    import time

    from datasets import file_loader

    decode = file_loader.decode

    def slow(path):
        if str(path).endswith("1.png"):
            time.sleep(600)
        return decode(path)

    file_loader.decode, file_loader.WORKER_TIMEOUT_S = slow, 1


@pytest.mark.parametrize("k", [1, 2, 3, 8])  # the eighth: while the others are started
def test_a_loader_process_that_is_killed_ends_the_run(root, k):
    argv = folder(root, **LARGE | {"nThreads": 1, "batchSize": 1})
    result = run(argv, partial(at_batch, kill_a_child, k), timeout_s=30)
    refused(result, 3, r"loader process was killed or hung: .*; fix: .*--nThreads")


def test_a_loader_process_that_hangs_ends_the_run(root):
    result = run(folder(root, **LARGE | {"nThreads": 1}), hang, timeout_s=30)
    refused(result, 3, r"loader process was killed or hung: .*timed out.*; fix: .*--nThreads")


def test_what_was_saved_before_a_loader_process_died_is_intact(root):
    argv = folder(root, **LARGE | {"nThreads": 1, "batchSize": 1})
    directory = root.parent / "run"
    copy = partial(keep_a_copy, directory)
    moments = partial(at_batch, copy, 9), partial(at_batch, kill_a_child, 10)
    result = run(argv, partial(both, *moments), timeout_s=30)
    assert result.code == 3
    before = saved(directory.with_suffix(".copy"))
    assert before.keys() >= {"checkpoint_000000008.pt", "model_last.pt", "log.jsonl"}
    assert saved(directory) == before
    assert run([*argv, "--resume=auto"]).code == 0


def keep_a_copy(directory: Path) -> None:
    shutil.copytree(directory, directory.with_suffix(".copy"))
