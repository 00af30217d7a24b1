"""The lines of `python -m tools.report`: published beside measured, as data and as CSV."""

import csv
import io
from dataclasses import dataclass

from tools.results import configs, match, published
from tools.results.match import Runs, SeedGroup
from tools.results.runs import Run

NOT_RUN = "not run"  # nothing was measured
UNKNOWN = "-"  # nothing was published, or the log does not say


@dataclass(frozen=True)
class Line:
    """One config, or one group of other runs, with what was published and what was measured.

    Args:
        table: key of the published table, the folder of a config without a claim, or "other".
        row: the published row that it is a cell of.
        column: of that row.
        config: None for other runs, and for a cell whose config is not there.
        name: of the config, or for other runs of the nearest one.
        cell: None when nothing was measured.
        differences: of other runs from the nearest config.
    """

    table: str
    row: published.Row | None
    column: str
    config: configs.Config | None
    name: str
    cell: SeedGroup | None
    differences: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        """Measured minus published error."""
        return self.cell.mean - self.row.errors[self.column] if self.row and self.cell else None

    @property
    def counted(self) -> configs.Config | Run | None:
        """What its counts and its split are those of."""
        return self.config or (self.cell.runs[0] if self.cell else None)


def lines(table: published.Table, found: Runs) -> list[Line]:
    """The cells of a published table that have a config, row by row."""
    known = configs.configs()
    return [
        Line(table.key, row, column, known.get(name), name, found.groups.get(name))
        for row in table.rows
        for column, name in row.configs.items()
    ]


def own_lines(found: Runs) -> list[Line]:
    """The configs that claim nothing, by folder."""
    own = [config for config in configs.configs().values() if not config.claim]
    return [
        Line(config.path.parent.name, None, "", config, config.name, found.groups.get(config.name))
        for config in own
    ]


def other_lines(found: Runs) -> list[Line]:
    """The complete runs of no config, with the nearest one."""
    placed = []
    for cell in found.others:
        name, differences = match.nearest(cell.runs[0])
        # The same settings: what is different is what it learnt from.
        words = tuple(differences) or ("not shown to have the images of the config's runs",)
        placed.append(Line("other", None, "", None, name, cell, words))
    return placed


CSV_COLUMNS = (
    "table", "method", "depth", "column", "config", "published_error", "measured_error", "std", "n",
    "seeds", "difference", "split", "published_parameters", "parameters", "multiply_adds",
    "published_s_per_step", "published_memory_mb", "images_per_s", "memory_mb",
    "device", "hours", "device_hours", "usd", "differences", "runs",
)  # fmt: skip
AVERAGES = ("images_per_s", "memory_mb", "hours", "device_hours")
MEASURED = ("measured_error", "std", "seeds", "difference", "device", "usd", "runs", *AVERAGES)


def as_csv(found: Runs, price: float | None) -> str:
    """Every config once, in the table that it claims a cell of, then the other complete runs."""
    cells: dict[str, Line] = {}
    for table in published.tables().values():
        for line in lines(table, found):
            cells.setdefault(line.name, line)
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    placed = [*cells.values(), *own_lines(found), *other_lines(found)]
    writer.writerows(_csv_row(line, price) for line in placed)
    return text.getvalue()


def published_costs(name: str) -> dict[str, str]:
    """Time and memory that were published for a config, in whichever table."""
    rows = [row for table in published.tables().values() for row in table.rows]
    found = (row.costs for row in rows if row.costs and name in row.configs.values())
    return next(found, {})


def _csv_row(line: Line, price: float | None) -> dict[str, object]:
    """Numbers in full; what was not measured is "not run", what nobody knows is "-"."""
    known: dict[str, object] = {"table": line.table, "column": line.column or None}
    known["config"] = line.name if line.table != "other" else f"nearest: {line.name}"
    known["differences"] = "; ".join(line.differences) or None
    if line.row:
        paid = published_costs(line.name)
        known |= {
            "method": line.row.method,
            "depth": line.row.depth,
            "published_error": line.row.printed[line.column],
            "published_parameters": line.row.params,
            "published_s_per_step": paid.get("seconds_per_iteration"),
            "published_memory_mb": paid.get("memory_mb"),
        }
    counted = line.counted
    if counted:
        known |= {"parameters": counted.parameters, "multiply_adds": counted.macs}
        known |= {"split": counted.split}
    known |= _taken(line, price) if line.cell else dict.fromkeys(MEASURED, NOT_RUN) | {"n": 0}
    return {name: UNKNOWN if known.get(name) is None else known[name] for name in CSV_COLUMNS}


def _taken(line: Line, price: float | None) -> dict[str, object]:
    """What was measured; None where a log does not say."""
    cell = line.cell
    hours = cell.average("device_hours")
    return {name: cell.average(name) for name in AVERAGES} | {
        "measured_error": cell.mean,
        "std": cell.std,
        "n": len(cell.runs),
        "seeds": " ".join(map(str, cell.seeds)),
        "difference": line.difference,
        "device": cell.device,
        "usd": None if price is None or hours is None else hours * price,
        "runs": " ".join(run.path.as_posix() for run in cell.runs),
    }
