"""Print a run's results, progress and warnings in the terminal."""

import contextlib
import os
import sys
import time

from errors import printable

SHOW_EVERY_S = {True: 1.0, False: 60.0}  # with a progress bar, without
_silenced = False  # only rank 0 of a run prints


def silence() -> None:
    """Print nothing from now on, on a rank other than 0."""
    global _silenced
    _silenced = True


def info(line: str, escape: bool = True) -> None:
    """Print a line; go on if standard output is closed, since the run may have taken days.

    Args:
        escape: control characters, which names may hold; a line of CSV keeps them.
    """
    line = printable(line) if escape else line
    try:
        if not _silenced:
            # A path may hold characters that the output cannot encode.
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        sys.stdout = None  # makes later calls of print() do nothing


def warn(line: str) -> None:
    """Print a note to standard error, which may be closed as well."""
    with contextlib.suppress(OSError):
        if not _silenced:
            print(f"note: {printable(line)}", file=sys.stderr, flush=True)


class Progress:
    """Show one pass over the data: a bar on a terminal, elsewhere the lines of the Lua code.

    Args:
        name: train, val or test.
        steps, done: number of steps of the pass, and how many of them were done before.
        metrics: of the pass so far, see engine/metrics.py.
    """

    def __init__(self, name: str, epoch: int, steps: int, done: int, metrics):
        self.name, self.epoch, self.metrics = name, epoch, metrics
        self.steps, self.done = steps, done
        self._bar = None
        self._start_interval()

    def _start_interval(self) -> None:
        self._displayed_at = time.monotonic()
        self._interval_steps = self._interval_images = 0
        self._interval_data_s = 0.0

    def __enter__(self) -> "Progress":
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        if not _silenced and is_terminal and os.environ.get("TERM") != "dumb":
            from tqdm import tqdm

            title = f"epoch {self.epoch} {self.name}"
            self._bar = tqdm(
                total=self.steps, initial=self.done, desc=title, unit="step",
                leave=False, dynamic_ncols=True, mininterval=1.0,
            )  # fmt: skip
        elif self.name == "train":
            info(f"=> Training epoch # {self.epoch}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def should_display(self) -> bool:
        """Return whether the next `update` displays the metrics, and so reads the device."""
        if _silenced or self.done + 1 >= self.steps:  # `finish` displays the last step
            return False
        return time.monotonic() - self._displayed_at >= SHOW_EVERY_S[self._bar is not None]

    def update(self, num_images: int, data_s: float, lr: float | None = None) -> None:
        """Count one step of `num_images` that waited `data_s` seconds for its batch."""
        display = self.should_display()
        self.done += 1
        self._interval_steps += 1
        self._interval_images += num_images
        self._interval_data_s += data_s
        if self._bar is not None:
            self._bar.update(1)
        if display:
            self._display(self.metrics, lr)

    def finish(self, metrics, lr: float | None = None) -> None:
        """Display the metrics of the whole pass."""
        if self._interval_steps and not _silenced:
            self._display(metrics, lr)

    def _display(self, metrics, lr: float | None) -> None:
        seconds = max(time.monotonic() - self._displayed_at, 1e-9)
        means = metrics.compute()
        if self._bar is not None:
            speed = f"{self._interval_images / seconds:.0f}"
            postfix = {"loss": f"{means['loss']:.4f}", "error": f"{means['top1']:.2f}%"}
            self._bar.set_postfix({**postfix, "images/s": speed})
        else:
            title = "Epoch" if self.name == "train" else "Test"
            line = (
                f" | {title}: [{self.epoch}][{self.done}/{self.steps}]    "
                f"Time {seconds / self._interval_steps:.3f}  "
                f"Data {self._interval_data_s / self._interval_steps:.3f}  "
                f"Err {means['loss']:1.4f}  "
                f"top1 {means['top1']:7.3f}  top5 {means['top5']:7.3f}"
            )
            info(line + (f"  LR {lr:.6g}" if lr is not None else ""))
        self._start_interval()


def format_test(tested: dict, model: str) -> str:
    """Format the errors on a test set that is measured once, at the end."""
    return f" * Test top1: {tested['test_top1']:6.3f}  top5: {tested['test_top5']:6.3f}  ({model})"


def format_final(last: dict | None, best: dict | None) -> str:
    """Format the last line of a run: the errors of its last epoch and of its best."""

    def labelled(which: str, result: dict | None) -> str:
        if result is None:
            return f"top1:    -    top5:    -    ({which}: none)"
        errors = f"top1: {result['val_top1']:6.3f}  top5: {result['val_top5']:6.3f}"
        return f"{errors}  ({which}: epoch {result['epoch']})"

    return f" * Finished {labelled('last', last)}   {labelled('best', best)}"
