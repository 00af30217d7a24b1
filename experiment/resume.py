"""Find the checkpoint to resume, and check it against the current settings, data and network."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import checkpoints
import models.state_dicts
import opts
from cli import network_settings
from cli.config_files import EARLIER_SETTINGS
from cli.flag_types import Settings
from cli.milestones import default_milestones, describe_rates, follow_length
from engine import optimizer
from engine.schedule import cosine_lr
from errors import CheckpointError, PeerError, UsageError, quoted
from experiment import run_data
from experiment.directory import RunDirectory
from fileio import checkpoint_schema, tensor_files
from fileio.atomic import atomic_write

# What to say of an entry of the data that differs, given its value now and before; and by which
# other entries it need not be said.
DATA_PHRASES: dict[str, tuple[str, set[str]]] = {
    "train": ("{} training images, was {}", set()),
    "val": ("{} validation images, was {}", set()),
    "test": ("{} test images, was {}", set()),
    "training_set": ("other training images", {"train"}),
    "test_set": ("other test images", {"val", "test"}),
    "held_out": ("other images held out, some of them trained on before", set()),
    "mean": ("other channel means", {"train", "training_set"}),
    "std": ("other channel deviations", {"mean", "train", "training_set"}),
}
DECIDE_BATCHES = {"train", "training_set", "held_out"}  # which images a batch has
# A resumed run has its own.
FIXED_AT_START = (
    *("epochNumber", "retrain", "resetClassifier", "adaptChannels", "from", "paddleDropout"),
)
# Perhaps by the weights of --retrain, by no flag.
BROUGHT = ("nChannels", "bnEps", "inputRange", "preprocess")
MAX_FRUITLESS_RESTARTS = 3  # automatic restarts in a row that made no progress
Warn = Callable[[str], None]


def load_checkpoint(
    opt: SimpleNamespace, directory: RunDirectory | None, world, warn: Warn
) -> tuple[dict | None, bool]:
    """Read the checkpoint to resume on rank 0, and return it on every rank.

    Args:
        directory: of the run; None on all ranks but 0.

    Returns:
        Its state, None to start afresh; and whether the run is already complete.

    Raises:
        CheckpointError, UsageError: as `find_checkpoint`.
        CheckpointError: a rank sees a newer checkpoint than rank 0.
        PeerError: the run makes no progress, see `check_progress`.
    """

    def read() -> tuple[dict | None, bool]:
        state = find_checkpoint(opt, warn)
        if state is None:
            for line in opt.start_notes:
                warn(line)
        is_trained = state is not None and state["epoch"] > opt.nEpochs
        if is_trained and directory.read_status().get("state") == "done":
            return state, True
        check_progress(directory, state, world.process.restarted)
        return state, False

    found = world.broadcast_result(read, tensor_files.to_bytes, tensor_files.from_bytes)
    check_shared_filesystem(Path(opt.save), world)
    return found


def find_checkpoint(opt: SimpleNamespace, warn: Warn) -> dict | None:
    """Read the checkpoint that `--resume` names; return None to start afresh.

    Raises:
        CheckpointError: none is there although one is named, or none is valid.
        UsageError: starting afresh would overwrite a run.
    """
    save = Path(opt.save)
    source = save if opt.resume == "auto" else Path(opt.resume)
    state = None
    # Read the file that is named, or the newest valid one of a directory.
    if opt.resume != "none":
        is_own = source.resolve() == save.resolve()
        if source.is_file():
            state = checkpoints.load(source)
        else:
            state = checkpoints.load_latest(source, warn, quarantine=is_own and not opt.testOnly)
        if state is not None:
            state = state | {"settings": _parse_saved_settings(state)}
        elif opt.testOnly or opt.resume != "auto":
            raise CheckpointError(f"no checkpoint in {source}", "name a run directory that has one")
    # Resuming an older checkpoint in place would leave newer ones of another history beside it.
    newest = checkpoints.list_checkpoints(save)[:1]
    continues = state and source.resolve() in [path.resolve() for path in (save, *newest)]
    if not continues and not opt.testOnly and checkpoints.has_checkpoint(save):
        raise UsageError(
            f"{save} already holds a run",
            "add --resume auto to continue it where it stopped, or choose another --save",
        )
    if state is None and opt.resume == "auto":
        warn(f"nothing to resume in {save}: starting afresh")
    return state


def _parse_saved_settings(state: dict) -> dict[str, object]:
    """Parse a checkpoint's settings, with defaults for new flags, or raise CheckpointError."""
    flags, given = opts.FLAGS, state["settings"]
    try:
        known = [flag for flag in flags.values() if flag.name in given]
        read = {flag.name: flag.parse(opts.as_text(given[flag.name])) for flag in known}
        statistics = [*state["data"]["mean"], *state["data"]["std"], read["nEpochs"]]
        count = 2 * read.get("nChannels", flags["nChannels"].default) + 1
        if len(statistics) != count or not all(map(math.isfinite, statistics)):
            raise ValueError("mean and std")
    except (KeyError, TypeError, ValueError) as error:
        what = f"the checkpoint has invalid settings or statistics: {error.args[0]}"
        raise CheckpointError(what, "use another checkpoint") from error
    defaults = {name: flag.default for name, flag in flags.items()} | EARLIER_SETTINGS
    return defaults | read


