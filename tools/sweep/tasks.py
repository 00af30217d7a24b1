"""The runs of a table, configs x seeds, and what the run directory of each says about it.

Nothing else is asked or kept: what is done stands in the run directories.
"""

import fcntl
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import opts
from cli.flag_types import Settings, closest_match
from errors import RunError, UsageError, printable
from fileio.atomic import read_json

CONFIGS = Path("configs")  # below the current directory, where a Slurm job runs the same names
# Tables of the paper that are no directory of their own.
TABLES = {"table2": ("c10", "c10plus", "c100", "c100plus", "svhn")}

# What may be said of a run.
DONE, SHORTER, NEW = "done", "done, but shorter", "not started"
PREEMPTED, FAILED, KILLED = "preempted", "failed", "killed"
RUNNING, OTHER = "running elsewhere", "other settings"
NOT_TO_START = (DONE, RUNNING, OTHER)


@dataclass(frozen=True, eq=False)
class Task:
    """One run of a table.

    Args:
        name: its directory below RUNS.
        config: its config file.
        save: its run directory.
        flags: the command line of main.py.
        opt: what that comes to.
    """

    name: str
    config: str
    save: Path
    flags: tuple[str, ...]
    opt: Settings


@dataclass(frozen=True)
class State:
    """What a run directory says.

    Args:
        word: one of those above.
        finished: epochs.
        detail: why it failed, or who has it.
        code: that main.py has ended with or would end with.
    """

    word: str
    finished: int = 0
    detail: str = ""
    code: int = 0


# --------------------------------------------------------------------------------- the work list


def work_list(names: list[str], seeds: list[int], runs: str, flags: list[str]) -> list[Task]:
    """The runs of tables and configs: configs as given, each with all seeds.

    Args:
        runs: directory of the run directories.
        flags: of main.py, for all runs.

    Raises:
        UsageError: every problem of the tables, the configs and their flags at once.
    """
    found, problems, tasks = [], [], []
    for name in names:
        try:
            found += configs_of(name)
        except UsageError as error:
            problems += error.problems
    for config in dict.fromkeys(found):
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
    """The config files that a table, a directory or a config file stands for.

    Raises:
        UsageError: there are none.
    """
    if name in TABLES:
        return [config for part in TABLES[name] for config in configs_of(part)]
    for path in (CONFIGS / name, CONFIGS / f"{name}.yaml", Path(name)):
        if path.is_dir():
            files = sorted(path.glob("*.yaml"))
            if not files:
                raise UsageError(f"no config files (*.yaml) in {path}", "name another directory")
            return [_from_here(file) for file in files]
        if path.is_file():
            return [_from_here(path)]
    known = [*TABLES, *(path.name for path in sorted(CONFIGS.iterdir()) if path.is_dir())]
    near = closest_match(name, known)
    fix = f"did you mean {near}?" if near else f"use {', '.join(known)}, or a config file"
    raise UsageError(f"no table or config {name}", fix)


def _from_here(path: Path) -> str:
    """A path relative to the current directory where it is below it, so that it has one name."""
    whole, here = Path(os.path.abspath(path)), Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)


# ------------------------------------------------------------------------- what a run has come to


def state_of(task: Task) -> State:
    """What a run's directory says, and whether this run may go on there."""
    said = progress_of(task)
    refused = None if said.word == RUNNING else refusal(task)
    return State(OTHER, said.finished, refused.report(), refused.code) if refused else said


def progress_of(task: Task) -> State:
    """What a run's directory says, whatever its settings were."""
    import experiment.log

    records = experiment.log.read_log(task.save)
    finished = records[-1]["epoch"] if records else 0
    owner = owner_of(task.save)
    if owner:
        return State(RUNNING, finished, owner)
    status = read_json(task.save / "status.json")
    word, code = status.get("state"), status.get("code")
    if word == DONE:
        is_whole = task.opt.nEpochs in (finished, status.get("epoch"))
        return State(DONE if is_whole else SHORTER, finished)
    if word in (PREEMPTED, FAILED):
        return State(word, finished, str(status.get("reason", "")), code or 1)
    return State(KILLED if word or finished else NEW, finished)


def owner_of(save: Path) -> str | None:
    """Who is writing a run directory, None when nobody is; nothing is changed by looking."""
    try:
        with open(save / ".lock") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return file.read().strip() or "another process"
    except OSError:
        return None
    return None


def refusal(task: Task) -> RunError | None:
    """Why main.py would not go on with what is in the directory: it is of other settings."""
    import checkpoints
    from experiment import resume

    config = task.save / "config.yaml"
    status = read_json(task.save / "status.json")
    has_checkpoint = checkpoints.has_checkpoint(task.save) or status.get("state") == DONE
    if not (config.is_file() and has_checkpoint):
        return None
    try:
        theirs = opts.settings(opts.parse(["--config", str(config)]))
    except UsageError:
        return None  # main.py reads the settings in the checkpoint
    defaults = {flag.name: flag.default for flag in opts.FLAGS.values()}
    state = {"settings": defaults | theirs, "overrides": [], "epoch": 1, "step": 0}
    try:
        resume.merge_settings(task.opt, state, lambda line: None)
    except RunError as error:
        return error
    return None


def listing(states: dict[Task, State]) -> str:
    """The runs of a table with the state of each, as text."""
    width = max(len(task.name) for task in states)
    lines = [f"{'run':<{width}}  {'state':<17}  {'epochs':>9}"]
    for task, state in states.items():
        code = f"{state.code}: " if state.word == FAILED else ""
        epochs = f"{state.finished}/{task.opt.nEpochs}"
        line = f"{task.name:<{width}}  {state.word:<17}  {epochs:>9}  {code}{state.detail}"
        lines.append(printable(line.rstrip()))
    words = Counter(state.word for state in states.values())
    counts = ", ".join(f"{count} {word}" for word, count in words.most_common())
    return "\n".join([*lines, f"{len(states)} runs: {counts}"])
