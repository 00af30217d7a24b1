"""Command lines of the tools: a few flags of their own, operands, and perhaps main.py's flags."""

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import opts
from cli.flag_reader import FlagParser
from cli.flag_types import Flag, help_text
from errors import RunError, UsageError

ROOT = Path(__file__).resolve().parents[1]  # of the project, whatever the current directory


@dataclass(frozen=True)
class Command:
    """What a command line asks for.

    Args:
        own: the values of the tool's flags by name.
        operands: what is no flag and no flag's value, in its order.
        network: flags of main.py as they would be given to it.
    """

    own: SimpleNamespace
    operands: list[str]
    network: list[str]


def read(
    argv: list[str],
    flags: dict[str, Flag],
    *,
    operands: str = "",
    least: int = 1,
    network: bool = False,
) -> Command:
    """Read the flags of a tool, and of main.py where the tool passes them on.

    A request for help is answered by `run`, before this.

    Args:
        operands: what they are called in the message when there is none; "": there must be none.
        least: 0 where operands may be left out.
        network: take main.py's flags too; they are not checked here.

    Raises:
        UsageError: every problem of the flags at once.
    """
    others = opts.FLAGS.keys() - flags.keys() if network else set()
    parser = FlagParser(flags | {name: opts.FLAGS[name] for name in others})
    found: list[str] | None = [] if operands else None
    raw = parser.parse_argv(argv, found)
    parser.add([flag for flag in raw if flag[0] not in others])
    problems = parser.problems
    if operands and len(found) < least:
        problems.insert(0, (f"no {operands}", f"name at least one {operands}"))
    if problems:
        raise UsageError.from_problems(problems)
    values = {name: flag.default for name, flag in flags.items()} | parser.values
    passed_on = [f"--{name}={value}" for name, value, _ in raw if name in others]
    return Command(SimpleNamespace(**values), found or [], passed_on)


def run(
    argv: list[str],
    usage: str,
    flags: dict[str, Flag],
    work: Callable[[list[str]], int | None],
    network: bool = False,
) -> int:
    """The main function of a tool: help, or its work; the exit code, 0 or that of its error.

    Args:
        work: gets `argv`, and returns an exit code where it is not 0.
        network: show main.py's flags in the help, too.
    """
    if {"-h", "-help", "--help"} & set(argv):
        groups = {"Options": list(flags.values())} | (opts.GROUPS if network else {})

        def work(argv: list[str]) -> None:
            print(help_text(usage, groups))

    try:
        code = work(argv) or 0
        print(end="", flush=True)
        return code
    except BrokenPipeError:  # `| head` is no error, and there is nobody to print to
        sys.stdout = None
        return 0
    except RunError as error:
        print(error.report(), file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