def check_shared_filesystem(directory: Path, world) -> None:
    """Raise CheckpointError when a rank sees a newer checkpoint than rank 0, which resumes."""
    found = checkpoints.list_checkpoints(directory)
    steps = world.all_gather_int(checkpoints.checkpoint_step(found[0]) if found else -1)
    rank = max(range(len(steps)), key=lambda rank: steps[rank])
    if steps[rank] > steps[0]:
        current = f"step {steps[0]}" if steps[0] >= 0 else "none"
        raise CheckpointError(
            f"process {rank} sees a checkpoint of step {steps[rank]} in {directory}, "
            f"0 sees {current}",
            "put the run directory on a disk that all machines share",
        )


def check_progress(directory: RunDirectory, state: dict | None, restarted: bool) -> None:
    """Count the automatic restarts in a row that find the run at the same step.

    status.json keeps the count. A start by hand and progress reset it; a start that a signal
    stopped did not fail and does not count.

    Args:
        state: the checkpoint to resume, None at the beginning of the run.
        restarted: whether a launcher restarted the run, see distributed/launcher.py.

    Raises:
        PeerError: the third in a row; whatever restarts the run would never stop.
    """
    step = state["global_step"] if state else 0
    status = directory.read_status()
    previous = status.get("start", {})
    num_fruitless = 0
    if restarted and previous.get("global_step") == step:
        num_fruitless = previous.get("in_vain", 0) + (status.get("state") != "preempted")
    reason = status.get("reason", "it was killed")
    # This function refused the last start already, so the cause is that of an earlier one.
    if num_fruitless > MAX_FRUITLESS_RESTARTS:
        reason = previous.get("reason", reason)
    start = {"global_step": step, "in_vain": num_fruitless, "reason": reason}
    directory.set_status_fields(start=start)
    if restarted:  # at once: it may not live until its first status
        directory.write_status("running")
    if num_fruitless >= MAX_FRUITLESS_RESTARTS:
        raise PeerError(
            f"{num_fruitless} automatic starts in a row found the run at step {step}; "
            f"the one before ended with: {reason}",
            "look into the cause, then start it by hand, which resets the count",
        )


def match_network(opt: Settings, state: dict) -> Settings:
    """Return the settings, where not given with those that weights have brought to the checkpoint.

    Raises:
        CheckpointError: they describe another network than the checkpoint's.
        UsageError: the dataset given has no images of as many channels.
    """
    brought = {name: state["settings"].get(name, opts.FLAGS[name].default) for name in BROUGHT}
    opt = opt.replace(**{name: brought[name] for name in brought.keys() & opt.defaults})
    differing = opts.differences(opts.settings(opt), state["settings"], "model")
    if differing:
        saved = " ".join(f"{name}={saved or 'unset'}" for name, _, saved in differing)
        current = " ".join(f"{name}={current or 'unset'}" for name, current, _ in differing)
        raise CheckpointError(
            f"checkpoint is a {state['settings']['netType']} with {saved}, settings say {current}",
            "give the same flags, or start another run with another --save",
        )
    UsageError.raise_for(network_settings.input_problems(opt))
    return opt


