"""What a flag is, and how a command line or a YAML file gives it a value.

Both are one language: each becomes a list of (flag, text, source) that one reader checks, so that
a wrong type, range or spelling is found in one place and reported with where it stands.
"""

import difflib
import errno
import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Problem = tuple[str, str]  # (what is wrong, how to mend it)
MAX_CONFIG = 2**14  # bytes; one with every flag has a tenth of it


@dataclass(frozen=True)
class Kind:
    """A type of value: what it is called in a message, and how its text is read."""

    called: str
    convert: Callable[[str], object]


def _whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,40}", text):
        raise ValueError
    return int(text)


def _whole_list(text: str) -> list[int]:
    return [] if text == "[]" else [_whole(part.strip()) for part in text.split(",")]


def _fraction(text: str) -> float:
    if "_" in text or not text.isascii() or text != text.strip():  # which float() would take
        raise ValueError
    return float(text)


text = Kind("text", str)
integer = Kind("a whole number", _whole)
integers = Kind("whole numbers with commas between", _whole_list)
number = Kind("a number", _fraction)
level = Kind("a level or auto", lambda text: text if text == "auto" else _whole(text))
boolean = Kind("true or false", {"true": True, "false": False}.__getitem__)


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers; an open end is excluded."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'above' if self.low_open else 'of at least'} {self.low}"
        high = f"{'below' if self.high_open else 'of at most'} {self.high}"
        return " and ".join([low] * (self.low > -math.inf) + [high] * (self.high < math.inf))


AT_LEAST_0 = Range(low=0)
AT_LEAST_1 = Range(low=1)
POSITIVE = Range(low=0, low_open=True)


@dataclass(frozen=True)
class Flag:
    """One option.

    Args:
        default: None means that the dataset or another flag decides; `note` then says how.
        role: what resuming makes of a difference: "model" is another network (an error), "course"
            another course of training (an error unless --override true), "length" longer or
            shorter training (an error if shorter), "" no matter.
        bare: the value when the flag stands alone on a command line.
    """

    name: str
    kind: Kind
    default: object
    help: str
    note: str = ""
    choices: tuple = ()
    range: Range | None = None
    role: str = ""
    bare: str | None = None

    def read(self, written: str) -> object:
        """The value of a text.

        Raises:
            ValueError: what is wrong, what to do, and the choice that was probably meant if any.
        """
        if not written:
            raise ValueError("has no value", f"give {self._expected()}")
        shown = repr(written) if len(written) <= 60 else repr(written[:60]) + "..."
        try:
            value = self.kind.convert(written)
        except (ValueError, KeyError):
            raise ValueError(
                f"{shown} is not {self.kind.called}", f"use {self._expected()}"
            ) from None
        if self.choices and value not in self.choices:
            known, near = ", ".join(map(str, self.choices)), self._nearest_choice(value)
            raise ValueError(f"{shown} is not one of {known}", f"use {near}", near)
        for item in value if isinstance(value, list) else [value]:
            if self.range and item not in self.range:
                raise ValueError(f"{shown} is out of range", f"use {self._expected()}")
        return value

    def _nearest_choice(self, value: object) -> object:
        if isinstance(value, str):
            return nearest(value, self.choices) or self.choices[0]
        numbers = [choice for choice in self.choices if not isinstance(choice, str)]
        return min(numbers, key=lambda choice: abs(choice - value))

    def _expected(self) -> str:
        if self.choices:
            return " or ".join(map(str, self.choices))
        return f"{self.kind.called} {self.range}" if self.range else self.kind.called


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str | None:
    """The member of `known` that is spelt most like `name`, None when nothing is like it."""
    folded = {word.lower(): word for word in known}
    found = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return folded[found[0]] if found else None


def as_text(value: object) -> str:
    """A setting as it is typed on a command line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "[]"
    return "" if value is None else str(value)


def help_text(usage: str, groups: dict[str, list[Flag]]) -> str:
    """What `--help` prints: each flag's meaning, choices and default."""
    lines = [usage]
    for title, flags in groups.items():
        lines += ["", f"{title}:"]
        for flag in flags:
            choices = f" ({' | '.join(map(str, flag.choices))})" if flag.choices else ""
            meaning = f"{flag.help}{choices} [{flag.note or as_text(flag.default)}]"
            first, *more = textwrap.wrap(meaning, 78)
            lines += [f"  --{flag.name:<16} {first}", *(f"{'':21}{line}" for line in more)]
    return "\n".join(lines)


