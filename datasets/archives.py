"""Official archives: found or downloaded, checked against their published sums, then unpacked."""

import hashlib
import os
import shutil
import socket
import tarfile
import tempfile
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from torchvision.datasets.utils import download_url

from errors import DataError, StorageError
from storage import NO_SPACE, storage_error

STALLED_S = 60  # a server that says nothing for so long is given up


def fetch(url: str, path: Path, md5: str) -> Path:
    """The file at `path`, downloaded from `url` with progress when absent, with the right sum.

    Raises:
        DataError: no network, or the file is not the one published.
        StorageError: the directory cannot be written.
    """
    if not path.exists():
        _download(url, path, md5)
    _check(path, md5, f"delete {path} and run again")
    return path


def _check(path: Path, md5: str, fix: str) -> None:
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", fix) from error
    if found != md5:
        raise DataError(f"{path} has md5 {found}, expected {md5}", fix)


def _download(url: str, path: Path, md5: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under another name until it is whole, so that no torso is ever taken for the archive.
        partial = tempfile.mkdtemp(prefix=".download-", dir=path.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {path.parent}: {error.strerror}", "name another --data"
        ) from error
    fix = f"put the file at {path.absolute()}"
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED_S)
    try:
        download_url(url, partial, filename=path.name)
        _check(Path(partial) / path.name, md5, fix)
        os.replace(Path(partial) / path.name, path)
    except (OSError, HTTPException, RuntimeError) as error:  # urllib's errors are OSErrors
        if getattr(error, "errno", None) in NO_SPACE:
            raise storage_error(error, path) from error
        raise DataError(f"cannot download {url}: {error}", fix) from error
    finally:
        socket.setdefaulttimeout(patience)
        shutil.rmtree(partial, ignore_errors=True)


def unpack(archive: Path, folder: str) -> None:
    """Unpack a checked tar archive's `folder` beside it, all or nothing.

    Raises:
        DataError: the archive is damaged, lacks `folder` or names files outside itself.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=archive.parent) as partial:
            with tarfile.open(archive) as tar:
                _check_members(tar)
                tar.extractall(partial, filter="data")
            os.replace(Path(partial) / folder, archive.parent / folder)
    except (tarfile.TarError, OSError, EOFError) as error:
        if getattr(error, "errno", None) in NO_SPACE:
            raise storage_error(error, archive) from error
        raise DataError(
            f"cannot unpack {archive}: {error}", f"delete {archive} and run again"
        ) from error


def _check_members(tar: tarfile.TarFile) -> None:
    """Refuse all that a dataset has no use for: links, devices, paths that lead elsewhere."""
    for member in tar:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or not (member.isreg() or member.isdir()):
            raise tarfile.TarError(f"{member.name} is no plain file inside it")
