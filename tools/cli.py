"""Parse a tool's command line and run the tool: print help and errors, return the exit code."""

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import opts
from cli.flag_reader import FlagParser
from cli.flag_types import Flag, help_text
from errors import RunError, UsageError

ROOT = Path(__file__).resolve().parents[1]  # of the project, whatever the current directory


class Command(NamedTuple):
    """Hold a parsed command line."""

    options: SimpleNamespace  # the values of the tool's flags by name
    arguments: list[str]  # positional
    main_flags: list[str]  # in the form that main.py takes


@dataclass(frozen=True)
class Tool:
    """Describe a tool: its help, its flags, and what else its command line takes."""

    usage: str | None  # what `--help` shows above the flags: the tool's docstring
    flags: tuple[Flag, ...] = ()
    arguments: str = ""  # name of a positional argument in errors; "": the tool takes none
    least: int = 1  # fewest positional arguments allowed
    main_flags: bool = False  # also accept main.py's flags, unchecked, unless the tool has its own

    def parse(self, argv: list[str]) -> Command:
        """Parse a command line, or raise UsageError with every problem of the tool's flags."""
        own = {flag.name: flag for flag in self.flags}
        others = opts.FLAGS.keys() - own.keys() if self.main_flags else set()
        parser = FlagParser(own | {name: opts.FLAGS[name] for name in others})
        found: list[str] | None = [] if self.arguments else None
        raw = parser.parse_argv(argv, found)
        parser.add([flag for flag in raw if flag[0] not in others])
        problems = parser.problems
        if self.arguments and len(found) < self.least:
            problems.insert(0, (f"no {self.arguments}", f"name at least one {self.arguments}"))
        UsageError.raise_for(problems)
        values = {name: flag.default for name, flag in own.items()} | parser.values
        passed_on = [f"--{name}={value}" for name, value, _ in raw if name in others]
        return Command(SimpleNamespace(**values), found or [], passed_on)

    def run(self, function: Callable[[list[str]], int | None], argv: list[str]) -> int:
        """Print help, or call `function`; report its errors, and return the exit code."""
        try:
            code = 0
            if {"-h", "-help", "--help"} & set(argv):
                own = {"Options": list(self.flags)} if self.flags else {}
                groups = own | (opts.GROUPS if self.main_flags else {})
                print(help_text((self.usage or "").rstrip(), groups))  # none with python -OO
            else:
                code = function(argv) or 0
            print(end="", flush=True)
            return code
        except BrokenPipeError:  # the reader has gone, as with `| head`
            sys.stdout = None
            return 0
        except RunError as error:
            print(error.report(), file=sys.stderr)
            return error.code
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
