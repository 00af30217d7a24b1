"""Command lines of the tools: a few flags of their own, arguments, and perhaps main.py's flags."""

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
        options: the values of the tool's flags by name.
        arguments: what is no flag and no flag's value, in its order.
        main_flags: flags of main.py as they would be given to it.
    """

    options: SimpleNamespace
    arguments: list[str]
    main_flags: list[str]


def read(
    argv: list[str],
    flags: dict[str, Flag],
    *,
    arguments: str = "",
    least: int = 1,
    main_flags: bool = False,
) -> Command:
    """Read the flags of a tool, and of main.py where the tool passes them on.

    A request for help is answered by `run`, before this.

    Args:
        arguments: what they are called in the message when there is none; "": there must be none.
        least: 0 where arguments may be left out.
        main_flags: take main.py's flags too; they are not checked here.

    Raises:
        UsageError: every problem of the flags at once.
    """
    others = opts.FLAGS.keys() - flags.keys() if main_flags else set()
    parser = FlagParser(flags | {name: opts.FLAGS[name] for name in others})
    found: list[str] | None = [] if arguments else None
    raw = parser.parse_argv(argv, found)
    parser.add([flag for flag in raw if flag[0] not in others])
    problems = parser.problems
    if arguments and len(found) < least:
        problems.insert(0, (f"no {arguments}", f"name at least one {arguments}"))
    if problems:
        raise UsageError.from_problems(problems)
    values = {name: flag.default for name, flag in flags.items()} | parser.values
    passed_on = [f"--{name}={value}" for name, value, _ in raw if name in others]
    return Command(SimpleNamespace(**values), found or [], passed_on)


def run(
    argv: list[str],
    usage: str,
    flags: dict[str, Flag],
    function: Callable[[list[str]], int | None],
    main_flags: bool = False,
) -> int:
    """The main function of a tool: help, or its work; the exit code, 0 or that of its error.

    Args:
        function: gets `argv`, and returns an exit code where it is not 0.
        main_flags: show main.py's flags in the help, too.
    """
    if {"-h", "-help", "--help"} & set(argv):
        groups = {"Options": list(flags.values())} | (opts.GROUPS if main_flags else {})

        def function(argv: list[str]) -> None:
            print(help_text(usage, groups))

    try:
        code = function(argv) or 0
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
