"""tools.endurance: a time is of the function itself; steps with and without a look take turns."""

import math
from types import SimpleNamespace

import pytest

from errors import NonFiniteError
from faults import endurance

TINY = ["--dataset=synthetic", "--imageSize=8", "--nClasses=3", "--depth=10", "--growthRate=2",
        "--batchSize=4", "--nGPU=0"]  # fmt: skip


class Clock:
    """A clock that shows what it is told."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_the_time_of_a_function_is_without_what_it_calls(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(endurance, "time", clock)

    def inner():
        clock.now += 1

    def outer():
        clock.now += 10
        owner.inner()
        owner.inner()
        clock.now += 100

    owner = SimpleNamespace(inner=inner, outer=outer)
    watch = endurance.Stopwatch()
    with watch.watch({"in": [(owner, "inner")], "out": [(owner, "outer")]}):
        owner.outer()
        owner.inner()
    assert watch.seconds == {"in": 3, "out": 110}
    owner.outer()
    assert watch.seconds == {"in": 3, "out": 110} and owner.inner is inner


def test_a_checkpoint_is_measured_with_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(endurance, "SAVES", 3)
    rows = {
        what: value for what, value, _ in endurance.measure_save("tiny", TINY, 40, 100, tmp_path)
    }
    parts = [value for what, value in rows.items() if "of it" in what]
    whole = rows["tiny: a checkpoint, ms, median of 3"]
    assert len(parts) == 8 and min(parts) > 0
    assert sum(parts) <= 3 * rows["tiny: the slowest of them, ms"]
    assert rows["tiny: epoch of which saving is 1 %, s"] > whole / 10
    assert not list(tmp_path.iterdir())  # nothing is left


def test_steps_are_compared_with_the_look_and_without(monkeypatch):
    for name, value in (("CIFAR", TINY), ("PAIRS", 4), ("WARM_UP", 0)):
        monkeypatch.setattr(endurance, name, value)
    looks, timed_steps = [], endurance.timed_steps

    def watched(trainer, data, before_step):
        def before(step: int) -> None:
            before_step(step)
            trainer._bad_step.fill_(1)  # as after a step that was not finite
            try:
                trainer.check_finite()
            except NonFiniteError:
                looks.append(True)
            else:
                looks.append(False)
            trainer._bad_step.fill_(-1)

        return timed_steps(trainer, data, before)

    monkeypatch.setattr(endurance, "timed_steps", watched)
    (_, share, _), (_, more, _), *_ = endurance.measure_check()
    assert looks[:8] == [True, False, False, True] * 2
    assert 0 < share < 100 and math.isfinite(more)


@pytest.mark.parametrize("flags", ["--only everything", "--no 1"])
def test_a_flag_that_is_none_is_refused_in_one_line(flags, capsys):
    assert endurance.main(flags.split()) == 2
    assert capsys.readouterr().err.startswith("error: ")
