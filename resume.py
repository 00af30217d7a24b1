"""What an earlier call left: finding it, and refusing to go on with it as something else."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import checkpoints
import models
import opts
from errors import CheckpointError, UsageError
from storage import write_whole


def find(opt: SimpleNamespace, warn: Callable[[str], None]) -> dict | None:
    """The checkpoint that `--resume` names, None to start afresh.

    Raises:
        CheckpointError: there is none where one is asked for, or none is valid.
        UsageError: starting afresh would overwrite a run.
    """
    save, source = Path(opt.save), Path(opt.save if opt.resume == "auto" else opt.resume)
    own, state = source.resolve() == save.resolve(), None
    if opt.resume != "none":
        state = (
            checkpoints.load(source)
            if source.is_file()
            else checkpoints.latest(source, warn, set_aside=own and not opt.testOnly)
        )
    must_exist = opt.resume != "none" if opt.testOnly else opt.resume not in ("none", "auto")
    if state is None and must_exist:
        raise CheckpointError(f"no checkpoint in {source}", "name a run directory that has one")
    # An older checkpoint's later history would be mixed with the new one in the same directory.
    newest = checkpoints.newest_first(save)[:1]
    goes_on = state is not None and source.resolve() in [path.resolve() for path in (save, *newest)]
    if not goes_on and not opt.testOnly and checkpoints.holds_run(save):
        raise UsageError(
            f"{save} already holds a run",
            "add --resume auto to continue it where it stopped, or choose another --save",
        )
    if state is None and opt.resume == "auto":
        warn(f"nothing to resume in {save}: starting afresh")
    return state


def check_network(opt: SimpleNamespace, state: dict) -> None:
    """Raise CheckpointError when the checkpoint is of another network than the settings say."""
    differing = opts.differences(opts.settings(opt), state["settings"], "model")
    if differing:
        theirs = " ".join(f"{name}={theirs}" for name, _, theirs in differing)
        mine = " ".join(f"{name}={mine}" for name, mine, _ in differing)
        raise CheckpointError(
            f"checkpoint is a {state['settings']['netType']} with {theirs}, settings say {mine}",
            "give the same flags, or start another run with another --save",
        )


def check(opt: SimpleNamespace, state: dict, warn: Callable[[str], None]) -> list[str]:
    """What `--override` has changed over the run's life, in words, this time's changes included.

    Also gives `opt` what the run began with and what a longer run keeps.

    Raises:
        CheckpointError: the checkpoint is of another network.
        UsageError: settings that shape training differ, without `--override true`.
    """
    check_network(opt, state)
    theirs = state["settings"]
    for name in ("epochNumber", "retrain", "resetClassifier"):  # of the start, which is past
        if getattr(opt, name) not in (opts.FLAGS[name].default, theirs[name]):
            warn(f"{name} has no effect on a run that is resumed")
        setattr(opt, name, theirs[name])
    if opt.nEpochs > theirs["nEpochs"]:
        _lengthen(opt, theirs, warn)
    changed = opts.differences(opts.settings(opt), theirs, "course")
    if opt.nEpochs < theirs["nEpochs"]:
        changed.append(("nEpochs", str(opt.nEpochs), str(theirs["nEpochs"])))
    words = [f"{name} {now}, was {before or 'not set'}" for name, now, before in changed]
    if words and not opt.override:
        raise UsageError(
            f"settings differ from the checkpoint's: {'; '.join(words)}",
            "give the same flags, or --override true to go on with these",
        )
    for change in words:
        warn(f"override: {change}")
    position = f"epoch {state['epoch']} step {state['step']}"
    if {"batchSize", "manualSeed"} & {name for name, _, _ in changed}:
        _restart_epoch(state, warn)
    return state["overrides"] + [f"{position}: {change}" for change in words]


def _lengthen(opt: SimpleNamespace, theirs: dict, warn: Callable[[str], None]) -> None:
    """A longer run goes on at the rates it had, unless milestones are given."""
    if opt.lrShape == "cosine":
        warn(f"the cosine spans {opt.nEpochs} epochs now, it was {theirs['nEpochs']}")
    elif "milestones" not in opt.given and opt.lrShape == theirs["lrShape"]:
        opt.milestones = theirs["milestones"]
        warn(f"milestones stay {opts.as_text(opt.milestones)}; --milestones sets others")


def _restart_epoch(state: dict, warn: Callable[[str], None]) -> None:
    """Put a checkpoint from the middle of an epoch whose batches are others now at its start."""
    if state["step"]:
        warn(f"epoch {state['epoch']} starts anew, its batches are others now")
        state |= {"step": 0, "sums": None, "time_s": 0.0, "data_s": 0.0}


def is_complete(opt: SimpleNamespace, state: dict, status: dict) -> bool:
    """Whether nothing is left to do: every epoch trained, and the end written down."""
    return state["epoch"] > opt.nEpochs and status.get("state") == "done"


def restore(trainer, state: dict, facts: dict, warn: Callable[[str], None]) -> None:
    """Put a trainer where the checkpoint was.

    Raises:
        CheckpointError: the data or the network's shapes differ; the trainer is untouched.
    """
    check_data(facts, state)
    _check_shapes(trainer.model, state)
    threads, device = torch.get_num_threads(), trainer.device.type
    if state["device"] != device:
        warn(f"the run was on {state['device']}, now on {device}: it goes on, not bit for bit")
        _restart_epoch(state, warn)
    elif device == "cpu" and state["threads"] != threads:
        warn(f"{threads} threads, the run had {state['threads']}: rounding can differ")
    trainer.load_state_dict(state)


def bring_best(opt: SimpleNamespace, trainer, warn: Callable[[str], None]) -> None:
    """Let a run that goes on in another directory have its best model there as well."""
    mine = Path(opt.save) / "model_best.pt"
    source = Path(opt.resume)
    theirs = (source if source.is_dir() else source.parent) / mine.name
    if trainer.best is None or mine.exists():
        return
    newest = None if opt.resume == "auto" else checkpoints.latest(theirs.parent, warn, False)
    # Its best may be of an epoch after the checkpoint that was named.
    if newest and newest["best"] == trainer.best and theirs.is_file():
        write_whole(mine, theirs.read_bytes())
    else:
        warn(f"{mine} is gone: the best result is forgotten and starts anew")
        trainer.best = None


def check_data(facts: dict, state: dict) -> None:
    """Raise CheckpointError when any of `facts` about the data is not the checkpoint's."""
    before = state["data"]
    changed = [name for name in facts if facts[name] != before.get(name)]
    if changed:
        shown = ", ".join(
            f"{name} {_short(facts[name])}, was {_short(before.get(name))}" for name in changed[:3]
        )
        raise CheckpointError(
            f"the data is not the checkpoint's: {shown}",
            "restore the data, or start another run from its weights with --retrain",
        )


def _check_shapes(model: nn.Module, state: dict) -> None:
    problems = models.mismatches(state["model"], model.state_dict())
    if state["momentum"]:
        problems += models.mismatches(state["momentum"], dict(model.named_parameters()))
    if problems:
        raise CheckpointError(
            f"checkpoint does not fit the network: {problems[0]} ({len(problems)} in all)",
            "use a checkpoint of this network",
        )


def _short(value: object) -> str:
    return f"{len(value)} values" if isinstance(value, list) and len(value) > 3 else str(value)
