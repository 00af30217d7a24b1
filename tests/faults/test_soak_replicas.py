"""Test two processes at length (`make soak`): lost peers at random, and the same losses."""

import random
import signal
import time
from functools import partial

import pytest

from faults.contract import FLAGS, call, codes, status, tiny
from faults.sabotage import at_batch, both, crash, fail, kill, note_time
from helpers.recording import losses, order, record_steps
from helpers.run_main import Ranks, is_alive

pytestmark = pytest.mark.soak
LOST_PEERS = 50


def test_when_a_process_is_lost_none_is_left(tmp_path, measured):
    draw, seconds, orphans = random.Random(1), [], 0
    for trial in range(LOST_PEERS):
        clock, save = tmp_path / f"{trial}.time", tmp_path / str(trial)
        action = draw.choice([kill, crash, partial(fail, "ZeroDivisionError")])
        moment = partial(both, partial(note_time, clock), action)
        at = {draw.choice([0, 1]): partial(at_batch, moment, draw.randrange(1, 12))}
        ranks = Ranks(tiny(**FLAGS, save=save), 2, at)
        pids = [one.process.pid for one in ranks.ranks]
        results = ranks.wait()
        seconds.append(time.monotonic() - float(clock.read_text()))
        assert set(codes(results)) <= {1, 8, -signal.SIGKILL, -signal.SIGSEGV}
        orphans += sum(map(is_alive, pids))
        assert status(save)["state"] == "failed"
    measured("G10", "lost processes of two, on one machine", LOST_PEERS, ">= 50")
    measured("G10", "seconds until both are gone, longest", max(seconds), "<= 10")
    measured("G10", "processes left over", orphans, "= 0")
    assert orphans == 0


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("precision", ["single", "double"])
def test_any_number_of_processes_has_the_same_order_and_losses(tmp_path, measured, size, precision):
    flags = {"nImages": 320, "imageSize": 16, "batchSize": 16, "growthRate": 4, "nEpochs": 1,
             "dropRate": 0.2, "nGPU": 0, "precision": precision}  # fmt: skip
    for count in (1, size):
        directory = tmp_path / str(count)
        directory.mkdir()
        argv = tiny(**flags, syncBN=True, save=directory / "run")
        record = partial(record_steps, directory)
        results = call(argv, count, dict.fromkeys(range(count), record))
        assert set(codes(results)) == {0}, results
    one, many = tmp_path / "1", tmp_path / str(size)
    differing = sum(a != b for a, b in zip(order(one), order(many), strict=True))
    gap = ((losses(many) - losses(one)).abs() / losses(one)).max().item()
    what = f"{size} processes and one, 20 steps, {precision} precision"
    measured("G14", f"{what}: steps of other images", differing, "= 0")
    measured("G14", f"{what}: largest relative difference of a loss", gap, "<= 1e-5")
    assert differing == 0 and gap <= 1e-5 and len(losses(many)) == 20
