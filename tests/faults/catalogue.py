"""List the faults: what disturbs a run, when, and what has to follow.

Here are those that every run of one or two processes meets in the same way: it ends with a code,
one line and a verdict, keeps what it had saved, and goes on as if undisturbed.
"""

import errno
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets.rng import permutation
from faults import sabotage
from faults.sabotage import at_batch, at_call, hang, impatient, kill, on_files, refuse, send

Action = Callable[[], None]
Moment = Callable[[Action, Path], Action]  # (action, run directory) -> what is done in the process

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
TERM = partial(send, signal.SIGTERM)
KILLED, CRASHED = -signal.SIGKILL, -signal.SIGSEGV
BOTH = (0, 1)


def batch(k: int, phase: str = "train") -> Moment:
    """Act within a batch."""
    return lambda action, run: partial(at_batch, action, k, phase)


def file(operation: str = "", name: str = "(?!tensorboard)", k: int = 1) -> Moment:
    """Act at an operation on a file of the run directory."""
    return lambda action, run: partial(on_files, action, run, operation=operation, name=name, k=k)


def calling(hook: str, k: int = 1) -> Moment:
    """Act before a call of a function in `sabotage.HOOKS`."""
    return lambda action, run: partial(at_call, action, hook, k)


def before(action: Action, run: Path) -> Action:
    """Act before the program begins: the action changes its environment."""
    return action


@dataclass(frozen=True)
class Fault:
    """Describe one disturbance of a run.

    Args:
        name: of the test.
        row: of docs/faults.md.
        moment, action: when what is done.
        codes: exit code of each process.
        step: global step of the newest checkpoint afterwards; None: there is none.
        message: pattern of all messages, on the standard error of one process; empty: nothing.
        ranks: processes that it is done to.
        also, others: what else is done to these, and to the other processes.
        flags: of the run.
        verdict: what status.json says besides state and code; None: there need not be one.
        resumes: the run is one that was killed in its second epoch.
        own_store: the processes rendezvous at a store that ends with rank 0.
    """

    name: str
    row: int
    moment: Moment
    action: Action
    codes: int | tuple[int, ...]
    step: int | None
    message: str = ""
    ranks: tuple[int, ...] = (0,)
    also: Action = int
    others: Action = int
    flags: Mapping[str, object] = field(default_factory=dict)
    verdict: Mapping[str, object] | None = field(default_factory=dict)
    resumes: bool = False
    own_store: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def size(self) -> int:
        """Return the number of processes."""
        return len(self.codes) if isinstance(self.codes, tuple) else 1

    def sabotages(self, run: Path) -> dict[int, Action]:
        """Return the action in each process, by rank."""
        hit = partial(sabotage.both, self.also, self.moment(self.action, run))
        return {rank: hit if rank in self.ranks else self.others for rank in range(self.size)}


def stopped(number: int) -> str:
    """Return the message of a run that was stopped by a signal."""
    name = signal.Signals(number).name
    begun = rf"{name}: finishing the step, then saving; a second signal exits.*\n"
    return rf"({begun})?stopped: {name}, .* is saved; to go on: .*\n"


NOTHING_SAVED = r"(.*\n)?stopped: SIGTERM.*; to go on: run it again\n"
ANYTHING = r"(.*\n)*"


def images(step: int) -> dict[str, object]:
    """Return the verdict of status.json on a non-finite step: the images of its batch."""
    epoch, number = (step - 1) // 4 + 1, (step - 1) % 4
    order = permutation(32, "order", 0, epoch).tolist()
    return {"batch": order[8 * number : 8 * number + 8]}


def not_finite(step: int) -> str:
    return rf"loss is not finite at epoch {(step - 1) // 4 + 1}, step {(step - 1) % 4 + 1}; fix: lo"


FULL, BROKEN = partial(refuse, errno.ENOSPC), partial(refuse, errno.EIO)
NO_SPACE = r"no space in {run}: .* needs 0\.\d MB, has \d+\.\d MB .*; fix: free space"
NO_WRITE = r"cannot write {run}/.*Input/output error; fix: check the disk"
NO_MEMORY = (
    r"out of memory with --batchSize 8 --optMemory 2; "
    r"fix: use --batchSize \d+( --optMemory \d)?, about \d+ MB instead of \d+ MB"
)
EVERY_STEP = {"saveEvery": 1e-9}

