"""How the processes of a run meet, and make sure that they run the same code."""

import hashlib
import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist  # noqa: TID251

from distributed.launcher import Place
from distributed.peer_monitor import AGAIN, PeerMonitor, symptom
from distributed.world import PATIENCE_S, World
from errors import PeerError, UsageError

MEETING_S = 300  # for all processes to be there


def join(place: Place, device: torch.device, timeout_s: float) -> World:
    """Meet the other processes of the run.

    Args:
        timeout_s: longest wait for them within the run; the meeting itself may take longer.

    Raises:
        PeerError: they do not come.
    """
    if place.size == 1:
        return World(place)
    patience = timedelta(seconds=PATIENCE_S)  # `World` is faster
    try:
        meeting, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=MEETING_S)))
        store = dist.PrefixStore(_name_of_start(meeting, place), meeting)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=patience,
            device_id=device if device.type == "cuda" else None,
        )
        host, pulse = (dist.new_group(backend="gloo", timeout=patience) for _ in range(2))
    except (RuntimeError, ValueError) as error:
        reason = symptom(error)
        if "EADDRINUSE" in reason:
            port = reason.partition("port: ")[2].partition(",")[0]
            fix = "end the program that has it, or choose another MASTER_PORT"
            raise UsageError(f"port {port} is in use", fix) from error
        raise PeerError(f"the {place.size} processes do not meet: {reason}", AGAIN) from error
    store.set(f"who/{place.rank}", json.dumps([socket.gethostname(), os.getpid()]))
    return World(place, host, PeerMonitor(place, store, pulse, timeout_s), timeout_s)


def _name_of_start(meeting: dist.Store, place: Place) -> str:
    """A name that only this start of the processes has, agreed through the store.

    torchrun keeps one store from restart to restart. In it lie the addresses of processes that are
    gone, which gloo would take for those of the new ones. So the first process gives the start a
    name, and the others ask for it with a word of their own: no old answer is taken for theirs.

    Raises:
        RuntimeError: not all of them come.
    """
    word = os.urandom(8).hex()
    if not place.is_first:
        meeting.set(f"ask/{place.rank}", word)
        name = meeting.get(f"answer/{word}").decode()
        meeting.set(f"{name}/{place.rank}", "")
        return name
    absent, end = list(range(1, place.size)), time.monotonic() + MEETING_S
    while absent:
        for rank in absent:
            if meeting.check([f"ask/{rank}"]):  # perhaps by a process that is gone
                meeting.set(f"answer/{meeting.get(f'ask/{rank}').decode()}", word)
        absent = [rank for rank in absent if not meeting.check([f"{word}/{rank}"])]
        if time.monotonic() > end:
            raise RuntimeError(f"no word of process {absent[0]}")
        time.sleep(0.02)
    return word


def versions() -> dict[str, str]:
    """What of this program and of PyTorch has to be the same in every process."""
    digest = hashlib.sha256()
    for path in source_files(Path(__file__).resolve().parents[1]):
        digest.update(path.read_bytes())
    return {"torch": torch.__version__, "code": digest.hexdigest()[:12]}


def source_files(root: Path) -> list[Path]:
    """The Python files of the program: those at `root` and in its packages, at any depth."""
    packages = [path.parent for path in root.glob("*/__init__.py")]
    return sorted([*root.glob("*.py"), *(file for each in packages for file in each.rglob("*.py"))])


def is_first_to_say(place: Place, line: str) -> bool:
    """Whether no other process of the run has claimed to say `line`, which all may have to say."""
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=10)))
        return store.add("said/" + hashlib.sha256(line.encode()).hexdigest(), 1) == 1
    except (RuntimeError, ValueError):
        return True
