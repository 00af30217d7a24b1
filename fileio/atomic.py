"""Write files atomically: a crash leaves the old file or the new one."""

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
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of Lustre without flock, NFS, FUSE
NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # of CIFS, FUSE


def atomic_write(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`.

    Writes a temporary file, syncs and renames it, and syncs the directory (docs/faults.md, rows 4,
    5 and 11). If `path` is a link, the link is replaced, not its target.

    Raises:
        StorageError: the disk is full or not writable; the temporary file is removed.
    """
    with atomic_open(path, len(data)) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_open(path: Path, size: int = 0) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` when the block ends, as atomic_write does.

    Args:
        size: bytes to be written, for the message if the disk is full; 0 if unknown.
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
        with contextlib.suppress(OSError):  # on a failing disk the next start removes it
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise storage_error(error, path, size) from error
        raise


def move_together(made: list[Path], places: list[Path]) -> None:
    """Move files that belong together, or a directory, to places on the same file system.

    The first place is emptied first, and filled last: a crash leaves none that looks complete.

    Raises:
        StorageError: one cannot be synced or moved.
    """
    try:
        for part in (part for path in made for part in (path, *path.rglob("*"))):
            sync_directory(part)  # a full disk shows here at the latest
        if len(made) > 1:
            places[0].unlink(missing_ok=True)
        for pair in reversed([*zip(made, places, strict=True)]):
            os.replace(*pair)
        sync_directory(places[0].parent)
    except OSError as error:
        raise storage_error(error, places[0]) from error


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, unless it exists; or raise StorageError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: Path, size: int = 0) -> StorageError:
    """Turn an OSError on writing `path` into an error that names the fix."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return StorageError(
            f"cannot write {path}: {error.strerror}", "allow more of them with ulimit -n"
        )
    if error.errno in NO_SPACE:
        free = shutil.disk_usage(path.parent).free
        need = f"{path.name} needs {size / 1e6:.1f} MB, has {free / 1e6:.1f} MB"
        stats = os.statvfs(path.parent)
        if stats.f_files and not stats.f_favail:  # some file systems report 0
            need = f"{path.name} needs a file, the disk has none left"
        return StorageError(
            f"no space in {path.parent}: {need} ({error.strerror})",
            "free space, or choose another disk with --save or --data",
        )
    fix = "check the disk, or write elsewhere: --save, --output"
    return StorageError(f"cannot write {path}: {error.strerror or error}", fix)


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power loss, if the file system can sync directories."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict:
    """Read the JSON object in a file; {} if the file is missing or holds none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
