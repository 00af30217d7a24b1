"""Describe the machine and the software of a benchmark in columns of its rows."""

import contextlib
import datetime
import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

from tools import cli


def columns(device) -> dict[str, object]:
    """Return the columns that describe the machine, the software and the day.

    Args:
        device: `torch.device` of the benchmark.
    """
    import torch

    import engine.device

    name, triton = engine.device.describe(device), "none"
    if device.type == "cpu" and (info := Path("/proc/cpuinfo")).exists():
        models = re.findall(r"model name\s*:\s*(.+)", info.read_text())
        name = f"{models[0] if models else 'CPU'}, {os.cpu_count()} cores"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        triton = importlib.metadata.version("triton")
    return {
        "device": name,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit(cli.ROOT),
        "date": datetime.date.today().isoformat(),
    }


def commit(checkout: Path) -> str:
    """Return the commit of a checkout, and whether it was changed since; `none` without Git."""
    return _first_line("git", "-C", str(checkout), "describe", "--always", "--dirty")


def _first_line(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        output = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True)
        return output.partition("\n")[0]
    return "none"
