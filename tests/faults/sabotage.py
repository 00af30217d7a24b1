"""Inject faults into a run from inside its process, by picklable functions for `run_main.run`.

An action does something now. A moment, such as `at_batch`, calls an action later on; it takes the
action first, so that a test reads `partial(at_batch, kill, k=3)`.
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
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# The functions of the program that tests replace or wrap: {what it does: (module, name)}.
HOOKS = {
    "run the program": ("main", "main"),
    "end the process": ("experiment.lifecycle", "_exit"),
    "agree on the attempt id": ("distributed.rendezvous", "_attempt_id"),
    "hash the code": ("distributed.rendezvous", "code_version"),
    "broadcast a result of rank 0": ("distributed.world", "World.broadcast_result"),
    "create the data": ("datasets.factory", "create"),
    "create the network": ("models.factory", "create"),
    "generate images": ("datasets.synthetic", "_noisy"),
    "decode an image": ("datasets.pipelines", "decode_region"),
    "take a batch from memory": ("datasets.memory_loader", "MemoryLoader.make_batch"),
    "take a batch from the loader processes": ("datasets.file_loader", "FileLoader._finish"),
    "iterate over memory": ("datasets.memory_loader", "MemoryLoader.batches"),
    "iterate over files": ("datasets.file_loader", "FileLoader.batches"),
    "find a checkpoint": ("experiment.resume", "find_checkpoint"),
    "restore a checkpoint": ("experiment.resume", "restore"),
    "train an epoch": ("train", "Trainer.train"),
    "train a batch": ("train", "Trainer._train_step"),
    "count a batch": ("engine.metrics", "Metrics.add"),
    "sum the gradients": ("engine.gradients", "GradientReducer.reduce"),
    "choose eager or captured steps": ("engine.cuda_graph", "make_capturer"),
    "divide a batch among processes": ("distributed.world", "BatchShard.set_sizes"),
    "save the end of an epoch": ("checkpoints", "CheckpointSaver.on_epoch_end"),
    "compute a loss": ("torch.nn.functional", "cross_entropy"),
    "compute the gradients": ("torch", "Tensor.backward"),
    "update the weights": ("torch.optim", "SGD.step"),
    "read the tensors": ("torch", "load"),
    "open TensorBoard": ("torch.utils.tensorboard", "SummaryWriter"),
    "count the GPUs": ("torch.cuda", "device_count"),
}
# The time limits of the program that tests shorten: {of what: (module, name)}.
LIMITS = {
    "end after a lost process": ("distributed.peer_monitor", "ABORT_GRACE_S"),
    "rendezvous": ("distributed.rendezvous", "RENDEZVOUS_TIMEOUT_S"),
    "stop while starting": ("distributed.signals", "STARTUP_TIMEOUT_S"),
    "repeat a signal": ("distributed.signals", "DUPLICATE_SIGNAL_S"),
    "wait for a loader process": ("datasets.file_loader", "WORKER_TIMEOUT_S"),
    "wait for a server": ("datasets.download", "TIMEOUT_S"),
    "pause between downloads": ("datasets.download", "RETRY_DELAY_S"),
    "read a checkpoint": ("fileio.tensor_files", "READ_S"),
}


def replace(hook: str, make: Callable[[Callable], object]) -> None:
    """Put `make(function)` in the place of a function in HOOKS."""
    module, name = HOOKS[hook]
    *owners, last = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, last, make(getattr(owner, last)))


def shorten(limits: dict[str, float]) -> None:
    """Set time limits in LIMITS, in seconds."""
    for limit, seconds in limits.items():
        module, name = LIMITS[limit]
        setattr(importlib.import_module(module), name, seconds)


# Actions:
def send(*numbers: int) -> None:
    """Send signals to this process."""
    for number in numbers:
        os.kill(os.getpid(), number)


# As the out-of-memory killer, a segmentation fault and a batch system do.
kill, crash, stop = (partial(send, n) for n in (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP))
send_to_group = partial(os.killpg, 0)  # with its loader processes; the group must be its own
hang = partial(time.sleep, 600)  # longer than any test takes


def kill_after(seconds: float) -> None:
    """Kill this process a moment later, wherever its main thread is then."""
    threading.Thread(target=lambda: (time.sleep(seconds), kill()), daemon=True).start()


def kill_a_child() -> None:
    """Do what the out-of-memory killer does to a loader process."""
    os.kill(int(Path("/proc/thread-self/children").read_text().split()[0]), signal.SIGKILL)


def wait_for(path: Path) -> None:
    """Hold this thread until there is a file, or for longer than any test takes."""
    for _ in range(60_000):
        if path.exists():
            return
        time.sleep(0.01)


def note_time(report: Path) -> None:
    """Write the time of the clock that all processes share."""
    report.write_text(repr(time.monotonic()))


def refuse(number: int) -> None:
    """Raise the error of the operating system instead of calling it."""
    raise OSError(number, os.strerror(number))


def fail(kind: str, text: str = "out of luck") -> None:
    """Raise an error of the program, or another one, that names this process."""
    import errors

    text = f"{text} in process {os.environ.get('RANK', '0')}"
    if hasattr(errors, kind):
        raise getattr(errors, kind)(text, "bring luck")
    raise getattr(builtins, kind)(text)


def ask_for_tensors() -> None:
    """Allocate a tensor that no machine has room for."""
    import torch

    torch.empty(2**50)


def fill_the_gpu() -> None:
    """Raise the error of PyTorch for a GPU that has no memory left."""
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


# Moments:
def both(*sabotages: Callable[[], None]) -> None:
    """Call several functions."""
    for sabotage in sabotages:
        sabotage()


def at_call(
    action: Callable[[], None], hook: str, k: int = 1, counts: Callable[[], bool] = lambda: True
) -> None:
    """Call `action` before the k-th call of a function in HOOKS, of those for which `counts()`."""
    calls = itertools.count(1)

    def acting(function: Callable) -> Callable:
        def act_and_call(*args, **kwargs):
            if counts() and next(calls) == k:
                action()
            return function(*args, **kwargs)

        return act_and_call

    replace(hook, acting)


def at_batch(action: Callable[[], None], k: int = 1, phase: str = "train") -> None:
    """Call `action` within the k-th batch of `phase`: train, val or any."""
    at_call(action, "count a batch", k, lambda: phase in ("any", _phase()))


def _phase() -> str:
    import torch

    return "train" if torch.is_grad_enabled() else "val"


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


def _watch(directory: Path, act: Callable[[str, str], None]) -> None:
    """Call `act(operation, path below directory)` before each operation on a file."""
    root = os.path.abspath(directory)

    def seen(operation: str, path: object) -> None:
        path = os.path.abspath(os.fsdecode(path))
        if path == root or path.startswith(root + os.sep):
            act(operation, os.path.relpath(path, root))

    # Audit events, with the index of the path among their arguments.
    events = {"open": ("open", 0), "os.rename": ("rename", 1), "os.remove": ("remove", 0),
              "os.mkdir": ("mkdir", 0)}  # fmt: skip

    def hook(event: str, args: tuple) -> None:
        if event in events:
            operation, index = events[event]
            if not isinstance(args[index], int):
                seen(operation, args[index])

    open_ = builtins.open

    def watched_fsync(file) -> None:
        number = file if isinstance(file, int) else file.fileno()
        seen("fsync", os.readlink(f"/proc/self/fd/{number}"))  # and no fsync, as in no_fsync

    def watched_open(file, mode="r", *args, **kwargs):
        opened = open_(file, mode, *args, **kwargs)
        if not isinstance(file, int) and set(mode) & set("wax+"):
            opened.write = partial(in_halves, file, opened.write, opened.flush)
        return opened

    def in_halves(file, write: Callable, flush: Callable, data) -> int:
        half = len(data) // 2
        write(data[:half])
        flush()
        seen("write", file)
        write(data[half:])
        return len(data)

    os.fsync, builtins.open = watched_fsync, watched_open
    sys.addaudithook(hook)


# Reports:
def _appending(report: Path) -> Callable[[str], None]:
    """Return a function that appends a line to a file, which survives a SIGKILL."""
    descriptor = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    return lambda line: os.write(descriptor, f"{line}\n".encode())


def record_files(directory: Path, report: Path) -> None:
    """Write each operation that `on_files` would count to `report`, a line each."""
    append = _appending(report)

    def act(operation: str, path: str) -> None:
        if not path.startswith("tensorboard"):
            append(f"{operation} {path}")

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
    append, last = _appending(report), [0.0]

    def remembering(cross_entropy: Callable) -> Callable:
        def remembered(*args, **kwargs):
            loss = cross_entropy(*args, **kwargs)
            if _phase() == "train":
                last[0] = loss.item()
            return loss

        return remembered

    def recording(train: Callable) -> Callable:
        def recorded(self, loader, on_step_end):
            def after() -> None:
                append(f"{self.global_step} {last[0].hex()} {time.monotonic()!r}")
                on_step_end()

            return train(self, loader, after)

        return recorded

    replace("compute a loss", remembering)
    replace("train an epoch", recording)


# Conditions:
def no_fsync() -> None:
    """Do not wait for the disk: a killed process loses nothing by it, a test saves time."""
    os.fsync = lambda file: None


def own_group() -> None:
    """Leave the tests' process group, so that a signal to the group is only this run's."""
    os.setpgid(0, 0)


def environment(**values: str) -> None:
    """Set environment variables."""
    os.environ.update(values)


def impatient() -> None:
    """Give this process a second to join others, or to end by itself."""
    shorten({"end after a lost process": 1, "rendezvous": 1, "stop while starting": 1})


def nan_loss(k: int, phase: str = "train") -> None:
    """Make the loss of the k-th batch of `phase` NaN; k = 0: of every one."""
    batches = itertools.count(1)

    def with_nonfinite(cross_entropy: Callable) -> Callable:
        def inject_nonfinite(*args, **kwargs):
            loss = cross_entropy(*args, **kwargs)
            return loss * float("nan") if _phase() == phase and k in (0, next(batches)) else loss

        return inject_nonfinite

    replace("compute a loss", with_nonfinite)


def nan_gradients(k: int) -> None:
    """Make gradients of the k-th step NaN, whose loss is finite."""
    steps = itertools.count(1)

    def with_nonfinite(step: Callable) -> Callable:
        def inject_nonfinite(self, *args, **kwargs):
            if next(steps) == k:
                self.param_groups[0]["params"][0].grad.fill_(float("nan"))
            return step(self, *args, **kwargs)

        return inject_nonfinite

    replace("update the weights", with_nonfinite)


def forget_rng() -> None:
    """Resume without the state of torch's generator, as many trainers do."""
    import torch

    torch.set_rng_state = lambda state: None


