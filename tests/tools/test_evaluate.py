"""Test that tools.evaluate counts what --testOnly counts, and draws and writes what it counted."""

import csv
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sklearn_metrics

from engine.metrics import Metrics
from errors import CheckpointError
from experiment import confusion, drawing
from faults.contract import command, tiny
from helpers.inference import logits, write_model
from helpers.run_main import run
from helpers.sample_data import noise
from tools import classify
from tools.cli import ROOT
from tools.evaluate import __main__ as evaluate
from tools.evaluate import drawings, predictions
from tools.export import __main__ as export
from tools.inference import data, network

CLASSES = list("abcdefg")
FILES = {*evaluate.FILES, "predictions.csv"}


def read(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open(newline="")))


def evaluated(capsys, *argv: object) -> str:
    """Run the tool, and return what it prints."""
    capsys.readouterr()
    assert evaluate.main([*map(str, argv), "--predictions=true"]) == 0
    return capsys.readouterr().out


@pytest.fixture
def weights(tmp_path) -> Path:
    """Write random weights of seven classes, and 40 test images below `data`."""
    flags = command(dataset="folder", imageSize=8, depth=10, growthRate=2, batchSize=16)
    for number, pixels in enumerate(noise(40, 8)):
        path = tmp_path / "data" / "val" / CLASSES[number % 7] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return write_model(tmp_path / "run", flags, CLASSES)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("small_run", ["--precision=double"]),
        ("small_run", ["--precision=bf16", "--batchSize=3"]),
        ("small_run", ["onnx"]),
        ("large_run", ["--onBadImage=skip"]),
        ("large_run", ["--tenCrop=true"]),
    ],
    ids=str,
)
def test_the_error_is_that_of_evaluation_and_of_tools_classify(
    name, flags, request, tmp_path, capsys
):
    directory = source = request.getfixturevalue(name)
    images = Path(shutil.copytree(directory.parent / "data", tmp_path / "data"))
    if flags == ["onnx"]:
        source, flags = tmp_path / "net.onnx", []
        assert export.main([str(directory), "--to=onnx", f"--output={source}"]) == 0
    if "--onBadImage=skip" in flags:
        next((images / "val").rglob("*.png")).write_text("no image")
    flags = [*flags, f"--data={images}"]
    told = evaluated(capsys, source, *flags, f"--output={tmp_path / 'out'}")
    tested = run([f"--resume={directory}", *flags, "--testOnly=true"])
    (line,) = (line for line in tested.out.splitlines() if line.startswith(" * Results"))
    assert told.splitlines()[0] == line
    rows = read(tmp_path / "out" / "predictions.csv")
    classify.main([str(source), str(images / "val"), *flags, "--csv", str(tmp_path / "c.csv")])
    first = {row["image"]: row for row in read(tmp_path / "c.csv") if row["rank"] == "1"}
    assert [row["image"] for row in rows] == [*first]
    for row in rows:
        assert Path(row["image"]).parent.name == row["class"]
        assert row["taken_for"] == first[row["image"]]["class"]
        assert row["percent"] == first[row["image"]]["percent"]
    wrong = sum(row["class"] != row["taken_for"] for row in rows)
    assert f"top1: {100 * wrong / len(rows):6.3f} " in line


