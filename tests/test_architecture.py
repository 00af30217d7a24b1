"""Test the structure of the code, beside what `make check` tests by ruff and import-linter."""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from distributed.rendezvous import source_files
from helpers.documents import project_files
from helpers.run_main import ROOT

MAX_FILE, MAX_CLASS, MAX_FUNCTION = 420, 250, 60  # lines
# import-linter sees packages only: what the files at the root must not import.
ABOVE = {
    "errors.py": "cli datasets distributed engine experiment fileio kernels models opts train main",
    "checkpoints.py": "cli datasets distributed engine experiment kernels models opts train main",
    "opts.py": "checkpoints distributed engine experiment fileio kernels train main",
    "train.py": "checkpoints cli datasets fileio kernels models opts main",
}
# The environment by which a launcher tells a process its rank.
LAUNCHER = r"""["'](RANK|WORLD_SIZE|LOCAL_\w+|MASTER_\w+|(TORCHELASTIC|SLURM)_\w+)["']"""
SOURCES = [path for path in project_files("*.py")
           if path.relative_to(ROOT).parts[0] not in ("tests", "findings")]  # fmt: skip


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> set[str]:
    """List the top-level names that a file imports, inside of functions as well."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {module.split(".")[0] for module in found}


def test_the_hash_of_the_code_covers_every_file():
    assert source_files(ROOT) == SOURCES


def test_the_root_has_five_files():
    assert {path.name for path in ROOT.glob("*.py")} == {"main.py", *ABOVE}


@pytest.mark.parametrize("file", ABOVE)
def test_a_file_at_the_root_imports_nothing_above_it(file):
    assert imported(ROOT / file) & set(ABOVE[file].split()) == set()
    assert "experiment" in imported(ROOT / "main.py")  # names of both sides match


def test_the_command_line_is_read_without_torch():
    code = """
        import sys, main, opts, cli.path_checks
        opts.parse([])
        sys.exit(str({"torch", "numpy", "PIL", "torchvision"} & sys.modules.keys() or ""))"""
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("package", ["models", "datasets"])
def test_settings_stop_at_the_door_of_a_package(package):
    doors = {"models/factory.py", "models/registry.py", "datasets/factory.py"}
    inside = {name(path) for path in (ROOT / package).glob("*.py")
              if re.search(r"\bopt\b", path.read_text())}  # fmt: skip
    assert inside <= doors


def test_launcher_py_alone_reads_the_launchers_variables():
    readers = {name(path) for path in SOURCES if re.search(LAUNCHER, path.read_text())}
    assert readers == {"distributed/launcher.py"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py"], ids=name)
def test_a_package_face_is_one_docstring(path):
    (only,) = ast.parse(path.read_text()).body
    assert isinstance(only, ast.Expr)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_is_too_long_to_hold_in_the_head(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE
    limits = {ast.ClassDef: MAX_CLASS, ast.FunctionDef: MAX_FUNCTION}
    for node in ast.walk(ast.parse(text)):
        if type(node) in limits:
            assert node.end_lineno - node.lineno < limits[type(node)], node.name
