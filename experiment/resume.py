"""What an earlier call left: finding it, and refusing to go on with it as something else."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

import checkpoints
import models.state_dicts
import opts
from cli.flag_types import Settings
from engine import optimizer
from errors import CheckpointError, PeerError, UsageError
from experiment.directory import RunDirectory
from fileio import checkpoint_schema, tensor_files
from fileio.atomic import atomic_write

DATA_FINGERPRINTS = ("training_set", "test_set")  # of the images themselves
MAX_FRUITLESS_RESTARTS = 3  # automatic starts without progress; the next would be no better


def find_checkpoint(opt: SimpleNamespace, warn: Callable[[str], None]) -> dict | None:
    """The checkpoint that `--resume` names, None to start afresh.

    Raises:
        CheckpointError: there is none where one is asked for, or none is valid.
        UsageError: starting afresh would overwrite a run.
    """
    save, source = Path(opt.save), Path(opt.save if opt.resume == "auto" else opt.resume)
    is_own, state = source.resolve() == save.resolve(), None
    if opt.resume != "none":
        state = (
            checkpoints.load(source)
            if source.is_file()
            else checkpoints.load_latest(source, warn, quarantine=is_own and not opt.testOnly)
        )
    if state is not None:
        state = state | {"settings": _parse_saved_settings(state)}
    must_exist = opt.resume != "none" if opt.testOnly else opt.resume not in ("none", "auto")
    if state is None and must_exist:
        raise CheckpointError(f"no checkpoint in {source}", "name a run directory that has one")
    # An older checkpoint's later history would be mixed with the new one in the same directory.
    newest = checkpoints.list_checkpoints(save)[:1]
    continues = state is not None and source.resolve() in [
        path.resolve() for path in (save, *newest)
    ]
    if not continues and not opt.testOnly and checkpoints.has_checkpoint(save):
        raise UsageError(
            f"{save} already holds a run",
            "add --resume auto to continue it where it stopped, or choose another --save",
        )
    if state is None and opt.resume == "auto":
        warn(f"nothing to resume in {save}: starting afresh")
    return state


def _parse_saved_settings(state: dict) -> dict[str, object]:
    """Read a state's settings, with the default of each flag that it does not know.

    Raises:
        CheckpointError: they are none, or its statistics of the data are none.
    """
    flags, given = opts.FLAGS, state["settings"]
    try:
        known = [flag for flag in flags.values() if flag.name in given]
        read = {flag.name: flag.parse(opts.as_text(given[flag.name])) for flag in known}
        statistics = [*state["data"]["mean"], *state["data"]["std"], read["nEpochs"]]
        if len(statistics) != 7 or not all(map(math.isfinite, statistics)):
            raise ValueError("mean and std")
    except (KeyError, TypeError, ValueError) as error:
        what = f"the checkpoint has invalid settings or statistics: {error.args[0]}"
        raise CheckpointError(what, "use another checkpoint") from error
    # A flag that a checkpoint does not know yet had the meaning of its default.
    return {name: flag.default for name, flag in flags.items()} | read


def load_checkpoint(
    opt: SimpleNamespace, directory: RunDirectory | None, world, warn: Callable[[str], None]
) -> tuple[dict | None, bool]:
    """Read the checkpoint to go on from in the first process, for all of them.

    Args:
        directory: of the run; None in all but the first process.

    Returns:
        Its state, None to start afresh; and whether nothing is left to do.

    Raises:
        CheckpointError, UsageError: as `find_checkpoint`.
        CheckpointError: a process sees a newer checkpoint than the first.
        PeerError: the run does not get on, see `check_progress`.
    """

    def read() -> tuple[dict | None, bool]:
        state = find_checkpoint(opt, warn)
        if state and is_complete(opt, state, directory.read_status()):
            return state, True
        check_progress(directory, state, world.process.restarted)
        return state, False

    found = world.broadcast_result(read, tensor_files.to_bytes, tensor_files.from_bytes)
    check_shared_filesystem(Path(opt.save), world.all_gather_int(newest_step(Path(opt.save))))
    return found


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint that can be seen in a directory, -1 for none."""
    found = checkpoints.list_checkpoints(directory)
    return checkpoints.checkpoint_step(found[0]) if found else -1


def check_shared_filesystem(directory: Path, steps: list[int]) -> None:
    """Raise CheckpointError when a process sees a newer checkpoint than the first, which resumes.

    Args:
        steps: `newest_step` of each process.
    """
    rank = max(range(len(steps)), key=lambda rank: steps[rank])
    if steps[rank] > steps[0]:
        current = f"step {steps[0]}" if steps[0] >= 0 else "none"
        raise CheckpointError(
            f"process {rank} sees a checkpoint of step {steps[rank]} in {directory}, "
            f"0 sees {current}",
            "put the run directory on a disk that all machines share",
        )


