"""The share of a table that is done and the time that is left, as worked out by hand."""

import dataclasses

import pytest

from helpers.tables import tiny, write_run
from tools.sweep import eta, tasks
from tools.sweep.eta import Load

# Work 2 an epoch took 10 s each, work 5 took 30 s: 70 s for 14 in all, 5 s for 1.
SMALL = Load("small", 2.0, 10, 4, 4, 40.0)
LARGE = Load("large", 5.0, 10, 1, 1, 30.0)
OTHER = Load("other", 3.0, 10)


def test_the_share_of_the_work_counts_large_networks_for_more():
    assert eta.share_done([SMALL, LARGE, OTHER]) == (4 * 2 + 1 * 5) / (20 + 50 + 30)
    assert eta.share_done([SMALL, LARGE, OTHER]) != (4 + 1) / 30  # as if all were alike
    assert eta.share_done([dataclasses.replace(SMALL, finished=10)]) == 1


def test_an_epoch_takes_what_its_kind_has_taken_else_what_its_work_says():
    loads = [SMALL, LARGE, OTHER]
    assert eta.epoch_seconds(dataclasses.replace(SMALL, timed=0), loads) == 10
    assert eta.epoch_seconds(LARGE, loads) == 30
    assert eta.epoch_seconds(OTHER, loads) == 3 * 70 / (4 * 2 + 1 * 5)
    assert eta.epoch_seconds(OTHER, [OTHER]) is None


@pytest.mark.parametrize(
    ("to_do", "workers", "seconds"),
    [
        ([SMALL, LARGE], 1, 6 * 10 + 9 * 30),
        ([SMALL, LARGE], 2, 9 * 30),
        ([SMALL, SMALL, LARGE, SMALL], 2, 60 + 270),
        ([SMALL] * 3, 2, 120),
        ([SMALL] * 3, 8, 60),
        ([], 2, 0),
    ],
)
def test_the_time_left_is_that_of_the_worker_that_ends_last(to_do, workers, seconds):
    assert eta.seconds_left(to_do, [SMALL, LARGE], workers) == seconds


def test_nobody_knows_the_time_left_before_the_first_epoch():
    assert eta.seconds_left([OTHER], [OTHER, OTHER], 1) is None
    assert eta.seconds_left([OTHER], [OTHER, SMALL], 1) == 10 * 3 * 5


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(1, "1 min"), (89, "1 min"), (91, "2 min"), (3569, "59 min"), (3571, "1 h 0 min"),
     (12_000, "3 h 20 min"), (172_740, "47 h 59 min"), (172_800, "2 d 0 h"),
     (190_800, "2 d 5 h")],
)  # fmt: skip
def test_times_are_said_as_one_says_them(seconds, said):
    assert eta.as_time(seconds) == said


@pytest.mark.parametrize(
    ("words", "share", "seconds", "line"),
    [
        ([tasks.DONE, tasks.NEW], 0.255, 12_000,
         "1 of 2 runs done, 25 % of the work, about 3 h 20 min left"),
        ([tasks.NEW], 0.0, None, "0 of 1 runs done, 0 % of the work, time left: not known yet"),
        ([tasks.FAILED, tasks.DONE], 0.999, 0,
         "1 of 2 runs done, 1 failed, 99 % of the work"),
        ([tasks.DONE], 1.0, 0, "1 of 1 runs done, 100 % of the work"),
    ],
)  # fmt: skip
def test_the_whole_table_is_a_line(words, share, seconds, line):
    assert eta.progress_line(words, share, seconds) == line


def test_what_a_log_says_of_a_run_is_its_epochs_and_their_whole_time(tmp_path):
    table = tiny(tmp_path)
    records = [{"epoch": 1, "time_s": 20.0, "val_time_s": 2.5}, {"epoch": 2, "time_s": 30.0},
               {"epoch": 3, "time_s": None, "val_time_s": 9.0}]  # fmt: skip
    write_run(table[0], None, records)
    with open(table[0].save / "log.jsonl", "a") as log:
        log.write('{"epoch": 4, "ti')  # a line cut off by a crash
    work = eta.epoch_work(table[0].opt)
    assert eta.load_of(table[0]) == Load(table[0].config, work, 3, 3, 2, 52.5)
    assert eta.load_of(table[0], counts_log=False) == Load(table[0].config, work, 3)
    assert eta.load_of(table[1]) == Load(table[1].config, work, 3)


def test_the_work_of_an_epoch_is_what_the_network_counts_times_the_images():
    words = ["c10/densenet-L40-k12", "svhn/densenet-bc-L100-k12", "imagenet/densenet-121-k32"]
    works = [eta.epoch_work(task.opt) for task in tasks.work_list(words, [0], "runs", [])]
    # Multiply-adds as tests/tools/test_describe.py has them.
    assert works == [
        264_812_928 * 50_000,
        287_929_692 * (604_388 - 6_000),
        2_834_161_664 * 1_281_167,
    ]
