"""Files that are replaced whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from errors import StorageError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def atomic_write(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash at any moment leaves the old file or the new one.

    Temporary file, fsync, rename, fsync of the directory (faults 4, 5 and 11 of docs/faults.md).
    `path` may be a link: the link is replaced, never what it points to.

    Raises:
        StorageError: the disk is full or cannot be written; the temporary file is gone.
    """
    with atomic_open(path, len(data)) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_open(path: Path, size: int = 0) -> Iterator[IO[bytes]]:
    """The same for a file that is written little by little: it replaces `path` at the end.

    Args:
        size: in bytes, for the message when there is no room; 0 where it is not known.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError):
            raise storage_error(error, path, size) from error
        raise


def storage_error(error: OSError, path: Path, size: int = 0) -> StorageError:
    """What a person can do about an operating system's refusal to write `path`."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return StorageError(
            f"cannot write {path}: {error.strerror}", "allow more of them with ulimit -n"
        )
    if error.errno in NO_SPACE:
        free = shutil.disk_usage(path.parent).free
        need = f"{path.name} needs {size / 1e6:.1f} MB, has {free / 1e6:.1f} MB"
        stats = os.statvfs(path.parent)
        if stats.f_files and not stats.f_favail:  # some file systems count none
            need = f"{path.name} needs a file, the disk has none left"
        return StorageError(
            f"no space in {path.parent}: {need} ({error.strerror})",
            "free space, or choose another disk with --save or --data",
        )
    fix = "check the disk, or write elsewhere: --save, --output"
    return StorageError(f"cannot write {path}: {error.strerror or error}", fix)


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # a failing disk may refuse; the next start sweeps it
        path.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    """The JSON object in a file, {} when there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