def merge_settings(opt: Settings, state: dict, warn: Warn) -> tuple[Settings, dict, list[str]]:
    """Compare the settings given with the checkpoint's, and merge them.

    Returns:
        The settings given, with those that the run keeps from its start; the checkpoint, moved to
        the start of its epoch if the batches have changed; and every change that `--override`
        has allowed so far, in words.

    Raises:
        CheckpointError: the checkpoint is of another network.
        UsageError: settings that shape training differ, without `--override true`.
    """
    opt = match_network(opt, state)
    saved = state["settings"]
    # Take over what does not change when a run is resumed.
    fixed = {name: saved.get(name, opts.FLAGS[name].default) for name in FIXED_AT_START}
    for name, value in fixed.items():
        if getattr(opt, name) not in (opts.FLAGS[name].default, value):
            warn(f"{name} has no effect on a run that is resumed")
    opt = opt.replace(**fixed)
    opt, chosen = _resolve_run_config(opt, saved, warn)
    known = state["defaults"]
    opt = opt.replace(defaults=None if known is None else frozenset(known) - chosen)
    keeps_milestones = "milestones" not in chosen and opt.lrShape == saved["lrShape"]
    if keeps_milestones:
        opt = opt.replace(milestones=saved.get("milestones"))
    if "resize" not in chosen:  # its default depends on `retrain`, and once was another
        opt = opt.replace(resize=saved["resize"])
    # Compare the rest.
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
    if opt.nEpochs != saved["nEpochs"]:
        opt = _change_length(opt, state, keeps_milestones, warn)
    overrides = state["overrides"] + [f"{_position(state)}: {change}" for change in changes]
    if {"batchSize", "manualSeed"} & {name for name, _, _ in changed}:
        state = _rewind_to_epoch_start(state, warn)
    return opt, state, overrides


def _resolve_run_config(opt: Settings, saved: dict, warn: Warn) -> tuple[Settings, frozenset[str]]:
    """Let the checkpoint win over what only a config says, unless `--override true`.

    That is the run's own config.yaml, where a process that was killed after it saved other settings
    has left the earlier ones; and in `--config` milestones that nobody has chosen.

    Returns:
        The settings; and the names of those that the user has chosen for this call.
    """
    current, chosen = opts.settings(opt), opt.given - opt.given_by_run - opt.defaults
    not_chosen = opt.given_by_run | (opt.given & opt.defaults & {"milestones"})
    edited = [
        difference
        for role in ("training", "duration")
        for difference in opts.differences(current, saved, role)
        if difference[0] in not_chosen
    ]
    names = frozenset(name for name, _, _ in edited)
    if opt.override:
        return opt, chosen | names
    for name, written, previous in edited:
        kept = f"{name} {previous or 'not set'}, as in the checkpoint"
        fix = f"--{name} {quoted(written)} --override true takes it"
        warn(f"{kept}; the config has {written}: {fix}")
    return opt.replace(**{name: saved.get(name) for name in names}), chosen


def _change_length(opt: Settings, state: dict, keeps_milestones: bool, warn: Warn) -> Settings:
    """Let milestones that were defaults follow another number of epochs; say what the rate does."""
    saved, epoch = state["settings"], state["epoch"]
    lengths = opt.nEpochs, saved["nEpochs"]
    is_now = "{} epochs, was {}".format(*lengths)
    if opt.lrShape == "cosine":
        now, before = (cosine_lr(opt.LR, min(epoch, n + 1), 0, n, 1) for n in lengths)
        warn(f"{is_now}: the cosine spans them, LR {now:.3g} at epoch {epoch}, was {before:.3g}")
        return opt
    if keeps_milestones and "milestones" in (state["defaults"] or ()):
        default = default_milestones(opt.nEpochs, opt.imagenetShape, opt.netType)
        trained = epoch - (state["step"] == 0)
        kept = follow_length(opt.milestones, default, trained, opt.nEpochs)
        opt = opt.replace(milestones=kept)
    which = "the same" if opt.milestones == saved.get("milestones") else "new"
    rates = describe_rates(opt.LR, opt.milestones, opt.nEpochs, opt.lrDecay)
    warn(f"{is_now}: {which} milestones, {rates}; --milestones with --override true sets others")
    return opt


def _position(state: dict) -> str:
    return f"epoch {state['epoch']} step {state['step']}"


