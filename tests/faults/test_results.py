"""Test the file of measured figures: one row for each goal and figure, the newest, by goals."""

import re

import pytest

from faults.results import COLUMNS, read, record
from helpers.run_main import ROOT


def test_a_figure_measured_again_replaces_its_row_and_no_other(tmp_path):
    path = tmp_path / "results.csv"
    for goal, what, value in [
        ("G12", "lost", 0),
        ("G5", "stall, ms", 28.123456),
        ("G12", "lost", 3),
    ]:
        record(path, goal, what, value, "<= 100", "make soak")
    # By the number of the goal, not by its letters.
    assert [(row["goal"], row["value"]) for row in read(path)] == [("G5", "28.12"), ("G12", "3")]
    assert "(family " in read(path)[0]["machine"] and list(read(path)[0]) == COLUMNS


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/faults_*.csv")), ids=lambda p: p.name)
def test_the_committed_file_has_one_row_for_each_goal_and_figure(path):
    rows = read(path)
    assert all(list(row) == COLUMNS and None not in row.values() for row in rows)
    assert len({(row["goal"], row["what"]) for row in rows}) == len(rows) > 10
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    commands = [row["command"] for row in rows if "(at " not in row["command"]]
    named = {name for command in commands for name in re.findall(r"::(test_\w+)", command)}
    assert len(named) > 10 and not [name for name in named if f"def {name}(" not in tests]
