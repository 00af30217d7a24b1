"""Test that a network's own data is found, read in evaluation form, and never mislabelled."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from errors import CheckpointError, DataError, RunError
from faults.contract import command, tiny
from helpers.inference import write_model
from helpers.run_main import run
from helpers.sample_data import error_line
from tools.inference import data, network

NETWORK = {"dataset": "folder", "imageSize": 8, "depth": 10, "growthRate": 2}


def pixels_of(net: network.LoadedModel, batch: torch.Tensor) -> np.ndarray:
    """Undo the normalisation of (n, C, H, W): (n, H, W, C) uint8."""
    scaled = batch.permute(0, 2, 3, 1).double().numpy() * net.std + net.mean
    return scaled.round().astype(np.uint8)


def check(net: network.LoadedModel, split, slip: int = 0) -> list[int]:
    """Assert that each image read is the file of its number; return the numbers."""
    names, labels, found = data.names(split), data.labels(split), []
    names = names[slip:] + names[:slip]
    for batch, numbers in data.read(net, split):
        for pixels, number in zip(pixels_of(net, batch), numbers, strict=True):
            assert (pixels == np.asarray(Image.open(names[number]))).all()
            assert Path(names[number]).parent.name == net.classes[labels[number]]
            found.append(number)
    return found


@pytest.fixture
def moved(small_run, tmp_path) -> Path:
    """Copy the data, so that a test may change it."""
    return Path(shutil.copytree(small_run.parent / "data", tmp_path / "data"))


def test_each_image_has_the_name_and_the_class_of_its_file(small_run, moved):
    flags = [f"--data={moved}", "--batchSize=2", "--onBadImage=skip"]
    net = network.load(small_run, flags)
    split = data.open_data(net).val
    assert check(net, split) == [*range(7)]
    with pytest.raises(AssertionError):
        check(net, split, slip=1)
    Path(data.names(split)[2]).write_text("no image")
    assert check(net, data.open_data(net).val) == [0, 1, 3, 4, 5, 6]
    assert "cannot read image" in error_line(
        lambda: check(network.load(small_run, flags[:2]), split_of(small_run, flags[:2]))
    )


def split_of(path: Path, flags: list[str]):
    return data.open_data(network.load(path, flags)).val


def test_the_data_of_the_run_is_read_where_it_still_is(small_run, tmp_path, moved, monkeypatch):
    own = str(small_run.parent / "data")
    assert network.load(small_run).opt.data == own
    assert network.load(small_run, [f"--data={moved}"]).opt.data == str(moved)
    copy = Path(shutil.copytree(small_run, tmp_path / "run"))
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(own, "/gone"))
    monkeypatch.chdir(tmp_path / "run")
    line = error_line(split_of, copy / "model_last.pt", [])
    assert "no directory data in" in line and "--data DIR" in line
    monkeypatch.chdir(tmp_path)  # has one of that name
    assert len(data.names(split_of(copy / "model_last.pt", []))) == 7


def test_other_classes_are_refused_and_unnamed_ones_take_the_datas(small_run, moved, tmp_path):
    (moved / "val" / "bee").rename(moved / "val" / "wasp")
    line = error_line(split_of, small_run, [f"--data={moved}"], of=CheckpointError)
    assert "has wasp" in line
    alone = shutil.copy(small_run / "model_last.pt", tmp_path / "alone.pt")
    flags = [*command(**NETWORK, inputRange="0,1"), f"--data={moved}"]
    net = network.load(Path(alone), flags)
    assert (net.classes, net.has_names) == (["0", "1"], False)
    assert data.open_data(net).classes == ["ant", "wasp"]
    shutil.copytree(moved / "val" / "ant", moved / "val" / "fly")
    assert "2 classes, the data has 3" in error_line(split_of, alone, flags, of=CheckpointError)


def test_a_folder_may_lack_classes_whose_names_are_numbers(tmp_path):
    weights = write_model(tmp_path / "run", command(**NETWORK), list("012"))
    for name in "02":
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / "val" / name / "a.png")
    net = network.load(weights, [f"--data={tmp_path / 'data'}"])
    assert data.labels(data.open_data(net).val).tolist() == [0, 2]
    # Weights that are not known to have names are numbered as the folder is, and so do not fit.
    with pytest.raises(RunError):
        data.open_data(replace(net, has_names=False))


@pytest.mark.parametrize("flags", [["--augment=true"], ["--tenCrop=true"]], ids=str)
def test_calibration_spreads_plain_training_images_over_the_set(request, flags):
    directory = request.getfixturevalue("large_run" if "tenCrop" in flags[0] else "small_run")
    net = network.load(directory, flags)
    split = data.open_data(net, training=True).train
    batches = [*data.calibration_batches(net, 4)]
    assert sum(map(len, batches)) == 4 and batches[0].shape[1:] == (3, *2 * [net.opt.imageSize])
    total = len(split.images)
    places = [total * i // 4 for i in range(4)]
    assert len({data.labels(split)[place].item() for place in places}) == 2
    wanted = torch.cat([images for images, _ in data.read(replace(net, opt=net.opt.replace(
        tenCrop=False)), split, torch.tensor(places))])  # fmt: skip
    assert torch.equal(torch.cat(batches), wanted)
    if net.opt.imageSize == 8:  # in memory: the files, neither shifted nor mirrored
        files = sorted((directory.parent / "data" / "train").rglob("*.png"))
        shown = [np.asarray(Image.open(files[place])) for place in places]
        assert (pixels_of(net, torch.cat(batches)) == shown).all()
    assert sum(map(len, data.calibration_batches(net, 999))) == total


def test_whitened_images_are_those_of_the_training_set(tmp_path):
    flags = tiny(dataset="digits", nImages=None, nClasses=None, preprocess="zca", nEpochs=1)
    flags = [flag for flag in flags if not flag.startswith("--imageSize")]
    assert run([*flags, f"--save={tmp_path / 'run'}"]).code == 0
    net = network.load(tmp_path / "run")
    split = data.open_data(net).val
    (batch, numbers), *_ = data.read(net, split)
    assert data.names(split)[numbers[1]] == "val[1]"
    assert data.names(split, "test")[1] == "test[1]"
    assert torch.equal(batch[1].permute(1, 2, 0), split.images.pixels[1])
    assert batch.dtype == torch.float32 and batch.std() < 3  # pixels would be up to 255
    with pytest.raises(DataError, match="no directory"):
        split_of(tmp_path / "run", ["--dataset=folder", "--data=/gone", "--preprocess=normalise"])
