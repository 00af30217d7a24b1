"""Make one table of what the steps of `python -m tools.gpu_report` have written.

A cell that no step has measured says "not run". Goals and the model's predictions stand beside it.
"""

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.benchmark.results import NOT_RUN, as_csv
from tools.gpu_report.machine import COLUMNS as MACHINE_COLUMNS
from tools.gpu_report.steps import MACHINE, NETWORKS, Outcome, steps

NUM_EPOCHS = 300  # that two are projected to
# Settings that the self-check runs with: main.py's flags by name.
CHECKED = {
    "k = 12, bf16": "--growthRate 12 --precision bf16",
    "k = 12, half": "--growthRate 12 --precision half",
    "k = 12, tf32": "--growthRate 12 --tf32 true",
    "k = 12, single": "--growthRate 12",
    "k = 32, bf16": "--growthRate 32 --precision bf16",
    "k = 32, single": "--growthRate 32",
    "basic, k = 12, bf16": "--growthRate 12 --precision bf16 --bottleneck false --depth 40",
}
MODES = {
    "eager": "eager",
    "compiled": "compiled",
    "compiled-reduce-overhead": "compiled with reduce-overhead",
}
STEPS = {step.name for step in steps()}
COLUMNS = ("step", "what", "unit", "measured", "goal", "met", "modelled", "note")
PRINTED = ("what", "unit", "measured", "goal", "met", "modelled", "note")


@dataclass(frozen=True)
class Goal:
    """Bound a figure from below or above."""

    number: float
    at_least: bool = True

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.number:g}"

    def is_met(self, measured: float) -> bool:
        """Return whether a figure reaches the goal."""
        return measured >= self.number if self.at_least else measured <= self.number


EAGER_GOALS, COMPILED_GOALS, BOUND_GOALS = {"64": Goal(5)}, {"64": Goal(1.6)}, {"512": Goal(36)}
MINUTES_GOAL, NONE_GOAL, CHECK_GOAL = Goal(15, False), Goal(0, False), Goal(1, False)


@dataclass(frozen=True)
class Row:
    """Hold a figure; None stands for what was not measured, or has no goal or prediction."""

    step: str  # that measures it
    what: str
    unit: str
    measured: float | None
    goal: Goal | None = None
    modelled: float | None = None
    note: str = ""
    is_part: bool = False  # of what the goal is about, which is then not said to be met

    def cells(self, outcomes: dict[str, Outcome]) -> dict[str, object]:
        """Return the row's cells by column."""
        has_run = self.measured is not None
        outcome = outcomes.get(self.step)
        notes = [self.note] * bool(self.note)
        if outcome and outcome.text and not outcome.is_done:
            notes.append(outcome.text)
        met = ""
        if self.goal and has_run:
            yes = "not known" if self.is_part else "yes"
            met = yes if self.goal.is_met(self.measured) else "no"
        elif self.goal:
            met = NOT_RUN
        return {
            "step": self.step,
            "what": self.what,
            "unit": self.unit,
            "measured": self.measured if has_run else NOT_RUN,
            "goal": self.goal or "",
            "met": met,
            "modelled": "" if self.modelled is None else self.modelled,
            "note": "; ".join(notes),
        }


def rows(directory: Path, outcomes: dict[str, Outcome]) -> list[Row]:
    """List all figures, from the files that the steps have left in a directory."""
    found = [*_tests(directory), *_differences(directory)]
    for network in NETWORKS:
        found += [*_speeds(directory, network), *_kernels(directory, network)]
    return [*found, *_epochs(directory, outcomes.get("epochs"))]


def read(path: Path) -> list[dict[str, str]]:
    """Read a step's CSV file; none where the step has not written it."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def _number(row: dict[str, str], column: str) -> float | None:
    cell = row.get(column, NOT_RUN)
    return None if cell == NOT_RUN else float(cell)


def _divided(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _modelled(directory: Path, name: str) -> dict[str, float]:
    """Return the modelled microseconds of a network's step, of its kernels, and of all else."""
    found = read(directory / "model.csv")
    return {row["what"]: float(row["us"]) for row in found if row["network"] == name}


def _tests(directory: Path) -> Iterator[Row]:
    log, step = directory / "gpu-tests.log", "gpu-tests"
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    # The line of each test, so that they count if pytest was stopped: `TEST PASSED`, or of
    # several processes `[gw0] [ 5%] PASSED TEST`.
    ends = [
        (state[1], test[1])
        for line in lines
        if re.match(r"tests/|\[gw\d", line)
        if (state := re.search(r"\b(PASSED|FAILED|ERROR)\b", line))
        if (test := re.search(r"\.py::(\w+)", line))
    ]
    bad = [test for state, test in ends if state != "PASSED"]
    names = ", ".join(sorted(set(bad)))
    is_whole = any(re.match(r"=+ .*\d+ (passed|failed|error)", line) for line in lines)
    passed, failed = (len(ends) - len(bad), len(bad)) if ends else (None, None)
    yield Row(step, "GPU tests that pass", "tests", passed)
    yield Row(step, "GPU tests that fail", "tests", failed, NONE_GOAL, None, names, not is_whole)


def _differences(directory: Path) -> Iterator[Row]:
    """Yield for each of the settings the result whose difference is largest beside its bound."""
    found = read(directory / "self-check.csv")
    for settings in CHECKED:
        ratios = {
            row["name"]: float(row["size"]) / float(row["bound"])
            for row in found
            if row["settings"] == settings
        }
        # A NaN is worse than any number.
        worst = max(ratios, key=lambda name: (math.isnan(ratios[name]), ratios[name]), default="")
        what = f"self-check, {settings}: largest difference"
        yield Row("self-check", what, "of its bound", ratios.get(worst), CHECK_GOAL, None, worst)


