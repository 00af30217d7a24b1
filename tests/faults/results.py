"""What the goals of docs/faults.md measure, as a CSV: one row for each goal and figure.

Written by `make soak RECORD=FILE`. A figure that is measured again replaces its row, so that the
file always says what was last seen, and how to see it again.
"""

import csv
import datetime
import io
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

from fileio.atomic import atomic_write


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Args:
        goal: G1 to G20.
        what: what was measured, with its unit.
        value: the result.
        limit: what the goal asks of it, such as `<= 5`; empty where it asks nothing.
        command: measures it again.
    """

    goal: str
    what: str
    value: float
    limit: str
    command: str


COLUMNS = ["date", "machine", "torch", *(field.name for field in fields(Figure))]


def record(path: Path, figures: Iterable[Figure]) -> None:
    """Add figures to a CSV, in place of those with the same goal and words."""
    rows = {(row["goal"], row["what"]): row for row in read(path)}
    here = {"date": f"{datetime.date.today()}", "machine": machine(), "torch": version("torch")}
    for figure in figures:
        value = figure.value if isinstance(figure.value, int) else float(f"{figure.value:.4g}")
        row = here | asdict(figure) | {"value": value}
        rows[figure.goal, figure.what] = row
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows.values(), key=lambda row: int(row["goal"].removeprefix("G"))))
    atomic_write(path, text.getvalue().encode())


def read(path: Path) -> list[dict[str, str]]:
    """The rows of such a file, none if there is no file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def machine() -> str:
    """What kind of machine this is, as far as it matters here."""
    return f"cpu-{len(os.sched_getaffinity(0))}core"
