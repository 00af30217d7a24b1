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
from errors import UsageError, printable
from tools.results import runs
from tools.results.configs import comparable_settings

CONFIGS = Path("configs")  # below the current directory, where a Slurm job finds the same names
# Tables of the paper that are several directories.
TABLES = {"table2": ("c10", "c10plus", "c100", "c100plus", "svhn")}

DONE, NEW, RUNNING = "done", "not started", "running elsewhere"
PREEMPTED, FAILED, KILLED = "preempted", "failed", "killed"
OTHER = "done, other settings"  # main.py decides whether it may go on


@dataclass(frozen=True, eq=False)
class Task:
    """One run of a table.

    Args:
        name: its directory below RUNS.
        config: its config file.
        save: its run directory.
        flags: the command line of main.py.
        opt: the settings in that command line.
    """

    name: str
    config: str
    save: Path
    flags: tuple[str, ...]
    opt: Settings


@dataclass(frozen=True)
class State:
    """The state of a run: one of the words above, and finished epochs.

    Args:
        detail: why it failed or stopped, or which process is writing it.
    """

    word: str
    finished: int = 0
    detail: str = ""

    @property
    def is_left(self) -> bool:
        """Whether a sweep is to start the run."""
        return self.word not in (DONE, RUNNING)


# --------------------------------------------------------------------------------- the work list


def work_list(names: list[str], seeds: list[int], runs: str, flags: list[str]) -> list[Task]:
    """Return the runs of tables and configs: the configs in their order, each with all seeds.

    Args:
        runs: directory of the run directories.
        flags: of main.py, for all runs.

    Raises:
        UsageError: every problem of the tables, the configs and their flags at once.
    """
    configs, problems, tasks = {}, [], []  # dicts instead of sets, to keep the order
    for name in names:
        try:
            configs |= dict.fromkeys(configs_of(name))
        except UsageError as error:
            problems += error.problems
    for config in configs:
        for seed in seeds:
            try:
                tasks.append(_task(config, seed, runs, flags))
            except UsageError as error:
                problems += error.problems
    if problems:
        raise UsageError.from_problems(list(dict.fromkeys(problems)))
    return tasks


def _task(config: str, seed: int, runs: str, flags: list[str]) -> Task:
    name = f"{config.removesuffix('.yaml').removeprefix('configs/').lstrip('/')}-seed{seed}"
    save = f"{runs}/{name}"  # as in scripts/train.slurm
    argv = ["--config", config, "--manualSeed", str(seed), "--save", save, "--resume", "auto"]
    return Task(name, config, Path(save), (*argv, *flags), opts.parse([*argv, *flags]))


def configs_of(name: str) -> list[str]:
    """Return the config files of a table or a directory, or the one config file.

    Raises:
        UsageError: there are none.
    """
    if name in TABLES:
        return [config for part in TABLES[name] for config in configs_of(part)]
    for path in (CONFIGS / name, CONFIGS / f"{name}.yaml", Path(name)):
        files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not files:
            raise UsageError(f"no config files (*.yaml) in {path}", "name another directory")
        if files[0].is_file():
            # One name for each file: relative below the current directory, else absolute.
            absolute, here = [Path(os.path.abspath(file)) for file in files], Path.cwd()
            return [
                str(file.relative_to(here) if file.is_relative_to(here) else file)
                for file in absolute
            ]
    known = [*TABLES, *(path.name for path in sorted(CONFIGS.iterdir()) if path.is_dir())]
    near = closest_match(name, known)
    fix = f"did you mean {near}?" if near else f"use {', '.join(known)}, or a config file"
    raise UsageError(f"no table or config {name}", fix)


# ------------------------------------------------------------------------------- states of runs


def state_of(task: Task) -> State:
    """Read the state of a run from its directory."""
    run = runs.read(task.save, warn=lambda line: None)
    finished = run.epoch if run else 0
    owner = lock_owner(task.save)
    if owner:
        return State(RUNNING, finished, owner)
    if not run:  # its settings cannot be read, or there are none yet: main.py decides
        return State(KILLED if task.save.exists() else NEW)
    if run.state == "done":
        is_same = comparable_settings(run.opt) == comparable_settings(task.opt)
        return State(DONE if is_same and run.is_done else OTHER, finished)
    if run.state in (PREEMPTED, FAILED):
        code = f"{run.status.get('code')}: " if run.state == FAILED else ""
        return State(run.state, finished, f"{code}{run.status.get('reason', '')}")
    return State(KILLED, finished)


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


def listing(states: dict[Task, State]) -> str:
    """Format the runs of a table with their states."""
    width = max(len(task.name) for task in states)
    lines = [f"{'run':<{width}}  {'state':<20}  {'epochs':>9}"]
    for task, state in states.items():
        epochs = f"{state.finished}/{task.opt.nEpochs}"
        line = f"{task.name:<{width}}  {state.word:<20}  {epochs:>9}  {state.detail}"
        lines.append(printable(line.rstrip()))
    words = Counter(state.word for state in states.values())
    counts = ", ".join(f"{count} {word}" for word, count in words.most_common())
    return "\n".join([*lines, f"{len(states)} runs: {counts}"])
