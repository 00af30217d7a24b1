"""tools.classify names the classes that evaluation finds, on the same pixels."""

import csv
import io
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from faults.contract import TINY_FILES, command, tiny
from helpers.inference import write_model
from helpers.run_main import run
from helpers.sample_data import noise, write_folder
from tools import classify
from tools.inference import network
from tools.inference.images import Unreadable

COUNTS = {split: dict.fromkeys(("ant", "bee", "cat"), 7) for split in ("train", "val")}
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
    assert classify.main([str(directory), str(data / "val"), *flags, "--csv=-"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 3 * 21
    right = [row for row in rows if Path(row["image"]).parent.name == row["class"]]
    loss = -sum(math.log(float(row["percent"]) / 100) for row in right) / len(right)
    wrong = sum(row["rank"] != "1" for row in right)

    result = run([f"--resume={directory}", *flags, "--testOnly=true"])
    assert result.code == 0, result.err
    ((wanted_loss, wanted_error),) = re.findall(r"Err (\S+) +top1 +(\S+)", result.out)
    assert f"{100 * wrong / len(right):.3f}" == wanted_error
    assert loss == pytest.approx(float(wanted_loss), abs=2e-4)


@pytest.fixture
def weights(tmp_path) -> Path:
    """Random weights of a network of seven classes, with their data."""
    flags = command(dataset="folder", imageSize=8, depth=10, growthRate=2)
    return write_model(tmp_path / "run", flags, list("abcdefg"))


@pytest.fixture
def images(tmp_path) -> Path:
    """Two images in a directory."""
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(noise(2, 8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def test_classes_are_sorted_shares_of_a_whole(weights, images, capsys):
    assert classify.main([str(weights), str(images), "--csv", "-", "--top", "99"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 2 * 7
    for mine in (rows[:7], rows[7:]):
        percents = [float(row["percent"]) for row in mine]
        assert [row["rank"] for row in mine] == list("1234567")
        assert sorted(row["class"] for row in mine) == list("abcdefg")
        assert percents == sorted(percents, reverse=True)
        assert sum(percents) == pytest.approx(100, abs=1e-3)


def test_five_classes_are_shown_with_their_names(weights, images, capsys):
    assert classify.main([str(weights), str(images / "1.png")]) == 0
    name, *lines = capsys.readouterr().out.splitlines()
    assert name == str(images / "1.png") and len(lines) == 5
    assert all(re.fullmatch(r" +\d+\.\d{3} %  [a-g]", line) for line in lines)


def test_an_image_that_cannot_be_read_stops_no_other(weights, images, capsys):
    (images / "0a.jpg").write_text("hello")
    alone = shutil.copy(images / "0a.jpg", images.parent / "alone.jpg")
    assert classify.main([str(weights), str(images), "--csv", "-", "--batchSize", "1"]) == 3
    told = capsys.readouterr()
    assert len(rows_of(told.out)) == 2 * 5
    line = rf"error: cannot read image {images}/0a.jpg: [^\n]+; fix: [^\n]+\n"
    assert re.fullmatch(line, told.err)
    assert classify.main([str(weights), str(alone)]) == 3
    assert capsys.readouterr().out == ""


def test_a_csv_file_is_what_would_be_printed_and_replaced_only_when_asked(
    weights, images, tmp_path, capsys
):
    path, argv = tmp_path / "found.csv", [str(weights), str(images), "--csv"]
    assert classify.main([*argv, "-"]) == 0
    printed = capsys.readouterr().out
    path.write_text("precious")
    assert classify.main([*argv, str(path)]) == 2 and path.read_text() == "precious"
    assert classify.main([*argv, str(path), "--overwrite"]) == 0
    assert path.read_text() == printed and capsys.readouterr().out == ""


def test_images_come_in_the_order_they_are_named_whatever_the_batch(weights, images):
    net = network.load(weights, ["--batchSize=2"])
    paths = [str(images / f"{number}.png") for number in (1, 0, 0, 1, 1)]
    whole = torch.cat([net.logits(some) for some, _ in net.batches(paths, Unreadable())])
    assert torch.allclose(whole[[1, 1, 2, 0, 0]], whole[[2, 1, 1, 3, 4]], rtol=0, atol=1e-6)
    assert not torch.allclose(whole[0], whole[1], rtol=0, atol=1e-3)
    found = classify.classify(net, paths, Unreadable(), 1)
    assert [path for path, _ in found] == paths
