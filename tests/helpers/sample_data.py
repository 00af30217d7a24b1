"""Write small datasets for the tests to disk, in the formats of the real ones."""

import hashlib
import io
import pickle
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

import datasets.factory
from datasets.factory import DataSplits
from engine.precision import PRECISIONS
from errors import DataError, RunError

CIFAR_KINDS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def create_data(opt: SimpleNamespace, warn=pytest.fail, **more) -> DataSplits:
    """Create the data of settings on the CPU, with images in the type of their precision."""
    dtype = PRECISIONS[opt.precision].dtype
    return datasets.factory.create(opt, torch.device("cpu"), warn, dtype=dtype, **more)


def read_all(loader) -> tuple[torch.Tensor, list[int]]:
    """Return all images and class numbers of the first epoch of a loader."""
    images, targets = zip(*loader.batches(1), strict=True)
    return torch.cat(images), torch.cat(targets).tolist()


def same_batches(some: list, others: list) -> bool:
    """Return whether two lists of (images, targets) are equal to the last bit."""
    return len(some) == len(others) and all(
        torch.equal(images, wanted) and torch.equal(targets, labels)
        for (images, targets), (wanted, labels) in zip(some, others, strict=True)
    )


def error_line(call, *args, of: type[RunError] = DataError) -> str:
    """Return the one line that a user reads when `call(*args)` raises a RunError."""
    with pytest.raises(of) as error:
        call(*args)
    line = error.value.report()
    assert re.fullmatch("error: [^\n]+; fix: [^\n]+", line)
    return line


def noise(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Make (N, size, size, 3) uint8: pictures that no shift or mirror makes alike."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def md5(data: bytes) -> str:
    """Compute the checksum as the datasets' publishers give it."""
    return hashlib.md5(data).hexdigest()


def write_folder(root: Path, counts: dict[str, dict[str, int]], size: int = 8) -> dict:
    """Write `{split: {class: images}}` as PNG; {split: (pixels, class numbers)} in file order."""
    written = {}
    for seed, (split, classes) in enumerate(counts.items()):
        labels = [label for label, name in enumerate(sorted(classes)) for _ in range(classes[name])]
        pixels = noise(len(labels), size, seed)
        for i, label in enumerate(labels):
            path = root / split / sorted(classes)[label] / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(path)
        for name in classes:  # also those without an image
            (root / split / name).mkdir(parents=True, exist_ok=True)
        written[split] = (pixels, labels)
    return written


def tar_gz(files: dict[str, bytes], extra: list[tarfile.TarInfo] = ()) -> bytes:
    """Make an archive of some files and of bare entries: links, devices."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        for entry in extra:
            tar.addfile(entry)
    return buffer.getvalue()


def cifar_files(name: str, train: tuple, test: tuple) -> dict[str, bytes]:
    """Return the files of CIFAR-10 (five parts) or CIFAR-100 by path; pixels as `noise` has."""
    kind = CIFAR_KINDS[name]
    key = "labels" if name == "cifar10" else "fine_labels"
    files = {}
    for part_names, (pixels, labels) in ((kind.train_list, train), (kind.test_list, test)):
        parts = np.array_split(np.arange(len(labels)), len(part_names))
        for (part_name, _), part in zip(part_names, parts, strict=True):
            rows = pixels[part].transpose(0, 3, 1, 2).reshape(len(part), -1)  # planes R, G, B
            content = {"data": rows, key: [int(labels[i]) for i in part]}
            if name == "cifar100":
                content["coarse_labels"] = [0] * len(part)
            files[f"{kind.base_folder}/{part_name}"] = pickle.dumps(content, protocol=2)
    names = {kind.meta["key"]: [f"class {i}" for i in range(10 if name == "cifar10" else 100)]}
    files[f"{kind.base_folder}/{kind.meta['filename']}"] = pickle.dumps(names, protocol=2)
    return files


def publish_cifar(monkeypatch, name: str, files: dict[str, bytes], archive: bytes) -> None:
    """Make the checksums of `files` and of `archive` the published ones."""
    kind = CIFAR_KINDS[name]
    checksums = {path.partition("/")[2]: md5(data) for path, data in files.items()}
    for part_names in ("train_list", "test_list"):
        parts = [[part, checksums[part]] for part, _ in getattr(kind, part_names)]
        monkeypatch.setattr(kind, part_names, parts)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": checksums[kind.meta["filename"]]})
    monkeypatch.setattr(kind, "tgz_md5", md5(archive))


def write_cifar(root: Path, monkeypatch, name: str, train: tuple, test: tuple) -> Path:
    """Write CIFAR's archive, with the published checksums changed to its own."""
    files = cifar_files(name, train, test)
    archive = tar_gz(files)
    publish_cifar(monkeypatch, name, files, archive)
    path = root / CIFAR_KINDS[name].filename
    path.write_bytes(archive)
    return path


def write_svhn(root: Path, monkeypatch, parts: dict[str, tuple]) -> None:
    """Write SVHN's files, `{split: (pixels, digits)}`; set the published checksums to theirs.

    The digit 0 has the label 10 there, and the image number is the last axis.
    """
    checksums = {}
    for split, (url, filename, _) in SVHN.split_list.items():
        pixels, digits = parts[split]
        labels = np.where(np.array(digits) == 0, 10, digits).astype(np.uint8)[:, None]
        scipy.io.savemat(root / filename, {"X": pixels.transpose(1, 2, 3, 0), "y": labels})
        checksums[split] = [url, filename, md5((root / filename).read_bytes())]
    monkeypatch.setattr(SVHN, "split_list", checksums)
