"""Train a table: its configs x seeds, one after another on the GPUs at hand or as a Slurm array.

A run is `main.py --config CONFIG --manualSeed SEED --save RUNS/CONFIG-seedSEED --resume auto` with
the flags that are given for all of them. The run directories alone say what is done: the same
command goes on where it was stopped.
"""

import os
import shlex
import signal
import sys
from collections import Counter

import experiment.directory
from cli import path_checks
from cli.flag_types import NON_NEGATIVE, Flag, as_text, boolean, integer, integers, text
from distributed import signals
from errors import Preempted, RunError, UsageError
from tools import cli
from tools.sweep import tasks
from tools.sweep.scheduler import LocalScheduler, RunOutcome, gpu_slots
from tools.sweep.tasks import State, Task

SCRIPT = "scripts/train.slurm"

# fmt: off
FLAGS = {flag.name: flag for flag in (
    Flag("seeds", integers, [0], "with commas between; each config is trained with each",
         range=NON_NEGATIVE),
    Flag("runs", text, "runs", "directory of the run directories"),
    Flag("gpus", integer, None, "GPUs to use, one for a run; 0: the CPU",
         "all that are visible, else the CPU", range=NON_NEGATIVE),
    Flag("slurm", boolean, False, "print the command for a Slurm array of the runs that are left, "
         "and start nothing", const="true"),
    Flag("dryRun", boolean, False, "list the runs and how far they are, and start nothing",
         const="true"),
)}
# fmt: on
# Flags of main.py that a sweep sets itself, or that do not train.
NOT_PASSED_ON = {
    "config": "name the config file without a flag",
    "manualSeed": "use --seeds",
    "save": "use --runs",
    "resume": "leave it out: a sweep always goes on with what is there",
    "nGPU": "use --gpus: each run has one",
    "printConfig": "leave it out, or use --dryRun true",
    "testOnly": "leave it out: a sweep trains",
}
USAGE = """usage: python -m tools.sweep TABLE|CONFIG... [--flag value ...] [any flags of main.py]

Train configs with several seeds, one run after another on each GPU, or print the Slurm array that
does. TABLE: a directory below configs/ (c10plus, wide, ...), or table2, which is all of c10,
c10plus, c100, c100plus and svhn. CONFIG: a config file, or c10plus/densenet-L40-k12, or a directory
of config files. Runs are in RUNS/c10plus/densenet-L40-k12-seed0 and so on; what each prints is in
a file beside it (.log). The same command again goes on; what is done is left alone. Ctrl-C stops
all runs, saved. Exit code: 0 all done, 75 stopped, else that of the first run that failed.
The flags config, manualSeed, save, resume, nGPU, printConfig and testOnly are the sweep's own."""


def parse(argv: list[str]) -> cli.Command:
    """Parse the sweep's flags, tables and flags of main.py; look at no file.

    Raises:
        UsageError: every problem of the sweep's own flags at once.
    """
    asked = cli.read(argv, FLAGS, arguments="table or config", main_flags=True)
    options = asked.options
    names = [flag[2:].partition("=")[0] for flag in asked.main_flags]
    problems = [(f"{name} is not a flag of a sweep", NOT_PASSED_ON[name])
                for name in names if name in NOT_PASSED_ON]  # fmt: skip
    twice = [seed for seed, count in Counter(options.seeds).items() if count > 1]
    if twice or not options.seeds:
        what = f"seeds: {as_text(twice)} given twice" if twice else "seeds: none is given"
        problems.append((what, "name each seed once, as in --seeds 0,1,2"))
    if options.slurm and options.dryRun:
        problems.append(("slurm and dryRun exclude each other", "keep one"))
    if options.slurm and options.gpus is not None:
        what = "gpus has no effect on a Slurm array"
        problems.append((what, f"leave it out: {SCRIPT} asks for them"))
    if problems:
        raise UsageError.from_problems(problems)
    return asked


def read_states(asked: cli.Command) -> dict[Task, State]:
    """Return the runs that are asked for, in order, with the state of each.

    Raises:
        UsageError: every problem of the tables, the configs and their flags at once.
    """
    options = asked.options
    table = tasks.work_list(asked.arguments, options.seeds, options.runs, asked.main_flags)
    return {task: tasks.state_of(task) for task in table}


