"""The log of a run: an `EpochRecord` a line in log.jsonl, the curves in TensorBoard."""

import contextlib
import errno
import json
import math
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from cli.flag_types import as_text
from engine.metrics import Metrics
from experiment.console import Progress, info, warn
from fileio.atomic import atomic_write

LOG = "log.jsonl"


@dataclass(frozen=True)
class EpochRecord:
    """A line of log.jsonl: what an epoch came to. Errors are in per cent.

    Args:
        epoch: from 1.
        lr: learning rate of its last step.
        images_per_s: trained, over all processes.
        data_wait: share of the training time that was spent waiting for batches.
        time_s, val_time_s: seconds of training and of evaluation.
        memory_mb: most memory in use so far, in MB.
        device: in words.
        replicas: processes of the run.
        torch: PyTorch's version.
    """

    epoch: int
    lr: float
    train_loss: float
    train_top1: float
    train_top5: float
    images_per_s: float
    data_wait: float
    time_s: float
    val_loss: float
    val_top1: float
    val_top5: float
    val_time_s: float
    memory_mb: float
    device: str
    replicas: int
    torch: str


class RunLog:
    """The console and the files of one run.

    Args:
        directory: the run directory; None to print only (evaluation without a run).
    """

    def __init__(self, directory: Path | None):
        self.directory = directory
        self._writer = None
        self._warned: set[str] = set()

    # ------------------------------------------------------------------------------------ files

    def open(self, next_epoch: int) -> None:
        """Start or continue the files: cut them back to the epochs before `next_epoch`."""
        kept = [line for line in read_log(self.directory) if line["epoch"] < next_epoch]
        lines = "".join(json.dumps(line) + "\n" for line in kept)
        atomic_write(self.directory / LOG, lines.encode())
        self._writer = _open_tensorboard(self.directory / "tensorboard", next_epoch)

    def epoch(self, record: EpochRecord, is_best: bool) -> None:
        """Add one epoch's record to log.jsonl and TensorBoard, and print its result."""
        values = asdict(record)
        # NaN is no JSON: a number that is not finite is written as null.
        jsonable = {key: value if _is_finite(value) else None for key, value in values.items()}
        try:
            _append(self.directory / LOG, json.dumps(jsonable) + "\n")
        except OSError as error:
            self.warn_once(f"cannot write {self.directory / LOG}: {error.strerror}")

        def scalars(writer) -> None:
            for key in values.keys() - {"epoch"}:
                if not isinstance(values[key], str):
                    writer.add_scalar(_tensorboard_tag(key), values[key], record.epoch)
            writer.flush()

        self._with_tensorboard(scalars)
        errors = f"top1: {record.val_top1:7.3f}  top5: {record.val_top5:7.3f}"
        best = "  (best so far)" if is_best else ""
        info(f" * Finished epoch # {record.epoch}     {errors}{best}\n")

    def add_text(self, **texts: str) -> None:
        """Show texts, such as the config, in TensorBoard."""
        for name, text in texts.items():
            self._with_tensorboard(
                lambda writer, n=name, t=text: writer.add_text(n, f"```\n{t}\n```", 0)
            )

    def add_images(self, images: Tensor) -> None:
        """Show a grid of up to 64 images (N, 3, H, W) as the network gets them in TensorBoard."""
        from torchvision.utils import make_grid

        if not len(images):  # every image of the first batch was skipped
            return
        shown = images[:64].float().cpu()
        low, high = shown.min(), shown.max()
        grid = make_grid((shown - low) / (high - low).clamp(min=1e-6), nrow=8)
        self._with_tensorboard(
            lambda writer: writer.add_image("augmented training images", grid, 0)
        )

    def close(self, settings: dict[str, object], results: dict[str, float]) -> None:
        """End the files of a complete run: TensorBoard gets its settings and final errors."""
        jsonable = {
            name: as_text(value) if isinstance(value, list) else value
            for name, value in settings.items()
        }
        errors = {f"final/{name}": value for name, value in results.items() if "top" in name}
        self._with_tensorboard(lambda writer: writer.add_hparams(jsonable, errors, run_name="."))
        self._with_tensorboard(lambda writer: writer.close())
        self._writer = None

    def _with_tensorboard(self, write: Callable) -> None:
        """Let `write` add to TensorBoard; training never ends because curves cannot be kept."""
        if self._writer:
            try:
                write(self._writer)
            except Exception as error:  # of a thread that TensorBoard writes in: any kind
                self._writer = None
                self.warn_once(f"no TensorBoard from here on: {error}")

    def warn_once(self, line: str) -> None:
        """Say a remark that is true until the end of the run."""
        if line not in self._warned:
            self._warned.add(line)
            warn(f"{line}; training goes on")

    # ---------------------------------------------------------------------------------- console

    def progress(
        self, name: str, epoch: int, steps: int, done: int, metrics: Metrics
    ) -> "Progress":
        """The progress of one pass over a split; use as a context manager."""
        return Progress(name, epoch, steps, done, metrics)


def read_log(directory: Path) -> list[dict]:
    """The records of a run's log.jsonl; a last line cut off by a crash is left out."""
    path = directory / LOG
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
            break
        records.append(record)
    return records


def _append(path: Path, line: str) -> None:
    """Add a whole line to a file, or nothing of it."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(line.encode()) < len(line.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def _is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _tensorboard_tag(key: str) -> str:
    """train_top1 -> error_top1/train, so that TensorBoard draws the splits together."""
    split, _, name = key.partition("_")
    if split in ("train", "val"):
        return f"{name.replace('top', 'error_top')}/{split}"
    return f"run/{key}"


def _open_tensorboard(directory: Path, next_epoch: int):
    """A TensorBoard writer that hides what a killed process wrote of `next_epoch` and later."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _thread_excepthook
        return SummaryWriter(str(directory), purge_step=next_epoch)
    except Exception as error:  # of an installation that does not fit together: any kind
        warn(f"no TensorBoard: {error}; training goes on")
        return None


def _thread_excepthook(failure) -> None:
    """Print what ended a thread, except TensorBoard's: that is raised again at the next write."""
    if "tensorboard" not in type(failure.thread).__module__:
        threading.__excepthook__(failure)
