"""List which classes a network takes for which, from counts of its evaluation."""

import math
from collections import Counter, defaultdict

import numpy as np

from errors import printable

COLUMNS = ("class", "images", "errors", "error, %", "mostly taken for")


def pairs_of(counts: np.ndarray) -> Counter:
    """Count the images of each class and class taken for, given (C, C) of engine/metrics.py."""
    return Counter({place: counts[place] for place in zip(*counts.nonzero(), strict=True)})


def by_class(pairs: Counter, classes: list[str]) -> list[tuple[str, int, int, float, str]]:
    """List the COLUMNS of each class from ascending `pairs_of`, those without images last.

    The highest error comes first.
    """
    taken, rows = defaultdict(Counter), []
    for (label, other), count in pairs.items():
        taken[label][other] = count
    for label, name in enumerate(classes):
        images, wrong = taken[label].total(), taken[label]
        errors = images - wrong.pop(label, 0)
        percent = 100 * errors / images if images else math.nan
        other = classes[max(wrong, key=wrong.get)] if errors else ""
        rows.append((name, images, errors, percent, other))
    return sorted(rows, key=lambda row: -row[3] if row[1] else 1)


def most_frequent(pairs: Counter, classes: list[str], limit: int) -> list[tuple[int, str, str]]:
    """List the most frequent confusions: images, class, class that they are taken for."""
    wrong = [(count, classes[i], classes[j]) for (i, j), count in pairs.most_common() if i != j]
    return wrong[:limit]


def as_markdown(rows: list[tuple[str, int, int, float, str]]) -> list[str]:
    """Format rows of `by_class` as the lines of a table, legible in a terminal as well."""
    names = [[printable(row[i]).replace("|", "\\|") for i in (0, -1)] for row in rows]
    width = max(len(name) for name, _ in [COLUMNS[:2], *names])
    lines = [f"| {COLUMNS[0]:{width}} | {' | '.join(COLUMNS[1:])} |", "|---|--:|--:|--:|---|"]
    for (name, other), (_, images, errors, percent, _) in zip(names, rows, strict=True):
        lines.append(f"| {name:{width}} | {images:6} | {errors:6} | {percent:8.3f} | {other} |")
    return lines
