"""The shape of the code: who imports whom, who may do what, and what every file must have."""

import ast
import functools
import graphlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distributed.rendezvous import source_files
from helpers.documents import project_files
from helpers.run_main import ROOT

# A package, or a file at the root, and what it may import: all that stands above it here.
LAYERS = (ROOT / "ARCHITECTURE.md").read_text().partition("## Layers\n")[2]
TABLE = re.search(r"\n\n((?: {4}\w[^\n]*\n)+)", LAYERS)
MAY_IMPORT = {unit: set(may) for unit, *may in map(str.split, TABLE[1].splitlines())}
ROOTS = {"main", "tools"}  # compose everything below, never the one the other
# Answer `--help`, usage errors and missing paths: what they import at start-up must be light.
LIGHT = {
    *("main", "opts", "errors", "datasets.registry", "models.registry", "fileio.atomic"),
    *("cli.flag_types", "cli.flag_reader", "cli.network_settings", "cli.path_checks"),
    *("distributed.launcher", "distributed.signals"),
    *("experiment.console", "experiment.directory", "experiment.lifecycle"),
}
# Lines of a file, a class and a function. Two files are longer, for now.
MAX_FILE, MAX_CLASS, MAX_FUNCTION = 420, 250, 60
LONGER = {"opts.py": 488, "tools/sweep/__main__.py": 442}


@functools.cache
def sources() -> list[Path]:
    """Every Python file of the program, whatever its folder: not those of tests and findings."""
    return [path for path in project_files("*.py") if unit(path) not in ("tests", "findings")]


def test_the_hash_of_the_code_is_of_every_file_of_it():
    assert source_files(ROOT) == sources()


def unit(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(node: ast.AST) -> set[str]:
    """The modules that a piece of code imports, e.g. `models.densenet`."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0, "write the whole name: relative imports hide the direction"
            names = {f"{part.module}.{alias.name}" for alias in part.names}
            files = {name for name in names if (ROOT / f"{name.replace('.', '/')}.py").is_file()}
            # `from models import densenet` takes a neighbour, not what models/factory.py defines.
            found |= names if names == files else names | {part.module}
    return found


def own_names(module: str) -> set[str]:
    """What can be imported from a file of the program."""
    body = tree(ROOT / f"{module.replace('.', '/')}.py").body
    return {part.id for node in body for part in ast.walk(node) if isinstance(part, ast.Name)} | {
        node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def at_start_up(node: ast.AST) -> set[str]:
    """The modules imported outside functions."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return set()
    if isinstance(node, ast.Import | ast.ImportFrom):
        return imported(node)
    return set().union(*map(at_start_up, ast.iter_child_nodes(node)))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of names, with ? for what is no name."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def calls(module: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def literal(call: ast.Call, keyword: str) -> object:
    """The value of a keyword argument that is written as a literal, else None."""
    for given in call.keywords:
        if given.arg == keyword and isinstance(given.value, ast.Constant):
            return given.value.value
    return None


# --------------------------------------------------------------------------------------- imports


def test_the_layers_are_listed_from_the_bottom_up():
    below: set[str] = set()
    for layer, may in MAY_IMPORT.items():
        assert may <= below, layer
        below.add(layer)
    assert {unit(path) for path in sources()} - ROOTS == set(MAY_IMPORT)


@pytest.mark.parametrize("path", sources(), ids=name)
def test_imports_point_down(path):
    project = set(MAY_IMPORT) | ROOTS | {"tests"}
    found = {module.split(".")[0] for module in imported(tree(path))} & project
    own = unit(path)
    allowed = MAY_IMPORT.get(own, set(MAY_IMPORT)) | {own}
    assert found <= allowed, f"{name(path)} imports {found - allowed}: see ARCHITECTURE.md, Layers"


def test_an_allowed_import_is_a_real_one():
    # So that the table stays the picture of the code and not a superset of it.
    for layer, may in MAY_IMPORT.items():
        found = set().union(*(imported(tree(path)) for path in sources() if unit(path) == layer))
        assert may <= {module.split(".")[0] for module in found}, layer


def test_no_module_imports_itself_through_others():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sources()
    }
    graph = {
        module: imported(tree(path)) & set(modules) - {module} for module, path in modules.items()
    }
    assert "datasets.factory" in graph["main"]  # the names of both sides match
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("datasets.decode") < order.index("datasets.factory") < order.index("main")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph | {"errors": {"main"}}).prepare()


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_what_answers_a_usage_error_loads_the_standard_library_only(module):
    found = at_start_up(tree(ROOT / f"{module.replace('.', '/')}.py"))
    rest = {part for part in found if part.split(".")[0] not in sys.stdlib_module_names}
    names = LIGHT | {f"{light}.{name}" for light in LIGHT for name in own_names(light)}
    assert rest <= names


