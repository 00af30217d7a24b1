"""Print the paper's tables with the errors that runs have measured: `python -m tools.report RUNS`.

The output is Markdown: Table 2 of the paper, and the Wide-DenseNets and ImageNet models of the
authors' README, each published error beside the measured one; then all other runs. It depends on
the runs, configs/ and docs/published.yaml alone: RESULTS.md is the report of results/runs.
"""

import os
import shlex
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from cli import network_settings
from cli.flag_types import Flag, Settings, text
from datasets.registry import DATASETS
from errors import UsageError, printable
from fileio.atomic import atomic_write
from tools import cli
from tools.results import groups, published, runs
from tools.results.configs import configs, count
from tools.results.groups import Runs, SeedGroup

# fmt: off
FLAGS = {flag.name: flag for flag in (
    Flag("output", text, None, "Markdown file to write; an existing report is replaced",
         "print it"),
)}
# fmt: on

USAGE = """usage: python -m tools.report RUNS... [--output FILE]

The paper's tables as Markdown, published and measured errors side by side, from the runs in the
directories RUNS and below. A run is a directory with config.yaml and log.jsonl; it needs no
weights. It belongs to the config in configs/ whose settings it has, seed aside."""

FIRST_WORDS = "# Results\n\nWritten by `python -m tools.report"
HEAD = """# Results

Written by `{command}`
from the runs found there, the settings in configs/ and the published numbers in
docs/published.yaml. Do not edit it: run the command again."""

INTRODUCTION = """\
Errors are in per cent. "Paper" is the published error; "measured" is the mean over complete runs of
a config, one for each seed, +- their sample standard deviation, with n, the number of seeds;
"difference" is measured minus published, in points. "not run" means that there is no complete run
of the config, "-" that nothing was published or that a log lacks the value. A measured error is the
test error after the last epoch, or, where a config holds images out for validation (on SVHN, and
for ResNet-110), that of the model with the lowest validation error. No run chooses a model by its
test error.

"Images" are the numbers of training and test images. Parameters and multiply-adds (of convolutions
and the classifier, for one image) are counted from the network, for ten classes on CIFAR and SVHN,
as in the paper, and for a thousand on ImageNet. Hours are the wall-clock time of training and
validation in one run, whatever else the machine did; s/step is the median over epochs, and memory
the peak: of the GPU's allocator, or of the whole process on a CPU.

A run on images that were re-encoded, such as CIFAR-10 as JPEG files, is not comparable to the
paper: its training and test images have other pixels."""

# Paragraphs below the titles of the published tables.
NOTES = {
    "table2": "Rows marked cited are results of other works as the paper quotes them; no config "
    "here reproduces them. An asterisk is the paper's: its authors ran the method of others "
    "themselves. Numbers in brackets are the paper's references. The published 10.2M of the "
    "pre-activation ResNet-1001 are without its batch normalisation.",
    "wide": "The README claims that k = 36 needs less time and memory than DenseNet-BC (L=100, "
    "k=12) at about its error, and that k = 48 needs about the same and has a lower one. Seconds "
    "per training step and memory were published for one TITAN X.",
    "imagenet": "Rows marked cited have no config here.",
}
NOT_RUN = "not run"  # nothing was measured
UNKNOWN = "-"  # nothing was published, or a log lacks it

# ----------------------------------------------------------------------------- cells of the tables


def measured(group: SeedGroup | None) -> str:
    """Format the error of a group: 4.51 +- 0.08 (n = 3)."""
    if group is None:
        return NOT_RUN
    deviation = "" if group.std is None else f" +- {group.std:.2f}"
    return f"{group.mean:.2f}{deviation} (n = {len(group.runs)})"


def printed(row: published.Row, column: str) -> str:
    """Return the published error as it was printed."""
    return row.errors.get(column, UNKNOWN) + ("\\*" if column in row.own else "")


