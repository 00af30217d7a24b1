"""Checkpoints: written whole, checked to the last bit before they are believed, never executed.

A run directory holds `checkpoint_<steps>.pt` (everything needed to go on) and the plain state
dicts `model_best.pt` and `model_last.pt`. docs/faults.md has the facts that shaped the format.
"""

import errno
import hashlib
import io
import math
import os
import re
import signal
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import limits
import lua_network
import schema
import torch7
from errors import CheckpointError, DamagedError, NonFiniteError, Preempted
from storage import storage_error, write_whole

FORMAT = 1
SEAL = b"sha256:"  # then 64 digits, as the comment that a zip archive may end with
_NAME = re.compile(r"checkpoint_(\d+)\.pt")
# What the tensors of a checkpoint may be: no subclasses, no complex or quantised numbers.
KINDS = (Tensor, nn.Parameter)
TYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
# What reading a file may cost, several times what a checkpoint of its size does.
READ_S, READ_RATE = 2, 2**25  # seconds of the processor, and bytes in each more
READ_BYTES = 2**27  # beyond twice the size of the file


def save(directory: Path, state: dict, keep: int, known: dict[Path, bool] | None = None) -> Path:
    """Write the checkpoint of `state` and remove all but the `keep` newest sound ones.

    Args:
        state: plain values and tensors; `state["global_step"]` names and orders the file.
        known: which files this process knows to be sound or damaged, kept from call to call, so
            that what it has not written itself is checked once; None checks anew.

    Raises:
        StorageError: it could not be written; every earlier checkpoint is intact.
    """
    path = directory / f"checkpoint_{state['global_step']:09d}.pt"
    data = _serialise({"format": FORMAT, **state})
    known = {} if known is None else known
    try:
        _remove_old(directory, keep, known)  # a process killed before its end left one too many
        write_whole(path, data)
        known[path] = True
        _remove_old(directory, keep, known)
    except OSError as error:
        raise storage_error(error, path) from error
    return path


def _remove_old(directory: Path, keep: int, known: dict[Path, bool]) -> None:
    """A damaged file does not count, or it would push out one that can be resumed; it stays."""
    found = newest_first(directory)
    for path in found:
        if path not in known:
            known[path] = _is_sound(path)
    for old in [path for path in found if known[path]][keep:]:
        old.unlink()


def _is_sound(path: Path) -> bool:
    """Whether a file has the bytes that were written, by its digest and its CRCs alone."""
    try:
        data = _bytes_of(path)
        with limits.time_limit(READ_S + len(data) / READ_RATE):
            _check_bytes(data)
    except Exception:  # damaged bytes can raise anything in a parser
        return False
    return True


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a plain state dict, loadable by name into torchvision's or timm's DenseNet."""
    write_whole(path, _serialise(weights))


def _serialise(state: object) -> bytes:
    # To memory first: torch.save to a full disk hides the reason, and what it leaves is a torso.
    buffer = io.BytesIO()
    torch.save(_on_cpu(state), buffer)
    _seal(buffer)
    return buffer.getvalue()


def _seal(archive: io.BytesIO) -> None:
    """Give a zip archive its own digest as its comment; in its place, since it may be large.

    The CRCs cover what is in the archive; this covers its directory too, which zipfile and torch
    read each in its own way.
    """
    with archive.getbuffer() as data:
        digest = hashlib.sha256(data[:-2]).hexdigest()  # without the length of a comment
    seal = SEAL + digest.encode()
    archive.seek(-2, io.SEEK_END)
    archive.write(len(seal).to_bytes(2, "little") + seal)


def _check_seal(data: bytes) -> None:
    """Raise ValueError unless a sealed archive is what it was; others are left to their CRCs."""
    length = len(SEAL) + 64
    content, seal = memoryview(data)[: -length - 2], data[-length:]
    if seal.startswith(SEAL) and seal != SEAL + hashlib.sha256(content).hexdigest().encode():
        raise ValueError("its digest is another")


def _on_cpu(value: object) -> object:
    """The same structure with every tensor contiguous on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value