def test_an_import_at_start_up_is_told_from_a_late_one():
    code = "import a\nif x:\n    import b\nclass C:\n    import c\n    def f(): import d"
    assert at_start_up(ast.parse(code)) == {"a", "b", "c"}
    assert imported(ast.parse(code)) == {"a", "b", "c", "d"}


def test_a_file_of_a_package_is_told_from_what_the_package_defines():
    def names(code: str) -> set[str]:
        return imported(ast.parse(code))

    assert names("from models import densenet") == {"models.densenet"}
    assert names("from models import create") == {"models", "models.create"}
    assert names("from models import create, densenet") == {
        "models", "models.create", "models.densenet"
    }  # fmt: skip


DOORS = ("models/factory.py", "models/registry.py", "datasets/factory.py")


@pytest.mark.parametrize("package", ["models", "datasets"])
def test_settings_stop_at_the_door_of_a_package(package):
    for path in (ROOT / package).glob("*.py"):
        names = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
        assert ("opt" in names) == (name(path) in DOORS), name(path)


# -------------------------------------------------------------------------------- who may do what

PRINTING = ("experiment/console.py", "experiment/lifecycle.py", "main.py", "opts.py")
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Objects sent between processes by torch.distributed are pickles as well.
OBJECT_COLLECTIVES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
TORCH_FILES = {"load", "save", "jit", "hub", "package", "serialization"}


def executes_data(module: ast.Module) -> list[str]:
    """What could run code that came in as data."""
    found = [part for part in imported(module) if part.split(".")[0] in PICKLES]
    for called, call in calls(module):
        function = called.split(".")[-1]
        bad = (
            called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
            or (called.startswith("yaml.") and "load" in function)
            or (function in ("extractall", "extract", "unpack_archive")
                and literal(call, "filter") != "data")
            or function in OBJECT_COLLECTIVES
            # Pillow runs Ghostscript on what claims to be PostScript, unless told what to expect.
            or (called.endswith("Image.open") and "formats" not in [g.arg for g in call.keywords])
            or any(given.arg in ("shell", "allow_pickle") for given in call.keywords)
        )  # fmt: skip
        found += [called] * bad
    return found


def loads_or_saves(module: ast.Module) -> list[str]:
    """Where PyTorch's files are read or written, under whatever name."""
    names = [called for called, _ in calls(module) if called.split(".")[0] == "torch"]
    found = [called for called in names if called.split(".")[1] in TORCH_FILES]
    found += [part for part in imported(module)
              if part.startswith("torch.") and part.split(".")[1] in TORCH_FILES]  # fmt: skip
    aliases = [alias.asname for node in ast.walk(module) if isinstance(node, ast.Import)
               for alias in node.names if alias.name == "torch"]  # fmt: skip
    return found + [alias for alias in aliases if alias]


def trusting_loads(module: ast.Module) -> list[str]:
    """Calls of torch.load that do not refuse code in so many words."""
    return [
        called
        for called, call in calls(module)
        if called == "torch.load" and literal(call, "weights_only") is not True
    ]


def flags_built(module: ast.Module) -> list[str]:
    """Where a flag is defined."""
    return [called for called, _ in calls(module) if called.split(".")[-1] == "Flag"]


def printing(module: ast.Module) -> list[str]:
    """Where something is written to the console."""
    streams = ("print", "sys.stdout.write", "sys.stderr.write", "warnings.warn")
    return [called for called, _ in calls(module) if called in streams]


