"""Write a small table of configs; hold the lock of a run directory in another process."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers import run_directories
from tools.sweep import tasks
from tools.sweep.tasks import Task

CONFIG = "dataset: digits\ndepth: 10\ngrowthRate: 2\nbatchSize: 256\nnEpochs: 3\n"


def tiny(directory: Path, *flags: str) -> list[Task]:
    """Return configs a and b below `directory`, each with seeds 0 and 1; runs below it, too."""
    (directory / "tiny").mkdir(exist_ok=True)
    for name in ("a", "b"):
        (directory / "tiny" / f"{name}.yaml").write_text(CONFIG)
    return tasks.work_list([f"{directory}/tiny"], [0, 1], f"{directory}/runs", list(flags))


def write_run(task: Task, state: str, finished: int, *flags: str, **status: object) -> None:
    """Write the directory of a run that has finished some epochs, with `flags` changed."""
    words = " ".join([*task.flags, *flags])
    run_directories.write_run(task.save, words, [50.0] * finished, state, status)


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("host far, process 7")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held_elsewhere(task: Task) -> Iterator[None]:
    """Let another process hold the lock of a run directory, and name itself there."""
    command = [sys.executable, "-I", "-S", "-c", HOLD, task.save / ".lock"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        yield
        holder.stdin.close()
