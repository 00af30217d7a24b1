"""Test that a call that takes too long or too much is stopped, and leaves nothing behind."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from fileio import limits
from helpers.run_main import ROOT


def settings() -> tuple:
    """Return the settings that the limits change for a while."""
    return (
        signal.getsignal(signal.SIGPROF),
        signal.getitimer(signal.ITIMER_PROF)[1],
        resource.getrlimit(resource.RLIMIT_AS),
    )


def test_a_long_computation_is_stopped():
    before = settings()
    with pytest.raises(TimeoutError, match="more than 0 s"), limits.time_limit(0.05):
        while True:
            pass
    assert settings() == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_a_long_wait_is_not_stopped():
    with limits.time_limit(0.1):
        time.sleep(0.3)


def test_the_time_of_other_threads_does_not_count():
    """Exclude those of OpenMP, which may wait in a loop for their next work."""
    over = threading.Event()

    def compute() -> None:
        while not over.is_set():
            hashlib.sha256(bytes(2**20))  # without the interpreter's lock

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    since = time.process_time()
    try:
        with limits.time_limit(0.1):
            while time.process_time() - since < 0.4:
                time.sleep(0.01)
    finally:
        over.set()
        for thread in threads:
            thread.join()


def alone(check: Callable[[], None]) -> None:
    """Run a function of this file in a process of its own.

    One that has run other tests may have freed much memory and kept it, and needs no more.
    """
    code = f"from tests.fileio import test_limits; test_limits.{check.__name__}()"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    subprocess.run(command, env=environment, check=True, capture_output=True)


def one_limit() -> None:
    before = settings()
    with limits.memory_limit(2**26):
        bytearray(2**24)
        with pytest.raises(MemoryError):
            bytearray(2**28)
    assert settings() == before
    bytearray(2**28)


def limit_within_a_lower_one() -> None:
    with limits.memory_limit(2**26), limits.memory_limit(2**30), pytest.raises(MemoryError):
        bytearray(2**28)


def no_limit() -> None:
    with pytest.raises(MemoryError):
        bytearray(2**28)


def test_a_large_allocation_is_stopped():
    alone(one_limit)
    with pytest.raises(subprocess.CalledProcessError):
        alone(no_limit)


def test_a_limit_within_a_lower_one_does_not_raise_it():
    alone(limit_within_a_lower_one)


def test_both_limits_end_with_an_error_of_any_kind():
    before = settings()
    with pytest.raises(KeyError), limits.time_limit(60), limits.memory_limit(2**26):
        raise KeyError
    assert settings() == before


def test_files_are_allowed_up_to_the_limit_of_the_system():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = len(os.listdir("/dev/fd")) + 100
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
        limits.allow_open_files(10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (low, hard)  # there is room
        limits.allow_open_files(200)
        assert low + 90 < resource.getrlimit(resource.RLIMIT_NOFILE)[0] < low + 110
        if hard != resource.RLIM_INFINITY:
            with pytest.raises(OSError, match=f"the limit is {hard}"):
                limits.allow_open_files(hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("quota", "wanted"), [
    ("150000 100000", 1), ("250000 100000", 2), ("50000 100000", 1), ("max 100000", 4), (None, 4),
])  # fmt: skip
def test_a_container_of_few_cores_counts_as_such(tmp_path, monkeypatch, quota, wanted):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    monkeypatch.setattr(limits, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota:
        limits.CPU_QUOTA.write_text(quota)
    assert limits.usable_cores() == wanted
