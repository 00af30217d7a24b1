"""Describe the GPU and the software in one row: `python -m tools.gpu_report.machine FILE`.

It fails, with the reason as its last line, where no GPU can be used.
"""

import sys
from pathlib import Path

from fileio import atomic
from tools.benchmark import machine, results

COLUMNS = ("device", "driver", "torch", "triton", "commit", "date")


def write(path: Path) -> None:
    """Write the row as CSV, or exit if there is no GPU that runs something."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device).add_(1).item()
    row = machine.columns(device)
    atomic.atomic_write(path, results.as_csv([{name: row[name] for name in COLUMNS}], COLUMNS))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
