"""Test that Figure 5 shows the mean absolute weights, and that its CSV is read back or refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from errors import CheckpointError, DataError
from models.densenet import DenseNet
from tools.figures import layer_usage


def tiny(bottleneck: bool = True, stages: tuple[int, ...] = (3, 2)) -> DenseNet:
    return DenseNet(stages, 2, 5, 4, bottleneck=bottleneck)


def reference(model: DenseNet, stages: tuple[int, ...], k: int, c0: int) -> list[float]:
    """Compute the cells by the words of the paper, one pair of layers after the other."""
    found = []
    for number, num_layers in enumerate(stages, start=1):
        block = getattr(model.features, f"denseblock{number}")
        if number > 1:
            c0 = getattr(model.features, f"transition{number - 1}").conv.out_channels
        is_last = number == len(stages)
        readers = [getattr(block, f"denselayer{i + 1}").conv1 for i in range(num_layers)]
        readers += [model.classifier if is_last else model.features[2 * number].conv]
        for target, reader in enumerate(readers, start=1):
            weights = np.abs(reader.weight.detach().numpy())
            for source in range(target):
                first = 0 if source == 0 else c0 + (source - 1) * k
                found.append(weights[:, first : c0 + source * k].mean())
    return found


def cells(blocks: list[layer_usage.Block]) -> list[float]:
    return [value for block in blocks for column in block for value in column]


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("stages", [(3, 2), (1, 1, 2, 1)])
def test_a_cell_is_the_mean_absolute_weight_between_two_layers(bottleneck, stages):
    model = tiny(bottleneck, stages)
    blocks = layer_usage.blocks(model.state_dict(), "it")
    assert cells(blocks) == pytest.approx(reference(model, stages, k=2, c0=5), rel=1e-6)
    assert [len(block) for block in blocks] == [n + 1 for n in stages]


def test_torchvisions_networks_and_the_old_spelling_are_read_too():
    weights = torchvision.models.DenseNet(4, (2, 1, 1, 3), 6, num_classes=3).state_dict()
    old = {re.sub(r"(layer\d+\.conv)1", r"\1.1", name): w for name, w in weights.items()}
    assert old.keys() != weights.keys()
    blocks = layer_usage.blocks(weights, "it")
    assert [len(block) for block in blocks] == [3, 2, 2, 4]
    assert layer_usage.blocks(old, "it") == blocks


@pytest.mark.parametrize(
    ("remove", "what"),
    [
        ("features.denseblock", "it has no dense block"),
        ("features.denseblock1.denselayer2.conv1", "dense block 1 has layers that read 5, 9, 11"),
        ("features.transition1.conv", "features.transition1.conv.weight is missing"),
        ("classifier", "classifier.weight is missing"),
        ("", "dense block 1 has layers that read 0, 7, 9, 11"),
    ],
)
def test_other_weights_are_not_of_a_densenet(remove, what):
    weights = tiny().state_dict()
    kept = {name: w for name, w in weights.items() if not remove or not name.startswith(remove)}
    if not remove:
        kept["features.denseblock1.denselayer1.conv1.weight"] = torch.zeros(8)
    with pytest.raises(CheckpointError, match=re.escape(f"it is not of a DenseNet: {what}")):
        layer_usage.blocks(kept, "it")


# Its CSV file:
TABLE = layer_usage.to_csv("a net", layer_usage.blocks(tiny().state_dict(), "it")).decode()


def test_the_csv_holds_the_cells_to_five_digits():
    blocks = layer_usage.blocks(tiny().state_dict(), "it")
    content = layer_usage.to_csv("a net", blocks)
    network, found = layer_usage.from_csv(Path("x.csv"), content)
    assert network == "a net" and cells(found) == pytest.approx(cells(blocks), rel=1e-4)
    targets = [line.split(",")[2] for line in content.decode().splitlines()]
    assert targets[-3:] == ["classifier"] * 3 and "transition" in targets


def without_line(start: str) -> str:
    return "".join(line for line in TABLE.splitlines(True) if not line.startswith(start))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "a,b\n1,2\n",
        TABLE.replace("source", "origin"),
        without_line("a net,1,2,1"),
        without_line("a net,1,transition"),
        without_line("a net,2,"),
        without_line("a net,1,1,"),
        re.sub(r"(a net,1,2,1),.*", r"\1", TABLE),
        re.sub(r"(a net,1,2,1),.*", r"\g<0>\na net,1,2,2,0.5", TABLE),
        TABLE.replace("classifier", "head"),
        "\xff\xfe",
        'network,block,target,source,mean_abs_weight\n"a net',
    ],
)
def test_a_table_that_is_not_complete_is_refused(content):
    with pytest.raises(DataError, match=r"x\.csv is not a complete table"):
        layer_usage.from_csv(Path("x.csv"), content.encode("latin-1"))
