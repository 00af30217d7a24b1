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
DUPLICATE_SIGNAL_S = 2.0  # a launcher repeats what its processes may have been told already
STARTUP_TIMEOUT_S = 20  # until all processes of a run can stop together
NOTHING_SAVED = "stopped: {}, there was nothing to save; to go on: run it again"
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class SignalHandler:
    """Turns the first signal into a request and the second into an immediate exit.

    Until `enable_saving` there is nothing to save, and the first signal ends the process at once.

    Args:
        has_launcher: this is one process of several, which stop together, and which may be told
            twice: by the launcher, and by whoever told the launcher.
        verbose: whether this process prints that it stops.
    """

    def __init__(self, has_launcher: bool = False, verbose: bool = True) -> None:
        self.signum = 0  # of the signal that asked to stop
        self.can_save = False
        self._has_launcher, self._verbose = has_launcher, verbose
        self._requested_at = 0.0

    def install(self) -> "SignalHandler":
        """Handle SIGINT, SIGTERM, SIGUSR1 and SIGHUP from now on."""
        for signum in SIGNALS:
            signal.signal(signum, self._on_signal)
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, SIGNALS
        )  # distributed/launcher.py has blocked them
        if self._has_launcher:
            self._startup_watchdog()
            die_with_parent()
        return self

    def _on_signal(self, signum: int, frame: object) -> None:
        name = signal.Signals(signum).name
        if not self.signum:
            self.signum, self._requested_at = signum, time.monotonic()
            if self.can_save and self._verbose:
                _write_stderr(
                    f"{name}: finishing the step, then saving; a second signal exits at once"
                )
            elif not self.can_save and not self._has_launcher:
                _write_stderr(NOTHING_SAVED.format(name))
                os._exit(PREEMPTED)  # no clean-up: files are whole at every moment
        elif not self._has_launcher or time.monotonic() - self._requested_at > DUPLICATE_SIGNAL_S:
            os._exit(128 + signum)

    def enable_saving(self) -> None:
        """From now on there is something to save, and somebody who looks at `signum`."""
        self.can_save = True

    @property
    def stopped_before_saving(self) -> bool:
        """Whether it was asked for while there was nothing to save."""
        return bool(self.signum) and not self.can_save

    def _startup_watchdog(self) -> None:
        """In a thread: end a process that was asked to stop and cannot do so with the others.

        The main thread may be waiting for them where no handler in Python is called; the number of
        a signal is written to a pipe all the same.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def wait() -> None:
            while (signum := os.read(reader, 1)[0]) not in SIGNALS:
                pass
            time.sleep(STARTUP_TIMEOUT_S)
            if not self.can_save:
                if self._verbose:
                    _write_stderr(NOTHING_SAVED.format(signal.Signals(signum).name))
                os._exit(PREEMPTED)

        threading.Thread(target=wait, daemon=True).start()


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the launcher is gone, or there would soon be two runs."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it went in between
            os.kill(os.getpid(), signal.SIGTERM)


def reserve_std_fds() -> None:
    """Have /dev/null in the place of a standard file that is closed.

    Else the next file opened, a checkpoint say, would be written to by whoever reports an error.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _write_stderr(line: str) -> None:
    with contextlib.suppress(OSError):  # Ctrl-C also ends the `tee` that standard error may go to
        os.write(2, f"{line}\n".encode())


def ignore_signals() -> None:
    """In a loader process: its parent decides when to stop, also when the whole group is told."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def kill_children() -> None:
    """End the loader processes after a failure: they ignore the signal that exiting sends them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each
    for child in multiprocessing.active_children():
        child.kill()
