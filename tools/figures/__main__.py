"""Draw the paper's figures and training curves from runs, as PNG and SVG.

usage: python -m tools.figures [RUNS...] [--weights CHECKPOINT] [options]

RUNS are run directories, or directories to search for them. Draws figure3 (ImageNet), figure4
(parameter efficiency and training on C10+), figure4-small and figure4-digits (the same of runs of
configs/small and configs/digits), curves of all runs, and with --weights figure5 (which layer uses
which), also as CSV. Published numbers come from docs/published.yaml, measured ones from the logs of
runs, parameters and multiply-adds from counting the networks of configs/. Nothing is drawn where
nothing was measured.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from cli.flag_types import Flag, pathname, text
from errors import DataError, UsageError
from experiment import console
from fileio.atomic import atomic_write, make_directory
from tools import cli
from tools.results import runs

NAMES = ("figure3", "figure4", "figure4-small", "figure4-digits", "curves", "figure5")
FLAGS = (
    Flag("output", pathname, "results/figures", "directory to write the figures into"),
    Flag("only", text, None, f"which figures, with commas between: {', '.join(NAMES)}",
         "all that can be drawn"),
    Flag("weights", pathname, None, "run directory, checkpoint or model file to draw Figure 5 of, "
         "or the figure5.csv of an earlier call", "no Figure 5"),
    Flag("scale", text, "column", "what a cell of Figure 5 is divided by: the largest of its "
         "column, of its block, or nothing", choices=("column", "block", "none")),
    Flag("note", text, "", "text to show with figures of weights and of runs on a folder of "
         "images, such as where these are from", "none"),
)  # fmt: skip
TOOL = cli.Tool(__doc__, FLAGS, "run directory", least=0)


def parse(argv: list[str]) -> SimpleNamespace:
    """Return the flags, with `runs` and the names in `only` as lists, or raise UsageError."""
    given = TOOL.parse(argv)
    asked = given.options
    asked.runs = given.arguments
    possible = [name for name in NAMES if (asked.weights if name == "figure5" else asked.runs)]
    if not possible:
        raise UsageError("no run directory", "name at least one, or --weights CHECKPOINT")
    asked.only = asked.only.split(",") if asked.only else possible
    fix = f"name some of {', '.join(NAMES)}: figure5 needs --weights, the others a run directory"
    problems = [(f"only: cannot draw {name!r}", fix) for name in asked.only if name not in possible]
    if "figure5" not in asked.only and asked.weights:
        problems.append(("weights are of figure5 alone", "add figure5 to --only"))
    UsageError.raise_for(problems)
    return asked


def draw_and_save(argv: list[str]) -> None:
    """Read and draw everything before the first file is written; print the names of the files."""
    asked = parse(argv)
    from tools.figures import plots

    found = runs.find(asked.runs)
    if asked.runs and not found:
        what = f"no run in {', '.join(asked.runs)}"
        raise DataError(what, "name directories that hold a config.yaml beside a log.jsonl")
    files = plots.draw(asked, found)
    directory = Path(asked.output)
    make_directory(directory)
    for name, content in files.items():
        atomic_write(directory / name, content)
        console.info(str(directory / name))


main = partial(TOOL.run, draw_and_save)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
