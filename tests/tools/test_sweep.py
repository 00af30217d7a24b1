"""A sweep trains what is left of a table, here or under Slurm, and goes on after it was stopped."""

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import main
from distributed import signals
from errors import DataError, Preempted, RunError, UsageError
from helpers.run_main import ROOT
from helpers.tables import held_elsewhere, tiny, write_run
from tools.sweep import __main__ as sweep
from tools.sweep import scheduler, tasks
from tools.sweep.scheduler import LocalScheduler, RunOutcome
from tools.sweep.tasks import State, Task

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
if code not in (0, 1):
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
def fake(tmp_path, monkeypatch):
    """Run a table with the fake program: `run(table, **plan)`; `plan(**plan)`; `started()`."""
    script, log = tmp_path / "fake.py", tmp_path / "started"
    script.write_text(FAKE)
    program = (sys.executable, "-I", "-S", str(script))
    monkeypatch.setattr(scheduler, "POLL_S", 0.005)
    monkeypatch.setenv("FAKE_LOG", str(log))

    def plan(**plan) -> None:
        monkeypatch.setenv("FAKE_PLAN", json.dumps(plan))

    def run(table, gpus=(None,), meanwhile=lambda: None, **wanted) -> SimpleNamespace:
        plan(**wanted)
        lines, handler = [], signals.SignalHandler().install()
        handler.enable_saving()
        states = {task: tasks.state_of(task) for task in table}
        meanwhile()
        local = LocalScheduler(states, list(gpus), lines.append, program)
        local.run(handler)
        codes = {outcome.task.save.name: outcome.code for outcome in local.outcomes}
        reasons = {outcome.task.save.name: outcome.reason for outcome in local.outcomes}
        return SimpleNamespace(codes=codes, reasons=reasons, lines=lines, **vars(local))

    def started() -> list[str]:
        found = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return found

    return SimpleNamespace(run=run, plan=plan, started=started, program=program)


# ------------------------------------------------------------------------------- before any run


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
        ("c10 --manualSeed 1", "manualSeed is not a flag of a sweep; fix: use --seeds"),
        ("c10 --nGPU 2", "nGPU is not a flag of a sweep; fix: use --gpus"),
        ("", "no table or config"),
        ("c10 --gpu 2", "unknown flag gpu (command line); fix: did you mean"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "LocalScheduler", None)
    argv = words.replace("EMPTY", str(tmp_path)).split()
    assert sweep.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_missing_data_is_noticed_before_the_first_run(tmp_path, monkeypatch):
    asked = sweep.parse(["small", "--data", str(tmp_path / "no"), "--runs", str(tmp_path)])
    monkeypatch.setattr(sweep, "LocalScheduler", None)
    with pytest.raises(DataError) as error:
        sweep.train(asked, signals.SignalHandler(), "the same command")
    (problem,) = error.value.problems  # the same for all of them
    assert problem[0] == f"no directory {tmp_path / 'no'}"


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
    assert scheduler.gpu_slots(gpus, visible, present) == expected
    with pytest.raises(UsageError, match="gpus=5 but"):
        scheduler.gpu_slots(5, visible, present)


# --------------------------------------------------------------------------------------- running


def test_runs_go_in_the_order_of_the_table_and_are_not_run_again(table, fake):
    fake.run(table[1:3])
    before = {path: path.stat() for path in table[1].save.parent.rglob("*") if path.is_file()}
    assert fake.started() == ["a-seed1 None", "b-seed0 None"] and len(before) == 8
    found = fake.run(table)
    assert fake.started() == ["a-seed0 None", "b-seed1 None"]
    assert found.lines[0] == "=> 2 of 4 runs done"
    assert found.lines[-2:] == [f"=> {table[3].name}: done", "=> 4 of 4 runs done"]
    assert [tasks.state_of(task) for task in table] == [State(tasks.DONE, 3)] * 4
    for path, stat in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_a_run_that_another_process_is_writing_is_left_to_it(table, fake):
    write_run(table[0], "running", 1)
    with held_elsewhere(table[0]):
        found = fake.run(table[:2])
    assert found.codes == {"a-seed0": 7, "a-seed1": 0}
    assert found.reasons["a-seed0"] == "host far, process 7"
    assert fake.started() == ["a-seed1 None"]
    sweep.raise_outcome(found.outcomes, 2, "", "again")  # it is not an error
    assert fake.run(table[:2]).codes == {"a-seed0": 0}  # and may go on now


def test_a_run_that_another_sweep_has_finished_meanwhile_is_not_run_again(table, fake):
    found = fake.run(table[:2], meanwhile=lambda: write_run(table[0], "done", 3))
    assert fake.started() == ["a-seed1 None"] and found.codes == {"a-seed0": 0, "a-seed1": 0}


def test_each_gpu_has_one_run_at_a_time(table, fake):
    found = fake.run(table, gpus=["3", "GPU-a"])
    assert set(found.codes.values()) == {0}
    gpus = [line.split()[1] for line in fake.started()]
    assert len(gpus) == 4 and set(gpus) == {"3", "GPU-a"}
    assert any("a-seed0: started on GPU 3; output: " in line for line in found.lines)


