"""What a person sees of a run in a terminal: lines, a progress bar, warnings."""

import contextlib
import os
import sys
import time

from errors import printable

SHOW_EVERY_S = {True: 1.0, False: 60.0}  # on a terminal, elsewhere
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


class Progress:
    """One pass over the data: a bar on a terminal, the lines of the Lua code elsewhere.

    Args:
        name: train, val or test.
        steps, done: of the pass, and of these done before.
        metrics: of the pass so far, see engine/metrics.py.
    """

    def __init__(self, name: str, epoch: int, steps: int, done: int, metrics):
        self.name, self.epoch, self.metrics = name, epoch, metrics
        self.steps, self.done = steps, done
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
            self._show(self.metrics, rate)

    def finish(self, metrics, rate: float | None = None) -> None:
        """Show the result of the whole pass."""
        if self._fresh_steps and not _muted:
            self._show(metrics, rate)

    def _show(self, metrics, rate: float | None) -> None:
        seconds = max(time.monotonic() - self._shown_at, 1e-9)
        means = metrics.compute()
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
