"""Every command in the documents is understood by the program that it names."""

import importlib
import re
import shlex
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import run as torchrun

import opts
from errors import UsageError
from helpers.documents import WORD, missing, project_files
from helpers.run_main import ROOT
from tools.results.configs import configs
from tools.sweep import tasks

# Their flags are main.py's.
WITH_FLAGS_OF_MAIN = ("describe",)
# The README's example of mistakes.
MISTAKEN = "python main.py --dataset cifar --depth 41"


def documents() -> str:
    """All Markdown files, the configs and the Makefile."""
    files = project_files("*.md") + sorted((ROOT / "configs").rglob("*.yaml"))
    makefile = (ROOT / "Makefile").read_text().replace("$(RUN)", "python")
    return "\n".join([*(path.read_text() for path in files), makefile])


@pytest.mark.parametrize("path", project_files("*.md"), ids=lambda path: path.name)
def test_what_a_document_names_is_there(path):
    assert missing(path.read_text(), path.parent) == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("`python -m tools.describe`, `tests/test_gpu.py`", []),
        ("`python -m tools.overhead`", ["tools.overhead"]),
        ("`train.py`, `models/NAME.py`, `kernels/triton_*.py`", []),
        ("`models/other.py` and other.py", ["models/other.py", "other.py"]),
        ("`kernels/cuda_*.py`", ["kernels/cuda_*.py"]),
        ("test_gpu.py::test_every_precision_learns", []),
        ("test_gpu.py::test_no_precision_learns", ["test_gpu.py::test_no_precision_learns"]),
        ("[file](docs/memory.md#speed), [file](https://a.b/c.md)", []),
        ("[file](docs/other.md)", ["docs/other.md"]),
        ("`python -m pytest tests/faults/test_soak_kills.py -k \"forgets or call\" -q`", []),
        ("`python -m pytest tests/test_gpu.py -k \"learns or forgives\"`",
         ["tests/test_gpu.py -k forgives"]),
        ("`python -m pytest tests/faults/test_soak_kills.py -k learns`",
         ["tests/faults/test_soak_kills.py -k learns"]),
        ("`python -m pytest tests/other -k \"call\"`", ["tests/other", "tests/other -k call"]),
        ("`python -m pytest -k NAME` or `python -m pytest -k name_of_none`", [" -k name_of_none"]),
    ],
)  # fmt: skip
def test_a_name_of_what_is_not_there_would_be_noticed(text, named):
    assert missing(text) == named


def test_a_stale_command_in_the_manual_would_be_noticed():
    manual = (ROOT / "docs" / "operations.md").read_text()
    for old, new in (("soak_kills", "soak_skills"), ("forgets", "forgives"), ("finite", "fine")):
        assert missing(manual.replace(old, new))


def documented_commands() -> list[str]:
    """Every `python main.py` and `python -m tools.NAME` line of them."""
    found = re.findall(rf"python (?:main\.py|-m tools\.\w+)(?: (?![ #]){WORD})+", documents())
    return sorted({command for command in found if "--help" not in command} - {MISTAKEN})


def parser(program: str) -> Callable[[list[str]], object]:
    """What reads the command line of `main.py` or of `tools.NAME`."""
    name = program.removeprefix("tools.")
    if name in ("main.py", *WITH_FLAGS_OF_MAIN):
        return opts.parse
    module = importlib.import_module(program)
    if hasattr(module, "__path__"):  # a tool of several files
        module = importlib.import_module(f"{program}.__main__")
    return module.parse