def images(group: SeedGroup | None) -> str:
    """Name the data and the numbers of training and test images: cifar10, 50,000 + 10,000."""
    if group is None:
        return NOT_RUN
    opt, data = group.runs[0].opt, group.runs[0].data
    by_directory = DATASETS[opt.dataset].is_named_by_directory
    name = Path(opt.data).name if by_directory else opt.dataset
    counts = (runs.number(data, "train"), runs.number(data, "test") or runs.number(data, "val"))
    return name + ("" if None in counts else ", {:,} + {:,}".format(*counts))


FACTS = ["parameters>", "multiply-adds>", "chosen by", "hardware", "hours>", "s/step>", "MB>"]


def facts(opt: Settings, group: SeedGroup | None) -> list[str]:
    """Fill the columns FACTS: the network's counts, and what one run needed."""
    counts = count(opt)
    found = [f"{counts.parameters:,}", f"{counts.macs:,}", runs.selection(opt)]
    if group is None:
        return found + [NOT_RUN] * 4
    found.append(group.device or UNKNOWN)
    for name, form in (("hours", ".2f"), ("seconds_per_step", ".3f"), ("memory_mb", ",.0f")):
        value = group.average(name)
        # 0.0032 of a run of seconds
        form = ".2g" if value and name == "hours" and value < 0.1 else form
        found.append(UNKNOWN if value is None else format(value, form))
    return found


