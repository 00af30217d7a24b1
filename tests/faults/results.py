"""Keep what the long tests measure in a CSV, one row for each goal and measurement.

`make soak RECORD=FILE` writes it. A repeated measurement replaces its row.
"""

import csv
import datetime
import io
import os
import platform
from importlib.metadata import version
from pathlib import Path

from fileio.atomic import atomic_write

COLUMNS = ["date", "machine", "torch", "goal", "what", "value", "limit", "command"]


def record(path: Path, goal: str, what: str, value: float, limit: str, command: str) -> None:
    """Add a measurement to a CSV, in place of the one with the same goal and words.

    Args:
        goal: G1 to G21, of docs/operations.md.
        what: what was measured, with its unit.
        limit: what the goal asks, such as `<= 5`; empty where it asks nothing.
        command: measures it again.
    """
    value = value if isinstance(value, int) else float(f"{value:.4g}")
    day, torch = f"{datetime.date.today()}", version("torch")
    row = [day, machine(), torch, goal, what, value, limit, command]
    rows = {(row["goal"], row["what"]): row for row in read(path)}
    rows[goal, what] = dict(zip(COLUMNS, row, strict=True))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows.values(), key=lambda row: int(row["goal"].removeprefix("G"))))
    atomic_write(path, text.getvalue().encode())


def machine() -> str:
    """Name this machine's CPU, and count the cores that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name, family, model = map(cpu.get, ("model name", "cpu family", "model"))
    return f"{name or platform.machine()} (family {family}, model {model}), {os.cpu_count()} cores"


def read(path: Path) -> list[dict[str, str]]:
    """Read the rows of such a file, none if there is no file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
