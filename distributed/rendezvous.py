"""The rendezvous of a run's processes: how they meet, and make sure that they run the same code."""

import hashlib
import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist  # noqa: TID251

from distributed.launcher import ProcessInfo
from distributed.peer_monitor import RERUN_HINT, PeerMonitor, first_line
from distributed.world import LONG_TIMEOUT_S, World
from errors import PeerError, UsageError

RENDEZVOUS_TIMEOUT_S = 300  # for all processes to be there


def init_process_group(process: ProcessInfo, device: torch.device, timeout_s: float) -> World:
    """Meet the other processes of the run.

    Args:
        timeout_s: longest wait for them within the run; the rendezvous itself may take longer.

    Raises:
        PeerError: they do not come.
    """
    if process.size == 1:
        return World(process)
    timeout = timedelta(seconds=LONG_TIMEOUT_S)  # `World` is faster
    try:
        base_store, _, _ = next(
            dist.rendezvous("env://", timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT_S))
        )
        store = dist.PrefixStore(_attempt_id(base_store, process), base_store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=process.rank,
            world_size=process.size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        host_group, heartbeat_group = (
            dist.new_group(backend="gloo", timeout=timeout) for _ in range(2)
        )
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        if "EADDRINUSE" in reason:
            port = reason.partition("port: ")[2].partition(",")[0]
            fix = "end the program that has it, or choose another MASTER_PORT"
            raise UsageError(f"port {port} is in use", fix) from error
        raise PeerError(
            f"the {process.size} processes do not meet: {reason}", RERUN_HINT
        ) from error
    store.set(f"who/{process.rank}", json.dumps([socket.gethostname(), os.getpid()]))
    return World(
        process, host_group, PeerMonitor(process, store, heartbeat_group, timeout_s), timeout_s
    )


def _attempt_id(base_store: dist.Store, process: ProcessInfo) -> str:
    """A name that only this start of the processes has, agreed through the store.

    torchrun keeps one store from restart to restart. In it lie the addresses of processes that are
    gone, which gloo would take for those of the new ones. So the first process gives the start a
    name, and the others ask for it with a word of their own: no old answer is taken for theirs.

    Raises:
        RuntimeError: not all of them come.
    """
    token = os.urandom(8).hex()
    if not process.is_rank0:
        base_store.set(f"ask/{process.rank}", token)
        name = base_store.get(f"answer/{token}").decode()
        base_store.set(f"{name}/{process.rank}", "")
        return name
    absent, end = list(range(1, process.size)), time.monotonic() + RENDEZVOUS_TIMEOUT_S
    while absent:
        for rank in absent:
            if base_store.check([f"ask/{rank}"]):  # perhaps by a process that is gone
                base_store.set(f"answer/{base_store.get(f'ask/{rank}').decode()}", token)
        absent = [rank for rank in absent if not base_store.check([f"{token}/{rank}"])]
        if time.monotonic() > end:
            raise RuntimeError(f"no word of process {absent[0]}")
        time.sleep(0.02)
    return token


def code_version() -> dict[str, str]:
    """What of this program and of PyTorch has to be the same in every process."""
    digest = hashlib.sha256()
    for path in source_files(Path(__file__).resolve().parents[1]):
        digest.update(path.read_bytes())
    return {"torch": torch.__version__, "code": digest.hexdigest()[:12]}


def source_files(root: Path) -> list[Path]:
    """The Python files of the program: those at `root` and in its packages, at any depth."""
    packages = [path.parent for path in root.glob("*/__init__.py")]
    return sorted([*root.glob("*.py"), *(file for each in packages for file in each.rglob("*.py"))])


def claim_report(process: ProcessInfo, line: str) -> bool:
    """Whether no other process of the run has claimed to say `line`, which all may have to say."""
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=10)))
        return store.add("said/" + hashlib.sha256(line.encode()).hexdigest(), 1) == 1
    except (RuntimeError, ValueError):
        return True
