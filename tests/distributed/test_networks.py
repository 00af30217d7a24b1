"""Test that two processes train each kind of network to the losses of one process."""

from functools import partial
from pathlib import Path

import pytest
import torch

from faults.contract import tiny
from faults.sabotage import both, replace
from helpers.recording import losses, order, record_steps, steps
from helpers.run_main import run_ranks

# 33 images in batches of 8: of the last batch the second process has none.
FLAGS = {"nImages": 33, "batchSize": 8, "nEpochs": 1, "nGPU": 0, "depth": None, "growthRate": None}
NETWORKS = {
    "fractalnet": {"depth": 11, "widen": 0.1, "imageSize": 32, "dropPath": 0.3, "syncBN": True},
    "resnet": {"depth": 14, "imageSize": 16, "stochasticDepth": 0.5, "syncBN": True},
    "dsn": {"widen": 0.1, "imageSize": 16, "LR": 0.01},
}


def draw_others() -> None:
    """Draw other random numbers than the seed gives, once the network is made."""
    replace(
        "create the network", lambda make: lambda *args: (make(*args), torch.manual_seed(99))[0]
    )


def trained(directory: Path, size: int, name: str, sabotage=None) -> Path:
    """Train in `size` processes; record each step beside the run directory."""
    directory.mkdir()
    record = partial(record_steps, directory)
    first = partial(both, record, sabotage) if sabotage else record
    flags = FLAGS | {"netType": name, "precision": "double"} | NETWORKS[name]
    results = run_ranks(
        tiny(**flags, save=directory / "run"), size, dict.fromkeys(range(size), first)
    )
    assert {result.code for result in results} == {0}, results
    return directory


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_train_each_network_to_the_losses_of_one(name, tmp_path):
    one, two = (trained(tmp_path / str(size), size, name) for size in (1, 2))
    assert len(losses(two)) == 5 and order(two) == order(one)
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-9, atol=0)
    drawn = [{part["rng"] for part in step} for step in steps(one)]
    assert [{part["rng"] for part in step} for step in steps(two)] == drawn  # both ranks alike
    assert len(set.union(*drawn)) == 5  # each step has drawn
    if name == "fractalnet":  # the twin: it matters what is drawn
        other = trained(tmp_path / "other", 2, name, draw_others)
        assert ((losses(other) / losses(one) - 1).abs() > 1e-4).any()
