"""A sweep trains what is left of a table, here or under Slurm, and can be stopped and goes on."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import main
import opts
from distributed import signals
from errors import DataError, Preempted, RunError, UsageError
from helpers.run_main import ROOT
from helpers.tables import epochs, held_elsewhere, tiny, write_run
from tools.sweep import __main__ as sweep
from tools.sweep import tasks
from tools.sweep.tasks import State, Task

# What stands for main.py. FAKE_PLAN says what becomes of a run; FAKE_LOG gets a line at each start.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path

told = []
signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
save = Path(sys.argv[sys.argv.index("--save") + 1])
save.mkdir(parents=True, exist_ok=True)
gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(f"{save.name} {gpu}\\n")
busy = Path(os.environ["FAKE_LOG"] + f".{gpu}")
busy.touch(exist_ok=False)  # two runs on one GPU would fail here
wish = json.loads(os.environ["FAKE_PLAN"]).get(save.name, 0)
end = time.monotonic() + 20
while wish == "wait" and not told and time.monotonic() < end:
    time.sleep(0.01)
busy.unlink()
code = 75 if told else wish
state = {0: "done", 75: "preempted"}.get(code, "failed")
epochs = 3 if code == 0 else 1
with open(save / "log.jsonl", "w") as log:
    for epoch in range(1, epochs + 1):
        log.write(json.dumps({"epoch": epoch, "time_s": 50.0, "val_time_s": 10.0}) + "\\n")
(save / "status.json").write_text(json.dumps({"state": state, "code": code, "epoch": epochs}))
if code == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if code not in (0, 1):
    print("error: an older line\\nerror: wrong; fix: mend it")
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def _signals():
    """Leave the signals of the test run as they were."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def table(tmp_path) -> list[Task]:
    """Two configs with two seeds."""
    return tiny(tmp_path)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Sweep over a table with the fake program: `sweep(table, plan, ...)`; `started()`."""
    script, log = tmp_path / "fake.py", tmp_path / "started"
    script.write_text(FAKE)
    monkeypatch.setattr(sweep, "POLL_S", 0.005)
    monkeypatch.setenv("FAKE_LOG", str(log))

    def run(
        table, where=(None,), stop_at="never", meanwhile=lambda: None, **plan
    ) -> SimpleNamespace:
        monkeypatch.setenv("FAKE_PLAN", json.dumps(plan))
        lines, stop = [], SimpleNamespace(signum=0)

        def say(line: str) -> None:
            lines.append(line)
            if stop_at in line:
                stop.signum = signal.SIGTERM

        states = {task: tasks.state_of(task) for task in table}
        meanwhile()
        program = (sys.executable, "-I", "-S", str(script))
        workers = sweep.LocalScheduler(states, list(where), say, program)
        workers.run(stop)
        ends = {end.task.save.name: (end.code, end.reason) for end in workers.ends}
        return SimpleNamespace(ends=ends, lines=lines, workers=workers)

    def started() -> list[str]:
        found = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return found

    return SimpleNamespace(sweep=run, started=started)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("c10pluss", "no table or config c10pluss; fix: did you mean c10plus?"),
        ("Table2", "did you mean table2?"),
        ("?", "fix: use table2, c10,"),
        ("EMPTY", "no config files (*.yaml) in "),
        ("c10 --seeds 0,1,0", "seeds: 0 given twice"),
        ("c10 --seeds []", "seeds: none is given"),
        ("c10 --seeds -1", "out of range"),
        ("c10 --slurm --gpus 2", "gpus has no effect"),
        ("c10 --slurm --dryRun", "exclude each other"),
        ("c10 --manualSeed 1", "manualSeed is no flag of a sweep; fix: use --seeds"),
        ("c10 --nGPU 2", "nGPU is no flag of a sweep; fix: use --gpus"),
        ("", "no table or config"),
        ("c10 --gpu 2", "unknown flag gpu (command line); fix: did you mean"),
    ],
)
def test_a_mistake_is_a_line_and_starts_nothing(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "LocalScheduler", None)
    argv = words.replace("EMPTY", str(tmp_path)).split()
    assert sweep.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_data_that_is_not_there_is_noticed_before_the_first_run(tmp_path, monkeypatch):
    asked = sweep.parse(["small", "--data", str(tmp_path / "no"), "--runs", str(tmp_path)])
    monkeypatch.setattr(sweep, "LocalScheduler", None)
    with pytest.raises(DataError) as error:
        sweep.train(asked, signals.SignalHandler(), "again")
    (problem,) = error.value.problems  # the same for all of them
    assert problem[0] == f"no directory {tmp_path / 'no'}"


# --------------------------------------------------------------------------------------- running


def test_a_run_of_other_settings_is_not_started_and_counts_as_failed(table, fake, tmp_path):
    write_run(table[0], {"state": "done", "code": 0, "epoch": 3}, epochs(3))
    theirs = opts.as_yaml(opts.parse([*table[0].flags, "--LR=0.3"]), exclude=opts.NOT_SAVED)
    (table[0].save / "config.yaml").write_text(theirs)
    done = fake.sweep(table)
    assert len(done.ends) == 3 == len(fake.started())
    assert done.lines[-1] == "=> 3 of 4 runs done, 1 failed, 75 % of the work"


def test_a_run_that_another_process_is_writing_is_left_to_it(table, fake):
    write_run(table[0], {"state": "running", "code": None}, epochs(1))
    with held_elsewhere(table[0]):
        done = fake.sweep(table[:2])
    assert done.ends["a-seed0"] == (7, "host far, process 7")
    assert done.ends["a-seed1"][0] == 0 and fake.started() == ["a-seed1 None"]
    sweep.raise_outcome(done.workers.ends, 2, "", "again")  # which is no error
    assert fake.sweep(table[:2]).ends["a-seed0"][0] == 0  # and it may go on now


def test_runs_go_one_after_another_in_the_order_of_the_list(table, fake):
    done = fake.sweep(table)
    assert fake.started() == [
        f"{name} None" for name in ("a-seed0", "a-seed1", "b-seed0", "b-seed1")
    ]
    assert {code for code, _ in done.ends.values()} == {0}
    assert done.lines[1] == "=> 0 of 4 runs done, 0 % of the work, time left: not known yet"
    # 60 s an epoch, three epochs a run
    assert "=> 1 of 4 runs done, 25 % of the work, about 9 min left" in done.lines
    assert done.lines[-2:] == [
        f"=> {table[3].name}: done",
        "=> 4 of 4 runs done, 100 % of the work",
    ]
    assert [tasks.state_of(task).word for task in table] == [tasks.DONE] * 4


def test_a_run_that_is_done_is_not_run_again(table, fake):
    fake.sweep(table[1:3])
    before = {path: path.stat() for path in table[1].save.parent.rglob("*")}
    assert len(fake.started()) == 2 and len(before) == 8
    fake.sweep(table)
    assert fake.started() == ["a-seed0 None", "b-seed1 None"]
    for path, stat in before.items():
        if path.is_file():
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_a_run_that_another_sweep_ends_meanwhile_is_not_run_again(table, fake):
    def end_it() -> None:
        write_run(table[0], {"state": "done", "code": 0, "epoch": 3}, epochs(3))

    done = fake.sweep(table[:2], meanwhile=end_it)
    assert fake.started() == ["a-seed1 None"]
    assert {code for code, _ in done.ends.values()} == {0} and len(done.ends) == 2


def test_each_gpu_has_one_run_at_a_time(table, fake):
    done = fake.sweep(table, where=["3", "GPU-a"])
    assert {code for code, _ in done.ends.values()} == {0}
    gpus = [line.split()[1] for line in fake.started()]
    assert len(gpus) == 4 and set(gpus) == {"3", "GPU-a"}
    assert any("a-seed0: started on GPU 3; output: " in line for line in done.lines)


def test_two_runs_on_one_gpu_would_be_noticed(table, fake):
    done = fake.sweep(table[:2], where=["3", "3"], **{"a-seed0": "wait", "a-seed1": "wait"},
                      stop_at="failed with 1")  # fmt: skip
    assert sorted(code for code, _ in done.ends.values()) == [1, 75]


def test_a_run_that_fails_does_not_keep_the_others_from_going_on(table, fake):
    done = fake.sweep(table, **{"a-seed0": 5, "a-seed1": "killed", "b-seed0": 75})
    assert done.ends["a-seed0"] == (5, "error: wrong; fix: mend it")
    assert done.ends["a-seed1"] == (137, "ended by SIGKILL")
    assert done.ends["b-seed0"][0] == 75 and done.ends["b-seed1"][0] == 0
    assert "=> " + table[0].name + ": failed with 5: error: wrong; fix: mend it" in done.lines
    assert done.lines[-1] == "=> 1 of 4 runs done, 2 failed, 50 % of the work"
    with pytest.raises(RunError, match=r"2 of 4 runs failed: .*a-seed0 \(5\), ") as error:
        sweep.raise_outcome(done.workers.ends, 4, "", "again")
    assert error.value.code == 5
    again = fake.sweep(table)
    assert {code for code, _ in again.ends.values()} == {0} and len(again.ends) == 3


def test_a_run_that_cannot_be_started_has_failed_and_is_no_traceback(table, fake):
    table[0].save.parent.mkdir(parents=True)
    Path(f"{table[0].save}.log").mkdir()
    done = fake.sweep(table[:2])
    assert done.ends["a-seed0"][0] == 6 and "error: cannot write" in done.ends["a-seed0"][1]
    assert done.ends["a-seed1"][0] == 0


def test_what_runs_print_is_added_to_a_file_beside_each(table, fake, capfd):
    for _ in range(2):
        fake.sweep(table[:1], **{"a-seed0": 3})
    output = Path(f"{table[0].save}.log").read_text()
    assert output == 2 * "error: an older line\nerror: wrong; fix: mend it\n"
    assert capfd.readouterr() == ("", "")
    silent = fake.sweep(table[:1], **{"a-seed0": 1})  # what was said before is not its reason
    assert silent.ends["a-seed0"] == (1, f"see {table[0].save}.log")


def test_a_signal_is_passed_on_once_and_nothing_else_is_started(table, fake):
    plan = {"a-seed0": "wait", "a-seed1": "wait"}
    done = fake.sweep(table, where=["0", "1"], stop_at="a-seed1: started", **plan)
    assert {name: code for name, (code, _) in done.ends.items()} == {"a-seed0": 75, "a-seed1": 75}
    assert sorted(fake.started()) == ["a-seed0 0", "a-seed1 1"] and done.workers.was_stopped
    with pytest.raises(Preempted, match="SIGTERM, 2 of 4 runs were in progress") as stopped:
        sweep.raise_outcome(done.workers.ends, 4, "SIGTERM", "python -m tools.sweep x")
    assert stopped.value.report().endswith("; to go on: python -m tools.sweep x")
    again = fake.sweep(table)
    assert len(again.ends) == 4 and not again.workers.was_stopped


@pytest.mark.parametrize(
    ("codes", "stopped_by", "code"),
    [((0, 0), "", 0), ((0, 7), "", 0), ((0, 8, 5), "", 8), ((75, 3), "", 3), ((0, 75), "", 75),
     ((5, 75), "SIGINT", 75), ((1, 143), "", 1)],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_first_failure(table, codes, stopped_by, code):
    ends = [sweep.RunOutcome(task, each) for task, each in zip(table, codes, strict=False)]
    try:
        sweep.raise_outcome(ends, 4, stopped_by, "again")
        ended = 0
    except RunError as error:
        ended = error.code
    assert ended == code


@pytest.mark.parametrize(
    ("gpus", "visible", "present", "expected"),
    [
        (None, None, 0, [None]),
        (None, None, 2, ["0", "1"]),
        (None, "5,GPU-a,7", 3, ["5", "GPU-a", "7"]),
        (2, "5,GPU-a,7", 3, ["5", "GPU-a"]),
        (1, None, 4, ["0"]),
        (0, "5", 1, [""]),
        (None, "", 0, [None]),
    ],
)
def test_each_worker_sees_one_of_the_gpus_that_the_sweep_sees(gpus, visible, present, expected):
    assert sweep.gpu_slots(gpus, visible, present) == expected


def test_gpus_that_are_not_there_are_a_usage_error():
    with pytest.raises(UsageError, match="gpus=3 but 2 CUDA devices"):
        sweep.gpu_slots(3, None, 2)


ORPHAN = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from tools.sweep import __main__ as sweep

child = "import os, signal, time; signal.pthread_sigmask(signal.SIG_UNBLOCK, {15}); time.sleep(60)"
task = SimpleNamespace(save=Path(sys.argv[1]), flags=())
print(sweep.start(task, None, (sys.executable, "-I", "-S", "-c", child)).process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a parent's death on Linux")
def test_a_run_does_not_outlive_a_sweep_that_was_killed(tmp_path):
    command = [sys.executable, "-c", ORPHAN, tmp_path / "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    end = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may still be listed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ----------------------------------------------------------------------------------------- Slurm

# What stands for sbatch: each task of the array in turn, up to the check of its flags.
SBATCH = """
import os, subprocess, sys
for part in sys.argv[1].removeprefix("--array=").split(","):
    low, _, high = part.partition("-")
    for task in range(int(low), int(high or low) + 1):
        job = os.environ | {"SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(["bash", *sys.argv[2:]], env=job)
"""
MAIN = """
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([int(os.environ["SLURM_ARRAY_TASK_ID"]), sys.argv[1:]]) + "\\n")
sys.exit(1)
"""


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """What each task of an array would start: `submitted(line)` -> (task, words of main.py)."""
    for name, script in {"sbatch": SBATCH, "python": MAIN}.items():
        (tmp_path / name).write_text(f"#!{sys.executable} -IS\n{script}")
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    more = {"CALLS": str(calls), "PYTHON": str(tmp_path / "python"),
            "PATH": f"{tmp_path}:{os.environ['PATH']}"}  # fmt: skip

    def run(line: str) -> list[tuple[int, list[str]]]:
        calls.unlink(missing_ok=True)
        subprocess.run(["bash", "-c", line], env=os.environ | more, cwd=ROOT, capture_output=True)
        return [tuple(json.loads(line)) for line in calls.read_text().splitlines()]

    return run


def test_the_array_trains_what_is_left_and_nothing_else(table, submitted, tmp_path, capsys):
    write_run(table[1], {"state": "done", "code": 0, "epoch": 3}, epochs(3))
    argv = [str(tmp_path / "tiny"), "--seeds", "0,1", "--runs", str(tmp_path / "runs"),
            "--data", "/a b/$HOME", "--slurm", "true"]  # fmt: skip
    assert sweep.main(argv) == 0
    said = capsys.readouterr()
    assert said.err == "note: 3 of 4 runs are left to start\n"
    assert "--array=0,2-3 " in said.out
    expected = tasks.work_list(argv[:1], [0, 1], argv[4], ["--data=/a b/$HOME"])
    calls = submitted(said.out)
    assert [number for number, _ in calls] == [0, 2, 3]
    for number, words in calls:
        words = [word.replace("//", "/") for word in words]  # the config lies outside the project
        assert words == ["main.py", *expected[number].flags, "--printConfig"]


def test_an_array_over_other_seeds_would_be_noticed(table, submitted):
    asked = sweep.parse([str(Path(table[0].config).parent), "--seeds", "0,1,2"])
    calls = submitted(sweep.slurm_line(asked, table, table))
    assert [words[4] for _, words in calls] == ["0", "1", "2", "0"]  # config a, seed 2 is not in it


def test_an_array_of_nothing_is_no_command(table, tmp_path, capsys):
    for task in table:
        write_run(task, {"state": "done", "code": 0, "epoch": 3}, epochs(3))
    argv = [str(tmp_path / "tiny"), "--seeds", "0,1", "--runs", str(tmp_path / "runs")]
    assert sweep.main([*argv, "--slurm"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("numbers", "ranges"),
    [([0], "0"), ([0, 1], "0-1"), ([0, 2, 4], "0,2,4"), ([0, 3, 4, 5, 9, 10], "0,3-5,9-10")],
)
def test_numbers_are_written_as_slurm_reads_them(numbers, ranges):
    assert sweep.as_ranges(numbers) == ranges


# ------------------------------------------------------------------------------------ all of it


def test_a_run_of_other_settings_is_refused_in_the_words_of_the_program(table, capsys, tmp_path):
    flags = list(table[0].flags)
    assert main.main([*flags, "--nEpochs=2"]) == 0
    before = (table[0].save / "status.json").read_bytes()
    codes = {"--LR=0.2": 2, "--nEpochs=1": 2, "--depth=16": 4, "--nEpochs=9": 0, "--nThreads=1": 0}
    for flag, code in codes.items():
        length = [] if "nEpochs" in flag else ["--nEpochs=2"]
        task = tiny(tmp_path, flag, *length)[0]
        state = tasks.state_of(task)
        assert (state.word == tasks.OTHER, state.code) == (bool(code), code), flag
        if code:
            capsys.readouterr()
            assert main.main(list(task.flags)) == code
            assert capsys.readouterr().err.splitlines() == [state.detail]
    assert (table[0].save / "status.json").read_bytes() == before
    overridden = tiny(tmp_path, "--LR=0.2", "--nEpochs=2", "--override=true")[0]
    assert tasks.state_of(overridden) == State(tasks.DONE, 2)


def test_a_sweep_that_is_stopped_goes_on_to_the_end_and_is_then_left_alone(tmp_path, capsys):
    tiny(tmp_path)
    argv = [f"{tmp_path}/tiny/a.yaml", "--seeds", "0,1", "--runs", f"{tmp_path}/runs",
            "--gpus", "0", "--nEpochs", "4", "--batchSize", "16"]  # fmt: skip
    flags = ["--nEpochs=4", "--batchSize=16"]  # epochs long enough to be stopped in
    first, second = tasks.work_list(argv[:1], [0, 1], f"{tmp_path}/runs", flags)
    over = threading.Event()

    def stop_after_an_epoch() -> None:
        while not over.wait(0.01):
            if tasks.progress_of(first).finished:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    killer = threading.Thread(target=stop_after_an_epoch)
    killer.start()
    try:
        code = sweep.main(argv)
    finally:
        over.set()
        killer.join()
    said = capsys.readouterr()
    assert code == 75 and "stopped: SIGTERM, 1 of 2 runs were in progress; to go on: " in said.err
    assert tasks.state_of(first).word == tasks.PREEMPTED
    assert 1 <= tasks.state_of(first).finished < 4 and not second.save.exists()

    again = shlex.split(said.err.splitlines()[-1].partition("to go on: ")[2])
    assert again[:3] == ["python", "-m", "tools.sweep"] and sweep.main(again[3:]) == 0
    assert re.search(r"seed0: started after \d of 4 epochs; ", capsys.readouterr().out)
    assert [tasks.state_of(task) for task in (first, second)] == [State(tasks.DONE, 4)] * 2

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files]
    assert sweep.main(argv) == 0
    assert capsys.readouterr().out == "=> 2 of 2 runs done, 100 % of the work\n"
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files] == before
    assert sweep.main([*argv, "--dryRun", "true"]) == 0
    assert "2 runs: 2 done\n2 of 2 runs done, 100 % of the work\n" in capsys.readouterr().out
