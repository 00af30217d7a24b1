"""The file of measured figures: one row for each goal and figure, the newest, by goals."""

import csv

import pytest

from faults.results import COLUMNS, Figure, read, record
from helpers.run_main import ROOT

LOST = Figure("G12", "checkpoints lost", 0, "= 0", "make soak")
STALL = Figure("G5", "stall, ms", 28.123456, "<= 100", "python -m pytest -m soak")


def test_a_figure_is_read_as_it_was_recorded(tmp_path):
    path = tmp_path / "results.csv"
    assert read(path) == []
    record(path, [LOST, STALL])
    stall, lost = read(path)  # by the number of the goal, not by its letters
    assert list(stall) == COLUMNS
    assert (stall["goal"], stall["what"], stall["value"]) == ("G5", "stall, ms", "28.12")
    assert (lost["goal"], lost["limit"], lost["command"]) == ("G12", "= 0", "make soak")
    assert stall["machine"].startswith("cpu-") and stall["torch"].startswith("2.")


def test_a_figure_measured_again_replaces_its_row_and_no_other(tmp_path):
    path = tmp_path / "results.csv"
    record(path, [LOST, STALL])
    again = Figure("G12", "checkpoints lost", 3, "= 0", "make soak")
    record(path, [again, Figure("G12", "disk", 3.5, "<= 4", "make soak")])
    assert [(row["goal"], row["value"]) for row in read(path)] == [
        ("G5", "28.12"), ("G12", "3"), ("G12", "3.5"),
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/faults_*.csv")), ids=lambda p: p.name)
def test_what_is_committed_is_one_row_for_each_goal_and_figure(path):
    with open(path) as file:
        rows = list(csv.reader(file))
    assert rows[0] == COLUMNS and all(len(row) == len(COLUMNS) for row in rows)
    keys = [(row["goal"], row["what"]) for row in read(path)]
    assert len(set(keys)) == len(keys) > 10