def _speeds(directory: Path, name: str) -> Iterator[Row]:
    """Yield images per second of this project and of the peers, and their ratios."""
    network, step = NETWORKS[name], f"replays-{name}"
    measured = next(iter(read(directory / f"{step}.csv")), {})
    speed, bound = _number(measured, "images_per_s"), _number(measured, "bound_images_per_s")
    predicted = _divided(network.batch_size * 1e6, _modelled(directory, name).get("step"))
    title = network.title
    yield Row(step, f"{title}: level 2, one CUDA graph", "images/s", speed, None, predicted)
    share = _divided(speed, bound)
    percent = None if share is None else 100 * share
    yield Row(step, f"{title}: of the copy bandwidth's bound", "%", percent, BOUND_GOALS.get(name))
    peers: dict[str, float | None] = {}
    for mode in (mode for mode in MODES if f"{mode}-{name}" in STEPS):
        speeds = [_number(row, "images_per_s") for row in read(directory / f"{mode}-{name}.csv")]
        peers[mode] = max(filter(None, speeds), default=None)
        what = f"{title}: torchvision, {MODES[mode]}"
        yield Row(f"{mode}-{name}", what, "images/s", peers[mode])
    ratio, what = _divided(speed, peers.pop("eager")), f"{title}: to torchvision, eager"
    yield Row(f"eager-{name}", what, "times", ratio, EAGER_GOALS.get(name))
    if peers:
        found = {MODES[mode]: each for mode, each in peers.items() if each}
        ratio = _divided(speed, max(found.values(), default=None))
        note, what = " and ".join(found), f"{title}: to the faster of torchvision compiled"
        goal, is_part = COMPILED_GOALS.get(name), len(found) < len(peers)
        yield Row(f"{mode}-{name}", what, "times", ratio, goal, None, note, is_part)


def _kernels(directory: Path, name: str) -> Iterator[Row]:
    """Yield the time of a step, of each kernel in it, and of the gaps between them."""
    step, title = f"replays-{name}", NETWORKS[name].title
    found = {row["what"]: row for row in read(directory / f"{step}.csv")}
    total = _number(found.pop("step", {}), "us")
    predicted = _modelled(directory, name)
    yield Row(step, f"{title}: a step", "us", total, None, predicted.pop("step", None))
    for kernel in [*found, *(kernel for kernel in predicted if kernel not in found)]:
        row = found.get(kernel, {})
        launches = _number(row, "launches")
        note = "" if launches is None else f"{launches:g} launches"
        what, us = f"{title}: {kernel}", _number(row, "us")
        yield Row(step, what, "us", us, None, predicted.get(kernel), note)
    gaps = total - sum(float(row["us"]) for row in found.values()) if found and total else None
    yield Row(step, f"{title}: in no kernel", "us", gaps)


def _epochs(directory: Path, outcome: Outcome | None) -> Iterator[Row]:
    """Yield the seconds of an epoch, and the minutes that all would take."""
    run, step = directory / "epochs.run", "epochs"
    log = run / "log.jsonl"
    records = list(map(json.loads, log.open())) if log.exists() else []
    # The two checkpoints are an epoch apart: training, test, records and the save.
    saves = sorted(path.stat().st_mtime for path in run.glob("checkpoint_*.pt"))
    training_s = epoch_s = minutes = None
    if outcome and outcome.is_done and len(saves) == len(records) == 2:
        training_s, epoch_s = records[1]["time_s"], saves[1] - saves[0]
        minutes = (outcome.seconds + (NUM_EPOCHS - 2) * epoch_s) / 60
    title = f"{NETWORKS['64'].title}, 50,000 synthetic images"
    yield Row(step, f"{title}: an epoch's training", "s", training_s)
    yield Row(step, f"{title}: an epoch with test and checkpoint", "s", epoch_s)
    what = f"{title}: {NUM_EPOCHS} epochs, projected from two"
    yield Row(step, what, "minutes", minutes, MINUTES_GOAL)


def as_csv_file(found: list[Row], directory: Path, outcomes: dict[str, Outcome]) -> bytes:
    """Write the rows as CSV, with the columns that describe the machine."""
    machine = next(iter(read(directory / f"{MACHINE}.csv")), {})
    columns = (*COLUMNS, *MACHINE_COLUMNS)
    return as_csv([row.cells(outcomes) | machine for row in found], columns)


def as_markdown(found: list[Row], directory: Path, outcomes: dict[str, Outcome]) -> bytes:
    """Write the rows as a Markdown page with one table."""
    machine = next(iter(read(directory / f"{MACHINE}.csv")), {})
    on = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines = [
        "# Report from a GPU",
        "",
        "Written by `python -m tools.gpu_report`. What is modelled is a prediction of",
        "`tools.benchmark --static`, not a measurement; its kernels include the gaps before them.",
        "",
        f"Measured on: {on or f'nothing ({outcomes[MACHINE].text})'}.",
        "",
        f"| {' | '.join(PRINTED)} |",
        "|---" * len(PRINTED) + "|",
    ]
    for row in found:
        cells = row.cells(outcomes)
        lines.append(f"| {' | '.join(_text(cells[column]) for column in PRINTED)} |")
    return ("\n".join(lines) + "\n").encode()


def _text(cell: object) -> str:
    text = f"{float(f'{cell:.3g}'):.12g}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|")
