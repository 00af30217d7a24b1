"""Download official archives, check them against their published MD5, and unpack them."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from errors import DataError, StorageError, quoted
from fileio import limits
from fileio.atomic import NO_LOCKS, NO_SPACE, storage_error

TIMEOUT_S = 60  # without an answer of the server
MAX_TRIES, RETRY_DELAY_S = 3, 5  # of a download, and seconds between them
LOCK_DELAY_S = 0.5  # between looks at the lock of another process
# Unpacking may take UNPACK_S of CPU time and 1 s per UNPACK_RATE bytes: CIFAR needs a fraction.
UNPACK_S, UNPACK_RATE = 4, 2**23
OF_THE_DISK = (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE)
MAX_FILES, MAX_BYTES = 1000, 2**28  # files in an archive, bytes in each


def fetch(url: str, path: Path, md5: str) -> Path:
    """Download `url` to `path` if it is absent, and check its MD5; return `path`.

    Raises:
        DataError: the download failed, or the file is not the published one.
        StorageError: the directory cannot be written.
    """
    if not path.exists():
        _download(url, path, md5)
    _check_md5(path, md5, f"delete {quoted(path)} and run again")
    return path


def _check_md5(path: Path, md5: str, fix: str) -> None:
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        what = f"cannot read {path}: {error.strerror}"
        raise DataError(what, "make it a readable file, or name another --data") from error
    if found != md5:
        raise DataError(f"{path} has md5 {found}, expected {md5}", fix)


def _download(url: str, path: Path, md5: str) -> None:
    partial = path.with_name(f".{path.name}.part")  # a name that never passes for the archive
    with _locked(partial, f"download {path.name}"):
        if path.exists():  # from the process that had the lock before
            return
        for earlier in path.parent.glob(".download-*"):  # where earlier versions kept their parts
            shutil.rmtree(earlier, ignore_errors=True)
        _download_in_tries(url, partial, md5, f"put the file at {path.absolute()}")
        os.replace(partial, path)


@contextlib.contextmanager
def _locked(path: Path, purpose: str) -> Iterator[None]:
    """Create a file if it is absent, and lock it; in the end remove it if it is empty.

    Another process waits. The kernel releases the lock of one that is killed.

    Raises:
        StorageError: the directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_and_lock(path)
        while not _is_at(path, file):
            file.close()  # the process that had the lock has renamed or removed the file
            file = _open_and_lock(path)
    except OSError as error:
        what = f"cannot {purpose}: cannot write {path.parent}: {error.strerror}"
        raise StorageError(what, "make it writable, or name another --data") from error
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):  # as where it was renamed
                if _is_at(path, file) and not path.stat().st_size:
                    path.unlink()


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _open_and_lock(path: Path) -> IO[bytes]:
    file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
    desc = f"waiting for another process: {path.name}"
    with tqdm(desc=desc, bar_format="{desc}, {elapsed}", delay=1, disable=None) as shown:
        while True:
            try:
                # Unlike a POSIX lock, it stays when the file is opened and closed once more.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                time.sleep(LOCK_DELAY_S)
                shown.refresh()
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                return file  # where two start at once, both may download; the MD5 decides


def _download_in_tries(url: str, partial: Path, md5: str, fix: str) -> None:
    """Continue a download until the file is the published one; raise RunError if it will not be."""
    for retries_left in reversed(range(MAX_TRIES)):
        try:
            _download_rest(url, partial)
            return _check_md5(partial, md5, fix)
        except (OSError, HTTPException, DataError) as error:
            if getattr(error, "errno", None) in NO_SPACE:
                raise storage_error(error, partial) from error
            if isinstance(error, DataError):  # the MD5 is wrong: start again
                os.truncate(partial, 0)
            if not retries_left:
                kept = partial.stat().st_size
                again = f"run again to continue at {kept / 1e6:.1f} MB, or " if kept else ""
                what = f"cannot download {url} in {MAX_TRIES} tries: {error}"
                raise DataError(what, again + fix) from error
        time.sleep(RETRY_DELAY_S)
    return None


def _download_rest(url: str, path: Path) -> None:
    """Download the missing rest of a file; on OSError or HTTPException keep what has arrived."""
    offset = path.stat().st_size if path.exists() else 0
    request = Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})  # noqa: S310
    try:
        response = urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
    except HTTPError as error:
        if offset and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is missing, or the file is another: its MD5 tells
        raise
    with response, open(path, "ab") as file:
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
        StorageError: the directory cannot be written.
    """
    purpose, prefix = f"unpack {archive}, which is sound", f".unpack-{folder}-"
    with _locked(archive.with_name(f".{folder}.part"), purpose):
        if (archive.parent / folder).is_dir():  # from the process that had the lock before
            return
        for killed in archive.parent.glob(f"{prefix}*"):
            shutil.rmtree(killed, ignore_errors=True)
        try:
            with (
                tempfile.TemporaryDirectory(prefix=prefix, dir=archive.parent) as partial,
                limits.time_limit(UNPACK_S + archive.stat().st_size / UNPACK_RATE),
                limits.memory_limit(2**28),
            ):
                with tarfile.open(archive) as tar:
                    _check_members(tar)
                    tar.extractall(partial, filter="data")
                os.replace(Path(partial) / folder, archive.parent / folder)
        except Exception as error:  # parsers raise any type on damaged or hostile bytes
            number = getattr(error, "errno", None)
            if number in NO_SPACE:
                raise storage_error(error, archive) from error
            if number in OF_THE_DISK:
                what = f"cannot {purpose}: {error.strerror}"
                raise StorageError(what, "check the disk, or name another --data") from error
            what = f"cannot unpack {archive}: {str(error) or 'no memory for it'}"
            raise DataError(what, f"delete {quoted(archive)} and run again") from error


def _check_members(tar: tarfile.TarFile) -> None:
    """Raise TarError on links, devices, paths outside the archive, and too much data."""
    for count, member in enumerate(tar):
        if count >= MAX_FILES or member.size > MAX_BYTES:
            raise tarfile.TarError(f"{member.name} is too large, or one too many")
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or not (member.isreg() or member.isdir()):
            raise tarfile.TarError(f"{member.name} is not a plain file inside it")
