"""Write the log of a run: one `EpochRecord` a line to log.jsonl, curves to TensorBoard."""

import contextlib
import errno
import json
import math
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from cli.flag_types import as_text
from engine.metrics import Metrics
from experiment import confusion
from experiment.console import Progress, info, warn
from fileio.atomic import atomic_write

LOG = "log.jsonl"


@dataclass(frozen=True)
class EpochRecord:
    """Hold the results of one epoch, a line of log.jsonl; errors (top1, top5) in per cent."""

    epoch: int
    lr: float  # of the epoch's last step
    train_loss: float
    train_top1: float
    train_top5: float
    images_per_s: float  # training images over all processes
    data_wait: float  # fraction of the training time spent waiting for batches
    time_s: float
    val_loss: float
    val_top1: float
    val_top5: float
    val_time_s: float
    memory_mb: float  # peak so far
    device: str
    replicas: int  # number of processes
    torch: str  # PyTorch's version


class RunLog:
    """Log one run to the console and to files in its directory; without one, print only."""

    progress = Progress  # of one pass over a split

    def __init__(self, directory: Path | None):
        self.directory = directory
        self._writer = None
        self._warned: set[str] = set()

    def open(self, next_epoch: int) -> None:
        """Open the files, and drop records at the end that a killed process wrote too early.

        These are of `next_epoch` and later, or torn. All other lines stay, byte by byte.
        """
        path = self.directory / LOG
        found = _read(path)
        lines = _without_tail(found.split(b"\n"), next_epoch)
        if (kept := b"".join(line + b"\n" for line in lines)) != found or not path.exists():
            atomic_write(path, kept)
        damaged = [str(i) for i, line in enumerate(lines, 1) if line.strip() and not _parse(line)]
        if damaged:
            warn(f"{path}: cannot read line {', '.join(damaged[:9])}; kept as it is")
        self._writer = _open_tensorboard(self.directory / "tensorboard", next_epoch)

    def epoch(self, record: EpochRecord, is_best: bool) -> None:
        """Write one epoch's record to log.jsonl and TensorBoard, and print its result."""
        values = asdict(record)
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        # JSON has no NaN: write null for a number that is not finite.
        nulls = {name: None for name, value in numbers.items() if not math.isfinite(value)}
        try:
            _append(self.directory / LOG, json.dumps(values | nulls) + "\n")
        except OSError as error:
            self.warn_once(f"cannot write {self.directory / LOG}: {error.strerror}")
        del numbers["epoch"]
        for name, value in numbers.items():
            self._tensorboard("add_scalar", _tensorboard_tag(name), value, record.epoch)
        self._tensorboard("flush")
        errors = f"top1: {record.val_top1:7.3f}  top5: {record.val_top5:7.3f}"
        best = "  (best so far)" if is_best else ""
        info(f" * Finished epoch # {record.epoch}     {errors}{best}")
        info("")

    def add_text(self, **texts: str) -> None:
        """Write texts, such as the config, to TensorBoard."""
        for name, text in texts.items():
            self._tensorboard("add_text", name, f"```\n{text}\n```", 0)

    def add_images(self, images: Tensor) -> None:
        """Write a grid of up to 64 images (N, C, H, W), as the network sees them."""
        from torchvision.utils import make_grid

        if not len(images):  # every image of the first batch was skipped
            return
        shown = images[:64].float().cpu()
        if shown.shape[1] not in (1, 3):  # nothing says how to show these
            shown = shown.mean(1, keepdim=True)
        low, high = shown.min(), shown.max()
        grid = make_grid((shown - low) / (high - low).clamp(min=1e-6), nrow=8)
        self._tensorboard("add_image", "augmented training images", grid)

    def confusion(self, metrics: Metrics, classes: list[str], phase: str, epoch: int) -> None:
        """Write which class is taken for which to TensorBoard: errors by class, and a picture."""
        if not self._writer or (counts := metrics.confusion()) is None:
            return
        counts = counts.numpy()
        table = confusion.as_markdown(confusion.by_class(confusion.pairs_of(counts), classes))
        self._tensorboard("add_text", f"errors by class/{phase}", "\n".join(table), epoch)
        try:
            from experiment import drawing

            picture = drawing.pixels(drawing.confusion(counts, classes))
        except Exception as error:  # a broken installation raises errors of any kind
            self.warn_once(f"no confusion matrix in TensorBoard: {error}")
        else:
            tag = f"confusion matrix/{phase}"
            self._tensorboard("add_image", tag, picture, epoch, dataformats="HWC")

    def close(self, settings: dict[str, object], results: dict[str, float]) -> None:
        """Write a complete run's settings and final errors to TensorBoard, and close it."""
        # TensorBoard takes no lists.
        flat = {n: as_text(v) if isinstance(v, list) else v for n, v in settings.items()}
        errors = {f"final/{name}": value for name, value in results.items() if "top" in name}
        self._tensorboard("add_hparams", flat, errors, run_name=".")
        self._tensorboard("close")
        self._writer = None

    def _tensorboard(self, method: str, *args: object, **options: object) -> None:
        """Call a method of the TensorBoard writer; if it fails, train on without TensorBoard."""
        if self._writer:
            try:
                getattr(self._writer, method)(*args, **options)
            except Exception as error:  # TensorBoard re-raises any error of its thread
                self._writer = None
                self.warn_once(f"no TensorBoard from here on: {error}")

    def warn_once(self, line: str) -> None:
        """Print a note unless this run has printed it before."""
        if line not in self._warned:
            self._warned.add(line)
            warn(f"{line}; training goes on")


