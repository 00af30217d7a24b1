"""Print the paper's tables as Markdown, published and measured errors side by side.

usage: python -m tools.report RUNS... [--output FILE]

The measured ones are of the runs in the directories RUNS and below. A run is a directory with
config.yaml and log.jsonl; it needs no weights, and belongs to the config in configs/ whose settings
it has, seed aside. The report depends on the runs, configs/ and docs/published.yaml alone:
RESULTS.md is the report of results/runs.
"""

import os
import shlex
import sys
import urllib.parse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cli.flag_types import Flag, Settings, pathname
from cli.network_settings import network_name
from errors import UsageError, printable
from experiment import console
from fileio.atomic import atomic_write
from tools import cli
from tools.results import published, runs
from tools.results.configs import configs, count
from tools.results.runs import GroupedRuns, SeedGroup

OUTPUT = Flag(
    "output", pathname, None, "Markdown file to write; an existing report is replaced", "print it"
)
TOOL = cli.Tool(__doc__, (OUTPUT,), "directory of runs")
parse = TOOL.parse

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
test error after the last epoch, or, where a config holds images out for validation (on SVHN except
for the Wide ResNet, and for ResNets of 110 and 1202 layers), that of the model with the lowest
validation error. No run chooses a model by its test error.

"Images" are the numbers of training and test images. Parameters and multiply-adds (of convolutions
and the classifier, for one image) are counted from the network, for ten classes on CIFAR and SVHN,
as in the paper, and for a thousand on ImageNet; the parameters of a Deeply Supervised Net include
the companion classifiers, which only training computes. Hours are the wall-clock time of training
and validation in one run, whatever else the machine did; s/step is the median over epochs, and
memory the peak: of the GPU's allocator, or of the whole process on a CPU.

A run on images that were re-encoded, such as CIFAR-10 as JPEG files, is not comparable to the
paper: its training and test images have other pixels."""

COSTS = {"seconds_per_iteration": "s/step, paper>", "memory_mb": "MB, paper>"}
NOT_RUN = "not run"  # nothing was measured
UNKNOWN = "-"  # nothing was published, or a log lacks it


# A row of a table is title -> cell; a title that ends in > is of a column of numbers.
Cells = dict[str, str]


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
    name, data = runs.data_name(group.runs[0].opt), group.runs[0].data
    counts = (runs.number(data, "train"), runs.number(data, "test") or runs.number(data, "val"))
    return name if None in counts else "{}, {:,} + {:,}".format(name, *counts)


def size_and_cost(opt: Settings, group: SeedGroup | None) -> Cells:
    """Return the cells that most tables end with: the network's size, and what one run needed."""
    size = count(opt)
    row = {"parameters>": f"{size.parameters:,}", "multiply-adds>": f"{size.macs:,}"}
    row["chosen by"] = runs.selection(opt)
    devices = dict.fromkeys(run.device or UNKNOWN for run in group.runs) if group else [NOT_RUN]
    row["hardware"] = "; ".join(devices)
    for title, name, form in (
        ("hours>", "hours", ".2f"),
        ("s/step>", "seconds_per_step", ".3f"),
        ("MB>", "memory_mb", ",.0f"),
    ):
        value = group and group.average(name)
        if value and name == "hours" and value < 0.1:
            form = ".2g"  # 0.0032 of a run of seconds
        missing = UNKNOWN if group else NOT_RUN
        row[title] = missing if value is None else format(value, form)
    return row