@dataclass
class Reader:
    """The settings given so far and everything found wrong with them."""

    flags: dict[str, Flag]
    values: dict[str, object] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)  # flags whose value is not what was meant

    def add(self, written: list[tuple[str, str, str]]) -> None:
        """Add the (flag, text, source) of one origin; what an earlier origin gave stays."""
        earlier = set(self.values)
        seen: dict[str, str] = {}
        for name, value, source in written:
            if name not in self.flags:
                near = nearest(name, list(self.flags))
                self.unread |= {near} - {None}
                fix = f"did you mean {near}?" if near else "see --help"
                self.problems.append((f"unknown flag {name} ({source})", fix))
            elif name in seen:
                self.problems.append(
                    (f"{name} is given twice ({seen[name]}; {source})", "keep one")
                )
            elif name not in earlier:
                self._set(self.flags[name], value, source)
            seen.setdefault(name, source)

    def _set(self, flag: Flag, written: str, source: str) -> None:
        try:
            self.values[flag.name] = flag.read(written)
        except ValueError as error:
            what, fix, *meant = error.args
            if meant:  # so that the rules between flags are judged on what was meant
                self.values[flag.name] = meant[0]
            else:
                self.unread.add(flag.name)
            self.problems.append((f"{flag.name}: {what} ({source})", fix))

    def command_line(
        self, argv: list[str], operands: list[str] | None = None
    ) -> list[tuple[str, str, str]]:
        """`-name value`, `--name value` and `--name=value` as (name, value, source).

        Args:
            operands: gets what is no flag and no flag's value; None: that is a problem.
        """
        written, rest = [], list(argv)
        while rest:
            token = rest.pop(0)
            match = re.fullmatch(r"--?([A-Za-z]\w*)(?:=(.*))?", token, re.DOTALL)
            if not match and operands is not None and not token.startswith("-"):
                operands.append(token)
                continue
            if not match:
                fix = "write --flag VALUE; see --help"
                self.problems.append((f"{token!r} is no flag (command line)", fix))
                continue
            name, value = match.groups()
            if value is None:
                bare = self.flags[name].bare if name in self.flags else None
                takes_next = bool(rest) and _is_value(rest[0])
                if takes_next and (bare is None or rest[0] in ("true", "false")):
                    value = rest.pop(0)
                else:
                    value = bare or ""
            written.append((name, value, "command line"))
        return written

    def yaml_file(self, path: Path) -> list[tuple[str, str, str]]:
        """The flags of a YAML file, each scalar as the very text that was written.

        The file is composed and never constructed: no tag is acted on, `1e-4` stays `1e-4`, and
        `12:30` or `yes` mean what they would mean on the command line.
        """
        import yaml

        example = "write one `flag: value` a line"
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_CONFIG + 1)
            if len(content) > MAX_CONFIG:
                raise OSError(errno.EFBIG, f"more than {MAX_CONFIG} bytes")
            root = yaml.compose(content.decode("utf-8-sig"), yaml.BaseLoader)
        except OSError as error:
            what = f"cannot read config {path}: {error.strerror}"
            self.problems.append((what, "name a readable YAML file"))
            self.unread |= self.flags.keys()
            return []
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}, line {mark.line + 1}" if mark else str(path)
            reason = getattr(error, "problem", None) or type(error).__name__
            self.problems.append((f"not YAML: {reason} ({where})", example))
            self.unread |= self.flags.keys()
            return []
        if not isinstance(root, yaml.MappingNode) or root.tag != "tag:yaml.org,2002:map":
            self.problems.append((f"config {path} holds no settings", example))
            return []
        written = []
        for key, value in root.value:
            source = f"{path}, line {key.start_mark.line + 1}"
            if key.value == "paper":  # the claim that the run is to reproduce; no flag
                continue
            if not _is_plain(key):
                self.problems.append((f"a key that is no flag ({source})", example))
                continue
            flag = self.flags.get(key.value)
            scalars = value.value if flag and flag.kind is integers and _is_list(value) else [value]
            if flag and not all(map(_is_plain, scalars)):
                self.problems.append((f"{key.value} has no plain value ({source})", example))
                continue
            listed = ",".join(str(node.value) for node in scalars) if flag and scalars else "[]"
            written.append((key.value, listed, source))
        return written


def _is_plain(node) -> bool:
    """Whether a YAML node is a scalar without a tag of its own."""
    return isinstance(node.value, str) and node.tag == "tag:yaml.org,2002:str"


def _is_list(node) -> bool:
    """Whether a YAML node is a list without a tag of its own."""
    return isinstance(node.value, list) and node.tag == "tag:yaml.org,2002:seq"


def _is_value(token: str) -> bool:
    """Whether a token is the value of the flag before it (`-0.1` and `-inf` are), not a flag."""
    return not re.match(r"--?[A-Za-z]", token) or token in ("-inf", "-nan")
