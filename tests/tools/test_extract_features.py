"""Test that tools.extract_features writes the classifier's input, for numpy without pickles."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from faults.contract import command
from helpers.inference import logits, write_model
from helpers.sample_data import noise, write_folder
from tools import extract_features
from tools.inference import network

SMALL = {"dataset": "folder", "imageSize": 8, "depth": 10, "growthRate": 4}
LARGE = {"dataset": "folder", "imageSize": 72, "growthRate": 8, "initChannels": 16}
LARGE |= dict.fromkeys(("d1", "d2", "d3", "d4"), 1)
NETWORKS = {
    "small": SMALL,
    "plain": SMALL | {"optMemory": 0},
    "double": SMALL | {"precision": "double"},
    "resnet": {"dataset": "folder", "imageSize": 8, "netType": "resnet", "depth": 8},
    "dsn": {"dataset": "folder", "imageSize": 8, "netType": "dsn", "widen": 0.1},
    "fractalnet": {"dataset": "folder", "imageSize": 32, "netType": "fractalnet", "depth": 6},
    "crops": LARGE | {"tenCrop": True},
}


@pytest.fixture
def weights(tmp_path, request) -> Path:
    """Write a run's model file with random weights, of the network that the test is given."""
    name = getattr(request, "param", "small")
    return write_model(tmp_path / "run", command(**NETWORKS[name]), list("abc"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write five images in two directories, a class each."""
    write_folder(tmp_path, {"images": {"ant": 2, "bee": 3}}, size=80)
    return tmp_path / "images"


def extracted(weights: Path, *argv: object, code: int = 0) -> dict[str, np.ndarray]:
    """Return the arrays that a command line writes."""
    output = weights.parent / "features.npz"
    line = [str(weights), *map(str, argv), f"--output={output}", "--overwrite", "--nThreads=0"]
    assert extract_features.main(line) == code
    with np.load(output, allow_pickle=False) as file:
        return {name: file[name] for name in file}


@pytest.mark.parametrize("weights", NETWORKS, indirect=True)
def test_the_classifier_makes_the_logits_of_the_features(weights, folder):
    found = extracted(weights, folder, "--batchSize=2")
    net = network.load(weights)
    wanted = logits(net, [str(folder / name) for name in found["names"]])
    matrix, bias = (net.model.classifier.get_parameter(name) for name in ("weight", "bias"))
    features = torch.from_numpy(found["features"]).to(matrix.dtype)
    assert features.shape == (5, net.model.classifier.in_features)
    with torch.no_grad():
        made = features @ matrix.T + bias
    assert torch.allclose(made, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(made[[1, 0, 2, 3, 4]], wanted, rtol=0, atol=1e-4)


def test_a_folder_of_classes_gives_names_and_labels_and_other_images_their_own_names(
    weights, folder
):
    found = extracted(weights, folder)
    names = [f"{n}/{i:04}.png" for i, n in enumerate(["ant", "ant", "bee", "bee", "bee"])]
    assert found["names"].tolist() == names and found["classes"].tolist() == ["ant", "bee"]
    assert found["labels"].tolist() == [0, 0, 1, 1, 1]
    assert (found["features"].dtype, found["labels"].dtype) == (np.float32, np.int64)

    paths = [str(folder / names[3]), str(folder / names[1])]
    found = extracted(weights, *paths)
    assert found.keys() == {"features", "names"} and found["names"].tolist() == paths
    both = extracted(weights, folder / "ant", folder / "bee")
    assert both["names"].tolist()[0] == str(folder / names[0])
    Image.fromarray(noise(1)[0]).save(folder / "0.png")  # not all in directories any more
    assert "labels" not in extracted(weights, folder)


def test_an_image_that_cannot_be_read_is_left_out_and_named(weights, folder, capsys):
    whole = extracted(weights, folder, "--batchSize=1")
    (folder / "bee" / "0002.png").write_bytes(b"no image")
    rest = extracted(weights, folder, "--batchSize=1", code=3)
    assert f"skipped image {folder / 'bee' / '0002.png'}" in capsys.readouterr().err
    for name in ("features", "names", "labels"):
        assert np.array_equal(rest[name], whole[name][[0, 1, 3, 4]])


def test_a_full_disk_leaves_what_was_there(weights, folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out" / "features.npz"
    output.parent.mkdir()
    output.write_bytes(b"precious")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = [str(weights), str(folder), f"--output={output}", "--overwrite"]
    assert extract_features.main(line) == 6
    assert "No space left" in capsys.readouterr().err
    assert os.listdir(output.parent) == ["features.npz"] and output.read_bytes() == b"precious"
