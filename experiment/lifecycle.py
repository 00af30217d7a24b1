"""Start the processes of a run, connect them, and report how the run ended.

Functions import torch where they need it, so that a mistyped flag is reported at once.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from distributed import launcher
from distributed.signals import kill_children
from errors import Preempted, RunError, UsageError
from experiment.directory import RunDirectory, write_outcome_for_lost_rank

MIN_TORCH = (2, 11)  # the oldest version that the tests have run on


def check_torch() -> None:
    """Raise UsageError if PyTorch is missing or too old."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UsageError("PyTorch is not installed", "pip install -r requirements.txt") from error
    # Only these: 2.11.0a0 is the name that some vendors give to their build of 2.11.
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if tuple(map(int, release.groups())) < MIN_TORCH:
        what = f"PyTorch {torch.__version__} is older than {'.'.join(map(str, MIN_TORCH))}"
        raise UsageError(what, "pip install -r requirements.txt")


def spawn_processes(opt: SimpleNamespace, fn: Callable[[], int]) -> int:
    """Run `--nGPU N` processes on this machine, one for each GPU; return the exit code."""
    check_torch()
    import engine.device

    engine.device.select(opt.nGPU)  # raises if there are fewer, or none can be used
    return launcher.spawn(opt.nGPU, fn)


def init_processes(opt: SimpleNamespace, process: launcher.ProcessInfo):
    """Connect to the other processes, if any; return the `World` and this one's device."""
    if process.has_launcher:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported
    check_torch()

    import engine.device
    from distributed import rendezvous
    from experiment import console

    device = engine.device.select(opt.nGPU, process)
    engine.device.configure(opt.cudnn, opt.tf32)
    if not process.is_rank0:
        console.silence()
    world = rendezvous.init_process_group(process, device, opt.timeout)
    notes = list(opt.notes)
    if process.has_launcher and opt.nGPU not in (None, 0, process.local_size):
        started = f"{process.local_size} processes were started on this machine"
        notes.append(f"nGPU {opt.nGPU} has no effect: {started}")
    for note in notes:
        console.warn(note)
    return world, device


def exit_with_code(code: int, world) -> int:
    """Exit together with the other processes of a run that is done; return the exit code."""
    with contextlib.suppress(RunError):  # the run is done even if a peer fails now
        world.monitor.shutdown()
    if world.size > 1:
        kill_children()
    return _exit(code, world)


def _exit(code: int, world) -> int:
    """Return the exit code, but exit one of several processes without PyTorch's teardown.

    The teardown may wait for lost peers, and may abort a process that had gloo groups ("terminate
    called without an active exception", torch 2.11): a finished run would exit with 134.
    """
    if world and world.size > 1:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def exit_with_error(
    error: Exception, opt: SimpleNamespace | None, process: launcher.ProcessInfo, world
) -> int:
    """Print how the run ended, on one process of it, and return the exit code."""
    # Tell the other processes; one of them may have failed before, and then its error counts.
    if isinstance(error, Preempted):
        with contextlib.suppress(RunError):  # the run is saved even if a peer fails now
            world.monitor.shutdown()
    else:
        kill_children()
        error = world.monitor.report_failure(error) if world else error
    # Report it once.
    if isinstance(error, RunError) and _should_report(error, process, world):
        _print_error(error)
        if world and not process.is_rank0:  # rank 0 is lost
            write_outcome_for_lost_rank(Path(opt.save), error)
    return _exit(error.code if isinstance(error, RunError) else 1, world)


def _should_report(error: RunError, process: launcher.ProcessInfo, world) -> bool:
    if world:
        return world.monitor.is_reporter
    if not process.has_launcher:
        return True
    from distributed import rendezvous

    return rendezvous.claim_report(error.report())


def _print_error(error: RunError) -> None:
    with contextlib.suppress(OSError):  # the reader of standard error may have exited
        print(error.report(), file=sys.stderr, flush=True)


def abort(world, directory: RunDirectory | None, error: RunError) -> None:
    """Abort this process, whose main thread is blocked in a collective that cannot complete."""
    if directory:
        directory.write_outcome(error)
    if world.monitor.is_reporter:
        _print_error(error)
    os._exit(error.code)
