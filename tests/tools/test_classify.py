"""Test that tools.classify names the classes that evaluation finds, on the same pixels."""

import csv
import io
import math
import re
import shutil
from pathlib import Path

import numpy as np
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


def test_pictures_lie_in_folders_as_their_images_do_and_change_no_answer(weights, images, capsys):
    for folder in ("one", "other"):
        (images / folder).mkdir()
        Image.new("RGB", (200, 30), "red").save(images / folder / "same.jpg")
    (images / "broken.png").write_text("hello")
    argv = [str(weights), str(images), "--csv", "-", "--top", "2"]
    assert classify.main(argv) == 3
    wanted = rows_of(capsys.readouterr().out)
    pngs = images.parent / "new" / "maps"
    contents = []
    for overwrite in ("false", "true"):
        assert classify.main([*argv, "--cam", str(pngs), "--overwrite", overwrite]) == 3
        for got, row in zip(rows_of(capsys.readouterr().out), wanted, strict=True):
            # A hook lets the last dense block run as plain modules, which round differently.
            assert float(got.pop("percent")) == pytest.approx(float(row["percent"]), rel=1e-4)
            assert got.items() <= row.items()
        found = sorted(path for path in pngs.rglob("*") if path.is_file())
        names = ["0.png.png", "1.png.png", "one/same.jpg.png", "other/same.jpg.png"]
        assert [str(path.relative_to(pngs)) for path in found] == names
        contents.append([path.read_bytes() for path in found])
    assert contents[0] == contents[1]
    # Three panels of 8 x 8 pixels, each as 20 x 20; two rows would be as wide as a line of 200.
    em, bar = 12, 7 * 12
    assert Image.open(found[0]).size == (2 * (160 + em) + em + bar, 2 * (160 + 3 * em) + em)
    assert Image.open(found[2]).size == (200 + 2 * em + bar, 3 * (30 + 3 * em) + em)

    pngs.joinpath("0.png.png").write_text("mine")
    (images / "2.png").symlink_to(images / "0.png")
    assert classify.main([*argv, "--cam", str(pngs)]) == 2
    assert "0.png.png exists; fix: name another, or add --overwrite true" in capsys.readouterr().err
    assert pngs.joinpath("0.png.png").read_text() == "mine"
    assert not pngs.joinpath("2.png.png").exists()


def test_a_name_of_any_letters_and_length_is_drawn_within_its_panel(tmp_path, images):
    flags = command(dataset="folder", imageSize=8, depth=10, growthRate=2)
    plain = write_model(tmp_path / "plain", flags, ["a", "b"])
    odd = tmp_path / "classes"
    odd.write_text("$x^2$ \\alpha \u72ac\n" + 200 * "W" + "\n", encoding="utf-8")
    sheets = []
    for number, more in enumerate(([], ["--classes", str(odd)])):
        pngs = tmp_path / str(number)
        assert classify.main([str(plain), str(images / "0.png"), "--cam", str(pngs), *more]) == 0
        sheets.append(np.asarray(Image.open(pngs / "0.png.png")).astype(int))
    differs = (sheets[0] != sheets[1]).any(2)
    columns = np.nonzero(differs)[1]
    assert differs.any() and not differs[36:196].any() and not differs[232:].any()
    assert set(columns) <= {*range(12, 172), *range(184, 344)}


@pytest.mark.parametrize(
    ("name", "more", "code", "message"),
    [
        ("large_run", ["--cam=maps", "--tenCrop=true"], 2, "a class activation map is of one crop"),
        ("small_run", ["--cam=maps", "--preprocess=gcn"], 2, "this network expects"),
        ("small_run", ["--cam=FILE/maps"], 6, "cannot write in FILE"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_one_line(
    name, more, code, message, request, images, capsys, monkeypatch
):
    monkeypatch.chdir(images)
    Path("FILE").write_text("mine")
    argv = [str(request.getfixturevalue(name)), "0.png", *more]
    assert classify.main(argv) == code
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not [*images.rglob("*.png.png")]
