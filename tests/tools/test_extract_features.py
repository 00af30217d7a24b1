"""tools.extract_features writes what the classifier sees, for numpy to read without pickles."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from faults.contract import command
from helpers.inference import write_model
from helpers.sample_data import noise, write_folder
from tools import extract_features
from tools.inference import network
from tools.inference.images import Unreadable, find_images

SMALL = {"dataset": "folder", "imageSize": 8, "depth": 10, "growthRate": 4}
LARGE = {"dataset": "folder", "imageSize": 72, "growthRate": 8, "initChannels": 16}
LARGE |= dict.fromkeys(("d1", "d2", "d3", "d4"), 1)
NETWORKS = {
    "small": SMALL,
    "plain": SMALL | {"optMemory": 0},
    "double": SMALL | {"precision": "double"},
    "resnet": {"dataset": "folder", "imageSize": 8, "netType": "resnet", "depth": 8},
    "large": LARGE,
    "crops": LARGE | {"tenCrop": True},
}


@pytest.fixture
def weights(tmp_path, request) -> Path:
    """A run's model file with random weights, of the network that the test is given."""
    name = getattr(request, "param", "small")
    return write_model(tmp_path / "run", command(**NETWORKS[name]), list("abc"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five images in two directories, a class each."""
    write_folder(tmp_path, {"images": {"ant": 2, "bee": 3}}, size=80)
    return tmp_path / "images"


def extracted(weights: Path, *argv: object, code: int = 0) -> dict[str, np.ndarray]:
    """The arrays that a command line writes."""
    output = weights.parent / "features.npz"
    line = [str(weights), *map(str, argv), f"--output={output}", "--overwrite", "--nThreads=0"]
    assert extract_features.main(line) == code
    with np.load(output, allow_pickle=False) as file:
        return {name: file[name] for name in file}


@pytest.mark.parametrize("weights", NETWORKS, indirect=True)
def test_the_classifier_makes_the_logits_of_the_features(weights, folder):
    found = extracted(weights, folder, "--batchSize=2")
    net = network.load(weights)
    paths = [str(folder / name) for name in found["names"]]
    logits = torch.cat([net.logits(images) for images, _ in net.batches(paths, Unreadable())])
    matrix, bias = (net.model.classifier.get_parameter(name) for name in ("weight", "bias"))
    features = torch.from_numpy(found["features"]).to(matrix.dtype)
    assert features.shape == (5, net.model.classifier.in_features)
    with torch.no_grad():
        made = features @ matrix.T + bias
    assert torch.allclose(made, logits, rtol=0, atol=1e-5)
    assert not torch.allclose(made[[1, 0, 2, 3, 4]], logits, rtol=0, atol=1e-4)


def test_a_folder_of_classes_gives_names_and_labels(weights, folder):
    found = extracted(weights, folder)
    assert found["names"].tolist() == [
        f"{name}/{number:04}.png" for number, name in enumerate(["ant", "ant", "bee", "bee", "bee"])
    ]
    assert found["classes"].tolist() == ["ant", "bee"]
    assert found["labels"].tolist() == [0, 0, 1, 1, 1]
    assert (found["features"].dtype, found["labels"].dtype) == (np.float32, np.int64)


def test_other_images_have_the_names_they_were_given(weights, folder):
    paths = [str(folder / "bee" / "0003.png"), str(folder / "ant" / "0001.png")]
    found = extracted(weights, *paths)
    assert found.keys() == {"features", "names"} and found["names"].tolist() == paths
    both = extracted(weights, folder / "ant", folder / "bee")
    assert both["names"].tolist()[0] == str(folder / "ant" / "0000.png")
    Image.fromarray(noise(1)[0]).save(folder / "0.png")  # not all in directories any more
    assert "labels" not in extracted(weights, folder)


def test_an_image_that_cannot_be_read_is_left_out_and_named(weights, folder, capsys):
    whole = extracted(weights, folder, "--batchSize=1")
    (folder / "bee" / "0002.png").write_bytes(b"no image")
    rest = extracted(weights, folder, "--batchSize=1", code=3)
    assert f"cannot read image {folder / 'bee' / '0002.png'}" in capsys.readouterr().err
    for name in ("features", "names", "labels"):
        assert np.array_equal(rest[name], whole[name][[0, 1, 3, 4]])


def test_features_are_computed_batch_by_batch_and_the_hook_is_removed(weights, folder):
    net = network.load(weights, ["--batchSize=2", "--nThreads=0"])
    computed = []
    net.model.register_forward_hook(lambda _, inputs, logits: computed.append(len(logits)))
    batches = extract_features.features(net, find_images([str(folder)]), None)
    next(batches)
    assert computed == [2]
    batches.close()
    assert not net.model.classifier._forward_pre_hooks


def test_a_full_disk_leaves_what_was_there(weights, folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out" / "features.npz"
    output.parent.mkdir()
    output.write_bytes(b"precious")
    line = [str(weights), str(folder), "--output", str(output)]
    assert extract_features.main(line) == 2
    assert output.read_bytes() == b"precious"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert extract_features.main([*line, "--overwrite"]) == 6
    assert "No space left" in capsys.readouterr().err
    assert os.listdir(output.parent) == ["features.npz"] and output.read_bytes() == b"precious"