def check_network(opt: SimpleNamespace, state: dict) -> None:
    """Raise CheckpointError when the checkpoint is of another network than the settings say."""
    differing = opts.differences(opts.settings(opt), state["settings"], "model")
    if differing:
        saved = " ".join(f"{name}={saved}" for name, _, saved in differing)
        current = " ".join(f"{name}={current}" for name, current, _ in differing)
        raise CheckpointError(
            f"checkpoint is a {state['settings']['netType']} with {saved}, settings say {current}",
            "give the same flags, or start another run with another --save",
        )


class ResumedRun(NamedTuple):
    """What a run goes on with.

    Args:
        opt: its settings: those given, with what it began with and what a longer run keeps.
        state: its checkpoint, at the start of the epoch where that has other batches now.
        overrides: what `--override` has changed over its life, in words, this time included.
    """

    opt: Settings
    state: dict
    overrides: list[str]


def merge_settings(opt: Settings, state: dict, warn: Callable[[str], None]) -> ResumedRun:
    """Compare the settings given with those of a checkpoint, and return what the run goes on with.

    Raises:
        CheckpointError: the checkpoint is of another network.
        UsageError: settings that shape training differ, without `--override true`.
    """
    check_network(opt, state)
    saved = state["settings"]
    opt = opt.replace(
        **_settings_fixed_at_start(opt, saved, warn), **_saved_schedule(opt, saved, warn)
    )
    changed = opts.differences(opts.settings(opt), saved, "training")
    if opt.nEpochs < saved["nEpochs"]:
        changed.append(("nEpochs", str(opt.nEpochs), str(saved["nEpochs"])))
    changes = [f"{name} {now}, was {previous or 'not set'}" for name, now, previous in changed]
    if changes and not opt.override:
        raise UsageError(
            f"settings differ from the checkpoint's: {'; '.join(changes)}",
            "give the same flags, or --override true to go on with these",
        )
    for change in changes:
        warn(f"override: {change}")
    position = f"epoch {state['epoch']} step {state['step']}"
    overrides = state["overrides"] + [f"{position}: {change}" for change in changes]
    if {"batchSize", "manualSeed"} & {name for name, _, _ in changed}:
        state = _rewind_to_epoch_start(state, warn)
    return ResumedRun(opt, state, overrides)


def _settings_fixed_at_start(
    opt: Settings, saved: dict, warn: Callable[[str], None]
) -> dict[str, object]:
    """The settings that a run has from its start, which is past."""
    names = ("epochNumber", "retrain", "resetClassifier")
    for name in names:
        if getattr(opt, name) not in (opts.FLAGS[name].default, saved[name]):
            warn(f"{name} has no effect on a run that is resumed")
    return {name: saved[name] for name in names}


def _saved_schedule(opt: Settings, saved: dict, warn: Callable[[str], None]) -> dict:
    """A longer run goes on at the rates it had, unless milestones are given."""
    is_longer = opt.nEpochs > saved["nEpochs"]
    if opt.nEpochs < saved["nEpochs"]:
        return {}
    if is_longer and opt.lrShape == "cosine":
        warn(f"the cosine spans {opt.nEpochs} epochs now, it was {saved['nEpochs']}")
        return {}
    if "milestones" in opt.given or opt.lrShape != saved["lrShape"]:
        return {}
    if is_longer:
        warn(f"milestones stay {opts.as_text(saved['milestones'])}; --milestones sets others")
    return {"milestones": saved["milestones"]}  # also when it is continued once more


def _rewind_to_epoch_start(state: dict, warn: Callable[[str], None]) -> dict:
    """Put a checkpoint from the middle of an epoch whose batches are others now at its start."""
    if not state["step"]:
        return state
    warn(f"epoch {state['epoch']} starts anew, its batches are others now")
    return checkpoint_schema.rewind_to_epoch_start(state)


def is_complete(opt: SimpleNamespace, state: dict, status: dict) -> bool:
    """Whether nothing is left to do: every epoch trained, and the end written down."""
    return state["epoch"] > opt.nEpochs and status.get("state") == "done"