def tied_to_a_backend(module: ast.Module) -> list[str]:
    """Where Triton, or what is written in it, is used by name."""
    backends = ("kernels.triton", "triton")
    found = [part for part in imported(module) if part.startswith(backends)]
    names = [dotted(node) for node in ast.walk(module) if isinstance(node, ast.Attribute)]
    found += [part for part in names if part == "kernels.triton_ops"]
    looked_up = ("importlib.import_module", "importlib.util.find_spec", "import_module")
    return found + [
        called
        for called, call in calls(module)
        if called in looked_up
        and any(isinstance(given, ast.Constant) and str(given.value).startswith("triton")
                for given in call.args)
    ]  # fmt: skip


def exchanges(module: ast.Module) -> list[str]:
    """Where processes exchange something through PyTorch, under whatever name."""
    found = [part for part in imported(module) if part.startswith("torch.distributed")]
    names = [dotted(node) for node in ast.walk(module) if isinstance(node, ast.Attribute)]
    return found + [part for part in names if part == "torch.distributed"]


# By these a launcher tells a process its place in the run.
PLACES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}


def places_read(module: ast.Module) -> list[str]:
    """Names in the environment that say which of several processes this one is."""
    values = [node.value for node in ast.walk(module) if isinstance(node, ast.Constant)]
    texts = [value for value in values if isinstance(value, str)]
    prefixes = ("TORCHELASTIC_", "SLURM_")
    return [text for text in texts if text in PLACES or text.startswith(prefixes)]


