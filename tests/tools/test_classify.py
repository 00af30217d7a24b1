"""tools.classify names the classes that evaluation finds, on the same pixels."""

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiment.directory import RunDirectory
from faults.contract import TINY_FILES, command, tiny
from fileio import tensor_files
from helpers.run_main import run
from helpers.sample_data import noise, write_folder
from tools import classify
from tools.inference import network
from tools.inference.images import Unreadable

CLASSES = ("ant", "bee", "cat")
COUNTS = {split: dict.fromkeys(CLASSES, 7) for split in ("train", "val")}
NETWORKS = {
    "small": tiny(dataset="folder", nImages=None, nClasses=None, nThreads=0, nEpochs=1),
    "large": command(**TINY_FILES, nThreads=0, nEpochs=1),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Each network's run and data: three classes that are told apart by chance."""
    made = {}
    for name, flags in NETWORKS.items():
        root = tmp_path_factory.mktemp(name)
        write_folder(root / "data", COUNTS, 8 if name == "small" else 90)
        result = run([*flags, f"--data={root / 'data'}", f"--save={root / 'run'}"])
        assert result.code == 0, result.err
        made[name] = root / "run", root / "data"
    return made


def rows_of(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


def evaluated(flags: list[str]) -> tuple[float, str]:
    """Loss and error as --testOnly prints them."""
    result = run([*flags, "--testOnly=true"])
    assert result.code == 0, result.err
    ((loss, error),) = re.findall(r"Err (\S+) +top1 +(\S+)", result.out)
    return float(loss), error


def counted(rows: list[dict]) -> tuple[float, str]:
    """The same from the rows, of which there is one for each class of each image."""
    right = [row for row in rows if Path(row["image"]).parent.name == row["class"]]
    loss = -sum(math.log(float(row["percent"]) / 100) for row in right) / len(right)
    wrong = sum(row["rank"] != "1" for row in right)
    return loss, f"{100 * wrong / len(right):.3f}"


def classified(capsys, *argv: str) -> list[dict]:
    assert classify.main([*argv, "--csv=-"]) == 0
    return rows_of(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("small", []),
        ("small", ["--precision=double"]),
        ("large", []),
        ("large", ["--tenCrop=true"]),
    ],
    ids=str,
)
def test_the_error_counted_from_its_output_is_that_of_evaluation(runs, name, flags, capsys):
    directory, data = runs[name]
    rows = classified(capsys, str(directory), str(data / "val"), *flags)
    assert len(rows) == 3 * 21
    loss, error = counted(rows)
    wanted_loss, wanted_error = evaluated([f"--resume={directory}", *flags])
    assert error == wanted_error and loss == pytest.approx(wanted_loss, abs=2e-4)


def test_other_statistics_or_crops_would_be_noticed_in_the_loss(runs, tmp_path, capsys):
    directory, data = runs["small"]
    moved = Path(shutil.copytree(directory, tmp_path / "moved"))
    facts = json.loads((moved / "data.json").read_text())
    (moved / "data.json").write_text(json.dumps(facts | {"mean": [60.0, 60.0, 60.0]}))
    losses = [
        counted(classified(capsys, str(path / "model_last.pt"), str(data / "val")))[0]
        for path in (directory, moved)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3
    directory, data = runs["large"]
    losses = [
        counted(classified(capsys, str(directory), str(data / "val"), f"--tenCrop={ten}"))[0]
        for ten in ("true", "false")
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.fixture
def net_and_images(tmp_path) -> tuple[Path, Path]:
    """Random weights of a network of seven classes with their data, and two images."""
    import models.factory
    import opts

    flags = command(dataset="folder", imageSize=8, depth=10, growthRate=2)
    directory = tmp_path / "run"
    directory.mkdir()
    model = models.factory.create(opts.parse(flags), 7)
    tensor_files.save_weights(directory / "model_last.pt", model.state_dict())
    (directory / "config.yaml").write_text(opts.as_yaml(opts.parse(flags)))
    facts = {"classes": list("abcdefg"), "mean": [128.0] * 3, "std": [64.0] * 3}
    RunDirectory(directory).write_json("data.json", facts)
    images = tmp_path / "images"
    images.mkdir()
    for number, pixels in enumerate(noise(2, 8)):
        Image.fromarray(pixels).save(images / f"{number}.png")
    return directory / "model_last.pt", images


def test_classes_are_sorted_shares_of_a_whole(net_and_images, capsys):
    weights, images = net_and_images
    assert classify.main([str(weights), str(images), "--csv", "-", "--top", "99"]) == 0
    rows = rows_of(capsys.readouterr().out)
    for image in ("0.png", "1.png"):
        mine = [row for row in rows if row["image"].endswith(image)]
        percents = [float(row["percent"]) for row in mine]
        assert [row["rank"] for row in mine] == list("1234567")
        assert sorted(row["class"] for row in mine) == list("abcdefg")
        assert percents == sorted(percents, reverse=True)
        assert sum(percents) == pytest.approx(100, abs=1e-3)
    ((first, _),) = network.load(weights).batches([rows[0]["image"]], Unreadable())
    best = network.load(weights).logits(first).softmax(dim=1).max()
    assert float(rows[0]["percent"]) == pytest.approx(100 * best.item(), rel=1e-4)


def test_five_classes_are_shown_with_their_names(net_and_images, capsys):
    weights, images = net_and_images
    assert classify.main([str(weights), str(images / "1.png")]) == 0
    name, *lines = capsys.readouterr().out.splitlines()
    assert name == str(images / "1.png") and len(lines) == 5
    assert all(re.fullmatch(r" +\d+\.\d{3} %  [a-g]", line) for line in lines)


def test_an_image_that_cannot_be_read_stops_no_other(net_and_images, capsys):
    weights, images = net_and_images
    (images / "0a.jpg").write_text("hello")
    alone = shutil.copy(images / "0a.jpg", images.parent / "alone.jpg")
    assert classify.main([str(weights), str(images), "--csv", "-", "--batchSize", "1"]) == 3
    told = capsys.readouterr()
    assert len(rows_of(told.out)) == 2 * 5
    assert re.fullmatch(
        rf"error: cannot read image {images}/0a.jpg: [^\n]+; fix: [^\n]+\n", told.err
    )
    assert classify.main([str(weights), str(alone)]) == 3
    assert capsys.readouterr().out == ""


def test_a_csv_file_is_whole_and_replaced_only_when_asked(net_and_images, tmp_path, capsys):
    weights, images = net_and_images
    command_line = [str(weights), str(images), "--csv", str(tmp_path / "found.csv")]
    assert classify.main(command_line) == 0
    assert capsys.readouterr().out == ""
    written = (tmp_path / "found.csv").read_text()
    assert classify.main([*command_line[:3], "-"]) == 0
    assert capsys.readouterr().out == written
    (tmp_path / "found.csv").write_text("precious")
    assert classify.main(command_line) == 2
    assert (tmp_path / "found.csv").read_text() == "precious"
    assert classify.main([*command_line, "--overwrite"]) == 0
    assert (tmp_path / "found.csv").read_text() == written


def test_images_come_in_the_order_they_are_named_whatever_the_batch(net_and_images):
    weights, images = net_and_images
    net = network.load(weights, ["--batchSize=2"])
    paths = [str(images / f"{number}.png") for number in (1, 0, 0, 1, 1)]
    whole = torch.cat([net.logits(some) for some, _ in net.batches(paths, Unreadable())])
    assert torch.allclose(whole[[1, 1, 2, 0, 0]], whole[[2, 1, 1, 3, 4]], rtol=0, atol=1e-6)
    assert not torch.allclose(whole[0], whole[1], rtol=0, atol=1e-3)
    found = classify.classify(net, paths, Unreadable(), 1)
    assert [path for path, _ in found] == paths
