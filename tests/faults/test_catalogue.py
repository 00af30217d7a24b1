"""Test the table of docs/faults.md: every row is there, and the tests that it names exist."""

import re
from collections.abc import Iterator

import errors
from distributed.signals import SIGNALS
from faults.catalogue import FAULTS
from helpers.documents import find_tests, project_files
from helpers.run_main import ROOT

NUM_ROWS = 87
DOCUMENT = (ROOT / "docs" / "faults.md").read_text()
MANUAL = (ROOT / "docs" / "operations.md").read_text()
UNCLAIMED = "not claimed: "
LEFT_OUT = {"gpu", "soak"}  # marks of tests that `make test` leaves out, or skips


def kinds(kind: type = errors.RunError) -> Iterator[type]:
    """Yield an error class and all that derive from it."""
    yield kind
    for derived in kind.__subclasses__():
        yield from kinds(derived)


CODES = {0} | {kind.code for kind in kinds()}
FORCED = {128 + number for number in SIGNALS}  # by a second signal


def cells(line: str) -> list[str]:
    """Split one line of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows(text: str) -> list[list[str]]:
    """Read number, fault, exit codes and tests of each row of the catalogue."""
    numbered = [cells(line) for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    return [row for row in numbered if len(row) == 4]


TESTS = find_tests()


def problems(text: str) -> list[str]:
    """List what is wrong with a catalogue."""
    catalogue = rows(text)
    numbers = [row[0] for row in catalogue]
    wanted = [str(number) for number in range(1, NUM_ROWS + 1)]
    found = [] if numbers == wanted else [f"rows: {' '.join(set(wanted) ^ set(numbers))}"]
    for number, _, codes, held_by in catalogue:
        if not set(map(int, re.findall(r"\d+", codes))) <= CODES | FORCED:
            found.append(f"row {number}: no such exit code: {codes}")
        if held_by.startswith(UNCLAIMED):
            found += [f"row {number}: no reason"] * (len(held_by.split()) < 5)
            continue
        names = re.findall(r"\w+\.py::\w+", held_by)
        found += [f"row {number}: no such test: {name}" for name in names if name not in TESTS]
        quick = [name for name in names if not LEFT_OUT & TESTS.get(name, set())]
        found += [f"row {number}: not held by `make test`"] * (not quick)
    return found


def test_every_fault_has_a_code_and_tests_that_exist_and_run():
    assert problems(DOCUMENT) == []


def test_a_name_stands_for_one_test():
    names = [path.name for path in project_files("test_*.py")]
    assert len(set(names)) == len(names)
    assert "test_catalogue.py::test_a_name_stands_for_one_test" in TESTS


def test_the_rows_that_name_the_common_test_are_those_of_its_faults():
    by_row = {int(row[0]): row for row in rows(DOCUMENT)}
    naming = {number for number, row in by_row.items() if "test_faults.py::" in row[3]}
    assert naming == {fault.row for fault in FAULTS}
    for fault in FAULTS:
        codes = fault.codes if isinstance(fault.codes, tuple) else (fault.codes,)
        # A killed process has no code of its own.
        documented = {int(code) for code in re.findall(r"\d+", by_row[fault.row][2])}
        assert {code for code in codes if code >= 0} <= documented, fault


def test_the_exit_codes_of_the_manual_are_those_of_the_program():
    (table,) = re.findall(r"\| code \|.*?\n((?:\|.*\n)+)", MANUAL)
    listed = {
        int(code) for line in table.splitlines() for code in re.findall(r"\d+", cells(line)[0])
    }
    assert listed == CODES | {128 + number for number in (2, 15)}
