"""How a run is asked to stop: a signal sets a flag, the training loop acts on it between steps."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PREEMPTED = 75  # the exit code of errors.Preempted: run it again
SAME_REQUEST_S = 2.0  # a launcher repeats what its processes may have been told already
START_UP_S = 20  # for the processes of one run to get to a point where they can stop together
NOTHING_SAVED = "stopped: {}, there was nothing to save; to go on: run it again"
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class Stop:
    """Turns the first signal into a request and the second into an immediate exit.

    Until `armed` is set there is nothing to save, and the first signal ends the process at once.

    Args:
        launched: this is one process of several, which stop together, and which may be told twice:
            by the launcher, and by whoever told the launcher.
        speaks: it is this one that says so.
    """

    def __init__(self, launched: bool = False, speaks: bool = True) -> None:
        self.number = 0  # of the signal that asked to stop
        self.armed = False
        self._launched, self._speaks = launched, speaks
        self._asked_at = 0.0

    def install(self) -> "Stop":
        """Handle SIGINT, SIGTERM, SIGUSR1 and SIGHUP from now on."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, SIGNALS
        )  # distributed/launcher.py has blocked them
        if self._launched:
            self._end_a_long_start()
            end_with_parent()
        return self

    def _on_signal(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if not self.number:
            self.number, self._asked_at = number, time.monotonic()
            if self.armed and self._speaks:
                _tell(f"{name}: finishing the step, then saving; a second signal exits at once")
            elif not self.armed and not self._launched:
                _tell(NOTHING_SAVED.format(name))
                os._exit(PREEMPTED)  # no clean-up: files are whole at every moment
        elif not self._launched or time.monotonic() - self._asked_at > SAME_REQUEST_S:
            os._exit(128 + number)

    def arm(self) -> None:
        """From now on there is something to save, and somebody who looks at `number`."""
        self.armed = True

    @property
    def was_early(self) -> bool:
        """Whether it was asked for while there was nothing to save."""
        return bool(self.number) and not self.armed

    def _end_a_long_start(self) -> None:
        """In a thread: end a process that was asked to stop and cannot do so with the others.

        The main thread may be waiting for them where no handler in Python is called; the number of
        a signal is written to a pipe all the same.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def wait() -> None:
            while (number := os.read(reader, 1)[0]) not in SIGNALS:
                pass
            time.sleep(START_UP_S)
            if not self.armed:
                if self._speaks:
                    _tell(NOTHING_SAVED.format(signal.Signals(number).name))
                os._exit(PREEMPTED)

        threading.Thread(target=wait, daemon=True).start()


def end_with_parent() -> None:
    """Have the kernel send SIGTERM when the launcher is gone, or there would soon be two runs."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it went in between
            os.kill(os.getpid(), signal.SIGTERM)


def hold_standard_files() -> None:
    """Have /dev/null in the place of a standard file that is closed.

    Else the next file opened, a checkpoint say, would be written to by whoever reports an error.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # Ctrl-C also ends the `tee` that standard error may go to
        os.write(2, f"{line}\n".encode())


def ignore_signals() -> None:
    """In a loader process: its parent decides when to stop, also when the whole group is told."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_children() -> None:
    """End the loader processes after a failure: they ignore the signal that exiting sends them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each
    for child in multiprocessing.active_children():
        child.kill()