def without_docstring(module: ast.Module) -> list[str]:
    """Public names without a docstring; `module` stands for the file itself."""

    def inside(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in node.body:
            kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            if isinstance(child, kinds) and not child.name.startswith("_"):
                if not ast.get_docstring(child):
                    yield prefix + child.name
                if isinstance(child, ast.ClassDef):
                    yield from inside(child, f"{child.name}.")

    return ([] if ast.get_docstring(module) else ["module"]) + list(inside(module, ""))


# rule, who may all the same, code that it must find, how often
RULES: list[tuple[Callable, Callable[[Path], bool], str, int]] = [
    (
        executes_data,
        lambda path: False,
        "import pickle\nfrom marshal import loads\neval(x)\nexec(x)\nyaml.load(f)\n"
        "yaml.unsafe_load(f)\ntar.extractall(p)\ntar.extractall(p, filter=f)\nrun(c, shell=True)\n"
        "numpy.load(f, allow_pickle=True)\ndist.broadcast_object_list(x)\nos.system(c)\n"
        "Image.open(f)\nPIL.Image.open(f)\n"
        "model.eval()\nyaml.compose(f)\ntar.extractall(p, filter='data')\n"
        "Image.open(f, formats=FORMATS)\nopen(f)",
        15,
    ),
    (
        loads_or_saves,
        lambda path: name(path) == "fileio/tensor_files.py",
        "torch.load(f)\ntorch.save(x, f)\nfrom torch import load\nimport torch as t\n"
        "torch.hub.load(x)\ntorch.jit.load(f)\njson.load(f)\ntorch.zeros(1)",
        6,
    ),
    (
        trusting_loads,
        lambda path: False,
        "torch.load(f)\ntorch.load(f, weights_only=False)\ntorch.load(f, weights_only=safe)\n"
        "torch.load(f, weights_only=1)\ntorch.load(f, **options)\n"
        "torch.load(f, weights_only=True)",
        5,
    ),
    (
        flags_built,
        lambda path: name(path) == "opts.py" or unit(path) == "tools",  # a tool may have its own
        "Flag('x', text, '', '')\nflags.Flag('x')",
        2,
    ),
    (
        printing,
        lambda path: name(path) in PRINTING or unit(path) == "tools",
        "print(x)\nsys.stdout.write(x)\nsys.stderr.write(x)\nfile.write(x)",
        3,
    ),
    (
        # `kernels.backend.select` alone knows which of the two runs.
        tied_to_a_backend,
        lambda path: unit(path) == "kernels",
        "import triton\nimport triton.language as tl\nfrom kernels import triton_ops\n"
        "kernels.triton_ops.product(x)\nimportlib.util.find_spec('triton')\n"
        "from kernels import reference\nkernels.backend.select('triton', device)",
        5,
    ),
    (
        exchanges,
        lambda path: unit(path) == "distributed",
        "import torch.distributed.tensor as t\nfrom torch import distributed\n"
        "from torch.distributed.nn import all_reduce\ntorch.distributed.barrier()\n"
        "import distributed\nfrom torch import multiprocessing\ndistributed.join(place)",
        5,
    ),
    (
        places_read,
        lambda path: name(path) == "distributed/launcher.py",
        "os.environ['RANK']\nos.getenv('LOCAL_RANK', 0)\n'WORLD_SIZE' in os.environ\n"
        "os.environ.get('SLURM_PROCID')\nint(env['TORCHELASTIC_RESTART_COUNT'])\n"
        "os.environ['PATH']\n'''RANK and its kin.'''\nrank = 0",
        5,
    ),
    (
        without_docstring,
        lambda path: False,
        "def f(): pass\nclass C:\n    def g(self): pass\n    def _h(self): pass\ndef _i(): pass\n"
        "class _D:\n    def j(self): pass\ndef k():\n    'Do.'\n    def inner(): pass",
        4,
    ),
]
RULE = pytest.mark.parametrize(
    ("rule", "exempt", "code", "count"), RULES, ids=[rule.__name__ for rule, *_ in RULES]
)


@RULE
def test_every_file_keeps_to_the_rule(rule, exempt, code, count):
    found = {name(path): rule(tree(path)) for path in sources() if not exempt(path)}
    assert {path: offences for path, offences in found.items() if offences} == {}


@RULE
def test_a_breach_of_the_rule_would_be_found(rule, exempt, code, count):
    assert len(rule(ast.parse(code))) == count


def test_the_owners_do_what_they_alone_may_do():
    # Else the rules would hold because the code they are about has moved.
    assert {"torch.load", "torch.save"} == set(
        loads_or_saves(tree(ROOT / "fileio/tensor_files.py"))
    )
    assert len(flags_built(tree(ROOT / "opts.py"))) > 40
    assert printing(tree(ROOT / "experiment/console.py"))
    assert "kernels.triton_ops" in tied_to_a_backend(tree(ROOT / "kernels/backend.py"))
    assert "torch.distributed" in exchanges(tree(ROOT / "distributed/world.py"))
    assert {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= set(
        places_read(tree(ROOT / "distributed/launcher.py"))
    )


# ------------------------------------------------------------------------------------- the house


def test_the_root_has_five_files():
    files = sorted(path.name for path in ROOT.glob("*.py"))
    assert files == ["checkpoints.py", "errors.py", "main.py", "opts.py", "train.py"]


@pytest.mark.parametrize("path", [p for p in sources() if p.name == "__init__.py"], ids=name)
def test_a_package_face_is_one_docstring(path):
    (only,) = tree(path).body
    assert isinstance(only, ast.Expr) and ast.get_docstring(tree(path))


def too_long(text: str, max_file: int = MAX_FILE) -> list[str]:
    """What of a file is too long: `file`, and the names of its classes and functions."""
    limits = {ast.ClassDef: MAX_CLASS, ast.FunctionDef: MAX_FUNCTION}
    nodes = [node for node in ast.walk(ast.parse(text)) if type(node) in limits]
    lengths = [(node.name, node.end_lineno - node.lineno + 1, limits[type(node)]) for node in nodes]
    lengths.append(("file", len(text.splitlines()), max_file))
    return [name for name, length, limit in lengths if length > limit]


def test_what_is_too_long_would_be_found():
    method = "    def f():\n" + "        1\n" * MAX_FUNCTION
    assert too_long("class C:\n" + method) == ["f"]
    assert too_long("class C:\n" + "    x = 1\n" * MAX_CLASS) == ["C"]
    assert too_long("x = 1\n" * (MAX_FILE + 1)) == ["file"]
    assert too_long("x = 1\n" * MAX_FILE) == []


@pytest.mark.parametrize("path", sources(), ids=name)
def test_nothing_is_too_long_to_hold_in_the_head(path):
    assert too_long(path.read_text(), LONGER.get(name(path), MAX_FILE)) == []
