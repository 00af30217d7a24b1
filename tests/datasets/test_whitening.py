"""Test contrast normalisation and ZCA whitening: against NumPy, in a run, and where refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets.whitening
import opts
from datasets.memory_loader import ImageTensors
from datasets.whitening import preprocess
from errors import UsageError
from faults.contract import command, refused, tiny
from helpers.run_main import run
from helpers.sample_data import create_data, noise, read_all, write_folder
from tools import classify


def images(count: int, size: int = 4, seed: int = 0) -> ImageTensors:
    """Make smooth images, whose pixels depend on each other; the first one is constant."""
    pixels = np.cumsum(noise(count, size, seed).astype(np.int64), axis=1) // size
    pixels[0] = 7
    return ImageTensors(torch.from_numpy(pixels.astype(np.uint8)), torch.zeros(count).long())


def restated_gcn(pixels: np.ndarray) -> np.ndarray:
    flat = pixels.reshape(len(pixels), -1).astype(np.float64)
    centred = flat - flat.mean(axis=1, keepdims=True)
    norms = np.sqrt((centred**2).sum(axis=1, keepdims=True))
    return 55 * centred / np.where(norms < 1e-6, 1, norms)


def restated_zca(flat: np.ndarray, kept: np.ndarray, bias: float = 0.1) -> np.ndarray:
    """Whiten by the singular values of the centred images; no covariance is made."""
    mean = flat[kept].mean(axis=0)
    _, values, axes = np.linalg.svd((flat[kept] - mean) / np.sqrt(len(kept)))
    variances = np.zeros(flat.shape[1])
    variances[: len(values)] = values**2
    return (flat - mean) @ axes.T / np.sqrt(variances + bias) @ axes


@pytest.mark.parametrize("count", [200, 30], ids=["full rank", "fewer images than dimensions"])
@pytest.mark.parametrize("kind", ["gcn", "zca"])
def test_images_are_preprocessed_as_numpy_does_it(count, kind, monkeypatch):
    monkeypatch.setattr(datasets.whitening, "CHUNK", 64)  # several, the last one smaller
    train, test, kept = images(count), images(20, seed=1), torch.arange(count)[1::2]
    got = preprocess(kind, train, test, kept)
    flat = [restated_gcn(part.pixels.numpy()) for part in (train, test)]
    whiten = restated_zca if kind == "zca" else lambda every, kept, bias=0: every
    for bias, is_right in ((0.1, True), (0.2, kind == "gcn")):
        want = whiten(np.concatenate(flat), kept.numpy(), bias)
        found = np.concatenate([part.pixels.flatten(1).numpy() for part in got])
        assert found.dtype == np.float32
        assert (np.abs(found - want).max() < 1e-5 * np.abs(want).max()) == is_right
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(got, (train, test), strict=True))
    assert kind == "zca" or not got[0].pixels[0].any()  # a constant image stays zeros


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    write_folder(root, {"train": dict.fromkeys("ab", 12), "val": dict.fromkeys("ab", 4)}, size=12)
    return root


@pytest.mark.parametrize("kind", ["gcn", "zca"])
@pytest.mark.parametrize(("dataset", "size"), [("digits", 8), ("folder", 16)])
def test_a_dataset_gives_preprocessed_batches(dataset, size, kind, folder):
    flags = {"dataset": dataset, "data": folder, "imageSize": size, "validSize": 4, "nThreads": 0}
    flags |= {"precision": "double", "augment": True, "batchSize": 8}
    plain, white = (
        create_data(opts.parse(command(**flags, preprocess=name))) for name in ("normalise", kind)
    )
    assert white.metadata["mean"] == [0.0] * 3 and white.metadata["std"] == [1.0] * 3
    raw = [part.images.pixels.numpy() for part in (plain.train, plain.test)]
    flat, kept = np.concatenate([restated_gcn(part) for part in raw]), plain.train.sampler.indices
    want = restated_zca(flat, kept.numpy()) if kind == "zca" else flat
    stored, tested = (part.images.pixels.double() for part in (white.train, white.test))
    got = np.concatenate([stored.flatten(1), tested.flatten(1)])
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    # A test has them as they are; training is cropped, with zeros around.
    batches, _ = read_all(white.test)
    assert torch.equal(batches, tested.permute(0, 3, 1, 2))  # float64, too
    trained, _ = read_all(white.train)
    assert set(trained[:8].flatten().tolist()) <= {0.0, *stored.flatten().tolist()}
    assert not torch.equal(trained, stored[white.train.sampler.indices].permute(0, 3, 1, 2))


@pytest.fixture(scope="module")
def whitened_run(folder, tmp_path_factory) -> Path:
    flags = {"dataset": "folder", "data": folder, "nImages": None, "nClasses": None}
    directory = tmp_path_factory.mktemp("whitened") / "run"
    result = run(tiny(**flags, preprocess="zca", nEpochs=1, save=directory))
    assert result.code == 0, result
    return directory


def test_a_test_whitens_by_the_training_images_whatever_names_the_weights(whitened_run, folder):
    last = json.loads((whitened_run / "log.jsonl").read_text())
    network = {"dataset": "folder", "data": folder, "imageSize": 8, "depth": 10, "growthRate": 2}
    weights = {"retrain": whitened_run / "model_last.pt", "batchSize": 8}
    for source in ({"resume": whitened_run}, network | weights):
        result = run(command(**source, testOnly=True, nGPU=0))
        assert result.code == 0, result
        assert f"Err {last['val_loss']:.4f}" in result.out, (result.out, last)
    alone = folder.parent / "alone"
    shutil.copytree(folder / "val", alone / "val")
    result = run(command(resume=whitened_run, data=alone, testOnly=True, nGPU=0))
    refused(result, 3, "zca are not kept .* has no training images .*; fix: name a --data")
    wrong = run(command(**source, testOnly=True, nGPU=0, preprocess="gcn"))
    assert wrong.code == 0 and f"Err {last['val_loss']:.4f}" not in wrong.out


def test_another_preprocessing_is_refused_on_resume(whitened_run, tmp_path):
    directory = shutil.copytree(whitened_run, tmp_path / "run")
    argv = command(resume=directory, preprocess="gcn", nEpochs=2)
    refused(run(argv), 2, "settings differ .*: preprocess gcn, was zca; fix: .*--override true")
    assert run([*argv, "--override=true"]).code == 0


def test_image_files_alone_are_refused_for_want_of_a_training_set(whitened_run, folder, capsys):
    assert classify.main([str(whitened_run), str(folder / "val")]) == UsageError.code
    line = "error: this network expects images after preprocess zca, not as they are; fix: "
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)
