"""What can go wrong for a person, each kind with its exit code. A bug keeps its traceback and 1."""


class RunError(Exception):
    """A failure with a cause and a remedy: one line on standard error, no traceback.

    Args:
        what: what is wrong, with the value or path.
        fix: what to do about it.
        details: plain values that status.json gets as well.
    """

    code = 1

    def __init__(self, what: str, fix: str, **details: object):
        self.problems = [(what, fix)]
        self.details = details  # for status.json
        super().__init__(what)

    def report(self) -> str:
        """One line per problem: `error: WHAT; fix: FIX`."""
        lines = (f"error: {what}; fix: {fix}" for what, fix in self.problems)
        return "\n".join(printable(line) for line in lines)


class UsageError(RunError):
    """Flags or a config file that cannot be run."""

    code = 2

    @classmethod
    def from_problems(cls, problems: list[tuple[str, str]]) -> "UsageError":
        """All problems of a command line at once: (what, fix) pairs."""
        error = cls(*problems[0])
        error.problems = list(problems)
        return error


class DataError(RunError):
    """A dataset that is missing, damaged or not what the settings say."""

    code = 3


class CheckpointError(RunError):
    """A checkpoint that is missing, damaged or made for another network."""

    code = 4


class DamagedError(CheckpointError):
    """A checkpoint that is not what was once written."""


class NonFiniteError(RunError):
    """A loss that is NaN or infinite."""

    code = 5


class StorageError(RunError):
    """A run directory that cannot be written."""

    code = 6


class OutOfMemoryError(RunError):
    """A step that needs more memory than there is."""

    code = 6


class BusyError(RunError):
    """A run directory that another process is writing."""

    code = 7


class PeerError(RunError):
    """A process of a run of several that is lost, hangs or cannot be met."""

    code = 8


class Preempted(RunError):
    """A run that was asked to stop and saved its state first: run it again with --resume."""

    code = 75

    def report(self) -> str:
        """One line, which is no error."""
        (what, fix) = self.problems[0]
        return printable(f"stopped: {what}; to go on: {fix}")


def printable(line: str) -> str:
    """A line as one line: file names and YAML keys may hold line breaks and terminal codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
