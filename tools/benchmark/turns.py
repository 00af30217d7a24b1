"""Let the cases of a benchmark take turns, and sum up what was measured in them.

A change of clock rate or load then affects all cases alike.
"""

import contextlib
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol


class Runner(Protocol):
    """Describe what can take turns."""

    row: dict[str, object]  # columns of the case; has a note once an error has stopped it
    turns: list  # what the counted turns have measured

    def take_turn(self) -> object:
        """Run the case once, and return what was measured."""


def take_turns(runners: Sequence[Runner], warm_up: int, turns: int) -> None:
    """Run all in turns of random order; one that fails takes no more turns."""
    order, rng = list(runners), random.Random(0)
    for turn in range(warm_up + turns):
        rng.shuffle(order)
        for runner in [runner for runner in order if "note" not in runner.row]:
            with error_as_note(runner.row):
                measured = runner.take_turn()
                if turn >= warm_up:
                    runner.turns.append(measured)


@contextlib.contextmanager
def error_as_note(row: dict) -> Iterator[None]:
    """Write an error, most likely out of memory, into a row: the other cases go on."""
    try:
        yield
    except Exception as error:
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        row["note"] = line if len(line) <= 160 else line[:157] + "..."
        name = " ".join(row[column] for column in ("who", "mode", "split") if column in row)
        report(f"{name}: {row['note']}")


def quartile_columns(column: str, values: list[float]) -> dict[str, float]:
    """Return median and quartiles of at least two values by column."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {column: median, f"{column}_q1": q1, f"{column}_q3": q3}


def report(line: str) -> None:
    """Print a line about the progress to standard error."""
    print(line, file=sys.stderr, flush=True)
