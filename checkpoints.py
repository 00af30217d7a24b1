"""Write checkpoints atomically, verify them before loading, and never unpickle code.

A run directory holds `checkpoint_<steps>.pt` (everything that an exact resume needs) and the plain
state dicts `model_best.pt` and `model_last.pt`. docs/faults.md gives the reasons for the format.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from errors import CheckpointError, DamagedError, NonFiniteError, Preempted, quoted
from fileio import checkpoint_schema, foreign_weights, tensor_files
from fileio.atomic import atomic_write, storage_error
from fileio.tensor_files import check_tensors, is_valid, on_cpu, read, save_weights, to_bytes

FORMAT = 1
_NAME = re.compile(r"checkpoint_(\d+)\.pt")


def save(
    directory: Path, state: dict, keep: int, validated: dict[Path, bool] | None = None
) -> Path:
    """Write the checkpoint of `state` and remove all but the `keep` newest valid ones.

    Args:
        state: plain values and tensors; `state["global_step"]` names and orders the file.
        validated: caches which files are valid, so that repeated calls verify each file once; None
            verifies all.

    Raises:
        StorageError: the disk refuses; every earlier checkpoint is intact.
    """
    path = directory / f"checkpoint_{state['global_step']:09d}.pt"
    data = to_bytes({"format": FORMAT, **state})
    validated = {} if validated is None else validated
    try:
        _remove_old(directory, keep, validated)  # a killed process may have left one too many
        atomic_write(path, data)
        validated[path] = True
        _remove_old(directory, keep, validated)
    except OSError as error:
        raise storage_error(error, path) from error
    return path


def _remove_old(directory: Path, keep: int, validated: dict[Path, bool]) -> None:
    # A damaged file stays and does not count: it must not push out one that can be resumed.
    found = list_checkpoints(directory)
    for path in found:
        if path not in validated:
            validated[path] = is_valid(path)
    for old in [path for path in found if validated[path]][keep:]:
        old.unlink()


def list_checkpoints(directory: Path) -> list[Path]:
    """List the checkpoints in a directory, newest first by the step in the name, not by date."""
    found = [path for path in directory.glob("checkpoint_*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(_NAME.fullmatch(path.name)[1])


def has_checkpoint(directory: Path) -> bool:
    """Tell whether a run has saved weights in `directory`."""
    return any(directory.glob("checkpoint_*.pt*")) or any(directory.glob("model_*.pt"))


def load_latest(
    directory: Path, warn: Callable[[str], None], quarantine: bool = True
) -> dict | None:
    """Load the newest valid checkpoint, or return None if the directory has none.

    Args:
        warn: called with a line for each damaged file.
        quarantine: rename damaged files to `.corrupt`; only the owner of the directory may.

    Raises:
        CheckpointError: all checkpoints are damaged, or another version of the program wrote the
            newest.
    """
    damaged = len(list(directory.glob("checkpoint_*.pt.corrupt")))
    for path in list_checkpoints(directory):
        try:
            return load(path)
        except DamagedError as error:
            damaged += 1
            what, _ = error.problems[0]
            warn(f"{what}; {_quarantine(path) if quarantine else 'trying the one before'}")
        except CheckpointError:
            if os.path.lexists(path):
                raise
            # A running process has removed it in the meantime.
            return load_latest(directory, warn, quarantine)
    if damaged:
        raise CheckpointError(
            f"no valid checkpoint among {damaged} in {directory}",
            "restore one from a backup, or start over in another --save with --resume none",
        )
    return None


def _quarantine(path: Path) -> str:
    target = path.with_name(path.name + ".corrupt")
    try:
        os.replace(path, target)
    except OSError as error:
        return f"left where it is: {error.strerror}"
    return f"set aside as {target.name}"


def load(path: Path) -> dict:
    """Load one checkpoint, with every tensor on the CPU.

    Raises:
        DamagedError: the bytes differ from what was written, or a weight is not finite.
        CheckpointError: the file is missing, or not a checkpoint of this version.
    """
    state = read(path, with_checksums=True)
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(
            f"{path} is not a checkpoint of this program", "use --retrain for plain weights"
        )
    written = state["format"] if checkpoint_schema.is_count(state["format"]) else "unknown"
    if written != FORMAT:
        raise CheckpointError(
            f"{path} has format {written}, this program reads {FORMAT}",
            "use the version of the program that wrote it",
        )
    state = checkpoint_schema.with_defaults(state)
    problem = checkpoint_schema.validate(state)
    if problem:
        raise CheckpointError(f"{path} {problem}", "use another checkpoint")
    if _NAME.fullmatch(path.name) and checkpoint_step(path) != state["global_step"]:
        raise CheckpointError(f"{path} is of step {state['global_step']}", "undo its renaming")
    return state


def load_weights(
    path: Path, key: str | None = None, warn: Callable[[str], None] = lambda line: None
) -> dict[str, Tensor]:
    """Load the weights in a file of this or another program.

    fileio/foreign_weights.py says how they are found; fileio/lua_network.py how the weights of a
    Lua network (`.t7`) are named.

    Args:
        key: names one of several networks in the file.
        warn: called with a line for each choice between them.

    Raises:
        CheckpointError: the file is missing or damaged, or does not hold these weights.
    """

    def select(state: object) -> dict[str, Tensor]:
        return foreign_weights.find(state, key, lambda line: warn(f"{path}: {line}"))

    return tensor_files.read(path, select=select)


class CheckpointSaver:
    """Save a run: on a timer, at the end of each epoch, and on a signal.

    All ranks call it at the same steps; rank 0 writes.

    Args:
        directory: the run directory, locked by rank 0; None on the other ranks.
        trainer: the train.Trainer to save.
        stop: the signals.SignalHandler of this process; its `signum` is set by a signal.
        keep: how many checkpoints stay.
        every_s: seconds between checkpoints within an epoch.

    Attributes:
        after_first_save: on rank 0, called once the first checkpoint is written; a run that
            resumes writes there what a failing start must leave as it was.
    """

    after_first_save: Callable[[], None] | None = None

    def __init__(self, directory, trainer, stop, *, keep: int, every_s: float):
        self.directory, self.trainer, self.stop = directory, trainer, stop
        self.keep, self.every_s = keep, every_s
        self._saved_at, self.has_saved = time.monotonic(), False
        self._validated: dict[Path, bool] = {}

    def save(self) -> None:
        """Write a checkpoint now."""
        self.trainer.check_finite()
        state = self.trainer.state_dict()
        self._on_rank0(lambda: self._write(on_cpu(state)))
        self._saved_at, self.has_saved = time.monotonic(), True

    def _write(self, state: dict) -> None:
        try:
            check_tensors(state)
        except ValueError as error:  # it must not become the newest checkpoint
            where = f"epoch {self.trainer.epoch}, step {self.trainer.step}"
            fix = "lower --LR; the last checkpoint is from before"
            raise NonFiniteError(f"the network has {error} at {where}", fix) from error
        self.directory.verify_lock()
        path = save(self.directory.path, state, self.keep, self._validated)
        if self.after_first_save and not self.has_saved:
            self.after_first_save()
        self.directory.write_status("running", checkpoint=path.name, **self.trainer.position)

    def _on_rank0(self, fn: Callable[[], None]) -> None:
        """Run `fn` on rank 0; if it raises, every rank raises the same error."""
        self.trainer.world.broadcast_result(lambda: fn() or b"")

    def on_step_end(self) -> None:
        """Save if one is due; save and raise Preempted if any rank has received a signal."""
        due = time.monotonic() - self._saved_at >= self.every_s
        signum, due = self.trainer.world.all_reduce_max(self.stop.signum, int(due))
        if signum or due:
            self.save()
        if signum:
            raise self._preempted(signum)

    def raise_if_stopping(self) -> None:
        """Raise Preempted if any rank has received a signal; the caller has saved."""
        (signum,) = self.trainer.world.all_reduce_max(self.stop.signum)
        if signum:
            raise self._preempted(signum)

    def _preempted(self, signum: int) -> Preempted:
        name = signal.Signals(signum).name
        directory = self.trainer.metadata.settings["save"]
        fix = "run it again with --resume auto"
        if self.trainer.world.size == 1:
            program = sys.argv[0] if os.path.basename(sys.argv[0]) == "main.py" else "main.py"
            fix = f"python {quoted(program)} --resume {quoted(directory)}"
        return Preempted(f"{name}, {directory} is saved", fix)

    def on_epoch_end(self) -> None:
        """Save the checkpoint, then the weights, of an epoch that has been evaluated."""
        self.save()
        self.save_models()

    def save_models(self) -> None:
        """Write `model_last.pt`, and `model_best.pt` if this epoch is the best.

        Runs after the checkpoint is written, and again on resume: a crash between loses neither.
        """
        self._on_rank0(self._write_models)

    def _write_models(self) -> None:
        weights = self.trainer.model.state_dict()
        save_weights(self.directory.path / "model_last.pt", weights)
        if self.trainer.results.is_best:
            save_weights(self.directory.path / "model_best.pt", weights)
