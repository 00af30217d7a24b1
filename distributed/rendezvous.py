"""Connect the processes of a run, and compute the code version that all must have."""

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

RENDEZVOUS_TIMEOUT_S = 300  # for all processes to join


def init_process_group(process: ProcessInfo, device: torch.device, timeout_s: float) -> World:
    """Connect to the other processes of the run.

    Args:
        timeout_s: longest wait for them within the run; the rendezvous itself may take longer.

    Raises:
        PeerError: not all of them join.
        UsageError: another program has the port.
    """
    if process.size == 1:
        return World(process)
    on_gpu = device.type == "cuda"
    timeout = timedelta(seconds=LONG_TIMEOUT_S)  # World sets shorter ones
    try:
        base_store = _env_store(RENDEZVOUS_TIMEOUT_S)
        store = dist.PrefixStore(_attempt_id(base_store, process), base_store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=process.rank,
            world_size=process.size,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
        groups = [dist.new_group(backend="gloo", timeout=timeout) for _ in range(2)]
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        if "EADDRINUSE" in reason:
            port = reason.partition("port: ")[2].partition(",")[0]
            fix = "end the program that has it, or choose another MASTER_PORT"
            raise UsageError(f"port {port} is in use", fix) from error
        what = f"the {process.size} processes cannot connect: {reason}"
        raise PeerError(what, RERUN_HINT) from error
    store.set(f"address/{process.rank}", json.dumps([socket.gethostname(), os.getpid()]))
    monitor = PeerMonitor(process, store, heartbeat_group=groups[1], timeout_s=timeout_s)
    return World(process, groups[0], monitor, timeout_s)


def _env_store(timeout_s: float) -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return store


def _attempt_id(base_store: dist.Store, process: ProcessInfo) -> str:
    """Agree through the store on a random name for this attempt to start the run.

    torchrun keeps one store over all restarts. It still has the addresses of processes that have
    exited, and gloo would connect to those. So rank 0 draws a name, and each other rank asks for
    it under a random token of its own, so that it cannot get an answer of an earlier attempt.
    Raises RuntimeError if not all processes join.
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
            if base_store.check([f"ask/{rank}"]):  # perhaps by a process of an earlier attempt
                base_store.set(f"answer/{base_store.get(f'ask/{rank}').decode()}", token)
        absent = [rank for rank in absent if not base_store.check([f"{token}/{rank}"])]
        if time.monotonic() > end:
            raise RuntimeError(f"no word of process {absent[0]}")
        time.sleep(0.02)
    return token


def code_version() -> dict[str, str]:
    """Return PyTorch's version and a hash of this program, equal in every process."""
    digest = hashlib.sha256()
    for path in source_files(Path(__file__).resolve().parents[1]):
        digest.update(path.read_bytes())
    return {"torch": torch.__version__, "code": digest.hexdigest()[:12]}


def source_files(root: Path) -> list[Path]:
    """Return the program's Python files: those at `root` and in its packages, at any depth."""
    packages = [path.parent for path in root.glob("*/__init__.py")]
    return sorted([*root.glob("*.py"), *(file for each in packages for file in each.rglob("*.py"))])


def claim_report(line: str) -> bool:
    """Return whether this process is the first of the run to claim printing `line`."""
    try:
        key = "reported/" + hashlib.sha256(line.encode()).hexdigest()
        return _env_store(timeout_s=10).add(key, 1) == 1
    except (RuntimeError, ValueError):
        return True
