"""Train runs on small and on large images, once for all tests of the tools that read them."""

from pathlib import Path

import pytest

from faults.contract import TINY_FILES, command, tiny, write_files
from helpers.run_main import run
from helpers.sample_data import write_folder

COUNTS = {"train": {"ant": 8, "bee": 6}, "val": {"ant": 3, "bee": 4}}


def _train(root: Path, flags: list[str]) -> Path:
    result = run([*flags, f"--data={root / 'data'}", f"--save={root / 'run'}"])
    assert result.code == 0, result.err
    return root / "run"


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    """Train two epochs on images of 8 pixels in two classes, which lie beside the run in `data`."""
    root = tmp_path_factory.mktemp("small")
    write_folder(root / "data", COUNTS, size=8)
    flags = {"dataset": "folder", "nImages": None, "nClasses": None, "nEpochs": 2}
    return _train(root, tiny(**flags))


@pytest.fixture(scope="session")
def large_run(tmp_path_factory) -> Path:
    """Train a network of ImageNet's shape for an epoch; its images lie beside it in `data`."""
    root = tmp_path_factory.mktemp("large")
    write_files(root / "data")
    return _train(root, command(**TINY_FILES, nThreads=0, nEpochs=1))
