"""Test runs with --nChannels, --inputRange and --bnEps from the command line, to their end."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from faults.contract import TINY_FILES, command, records, refused, tiny, write_files
from helpers.run_main import run

FILES = {**TINY_FILES, "nThreads": 0, "nGPU": 0}
CHOSEN = {"nChannels": 1, "bnEps": 1.001e-5, "inputRange": "-1024,1024"}


@pytest.fixture(scope="module")
def grey(tmp_path_factory) -> Path:
    """Train two epochs on grey files; return the run, beside whose directory lies `data`."""
    root = tmp_path_factory.mktemp("grey")
    write_files(root / "data")
    result = run(command(**FILES, nChannels=1, data=root / "data", save=root / "run", nEpochs=2))
    assert result.code == 0, result.err
    assert result.err == "note: grey images: lighting and saturation, which change colours, are " \
                         "left out\n"  # fmt: skip
    return root / "run"


def losses(save: Path) -> list[tuple]:
    return [(record["train_loss"], record["val_loss"]) for record in records(save)]


def weights(save: Path) -> dict[str, torch.Tensor]:
    return torch.load(save / "model_last.pt", weights_only=True)


def test_a_grey_run_records_its_statistics_and_is_tested_with_them(grey):
    data = json.loads((grey / "data.json").read_text())
    assert len(data["mean"]) == len(data["std"]) == 1
    assert weights(grey)["features.conv0.weight"].shape == (4, 1, 7, 7)
    # A test with other training images still uses them.
    images = grey.parent / "data"
    for path in (images / "train").glob("*/*"):
        path.rename(path.with_suffix(".gone"))
    line = {**FILES, "data": images, "testOnly": True}
    tested = [
        run(command(**line, resume=grey)),
        run(command(**line, nChannels=1, retrain=grey / "model_last.pt")),
        run(command(**line, resume=grey, tenCrop=True, resize="torch7")),
    ]
    for path in (images / "train").glob("*/*"):
        path.rename(path.with_suffix(".png"))
    assert [result.code for result in tested] == [0, 0, 0], [result.err for result in tested]
    loss = losses(grey)[-1][1]
    for result in tested[:2]:
        (found,) = re.findall(r"\| Test: .*Err (\S+)|Err (\S+)", result.out)[-1:]
        assert float(found[0] or found[1]) == pytest.approx(loss, abs=1e-3)


def test_a_stopped_run_goes_on_with_what_only_its_checkpoint_says(tmp_path):
    write_files(tmp_path / "data")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    line = {**FILES, "data": tmp_path / "data", "optMemory": 3}
    for save, epochs in ((whole, 2), (halves, 1)):
        result = run(command(**line, **CHOSEN, save=save, nEpochs=epochs, milestones=9))
        assert result.code == 0, result.err
    config = yaml.safe_load((halves / "config.yaml").read_text())
    recorded = {name: config[name] for name in CHOSEN}
    assert recorded == CHOSEN | {"inputRange": [-1024, 1024], "bnEps": recorded["bnEps"]}
    assert float(recorded["bnEps"]) == 1.001e-5
    # As after --retrain FILE, whose weights have brought them: no flag and no config says it.
    (halves / "config.yaml").unlink()
    again = {"save": halves, "resume": "auto", "nEpochs": 2, "milestones": 9}
    result = run(command(**line, **again))
    assert result.code == 0, result.err
    assert losses(halves) == losses(whole)
    assert all(torch.equal(weights(whole)[n], tensor) for n, tensor in weights(halves).items())
    data = [json.loads((save / "data.json").read_text()) for save in (whole, halves)]
    assert data[0] == data[1] and data[0]["mean"] == [127.5]
    # Others are another network, or need an override.
    other = command(**line, **again | {"nEpochs": 3})
    refused(run([*other, "--bnEps=1e-3"]), 4, "with bnEps=1.001e-05, settings say bnEps=0.001")
    refused(run([*other, "--nChannels=3"]), 4, "with nChannels=1, settings say nChannels=3")
    differs = r"inputRange 0\.0,1\.0, was -1024\.0,1024\.0"
    refused(run([*other, "--inputRange=0,1"]), 2, differs)
    result = run([*other, "--inputRange=0,1", "--override=true"])
    assert result.code == 0 and re.search(f"override: {differs}", result.err), result.err
    assert json.loads((halves / "data.json").read_text())["std"] == [255]


def test_a_checkpoint_of_before_has_the_defaults(tmp_path):
    flags = {"nGPU": 0, "save": tmp_path, "nEpochs": 1, "milestones": 9}
    assert run(tiny(**flags)).code == 0
    config = (tmp_path / "config.yaml").read_text()
    kept = [
        line for line in config.splitlines() if line.partition(":")[0] not in ("nChannels", "bnEps")
    ]
    (tmp_path / "config.yaml").write_text("\n".join(kept))
    refused(run(tiny(**flags | {"nEpochs": 2}, resume="auto", bnEps=1e-3)), 4, "settings say bnEps")
    result = run(tiny(**flags | {"nEpochs": 2}, resume="auto"))
    assert result.code == 0 and len(records(tmp_path)) == 2


def test_synthetic_images_of_four_channels_train_and_are_drawn(tmp_path):
    result = run(tiny(nGPU=0, nChannels=4, save=tmp_path, nEpochs=1, milestones=9))
    assert result.code == 0 and "TensorBoard" not in result.err, result.err
    assert weights(tmp_path)["features.conv0.weight"].shape[1] == 4


def test_weights_of_other_channels_are_adapted_on_request_or_refused(grey, tmp_path):
    three = {"data": grey.parent / "data", "retrain": grey / "model_last.pt"}
    advice = "; fix: use --nChannels 1, or add --adaptChannels true$"
    line = command(**FILES, **three, save=tmp_path / "a", nEpochs=1)
    refused(run(line), 4, advice)
    result = run([*line, "--adaptChannels=true"])
    note = "note: features.conv0.weight takes 1 channels: repeated over 3, and scaled\n"
    assert result.code == 0 and note in result.err, result.err
    tested = command(**FILES, **three, testOnly=True)
    refused(run(tested), 4, advice)
    result = run([*tested, "--adaptChannels=true"])
    assert result.code == 0 and note in result.err, result.err
    refused(run(command(**FILES, data=three["data"], adaptChannels=True)), 2, "without weights")