def test_a_run_that_fails_does_not_keep_the_others_from_going_on(table, fake):
    found = fake.run(table, **{"a-seed0": 5, "a-seed1": "killed", "b-seed0": 75})
    assert found.codes == {"a-seed0": 5, "a-seed1": 137, "b-seed0": 75, "b-seed1": 0}
    assert found.reasons["a-seed0"] == "error: wrong; fix: correct it"
    assert found.reasons["a-seed1"] == "ended by SIGKILL"
    assert f"=> {table[0].name}: failed with 5: error: wrong; fix: correct it" in found.lines
    assert found.lines[-1] == "=> 1 of 4 runs done, 2 failed"
    with pytest.raises(RunError, match=r"2 of 4 runs failed: .*a-seed0 \(5\), ") as error:
        sweep.raise_outcome(found.outcomes, 4, "", "again")
    assert error.value.code == 5
    assert fake.run(table).codes == {"a-seed0": 0, "a-seed1": 0, "b-seed0": 0}


def test_the_output_of_a_run_is_added_to_a_file_beside_it(table, fake, capfd):
    for _ in range(2):
        fake.run(table[:1], **{"a-seed0": 3})
    output = Path(f"{table[0].save}.log")
    assert output.read_text() == 2 * "error: an older line\nerror: wrong; fix: correct it\n"
    assert capfd.readouterr() == ("", "")
    silent = fake.run(table[:1], **{"a-seed0": 1})  # an earlier error is not its reason
    assert silent.reasons == {"a-seed0": f"see {output}"}
    output.unlink()
    output.mkdir()
    refused = fake.run(table[:2])
    assert refused.codes == {"a-seed0": 6, "a-seed1": 0}
    assert "error: cannot write" in refused.reasons["a-seed0"]


def test_a_signal_is_passed_on_to_all_runs_in_progress(table, fake):
    plan = {"a-seed0": "wait", "a-seed1": "stop the sweep"}
    found = fake.run(table, gpus=["0", "1"], **plan)
    assert found.codes == {"a-seed0": 75, "a-seed1": 75} and found.stopped_by == signal.SIGTERM
    assert sorted(fake.started()) == ["a-seed0 0", "a-seed1 1"]
    with pytest.raises(Preempted, match="SIGTERM, 2 of 4 runs were in progress"):
        sweep.raise_outcome(found.outcomes, 4, "SIGTERM", "again")


@pytest.mark.parametrize(
    ("codes", "stopped_by", "code"),
    [((0, 0), "", 0), ((0, 7), "", 0), ((0, 8, 5), "", 8), ((75, 3), "", 3), ((0, 75), "", 75),
     ((5, 75), "SIGINT", 75), ((1, 143), "", 1)],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_first_failure(table, codes, stopped_by, code):
    outcomes = [RunOutcome(task, each) for task, each in zip(table, codes, strict=False)]
    try:
        sweep.raise_outcome(outcomes, 4, stopped_by, "again")
        ended = 0
    except RunError as error:
        ended = error.code
    assert ended == code


ORPHAN = """
import sys
pipe = open(sys.argv[2], "w")
from pathlib import Path
from types import SimpleNamespace
from tools.sweep import scheduler

child = '''
import signal, sys, time
with open(sys.argv[1], "w") as pipe:
    print("started", file=pipe, flush=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    time.sleep(600)
    print("outlived the sweep", file=pipe)
'''
task = SimpleNamespace(save=Path(sys.argv[1]), flags=(sys.argv[2],))
scheduler.start(task, None, (sys.executable, "-I", "-S", "-c", child)).process.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_a_run_does_not_outlive_a_sweep_that_was_killed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", ORPHAN, tmp_path / "run", tmp_path / "pipe"]
    with subprocess.Popen(command, cwd=ROOT) as parent, open(tmp_path / "pipe") as pipe:
        assert pipe.readline() == "started\n"
        parent.kill()
        assert pipe.read() == ""  # ends when the last process that has the pipe open ends


def test_a_sweep_that_was_stopped_goes_on_to_the_end(tmp_path, fake, capsys, monkeypatch):
    local = functools.partial(LocalScheduler, program=fake.program)
    monkeypatch.setattr(sweep, "LocalScheduler", local)
    tiny(tmp_path)
    argv = [f"{tmp_path}/tiny/a.yaml", "--seeds", "0,1", "--runs", f"{tmp_path}/runs",
            "--gpus", "0"]  # fmt: skip
    fake.plan(**{"a-seed0": "stop the sweep"})
    assert sweep.main(argv) == 75
    error = capsys.readouterr().err
    assert "stopped: SIGTERM, 1 of 2 runs were in progress; to go on: " in error
    again = shlex.split(error.splitlines()[-1].partition("to go on: ")[2])
    assert again == ["python", "-m", "tools.sweep", *argv]
    fake.plan()
    assert sweep.main(argv) == 0
    assert "seed0: started after 1 of 3 epochs; output: " in capsys.readouterr().out
    assert sweep.main(argv) == 0
    assert capsys.readouterr().out == "=> 2 of 2 runs done\n"
    assert len(fake.started()) == 3
    assert sweep.main([*argv, "--dryRun"]) == 0
    assert capsys.readouterr().out.endswith("2 runs: 2 done\n")


def test_main_py_decides_whether_a_run_of_other_settings_may_go_on(table, capsys, tmp_path):
    assert main.main([*table[0].flags, "--nEpochs=2"]) == 0
    before = (table[0].save / "status.json").read_bytes()
    for flags, code in ((["--nEpochs=2"], 0), (["--nEpochs=2", "--LR=0.2"], 2)):
        task = tiny(tmp_path, *flags)[0]
        assert tasks.state_of(task) == State(tasks.OTHER if code else tasks.DONE, 2)
        assert main.main(list(task.flags)) == code
    assert "settings differ from the checkpoint's: LR" in capsys.readouterr().err
    assert (table[0].save / "status.json").read_bytes() == before


# ----------------------------------------------------------------------------------------- Slurm

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
