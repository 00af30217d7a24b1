"""The life of a run's processes: starting them, meeting the others, and saying how the run ended.

What is heavy is imported where it is used, so that a mistyped flag is answered at once.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from distributed import launcher
from distributed.signals import kill_children
from errors import Preempted, RunError
from experiment.directory import RunDirectory, write_outcome_for_lost_rank


def spawn_processes(opt: SimpleNamespace, fn: Callable[[], int]) -> int:
    """`--nGPU N`: run N processes of this machine, each on a GPU of its own; the exit code."""
    import engine.device

    engine.device.select(opt.nGPU)  # all of them are there
    return launcher.spawn(opt.nGPU, fn)


def init_processes(opt: SimpleNamespace, process: launcher.ProcessInfo):
    """Meet the other processes of the run, if any: the `World`, and the device of this one."""
    if process.has_launcher:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is loaded

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
    """End a run that is done together with the others; the exit code."""
    with contextlib.suppress(RunError):  # whatever becomes of the others
        world.monitor.shutdown()
    if world.size > 1:
        kill_children()
        _exit_now(code)
    return code


def _exit_now(code: int) -> None:
    """End one of several processes without PyTorch's teardown.

    It may wait for processes that are gone, and a process that had gloo groups may abort in it
    ("terminate called without an active exception", torch 2.11): a finished run would end in 134.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def exit_with_error(
    error: Exception, opt: SimpleNamespace | None, process: launcher.ProcessInfo, world
) -> int:
    """Say on standard error how the run ended, once for all its processes; the exit code."""
    if isinstance(error, Preempted):
        with contextlib.suppress(RunError):  # it is saved, whatever becomes of the others
            world.monitor.shutdown()
    else:
        kill_children()
        if world:
            error = world.monitor.report_failure(
                error
            )  # or what another process has failed with before
    code = error.code if isinstance(error, RunError) else 1
    if isinstance(error, RunError) and _should_report(error, process, world):
        print_error(error)
        if world and not process.is_rank0:  # which is lost
            write_outcome_for_lost_rank(Path(opt.save), error)
    if world and world.size > 1:
        _exit_now(code)
    return code


def _should_report(error: RunError, process: launcher.ProcessInfo, world) -> bool:
    """Whether this is the process that says how the run ended."""
    if world:
        return world.monitor.is_reporter
    if not process.has_launcher:
        return True
    from distributed import rendezvous

    return rendezvous.claim_report(process, error.report())


def print_error(error: RunError) -> None:
    """Print the line, or lines, of an error."""
    with contextlib.suppress(OSError):  # whoever was to read it may be gone
        print(error.report(), file=sys.stderr, flush=True)


def abort(world, directory: RunDirectory | None, error: RunError) -> None:
    """End a process whose main thread waits for what will never come."""
    if directory:
        directory.write_outcome(error)
    if world.monitor.is_reporter:
        print_error(error)
    os._exit(error.code)