def markdown_table(titles: list[str], rows: Iterable[list[str]]) -> str:
    """Format a Markdown table; a title that ends in > is of a column of numbers."""
    shown = [title.removesuffix(">") for title in titles]
    rule = ["--:" if title.endswith(">") else "---" for title in titles]
    body = [[printable(text).replace("|", "\\|") for text in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [shown, rule, *body])


def wrap(text: str, indent: str = "") -> str:
    """Break a paragraph into lines, with `indent` before all but the first."""
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


# --------------------------------------------------------------------------------------- sections


def overview(table: published.Table, found: Runs) -> str:
    """Repeat a published table, with `published / measured` where there is a config."""
    costs = {name: title for name, title in (("seconds_per_iteration", "s/step, paper>"),
             ("memory_mb", "MB, paper>")) if any(row.costs for row in table.rows)}  # fmt: skip
    errors = [f"{column}: paper / measured" for column in table.columns]
    body = []
    for row in table.rows:
        name = row.method if row.configs else f"{row.method} (cited)"
        line = [name, str(row.depth or UNKNOWN), row.params or UNKNOWN]
        for column in table.columns:
            config = row.configs.get(column)
            own = f" / {measured(found.groups.get(config))}" if config else ""
            line.append(printed(row, column) + own)
        body.append(line + [row.costs[name] for name in costs])
    return markdown_table(["method", "L>", "parameters>", *errors, *costs.values()], body)


def details(table: published.Table, found: Runs) -> str:
    """List the configs of a published table, a line each."""
    body = []
    for row in table.rows:
        for column, name in row.configs.items():
            group = found.groups.get(name)
            difference = f"{group.mean - float(row.errors[column]):+.2f}" if group else UNKNOWN
            line = [f"`{name}`", printed(row, column), measured(group), difference]
            body.append(line + facts(configs()[name].opt, group))
    return markdown_table(["config", "paper>", "measured>", "difference>", *FACTS], body)


def own_configs(found: Runs) -> Iterator[str]:
    """List the configs without a claim, a table for each folder."""
    own = [config for config in configs().values() if not config.claim]
    for folder in sorted({config.name.partition("/")[0] for config in own}):
        yield f"## Of this project: configs/{folder}"
        yield "Nothing was published for these settings, so there is nothing to compare with."
        body = []
        for config in (config for config in own if config.name.startswith(f"{folder}/")):
            group = found.groups.get(config.name)
            line = [f"`{config.name}`", measured(group), images(group)]
            body.append(line + facts(config.opt, group))
        yield markdown_table(["config", "measured>", "images", *FACTS], body)


def other_runs(found: Runs) -> Iterator[str]:
    """List the runs that belong to no config, and those that are not complete."""
    yield "## Other complete runs"
    body = []
    for group in found.others:
        opt = group.runs[0].opt
        paths = ", ".join(f"`{run.path.as_posix()}`" for run in group.runs)
        line = [
            paths,
            measured(group),
            network_settings.network_name(opt),
            str(opt.nEpochs),
            images(group),
        ]
        body.append(line + facts(opt, group))
    titles = ["runs", "measured>", "network", "epochs>", "images", *FACTS]
    yield markdown_table(titles, body) if body else "None."
    yield "## Runs that are not complete"
    body = []
    for run in found.unfinished:
        state = "done, but its log or its result is missing" if run.state == "done" else run.state
        config = f"`{run.config}`" if run.config else UNKNOWN
        epoch = f"{run.epoch} of {run.opt.nEpochs}"
        body.append([f"`{run.path.as_posix()}`", config, str(run.seed), epoch, state])
    titles = ["run", "config", "seed>", "epoch>", "state"]
    yield markdown_table(titles, body) if body else "None."


def left_out(found: Runs, notes: list[str]) -> Iterator[str]:
    """List what was found and not used, with the reason."""
    notes = [f"{run.path} ({run.error:.2f}) has {reason}" for run, reason in found.unused] + notes
    if notes:
        yield "## Left out"
        yield "\n".join(f"- {printable(note)}" for note in notes)


def figures(directories: list[str], base: Path) -> Iterator[str]:
    """Show the pictures in the folder `figures` beside each directory of runs.

    Args:
        base: directory of the document, which the links start from.
    """
    folders = dict.fromkeys(Path(directory).parent / "figures" for directory in directories)
    pictures = [path for folder in folders for path in sorted(folder.glob("*.png"))]
    if pictures:
        yield "## Figures"
    for path in pictures:
        link = Path(os.path.relpath(path, base)).as_posix().replace(" ", "%20")
        yield f"![{path.stem}]({link})"


# ----------------------------------------------------------------------------------- the command


def parse(argv: list[str]) -> cli.Command:
    """Parse a command line; read no file.

    Raises:
        UsageError: every problem of the flags at once.
    """
    return cli.read(argv, FLAGS, arguments="directory of runs")


def create(argv: list[str]) -> tuple[str, list[str]]:
    """Return the report that a command line asks for, and the warnings about unreadable runs.

    Raises:
        UsageError: flags that cannot be read.
        DataError: an argument that is not a directory.
    """
    asked, notes = parse(argv), []
    found = groups.group_runs(runs.find(asked.arguments, notes.append))
    command = printable(shlex.join(["python", "-m", "tools.report", *argv]))
    parts = [HEAD.format(command=command), INTRODUCTION]
    for key, table in published.tables().items():
        parts += [f"## {table.title}", wrap(NOTES[key]), overview(table, found)]
        parts += ["By config:", details(table, found)]
    parts += own_configs(found)
    parts += other_runs(found)
    parts += left_out(found, notes)
    parts += figures(asked.arguments, Path(asked.options.output or "").parent)
    parts.append("## Sources of the published numbers")
    parts.append("\n".join(wrap(f"- {text}.", "  ") for text in published.sources().values()))
    return "\n\n".join(parts) + "\n", notes


def check_output(path: Path) -> None:
    """Raise UsageError if a file exists and is not a report."""
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(FIRST_WORDS)) not in (b"", FIRST_WORDS.encode()):
                what = f"output: {path} was not written by this tool"
                raise UsageError(what, "move it away, or name another --output")


def report(argv: list[str]) -> None:
    """Write or print the report that a command line asks for."""
    output = parse(argv).options.output
    if output:
        check_output(Path(output))
    markdown, notes = create(argv)
    for note in notes:
        runs.warn(note)
    if output:
        atomic_write(Path(output), markdown.encode())
    else:
        print(markdown, end="")


def main(argv: list[str]) -> int:
    """Run a command line; return the exit code."""
    return cli.run(argv, USAGE, FLAGS, report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
