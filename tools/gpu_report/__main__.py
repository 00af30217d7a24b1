"""Measure on a GPU, within nine minutes, what this project claims about one.

usage: python -m tools.gpu_report [--output DIR] [--minutes N]

The GPU tests, the self-check's differences, the kernels of a captured step beside their model, the
speed of BC-100-12 and DenseNet-121 beside torchvision eager and compiled, and 300 epochs projected
from two. Each step runs in processes of its own with its own limit. After each one gpu-report.csv
and gpu-report.md are written anew, and gpu-report/ keeps what it printed and measured. Where a step
has measured nothing, as without a GPU, the cells say "not run".
"""

import csv
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from cli.flag_types import Flag, Range, number, pathname
from errors import StorageError, UsageError, printable
from fileio import atomic
from tools import cli
from tools.benchmark.results import NOT_RUN
from tools.benchmark.turns import report
from tools.gpu_report import table
from tools.gpu_report.steps import MACHINE, Outcome, Step, run_step, steps

FLAGS = (
    Flag("output", pathname, "results", "directory to write to; an earlier report in it that holds "
         "measurements is not replaced"),
    Flag("minutes", number, 9.0, "of all steps together; what does not fit is not run",
         range=Range(low=0)),
)  # fmt: skip
TOOL = cli.Tool(__doc__, FLAGS)
parse = TOOL.parse
NAME = "gpu-report"


def prepare(output: Path, todo: list[Step]) -> Path:
    """Make the directory of the steps' files, without those of earlier ones, and return it.

    Raises:
        UsageError: an earlier report there holds measurements.
        StorageError: it cannot be written.
    """
    directory, file = output / NAME, output / f"{NAME}.csv"
    earlier = csv.DictReader(file.open()) if file.exists() else []
    if any(row.get("measured") != NOT_RUN for row in earlier):
        fix = "move it away, with the files of that name, or name another directory with --output"
        raise UsageError(f"output: {file} holds measurements", fix)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in [path for step in todo for path in directory.glob(f"{step.name}.*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        what = f"output: cannot write in {output}: {error.strerror}"
        raise StorageError(what, "name another directory with --output") from error
    return directory.resolve()


def run_all(todo: list[Step], output: Path, seconds: float) -> dict[str, Outcome]:
    """Run the steps, and write the report after each; return how they ended, by name.

    Args:
        seconds: for all together.
    """
    directory, end = prepare(output, todo), time.monotonic() + seconds
    outcomes: dict[str, Outcome] = {}
    for step in todo:
        has_gpu = MACHINE not in outcomes or outcomes[MACHINE].is_done
        if step.needs_gpu and not has_gpu:
            outcomes[step.name] = Outcome(False, 0, "")  # the page says why, above the table
        else:
            step = step if has_gpu else replace(step, limit_s=seconds)  # nothing else needs time
            report(f"{step.name}: at most {step.limit_s:.0f} s")
            outcomes[step.name] = run_step(step, directory, end - time.monotonic())
            report(f"{step.name}: {outcomes[step.name].text}")
        rows = table.rows(directory, outcomes)
        for suffix, write in {"csv": table.as_csv_file, "md": table.as_markdown}.items():
            atomic.atomic_write(output / f"{NAME}.{suffix}", write(rows, directory, outcomes))
    return outcomes


def run(argv: list[str]) -> None:
    """Write the report."""
    options = parse(argv).options
    output = Path(options.output).expanduser()
    run_all(steps(), output, 60 * options.minutes)
    print(f"written: {printable(str(output / NAME))}.csv and .md")


main = partial(TOOL.run, run)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
