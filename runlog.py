"""What a person sees of a run: console, TensorBoard and log.jsonl. The only part that prints."""

import contextlib
import errno
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from errors import printable
from flags import as_text
from metrics import Sums
from storage import write_whole

SHOW_EVERY_S = {True: 1.0, False: 60.0}  # on a terminal, elsewhere
LOG = "log.jsonl"


_muted = False  # only the first process of a run speaks


def mute() -> None:
    """Print nothing from now on: another process of the run does."""
    global _muted
    _muted = True


def say(line: str) -> None:
    """Print a line; a closed standard output must not end a run of days."""
    try:
        if not _muted:
            # A path may hold what the encoding of the output does not have.
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        sys.stdout = None  # print() to None does nothing from now on


def warn(line: str) -> None:
    """Print a remark to standard error, which may be closed as well."""
    with contextlib.suppress(OSError):
        if not _muted:
            print(f"note: {printable(line)}", file=sys.stderr, flush=True)


class RunLog:
    """The console and the files of one run.

    Args:
        directory: the run directory; None to print only (evaluation without a run).
    """

    def __init__(self, directory: Path | None):
        self.directory = directory
        self._board = None
        self._warned: set[str] = set()

    # ------------------------------------------------------------------------------------ files

    def open(self, next_epoch: int) -> None:
        """Start or continue the files: cut them back to the epochs before `next_epoch`."""
        kept = [line for line in read_log(self.directory) if line["epoch"] < next_epoch]
        lines = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self.directory / LOG, lines.encode())
        self._board = _open_board(self.directory / "tensorboard", next_epoch)

    def epoch(self, record: dict, is_best: bool) -> None:
        """Add one epoch's record to log.jsonl and TensorBoard, and print its result."""
        # NaN is no JSON: a number that is not finite is written as null.
        plain = {key: value if _is_finite(value) else None for key, value in record.items()}
        try:
            _append(self.directory / LOG, json.dumps(plain) + "\n")
        except OSError as error:
            self.warn_once(f"cannot write {self.directory / LOG}: {error.strerror}")

        def scalars(board) -> None:
            for key in record.keys() - {"epoch"}:
                if not isinstance(record[key], str):
                    board.add_scalar(_board_name(key), record[key], record["epoch"])
            board.flush()

        self._on_board(scalars)
        errors = f"top1: {record['val_top1']:7.3f}  top5: {record['val_top5']:7.3f}"
        best = "  (best so far)" if is_best else ""
        say(f" * Finished epoch # {record['epoch']}     {errors}{best}\n")

    def texts(self, **texts: str) -> None:
        """Show texts, such as the config, in TensorBoard."""
        for name, text in texts.items():
            self._on_board(lambda board, n=name, t=text: board.add_text(n, f"```\n{t}\n```", 0))

    def images(self, images: Tensor) -> None:
        """Show a grid of up to 64 images (N, 3, H, W) as the network gets them in TensorBoard."""
        from torchvision.utils import make_grid

        if not len(images):  # every image of the first batch was skipped
            return
        shown = images[:64].float().cpu()
        low, high = shown.min(), shown.max()
        grid = make_grid((shown - low) / (high - low).clamp(min=1e-6), nrow=8)
        self._on_board(lambda board: board.add_image("augmented training images", grid, 0))

    def close(self, settings: dict[str, object], results: dict[str, float]) -> None:
        """End the files of a complete run: TensorBoard gets its settings and final errors."""
        plain = {
            name: as_text(value) if isinstance(value, list) else value
            for name, value in settings.items()
        }
        errors = {f"final/{name}": value for name, value in results.items() if "top" in name}
        self._on_board(lambda board: board.add_hparams(plain, errors, run_name="."))
        self._on_board(lambda board: board.close())
        self._board = None

    def _on_board(self, write: Callable) -> None:
        """Let `write` add to TensorBoard; training never ends because curves cannot be kept."""
        if self._board:
            try:
                write(self._board)
            except Exception as error:  # of a thread that TensorBoard writes in: any kind
                self._board = None
                self.warn_once(f"no TensorBoard from here on: {error}")

    def warn_once(self, line: str) -> None:
        """Say a remark that is true until the end of the run."""
        if line not in self._warned:
            self._warned.add(line)
            warn(f"{line}; training goes on")

    # ---------------------------------------------------------------------------------- console

    def phase(self, name: str, epoch: int, steps: int, done: int, sums: Sums) -> "Progress":
        """The progress of one pass over a split; use as a context manager."""
        return Progress(name, epoch, steps, done, sums)


