"""Read a command line or a YAML file of flags: one reader checks both.

Both are one language: each becomes a list of (flag, text, source), so that a wrong type, range or
spelling is found in one place and reported with where it stands.
"""

import errno
import re
from dataclasses import dataclass, field
from pathlib import Path

from cli.flag_types import Flag, Problem, closest_match, integers

MAX_CONFIG_BYTES = 2**14  # bytes; one with every flag has a tenth of it


@dataclass
class FlagParser:
    """The settings given so far and everything found wrong with them."""

    flags: dict[str, Flag]
    values: dict[str, object] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unparsed: set[str] = field(default_factory=set)  # flags whose value is not what was meant

    def add(self, raw: list[tuple[str, str, str]]) -> None:
        """Add the (flag, text, source) of one origin; what an earlier origin gave stays."""
        earlier = set(self.values)
        seen: dict[str, str] = {}
        for name, value, source in raw:
            if name not in self.flags:
                close = closest_match(name, list(self.flags))
                self.unparsed |= {close} - {None}
                fix = f"did you mean {close}?" if close else "see --help"
                self.problems.append((f"unknown flag {name} ({source})", fix))
            elif name in seen:
                self.problems.append(
                    (f"{name} is given twice ({seen[name]}; {source})", "keep one")
                )
            elif name not in earlier:
                self._set(self.flags[name], value, source)
            seen.setdefault(name, source)

    def _set(self, flag: Flag, raw: str, source: str) -> None:
        try:
            self.values[flag.name] = flag.parse(raw)
        except ValueError as error:
            what, fix, *meant = error.args
            if meant:  # so that the rules between flags are judged on what was meant
                self.values[flag.name] = meant[0]
            else:
                self.unparsed.add(flag.name)
            self.problems.append((f"{flag.name}: {what} ({source})", fix))

    def parse_argv(
        self, argv: list[str], positionals: list[str] | None = None
    ) -> list[tuple[str, str, str]]:
        """`-name value`, `--name value` and `--name=value` as (name, value, source).

        Args:
            positionals: gets what is no flag and no flag's value; None: that is a problem.
        """
        raw, rest = [], list(argv)
        while rest:
            token = rest.pop(0)
            match = re.fullmatch(r"--?([A-Za-z]\w*)(?:=(.*))?", token, re.DOTALL)
            if not match and positionals is not None and not token.startswith("-"):
                positionals.append(token)
                continue
            if not match:
                fix = "write --flag VALUE; see --help"
                self.problems.append((f"{token!r} is no flag (command line)", fix))
                continue
            name, value = match.groups()
            if value is None:
                const = self.flags[name].const if name in self.flags else None
                takes_next = bool(rest) and _is_value(rest[0])
                if takes_next and (const is None or rest[0] in ("true", "false")):
                    value = rest.pop(0)
                else:
                    value = const or ""
            raw.append((name, value, "command line"))
        return raw

    def parse_yaml(self, path: Path) -> list[tuple[str, str, str]]:
        """The flags of a YAML file, each scalar as the very text that was written.

        The file is composed and never constructed: no tag is acted on, `1e-4` stays `1e-4`, and
        `12:30` or `yes` mean what they would mean on the command line.
        """
        import yaml

        example = "write one `flag: value` a line"
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_CONFIG_BYTES + 1)
            if len(content) > MAX_CONFIG_BYTES:
                raise OSError(errno.EFBIG, f"more than {MAX_CONFIG_BYTES} bytes")
            root = yaml.compose(content.decode("utf-8-sig"), yaml.BaseLoader)
        except OSError as error:
            what = f"cannot read config {path}: {error.strerror}"
            self.problems.append((what, "name a readable YAML file"))
            self.unparsed |= self.flags.keys()
            return []
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}, line {mark.line + 1}" if mark else str(path)
            reason = getattr(error, "problem", None) or type(error).__name__
            self.problems.append((f"not YAML: {reason} ({where})", example))
            self.unparsed |= self.flags.keys()
            return []
        if not isinstance(root, yaml.MappingNode) or root.tag != "tag:yaml.org,2002:map":
            self.problems.append((f"config {path} holds no settings", example))
            return []
        raw = []
        for key, value in root.value:
            source = f"{path}, line {key.start_mark.line + 1}"
            if key.value == "paper":  # the claim that the run is to reproduce; no flag
                continue
            if not _is_plain_scalar(key):
                self.problems.append((f"a key that is no flag ({source})", example))
                continue
            flag = self.flags.get(key.value)
            scalars = (
                value.value if flag and flag.type is integers and _is_plain_list(value) else [value]
            )
            if flag and not all(map(_is_plain_scalar, scalars)):
                self.problems.append((f"{key.value} has no plain value ({source})", example))
                continue
            listed = ",".join(str(node.value) for node in scalars) if flag and scalars else "[]"
            raw.append((key.value, listed, source))
        return raw


def _is_plain_scalar(node) -> bool:
    """Whether a YAML node is a scalar without a tag of its own."""
    return isinstance(node.value, str) and node.tag == "tag:yaml.org,2002:str"


def _is_plain_list(node) -> bool:
    """Whether a YAML node is a list without a tag of its own."""
    return isinstance(node.value, list) and node.tag == "tag:yaml.org,2002:seq"


def _is_value(token: str) -> bool:
    """Whether a token is the value of the flag before it (`-0.1` and `-inf` are), not a flag."""
    return not re.match(r"--?[A-Za-z]", token) or token in ("-inf", "-nan")