def markdown_table(rows: list[Cells]) -> str:
    """Format rows with the same titles as a Markdown table."""
    if not rows:
        return "None."
    titles = [title.removesuffix(">") for title in rows[0]]
    rule = ["--:" if title.endswith(">") else "---" for title in rows[0]]
    body = [[printable(text).replace("|", "\\|") for text in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [titles, rule, *body])


def overview(table: published.Table, found: GroupedRuns) -> str:
    """Repeat a published table, with `published / measured` where there is a config."""
    rows = []
    for row in table.rows:
        name = row.method if row.configs else f"{row.method} (cited)"
        line = {"method": name, "L>": row.depth or UNKNOWN, "parameters>": row.params or UNKNOWN}
        for column in table.columns:
            config = row.configs.get(column)
            own = f" / {measured(found.groups.get(config))}" if config else ""
            line[f"{column}: paper / measured"] = printed(row, column) + own
        rows.append(line | {COSTS[name]: cost for name, cost in row.costs.items()})
    return markdown_table(rows)


def details(table: published.Table, found: GroupedRuns) -> str:
    """List the configs of a published table, a line each."""
    rows = []
    for row in table.rows:
        for column, name in row.configs.items():
            group = found.groups.get(name)
            line = {
                "config": f"`{name}`",
                "paper>": printed(row, column),
                "measured>": measured(group),
                "difference>": f"{group.mean - float(row.errors[column]):+.2f}" if group else "-",
            }
            rows.append(line | size_and_cost(configs()[name].opt, group))
    return markdown_table(rows)


def own_configs(found: GroupedRuns) -> Iterator[str]:
    """List the configs without a claim, a table for each folder."""
    folders: dict[str, list[Cells]] = {}
    for name, config in configs().items():
        if not config.claim:
            group = found.groups.get(name)
            line = {"config": f"`{name}`", "measured>": measured(group), "images": images(group)}
            rows = folders.setdefault(name.partition("/")[0], [])
            rows.append(line | size_and_cost(config.opt, group))
    for folder, rows in folders.items():
        yield f"## Of this project: configs/{folder}"
        yield "Nothing was published for these settings, so there is nothing to compare with."
        yield markdown_table(rows)


def other_runs(found: GroupedRuns) -> Iterator[str]:
    """List the runs that belong to no config, and those that are not complete."""
    yield "## Other complete runs"
    rows = []
    for group in found.others:
        opt = group.runs[0].opt
        line = {
            "runs": ", ".join(f"`{run.path.as_posix()}`" for run in group.runs),
            "measured>": measured(group),
            "network": network_name(opt),
            "epochs>": str(opt.nEpochs),
            "images": images(group),
        }
        rows.append(line | size_and_cost(opt, group))
    yield markdown_table(rows)
    yield "## Runs that are not complete"
    yield markdown_table([
        {
            "run": f"`{run.path.as_posix()}`",
            "config": f"`{run.config}`" if run.config else UNKNOWN,
            "seed>": str(run.opt.manualSeed),
            "epoch>": f"{run.epoch} of {run.opt.nEpochs}",
            "state": run.state + (", but its log or its result is missing" * (run.state == "done")),
        }
        for run in found.unfinished
    ])  # fmt: skip


def figures(directories: list[str], base: Path) -> Iterator[str]:
    """Show the pictures in `figures` beside each directory of runs, by links relative to `base`."""
    folders = dict.fromkeys(Path(directory).parent / "figures" for directory in directories)
    pictures = [path for folder in folders for path in sorted(folder.glob("*.png"))]
    if pictures:
        yield "## Figures"
    for path in pictures:
        link = urllib.parse.quote(
            Path(os.path.relpath(path, base)).as_posix(), errors="surrogateescape"
        )
        yield f"![{printable(path.stem)}]({link})"


def create(argv: list[str]) -> str:
    """Return the report that a command line asks for; print which runs are left out."""
    asked = parse(argv)
    found = runs.group_runs(runs.find(asked.arguments))
    for run, first in found.repeated:
        console.warn(f"{run.path} is left out: {first.path} has the same settings and seed")
    command = printable(shlex.join(["python", "-m", "tools.report", *argv]))
    parts = [HEAD.format(command=command), INTRODUCTION]
    for table in published.tables().values():
        parts += [f"## {table.title}", table.note, overview(table, found)]
        parts += ["By config:", details(table, found)]
    parts += own_configs(found)
    parts += other_runs(found)
    parts += figures(asked.arguments, Path(asked.options.output or "").parent)
    parts.append("## Sources of the published numbers")
    texts = [text.replace("\n", "\n  ") for text in published.sources().values()]
    parts.append("\n".join(f"- {text}." for text in texts))
    return "\n\n".join(parts) + "\n"


def report(argv: list[str]) -> None:
    """Write or print the report; raise UsageError if the output exists and is not a report."""
    output = parse(argv).options.output
    if output and Path(output).is_file():
        with open(output, "rb") as file:
            if file.read(len(FIRST_WORDS)) not in (b"", FIRST_WORDS.encode()):
                what = f"output: {output} was not written by this tool"
                raise UsageError(what, "move it away, or name another --output")
    markdown = create(argv)
    if output:
        atomic_write(Path(output), markdown.encode())
    else:
        print(markdown, end="")


main = partial(TOOL.run, report)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