class Progress:
    """One pass over the data: a bar on a terminal, the lines of the Lua code elsewhere."""

    def __init__(self, name: str, epoch: int, steps: int, done: int, sums: Sums):
        self.name, self.epoch, self.steps, self.done, self.sums = name, epoch, steps, done, sums
        self._bar = None
        self._shown_at = time.monotonic()
        self._fresh_steps = self._fresh_images = 0
        self._fresh_data_s = 0.0

    def __enter__(self) -> "Progress":
        if not _muted and _has_bar():
            from tqdm import tqdm

            title = f"epoch {self.epoch} {self.name}"
            self._bar = tqdm(
                total=self.steps, initial=self.done, desc=title, unit="step",
                leave=False, dynamic_ncols=True, mininterval=1.0,
            )  # fmt: skip
        elif self.name == "train":
            say(f"=> Training epoch # {self.epoch}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def is_due(self) -> bool:
        """Whether the next `update` shows something, and so reads the device."""
        pause = SHOW_EVERY_S[self._bar is not None]
        if _muted or self.done + 1 >= self.steps:  # `finish` shows the last step
            return False
        return time.monotonic() - self._shown_at >= pause

    def update(self, num_images: int, data_s: float, rate: float | None = None) -> None:
        """Count one step of `num_images` that waited `data_s` seconds for its batch."""
        due = self.is_due()
        self.done += 1
        self._fresh_steps += 1
        self._fresh_images += num_images
        self._fresh_data_s += data_s
        if self._bar is not None:
            self._bar.update(1)
        if due:
            self._show(self.sums, rate)

    def finish(self, sums: Sums, rate: float | None = None) -> None:
        """Show the result of the whole pass."""
        if self._fresh_steps and not _muted:
            self._show(sums, rate)

    def _show(self, sums: Sums, rate: float | None) -> None:
        seconds = max(time.monotonic() - self._shown_at, 1e-9)
        means = sums.read()
        if self._bar is not None:
            speed = f"{self._fresh_images / seconds:.0f}"
            shown = {"loss": f"{means['loss']:.4f}", "error": f"{means['top1']:.2f}%"}
            self._bar.set_postfix({**shown, "images/s": speed})
        else:
            title = "Epoch" if self.name == "train" else "Test"
            line = (
                f" | {title}: [{self.epoch}][{self.done}/{self.steps}]    "
                f"Time {seconds / self._fresh_steps:.3f}  "
                f"Data {self._fresh_data_s / self._fresh_steps:.3f}  Err {means['loss']:1.4f}  "
                f"top1 {means['top1']:7.3f}  top5 {means['top5']:7.3f}"
            )
            say(line + (f"  LR {rate:.6g}" if rate is not None else ""))
        self._shown_at = time.monotonic()
        self._fresh_steps = self._fresh_images = 0
        self._fresh_data_s = 0.0


def _has_bar() -> bool:
    """Whether standard error is a terminal that can draw a line anew."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return is_terminal and os.environ.get("TERM") != "dumb"


def tested_line(tested: dict, model: str) -> str:
    """The result on a test set that was kept for the end."""
    return f" * Test top1: {tested['test_top1']:6.3f}  top5: {tested['test_top5']:6.3f}  ({model})"


def finished_line(last: dict | None, best: dict | None) -> str:
    """The last line of a run: the errors of its last epoch and of its best, each labelled."""

    def labelled(which: str, result: dict | None) -> str:
        if result is None:
            return f"top1:    -    top5:    -    ({which}: none)"
        errors = f"top1: {result['val_top1']:6.3f}  top5: {result['val_top5']:6.3f}"
        return f"{errors}  ({which}: epoch {result['epoch']})"

    return f" * Finished {labelled('last', last)}   {labelled('best', best)}"


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


def _board_name(key: str) -> str:
    """train_top1 -> error_top1/train, so that TensorBoard draws the splits together."""
    split, _, name = key.partition("_")
    if split in ("train", "val"):
        return f"{name.replace('top', 'error_top')}/{split}"
    return f"run/{key}"


def _open_board(directory: Path, next_epoch: int):
    """A TensorBoard writer that hides what a killed process wrote of `next_epoch` and later."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _other_threads
        return SummaryWriter(str(directory), purge_step=next_epoch)
    except Exception as error:  # of an installation that does not fit together: any kind
        warn(f"no TensorBoard: {error}; training goes on")
        return None


def _other_threads(failure) -> None:
    """Print what ended a thread, except TensorBoard's: that is raised again at the next write."""
    if "tensorboard" not in type(failure.thread).__module__:
        threading.__excepthook__(failure)