def test_every_count_is_that_of_scikit_learn(weights, tmp_path, capsys):
    out = tmp_path / "out"
    told = evaluated(capsys, weights, f"--data={tmp_path / 'data'}", f"--output={out}")
    assert {path.name for path in out.iterdir()} == FILES
    net = network.load(weights)
    rows = read(out / "predictions.csv")
    scores = logits(net, [row["image"] for row in rows]).numpy()
    labels = [CLASSES.index(Path(row["image"]).parent.name) for row in rows]
    matrix = sklearn_metrics.confusion_matrix(labels, scores.argmax(1), labels=range(7))
    header, *lines = csv.reader((out / "confusion.csv").open(newline=""))
    assert header == ["class", *CLASSES] and [line[0] for line in lines] == CLASSES
    assert [[int(cell) for cell in line[1:]] for line in lines] == matrix.tolist()

    by_class = {row["class"]: row for row in read(out / "per_class.csv")}
    recall = sklearn_metrics.recall_score(labels, scores.argmax(1), average=None)
    for name, right in zip(CLASSES, recall, strict=True):
        assert float(by_class[name]["error, %"]) == pytest.approx(100 - 100 * right, 1e-5)
    percents = [float(row["error, %"]) for row in read(out / "per_class.csv")]
    assert percents == sorted(percents, reverse=True)
    assert evaluate.table([("a", 50 / 3, 2000000)]) == b"a,16.6667,2000000\n"
    # The curve in the picture is a function of the ranks.
    ranks = np.array([int(row["rank_of_class"]) for row in rows])
    for k in range(1, 7):
        accuracy = sklearn_metrics.top_k_accuracy_score(labels, scores, k=k)
        assert (ranks <= k).mean() == pytest.approx(accuracy)
    sure = np.exp(scores.astype(float)) / np.exp(scores.astype(float)).sum(1, keepdims=True)
    for row, values, label in zip(rows, sure, labels, strict=True):
        assert float(row["percent"]) == pytest.approx(100 * values.max(), rel=1e-4)
        assert float(row["percent_of_class"]) == pytest.approx(100 * values[label], rel=1e-4)
    error = plain_ece(sure.max(1), ranks == 1)
    assert f"expected calibration error: {100 * error:.3f} %, of 40 images" in told


