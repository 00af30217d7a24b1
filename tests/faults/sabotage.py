"""What tests do to a run from inside it: picklable functions for `run_main.run(argv, sabotage)`.

`at_batch` and `on_files` wait for a moment and then call an action; both take the action first, so
that a test reads `partial(at_batch, kill, k=3)`.
"""

import builtins
import ctypes
import functools
import importlib
import itertools
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# --------------------------------------------------------------------------------------- actions


def kill() -> None:
    """What the out-of-memory killer does to this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(seconds: float) -> None:
    """The same, a moment later, wherever the main thread is then."""
    threading.Thread(target=lambda: (time.sleep(seconds), kill()), daemon=True).start()


def send(number: int) -> None:
    """A signal to this process."""
    os.kill(os.getpid(), number)


def send_to_group(number: int) -> None:
    """A signal to this process and its loader processes; the group must be its own."""
    os.killpg(0, number)


def kill_a_child() -> None:
    """What the out-of-memory killer does to a loader process."""
    os.kill(int(Path("/proc/thread-self/children").read_text().split()[0]), signal.SIGKILL)


def note_time(report: Path) -> None:
    """Write what the clock that all processes share says."""
    report.write_text(repr(time.monotonic()))


def refuse(number: int) -> None:
    """What the operating system answers instead of doing what was asked."""
    raise OSError(number, os.strerror(number))


def ask_for_tensors() -> None:
    """A tensor that no machine has room for."""
    import torch

    torch.empty(2**50)


def ask_for_bytes() -> None:
    """The same of Python."""
    bytearray(2**60)


def fill_the_gpu() -> None:
    """What PyTorch raises when a GPU has no memory left."""
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


# --------------------------------------------------------------------------------------- moments


def both(*sabotages: Callable[[], None]) -> None:
    """Several at once."""
    for sabotage in sabotages:
        sabotage()


def at_batch(action: Callable[[], None], k: int = 1, phase: str = "train") -> None:
    """Call `action` within the k-th batch of `phase`: train, val or any."""
    import torch

    from engine import metrics

    add, batches = metrics.Metrics.add, itertools.count(1)

    def add_and_act(self, *args) -> None:
        now = "train" if torch.is_grad_enabled() else "val"
        if phase in ("any", now) and next(batches) == k:
            action()
        add(self, *args)

    metrics.Metrics.add = add_and_act


def before_call(action: Callable[[], None], function: Callable, k: int = 1) -> None:
    """Call `action` before the k-th call of a function of a module or method of a class."""
    *owners, last = function.__qualname__.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(function.__module__))
    calls = itertools.count(1)

    def act_and_call(*args, **kwargs):
        if next(calls) == k:
            action()
        return function(*args, **kwargs)

    setattr(owner, last, act_and_call)


def replace_everywhere(function: Callable, substitute: Callable) -> None:
    """Replace a function in every module that has it, under whatever name it was imported."""
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items() if hasattr(module, "__dict__") else ()):
            if value is function:
                setattr(module, name, substitute)


def on_files(
    action: Callable[[], None],
    directory: Path,
    *,
    operation: str = "",
    name: str = "(?!tensorboard)",
    k: int = 1,
) -> None:
    """Call `action` at the k-th operation on a file below `directory`.

    Args:
        operation: open, write (half of it is done by then), fsync, rename (to that name), remove
            or mkdir; all of them by default.
        name: a pattern of the path below `directory`.
    """
    matches = itertools.count(1)

    def act(now: str, path: str) -> None:
        if operation in ("", now) and re.match(name, path) and next(matches) == k:
            action()

    _watch(directory, act)


def record_files(directory: Path, report: Path) -> None:
    """Write each operation that `on_files` would count to `report`, a line each."""
    descriptor = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def act(operation: str, path: str) -> None:
        if not path.startswith("tensorboard"):
            os.write(descriptor, f"{operation} {path}\n".encode())

    _watch(directory, act)


def record_disk_use(directory: Path, report: Path) -> None:
    """Write the most bytes that checkpoints and models take at any moment, also unfinished ones."""
    most = 0

    def act(operation: str, path: str) -> None:
        nonlocal most
        now = sum(path.stat().st_size for path in directory.glob("*.pt*"))
        if now > most:
            most = now
            report.write_text(str(most))

    _watch(directory, act)


def record_losses(report: Path) -> None:
    """Write number, loss and time of each training step to `report`, a line each."""
    import torch
    import torch.nn.functional as F

    from train import Trainer

    descriptor = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    cross_entropy, train, last = F.cross_entropy, Trainer.train, [0.0]

    def remembered(*args, **kwargs):
        loss = cross_entropy(*args, **kwargs)
        if torch.is_grad_enabled():
            last[0] = loss.item()
        return loss

    def recorded(self, loader, on_step_end):
        def after() -> None:
            line = f"{self.global_step} {last[0].hex()} {time.monotonic()!r}\n"
            os.write(descriptor, line.encode())
            on_step_end()

        return train(self, loader, after)

    F.cross_entropy, Trainer.train = remembered, recorded


def _watch(directory: Path, act: Callable[[str, str], None]) -> None:
    """Call `act(operation, path below directory)` before each operation on a file."""
    root = os.path.abspath(directory)

    def seen(operation: str, path: object) -> None:
        path = os.path.abspath(os.fsdecode(path))
        if path == root or path.startswith(root + os.sep):
            act(operation, os.path.relpath(path, root))

    events = {"open": ("open", 0), "os.rename": ("rename", 1), "os.remove": ("remove", 0),
              "os.mkdir": ("mkdir", 0)}  # fmt: skip

    def hook(event: str, args: tuple) -> None:
        if event in events:
            operation, place = events[event]
            if not isinstance(args[place], int):
                seen(operation, args[place])

    open_ = builtins.open

    def watched_fsync(file) -> None:
        number = file if isinstance(file, int) else file.fileno()
        seen("fsync", os.readlink(f"/proc/self/fd/{number}"))  # and no_fsync

    def watched_open(file, mode="r", *args, **kwargs):
        opened = open_(file, mode, *args, **kwargs)
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return opened
        return _Writing(opened, partial(seen, "write", file))

    os.fsync, builtins.open = watched_fsync, watched_open
    sys.addaudithook(hook)


class _Writing:
    """A file that is written in two halves, with a call between them."""

    def __init__(self, file, between: Callable[[], None]):
        self._file, self._between = file, between

    def write(self, data) -> int:
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._between()
        self._file.write(data[half:])
        return len(data)

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


# ------------------------------------------------------------------------------------ conditions


def no_fsync() -> None:
    """Do not wait for the disk: a killed process loses nothing by it, a test saves time."""
    os.fsync = lambda file: None


def own_group() -> None:
    """Leave the tests' process group, so that a signal to the group is only this run's."""
    os.setpgid(0, 0)


def environment(**values: str) -> None:
    """Set environment variables."""
    os.environ.update(values)


def nan_loss(k: int) -> None:
    """Make the loss of the k-th training step NaN."""
    import torch
    import torch.nn.functional as F

    cross_entropy, steps = F.cross_entropy, itertools.count(1)

    def spoilt(*args, **kwargs):
        loss = cross_entropy(*args, **kwargs)
        return loss * float("nan") if torch.is_grad_enabled() and next(steps) == k else loss

    F.cross_entropy = spoilt


def forget_rng() -> None:
    """Resume without the state of torch's generator, as careless trainers do."""
    import torch

    torch.set_rng_state = lambda state: None


