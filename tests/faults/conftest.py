"""Run once for all tests: undisturbed runs to compare with, and killed ones to resume."""

import functools
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from faults.contract import FLAGS, call, codes, newest_step, outcome, tiny, write_files
from faults.sabotage import at_batch, kill
from faults.soak import Soak, soaks


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Callable[..., dict]:
    """Return a function: number of processes -> the outcome of such a run."""

    @functools.cache
    def undisturbed(size: int = 1) -> dict:
        directory = tmp_path_factory.mktemp("undisturbed")
        assert set(codes(call(tiny(**FLAGS, save=directory), size))) == {0}
        return outcome(directory)

    return undisturbed


@pytest.fixture(scope="session")
def begun(tmp_path_factory) -> Callable[..., Path]:
    """Return a function: place, number of processes, epochs -> a copy of a run killed after them.

    Its last checkpoint is that of the end of the epoch before.
    """

    @functools.cache
    def killed(size: int, epochs: int) -> Path:
        directory = tmp_path_factory.mktemp("begun")
        moment = partial(at_batch, kill, 4 * epochs + 2)
        call(tiny(**FLAGS, save=directory), size, dict.fromkeys(range(size), moment))
        assert newest_step(directory) == 4 * epochs
        return directory

    return lambda copy, size=1, epochs=1: shutil.copytree(killed(size, epochs), copy)


@pytest.fixture
def root(tmp_path) -> Path:
    """Write two classes of four training and two validation images."""
    return write_files(tmp_path / "data", 4)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Soak]:
    """Make the runs of the soak tests: memory, files and pair."""
    return soaks(tmp_path_factory.mktemp("soak"))
