"""Test that a sweep trains the rest of a table, here or under Slurm, and resumes after a stop."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import main
from distributed import signals
from errors import UsageError
from helpers.run_main import ROOT
from helpers.tables import CONFIG, held_elsewhere, tiny, write_run
from tools.results import published
from tools.sweep import __main__ as sweep
from tools.sweep import tasks
from tools.sweep.tasks import Task

# Stands for main.py. FAKE_PLAN says what becomes of a run; FAKE_LOG gets a line at each start.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path

received = []
signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
config, save = Path(sys.argv[2]), Path(sys.argv[6])
save.mkdir(parents=True, exist_ok=True)
gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(f"{save.name} {gpu}\\n")
busy = Path(os.environ["FAKE_LOG"] + f".{gpu}")
busy.touch(exist_ok=False)  # a second run on this GPU would fail here
plan = json.loads(os.environ["FAKE_PLAN"]).get(save.name, 0)
if plan == "stop the sweep":
    os.kill(os.getppid(), signal.SIGTERM)
while isinstance(plan, str) and plan != "killed" and not received:
    time.sleep(0.01)  # until the sweep passes the signal on
busy.unlink()
code = 75 if received else plan
state = {0: "done", 75: "preempted"}.get(code, "failed")
epochs = 3 if code == 0 else 1
lines = [json.dumps({"epoch": epoch, "val_top1": 50.0}) for epoch in range(1, epochs + 1)]
(save / "log.jsonl").write_text("\\n".join(lines))
(save / "status.json").write_text(json.dumps({"state": state, "code": code, "epoch": epochs}))
(save / "config.yaml").write_text(config.read_text())
if code == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if code == 75:
    print("stopped: SIGUSR1")
elif code not in (0, 1):
    print("error: an older line\\nerror: wrong; fix: correct it")
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
    """Return two configs with two seeds."""
    return tiny(tmp_path)


@pytest.fixture
def fake(tmp_path, monkeypatch, capsys):
    """Sweep the table with the fake program: `run(words, **plan)` gives code, lines and error."""
    script, log = tmp_path / "fake.py", tmp_path / "started"
    script.write_text(FAKE)
    monkeypatch.setattr(sweep, "PROGRAM", (sys.executable, "-I", "-S", str(script)))
    monkeypatch.setattr(sweep, "POLL_S", 0.005)
    monkeypatch.setenv("FAKE_LOG", str(log))

    def run(words: str = "tiny", gpus=("",), **plan) -> SimpleNamespace:
        monkeypatch.setenv("FAKE_PLAN", json.dumps(plan))
        monkeypatch.setattr(sweep, "gpu_slots", lambda *_: list(gpus))
        log.unlink(missing_ok=True)
        name, *flags = words.split()
        argv = [f"{tmp_path}/{name}", "--seeds", "0,1", "--runs", f"{tmp_path}/runs", *flags]
        code = sweep.main(argv)
        started = log.read_text().splitlines() if log.exists() else []
        lines, error = capsys.readouterr()
        lines = lines.replace(f"{tmp_path}/tiny/".lstrip("/"), "")
        return SimpleNamespace(code=code, started=started, lines=lines.splitlines(),
                               error=error, argv=argv)  # fmt: skip

    return run


# Before any run:
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("c10pluss", "no table or config c10pluss; fix: did you mean c10plus?"),
        ("?", "fix: use table2, c10,"),
        ("EMPTY", "no config files (*.yaml) in "),
        ("c10 --seeds 0,1,0", "seeds: 0,1,0 are not one or more different seeds"),
        ("c10 --seeds []", "are not one or more different seeds"),
        ("c10 --seeds -1", "out of range"),
        ("c10 --slurm --gpus 2", "gpus has no effect"),
        ("c10 --slurm --dryRun", "exclude each other"),
        ("c10 --manualSeed 1", "manualSeed is not a flag of a sweep; fix: leave it out; a sweep "),
        ("", "no table or config"),
        ("c10 --gpu 2", "unknown flag gpu (command line); fix: did you mean"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "start", None)
    assert sweep.main(words.replace("EMPTY", str(tmp_path)).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_dry_run_of_table_2_lists_all_of_its_numbers(tmp_path, capsys):
    assert sweep.main(f"table2 --seeds 0 --dryRun true --runs {tmp_path}".split()) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert total == "75 runs: 75 not started"
    printed = [row.configs.values() for row in published.tables()["table2"].rows]
    listed = {line.split()[0].removesuffix("-seed0") for line in lines}
    assert {name for names in printed for name in names} <= listed


def test_missing_data_is_noticed_before_the_first_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "start", None)
    assert sweep.main(["small", "--data", f"{tmp_path}/no", "--runs", str(tmp_path)]) == 3
    (line,) = capsys.readouterr().err.splitlines()  # the same for all of them
    assert line.startswith(f"error: no directory {tmp_path}/no; fix: ")
    (tmp_path / "file").write_text("")
    argv = ["digits", "small", "--data", f"{tmp_path}/no", "--runs", f"{tmp_path}/file"]
    assert sweep.main(argv) == 6  # of the first; all are reported
    first, second = capsys.readouterr().err.splitlines()
    assert "error: not a directory: " in first and "error: no directory " in second


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
def test_each_slot_is_one_of_the_gpus_that_the_sweep_sees(gpus, visible, present, expected):
    assert sweep.gpu_slots(gpus, visible, present) == expected
    with pytest.raises(UsageError, match="gpus=5 but"):
        sweep.gpu_slots(5, visible, present)


# Running:
def test_runs_go_in_the_order_of_the_table_and_are_not_run_again(table, fake):
    assert fake("tiny/b.yaml").started == ["b-seed0 ", "b-seed1 "]
    before = {path: path.stat() for path in table[2].save.parent.rglob("*") if path.is_file()}
    found = fake()
    assert found.started == ["a-seed0 ", "a-seed1 "] and found.code == 0 and len(before) == 8
    assert found.lines[0] == "=> 2 of 4 runs done"
    assert found.lines[-2:] == ["=> a-seed1: done", "=> 4 of 4 runs done"]
    assert fake().lines == ["=> 4 of 4 runs done"]
    assert fake("tiny --dryRun").lines[-1] == "4 runs: 4 done"
    for path, stat in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_a_run_that_another_process_is_writing_is_left_to_it(table, fake):
    write_run(table[0], "running", 1)
    with held_elsewhere(table[0]):
        found = fake("tiny/a.yaml")
    assert found.started == ["a-seed1 "] and found.code == 0  # it is not an error
    assert "=> a-seed0: running elsewhere: host far, process 7" in found.lines
    assert fake("tiny/a.yaml").started == ["a-seed0 "]  # and may go on now


def test_a_run_that_another_sweep_has_finished_meanwhile_is_not_run_again(table, fake, monkeypatch):
    install = signals.SignalHandler.install  # is called once the states have been read

    def install_later(self):
        write_run(table[0], "done", 3)
        return install(self)

    monkeypatch.setattr(signals.SignalHandler, "install", install_later)
    found = fake("tiny/a.yaml")
    assert found.started == ["a-seed1 "] and found.lines[-1] == "=> 2 of 2 runs done"


def test_each_gpu_has_one_run_at_a_time(table, fake):
    found = fake(gpus=["3", "GPU-a"])
    gpus = [line.split()[1] for line in found.started]
    assert found.code == 0 and len(gpus) == 4 and set(gpus) == {"3", "GPU-a"}
    assert any("a-seed0: started on GPU 3; output: " in line for line in found.lines)


@pytest.mark.parametrize(
    ("codes", "code", "lines"),
    [
        ([5, "killed", 75, 0], 5, [
            "a-seed0: failed with 5: error: wrong; fix: correct it",
            "a-seed1: failed with 137: ended by SIGKILL", "b-seed0: stopped: SIGUSR1",
            "1 of 4 runs done, 2 failed",
        ]),
        ([75, 1, 3, 0], 1, ["2 of 4 runs failed: "]),
        ([0, 75, 0, 0], 75, ["stopped: a signal, 1 of 4 runs were in progress; to go on: "]),
    ],
)  # fmt: skip
def test_a_run_that_fails_does_not_keep_the_others_from_going_on(table, fake, codes, code, lines):
    names = ["a-seed0", "a-seed1", "b-seed0", "b-seed1"]
    found = fake(**dict(zip(names, codes, strict=True)))
    assert found.code == code and [line.split()[0] for line in found.started] == names
    for line in lines:
        assert line in "\n".join([*found.lines, found.error])
    left = [name + " " for name, each in zip(names, codes, strict=True) if each != 0]
    again = fake()
    assert again.started == left and again.code == 0


def test_the_output_of_a_run_is_added_to_a_file_beside_it(table, fake):
    output = Path(f"{table[0].save}.log")
    for _ in range(2):
        assert len(fake("tiny/a.yaml", **{"a-seed0": 3}).error.splitlines()) == 1
    assert output.read_text() == 2 * "error: an older line\nerror: wrong; fix: correct it\n"
    silent = fake("tiny/a.yaml", **{"a-seed0": 1})  # an earlier error is not its reason
    assert "=> a-seed0: failed with 1: see " in silent.lines[2]
    output.unlink()
    output.mkdir()
    refused = fake("tiny/a.yaml")
    assert refused.code == 6 and "a-seed0: failed with 6: error: cannot" in refused.lines[1]


def test_a_signal_is_passed_on_to_all_runs_and_the_same_command_goes_on(table, fake):
    found = fake(gpus=["0", "1"], **{"a-seed0": "wait", "a-seed1": "stop the sweep"})
    assert sorted(found.started) == ["a-seed0 0", "a-seed1 1"] and found.code == 75
    assert "stopped: SIGTERM, 2 of 4 runs were in progress; to go on: " in found.error
    again = shlex.split(found.error.splitlines()[-1].partition("to go on: ")[2])
    assert again == ["python", "-m", "tools.sweep", *found.argv]
    found = fake()
    assert found.code == 0 and len(found.started) == 4
    assert "a-seed0: started after 1 of 3 epochs; output: " in found.lines[1]


ORPHAN = """
import sys
pipe = open(sys.argv[2], "w")
from pathlib import Path
from types import SimpleNamespace
from tools.sweep import __main__ as sweep

