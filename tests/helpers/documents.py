"""The Markdown files, and what they name that is not there: files, tools and tests."""

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

# A word of a command line: a comma ends it where a sentence goes on behind.
WORD = r"(?:[^`#|,\s]|,(?=\S))+"


@functools.cache
def project_files(pattern: str) -> list[Path]:
    """Find files of the project by their names, hidden folders and those that git ignores apart."""
    ignored, found = [ROOT / name for name in ("checkpoints", "data", "runs")], []
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below
                    if not name.startswith(".") and Path(folder, name) not in ignored]  # fmt: skip
        found += [Path(folder, name) for name in fnmatch.filter(names, pattern)]
    return sorted(found)


def marks(node: ast.AST) -> set[str]:
    """The names after `pytest.mark.` in a piece of code."""
    return set(re.findall(r"pytest\.mark\.(\w+)", ast.unparse(node)))


@functools.cache
def find_tests() -> dict[str, set[str]]:
    """Find all tests: {`file.py::test_name`: the marks of that test and of its file}."""
    found = {}
    for path in project_files("test_*.py"):
        body = ast.parse(path.read_text()).body
        whole_file = set().union(
            *(marks(node) for node in body
              if isinstance(node, ast.Assign) and ast.unparse(node).startswith("pytestmark ="))
        )  # fmt: skip
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                decorators = set().union(*map(marks, node.decorator_list))
                found[f"{path.name}::{node.name}"] = whole_file | decorators
    return found


def missing(text: str, folder: Path = ROOT) -> list[str]:
    """List what a document names that is not there.

    Args:
        folder: of the document. A path may begin there or at the top; a bare name of a `.py` may be
            that of any file. Capitals in place of a name, as in `models/NAME.py`, stand for any.
    """
    tests = re.findall(r"\w+\.py::\w+", text)
    tools = re.findall(r"python -m (tools\.\w+)", text)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    files = re.findall(r"(?<![\w./*-])[\w./*-]+\.py\b", text)
    return [
        *(test for test in tests if test not in find_tests()),
        *(tool for tool in tools if not importlib.util.find_spec(tool)),
        *(link for link in links if not (folder / link).exists()),
        *(file for file in files if not _is_there(re.sub(r"\b[A-Z]+\b", "*", file), folder)),
        *(part for line in re.findall(rf"python -m pytest((?: {WORD}|(?<=-k) \"[^\"]*\")+)", text)
          for part in _tests_nothing(shlex.split(line))),
    ]  # fmt: skip


def _is_there(file: str, folder: Path) -> bool:
    if "/" not in file:
        return bool(project_files(file))
    return any(any(start.glob(file)) for start in (folder, ROOT))


def _tests_nothing(words: list[str]) -> Iterator[str]:
    """The paths and the alternatives after -k of a pytest command that choose no test."""
    paths = [word for word in words if "/" in word]
    yield from (path for path in paths if not (ROOT / path).exists())
    within = [
        test for test in find_tests()
        if not paths or test.split("::")[0] in {Path(path).name for path in paths}
    ]  # fmt: skip
    asked = words[words.index("-k") + 1] if "-k" in words else ""
    for part in filter(None, asked.split(" or ")):
        if not part.isupper() and not any(part in test.split("::")[1] for test in within):
            yield f"{' '.join(paths)} -k {part}"
