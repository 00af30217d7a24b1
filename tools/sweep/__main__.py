"""Trains a table: its configs x seeds, one after another on the GPUs at hand or as a Slurm array.

A run is `main.py --config CONFIG --manualSeed SEED --save RUNS/CONFIG-seedSEED --resume auto` with
the flags that are given for all of them. What is done is read from the run directories and nowhere
else, so that the same command goes on where it was stopped and leaves alone what is done.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import experiment.directory
from cli import path_checks
from cli.flag_types import NON_NEGATIVE, Flag, as_text, boolean, integer, integers, text
from distributed import signals
from errors import BusyError, Preempted, RunError, UsageError
from fileio import atomic
from tools import cli
from tools.sweep import eta, tasks
from tools.sweep.tasks import State, Task

PROGRAM = (sys.executable, "main.py")
SCRIPT = "scripts/train.slurm"
POLL_S, SHOW_EVERY_S = 0.2, 60.0

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
# Flags of main.py that a sweep sets itself, or that are no training.
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
    """The flags, tables and passed-on flags of a command line; no file is looked at.

    Raises:
        UsageError: every problem of the sweep's own flags at once.
    """
    asked = cli.read(argv, FLAGS, arguments="table or config", main_flags=True)
    own = asked.options
    names = [flag[2:].partition("=")[0] for flag in asked.main_flags]
    problems = [(f"{name} is no flag of a sweep", NOT_PASSED_ON[name])
                for name in names if name in NOT_PASSED_ON]  # fmt: skip
    twice = [seed for seed, count in Counter(own.seeds).items() if count > 1]
    if twice or not own.seeds:
        what = f"seeds: {as_text(twice)} given twice" if twice else "seeds: none is given"
        problems.append((what, "name each seed once, as in --seeds 0,1,2"))
    if own.slurm and own.dryRun:
        problems.append(("slurm and dryRun exclude each other", "keep one"))
    if own.slurm and own.gpus is not None:
        what = "gpus has no effect on a Slurm array"
        problems.append((what, f"leave it out: {SCRIPT} asks for them"))
    if problems:
        raise UsageError.from_problems(problems)
    return asked


# --------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Job:
    """A run in progress.

    Args:
        place: its GPU, see `gpu_slots`.
        output: what it prints goes there, from byte `begin` on.
    """

    task: Task
    place: str | None
    process: subprocess.Popen
    output: Path
    begin: int


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended: `code` is main.py's, or 128 + the signal that has ended it."""

    task: Task
    code: int
    reason: str = ""

    @property
    def is_failure(self) -> bool:
        """Whether it is neither done, nor stopped and saved, nor in the hands of another."""
        return self.code not in (0, Preempted.code, BusyError.code)


