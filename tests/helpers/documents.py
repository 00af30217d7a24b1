"""Find the Markdown files and the tests, and what documents name that does not exist."""

import ast
import fnmatch
import functools
import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from helpers.run_main import ROOT

# A word of a command line. A comma ends it where the sentence goes on.
WORD = r"(?:[^`#|,\s]|,(?=\S))+"


@functools.cache
def project_files(pattern: str) -> list[Path]:
    """Find files of the project by name, except in hidden folders and those that git ignores."""
    ignored, found = [ROOT / name for name in ("checkpoints", "data", "runs")], []
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below
                    if not name.startswith(".") and Path(folder, name) not in ignored]  # fmt: skip
        found += [Path(folder, name) for name in fnmatch.filter(names, pattern)]
    return sorted(found)


@functools.cache
def find_tests() -> dict[str, set[str]]:
    """Find all tests: {`file.py::test_name`: the marks of that test and of its file}."""
    found = {}
    for path in project_files("test_*.py"):
        body = ast.parse(path.read_text()).body
        assigned = [ast.unparse(node) for node in body if isinstance(node, ast.Assign)]
        file_marks = _marks(*(line for line in assigned if line.startswith("pytestmark =")))
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                decorators = _marks(*map(ast.unparse, node.decorator_list))
                found[f"{path.name}::{node.name}"] = file_marks | decorators
    return found


def _marks(*sources: str) -> set[str]:
    return {name for source in sources for name in re.findall(r"pytest\.mark\.(\w+)", source)}


def missing(text: str, folder: Path = ROOT) -> list[str]:
    """List what a document names that does not exist.

    Args:
        folder: of the document. A path may begin there or at the top; a bare name of a `.py` may be
            that of any file. Capitals in place of a name, as in `models/NAME.py`, stand for any.
    """
    tests = re.findall(r"\w+\.py::\w+", text)
    tools = re.findall(r"python -m (tools\.\w+)", text)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    files = re.findall(r"(?<![\w./*-])[\w./*-]+\.py\b", text)
    commands = re.findall(rf"python -m pytest((?: {WORD}|(?<=-k) \"[^\"]*\")+)", text)
    return [
        *(test for test in tests if test not in find_tests()),
        *(tool for tool in tools if not importlib.util.find_spec(tool)),
        *(link for link in links if not (folder / link).exists()),
        *(file for file in files if not _exists(re.sub(r"\b[A-Z]+\b", "*", file), folder)),
        *(part for command in commands for part in _without_tests(shlex.split(command))),
    ]


def _exists(file: str, folder: Path) -> bool:
    if "/" not in file:
        return bool(project_files(file))
    return any(any(start.glob(file)) for start in (folder, ROOT))


def _without_tests(words: list[str]) -> Iterator[str]:
    """Yield the paths and the alternatives after -k of a pytest command that select no test."""
    paths = [word for word in words if "/" in word]
    yield from (path for path in paths if not (ROOT / path).exists())
    files = {Path(path).name for path in paths}
    tests = [test for test in find_tests() if not paths or test.split("::")[0] in files]
    wanted = words[words.index("-k") + 1].split(" or ") if "-k" in words else []
    for part in wanted:
        if not part.isupper() and not any(part in test.split("::")[1] for test in tests):
            yield f"{' '.join(paths)} -k {part}"
