"""The paper's tables with what runs have measured: `python -m tools.report RUNS...`.

Prints Markdown: Table 2 of the paper, the Wide-DenseNets and the ImageNet models of the authors'
README, with the published and the measured error side by side, then the runs that are no cell of
them. The published numbers are those of docs/published.yaml, the settings of a cell those of its
config in configs/. The same runs give the same text on any machine: RESULTS.md is the one of
results/runs.
"""

import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cli.flag_types import POSITIVE, Flag, number, text
from datasets import registry
from errors import UsageError, printable
from fileio.atomic import atomic_write
from tools import cli
from tools.report.rows import (
    CSV_COLUMNS,
    NOT_RUN,
    UNKNOWN,
    Line,
    as_csv,
    lines,
    other_lines,
    own_lines,
)
from tools.results import match, published, runs
from tools.results.match import Runs, SeedGroup
from tools.results.runs import Run

# fmt: off
FLAGS = {flag.name: flag for flag in (
    Flag("output", text, None, "Markdown file to write; one that this tool has written is replaced",
         "print it"),
    Flag("csv", text, None, "CSV file to write too, one row for each config and each other group",
         "none"),
    Flag("price", number, None, "USD of an hour of one device: adds what a run costs",
         "hours only", range=POSITIVE),
)}
# fmt: on

USAGE = """usage: python -m tools.report RUNS... [--flag value ...]

The paper's tables as Markdown, published and measured errors side by side, from the runs in the
directories RUNS and below. A run is one whose config.yaml and log.jsonl are there; weights are
not needed. It counts for the config in configs/ that it has all settings of but the seed."""

INTRODUCTION = """\
Errors are in per cent. "Paper" is the published error; "measured" is the mean over complete runs of
a config, one for each seed, +- their sample standard deviation, with n, the number of seeds;
"difference" is measured minus published, in points. "not run" means that no complete run of the
config is there, "-" that nothing was published or that a log does not say. A measured number is the
test error after the last epoch, or, where a config holds images out for validation (on SVHN, and
for ResNet-110), that of the model with the lowest validation error; none is chosen by test error.

"Images" are how many were trained on and tested on. Parameters and multiply-adds (of convolutions
and the classifier, for one image) are counted from the network, for ten classes on CIFAR and SVHN,
as the paper does, and for a thousand on ImageNet. Hours are those of training and of validation
after each epoch, by the clock and with whatever else the machine did, for one run; device hours are
these times the devices at work.

A run on images that were re-encoded, such as CIFAR-10 as JPEG files, is not comparable to the
paper: it has learnt from and was tested on other pixels."""

# Paragraphs below the titles of the published tables.
NOTES = {
    "table2": "Rows marked cited are results of other works as the paper quotes them: nothing here "
    "reproduces them. An asterisk is the paper's: its authors ran the method of others themselves. "
    "Numbers in brackets are the paper's references. The published 10.2M of the pre-activation "
    "ResNet-1001 are without its batch normalisation.",
    "wide": "The README claims that k = 36 needs less time and memory than DenseNet-BC (L=100, "
    "k=12) at about its error, and that k = 48 needs about the same and has a lower one. Seconds "
    "per training step and memory were published for one TITAN X; the measured ones are those of "
    "the complete runs of both columns, at their settings, by device.",
    "imagenet": "Rows marked cited have no config here.",
}


# ------------------------------------------------------------------------------------ their texts


def measured(cell: SeedGroup | None) -> str:
    """4.51 +- 0.08 (n = 3)."""
    if cell is None:
        return NOT_RUN
    deviation = "" if cell.std is None else f" +- {cell.std:.2f}"
    return f"{cell.mean:.2f}{deviation} (n = {len(cell.runs)})"


def printed(row: published.Row, column: str) -> str:
    """The published error as it was printed."""
    if column not in row.printed:
        return UNKNOWN
    return row.printed[column] + ("\\*" if column in row.own else "")


