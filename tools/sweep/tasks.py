"""List the runs of a table, configs x seeds, and read from its directory what became of each.

A sweep stores nothing of its own: the run directories say what is done.
"""

import fcntl
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import opts
from cli.flag_types import Settings, closest_match
from errors import BusyError, Preempted, UsageError, printable
from tools import cli
from tools.results import runs
from tools.results.configs import comparable_settings

CONFIGS = cli.ROOT / "configs"
# Tables of the paper that are several directories.
TABLES = {"table2": ("c10", "c10plus", "c100", "c100plus", "svhn")}

DONE, NEW, RUNNING = "done", "not started", "running elsewhere"
PREEMPTED, FAILED, KILLED = "preempted", "failed", "killed"
OTHER = "done, other settings"  # main.py decides whether it may go on


@dataclass(eq=False)
class Task:
    """Hold one run of a table, and its outcome."""

    name: str  # its directory below RUNS
    config: str  # its config file
    save: Path  # its run directory
    flags: tuple[str, ...]  # the command line of main.py
    opt: Settings  # the settings in that command line
    state: str = NEW  # one of the words above
    finished: int = 0  # epochs
    detail: str = ""  # why it failed or stopped, or which process is writing it
    code: int | None = None  # main.py's in this sweep, or 128 + the signal that ended it

    @property
    def is_left(self) -> bool:
        """Return whether a sweep is to start the run."""
        return self.state not in (DONE, RUNNING)

    @property
    def has_failed(self) -> bool:
        """Return whether the run ended in this sweep, neither stopped nor left to others."""
        return self.code not in (None, 0, Preempted.code, BusyError.code)

    def read_state(self) -> None:
        """Set state, finished and detail from the run directory."""
        run = runs.read(self.save, warn=lambda line: None)
        self.finished = run.epoch if run else 0
        self.detail = lock_owner(self.save) or ""
        if self.detail:
            self.state = RUNNING
        elif not run:  # its settings cannot be read, or there are none yet: main.py decides
            self.state = KILLED if self.save.exists() else NEW
        elif run.state == "done":
            is_same = comparable_settings(run.opt) == comparable_settings(self.opt)
            self.state = DONE if is_same and run.is_done else OTHER
        elif run.state in (PREEMPTED, FAILED):
            code = f"{run.status.get('code')}: " if run.state == FAILED else ""
            self.state, self.detail = run.state, f"{code}{run.status.get('reason', '')}"
        else:
            self.state = KILLED


def work_list(names: list[str], seeds: list[int], directory: str, flags: list[str]) -> list[Task]:
    """Return the runs of tables and configs: the configs in their order, each with all seeds.

    Args:
        directory: of the run directories.
        flags: of main.py, for all runs.

    Raises:
        UsageError: every problem of the tables, the configs and their flags at once.
    """
    configs, problems, tasks = {}, {}, []  # dicts instead of sets, to keep the order
    for name in names:
        try:
            configs |= dict.fromkeys(configs_of(name))
        except UsageError as error:
            problems |= dict.fromkeys(error.problems)
    for config, seed in [(config, seed) for config in configs for seed in seeds]:
        # As in scripts/train.slurm, which is started in the project's directory.
        short = os.path.abspath(config).removeprefix(f"{CONFIGS}/")
        short = config.removeprefix("configs/") if os.path.isabs(short) else short
        name = f"{short.removesuffix('.yaml').lstrip('/')}-seed{seed}"
        save = f"{directory}/{name}"
        argv = ["--config", config, "--manualSeed", str(seed), "--save", save, "--resume", "auto"]
        argv += flags
        try:
            tasks.append(Task(name, config, Path(save), tuple(argv), opts.parse(argv)))
        except UsageError as error:
            problems |= dict.fromkeys(error.problems)
    UsageError.raise_for(list(problems))
    for task in tasks:
        task.read_state()
    return tasks


def configs_of(name: str) -> list[str]:
    """List the config files of a table or a directory, or the one config, or raise UsageError."""
    if name in TABLES:
        return [config for part in TABLES[name] for config in configs_of(part)]
    for path in (CONFIGS / name, CONFIGS / f"{name}.yaml", Path(name)):
        files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not files:
            raise UsageError(f"no config files (*.yaml) in {path}", "name another directory")
        if files[0].is_file():
            # One name for each file: relative below the current directory, else absolute.
            return [os.path.abspath(file).removeprefix(f"{os.getcwd()}/") for file in files]
    known = [*TABLES, *(path.name for path in sorted(CONFIGS.iterdir()) if path.is_dir())]
    near = closest_match(name, known)
    fix = f"did you mean {near}?" if near else f"use {', '.join(known)}, or a config file"
    raise UsageError(f"no table or config {name}", fix)


def lock_owner(save: Path) -> str | None:
    """Return the process that is writing a run directory, if any; change nothing."""
    try:
        with open(save / ".lock") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return file.read().strip() or "another process"
    except OSError:
        pass
    return None


def listing(tasks: list[Task]) -> str:
    """Format the runs of a table with their states."""
    width = max(len(task.name) for task in tasks)
    lines = [f"{'run':<{width}}  {'state':<20}  {'epochs':>9}"]
    for task in tasks:
        epochs = f"{task.finished}/{task.opt.nEpochs}"
        line = f"{task.name:<{width}}  {task.state:<20}  {epochs:>9}  {task.detail}"
        lines.append(printable(line.rstrip()))
    counts = Counter(task.state for task in tasks).most_common()
    lines.append(f"{len(tasks)} runs: {', '.join(f'{count} {state}' for state, count in counts)}")
    return "\n".join(lines)