def check_progress(directory: RunDirectory, state: dict | None, is_automatic: bool) -> None:
    """Count the automatic starts in a row that find the run where the start before found it.

    The count lies in status.json. A start by hand sets it back to 0, and so does progress; a start
    that was stopped by a signal is no failure and does not count.

    Args:
        state: the checkpoint that the run goes on from, None at its beginning.
        is_automatic: whether a launcher starts the run anew, see distributed/launcher.py.

    Raises:
        PeerError: it is the third; whatever restarts the run would do so for ever.
    """
    step = state["global_step"] if state else 0
    status = directory.read_status()
    previous = status.get("start", {})
    num_fruitless = 0
    if is_automatic and previous.get("global_step") == step:
        num_fruitless = previous.get("in_vain", 0) + (status.get("state") != "preempted")
    reason = status.get("reason", "it was killed")
    # Refused by this function already at the last start: the cause is older.
    if num_fruitless > MAX_FRUITLESS_RESTARTS:
        reason = previous.get("reason", reason)
    directory.set_status_fields(
        start={"global_step": step, "in_vain": num_fruitless, "reason": reason}
    )
    if is_automatic:  # at once: it may not live until its first status
        directory.write_status("running")
    if num_fruitless >= MAX_FRUITLESS_RESTARTS:
        raise PeerError(
            f"{num_fruitless} automatic starts in a row found the run at step {step}; "
            f"the one before ended with: {reason}",
            "look into the cause, then start it by hand, which counts anew",
        )


def restore(
    trainer, state: dict, facts: dict, warn: Callable[[str], None], override: bool = False
) -> list[str]:
    """Put a trainer where the checkpoint was; what `override` has changed, in words.

    Raises:
        CheckpointError: the data or the network's shapes differ; the trainer is untouched.
    """
    where = f"epoch {state['epoch']} step {state['step']}"
    changes = [f"{where}: data {change}" for change in check_data(facts, state, override)]
    for change in changes:
        warn(f"override: {change}")
    _check_shapes(trainer.model, state)
    threads, device = torch.get_num_threads(), trainer.device.type
    if state["device"] != device:
        warn(f"the run was on {state['device']}, now on {device}: it goes on, not bit for bit")
        state = _rewind_to_epoch_start(state, warn)
    elif device == "cpu" and state["threads"] != threads:
        warn(f"{threads} threads, the run had {state['threads']}: rounding can differ")
    size = trainer.world.size
    if state["replicas"] != size:
        warn(f"{size} processes, the run had {state['replicas']}: the images keep their order")
    trainer.load_state_dict(state)
    return changes


def copy_best_model(opt: SimpleNamespace, trainer, warn: Callable[[str], None]) -> None:
    """Let a run that goes on in another directory have its best model there as well."""
    current = Path(opt.save) / "model_best.pt"
    source = Path(opt.resume)
    saved = (source if source.is_dir() else source.parent) / current.name
    if trainer.results.best is None or current.exists():
        return
    newest = None if opt.resume == "auto" else checkpoints.load_latest(saved.parent, warn, False)
    # Its best may be of an epoch after the checkpoint that was named.
    if newest and newest["best"] == trainer.results.best and saved.is_file():
        atomic_write(current, saved.read_bytes())
    else:
        warn(f"{current} is gone: the best result is forgotten and starts anew")
        trainer.results.best = None


def check_data(facts: dict, state: dict, override: bool = False) -> list[str]:
    """Compare `facts` about the data with the checkpoint's; what may differ and does, in words.

    Args:
        override: the images themselves may be others; never the classes or the counts.

    Raises:
        CheckpointError: anything else differs.
    """
    previous = state["data"]
    # A fact that an older version did not write down is not compared.
    changed = [name for name in facts if name in previous and facts[name] != previous[name]]
    changed.sort(key=lambda name: name in DATA_FINGERPRINTS)
    shown = [f"{name} {_shorten(facts[name])}, was {_shorten(previous[name])}" for name in changed]
    is_content_only = set(changed) <= {"mean", "std", *DATA_FINGERPRINTS}
    if changed and not (override and is_content_only):
        fix = "restore the data, or start another run from its weights with --retrain"
        raise CheckpointError(
            f"the data is not the checkpoint's: {', '.join(shown[:3])}",
            f"{fix}, or add --override true" if is_content_only else fix,
        )
    return shown


def _check_shapes(model: nn.Module, state: dict) -> None:
    problems = models.state_dicts.state_dict_mismatches(state["model"], model.state_dict())
    expected = optimizer.expected_state(state["settings"], model)
    problems += models.state_dicts.state_dict_mismatches(state["momentum"], expected)
    if problems:
        raise CheckpointError(
            f"checkpoint does not fit the network: {problems[0]} ({len(problems)} in all)",
            "use a checkpoint of this network",
        )


def _shorten(value: object) -> str:
    if isinstance(value, list) and len(value) > 3:
        return f"{len(value)} values"
    return str(value)[:64]
