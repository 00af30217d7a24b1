"""Start the runs of a table as processes on this machine, one at a time on each GPU."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distributed import signals
from errors import BusyError, Preempted, UsageError
from fileio.atomic import storage_error
from tools.sweep import tasks
from tools.sweep.tasks import State, Task

PROGRAM = (sys.executable, "main.py")
POLL_S = 0.2


@dataclass(frozen=True)
class Job:
    """A run in progress.

    Args:
        gpu: see `gpu_slots`.
        output: the file that it prints to, from byte `begin` on.
    """

    task: Task
    gpu: str | None
    process: subprocess.Popen
    output: Path
    begin: int


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended: `code` is main.py's, or 128 + the signal that ended it."""

    task: Task
    code: int
    reason: str = ""

    @property
    def is_failure(self) -> bool:
        """Whether it is neither done, nor stopped and saved, nor run by another process."""
        return self.code not in (0, Preempted.code, BusyError.code)


def gpu_slots(gpus: int | None, visible: str | None, present: int) -> list[str | None]:
    """Return a value of CUDA_VISIBLE_DEVICES for each slot; None leaves it as it is.

    Args:
        gpus: the flag.
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


def start(task: Task, gpu: str | None, program: tuple[str, ...]) -> Job:
    """Start a run, in a session of its own: the scheduler alone passes Ctrl-C on to it.

    On Linux the run is told to stop when this process ends, however that happens.

    Raises:
        OSError: its output cannot be written.
    """
    output = Path(f"{task.save}.log")
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    with open(output, "ab") as file:
        begin = file.tell()
        # Signals wait until the run can handle them: signals.SignalHandler unblocks them.
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
    return Job(task, gpu, process, output, begin)


def outcome_of(job: Job) -> RunOutcome:
    """Return the exit code of a run that has ended, and the line in its output that says why."""
    code = job.process.returncode
    if code < 0:
        return RunOutcome(job.task, 128 - code, f"ended by {signal.Signals(-code).name}")
    with open(job.output, "rb") as file:
        file.seek(job.begin)
        lines = file.read().decode(errors="replace").splitlines()
    reasons = [line for line in lines if line.startswith(("error: ", "stopped: "))]
    reason = reasons[-1] if reasons else f"see {job.output}"
    return RunOutcome(job.task, code, reason if code else "")


class LocalScheduler:
    """Run what is left of a table, one run at a time in each slot.

    Args:
        states: of all runs of the table, in its order.
        gpus: see `gpu_slots`.
        say: prints a line.
        program: the words before a run's flags.
    """

    def __init__(
        self,
        states: dict[Task, State],
        gpus: list[str | None],
        say: Callable[[str], None],
        program: tuple[str, ...] = PROGRAM,
    ):
        self._num_runs, self._program, self._say = len(states), program, say
        self._free, self._jobs = deque(gpus), []
        # A run of another process may have been stopped when its turn comes.
        self._waiting = deque(task for task in states if states[task].word != tasks.DONE)
        self._num_done = self._num_runs - len(self._waiting)
        self.outcomes: list[RunOutcome] = []
        self.stopped_by = 0

    def run(self, handler: signals.SignalHandler) -> None:
        """Bring all runs to their ends; after a signal tell them to save, and start no others."""
        self._say(self.progress())
        while self._waiting or self._jobs:
            if handler.signum and not self.stopped_by:
                self.stopped_by = handler.signum
                self._waiting.clear()
                for job in self._jobs:
                    job.process.send_signal(handler.signum)
            for job in [job for job in self._jobs if job.process.poll() is not None]:
                self._jobs.remove(job)
                self._free.append(job.gpu)
                self._add(outcome_of(job))
            while self._waiting and self._free:
                self._start(self._waiting.popleft())
            if self._jobs:
                time.sleep(POLL_S)

    def _start(self, task: Task) -> None:
        state = tasks.state_of(task)  # another sweep may have come first
        if not state.is_left:
            code = 0 if state.word == tasks.DONE else BusyError.code
            self._add(RunOutcome(task, code, state.detail))
            return
        try:
            job = start(task, self._free[0], self._program)
        except OSError as error:
            refusal = storage_error(error, Path(f"{task.save}.log"))
            self._add(RunOutcome(task, refusal.code, refusal.report()))
            return
        self._jobs.append(job)
        self._free.popleft()
        where = f" on GPU {job.gpu}" if job.gpu else ""
        since = f" after {state.finished} of {task.opt.nEpochs} epochs" if state.finished else ""
        self._say(f"=> {task.name}: started{where}{since}; output: {job.output}")

    def _add(self, outcome: RunOutcome) -> None:
        self.outcomes.append(outcome)
        self._num_done += outcome.code == 0
        words = {0: tasks.DONE, Preempted.code: "stopped", BusyError.code: tasks.RUNNING}
        word = words.get(outcome.code, f"{tasks.FAILED} with {outcome.code}")
        reason = outcome.reason.removeprefix(f"{word}: ")
        self._say(f"=> {outcome.task.name}: {word}" + (f": {reason}" if reason else ""))
        self._say(self.progress())

    def progress(self) -> str:
        """Count the runs that are done and those that failed."""
        failed = sum(outcome.is_failure for outcome in self.outcomes)
        line = f"=> {self._num_done} of {self._num_runs} runs done"
        return f"{line}, {failed} failed" if failed else line
