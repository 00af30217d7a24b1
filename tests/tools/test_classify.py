"""Test that tools.classify names the classes that evaluation finds, on the same pixels."""

import csv
import io
import math
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from faults.contract import command
from helpers.inference import write_model
from helpers.run_main import run
from helpers.sample_data import noise
from tools import classify


def rows_of(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("small_run", ["--precision=double"]),
        ("large_run", []),
        ("large_run", ["--tenCrop=true"]),
    ],
    ids=str,
)
def test_the_error_counted_from_its_output_is_that_of_evaluation(name, flags, request, capsys):
    directory = request.getfixturevalue(name)
    images = directory.parent / "data" / "val"
    assert classify.main([str(directory), str(images), *flags, "--csv=-"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 2 * len(list(images.rglob("*.png")))
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
    """Write random weights of a network of seven classes, with their data."""
    flags = command(dataset="folder", imageSize=8, depth=10, growthRate=2)
    return write_model(tmp_path / "run", flags, list("abcdefg"))


@pytest.fixture
def images(tmp_path) -> Path:
    """Write two images in a directory."""
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(noise(2, 8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def test_classes_are_sorted_shares_of_a_whole_and_five_are_printed(weights, images, capsys):
    assert classify.main([str(weights), str(images), "--csv", "-", "--top", "99"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 2 * 7
    for image_rows in (rows[:7], rows[7:]):
        percents = [float(row["percent"]) for row in image_rows]
        assert [row["rank"] for row in image_rows] == list("1234567")
        assert sorted(row["class"] for row in image_rows) == list("abcdefg")
        assert percents == sorted(percents, reverse=True)
        assert sum(percents) == pytest.approx(100, abs=1e-3)

    assert classify.main([str(weights), str(images / "1.png")]) == 0
    name, *lines = capsys.readouterr().out.splitlines()
    assert name == str(images / "1.png") and len(lines) == 5
    assert [line.split()[-1] for line in lines] == [row["class"] for row in rows[7:12]]
    assert all(re.fullmatch(r" +\d+\.\d{3} %  [a-g]", line) for line in lines)


def test_an_image_that_cannot_be_read_stops_no_other(weights, images, capsys):
    (images / "0a.jpg").write_text("hello")
    alone = shutil.copy(images / "0a.jpg", images.parent / "alone.jpg")
    assert classify.main([str(weights), str(images), "--csv", "-", "--batchSize", "1"]) == 3
    told = capsys.readouterr()
    assert len(rows_of(told.out)) == 2 * 5
    line = rf"error: skipped image {images}/0a.jpg: [^\n]+; fix: [^\n]+\n"
    assert re.fullmatch(line, told.err)
    assert classify.main([str(weights), str(alone)]) == 3
    assert capsys.readouterr().out == ""


def test_a_csv_file_is_what_would_be_printed(weights, images, tmp_path, capsys):
    path, argv = tmp_path / "found.csv", [str(weights), str(images), "--csv"]
    assert classify.main([*argv, "-"]) == 0
    printed = capsys.readouterr().out
    assert classify.main([*argv, str(path)]) == 0
    assert path.read_text() == printed and capsys.readouterr().out == ""


def test_names_that_break_lines_are_escaped_on_the_terminal_and_raw_in_csv(
    tmp_path, images, capsys
):
    classes = ["line\nbreak", "\x1b[31mred", "plain é"]
    flags = command(dataset="folder", imageSize=8, depth=10, growthRate=2)
    weights = write_model(tmp_path / "odd", flags, classes)
    image = (images / "0.png").rename(images / "odd\n.png")
    assert classify.main([str(weights), str(image)]) == 0
    name, *lines = capsys.readouterr().out.splitlines()
    assert name == f"{images}/odd\\n.png"
    assert {line.split("%  ")[1] for line in lines} == {
        "line\\nbreak", "\\x1b[31mred", "plain é"
    }  # fmt: skip
    assert classify.main([str(weights), str(image), "--csv", "-"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert {row["class"] for row in rows} == {*classes} and rows[0]["image"] == str(image)
