"""The paper's figures and training curves from runs, as PNG and SVG.

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
from tools.figures import layer_usage
from tools.figures.series import (
    alike,
    curve,
    data_name,
    largest_of_each_kind,
    measured_series,
    published_series,
)
from tools.results import configs, match, published

# Figures of runs that reproduce no cell of the paper, and the folder of their configs.
ASIDE = {"figure4-small": "small", "figure4-digits": "digits"}
NAMES = ("figure3", "figure4", *ASIDE, "curves", "figure5")
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
        Flag("note", text, "", "words to be shown with figures of weights and of runs on a folder "
             "of images, such as where these are from", "none"),
    )
}  # fmt: skip
USAGE = """usage: python -m tools.figures RUNS... [options]
       python -m tools.figures --weights CHECKPOINT [options]

RUNS are run directories, or directories to search for them. Draws figure3 (ImageNet), figure4
(parameter efficiency on C10+), figure4-small and figure4-digits (the same of runs of configs/small
and configs/digits), curves of all runs, and with --weights figure5 (which layer uses which), each
as PNG and SVG, and the numbers of figure5 as CSV."""

# Whose training curves Figure 4 shows.
PAPER_CURVES = {
    "c10plus/preresnet-1001": "pre-activation ResNet-1001",
    "c10plus/densenet-bc-L100-k12": "DenseNet-BC L=100 k=12",
}


# ------------------------------------------------------------------------------------- the figures


def figure3(plots: ModuleType, cells: dict):
    """ImageNet: error against parameters and against multiply-adds."""
    rows = published.tables()["imagenet"].rows
    cited = published_series(rows, "top-1", configs.configs())
    series = [*cited, *measured_series(cells, "imagenet")]
    return plots.results(series, "top-1 error on ImageNet, one crop, %")


def figure4(plots: ModuleType, cells: dict, shown: list):
    """C10+: variants of DenseNet, DenseNet-BC against ResNet, and how two of them train."""
    rows = published.tables()["table2"].rows
    series = published_series(rows, "C10+", configs.configs()) + measured_series(cells, "c10plus")
    variants = [one for one in series if one.kind.startswith("DenseNet")]
    rivals = [one for one in series if one.kind in ("DenseNet-BC", "pre-activation ResNet")]
    drawn = [run for run in shown if run.config in PAPER_CURVES and run.records]
    absent = PAPER_CURVES.keys() - {run.config for run in drawn}
    return plots.efficiency(
        [
            ("DenseNet variants", "parameters", variants),
            ("DenseNet-BC and ResNet", "parameters", rivals),
        ],
        [curve(run) for run in drawn],
        [title for name, title in PAPER_CURVES.items() if name in absent],
        "CIFAR-10 with augmentation (C10+)",
    )


def figure4_aside(plots: ModuleType, cells: dict, folder: str, note: str = ""):
    """The same of runs that reproduce no cell of the paper; None when there is none."""
    own = {name: cell for name, cell in cells.items() if name.split("/")[0] == folder}
    if not own:
        return None
    found = [run for cell in own.values() for run in cell.runs]
    data = sorted({f"{data_name(run.opt)}, {run.opt.nEpochs} epochs" for run in found})
    if len({run.images for run in found}) > 1:
        data.append("not all on the same images")
    series = measured_series(own, folder)
    title = f"Runs of configs/{folder}, no cell of the paper: {'; '.join(data)}"
    return plots.efficiency(
        [("by parameters", "parameters", series), ("by multiply-adds", "macs", series)],
        [curve(run) for run in largest_of_each_kind(found)],
        [],
        _lines(title, _of_folder(note, found)),
    )


def training_curves(plots: ModuleType, shown: list, note: str = "") -> dict:
    """A figure for all runs that train alike, by the name of its file."""
    return {
        "curves-" + re.sub(r"[^a-z0-9.]+", "-", title.lower().replace("+", "-plus")):
            plots.training([curve(run) for run in group], _lines(title, _of_folder(note, group)))
        for title, group in alike(shown).items()
    }  # fmt: skip


def _of_folder(note: str, found: list) -> str:
    """The note where it belongs: images of one's own, of which a name says little."""
    return note if all(DATASETS[run.opt.dataset].is_named_by_directory for run in found) else ""


def _lines(*texts: str) -> str:
    return "\n".join(filter(None, texts))


# ----------------------------------------------------------------------------------- the command


