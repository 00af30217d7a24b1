"""Write what the self-check finds: `python -m tools.gpu_report.differences FILE`."""

import sys
from pathlib import Path

import torch

import engine.device
from engine import self_check
from fileio import atomic
from kernels.backend import load_triton
from tools.benchmark import results
from tools.gpu_report import steps
from tools.gpu_report.table import CHECKED

COLUMNS = ("settings", "name", "size", "bound", "explained")


def write(path: Path) -> None:
    """Check each of the settings, and write one row for each result; those before an error stay."""
    device, rows, ops = torch.device("cuda", 0), [], load_triton()
    for settings, flags in CHECKED.items():
        opt = steps.settings(flags)
        engine.device.configure(opt.cudnn, opt.tf32)
        for found in self_check.measure_differences(opt, device, ops):
            row = {name: getattr(found, name) for name in COLUMNS[1:]}
            rows.append({"settings": settings} | row)
            print(*rows[-1].values(), sep="\t")
        atomic.atomic_write(path, results.as_csv(rows, COLUMNS))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