child = '''
import signal, sys, time
with open(sys.argv[1], "w") as pipe:
    print("started", file=pipe, flush=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    time.sleep(600)
    print("outlived the sweep", file=pipe)
'''
sweep.PROGRAM = (sys.executable, "-I", "-S", "-c", child)
sweep.start(SimpleNamespace(save=Path(sys.argv[1]), flags=(sys.argv[2],)), None).process.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_a_run_does_not_outlive_a_sweep_that_was_killed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", ORPHAN, tmp_path / "run", tmp_path / "pipe"]
    with subprocess.Popen(command, cwd=ROOT) as parent, open(tmp_path / "pipe") as pipe:
        assert pipe.readline() == "started\n"
        parent.kill()
        assert pipe.read() == ""  # ends when the last process that has the pipe open ends


def test_a_run_that_main_py_has_finished_is_done_with_the_same_settings(table, tmp_path):
    assert main.main([*table[0].flags, "--nEpochs=1"]) == 0
    assert tiny(tmp_path, "--nEpochs=1")[0].state == tasks.DONE
    assert tiny(tmp_path, "--nEpochs=1", "--LR=0.2")[0].state == tasks.OTHER


# Slurm:
# Stands for sbatch: starts each task of the array in turn, up to the check of its flags.
SBATCH = """
import os, subprocess, sys
for task in sys.argv[1].removeprefix("--array=").split(","):
    job = os.environ | {"SLURM_ARRAY_TASK_ID": task}
    subprocess.run(["bash", *sys.argv[2:]], env=job)
"""
MAIN = """
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([int(os.environ["SLURM_ARRAY_TASK_ID"]), sys.argv[1:]]) + "\\n")
sys.exit(1)
"""


