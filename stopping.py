"""How a run is asked to stop: a signal sets a flag, the training loop acts on it between steps."""

import contextlib
import multiprocessing
import os
import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Stop:
    """Turns the first signal into a request and the second into an immediate exit.

    Until `armed` is set there is nothing to save, and the first signal ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: str | None = None  # name of the signal that asked to stop
        self.armed = False

    def install(self) -> "Stop":
        """Handle SIGINT, SIGTERM, SIGUSR1 and SIGHUP from now on."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if self.signal is None and self.armed:
            self.signal = name
            _tell(f"{name}: finishing the step, then saving; a second signal exits at once")
            return
        if self.signal is None:
            _tell(f"stopped: {name}, there was nothing to save; to go on: run it again")
        os._exit(128 + number)  # no clean-up: files are whole at every moment


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # Ctrl-C also ends the `tee` that standard error may go to
        os.write(2, f"{line}\n".encode())


def ignore_signals() -> None:
    """In a loader process: its parent decides when to stop, also when the whole group is told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def kill_children() -> None:
    """End the loader processes after a failure: they ignore the signal that exiting sends them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each
    for child in multiprocessing.active_children():
        child.kill()
