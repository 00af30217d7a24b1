"""Define flags: their types, ranges and help; and `Settings`, the values of all of them."""

import difflib
import math
import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from cli import posix_check  # noqa: F401 (ends the program on Windows)

Problem = tuple[str, str]  # (what is wrong, how to fix it)


@dataclass(frozen=True)
class FlagType:
    """Describe a type of value in messages, and convert text to it."""

    description: str
    convert: Callable[[str], object]


def _parse_int(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,40}", text):
        raise ValueError
    return int(text)


def _parse_int_list(text: str) -> list[int]:
    return [] if text == "[]" else [_parse_int(part.strip()) for part in text.split(",")]


def _parse_float(text: str) -> float:
    if "_" in text or not text.isascii() or text != text.strip():  # float() would accept these
        raise ValueError
    return float(text)


def _parse_interval(text: str) -> list[float]:
    low, high = (_parse_float(part.strip()) for part in text.split(","))
    if not (low < high and math.isfinite(high - low)):
        raise ValueError
    return [low, high]


text = FlagType("text", str)
# A shell leaves `~` as it is in `--data=~/DIR` and in a config file.
pathname = FlagType("a path", os.path.expanduser)
integer = FlagType("a whole number", _parse_int)
integers = FlagType("whole numbers with commas between", _parse_int_list)
number = FlagType("a number", _parse_float)
interval = FlagType("two numbers LOW,HIGH, the lower one first", _parse_interval)
level = FlagType("a level or auto", lambda text: text if text == "auto" else _parse_int(text))
boolean = FlagType("true or false", {"true": True, "false": False}.__getitem__)


class Settings(SimpleNamespace):
    """Hold the value of every flag and what follows from them; not changed once made."""

    def replace(self, **changes: object) -> "Settings":
        """Return a copy with some of the settings changed."""
        return Settings(**vars(self) | changes)


@dataclass(frozen=True)
class Range:
    """Contain the finite numbers of an interval; an open end is excluded."""

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


NON_NEGATIVE = Range(low=0)
AT_LEAST_1 = Range(low=1)
POSITIVE = Range(low=0, low_open=True)


@dataclass(frozen=True)
class Flag:
    """Describe one option of a command line."""

    name: str
    type: FlagType
    default: object  # None if the dataset or another flag decides; `default_note` then says how
    help: str
    default_note: str = ""
    choices: tuple = ()
    range: Range | None = None
    # What a changed value means for a resumed run: "model" another network (an error), "training"
    # other training (an error unless --override true), "duration" more epochs, or fewer (an error).
    role: str = ""
    const: str | None = None  # value of the flag where it stands alone on a command line

    def parse(self, raw: str) -> object:
        """Return the value that a text stands for.

        Raises:
            ValueError: (what is wrong, how to fix it), and the choice closest to the text if any.
        """
        if not raw:
            raise ValueError("has no value", f"give {self._expected()}")
        shown = repr(raw) if len(raw) <= 60 else repr(raw[:60]) + "..."
        fix = f"use {self._expected()}"
        try:
            value = self.type.convert(raw)
        except (ValueError, KeyError):
            raise ValueError(f"{shown} is not {self.type.description}", fix) from None
        if self.choices and value not in self.choices:
            known, close = ", ".join(map(str, self.choices)), self._closest_choice(value)
            raise ValueError(f"{shown} is not one of {known}", f"use {close}", close)
        for item in value if isinstance(value, list) else [value]:
            if self.range and item not in self.range:
                raise ValueError(f"{shown} is out of range", fix)
        return value

    def _closest_choice(self, value: object) -> object:
        if isinstance(value, str):
            return closest_match(value, self.choices) or self.choices[0]
        numbers = [choice for choice in self.choices if not isinstance(choice, str)]
        return min(numbers, key=lambda choice: abs(choice - value))

    def _expected(self) -> str:
        if self.choices:
            return " or ".join(map(str, self.choices))
        return f"{self.type.description} {self.range}" if self.range else self.type.description


def broken(rules: list[tuple[bool, str, str]]) -> list[Problem]:
    """List the problems of the rules that are broken: (whether it is broken, what, fix) each."""
    return [(what, fix) for is_broken, what, fix in rules if is_broken]


def closest_match(name: str, known: list[str] | tuple[str, ...]) -> str | None:
    """Find the member of `known` that is spelt most like `name`; None if nothing is close."""
    folded = {word.lower(): word for word in known}
    found = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return folded[found[0]] if found else None


def as_text(value: object) -> str:
    """Write a setting as it is typed on a command line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "[]"
    return "" if value is None else str(value)


def help_text(usage: str, groups: dict[str, list[Flag]]) -> str:
    """Compose what `--help` prints: each flag's meaning, choices and default."""
    lines = [usage]
    for title, flags in groups.items():
        lines += ["", f"{title}:"]
        for flag in flags:
            choices = f" ({' | '.join(map(str, flag.choices))})" if flag.choices else ""
            meaning = f"{flag.help}{choices} [{flag.default_note or as_text(flag.default)}]"
            first, *more = textwrap.wrap(meaning, 78)
            lines += [f"  --{flag.name:<16} {first}", *(f"{'':21}{line}" for line in more)]
    return "\n".join(lines)