def test_the_array_trains_what_is_left(table, tmp_path, capsys):
    for name, script in {"sbatch": SBATCH, "python": MAIN}.items():
        (tmp_path / name).write_text(f"#!{sys.executable} -IS\n{script}")
        (tmp_path / name).chmod(0o755)
    write_run(table[1], "done", 3)
    argv = [str(tmp_path / "tiny"), "--seeds", "0,1", "--runs", str(tmp_path / "runs")]
    more = ["--data", "/a b/$HOME"]
    assert sweep.main([*argv, *more, "--slurm", "true"]) == 0
    line, note = capsys.readouterr()
    assert note == "note: 3 of 4 runs are left to start\n" and "--array=0,2,3 " in line

    calls = tmp_path / "calls"
    variables = {"CALLS": str(calls), "PYTHON": str(tmp_path / "python"),
                 "PATH": f"{tmp_path}:{os.environ['PATH']}"}  # fmt: skip
    environment = os.environ | variables
    subprocess.run(["bash", "-c", line], env=environment, cwd=ROOT, capture_output=True)
    expected = tasks.work_list(argv[:1], [0, 1], argv[4], ["--data=/a b/$HOME"])
    found = dict(map(json.loads, calls.read_text().splitlines()))
    assert list(found) == [0, 2, 3]
    for number, words in found.items():
        words = [word.replace("//", "/") for word in words]  # the config lies outside the project
        assert words == ["main.py", *expected[number].flags, "--printConfig"]

    for task in (table[0], table[2], table[3]):
        write_run(task, "done", 3)
    assert sweep.main([*argv, "--slurm"]) == 0
    assert capsys.readouterr().out == ""


def test_in_another_directory_runs_are_started_and_slurm_says_where_to_go(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    argv = ["quickstart.yaml", "--runs", str(tmp_path / "runs")]
    Path("quickstart.yaml").write_text(f"{CONFIG}LR: 0.1\n")
    assert sweep.main([*argv, "--slurm", "true"]) == 2
    assert f"; fix: cd {ROOT} first" in capsys.readouterr().err
    assert Path(sweep.PROGRAM[1]).samefile(ROOT / "main.py")
    assert sweep.main([*argv, "--dryRun", "true"]) == 0
    assert re.search("quickstart-seed0 +not started", capsys.readouterr().out)