def program_of(command: str) -> tuple[str, list[str]]:
    """`main.py` or `tools.NAME`, and what is given to it."""
    _, *words = shlex.split(command)
    words = words[words[0] == "-m" :]
    return words[0], words[1:]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with the files that the commands name: configs, and a run called RUN."""
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "config.yaml").write_text("depth: 100\n")
    for name in ("configs", "results", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", documented_commands())
def test_every_documented_command_is_understood(command, project):
    program, argv = program_of(command)
    read = parser(program)(argv)
    if program == "tools.sweep":
        assert all(map(tasks.configs_of, read.arguments))  # each is a table or a config


def test_commands_are_found_in_every_document_and_for_every_tool():
    found = documented_commands()
    tools = {path.stem for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()}
    tools |= {path.parent.name for path in (ROOT / "tools").glob("*/__main__.py")}
    named = {match[1] for match in map(re.compile(r"python -m tools\.(\w+)").match, found) if match}
    assert named == tools
    assert any("--seeds 0,1,2" in command for command in found)  # a comma within a word
    assert any(command.endswith("RUN") for command in found)


def launches() -> list[str]:
    """Every `torchrun ... main.py ...` line of the documents."""
    pattern = rf"torchrun (?:(?![ #]){WORD} )*main\.py(?: (?![ #.]){WORD})+"
    found = re.findall(pattern, documents())
    return sorted(set(found))


def sizes(command: str) -> list[int]:
    """How many processes a `torchrun` line may start; it and its program must understand it."""
    args = torchrun.get_args_parser().parse_args(shlex.split(command)[1:])
    fewest, most = torchrun.parse_min_max_nnodes(args.nnodes)
    found = [nodes * int(args.nproc_per_node) for nodes in range(fewest, most + 1)]
    assert args.training_script == "main.py"
    for size in found:
        opts.parse(args.training_script_args, size)
    return found


@pytest.mark.parametrize("command", launches())
def test_every_documented_launch_is_understood_at_every_size_that_it_allows(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert sizes(command)


def test_launches_are_found_and_their_mistakes_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    (elastic,) = (command for command in launches() if "--nnodes" in command)
    assert sizes(elastic) == [8, 16, 24, 32]
    with pytest.raises(opts.UsageError, match="256 over 24 processes"):
        sizes(elastic.replace("--batchSize 192", "--batchSize 256"))
    with pytest.raises(SystemExit):
        sizes(elastic.replace("--nnodes", "--nodes"))


COLUMNS = {"C10+": "c10plus", "C100+": "c100plus", "C10": "c10", "C100": "c100"}


def recipes(text: str) -> Iterator[tuple[str, str]]:
    """(config, error) of the tables with a command in each row; columns name the data, or none."""
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        match = re.search(r"--config configs/(\S+?)/(\S+)\.yaml", line)
        if not match or len(cells) != len(header):
            header = cells if "command" in cells else header
            continue
        folder, name = match.groups()
        for title, cell in zip(header, cells, strict=True):
            data = COLUMNS.get(title.removeprefix("error "))
            if cell and (data or title == "error"):
                wide = data and folder == "wide"
                place = (
                    f"wide/{name.replace('c10plus', data)}" if wide else f"{data or folder}/{name}"
                )
                yield place, cell


def wrong_recipes(text: str) -> list[tuple[str, str]]:
    """Those whose error is not the published one."""
    known = configs()
    return [(name, error) for name, error in recipes(text)
            if name not in known or known[name].claim["error"] != float(error)]  # fmt: skip


def test_the_recipes_name_the_published_errors():
    text = (ROOT / "TRAINING.md").read_text()
    assert wrong_recipes(text) == []
    for right, wrong, name in (
        ("| 25.0 |", "| 25.1 |", "imagenet/densenet-121-k32"),
        ("| 27.55 |", "| 27.65 |", "c100/densenet-L40-k12"),
        ("| 19.99 |", "| 9.99 |", "wide/c100plus-L40-k60"),
        ("| 1.67 |", "| 1.76 |", "svhn/densenet-L100-k12"),
    ):
        assert wrong_recipes(text.replace(right, wrong)) == [(name, wrong.strip("| "))]


def test_every_published_result_has_a_recipe():
    named = {name for name, _ in recipes((ROOT / "TRAINING.md").read_text())}
    assert named == {name for name, config in configs().items() if config.claim}


def test_the_mistakes_in_the_readme_are_answered_as_it_says():
    text = (ROOT / "README.md").read_text()
    command, *answer = re.search(r"```\n\$ (.*?)\n```", text, re.DOTALL)[1].splitlines()
    with pytest.raises(opts.UsageError) as error:
        opts.parse(shlex.split(command)[2:])
    assert error.value.report().splitlines() == answer


def test_a_command_with_a_mistake_would_be_noticed(project):
    for command in documented_commands():
        program, argv = program_of(command)
        with pytest.raises(UsageError, match="growthrate"):
            parser(program)([*argv, "--growthrate", "12"])
