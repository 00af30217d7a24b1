"""Handle signals: the first requests a stop, on which the training loop acts between two steps."""

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
DUPLICATE_SIGNAL_S = 2.0  # a launcher repeats signals that its processes may have had already
STARTUP_TIMEOUT_S = 20  # until all processes of a run can stop together
STOPPING = "{}: finishing the step, then saving; a second signal exits at once"
NOTHING_SAVED = "stopped: {}, there was nothing to save; to go on: run it again"
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class SignalHandler:
    """Record the first signal as a request to stop; exit at the second.

    Args:
        has_launcher: a launcher started this process. It stops together with the run's other
            processes, and may get a signal twice, from its sender and from the launcher.
        verbose: print that the process stops.

    Attributes:
        signum: the signal that requested the stop, 0 before.
        can_save: set once the loop runs and reads `signum`; until then there is nothing to save,
            and the first signal ends the process at once.
    """

    def __init__(self, has_launcher: bool = False, verbose: bool = True) -> None:
        self.signum, self.can_save = 0, False
        self._has_launcher, self._verbose = has_launcher, verbose
        self._requested_at = 0.0

    def install(self) -> "SignalHandler":
        """Handle SIGINT, SIGTERM, SIGUSR1 and SIGHUP from now on, but not a SIGHUP under nohup."""
        for signum in SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # launcher.spawn has blocked them
        if self._has_launcher:
            self._startup_watchdog()
            die_with_parent()
        return self

    def _on_signal(self, signum: int, frame: object) -> None:
        if not self.signum:
            self.signum, self._requested_at = signum, time.monotonic()
            if self.can_save:
                self._print(STOPPING, signum)
            elif not self._has_launcher:
                self._exit_unsaved(signum)
        elif not self._has_launcher or time.monotonic() - self._requested_at > DUPLICATE_SIGNAL_S:
            os._exit(128 + signum)

    def _exit_unsaved(self, signum: int) -> None:
        self._print(NOTHING_SAVED, signum)
        os._exit(PREEMPTED)  # no clean-up: every file is complete at any moment

    def _print(self, line: str, signum: int) -> None:
        if self._verbose:
            with contextlib.suppress(OSError):  # Ctrl-C also ends a `tee` that reads stderr
                os.write(2, f"{line.format(signal.Signals(signum).name)}\n".encode())

    def _startup_watchdog(self) -> None:
        """Start a thread that ends the process if it cannot stop together with the others.

        The main thread may be blocked in C code, where Python calls no signal handler. Python
        writes the signal's number to the wakeup pipe nevertheless.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def wait() -> None:
            while (signum := os.read(reader, 1)[0]) not in SIGNALS:
                pass
            time.sleep(STARTUP_TIMEOUT_S)
            if not self.can_save:
                self._exit_unsaved(signum)

        threading.Thread(target=wait, daemon=True).start()


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the launcher exits: a restart would run beside this one."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it exited before the call
            os.kill(os.getpid(), signal.SIGTERM)


def reserve_std_fds() -> None:
    """Open /dev/null for each of stdin, stdout and stderr that is closed.

    Else the next file opened, such as a checkpoint, gets the descriptor, and messages go into it.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor


def ignore_signals() -> None:
    """Ignore signals in a loader process, even to the whole group: its parent decides to stop."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def kill_children() -> None:
    """Kill the loader processes after a failure: they ignore the signal sent at exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each
    for child in multiprocessing.active_children():
        child.kill()
