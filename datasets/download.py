"""Download official archives, check them against their published MD5, and unpack them."""

import hashlib
import os
import shutil
import tarfile
import tempfile
import time
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.request import Request, urlopen

from tqdm import tqdm

from errors import DataError, StorageError
from fileio import limits
from fileio.atomic import NO_SPACE, storage_error

TIMEOUT_S = 60  # without an answer of the server
MAX_TRIES, RETRY_DELAY_S = 3, 5  # of a download, and seconds between them
# Unpacking may take UNPACK_S of CPU time and 1 s per UNPACK_RATE bytes: CIFAR needs a fraction.
UNPACK_S, UNPACK_RATE = 4, 2**23
MAX_FILES, MAX_BYTES = 1000, 2**28  # files in an archive, bytes in each


def fetch(url: str, path: Path, md5: str) -> Path:
    """Download `url` to `path` if it is absent, and check its MD5; return `path`.

    Raises:
        DataError: the download failed, or the file is not the published one.
        StorageError: the directory cannot be written.
    """
    if not path.exists():
        _download(url, path, md5)
    _check_md5(path, md5, f"delete {path} and run again")
    return path


def _check_md5(path: Path, md5: str, fix: str) -> None:
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
        # A partial file has another name, so that it never passes for the archive.
        partial = Path(tempfile.mkdtemp(prefix=".download-", dir=path.parent))
    except OSError as error:
        what = f"cannot write {path.parent}: {error.strerror}"
        raise StorageError(what, "name another --data") from error
    fix = f"put the file at {path.absolute()}"
    try:
        for retries_left in reversed(range(MAX_TRIES)):
            try:
                _download_rest(url, partial / path.name)
                _check_md5(partial / path.name, md5, fix)
                break
            except (OSError, HTTPException, DataError) as error:
                if getattr(error, "errno", None) in NO_SPACE:
                    raise storage_error(error, path) from error
                if not retries_left:
                    what = f"cannot download {url} in {MAX_TRIES} tries: {error}"
                    raise DataError(what, fix) from error
                if isinstance(error, DataError):  # the MD5 is wrong: start again
                    (partial / path.name).unlink()
            time.sleep(RETRY_DELAY_S)
        os.replace(partial / path.name, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download_rest(url: str, path: Path) -> None:
    """Download the missing rest of a file; on OSError or HTTPException keep what has arrived."""
    offset = path.stat().st_size if path.exists() else 0
    request = Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})  # noqa: S310
    with urlopen(request, timeout=TIMEOUT_S) as response, open(path, "ab") as file:  # noqa: S310
        if response.status != HTTPStatus.PARTIAL_CONTENT:  # the server sends the whole file
            file.truncate(0)
        with tqdm(total=response.length, unit="B", unit_scale=True, disable=None) as progress:
            while part := response.read(2**20):
                file.write(part)
                progress.update(len(part))
    if response.length:
        raise ConnectionError(f"{response.length} bytes are missing")


def unpack(archive: Path, folder: str) -> None:
    """Unpack `folder` of a tar archive beside it, all or nothing.

    Raises:
        DataError: the archive is damaged, lacks `folder`, names files outside itself, or unpacks
            to more than a dataset can have.
    """
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".unpack-", dir=archive.parent) as partial,
            limits.time_limit(UNPACK_S + archive.stat().st_size / UNPACK_RATE),
            limits.memory_limit(2**28),
        ):
            with tarfile.open(archive) as tar:
                _check_members(tar)
                tar.extractall(partial, filter="data")
            os.replace(Path(partial) / folder, archive.parent / folder)
    except Exception as error:  # parsers raise any type on damaged or hostile bytes
        if getattr(error, "errno", None) in NO_SPACE:
            raise storage_error(error, archive) from error
        what = f"cannot unpack {archive}: {str(error) or 'no memory for it'}"
        raise DataError(what, f"delete {archive} and run again") from error


def _check_members(tar: tarfile.TarFile) -> None:
    """Raise TarError on links, devices, paths outside the archive, and too much data."""
    for count, member in enumerate(tar):
        if count >= MAX_FILES or member.size > MAX_BYTES:
            raise tarfile.TarError(f"{member.name} is too large, or one too many")
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or not (member.isreg() or member.isdir()):
            raise tarfile.TarError(f"{member.name} is not a plain file inside it")
