"""Draw the paper's figures and training curves from runs, as PNG and SVG.

Published numbers come from docs/published.yaml, measured ones from the logs of runs, parameters and
multiply-adds from counting the networks of configs/. Nothing is drawn where nothing was measured.
"""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

from cli.flag_types import Flag, closest_match, text
from datasets.registry import DATASETS
from errors import CheckpointError, DataError, RunError, StorageError, UsageError
from fileio.atomic import atomic_write
from tools import cli
from tools.figures import layer_usage, series
from tools.results import groups, published, runs
from tools.results.runs import Run

# Figures of runs without published errors, and the folder of their configs.
OWN_FIGURES = {"figure4-small": "small", "figure4-digits": "digits"}
NAMES = ("figure3", "figure4", *OWN_FIGURES, "curves", "figure5")
# The networks whose training curves Figure 4 shows.
PAPER_CURVES = {
    "c10plus/preresnet-1001": "pre-activation ResNet-1001",
    "c10plus/densenet-bc-L100-k12": "DenseNet-BC L=100 k=12",
}
FLAGS = {
    flag.name: flag
    for flag in (
        Flag("output", text, "results/figures", "directory to write the figures into"),
        Flag("only", text, None, f"which figures, with commas between: {', '.join(NAMES)}",
             "all that can be drawn"),
        Flag("weights", text, None, "run directory, checkpoint or model file to draw Figure 5 of, "
             "or the figure5.csv of an earlier call", "no Figure 5"),
        Flag("scale", text, None, "what a cell of Figure 5 is divided by: the largest of its "
             "column, of its block, or nothing", "column", choices=tuple(layer_usage.SCALES)),
        Flag("note", text, "", "text to show with figures of weights and of runs on a folder of "
             "images, such as where these are from", "none"),
    )
}  # fmt: skip
USAGE = """usage: python -m tools.figures RUNS... [options]
       python -m tools.figures --weights CHECKPOINT [options]

RUNS are run directories, or directories to search for them. Draws figure3 (ImageNet), figure4
(parameter efficiency on C10+), figure4-small and figure4-digits (the same of runs of configs/small
and configs/digits), curves of all runs, and with --weights figure5 (which layer uses which), each
as PNG and SVG, and the numbers of figure5 as CSV."""


# ------------------------------------------------------------------------------------- the figures


def figure3(plots: ModuleType, found: groups.Runs):
    """Draw ImageNet errors against parameters and against multiply-adds."""
    points = series.published_points(published.tables()["imagenet"].rows, "top-1")
    points += series.measured_points(found.groups, "imagenet")
    panels = [("by parameters", "parameters", points), ("by multiply-adds", "macs", points)]
    return plots.efficiency(panels, "ImageNet, top-1 error of one crop")


def figure4(plots: ModuleType, found: groups.Runs, shown: list[Run]):
    """Draw C10+: variants of DenseNet, DenseNet-BC against ResNet, and how two of them train."""
    points = series.published_points(published.tables()["table2"].rows, "C10+")
    points += series.measured_points(found.groups, "c10plus")
    variants = [point for point in points if point.kind.startswith("DenseNet")]
    rivals = [point for point in points if point.kind in ("DenseNet-BC", "pre-activation ResNet")]
    drawn = [run for run in shown if run.config in PAPER_CURVES and run.records]
    absent = PAPER_CURVES.keys() - {run.config for run in drawn}
    panels = [
        ("DenseNet variants", "parameters", variants),
        ("DenseNet-BC and ResNet", "parameters", rivals),
    ]
    missing = tuple(title for name, title in PAPER_CURVES.items() if name in absent)
    return plots.efficiency(panels, "CIFAR-10 with augmentation (C10+)", drawn, missing)


def own_figure4(plots: ModuleType, found: groups.Runs, folder: str, note: str):
    """Draw the same of the runs of another folder of configs/; None if there is none."""
    own = [group for name, group in found.groups.items() if name.startswith(f"{folder}/")]
    shown = [run for group in own for run in group.runs]
    if not shown:
        return None
    data = sorted({f"{series.data_name(run.opt)}, {run.opt.nEpochs} epochs" for run in shown})
    if len({run.images for run in shown}) > 1:
        data.append("not all on the same images")
    points = series.measured_points(found.groups, folder)
    panels = [("by parameters", "parameters", points), ("by multiply-adds", "macs", points)]
    title = f"Runs of configs/{folder}, not of the paper: {'; '.join(data)}"
    title = _with_note(title, note, shown)
    return plots.efficiency(panels, title, series.largest_of_each_kind(shown))


def training_curves(plots: ModuleType, shown: list[Run], note: str) -> dict:
    """Draw the runs on the same data and of the same length together, by name of the file."""
    figures = {}
    for title, group in series.by_data(shown).items():
        name = re.sub(r"[^a-z0-9.]+", "-", title.lower().replace("+", "-plus"))
        figures[f"curves-{name}"] = plots.training(group, _with_note(title, note, group))
    return figures


