"""Give all tests one thread, so that results repeat and two test runs do not compete.

`--record FILE` writes what the long tests measure into a file.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from faults.results import record
from kernels.precision import set_tf32

torch.set_num_threads(1)
# As main.py does by default; by PyTorch's, cuDNN computes single precision with 10 bits.
set_tf32(False)
# cuBLAS reads it once, before its first product; deterministic tests cannot do without.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, metavar="FILE", help="CSV for what tests measure")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def measured(request) -> Callable[[str, str, float, str], None]:
    """Record a value with `measured(goal, what, value, limit)`; a test asserts the limit."""
    path = request.config.getoption("--record")
    command = f'python -m pytest -q -m soak "{request.node.nodeid}"'

    def measured(goal: str, what: str, value: float, limit: str) -> None:
        print(f"{goal}: {what}: {value} ({limit})")
        if path:
            record(path, goal, what, value, limit, command)

    return measured