def plain_ece(sure: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Compute equation 3 of Guo et al. (2017) bin by bin."""
    error = 0.0
    for m in range(bins):
        inside = [i for i, p in enumerate(sure) if m / bins < p <= (m + 1) / bins]
        if inside:
            accuracy = sum(bool(right[i]) for i in inside) / len(inside)
            error += abs(accuracy - sum(sure[i] for i in inside) / len(inside)) * len(inside)
    return error / len(sure)


def test_calibration_is_that_of_guo_and_others():
    rng = np.random.default_rng(0)
    for count in (1, 7, 500):
        sure = np.append(rng.random(count) ** 0.5, [0.2, 1 / 3, 1.0])  # three are upper limits
        right = rng.random(count + 3) < 0.6  # too sure in some bins, not sure enough in others
        *bins, ece = predictions.calibration(sure, right)
        assert ece == pytest.approx(plain_ece(sure, right), abs=1e-12)
        assert bins[0].sum() == count + 3
    assert abs(ece - plain_ece(sure, right, bins=14)) > 1e-4
    limits, *_ = predictions.calibration(np.array([0.2, 1 / 3, 1.0]), np.ones(3))
    assert limits.nonzero()[0].tolist() == [2, 4, 14]  # the upper limit of a bin is in it


def test_of_equal_logits_the_first_is_the_one_that_the_errors_count(weights, tmp_path):
    net = network.load(weights, [f"--data={tmp_path / 'data'}"])
    with torch.no_grad():
        net.model.classifier.weight.zero_()
        bias = net.model.classifier.bias.copy_(torch.tensor([0.0, 1, 1, 1, 1, 1, 1]))
    metrics = Metrics(net.device, 7)
    found, _ = predictions.predict(net, data.open_data(net).val, metrics)
    wrong = metrics.compute()
    for k, name in ((1, "top1"), (5, "top5")):
        assert 100 * (found.ranks > k).mean() == pytest.approx(wrong[name])
    assert ((found.taken == found.targets) == (found.ranks == 1)).all()
    assert {*found.ranks[found.targets == 0].tolist()} == {7}
    bias.data[0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        predictions.predict(net, data.open_data(net).val, metrics)


def test_the_mistakes_shown_are_the_surest_with_their_own_pixels(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "MISTAKES", 9)
    net = network.load(weights, [f"--data={tmp_path / 'data'}", "--batchSize=4"])
    split = data.open_data(net).val
    found, worst = predictions.predict(net, split, Metrics(net.device, 7))
    wrong = np.flatnonzero(found.taken != found.targets)
    assert [place for _, place, _ in worst] == sorted(wrong, key=lambda i: -found.sure[i])[:9]
    assert all(image.untyped_storage().nbytes() == 4 * image.numel() for *_, image in worst)
    names = data.names(split)
    figure = drawings.mistakes(net, found, worst, names, CLASSES)
    for axes, (_, place, _) in zip(figure.axes, worst, strict=False):
        path = names[found.numbers[place]]
        assert (axes.images[0].get_array() == np.asarray(Image.open(path))).all()
        end, is_class, named = axes.get_title().split("\n")
        assert end == f"{Path(path).parent.name}/{Path(path).name}" and is_class[3:] == end[0]
        assert named == f"{100 * found.sure[place]:.1f} % {CLASSES[found.taken[place]]}"
    assert "no mistakes" in drawings.mistakes(net, found, [], names, CLASSES).get_suptitle()


def test_whitened_images_in_memory_are_evaluated_by_their_place(tmp_path, capsys):
    flags = tiny(dataset="digits", nImages=None, nClasses=None, preprocess="zca", nEpochs=1)
    assert run([*flags, f"--save={tmp_path / 'run'}"]).code == 0
    told = evaluated(capsys, tmp_path / "run", f"--output={tmp_path / 'out'}")
    tested = run([f"--resume={tmp_path / 'run'}", "--testOnly=true"]).out
    assert told.splitlines()[0] == tested.splitlines()[-1]
    assert read(tmp_path / "out" / "predictions.csv")[3]["image"] == "val[3]"


def test_independent_outputs_are_ranked_by_logits_and_calibrated(weights, tmp_path):
    net = network.load(weights, [f"--data={tmp_path / 'data'}"])
    object.__setattr__(net, "thresholds", [0.9, 0.1, *[0.5] * 5])
    found, _ = predictions.predict(net, data.open_data(net).val, Metrics(net.device, 7))
    paths = [data.names(data.open_data(net).val)[number] for number in found.numbers]
    scores = torch.cat([net.scores(images) for images, _ in net.batches(paths)])
    assert (found.taken == logits(net, paths).argmax(1).numpy()).all()
    assert np.allclose(found.sure, scores[range(40), found.taken])
    assert (scores.argmax(1).numpy() != found.taken).any()  # --testOnly counts logits


def test_files_are_equal_and_replaced_only_when_asked(weights, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [str(weights), f"--data={tmp_path / 'data'}", f"--output={out}"]
    evaluated(capsys, *argv)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert evaluate.main(argv) == 2
    assert "exists; fix: name another, or add --overwrite true" in capsys.readouterr().err
    evaluated(capsys, *argv, "--overwrite=true")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert evaluate.main([*argv, "--overwrite=true"]) == 0  # without --predictions
    del before["predictions.csv"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_many_classes_have_all_but_the_matrix(weights, tmp_path, monkeypatch, capsys):
    argv = [weights, f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}"]
    told = evaluated(capsys, *argv)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("engine.metrics.MAX_CLASSES", 6)
    assert evaluate.main([*map(str, argv), "--predictions=true", "--overwrite=true"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "note: no confusion.csv and confusion.png of 7 classes\n"
    assert printed.out.splitlines()[:-1] == told.splitlines()[:-1]
    del before["confusion.csv"], before["confusion.png"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_worst_and_the_best_classes_are_told_apart(weights, tmp_path, monkeypatch, capsys):
    shutil.rmtree(tmp_path / "data" / "val" / "c")
    argv = [weights, f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}"]
    monkeypatch.setattr(evaluate, "LINES", 2)
    rows = read_told(evaluated(capsys, *argv))
    written = [row["class"] for row in read(tmp_path / "out" / "per_class.csv")]
    assert written[-1] == "c" and rows == [*written[:2], "...", *written[4:6]]
    monkeypatch.setattr(evaluate, "LINES", 3)
    assert read_told(evaluated(capsys, *argv, "--overwrite=true")) == written[:6]


def read_told(told: str) -> list[str]:
    """Return the first cells of the printed table."""
    return re.findall(r"^\| (\S+)", told, re.MULTILINE)[1:]


@pytest.mark.parametrize(
    ("argv", "code", "shown"),
    [
        (["RUN", "OTHER"], 2, "OTHER is one checkpoint too many"),
        (["RUN", "--output=RUN"], 2, "is not a directory; fix: name another --output\n"),
        (["RUN", "--output=RUN", "--overwrite=true"], 2, "is not a directory; fix: name another"),
        (["RUN", "--output=nowhere/out"], 6, "no directory nowhere"),
        (["nothing"], 4, "no such file or directory: nothing"),
        (["RUN", "--data=nothing"], 3, "no directory nothing"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_writes_nothing(
    argv, code, shown, weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([str(weights) if word == "RUN" else word.replace("RUN", str(weights))
                          for word in argv]) == code  # fmt: skip
    told = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+; fix: [^\n]+\n", told.err) and shown in told.err
    assert not (tmp_path / "evaluation").exists()


# The pictures:
@pytest.mark.parametrize("num_classes", [7, 21, 60, 1000])
def test_the_numbers_of_the_curves_are_legible(num_classes):
    bins, ranks = [np.arange(15), np.ones(15), np.ones(15)], np.arange(num_classes) + 1
    figure = drawings.curves(bins, 0.1, ranks, num_classes)
    drawing.render(figure, "png")
    axis = figure.axes[2].xaxis
    labels = {label.get_text() for label in axis.get_ticklabels(which="both")} - {""}
    assert {"7": {"2", "4", "6"}}.get(str(num_classes), {"1", "10"}) <= labels
    assert all(re.fullmatch(r"[\d.]+", label) for label in labels)


@pytest.mark.parametrize("module", ["experiment.drawing", "tools.evaluate.drawings",
                                    "tools.figures.plots", "tools.inference.overlays"])  # fmt: skip
def test_the_backend_of_a_notebook_is_not_needed(module):
    code = f"import {module}; import matplotlib; print(matplotlib.get_backend())"
    environment = os.environ | {"MPLBACKEND": "module://absent.backend"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert (told.returncode, told.stdout) == (0, "agg\n"), told.stderr


@pytest.mark.parametrize("num_classes", [2, 7, 25, 26, 1000])
def test_a_matrix_is_legible_and_shows_every_count(num_classes):
    rng = np.random.default_rng(num_classes)
    counts = rng.poisson(2 / num_classes, (num_classes, num_classes)) + 9 * np.eye(
        num_classes, dtype=int
    )
    counts[1, 0] = 7
    classes = [f"$c_{{{number}}}$ " + 40 * "é" for number in range(num_classes)]
    figure = drawing.confusion(counts, classes)
    again = drawing.confusion(counts, classes)
    assert drawing.render(figure, "png") == drawing.render(again, "png")
    (matrix, *lists) = figure.axes
    colours = matrix.images[0].get_array()
    if num_classes <= drawing.NAMED_CLASSES:
        shown = {tuple(map(round, text.get_position())): text.get_text() for text in matrix.texts}
        assert shown == {(j, i): str(counts[i, j]) for i, j in zip(*counts.nonzero(), strict=True)}
        names = [label.get_text() for label in matrix.get_yticklabels()]
        assert [name[:4] for name in names] == [name[:4] for name in classes]
    else:
        texts = [text.get_text() for text in lists[0].texts]
        assert texts[0].startswith(f" {classes[1][:9]}") and len(texts) == drawing.LISTED
        assert lists[0].patches[0].get_width() == 7
    block = -(-num_classes // drawing.MAX_CELLS)
    for i, j in ((1, 0), (num_classes - 1, num_classes - 1)):
        value = colours[i // block, j // block]  # above 0 is blue
        assert (value > 0) == (i // block == j // block) and value != 0
    labels = [text for text in figure.findobj() if hasattr(text, "get_parse_math")]
    assert not any(text.get_parse_math() for text in labels)


def test_a_class_without_images_has_no_error_and_confusions_are_in_order():
    counts = confusion.pairs_of(np.array([[3, 1, 0], [0, 0, 0], [5, 5, 2]]))
    rows = confusion.by_class(counts, ["a", "b|", "c"])
    assert [row[0] for row in rows] == ["c", "a", "b|"] and math.isnan(rows[2][3])
    assert rows[0][1:] == (12, 10, pytest.approx(1000 / 12), "a")
    assert confusion.most_frequent(counts, list("abc"), 9) == [
        (5, "c", "a"), (5, "c", "b"), (1, "a", "b")
    ]  # fmt: skip
    assert confusion.as_markdown(rows)[-1] == "| b\\|   |      0 |      0 |      nan |  |"