def read_log(directory: Path) -> list[dict]:
    """Read the records of log.jsonl; pass over lines that are none, such as a torn last one."""
    records = map(_parse, _read(directory / LOG).split(b"\n"))
    return [record for record in records if record]


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _parse(line: bytes) -> dict | None:
    """Return the record of a line, or None if it holds none."""
    try:
        # A power cut may leave zeros where a file has grown.
        record = json.loads(line.strip(b"\0").decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and type(record.get("epoch")) is int
    return record if is_record else None


def _without_tail(lines: list[bytes], next_epoch: int) -> list[bytes]:
    """Leave out a torn last line, and the records of `next_epoch` and later at the end."""
    if not _parse(lines[-1]):  # torn, or nothing behind the last line break
        lines = lines[:-1]
    epochs = [(_parse(line) or {}).get("epoch") for line in lines]
    earlier = [i for i, epoch in enumerate(epochs) if epoch is not None and epoch < next_epoch]
    end = earlier[-1] + 1 if earlier else 0
    if earlier and epochs[end - 1] < next_epoch - 1 and epochs[end:] and epochs[end] is not None:
        return lines  # it stands where epoch `next_epoch` - 1 would: its number is damaged
    kept = lines[:end]
    for line, epoch in zip(lines[end:], epochs[end:], strict=True):
        if epoch == next_epoch:
            next_epoch += 1
        else:
            kept.append(line)
    return kept


def _append(path: Path, line: str) -> None:
    """Append a whole line to a file, or nothing."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(line.encode()) < len(line.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def _tensorboard_tag(key: str) -> str:
    """Map train_top1 to error_top1/train, so that TensorBoard draws the splits together."""
    split, _, name = key.partition("_")
    if split in ("train", "val"):
        return f"{name.replace('top', 'error_top')}/{split}"
    return f"run/{key}"


def _open_tensorboard(directory: Path, next_epoch: int):
    """Open TensorBoard; hide what a killed process wrote for `next_epoch` and later."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _thread_excepthook
        return SummaryWriter(str(directory), purge_step=next_epoch)
    except Exception as error:  # a broken installation raises errors of any kind
        warn(f"no TensorBoard: {error}; training goes on")
        return None


def _thread_excepthook(failure) -> None:
    """Print the error of a thread, unless TensorBoard raises it again at the next write."""
    if "tensorboard" not in type(failure.thread).__module__:
        threading.__excepthook__(failure)