# ---------------------------------------------------------------------------------- on this machine


def train(asked: cli.Command, handler: signals.SignalHandler, rerun_command: str) -> None:
    """Train what is left of a table on the GPUs of this machine.

    Raises:
        RunError: what `read_states`, `check`, `gpu_slots` and `raise_outcome` raise.
    """
    import torch

    from experiment import console

    states = read_states(asked)
    check([task for task, state in states.items() if state.is_left])
    visible, present = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    scheduler = LocalScheduler(
        states, gpu_slots(asked.options.gpus, visible, present), console.info
    )
    handler.enable_saving()
    scheduler.run(handler)
    stopped_by = signal.Signals(handler.signum).name if scheduler.stopped_by else ""
    raise_outcome(scheduler.outcomes, len(states), stopped_by, rerun_command)


def check(table: list[Task]) -> None:
    """Check that the data of all runs is there, and that their directories can be written.

    Raises:
        RunError: every problem at once, with the code of the first.
    """
    errors = []
    for task in table:
        try:
            path_checks.check(task.opt)
            experiment.directory.check_writable(task.save)
        except RunError as error:
            errors.append(error)
    if errors:
        problems = [problem for error in errors for problem in error.problems]
        errors[0].problems = list(dict.fromkeys(problems))
        raise errors[0]


def raise_outcome(
    outcomes: list[RunOutcome], num_runs: int, stopped_by: str, rerun_command: str
) -> None:
    """Raise the error that a sweep ends with, if any.

    Args:
        outcomes: of the runs that were tried, in their order.
        stopped_by: the signal that stopped the sweep, or "".

    Raises:
        Preempted: the sweep or one of its runs was stopped.
        RunError: runs have failed; its code is that of the first.
    """
    failed = [outcome for outcome in outcomes if outcome.is_failure]
    stopped = [outcome.task.name for outcome in outcomes if outcome.code == Preempted.code]
    if stopped_by:
        what = f"{stopped_by}, {len(stopped)} of {num_runs} runs were in progress"
        raise Preempted(what, rerun_command)
    if failed:
        names = ", ".join(f"{outcome.task.name} ({outcome.code})" for outcome in failed)
        what = f"{len(failed)} of {num_runs} runs failed: {names}"
        error = RunError(what, f"correct the error above of each, then {rerun_command}")
        error.code = failed[0].code
        raise error
    if stopped:
        raise Preempted(f"a signal stopped {', '.join(stopped)}", rerun_command)


# ---------------------------------------------------------------------------------------- Slurm


def submit(asked: cli.Command) -> None:
    """Print the command that submits the runs that are left, as tasks of an array.

    Task i of scripts/train.slurm is config i / #seeds with seed i % #seeds: the i-th of the table.
    """
    states = read_states(asked)
    left = [str(index) for index, state in enumerate(states.values()) if state.is_left]
    print(f"note: {len(left)} of {len(states)} runs are left to start", file=sys.stderr)
    for task, state in states.items():
        if state.word == tasks.RUNNING:
            print(f"note: {task.name}: {state.word}: {state.detail}", file=sys.stderr)
    if left:
        seeds = " ".join(map(str, asked.options.seeds))
        configs = dict.fromkeys(task.config for task in states)
        words = ["sbatch", f"--array={','.join(left)}", SCRIPT, *configs, *asked.main_flags]
        settings = f"SEEDS={shlex.quote(seeds)} RUNS={shlex.quote(asked.options.runs)}"
        print(f"{settings} {shlex.join(words)}")


# --------------------------------------------------------------------------------------- the tool


def sweep(argv: list[str]) -> None:
    """Train, list or submit the table that a command line asks for."""
    asked = parse(argv)
    if asked.options.slurm:
        submit(asked)
    elif asked.options.dryRun:
        print(tasks.listing(read_states(asked)))
    else:
        train(asked, signals.SignalHandler().install(), f"python -m tools.sweep {shlex.join(argv)}")


def main(argv: list[str]) -> int:
    """Run a command line; return the exit code."""
    return cli.run(argv, USAGE, FLAGS, sweep, main_flags=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