def images(cell: SeedGroup | None) -> str:
    """Of what the runs have learnt and were tested on how many: cifar10, 50,000 + 10,000."""
    if cell is None:
        return NOT_RUN
    opt, data = cell.runs[0].opt, cell.runs[0].data
    named = registry.DATASETS[opt.dataset].is_named_by_directory
    name = Path(opt.data).name if named else opt.dataset
    counts = (runs.number(data, "train"), runs.number(data, "test") or runs.number(data, "val"))
    return name + ("" if None in counts else ", {:,} + {:,}".format(*counts))


def costs(cell: SeedGroup | None, price: float | None) -> list[str]:
    """Hardware, hours, device hours, and with a price the money, of one run."""
    if cell is None:
        return [NOT_RUN] * (3 + (price is not None))
    device_hours = cell.average("device_hours")
    shown = [cell.device or UNKNOWN, _decimal(cell.average("hours")), _decimal(device_hours)]
    if price is not None:
        shown.append(_decimal(None if device_hours is None else device_hours * price))
    return shown


def _decimal(value: float | None) -> str:
    """180.00, or 0.00053 of what took seconds."""
    if value is None:
        return UNKNOWN
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def _cost_titles(price: float | None) -> list[str]:
    return ["hardware", "hours>", "device hours>"] + ["USD>"] * (price is not None)


def network(line: Line) -> list[str]:
    """Parameters, multiply-adds, and the split that chooses the number."""
    if line.counted is None:
        return [UNKNOWN] * 3
    return [f"{line.counted.parameters:,}", f"{line.counted.macs:,}", line.counted.split]


NETWORK_TITLES = ["parameters>", "multiply-adds>", "chosen by"]