def _rewind_to_epoch_start(state: dict, warn: Warn) -> dict:
    """Move a checkpoint to the start of its epoch, whose batches are others now."""
    if not state["step"]:
        return state
    warn(f"epoch {state['epoch']} starts again: its batches have changed")
    return checkpoint_schema.rewind_to_epoch_start(state)


def restore(trainer, state: dict, metadata: dict, warn: Warn, override: bool = False) -> list[str]:
    """Load a checkpoint into a trainer; return what `override` has allowed to change, in words.

    Args:
        metadata: of the current data, see datasets.factory.DataSplits.

    Raises:
        CheckpointError: the data or the network's shapes differ; the trainer is unchanged.
    """
    changes = [
        f"{_position(state)}: data {change}" for change in check_data(metadata, state, override)
    ]
    for change in changes:
        warn(f"override: {change}")
    if "thresholds" in state["data"]:  # the weights of --retrain had them
        metadata["thresholds"] = state["data"]["thresholds"]
    _check_shapes(trainer.model, state)
    was_augmented = state["settings"]["augment"] and "draws" not in state["data"]
    if "draws" in metadata and was_augmented:
        warn("the run began with an earlier loader: from here on crops and colours are drawn anew")
    if _changed_entries(metadata, state) & DECIDE_BATCHES:
        state = _rewind_to_epoch_start(state, warn)
    # Say what may change the rounding, and rewind where the random numbers cannot continue.
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


def check_data(metadata: dict, state: dict, override: bool = False) -> list[str]:
    """Compare the data with the checkpoint's; return the differences that are allowed, in words.

    Args:
        override: allow other images; other classes never.

    Raises:
        CheckpointError: anything else differs.
    """
    saved, changed = state["data"], _changed_entries(metadata, state)
    if "classes" in changed:
        run_data.check_classes(metadata["classes"], saved["classes"])
    shown = [
        phrase.format(metadata[name], saved[name])
        for name, (phrase, reasons) in DATA_PHRASES.items()
        if name in changed and not reasons & changed
    ]
    if shown and not override:
        raise CheckpointError(
            f"the data is not the checkpoint's: {', '.join(shown)}",
            "restore the data, or add --override true to go on with these images",
        )
    return shown


def _changed_entries(metadata: dict, state: dict) -> set[str]:
    saved = state["data"]  # an older version did not write every entry
    return {name for name in metadata if name in saved and metadata[name] != saved[name]}


def _check_shapes(model: nn.Module, state: dict) -> None:
    problems = models.state_dicts.state_dict_mismatches(state["model"], model.state_dict())
    expected = optimizer.expected_state(state["settings"], model)
    problems += models.state_dicts.state_dict_mismatches(state["momentum"], expected)
    if problems:
        raise CheckpointError(
            f"checkpoint does not fit the network: {problems[0]} ({len(problems)} in all)",
            "use a checkpoint of this network",
        )


def sync_run_files(opt: Settings, directory: RunDirectory | None, trainer, saver, warn: Warn):
    """Bring the model files of a resumed run up to its checkpoint."""
    if trainer.is_between_epochs:
        saver.save_models()  # a crash may have come between the checkpoint and the model files
    is_new_directory = False
    if directory:
        copy_best_model(opt, trainer, warn)
        is_new_directory = not checkpoints.list_checkpoints(directory.path)
    if any(trainer.world.all_reduce_max(is_new_directory)):
        saver.save()  # so that `--resume auto` works from here on


def copy_best_model(opt: Settings, trainer, warn: Warn) -> None:
    """Copy the best model so far to the new directory of a run that is resumed from another."""
    current, source = Path(opt.save) / "model_best.pt", Path(opt.resume)
    saved = (source if source.is_dir() else source.parent) / current.name
    if trainer.results.best is None or current.exists():
        return
    newest = None if opt.resume == "auto" else checkpoints.load_latest(saved.parent, warn, False)
    # The best model there may be of an epoch after the checkpoint that was named.
    if newest and newest["best"] == trainer.results.best and saved.is_file():
        atomic_write(current, saved.read_bytes())
    else:
        warn(f"{current} is gone: the best result is forgotten, the next epoch sets one")
        trainer.results.best = None
