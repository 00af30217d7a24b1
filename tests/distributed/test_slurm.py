"""Test scripts/train.slurm with small scripts that simulate Slurm: commands, requeued jobs."""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import run as torchrun

import opts
from experiment import resume
from helpers.run_main import ROOT, wait_until

SCRIPT = ROOT / "scripts" / "train.slurm"
CONFIG = "configs/c10plus/densenet-bc-L100-k12.yaml"

# What stands for Slurm. A scenario is a few lines of shell that `srun` runs in place of the step.
STUBS = {
    "srun": """
printf '%s\\n' "$@" >"$LOG/srun"
echo "shared store: ${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-yes}" >"$LOG/store"
while [[ $1 != --save ]]; do shift; done
mkdir -p "$2" && cd "$2"
say() { printf '{"state": "%s", "code": %s, "start": {"in_vain": %s}}' "$1" "$2" "${3:-0}" >.new
        mv .new status.json; }
eval "$SCENARIO"
""",
    "scontrol": """
[[ $1 == show ]] && printf '%s\\n' node-a node-b && exit
echo "$*" >>"$LOG/scontrol"
""",
    # The program itself is tested elsewhere; what reads the verdict is the script's own.
    "python": f"""
[[ $1 == main.py ]] && echo "$*" >"$LOG/main.py" && exit "$MISTAKE"
exec {shlex.quote(sys.executable)} -I -S "$@"
""",
}


