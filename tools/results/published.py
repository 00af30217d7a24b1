"""The published numbers of docs/published.yaml: tables, rows, and where each number stands."""

import functools
from dataclasses import dataclass, field

from tools import cli

PUBLISHED = cli.ROOT / "docs" / "published.yaml"


@dataclass(frozen=True)
class Row:
    """One line of a published table.

    Args:
        params: as printed, such as "27.2M"; None where the source gives none.
        errors: column -> error in per cent.
        configs: column -> config that reproduces it, such as "c10plus/densenet-bc-L100-k12".
        source: a key of `sources`.
        printed: column -> the error as printed, "7.00".
        own: columns in which the authors of DenseNet ran a method of others themselves.
        costs: `seconds_per_iteration` and `memory_mb` as printed, where they were published.
    """

    method: str
    depth: int | None
    params: str | None
    errors: dict[str, float]
    configs: dict[str, str]
    source: str
    printed: dict[str, str] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    costs: dict[str, str] = field(default_factory=dict)

    @property
    def is_cited(self) -> bool:
        """Whether nothing here reproduces the row."""
        return not self.configs


@dataclass(frozen=True)
class Table:
    """A published table: its columns are datasets, or "top-1" of ImageNet."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: list[Row]


def plain(text: str) -> object:
    """A YAML document as dicts, lists and texts, each scalar as it is written: 7.00 stays 7.00.

    Composed and never constructed: no tag is acted on.
    """
    import yaml

    def value(node) -> object:
        if isinstance(node, yaml.MappingNode):
            return {value(key): value(item) for key, item in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [value(item) for item in node.value]
        return node.value

    root = yaml.compose(text, yaml.BaseLoader)
    return {} if root is None else value(root)


@functools.cache
def tables() -> dict[str, Table]:
    """The tables by key: "table2", "wide" and "imagenet"."""
    found = {}
    for key, table in plain(PUBLISHED.read_text())["tables"].items():
        rows = [_row(row) for row in table["rows"]]
        found[key] = Table(key, table["title"], tuple(table["columns"]), rows)
    return found


@functools.cache
def sources() -> dict[str, str]:
    """Where the numbers stand, by the key that rows have."""
    return plain(PUBLISHED.read_text())["sources"]


def _row(row: dict) -> Row:
    return Row(
        method=row["method"],
        depth=int(row["depth"]) if "depth" in row else None,
        params=row.get("params"),
        errors={column: float(error) for column, error in row["errors"].items()},
        configs=row.get("configs", {}),
        source=row["source"],
        printed=row["errors"],
        own=tuple(row.get("own", ())),
        costs=row.get("costs", {}),
    )
