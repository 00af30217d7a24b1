"""Test the runs of a table, and the states that are read from their directories."""

import fcntl
from pathlib import Path

import pytest

import opts
from errors import UsageError
from helpers.run_main import ROOT
from helpers.tables import CONFIG, held_elsewhere, tiny, write_run
from tools.sweep import tasks


def names(*words: str, seeds: tuple[int, ...] = (0,)) -> list[str]:
    return [task.name for task in tasks.work_list(list(words), list(seeds), "runs", [])]


def test_a_table_is_its_configs_each_with_all_seeds():
    found = tasks.work_list(["wide", "c10/densenet-L40-k12"], [3, 1], "runs", ["--nThreads=4"])
    configs = [*sorted(Path("configs/wide").glob("*")), Path("configs/c10/densenet-L40-k12.yaml")]
    assert [task.config for task in found] == [str(path) for path in configs for _ in range(2)]
    assert [task.opt.manualSeed for task in found] == [3, 1] * 7
    last = found[-1]
    assert (last.name, str(last.save)) == ("c10/densenet-L40-k12-seed1", "runs/" + last.name)
    assert (last.opt.save, last.opt.resume, last.opt.nThreads) == (str(last.save), "auto", 4)
    assert last.opt == opts.parse(list(last.flags)) and last.opt.depth == 40


def test_table_2_is_its_five_columns():
    found = names("table2")
    folders = {name.split("/")[0] for name in found}
    assert folders == {"c10", "c10plus", "c100", "c100plus", "svhn"}
    assert len(found) == sum(len(list(Path("configs", one).glob("*.yaml"))) for one in folders)


def test_a_config_named_twice_is_one_run():
    one = "configs/c10/densenet-L40-k12.yaml"
    assert names(one, "c10/densenet-L40-k12", f"./{one}", str(ROOT / one)) == names(one)
    assert len(names(one, "c100/densenet-L40-k12")) == 2


def test_all_mistakes_are_reported_at_once_and_each_once(tmp_path):
    (tmp_path / "a.yaml").write_text(CONFIG + "LRR: 3\n")
    (tmp_path / "b.yaml").write_text(CONFIG.replace("10", "41"))
    with pytest.raises(UsageError) as error:
        tasks.work_list([str(tmp_path), "nowhere"], [0, 1], "runs", ["--momentum=2"])
    lines = error.value.report().splitlines()
    for line, part in zip(lines, ["nowhere", "momentum", "LRR", "depth: 41"], strict=True):
        assert part in line


@pytest.mark.parametrize(
    ("found", "state"),
    [
        (None, (tasks.NEW, 0, "")),
        (("done", 3), (tasks.DONE, 3, "")),
        (("done", 3, "--nThreads=9"), (tasks.DONE, 3, "")),
        # main.py tells these apart: a longer run, other settings, a damaged log
        (("done", 2, "--nEpochs=2"), (tasks.OTHER, 2, "")),
        (("done", 3, "--LR=0.3"), (tasks.OTHER, 3, "")),
        (("done", 2), (tasks.OTHER, 2, "")),
        (("preempted", 1), (tasks.PREEMPTED, 1, "SIGINT")),
        (("failed", 0), (tasks.FAILED, 0, "5: SIGINT")),
        (("running", 2), (tasks.KILLED, 2, "")),
        (("unheard of", 1), (tasks.KILLED, 1, "")),
    ],
)
def test_the_state_of_a_run_is_read_from_its_directory(tmp_path, found, state):
    if found:
        write_run(tiny(tmp_path)[0], *found, code=5, reason="SIGINT")
    task, other = tiny(tmp_path)[:2]
    assert (task.state, task.finished, task.detail) == state and other.state == tasks.NEW


def test_a_directory_without_readable_settings_is_of_a_killed_run(tmp_path):
    task = tiny(tmp_path)[0]
    write_run(task, "done", 3)
    (task.save / "config.yaml").write_text("depth: [")
    task.read_state()
    assert task.state == tasks.KILLED


def test_a_run_that_another_process_is_writing_is_recognised_without_disturbing_it(tmp_path):
    task = tiny(tmp_path)[0]
    write_run(task, "running", 1)
    with held_elsewhere(task):
        task.read_state()
        assert (task.state, task.detail) == (tasks.RUNNING, "host far, process 7")
        with open(task.save / ".lock", "a") as lock, pytest.raises(BlockingIOError):
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # looking has not taken it away


def test_the_list_shows_every_run_and_counts_them(tmp_path):
    write_run(tiny(tmp_path)[0], "done", 3)
    write_run(tiny(tmp_path)[1], "failed", 1, code=5, reason="nan")
    head, *lines, counts = tasks.listing(tiny(tmp_path)).splitlines()
    assert head.split() == ["run", "state", "epochs"]
    assert [" ".join(line.split()[1:]) for line in lines] == [
        "done 3/3", "failed 1/3 5: nan", "not started 0/3", "not started 0/3",
    ]  # fmt: skip
    assert counts == "4 runs: 2 not started, 1 done, 1 failed"


def test_a_sweep_started_in_another_directory_has_the_same_runs(tmp_path, monkeypatch):
    own = tmp_path / "own.yaml"
    own.write_text(CONFIG)
    wanted = names("c10", str(own))
    monkeypatch.chdir(tmp_path)
    assert names("c10", "own.yaml") == [*wanted[:-1], "own-seed0"]
    (task,) = tasks.work_list(["c10/densenet-L40-k12"], [0], "runs", [])
    assert task.config == str(ROOT / "configs/c10/densenet-L40-k12.yaml")
    with pytest.raises(UsageError, match="no table or config nowhere"):
        names("nowhere")