@pytest.fixture
def slurm(tmp_path) -> SimpleNamespace:
    """Simulate a job of Slurm: `start` a script with arguments, `finish` it; `log` the calls."""
    stubs, log = tmp_path / "bin", tmp_path / "log"
    for directory in (stubs, log):
        directory.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (stubs / name).chmod(0o755)
    job = {"PATH": f"{stubs}:{os.environ['PATH']}", "PYTHON": str(stubs / "python"),
           "LOG": str(log), "MISTAKE": "0", "RUNS": str(tmp_path / "runs"),
           "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "31234", "SLURM_NNODES": "2",
           "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "4"}  # fmt: skip

    def start(scenario: str, *args: str, script: Path = SCRIPT, **more: object) -> subprocess.Popen:
        environment = {**job, "SCENARIO": scenario} | {k: str(v) for k, v in more.items()}
        command = ["bash", str(script), *(args or (CONFIG,))]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(scenario: str, *args: str, **more: object) -> SimpleNamespace:
        return finish(start(scenario, *args, **more))

    def finish(process: subprocess.Popen) -> SimpleNamespace:
        out, err = process.communicate(timeout=300)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    def calls(name: str) -> list[str]:
        path = log / name
        return path.read_text().splitlines() if path.exists() else []

    save = tmp_path / "runs" / "c10plus" / "densenet-bc-L100-k12-seed0"
    return SimpleNamespace(start=start, run=run, finish=finish, calls=calls, log=log, save=save)


def one_line(result: SimpleNamespace, code: int, *words: str) -> None:
    """Assert that a job ended with `code` and one line `error: ...; fix: ...` with these words."""
    assert result.code == code, result
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and "; fix: " in line
    assert all(word in line for word in words), line


# Processes started:
def test_every_node_runs_a_torchrun_that_joins_the_first_nodes(slurm):
    assert slurm.run("exit 0", CONFIG, "--data", "/scratch/a b").code == 0
    words = slurm.calls("srun")
    command = words.index("-m")
    assert {"--ntasks-per-node=1", "--kill-on-bad-exit=0"} <= set(words[:command])
    assert words[command + 1] == "torch.distributed.run"
    args = torchrun.get_args_parser().parse_args(words[command + 2 :])
    assert (args.nnodes, args.nproc_per_node, args.rdzv_id) == ("2", "4", "31234")
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("c10d", "node-a:21234")
    assert "SIGUSR1" in args.signals_to_handle.split(",") and args.max_restarts > 0
    assert args.training_script == "main.py"
    assert slurm.calls("store") == ["shared store: 1"]  # that is, disabled
    assert slurm.calls("main.py")[0].endswith(" --printConfig")  # checked before, on one node
    opt = opts.parse(args.training_script_args)
    assert (opt.config, opt.save, opt.data) == (CONFIG, str(slurm.save), "/scratch/a b")
    assert (opt.manualSeed, opt.resume, opt.depth, opt.dataset) == (0, "auto", 100, "cifar10")


CONFIGS = [f"configs/c10plus/densenet-L{depth}.yaml" for depth in (40, 100)]
GRID = [(config, seed) for config in ("densenet-L40", "densenet-L100") for seed in (3, 1, 4)]


@pytest.mark.parametrize("index", range(6))
def test_an_array_covers_every_config_with_every_seed(slurm, index):
    array = {"SLURM_ARRAY_TASK_ID": index, "SLURM_ARRAY_JOB_ID": 31200, "SEEDS": "3 1 4"}
    assert slurm.run("exit 0", *CONFIGS, "--LR", "0.2", **array).code == 0
    config, seed = GRID[index]
    said = slurm.calls("main.py")[0]
    assert f"--config configs/c10plus/{config}.yaml --manualSeed {seed} " in said
    assert f"/c10plus/{config}-seed{seed} --resume auto --LR 0.2" in said


@pytest.mark.parametrize(
    ("args", "more", "words"),
    [
        (CONFIGS, {"SLURM_ARRAY_TASK_ID": 6}, ["array task 6: 2 configs x 3 seeds", "0 to 5"]),
        (CONFIGS, {}, ["one job is one run", "sbatch --array=0-5"]),
        (["--depth", "40"], {}, ["no config file"]),
        (CONFIGS, {"SEEDS": " "}, ["no seed"]),
    ],
)
def test_a_job_without_a_run_gets_one_line(slurm, args, more, words):
    one_line(slurm.run("exit 0", *args, **{"SEEDS": "3 1 4"} | more), 2, *words)
    assert not slurm.calls("srun") and not slurm.calls("main.py")


def test_a_mistake_in_the_flags_ends_the_job_before_anything_is_started(slurm):
    result = slurm.run("exit 0", CONFIG, "--growthrate", "3", PYTHON=sys.executable)
    one_line(result, 2, "growthrate", "did you mean")
    assert not slurm.calls("srun") and not slurm.calls("scontrol")


# What becomes of the job:
REQUEUED = ["requeue 31234"]


@pytest.mark.parametrize(
    ("scenario", "code", "requeued"),
    [
        ("say done 0", 0, False),
        ("exit 0", 0, False),  # already complete: nothing is written
        ("say done 0; exit 1", 0, False),  # torchrun stumbled on its way out
        *((f"say failed {code}; exit 1", code, False) for code in (1, 2, 3, 4, 5, 6, 7)),
        ("say failed 8; exit 1", 75, True),
        (f"say failed 8 {resume.MAX_FRUITLESS_RESTARTS - 1}; exit 1", 75, True),
        # It would get no further.
        (f"say failed 8 {resume.MAX_FRUITLESS_RESTARTS}; exit 1", 8, False),
        ("say running null; exit 1", 75, True),
        ("say preempted 75; exit 1", 75, True),  # its torchrun was killed
        ("exit 1", 1, False),
    ],
)
def test_a_run_is_requeued_if_it_can_go_on(slurm, scenario, code, requeued):
    result = slurm.run(scenario)
    assert (result.code, result.err) == (code, "")
    assert slurm.calls("scontrol") == (REQUEUED if requeued else [])


@pytest.mark.parametrize("state", ["preempted 75", "failed 8", "running null", "done 0"])
def test_the_verdict_of_an_earlier_start_is_not_taken_for_this_ones(slurm, state):
    assert slurm.run(f"say {state}; exit 0").code == 0
    result = slurm.run("exit 1")
    assert result.code == 1 and "none, code 1; not requeued" in result.out
    assert slurm.calls("scontrol") == []


def test_a_run_that_another_job_is_writing_is_left_to_it(slurm):
    slurm.save.mkdir(parents=True)
    with open(slurm.save / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        result = slurm.run("say running null; exit 1")
    assert result.code == 7 and slurm.calls("scontrol") == []


@pytest.mark.parametrize(("count", "requeued"), [(0, True), (49, True), (50, False), (51, False)])
def test_a_job_is_requeued_a_limited_number_of_times(slurm, count, requeued):
    result = slurm.run("say failed 8; exit 1", SLURM_RESTART_COUNT=count)
    assert slurm.calls("scontrol") == (REQUEUED if requeued else [])
    if not requeued:
        one_line(result, 8, f"requeued {count} times already")


def test_one_task_of_an_array_is_requeued_and_not_the_whole_array(slurm):
    """Test the last task too, which has the number of the array itself."""
    array = {"SLURM_ARRAY_TASK_ID": 2, "SLURM_ARRAY_JOB_ID": 31234, "SEEDS": "0 1 2"}
    assert slurm.run("say failed 8; exit 1", **array).code == 75
    assert slurm.calls("scontrol") == ["requeue 31234_2"]


# Signals:
# A step that saves a moment after it was told to stop.
STEP = """
trap 'echo USR1 >>"$LOG/signals"; sleep 0.1; say preempted 75; exit 1' USR1
trap 'echo TERM >>"$LOG/signals"' TERM
say running null; touch "$LOG/began"
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""


def tell(slurm, number: int, step: str = STEP, **more: object) -> subprocess.Popen:
    """Start a job, and send a signal to its batch shell while its step runs."""
    process = slurm.start(step, **more)
    wait_until(lambda: (slurm.log / "began").exists() or process.poll() is not None)
    process.send_signal(number)
    (slurm.log / "told").touch()
    return process


def told(slurm, *args: object, **more: object) -> SimpleNamespace:
    """Return how a job ends that gets a signal while its step runs."""
    return slurm.finish(tell(slurm, *args, **more))


def test_a_job_told_to_stop_passes_it_on_waits_and_is_requeued_once(slurm):
    result = told(slurm, signal.SIGUSR1)
    assert (result.code, result.err) == (75, "")
    assert slurm.calls("signals") == ["USR1"]
    assert slurm.calls("scontrol") == REQUEUED
    assert "stopped and saved; requeued, 1 of at most 50 times" in result.out


# Waits for a file of the test, and saves then.
HELD = 'until [[ -e "$LOG/{}" ]]; do sleep 0.01; done; say preempted 75; exit 1'


def test_a_job_that_does_not_wait_for_its_step_decides_too_early(slurm, tmp_path):
    text = SCRIPT.read_text()
    hasty = tmp_path / "hasty"
    hasty.write_text(text.replace("((!told))", "true"))
    assert hasty.read_text() != text
    step = STEP.replace("sleep 0.1; say preempted 75; exit 1", HELD.format("decided"))
    process = tell(slurm, signal.SIGUSR1, step, script=hasty)
    process.wait(timeout=300)  # the step is held until the script has decided
    (slurm.log / "decided").touch()
    assert "stopped and saved" not in slurm.finish(process).out


def test_a_job_stopped_before_its_run_prints_anything_is_requeued(slurm):
    step = """trap 'exit 1' USR1; touch "$LOG/began"; while sleep 0.1; do :; done"""
    result = told(slurm, signal.SIGUSR1, step)
    assert result.code == 75 and "before there was anything to save" in result.out
    assert slurm.calls("scontrol") == REQUEUED


def test_a_job_told_to_stop_for_the_last_time_says_so(slurm):
    result = told(slurm, signal.SIGUSR1, SLURM_RESTART_COUNT=50)
    one_line(result, 75, "stopped and saved", "sbatch again")
    assert slurm.calls("signals") == ["USR1"] and slurm.calls("scontrol") == []


def test_a_cancelled_job_waits_for_its_step_and_is_not_requeued(slurm):
    step = """trap 'echo TERM >>"$LOG/signals"' TERM; touch "$LOG/began"\n""" + HELD.format("told")
    one_line(told(slurm, signal.SIGTERM, step), 75, "cancelled; ", "is preempted")
    assert slurm.calls("scontrol") == [] and slurm.calls("signals") == []


# The script itself:
def test_slurm_is_asked_for_what_the_script_relies_on():
    asked = [line.split()[1] for line in SCRIPT.read_text().splitlines()
             if line.startswith("#SBATCH ")]  # fmt: skip
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(
        asked
    )


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    result = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert result.stdout == ""