def forget_position() -> None:
    """Resume in the middle of an epoch with the first batch of it."""
    for loader in ("iterate over memory", "iterate over files"):
        replace(loader, lambda batches: lambda self, epoch, start=0: batches(self, epoch, 0))


def pause_at_end_of(epoch: int, ready: Path, leave: bool = False) -> None:
    """Make `ready` and wait for SIGUSR2 before the end of an epoch is saved; then `leave`."""
    epochs = itertools.count(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    ctypes.CDLL(None).prctl(0x59616D61, -1, 0, 0, 0)  # PR_SET_PTRACER: any process may trace this

    def pausing(on_epoch_end: Callable) -> Callable:
        def paused(self) -> None:
            here = next(epochs) == epoch
            if here:
                ready.touch()
                signal.sigwait({signal.SIGUSR2})
            on_epoch_end(self)
            if here and leave:
                os._exit(0)

        return paused

    replace("save the end of an epoch", pausing)


def limit_file_size(size: int) -> None:
    """Fill the disk after `size` bytes of any one file (Python ignores SIGXFSZ)."""
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
    """Set the clock back by an hour whenever it is read."""
    calls = itertools.count(1)
    now = time.time()
    time.time = lambda: now - 3600 * next(calls)


def close_standard_files(*numbers: int) -> None:
    """Close standard files as `<&- >&- 2>&-` or some of these do."""
    for number in numbers:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)