def _with_note(title: str, note: str, shown: list[Run]) -> str:
    """Add the note to figures of a user's own images, whose name says little."""
    own_images = all(DATASETS[run.opt.dataset].is_named_by_directory for run in shown)
    return f"{title}\n{note}".rstrip() if own_images else title


def read_layer_usage(path: Path) -> tuple[str, list[layer_usage.Block], bytes]:
    """Return the name of the weights, the cells of Figure 5, and both as CSV.

    Args:
        path: the CSV of an earlier call, or weights that tools.inference.sources reads.

    Raises:
        RunError: it cannot be read, or is not of a DenseNet.
    """
    if path.suffix == ".csv":
        try:
            table = path.read_bytes()
        except OSError as error:
            what = f"cannot read {path}: {error.strerror}"
            raise DataError(what, "name a figure5.csv") from error
    else:
        from models import lua_weights
        from tools.inference import sources

        sources.check_there(path)
        weights = sources.read(path).weights
        if lua_weights.is_lua(weights):
            fix = "write them with python -m tools.export --to weights first"
            raise CheckpointError(f"the weights in {path} are named as in Lua", fix)
        in_run = path.stem.startswith(("checkpoint_", "model_"))
        full = path.resolve()
        name = full.parent.name if in_run else full.name if path.is_dir() else full.stem
        table = layer_usage.to_csv(name, layer_usage.blocks(weights, path))
    # Always through the table, so that the figure is a function of it.
    return *layer_usage.from_csv(path, table), table


# ----------------------------------------------------------------------------------- the command


def parse(argv: list[str]) -> SimpleNamespace:
    """Return the flags, with `runs` and the names in `only` as lists.

    Raises:
        UsageError: every problem of the command line at once.
    """
    given = cli.read(argv, FLAGS, arguments="run directory", least=0)
    asked = given.options
    asked.runs = given.arguments
    possible = [name for name in NAMES if (asked.weights if name == "figure5" else asked.runs)]
    if not possible:
        raise UsageError("no run directory", "name at least one, or --weights CHECKPOINT")
    asked.only = asked.only.split(",") if asked.only else possible
    problems = []
    for name in asked.only:
        if name not in NAMES:
            fix = f"use {closest_match(name, NAMES) or NAMES[0]}"
            problems.append((f"only: {name!r} is not one of {', '.join(NAMES)}", fix))
        elif name not in possible:
            need = "--weights CHECKPOINT" if name == "figure5" else "a run directory"
            problems.append((f"there is nothing to draw {name} of", f"name {need}"))
    if "figure5" not in asked.only and (asked.weights or asked.scale):
        problems.append(("weights and scale are of figure5 alone", "add figure5 to --only"))
    if asked.only == ["figure5"] and asked.runs:
        problems.append(("figure5 shows no run", "leave run directories out"))
    if problems:
        raise UsageError.from_problems(problems)
    asked.scale = asked.scale or next(iter(layer_usage.SCALES))
    return asked


def draw(plots: ModuleType, asked: SimpleNamespace, found: list[Run]) -> tuple[dict, bytes | None]:
    """Return the figures by the names of their files, and the table of Figure 5."""
    grouped = groups.group_runs(found)
    unused = [run for run, _ in grouped.unused]
    shown = [run for run in found if run not in unused]
    figures, table = {}, None
    for name in asked.only:
        if name == "figure3":
            figures[name] = figure3(plots, grouped)
        elif name == "figure4":
            figures[name] = figure4(plots, grouped, shown)
        elif name == "curves":
            figures |= training_curves(plots, shown, asked.note)
        elif name == "figure5":
            network, blocks, table = read_layer_usage(Path(asked.weights))
            figures[name] = plots.heat_maps(network, blocks, asked.scale, asked.note)
        elif figure := own_figure4(plots, grouped, OWN_FIGURES[name], asked.note):
            figures[name] = figure
        else:
            print(f"{name}: not run: there is no complete run of configs/{OWN_FIGURES[name]}")
    return figures, table


def draw_and_save(argv: list[str]) -> None:
    """Read everything, draw, then write and print the names of the files.

    Raises:
        RunError: of any kind; nothing was written unless it is a StorageError.
    """
    asked = parse(argv)
    try:
        from tools.figures import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        fix = "pip install -r requirements-tools.txt"
        raise RunError("tools.figures needs matplotlib", fix) from error
    found = runs.find(asked.runs)
    if asked.runs and not found:
        what = f"no run in {', '.join(asked.runs)}"
        raise DataError(what, "name directories that hold a config.yaml beside a log.jsonl")
    figures, table = draw(plots, asked, found)
    directory = Path(asked.output)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot make {directory}: {error.strerror}"
        raise StorageError(what, "name another directory with --output") from error
    if table:
        atomic_write(directory / "figure5.csv", table)
        print(directory / "figure5.csv")
    for name, figure in figures.items():
        for path in plots.save(figure, directory, name):
            print(path)


def main(argv: list[str]) -> int:
    """Run a command line; return the exit code."""
    return cli.run(argv, USAGE, FLAGS, draw_and_save)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
