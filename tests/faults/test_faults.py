"""Run the catalogue of faults: each ends as docs/faults.md says and loses nothing saved."""

import re
import signal
from pathlib import Path

import pytest

from faults.catalogue import FAULTS, Fault
from faults.contract import (
    FLAGS,
    call,
    check_whole,
    codes,
    newest_step,
    outcome,
    refused,
    saved,
    status,
    tiny,
)
from faults.sabotage import stop
from helpers.run_main import Ranks, Result

STATES = {0: "done", 75: "preempted", 130: "running", 143: "running"}  # others: failed


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_disturbed_run_ends_as_documented_and_loses_nothing(fault, undisturbed, begun, tmp_path):
    directory = tmp_path / "run"
    if fault.resumes:
        begun(directory, fault.size)
    before = saved(directory)
    argv = tiny(**FLAGS | fault.flags, save=directory)
    resume = ["--resume=auto"]
    results = disturbed([*argv, *resume * fault.resumes], fault, directory)

    check_end(fault, results, directory)
    assert newest_step(directory) == fault.step
    assert not fault.resumes or saved(directory) == before
    check_whole(directory)

    # Where nothing was saved the plain command begins again.
    results = call([*argv, *resume * bool(fault.step)], fault.size)
    assert set(codes(results)) == {0}, results
    assert outcome(directory) == undisturbed(fault.size)


def disturbed(argv: list[str], fault: Fault, directory: Path) -> list[Result]:
    """Run with a fault; a process that is suspended by it is killed once the others have ended."""
    if fault.size == 1:
        return call(argv, 1, fault.sabotages(directory))
    ranks = Ranks(argv, fault.size, fault.sabotages(directory), fault.own_store)
    if fault.action is stop:
        (hung,) = fault.ranks
        ended = ranks[1 - hung].wait()
        ranks[hung].signal(signal.SIGKILL)
        killed = ranks[hung].wait()
        return [killed, ended] if hung == 0 else [ended, killed]
    return ranks.wait()


def check_end(fault: Fault, results: list[Result], directory: Path) -> None:
    """Assert exit codes, what is said, and the verdict."""
    wanted = fault.codes if isinstance(fault.codes, tuple) else (fault.codes,)
    assert tuple(codes(results)) == wanted, results
    reporting = [result for result in results if result.err]
    assert len(reporting) <= 1 and not any("Traceback" in result.err for result in results), results
    code = max(wanted)
    if 0 < code <= 8:
        refused(reporting[0], code, fault.message.replace("{run}", re.escape(str(directory))))
    else:
        assert re.fullmatch(fault.message, "".join(result.err for result in reporting)), results
    if min(wanted) >= 0 and (code <= 8 or (code == 75 and fault.step)):
        assert not list(directory.glob(".*.tmp"))
    if fault.verdict is None or (fault.step is None and code not in range(1, 9)):
        return  # it ended before it could say anything
    verdict = status(directory)
    state = "running" if code < 0 else STATES.get(code, "failed")
    assert (verdict["state"], verdict["code"]) == (state, None if state == "running" else code)
    assert dict(fault.verdict).items() <= verdict.items()