def parse(argv: list[str]) -> SimpleNamespace:
    """The flags, with `runs` and the names in `only` as lists.

    Raises:
        UsageError: every problem of the command line at once.
    """
    given = cli.read(argv, FLAGS, arguments="run directory", least=0)
    asked = given.options
    asked.runs = given.arguments
    asked.only = asked.only.split(",") if asked.only else _can_be_drawn(asked)
    problems = _misfits(asked)
    if problems:
        raise UsageError.from_problems(problems)
    asked.scale = asked.scale or next(iter(layer_usage.SCALES))
    return asked


def _can_be_drawn(asked: SimpleNamespace) -> list[str]:
    return [name for name in NAMES if (asked.weights if name == "figure5" else asked.runs)]


def _misfits(asked: SimpleNamespace) -> list[tuple[str, str]]:
    """What is asked for without what it is drawn of, and the other way round."""
    if not asked.runs and not asked.weights:
        return [("no run directory", "name at least one, or --weights CHECKPOINT")]
    problems = []
    for name in asked.only:
        if name not in NAMES:
            fix = f"use {closest_match(name, NAMES) or NAMES[0]}"
            problems.append((f"only: {name!r} is not one of {', '.join(NAMES)}", fix))
        elif name not in _can_be_drawn(asked):
            need = "--weights CHECKPOINT" if name == "figure5" else "a run directory"
            problems.append((f"there is nothing to draw {name} of", f"name {need}"))
    if "figure5" not in asked.only and (asked.weights or asked.scale):
        problems.append(("weights and scale are of figure5 alone", "add figure5 to --only"))
    if asked.only == ["figure5"] and asked.runs:
        problems.append(("no run is shown in figure5", "leave run directories out"))
    return problems


def main(argv: list[str]) -> int:
    """Draw the figures and print the names of their files."""
    return cli.run(argv, USAGE, FLAGS, work)


def work(argv: list[str]) -> None:
    """Read everything first, then draw and write.

    Raises:
        RunError: of any kind; nothing was written unless it is a StorageError.
    """
    asked = parse(argv)
    plots = _plots()
    found = match.find(asked.runs)
    if asked.runs and not found:
        what = f"no run in {', '.join(asked.runs)}"
        raise DataError(what, "name directories that hold a config.yaml beside a log.jsonl")
    made, table = _drawn(plots, asked, found)
    directory = Path(asked.output)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot make {directory}: {error.strerror}"
        raise StorageError(what, "name another directory with --output") from error
    if table:
        atomic_write(directory / "figure5.csv", table)
        print(directory / "figure5.csv")
    for name, figure in made.items():
        for path in plots.save(figure, directory, name):
            print(path)


def _drawn(plots: ModuleType, asked: SimpleNamespace, found: list) -> tuple[dict, bytes | None]:
    """The figures by the names of their files, and the table of Figure 5."""
    arranged = match.group_runs(found)
    left_out = [run for run, _ in arranged.unused]
    shown = [run for run in found if run not in left_out]
    cells, made, table = arranged.groups, {}, None
    for name in asked.only:
        if name == "figure3":
            made[name] = figure3(plots, cells)
        elif name == "figure4":
            made[name] = figure4(plots, cells, shown)
        elif name == "curves":
            made |= training_curves(plots, shown, asked.note)
        elif name == "figure5":
            whose, blocks, table = cells_of(Path(asked.weights))
            made[name] = plots.heat_maps(whose, blocks, asked.scale, asked.note)
        else:
            figure = figure4_aside(plots, cells, ASIDE[name], asked.note)
            if figure is None:
                print(f"{name}: not run: there is no complete run of configs/{ASIDE[name]}")
            else:
                made[name] = figure
    return made, table


def cells_of(path: Path) -> tuple[str, list[layer_usage.Block], bytes]:
    """Whose weights they are, the cells of Figure 5, and both as CSV.

    Args:
        path: a CSV that this has written, or what tools.inference.sources reads.

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
        whole = path.resolve()
        whose = whole.parent.name if in_run else whole.name if path.is_dir() else whole.stem
        table = layer_usage.as_csv(whose, layer_usage.blocks(weights, path))
    # Through the table in any case, so that the figure is a function of it.
    return *layer_usage.from_csv(path, table), table


def _plots() -> ModuleType:
    try:
        from tools.figures import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        fix = "pip install -r requirements-tools.txt"
        raise RunError("tools.figures needs matplotlib", fix) from error
    return plots


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