def markdown_table(titles: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; a title that ends in > is of a column of numbers."""
    shown = [title.removesuffix(">") for title in titles]
    rule = ["--:" if title.endswith(">") else "---" for title in titles]
    body = [[printable(text).replace("|", "\\|") for text in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [shown, rule, *body])


# ---------------------------------------------------------------------------------- the document


def overview(table: published.Table, found: Runs) -> str:
    """A published table as it stands, with `published / measured` where there is a config."""

    def cell(row: published.Row, column: str) -> str:
        if column not in row.configs:
            return printed(row, column)
        return f"{printed(row, column)} / {measured(found.groups.get(row.configs[column]))}"

    titles = ["method", "L>", "parameters>", *(f"{c}: paper / measured" for c in table.columns)]
    body = []
    for row in table.rows:
        method = f"{row.method} (cited)" if row.is_cited else row.method
        first = [method, str(row.depth or UNKNOWN), row.params or UNKNOWN]
        body.append(first + [cell(row, column) for column in table.columns])
    return markdown_table(titles, body)


def details(table: published.Table, found: Runs, price: float | None) -> str:
    """One line for each cell of a published table that has a config."""
    titles = ["config", "paper>", "measured>", "difference>", "parameters, paper>", *NETWORK_TITLES]
    body = []
    for line in lines(table, found):
        difference = UNKNOWN if line.difference is None else f"{line.difference:+.2f}"
        paper = printed(line.row, line.column)
        first = [f"`{line.name}`", paper, measured(line.cell), difference]
        size = line.row.params or UNKNOWN
        body.append([*first, size, *network(line), *costs(line.cell, price)])
    return markdown_table([*titles, *_cost_titles(price)], body)


def wide_costs(table: published.Table, found: Runs) -> str:
    """Time and memory of the rows that have published ones."""
    titles = ["method", "s/step, paper>", "s/step, measured", "MB, paper>", "MB, measured"]
    body = []
    for row in table.rows:
        cells = [found.groups[name] for name in row.configs.values() if name in found.groups]
        done = [run for cell in cells for run in cell.runs]
        speed = by_device(done, _per_step, "{:.3f}")
        memory = by_device(done, lambda cell: cell.average("memory_mb"), "{:,.0f}")
        time = row.costs["seconds_per_iteration"]
        body.append([f"{row.method}, L = {row.depth}", time, speed, row.costs["memory_mb"], memory])
    return markdown_table(titles, body)


def _per_step(cell: SeedGroup) -> float | None:
    speed = cell.average("images_per_s")
    return cell.runs[0].opt.batchSize / speed if speed else None


def by_device(done: list[Run], value: Callable[[SeedGroup], float | None], form: str) -> str:
    """A mean of runs for each device that they ran on: 0.021 (NVIDIA H200)."""
    groups: dict[str | None, list[Run]] = {}
    for run in done:
        groups.setdefault(run.device, []).append(run)
    found = {device: value(SeedGroup(group)) for device, group in groups.items()}
    parts = [
        UNKNOWN if mean is None else f"{form.format(mean)} ({device or 'device not logged'})"
        for device, mean in found.items()
    ]
    return "; ".join(parts) or NOT_RUN


def own_configs(found: Runs, price: float | None) -> Iterator[str]:
    """The configs that are no cell of a published table, a table for each folder."""
    placed = own_lines(found)
    for folder in sorted({line.table for line in placed}):
        yield f"## Of this project: configs/{folder}"
        yield "Nothing was published for these settings, so there is nothing to compare with."
        titles = ["config", "measured>", "images", *NETWORK_TITLES, *_cost_titles(price)]
        body = []
        for line in (line for line in placed if line.table == folder):
            first = [f"`{line.name}`", measured(line.cell), images(line.cell)]
            body.append([*first, *network(line), *costs(line.cell, price)])
        yield markdown_table(titles, body)


def other_runs(found: Runs, price: float | None) -> Iterator[str]:
    """The runs that are in no table: complete ones, then those that are not."""
    placed = other_lines(found)
    yield "## Other complete runs"
    if placed:
        yield "Runs of the settings of no config, with the nearest config and what differs from it."
        titles = ["runs", "measured>", "nearest config", "differences", "images", *NETWORK_TITLES]
        yield markdown_table(
            [*titles, *_cost_titles(price)], (_other(line, price) for line in placed)
        )
    else:
        yield "None."
    yield "## Runs that are not complete"
    if found.unfinished:
        yield markdown_table(["run", "config", "seed>", "epoch>", "state"], _unfinished(found))
    else:
        yield "None."


def _other(line: Line, price: float | None) -> list[str]:
    paths = ", ".join(f"`{run.path.as_posix()}`" for run in line.cell.runs)
    first = [paths, measured(line.cell), f"`{line.name}`", "; ".join(line.differences)]
    return [*first, images(line.cell), *network(line), *costs(line.cell, price)]


def _unfinished(found: Runs) -> Iterator[list[str]]:
    for run in found.unfinished:
        config = f"`{run.config}`" if run.config else f"nearest: `{match.nearest(run)[0]}`"
        # A machine that went down could not say so.
        state = "done, but its log or its result is not whole" if run.state == "done" else run.state
        epoch = f"{run.epoch} of {run.opt.nEpochs}"
        yield [f"`{run.path.as_posix()}`", config, str(run.seed), epoch, state]


def left_out(found: Runs, notes: list[str]) -> Iterator[str]:
    """What was found and counts for nothing, with the reason."""
    told = [f"{run.path} ({run.error:.2f}) has {reason}" for run, reason in found.unused]
    if told or notes:
        yield "## Left out"
        yield "\n".join(f"- {printable(note)}" for note in [*told, *notes])


def figures(directories: list[str], place: Path) -> Iterator[str]:
    """The pictures in a folder `figures` beside a directory of runs.

    Args:
        place: directory of the document that shows them.
    """
    beside = {Path(directory).parent / "figures": None for directory in directories}
    pictures = [path for folder in beside for path in sorted(folder.glob("*.png"))]
    if pictures:
        yield "## Figures"
        for path in pictures:
            link = Path(os.path.relpath(path, place)).as_posix().replace(" ", "%20")
            yield f"![{path.stem}]({link})"


def document(asked: cli.Command, argv: list[str], found: Runs, notes: list[str]) -> str:
    """The whole report.

    Args:
        argv: the command line, which the report begins with.
        notes: what could not be read.
    """
    price, output = asked.options.price, asked.options.output
    written = shlex.join(["python", "-m", "tools.report", *argv])
    parts = [HEAD.format(command=printable(written)), INTRODUCTION]
    for table in published.tables().values():
        parts += [f"## {table.title}", wrapped(NOTES[table.key]), overview(table, found)]
        if table.key == "wide":
            parts.append(wide_costs(table, found))
        parts += ["Each cell:", details(table, found, price)]
    parts += own_configs(found, price)
    parts += other_runs(found, price)
    parts += left_out(found, notes)
    parts += figures(asked.arguments, Path(output).parent if output else Path())
    parts.append("## Sources of the published numbers")
    parts.append("\n".join(wrapped(f"- {text}.", "  ") for text in published.sources().values()))
    return "\n\n".join(parts) + "\n"


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph in lines that a person can read, `indent` before all but the first."""
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


FIRST_WORDS = "# Results\n\nWritten by `python -m tools.report"
HEAD = """# Results

Written by `{command}`
from the runs found there, the settings in configs/ and the published numbers in
docs/published.yaml; it is written anew, never edited."""


# ----------------------------------------------------------------------------------- the command


def parse(argv: list[str]) -> cli.Command:
    """The command line: FLAGS, and the directories of runs as operands.

    Raises:
        UsageError: every problem of the flags at once.
    """
    asked = cli.read(argv, FLAGS, arguments="directory of runs")
    if asked.options.csv and asked.options.csv == asked.options.output:
        raise UsageError(f"output and csv are one file: {asked.options.csv}", "name two")
    return asked


def check_target(name: str | None, flag: str, first_words: str) -> None:
    """Raise UsageError when a file cannot be written, or is not one that this tool has written."""
    path = Path(name or ".report")
    if not path.parent.is_dir():
        raise UsageError(f"{flag}: no directory {path.parent}", "make it, or name another file")
    if path.is_dir():
        raise UsageError(f"{flag}: {path} is a directory", "name a file in it")
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(first_words)) not in (b"", first_words.encode()):
                what = f"{flag}: {path} was not written by this tool"
                raise UsageError(what, f"move it away, or name another --{flag}")


