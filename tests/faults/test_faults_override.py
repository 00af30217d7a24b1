"""Test row 9: SIGKILL at each change of a file of a run that is resumed with other settings."""

import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

import checkpoints
from faults.contract import command, outcome, tiny
from faults.sabotage import kill, no_fsync, on_files, record_files
from faults.test_faults_kills import FLAGS, last_of_each_kind
from helpers.run_main import run


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """Finish a run of one epoch."""
    directory = tmp_path_factory.mktemp("short")
    assert run(tiny(**FLAGS | {"nEpochs": 1}, save=directory)).code == 0
    return directory


def test_a_run_with_other_settings_that_is_killed_is_resumed_by_its_directory_alone(
    short, tmp_path
):
    """Kill it at each change of a file: it has the new settings, or as before the old ones."""

    def overridden(directory: Path) -> list[str]:
        shutil.copytree(short, directory)
        return command(resume=directory, nEpochs=2, LR=0.05, milestones=[], override=True)

    argv, report = overridden(tmp_path / "whole"), tmp_path / "whole.txt"
    assert run(argv, partial(record_files, tmp_path / "whole", report)).code == 0
    want, operations = outcome(tmp_path / "whole"), report.read_text().splitlines()
    moments = last_of_each_kind(operations)
    assert len(moments) > 15
    states = set()
    for k in moments:
        directory, what = tmp_path / str(k), operations[k - 1]
        argv = overridden(directory)
        killed = run(argv, partial(on_files, kill, directory, k=k))
        assert killed.code == -signal.SIGKILL, (what, killed)
        result = run(command(resume=directory), no_fsync)
        assert result.code == 0, (what, result)
        config = (directory / "config.yaml").read_bytes()
        state = checkpoints.load_latest(directory, pytest.fail)
        states.add((state["settings"]["LR"], "as in the checkpoint" in result.err))
        if state["settings"]["LR"] == 0.1:
            assert config == (short / "config.yaml").read_bytes(), what
            assert run(argv, no_fsync).code == 0, what
        assert outcome(directory) == want, what
        whole = (tmp_path / "whole" / "config.yaml").read_bytes()
        assert (directory / "config.yaml").read_bytes() == whole, what
    # Before the first checkpoint, between it and config.yaml, and after both.
    assert states == {(0.1, False), (0.05, True), (0.05, False)}