ONE_PROCESS = [
    Fault("killed while starting", 1, file(name="tensorboard"), kill, KILLED, None),
    Fault("killed in the first step", 2, batch(1), kill, KILLED, None),
    Fault("killed in the second epoch", 2, batch(6), kill, KILLED, 4),
    Fault("killed within an epoch that was saved", 2, batch(6), kill, KILLED, 5, flags=EVERY_STEP),
    Fault("killed in the first validation", 3, batch(1, "val"), kill, KILLED, None),
    Fault("killed in validation", 3, batch(2, "val"), kill, KILLED, 4),
    Fault("killed while a log is written", 8, file("write", "log.jsonl", 2), kill, KILLED, 4),
    Fault("killed while TensorBoard is opened", 8, file("open", "tensorboard"), kill, KILLED, None),
    Fault("killed while a checkpoint is read", 9, file("open", "checkpoint"), kill, KILLED, 4,
          resumes=True),
    *(Fault(f"{name} of {what} fails, {number}", row, file(name, rf"\.?{what}", k),
            {"full": FULL, "broken": BROKEN}[number], 6, step,
            {"full": NO_SPACE, "broken": NO_WRITE}[number])
      for row, what, name, k, number, step in [
          (11, "checkpoint", "write", 2, "full", 4), (11, "checkpoint", "write", 2, "broken", 4),
          (11, "checkpoint", "fsync", 2, "full", 4), (13, "checkpoint", "fsync", 2, "broken", 4),
          (11, "checkpoint", "rename", 2, "full", 4), (11, "model_last", "write", 2, "full", 8),
          (13, "model_best", "fsync", 1, "broken", 4), (11, "status", "rename", 2, "full", 4),
      ]),
    *(Fault(f"no memory for {what}, {phase}", 55, batch(k, phase), action, 6, 4, NO_MEMORY)
      for what, action, phase, k in [
          ("tensors", sabotage.ask_for_tensors, "train", 6),
          ("tensors of a GPU", sabotage.fill_the_gpu, "val", 2),
      ]),
    *(Fault(f"loss not finite in step {k}", 56, before, partial(sabotage.nan_loss, k), 5,
            k - 1 or None, not_finite(k), flags=EVERY_STEP, verdict=images(k)) for k in (1, 6, 8)),
    *(Fault(f"gradient not finite in step {k}", 57, before, partial(sabotage.nan_gradients, k), 5,
            4, "; fix: lower --LR") for k in (5, 8)),
    *(Fault(f"{signal.Signals(number).name} in a step", 58, batch(6), partial(send, number), 75, 6,
            stopped(number), verdict={"epoch": 2, "step": 2}) for number in SIGNALS),
    *(Fault(f"SIGTERM while {what}", 58, moment, TERM, code, step,
            stopped(signal.SIGTERM) if step else NOTHING_SAVED, flags={"keep": 1})
      for what, moment, code, step in [
          ("the config is written", file("fsync", r"\.config"), 75, None),
          ("a checkpoint is written", file("write", r"\.checkpoint"), 75, 5),
          ("a checkpoint is renamed", file("rename", "checkpoint"), 75, 5),
          ("the status is written", file("fsync", r"\.status", 3), 75, 9),
          ("a checkpoint is removed", file("remove", "checkpoint"), 75, 9),
          ("a model is written", file("write", r"\.model_last"), 75, 5),
          ("the log is written", file("write", "log", 2), 75, 9),
      ]),
    Fault("SIGTERM while a checkpoint is read", 62, calling("restore a checkpoint"), TERM, 75, 4,
          NOTHING_SAVED, verdict=None, resumes=True),
    Fault("a second signal in a step", 59, batch(6), partial(send, signal.SIGTERM, signal.SIGINT),
          130, 4, ANYTHING),
    *(Fault(f"a second signal at the {operation} of a save", 80,
            file(operation, r"\.?checkpoint_000000006"), partial(send, number), 128 + number, 4,
            ANYTHING, also=partial(at_batch, TERM, 6))
      for operation, number in [("write", signal.SIGTERM), ("rename", signal.SIGINT)]),
    Fault("SIGPIPE", 63, batch(3), partial(send, signal.SIGPIPE), 0, 12),
    Fault("SIGTERM after the reader of the output is gone", 76, batch(6), TERM, 75, 6,
          also=sabotage.close_pipes),
    Fault("the disk fills up in the middle of a file", 11, before,
          partial(sabotage.limit_file_size, 20_000), 6, 4,
          r"no space in .* needs .* MB, has .* MB .*File too large.*; fix: free space",
          resumes=True),
    Fault("the working directory is removed", 78, batch(3), sabotage.leave, 0, 12),
    Fault("TensorBoard is not installed", 79, before, sabotage.hide_tensorboard, 0, 12,
          "note: no TensorBoard: .*; training goes on\n"),
    Fault("TensorBoard fails", 79, calling("open TensorBoard"), partial(sabotage.fail, "TypeError"),
          0, 12, "note: no TensorBoard: .*; training goes on\n"),
]  # fmt: skip

LOST = r"process {} \(host .*, \d+\) is lost"
BUSY = partial(sabotage.both, impatient, partial(at_batch, hang, 6))


def lost(rank: int) -> dict[str, object]:
    """Return the codes and words of two processes of which one was killed or hangs."""
    codes = (KILLED, 8) if rank == 0 else (8, KILLED)
    return {
        "codes": codes,
        "ranks": (rank,),
        "message": LOST.format(rank),
        "verdict": {"lost": [rank]},
    }