def forget_position() -> None:
    """Resume in the middle of an epoch with the first batch of it."""
    from datasets.file_loader import FileLoader
    from datasets.memory_loader import MemoryLoader

    def from_the_first(batches):
        return lambda self, epoch, start=0: batches(self, epoch, 0)

    for kind in (MemoryLoader, FileLoader):
        kind.batches = from_the_first(kind.batches)


def pause_at_end_of(epoch: int, ready: Path, leave: bool = False) -> None:
    """Make `ready` and wait for SIGUSR2 before the end of an epoch is saved; then `leave`."""
    from checkpoints import CheckpointSaver

    on_epoch_end, epochs = CheckpointSaver.on_epoch_end, itertools.count(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    ctypes.CDLL(None).prctl(0x59616D61, -1, 0, 0, 0)  # PR_SET_PTRACER: any process may trace this

    def paused(self) -> None:
        here = next(epochs) == epoch
        if here:
            ready.touch()
            signal.sigwait({signal.SIGUSR2})
        on_epoch_end(self)
        if here and leave:
            os._exit(0)

    CheckpointSaver.on_epoch_end = paused


def limit_file_size(size: int) -> None:
    """A disk that is full after `size` bytes of any one file (Python ignores SIGXFSZ)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_memory(more: int) -> None:
    """Allow `more` bytes of address space than are in use now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)


def limit_files(more: int, soft: bool = False) -> None:
    """Allow `more` open files than there are now; `soft`: a process may raise it itself."""
    used = max(map(int, os.listdir("/proc/self/fd")))
    while os.open(os.devnull, os.O_RDONLY) <= used:  # fill what is free below
        pass
    limit, hard = used + 2 + more, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard if soft else limit))


def turn_the_clock_back() -> None:
    """A clock that is set back by an hour whenever it is looked at."""
    calls = itertools.count(1)
    now = time.time()
    time.time = lambda: now - 3600 * next(calls)


def close_standard_files(*numbers: int) -> None:
    """As after `<&- >&- 2>&-` or some of these."""
    for number in numbers:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)


def close_pipes() -> None:
    """Standard output and error are pipes whose reader is gone, as of `| tee` after Ctrl-C."""
    import main

    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    run = main.main

    def run_and_reopen(argv: list[str]) -> int:
        code = run(argv)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the harness flushes them)
        return code

    main.main = run_and_reopen


def mount(directory: Path, options: str, read_only: bool = False) -> None:
    """Put an empty tmpfs over `directory`, visible to this process alone.

    Raises:
        PermissionError: this system does not let the tests do it.
    """
    libc, new_mounts, new_user = ctypes.CDLL(None, use_errno=True), 0x20000, 0x10000000
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_mounts) != 0:
        if libc.unshare(new_mounts | new_user) != 0:
            raise PermissionError("no mount namespace")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    private, flags = 0x44000, 1 if read_only else 0  # MS_PRIVATE | MS_REC, MS_RDONLY
    done = libc.mount(b"none", b"/", None, private, None) == 0 and (
        libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", flags, options.encode()) == 0
    )
    if not done:
        raise PermissionError("no mount")
