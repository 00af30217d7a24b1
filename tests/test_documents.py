"""Test that every file, test and command that the documents name exists and is understood."""

import csv
import importlib
import re
import shlex
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import run as torchrun

import opts
from deploy.table import table
from errors import UsageError
from exchange.square import tables
from helpers.documents import WORD, missing, project_files
from helpers.run_main import ROOT
from tools.export.runtimes import RUNTIMES
from tools.results.configs import configs
from tools.sweep import tasks

# The README's example of mistakes.
MISTAKEN = "python main.py --dataset cifar --depth 41"


@pytest.mark.parametrize("path", project_files("*.md"), ids=lambda path: path.name)
def test_every_name_in_a_document_exists(path):
    assert missing(path.read_text(), path.parent) == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("`python -m tools.describe`, `train.py`, `models/NAME.py`, `kernels/triton_*.py`", []),
        ("`python -m tools.overhead`", ["tools.overhead"]),
        ("`models/other.py` and other.py", ["models/other.py", "other.py"]),
        ("`kernels/cuda_*.py`", ["kernels/cuda_*.py"]),
        ("test_gpu.py::test_every_precision_learns", []),
        ("test_gpu.py::test_no_precision_learns", ["test_gpu.py::test_no_precision_learns"]),
        ("[file](docs/memory.md#speed), [file](https://a.b/c.md)", []),
        ("[file](docs/other.md)", ["docs/other.md"]),
        ("`python -m pytest tests/test_gpu.py -k \"learns or forgives\"`",
         ["tests/test_gpu.py -k forgives"]),
        ("`python -m pytest tests/other -k \"call\"`", ["tests/other", "tests/other -k call"]),
        ("`python -m pytest -k NAME` or `python -m pytest -k name_of_none`", [" -k name_of_none"]),
    ],
)  # fmt: skip
def test_a_name_of_something_that_does_not_exist_is_noticed(text, named):
    assert missing(text) == named


def documents() -> str:
    """Join all Markdown files, the configs and the Makefile."""
    files = project_files("*.md") + sorted((ROOT / "configs").rglob("*.yaml"))
    makefile = (ROOT / "Makefile").read_text().replace("$(RUN)", "python")
    return "\n".join([*(path.read_text() for path in files), makefile])


def documented_commands() -> list[str]:
    """List every `python main.py` and `python -m tools.NAME` line of the documents."""
    found = re.findall(rf"python (?:main\.py|-m tools\.\w+)(?: (?![ #]){WORD})+", documents())
    return sorted({command for command in found if "--help" not in command} - {MISTAKEN})


def parser(program: str) -> Callable[[list[str]], object]:
    """Return the parser of the command line of `main.py` or of `tools.NAME`."""
    if program == "main.py":
        return opts.parse
    module = importlib.import_module(program)
    if hasattr(module, "__path__"):  # a tool of several files
        module = importlib.import_module(f"{program}.__main__")
    return module.parse


@pytest.fixture
def _project(tmp_path, monkeypatch):
    """Enter a directory with the files that the commands name: configs, and a run called RUN."""
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "config.yaml").write_text("depth: 100\n")
    for name in ("configs", "results", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", documented_commands())
def test_every_documented_command_is_understood(command, _project):
    words = shlex.split(command)
    program, *argv = words[2:] if words[1] == "-m" else words[1:]
    read = parser(program)(argv)
    if program == "tools.sweep":
        assert all(map(tasks.configs_of, read.arguments))  # each is a table or a config
    with pytest.raises(UsageError, match="growthrate"):
        parser(program)([*argv, "--growthrate", "12"])


def test_every_tool_has_a_documented_command():
    found = documented_commands()
    tools = {path.stem for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()}
    tools |= {path.parent.name for path in (ROOT / "tools").glob("*/__main__.py")}
    named = {match[1] for match in map(re.compile(r"python -m tools\.(\w+)").match, found) if match}
    assert named == tools
    assert any("--seeds 0,1,2" in command for command in found)  # a comma within a word
    assert any(command.endswith("RUN") for command in found)


def launches() -> list[str]:
    """List every `torchrun ... main.py ...` line of the documents."""
    pattern = rf"torchrun (?:(?![ #]){WORD} )*main\.py(?: (?![ #.]){WORD})+"
    return sorted(set(re.findall(pattern, documents())))


@pytest.mark.parametrize("command", launches())
def test_every_documented_launch_is_understood_at_every_size_that_it_allows(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = torchrun.get_args_parser().parse_args(shlex.split(command)[1:])
    assert args.training_script == "main.py"
    fewest, most = torchrun.parse_min_max_nnodes(args.nnodes)
    sizes = [nodes * int(args.nproc_per_node) for nodes in range(fewest, most + 1)]
    assert sizes and ("--nnodes" not in command or sizes == [8, 16, 24, 32])
    for size in sizes:
        opts.parse(args.training_script_args, size)


def test_a_launch_on_a_varying_number_of_machines_is_documented():
    assert sum("--nnodes" in command for command in launches()) == 1


COLUMNS = {"C10+": "c10plus", "C100+": "c100plus", "C10": "c10", "C100": "c100"}


def recipes(text: str) -> Iterator[tuple[str, float]]:
    """Yield (config, error) of the tables that have a command in each row.

    The config in the command is that of one column; the names of the columns give the others.
    """
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        match = re.search(r"--config configs/(\S+?)/(\S+)\.yaml", line)
        if not match or len(cells) != len(header):
            header = cells if "command" in cells else header
            continue
        folder, name = match.groups()
        for title, cell in zip(header, cells, strict=True):
            column = COLUMNS.get(title.removeprefix("error "))
            if not cell or not (column or title == "error"):
                continue
            if column and folder == "wide":
                yield f"wide/{name.replace('c10plus', column)}", float(cell)
            else:
                yield f"{column or folder}/{name}", float(cell)


def test_every_published_result_has_a_recipe_with_its_error():
    found = list(recipes((ROOT / "TRAINING.md").read_text()))
    claims = {name: config.claim["error"] for name, config in configs().items() if config.claim}
    assert dict(found) == claims
    assert len(set(found)) == len(claims)  # a config in two tables has one error


def test_the_mistakes_in_the_readme_are_answered_as_it_says():
    text = (ROOT / "README.md").read_text()
    command, *answer = re.search(r"```\n\$ (.*?)\n```", text, re.DOTALL)[1].splitlines()
    with pytest.raises(UsageError) as error:
        opts.parse(shlex.split(command)[2:])
    assert error.value.report().splitlines() == answer


def test_the_tables_of_the_exchange_are_those_of_its_newest_results():
    newest = sorted((ROOT / "results").glob("exchange_*.csv"))[-1]
    rows = [*csv.DictReader(newest.read_text().splitlines())]
    assert tables(rows) in (ROOT / "docs/exchange.md").read_text()


def test_the_table_of_programs_is_that_of_its_newest_results():
    newest = sorted((ROOT / "results").glob("deploy_*.csv"))[-1]
    rows = [*csv.DictReader(newest.read_text().splitlines())]
    assert table(rows) in (ROOT / "docs/deploy.md").read_text()
    assert {row["to"] for row in rows} == RUNTIMES.keys()
