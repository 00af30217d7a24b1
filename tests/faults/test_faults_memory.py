"""Row 55: a step for which there is no memory ends the run with what would fit; nothing is lost."""

from functools import partial

import pytest

from faults.contract import outcome, refused, saved, status, tiny
from faults.sabotage import ask_for_bytes, ask_for_tensors, at_batch, fill_the_gpu
from helpers.run_main import run

FLAGS = {"depth": 16, "growthRate": 8, "batchSize": 16, "nEpochs": 3}
OUT = (
    r"out of memory with --batchSize 16 --optMemory 2; "
    r"fix: use --batchSize \d+( --optMemory \d)?, about \d+ MB instead of \d+ MB"
)


@pytest.mark.parametrize("action", [ask_for_tensors, ask_for_bytes, fill_the_gpu])
@pytest.mark.parametrize(("phase", "batch"), [("train", 4), ("val", 2)])
def test_no_memory_is_one_line_and_the_run_goes_on_where_it_was(tmp_path, action, phase, batch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(tiny(**FLAGS, save=whole)).code == 0
    sabotage = partial(at_batch, action, k=batch, phase=phase)  # the last of the second epoch
    refused(run(tiny(**FLAGS, save=parts), sabotage), 6, OUT)
    assert status(parts)["state"] == "failed" and status(parts)["code"] == 6
    before = saved(parts)
    assert any(name.startswith("checkpoint_") for name in before)
    assert run(tiny(**FLAGS, save=parts, resume="auto")).code == 0
    assert outcome(parts) == outcome(whole)
    assert saved(parts) != before


def test_another_error_is_a_bug_with_its_traceback(tmp_path):
    result = run(tiny(**FLAGS, save=tmp_path / "run"), partial(at_batch, fail, k=2))
    assert result.code == 1 and "RuntimeError: out of luck" in result.err
    verdict = status(tmp_path / "run")
    assert (verdict["state"], verdict["code"]) == ("failed", 1)
    assert verdict["reason"] == "a bug: RuntimeError: out of luck"


def fail() -> None:
    raise RuntimeError("out of luck")