def gpu_slots(gpus: int | None, visible: str | None, present: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES for each worker; None leaves it as it is.

    Args:
        gpus: as the flag says.
        visible: the variable now.
        present: GPUs that PyTorch sees.

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


def start(task: Task, place: str | None, program: tuple[str, ...]) -> Job:
    """Start a run, which on Linux ends with this process, however that ends.

    It is in a session of its own, so that Ctrl-C reaches it once: through `LocalScheduler`.

    Raises:
        OSError: its output cannot be written.
    """
    output = Path(f"{task.save}.log")
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({} if place is None else {"CUDA_VISIBLE_DEVICES": place})
    with open(output, "ab") as file:
        begin = file.tell()
        # A signal waits until the run can handle it: signals.SignalHandler lets it through.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
        try:
            process = subprocess.Popen(
                [*program, *task.flags],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=signals.die_with_parent,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Job(task, place, process, output, begin)


def end_of(job: Job) -> RunOutcome:
    """The exit code of a run that has ended, and the line that says why."""
    code = job.process.returncode
    if code == 0:
        return RunOutcome(job.task, 0)
    if code < 0:
        return RunOutcome(job.task, 128 - code, f"ended by {signal.Signals(-code).name}")
    with open(job.output, "rb") as file:
        file.seek(job.begin)
        lines = file.read().decode(errors="replace").splitlines()
    said = [line for line in lines if line.startswith(("error: ", "stopped: "))]
    return RunOutcome(job.task, code, said[-1] if said else f"see {job.output}")


class LocalScheduler:
    """Bring the runs of a table to their ends, one on each place at a time.

    Args:
        states: of all runs of the table, in its order, before any is started.
        where: see `gpu_slots`.
        say: prints a line.
        program: the words before a run's flags.
    """

    def __init__(
        self,
        states: dict[Task, State],
        where: list[str | None],
        say: Callable[[str], None],
        program: tuple[str, ...] = PROGRAM,
    ):
        self._states, self._num_slots = states, len(where)
        self._program, self._say = program, say
        self._free, self._jobs = deque(where), []
        # One that runs elsewhere may have been stopped when its turn comes.
        done_with = (tasks.DONE, tasks.OTHER)
        self._waiting = deque(task for task in states if states[task].word not in done_with)
        self.ends: list[RunOutcome] = []
        self.was_stopped = False

    def run(self, handler: signals.SignalHandler) -> None:
        """All of them; after a signal those in progress are told to save and no other begins."""
        shown_at = time.monotonic()
        while self._waiting or self._jobs:
            if handler.signum and not self.was_stopped:
                self.was_stopped = True
                self._waiting.clear()
                for job in self._jobs:
                    job.process.send_signal(handler.signum)
            changed = self._end_those_that_have()
            while self._waiting and self._free:
                self._begin(self._waiting.popleft())
                changed = True
            if changed or time.monotonic() - shown_at > SHOW_EVERY_S:
                self._say(f"=> {self.progress()}")
                shown_at = time.monotonic()
            if self._jobs:
                time.sleep(POLL_S)

    def _begin(self, task: Task) -> None:
        state = tasks.progress_of(task)  # another sweep may have come first
        if state.word in (tasks.DONE, tasks.RUNNING):
            code = 0 if state.word == tasks.DONE else BusyError.code
            self._take(RunOutcome(task, code, state.detail))
            return
        try:
            job = start(task, self._free[0], self._program)
        except OSError as error:
            refused = atomic.storage_error(error, Path(f"{task.save}.log"))
            self._take(RunOutcome(task, refused.code, refused.report()))
            return
        self._free.popleft()
        self._jobs.append(job)
        where = f" on GPU {job.place}" if job.place else ""
        since = f" after {state.finished} of {task.opt.nEpochs} epochs" if state.finished else ""
        self._say(f"=> {task.name}: started{where}{since}; output: {job.output}")

    def _end_those_that_have(self) -> bool:
        ended = [job for job in self._jobs if job.process.poll() is not None]
        for job in ended:
            self._jobs.remove(job)
            self._free.append(job.place)
            self._take(end_of(job))
        return bool(ended)

    def _take(self, end: RunOutcome) -> None:
        self.ends.append(end)
        words = {0: tasks.DONE, Preempted.code: "stopped", BusyError.code: tasks.RUNNING}
        word = words.get(end.code, f"{tasks.FAILED} with {end.code}")
        reason = end.reason.removeprefix(f"{word}: ")
        self._say(f"=> {end.task.name}: {word}" + (f": {reason}" if reason else ""))

    def progress(self) -> str:
        """How far the whole table is, as eta.progress_line says it."""
        loads = {task: eta.load_of(task, counts_log=state.word != tasks.OTHER)
                 for task, state in self._states.items()}  # fmt: skip
        waiting = [task for task in self._waiting if self._states[task].word != tasks.RUNNING]
        to_do = [loads[task] for task in [*(job.task for job in self._jobs), *waiting]]
        everything = list(loads.values())
        left = eta.seconds_left(to_do, everything, self._num_slots)
        return eta.progress_line(self._words(), eta.share_done(everything), left)

    def _words(self) -> list[str]:
        failed = {end.task for end in self.ends if end.is_failure}
        failed |= {task for task, state in self._states.items() if state.word == tasks.OTHER}
        # One that has failed before is tried again.
        return [
            tasks.FAILED if task in failed
            else tasks.DONE if tasks.progress_of(task).word == tasks.DONE
            else tasks.NEW
            for task in self._states
        ]  # fmt: skip


def raise_outcome(ends: list[RunOutcome], num_runs: int, stopped_by: str, again: str) -> None:
    """Raise what a sweep ends with; nothing when every run is done or in other hands.

    Args:
        ends: of the runs that were tried, in their order.
        stopped_by: the signal that has stopped it, or "".
        again: the command that goes on.

    Raises:
        Preempted: it was stopped.
        RunError: runs have failed; its code is that of the first.
    """
    failed = [end for end in ends if end.is_failure]
    stopped = [end.task.name for end in ends if end.code == Preempted.code]
    if stopped_by:
        raise Preempted(f"{stopped_by}, {len(stopped)} of {num_runs} runs were in progress", again)
    if failed:
        names = ", ".join(f"{end.task.name} ({end.code})" for end in failed)
        what = f"{len(failed)} of {num_runs} runs failed: {names}"
        error = RunError(what, f"mend what is said of each above, then {again}")
        error.code = failed[0].code
        raise error
    if stopped:
        raise Preempted(f"somebody stopped {', '.join(stopped)}", again)


# ---------------------------------------------------------------------------------------- Slurm


def slurm_line(asked: cli.Command, table: list[Task], left: list[Task]) -> str:
    """The command that submits the runs that are `left`, as tasks of an array over the table.

    Task i of scripts/train.slurm is config i / #seeds with seed i % #seeds: the i-th of the table.
    """
    seeds = shlex.quote(" ".join(map(str, asked.options.seeds)))
    array = as_ranges([number for number, task in enumerate(table) if task in left])
    configs = dict.fromkeys(task.config for task in table)
    words = ["sbatch", f"--array={array}", SCRIPT, *configs, *asked.main_flags]
    return f"SEEDS={seeds} RUNS={shlex.quote(asked.options.runs)} {shlex.join(words)}"


def as_ranges(numbers: list[int]) -> str:
    """Ascending numbers as Slurm writes them: 0,3-5."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def submit(asked: cli.Command, states: dict[Task, State]) -> None:
    """Print the Slurm command for what is left; what it leaves out stands on standard error."""
    left = [task for task, state in states.items() if state.word not in tasks.NOT_TO_START]
    print(f"note: {len(left)} of {len(states)} runs are left to start", file=sys.stderr)
    for task, state in states.items():
        if state.word in (tasks.RUNNING, tasks.OTHER):
            print(f"note: {task.name}: {state.word}: {state.detail}", file=sys.stderr)
    if left:
        print(slurm_line(asked, list(states), left))


# --------------------------------------------------------------------------------------- the tool


def check(table: list[Task]) -> None:
    """Look whether the data of all runs is there, and their directories can be written.

    Raises:
        RunError: every problem of one kind at once.
    """
    found: dict[type[RunError], list[tuple[str, str]]] = {}
    for task in table:
        try:
            path_checks.check(task.opt)
            experiment.directory.check_writable(task.save)
        except RunError as error:
            found.setdefault(type(error), []).extend(error.problems)
    for kind, problems in found.items():
        error = kind(*problems[0])
        error.problems = list(dict.fromkeys(problems))
        raise error


def workers(asked: cli.Command, states: dict[Task, State]) -> LocalScheduler:
    """The workers of this machine.

    Raises:
        UsageError: more GPUs are asked for than there are.
    """
    import torch

    from experiment import console

    visible, present = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    where = gpu_slots(asked.options.gpus, visible, present)
    return LocalScheduler(states, where, console.info)


def states_of(asked: cli.Command) -> dict[Task, State]:
    """The runs that are asked for, in order, and what has come of each.

    Raises:
        UsageError: every problem of the tables, the configs and their flags at once.
    """
    own = asked.options
    table = tasks.work_list(asked.arguments, own.seeds, own.runs, asked.main_flags)
    return {task: tasks.state_of(task) for task in table}


def train(asked: cli.Command, handler: signals.SignalHandler, again: str) -> None:
    """Train what is left of a table on the GPUs at hand.

    Raises:
        RunError: what `states_of`, `check`, `workers` and `raise_outcome` raise.
    """
    from experiment import console

    states = states_of(asked)
    check([task for task, state in states.items() if state.word not in tasks.NOT_TO_START])
    here = workers(asked, states)
    refused = [RunOutcome(task, state.code, state.detail)
               for task, state in states.items() if state.word == tasks.OTHER]  # fmt: skip
    for end in refused:
        console.info(f"=> {end.task.name}: {tasks.OTHER}: {end.reason}")
    handler.enable_saving()
    here.run(handler)
    if not here.ends:  # else it has been said
        console.info(f"=> {here.progress()}")
    signalled = signal.Signals(handler.signum).name if here.was_stopped else ""
    raise_outcome(refused + here.ends, len(states), signalled, again)


def sweep(argv: list[str]) -> None:
    """Train, list or submit the table that a command line asks for."""
    asked = parse(argv)
    if asked.options.slurm:
        submit(asked, states_of(asked))
    elif asked.options.dryRun:
        states = states_of(asked)
        print(tasks.listing(states))
        print(workers(asked, states).progress())
    else:
        train(asked, signals.SignalHandler().install(), f"python -m tools.sweep {shlex.join(argv)}")


def main(argv: list[str]) -> int:
    """Sweep over a table; the exit code."""
    return cli.run(argv, USAGE, FLAGS, sweep, main_flags=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
