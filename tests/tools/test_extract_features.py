"""tools.extract_features writes what the classifier sees, for numpy to read without pickles."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models.factory
import opts
from experiment.directory import RunDirectory
from faults.contract import command
from fileio import tensor_files
from helpers.sample_data import noise, write_folder
from tools import extract_features
from tools.inference import network
from tools.inference.images import Unreadable, find_images

SMALL = {"dataset": "folder", "imageSize": 8, "depth": 10, "growthRate": 4}
LARGE = {"dataset": "folder", "imageSize": 72, "growthRate": 8, "initChannels": 16}
LARGE |= dict.fromkeys(("d1", "d2", "d3", "d4"), 1)
RESNET = {"dataset": "folder", "imageSize": 8, "netType": "resnet", "depth": 8}


@pytest.fixture
def make(tmp_path):
    """Writes a run's model file with random weights, running statistics included."""

    def make(**flags: object) -> Path:
        opt = opts.parse(command(**flags))
        directory = tmp_path / "run"
        directory.mkdir(exist_ok=True)
        model = models.factory.create(opt, 3)
        torch.nn.init.normal_(model.classifier.bias)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
        tensor_files.save_weights(directory / "model_last.pt", model.state_dict())
        (directory / "config.yaml").write_text(opts.as_yaml(opt))
        facts = {"classes": list("abc"), "mean": [128.0] * 3, "std": [64.0] * 3}
        RunDirectory(directory).write_json("data.json", facts)
        return directory / "model_last.pt"

    return make


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five images in two directories, a class each."""
    write_folder(tmp_path, {"images": {"ant": 2, "bee": 3}}, size=80)
    return tmp_path / "images"


def extracted(tmp_path: Path, *argv: object, code: int = 0) -> dict[str, np.ndarray]:
    """The arrays that a command line writes."""
    output = tmp_path / "features.npz"
    line = [*map(str, argv), f"--output={output}", "--overwrite"]
    assert extract_features.main(line) == code
    with np.load(output, allow_pickle=False) as file:
        return {name: file[name] for name in file}


@pytest.mark.parametrize(
    "flags",
    [
        SMALL,
        SMALL | {"optMemory": 0},
        SMALL | {"precision": "double"},
        RESNET,
        LARGE,
        LARGE | {"tenCrop": True},
    ],
    ids=["small", "plain", "double", "resnet", "large", "crops"],
)
def test_the_classifier_makes_the_logits_of_the_features(make, folder, tmp_path, flags):
    weights = make(**flags)
    found = extracted(
        tmp_path, weights, folder, "--batchSize=2" if "d1" not in flags else "--nGPU=0"
    )
    net = network.load(weights)
    paths = [str(folder / name) for name in found["names"]]
    logits = [net.logits(images) for images, _ in net.batches(paths, Unreadable())]
    matrix, bias = (net.model.classifier.get_parameter(name) for name in ("weight", "bias"))
    features = torch.from_numpy(found["features"]).to(matrix.dtype)
    assert features.shape == (5, net.model.classifier.in_features)
    with torch.no_grad():
        made = features @ matrix.T + bias
    assert torch.allclose(made, torch.cat(logits), rtol=0, atol=1e-5)
    assert not torch.allclose(made[[1, 0, 2, 3, 4]], torch.cat(logits), rtol=0, atol=1e-4)


def test_a_folder_of_classes_gives_names_and_labels(make, folder, tmp_path):
    found = extracted(tmp_path, make(**SMALL), folder)
    assert found["names"].tolist() == [
        f"{name}/{number:04}.png" for number, name in enumerate(["ant", "ant", "bee", "bee", "bee"])
    ]
    assert found["classes"].tolist() == ["ant", "bee"]
    assert found["labels"].tolist() == [0, 0, 1, 1, 1]
    assert (found["features"].dtype, found["labels"].dtype) == (np.float32, np.int64)


def test_other_images_have_the_names_they_were_given(make, folder, tmp_path):
    paths = [str(folder / "bee" / "0003.png"), str(folder / "ant" / "0001.png")]
    found = extracted(tmp_path, make(**SMALL), *paths)
    assert found.keys() == {"features", "names"} and found["names"].tolist() == paths
    Image.fromarray(noise(1)[0]).save(folder / "0.png")  # not all in directories any more
    assert "labels" not in extracted(tmp_path, make(**SMALL), folder)
    both = extracted(tmp_path, make(**SMALL), folder / "ant", folder / "bee")
    assert both["names"].tolist()[0] == str(folder / "ant" / "0000.png")


def test_an_image_that_cannot_be_read_is_left_out_and_named(make, folder, tmp_path, capsys):
    weights = make(**SMALL)
    whole = extracted(tmp_path, weights, folder, "--batchSize=1")
    (folder / "bee" / "0002.png").write_bytes(b"no image")
    rest = extracted(tmp_path, weights, folder, "--batchSize=1", "--nThreads=0", code=3)
    assert f"cannot read image {folder / 'bee' / '0002.png'}" in capsys.readouterr().err
    assert np.array_equal(rest["features"], whole["features"][[0, 1, 3, 4]])
    assert rest["names"].tolist() == whole["names"][[0, 1, 3, 4]].tolist()
    assert rest["labels"].tolist() == [0, 0, 1, 1]


def test_features_are_computed_batch_by_batch_and_the_hook_is_removed(make, folder):
    net = network.load(make(**SMALL), ["--batchSize=2", "--nThreads=0"])
    computed = []
    net.model.register_forward_hook(lambda _, inputs, logits: computed.append(len(logits)))
    batches = extract_features.features(net, find_images([str(folder)]), None)
    next(batches)
    assert computed == [2]
    batches.close()
    assert not net.model.classifier._forward_pre_hooks


def test_a_full_disk_leaves_what_was_there(make, folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out" / "features.npz"
    output.parent.mkdir()
    output.write_bytes(b"precious")
    line = [str(make(**SMALL)), str(folder), "--output", str(output)]
    assert extract_features.main(line) == 2
    assert output.read_bytes() == b"precious"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert extract_features.main([*line, "--overwrite"]) == 6
    assert "No space left" in capsys.readouterr().err
    assert os.listdir(output.parent) == ["features.npz"] and output.read_bytes() == b"precious"
    monkeypatch.undo()
    assert extract_features.main([*line, "--overwrite"]) == 0
    assert os.listdir(output.parent) == ["features.npz"] and output.read_bytes() != b"precious"
    shutil.rmtree(output.parent)
    assert extract_features.main(line) == 6