def hide_tensorboard() -> None:
    """Fail to import it, as where it is not installed."""
    sys.modules["torch.utils.tensorboard"] = None


def close_pipes() -> None:
    """Make standard output and error pipes without a reader, as of `| tee` after Ctrl-C."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)

    def reopening(run: Callable) -> Callable:
        def run_and_reopen(argv: list[str]) -> int:
            code = run(argv)
            # The harness flushes them.
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            return code

        return run_and_reopen

    replace("run the program", reopening)


def leave() -> None:
    """Enter a working directory, and delete it."""
    directory = tempfile.mkdtemp()
    os.chdir(directory)
    os.rmdir(directory)


def mount_or_leave(directory: Path, options: str, read_only: bool = False) -> None:
    """Put an empty tmpfs over `directory`, visible to this process alone; 77 if not allowed."""
    libc, new_mounts, new_user = ctypes.CDLL(None), 0x20000, 0x10000000
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_mounts) != 0:
        if libc.unshare(new_mounts | new_user) != 0:
            os._exit(77)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    private, flags = 0x44000, 1 if read_only else 0  # MS_PRIVATE | MS_REC, MS_RDONLY
    if libc.mount(b"none", b"/", None, private, None) or (
        libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", flags, options.encode())
    ):
        os._exit(77)
