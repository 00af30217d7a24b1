"""The errors that a user can cause or meet, with their exit codes. A bug exits with 1."""


class RunError(Exception):
    """An error that is reported in one line with its fix, without a traceback.

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
    """A flag or config file is invalid."""

    code = 2

    @classmethod
    def from_problems(cls, problems: list[tuple[str, str]]) -> "UsageError":
        """Report all problems of a command line at once: (what, fix) pairs."""
        error = cls(*problems[0])
        error.problems = list(problems)
        return error


class DataError(RunError):
    """The dataset is missing, damaged or not as the settings say."""

    code = 3


class CheckpointError(RunError):
    """A checkpoint is missing, damaged or of another network."""

    code = 4


class DamagedError(CheckpointError):
    """A checkpoint differs from what was written."""


class NonFiniteError(RunError):
    """A loss is NaN or infinite."""

    code = 5


class StorageError(RunError):
    """The run directory cannot be written."""

    code = 6


class OutOfMemoryError(RunError):
    """A step needs more memory than there is."""

    code = 6


class BusyError(RunError):
    """Another process is writing the run directory."""

    code = 7


class PeerError(RunError):
    """Another process of the run is lost, hangs or does not join."""

    code = 8


class Preempted(RunError):
    """The run stopped at a signal after it saved its state: run it again with --resume."""

    code = 75
    template = "stopped: {}; to go on: {}"


def printable(line: str) -> str:
    """Escape control characters: file names and YAML keys may hold line breaks."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
