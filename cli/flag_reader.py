"""Read flags from a command line or a YAML file.

Both become a list of (flag, text, source), which the same code checks.
"""

import codecs
import errno
import re
from dataclasses import dataclass, field
from pathlib import Path

from cli.flag_types import Flag, Problem, closest_match, integers, interval, pathname

MAX_CONFIG_BYTES = 2**14  # a config with every flag has a tenth of it
EXAMPLE = "write one `flag: value` a line"
# Names of other programs, in lower case.
OTHER_NAMES = {
    "learningrate": "LR", "epochs": "nEpochs", "workers": "nThreads", "numworkers": "nThreads",
    "wd": "weightDecay", "seed": "manualSeed", "gpus": "nGPU", "arch": "netType",
    "model": "netType", "pretrained": "retrain", "checkpoint": "resume", "output": "save",
    "evaluate": "testOnly", "numclasses": "nClasses", "amp": "precision",
}  # fmt: skip
# What editors and PDF files put in place of two hyphens.
DASHES = tuple("\u2010\u2011\u2012\u2013\u2014\u2015\u2212")

RawFlag = tuple[str, str, str]  # (flag, text, source)


@dataclass
class FlagParser:
    """Collect the settings given so far and every problem found in them."""

    flags: dict[str, Flag]
    values: dict[str, object] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unparsed: set[str] = field(default_factory=set)  # flags that were given, value unknown
    # Flags of a file that says they were not given but defaults, when a run wrote it.
    defaults: set[str] = field(default_factory=set)

    def add(self, raw: list[RawFlag]) -> None:
        """Add the flags of one origin; values of an earlier origin stay."""
        earlier = set(self.values)
        seen: dict[str, str] = {}
        for name, value, source in raw:
            if name not in self.flags:
                plain = name.lower().replace("-", "").replace("_", "")
                close = closest_match(OTHER_NAMES.get(plain, name), list(self.flags))
                self.unparsed |= {close} - {None}
                fix = f"did you mean {close}?" if close else "see --help"
                self.problems.append((f"unknown flag {name} ({source})", fix))
            elif name in seen:
                what = f"{name} is given twice ({seen[name]}; {source})"
                self.problems.append((what, "keep one"))
            elif name not in earlier:
                self._set(self.flags[name], value, source)
            seen.setdefault(name, source)

    def _set(self, flag: Flag, raw: str, source: str) -> None:
        try:
            self.values[flag.name] = flag.parse(raw)
        except ValueError as error:
            what, fix, *closest = error.args
            if closest:  # so that the rules between flags are checked for what was probably meant
                self.values[flag.name] = closest[0]
            else:
                self.unparsed.add(flag.name)
            self.problems.append((f"{flag.name}: {what} ({source})", fix))

    def parse_argv(self, argv: list[str], positionals: list[str] | None = None) -> list[RawFlag]:
        """Split `-name value`, `--name value` and `--name=value`.

        Args:
            positionals: gets the tokens that are neither flags nor their values; None: each of
                these is a problem.
        """
        raw, rest = [], list(argv)
        while rest:
            token = rest.pop(0)
            match = re.fullmatch(r"--?([A-Za-z][\w-]*)(?:=(.*))?", token, re.DOTALL)
            if match:
                name, value = match.groups()
                value = self._take_value(name, rest) if value is None else value
                raw.append((name, value, "command line"))
            elif positionals is not None and not token.startswith("-"):
                positionals.append(token)
            else:
                what = f"{token!r} is not a flag (command line)"
                fix = "write --flag VALUE, a list with commas; see --help"
                if token.startswith(DASHES):
                    fix = f"type two hyphens: {token[0]!r} is another character"
                self.problems.append((what, fix))
        return raw

    def _take_value(self, name: str, rest: list[str]) -> str:
        """Take the value of a flag from the tokens behind it; "" if it has none."""
        const = self.flags[name].const if name in self.flags else None
        has_value = bool(rest) and _is_value(rest[0])
        if has_value and (const is None or rest[0] in ("true", "false")):
            return rest.pop(0)
        return const or ""

    def parse_yaml(self, path: Path) -> list[RawFlag]:
        """Split a YAML file into flags, each with the very text that the file has.

        The file is composed, not constructed: no tag is acted on, `1e-4` stays `1e-4`, and `12:30`
        or `yes` mean what they mean on the command line.
        """
        import yaml

        try:
            return self._split(yaml.compose(_read_config(path), yaml.BaseLoader), path)
        except OSError as error:
            what = f"cannot read config {path}: {error.strerror}"
            self.problems.append((what, "name a readable YAML file"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}, line {mark.line + 1}" if mark else str(path)
            reason = getattr(error, "problem", None) or type(error).__name__
            self.problems.append((f"not YAML: {reason} ({where})", EXAMPLE))
        self.unparsed |= self.flags.keys()
        return []

    def _split(self, root, path: Path) -> list[RawFlag]:
        if root is None or not _is_plain(root, "mapping"):
            self.problems.append((f"config {path} holds no settings", EXAMPLE))
            return []
        raw = []
        for key, node in root.value:
            source = f"{path}, line {key.start_mark.line + 1}"
            if key.value == "paper":  # the result that a config reproduces, not a flag
                continue
            try:
                if key.value == "defaults":
                    self.defaults |= _names(node) - self.values.keys()
                else:
                    raw.append((key.value, self._text(key, node), source))
            except ValueError as error:
                self.problems.append((f"{error} ({source})", EXAMPLE))
        return raw

    def _text(self, key, node) -> str:
        if not _is_plain(key, "scalar"):
            raise ValueError("a key that is not a flag")
        flag = self.flags.get(key.value)
        if not flag:  # `add` refuses it; its node may be an alias bomb
            return ""
        takes_list = flag.type in (integers, interval) and _is_plain(node, "sequence")
        scalars = node.value if takes_list else [node]
        if not all(_is_plain(scalar, "scalar") for scalar in scalars):
            raise ValueError(f"{key.value} has no plain value")
        if flag.type is pathname and node.value == "~":  # YAML's null
            raise ValueError(f"{key.value} is null")
        return ",".join(scalar.value for scalar in scalars) if scalars else "[]"


def _names(node) -> set[str]:
    items = node.value if _is_plain(node, "sequence") else [node]
    if not all(_is_plain(item, "scalar") for item in items):
        raise ValueError("defaults is not a list of flags")
    return {item.value for item in items}


def _read_config(path: Path) -> str:
    with open(path, "rb") as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_CONFIG_BYTES} bytes")
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # of PowerShell's >
    return content.decode("utf-16" if is_utf16 else "utf-8-sig")


def _is_plain(node, kind: str) -> bool:
    """Tell whether a YAML node is a scalar, sequence or mapping without a tag of its own."""
    tag = {"scalar": "str", "sequence": "seq", "mapping": "map"}[kind]
    return node.id == kind and node.tag == f"tag:yaml.org,2002:{tag}"


def _is_value(token: str) -> bool:
    """Tell whether a token is a value, as `-0.1` and `-inf` are, and not a flag."""
    return not re.match(r"--?[A-Za-z]", token) or token in ("-inf", "-nan")
