"""Load the published numbers of docs/published.yaml: tables, rows, and their sources."""

import functools
from dataclasses import dataclass

import yaml

from tools import cli

PUBLISHED = cli.ROOT / "docs" / "published.yaml"


@dataclass(frozen=True)
class Row:
    """One line of a published table.

    Args:
        params: as printed, such as "27.2M"; None where the source gives none.
        errors: column -> error in per cent, as printed: "7.00".
        configs: column -> config that reproduces it; {} for a row that is only cited.
        source: a key of `sources`.
        own: columns in which the authors of DenseNet ran another method themselves.
        costs: `seconds_per_iteration` and `memory_mb` as printed, where they were published.
    """

    method: str
    depth: int | None
    params: str | None
    errors: dict[str, str]
    configs: dict[str, str]
    source: str
    own: tuple[str, ...]
    costs: dict[str, str]


@dataclass(frozen=True)
class Table:
    """A published table: its columns are datasets, or "top-1" of ImageNet."""

    title: str
    columns: tuple[str, ...]
    rows: list[Row]


def load_yaml(text: str) -> object:
    """Load YAML as dicts, lists and strings, each scalar as it is written: 7.00 stays 7.00.

    It composes the document and constructs nothing, so that no tag is acted on.
    """

    def value(node: yaml.Node) -> object:
        if isinstance(node, yaml.MappingNode):
            return {value(key): value(item) for key, item in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [value(item) for item in node.value]
        return node.value

    root = yaml.compose(text, yaml.BaseLoader)
    return {} if root is None else value(root)


@functools.cache
def tables() -> dict[str, Table]:
    """Load the tables by key: "table2", "wide" and "imagenet"."""
    return {
        key: Table(table["title"], tuple(table["columns"]), [_row(**row) for row in table["rows"]])
        for key, table in load_yaml(PUBLISHED.read_text())["tables"].items()
    }


@functools.cache
def sources() -> dict[str, str]:
    """Load the titles of the sources, by the key that rows give."""
    return load_yaml(PUBLISHED.read_text())["sources"]


def _row(method, errors, source, depth=None, params=None, configs=None, own=(), costs=None) -> Row:
    depth = None if depth is None else int(depth)
    return Row(method, depth, params, errors, configs or {}, source, tuple(own), costs or {})