def newest_first(directory: Path) -> list[Path]:
    """The checkpoints in a directory by the step in their names, never by their dates."""
    found = [path for path in directory.glob("checkpoint_*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(_NAME.fullmatch(path.name)[1])


def holds_run(directory: Path) -> bool:
    """Whether a run got far enough in `directory` to leave weights there."""
    return any(directory.glob("checkpoint_*.pt*")) or any(directory.glob("model_*.pt"))


def latest(directory: Path, warn: Callable[[str], None], set_aside: bool = True) -> dict | None:
    """The newest valid checkpoint's state, None when there is none at all.

    Args:
        warn: called with a line for each damaged file.
        set_aside: rename damaged files to `.corrupt`; for the owner of the directory only.

    Raises:
        CheckpointError: there are checkpoints and none of them is valid, or the newest is sound
            but of another version of this program.
    """
    damaged = len(list(directory.glob("checkpoint_*.pt.corrupt")))
    for path in newest_first(directory):
        try:
            return load(path)
        except DamagedError as error:
            damaged += 1
            what, _ = error.problems[0]
            warn(f"{what}; {_set_aside(path) if set_aside else 'trying the one before'}")
        except CheckpointError:
            if os.path.lexists(path):
                raise
            return latest(directory, warn, set_aside)  # a running process has removed it since
    if damaged:
        raise CheckpointError(
            f"no valid checkpoint among {damaged} in {directory}",
            "restore one from a backup, or start over in another --save with --resume none",
        )
    return None


def _set_aside(path: Path) -> str:
    aside = path.with_name(path.name + ".corrupt")
    try:
        os.replace(path, aside)
    except OSError as error:
        return f"left where it is: {error.strerror}"
    return f"set aside as {aside.name}"


def packed(value: object) -> bytes:
    """Plain values and tensors as bytes, for the other processes of a run."""
    return _serialise(value)


def unpacked(data: bytes) -> object:
    """What `packed` was given, every tensor on the CPU."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def load(path: Path) -> dict:
    """One checkpoint's state, every tensor on the CPU.

    Raises:
        DamagedError: it is not what was written, or has non-finite weights.
        CheckpointError: it is missing, or not a checkpoint of this version.
    """
    state = _read(path, with_checksums=True)
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(
            f"{path} is not a checkpoint of this program", "use --retrain for plain weights"
        )
    written = state["format"] if schema.is_count(state["format"]) else "unknown"
    if written != FORMAT:
        raise CheckpointError(
            f"{path} has format {written}, this program reads {FORMAT}",
            "use the version of the program that wrote it",
        )
    state.setdefault("replicas", 1)  # older ones know of no more
    problem = schema.problem(state)
    if problem:
        raise CheckpointError(f"{path} {problem}", "use another checkpoint")
    if _NAME.fullmatch(path.name) and step_of(path) != state["global_step"]:
        raise CheckpointError(f"{path} is of step {state['global_step']}", "undo its renaming")
    return state


def load_weights(path: Path) -> dict[str, Tensor]:
    """The network weights in a checkpoint or a plain state dict, also of torchvision or timm.

    Those of a network of Lua Torch (`.t7`) are named as in lua_network.py.

    Raises:
        CheckpointError: missing, damaged or no weights.
    """
    weights = _read(path)
    for wrapper in ("model", "state_dict"):
        if isinstance(weights, dict) and isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    if not schema.are_tensors(weights) or not weights:
        raise CheckpointError(f"{path} holds no state dict", "name a file of weights")
    return dict(weights)


def _read(path: Path, with_checksums: bool = False) -> object:
    """Deserialise a file after checking that it is what was written.

    `torch.load` checks no CRC: of 200 files with one flipped bit it loaded 199. The CRCs that
    torch.save writes are checked here; old files without a zip archive around them have none.
    """
    data = _bytes_of(path)
    try:
        with limits.time_limit(READ_S + len(data) / READ_RATE):
            with limits.memory_limit(READ_BYTES + 2 * len(data)), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what torch finds odd is refused here
                state = _parsed(data, with_checksums)
            # Not under that limit: torch may start threads here, each with much address space.
            _check_tensors(state, 2 * len(data))
    except Exception as error:  # hostile or damaged bytes can raise anything in a parser
        raise _unreadable(path, data, with_checksums, error) from error
    return state


def _is_zip(data: bytes) -> bool:
    return data.startswith(b"PK\x03\x04")


def _parsed(data: bytes, with_checksums: bool) -> object:
    if _is_zip(data):
        _check_bytes(data)
    elif with_checksums:
        raise ValueError("not a zip archive")
    elif torch7.recognises(data):
        return lua_network.weights(torch7.load(data))
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _unreadable(path: Path, data: bytes, with_checksums: bool, error: Exception) -> CheckpointError:
    """What to report when reading a file failed in whatever way."""
    if isinstance(error, CheckpointError):
        what, fix = error.problems[0]
        return CheckpointError(f"{path}: {what}", fix)
    # What was only too much is not proven to be damaged: it stays where it is.
    if isinstance(error, TimeoutError):
        return CheckpointError(f"{path} {error}", "use another checkpoint")
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        fix = "use another checkpoint, or a machine with more memory"
        return CheckpointError(f"{path} takes more memory than there is", fix)
    was_read = _is_zip(data) or (torch7.recognises(data) and not with_checksums)
    reason = f"damaged ({_first_line(error)})" if was_read else _looks_like(data)
    return DamagedError(f"{path} is {reason}", "use another checkpoint")


def _bytes_of(path: Path) -> bytes:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would never end
            raise OSError(errno.EINVAL, "not a regular file")
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", "it is larger than memory")
        raise CheckpointError(f"cannot read {path}: {reason}", "name a file") from error


def _check_bytes(data: bytes) -> None:
    """Raise an exception of any kind unless a zip archive is what was written."""
    _check_seal(data)
    _check_archive(data)


def _check_archive(data: bytes) -> None:
    """Every entry stored, inside the file, and with the CRC it was written with."""
    end = data.rindex(b"PK\x05\x06") + 22  # of the last record, before the comment
    if int.from_bytes(data[end - 2 : end], "little") != len(data) - end:
        raise ValueError("cut short")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
            if entry.CRC == 0 and entry.file_size > 0:
                raise ValueError(f"{entry.filename} has no checksum")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("entries share a name")
        if sum(entry.file_size for entry in entries) > len(data):
            raise ValueError("entries are larger than the file")
        broken = archive.testzip()
        if broken:
            raise ValueError(f"checksum of {broken}")


def _check_tensors(state: object, most: float = math.inf) -> None:
    """Refuse tensors that are bigger than what the file holds of them, and values not finite.

    Args:
        most: bytes of all tensors together, which may share what the file holds.
    """
    rest, seen = [state], set()
    while rest:
        value = rest.pop()
        if id(value) in seen:  # lists of one list twice, and so on, would never end
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            size = value.numel() * value.element_size()
            most -= size
            if type(value) not in KINDS or value.dtype not in TYPES:
                raise ValueError("a tensor that is no weight")
            strided = value.layout == torch.strided
            if not strided or size > value.untyped_storage().nbytes() or most < 0:
                raise ValueError("a tensor larger than its data")
            if value.is_floating_point() and not _is_finite(value):
                raise ValueError("a weight that is not finite")
        elif isinstance(value, dict):
            rest.extend(value.values())
        elif isinstance(value, list | tuple):
            rest.extend(value)


def _is_finite(tensor: Tensor) -> bool:
    # In one pass, several times as fast as isfinite(); what is not a number is both extremes.
    return not tensor.numel() or all(map(math.isfinite, torch.aminmax(tensor.detach())))


def _looks_like(data: bytes) -> str:
    """What a file that is no checkpoint seems to be."""
    head = data[:200].lstrip().lower()
    if not data:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file it points to"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not a checkpoint"
    if torch7.recognises(data):
        return "a file of Lua Torch, for --retrain only"
    if b"ustar" in data[257:263]:
        return "a tar archive, not a checkpoint"
    if head.isascii() and b"\x00" not in head and head[:1] not in (b"\x80", b"("):
        return "text, not a checkpoint"
    return "not a checkpoint, or one with more in it than weights"


def _first_line(error: Exception) -> str:
    if str(error).startswith("Weights only load failed"):
        return "it holds more than weights and plain values"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


class Saver:
    """Saves a run when it is due: on a timer, at the end of an epoch, on request.

    All processes of a run save together, and the first of them writes.

    Args:
        directory: the run directory, locked by this process; None in all but the first.
        trainer: has `state_dict()`, `check_finite()`, `is_best`, the position and the `world`.
        stop: its `number` is set once this process is asked to stop.
        facts: plain values stored with every checkpoint (settings, data).
        every_s: seconds between checkpoints within an epoch.
    """

    def __init__(self, directory, trainer, stop, facts: dict, *, keep: int, every_s: float):
        self.directory, self.trainer, self.stop = directory, trainer, stop
        self.facts, self.keep, self.every_s = facts, keep, every_s
        self._saved_at = time.monotonic()
        self._known: dict[Path, bool] = {}  # checkpoints that are sound, or not

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        self.trainer.check_finite()
        state = {**self.trainer.state_dict(), **self.facts}
        self._by_first(lambda: self._write(_on_cpu(state)))
        self._saved_at = time.monotonic()

    def _write(self, state: dict) -> None:
        try:
            _check_tensors(state)
        except ValueError as error:  # a ruined state must never become the newest
            where = f"epoch {self.trainer.epoch}, step {self.trainer.step}"
            fix = "lower --LR; the last checkpoint is from before"
            raise NonFiniteError(f"the network has {error} at {where}", fix) from error
        self.directory.check_owner()
        path = save(self.directory.path, state, self.keep, self._known)
        self.directory.write_status("running", checkpoint=path.name, **self.trainer.position)

    def _by_first(self, work: Callable[[], None]) -> None:
        """Do `work` in the first process; the others fail as it does."""
        self.trainer.world.from_first(lambda: work() or b"")

    def after_step(self) -> None:
        """Save if it is time; when any process is asked to stop, save and raise Preempted."""
        due = time.monotonic() - self._saved_at >= self.every_s
        number, due = self.trainer.world.maximum(self.stop.number, int(due))
        if number or due:
            self.save()
        if number:
            raise self._preempted(number)

    def stop_if_asked(self) -> None:
        """Raise Preempted when asked to stop; all there is to save has been saved."""
        (number,) = self.trainer.world.maximum(self.stop.number)
        if number:
            raise self._preempted(number)

    def _preempted(self, number: int) -> Preempted:
        name = signal.Signals(number).name
        directory = self.facts["settings"]["save"]
        alone = self.trainer.world.size == 1
        fix = f"python main.py --resume {directory}" if alone else "run it again with --resume auto"
        return Preempted(f"{name}, {directory} is saved", fix)

    def end_epoch(self) -> None:
        """Save the checkpoint and the weights of an epoch that has just been evaluated."""
        self.save()
        self.save_models()

    def save_models(self) -> None:
        """Write `model_last.pt`, and `model_best.pt` if this epoch is the best.

        After the checkpoint, and again when it is resumed: a crash in between loses neither.
        """
        self._by_first(self._write_models)

    def _write_models(self) -> None:
        weights = self.trainer.model.state_dict()
        save_weights(self.directory.path / "model_last.pt", weights)
        if self.trainer.is_best:
            save_weights(self.directory.path / "model_best.pt", weights)
