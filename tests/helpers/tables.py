"""A small table of configs, and run directories that say what a test wants them to say."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.sweep import tasks
from tools.sweep.tasks import Task

CONFIG = "dataset: digits\ndepth: 10\ngrowthRate: 2\nbatchSize: 256\nnEpochs: 3\n"


def tiny(directory: Path, *flags: str) -> list[Task]:
    """Configs a and b below `directory`, each with seeds 0 and 1, runs in `directory`/runs."""
    (directory / "tiny").mkdir(exist_ok=True)
    for name in ("a", "b"):
        (directory / "tiny" / f"{name}.yaml").write_text(CONFIG)
    return tasks.work_list([f"{directory}/tiny"], [0, 1], f"{directory}/runs", list(flags))


def write_run(task: Task, status: dict | str | None, records: list[dict] | None = None) -> None:
    """A run directory with this status.json, if any, and these records of epochs."""
    task.save.mkdir(parents=True)
    if status is not None:
        text = status if isinstance(status, str) else json.dumps(status)
        (task.save / "status.json").write_text(text)
    lines = (json.dumps(record) + "\n" for record in records or [])
    (task.save / "log.jsonl").write_text("".join(lines))


def epochs(count: int) -> list[dict]:
    """Records of the first epochs, a minute each."""
    return [{"epoch": number + 1, "time_s": 50.0, "val_time_s": 10.0} for number in range(count)]


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
    """Let another process have the lock of a run directory, in which it says so."""
    command = [sys.executable, "-I", "-S", "-c", HOLD, task.save / ".lock"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        yield
        holder.stdin.close()
