"""Define the errors that a user can cause or encounter. A bug exits with code 1."""

import os
import shlex


class RunError(Exception):
    """Report an error in one line with its fix, without a traceback.

    Args:
        what: what is wrong, with the value or path.
        fix: what the user can do about it.
        details: plain values for status.json.
    """

    code = 1
    template = "error: {}; fix: {}"

    def __init__(self, what: str, fix: str, **details: object):
        self.problems = [(what, fix)]
        self.details = details
        super().__init__(what)

    def report(self) -> str:
        """Format one line per problem."""
        return "\n".join(printable(self.template.format(*problem)) for problem in self.problems)


class UsageError(RunError):
    """Report that a flag or config file is invalid."""

    code = 2

    @classmethod
    def raise_for(cls, problems: list[tuple[str, str]]) -> None:
        """Raise all problems of a command line, (what, fix) each, as one error if there are any."""
        if problems:
            error = cls(*problems[0])
            error.problems = list(problems)
            raise error


class DataError(RunError):
    """Report that the dataset is missing, damaged or not as the settings say."""

    code = 3


class CheckpointError(RunError):
    """Report that a checkpoint is missing, damaged or of another network."""

    code = 4


class DamagedError(CheckpointError):
    """Report that a checkpoint differs from what was written."""


class NonFiniteError(RunError):
    """Report that a loss or gradient is NaN or infinite."""

    code = 5


class StorageError(RunError):
    """Report that the run directory cannot be written."""

    code = 6


class OutOfMemoryError(RunError):
    """Report that a step needs more memory than there is."""

    code = 6


class BusyError(RunError):
    """Report that another process is writing the run directory."""

    code = 7


class PeerError(RunError):
    """Report that another process of the run is lost, hangs or does not join."""

    code = 8


class Preempted(RunError):
    """Report that the run stopped at a signal, with its state saved; --resume continues."""

    code = 75
    template = "stopped: {}; to go on: {}"


def printable(line: str) -> str:
    """Escape control characters: file names and YAML keys may hold line breaks."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def quoted(path: object) -> str:
    """Quote a path for the shell, in one line: control characters as in $'line\\nbreak'."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    escapes = {"\\": "\\\\", "'": "\\'"}

    def escaped(c: str) -> str:
        return c if c.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(c))

    return "$'" + "".join(escapes.get(c, escaped(c)) for c in text) + "'"
