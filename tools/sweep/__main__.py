"""Train configs with several seeds, one run after another on each GPU, or as a Slurm array.

usage: python -m tools.sweep TABLE|CONFIG... [--flag value ...] [main.py's flags]

TABLE: a directory below configs/ (c10plus, wide, ...), or table2, which is all of c10, c10plus,
c100, c100plus and svhn. CONFIG: a config file, or c10plus/densenet-L40-k12, or a directory of
config files. Runs are in RUNS/c10plus/densenet-L40-k12-seed0 and so on; what each prints is in a
file beside it (.log). The same command again goes on; what is done is left alone. Ctrl-C stops all
runs, saved. Exit code: 0 all done, 75 stopped, else that of the first run that failed.
The flags config, manualSeed, save, resume, nGPU, printConfig and testOnly are the sweep's own.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cli import path_checks
from cli.flag_types import NON_NEGATIVE, Flag, as_text, boolean, broken, integer, integers, pathname
from distributed import signals
from errors import BusyError, Preempted, RunError, StorageError, UsageError, quoted
from experiment import console
from experiment.directory import check_writable
from fileio.atomic import storage_error
from tools import cli
from tools.sweep import tasks
from tools.sweep.tasks import Task

PROGRAM, SCRIPT = (sys.executable, str(cli.ROOT / "main.py")), "scripts/train.slurm"
POLL_S = 0.2

FLAGS = (
    Flag("seeds", integers, [0], "with commas between; each config is trained with each",
         range=NON_NEGATIVE),
    Flag("runs", pathname, "runs", "directory of the run directories"),
    Flag("gpus", integer, None, "GPUs to use, one for a run; 0: the CPU",
         "all that are visible, else the CPU", range=NON_NEGATIVE),
    Flag("slurm", boolean, False, "print the command for a Slurm array of the runs that are left, "
         "and start nothing", const="true"),
    Flag("dryRun", boolean, False, "list the runs and how far they are, and start nothing",
         const="true"),
)  # fmt: skip
# Flags of main.py that a sweep sets itself, or that do not train.
NOT_PASSED_ON = ("config", "manualSeed", "save", "resume", "nGPU", "printConfig", "testOnly")
TOOL = cli.Tool(__doc__, FLAGS, "table or config", main_flags=True)


def parse(argv: list[str]) -> cli.Command:
    """Parse a command line, or raise UsageError; look at no file."""
    asked = TOOL.parse(argv)
    options = asked.options
    fix = "leave it out; a sweep has --seeds, --runs and --gpus, and names configs without a flag"
    names = [flag[2:].partition("=")[0] for flag in asked.main_flags]
    rules = [
        *((name in NOT_PASSED_ON, f"{name} is not a flag of a sweep", fix) for name in names),
        (len(set(options.seeds)) < max(1, len(options.seeds)),
         f"seeds: {as_text(options.seeds)} are not one or more different seeds",
         "name each seed once, as in --seeds 0,1,2"),
        (options.slurm and options.dryRun, "slurm and dryRun exclude each other", "keep one"),
        (options.slurm and options.gpus is not None,
         "gpus has no effect on a Slurm array", f"leave it out: {SCRIPT} asks for them"),
    ]  # fmt: skip
    UsageError.raise_for(broken(rules))
    return asked


class Job(NamedTuple):
    """Hold a run in progress."""

    task: Task
    gpu: str | None  # a value of CUDA_VISIBLE_DEVICES; None leaves it as it is
    process: subprocess.Popen
    output: Path  # the file that it prints to
    begin: int  # size of that file before


def gpu_slots(gpus: int | None, visible: str | None, present: int) -> list[str | None]:
    """Return a value of CUDA_VISIBLE_DEVICES, now `visible`, for each slot; None: leave it.

    Raises:
        UsageError: more GPUs are asked for than there are.
    """
    if gpus is not None and gpus > present:
        found = f"{present or 'no'} CUDA device{'s' * (present > 1)}"
        raise UsageError(f"gpus={gpus} but {found}", f"--gpus {present}")
    if gpus == 0:
        return [""]
    names = visible.split(",") if visible else [str(number) for number in range(present)]
    return names[: present if gpus is None else gpus] or [None]


def start(task: Task, gpu: str | None) -> Job:
    """Start a run, in a session of its own: the sweep alone passes Ctrl-C on to it.

    On Linux the run is told to stop when this process ends, however that happens.

    Raises:
        StorageError: its output cannot be written.
    """
    output = Path(f"{task.save}.log")
    # Signals wait until the run can handle them: signals.SignalHandler unblocks them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "ab") as file:
            begin = file.tell()
            process = subprocess.Popen(
                [*PROGRAM, *task.flags],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}),
                start_new_session=True,
                preexec_fn=signals.die_with_parent,
            )
        return Job(task, gpu, process, output, begin)
    except OSError as error:
        raise storage_error(error, output) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def finish(job: Job) -> None:
    """Set the code of a run that has ended, and as its detail the line that says why."""
    code, job.task.detail = job.process.returncode, ""
    job.task.code = code if code >= 0 else 128 - code
    if code < 0:
        job.task.detail = f"ended by {signal.Signals(-code).name}"
    elif code:
        lines = job.output.read_bytes()[job.begin :].decode(errors="replace").splitlines()
        reasons = [line for line in lines if line.startswith(("error: ", "stopped: "))]
        job.task.detail = reasons[-1] if reasons else f"see {job.output}"


def progress(table: list[Task]) -> str:
    """Count the runs that are done and those that failed."""
    done = sum(task.state == tasks.DONE for task in table)
    failed = sum(task.has_failed for task in table)
    return f"=> {done} of {len(table)} runs done" + (f", {failed} failed" if failed else "")


def run(table: list[Task], gpus: list[str | None], handler: signals.SignalHandler) -> bool:
    """Run what is left of a table, one run at a time in each slot; set the code of each run.

    After a signal tell the runs in progress to save, start no others, and return True.
    """

    def report_end(task: Task) -> None:
        words = {0: tasks.DONE, Preempted.code: "stopped", BusyError.code: tasks.RUNNING}
        task.state = words.get(task.code, f"{tasks.FAILED} with {task.code}")
        reason = task.detail.removeprefix(f"{task.state}: ")
        console.info(f"=> {task.name}: {task.state}" + (f": {reason}" if reason else ""))
        console.info(progress(table))

    console.info(progress(table))
    # A run of another process may have been stopped when its turn comes.
    waiting, free = deque(task for task in table if task.state != tasks.DONE), deque(gpus)
    jobs: list[Job] = []
    is_stopped = False
    while waiting or jobs:
        if handler.signum and not is_stopped:
            is_stopped = True
            waiting.clear()
            for job in jobs:
                job.process.send_signal(handler.signum)
        for job in [job for job in jobs if job.process.poll() is not None]:
            jobs.remove(job)
            free.append(job.gpu)
            finish(job)
            report_end(job.task)
        while waiting and free:
            task = waiting.popleft()
            task.read_state()  # another sweep may have come first
            if not task.is_left:
                task.code = 0 if task.state == tasks.DONE else BusyError.code
                report_end(task)
                continue
            try:
                job = start(task, free[0])
            except StorageError as error:
                task.code, task.detail = error.code, error.report()
                report_end(task)
                continue
            jobs.append(job)
            where = f" on GPU {job.gpu}" if free.popleft() else ""
            since = f" after {task.finished} of {task.opt.nEpochs} epochs" if task.finished else ""
            console.info(f"=> {task.name}: started{where}{since}; output: {job.output}")
        if jobs:
            time.sleep(POLL_S)
    return is_stopped


def train(asked: cli.Command, table: list[Task], rerun_command: str) -> None:
    """Train what is left of a table on the GPUs of this machine.

    Raises:
        RunError: data is missing, a directory cannot be written, `gpu_slots` raises, or a run has
            failed; its code is that of the first in the table.
        Preempted: the sweep or one of its runs was stopped.
    """
    import torch

    handler = signals.SignalHandler().install()
    errors = []
    for task in [task for task in table if task.is_left]:
        try:
            path_checks.check(task.opt)
            check_writable(task.save)
        except RunError as error:
            errors.append(error)
    if errors:
        errors[0].problems = [*dict.fromkeys(p for error in errors for p in error.problems)]
        raise errors[0]
    visible, present = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    gpus = gpu_slots(asked.options.gpus, visible, present)
    handler.can_save = True
    is_stopped = run(table, gpus, handler)

    stopped = [task for task in table if task.code == Preempted.code]
    failed = [task for task in table if task.has_failed]
    if failed and not is_stopped:
        names = ", ".join(f"{task.name} ({task.code})" for task in failed)
        what = f"{len(failed)} of {len(table)} runs failed: {names}"
        error = RunError(what, f"correct the error above of each, then {rerun_command}")
        error.code = failed[0].code
        raise error
    if stopped or is_stopped:
        name = signal.Signals(handler.signum).name if is_stopped else "a signal"
        what = f"{name}, {len(stopped)} of {len(table)} runs were in progress"
        raise Preempted(what, rerun_command)


def submit(asked: cli.Command, table: list[Task]) -> None:
    """Print the command that submits the runs that are left, as tasks of an array.

    Task i of scripts/train.slurm is config i / #seeds with seed i % #seeds: the i-th of the table.
    """
    if Path.cwd() != cli.ROOT:
        what = f"slurm: {SCRIPT} runs main.py in the directory where sbatch is called"
        raise UsageError(what, f"cd {quoted(cli.ROOT)} first")
    left = [str(index) for index, task in enumerate(table) if task.is_left]
    console.warn(f"{len(left)} of {len(table)} runs are left to start")
    if left:
        seeds = " ".join(map(str, asked.options.seeds))
        configs = dict.fromkeys(task.config for task in table)
        words = ["sbatch", f"--array={','.join(left)}", SCRIPT, *configs, *asked.main_flags]
        settings = f"SEEDS={shlex.quote(seeds)} RUNS={shlex.quote(asked.options.runs)}"
        print(f"{settings} {shlex.join(words)}")


def sweep(argv: list[str]) -> None:
    """Train, list or submit the table that a command line asks for."""
    asked = parse(argv)
    options = asked.options
    table = tasks.work_list(asked.arguments, options.seeds, options.runs, asked.main_flags)
    if options.slurm:
        submit(asked, table)
    elif options.dryRun:
        print(tasks.listing(table))
    else:
        train(asked, table, f"python -m tools.sweep {shlex.join(argv)}")


main = partial(TOOL.run, sweep)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