@dataclass(frozen=True)
class Report:
    """What a command line asks for, before anything is written.

    Args:
        markdown, csv: the two texts.
        notes: what could not be read.
    """

    markdown: str
    csv: str
    notes: list[str]


def create(argv: list[str]) -> Report:
    """The report of a command line.

    Raises:
        UsageError: flags that cannot be read.
        DataError: an operand that is no directory.
    """
    asked = parse(argv)
    notes: list[str] = []
    found = match.group_runs(match.find(asked.arguments, notes.append))
    markdown = document(asked, argv, found, notes)
    return Report(markdown, as_csv(found, asked.options.price), notes)


def work(argv: list[str]) -> None:
    """Write the report, and the CSV when one is asked for."""
    own = parse(argv).options
    check_target(own.output, "output", FIRST_WORDS)
    check_target(own.csv, "csv", ",".join(CSV_COLUMNS))
    report = create(argv)
    for note in report.notes:
        match.warn(note)
    if own.csv:
        atomic_write(Path(own.csv), report.csv.encode())
    if own.output:
        atomic_write(Path(own.output), report.markdown.encode())
    else:
        print(report.markdown, end="")


def main(argv: list[str]) -> int:
    """Run one command line; the exit code."""
    return cli.run(argv, USAGE, FLAGS, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
