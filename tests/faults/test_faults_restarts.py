"""Test that a run that is restarted repeatedly without progress is stopped, and why."""

from pathlib import Path

import pytest

from distributed import launcher
from errors import DataError, PeerError, Preempted, RunError
from experiment import resume
from experiment.directory import RunDirectory
from faults.contract import status

BY_HAND = {"SLURM_RESTART_COUNT": "0"}
BY_TORCHRUN = {"TORCHELASTIC_RESTART_COUNT": "1"}
BY_SLURM = {"SLURM_RESTART_COUNT": "7", "TORCHELASTIC_RESTART_COUNT": "0"}

CAUSE = DataError("cannot read image 7.png", "remove it")


class Killed(BaseException):
    """Stand for SIGKILL: nothing is written any more."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Do what one process does: find its checkpoint at `step`, write so, and end with `end`."""

    def start(environment: dict[str, str], step: int, end: BaseException = CAUSE) -> None:
        for name in launcher.RESTART_COUNTS:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(type(end)), RunDirectory(tmp_path) as directory:
            state = {"global_step": step} if step else None
            resume.check_progress(directory, state, launcher.from_env().restarted)
            directory.write_status("running", global_step=step)
            raise end

    return start


def refused(start, environment: dict[str, str], step: int = 40) -> RunError:
    """Return the error that a start is refused with."""
    with pytest.raises(PeerError) as caught:
        start(environment, step)
    return caught.value


@pytest.mark.parametrize("environment", [BY_TORCHRUN, BY_SLURM], ids=["torchrun", "slurm"])
@pytest.mark.parametrize("step", [0, 40])
def test_the_third_automatic_start_without_progress_is_refused(start, tmp_path, environment, step):
    for begun_by in (BY_HAND, environment, environment):
        start(begun_by, step)
    error = refused(start, environment, step)
    assert error.code == 8
    assert error.report() == (
        f"error: 3 automatic starts in a row found the run at step {step}; the one before ended "
        f"with: {CAUSE}; fix: look into the cause, then start it by hand, which resets the count"
    )
    assert (status(tmp_path)["state"], status(tmp_path)["code"]) == ("failed", 8)
    again = refused(start, environment, step)  # whatever restarts it may not have understood
    assert f"4 automatic starts in a row found the run at step {step}" in str(again)
    assert str(again).count(str(CAUSE)) == 1 and str(again).endswith(str(CAUSE))


STOPPED = Preempted("SIGTERM", "go on")
TWO_FAILURES = [(BY_HAND, 40, CAUSE), (BY_TORCHRUN, 40, CAUSE), (BY_TORCHRUN, 40, CAUSE)]


@pytest.mark.parametrize(
    "starts",
    [
        [*TWO_FAILURES, (BY_HAND, 40, CAUSE), ({}, 40, CAUSE), (BY_TORCHRUN, 40, CAUSE)],
        [*TWO_FAILURES, (BY_TORCHRUN, 41, CAUSE), (BY_TORCHRUN, 41, CAUSE)],
        [(BY_HAND, 40, CAUSE), *[(BY_SLURM, 40, STOPPED)] * 9, *[(BY_SLURM, 40, CAUSE)] * 2],
    ],
    ids=["started by hand", "got further", "stopped by a signal"],
)
def test_only_failed_starts_without_progress_are_counted(start, starts):
    for environment, step, end in starts:
        start(environment, step, end)


def test_killed_starts_count_and_are_called_killed(start):
    for environment in (BY_HAND, BY_TORCHRUN, BY_TORCHRUN):
        start(environment, 40, Killed())
    assert str(refused(start, BY_TORCHRUN)).endswith("ended with: it was killed")


def test_an_automatic_start_is_counted_before_it_can_die(tmp_path, monkeypatch):
    """Check too that a start by hand writes nothing before it is known to be in order."""
    for count, written in (("0", False), ("1", True)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        with pytest.raises(DataError), RunDirectory(Path(tmp_path)) as directory:
            resume.check_progress(directory, None, launcher.from_env().restarted)
            raise CAUSE
        assert (tmp_path / "status.json").exists() == written