TWO_PROCESSES = [
    *(Fault(f"SIGTERM to process {rank} in {phase} {k}", 60, batch(k, phase), TERM, (75, 75), step,
            stopped(signal.SIGTERM), ranks=(rank,))
      for rank, phase, k, step in [(0, "train", 6, 6), (1, "train", 1, 1), (1, "train", 8, 8),
                                   (0, "val", 2, 8)]),
    Fault("SIGTERM twice to both", 61, batch(6), partial(send, *2 * [signal.SIGTERM]), (75, 75), 6,
          stopped(signal.SIGTERM), ranks=BOTH),
    Fault("SIGTERM again later to both", 59, batch(6), partial(send, *2 * [signal.SIGTERM]),
          (143, 143), 4, ANYTHING, ranks=BOTH,
          also=partial(sabotage.shorten, {"repeat a signal": 0})),
    *(Fault(f"SIGTERM to process {rank} before they have connected", 62,
            calling("agree on the attempt id"), TERM, (75, 75), 1, stopped(signal.SIGTERM),
            ranks=(rank,)) for rank in BOTH),
    *(Fault(f"loss not finite in step {k} of process {rank}", 56, before,
            partial(sabotage.nan_loss, k), (5, 5), step, not_finite(k), ranks=(rank,),
            verdict=images(k)) for rank, k, step in [(0, 6, 4), (1, 1, None)]),
    *(Fault(f"process {rank} killed", 65, batch(6), kill, step=4, **lost(rank)) for rank in BOTH),
    Fault("process 1 crashed", 65, batch(6), sabotage.crash, step=4,
          **lost(1) | {"codes": (8, CRASHED)}),
    *(Fault(f"process {rank} killed while the other is busy", 65, batch(6), kill, step=4,
            others=BUSY, own_store=True, **lost(rank) | {"message": "is lost", "verdict": None})
      for rank in BOTH),
    *(Fault(f"process {rank} fails while the other is busy", 67, batch(6),
            partial(sabotage.fail, "DataError"), (3, 3), 4, f"luck in process {rank}; fix: bring",
            ranks=(rank,), others=BUSY) for rank in BOTH),
    Fault("the process with the store killed", 65, batch(6), kill, step=4, own_store=True,
          **lost(0) | {"message": "the process that held the run together is lost .*; fix: "}),
    Fault("process 1 killed while process 0 finds the checkpoint", 65,
          calling("broadcast a result of rank 0"), kill, step=None,
          others=partial(sabotage.both, impatient, partial(at_call, hang, "find a checkpoint")),
          **lost(1)),
    *(Fault(f"process {rank} hangs in {what}", 66, moment, sabotage.stop, step=step,
            flags={"timeout": 10}, others=impatient,
            **lost(rank) | {"message": LOST.format(rank) + r" \(.*timed out.*\); fix: "}
            | {"verdict": {} if rank else None})  # which holds the lock of the run directory
      for rank, what, moment, step in [
          (0, "a step", batch(6), 4), (1, "the first step", batch(1), None),
          (1, "the sum of the gradients", calling("sum the gradients", 7), 4),
          (0, "finding the checkpoint", calling("find a checkpoint"), None),
      ]),
    *(Fault(f"the first process cannot {name} {what}", 67, file(name, what, k), FULL, (6, 6), step,
            "no space in .*; fix: free space", verdict=verdict, own_store=own_store)
      for name, what, k, step, verdict, own_store in [
          ("mkdir", r"\.", 1, None, None, False), ("write", r"\.config", 1, None, None, False),
          ("fsync", r"\.log", 1, None, {}, False), ("open", r"\.checkpoint", 1, None, {}, False),
          ("write", r"\.checkpoint", 2, 4, {}, True),
          ("fsync", r"\.checkpoint", 1, None, {}, False),
          ("rename", "checkpoint", 1, None, {}, False), ("remove", "checkpoint", 1, 12, {}, False),
          ("fsync", r"\.status", 3, 8, {}, False), ("write", r"\.model_last", 1, 4, {}, False),
          ("rename", "model_best", 1, 4, {}, False),
      ]),
    *(Fault(f"process {rank} cannot {hook}", 67, calling(hook),
            partial(sabotage.fail, "CheckpointError"), (4, 4), 4, f"luck in process {rank}; fix: ",
            ranks=(rank,), verdict=None, resumes=True)
      for rank, hook in [(0, "find a checkpoint"), (0, "restore a checkpoint"),
                         (1, "restore a checkpoint"), (1, "create the network")]),
    Fault("process 1 cannot create the data", 67, calling("create the data"),
          partial(sabotage.fail, "DataError"), (3, 3), None, "luck in process 1; fix: bring",
          ranks=(1,), verdict=None),
]  # fmt: skip

FAULTS = ONE_PROCESS + TWO_PROCESSES
