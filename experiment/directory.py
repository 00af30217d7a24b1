"""Lock a run directory against a second writer, and write its status.json."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from errors import BusyError, Preempted, RunError, StorageError
from experiment.console import warn
from fileio.atomic import NO_LOCKS, atomic_write, read_json, storage_error


def check_writable(directory: Path) -> None:
    """Raise StorageError if `directory` cannot be created or written; create nothing."""
    ancestor = directory.absolute()
    while not os.path.lexists(ancestor):
        ancestor = ancestor.parent
    is_directory = ancestor.is_dir()
    if not is_directory or not os.access(ancestor, os.W_OK | os.X_OK):
        what = "cannot write in" if is_directory else "not a directory:"
        raise StorageError(f"{what} {ancestor}", "name another run directory with --save")


class RunDirectory:
    """Hold the directory of one run, locked against a second writer until the `with` ends.

    Raises:
        StorageError: it cannot be created or written.
        BusyError: another process has locked it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._status: dict[str, object] = {}
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "a+")  # noqa: SIM115 (held until close)
            self._acquire_lock()
            for temporary in path.glob(".*.tmp"):  # of a process that was killed while writing
                temporary.unlink()
        except OSError as error:
            raise storage_error(error, path) from error

    def _acquire_lock(self) -> None:
        # A POSIX record lock: the kernel releases it when the process ends in any way, and loader
        # processes that are forked later do not inherit it, as they would with flock.
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = self._read_owner() or "another process"
                self._lock.close()
                what = f"run directory {self.path} is in use by {owner}"
                raise BusyError(what, "wait for it to end, or choose another --save") from None
            if error.errno not in NO_LOCKS:
                raise storage_error(error, self.path / ".lock") from error
            # `verify_lock` still stops the process that came first.
            what = f"the disk of {self.path} has no locks ({error.strerror})"
            warn(f"{what}: start no second process on this run")
        self._lock.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self._owner = f"host {socket.gethostname()}, process {os.getpid()}, since {started}"
        self._lock.write(f"{self._owner}\n")
        self._lock.flush()

    def _read_owner(self) -> str:
        self._lock.seek(0)
        return self._lock.read().strip()

    def verify_lock(self) -> None:
        """Raise BusyError if a process of another machine has overwritten the lock file.

        A network file system may share the file's content between machines, and not the lock.
        """
        owner = self._read_owner()
        if owner != self._owner:
            self._status.clear()  # the other process writes the run's outcome
            what = f"run directory {self.path} was taken over by {owner or 'an unknown process'}"
            raise BusyError(what, "let that one end the run")

    def write_json(self, name: str, value: object) -> None:
        """Write a small JSON file atomically."""
        atomic_write(self.path / name, (json.dumps(value, indent=1) + "\n").encode())

    def write_status(self, state: str, code: int | None = None, **more: object) -> None:
        """Write `status.json`, for programs that cannot see the exit code.

        Args:
            state: running, preempted, failed or done.
            more: fields to add to those written before, such as the last checkpoint.
        """
        self._status |= {"state": state, "code": code, **more}
        self.write_json("status.json", self._status)

    def set_status_fields(self, **more: object) -> None:
        """Add fields to every status that is written from now on."""
        self._status |= more

    def read_status(self) -> dict:
        """Read `status.json`; {} if there is none."""
        return read_json(self.path / "status.json")

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # A start that is refused before it wrote a status leaves the earlier one.
        if "state" in self._status and isinstance(error, Exception):
            self.write_outcome(error)
        self._lock.close()

    def write_outcome(self, error: Exception) -> None:
        """Write the error that ended the run to `status.json`: a RunError, or else a bug."""
        state = "preempted" if isinstance(error, Preempted) else "failed"
        if not isinstance(error, RunError):
            error = RunError(f"a bug: {type(error).__name__}: {error}", "report it")
        with contextlib.suppress(StorageError):  # the disk may be what failed
            self.write_status(state, error.code, reason=str(error), **error.details)


def write_outcome_for_lost_rank(path: Path, error: RunError) -> None:
    """Write the outcome for rank 0, which is lost, if `path` exists on this machine."""
    if path.is_dir():
        with contextlib.suppress(RunError), RunDirectory(path) as directory:
            directory.set_status_fields(**directory.read_status())
            directory.write_outcome(error)
