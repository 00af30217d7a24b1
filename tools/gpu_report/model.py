"""Write what `--static` predicts of the networks: `python -m tools.gpu_report.model FILE`."""

import sys
from pathlib import Path

import torch

from fileio import atomic
from tools.benchmark import results, static
from tools.gpu_report import steps

COLUMNS = ("network", "what", "us")
H200 = (9, 0)  # compute capability of the GPU that the goals are about


def write(path: Path) -> None:
    """Write the kernels of each network for this GPU, or without one for an H200."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else H200
    rows: list[dict[str, object]] = []
    for name, network in steps.NETWORKS.items():
        opt = steps.settings(network.all_flags)
        for kernel, us in static.kernel_us(opt, 10 * major + minor).items():
            rows.append({"network": name, "what": kernel, "us": us})
        atomic.atomic_write(path, results.as_csv(rows, COLUMNS))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
