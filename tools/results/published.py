"""Load the published numbers of docs/published.yaml: tables, rows, and their sources."""

import functools
from dataclasses import dataclass, field

import yaml

from tools import cli

PUBLISHED = cli.ROOT / "docs" / "published.yaml"


@dataclass(frozen=True)
class Row:
    """Hold one line of a published table, every number as it is printed."""

    method: str
    errors: dict[str, str]  # column -> error in per cent, such as "7.00"
    source: str  # a key of `sources`
    depth: str | None = None
    params: str | None = None  # such as "27.2M"; None where the source gives none
    configs: dict[str, str] = field(default_factory=dict)  # column -> config; {}: only cited
    own: list[str] = field(default_factory=list)  # columns run by DenseNet's authors
    costs: dict[str, str] = field(default_factory=dict)  # seconds_per_iteration, memory_mb


@dataclass(frozen=True)
class Table:
    """Hold a published table: its columns are datasets, or "top-1" of ImageNet."""

    title: str
    note: str
    columns: list[str]
    rows: list[Row]


def load_yaml(text: str) -> dict:
    """Load YAML as dicts, lists and strings, each scalar as it is written: 7.00 stays 7.00."""
    return yaml.load(text, yaml.BaseLoader) or {}  # noqa: S506 (it acts on no tag)


@functools.cache
def tables() -> dict[str, Table]:
    """Load the tables by key: "table2", "wide" and "imagenet"."""
    return {
        key: Table(**table | {"rows": [Row(**row) for row in table["rows"]]})
        for key, table in load_yaml(PUBLISHED.read_text())["tables"].items()
    }


def sources() -> dict[str, str]:
    """Load the titles of the sources, by the key that rows give."""
    return load_yaml(PUBLISHED.read_text())["sources"]
